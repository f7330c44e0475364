"""Textures: holes filled, how much around a sample is usable, their unit and their local contrast, a kernel each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import block_of, cell_of, divide
from torchalign.kernels.launching import expanded, kernel, launch, operator, planes_of
from torchalign.kernels.sampling import neighbour, padded, triangle

# One program takes the mean of a frame, or walks its samples.
MOST_PIXELS, MOST_SAMPLES = 2**22, 2**20


@kernel
def mean_frames(
    image,  # (N, H, W)
    usable,  # (N, H, W), 0 and 1
    means,  # (N, 2): the mean of what is usable, and its share
    pixels,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: one frame."""
    frame = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), COMPUTE)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, pixels, BLOCK):
        place = first + tl.arange(0, BLOCK)
        good = tl.load(usable + frame * pixels + place, mask=place < pixels, other=0) != 0
        value = tl.load(image + frame * pixels + place, mask=place < pixels, other=0)
        total += tl.where(good, value, 0.0)
        count += good.to(tl.int32)
    whole = tl.sum(count, 0).to(COMPUTE)
    tl.store(means + 2 * frame, divide(tl.sum(total, 0), tl.maximum(whole, 1.0)))
    tl.store(means + 2 * frame + 1, divide(whole, tl.cast(pixels, COMPUTE)))


