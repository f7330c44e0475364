"""Running statistics of residual misregistration, of fixed size, on the device: nothing waits until it is read.

A functional core for two shells, :class:`~torchalign.training.check.AlignmentCheck` and
:class:`~torchalign.training.metric.RegistrationError`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Residuals", "Summary", "empty_residuals", "merge_residuals", "quantile", "record", "summarise"]

# The histogram: bins of 1.5 % from a thousandth of a pixel to 64 px, one below and one above.
_LOWEST, _HIGHEST, _BINS = 1e-3, 64.0, 768
_STEP = math.log(_HIGHEST / _LOWEST) / (_BINS - 2)


class Residuals(NamedTuple):
    """What is kept; every field of fixed size.

    Attributes:
        seen: () int64, samples that came.
        unmatched: () int64, samples on which no residual could be measured.
        blank: () int64, those of them that showed nothing to be matched.
        total: () float64, sum of the residuals, in pixels.
        histogram: (768,) int64, counts of residuals in logarithmic bins of 1.5 %.
        worst: (K,) float32, the largest residuals, falling; −1 where there were fewer.
        worst_ids: (K,) int64, the samples they belong to.
    """

    seen: Tensor
    unmatched: Tensor
    blank: Tensor
    total: Tensor
    histogram: Tensor
    worst: Tensor
    worst_ids: Tensor


class Summary(NamedTuple):
    """What is read: plain numbers; lengths in pixels, NaN where nothing was measured.

    Attributes:
        measured: samples measured.
        unmatched: samples that came and could not be measured: no match, or
        blank: those of them that showed nothing: flat, empty, masked.
        mean: of the residuals.
        median: to 1.5 %.
        p95: the 95th percentile, to 1.5 %.
        worst: (sample id, residual), the largest first.
    """

    measured: int
    unmatched: int
    blank: int
    mean: float
    median: float
    p95: float
    worst: tuple[tuple[int, float], ...]

    @property
    def unmeasured(self) -> float:
        """Share of the samples that could not be measured, of which nothing is known; NaN where none came."""
        seen = self.measured + self.unmatched
        return self.unmatched / seen if seen else math.nan


def empty_residuals(worst: int = 16, device: torch.device | str | None = None) -> Residuals:
    """Statistics of nothing."""
    count = torch.zeros((), dtype=torch.int64, device=device)
    return Residuals(
        seen=count,
        unmatched=count.clone(),
        blank=count.clone(),
        total=torch.zeros((), dtype=torch.float64, device=device),
        histogram=torch.zeros(_BINS, dtype=torch.int64, device=device),
        worst=torch.full((worst,), -1.0, dtype=torch.float32, device=device),
        worst_ids=torch.full((worst,), -1, dtype=torch.int64, device=device),
    )


def record(state: Residuals, residual: Tensor, ids: Tensor, seeing: Tensor | None = None) -> Residuals:
    """The statistics with more samples in them.

    Args:
        state: so far.
        residual: (N,), in pixels; NaN where it could not be measured; inf is a residual like any other.
        ids: (N,) int64.
        seeing: (N,) bool, there was something to be matched; ``None``: everywhere.

    Returns:
        New :class:`Residuals`, made without waiting for the device.
    """
    measured = ~residual.isnan()
    length = torch.where(measured, residual, 0.0).to(torch.float32)
    position = ((length.clamp(_LOWEST, _HIGHEST) / _LOWEST).log() / _STEP).floor() + 1
    position = torch.where(length < _LOWEST, 0, position.to(torch.int64)).clamp(max=_BINS - 1)
    one = measured.to(torch.int64)
    blank = torch.zeros_like(one) if seeing is None else (~seeing).to(torch.int64)
    return _keep_worst(
        Residuals(
            state.seen + residual.shape[0],
            state.unmatched + (1 - one).sum(),
            state.blank + ((1 - one) * blank).sum(),
            state.total + length.to(state.total.dtype).sum(),
            state.histogram.scatter_add(0, position, one),
            torch.cat((state.worst.to(torch.float32), torch.where(measured, length, -1.0))),
            torch.cat((state.worst_ids, ids)),
        ),
        state.worst.shape[0],
    )


def merge_residuals(first: Residuals, second: Residuals) -> Residuals:
    """The statistics of both, of the size of the first."""
    joined = Residuals(
        first.seen + second.seen,
        first.unmatched + second.unmatched,
        first.blank + second.blank,
        first.total + second.total,
        first.histogram + second.histogram,
        torch.cat((first.worst, second.worst)),
        torch.cat((first.worst_ids, second.worst_ids)),
    )
    return _keep_worst(joined, first.worst.shape[0])


def quantile(histogram: Tensor, q: float) -> Tensor:
    """(), the residual below which a share ``q`` of the counts lies; NaN of nothing.

    Geometrically interpolated within its bin; no worse than the bin's 1.5 %.

    >>> state = record(empty_residuals(), torch.linspace(0.1, 0.3, 1001), torch.arange(1001))
    >>> round(float(quantile(state.histogram, 0.5)), 2)
    0.2
    """
    counts = histogram.cumsum(-1).to(torch.float64)
    total = counts[-1]
    target = q * total
    index = torch.searchsorted(counts, target.reshape(1)).clamp(max=_BINS - 1).squeeze(0)
    inside = histogram.gather(0, index.reshape(1)).squeeze(0).to(torch.float64)
    below = counts.gather(0, index.reshape(1)).squeeze(0) - inside
    share = (target - below) / inside.clamp(min=1)
    value = _LOWEST * torch.exp((index - 1 + share) * _STEP)
    value = torch.where(index == 0, share * _LOWEST, value)  # the lowest bin starts at 0
    value = torch.where(index == _BINS - 1, torch.inf, value)
    return torch.where(total > 0, value, torch.nan)


def summarise(state: Residuals) -> Summary:
    """Read the statistics: this waits for the device, once."""
    numbers = torch.stack(
        [
            state.seen.to(torch.float64),
            state.unmatched.to(torch.float64),
            state.blank.to(torch.float64),
            state.total.to(torch.float64),
            quantile(state.histogram, 0.5),
            quantile(state.histogram, 0.95),
        ]
    )
    kept = torch.cat((numbers, state.worst.to(torch.float64), state.worst_ids.to(torch.float64))).tolist()
    seen, unmatched, blank, total, median, p95 = kept[:6]
    count = int(seen - unmatched)
    size = state.worst.shape[0]
    worst = tuple(
        (int(name), length)
        for length, name in zip(kept[6 : 6 + size], kept[6 + size :], strict=True)
        if length >= 0
    )
    mean = total / count if count else math.nan
    return Summary(count, int(unmatched), int(blank), mean, median, p95, worst)


def _keep_worst(state: Residuals, size: int) -> Residuals:
    worst, order = state.worst.topk(size)
    return state._replace(worst=worst, worst_ids=state.worst_ids.gather(0, order))
