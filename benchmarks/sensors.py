"""Across sensors: `PCC` and `ECC(contrast="structure")` beside `PCC()`, on ground truth by decimation.

python benchmarks/sensors.py [--frames 40] [--seed 0] [--scene PATH] [--update-readme | --check-readme]

Frames and reference are cut from one scene at whole offsets and averaged in blocks, then given different physics:
bands, ratios of bands, negatives, and a simulated radar: a contrast that is reversed and not monotonic, with
one-look speckle. For affine motion the scene is warped on its own pixels before it is averaged. Unrelated pairs are of
other places.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    add_readme_options,
    described,
    machine,
    percent,
    pixels,
    read_results,
    table,
    update_readme,
    versions,
    write_results,
)
from torch import Tensor

import torchalign as ta

SIZE, FACTOR, REACH = 256, 5, 4  # pixels of a frame, scene pixels of a pixel, pixels of shift


def open_scene(path: Path) -> Tensor:
    """(C, H, W) in [0, 1]."""
    import rasterio

    with rasterio.open(path) as file:
        return torch.from_numpy(file.read().astype("float32")) / 255


def decimate(window: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(window[None], FACTOR)[0]


def cut(scene: Tensor, x: int, y: int) -> Tensor:
    side = SIZE * FACTOR
    return decimate(scene[:, y : y + side, x : x + side])


def warped(scene: Tensor, x: int, y: int, warp: Tensor) -> Tensor:
    """:func:`cut` of a scene that is warped (2, 3), in pixels of the frame, on its own pixels."""
    along = (torch.arange(SIZE * FACTOR) + 0.5) / FACTOR - 0.5
    columns, rows = torch.meshgrid(along, along, indexing="xy")
    points = [
        (a * columns + b * rows + c + 0.5) * FACTOR - 0.5 + corner
        for (a, b, c), corner in zip(warp.tolist(), (x, y), strict=True)
    ]
    height, width = scene.shape[-2:]
    grid = torch.stack((2 * points[0] / (width - 1) - 1, 2 * points[1] / (height - 1) - 1), -1)
    sampled = torch.nn.functional.grid_sample(
        scene[None], grid[None], mode="bicubic", align_corners=True, padding_mode="border"
    )
    return decimate(sampled[0])


def draw_warp(random: torch.Generator, degrees: float = 4.0, strain: float = 0.03) -> Tensor:
    """(2, 3): turned, stretched and sheared about the centre, which moves by up to 4 px in x and y."""

    def uniform(limit: float) -> float:
        return limit * (2 * float(torch.rand((), generator=random)) - 1)

    angle, x, y, shear = math.radians(uniform(degrees)), uniform(strain), uniform(strain), uniform(strain)
    linear = torch.tensor(
        [
            [math.cos(angle) * (1 + x), -math.sin(angle) * (1 + y) + shear],
            [math.sin(angle) * (1 + x), math.cos(angle) * (1 + y)],
        ]
    )
    centre = torch.full((2,), (SIZE - 1) / 2)
    shift = torch.tensor([uniform(REACH), uniform(REACH)])
    return torch.cat((linear, (centre - linear @ centre + shift)[:, None]), 1)


def radar(image: Tensor, random: torch.Generator, looks: int = 1) -> Tensor:
    """(1, H, W): brightness through a curve that falls, then rises, times speckle (exponential, a mean of looks)."""
    grey = image.mean(0, keepdim=True)
    low, high = grey.quantile(0.02), grey.quantile(0.98)
    level = ((grey - low) / (high - low)).clamp(0, 1)
    power = (1 - level) ** 1.5 + 0.6 * (level - 0.65).clamp(min=0) * 2
    speckle = -torch.rand((looks, *power.shape), generator=random).clamp(min=1e-6).log()
    return (0.05 + power) * speckle.mean(0)


def ratio(image: Tensor, random: torch.Generator) -> Tensor:
    """(1, H, W): the normalised difference of two bands, with noise of 0.01."""
    index = (image[1:2] - image[:1]) / (image[1:2] + image[:1] + 0.05)
    return index + 0.01 * torch.randn(index.shape, generator=random)


def clouded(frame: Tensor, share: float, random: torch.Generator) -> Tensor:
    """Opaque bright blobs over a share of the frame."""
    noise = torch.randn(1, 1, 17, 17, generator=random)
    field = torch.nn.functional.interpolate(
        noise, size=frame.shape[-2:], mode="bicubic", align_corners=False
    )[0, 0]
    covered = field > field.flatten().quantile(1 - share)
    level = frame.max() * (0.8 + 0.2 * torch.rand(1, generator=random))
    return torch.where(covered, level, frame)


def mean(image: Tensor, random: torch.Generator) -> Tensor:
    return image.mean(0, keepdim=True)


Look = Callable[[Tensor, torch.Generator], Tensor]
PAIRS: dict[str, tuple[Look, Look]] = {
    "red on its negative": (lambda image, _: image[:1], lambda image, _: 1 - image[:1]),
    "blue on red": (lambda image, _: image[2:3], lambda image, _: image[:1]),
    "index on mean": (ratio, mean),
    "radar on optical": (radar, mean),
    "radar of four looks on optical": (lambda image, random: radar(image, random, 4), mean),
    "radar on optical, 30 % cloud": (
        radar,
        lambda image, random: clouded(image.mean(0, keepdim=True), 0.3, random),
    ),
    "same band, noise 0.01": (
        lambda image, random: image[:1] + 0.01 * torch.randn(image[:1].shape, generator=random),
        lambda image, random: image[:1] + 0.01 * torch.randn(image[:1].shape, generator=random),
    ),
}


AFFINE = ("red on its negative", "index on mean", "radar on optical", "radar of four looks on optical")


def simulate(
    scene: Tensor, looks: tuple[Look, Look], frames: int, seed: int, *, affine: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (T, 1, H, W), a reference for each, and the warps (T, 2, 3); whole shifts unless ``affine``."""
    random = torch.Generator().manual_seed(seed)
    side, margin = SIZE * FACTOR, 3 * REACH * FACTOR if affine else REACH * FACTOR
    moving, reference, warps = [], [], []
    for _ in range(frames):
        x, y = (
            int(torch.randint(margin, length - side - margin, (1,), generator=random))
            for length in (scene.shape[-1], scene.shape[-2])
        )
        if affine:
            warp = draw_warp(random)
            seen = warped(scene, x, y, warp)
        else:
            dx, dy = torch.randint(-margin, margin + 1, (2,), generator=random).tolist()
            warp = torch.tensor([[1.0, 0.0, dx / FACTOR], [0.0, 1.0, dy / FACTOR]])
            seen = cut(scene, x + dx, y + dy)
        moving.append(looks[0](seen, random))
        reference.append(looks[1](cut(scene, x, y), random))
        warps.append(warp)
    return torch.stack(moving), torch.stack(reference), torch.stack(warps)


