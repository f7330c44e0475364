"""The factor by which frames were enlarged: their sharpness column by column, and how it repeats, a kernel each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import divide
from torchalign.kernels.launching import block_length, kernel, launch, operator

_FACTORS = 8


@kernel
def profile_frames(
    image,  # (N, H, W)
    usable,  # (N, H, W), 0 and 1
    profile,  # (N, 2 (W − 2) + 2 (H − 2))
    height,
    width,
    every_row,  # which tells the columns
    every_column,
    HAS_USABLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 256,
):
    """One program: a block of columns, or rows, of one frame; mean first and second differences."""
    wide = tl.cdiv(width - 2, BLOCK)
    blocks = wide + tl.cdiv(height - 2, BLOCK)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    down = block >= wide
    count = tl.where(down, height, width) - 2
    lines = tl.where(down, tl.cdiv(width, every_column), tl.cdiv(height, every_row))
    along = tl.where(down, width, 1)
    across = tl.where(down, every_column, every_row * width)
    place = tl.where(down, block - wide, block) * BLOCK + tl.arange(0, BLOCK)
    live = place < count
    first = tl.zeros((BLOCK,), COMPUTE)
    second = tl.zeros((BLOCK,), COMPUTE)
    known = tl.zeros((BLOCK,), COMPUTE)
    for line in range(lines):
        at = frame * height * width + line * across + place * along
        before = tl.load(image + at, mask=live, other=0)
        own = tl.load(image + at + along, mask=live, other=0)
        after = tl.load(image + at + 2 * along, mask=live, other=0)
        good = live
        if HAS_USABLE:
            good = good & (tl.load(usable + at, mask=live, other=0) != 0)
            good = good & (tl.load(usable + at + along, mask=live, other=0) != 0)
            good = good & (tl.load(usable + at + 2 * along, mask=live, other=0) != 0)
        step = after - own
        first += tl.where(good, tl.abs(step), 0.0)
        second += tl.where(good, tl.abs(step - (own - before)), 0.0)
        known += good.to(COMPUTE)
    known = tl.maximum(known, 1.0)
    out = profile + frame * 2 * (height + width - 4) + tl.where(down, 2 * (width - 2), 0) + place
    tl.store(out, divide(first, known), mask=live)
    tl.store(out + count, divide(second, known), mask=live)


@triton.jit
def _logarithm(profile, place, live, floor):
    """The logarithm of a profile."""
    return tl.log(tl.load(profile + place, mask=live, other=1) + floor)


@triton.jit
def _detail(profile, place, live, floor):
    """The same, less what changes slowly."""
    level = _logarithm(profile, place + 1, live, floor)
    around = _logarithm(profile, place, live, floor) + _logarithm(profile, place + 2, live, floor)
    return tl.where(live, level - 0.5 * around, 0.0)


@kernel
def repeat_frames(
    profile,  # (N, 2 (W − 2) + 2 (H − 2))
    factor,  # (N,)
    height,
    width,
    least: tl.float64,
    COMPUTE: tl.constexpr,
    TINY: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr = 64,
):
    """One program: one frame. See functional.defects.enlargement."""
    frame = tl.program_id(0).to(tl.int64)
    base = profile + frame * 2 * (height + width - 4)
    factors = tl.arange(0, FACTORS) + 1
    repeats = tl.full((FACTORS,), float("inf"), COMPUTE)
    for axis in range(2):
        own = tl.full((FACTORS,), -1.0, COMPUTE)
        whole = tl.where(axis == 1, height, width) - 2
        count = whole - 2
        for kind in range(2):
            line = base + axis * 2 * (width - 2) + kind * whole
            total = tl.zeros((BLOCK,), COMPUTE)
            for first in range(0, whole, BLOCK):
                place = first + tl.arange(0, BLOCK)
                total += tl.load(line + place, mask=place < whole, other=0)
            # what rounding leaves of a straight line
            floor = 1e-3 * divide(tl.sum(total, 0), tl.cast(whole, COMPUTE)) + TINY
            total = tl.zeros((BLOCK,), COMPUTE)
            for first in range(0, count, BLOCK):
                place = first + tl.arange(0, BLOCK)
                total += _detail(line, place, place < count, floor)
            mean = divide(tl.sum(total, 0), tl.cast(count, COMPUTE))
            square = tl.zeros((BLOCK,), COMPUTE)
            real = tl.zeros((FACTORS,), COMPUTE)
            imaginary = tl.zeros((FACTORS,), COMPUTE)
            for first in range(0, count, BLOCK):
                place = first + tl.arange(0, BLOCK)
                live = place < count
                detail = tl.where(live, _detail(line, place, live, floor) - mean, 0.0)
                square += detail * detail
                turns = (place[:, None] % factors[None, :]).to(COMPUTE) / factors[None, :].to(COMPUTE)
                angle = turns * 6.283185307179586
                real += tl.sum(detail[:, None] * tl.cos(angle), 0)
                imaginary += tl.sum(detail[:, None] * tl.sin(angle), 0)
            spread = tl.sqrt(divide(tl.sum(square, 0), tl.cast(count, COMPUTE)))
            scale = tl.sqrt(divide(tl.cast(2.0, COMPUTE), tl.cast(count, COMPUTE)))
            scale = divide(scale, tl.where(spread > 0, spread, 1.0))
            own = tl.maximum(own, scale * tl.sqrt(real * real + imaginary * imaginary))
        repeats = tl.minimum(repeats, own)
    repeated = (repeats > tl.cast(least, COMPUTE)) & (factors > 1)
    tl.store(factor + frame, tl.max(tl.where(repeated, factors, 1), 0).to(tl.int64))


def repeated(image: Tensor, usable: Tensor | None, strides: Sequence[int], least: float) -> Tensor:
    """See :func:`torchalign.functional.defects.enlargement`: (...,) int64, 1 to 8.

    The strides say every which row tells the columns, and every which column the rows; repeats of ``least`` standard
    deviations count. An image has 5 pixels a side and more.
    """
    usable = None if usable is None else usable.expand(image.shape)
    return _repeat(_profile(image, usable, strides), image.shape[-2:], least)


@operator()
def _profile(image: Tensor, usable: Tensor | None, strides: list[int]) -> Iterator[Tensor]:
    lead, (height, width) = image.shape[:-2], image.shape[-2:]
    profile = image.new_empty((*lead, 2 * (height + width - 4)))
    yield profile
    length = block_length(profile_frames)
    blocks = triton.cdiv(height - 2, length) + triton.cdiv(width - 2, length)
    tensors, numbers = (image, usable, profile), (height, width, *strides)
    launch(profile_frames, (*lead, blocks), (), tensors, numbers)


@operator()
def _repeat(profile: Tensor, size: list[int], least: float) -> Iterator[Tensor]:
    factor = profile.new_empty(profile.shape[:-1], dtype=torch.int64)
    yield factor
    launch(repeat_frames, factor.shape, (), (profile, factor), (*size, least), FACTORS=_FACTORS)
