"""Newton's ascent on a correlation's trigonometric polynomial; and on that divided by the overlap of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import block_of, divide, load_pair, store_pair
from torchalign.kernels.launching import by_group, expanded, kernel, launch, operator, planes_of
from torchalign.kernels.turn import load_complex, wave_of

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
def step_to_peak(gx, gy, hxx, hyy, hxy, determinant, peak, LONGEST: tl.constexpr):
    """The step to a maximum, cut along each axis; none where the surface is not curved as at a peak."""
    safe = tl.where(peak, determinant, 1.0)
    x = tl.where(peak, divide(hxy * gy - hyy * gx, safe), 0.0)
    y = tl.where(peak, divide(hxy * gx - hxx * gy, safe), 0.0)
    return tl.minimum(tl.maximum(x, -LONGEST), LONGEST), tl.minimum(tl.maximum(y, -LONGEST), LONGEST)


@triton.jit
def snapped(shift, EPSILON: tl.constexpr):
    """Identical frames are at exactly 0: what rounding leaves there is taken off."""
    return tl.where(tl.abs(shift) < 64 * EPSILON, 0.0, shift)


@triton.jit
def _divided_derivatives(
    spectra, frame, stack, bins, columns, fy, fx, shift_x, shift_y, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """Slopes and curvatures of a logarithm, see functional.phase._divided_step; and whether it has one."""
    gx = tl.zeros_like(shift_x)
    gy = tl.zeros_like(shift_x)
    hxx = tl.zeros_like(shift_x)
    hyy = tl.zeros_like(shift_x)
    hxy = tl.zeros_like(shift_x)
    positive = shift_x == shift_x
    for which in range(3):
        own = spectra + (which * stack + frame) * bins * 2
        other = own + tl.cast(stack, tl.int64) * bins * 6
        value, x1, y1, xx, yy, xy = derivatives(
            own, other, bins, columns, fy, fx, shift_x, shift_y, True, COMPUTE, BLOCK
        )
        positive = positive & (value > 0)
        safe = tl.where(value > 0, value, 1.0)
        share = tl.where(which == 0, 1.0, -0.5).to(COMPUTE)
        x1 = divide(x1, safe)
        y1 = divide(y1, safe)
        gx += share * x1
        gy += share * y1
        hxx += share * (divide(xx, safe) - x1 * x1)
        hyy += share * (divide(yy, safe) - y1 * y1)
        hxy += share * (divide(xy, safe) - x1 * y1)
    return positive, gx, gy, hxx, hyy, hxy


@kernel
def climb_frames(
    spectra,  # (N, h, w//2+1, 2), half of a cross-power spectrum; if DIVIDED (2, 3, N, ...), of what is correlated
    fy,  # (h,), cycles per pixel
    fx,  # (w//2+1,)
    start,  # (N, 2), pixels
    found,  # (N, 2)
    last,  # (N, 2)
    peaks,  # (N,), 0 and 1
    stack,  # frames in all
    bins,
    columns,
    steps,  # at least one
    DIVIDED: tl.constexpr,
    COMPUTE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: one frame."""
    frame = tl.program_id(0).to(tl.int64)
    MARGIN: tl.constexpr = 0.0 if DIVIDED else EPSILON
    LONGEST: tl.constexpr = 0.3 if DIVIDED else 0.5
    own = spectra + frame * bins * 2
    shift_x, shift_y = load_pair(start, frame)
    step_x = tl.zeros_like(shift_x)
    step_y = tl.zeros_like(shift_y)
    peak = shift_x != shift_x
    for _ in range(steps):
        if DIVIDED:
            positive, gx, gy, hxx, hyy, hxy = _divided_derivatives(
                spectra, frame, stack, bins, columns, fy, fx, shift_x, shift_y, COMPUTE, BLOCK
            )
        else:
            value, gx, gy, hxx, hyy, hxy = derivatives(
                own, own, bins, columns, fy, fx, shift_x, shift_y, False, COMPUTE, BLOCK
            )
            positive = value == value
        product = hxx * hyy
        determinant = product - hxy * hxy
        peak = positive & (hxx < 0) & (determinant > MARGIN * product)
        step_x, step_y = step_to_peak(gx, gy, hxx, hyy, hxy, determinant, peak, LONGEST)
        shift_x += step_x
        shift_y += step_y
    store_pair(found, frame, snapped(shift_x, EPSILON), snapped(shift_y, EPSILON))
    store_pair(last, frame, step_x, step_y)
    tl.store(peaks + frame, peak.to(tl.uint8))


