"""Is what is accepted right? Field data of the kinds that fool a registration: each draw knows its own truth.

Windows of three high-resolution scenes at whole-pixel offsets, averaged in blocks of 5 × 5, and then what happens
to real frames: an undeclared fill, bands enlarged from a coarser grid, regular gaps, ground that fixes one
direction, patterns of the detector, motions that a translation lacks, small and smooth frames, a limit near half of
the frame,
little in common, reversed contrast. Shape, value, factor, kernel, phase, orientation, size and scene are drawn.

    python benchmarks/trust.py [--draws 30] [--kind fill] [--method PCC] [--seed 1]
    python benchmarks/trust.py --update-readme

A frame is **wrong** if it was accepted with an error over max(4 σ, 0.1 px), σ in the direction of the error.

Besides, OpenCV's own test of its ECC: images under random motions of five models, 10 to 20 px away, of which the
matrix must be found to 0.1 px, root mean square over the frame.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    HERE,
    add_readme_options,
    described,
    machine,
    pixels,
    read_results,
    table,
    update_readme,
    versions,
    write_results,
)
from torch import Tensor
from torch.nn import functional as F

import torchalign as ta

NAME = "trust"
FACTOR = 5
Array = np.ndarray


class Draw(NamedTuple):
    """A pair of frames, and what is true of them."""

    moving: Array  # (H, W)
    reference: Array
    truth: Array | None  # (x, y), the displacement of the frame's centre; None: there is no right answer
    bound: float | None = None  # px: the information is there, the error must be below
    masks: tuple[Array, Array] | None = None  # of the moving frame and of the reference
    limit: float = 5.0


class Scenes:
    """Three high-resolution scenes, and windows of them."""

    def __init__(self, landsat: Path | None) -> None:
        random = torch.Generator().manual_seed(77)
        self.scenes = [_blobs(1400, random), _fields(1400, random)]
        if landsat is not None and landsat.exists():
            from PIL import Image

            grey = np.asarray(Image.open(landsat), dtype=np.float32).mean(-1)[300:1700, 400:1800]
            self.scenes.append((grey - grey.mean()) / grey.std())

    def pair(
        self, rng: np.random.Generator, size: tuple[int, int], factor: int = FACTOR, smear: Any = None
    ) -> tuple[Array, Array, Array]:
        """Two windows, (H, W) each, and the shift (x, y) in pixels that brings the first onto the second."""
        scene = self.scenes[rng.integers(len(self.scenes))]
        if smear is not None:
            scene = smear(scene)
        turns = rng.integers(4)
        scene = np.rot90(scene, turns)
        reach = 3 * factor
        top, left = (rng.integers(reach, scene.shape[i] - factor * size[i] - reach) for i in (0, 1))
        dy, dx = rng.integers(-reach + 1, reach, 2)
        first = decimate(scene, factor, top + dy, left + dx, size)
        second = decimate(scene, factor, top, left, size)
        return first, second, np.array([dx, dy]) / factor


def _spectral(size: int, response: Callable[[Tensor], Tensor], random: torch.Generator) -> Tensor:
    radius = torch.hypot(torch.fft.rfftfreq(size), torch.fft.fftfreq(size)[:, None])
    field = torch.fft.irfft2(
        torch.fft.rfft2(torch.randn(size, size, generator=random)) * response(radius), s=(size, size)
    )
    return (field - field.mean()) / field.std()


def _gauss(sigma: float) -> Callable[[Tensor], Tensor]:
    return lambda radius: torch.exp(-2 * (math.pi * sigma * radius).square())


def _blobs(size: int, random: torch.Generator) -> Array:
    """Noise smoothed by 2, and by 8 at a quarter of the amplitude before that: as in the reports."""
    return (_spectral(size, _gauss(2.0), random) + 0.5 * _spectral(size, _gauss(8.0), random)).numpy()


def _fields(size: int, random: torch.Generator) -> Array:
    """A landscape's 1/f spectrum, cut into levels: hard edges."""
    grey = _spectral(size, lambda radius: radius.clamp(min=1 / 128) ** -1.6, random)
    other = _spectral(size, lambda radius: radius.clamp(min=1 / 128) ** -1.6, random)
    mixed = 0.8 * grey + 0.7 * (2 * other).round() / 2
    return ((mixed - mixed.mean()) / mixed.std()).numpy()


