"""A spectrum turned by a shift of its content, and the window of common ground, a kernel each."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.sampling import block_of, frames_of, kernel, launch, operator, wave_of

__all__ = ["common_window", "pull_frames", "pulls", "tukey", "turn", "turn_frames", "window_frames"]


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
    source = spectrum + (frame // repeat) * bins * 2 + 2 * place
    real = tl.load(source, mask=live, other=0)
    imaginary = tl.load(source + 1, mask=live, other=0)
    target = turned + frame * bins * 2 + 2 * place
    tl.store(target, real * cosine - imaginary * sine, mask=live)
    tl.store(target + 1, real * sine + imaginary * cosine, mask=live)


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
    a = tl.load(moving + frame * bins * 2 + 2 * place, mask=live, other=0)
    b = tl.load(moving + frame * bins * 2 + 2 * place + 1, mask=live, other=0)
    real = a * cosine - b * sine
    imaginary = a * sine + b * cosine
    there = reference + (frame // group) * bins * 2 + 2 * place
    c = tl.load(there, mask=live, other=0)
    d = tl.load(there + 1, mask=live, other=0)
    share = tl.load(root + place, mask=live, other=0)
    unit = share * tl.cast(samples, COMPUTE)
    target = spectra + frame * bins * 6 + 2 * place
    tl.store(target, (real - c) * share, mask=live)
    tl.store(target + 1, (imaginary - d) * share, mask=live)
    # times iω
    tl.store(target + 2 * bins, -(imaginary + d) * unit * x, mask=live)
    tl.store(target + 2 * bins + 1, (real + c) * unit * x, mask=live)
    tl.store(target + 4 * bins, -(imaginary + d) * unit * y, mask=live)
    tl.store(target + 4 * bins + 1, (real + c) * unit * y, mask=live)


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
    frame, place, live = block_of(rows * columns, BLOCK)
    zero = tl.zeros((BLOCK,), COMPUTE)
    high = zero + tl.cast(height, COMPUTE)
    wide = zero + tl.cast(width, COMPUTE)
    y = (place // columns).to(COMPUTE) * high / rows
    x = (place % columns).to(COMPUTE) * wide / columns
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


def common_window(
    shift: Tensor, size: tuple[int, int], frame: tuple[int, int], ramps: tuple[float, float]
) -> Tensor:
    """The Tukey window of the ground that a frame shifted by ``shift`` has in common with the one in place.

    Args:
        shift: (..., 2), (x, y) in pixels.
        size: (h, w) samples.
        frame: (H, W) in pixels.
        ramps: how long the window falls off along y and x, in pixels.

    Returns:
        (..., h, w).
    """
    return _common_window(shift, list(size), list(frame), list(ramps))


@operator("common_window", lambda shift, size: shift.new_empty((*shift.shape[:-1], *size)))
def _common_window(shift: Tensor, size: list[int], frame: list[int], ramps: list[float]) -> Tensor:
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
    shared = len(lead) > 0 and reference.ndim == moving.ndim and reference.shape[-4] == 1
    reference = reference.expand(*((*lead[:-1], 1) if shared else lead), *reference.shape[-3:])
    bins = rows * columns
    launch(
        pull_frames,
        frames_of(moving, 3),
        (moving, reference, fy, fx, shift.expand(*lead, 2), root, spectra),
        (bins, columns, lead[-1] if shared else 1, math.pi * samples),
        samples=bins,
    )
    return spectra
