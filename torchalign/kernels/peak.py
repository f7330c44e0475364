"""The highest sample of a correlation surface within a limit, and what it is measured by, as one kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import divide, store_pair
from torchalign.kernels.launching import kernel, launch, operator, planes_of

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
    surface,  # (N, h, w), finite
    shift,  # (N, 2), pixels
    significances,  # (N,)
    outsides,  # (N,), 0 and 1
    heights,  # (N,)
    spreads,  # (N,)
    rows,
    columns,
    step_y: tl.float64,  # pixels from one sample to the next
    step_x: tl.float64,
    reach: tl.float64,  # how far a peak may lie, in pixels
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
    shift_x = across * (x.to(COMPUTE) + _vertex(left, centre, right))
    shift_y = down * (y.to(COMPUTE) + _vertex(above, centre, below))
    store_pair(shift, frame, shift_x, shift_y)
    tl.store(significances + frame, significance)
    tl.store(outsides + frame, outside.to(tl.uint8))
    tl.store(heights + frame, height)
    tl.store(spreads + frame, spread)


@operator(planes_of(MOST_SAMPLES))
def peak(
    surface: Tensor, steps: list[float], reach: float, margin: float, least: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """See :func:`torchalign.functional.peak.coarse_peak`.

    A peak beyond the ``reach`` counts if it exceeds the one within by the factor ``margin``, and ``least`` standard
    deviations of the surface.

    Returns:
        shift (..., 2), significance (...,), outside (...,) bool, height (...,) and spread (...,).
    """
    lead = surface.shape[:-2]
    shift, outside = surface.new_empty((*lead, 2)), surface.new_empty(lead, dtype=torch.bool)
    significance, height, spread = (surface.new_empty(lead) for _ in range(3))
    found = shift, significance, outside, height, spread
    yield found
    launch(peak_frames, lead, (), (surface, *found), (*surface.shape[-2:], *steps, reach, margin, least))
