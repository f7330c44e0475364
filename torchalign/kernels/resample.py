"""The final warp as one kernel: all options of :func:`torchalign.functional.warp.resample`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import cell_of, divide, is_finite
from torchalign.kernels.launching import entries_of, kernel, launch, operator, strided_frames
from torchalign.kernels.sampling import interpolate, padded, source_of

_INTERPOLATIONS = {"nearest": 0, "bilinear": 1, "bicubic": 2}
_PADDINGS = {"border": 0, "zeros": 1, "reflection": 2}
# dtypes of cubes: what is computed in, and the range of integers (others are left to the functions of torch)
_COMPUTE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.uint8: torch.float32,
    torch.int8: torch.float32,
    torch.uint16: torch.float32,
    torch.int16: torch.float32,
    torch.int32: torch.float64,
}
_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _rounded(values, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, COMPUTE: tl.constexpr):
    """Rounded half to even, and clamped: what is added and taken off again leaves no place for a fraction."""
    if COMPUTE == tl.float64:  # noqa: SIM108, SIM300
        whole = 6755399441055744.0  # 1.5 · 2⁵²
    else:
        whole = 12582912.0  # 1.5 · 2²³
    values = tl.minimum(tl.maximum(values, LOWEST), HIGHEST)
    return (values + whole) - whole


@kernel
def resample_frames(
    frames,  # (N, C, H, W), by its strides
    motion,  # (N, 2 | 6 | 9), moving → reference
    mask,  # (N, H, W), 0 and 1, by its strides
    local,  # (N, 2, h, w), shifts (x, y) on top of the motion, in pixels
    values,  # (N, C, h, w)
    validity,  # (N, h, w), 0 and 1
    fill: tl.float64,
    bands,
    height,
    width,
    strides,  # of frames: frame, band, row, column
    mask_strides,  # of the mask: frame, row, column
    step,  # of the lattice of output pixels
    ENTRIES: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    PADDING: tl.constexpr,
    FLOATING: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FILLED: tl.constexpr,
    HAS_LOCAL: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    COMPUTE: tl.constexpr,
    POSITION: tl.constexpr,
    INDEX: tl.constexpr,  # int64 for planes whose pixels lie further apart than 2³¹
    BLOCK: tl.constexpr = 256,
):
    """One program: a block of output pixels of one frame, all of its bands."""
    rows = (height + step - 1) // step
    columns = (width + step - 1) // step
    frame, place, live, x, y = cell_of(rows, columns, BLOCK)
    x = x * step
    y = y * step

    column, row, fx, fy, near_column, near_row, inside = source_of(
        motion + frame * ENTRIES, x, y, height, width, local + frame * 2 * rows * columns + place, rows * columns,
        live, HAS_LOCAL, ENTRIES, POSITION, COMPUTE,
    )  # fmt: skip
    near_column = padded(near_column, width, PADDING == 2).to(INDEX)
    near_row = padded(near_row, height, PADDING == 2).to(INDEX)
    near_mask = near_row * mask_strides[1] + near_column * mask_strides[2]
    near = near_row * strides[2] + near_column * strides[3]

    plane = frames + frame * strides[0]
    usable = mask + frame * mask_strides[0]
    out = values + frame * bands * rows * columns
    valid = inside
    for band in range(bands):
        pixels = plane + tl.cast(band, tl.int64) * strides[1]
        nearest = tl.load(pixels + near, mask=live)
        near_usable = live
        if FLOATING:
            near_usable = near_usable & is_finite(nearest.to(COMPUTE))
        if HAS_MASK:
            near_usable = near_usable & (tl.load(usable + near_mask, mask=live, other=0) != 0)
        if INTERPOLATION == 0:
            result = nearest
        else:
            linear, linear_share, total, met = interpolate(
                pixels, usable, column, row, fx, fy, height, width, (strides[2], strides[3]),
                (mask_strides[1], mask_strides[2]), live, INTERPOLATION, PADDING == 2, FLOATING, HAS_MASK, INDEX, COMPUTE,
            )  # fmt: skip
            # bicubic where that met nothing unusable, else bilinear; or the nearest pixel, which weighs 1/4 or more of
            # that, so that near_usable guards the division
            if FLOATING or HAS_MASK:
                linear = divide(linear, tl.where(near_usable, linear_share, 1.0))
                if INTERPOLATION == 2:
                    linear = tl.where(met > 0, linear, total)
            elif INTERPOLATION == 2:
                linear = total
            if not FLOATING:
                linear = _rounded(linear, LOWEST, HIGHEST, COMPUTE)
            result = linear.to(nearest.dtype)
            if FLOATING or HAS_MASK:
                result = tl.where(near_usable, result, nearest)
        if FILLED:
            result = tl.where(
                inside & near_usable, result, tl.full(result.shape, fill, COMPUTE).to(nearest.dtype)
            )
        elif PADDING == 1:
            result = tl.where(inside, result, tl.full(result.shape, 0, COMPUTE).to(nearest.dtype))
        tl.store(out + tl.cast(band, tl.int64) * rows * columns + place, result, mask=live)
        valid = valid & near_usable
    tl.store(validity + frame * rows * columns + place, valid.to(tl.int8), mask=live)


@operator(lambda cube: cube.dtype in _COMPUTE)
def resample(
    cube: Tensor,
    motion: Tensor,
    mask: Tensor | None,
    interpolation: str,
    padding_mode: str,
    fill_value: float | None,
    step: int = 1,
    local: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """See :func:`torchalign.functional.warp.resample`; ``local`` (..., T, 2, h, w) are shifts on top of the motion."""
    lead, (bands, height, width) = cube.shape[:-3], cube.shape[-3:]
    size = [(length + step - 1) // step for length in (height, width)]
    values, validity = cube.new_empty((*lead, bands, *size)), cube.new_empty((*lead, *size), dtype=torch.bool)
    yield values, validity
    if values.numel() == 0:
        validity.fill_(True)
        return
    frames, masks, strides = strided_frames(lead, cube, mask)
    motion = motion.to(torch.promote_types(motion.dtype, torch.float32)).contiguous()
    compute, floating = _COMPUTE[cube.dtype], cube.dtype.is_floating_point
    doubled = torch.float64 in (compute, motion.dtype)
    # how far the last pixel of a plane lies from the first
    far = max((height - 1) * down + (width - 1) * along for *_, down, along in strides)
    launch(
        resample_frames,
        lead,
        size,
        (frames, motion, masks, None if local is None else local.contiguous(), values, validity),
        (0.0 if fill_value is None else fill_value, bands, height, width, *strides, step),
        strided=True,
        ENTRIES=entries_of(motion),
        INTERPOLATION=_INTERPOLATIONS[interpolation],
        PADDING=_PADDINGS[padding_mode],
        FLOATING=floating,
        FILLED=fill_value is not None,
        LOWEST=0 if floating else torch.iinfo(cube.dtype).min,
        HIGHEST=0 if floating else torch.iinfo(cube.dtype).max,
        COMPUTE=_DTYPES[compute],
        POSITION=_DTYPES[torch.float64 if doubled else torch.float32],
        INDEX=tl.int64 if far >= 2**31 else tl.int32,
    )
