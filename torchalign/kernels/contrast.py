"""The local contrast of textures: their unit, what stands out of the local mean, and its variance, a kernel each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from torchalign.kernels.sampling import (
    block_of,
    cell_of,
    divide,
    frames_of,
    kernel,
    launch,
    neighbour,
    operator,
    padded,
    triangle,
)

# One program walks the samples of a frame.
MOST_SAMPLES = 2**20


@kernel
def unit_frames(
    field,  # (N, h, w)
    noise,  # (N,)
    empty,  # (N,), 0 and 1
    unit,  # (N,)
    flat,  # (N,), 0 and 1
    samples,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: one frame; the root of the mean square, 1 where there is nothing to see."""
    frame = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, samples, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(field + frame * samples + place, mask=place < samples, other=0).to(tl.float64)
        square += value * value
    scale = tl.sqrt(tl.sum(square, 0) / samples).to(COMPUTE)
    known = (scale > tl.load(noise + frame)) & (scale < float("inf")) & (tl.load(empty + frame) == 0)
    tl.store(unit + frame, tl.where(known, scale, 1.0))
    tl.store(flat + frame, (~known).to(tl.uint8))


@kernel
def smooth_frames(
    field,  # (N, h, w)
    unit,  # (N,)
    result,  # (N, h, w)
    rows,
    columns,
    SQUARED: tl.constexpr,  # the mean of squares; else the field, in its unit, less its mean
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of samples of one frame. Means over 7 × 7 samples, triangular, the border continued."""
    frame, place, live, x, y = cell_of(rows, columns, BLOCK)
    samples = rows * columns
    plane = field + frame * samples
    scale = tl.zeros((BLOCK,), COMPUTE) + tl.load(unit + frame)
    total = tl.zeros((BLOCK,), COMPUTE)
    for j in range(-3, 4):
        for i in range(-3, 4):
            share = triangle(i, j, 3)
            value = tl.load(plane + neighbour(x, y, i, j, rows, columns), mask=live, other=0)
            if SQUARED:
                total += value * value * share
            else:
                total += divide(value, scale) * share
    if not SQUARED:
        total = divide(tl.load(plane + place, mask=live, other=0), scale) - total
    tl.store(result + frame * samples + place, total, mask=live)


@kernel
def contrast_frames(
    detail,  # (N, h, w)
    variance,  # (N, h, w)
    typical,  # (N,)
    weights,  # (N, h, w)
    contrast,  # (N, h, w)
    weighted,  # (N, h, w)
    samples,
    WEIGHTED: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of samples of one frame."""
    frame, place, live = block_of(samples, BLOCK)
    at = frame * samples + place
    median = tl.load(typical + frame)
    total = tl.load(variance + at, mask=live, other=0) + tl.where(median == median, median, 0.0)
    flat = total <= LEAST
    value = tl.load(detail + at, mask=live, other=0)
    value = tl.where(flat, 0.0, divide(value, tl.sqrt(tl.where(flat, 1.0, total))))
    tl.store(contrast + at, value, mask=live)
    if WEIGHTED:
        tl.store(weighted + at, value * tl.load(weights + at, mask=live, other=0), mask=live)


@kernel
def share_frames(
    coverage,  # (N, h, w)
    mean,  # (N, h, w), of what is around
    weights,  # (N, h, w)
    cover,  # (N, h, w)
    rows,
    columns,
    lowest: tl.float64,
    highest: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of samples of one frame; see functional.texture._shares."""
    frame, place, live, x, y = cell_of(rows, columns, BLOCK)
    samples = rows * columns
    plane = coverage + frame * samples
    total = tl.zeros((BLOCK,), COMPUTE)
    for j in range(-1, 2):
        row = padded(y + j, rows, False)
        for i in range(-1, 2):
            column = padded(x + i, columns, False)
            least = tl.full((BLOCK,), float("inf"), COMPUTE)
            for n in range(-1, 2):
                for m in range(-1, 2):
                    at = neighbour(column, row, m, n, rows, columns)
                    least = tl.minimum(least, tl.load(plane + at, mask=live, other=1))
            total += least * triangle(i, j, 1)
    out = frame * samples + place
    tl.store(cover + out, tl.minimum(tl.maximum(2 * total - 1, 0.0), 1.0), mask=live)
    low = total * 0 + tl.cast(lowest, COMPUTE)
    share = divide(tl.load(mean + out, mask=live, other=0) - low, tl.cast(highest, COMPUTE) - low)
    tl.store(weights + out, tl.minimum(tl.maximum(share, 0.0), 1.0), mask=live)


def units(field: Tensor, noise: Tensor, empty: Tensor) -> tuple[Tensor, Tensor] | None:
    """The deviation of every frame, 1 where it is no more than ``noise``, not finite, or ``empty``; and where it is.

    Args:
        field: (..., h, w), of mean nearly 0.
        noise: (...,).
        empty: (...,) bool.

    Returns:
        (...,) and (...,) bool; ``None`` where a frame is too large for one program.
    """
    if field.shape[-2] * field.shape[-1] > MOST_SAMPLES:
        return None
    return tuple(_units(field, noise.expand(field.shape[:-2]), empty.expand(field.shape[:-2])))


@operator("units", lambda field, noise, empty: (field.new_empty(noise.shape), empty.new_empty(noise.shape)))
def _units(field: Tensor, noise: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    unit, flat = field.new_empty(noise.shape), empty.new_empty(noise.shape)
    tensors = field, noise, empty, unit, flat
    launch(unit_frames, frames_of(field), tensors, (field.shape[-2] * field.shape[-1],))
    return unit, flat


def contrast(
    field: Tensor, unit: Tensor, weights: Tensor | None, typical: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """See :func:`torchalign.functional.texture.local_contrast`, of a field in its ``unit`` (...).

    Args:
        field: (..., h, w).
        unit: (...,), what it is divided by.
        weights: (..., h, w) or ``None``.
        typical: makes of the local variance (..., h, w) its median (...,), which may be NaN.

    Returns:
        (..., h, w), and the same times the weights.
    """
    detail = _smooth(field, unit, False)
    variance = _smooth(detail, unit, True)
    weights = None if weights is None else weights.expand(field.shape)
    plain, weighted = _contrast(detail, variance, typical(variance), weights)
    return plain, plain if weights is None else weighted


@operator("smooth", lambda field, unit, squared: field.new_empty(field.shape))
def _smooth(field: Tensor, unit: Tensor, squared: bool) -> Tensor:
    result = field.new_empty(field.shape)
    size = field.shape[-2:]
    tensors = field, unit, result
    launch(smooth_frames, frames_of(field), tensors, size, samples=size[0] * size[1], SQUARED=squared)
    return result


def _contrast_like(
    detail: Tensor, variance: Tensor, typical: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    return detail.new_empty(detail.shape), detail.new_empty(0 if weights is None else detail.shape)


@operator("contrast", _contrast_like)
def _contrast(
    detail: Tensor, variance: Tensor, typical: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    plain, weighted = _contrast_like(detail, variance, typical, weights)
    samples = detail.shape[-2] * detail.shape[-1]
    launch(
        contrast_frames,
        frames_of(detail),
        (detail, variance, typical, weights, plain, weighted),
        (samples,),
        samples=samples,
        WEIGHTED=weights is not None,
        # below it the derivative of the root overflows
        LEAST=torch.finfo(detail.dtype).tiny ** 0.5,
    )
    return plain, weighted


@operator("shares", lambda coverage: (coverage.new_empty(coverage.shape), coverage.new_empty(coverage.shape)))
def shares(coverage: Tensor, mean: Tensor, lowest: float, highest: float) -> tuple[Tensor, Tensor]:
    """(..., h, w) twice: of the shares of samples that are usable what :func:`functional.texture._shares` makes."""
    weights, cover = coverage.new_empty(coverage.shape), coverage.new_empty(coverage.shape)
    size = coverage.shape[-2:]
    tensors, numbers = (coverage, mean, weights, cover), (*size, lowest, highest)
    launch(share_frames, frames_of(coverage), tensors, numbers, samples=size[0] * size[1])
    return weights, cover
