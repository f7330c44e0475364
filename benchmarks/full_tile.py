"""Two full Sentinel-2 tiles, 10980² pixels of four bands in uint16, from file to file: memory, time, accuracy.

``/usr/bin/time -v python benchmarks/full_tile.py [--size 10980]``. The scene is made of the Landsat scene of
``../shared/data``, repeated and cut at two offsets at three times the resolution, so that the shift is (5/3, 4/3)
pixels exactly; made blockwise, and outside the measured part, which is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from common import machine, write_results
from rasterio.transform import Affine
from rasterio.windows import Window

FACTOR, SHIFT = 3, (5, 4)  # (right, down) in fine pixels
BANDS, ROWS, FULL = 4, 180, 10980

MEASURED = """
import json, sys
import torchalign as ta
paths, report = ta.io.align_scenes(sys.argv[1], sys.argv[2], "first", sys.argv[3], progress=False)
print(json.dumps({name: float(report[name][1]) for name in ("shift_x", "shift_y", "sigma", "score", "status")}))
"""


def make(folder: Path, size: int) -> None:
    """Average fine pixels by blocks; the second file is cut 5 fine pixels to the right and 4 down."""
    scene = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "landsat7_rgb.tif"
    with rasterio.open(scene) as file:
        fine = file.read(1)[300:1500, 300:1700].astype(np.float32)
    random = np.random.default_rng(0)
    big = np.concatenate([fine, fine[::-1]], 0)
    big = np.concatenate([big, big[:, ::-1]], 1)  # repeats without a seam
    columns = np.arange(size * FACTOR)
    for number, (right, down) in enumerate([(0, 0), SHIFT]):
        profile = {"driver": "GTiff", "dtype": "uint16", "count": BANDS, "height": size, "width": size,
                   "crs": "EPSG:32633", "transform": Affine(10, 0, 499980, 0, -10, 5000040), "nodata": 0,
                   "tiled": True, "blockxsize": 512, "blockysize": 512}  # fmt: skip
        with rasterio.open(folder / f"2020010{number + 1}.tif", "w", **profile) as file:
            for top in range(0, size, ROWS):
                count = min(ROWS, size - top)
                rows = (np.arange(top * FACTOR, (top + count) * FACTOR) + down) % big.shape[0]
                cut = big[np.ix_(rows, (columns + right) % big.shape[1])]
                coarse = cut.reshape(count, FACTOR, size, FACTOR).mean((1, 3)) * 12 + 300
                values = np.stack([coarse * (1 - 0.1 * band) for band in range(BANDS)])
                values += random.normal(0, 8, values.shape).astype(np.float32)
                file.write(values.clip(1, 65535).astype("uint16"), window=Window(0, top, size, count))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=FULL)
    parser.add_argument("--aligner", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        source.mkdir()
        make(source, options.size)
        started = time.perf_counter()
        command = [sys.executable, "-c", MEASURED, str(source), str(target), options.aligner]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        found = json.loads(done.stdout)
        truth = SHIFT[0] / FACTOR, SHIFT[1] / FACTOR
        error = float(np.hypot(found["shift_x"] - truth[0], found["shift_y"] - truth[1]))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        results = {"size": options.size, "seconds": round(seconds, 1), "peak_gib": round(peak, 2),
                   "error_px": round(error, 4), **found}  # fmt: skip
        print(json.dumps(results))
        if options.size == FULL:
            write_results("full_tile", {"machine": machine(), **results})


if __name__ == "__main__":
    main()
