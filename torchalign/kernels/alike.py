"""How alike two fields are around each sample, or each block of them, as one kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchalign.kernels.language import cell_of, divide
from torchalign.kernels.launching import by_group, expanded, kernel, launch, operator
from torchalign.kernels.sampling import padded, triangle


@triton.jit
def alike_at(
    own, other, x, y, rows, columns, live,
    STEP: tl.constexpr, REACH: tl.constexpr, TINY: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The squared correlation coefficient of two planes, squared again, at blocks (x, y) of ``STEP`` × ``STEP`` samples.

    Means are triangular, over 2 ``REACH`` + 1 blocks a side, the border continued; what is missing of a block is 0.
    """
    both = tl.zeros(x.shape, COMPUTE)
    square = tl.zeros(x.shape, COMPUTE)
    other_square = tl.zeros(x.shape, COMPUTE)
    place = tl.arange(0, STEP * STEP)[None, :]
    for j in range(-REACH, REACH + 1):
        row = (padded(y + j, (rows + STEP - 1) // STEP, False) * STEP)[:, None] + place // STEP
        for i in range(-REACH, REACH + 1):
            column = (padded(x + i, (columns + STEP - 1) // STEP, False) * STEP)[:, None] + place % STEP
            there = live[:, None] & (row < rows) & (column < columns)
            a = tl.load(own + row * columns + column, mask=there, other=0)
            b = tl.load(other + row * columns + column, mask=there, other=0)
            share = triangle(i, j, REACH)
            both += tl.sum(a * b, 1) * share
            square += tl.sum(a * a, 1) * share
            other_square += tl.sum(b * b, 1) * share
    both = tl.maximum(both, 0.0)
    found = divide(both * both, square * other_square + TINY)
    return tl.minimum(found * found, 1.0)


@kernel
def alike_frames(
    own,  # (N, h, w)
    field,  # (N or 1 a group, h, w)
    similarity,  # (N, ⌈h / STEP⌉, ⌈w / STEP⌉)
    rows,
    columns,
    group,
    STEP: tl.constexpr,
    REACH: tl.constexpr,
    TINY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr = 64,
):
    """One program: a block of places of one frame."""
    high = (rows + STEP - 1) // STEP
    wide = (columns + STEP - 1) // STEP
    frame, place, live, x, y = cell_of(high, wide, BLOCK)
    plane = own + frame * rows * columns
    other = field + (frame // group) * rows * columns
    found = alike_at(plane, other, x, y, rows, columns, live, STEP, REACH, TINY, COMPUTE)
    tl.store(similarity + frame * high * wide + place, found, mask=live)


@operator()
def alike(moving: Tensor, reference: Tensor, step: int) -> Iterator[Tensor]:
    """See :func:`torchalign.functional.common_ground.agreement_of_blocks`, of blocks of ``step`` × ``step``.

    With 1 it is of every sample and 7 × 7 around it; else of 3 × 3 blocks.
    """
    lead = torch.broadcast_shapes(moving.shape[:-2], reference.shape[:-2])
    size = [(length + step - 1) // step for length in moving.shape[-2:]]
    similarity = moving.new_empty((*lead, *size))
    yield similarity
    (moving,), (reference, group) = expanded(lead, 2, moving), by_group(lead, 2, reference)
    launch(
        alike_frames,
        lead,
        size,
        (moving, reference, similarity),
        (*moving.shape[-2:], group),
        STEP=step,
        REACH=3 if step == 1 else 1,
        # the fields are of order 1
        TINY=torch.finfo(moving.dtype).eps ** 2,
    )
