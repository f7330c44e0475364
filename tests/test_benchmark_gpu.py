"""benchmarks/gpu.py is for machines with a GPU; that it runs is seen on any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_runs_on_a_device(device):
    before = set((ROOT / "benchmarks" / "results").glob("*"))
    done = run("--quick", "--device", device.type)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in (
        "| estimate |",
        "| whole, `PCC()` |",
        "torchalign, CPU",
        "Streamed from the host",
        "AlignmentCheck",
    ):
        assert part in done.stdout
    assert set((ROOT / "benchmarks" / "results").glob("*")) == before  # a quick look writes nothing


def test_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("--device", "cuda")
    assert done.returncode == 1
    assert "no GPU" in done.stderr
