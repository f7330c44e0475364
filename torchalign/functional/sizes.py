"""Arithmetic of sizes that are numbers, or symbols, as they can be under torch.export.

A symbol can be computed with. To compare it would pin the program to one answer, and every minimum or maximum of
symbols becomes part of all that is computed from it: torch then takes many minutes to export a program, or fails.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from torchalign._host import is_known

__all__ = ["lags_within", "square_root", "stride_for", "working_length"]


def square_root(number: float) -> float:
    """The root of a size, or of a product of sizes.

    >>> square_root(9)
    3.0
    """
    return torch.sym_sqrt(number)  # type: ignore[attr-defined, no-any-return, unused-ignore]


def working_length(length: int, max_frequency: float) -> int:
    """Samples of the coarsest grid, in multiples of 8, that holds a band; never more than the ``length`` in pixels.

    >>> working_length(101, 0.25), working_length(101, 0.5)
    (56, 101)
    """
    # whole numbers only: a symbol is known exactly, its product with a float is not
    share = Fraction(max_frequency / 4).limit_denominator(2**16)
    coarse = 8 * ((length * share.numerator + share.denominator - 1) // share.denominator)
    if is_known(length):
        return min(length, coarse)
    if max_frequency > 0.25:
        return torch.sym_min(length, coarse)  # type: ignore[return-value, unused-ignore]
    torch._check(length >= 8)  # then it is no finer, which a symbol does not say by itself
    return coarse


def stride_for(size: tuple[int, int], least: int) -> int:
    """The stride at which at least so many samples a side remain; 1 for symbols, of one lattice for all sizes.

    >>> stride_for((300, 1000), 128)
    2
    """
    return max(1, min(size) // least) if all(map(is_known, size)) else 1


def lags_within(samples: int, reach: float, like: Tensor) -> Tensor:
    """The whole lags within ``reach`` samples that a periodic signal of ``samples`` can distinguish.

    (n,) int64, ascending, on the device of ``like``. Of symbols all lags: their number would be another symbol.

    >>> lags_within(8, 2.5, torch.zeros(1)), lags_within(4, 9.0, torch.zeros(1))
    (tensor([-2, -1,  0,  1,  2]), tensor([-2, -1,  0,  1]))
    """
    if not is_known(samples):
        return torch.arange(samples, device=like.device) - samples // 2
    furthest = math.floor(reach)
    return torch.arange(
        -min(furthest, samples // 2), min(furthest, (samples - 1) // 2) + 1, device=like.device
    )
