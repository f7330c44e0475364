"""The steps of an ECC ascent as one kernel: sampling, inner products, the increment, and so on until none is long.

Convention:
    As in :mod:`torchalign.functional.ecc`: warps are 3 × 3 and normalised (the frame's centre is 0, half of its
    longer side 1); an increment is composed on the left. Fields are continued beyond their border, by 3 samples
    on every side, so that no tap of a spline is outside.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import block_of, divide, lerp, load_matrix, load_pair, store_pair
from torchalign.kernels.launching import by_group, expanded, kernel, launch, operator
from torchalign.kernels.sampling import read_spline
from torchalign.kernels.turn import load_complex, tukey, wave_of

_MOTIONS = ("translation", "euclidean", "similarity", "affine", "homography")
# a point farther out than this, in samples, is nowhere
_NOWHERE = tl.constexpr(1e7)


@triton.jit
def _finite_or_far(value):
    """What is no number, or would overflow, is far away."""
    value = tl.where(value == value, value, _NOWHERE)
    return tl.minimum(tl.maximum(value, -_NOWHERE), _NOWHERE)


@triton.jit
def _inverse(warp):
    """Of a 3 × 3 matrix, by its adjugate."""
    a, b, c, d, e, f, g, h, i = warp
    p = e * i - f * h
    q = f * g - d * i
    r = d * h - e * g
    determinant = a * p + b * q + c * r
    return (
        _finite_or_far(divide(p, determinant)),
        _finite_or_far(divide(c * h - b * i, determinant)),
        _finite_or_far(divide(b * f - c * e, determinant)),
        _finite_or_far(divide(q, determinant)),
        _finite_or_far(divide(a * i - c * g, determinant)),
        _finite_or_far(divide(c * d - a * f, determinant)),
        _finite_or_far(divide(r, determinant)),
        _finite_or_far(divide(b * g - a * h, determinant)),
        _finite_or_far(divide(a * e - b * d, determinant)),
    )


@triton.jit
def _points(inverse, x, y, half, height, width, PROJECTIVE: tl.constexpr):
    """Pixels (column, row) of the moving frame that samples of the reference show."""
    across = (width - 1) * 0.5
    down = (height - 1) * 0.5
    column = (
        (inverse[0] * half + inverse[6] * across) * x
        + (inverse[1] * half + inverse[7] * across) * y
        + (inverse[2] * half + inverse[8] * across)
    )
    row = (
        (inverse[3] * half + inverse[6] * down) * x
        + (inverse[4] * half + inverse[7] * down) * y
        + (inverse[5] * half + inverse[8] * down)
    )
    if PROJECTIVE:
        # beyond its horizon a homography shows nothing
        depth = inverse[6] * x + inverse[7] * y + inverse[8]
        depth = tl.where(depth > 0, depth, 1 / _NOWHERE)
        column = divide(column, depth)
        row = divide(row, depth)
    return column, row


@triton.jit
def _sample(field, rows, columns, column, row, wide, high, live, SPLINE: tl.constexpr):
    """A continued field of rows × columns at pixels of a frame of high × wide; beyond the border is the border."""
    column = tl.minimum(tl.maximum(column * divide(wide * 0 + columns, wide), -1.0), columns)
    row = tl.minimum(tl.maximum(row * divide(wide * 0 + rows, high), -1.0), rows)
    left = tl.floor(column)
    top = tl.floor(row)
    fx = column - left
    fy = row - top
    line = columns + 6
    at = field + (top.to(tl.int32) + 3) * line + left.to(tl.int32) + 3
    if SPLINE:
        value = read_spline(at, line, fx, fy, live)
    else:
        above = lerp(tl.load(at, mask=live, other=0), tl.load(at + 1, mask=live, other=0), fx)
        below = lerp(tl.load(at + line, mask=live, other=0), tl.load(at + line + 1, mask=live, other=0), fx)
        value = lerp(above, below, fy)
    return value


@kernel
def look_frames(
    spline,  # (N, h + 6, w + 6), coefficients of a cubic B-spline, continued
    usable,  # (N, h' + 6, w' + 6), how much is usable, continued
    warp,  # (N, 9), normalised
    level_x,  # (n,), where the samples lie, normalised
    level_y,  # (n,)
    level_weights,  # (N or 1 a group, n), of the reference
    values,  # (N, n)
    common,  # (N, n)
    samples,
    group,
    rows,
    columns,
    usable_rows,
    usable_columns,
    height: tl.float64,  # of the frame, in pixels
    width: tl.float64,
    ramp_y: tl.float64,  # how long the window falls off, in pixels
    ramp_x: tl.float64,
    HAS_USABLE: tl.constexpr,
    TAPERED: tl.constexpr,
    PROJECTIVE: tl.constexpr,
    SPLINE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 256,
):
    """One program: a block of samples of one frame."""
    frame, place, live = block_of(samples, BLOCK)
    zero = tl.zeros((BLOCK,), COMPUTE)
    high = zero + tl.cast(height, COMPUTE)
    wide = zero + tl.cast(width, COMPUTE)
    half = tl.maximum(high, wide) * 0.5
    inverse = _inverse(load_matrix(warp + 9 * frame, COMPUTE))
    x = tl.load(level_x + place, mask=live, other=0)
    y = tl.load(level_y + place, mask=live, other=0)
    column, row = _points(inverse, x, y, half, high, wide, PROJECTIVE)
    field = spline + frame * (rows + 6) * (columns + 6)
    value = _sample(field, rows, columns, column, row, wide, high, live, SPLINE)
    tl.store(values + frame * samples + place, value, mask=live)
    if TAPERED:
        own = tukey(row, high, zero + tl.cast(ramp_y, COMPUTE)) * tukey(
            column, wide, zero + tl.cast(ramp_x, COMPUTE)
        )
    else:
        within = (column > -0.5) & (column < wide - 0.5) & (row > -0.5) & (row < high - 0.5)
        own = within.to(COMPUTE)
    if HAS_USABLE:
        mask = usable + frame * (usable_rows + 6) * (usable_columns + 6)
        share = _sample(mask, usable_rows, usable_columns, column, row, wide, high, live, False)
        # between two ones lies a one, but for rounding
        own *= tl.where(share > 1 - 1e-5, 1.0, share)
    onto = tl.load(level_weights + (frame // group) * samples + place, mask=live, other=0)
    tl.store(common + frame * samples + place, tl.minimum(onto, own), mask=live)


@triton.jit
def _store_matrix(out, entries):
    for place in tl.static_range(9):
        tl.store(out + place, entries[place])


@triton.jit
def _load_system(means, inverses, solutions, rests, corners, frame, places, PARAMETERS: tl.constexpr):
    """The normal equations of a frame at places 2 …, and how each parameter displaces the corners."""
    parameter = (places >= 2) & (places < 2 + PARAMETERS)
    mean = tl.load(means + frame * (2 + PARAMETERS) + places, mask=places < 2 + PARAMETERS, other=0)
    solved = tl.load(solutions + frame * PARAMETERS + places - 2, mask=parameter, other=0)
    inverse = tl.load(
        inverses + frame * PARAMETERS * PARAMETERS + (places[:, None] - 2) * PARAMETERS + places[None, :] - 2,
        mask=parameter[:, None] & parameter[None, :],
        other=0,
    )
    four = tl.arange(0, 4)
    corner = four[:, None] * PARAMETERS + places[None, :] - 2
    corners_x = tl.load(corners + corner, mask=parameter[None, :], other=0)
    corners_y = tl.load(corners + 4 * PARAMETERS + corner, mask=parameter[None, :], other=0)
    return mean, inverse, solved, tl.load(rests + frame), corners_x, corners_y


@triton.jit
def _best_step(moments, system, places, longest):
    """The step, at places 2 …, that maximises the coefficient of the linearised reference; and its reach.

    That is how far it moves the farthest corner, in pixels: no more than the longest way.
    """
    mean, inverse, solved, rest, corners_x, corners_y = system
    first = tl.sum(tl.where(places == 0, moments, 0.0), 0)
    centred = moments - first * mean
    along = tl.sum(tl.where(places == 1, centred, 0.0), 0) - tl.sum(centred * solved, 0)
    good = (along > 0) & (rest > 0)
    gain = tl.where(good, divide(rest, tl.where(good, along, 1.0)), 1.0)
    increment = gain * tl.sum(inverse * centred[None, :], 1) - solved
    x = tl.sum(corners_x * increment[None, :], 1)
    y = tl.sum(corners_y * increment[None, :], 1)
    reach = tl.sqrt(tl.max(x * x + y * y, 0))
    shorter = divide(longest, tl.maximum(reach, longest))
    return increment * shorter, reach * shorter


@triton.jit
def _entry(vector, places, PLACE: tl.constexpr):
    return tl.sum(tl.where(places == PLACE, vector, 0.0), 0)


@triton.jit
def _composed(step, places, nothing, warp, MOTION: tl.constexpr):
    """The increment's warp, composed on the left of a warp; the last entry is 1."""
    a, b, c, d, e, f, g, h, i = warp
    tx = _entry(step, places, 2)
    ty = _entry(step, places, 3)
    aa = nothing + 1
    bb = nothing
    cc = nothing
    dd = nothing + 1
    gg = nothing
    hh = nothing
    if MOTION == 1:
        angle = _entry(step, places, 4)
        aa = tl.cos(angle)
        cc = tl.sin(angle)
        bb = -cc
        dd = aa
    elif MOTION == 2:
        cc = _entry(step, places, 4)
        bb = -cc
        aa = 1 + _entry(step, places, 5)
        dd = aa
    elif MOTION >= 3:
        aa = 1 + _entry(step, places, 4)
        bb = _entry(step, places, 5)
        cc = _entry(step, places, 6)
        dd = 1 + _entry(step, places, 7)
    if MOTION == 4:
        gg = _entry(step, places, 8)
        hh = _entry(step, places, 9)
    last = gg * c + hh * f + i
    return (
        divide(aa * a + bb * d + tx * g, last),
        divide(aa * b + bb * e + tx * h, last),
        divide(aa * c + bb * f + tx * i, last),
        divide(cc * a + dd * d + ty * g, last),
        divide(cc * b + dd * e + ty * h, last),
        divide(cc * c + dd * f + ty * i, last),
        divide(gg * a + hh * d + g, last),
        divide(gg * b + hh * e + h, last),
        divide(last, last),
    )


