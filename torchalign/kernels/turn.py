"""Spectra turned by a shift of their content, and multiplied; and the window of common ground: a kernel each."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.sampling import (
    block_of,
    by_group,
    cell_of,
    frames_of,
    kernel,
    launch,
    load_complex,
    operator,
    store_complex,
    wave_of,
)


@kernel
def turn_frames(
    spectrum,  # (N, h, w//2+1, 2)
    fy,  # (h,), cycles per pixel
    fx,  # (w//2+1,)
    shift,  # (N, 2)
    turned,  # (N, h, w//2+1, 2)
    bins,
    columns,
    repeat,  # frames that share a spectrum
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of bins of one frame."""
    frame, place, live = block_of(bins, BLOCK)
    shift_x = tl.load(shift + 2 * frame)
    shift_y = tl.load(shift + 2 * frame + 1)
    _, _, cosine, sine = wave_of(place, live, columns, fy, fx, shift_x, shift_y)
    real, imaginary = load_complex(spectrum + (frame // repeat) * bins * 2, place, live)
    along, across = real * cosine - imaginary * sine, real * sine + imaginary * cosine
    store_complex(turned + frame * bins * 2, place, live, along, across)


@kernel
def pull_frames(
    moving,  # (N, h, w//2+1, 2)
    reference,  # (N or 1 a group, h, w//2+1, 2)
    fy,  # (h,), cycles per pixel
    fx,  # (w//2+1,)
    shift,  # (N, 2)
    root,  # (h, w//2+1)
    spectra,  # (N, 3, h, w//2+1, 2)
    bins,
    columns,
    group,
    samples: tl.float64,  # π times their number
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of bins of one frame. See functional.uncertainty.block_pulls."""
    frame, place, live = block_of(bins, BLOCK)
    shift_x = tl.load(shift + 2 * frame)
    shift_y = tl.load(shift + 2 * frame + 1)
    y, x, cosine, sine = wave_of(place, live, columns, fy, fx, shift_x, shift_y)
    a, b = load_complex(moving + frame * bins * 2, place, live)
    real = a * cosine - b * sine
    imaginary = a * sine + b * cosine
    c, d = load_complex(reference + (frame // group) * bins * 2, place, live)
    share = tl.load(root + place, mask=live, other=0)
    unit = share * tl.cast(samples, COMPUTE)
    target = spectra + frame * bins * 6
    store_complex(target, place, live, (real - c) * share, (imaginary - d) * share)
    # times iω
    store_complex(target + 2 * bins, place, live, -(imaginary + d) * unit * x, (real + c) * unit * x)
    store_complex(target + 4 * bins, place, live, -(imaginary + d) * unit * y, (real + c) * unit * y)


@kernel
def cross_frames(
    moving,  # (N, h, w//2+1, 2)
    reference,  # (N or 1 a group, h, w//2+1, 2)
    weight,  # (h, w//2+1)
    power,  # (N, h, w//2+1, 2)
    bins,
    group,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of bins of one frame."""
    frame, place, live = block_of(bins, BLOCK)
    a, b = load_complex(moving + frame * bins * 2, place, live)
    c, d = load_complex(reference + (frame // group) * bins * 2, place, live)
    share = tl.load(weight + place, mask=live, other=0)
    c *= share
    d *= share
    store_complex(power + frame * bins * 2, place, live, a * c + b * d, a * d - b * c)


@triton.jit
def tukey(position, length, ramp):
    """functional.smoothing.tukey, for a taper that is not 0."""
    from_middle = tl.abs(position - 0.5 * (length - 1))
    angle = (0.5 * length - from_middle) * (1.5707963267948966 / ramp)
    sine = tl.sin(tl.minimum(tl.maximum(angle, 0.0), 1.5707963267948966))
    return sine * sine


@kernel
def window_frames(
    shift,  # (N, 2)
    window,  # (N, h, w)
    rows,
    columns,
    height: tl.float64,
    width: tl.float64,
    ramp_y: tl.float64,
    ramp_x: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """One program: a block of samples of one frame."""
    frame, place, live, column, row = cell_of(rows, columns, BLOCK)
    zero = tl.zeros((BLOCK,), COMPUTE)
    high = zero + tl.cast(height, COMPUTE)
    wide = zero + tl.cast(width, COMPUTE)
    y = row.to(COMPUTE) * high / rows
    x = column.to(COMPUTE) * wide / columns
    along_y = zero + tl.cast(ramp_y, COMPUTE)
    along_x = zero + tl.cast(ramp_x, COMPUTE)
    own = tl.minimum(tukey(y, high, along_y), tukey(y - tl.load(shift + 2 * frame + 1), high, along_y))
    own *= tl.minimum(tukey(x, wide, along_x), tukey(x - tl.load(shift + 2 * frame), wide, along_x))
    tl.store(window + frame * rows * columns + place, own, mask=live)


def turn(spectrum: Tensor, frequencies: tuple[Tensor, Tensor], shift: Tensor) -> Tensor:
    """See :func:`torchalign.functional.fourier.shift_phase`.

    Args:
        spectrum: (..., H, W//2+1), an ``rfft2``; its leading dimensions broadcast against those of ``shift``.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        shift: (..., 2), (x, y) in pixels.

    Returns:
        (..., H, W//2+1).
    """
    lead = torch.broadcast_shapes(spectrum.shape[:-2], shift.shape[:-1])
    parts = torch.view_as_real(spectrum.resolve_conj())
    if math.prod(spectrum.shape[:-2]) != 1:
        parts = parts.expand(*lead, *parts.shape[-3:])
    turned = _turn(parts, frequencies[0], frequencies[1], shift.expand(*lead, 2).to(parts.dtype))
    return torch.view_as_complex(turned)


def _turned_like(spectrum: Tensor, shift: Tensor) -> Tensor:
    return spectrum.new_empty((*shift.shape[:-1], *spectrum.shape[-3:]))


@operator("turn", _turned_like)
def _turn(spectrum: Tensor, fy: Tensor, fx: Tensor, shift: Tensor) -> Tensor:
    turned = _turned_like(spectrum, shift)
    rows, columns = spectrum.shape[-3:-1]
    frames, bins = frames_of(shift, 1), rows * columns
    repeat = frames // max(frames_of(spectrum, 3), 1)
    launch(turn_frames, frames, (spectrum, fy, fx, shift, turned), (bins, columns, repeat), samples=bins)
    return turned


@operator("common_window", lambda shift, size: shift.new_empty((*shift.shape[:-1], *size)))
def common_window(shift: Tensor, size: list[int], frame: list[int], ramps: list[float]) -> Tensor:
    """(..., h, w): the Tukey window of the ground that a frame shifted by (..., 2) has in common with the one in place.

    Args:
        shift: (x, y) in pixels.
        size: (h, w) samples.
        frame: (H, W) in pixels.
        ramps: how long the window falls off along y and x, in pixels.
    """
    window = shift.new_empty((*shift.shape[:-1], *size))
    numbers = *size, *map(float, frame), *ramps
    launch(window_frames, frames_of(shift, 1), (shift, window), numbers, samples=size[0] * size[1])
    return window


def pulls(
    moving: Tensor,
    reference: Tensor,
    frequencies: tuple[Tensor, Tensor],
    shift: Tensor,
    root: Tensor,
    samples: int,
) -> Tensor:
    """See :func:`torchalign.functional.uncertainty.block_pulls`.

    Args:
        moving: (..., T, h, w//2+1), an ``rfft2``.
        reference: (..., 1 or T, h, w//2+1).
        frequencies: (h,) and (w//2+1,), along y and x, in cycles per pixel.
        shift: (..., T, 2), by which the moving one is turned.
        root: (h, w//2+1), what all is multiplied by.
        samples: of a frame on the grid.

    Returns:
        (..., T, 3, h, w//2+1): the difference, and the sum's derivatives by x and by y, times half the samples.
    """
    parts, still = (torch.view_as_real(part.resolve_conj()) for part in (moving, reference))
    return torch.view_as_complex(_pulls(parts, still, *frequencies, shift.to(parts.dtype), root, samples))


@operator("pulls", lambda moving: moving.new_empty((*moving.shape[:-3], 3, *moving.shape[-3:])))
def _pulls(
    moving: Tensor, reference: Tensor, fy: Tensor, fx: Tensor, shift: Tensor, root: Tensor, samples: int
) -> Tensor:
    spectra = moving.new_empty((*moving.shape[:-3], 3, *moving.shape[-3:]))
    lead, (rows, columns) = moving.shape[:-3], moving.shape[-3:-1]
    reference, group = by_group(lead, 3, reference)
    bins = rows * columns
    tensors = moving, reference, fy, fx, shift.expand(*lead, 2), root, spectra
    launch(
        pull_frames, frames_of(moving, 3), tensors, (bins, columns, group, math.pi * samples), samples=bins
    )
    return spectra


def cross(moving: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """See :func:`torchalign.functional.phase.cross_power`.

    Args:
        moving: (..., T, h, w//2+1), an ``rfft2``.
        reference: (..., 1 or T, h, w//2+1).
        weight: (h, w//2+1), what the product is multiplied by.

    Returns:
        (..., T, h, w//2+1).
    """
    lead = torch.broadcast_shapes(moving.shape[:-2], reference.shape[:-2])
    parts, still = (torch.view_as_real(part.resolve_conj()) for part in (moving, reference))
    return torch.view_as_complex(_cross(parts.expand(*lead, *parts.shape[-3:]), still, weight))


@operator("cross", lambda moving: moving.new_empty(moving.shape))
def _cross(moving: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    power = moving.new_empty(moving.shape)
    reference, group = by_group(moving.shape[:-3], 3, reference)
    tensors, bins = (moving, reference, weight, power), weight.numel()
    launch(cross_frames, frames_of(moving, 3), tensors, (bins, group), samples=bins)
    return power
