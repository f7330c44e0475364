"""Newton's ascent on a correlation's trigonometric polynomial as one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.sampling import divide, frames_of, kernel, launch, load_complex, operator, wave_of

# One program walks the spectrum of a frame, once a step: of larger ones the matrix products of torch are faster.
MOST_BINS = 2**18


@triton.jit
def unturned(
    spectrum, other, place, bins, columns, fy, fx, shift_x, shift_y,
    CROSSED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Of a block of bins the angular frequencies (y, x), and real and imaginary part, as often as the bin counts.

    Of a spectrum, or if ``CROSSED`` of the cross-power of two, after a shift is undone.
    """
    live = place < bins
    y, x, cosine, sine = wave_of(place, live, columns, fy, fx, shift_x, shift_y)
    often = tl.where(live, 1.0, 0.0).to(COMPUTE) + tl.where(x > 0, 1.0, 0.0).to(COMPUTE)
    real, imaginary = load_complex(spectrum, place, live)
    if CROSSED:
        c, d = load_complex(other, place, live)
        product = real * c + imaginary * d
        imaginary = real * d - imaginary * c
        real = product
    along = (real * cosine - imaginary * sine) * often
    across = (real * sine + imaginary * cosine) * often
    return y * 6.283185307179586, x * 6.283185307179586, along, across


@triton.jit
def with_bins(value, hxx, hyy, hxy, x, y, along):
    """The sums for a correlation's value and curvatures, with those of another block of bins."""
    return value + along, hxx - x * x * along, hyy - y * y * along, hxy - x * y * along


@triton.jit
def derivatives(
    spectrum, other, bins, columns, fy, fx, shift_x, shift_y,
    CROSSED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The value of a correlation at a shift, its slopes along x and y, and its curvatures xx, yy and xy."""
    value = tl.zeros((BLOCK,), COMPUTE)
    gx = tl.zeros((BLOCK,), COMPUTE)
    gy = tl.zeros((BLOCK,), COMPUTE)
    hxx = tl.zeros((BLOCK,), COMPUTE)
    hyy = tl.zeros((BLOCK,), COMPUTE)
    hxy = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, bins, BLOCK):
        place = first + tl.arange(0, BLOCK)
        y, x, along, across = unturned(
            spectrum, other, place, bins, columns, fy, fx, shift_x, shift_y, CROSSED, COMPUTE
        )
        value, hxx, hyy, hxy = with_bins(value, hxx, hyy, hxy, x, y, along)
        gx -= x * across
        gy -= y * across
    return tl.sum(value, 0), tl.sum(gx, 0), tl.sum(gy, 0), tl.sum(hxx, 0), tl.sum(hyy, 0), tl.sum(hxy, 0)


@triton.jit
def newton_step(gx, gy, hxx, hyy, hxy, determinant, peak, LONGEST: tl.constexpr):
    """The step to a maximum, cut along each axis; none where the surface is not curved as at a peak."""
    safe = tl.where(peak, determinant, 1.0)
    x = tl.where(peak, divide(hxy * gy - hyy * gx, safe), 0.0)
    y = tl.where(peak, divide(hxy * gx - hxx * gy, safe), 0.0)
    return tl.minimum(tl.maximum(x, -LONGEST), LONGEST), tl.minimum(tl.maximum(y, -LONGEST), LONGEST)


@triton.jit
def settled(shift, EPSILON: tl.constexpr):
    """Identical frames are at exactly 0: what rounding leaves there is taken off."""
    return tl.where(tl.abs(shift) < 64 * EPSILON, 0.0, shift)


@kernel
def climb_frames(
    power,  # (N, h, w//2+1, 2)
    fy,  # (h,), cycles per pixel
    fx,  # (w//2+1,)
    start,  # (N, 2)
    found,  # (N, 2)
    last,  # (N, 2)
    peaks,  # (N,), 0 and 1
    bins,
    columns,
    steps,
    COMPUTE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: one frame."""
    frame = tl.program_id(0).to(tl.int64)
    spectrum = power + frame * bins * 2
    shift_x = tl.load(start + 2 * frame)
    shift_y = tl.load(start + 2 * frame + 1)
    step_x = tl.zeros_like(shift_x)
    step_y = tl.zeros_like(shift_y)
    curved = shift_x != shift_x
    for _ in range(steps):
        _value, gx, gy, hxx, hyy, hxy = derivatives(
            spectrum, spectrum, bins, columns, fy, fx, shift_x, shift_y, False, COMPUTE, BLOCK
        )
        product = hxx * hyy
        determinant = product - hxy * hxy
        curved = (hxx < 0) & (determinant > EPSILON * product)
        step_x, step_y = newton_step(gx, gy, hxx, hyy, hxy, determinant, curved, 0.5)
        shift_x += step_x
        shift_y += step_y
    tl.store(found + 2 * frame, settled(shift_x, EPSILON))
    tl.store(found + 2 * frame + 1, settled(shift_y, EPSILON))
    tl.store(last + 2 * frame, step_x)
    tl.store(last + 2 * frame + 1, step_y)
    tl.store(peaks + frame, curved.to(tl.uint8))


def climb(
    power: Tensor, frequencies: tuple[Tensor, Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Newton's ascent, see :func:`torchalign.functional.peak.refine_peak`.

    Args:
        power: (..., H, W//2+1), half of a Hermitian cross-power spectrum.
        frequencies: (H,) and (W//2+1,), along y and x, in cycles per pixel.
        start: (..., 2), (x, y) in pixels.
        steps: at least one, each of at most half a pixel an axis.

    Returns:
        The shift (..., 2); the last step (..., 2); and whether the Hessian was negative definite there (...,).
        ``None`` where the spectrum is too large for one program.
    """
    if power.shape[-2] * power.shape[-1] > MOST_BINS:
        return None
    parts = torch.view_as_real(power.resolve_conj())
    start = start.expand(*power.shape[:-2], 2).to(parts.dtype)
    return tuple(_climb(parts, frequencies[0], frequencies[1], start, steps))


def _climbed_like(power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lead = power.shape[:-3]
    return power.new_empty((*lead, 2)), power.new_empty((*lead, 2)), power.new_empty(lead, dtype=torch.bool)


@operator("climb", _climbed_like)
def _climb(power: Tensor, fy: Tensor, fx: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    found, last, peaks = _climbed_like(power)
    rows, columns = power.shape[-3:-1]
    tensors = power, fy, fx, start, found, last, peaks
    launch(climb_frames, frames_of(power, 3), tensors, (rows * columns, columns, steps))
    return found, last, peaks