@kernel
def step_warped(
    spline,  # (N, h + 6, w + 6), coefficients of a cubic B-spline, continued
    start,  # (N, 9), normalised
    moves,  # (N,), 0 and 1: whether a frame moves at all
    weights,  # (N, n)
    regressors,  # (N or 1 a group, K, n): 1, the texture, its derivatives by the P parameters, and more
    means,  # (N, 2 + P)
    inverses,  # (N, P, P)
    solutions,  # (N, P)
    rests,  # (N,)
    level_x,  # (n,), where the samples lie, normalised
    level_y,  # (n,)
    corners,  # (8, P), how each parameter displaces the frame's corners, x of the four and then y, in pixels
    warps,  # (N, 9)
    reaches,  # (N,)
    seen,  # (N, 9), where the frame was sampled last
    samples,
    group,
    lines,  # K
    rows,
    columns,
    iterations,
    height: tl.float64,  # of the frame, in pixels
    width: tl.float64,
    longest: tl.float64,  # step, in pixels
    tolerance: tl.float64,
    PARAMETERS: tl.constexpr,
    PADDED: tl.constexpr,  # the next power of two of 2 + P
    MOTION: tl.constexpr,
    PROJECTIVE: tl.constexpr,
    SPLINE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 256,
):
    """One program: one frame."""
    frame = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, PADDED)
    system = _load_system(means, inverses, solutions, rests, corners, frame, places, PARAMETERS)
    zero = tl.zeros((BLOCK,), COMPUTE)
    high = zero + tl.cast(height, COMPUTE)
    wide = zero + tl.cast(width, COMPUTE)
    half = tl.maximum(high, wide) * 0.5
    nothing = tl.cast(0.0, COMPUTE)
    limit = tl.cast(longest, COMPUTE)
    field = spline + frame * (rows + 6) * (columns + 6)
    rows_of = regressors + (frame // group) * lines * samples

    own = load_matrix(start + 9 * frame, COMPUTE)
    going = tl.load(moves + frame) != 0
    reach = nothing
    _store_matrix(seen + 9 * frame, own)
    for _ in range(iterations):
        if going:
            _store_matrix(seen + 9 * frame, own)
            back = _inverse(own)
            total = tl.zeros((PADDED, BLOCK), COMPUTE)
            for first in range(0, samples, BLOCK):
                place = first + tl.arange(0, BLOCK)
                live = place < samples
                x = tl.load(level_x + place, mask=live, other=0)
                y = tl.load(level_y + place, mask=live, other=0)
                column, row = _points(back, x, y, half, high, wide, PROJECTIVE)
                value = _sample(field, rows, columns, column, row, wide, high, live, SPLINE)
                value *= tl.load(weights + frame * samples + place, mask=live, other=0)
                tile = tl.load(
                    rows_of + places[:, None] * samples + place[None, :],
                    mask=(places < 2 + PARAMETERS)[:, None] & live[None, :],
                    other=0,
                )
                total += tile * value[None, :]
            step, reach = _best_step(tl.sum(total, 1), system, places, limit)
            own = _composed(step, places, nothing, own, MOTION)
            going = reach > tl.cast(tolerance, COMPUTE)
    _store_matrix(warps + 9 * frame, own)
    tl.store(reaches + frame, reach)


@kernel
def step_shifted(
    spectrum,  # (N, h, w//2+1, 2), 0 at half the sampling rate
    weighted,  # (N, 4, h, w//2+1, 2), spectra of the weighted regressors
    start,  # (N, 2), pixels
    moves,  # (N,), 0 and 1
    means,  # (N, 4)
    inverses,  # (N, 2, 2)
    solutions,  # (N, 2)
    rests,  # (N,)
    fy,  # (h,), cycles per pixel
    fx,  # (w//2+1,)
    corners,  # (8, 2)
    shifts,  # (N, 2), pixels
    reaches,  # (N,)
    seen,  # (N, 2), where the frame was sampled last
    bins,
    columns,
    iterations,
    samples: tl.float64,  # h · w
    half: tl.float64,  # of the frame's longer side, in pixels
    longest: tl.float64,  # step, in pixels
    tolerance: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 256,
):
    """One program: one frame. Inner products of fields are those of their spectra (Parseval)."""
    frame = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, 4)
    system = _load_system(means, inverses, solutions, rests, corners, frame, places, 2)
    own = spectrum + frame * bins * 2
    spectra = weighted + frame * 4 * bins * 2
    nothing = tl.cast(0.0, COMPUTE)
    limit = tl.cast(longest, COMPUTE)
    area = tl.cast(samples, COMPUTE)
    unit = tl.cast(half, COMPUTE)
    x_shift, y_shift = load_pair(start, frame)
    going = tl.load(moves + frame) != 0
    reach = nothing
    store_pair(seen, frame, x_shift, y_shift)
    for _ in range(iterations):
        if going:
            store_pair(seen, frame, x_shift, y_shift)
            total = tl.zeros((4, BLOCK), COMPUTE)
            for first in range(0, bins, BLOCK):
                place = first + tl.arange(0, BLOCK)
                live = place < bins
                _y, x, cosine, sine = wave_of(place, live, columns, fy, fx, x_shift, y_shift)
                # how often a column stands in the whole spectrum
                often = tl.where(x > 0, 2.0, 1.0)
                given, other = load_complex(own, place, live)
                real = (given * cosine + other * sine) * often
                imaginary = (other * cosine - given * sine) * often
                # real part of the conjugate of the weighted regressors' spectra times the frame's
                lines = places[:, None] * bins + place[None, :]
                along, across = load_complex(spectra, lines, live[None, :])
                total += along * real[None, :] + across * imaginary[None, :]
            moments = tl.sum(total, 1)
            moments = divide(moments, area + tl.zeros_like(moments))
            step, reach = _best_step(moments, system, places, limit)
            x_shift += _entry(step, places, 2) * unit
            y_shift += _entry(step, places, 3) * unit
            going = reach > tl.cast(tolerance, COMPUTE)
    store_pair(shifts, frame, x_shift, y_shift)
    tl.store(reaches + frame, reach)


