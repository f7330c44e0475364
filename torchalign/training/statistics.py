"""Running statistics of residual misregistration, of fixed size, on the device: nothing waits until it is read.

A functional core for two shells, :class:`~torchalign.training.check.AlignmentCheck` and
:class:`~torchalign.training.metric.RegistrationError`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The histogram: one bin for exactly 0, one up to a thousandth of a pixel, bins of 1.5 % to 64 px, one above.
_LOWEST, _HIGHEST, _BINS = 1e-3, 64.0, 768
_STEP = math.log(_HIGHEST / _LOWEST) / (_BINS - 3)


class Residuals(NamedTuple):
    """What is kept; every field of fixed size."""

    seen: Tensor  # () int64, samples recorded
    unmatched: Tensor  # () int64, samples on which no residual could be measured
    blank: Tensor  # () int64, those of them that showed nothing to be matched
    slipped: Tensor  # () int64, samples that slip for certain
    total: Tensor  # () float64, sum of the residuals, in pixels
    histogram: Tensor  # (768,) int64, counts of residuals in logarithmic bins of 1.5 %
    worst: Tensor  # (K,) float32, the largest residuals, falling; −1 where there were fewer
    worst_ids: Tensor  # (K,) int64, the samples they belong to


class Verdict(NamedTuple):
    """What is read: plain numbers; lengths in pixels, NaN where nothing was measured. ``str`` says it in words.

    Attributes:
        measured: samples measured.
        unmatched: samples that could not be measured: no match, or
        blank: those of them that showed nothing: flat, empty, masked.
        mean: of the residuals.
        median: to 1.5 % or 0.001 px, exact at 0.
        p95: the 95th percentile, as good.
        worst: (sample id, residual), the largest first.
        tolerance: the largest residual that is no slip.
        slipped: samples displaced by more than ``tolerance`` and two standard errors.
        mismatched: more samples than ``max_unmatched`` allows show something and find no match.
        step: the step of a pipeline at fault, with the residual it adds; ``None``: not known.
        cure: what usually helps; empty where all is registered.
    """

    measured: int
    unmatched: int
    blank: int
    mean: float
    median: float
    p95: float
    worst: tuple[tuple[int, float], ...]
    tolerance: float = math.nan
    slipped: int = 0
    mismatched: bool = False
    step: Any = None
    cure: str = ""

    @property
    def unmeasured(self) -> float:
        """Share of the samples that could not be measured, of which nothing is known; NaN where there are none."""
        seen = self.measured + self.unmatched
        return self.unmatched / seen if seen else math.nan

    @property
    def largest(self) -> float:
        """The largest residual."""
        return self.worst[0][1] if self.worst else math.nan

    @property
    def word(self) -> str:
        """``"misregistered"``, ``"no match"``, ``"registered"`` or ``"not measured"``."""
        if self.slipped:
            return "misregistered"
        if self.mismatched:
            return "no match"
        return "registered" if self.measured else "not measured"

    def __str__(self) -> str:
        """The verdict in a few lines."""
        largest = f"largest {self.largest:.3g} px"
        if math.isinf(self.largest):
            largest = "the worst is blank or cannot be matched at all"
        figures = f"median {self.median:.3g} px, 95 % below {self.p95:.3g} px, {largest}"
        limit = "" if math.isnan(self.tolerance) else f" beyond the tolerance of {self.tolerance:g} px"
        lines = [f"{self.word}: {self.slipped} of {self.measured} samples slip{limit}"]
        lines[0] += f" ({figures})" if self.measured else ""
        if self.mismatched:
            lines.append(f"{self.unmatched - self.blank} samples show something and do not match at all")
        if self.unmatched:
            lines.append(f"{self.unmatched} samples could not be measured, {self.blank} of them blank")
        if self.step is not None:
            step = f"number {self.step.number}, {self.step.name}; it adds {self.step.residual:.3g} px"
            lines.append(f"the step at fault is {step}")
        if self.cure:
            lines.append(f"usual cure: {self.cure}")
        return "\n".join(lines)


def empty_residuals(worst: int = 16, device: torch.device | str | None = None) -> Residuals:
    """Statistics of nothing."""
    count = torch.zeros((), dtype=torch.int64, device=device)
    return Residuals(
        seen=count,
        unmatched=count.clone(),
        blank=count.clone(),
        slipped=count.clone(),
        total=torch.zeros((), dtype=torch.float64, device=device),
        histogram=torch.zeros(_BINS, dtype=torch.int64, device=device),
        worst=torch.full((worst,), -1.0, dtype=torch.float32, device=device),
        worst_ids=torch.full((worst,), -1, dtype=torch.int64, device=device),
    )


def record(
    state: Residuals,
    residual: Tensor,
    ids: Tensor,
    seeing: Tensor | None = None,
    slips: Tensor | None = None,
) -> Residuals:
    """The statistics with more samples in them.

    Args:
        state: so far.
        residual: (N,), in pixels; NaN where it could not be measured; inf is a residual like any other.
        ids: (N,) int64.
        seeing: (N,) bool, there was something to be matched; ``None``: everywhere.
        slips: (N,) bool, it is certainly misregistered; ``None``: nowhere.

    Returns:
        New :class:`Residuals`, made without waiting for the device.
    """
    measured = ~residual.isnan()
    length = torch.where(measured, residual, 0.0).to(torch.float32)
    position = ((length.clamp(_LOWEST, _HIGHEST) / _LOWEST).log() / _STEP).floor() + 2
    position = torch.where(length < _LOWEST, (length > 0).to(torch.int64), position.to(torch.int64))
    position = position.clamp(max=_BINS - 1)
    one = measured.to(torch.int64)
    blank = torch.zeros_like(one) if seeing is None else (~seeing).to(torch.int64)
    new = Residuals(
        torch.full_like(state.seen, residual.shape[0]),
        (1 - one).sum(),
        ((1 - one) * blank).sum(),
        torch.zeros_like(state.slipped) if slips is None else slips.sum(),
        length.to(state.total.dtype).sum(),
        torch.zeros_like(state.histogram).scatter_add(0, position, one),
        torch.where(measured, length, -1.0),
        ids,
    )
    return merge_residuals(state, new)


def merge_residuals(first: Residuals, second: Residuals) -> Residuals:
    """The statistics of both, of the size of the first."""
    sums = [own + other for own, other in zip(first[:-2], second[:-2], strict=True)]
    worst, order = torch.cat((first.worst.to(torch.float32), second.worst)).topk(first.worst.shape[0])
    ids = torch.cat((first.worst_ids, second.worst_ids)).gather(0, order)
    return Residuals(*[*sums, worst, ids])


def quantile(state: Residuals, q: float) -> Tensor:
    """(), the residual below which a share ``q`` of the samples lies; NaN of nothing.

    Geometrically interpolated within its bin: good to 1.5 % or 0.001 px, exact at 0, never above the largest.

    >>> state = record(empty_residuals(), torch.linspace(0.1, 0.3, 1001), torch.arange(1001))
    >>> round(float(quantile(state, 0.5)), 2)
    0.2
    """
    histogram = state.histogram
    counts = histogram.cumsum(-1).to(torch.float64)
    total = counts[-1]
    target = q * total
    index = torch.searchsorted(counts, target.reshape(1)).clamp(max=_BINS - 1).squeeze(0)
    inside = histogram.gather(0, index.reshape(1)).squeeze(0).to(torch.float64)
    below = counts.gather(0, index.reshape(1)).squeeze(0) - inside
    share = (target - below) / inside.clamp(min=1)
    value = _LOWEST * torch.exp((index - 2 + share) * _STEP)
    value = torch.where(index == 1, share * _LOWEST, value)  # this bin starts at 0
    value = torch.where(index == _BINS - 1, torch.inf, torch.where(index == 0, 0.0, value))
    value = torch.minimum(value, state.worst.amax().to(value.dtype))
    return torch.where(total > 0, value, torch.nan)


def read_verdict(state: Residuals) -> Verdict:
    """Read the statistics: this waits for the device, once."""
    counts = (state.seen, state.unmatched, state.blank, state.slipped, state.total)
    figures = torch.stack([count.to(torch.float64) for count in counts])
    medians = torch.stack([quantile(state, 0.5), quantile(state, 0.95)])
    kept = torch.cat((figures, medians, state.worst.to(torch.float64), state.worst_ids.to(torch.float64)))
    seen, unmatched, blank, slipped, total, median, p95, *rest = kept.tolist()
    size = len(rest) // 2
    worst = tuple(
        (int(name), length) for length, name in zip(rest[:size], rest[size:], strict=True) if length >= 0
    )
    count = int(seen - unmatched)
    mean = total / count if count else math.nan
    return Verdict(count, int(unmatched), int(blank), mean, median, p95, worst, slipped=int(slipped))
