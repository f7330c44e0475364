"""The channel that is seen, what of it is finite, and 0 where it is not, as one kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import cell_of, divide, is_finite
from torchalign.kernels.launching import kernel, launch, operator, strided_frames

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@kernel
def channel_frames(
    frames,  # (N, C, H, W), by its strides
    mask,  # (N, H, W), 0 and 1, by its strides
    seen,  # (N, H, W)
    usable,  # (N, H, W), 0 and 1
    first_band,
    second_band,
    third_band,
    bands,
    height,
    width,
    strides,  # of frames: frame, band, row, column
    mask_strides,  # of the mask: frame, row, column
    MODE: tl.constexpr,  # 0: the first band; 1: the mean of all; 2: the mean of the three; 3: their luminance
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of pixels of one frame."""
    frame, place, live, x, y = cell_of(height, width, BLOCK)
    x = x.to(tl.int64)
    y = y.to(tl.int64)
    pixels = frames + frame * strides[0] + y * strides[2] + x * strides[3]
    if MODE == 1:
        total = tl.load(pixels, mask=live).to(COMPUTE)
        for band in range(1, bands):
            total += tl.load(pixels + tl.cast(band, tl.int64) * strides[1], mask=live).to(COMPUTE)
        value = divide(total, tl.zeros_like(total) + bands)
    else:
        value = tl.load(pixels + tl.cast(first_band, tl.int64) * strides[1], mask=live).to(COMPUTE)
        if MODE >= 2:
            second = tl.load(pixels + tl.cast(second_band, tl.int64) * strides[1], mask=live).to(COMPUTE)
            third = tl.load(pixels + tl.cast(third_band, tl.int64) * strides[1], mask=live).to(COMPUTE)
            if MODE == 2:
                value = divide(value + second + third, tl.zeros_like(value) + 3)
            else:
                value = 0.299 * value + 0.587 * second + 0.114 * third
    good = is_finite(value)
    if HAS_MASK:
        here = mask + frame * mask_strides[0] + y * mask_strides[1] + x * mask_strides[2]
        good = good & (tl.load(here, mask=live, other=0) != 0)
    tl.store(seen + frame * height * width + place, tl.where(good, value, 0.0), mask=live)
    tl.store(usable + frame * height * width + place, good.to(tl.int8), mask=live)


@operator(lambda cube: cube.dtype in _FLOATING)
def see(cube: Tensor, mask: Tensor | None, channel: str, bands: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The channel in float32 or float64, 0 where it is unusable; and where it is usable; (..., H, W) both.

    Args:
        cube: (..., C, H, W), floating.
        mask: bool, (..., H, W), or ``None``; one for all frames, or several for one.
        channel: ``"band"``, ``"mean"`` (of all), ``"rgb_mean"`` or ``"luminance"``.
        bands: the indices of the one band, or of the three, from 0 on.
    """
    lead = torch.broadcast_shapes(cube.shape[:-3], () if mask is None else mask.shape[:-2])
    number, *size = cube.shape[-3:]
    dtype = torch.float64 if cube.dtype == torch.float64 else torch.float32
    seen, usable = (
        cube.new_empty((*lead, *size), dtype=dtype),
        cube.new_empty((*lead, *size), dtype=torch.bool),
    )
    yield seen, usable
    frames, masks, strides = strided_frames(lead, cube, mask)
    launch(
        channel_frames,
        lead,
        size,
        (frames, masks, seen, usable),
        (*(*bands, 0, 0, 0)[:3], number, *size, *strides),
        strided=True,
        MODE=("band", "mean", "rgb_mean", "luminance").index(channel),
    )
