"""Holes filled and the mean taken off, and how much around a sample is usable, as kernels."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from torchalign.kernels.sampling import (
    cell_of,
    divide,
    frames_of,
    kernel,
    launch,
    neighbour,
    operator,
    triangle,
)

# One program takes the mean of a frame.
MOST_PIXELS = 2**22


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


def fill(image: Tensor, usable: Tensor, least: float) -> tuple[Tensor, Tensor] | None:
    """The image less the mean of what is usable, its holes filled from their neighbours.

    Args:
        image: (..., H, W), finite.
        usable: bool, (..., H, W).
        least: a hole is filled from neighbours of at least this (triangular) weight in all.

    Returns:
        (..., H, W); and (..., 2), the mean and the share of what is usable. ``None`` where a frame is too large for
        one program.
    """
    if image.shape[-2] * image.shape[-1] > MOST_PIXELS:
        return None
    usable = usable.expand(image.shape)
    means = _usable_mean(image, usable)
    return _fill_with(image, usable, means, least), means


@operator("mean", lambda image: image.new_empty((*image.shape[:-2], 2)))
def _usable_mean(image: Tensor, usable: Tensor) -> Tensor:
    means = image.new_empty((*image.shape[:-2], 2))
    launch(mean_frames, frames_of(image), (image, usable, means), (image.shape[-2] * image.shape[-1],))
    return means


@operator("fill", lambda image: image.new_empty(image.shape))
def _fill_with(image: Tensor, usable: Tensor, means: Tensor, least: float) -> Tensor:
    filled = image.new_empty(image.shape)
    size = image.shape[-2:]
    tensors = image, usable, means, filled
    launch(fill_frames, frames_of(image), tensors, (*size, least), samples=size[0] * size[1])
    return filled


@operator("coverage", lambda usable, size, dtype: usable.new_empty((*usable.shape[:-2], *size), dtype=dtype))
def coverage(usable: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """(..., h, w): the share of pixels (..., H, W) that is usable around each sample of a coarser grid."""
    share = usable.new_empty((*usable.shape[:-2], *size), dtype=dtype)
    sizes = zip(usable.shape[-2:], size, strict=True)
    most = (-(-length // samples) + (length % samples > 0) for length, samples in sizes)
    numbers = *usable.shape[-2:], *size, *most
    launch(cover_frames, frames_of(usable), (usable, share), numbers, samples=size[0] * size[1])
    return share
