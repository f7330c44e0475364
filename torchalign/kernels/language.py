"""What kernels are written in besides Triton's own language.

Products are never contracted to fused multiply-adds (kernels are launched with ``enable_fp_fusion=False``): a
determinant that is 0 must be 0 here too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of(count, BLOCK: tl.constexpr):
    """The frame of a program, its block of the frame's ``count`` places, and which of these exist."""
    blocks = tl.cdiv(count, BLOCK)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return frame, place, place < count


@triton.jit
def cell_of(rows, columns, BLOCK: tl.constexpr):
    """The same of a frame of rows × columns, and column and row of each place."""
    frame, place, live = block_of(rows * columns, BLOCK)
    return frame, place, live, place % columns, place // columns


@triton.jit
def load_pair(pairs, place):
    """Of pairs the x and the y at a place."""
    return tl.load(pairs + 2 * place), tl.load(pairs + 2 * place + 1)


@triton.jit
def store_pair(pairs, place, x, y):
    """The same, written."""
    tl.store(pairs + 2 * place, x)
    tl.store(pairs + 2 * place + 1, y)


@triton.jit
def load_row(row, COMPUTE: tl.constexpr):
    """Three entries of a matrix."""
    return tl.load(row).to(COMPUTE), tl.load(row + 1).to(COMPUTE), tl.load(row + 2).to(COMPUTE)


@triton.jit
def load_matrix(warp, COMPUTE: tl.constexpr):
    """All nine, row by row."""
    a, b, c = load_row(warp, COMPUTE)
    d, e, f = load_row(warp + 3, COMPUTE)
    g, h, i = load_row(warp + 6, COMPUTE)
    return a, b, c, d, e, f, g, h, i


@triton.jit
def is_finite(values):
    """Neither NaN nor infinite."""
    return tl.abs(values) < float("inf")


@triton.jit
def lerp(first, second, share):
    """torch.lerp: exact for constants, and at shares 0 and 1."""
    step = second - first
    return tl.where(share < 0.5, first + share * step, second - step * (1 - share))


@triton.jit
def divide(numerator, denominator):
    """Rounded as torch rounds it."""
    if numerator.dtype == tl.float64:  # noqa: SIM108
        quotient = numerator / denominator
    else:
        quotient = tl.div_rn(numerator, denominator)
    return quotient
