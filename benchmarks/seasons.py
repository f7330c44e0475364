"""Series with a truth whose seasons, sun, clouds and fields change: what references of a series disagree about.

A high-resolution scene is cut into fields, each with a yearly course of its own. Relief is shaded by the sun of its
date, and casts shadows, trees too; fields change for good; clouds cover what they cover. Only then is the scene
decimated, at an offset in whole fine pixels: shifts are exact, and no interpolation kernel is involved.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from torchalign.cube.sun import sun_position

__all__ = ["KINDS", "SeasonalSeries", "landsat_scene", "simulate_seasons"]

# what `simulate_seasons` is asked for, by the names of the tables
KINDS = {
    "plain": {"seasons": False},
    "seasons": {},
    "relief": {"relief": 1.0},
    "everything": {"relief": 1.0, "clouds": 0.5, "change": 0.15},
}


class SeasonalSeries(NamedTuple):
    cube: Tensor  # (T, 1, H, W)
    clear: Tensor  # (T, H, W) bool
    shift: Tensor  # (T, 2), (x, y) in pixels, what brings each frame to the common grid
    sun: Tensor  # (T, 2), elevation and azimuth in degrees
    time: np.ndarray  # (T,) datetime64


def landsat_scene(side: int = 1350) -> np.ndarray:
    """The middle of the development scene; skips nothing: the file must be there."""
    from pathlib import Path

    import rasterio

    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "landsat7_rgb.tif"
    with rasterio.open(path) as source:
        return source.read(window=((250, 250 + side), (400, 400 + side))).mean(0, dtype=np.float32) / 255


def _rough_ground(side: int, random: np.random.Generator) -> np.ndarray:
    """Heights with a steep spectrum, in units of their own."""
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    amplitude = np.where(radius > 0, (radius + 1 / side) ** -2 / (1 + (radius / 0.02) ** 4), 0)
    phase = np.exp(2j * np.pi * random.random(radius.shape))
    height = np.fft.irfft2(amplitude * phase, s=(side, side))
    return (height / height.std()).astype(np.float32)


def _fields(scene: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected areas of one brightness, numbered."""
    smooth = ndimage.gaussian_filter(scene, 4)
    level = np.digitize(smooth, np.quantile(smooth, np.linspace(0, 1, 13)[1:-1]))
    number, total = np.zeros(scene.shape, int), 0
    for one in range(12):
        area, count = ndimage.label(level == one)
        number += np.where(area > 0, area + total, 0)
        total += count
    return number, total


def _lit(height: np.ndarray, sun: tuple[float, float], pixel: float) -> np.ndarray:
    """Where the sun reaches the ground, by looking towards it step by step."""
    elevation, azimuth = np.deg2rad(sun)
    lit = np.ones(height.shape, bool)
    for distance in range(3, 42, 3):
        rows, columns = round(-distance * np.cos(azimuth)), round(distance * np.sin(azimuth))
        towards = np.roll(height, (-rows, -columns), (0, 1))
        lit &= towards <= height + distance * pixel * np.tan(elevation)
    return lit