def measure(aligner: ta.Aligner, moving: Tensor, reference: Tensor, warp: Tensor) -> dict[str, float]:
    """Errors of the centre against σ; ``median`` and ``p95`` are over the mean of the four corners."""
    estimate = aligner.estimate(moving, reference)
    valid = estimate.valid
    bottom, right = moving.shape[-2] - 1.0, moving.shape[-1] - 1.0
    points = torch.tensor(
        [[right / 2, 0, right, 0, right], [bottom / 2, 0, 0, bottom, bottom], [1.0, 1, 1, 1, 1]]
    )
    centre, *corners = ((estimate.warp[..., :2, :] - warp) @ points).unbind(-1)
    length = torch.stack(corners).norm(dim=-1).mean(0)
    ratio = (centre.abs() / estimate.sigma[:, None])[valid]
    return {
        "frames": len(valid),
        "accepted": int(valid.sum()),
        "within_1px": int((valid & (length <= 1)).sum()),
        "over_3px": int((valid & (length > 3)).sum()),
        "median": float(length[valid].median()) if valid.any() else float("nan"),
        "p95": float(length[valid].quantile(0.95)) if valid.any() else float("nan"),
        "in_1_sigma": float((ratio <= 1).float().mean()) if valid.any() else float("nan"),
        "in_2_sigma": float((ratio <= 2).float().mean()) if valid.any() else float("nan"),
    }


