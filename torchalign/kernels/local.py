"""Local shifts: frames read where a field says, how alike they are, and the derivatives by it, a kernel each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.alike import alike_at
from torchalign.kernels.language import block_of, cell_of, divide, lerp
from torchalign.kernels.launching import kernel, launch, operator
from torchalign.kernels.sampling import neighbour, read_spline


@triton.jit
def _whole_and_fraction(at, length, pad):
    """Of a position that is kept where the frame is continued; what is no number lies before it."""
    at = tl.where(at == at, at, -pad)
    at = tl.minimum(tl.maximum(at, 2 - pad), length + (pad - 3))
    whole = tl.floor(at)
    return whole, at - whole


@triton.jit
def _near(whole, samples, length):
    """The sample nearest to the middle of a pixel."""
    scale = divide(tl.zeros_like(whole) + samples, tl.zeros_like(whole) + length)
    return tl.minimum(tl.maximum((whole + 0.5) * scale + 0.5, 0).to(tl.int32), samples - 1)


@kernel
def read_frames(
    coefficients,  # (N, H + 2P, W + 2P)
    weights,  # (N, h, w)
    at,  # (1 or N, 2, h, w)
    values,  # (N, h, w)
    inside,  # (N, h, w)
    usable,  # (N, h, w)
    height,
    width,
    rows,
    columns,
    pad,  # pixels by which the frame is continued
    each,  # 1 where every frame has its own positions, else 0
    HAS_WEIGHTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: a block of samples of one frame."""
    samples = rows * columns
    frame, place, live = block_of(samples, BLOCK)
    here = at + frame * each * 2 * samples + place
    x = tl.load(here, mask=live, other=0)
    y = tl.load(here + samples, mask=live, other=0)
    within = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    column, fx = _whole_and_fraction(x, width, pad)
    row, fy = _whole_and_fraction(y, height, pad)
    line = width + 2 * pad
    first = (row.to(tl.int32) + pad) * line + column.to(tl.int32) + pad
    plane = coefficients + frame * line * (height + 2 * pad)
    out = frame * samples + place
    tl.store(values + out, read_spline(plane + first, line, fx, fy, live), mask=live)
    tl.store(inside + out, within.to(COMPUTE), mask=live)
    if HAS_WEIGHTS:
        near = _near(row, rows, height) * columns + _near(column, columns, width)
        tl.store(usable + out, tl.load(weights + frame * samples + near, mask=live, other=0), mask=live)


@triton.jit
def _pair_of(own, field, rows, columns, each, BLOCK: tl.constexpr):
    """A program's frame and its block, the plane of the frame, that of its reference, and where results lie."""
    frame, place, live, x, y = cell_of(rows, columns, BLOCK)
    samples = rows * columns
    return (
        frame,
        place,
        live,
        x,
        y,
        own + frame * samples,
        field + frame * each * samples,
        frame * samples + place,
    )


