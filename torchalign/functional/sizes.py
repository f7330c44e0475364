"""Arithmetic of sizes that may be symbols, as they are under torch.export: neither compared nor branched on."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["ceil_to_multiple", "lags_within", "larger", "smaller", "square_root"]

Number = TypeVar("Number", int, float)


def smaller(first: Number, second: Number) -> Number:
    """The smaller of two sizes.

    >>> smaller(3, 4)
    3
    """
    return torch.sym_min(first, second)  # type: ignore[return-value, unused-ignore]


def larger(first: Number, second: Number) -> Number:
    """The larger of two sizes.

    >>> larger(3, 4)
    4
    """
    return torch.sym_max(first, second)  # type: ignore[return-value, unused-ignore]


def square_root(number: float) -> float:
    """The root of a size, or of a product of sizes.

    >>> square_root(9)
    3.0
    """
    return torch.sym_sqrt(number)  # type: ignore[attr-defined, no-any-return, unused-ignore]


def ceil_to_multiple(length: int, share: float, multiple: int) -> int:
    """The smallest multiple that is no less than a share of a length.

    >>> ceil_to_multiple(101, 0.5, 8)
    56
    """
    # whole numbers only: a symbol is known exactly, its product with a float is not
    exact = Fraction(share / multiple).limit_denominator(2**16)
    return multiple * ((length * exact.numerator + exact.denominator - 1) // exact.denominator)


def lags_within(samples: int, reach: float, like: Tensor) -> Tensor:
    """The whole lags within ``reach`` samples that a periodic signal of ``samples`` can tell apart.

    Args:
        samples: of the signal.
        reach: in samples.
        like: a tensor on the device of the result.

    Returns:
        (n,) int64, ascending.

    >>> lags_within(8, 2.5, torch.zeros(1)), lags_within(4, 9.0, torch.zeros(1))
    (tensor([-2, -1,  0,  1,  2]), tensor([-2, -1,  0,  1]))
    """
    furthest = math.floor(reach)
    lowest, highest = -smaller(furthest, samples // 2), smaller(furthest, (samples - 1) // 2)
    return torch.arange(lowest, highest + 1, device=like.device)
