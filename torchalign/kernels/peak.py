"""The highest sample of a correlation surface within a limit, and what it is measured by, as one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.sampling import divide, frames_of, kernel, launch, operator

# One program walks the surface of a frame.
MOST_SAMPLES = 2**19


@triton.jit
def _vertex(before, centre, after):
    """Where the parabola through three equidistant samples, the middle one highest, has its vertex."""
    curvature = before - 2 * centre + after
    vertex = divide(0.5 * (before - after), tl.where(curvature < 0, curvature, -1.0))
    return tl.minimum(tl.maximum(tl.where(curvature < 0, vertex, 0.0), -0.5), 0.5)


@kernel
def peak_frames(
    surface,  # (N, h, w)
    found,  # (N, 6)
    rows,
    columns,
    step_y: tl.float64,
    step_x: tl.float64,
    reach: tl.float64,
    margin: tl.float64,
    least: tl.float64,
    TINY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: one frame."""
    frame = tl.program_id(0).to(tl.int64)
    samples = rows * columns
    plane = surface + frame * samples
    down = tl.cast(step_y, COMPUTE)
    across = tl.cast(step_x, COMPUTE)
    limit = tl.cast(reach, COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    square = tl.zeros((BLOCK,), COMPUTE)
    highest = tl.full((BLOCK,), float("-inf"), COMPUTE)
    inside = tl.full((BLOCK,), float("-inf"), COMPUTE)
    order = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, samples, BLOCK):
        place = first + tl.arange(0, BLOCK)
        live = place < samples
        value = tl.load(plane + place, mask=live, other=0)
        total += value
        square += value * value
        highest = tl.maximum(highest, tl.where(live, value, float("-inf")))
        # lags from the lowest on: −n // 2 … (n − 1) // 2
        y = (place // columns + rows // 2) % rows
        x = (place % columns + columns // 2) % columns
        lag_y = (y - rows // 2).to(COMPUTE) * down
        lag_x = (x - columns // 2).to(COMPUTE) * across
        within = live & (lag_y * lag_y + lag_x * lag_x <= limit * limit)
        near = tl.where(within, value, float("-inf"))
        here = y * columns + x
        better = (near > inside) | ((near == inside) & (here < order))
        order = tl.where(better, here, order)
        inside = tl.maximum(inside, near)
    height = tl.max(inside, 0)
    best = tl.min(tl.where(inside == height, order, samples), 0)
    y = best // columns - rows // 2
    x = best % columns - columns // 2
    mean = divide(tl.sum(total, 0), tl.cast(samples, COMPUTE))
    power = divide(tl.sum(square, 0), tl.cast(samples, COMPUTE))
    spread = tl.sqrt(tl.maximum(power - mean * mean, 0.0))
    positive = tl.maximum(height, 0.0)
    significance = divide(positive, spread + TINY)
    top = tl.max(highest, 0)
    outside = (top > tl.cast(margin, COMPUTE) * positive) & (top >= tl.cast(least, COMPUTE) * spread)
    row = (y + rows) % rows
    column = (x + columns) % columns
    centre = tl.load(plane + row * columns + column)
    left = tl.load(plane + row * columns + (column + columns - 1) % columns)
    right = tl.load(plane + row * columns + (column + 1) % columns)
    above = tl.load(plane + (row + rows - 1) % rows * columns + column)
    below = tl.load(plane + (row + 1) % rows * columns + column)
    out = found + 6 * frame
    tl.store(out, across * (x.to(COMPUTE) + _vertex(left, centre, right)))
    tl.store(out + 1, down * (y.to(COMPUTE) + _vertex(above, centre, below)))
    tl.store(out + 2, significance)
    tl.store(out + 3, outside.to(COMPUTE))
    tl.store(out + 4, height)
    tl.store(out + 5, spread)


def peak(
    surface: Tensor, steps: tuple[float, float], reach: float, margin: float, least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """See :func:`torchalign.functional.peak.coarse_peak`.

    Args:
        surface: (..., h, w), finite.
        steps: pixels from one sample to the next, along y and x.
        reach: how far a peak may lie, in pixels.
        margin: a peak beyond the reach counts if it exceeds the one within by this factor,
        least: and this many standard deviations of the surface.

    Returns:
        shift (..., 2), significance (...,), outside (...,) bool, height (...,) and spread (...,); ``None`` where
        the surface is too large for one program.
    """
    if surface.shape[-2] * surface.shape[-1] > MOST_SAMPLES:
        return None
    found = _peak(surface, list(steps), reach, margin, least)
    return found[..., :2], found[..., 2], found[..., 3] > 0, found[..., 4], found[..., 5]


@operator("peak", lambda surface: surface.new_empty((*surface.shape[:-2], 6)))
def _peak(surface: Tensor, steps: list[float], reach: float, margin: float, least: float) -> Tensor:
    found = surface.new_empty((*surface.shape[:-2], 6))
    numbers = *surface.shape[-2:], *steps, reach, margin, least
    launch(peak_frames, frames_of(surface), (surface, found), numbers)
    return found
