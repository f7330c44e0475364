"""AlignmentCheck as a callback of Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchalign._check import check_kind, message
from torchalign.training.check import AlignmentCheck

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]  # its older name
    except ImportError as error:
        cure = 'pip install "torchalign[training]"'
        raise ImportError(message("AlignmentCallback", "the package lightning", "none", cure)) from error


class AlignmentCallback(Callback):
    """Check every training batch, and log the statistics at the end of the epoch.

    Logged are ``registration/median``, ``registration/p95``, ``registration/unmatched`` (how many) and
    ``registration/unmeasured`` (which share of all that came): what was recorded is read once an epoch.

    With several processes every one checks its own batches and has its own statistics. Lightning's loggers write
    those of rank 0, unless ``sync_dist=True``: then each figure is the mean over the processes (a mean of their
    medians is not the median of all; a process that measured nothing makes it NaN). Where the statistics of all
    samples are wanted, log a :class:`~torchalign.training.metric.RegistrationError`, whose counts are summed.
    ``action="raise"`` raises on the rank that saw it, and Lightning ends the others.

    Args:
        check: what checks.
        pair: takes the batch, returns ``(moving, reference)`` or more of the check's arguments; default: the
            first two of a batch that is a tuple or list.
        sync_dist: log the means over all processes, see above; they then wait for each other once an epoch.

    Example:
        >>> callback = ta.AlignmentCallback(ta.AlignmentCheck(every=10), pair=lambda batch: batch["images"])
    """

    def __init__(
        self,
        check: AlignmentCheck,
        *,
        pair: Callable[[Any], tuple[Tensor, ...]] | None = None,
        sync_dist: bool = False,
    ) -> None:
        super().__init__()
        check_kind(
            "check", check, AlignmentCheck, "an AlignmentCheck", "give ta.AlignmentCheck()", optional=False
        )
        self.check = check
        self.pair = _first_two if pair is None else pair
        self.sync_dist = bool(sync_dist)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check the batch."""
        self.check(*self.pair(batch))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what was recorded, and begin anew."""
        summary = self.check.summary()
        figures = {
            "median": summary.median,
            "p95": summary.p95,
            "unmatched": float(summary.unmatched),
            "unmeasured": summary.unmeasured,
        }
        for name, value in figures.items():
            # a process that kept silent would have the others wait for ever
            if self.sync_dist or not math.isnan(value):
                pl_module.log(f"registration/{name}", value, sync_dist=self.sync_dist)
        self.check.reset()


def _first_two(batch: Any) -> tuple[Tensor, ...]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        expected, cure = "a tuple whose first two are (moving, reference)", "give pair="
        raise TypeError(message("batch", expected, type(batch).__name__, cure))
    return batch[0], batch[1]
