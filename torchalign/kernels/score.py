"""The gate's scores as one kernel: samples of the moving frames, and their correlation with the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import divide
from torchalign.kernels.launching import by_group, entries_of, expanded, kernel, launch, operator
from torchalign.kernels.sampling import interpolate, padded, source_of


@kernel
def score_frames(
    moving,  # (N, H, W), finite
    reference,  # (N or 1 a group, H, W)
    motions,  # (S, N, 2 | 6 | 9), moving → reference
    moving_usable,  # (N, H, W), 0 and 1
    reference_usable,  # (N or 1 a group, H, W), 0 and 1
    weight,  # (N, h, w), over the lattice
    local,  # (N, 2, h, w), shifts (x, y) on top of the last motion, in pixels
    scores,  # (N, S + 1)
    stack,  # frames in all
    group,  # frames that share a reference
    height,
    width,
    step,  # of the lattice, in pixels
    STAGES: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_MOVING_USABLE: tl.constexpr,
    HAS_REFERENCE_USABLE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_LOCAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 256,
):
    """One program: one frame under one of its motions, or (the last) under none.

    Every lane keeps running means and sums of squares of what it has seen (Welford 1962, doi:10.2307/1266577),
    which are put together at the end: nothing cancels, however far the values are from 0.
    """
    frame = (tl.program_id(0) // (STAGES + 1)).to(tl.int64)
    chosen = tl.program_id(0) % (STAGES + 1)
    rows = (height + step - 1) // step
    columns = (width + step - 1) // step
    plane = moving + frame * height * width
    other = reference + frame // group * height * width
    usable = moving_usable + frame * height * width
    other_usable = reference_usable + frame // group * height * width

    count = tl.zeros((BLOCK,), COMPUTE)
    mean = tl.zeros((BLOCK,), COMPUTE)
    other_mean = tl.zeros((BLOCK,), COMPUTE)
    # squares of large values overflow in float32
    square = tl.zeros((BLOCK,), tl.float64)
    other_square = tl.zeros((BLOCK,), tl.float64)
    product = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, rows * columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        live = place < rows * columns
        x = (place % columns) * step
        y = (place // columns) * step
        here = y.to(tl.int64) * width + x
        ground = live
        if HAS_MOVING_USABLE:
            ground = ground & (tl.load(usable + here, mask=live, other=0) != 0)
        if HAS_REFERENCE_USABLE:
            ground = ground & (tl.load(other_usable + here, mask=live, other=0) != 0)
        value = tl.load(plane + here, mask=live, other=0).to(COMPUTE)
        shifts = local + frame * 2 * rows * columns + place
        for stage in tl.static_range(STAGES):
            motion = motions + (stage * stack + frame) * ENTRIES
            column, row, fx, fy, near_column, near_row, inside = source_of(
                motion, x, y, height, width, shifts, rows * columns, live,
                HAS_LOCAL and stage == STAGES - 1, ENTRIES, COMPUTE, COMPUTE,
            )  # fmt: skip
            ground = ground & inside
            if HAS_MOVING_USABLE:
                near = padded(near_row, height, False).to(tl.int64) * width + padded(
                    near_column, width, False
                )
                ground = ground & (tl.load(usable + near, mask=live, other=0) != 0)
            if chosen == stage:
                linear, linear_share, value, met = interpolate(
                    plane, usable, column, row, fx, fy, height, width, (width, 1), (width, 1), live,
                    2, False, False, HAS_MOVING_USABLE, tl.int64, COMPUTE,
                )  # fmt: skip
                if HAS_MOVING_USABLE:
                    # bilinear where that met an unusable pixel; where the nearest one is usable, which is where it
                    # counts, the share is 1/4 or more
                    linear = divide(linear, tl.where(linear_share > 0, linear_share, 1.0))
                    value = tl.where(met > 0, linear, value)
        own = ground.to(COMPUTE)
        if HAS_WEIGHT:
            own = own * tl.load(weight + frame * rows * columns + place, mask=live, other=0).to(COMPUTE)
        onto = tl.load(other + here, mask=live, other=0).to(COMPUTE)
        count += own
        share = tl.where(own > 0, own / tl.where(own > 0, count, 1.0), 0.0)
        away = value - mean
        other_away = onto - other_mean
        mean += away * share
        other_mean += other_away * share
        left = (own * (value - mean)).to(tl.float64)
        other_left = (onto - other_mean).to(tl.float64)
        square += away.to(tl.float64) * left
        product += left * other_away.to(tl.float64)
        other_square += own.to(tl.float64) * other_left * other_away.to(tl.float64)

    total = tl.sum(count, 0)
    safe = tl.where(total > 0, total, 1.0)
    away = mean - tl.sum(mean * count, 0) / safe
    other_away = other_mean - tl.sum(other_mean * count, 0) / safe
    # what the means of the lanes leave over, their own mean, is taken off too
    away = (away - tl.sum(away * count, 0) / safe).to(tl.float64)
    other_away = (other_away - tl.sum(other_away * count, 0) / safe).to(tl.float64)
    lanes = count.to(tl.float64)
    variance = tl.sum(square + lanes * away * away, 0)
    other_variance = tl.sum(other_square + lanes * other_away * other_away, 0)
    covariance = tl.sum(product + lanes * away * other_away, 0)
    flat = (variance <= 0) | (other_variance <= 0)
    norm = tl.sqrt(tl.where(flat, 1.0, variance)) * tl.sqrt(tl.where(flat, 1.0, other_variance))
    found = tl.where(flat, 0.0, covariance / norm)
    tl.store(scores + frame * (STAGES + 1) + chosen, tl.minimum(tl.maximum(found, -1.0), 1.0).to(COMPUTE))


@operator()
def score(
    moving: Tensor,
    reference: Tensor,
    motions: Tensor,
    moving_usable: Tensor | None,
    reference_usable: Tensor | None,
    weight: Tensor | None,
    step: int,
    local: Tensor | None = None,
) -> Iterator[Tensor]:
    """Zero-normalised cross-correlations over the ground that all motions leave in sight, see functional.quality.

    Returns:
        (..., T, S + 1): under each of the S motions, and under none; 0 where one of the two is flat.
    """
    lead, stages = moving.shape[:-2], motions.shape[0]
    scores = moving.new_empty((*lead, stages + 1))
    yield scores
    reference, reference_usable, group = by_group(lead, 2, reference, reference_usable)
    (moving_usable,) = expanded(lead, 2, moving_usable)
    launch(
        score_frames,
        scores.shape,
        (),
        (moving, reference, motions, moving_usable, reference_usable, weight, local, scores),
        (math.prod(lead), group, *moving.shape[-2:], step),
        STAGES=stages,
        ENTRIES=entries_of(motions),
    )
