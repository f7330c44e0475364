"""Fixtures of the whole suite: the device axis, the real data, seeds and threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

# its asserts are the contract's, and should explain themselves as a test module's do
pytest.register_assert_rewrite("contract")

_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        action="append",
        choices=["cpu", "cuda"],
        help="device of the tests that take one; may be given twice (default: cpu)",
    )
    parser.addoption(
        "--slow", action="store_true", help="run those too that are marked as slow, as .ci/run does"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: tracing that takes a minute; runs with --slow alone")
    # small images gain nothing from threads, which wait for each other where cores are shared
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes a minute: --slow runs it, as .ci/run does"))


def pytest_generate_tests(metafunc):
    own = [str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")]
    if "device" in metafunc.fixturenames and not any("device" in names.split(",") for names in own):
        devices = metafunc.config.getoption("--device") or ["cpu"]
        missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
        marks = {"cpu": (), "cuda": missing}
        chosen = [pytest.param(name, marks=marks[name]) for name in dict.fromkeys(devices)]
        metafunc.parametrize("device", chosen, indirect=True)


@pytest.fixture
def device(request) -> torch.device:
    """Where a test runs: `pytest --device cpu --device cuda`."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, for libraries that draw from the global generator


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, which a user's machine does not have."""
    if not _DATA.is_dir():
        pytest.skip(f"real data not found: no folder {_DATA}")
    return _DATA


@pytest.fixture(scope="session")
def landsat(shared_data) -> torch.Tensor:
    """(3, 1917, 2181) float32 in [0, 1]: Landsat-7 R, G, B at 30 m; the corners hold no data (0)."""
    image = pytest.importorskip("PIL.Image", reason="pillow, which reads the Landsat scene, is missing")
    with image.open(shared_data / "landsat7_rgb.tif") as scene:
        values = np.moveaxis(np.asarray(scene), -1, 0)
    return torch.from_numpy(values.astype(np.float32) / 255)
