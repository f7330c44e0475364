"""Local shifts against known fields: ``python benchmarks/local.py [--frames 16] [--write]``.

Ground truth: a real high-resolution scene (Landsat-7, ``../shared/data/landsat7_rgb.tif``) is warped at four times
the resolution by a known field, then averaged over 4 × 4 pixels: no interpolation kernel under test made the truth,
and the aliasing is that of a sensor. Every frame has its own field, a shift of up to ± 1 px, a gain, an offset,
noise of 0.005, and opaque clouds over 30 % where a row says so. The frames are 256 × 256. Errors are those of warp
and field together, in pixels, over pixels that are clear and inside the frame; ``sure`` where the field's own σ is
below 0.05 px, for the scene holds water, which shows nothing.

Beside it: OpenCV's DIS and Farnebäck, scikit-image's ILK and TV-L1 (standardised images; none of them takes the
frame's global shift or a mask), and AROSICS' local tie points where it is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import machine, versions, write_results
from scipy.ndimage import gaussian_filter, map_coordinates, spline_filter

import torchalign as ta
from torchalign.functional.shift_field import field_at, sigma_at
from torchalign.functional.warp import backward_displacement

SCENE = Path(__file__).resolve().parents[2] / "shared" / "data" / "landsat7_rgb.tif"
SIZE, FACTOR, MARGIN = 256, 4, 24


class Row(NamedTuple):
    kind: str
    amplitude: float
    clouds: float = 0.0
    spacing: int = 24


ROWS = {
    "constant": Row("constant", 0.0),
    "quadratic, 1 px": Row("quadratic", 1.0),
    "terrain-like, 1 px": Row("terrain", 1.0),
    "terrain-like, 3 px": Row("terrain", 3.0),
    "terrain-like, 0.3 px": Row("terrain", 0.3),
    "jitter along the track, 1 px": Row("jitter", 1.0, spacing=16),
    "terrain-like, 30 % cloud": Row("terrain", 1.0, clouds=0.3),
    "step (seam), 1 px": Row("step", 1.0),
}


class Frames(NamedTuple):
    cube: np.ndarray  # (T, H, W)
    reference: np.ndarray  # (H, W)
    field: np.ndarray  # (T, 2, H, W): aligned(q) = frame(q + field(q))
    usable: np.ndarray  # (T, H, W) bool: clear, and inside the frame


def shape_of(kind: str, random: np.random.Generator) -> np.ndarray:
    """(2, n, n): a field (x, y) over the frame and a margin, of mean 0 and greatest length 1 within it."""
    n = SIZE + 2 * MARGIN
    y, x = np.mgrid[:n, :n] - float(MARGIN)
    half = (SIZE - 1) / 2
    if kind == "quadratic":
        across, down = (x - half) / half, (y - half) / half
        terms = np.stack([across, down, across**2, across * down, down**2])
        field = np.einsum("ck,kyx->cyx", random.normal(size=(2, 5)), terms)
    elif kind == "terrain":  # a Gaussian covariance of correlation length 60 px, mostly along x
        smooth = 60 / np.sqrt(2)
        noise = random.normal(size=(2, n + 400, n + 400))
        field = np.stack([gaussian_filter(part, smooth)[200:-200, 200:-200] for part in noise])
        field *= np.array([1.0, 0.4])[:, None, None] / field.std()
    elif kind == "jitter":
        periods, phases = random.uniform(60, 120, 2), random.uniform(0, 2 * np.pi, 2)
        field = np.stack(
            [a * np.sin(2 * np.pi * y / p + f) for a, p, f in zip((1.0, 0.6), periods, phases, strict=True)]
        )
    elif kind == "step":
        edge = half + random.uniform(-20, 20) + random.uniform(-0.2, 0.2) * (y - half)
        angle = random.uniform(0, 2 * np.pi)
        field = np.stack([np.cos(angle) * (x > edge), np.sin(angle) * (x > edge)])
    else:
        return np.zeros((2, n, n))
    inner = (slice(None), slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    field = field - field[inner].mean((1, 2), keepdims=True)
    return field / np.hypot(*field[inner]).max()


def read_at(field: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    at = [y + MARGIN, x + MARGIN]
    return np.stack([map_coordinates(part, at, order=1, mode="nearest") for part in field])


def simulate(row: Row, frames: int, seed: int) -> Frames:
    import rasterio

    random = np.random.default_rng(seed)
    with rasterio.open(SCENE) as source:
        scene = source.read(window=((330, 1510), (480, 1660))).mean(0) / 255
    spline = spline_filter(scene)
    side = SIZE * FACTOR
    corner = (scene.shape[0] - side) // 2

    def average(image: np.ndarray) -> np.ndarray:
        return image.reshape(SIZE, FACTOR, SIZE, FACTOR).mean((1, 3))

    rows, columns = np.mgrid[:side, :side].astype(float)
    fine = [(part + 0.5) / FACTOR - 0.5 for part in (rows, columns)]
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    cube, fields, usable = [], [], []
    for _ in range(frames):
        forward = row.amplitude * shape_of(row.kind, random) + random.uniform(-1, 1, (2, 1, 1))
        dx, dy = FACTOR * read_at(forward, *fine)
        at = [rows + corner + dy, columns + corner + dx]
        frame = average(map_coordinates(spline, at, order=3, prefilter=False))
        field = np.zeros((2, SIZE, SIZE))
        for _ in range(30):  # frame(p) shows p + forward(p): field(q) = −forward(q + field(q))
            field = -read_at(forward, y + field[1], x + field[0])
        gain, offset = random.uniform(0.7, 1.3), random.uniform(-0.05, 0.05)
        frame = gain * frame + offset + random.normal(0, 0.005, frame.shape)
        cloud = np.zeros(frame.shape, bool)
        while cloud.mean() < row.clouds:
            cy, cx, radius = *random.uniform(0, SIZE, 2), random.uniform(SIZE / 20, SIZE / 6)
            cloud |= (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        frame = np.where(cloud, random.uniform(0.5, 0.9), frame)
        py, px = y + field[1], x + field[0]
        inside = (py >= 0) & (py <= SIZE - 1) & (px >= 0) & (px <= SIZE - 1)
        near = tuple(part.round().astype(int).clip(0, SIZE - 1) for part in (py, px))
        cube.append(frame)
        fields.append(field)
        usable.append(inside & ~cloud[near])
    reference = average(scene[corner : corner + side, corner : corner + side])
    return Frames(np.stack(cube), reference, np.stack(fields), np.stack(usable))


def displacement(estimate: ta.Estimate) -> tuple[np.ndarray, np.ndarray]:
    """(T, 2, H, W) of warp and field together; and the field's σ (T, H, W), inf without one."""
    axis = torch.arange(float(SIZE))
    dx, dy = torch.broadcast_tensors(*backward_displacement(estimate.warp, axis, axis[:, None]))
    backward = torch.stack((dx, dy), 1)
    if estimate.field is None:
        return backward.expand(-1, 2, SIZE, SIZE).numpy(), np.full((len(backward), SIZE, SIZE), np.inf)
    shifts = torch.stack(field_at(estimate.field, axis, axis), 1)
    return (backward + shifts).numpy(), sigma_at(estimate.field, axis, axis).numpy()


