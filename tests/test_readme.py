"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from scenes import fractal_stack
from series import make_series

import torchalign as ta
from torchalign.models.weights import find_weights

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def name(block: str) -> str:
    return next(line for line in block.splitlines() if "ta." in line and "import" not in line).strip()[:50]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The names that the blocks take for granted, and the folders."""
    pytest.importorskip("rioxarray")
    v2 = pytest.importorskip("torchvision.transforms.v2")
    monkeypatch.chdir(tmp_path)
    data = make_series(6, 64)
    for folder, cube in (
        ("scenes", data.cube),
        (
            "scenes_20m",
            data.cube.coarsen(y=2, x=2).mean().round().astype("uint16").assign_attrs(_FillValue=0),
        ),
        ("classes", (data.cube[:, :1] > 2000).astype("uint8")),
    ):
        ta.write_stack(cube, folder, template="{time:%Y%m%d}.tif")
    stack = fractal_stack(4, size=(64, 64), bands=3, noise=0.003)
    return {
        "ta": ta,
        "torch": torch,
        "datacube": data.cube,
        "clear": data.clear,
        "clouds": ~data.clear,
        "cube": stack.cube,
        "reference": stack.reference,
        "moving": stack.cube,
        "target": stack.reference.expand_as(stack.cube),
        "frames": stack.cube,
        "series": stack.cube.expand(2, -1, -1, -1, -1).clone().requires_grad_(),
        "first_frames": stack.reference.expand(2, -1, -1, -1),
        "true_shift": stack.shift,
        "first_date": stack.cube,
        "second_date": stack.cube,
        "image": stack.cube[0],
        "label": torch.zeros(64, 64, dtype=torch.int64),
        "augment": v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomCrop(48)]),
        "network": torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Flatten(-3, -2)),
        "aligner": ta.PCC(),
    }


def marks(block: str) -> list:
    return [pytest.mark.slow] if "torch.export" in block else []


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=name(block), marks=marks(block)) for block in BLOCKS]
)
def test_block(given, block):
    if "aliked" in block and find_weights("aliked-n16") is None:
        pytest.skip("the weights of ALIKED are not here")
    if not torch.cuda.is_available():
        if ".cuda(" in block:
            pytest.skip("wants a GPU")
        block = block.replace('device="cuda"', 'device="cpu"')
    frames = given["frames"]
    exec(compile(block, str(README), "exec"), given)
    if "aligned" in given:
        assert tuple(given["aligned"].shape[-2:]) == (64, 64)
    if "moved" in given:
        assert given["moved"].shape == frames.shape


def test_there_are_blocks():
    assert len(BLOCKS) >= 7
    assert all("ta." in block for block in BLOCKS)
