"""The channel that is seen, what of it is finite, and 0 where it is not, as one kernel."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from torchalign.kernels.sampling import cell_of, divide, frames_of, is_finite, kernel, launch, operator

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
    stride_frame,
    stride_band,
    stride_row,
    stride_column,
    mask_frame,
    mask_row,
    mask_column,
    MODE: tl.constexpr,  # 0: the first band; 1: the mean of all; 2: the mean of the three; 3: their luminance
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of pixels of one frame."""
    frame, place, live, x, y = cell_of(height, width, BLOCK)
    x = x.to(tl.int64)
    y = y.to(tl.int64)
    pixels = frames + frame * stride_frame + y * stride_row + x * stride_column
    if MODE == 1:
        total = tl.load(pixels, mask=live).to(COMPUTE)
        for band in range(1, bands):
            total += tl.load(pixels + tl.cast(band, tl.int64) * stride_band, mask=live).to(COMPUTE)
        value = divide(total, tl.zeros_like(total) + bands)
    else:
        value = tl.load(pixels + tl.cast(first_band, tl.int64) * stride_band, mask=live).to(COMPUTE)
        if MODE >= 2:
            second = tl.load(pixels + tl.cast(second_band, tl.int64) * stride_band, mask=live).to(COMPUTE)
            third = tl.load(pixels + tl.cast(third_band, tl.int64) * stride_band, mask=live).to(COMPUTE)
            if MODE == 2:
                value = divide(value + second + third, tl.zeros_like(value) + 3)
            else:
                value = 0.299 * value + 0.587 * second + 0.114 * third
    good = is_finite(value)
    if MASKED:
        good = good & (
            tl.load(mask + frame * mask_frame + y * mask_row + x * mask_column, mask=live, other=0) != 0
        )
    tl.store(seen + frame * height * width + place, tl.where(good, value, 0.0), mask=live)
    tl.store(usable + frame * height * width + place, good.to(tl.int8), mask=live)


def see(
    cube: Tensor, mask: Tensor | None, channel: str, bands: tuple[int, ...]
) -> tuple[Tensor, Tensor] | None:
    """The channel in float32 or float64, 0 where it is unusable; and where it is usable.

    Args:
        cube: (..., C, H, W), floating.
        mask: bool, (..., H, W), or ``None``; one for all frames, or several for one.
        channel: ``"band"``, ``"mean"`` (of all), ``"rgb_mean"`` or ``"luminance"``.
        bands: the indices of the one band, or of the three, from 0 on.

    Returns:
        (..., H, W) twice; ``None`` for a dtype that the kernel does not take.
    """
    if cube.dtype not in _FLOATING:
        return None
    if mask is not None:
        lead = torch.broadcast_shapes(cube.shape[:-3], mask.shape[:-2])
        cube, mask = cube.expand(*lead, *cube.shape[-3:]), mask.expand(*lead, *cube.shape[-2:])
    return tuple(_see(cube, mask, channel, list(bands)))


def _seen_like(cube: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*cube.shape[:-3], *cube.shape[-2:])
    dtype = torch.float64 if cube.dtype == torch.float64 else torch.float32
    return cube.new_empty(shape, dtype=dtype), cube.new_empty(shape, dtype=torch.bool)


@operator("see", _seen_like)
def _see(cube: Tensor, mask: Tensor | None, channel: str, bands: list[int]) -> tuple[Tensor, Tensor]:
    seen, usable = _seen_like(cube)
    count, (number, height, width) = frames_of(cube, 3), cube.shape[-3:]
    frames = cube.reshape(count, number, height, width)
    masks = None if mask is None else mask.reshape(count, height, width)
    launch(
        channel_frames,
        count,
        (frames, masks, seen, usable),
        (
            *(*bands, 0, 0, 0)[:3],
            *(number, height, width),
            *frames.stride(),
            *((0, 0, 0) if masks is None else masks.stride()),
        ),
        samples=height * width,
        strided=True,
        MODE=("band", "mean", "rgb_mean", "luminance").index(channel),
        MASKED=masks is not None,
    )
    return seen, usable