def decimate(scene: Array, factor: int, top: int, left: int, size: tuple[int, int]) -> Array:
    window = scene[top : top + factor * size[0], left : left + factor * size[1]]
    return window.reshape(size[0], factor, size[1], factor).mean((1, 3)).astype(np.float64)


def grid_of(size: tuple[int, int]) -> tuple[Array, Array]:
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    return y - (size[0] - 1) / 2, x - (size[1] - 1) / 2


def a_size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.choice([112, 128, 150, 160])), int(rng.choice([112, 128, 150, 160]))


def noise(rng: np.random.Generator, size: tuple[int, int], sigma: float = 0.02) -> Array:
    return rng.normal(0, sigma, size)


# --- the kinds ---


def clean(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Nothing but noise: what the others are compared with."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    return Draw(m + noise(rng, size), r + noise(rng, size), t, 0.1)


def clouds(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Opaque clouds over 10–30 %, not masked."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    radius = torch.from_numpy(
        np.hypot(*np.meshgrid(np.fft.fftfreq(size[0]), np.fft.rfftfreq(size[1]), indexing="ij"))
    )
    field = np.fft.irfft2(
        np.fft.rfft2(rng.normal(size=size)) * np.asarray(radius.clamp(min=0.01)) ** -1.7, s=size
    )
    cloudy = field > np.quantile(field, 1 - rng.uniform(0.1, 0.3))
    m = np.where(cloudy, 4 + 0.3 * field / field.std(), m)
    return Draw(m + noise(rng, size), r + noise(rng, size), t, 0.15)


def area(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """An area of interest over 40–75 % of the frame: disc, tilted rectangle, half plane or blob."""
    y, x = grid_of(size)
    share = rng.uniform(0.42, 0.75)
    kind = rng.integers(4)
    angle = rng.uniform(0, math.pi)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == 0:
        measure = np.hypot(x - rng.uniform(-9, 9), y - rng.uniform(-9, 9))
    elif kind == 1:
        measure = np.maximum(np.abs(u) / rng.uniform(0.7, 1.4), np.abs(v))
    elif kind == 2:
        measure = u
    else:
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(size[0]), np.fft.rfftfreq(size[1]), indexing="ij"))
        measure = np.fft.irfft2(np.fft.rfft2(rng.normal(size=size)) * np.exp(-200 * radius**2), s=size)
    return measure < np.quantile(measure, share)


