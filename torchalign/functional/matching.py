"""Matches of local features."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Matches"]


class Matches(NamedTuple):
    """index (B, K) int64 into the second features' keypoints, -1 where there is none; weight (B, K) in [0, 1]."""

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    weight: Tensor