@kernel
def weigh_frames(
    own,  # (N, h, w)
    field,  # (1 or N, h, w)
    inside,  # (N, h, w)
    usable,  # (N, h, w)
    weights,  # (1 or N, h, w)
    similarity,  # (N, h, w)
    weighted,  # (2, N, h, w)
    stack,  # frames in all
    rows,
    columns,
    each_field,  # 1 where every frame has its own, else 0
    each_weight,
    HAS_USABLE: tl.constexpr,
    TINY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: a block of samples of one frame."""
    frame, place, live, x, y, plane, other, out = _pair_of(own, field, rows, columns, each_field, BLOCK)
    samples = rows * columns
    found = alike_at(plane, other, x, y, rows, columns, live, 1, 3, TINY, COMPUTE)
    tl.store(similarity + out, found, mask=live)
    weight = found * tl.load(inside + out, mask=live, other=0)
    counts = tl.load(weights + frame * each_weight * samples + place, mask=live, other=0)
    if HAS_USABLE:
        counts = tl.load(usable + out, mask=live, other=0) * counts
    weight = weight * counts
    residual = tl.load(other + place, mask=live, other=0) - tl.load(plane + place, mask=live, other=0)
    tl.store(weighted + out, weight * (residual * residual), mask=live)
    tl.store(weighted + tl.cast(stack, tl.int64) * samples + out, weight, mask=live)


@triton.jit
def _mean_at(plane, other, at, live):
    """Of frame and reference, halfway."""
    return lerp(tl.load(plane + at, mask=live, other=0), tl.load(other + at, mask=live, other=0), 0.5)


@kernel
def differentiate_frames(
    own,  # (N, h, w)
    field,  # (1 or N, h, w)
    weight,  # (N, h, w)
    around,  # (2, N, h, w), weighted squares and weights, averaged around
    whole,  # (2, N), their sums
    local,  # (N, 2, h, w), the field of shifts
    products,  # (N, 3, h, w)
    pull,  # (N, 2, h, w)
    stack,  # frames in all
    rows,
    columns,
    each_field,  # 1 where every frame has its own, else 0
    down: tl.float64,  # samples a pixel
    along: tl.float64,
    least: tl.float64,  # variance of a sample, of the frame's
    redundancy: tl.float64,  # how many samples say as much as one
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """One program: a block of samples of one frame; central differences of fourth order."""
    frame, place, live, x, y, plane, other, out = _pair_of(own, field, rows, columns, each_field, BLOCK)
    samples = rows * columns
    gx = tl.zeros((BLOCK,), COMPUTE)
    gy = tl.zeros((BLOCK,), COMPUTE)
    for step in tl.static_range(1, 3):
        share = 2 / 3 if step == 1 else -1 / 12
        right = _mean_at(plane, other, neighbour(x, y, step, 0, rows, columns), live)
        left = _mean_at(plane, other, neighbour(x, y, -step, 0, rows, columns), live)
        below = _mean_at(plane, other, neighbour(x, y, 0, step, rows, columns), live)
        above = _mean_at(plane, other, neighbour(x, y, 0, -step, rows, columns), live)
        gx += (right - left) * share
        gy += (below - above) * share
    gx = gx * tl.cast(along, COMPUTE)
    gy = gy * tl.cast(down, COMPUTE)
    nothing = tl.zeros((BLOCK,), COMPUTE)
    typical = divide(
        tl.load(whole + frame) + nothing, tl.maximum(tl.load(whole + stack + frame) + nothing, 1e-6)
    )
    square = tl.load(around + out, mask=live, other=0)
    count = tl.load(around + tl.cast(stack, tl.int64) * samples + out, mask=live, other=0)
    variance = tl.maximum(divide(square, count + 1e-3), typical * tl.cast(least, COMPUTE)) + 1e-6
    precision = divide(tl.load(weight + out, mask=live, other=0), variance * tl.cast(redundancy, COMPUTE))
    px = precision * gx
    py = precision * gy
    residual = tl.load(other + place, mask=live, other=0) - tl.load(plane + place, mask=live, other=0)
    ux = tl.load(local + frame * 2 * samples + place, mask=live, other=0)
    uy = tl.load(local + (frame * 2 + 1) * samples + place, mask=live, other=0)
    tl.store(products + frame * 3 * samples + place, px * gx, mask=live)
    tl.store(products + (frame * 3 + 1) * samples + place, px * gy, mask=live)
    tl.store(products + (frame * 3 + 2) * samples + place, py * gy, mask=live)
    tl.store(pull + frame * 2 * samples + place, px * (residual + gx * ux + gy * uy), mask=live)
    tl.store(pull + (frame * 2 + 1) * samples + place, py * (residual + gx * ux + gy * uy), mask=live)


@operator()
def read_splines(
    coefficients: Tensor, weights: Tensor | None, at: Tensor, size: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """See functional.local._read_frames: values, 1 inside, and the nearest weight if there are weights; (N, h, w)."""
    lead, samples = coefficients.shape[:1], at.shape[-2:]
    value, inside = (coefficients.new_empty((*lead, *samples)) for _ in range(2))
    usable = at.new_empty(0 if weights is None else value.shape)
    yield value, inside, usable
    pad = (coefficients.shape[-1] - size[1]) // 2
    launch(
        read_frames,
        lead,
        samples,
        (coefficients, weights, at, value, inside, usable),
        (*size, *samples, pad, int(at.shape[0] > 1)),
    )


@operator()
def weigh(
    own: Tensor, field: Tensor, inside: Tensor, usable: Tensor | None, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """See functional.local._weigh: (N, h, w), but for a single reference's ``field`` and ``weights``."""
    similarity, weighted = own.new_empty(own.shape), own.new_empty((2, *own.shape))
    yield similarity, weighted
    launch(
        weigh_frames,
        own.shape[:1],
        own.shape[1:],
        (own, field, inside, usable, weights, similarity, weighted),
        (*own.shape, int(field.shape[0] > 1), int(weights.shape[0] > 1)),
        TINY=torch.finfo(own.dtype).eps ** 2,
    )


@operator()
def differentiate(
    own: Tensor,
    field: Tensor,
    weight: Tensor,
    around: Tensor,
    whole: Tensor,
    local: Tensor,
    numbers: list[float],
) -> Iterator[tuple[Tensor, Tensor]]:
    """See functional.local._products_and_pull: (N, 3, h, w) and (N, 2, h, w).

    The numbers are samples a pixel (down, along); the least variance of a sample as a share of the frame's; and how
    many samples say as much as one.
    """
    count, *size = own.shape
    products, pull = own.new_empty((count, 3, *size)), own.new_empty((count, 2, *size))
    yield products, pull
    tensors = own, field, weight, around, whole, local, products, pull
    launch(differentiate_frames, (count,), size, tensors, (count, *size, int(field.shape[0] > 1), *numbers))
