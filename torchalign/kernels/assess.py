"""How well a maximum of a correlation is known, and how far its weights pulled it, as one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.climb import MOST_BINS, snapped, unturned, with_bins
from torchalign.kernels.language import divide, load_pair, store_pair
from torchalign.kernels.launching import expanded, kernel, launch, operator, planes_of


@triton.jit
def _overlap_of_weights(
    weights, rows, columns, half_y, half_x, COMPUTE: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr
):
    """functional.uncertainty.overlap_curvature, and how many bins the window's spectrum correlates."""
    kxx = tl.zeros((BLOCK,), COMPUTE)
    kyy = tl.zeros((BLOCK,), COMPUTE)
    kxy = tl.zeros((BLOCK,), COMPUTE)
    square = tl.zeros((BLOCK,), COMPUTE)
    fourth = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, rows * columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        live = place < rows * columns
        x = place % columns
        y = place // columns
        inner = live & (x > 0) & (x < columns - 1) & (y > 0) & (y < rows - 1)
        own = tl.load(weights + place, mask=live, other=0)
        right = tl.load(weights + place + 1, mask=inner, other=0)
        left = tl.load(weights + place - 1, mask=inner, other=0)
        below = tl.load(weights + place + columns, mask=inner, other=0)
        above = tl.load(weights + place - columns, mask=inner, other=0)
        by_x = (right - left) * half_x
        by_y = (below - above) * half_y
        kxx += by_x * by_x
        kyy += by_y * by_y
        kxy += by_x * by_y
        square += own * own
        fourth += own * own * own * own
    area = tl.sum(square, 0)
    total = area + TINY
    bins = divide(tl.cast(rows * columns, COMPUTE) * tl.sum(fourth, 0), area * area + TINY)
    return divide(tl.sum(kxx, 0), total), divide(tl.sum(kyy, 0), total), divide(tl.sum(kxy, 0), total), bins


@triton.jit
def _direction(xx, yy, xy):
    """functional.uncertainty.largest_direction, by the half angle."""
    difference = xx - yy
    difference = tl.where(difference == difference, difference, 0.0)
    twice = tl.where(xy == xy, 2 * xy, 0.0)
    largest = tl.maximum(tl.abs(difference), tl.abs(twice))
    unit = tl.where(largest > 0, largest, 1.0)
    difference = divide(difference, unit)
    twice = divide(twice, unit)
    length = tl.sqrt(difference * difference + twice * twice)
    length = tl.where(length > 0, length, 1.0)
    cosine = tl.where(largest > 0, divide(difference, length), 1.0)
    sine = divide(twice, length)
    longer = tl.sqrt(0.5 * (1 + tl.abs(cosine)))
    shorter = divide(0.5 * tl.abs(sine), longer)
    x = tl.where(cosine >= 0, longer, shorter)
    y = tl.where(cosine >= 0, shorter, longer)
    return x, tl.where(twice < 0, -y, y)


@triton.jit
def _sandwich(gxx, gyy, gxy, mxx, myy, mxy, determinant):
    """xx, yy and xy of G⁻¹ M G⁻¹, of symmetric matrices; the determinant is G's."""
    square = determinant * determinant
    xx = divide(gyy * gyy * mxx - 2 * gyy * gxy * mxy + gxy * gxy * myy, square)
    yy = divide(gxx * gxx * myy - 2 * gxx * gxy * mxy + gxy * gxy * mxx, square)
    xy = divide((gxx * gyy + gxy * gxy) * mxy - gyy * gxy * mxx - gxx * gxy * myy, square)
    return xx, yy, xy


@triton.jit
def _weights_pull(gxx, gyy, gxy, kxx, kyy, kxy, determinant, regular):
    """The matrix H⁻¹ (C K), row by row; 0 where H has no inverse."""
    xx = tl.where(regular, divide(gyy * kxx - gxy * kxy, determinant), 0.0)
    xy = tl.where(regular, divide(gyy * kxy - gxy * kyy, determinant), 0.0)
    yx = tl.where(regular, divide(gxx * kxy - gxy * kxx, determinant), 0.0)
    yy = tl.where(regular, divide(gxx * kyy - gxy * kxy, determinant), 0.0)
    return xx, xy, yx, yy


