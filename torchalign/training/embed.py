"""Alignment as a layer: a series goes in, the same series comes out, its frames on each other."""

from __future__ import annotations

import operator
from typing import Literal

import torch
from torch import Tensor, nn

from torchalign._check import check_cube, check_mask, check_option, message
from torchalign.aligner import Aligner
from torchalign.functional.smoothing import nanmedian
from torchalign.pcc import PCC
from torchalign.training.measure import aligner_or

Onto = Literal["first", "median"]


class AlignToFirst(nn.Module):
    """Align the frames of a series with one of them, or with their median: (..., T, C, H, W) → (..., T, C, H, W).

    A layer for the front of a model, without parameters::

        model = nn.Sequential(ta.AlignToFirst(), network)
        prediction = model(series)  # (B, T, C, H, W)

    Frames without a match (clouds) pass unchanged. Gradients reach the frames through the resampling and, by the
    implicit function theorem, through the estimate. The aligner alone says more: ``aligner(series, series[:, 0])``
    gives the warps, scores and reasons too.

    Args:
        aligner: what aligns; ``None``: ``ta.PCC(interpolation="bicubic")``.
        onto: ``"first"``, the index of a frame, or ``"median"``: the median over time, pixel by pixel, of what is
            finite. A median of frames that are not aligned is blurred, but lies in their midst; no frame is then
            left as it is.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an unknown word; in ``forward``, no series, or an index beyond it.

    Example:
        >>> ta.AlignToFirst()(torch.rand(2, 3, 4, 64, 64)).shape
        torch.Size([2, 3, 4, 64, 64])
    """

    def __init__(self, aligner: Aligner | None = None, *, onto: Onto | int = "first") -> None:
        super().__init__()
        if isinstance(onto, str):
            check_option("onto", onto, Onto)
        elif isinstance(onto, bool) or not hasattr(onto, "__index__"):
            raise TypeError(message("onto", '"first", "median" or an index', repr(onto), "name a frame"))
        self.aligner = aligner_or(aligner, lambda: PCC(interpolation="bicubic"))
        self.onto: Onto | int = onto if isinstance(onto, str) else operator.index(onto)

    def forward(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """Align.

        Args:
            series: (..., T, C, H, W), floating.
            mask: bool, broadcastable to (..., T, H, W), True = usable.

        Returns:
            The aligned series, like ``series``; the frame aligned onto comes back bit for bit.
        """
        check_cube(series)
        mask = check_mask("mask", mask, (*series.shape[:-3], *series.shape[-2:]), series)
        if mask is not None:
            mask = mask.expand(*series.shape[:-3], *series.shape[-2:])
        if self.onto == "median":
            # ±inf is unusable too, and would be a median
            usable = series.isfinite() if mask is None else series.isfinite() & mask.unsqueeze(-3)
            reference = nanmedian(torch.where(usable, series, torch.nan), -4)
            return self.aligner(series, reference, mask).aligned
        index, frames = 0 if self.onto == "first" else int(self.onto), series.shape[-4]
        if not -frames <= index < frames:
            cure = "count from 0, or from −1"
            raise ValueError(message("onto", f"an index below {frames} frames", index, cure))
        known = None if mask is None else mask.select(-3, index).unsqueeze(-3)
        return self.aligner(series, series.select(-4, index), mask, known).aligned

    def extra_repr(self) -> str:
        """The options."""
        return f"onto={self.onto!r}"
