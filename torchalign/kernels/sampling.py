"""Where an output pixel lies in its frame, and what is read there: the pieces that kernels share.

Convention:
    As in :mod:`torchalign.functional.warp`: a source position is output pixel + displacement, and only the
    displacement is computed in floating point.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchalign.kernels.language import divide, is_finite, lerp, load_row

# beyond this many pixels a displacement is cut, as in functional.warp
_FARTHEST = tl.constexpr(2.0**22)


@triton.jit
def bounded(displacement):
    """What is no number, or too far, is nowhere near the frame."""
    known = tl.where(displacement == displacement, displacement, _FARTHEST)
    return tl.minimum(tl.maximum(known, -_FARTHEST), _FARTHEST)


@triton.jit
def _near_or_nowhere(line, determinant):
    line = divide(line, determinant)
    return tl.where(tl.abs(line) <= 0.5 * _FARTHEST, line, _FARTHEST)


@triton.jit
def displacement(motion, x, y, ENTRIES: tl.constexpr, COMPUTE: tl.constexpr):
    """``warp⁻¹ p − p`` for p = (x, y), see functional.warp._displacement: term by term what is written there."""
    if ENTRIES == 2:
        dx = bounded(-tl.load(motion).to(COMPUTE)) + tl.zeros_like(x)
        dy = bounded(-tl.load(motion + 1).to(COMPUTE)) + tl.zeros_like(y)
    else:
        a, b, c = load_row(motion, COMPUTE)
        d, e, f = load_row(motion + 3, COMPUTE)
        if ENTRIES == 6:
            determinant = a * e - b * d + tl.zeros_like(x)
            dx = _near_or_nowhere(
                (b * d - e * (a - 1)) * x + (b * f - e * c), determinant
            ) + _near_or_nowhere(-b * y, determinant)
            dy = _near_or_nowhere(-d * x + (d * c - a * f), determinant) + _near_or_nowhere(
                (b * d - a * (e - 1)) * y, determinant
            )
        else:
            g, h, i = load_row(motion + 6, COMPUTE)
            depth = (d * h - e * g) * x + (b * g - a * h) * y + (a * e - b * d)
            perspective = (d * h - e * g) * x + (b * g - a * h) * y
            across = (e * (i - a) - f * h + b * d - perspective) * x + (c * h - b * i) * y + (b * f - c * e)
            down = (f * g - d * i) * x + (a * (i - e) - c * g + b * d - perspective) * y + (c * d - a * f)
            dx = bounded(divide(across, depth))
            dy = bounded(divide(down, depth))
    return dx, dy


@triton.jit
def source_of(
    motion, x, y, height, width, local, samples, live,
    LOCAL: tl.constexpr, ENTRIES: tl.constexpr, POSITION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Whole and fractional source positions, the nearest pixel, and whether it is one of the frame's.

    ``LOCAL``: with shifts on top of the motion, those along y ``samples`` places after those along x.
    """
    dx, dy = displacement(motion, x.to(POSITION), y.to(POSITION), ENTRIES, POSITION)
    if LOCAL:
        dx = bounded(dx + tl.load(local, mask=live, other=0).to(POSITION))
        dy = bounded(dy + tl.load(local + samples, mask=live, other=0).to(POSITION))
    whole_x = tl.floor(dx)
    whole_y = tl.floor(dy)
    fx = (dx - whole_x).to(COMPUTE)
    fy = (dy - whole_y).to(COMPUTE)
    column = x + whole_x.to(tl.int32)
    row = y + whole_y.to(tl.int32)
    near_column = column + (fx >= 0.5).to(tl.int32)
    near_row = row + (fy >= 0.5).to(tl.int32)
    inside = (near_column >= 0) & (near_column < width) & (near_row >= 0) & (near_row < height)
    return column, row, fx, fy, near_column, near_row, inside


@triton.jit
def padded(index, length, REFLECT: tl.constexpr):
    """Indices into a line of ``length`` pixels, which is continued beyond its ends."""
    if REFLECT:  # … 1 0 | 0 1 2 … L−1 | L−1 L−2 …, period 2L
        period = 2 * length
        index = ((index % period) + period) % period
        index = tl.minimum(index, period - 1 - index)
    return tl.minimum(tl.maximum(index, 0), length - 1)


@triton.jit
def neighbour(x, y, i, j, rows, columns):
    """The place of the sample that lies i columns and j rows further, the border continued."""
    return padded(y + j, rows, False) * columns + padded(x + i, columns, False)