def ours(aligner: ta.Aligner) -> Callable[[Frames], tuple[np.ndarray, np.ndarray]]:
    def run(data: Frames) -> tuple[np.ndarray, np.ndarray]:
        cube, reference = (torch.tensor(part, dtype=torch.float32) for part in (data.cube, data.reference))
        return displacement(aligner.estimate(cube[:, None], reference[None]))

    return run


def pair_by_pair(
    flow: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Callable[[Frames], tuple[np.ndarray, None]]:
    def run(data: Frames) -> tuple[np.ndarray, None]:
        return np.stack([flow(data.reference, frame) for frame in data.cube]), None

    return run


def others() -> dict[str, Callable[[Frames], tuple[np.ndarray, None]]]:
    import cv2
    from skimage.registration import optical_flow_ilk, optical_flow_tvl1

    cv2.setNumThreads(1)

    def standard(image: np.ndarray) -> np.ndarray:
        return (image - np.median(image)) / image.std()

    def bytes_of(image: np.ndarray) -> np.ndarray:
        return (128 + 50 * standard(image)).clip(0, 255).astype(np.uint8)

    def dis(reference: np.ndarray, frame: np.ndarray) -> np.ndarray:
        engine = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        return engine.calc(bytes_of(reference), bytes_of(frame), None).transpose(2, 0, 1)

    def farneback(reference: np.ndarray, frame: np.ndarray) -> np.ndarray:
        window = cv2.OPTFLOW_FARNEBACK_GAUSSIAN
        images = bytes_of(reference), bytes_of(frame)
        return cv2.calcOpticalFlowFarneback(*images, None, 0.5, 3, 31, 5, 7, 1.5, window).transpose(2, 0, 1)

    def ilk(reference: np.ndarray, frame: np.ndarray) -> np.ndarray:
        return optical_flow_ilk(standard(reference), standard(frame), radius=12, num_warp=5)[::-1]

    def tvl1(reference: np.ndarray, frame: np.ndarray) -> np.ndarray:
        return optical_flow_tvl1(standard(reference), standard(frame), attachment=15)[::-1]

    flows = {"OpenCV DIS": dis, "OpenCV Farnebäck": farneback, "skimage ILK": ilk, "skimage TV-L1": tvl1}
    return {name: pair_by_pair(flow) for name, flow in flows.items()}


def measure(row: Row, frames: int, seed: int, with_others: bool) -> dict[str, dict[str, float]]:
    data = simulate(row, frames, seed)
    # a field of 3 px lies further than that from what PCC takes for the whole frame's shift
    local = ta.Cascade(ta.PCC(), ta.Local(spacing=row.spacing, max_deviation=3.0 + row.amplitude))
    methods = {"global PCC": ours(ta.PCC()), "Local": ours(local)}
    few = Frames(data.cube[:4], data.reference, data.field[:4], data.usable[:4])
    results = {}
    for name, run in (methods | (others() if with_others else {})).items():
        given = data if name in methods else few
        begun = time.process_time()
        found, sigma = run(given)
        seconds = (time.process_time() - begun) / len(given.cube)
        error = np.hypot(*np.moveaxis(found - given.field, 1, 0))
        usable = given.usable
        result = {
            "median": float(np.median(error[usable])),
            "p95": float(np.quantile(error[usable], 0.95)),
            "ms": 1e3 * seconds,
        }
        if sigma is not None and (sigma < 1e6).any():
            sure = usable & (sigma < 0.05)
            part = np.abs(found - given.field) / np.maximum(sigma, 1e-9)[:, None]
            each = np.broadcast_to((usable & (sigma < 1e6))[:, None], part.shape)
            result |= {
                "share": float(sure.sum() / usable.sum()),
                "sure_median": float(np.median(error[sure])),
                "sure_p95": float(np.quantile(error[sure], 0.95)),
                "within_1": float((part[each] < 1).mean()),
                "within_2": float((part[each] < 2).mean()),
                "kept": float((sigma < 1e6).any((1, 2)).mean()),
            }
        results[name] = result
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--alone", action="store_true", help="only torchalign")
    parser.add_argument("--write", action="store_true", help="save to results/local.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for number, (name, row) in enumerate(ROWS.items()):
        rows[name] = measure(row, options.frames, options.seed + number, not options.alone)
        for method, result in rows[name].items():
            numbers = " ".join(f"{key} {value:.4g}" for key, value in result.items())
            print(f"{name:30s} {method:17s} {numbers}", flush=True)
    if options.write:
        packages = ("torchalign", "torch", "opencv-python-headless", "scikit-image")
        write_results("local", {"machine": machine(), "versions": versions(*packages), "rows": rows})


if __name__ == "__main__":
    main()
