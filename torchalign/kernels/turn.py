"""Spectra turned by a shift of their content, and multiplied; and the window of common ground: a kernel each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import block_of, cell_of, load_pair
from torchalign.kernels.launching import by_group, expanded, kernel, launch, operator


@triton.jit
def load_complex(spectrum, place, live):
    """Real and imaginary parts of some of a spectrum's bins."""
    real = tl.load(spectrum + 2 * place, mask=live, other=0)
    return real, tl.load(spectrum + 2 * place + 1, mask=live, other=0)


@triton.jit
def store_complex(spectrum, place, live, real, imaginary):
    """The same, written."""
    tl.store(spectrum + 2 * place, real, mask=live)
    tl.store(spectrum + 2 * place + 1, imaginary, mask=live)


@triton.jit
def wave_of(place, live, columns, fy, fx, shift_x, shift_y):
    """The frequencies (y, x) of a block of bins, and cosine and sine of the phase of a shift there."""
    y = tl.load(fy + place // columns, mask=live, other=0)
    x = tl.load(fx + place % columns, mask=live, other=0)
    cycles = x * shift_x + y * shift_y
    # within half a turn, where sine and cosine are at their best
    angle = (cycles - tl.floor(cycles + 0.5)) * 6.283185307179586
    return y, x, tl.cos(angle), tl.sin(angle)


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
    shift_x, shift_y = load_pair(shift, frame)
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
    shift,  # (N, 2), by which the moving one is turned
    root,  # (h, w//2+1), what all is multiplied by
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
    shift_x, shift_y = load_pair(shift, frame)
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
    shift_x, shift_y = load_pair(shift, frame)
    own = tl.minimum(tukey(y, high, along_y), tukey(y - shift_y, high, along_y))
    own *= tl.minimum(tukey(x, wide, along_x), tukey(x - shift_x, wide, along_x))
    tl.store(window + frame * rows * columns + place, own, mask=live)


@operator()
def turn(spectrum: Tensor, frequencies: list[Tensor], shift: Tensor) -> Iterator[Tensor]:
    """See :func:`torchalign.functional.fourier.shift_phase`: leading dimensions of spectrum and shift broadcast."""
    lead, size = torch.broadcast_shapes(spectrum.shape[:-2], shift.shape[:-1]), spectrum.shape[-2:]
    turned = spectrum.new_empty((*lead, *size))
    yield turned
    repeat = math.prod(lead)
    if math.prod(spectrum.shape[:-2]) != 1:
        (spectrum,), repeat = expanded(lead, 2, spectrum), 1
    shift, bins = shift.expand(*lead, 2).to(spectrum.dtype.to_real()), math.prod(size)
    launch(turn_frames, lead, size, (spectrum, *frequencies, shift, turned), (bins, size[1], repeat))


@operator()
def common_window(shift: Tensor, size: list[int], frame: list[int], ramps: list[float]) -> Iterator[Tensor]:
    """(..., h, w): the Tukey window of the ground that a frame shifted by (..., 2) has in common with the one in place.

    Frame and ramps, how long it falls off along y and x, are in pixels.
    """
    window = shift.new_empty((*shift.shape[:-1], *size))
    yield window
    launch(window_frames, shift.shape[:-1], size, (shift, window), (*size, *map(float, frame), *ramps))


@operator()
def pulls(
    moving: Tensor, reference: Tensor, frequencies: list[Tensor], shift: Tensor, root: Tensor, samples: int
) -> Iterator[Tensor]:
    """The spectra (..., T, 3, h, w//2+1) of :func:`torchalign.functional.uncertainty.block_pulls`, times ``root``.

    Those of the difference, and of the sum's derivatives by x and by y times half the ``samples`` of a frame.
    """
    lead, size = moving.shape[:-2], moving.shape[-2:]
    spectra = moving.new_empty((*lead, 3, *size))
    yield spectra
    reference, group = by_group(lead, 2, reference)
    shift = shift.expand(*lead, 2).to(root.dtype)
    tensors = moving, reference, *frequencies, shift, root, spectra
    launch(pull_frames, lead, size, tensors, (math.prod(size), size[1], group, math.pi * samples))


@operator()
def cross(moving: Tensor, reference: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """See :func:`torchalign.functional.phase.cross_power`; the product is multiplied by ``weight``."""
    lead, size = torch.broadcast_shapes(moving.shape[:-2], reference.shape[:-2]), moving.shape[-2:]
    power = moving.new_empty((*lead, *size))
    yield power
    (moving,), (reference, group) = expanded(lead, 2, moving), by_group(lead, 2, reference)
    launch(cross_frames, lead, size, (moving, reference, weight, power), (math.prod(size), group))
