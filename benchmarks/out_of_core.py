"""A Zarr cube larger than memory, made, aligned chunk by chunk, and what that takes of memory.

    python benchmarks/out_of_core.py --folder /where/there/is/room --gigabytes 8

The store holds one landscape-like texture, uint16, without compression, cut at known offsets of half a pixel, so
that the result is checked as well. Making, aligning and checking run in processes of their own; the peak
resident memory is the aligning one's, as the system counts it (``ru_maxrss``), with nothing about memory in its
environment. The stores are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import xarray as xr

BANDS, SIZE, FACTOR, REACH = 4, 1024, 2, 3.0  # REACH: pixels
VIEWS = 24  # frames that differ by more than their noise


def scene() -> torch.Tensor:
    """(BANDS, …) float32, a field with the 1/f spectrum of landscapes, in 0 … 1."""
    side = FACTOR * (SIZE + 2 * int(REACH) + 2)
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    bands = []
    for _ in range(BANDS):
        spectrum = np.fft.rfft2(random.normal(size=(side, side)).astype(np.float32)) / frequency
        field = np.fft.irfft2(spectrum, s=(side, side))
        bands.append((field - field.min()) / np.ptp(field))
    return torch.from_numpy(np.stack(bands).astype(np.float32))


def offsets(frames: int) -> np.ndarray:
    """(T, 2) in pixels, (x, y): the truth, which repeats itself. The first is 0."""
    reach = int(REACH * FACTOR)
    steps = np.random.default_rng(1).integers(-reach, reach + 1, (VIEWS, 2))
    steps[0] = 0
    return steps[np.arange(frames) % VIEWS] / FACTOR


def make(store: Path, frames: int, chunk: int) -> None:
    """Written part by part; nothing here may need much memory either."""
    import dask.array as da

    ground, random = scene(), np.random.default_rng(2)
    empty = da.zeros((frames, BANDS, SIZE, SIZE), chunks=(chunk, -1, -1, -1), dtype=np.uint16)
    coords = {
        "time": np.datetime64("2017-01-05", "ns") + np.arange(frames) * np.timedelta64(2, "D"),
        "y": 5e6 - 10.0 * np.arange(SIZE),
        "x": 5e5 + 10.0 * np.arange(SIZE),
    }
    cube = xr.DataArray(empty, coords, ("time", "band", "y", "x"), name="reflectance")
    for axis in "xy":
        cube[axis].attrs["units"] = "m"
    encoding = {"reflectance": {"compressors": None}}
    cube.to_dataset().to_zarr(store, compute=False, encoding=encoding, zarr_format=2, consolidated=True)
    middle = FACTOR * (int(REACH) + 1)
    views = []
    for x, y in offsets(min(frames, VIEWS)):
        top, left = middle + round(y * FACTOR), middle + round(x * FACTOR)
        window = ground[:, top : top + FACTOR * SIZE, left : left + FACTOR * SIZE]
        views.append(torch.nn.functional.avg_pool2d(window[None], FACTOR)[0].numpy() * 8000 + 500)
    noise = random.normal(0, 20, (2 * SIZE, SIZE)).astype(np.float32)
    for start in range(0, frames, chunk):
        part = []
        for number in range(start, min(start + chunk, frames)):
            row = int(random.integers(SIZE))
            part.append((views[number % VIEWS] + noise[row : row + SIZE]).astype(np.uint16))
        written = xr.Dataset({"reflectance": (cube.dims, np.stack(part))})
        written.to_zarr(store, region={"time": slice(start, start + len(part))}, consolidated=True)


def align(store: Path, out: Path, reference: str, workers: int) -> dict[str, object]:
    """What a user would write, and what it took."""
    import dask

    import torchalign as ta
    from torchalign.io import write_cube

    start = time.perf_counter()
    with dask.config.set(scheduler="threads", num_workers=workers):
        cube = xr.open_zarr(store)["reflectance"]
        aligned, report = ta.align(cube, reference, ta.PCC(crop_center=512))
        _, report = write_cube(aligned, out, report=report)
    seconds = time.perf_counter() - start
    found = np.stack([report.shift_x, report.shift_y], -1)
    error = found - offsets(len(found))
    error = np.hypot(*(error - np.median(error, 0)).T)  # a median has a place of its own
    return {
        "seconds": round(seconds, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "frames": len(found),
        "aligned": int((report.status == 0).sum()),
        "median_error": round(float(np.median(error)), 4),
        "worst_error": round(float(error.max()), 4),
        "summary": str(ta.summarize(report)).splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--chunk", type=int, default=2, help="frames in a chunk of the store")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--reference", action="append", help="may be given twice; default: first and median")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)  # how this script calls itself
    given = parser.parse_args()
    if given.step:
        store, out, reference = given.step
        print(json.dumps(align(Path(store), Path(out), reference, given.workers)))
        return
    frames = round(given.gigabytes * 1e9 / (BANDS * SIZE * SIZE * 2))
    folder = Path(tempfile.mkdtemp(prefix="out-of-core-", dir=given.folder))
    try:
        store, out = folder / "cube.zarr", folder / "aligned.zarr"
        start = time.perf_counter()
        make(store, frames, given.chunk)
        made = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        print(
            f"made {made / 1e9:.2f} GB, {frames} frames, in {time.perf_counter() - start:.0f} s", flush=True
        )
        for reference in given.reference or ["first", "median"]:
            command = [sys.executable, __file__, "--workers", str(given.workers)]
            done = subprocess.run(
                [*command, "--step", str(store), str(out), reference],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            result = json.loads(done.stdout.splitlines()[-1])
            first = xr.open_zarr(out)["reflectance"]
            result["written_shape"] = list(first.shape)
            result["written_gb"] = round(first.nbytes / 1e9, 2)
            print(reference, json.dumps(result, indent=1), flush=True)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