@operator(planes_of(MOST_BINS))
def climb(
    spectra: Tensor, frequencies: list[Tensor], start: Tensor, steps: int, divided: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Newton's ascent: functional.peak.refine_peak, or if ``divided`` functional.phase._refine_divided.

    A step is at most half a pixel an axis, or 0.3 pixels if divided.

    Returns:
        The shift (..., 2); the last step (..., 2); and whether that was one to a maximum (...,).
    """
    lead, (rows, columns) = spectra.shape[2 * divided : -2], spectra.shape[-2:]
    shift, last = (start.new_empty((*lead, 2), dtype=spectra.dtype.to_real()) for _ in range(2))
    peaks = start.new_empty(lead, dtype=torch.bool)
    yield shift, last, peaks
    start = start.expand(*lead, 2).to(shift.dtype)
    tensors, numbers = (spectra, *frequencies, start, shift, last, peaks), (rows * columns, columns, steps)
    launch(climb_frames, lead, (), tensors, (math.prod(lead), *numbers), DIVIDED=divided)


@kernel
def overlap_frames(
    own,  # (N, h, w), the window of the ground in common, over the moving frame
    other,  # (N, h, w), over the reference
    moved,  # (N, h, w), the weights over the moving frame
    weights,  # (N, h, w), over the reference
    cover,  # (N, h, w), of the moving frame
    other_cover,  # (N or 1 a group, h, w)
    moving,  # (N, h, w)
    reference,  # (N or 1 a group, h, w)
    fields,  # (2, 3, N, h, w)
    stack,  # frames in all
    group,
    samples,
    HAS_COVER: tl.constexpr,
    HAS_OTHER_COVER: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: a block of samples of one frame."""
    frame, place, live = block_of(samples, BLOCK)
    here = frame * samples + place
    there = frame // group * samples + place
    weight = tl.load(own + here, mask=live, other=0)
    share = tl.load(moved + here, mask=live, other=0)
    weight *= tl.minimum(tl.maximum(share, 0.0), 1.0)
    if HAS_COVER:
        weight *= tl.load(cover + here, mask=live, other=0)
    value = tl.load(moving + here, mask=live, other=0)
    step = tl.cast(stack, tl.int64) * samples
    tl.store(fields + here, weight * value, mask=live)
    tl.store(fields + step + here, weight * value * value, mask=live)
    tl.store(fields + 2 * step + here, weight, mask=live)
    weight = tl.load(other + here, mask=live, other=0) * tl.load(weights + here, mask=live, other=0)
    if HAS_OTHER_COVER:
        weight *= tl.load(other_cover + there, mask=live, other=0)
    value = tl.load(reference + there, mask=live, other=0)
    tl.store(fields + 3 * step + here, weight * value, mask=live)
    tl.store(fields + 4 * step + here, weight, mask=live)
    tl.store(fields + 5 * step + here, weight * value * value, mask=live)


@operator()
def overlaps(
    windows: list[Tensor],
    moved: Tensor,
    weights: Tensor,
    cover: Tensor | None,
    other_cover: Tensor | None,
    moving: Tensor,
    reference: Tensor,
) -> Iterator[Tensor]:
    """See :func:`torchalign.functional.phase._divided_fields`, (2, 3, ..., T, h, w)."""
    fields = moved.new_empty((2, 3, *moved.shape))
    yield fields
    lead, size = moved.shape[:-2], moved.shape[-2:]
    reference, other_cover, group = by_group(lead, 2, reference, other_cover)
    own, other, weights, cover, moving = expanded(lead, 2, *windows, weights, cover, moving)
    launch(
        overlap_frames,
        lead,
        size,
        (own, other, moved, weights, cover, other_cover, moving, reference, fields),
        (math.prod(lead), group, math.prod(size)),
    )