def chip_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Of the real Sentinel-2 chip: what is aligned on what, (1, H, W) each."""
    import spyndex

    chip = torch.from_numpy(np.array(spyndex.datasets.open("sentinel")).astype("float32")) / 1e4
    blue, green, red, infrared = chip.split(1)
    ndvi = (infrared - red) / (infrared + red)
    bands = {"B02": blue, "B03": green, "B04": red, "B08": infrared}
    found = {"NDVI on RGB": (ndvi, (blue + green + red) / 3), "B04 on its negative": (red, 1 - red)}
    for name, band in bands.items():
        found |= {f"{name} on {other}": (band, bands[other]) for other in bands if other != name}
    return found


def measure_chip(aligner: ta.Aligner, moving: Tensor, reference: Tensor, seed: int) -> dict[str, float]:
    shifts = np.random.default_rng(seed).integers(-REACH, REACH + 1, (20, 2))
    window = slice(40, 260)
    frames = torch.stack([moving[:, 40 + y : 260 + y, 40 + x : 260 + x] for x, y in shifts.tolist()])
    one = reference[:, window, window].expand_as(frames)
    warps = torch.eye(2, 3).repeat(len(shifts), 1, 1)
    warps[..., 2] = torch.from_numpy(shifts)
    return measure(aligner, frames, one, warps)


def unrelated(scene: Tensor, aligner: ta.Aligner, pairs: int, seed: int) -> dict[str, float]:
    """Optical and radar, optical and optical, of places that share no pixel."""
    random = torch.Generator().manual_seed(seed)
    small, accepted = 128 * FACTOR, 0
    places = [
        (x, y)
        for y in range(0, scene.shape[-2] - small, small)
        for x in range(0, scene.shape[-1] - small, small)
    ]
    for first in range(0, pairs, 50):
        moving, reference = [], []
        for index in range(first, min(first + 50, pairs)):
            one, other = (places[i] for i in torch.randperm(len(places), generator=random)[:2].tolist())
            # mirrored and turned, so that few places make many pairs
            turn = int(torch.randint(0, 4, (1,), generator=random))
            a, b = (decimate(scene[:, y : y + small, x : x + small]) for x, y in (one, other))
            a = torch.rot90(a if index % 2 else a.flip(-1), turn, (-2, -1))
            moving.append(radar(a, random) if index % 4 < 2 else a.mean(0, keepdim=True))
            reference.append(b.mean(0, keepdim=True))
        accepted += int(aligner.estimate(torch.stack(moving), torch.stack(reference)).valid.sum())
    return {"pairs": pairs, "accepted": accepted}


def run(scene: Tensor, frames: int, seed: int, pairs: int) -> dict[str, Any]:
    aligners = {
        "structure": ta.PCC(contrast="structure", max_translation=8),
        "structure, robust": ta.PCC(contrast="structure", robust=True, max_translation=8),
        "ECC, structure": ta.ECC(contrast="structure", max_translation=8),
        "local": ta.PCC(max_translation=8),
    }
    affine = {
        name: ta.ECC(motion="affine", contrast=contrast, max_translation=8)
        for name, contrast in (("ECC, structure", "structure"), ("ECC, local", "local"))
    }
    results: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("torchalign", "torch"),
        "seed": seed,
        "rows": {},
    }
    for condition, looks in PAIRS.items():
        given = simulate(scene, looks, frames, seed)
        results["rows"][condition] = {name: measure(aligner, *given) for name, aligner in aligners.items()}
        print(condition, results["rows"][condition], flush=True)
    for condition, (moving, reference) in chip_pairs().items():
        row = {name: measure_chip(aligner, moving, reference, seed) for name, aligner in aligners.items()}
        results["rows"][f"chip: {condition}"] = row
        print(condition, row, flush=True)
    results["affine"] = {}
    for condition in AFFINE:
        given = simulate(scene, PAIRS[condition], frames, seed + 1, affine=True)
        results["affine"][condition] = {name: measure(aligner, *given) for name, aligner in affine.items()}
        print("affine", condition, results["affine"][condition], flush=True)
    results["unrelated"] = {
        name: unrelated(scene, aligner, pairs, seed)
        for name, aligner in (aligners | {"affine": affine["ECC, structure"]}).items()
    }
    print(results["unrelated"])
    return results


def to_markdown(results: dict[str, Any]) -> str:
    names = list(next(iter(results["rows"].values())))

    def cell(row: dict[str, float]) -> str:
        wrong = f", **{row['over_3px']:.0f} over 3 px**" if row["over_3px"] else ""
        if not row["accepted"]:
            return "none accepted"
        return f"{pixels(row['median'])} / {pixels(row['p95'])} ({percent(row['accepted'], row['frames'])}{wrong})"

    def within(name: str, key: str) -> str:
        rows = [row[name] for row in results["rows"].values() if row[name]["accepted"]]
        total = sum(row["accepted"] for row in rows)
        return percent(sum(row["accepted"] * row[key] for row in rows), total) if total else "none accepted"

    body = [[name, *(cell(row[each]) for each in names)] for name, row in results["rows"].items()]
    body.append(
        [
            "unrelated pairs accepted",
            *(f"{results['unrelated'][n]['accepted']} of {results['unrelated'][n]['pairs']}" for n in names),
        ]
    )
    for key, sigma in (("in_1_sigma", "1 σ"), ("in_2_sigma", "2 σ")):
        body.append([f"errors of all rows within {sigma}", *(within(name, key) for name in names)])
    text = f"{described(results)}\n\n" + table(["median / p95, px (accepted)", *names], body)
    pairs = results["unrelated"]["affine"]
    affine = [
        [name, *(cell(one) for one in row.values()), f"{one_in(row, 1)} / {one_in(row, 2)}"]
        for name, row in results["affine"].items()
    ]
    heads = [
        "affine: ± 4°, ± 3 %, ± 4 px; corners, median / p95, px (accepted)",
        *next(iter(results["affine"].values())),
        "ECC, structure: centre within 1 σ / 2 σ",
    ]
    return (
        f"{text}\n\n{table(heads, affine)}\n\nUnrelated pairs accepted by the affine "
        f'`ECC(contrast="structure")`: {pairs["accepted"]} of {pairs["pairs"]}.'
    )


def one_in(row: dict[str, dict[str, float]], sigmas: int) -> str:
    return percent(row["ECC, structure"][f"in_{sigmas}_sigma"], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scene", type=Path, default=Path(__file__).parents[2] / "shared/data/landsat7_rgb.tif"
    )
    add_readme_options(parser)
    given = parser.parse_args()
    if given.check_readme or given.update_readme:
        update_readme("sensors", to_markdown(read_results("sensors")), check=given.check_readme)
        return
    results = run(open_scene(given.scene), given.frames, given.seed, given.pairs)
    write_results("sensors", results)
    print(to_markdown(results))


if __name__ == "__main__":
    main()
