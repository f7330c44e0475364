"""What the README and the site show runs as it stands there: every page from top to bottom, in one namespace."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import fractal_stack
from series import make_series

import torchalign as ta

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_generated" not in path.parts
}
# What a page says to a shell, beside the command torchalign.
SHELL = re.compile(
    r"python3 -m venv |pip install |bash \.ci/run|"
    r"\.venv/bin/(pip install|pre-commit install|python -m (pytest|ruff|mypy|sphinx)|python notebooks/run\.py)"
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def is_slow(block: str) -> bool:
    return "torch.export" in block or "torch.compile(" in block


def wants_gpu(block: str) -> bool:
    return ".cuda" in block


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The folders that the pages speak of, and the cubes in them."""
    pytest.importorskip("rioxarray")
    folder = tmp_path_factory.mktemp("stage")
    made = make_series(6, 64)
    days = {"time": made.cube["time"].dt.floor("D")}  # as the names of the files have it
    data = made._replace(cube=made.cube.assign_coords(days), clear=made.clear.assign_coords(days))
    coarse = data.cube.coarsen(y=2, x=2).mean().round().astype("uint16").assign_attrs(_FillValue=0)
    for name, cube in (
        ("scenes", data.cube),
        ("scenes_20m", coarse),
        ("classes", (data.cube[:, :1] > 2000).astype("uint8")),
        ("clouds", (~data.clear).expand_dims(band=["clouds"], axis=1).astype("uint8")),
    ):
        ta.write_stack(cube, folder / name, template="{time:%Y%m%d}.tif")
    return folder, data


@pytest.fixture
def given(stage, tmp_path, monkeypatch):
    """The names that the pages take for granted, in a folder of their own."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    folder, data = stage
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    stack = fractal_stack(4, size=(64, 64), bands=3, noise=0.003)
    red, nir = (data.cube.isel(band=number, drop=True) for number in (0, 1))
    return {
        "ta": ta,
        "torch": torch,
        "np": np,
        "cube": data.cube.copy(),
        "clear": data.clear,
        "clouds": ~data.clear,
        "dataset": red.to_dataset(name="red").assign(nir=nir, scl=(nir > 2000).astype("uint8")),
        "reference_image": data.cube.isel(time=0, drop=True),
        "frames": stack.cube,
        "reference": stack.reference,
        "sun": torch.tensor([[30.0, 150.0], [40.0, 150.0], [50.0, 140.0], [60.0, 130.0]]),
        "moving": stack.cube,
        "target": stack.reference.expand_as(stack.cube),
        "series": stack.cube.expand(2, -1, -1, -1, -1).clone().requires_grad_(),
        "first_frames": stack.reference.expand(2, -1, -1, -1),
        "true_shift": stack.shift,
        "first_date": stack.cube,
        "second_date": stack.cube,
        "image": stack.cube[0],
        "label": torch.zeros(64, 64, dtype=torch.int64),
        "augment": v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomCrop(48)]),
        "network": torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Flatten(-3, -2)),
    }


def run(page: str, block: str, names: dict) -> None:
    if not torch.cuda.is_available():
        block = block.replace('device="cuda"', 'device="cpu"')
    # what is shown is checked here, not the compiler of the day; and a cluster of threads starts at once
    block = block.replace("fullgraph=True)", 'fullgraph=True, backend="aot_eager")')
    block = block.replace("n_workers=2, threads_per_worker=1", "processes=False")
    exec(compile(block, page, "exec"), names)


def shell_commands(page: str) -> list[list[str]]:
    """Of the program torchalign itself, as words."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("torchalign ")]


def runnable(page: str) -> list[str]:
    return [block for block in blocks(page, "python") if not (is_slow(block) or wants_gpu(block))]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page) or shell_commands(page)])
def test_page(page, given, stage, tmp_path, monkeypatch, capsys):
    for block in runnable(page):
        run(page, block, given)
    if shell_commands(page):  # in folders as they were
        monkeypatch.chdir(shutil.copytree(stage[0], tmp_path / "shell"))
        pytest.importorskip("typer")
        from torchalign.cli import main

        for words in shell_commands(page):
            assert main(words) == 0, words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}:{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, "python"))
        if is_slow(block) and not wants_gpu(block)
    ],
)
def test_slow_block(page, block, given):
    run(page, "import torchalign as ta\n" + block, given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(wants_gpu, blocks(page, "python")))])
def test_page_on_a_gpu(page, given):
    for block in blocks(page, "python"):
        if not is_slow(block):
            run(page, block, given)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_shell_lines_are_known(page):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    for line in lines:
        for part in line.split(" && "):
            assert part.startswith(("torchalign ", ".venv/bin/torchalign demo")) or SHELL.match(part), part
    scripts = re.findall(r"python ((?:notebooks|benchmarks|docs)/\S+\.py)", PAGES[page])
    assert all((ROOT / script).exists() for script in scripts)


def test_every_block_is_of_a_known_kind():
    kinds = {
        kind for text in PAGES.values() for kind in re.findall(r"^ *```([^\n`]*)\n(?=.)", text, re.MULTILINE)
    }
    assert kinds <= {"python", "bash", "text", "{eval-rst}", ""}


def test_readme_is_one_screen():
    text = PAGES["README.md"]
    assert len(text.split()) <= 1100
    assert len(text.splitlines()) <= 160


def test_links_to_files_lead_somewhere():
    wrong = []
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", text):
            path = ((ROOT / page).parent / target).resolve()
            generated = "_generated" in target
            if not generated and not path.exists():
                wrong.append((page, target))
    assert wrong == []


def test_architecture_is_drawn_from_the_imports(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs/pictures"))
    import architecture

    members, arrows = architecture.graph()
    assert {"methods", "functional", "cube", "faces"} <= set(members)
    assert ("methods", "functional") in arrows
    assert ("functional", "methods") not in arrows
    picture = architecture.draw()
    assert picture == (ROOT / "docs/pictures/architecture.svg").read_text()
    assert all(architecture.TITLES[name].split(":")[0] in picture for name in members)
    sys.modules.pop("architecture")
