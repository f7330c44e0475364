"""Registration error as a metric of torchmetrics, which gathers it from all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from torchalign._check import like
from torchalign.aligner import Aligner
from torchalign.training.check import AlignmentCheck
from torchalign.training.measure import check_samples, measure_residuals
from torchalign.training.statistics import Residuals, empty_residuals, merge_residuals, quantile, record


class RegistrationError(Metric):
    """The residual misregistration of pairs, in pixels: mean, median, 95th percentile, the worst samples.

    :class:`~torchalign.training.check.AlignmentCheck`'s measurement and statistics, as a ``torchmetrics.Metric``:
    every sample of a batch is measured; states are of fixed size, on the device, and are summed over the processes
    of a distributed run (the worst samples of each are joined).

    Args:
        aligner: what measures; ``None``: ``ta.PCC(max_translation=8)``.
        window: side of the windows, in pixels.
        worst: how many of the worst samples are remembered.
        kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> metric = ta.RegistrationError()
        >>> image = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> image = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
        >>> metric.update(image.roll(1, -1), image)
        >>> result = metric.compute()
        >>> int(result["measured"]), round(float(result["median"]), 1)
        (2, 1.0)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    seen: Tensor

    def __init__(
        self, aligner: Aligner | None = None, *, window: int = 96, worst: int = 16, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check = AlignmentCheck(aligner, window=window, worst=worst)  # it checks the options
        self.aligner = check.aligner
        self.window = check.window
        sums = dict.fromkeys(("seen", "unmatched", "blank", "slipped", "total", "histogram"), "sum")
        for name, tensor in empty_residuals(worst)._asdict().items():
            # the worst of all processes come stacked, (processes, K)
            self.add_state(name, tensor, dist_reduce_fx=sums.get(name))

    @like(AlignmentCheck.forward)
    def update(self, *pair: Any, **named: Any) -> None:
        """Measure every sample of a batch."""
        samples = check_samples(*pair, **named)
        with torch.no_grad():
            found, ids = measure_residuals(self.aligner, samples, window=self.window), samples.ids
            if ids is None:
                ids = self.seen + torch.arange(found.residual.shape[0], device=found.residual.device)
            kept = record(self._state(), found.residual, ids, found.seeing)
        for name, tensor in kept._asdict().items():
            setattr(self, name, tensor)

    def compute(self) -> dict[str, Tensor]:
        """``measured``, ``unmatched``, ``mean``, ``median``, ``p95``, and ``worst`` (K,) with ``worst_ids`` (K,).

        ``blank`` are those of the unmatched that showed nothing to be matched.
        Lengths in pixels, NaN where nothing was measured; −1 stands where there were fewer than K samples. Medians
        and percentiles are good to 1.5 % or 0.001 px.
        """
        state = self._state()
        count = state.seen - state.unmatched
        return {
            "measured": count,
            "unmatched": state.unmatched,
            "blank": state.blank,
            "mean": torch.where(count > 0, state.total / count.clamp(min=1), torch.nan),
            "median": quantile(state, 0.5),
            "p95": quantile(state, 0.95),
            "worst": state.worst,
            "worst_ids": state.worst_ids,
        }

    def _state(self) -> Residuals:
        """The states; what several processes had to say joined."""
        state = Residuals(*(getattr(self, name) for name in Residuals._fields))
        if state.worst.ndim == 1:
            return state
        kept = state.worst.shape[-1]
        nothing = empty_residuals(kept, state.worst.device)
        joined = merge_residuals(
            nothing, nothing._replace(worst=state.worst.flatten(), worst_ids=state.worst_ids.flatten())
        )
        return state._replace(worst=joined.worst, worst_ids=joined.worst_ids)
