"""The picture of the README: a real Sentinel-2 series, all dates in one call, each with its verdict.

python benchmarks/real_series.py [--data ../shared/data/sentinel2_ndvi] [--out docs/sentinel2_ndvi.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import xarray as xr

import torchalign as ta
from torchalign import plot

ROOT = Path(__file__).resolve().parents[1]


def load(folder: Path) -> tuple[xr.DataArray, xr.DataArray]:
    """The NDVI series (time, y, x), and where it is clear."""
    dates = [stamp[:19] for stamp in json.loads((folder / "timestamps.json").read_text())]
    coords = {"time": np.array(dates, "datetime64[ns]")}
    dims = ("time", "y", "x")
    ndvi = xr.DataArray(np.load(folder / "NDVI.npy")[..., 0], dims=dims, coords=coords, name="NDVI")
    clear = xr.DataArray(np.load(folder / "CLM.npy")[..., 0] == 0, dims=dims, coords=coords, name="clear")
    return ndvi, clear


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/sentinel2_ndvi")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/sentinel2_ndvi.png")
    arguments = parser.parse_args()

    ndvi, clear = load(arguments.data)
    share = clear.mean(("y", "x"))
    reference = ndvi.where(clear)[(share > 0.98).values].median("time")
    aligned, report = ta.align(ndvi, reference, ta.PCC(interpolation="bicubic"), mask=clear)

    status = report["status"].values
    clear_dates, overcast = (share > 0.98).values, (share < 0.02).values
    gain = (report["score"] - report["score_before"]).values
    shift = np.hypot(report["shift_x"], report["shift_y"]).values
    aligned_dates, better = (status[clear_dates] == 0).sum(), (gain[clear_dates] > 0).sum()
    largest = shift[clear_dates].max()
    print(
        f"{clear_dates.sum()} clear dates: {aligned_dates} OK, {better} with a higher score, up to {largest:.2f} px"
    )
    print(f"{overcast.sum()} overcast dates: {(status[overcast] == 0).sum()} OK")
    title = (
        f"Real Sentinel-2 NDVI, {len(status)} dates in one call: "
        f"{(status == 0).sum()} aligned, {(status != 0).sum()} flagged"
    )
    visible = share.values > 0.5
    visible[np.flatnonzero(~visible)[::2]] = (
        True  # and every other of the dates where there is nothing to see
    )
    kept = np.flatnonzero(visible)
    figure = plot.summary(ndvi.isel(time=kept), aligned.isel(time=kept), report.isel(time=kept), title=title)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=60)


if __name__ == "__main__":
    main()
