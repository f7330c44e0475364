"""Fixtures of the whole suite: the device axis, the real data, seeds and threads."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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
    # read once, when cuBLAS starts; without it torch up to 2.8 refuses deterministic matrix products
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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


@pytest.fixture
def cuda(device) -> torch.device:
    """A GPU that is there, for what fake tensors cannot show."""
    if device.type != "cuda":
        pytest.skip("wants a GPU: pytest --device cuda")
    return device


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, for libraries that draw from the global generator


# what waits for the device inside, seen on a real one
_WAITING = ("aten.cholesky_inverse", "aten.cholesky_solve", "aten._cholesky_solve_helper")


class _NothingWaits(TorchDispatchMode):
    """A copy from the host waits for the device, unless it is asked not to; fake tensors do not mind."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(operator).startswith(_WAITING):
            raise AssertionError(f"{operator} waits for the device")
        out = operator(*args, **kwargs)
        waits = not kwargs.get("non_blocking") and len(args) <= 2  # of copy_ it may be the third argument
        source = None
        if operator is torch.ops.aten._to_copy.default and waits:
            source = args[0]
        elif operator is torch.ops.aten.copy_.default and waits and args[1].ndim > 0:
            source = args[1]  # (a number is filled in)
        if source is not None and (source.device.type, out.device.type) == ("cpu", "cuda"):
            raise AssertionError("a copy from the host waits for the device")
        return out


@pytest.fixture
def fake():
    """Tensors on a GPU that is not there. What mixes devices raises, what waits for the device too."""
    if torch.version.cuda is None:
        pytest.skip("fake CUDA tensors need a build of torch with CUDA; this one has none")
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with FakeTensorMode() as mode, _NothingWaits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the missing driver
            yield mode
    finally:
        torch.backends.cudnn.enabled = before


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