@operator()
def look(
    spline: Tensor,
    usable: Tensor | None,
    warp: Tensor,
    level_weights: Tensor,
    level_x: Tensor,
    level_y: Tensor,
    frame: list[int],
    ramps: list[float],
    projective: bool,
    precise: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The moving frames as a warp shows them over the reference's samples, and the ground that both have; (..., T, n).

    Without ramps there is no window; if ``precise`` samples are of the spline, else bilinear.
    """
    lead, samples = warp.shape[:-2], level_x.shape[0]
    values, common = (warp.new_empty((*lead, samples)) for _ in range(2))
    yield values, common
    (spline, mask), (weights, group) = expanded(lead, 2, spline, usable), by_group(lead, 1, level_weights)
    sizes = [
        length - 6 for field in (spline, spline if mask is None else mask) for length in field.shape[-2:]
    ]
    launch(
        look_frames,
        lead,
        (samples,),
        (spline, mask, warp, level_x, level_y, weights, values, common),
        (samples, group, *sizes, *map(float, frame), *(ramps or (1.0, 1.0))),
        TAPERED=bool(ramps),
        PROJECTIVE=projective,
        SPLINE=precise,
    )


@operator()
def ascend_warped(
    spline: Tensor,
    start: Tensor,
    moves: Tensor,
    weights: Tensor,
    regressors: Tensor,
    equations: list[Tensor],
    level_x: Tensor,
    level_y: Tensor,
    corners: Tensor,
    frame: list[int],
    longest: float,
    projective: bool,
    motion: str,
    iterations: int,
    tolerance: float,
    precise: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Steps of frames under any warp, until none moves a point of the frame by more than a tolerance, in pixels.

    Returns:
        The warps (..., T, 3, 3); the reach (..., T) of the last step, in pixels; and the warps before it.
    """
    lead, parameters = start.shape[:-2], corners.shape[-1]
    warp, reach, seen = (start.new_empty(shape) for shape in (start.shape, lead, start.shape))
    yield warp, reach, seen
    (spline,), (moves,) = expanded(lead, 2, spline), expanded(lead, 0, moves)
    lines, group = by_group(lead, 2, regressors)
    launch(
        step_warped,
        lead,
        (),
        (spline, start, moves, weights, lines, *equations, level_x, level_y, corners, warp, reach, seen),
        (
            *(level_x.shape[0], group, regressors.shape[-2]),
            *(length - 6 for length in spline.shape[-2:]),
            iterations,
            *map(float, frame),
            longest,
            tolerance,
        ),
        PARAMETERS=parameters,
        PADDED=triton.next_power_of_2(2 + parameters),
        MOTION=_MOTIONS.index(motion),
        PROJECTIVE=projective,
        SPLINE=precise,
    )


@operator()
def ascend_shifted(
    spectrum: Tensor,
    weighted: Tensor,
    start: Tensor,
    moves: Tensor,
    equations: list[Tensor],
    frequencies: list[Tensor],
    corners: Tensor,
    samples: int,
    half: float,
    longest: float,
    iterations: int,
    tolerance: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Steps of frames that are only shifted, by products of spectra; as :func:`ascend_warped`, shifts in pixels."""
    lead, (rows, columns) = start.shape[:-1], spectrum.shape[-2:]
    shift, reach, seen = (start.new_empty(shape) for shape in (start.shape, lead, start.shape))
    yield shift, reach, seen
    (spectrum,), (moves,) = expanded(lead, 2, spectrum), expanded(lead, 0, moves)
    launch(
        step_shifted,
        lead,
        (),
        (spectrum, weighted, start, moves, *equations, *frequencies, corners, shift, reach, seen),
        (rows * columns, columns, iterations, float(samples), half, longest, tolerance),
    )