@triton.jit
def triangle(i, j, REACH: tl.constexpr):
    """That sample's weight in a triangular mean over 2 ``REACH`` + 1 samples a side."""
    far_y = tl.where(j < 0, -j, j)
    far_x = tl.where(i < 0, -i, i)
    return ((REACH + 1 - far_y) * (REACH + 1 - far_x)) * (1.0 / (REACH + 1) ** 4)


@triton.jit
def cubic_weight(fraction, TAP: tl.constexpr):
    """Keys' weight, A = −1/2, of the pixel at ``TAP`` − 1 from ⌊x⌋."""
    rest = 1 - fraction
    if TAP == 0:
        weight = ((-0.5 * fraction + 1.0) * fraction - 0.5) * fraction
    elif TAP == 1:
        weight = (1.5 * fraction - 2.5) * fraction * fraction + 1
    elif TAP == 2:
        weight = (1.5 * rest - 2.5) * rest * rest + 1
    else:
        weight = ((-0.5 * rest + 1.0) * rest - 0.5) * rest
    return weight


@triton.jit
def read(
    pixels, usable, at, at_mask, live, COMPUTE: tl.constexpr, FLOATING: tl.constexpr, MASKED: tl.constexpr
):
    """Pixels, 0 where they are unusable; and where they are usable (1 and 0)."""
    values = tl.load(pixels + at, mask=live).to(COMPUTE)
    good = live
    if FLOATING:
        good = good & is_finite(values)
    if MASKED:
        good = good & (tl.load(usable + at_mask, mask=live, other=0) != 0)
    return tl.where(good, values, 0.0), good


@triton.jit
def interpolate(
    pixels, usable, column, row, fx, fy, height, width, strides, mask_strides, live,
    INTERPOLATION: tl.constexpr, REFLECT: tl.constexpr, FLOATING: tl.constexpr, MASKED: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The bilinear value and the share of it that is usable; the bicubic one, and what of it met unusable pixels.

    Strides are those of rows and columns. ``INTERPOLATION`` is 1 (bilinear alone) or 2.
    """
    total = tl.zeros_like(fx)
    met = tl.zeros_like(fx)
    for j in tl.static_range(4):
        if INTERPOLATION == 2 or (j == 1 or j == 2):
            at_row = padded(row + (j - 1), height, REFLECT).to(INDEX)
            weight_y = cubic_weight(fy, j)
            line = tl.zeros_like(fx)
            met_line = tl.zeros_like(fx)
            for i in tl.static_range(4):
                if INTERPOLATION == 2 or (i == 1 or i == 2):
                    at_column = padded(column + (i - 1), width, REFLECT).to(INDEX)
                    at = at_row * strides[0] + at_column * strides[1]
                    at_mask = at_row * mask_strides[0] + at_column * mask_strides[1]
                    tap, good = read(pixels, usable, at, at_mask, live, COMPUTE, FLOATING, MASKED)
                    share = good.to(COMPUTE)
                    if INTERPOLATION == 2:
                        weight_x = cubic_weight(fx, i)
                        line += weight_x * tap
                        if FLOATING or MASKED:
                            met_line += tl.abs(weight_x) * (1 - share)
                    if i == 1:
                        left = tap
                        left_share = share
                    elif i == 2:
                        level = lerp(left, tap, fx)
                        level_share = lerp(left_share, share, fx)
            if INTERPOLATION == 2:
                total += weight_y * line
                if FLOATING or MASKED:
                    met += tl.abs(weight_y) * met_line
            if j == 1:
                above = level
                above_share = level_share
            elif j == 2:
                linear = lerp(above, level, fy)
                linear_share = lerp(above_share, level_share, fy)
    return linear, linear_share, total, met


@triton.jit
def spline_weight(fraction, TAP: tl.constexpr):
    """Of a cubic B-spline, of the coefficient at ``TAP`` − 1 from ⌊x⌋; the four sum to 1."""
    rest = 1 - fraction
    right = ((0.5 - fraction * (1 / 3)) * fraction + 0.5) * fraction + (1 / 6)
    first = rest * rest * rest * (1 / 6)
    last = fraction * fraction * fraction * (1 / 6)
    if TAP == 0:
        weight = first
    elif TAP == 1:
        weight = 1 - right - first
    elif TAP == 2:
        weight = right - last
    else:
        weight = last
    return weight


@triton.jit
def read_spline(pixel, line, fx, fy, live):
    """A cubic B-spline beyond a pixel by fractions, whose coefficients lie in lines of this length."""
    total = tl.zeros_like(fx)
    for j in tl.static_range(4):
        part = tl.zeros_like(fx)
        for i in tl.static_range(4):
            tap = tl.load(pixel + (j - 1) * line + (i - 1), mask=live, other=0)
            part += spline_weight(fx, i) * tap
        total += spline_weight(fy, j) * part
    return total
