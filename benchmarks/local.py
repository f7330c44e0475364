"""Local shifts against known fields: ``python benchmarks/local.py [--frames 16] [--only rows scale large real]``.

Ground truth: a real high-resolution scene (Landsat-7, ``../shared/data/landsat7_rgb.tif``) is warped at four times
the resolution by a known field, then averaged over 4 × 4 pixels: no interpolation kernel under test made the truth,
and the aliasing is that of a sensor. Every frame has its own field, a shift of up to ± 1 px, a gain, an offset,
noise of 0.005, and opaque clouds over 30 % where a row says so. The frames are 256 × 256. Errors are those of warp
and field together, in pixels, over pixels that are clear and inside the frame; ``sure`` where the field's own σ is
below 0.05 px, for the scene holds water, which shows nothing.

Beside it: OpenCV's DIS and Farnebäck, scikit-image's ILK and TV-L1 (standardised images; none of them takes the
frame's global shift or a mask).

* **scale**: seconds of CPU a frame, of many frames at once; and of ECC with an affine motion, beside it.
* **large**: one frame of 2048² and one of 4096², which are cut into tiles; and how far the field on and beside the
  tiles' borders is from that of a window around them, which is one tile.
* **real**: triangles of three clear dates of the Sentinel-2 NDVI series: what lies at a pixel of the first, found in the
  third directly and by way of the second, in pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    RESULTS,
    add_readme_options,
    described,
    machine,
    pixels,
    read_results,
    readme_or_run,
    table,
    versions,
    write_results,
)
from real_series import ROOT, load
from scipy.ndimage import gaussian_filter, map_coordinates, spline_filter

import torchalign as ta
from torchalign.functional.affine import invert_warp, transform_points
from torchalign.functional.local import Mosaic
from torchalign.functional.shift_field import field_at, field_at_points, is_zero, sigma_at
from torchalign.functional.warp import backward_displacement

SCENE = Path(__file__).resolve().parents[2] / "shared" / "data" / "landsat7_rgb.tif"
SIZE, FACTOR, MARGIN = 256, 4, 24
PARTS = ("rows", "scale", "large", "real")


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


def run_rows(options: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    for number, (name, row) in enumerate(ROWS.items()):
        rows[name] = measure(row, options.frames, options.seed + number, not options.alone)
        for method, result in rows[name].items():
            numbers = " ".join(f"{key} {value:.4g}" for key, value in result.items())
            print(f"{name:30s} {method:17s} {numbers}", flush=True)
    return rows


def timed(function: Callable[[], Any], times: int = 3) -> float:
    """Seconds of CPU, the best of some."""
    found = []
    for _ in range(times):
        begun = time.process_time()
        function()
        found.append(time.process_time() - begun)
    return min(found)


def run_scale() -> dict[str, Any]:
    data = simulate(ROWS["terrain-like, 1 px"], 8, 77)
    cube, reference = (torch.tensor(part, dtype=torch.float32) for part in (data.cube, data.reference))
    cube, reference = cube[:, None], reference[None]
    local, affine = ta.Cascade(ta.PCC(), ta.Local()), ta.ECC(motion="affine")
    found: dict[str, Any] = {
        "Local, ms": 1e3 * timed(lambda: local.estimate(cube, reference)) / 8,
        "ECC affine, ms": 1e3 * timed(lambda: affine.estimate(cube, reference)) / 8,
    }
    small, still = cube[..., :128, :128], reference[..., :128, :128]
    for frames in (8, 100, 1000):
        many = small[torch.arange(frames) % 8]
        seconds = timed(lambda many=many: local.estimate(many, still), 1 if frames > 100 else 3)
        found[f"{frames} frames of 128², ms a frame"] = 1e3 * seconds / frames
    return found


def run_large() -> dict[str, Any]:
    import rasterio

    with rasterio.open(SCENE) as source:
        scene = source.read(window=((330, 1510), (480, 1660))).mean(0) / 255
    found: dict[str, Any] = {}
    random = np.random.default_rng(5)
    for side in (2048, 4096):
        far = side + 64
        still = np.pad(scene, ((0, max(0, far - len(scene))), (0, max(0, far - len(scene)))), "symmetric")[
            :far, :far
        ]
        smooth = gaussian_filter(random.normal(size=(2, far // 16, far // 16)), (0, 5, 5))
        field = np.stack([np.kron(part / np.abs(part).max(), np.ones((16, 16))) for part in smooth])
        field = gaussian_filter(field, (0, 16, 16))
        y, x = np.mgrid[:far, :far].astype(np.float32)
        moving = map_coordinates(still, [y[: len(field[1])] - field[1], x - field[0]], order=3)[:far, :far]
        moving, still = (
            torch.tensor(part[32:-32, 32:-32], dtype=torch.float32)[None] for part in (moving, still)
        )
        moving = moving + 0.005 * torch.randn(moving.shape, generator=torch.Generator().manual_seed(1))
        local = ta.Local()
        start = torch.eye(2, 3)[None]
        begun = time.process_time()
        estimate = local.estimate(moving[None], still, init=start)
        found[f"{side}², s"] = time.process_time() - begun
        if side == 2048:
            continue
        # across tiles' borders: a window of 600 pixels around each of some of them, estimated alone
        windows = Mosaic((side, side), local.spacing).windows()
        borders = sorted({rows.stop for rows, _ in windows})[:-1]
        gaps = []
        for border in borders[:3]:
            corner = (border - 300) // local.spacing * local.spacing
            window = (slice(None), slice(corner, corner + 600), slice(corner, corner + 600))
            alone = local.estimate(moving[window][None], still[window], init=start)
            inner = torch.arange(150.0, 450.0, 4)
            # warp and field together: alone, the window's warp is another one
            both = [
                [
                    part - shift
                    for part, shift in zip(field_at(one.field, at, at), one.warp[0, :, 2], strict=True)
                ]
                for one, at in ((alone, inner), (estimate, inner + corner))
            ]
            apart = torch.hypot(*(one - other for one, other in zip(*both, strict=True)))
            known = sigma_at(alone.field, inner, inner) < 0.05
            gaps.append(apart[known])
        apart = torch.cat(gaps)
        found |= {
            "tiles": len(windows),
            "apart at borders, median": float(apart.median()),
            "apart at borders, p95": float(apart.quantile(0.95)),
        }
    return found


def run_real() -> dict[str, Any]:
    ndvi, clear = load(ROOT / "../shared/data/sentinel2_ndvi")
    chosen = (clear.mean(("y", "x")) > 0.98).values
    cube = torch.from_numpy(ndvi.where(clear).values[chosen]).float()[:, None]
    height, width = cube.shape[-2:]
    y, x = (torch.arange(12.0, length - 12, 4) for length in (height, width))
    at = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, -1, 2)
    closures: dict[str, list[float]] = {"global": [], "local": []}
    lost = fields = 0
    aligners = {"global": ta.PCC(), "local": ta.Cascade(ta.PCC(), ta.Local())}
    triples = [cube[first::gap][:3] for gap in (2, 5, 8) for first in range(len(cube) - 2 * gap)]
    for one, two, three in triples:
        pairs = ((two, one), (three, two), (three, one))
        found = {
            name: [aligner.estimate(moving[None], still) for moving, still in pairs]
            for name, aligner in aligners.items()
        }
        if not all(bool(estimate.valid) for estimates in found.values() for estimate in estimates):
            continue
        fields += any(not bool(is_zero(estimate.field)) for estimate in found["local"])
        lost += sum(
            bool(after.score < before.score - 1e-3)
            for before, after in zip(found["global"], found["local"], strict=True)
        )

        for name, (to_two, to_three, direct) in found.items():

            def source(estimate: ta.Estimate, points: torch.Tensor) -> torch.Tensor:
                own = transform_points(invert_warp(estimate.warp), points)
                return own if estimate.field is None else own + field_at_points(estimate.field, points)

            gap = source(to_three, source(to_two, at)) - source(direct, at)
            closures[name].append(float(gap.norm(dim=-1).median()))
    return {
        "triangles": len(closures["global"]),
        "with a field": fields,
        "global": float(np.median(closures["global"])),
        "local": float(np.median(closures["local"])),
        "pairs with a lower score": lost,
    }


def report(results: Mapping[str, Any]) -> str:
    """For benchmarks/README.md: of the parts that were run."""
    found = [described(results)]
    if "rows" in results:
        found += [
            f"{results['frames']} frames a row from seed {results['first seed']} on (4 for the methods of others); px, "
            "median / p95 over clear pixels.",
            table(*row_table(results["rows"])),
        ]
    if "scale" in results:
        scale = results["scale"]
        many = [f"{value:.1f} of {name.split(' ')[0]}" for name, value in scale.items() if "128²" in name]
        found.append(
            f"A frame of 256² takes {scale['Local, ms']:.0f} ms on one thread, PCC before it included, "
            f'{scale["Local, ms"] / scale["ECC affine, ms"]:.1f} times as long as `ECC(motion="affine")`. '
            f"Milliseconds a frame of 128²: {', '.join(many)} at once."
        )
    if "large" in results:
        large = results["large"]
        apart = f"{pixels(large['apart at borders, median'])} / {pixels(large['apart at borders, p95'])}"
        found.append(
            f"One frame of 2048²: {large['2048², s']:.0f} s of CPU; of 4096², in {large['tiles']} tiles: "
            f"{large['4096², s']:.0f} s. Around the tiles' borders its field is {apart} px (median / p95) from that of "
            "one window around them."
        )
    if "real" in results:
        real = results["real"]
        found.append(
            f"Real Sentinel-2 NDVI, {real['triangles']} triangles of clear dates: they close to {real['global']:.3f} px "
            f"with PCC, to {real['local']:.3f} px with Local; in {real['with a field']} of them a pair asks for a field. "
            f"{real['pairs with a lower score']} pairs lose score."
        )
    return "\n\n".join(found)


def row_table(rows: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for name, methods in rows.items():
        own = methods["Local"]
        sure = z = "–"
        if "share" in own:
            sure = f"{pixels(own['sure_median'])} / {pixels(own['sure_p95'])} ({own['share']:.0%})"
            z = f"{own['within_1']:.0%} / {own['within_2']:.0%}"
        both = [f"{pixels(result['median'])} / {pixels(result['p95'])}" for result in methods.values()]
        lines.append([name, both[0], both[1], sure, z, *both[2:]])
    names = list(next(iter(rows.values())))
    header = ["field", names[0], f"**{names[1]}**", "its σ < 0.05 px (share)", "within 1 / 2 σ", *names[2:]]
    return header, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--seed", type=int, default=7000)
    parser.add_argument("--alone", action="store_true", help="only torchalign")
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, default=PARTS, help="the rest of the last results stays"
    )
    add_readme_options(parser)
    options = parser.parse_args()
    if readme_or_run(options, "local", report):
        return
    torch.set_num_threads(1)
    packages = ("torchalign", "torch", "opencv-python-headless", "scikit-image")
    results = read_results("local") if (RESULTS / "local.json").exists() else {}
    results |= {"machine": machine(), "versions": versions(*packages)}
    runs = {"rows": lambda: run_rows(options), "scale": run_scale, "large": run_large, "real": run_real}
    for part in options.only:
        results[part] = runs[part]()
        if part == "rows":
            results |= {"frames": options.frames, "first seed": options.seed}
        print(part, results[part] if part != "rows" else "", flush=True)
        write_results("local", results)
    print(report(results))


if __name__ == "__main__":
    main()
