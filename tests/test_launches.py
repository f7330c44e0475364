"""What a GPU is asked for stays within its budget: launches, bytes and memory, counted on fake CUDA tensors."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch with CUDA")

# of 256 frames of 4 × 256²: launches, gigabytes, and the peak beside the cube in cubes
BUDGETS = {
    "PCC()": (390, 4.25, 3.5),
    "ECC()": (1150, 7.5, 3.5),
    'ECC(motion="affine")': (1200, 7.0, 3.5),
    'ECC(motion="homography")': (1600, 8.0, 3.5),
    "Cascade(PCC(), ECC())": (1600, 11.0, 3.5),
    "LGM()": (4500, 250.0, 40.0),
    "Local()": (1150, 40.0, 15.0),
}


@pytest.fixture(scope="module")
def launches():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(BENCHMARKS)
    yield runpy.run_path(str(BENCHMARKS / "launches.py"))
    patch.undo()


@pytest.mark.parametrize(
    # slow: the longest, what lies between translations and homographies, and what adds up PCC and ECC
    "name",
    [
        pytest.param(
            key, marks=[pytest.mark.slow] * key.startswith(("LGM", 'ECC(motion="affine"', "Cascade"))
        )
        for key in BUDGETS
    ],
)
def test_budget(launches, name):
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels; this torch has none")
    most, gigabytes, cubes = BUDGETS[name]
    found = launches["summary"](launches["count"](launches["ALIGNERS"][name]), 4 * 256 * 4 * 256**2)
    assert found["launches"] <= most
    assert found["gigabytes"] <= gigabytes
    assert found["peak_cubes"] <= cubes


@pytest.mark.parametrize(("frames", "side"), [(1, 10980), pytest.param(4, 2048, marks=pytest.mark.slow)])
def test_large_frames_need_few_cubes(launches, frames, side):
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels; this torch has none")
    found = launches["count"](launches["ALIGNERS"]["PCC()"], frames=frames, size=(side, side))
    assert 1 < found.peak / (4 * frames * 4 * side**2) <= 3.5


def test_what_torch_alone_launches(launches):
    count = launches["count"](launches["ALIGNERS"]["PCC()"], triton=False)
    assert len(count.launches) <= 1250
    assert sum(launch.moved for launch in count.launches) <= 22e9
    assert not any(launch.name.startswith("torchalign") for launch in count.launches)


def test_bytes_are_those_that_are_read_and_written(launches):
    tensor = torch.empty(4, 3).expand(2, 4, 3)
    assert launches["size_of"](tensor) == 48


def test_the_pages_name_what_was_counted():
    found = json.loads((BENCHMARKS / "results/launches.json").read_text())["aligners"]
    counted = {name: f"{row['triton']['launches']:,}" for name, row in found.items()}
    pages = {
        name: (BENCHMARKS.parent / name).read_text()
        for name in ("docs/guide/scale.md", "docs/guide/gpu.md", "CHANGELOG.md")
    }
    for name in ("PCC()", "ECC()", 'ECC(motion="affine")', "Cascade(PCC(), ECC())", "LGM()"):
        (row,) = (
            line for line in pages["docs/guide/scale.md"].splitlines() if line.startswith(f"| `{name}` |")
        )
        assert row.split("|")[5].strip() == counted[name]
    pcc, ecc, cascade, lgm = (counted[name] for name in ("PCC()", "ECC()", "Cascade(PCC(), ECC())", "LGM()"))
    assert f"is {pcc} launches" in pages["docs/guide/gpu.md"]
    assert f"`ECC` {ecc} and" in pages["docs/guide/gpu.md"]
    assert f"`PCC` {pcc} launches, `ECC` {ecc}, `Cascade` {cascade}, `LGM` {lgm}." in pages["CHANGELOG.md"]
