"""``torchalign demo``: known shifts, found again, in figures and pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import torchalign
from torchalign._check import require
from torchalign.cli.outputs import check_output, print_written
from torchalign.cube.files import atomic

if TYPE_CHECKING:
    import xarray as xr

_TOLERANCE = 0.3  # pixels; every frame that the demo accepts is nearer to the truth than this


def run_demo(out: Path, frames: int, device: str | None, seed: int) -> int:
    """Run the demo and write its files; the exit code is 1 if a shift was not found."""
    require("demo", "demo", "spyndex", "matplotlib", "PIL", "h5netcdf", "h5py")
    from torchalign import plot
    from torchalign.datasets import demo_stack
    from torchalign.html import save_html

    names = ("summary.png", "animation.gif", "report.html", "report.csv", "report.nc")
    summary, animation, page, table, dataset = outputs = [out / name for name in names]
    for path in outputs:
        check_output(path, True)
    stack = demo_stack(frames=frames, seed=seed)
    aligned, report = torchalign.align(stack.cube, "first", device=device)
    truth = stack.shift.values.copy()
    found = np.stack([report["shift_x"].values, report["shift_y"].values], -1)
    error = np.hypot(*(found - truth).T)
    accepted = report["status"].values == torchalign.Status.OK
    _print_demo(stack.clear.mean(("y", "x")).values, truth, found, error, report)
    rest = accepted.copy()
    rest[0] = False  # the reference itself: its error is 0 whatever the method
    median, worst = (
        float(function(error[rest])) if rest.any() else np.inf for function in (np.median, np.max)
    )
    height, width = stack.cube.sizes["y"], stack.cube.sizes["x"]
    side = min(144, height, width)

    out.mkdir(parents=True, exist_ok=True)
    truth[0] = np.nan  # not a measurement; the pictures leave it out
    title = (
        f"torchalign demo: Sentinel-2, no cloud mask: {int(accepted.sum())} of {frames} frames aligned, "
        f"{int((~accepted).sum())} flagged, median error {median:.4f} px"
    )
    figure = plot.summary(stack.cube, aligned, report, true_shift=truth, title=title)
    with atomic(summary) as path:
        figure.savefig(path, dpi=110, format="png")
    zoom = ((height - side) // 2, (width - side) // 2, side)
    plot.animate(stack.cube, aligned, animation, report=report, zoom=zoom)
    for path in (table, dataset):
        torchalign.save_report(report, path, overwrite=True)
    save_html(report, page, stack.cube, aligned, title=title, overwrite=True)
    print(f"median error {median:.4f} px, worst {worst:.4f} px, no cloud mask")
    print_written(*outputs)

    overcast = stack.clear.mean(("y", "x")).values < 0.01
    problems = [
        f"frame {number} shows no ground and was not flagged"
        for number in np.flatnonzero(overcast & accepted)
    ]
    problems += [f"frame {number} was not aligned" for number in np.flatnonzero(~overcast & ~accepted)]
    wrong = np.flatnonzero(accepted & ~(error < _TOLERANCE) & ~overcast)
    problems += [f"frame {number} is {error[number]:.2f} px off" for number in wrong]
    for problem in problems:
        print(f"torchalign: demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _print_demo(clear: Any, truth: Any, found: Any, error: Any, report: xr.Dataset) -> None:
    """One row a frame; on a terminal, those that were not aligned in yellow."""

    def texts(values: Any, form: str) -> list[str]:
        return [format(value, form) for value in values]

    moved = report["status"].values == torchalign.Status.OK
    before, after = (texts(report[name].values, ".2f") for name in ("score_before", "score"))
    columns: dict[str, Any] = {
        "frame": texts(range(len(moved)), "d"),
        "date": [str(date)[:10] for date in report["time"].values],
        "clear": texts(clear, ".0%"),
        **{f"true {axis}": texts(values, "+.3f") for axis, values in zip("xy", truth.T, strict=True)},
        **{f"found {axis}": texts(values, "+.3f") for axis, values in zip("xy", found.T, strict=True)},
        "error": texts(error, ".4f"),
        "σ": texts(report["sigma"].values, ".4f"),
        "score": [" → ".join(pair) for pair in zip(before, after, strict=True)],
        "status": report["status_name"].values,
    }
    for name in ("found x", "found y", "error", "σ"):  # a frame that was not moved is where it was
        columns[name] = np.where(moved, columns[name], "–")
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line, is_plain in zip(lines, [True, *moved], strict=True):
        print(line if is_plain or not colour else f"\033[33m{line}\033[0m")