@triton.jit
def _fourth_moment(x, y, p40, p31, p22, p13, p04):
    """Along a direction (x, y), of the sums of a block's lanes."""
    total = x * x * x * x * tl.sum(p40, 0) + 4 * x * x * x * y * tl.sum(p31, 0)
    total += 6 * x * x * y * y * tl.sum(p22, 0)
    return total + (4 * x * y * y * y * tl.sum(p13, 0) + y * y * y * y * tl.sum(p04, 0))


@kernel
def assess_frames(
    power,  # (N, h, w//2+1, 2)
    fy,  # (h,), cycles per pixel
    fx,  # (w//2+1,)
    start,  # (N, 2), the maximum, in pixels
    together,  # (N, 2), where the weights match
    weights,  # (N, h, w)
    settled_shift,  # (N, 2)
    covariance,  # (N, 2, 2)
    heights,  # (N,)
    curvatures,  # (N,)
    fixed,  # (N,)
    inverse,  # (N, 2, 2)
    rows,
    columns,  # of the weights
    half_y: tl.float64,  # one by twice the sampling, in pixels
    half_x: tl.float64,
    calibration: tl.float64,
    share: tl.float64,
    pulls: tl.float64,
    longest: tl.float64,
    largest: tl.float64,
    COMPUTE: tl.constexpr,
    TINY: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: one frame. See functional.uncertainty.assess_peak, and functional.phase for what follows it."""
    frame = tl.program_id(0).to(tl.int64)
    half = columns // 2 + 1
    bins = rows * half
    spectrum = power + frame * bins * 2
    shift_x, shift_y = load_pair(start, frame)
    c00 = tl.zeros((BLOCK,), COMPUTE)
    c20 = tl.zeros((BLOCK,), COMPUTE)
    c02 = tl.zeros((BLOCK,), COMPUTE)
    c11 = tl.zeros((BLOCK,), COMPUTE)
    sxx = tl.zeros((BLOCK,), COMPUTE)
    syy = tl.zeros((BLOCK,), COMPUTE)
    sxy = tl.zeros((BLOCK,), COMPUTE)
    p00 = tl.zeros((BLOCK,), COMPUTE)
    p40 = tl.zeros((BLOCK,), COMPUTE)
    p31 = tl.zeros((BLOCK,), COMPUTE)
    p22 = tl.zeros((BLOCK,), COMPUTE)
    p13 = tl.zeros((BLOCK,), COMPUTE)
    p04 = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, bins, BLOCK):
        place = first + tl.arange(0, BLOCK)
        y, x, along, across = unturned(
            spectrum, spectrum, place, bins, half, fy, fx, shift_x, shift_y, False, COMPUTE
        )
        c00, c20, c02, c11 = with_bins(c00, c20, c02, c11, x, y, along)
        # a bin and its conjugate pull alike: together the square of twice the pull
        pull = across * across
        sxx += x * x * pull
        syy += y * y * pull
        sxy += x * y * pull
        whole = pull + along * along
        p00 += whole
        p40 += x * x * x * x * whole
        p31 += x * x * x * y * whole
        p22 += x * x * y * y * whole
        p13 += x * y * y * y * whole
        p04 += y * y * y * y * whole
    value = tl.sum(c00, 0)
    wxx = -tl.sum(c20, 0)
    wyy = -tl.sum(c02, 0)
    wxy = -tl.sum(c11, 0)
    kxx, kyy, kxy, correlated = _overlap_of_weights(
        weights + frame * rows * columns, rows, columns, tl.cast(half_y, COMPUTE), tl.cast(half_x, COMPUTE),
        COMPUTE, TINY, BLOCK,
    )  # fmt: skip
    kxx *= value
    kyy *= value
    kxy *= value
    gxx = wxx - kxx
    gyy = wyy - kyy
    gxy = wxy - kxy
    determinant = gxx * gyy - gxy * gxy
    regular = determinant > 0
    safe = tl.where(regular, determinant, 1.0)
    rxx, rxy, ryx, ryy = _weights_pull(gxx, gyy, gxy, kxx, kyy, kxy, safe, regular)
    mxx = tl.sum(sxx, 0) * correlated
    myy = tl.sum(syy, 0) * correlated
    mxy = tl.sum(sxy, 0) * correlated
    cxx, cyy, cxy = _sandwich(gxx, gyy, gxy, mxx, myy, mxy, safe)
    scale = tl.cast(calibration, COMPUTE)
    left = tl.cast(share, COMPUTE)
    cxx = tl.where(regular, scale * cxx, float("inf")) + left * (rxx * rxx + rxy * rxy)
    cyy = tl.where(regular, scale * cyy, float("inf")) + left * (ryx * ryx + ryy * ryy)
    cxy = tl.where(regular, scale * cxy, 0.0) + left * (rxx * ryx + rxy * ryy)
    height = value / tl.sqrt(0.5 * correlated * tl.sum(p00, 0) + TINY)
    x, y = _direction(cxx, cyy, cxy)
    fourth = _fourth_moment(x, y, p40, p31, p22, p13, p04)
    bend = x * x * gxx + y * y * gyy + 2 * x * y * gxy
    entire = x * x * wxx + y * y * wyy + 2 * x * y * wxy
    curvature = bend / tl.sqrt(0.5 * correlated * fourth + TINY)
    ground = tl.where(entire > 0, divide(bend, tl.where(entire > 0, entire, 1.0)), 0.0)
    # what the weights pulled is taken off, if it is little, and is an error besides
    most = tl.cast(longest, COMPUTE)
    x, y = load_pair(together, frame)
    away_x = tl.minimum(tl.maximum(shift_x - x, -most), most)
    away_y = tl.minimum(tl.maximum(shift_y - y, -most), most)
    extra_x = rxx * away_x + rxy * away_y
    extra_y = ryx * away_x + ryy * away_y
    bounded = tl.maximum(tl.abs(extra_x), tl.abs(extra_y)) <= tl.cast(largest, COMPUTE)
    shift_x += tl.where(bounded, extra_x, 0.0)
    shift_y += tl.where(bounded, extra_y, 0.0)
    extra_x = tl.cast(pulls, COMPUTE) * tl.minimum(tl.maximum(extra_x, -1.0), 1.0)
    extra_y = tl.cast(pulls, COMPUTE) * tl.minimum(tl.maximum(extra_y, -1.0), 1.0)
    store_pair(settled_shift, frame, snapped(shift_x, EPSILON), snapped(shift_y, EPSILON))
    store_pair(covariance, 2 * frame, cxx + extra_x * extra_x, cxy + extra_x * extra_y)
    store_pair(covariance, 2 * frame + 1, cxy + extra_x * extra_y, cyy + extra_y * extra_y)
    tl.store(heights + frame, height)
    tl.store(curvatures + frame, curvature)
    tl.store(fixed + frame, ground)
    across = tl.where(regular, -divide(gxy, safe), 0.0)
    store_pair(inverse, 2 * frame, tl.where(regular, divide(gyy, safe), 0.0), across)
    store_pair(inverse, 2 * frame + 1, across, tl.where(regular, divide(gxx, safe), 0.0))


@operator(planes_of(MOST_BINS))
def assess(
    power: Tensor,
    frequencies: list[Tensor],
    shift: Tensor,
    together: Tensor,
    weights: Tensor,
    spacing: list[float],
    limits: list[float],
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """See :func:`torchalign.functional.uncertainty.assess_peak`, and what :mod:`torchalign.functional.phase` makes of it.

    The ``limits`` are the factor of the covariance; the share of the square of the weights' correction that is error;
    how many times what the weights pulled is error besides; the longest way, and the largest correction that is made,
    in pixels.

    Returns:
        The shift (..., 2) less the weights' pull; and its covariance (..., 2, 2), the height, the curvature along
        its larger axis, and the share of it that is not the weights', (...,) each, and the inverse of the Hessian
        (..., 2, 2).
    """
    lead, dtype = power.shape[:-2], power.dtype.to_real()
    sizes = (2,), (2, 2), (), (), (), (2, 2)
    found: Any = tuple(shift.new_empty((*lead, *size), dtype=dtype) for size in sizes)
    yield found
    shift, together = (part.to(dtype) for part in expanded(lead, 1, shift, together))
    tensors = power, *frequencies, shift, together, *expanded(lead, 2, weights), *found
    halves = [0.5 / step for step in spacing]
    launch(assess_frames, lead, (), tensors, (*weights.shape[-2:], *halves, *limits))