@kernel
def fill_frames(
    image,  # (N, H, W)
    usable,  # (N, H, W), 0 and 1
    means,  # (N, 2)
    filled,  # (N, H, W)
    height,
    width,
    least: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of pixels of one frame; where all are usable, it reads each once."""
    frame, place, live, x, y = cell_of(height, width, BLOCK)
    pixels = height * width
    plane = image + frame * pixels
    mask = usable + frame * pixels
    mean = tl.load(means + 2 * frame)
    good = tl.load(mask + place, mask=live, other=1) != 0
    centred = tl.load(plane + place, mask=live, other=0) - mean
    if tl.min(good.to(tl.int32), 0) == 0:
        total = tl.zeros((BLOCK,), COMPUTE)
        weight = tl.zeros((BLOCK,), COMPUTE)
        # 7 × 7 pixels, triangular, the border continued
        for j in range(-3, 4):
            for i in range(-3, 4):
                at = neighbour(x, y, i, j, height, width)
                share = triangle(i, j, 3)
                seen = tl.load(mask + at, mask=live & ~good, other=0) != 0
                value = tl.load(plane + at, mask=live & ~good, other=0) - mean
                total += tl.where(seen, value, 0.0) * share
                weight += seen.to(COMPUTE) * share
        local = divide(total, tl.maximum(weight, tl.cast(least, COMPUTE)))
        centred = tl.where(good, centred, local)
    tl.store(filled + frame * pixels + place, centred, mask=live)


@kernel
def cover_frames(
    usable,  # (N, H, W), 0 and 1
    share,  # (N, h, w)
    height,
    width,
    rows,
    columns,
    tall,  # the most pixels of a sample's window
    wide,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of samples of one frame; windows as in ``F.interpolate(mode="area")``."""
    frame, place, live, x, y = cell_of(rows, columns, BLOCK)
    top = (y * height) // rows
    left = (x * width) // columns
    bottom = ((y + 1) * height + rows - 1) // rows
    right = ((x + 1) * width + columns - 1) // columns
    total = tl.zeros((BLOCK,), tl.int32)
    for j in range(tall):
        for i in range(wide):
            inside = live & (top + j < bottom) & (left + i < right)
            at = frame * height * width + (top + j) * width + left + i
            total += (tl.load(usable + at, mask=inside, other=0) != 0).to(tl.int32)
    area = ((bottom - top) * (right - left)).to(COMPUTE)
    tl.store(share + frame * rows * columns + place, divide(total.to(COMPUTE), area), mask=live)


@kernel
def unit_frames(
    field,  # (N, h, w), of mean nearly 0
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
    HAS_WEIGHTS: tl.constexpr,
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
    if HAS_WEIGHTS:
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


def fill(image: Tensor, usable: Tensor, least: float) -> tuple[Tensor, Tensor] | None:
    """(..., H, W), see :func:`torchalign.functional.texture.centre`; and (..., 2), mean and share of what is usable.

    A hole is filled from neighbours of at least the weight ``least`` in all.
    """
    usable = usable.expand(image.shape)
    means = _usable_mean(image, usable)
    return None if means is None else (_filled_holes(image, usable, means, least), means)


@operator(planes_of(MOST_PIXELS))
def _usable_mean(image: Tensor, usable: Tensor) -> Iterator[Tensor]:
    lead, size = image.shape[:-2], image.shape[-2:]
    means = image.new_empty((*lead, 2))
    yield means
    launch(mean_frames, lead, (), (image, usable, means), (math.prod(size),))


@operator()
def _filled_holes(image: Tensor, usable: Tensor, means: Tensor, least: float) -> Iterator[Tensor]:
    filled = image.new_empty(image.shape)
    yield filled
    size = image.shape[-2:]
    launch(fill_frames, image.shape[:-2], size, (image, usable, means, filled), (*size, least))


@operator()
def coverage(usable: Tensor, size: list[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """(..., h, w): the share of pixels (..., H, W) that is usable around each sample of a coarser grid."""
    lead, frame = usable.shape[:-2], usable.shape[-2:]
    share = usable.new_empty((*lead, *size), dtype=dtype)
    yield share
    sizes = zip(frame, size, strict=True)
    most = (-(-length // samples) + (length % samples > 0) for length, samples in sizes)
    launch(cover_frames, lead, size, (usable, share), (*frame, *size, *most))


@operator(planes_of(MOST_SAMPLES))
def units(field: Tensor, noise: Tensor, empty: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(...,): the deviation of every frame, 1 where it is no more than ``noise``, not finite, or ``empty``; and where."""
    lead = field.shape[:-2]
    unit, flat = field.new_empty(lead), empty.new_empty(lead)
    yield unit, flat
    noise, empty = expanded(lead, 0, noise, empty)
    launch(unit_frames, lead, (), (field, noise, empty, unit, flat), (math.prod(field.shape[-2:]),))


def contrast(
    field: Tensor, unit: Tensor, weights: Tensor | None, typical: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """See :func:`torchalign.functional.texture.local_contrast`, of a field in its ``unit`` (...,).

    ``typical`` makes of the local variance (..., h, w) its median (...,), which may be NaN.

    Returns:
        (..., h, w), and the same times the weights.
    """
    detail = _smooth(field, unit, False)
    variance = _smooth(detail, unit, True)
    weights = None if weights is None else weights.expand(field.shape)
    plain, weighted = _contrast(detail, variance, typical(variance), weights)
    return plain, plain if weights is None else weighted


@operator()
def _smooth(field: Tensor, unit: Tensor, squared: bool) -> Iterator[Tensor]:
    result = field.new_empty(field.shape)
    yield result
    size = field.shape[-2:]
    launch(smooth_frames, field.shape[:-2], size, (field, unit, result), size, SQUARED=squared)


@operator()
def _contrast(
    detail: Tensor, variance: Tensor, typical: Tensor, weights: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    plain, weighted = detail.new_empty(detail.shape), detail.new_empty(0 if weights is None else detail.shape)
    yield plain, weighted
    size = detail.shape[-2:]
    launch(
        contrast_frames,
        detail.shape[:-2],
        size,
        (detail, variance, typical, weights, plain, weighted),
        (math.prod(size),),
        # below it the derivative of the root overflows
        LEAST=torch.finfo(detail.dtype).tiny ** 0.5,
    )


@operator()
def shares(coverage: Tensor, mean: Tensor, lowest: float, highest: float) -> Iterator[tuple[Tensor, Tensor]]:
    """(..., h, w) twice: of the shares of samples that are usable what :func:`functional.texture._shares` makes."""
    weights, cover = coverage.new_empty(coverage.shape), coverage.new_empty(coverage.shape)
    yield weights, cover
    size = coverage.shape[-2:]
    tensors, numbers = (coverage, mean, weights, cover), (*size, lowest, highest)
    launch(share_frames, coverage.shape[:-2], size, tensors, numbers)