def fill(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """One constant outside an area of interest that stays where it is, not declared."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    inside, value = area(rng, size), rng.choice([0.0, 255.0, -9999.0, 65535.0, 5.0])
    m, r = 10 + m + noise(rng, size), 10 + r + noise(rng, size)
    return Draw(
        np.where(inside, m, value), np.where(inside, r, value), t, 0.03 if inside.mean() > 0.4 else None
    )


def water(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """8 bits, water at one value and snow saturated: constant, but moving with the ground."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    low, high = np.quantile(r, rng.uniform(0.1, 0.4)), np.quantile(r, rng.uniform(0.75, 0.95))
    m, r = (
        np.clip(20 + 200 * (image - low) / (high - low), 20, 255).round().clip(20, 220) for image in (m, r)
    )
    return Draw(m, r, t, 0.05)


def _enlarge(image: Array, factor: int, mode: str) -> Array:
    if mode == "nearest":
        return image.repeat(factor, 0).repeat(factor, 1)
    given = torch.from_numpy(image)[None, None]
    return F.interpolate(given, scale_factor=factor, mode=mode, align_corners=False)[0, 0].numpy()


def enlarged(factor: int) -> Callable[[Scenes, np.random.Generator], Draw]:
    def draw(scenes: Scenes, rng: np.random.Generator) -> Draw:
        coarse = int(rng.choice([144, 180, 240])) // factor
        m, r, t = scenes.pair(rng, (coarse, coarse))
        m, r = m + noise(rng, m.shape), r + noise(rng, r.shape)
        mode = str(rng.choice(["nearest", "nearest", "bilinear", "bicubic"]))
        m, r = (_enlarge(image, factor, mode) for image in (m, r))
        top, left = rng.integers(0, factor, 2)
        size = m.shape[0] - factor + 1
        m, r = (image[top : top + size, left : left + size] for image in (m, r))
        return Draw(m, r, t * factor, 0.3 if factor == 6 else 0.1, None, 5.0 * factor)

    draw.__doc__ = f"Delivered {factor} times as large: nearest, bilinear or bicubic."
    return draw


def gaps(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Regular stripes without data, masked, at other places in the two frames."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    y, x = grid_of(size)
    period, share = rng.integers(24, 42), rng.uniform(0.15, 0.3)
    slope = rng.choice([0.0, math.pi / 2, rng.uniform(0, math.pi)])
    along = y * math.cos(slope) + x * math.sin(slope) + 1000
    offset, phase = rng.uniform(0.2, 0.8) * period, rng.uniform(0, period)
    first, second = ((along + shift) % period >= share * period for shift in (phase, phase + offset))
    return Draw(m + noise(rng, size), r + noise(rng, size), t, 0.03, (first, second))


def aperture(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Ground smeared along a direction, which nothing but noise fixes then."""
    size = a_size(rng)
    length, axis = rng.uniform(40, 200), int(rng.integers(2))

    def smear(scene: Array) -> Array:
        frequency = np.fft.rfftfreq(scene.shape[axis])
        response = np.exp(-2 * (math.pi * length * frequency) ** 2)
        shape = (-1, 1) if axis == 0 else (1, -1)
        spread = np.fft.irfft(
            np.fft.rfft(scene, axis=axis) * response.reshape(shape), n=scene.shape[axis], axis=axis
        )
        spread = spread - spread.mean()
        return spread / spread.std()

    m, r, t = scenes.pair(rng, size, smear=smear)
    return Draw(m + noise(rng, size), r + noise(rng, size), t)


def hot_pixels(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """0.5 % of the detector's pixels are hot, by 10 standard deviations."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    hot = (rng.random(size) < 0.005) * rng.choice([5.0, 10.0, 20.0]) * rng.choice([-1.0, 1.0])
    return Draw(m + hot + noise(rng, size), r + hot + noise(rng, size), t, 0.03)


def column_stripes(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Columns (or rows) of the detector differ, by 0.1 to 0.3 standard deviations of the scene."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    level, axis = rng.uniform(0.1, 0.3), rng.integers(2)
    stripes = rng.normal(0, level, (1, size[1]) if axis else (size[0], 1))
    return Draw(m + stripes + noise(rng, size), r + stripes + noise(rng, size), t)


def distorted(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Barrel distortion or a tilt that a translation lacks; the truth is that of the centre."""
    from scipy.ndimage import map_coordinates

    size = a_size(rng)
    big = (size[0] * 3, size[1] * 3)
    m, r, t = scenes.pair(rng, big, factor=1 + FACTOR // 3)
    y, x = grid_of(size)
    if rng.integers(2):
        k = rng.uniform(0.4, 1.5) * rng.choice([-1, 1]) / np.hypot(*size) ** 2 * 4
        scale = 1 + k * (x**2 + y**2) / np.hypot(*size) * 2
        u, v = x * scale, y * scale
    else:
        angle = math.radians(rng.uniform(0.5, 2.0)) * rng.choice([-1, 1])
        u, v = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    cy, cx = (big[0] - 1) / 2, (big[1] - 1) / 2
    from scipy.ndimage import uniform_filter

    m, r = uniform_filter(m, 3), uniform_filter(r, 3)
    moved = map_coordinates(m, [cy + 3 * v, cx + 3 * u], order=3)
    still = map_coordinates(r, [cy + 3 * y, cx + 3 * x], order=3)
    return Draw(moved + noise(rng, size), still + noise(rng, size), t / 3)


def small(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """40 to 72 pixels a side."""
    size = int(rng.integers(40, 73)), int(rng.integers(40, 73))
    m, r, t = scenes.pair(rng, size)
    level = rng.choice([0.02, 0.1])
    return Draw(m + noise(rng, size, level), r + noise(rng, size, level), t)


def smooth(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Small and blurred by 2 to 4 pixels."""
    from scipy.ndimage import gaussian_filter

    size = int(rng.integers(44, 97)), int(rng.integers(44, 97))
    pad = 16
    m, r, t = scenes.pair(rng, (size[0] + 2 * pad, size[1] + 2 * pad))
    blur = rng.uniform(2, 4)
    m, r = (gaussian_filter(image, blur)[pad:-pad, pad:-pad] for image in (m, r))
    level = rng.choice([1e-3, 0.01, 0.03]) * r.std()
    return Draw(m + noise(rng, size, level), r + noise(rng, size, level), t)


def blob(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """One Gaussian blob with noise."""
    size = int(rng.integers(48, 129)), int(rng.integers(48, 129))
    y, x = grid_of(size)
    t, width = rng.uniform(-2, 2, 2), rng.uniform(5, 14)
    m = np.exp(-((x + t[0]) ** 2 + (y + t[1]) ** 2) / (2 * width**2))
    r = np.exp(-(x**2 + y**2) / (2 * width**2))
    level = rng.choice([1e-3, 5e-3])
    return Draw(m + noise(rng, size, level), r + noise(rng, size, level), t)


def wrapped(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """A sparse frame, a shift beyond half of it, and a limit near half of it."""
    size = int(rng.choice([64, 80, 96]))
    away = int(rng.integers(size // 2 + 2, size * 2 // 3))
    high, low = np.zeros((2 * size, 2 * size)), 0.02
    spots = rng.integers(4, size + 20, (14, 2))
    y, x = np.mgrid[: 2 * size, : 2 * size].astype(float)
    for row, column in spots:
        high += np.exp(-((x - column) ** 2 + (y - row) ** 2) / 8)
    r = high[:size, :size]
    m = high[:size, away : away + size] if rng.integers(2) else high[away : away + size, :size]
    return Draw(m + noise(rng, m.shape, low), r + noise(rng, r.shape, low), None, None, None, size / 2 - 1)


def little_in_common(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """Two dates of which 15 to 40 % of the contrast is the same."""
    size = int(rng.choice([100, 128])), int(rng.choice([100, 128]))
    m, r, t = scenes.pair(rng, size)
    share = rng.uniform(0.15, 0.4)
    own = [scenes.pair(rng, size)[0] for _ in range(2)]
    m, r = (
        math.sqrt(share) * image + math.sqrt(1 - share) * other
        for image, other in zip((m, r), own, strict=True)
    )
    return Draw(m + noise(rng, size), r + noise(rng, size), t)


def reversed_contrast(scenes: Scenes, rng: np.random.Generator) -> Draw:
    """What is bright in one is dark in the other, and something of its own in each."""
    size = a_size(rng)
    m, r, t = scenes.pair(rng, size)
    own = [scenes.pair(rng, size)[0] for _ in range(2)]
    level = rng.uniform(0, 0.8)
    return Draw(level * own[0] - m + noise(rng, size), r + level * own[1] + noise(rng, size), t)


KINDS: dict[str, Callable[[Scenes, np.random.Generator], Draw]] = {
    "clean": clean,
    "clouds": clouds,
    "fill": fill,
    "water and snow": water,
    "enlarged ×2": enlarged(2),
    "enlarged ×3": enlarged(3),
    "enlarged ×6": enlarged(6),
    "regular gaps": gaps,
    "one direction": aperture,
    "hot pixels": hot_pixels,
    "detector stripes": column_stripes,
    "distorted": distorted,
    "small": small,
    "small and smooth": smooth,
    "one blob": blob,
    "wrapped peak": wrapped,
    "little in common": little_in_common,
    "reversed contrast": reversed_contrast,
}
METHODS: dict[str, Callable[[float], ta.Aligner]] = {
    "PCC": lambda limit: ta.PCC(max_translation=limit),
    "auto": lambda limit: ta.Cascade(ta.PCC(max_translation=limit), ta.ECC(max_translation=limit)),
    "LGM": lambda limit: ta.LGM(max_translation=limit),
}


# --- measured ---


def measure(draw: Draw, make: Callable[[float], ta.Aligner]) -> dict[str, float]:
    """Status, error, σ along the error, and how many σ the error is, along each axis of the covariance."""
    masks = draw.masks or (None, None)

    def tensor(values: Array | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(np.ascontiguousarray(values))

    moving, reference = (torch.from_numpy(image).float()[None] for image in (draw.moving, draw.reference))
    estimate = make(draw.limit).estimate(moving[None], reference, tensor(masks[0]), tensor(masks[1]))
    row: dict[str, float] = {"status": int(estimate.status[0]), "score": float(estimate.score[0])}
    if row["status"]:
        return row
    row["sigma"] = float(estimate.sigma[0])
    if draw.truth is None:
        return row | {"error": math.inf, "ratio": math.inf, "z": []}
    size = draw.reference.shape
    centre = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
    warp = estimate.warp[0, :2].double().numpy()
    error = warp[:, :2] @ centre + warp[:, 2] - centre - draw.truth
    covariance = estimate.covariance[0].double().numpy()
    values, axes = np.linalg.eigh(covariance)
    z = (axes.T @ error) / np.sqrt(np.maximum(values, 1e-12))
    length = float(np.hypot(*error))
    along = math.sqrt(max(1e-12, error @ covariance @ error)) / max(length, 1e-9)
    return row | {
        "error": length,
        "along": along,
        "ratio": length / max(along, 1e-6),
        "z": [abs(float(v)) for v in z],
    }


def run(kind: str, method: str, scenes: Scenes, draws: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(draws):
        rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
        draw = KINDS[kind](scenes, rng)
        rows.append(measure(draw, METHODS[method]) | {"bound": draw.bound})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    accepted = [row for row in rows if not row["status"]]
    errors = sorted(row["error"] for row in accepted)
    wrong = [row for row in accepted if row["error"] > max(4 * row.get("along", 0.0), 0.1)]
    off = [row for row in accepted if row["bound"] is not None and row["error"] > row["bound"]]
    z = [value for row in accepted for value in row["z"]]
    return {
        "draws": len(rows),
        "accepted": len(accepted),
        "wrong": len(wrong),
        "beyond_bound": len(off),
        "bounded": sum(row["bound"] is not None for row in rows),
        "median": float(np.median(errors)) if errors else math.nan,
        "worst": errors[-1] if errors else math.nan,
        "sigma": float(np.median([row["sigma"] for row in accepted])) if accepted else math.nan,
        "z_rms": float(np.sqrt(np.mean(np.square(z)))) if z else math.nan,
        "within_1": float(np.mean([v <= 1 for v in z])) if z else math.nan,
        "within_2": float(np.mean([v <= 2 for v in z])) if z else math.nan,
    }


# --- OpenCV's test of its ECC ---

_PICTURES = ("astronaut", "camera", "chelsea", "coffee", "coins", "moon", "rocket")
_SIDE, _MARGIN, _LARGEST_RMS = 200, 40, 0.1
_MOTIONS = ("translation", "euclidean", "similarity", "affine", "homography")


def random_motion(motion: str, rng: np.random.Generator) -> Array:
    """(3, 3), reference → moving, as opencv/modules/video/test/test_ecc.cpp draws it."""
    warp = np.eye(3)
    warp[:2, 2] = rng.uniform(10, 20, 2)
    angle = math.pi / 30 + math.radians(rng.uniform(-2, 2))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    if motion in ("euclidean", "similarity"):
        warp[:2, :2] = turn * (1 if motion == "euclidean" else rng.uniform(0.95, 1.05))
    if motion in ("affine", "homography"):
        warp[:2, :2] += np.diag(rng.uniform(-0.05, 0.05, 2)) + np.fliplr(np.diag(rng.uniform(-0.03, 0.03, 2)))
    if motion == "homography":
        warp[2, :2] = rng.uniform(0.0001, 0.0003, 2)
    return warp


def protocol(draws: int, seed: int) -> dict[str, dict[str, int]]:
    """Of every method, how many are found, how many flagged, and how many wrong: accepted and further off."""
    import cv2
    from skimage import color, data, transform

    y, x = np.mgrid[:_SIDE, :_SIDE].astype(float)
    points = np.stack((x.ravel(), y.ravel(), np.ones(x.size)))
    far: dict[str, Any] = {"max_translation": 60.0}
    makers: dict[str, Callable[[Any], ta.Aligner]] = {
        "ECC": lambda motion: ta.ECC(motion=motion, **far),
        "Cascade": lambda motion: ta.Cascade(ta.PCC(**far), ta.ECC(motion=motion, **far)),
    }
    found = {name: {"cases": 0, "found": 0, "flagged": 0, "wrong": 0} for name in makers}
    side = _SIDE + 2 * _MARGIN
    for number, name in enumerate(_PICTURES):
        picture = getattr(data, name)()
        grey = color.rgb2gray(picture) if picture.ndim == 3 else picture / 255
        grey = transform.resize(grey, (side, side), anti_aliasing=True)
        for kind, motion in enumerate(_MOTIONS):
            for draw in range(draws):
                warp = random_motion(motion, np.random.default_rng([seed, number, kind, draw]))
                there = warp @ points
                there = (there[:2] / there[2] + _MARGIN).astype(np.float32).reshape(2, _SIDE, _SIDE)
                still = cv2.remap(grey.astype(np.float32), *there, cv2.INTER_LINEAR)
                moving = grey[_MARGIN : _MARGIN + _SIDE, _MARGIN : _MARGIN + _SIDE].astype(np.float32)
                images = [torch.from_numpy(np.ascontiguousarray(image))[None] for image in (moving, still)]
                for label, make in makers.items():
                    row = found[label]
                    row["cases"] += 1
                    estimate = make(motion).estimate(images[0][None], images[1])
                    if int(estimate.status[0]):
                        row["flagged"] += 1
                        continue
                    matrix = np.eye(3)
                    matrix[: estimate.warp.shape[-2]] = estimate.warp[0].double().numpy()
                    back = np.linalg.inv(matrix) @ points
                    apart = back[:2] / back[2] + _MARGIN - there.reshape(2, -1)
                    good = math.sqrt((apart**2).sum(0).mean()) <= _LARGEST_RMS
                    row["found" if good else "wrong"] += 1
    return found


# --- written down ---


def mixed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All kinds together: how many are accepted, wrong, over 0.3 px; and how many errors lie within 1 and 2 σ."""
    known = summary(rows)
    far = sum(row["error"] > 0.3 for row in rows if not row["status"])
    kept = ("draws", "accepted", "wrong", "within_1", "within_2", "z_rms")
    return {name: known[name] for name in kept} | {"over_0.3": far}


def report(results: Mapping[str, Any]) -> str:
    """The README's tables."""
    header = ["kind", "method", "accepted", "wrong", "median px", "worst px", "median σ px", "rms z"]
    rows = [
        [
            kind,
            method,
            f"{row['accepted']} of {row['draws']}",
            str(row["wrong"]),
            pixels(row["median"]),
            pixels(row["worst"]),
            pixels(row["sigma"]),
            "–" if row["z_rms"] is None else f"{row['z_rms']:.2f}",
        ]
        for kind, methods in results["kinds"].items()
        for method, row in methods.items()
    ]
    together = [
        [
            method,
            f"{row['accepted']} of {row['draws']}",
            str(row["wrong"]),
            str(row["over_0.3"]),
            f"{row['within_1']:.0%}",
            f"{row['within_2']:.0%}",
            f"{row['z_rms']:.2f}",
        ]
        for method, row in results["mixed"].items()
    ]
    header_together = ["all kinds", "accepted", "wrong", "over 0.3 px", "within 1 σ", "within 2 σ", "rms z"]
    cases = [
        [name, *(str(row[key]) for key in ("cases", "found", "flagged", "wrong"))]
        for name, row in results["protocol"].items()
    ]
    header_cases = ["OpenCV's test of ECC", "cases", "found to 0.1 px", "flagged", "wrong"]
    tables = (table(header_together, together), table(header_cases, cases), table(header, rows))
    return "\n\n".join((*tables, f"Seed {results['seed']}. {described(results)}"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scene", type=Path, default=HERE.parent.parent / "shared/data/landsat7_rgb.tif")
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--lgm-draws", type=int, default=30, help="at most so many of LGM, which is slow")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--rows", action="store_true", help="print every draw")
    add_readme_options(parser)
    given = parser.parse_args()
    if given.update_readme or given.check_readme:
        update_readme(NAME, report(read_results(NAME)), check=given.check_readme)
        return
    scenes = Scenes(given.scene)
    found: dict[str, Any] = {}
    all_rows: dict[str, list[dict[str, Any]]] = {}
    for kind in given.kind or KINDS:
        for method in given.method or METHODS:
            draws = min(given.draws, given.lgm_draws) if method == "LGM" else given.draws
            rows = run(kind, method, scenes, draws, given.seed)
            all_rows.setdefault(method, []).extend(rows)
            found.setdefault(kind, {})[method] = row = summary(rows)
            print(
                f"{kind:18} {method:5} accepted {row['accepted']:3}/{draws} wrong {row['wrong']:3} "
                f"beyond {row['beyond_bound']:3}/{row['bounded']:3} median {pixels(row['median'])} "
                f"worst {pixels(row['worst'])} σ {pixels(row['sigma'])} "
                f"z {row['z_rms']:.2f} {row['within_1']:.2f}/{row['within_2']:.2f}",
                flush=True,
            )
            if given.rows:
                for number, one in enumerate(rows):
                    print("  ", number, ta.Status(one["status"]).name, one)
    together = {method: mixed(rows) for method, rows in all_rows.items()}
    print(together)
    if not given.kind:
        cases = protocol(3, given.seed)
        print(cases)
        described_by = {
            "machine": machine(),
            "versions": versions("torchalign", "torch", "opencv-python-headless"),
        }
        results = {"seed": given.seed, "mixed": together, "protocol": cases, "kinds": found}
        write_results(NAME, described_by | results)


if __name__ == "__main__":
    main()