def simulate_seasons(
    scene: np.ndarray,
    *,
    frames: int = 48,
    size: int = 192,
    factor: int = 5,
    seed: int = 0,
    seasons: bool = True,
    relief: float = 0.0,
    clouds: float = 0.0,
    change: float = 0.0,
    jitter: float = 0.45,
    farthest: float = 2.0,
    noise: float = 0.006,
    pixel: float = 10.0,
    latitude: float = 46.0,
    longitude: float = 14.5,
) -> SeasonalSeries:
    """Two years of a scene (H, W in [0, 1]) at `factor` times the pixel size, see the module's docstring.

    `clouds` is the share of frames that have some; `change` the share of ground that another cover has from the
    middle of the series on; `jitter` and `farthest`, of the shifts, are in pixels; `relief` multiplies slopes of a
    standard deviation of 0.3 over the left part of the scene, the right one is flat.
    """
    random = np.random.default_rng(seed)
    margin = int(farthest * factor) + 5
    side = size * factor + 2 * margin
    top, left = (np.array(scene.shape) - side) // 2
    scene = np.clip(scene[top : top + side, left : left + side], 0.02, None)
    number, total = _fields(scene)
    cover = random.integers(0, 8, total + 1)[number]
    course = random.uniform(0.1, 0.6, 8)
    late = random.uniform(-60, 60, 8) + random.choice([0, 180], 8, p=[0.7, 0.3])
    fine = pixel / factor
    height = _rough_ground(side, random)
    slopes = np.gradient(height)
    height *= 0.3 * fine / np.hypot(*slopes).std()
    hilly = ndimage.gaussian_filter1d((np.arange(side) < 0.6 * side).astype(np.float32), 20)
    height *= relief * hilly
    down, right = (slope / fine for slope in np.gradient(height))
    trees = ndimage.gaussian_filter(np.where(cover < 2, 18.0, 0.0), 1)
    other = scene.T[::-1] * scene.mean() / scene.mean()
    rough = ndimage.gaussian_filter(random.standard_normal(scene.shape), 8 * factor)
    changed = rough > np.quantile(rough, 1 - change)
    days = np.sort(np.round(np.arange(frames) * (730 / frames) + random.uniform(-4, 4, frames))).astype(int)
    time = np.datetime64("2016-01-03T10:00") + days * np.timedelta64(1, "D")
    suns = np.stack(sun_position(time, latitude, longitude), -1)
    offset = np.clip(
        np.round(random.normal(0, jitter * factor, (frames, 2))), -farthest * factor, farthest * factor
    )
    offset = offset.astype(int)
    y, x = np.mgrid[:size, :size]
    images, clear = [], []
    for frame in range(frames):
        ground = np.where(changed, other, scene) if frame >= frames // 2 else scene
        if seasons:
            growth = 1 + course * np.cos(2 * np.pi * (days[frame] - 200 - late) / 365)
            ground = ground * ndimage.gaussian_filter(growth[cover].astype(np.float32), 1)
        if relief:
            elevation, azimuth = np.deg2rad(suns[frame])
            slope = down * np.cos(azimuth) - right * np.sin(azimuth)
            facing = (np.sin(elevation) + np.cos(elevation) * slope) / np.sqrt(1 + down**2 + right**2)
            shade = np.clip(facing, 0, None) / np.sin(elevation)
            lit = _lit(height + trees, tuple(suns[frame]), fine).astype(np.float32)
            ground = ground * (0.25 + 0.75 * shade * ndimage.gaussian_filter(lit, 0.8))
        dy, dx = offset[frame] + margin
        image = ground[dy : dy + size * factor, dx : dx + size * factor]
        image = image.reshape(size, factor, size, factor).mean((1, 3))
        image = image * random.uniform(0.85, 1.15) + random.uniform(-0.03, 0.03)
        image = image + random.normal(0, noise, image.shape)
        cloud = np.zeros((size, size), bool)
        if random.random() < clouds:
            wanted = random.uniform(0, 0.9)
            while cloud.mean() < wanted:
                (row, column), radius = random.uniform(0, size, 2), random.uniform(size / 20, size / 6)
                cloud |= (y - row) ** 2 + (x - column) ** 2 < radius**2
            billows = ndimage.gaussian_filter(random.standard_normal((size, size)), 2.5)
            image = np.where(cloud, random.uniform(0.5, 0.9) + 0.06 * billows / billows.std(), image)
        images.append(image)
        clear.append(~cloud)
    return SeasonalSeries(
        torch.from_numpy(np.stack(images).astype(np.float32))[:, None],
        torch.from_numpy(np.stack(clear)),
        torch.from_numpy(offset[:, ::-1] / factor),
        torch.from_numpy(suns),
        time,
    )
