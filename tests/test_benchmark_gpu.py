"""benchmarks/gpu.py is for machines with a GPU; that it runs is seen on any."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def run(monkeypatch, capsys):
    """The script as on a command line, but in this process; what it prints."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def of(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
        return capsys.readouterr().out

    return of


@pytest.mark.slow
def test_runs_on_a_device(run, device):
    before = set((BENCHMARKS / "results").glob("*"))
    printed = run("--quick", "--device", device.type)
    for part in (
        "| estimate |",
        "| whole, `PCC()` |",
        "torchalign.ECC on the CPU",
        "Streamed from the host, one launch a part",
        '| `ta.align(cube, reference, "pcc", graph=False)` |',
        "AlignmentCheck",
    ):
        assert part in printed
    assert set((BENCHMARKS / "results").glob("*")) == before  # a quick look writes nothing


def test_says_that_there_is_no_gpu(run):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="no GPU"):
        run("--device", "cuda")
