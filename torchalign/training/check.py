"""Is what comes out of the augmentation still registered? A check for the training loop."""

from __future__ import annotations

import bisect
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from torchalign._check import check_number, check_option, check_whole, message
from torchalign.aligner import Aligner
from torchalign.pcc import PCC
from torchalign.training import probe as probing
from torchalign.training.measure import Measured, Samples, aligner_or, check_samples, measure_residuals
from torchalign.training.statistics import Residuals, Verdict, empty_residuals, read_verdict, record
from torchalign.types import each_field

Action = Literal["record", "warn", "raise"]

# What usually helps, by what a probe has found. Nearest-exact is for masks alone, and few transforms can be told that.
_APART = (
    "resize masks apart from their image: v2.functional.resize(mask, size, InterpolationMode.NEAREST_EXACT)"
)
_CURES: dict[probing.Cause | None, str] = {
    "nearest": f'masks are resized by mode="nearest", which is up to half a pixel off; {_APART}',
    "resized crop": 'RandomResizedCrop resizes masks by mode="nearest", whatever its interpolation; crop both, then '
    + _APART,
    "align_corners": "one input is resized with align_corners=True; resize all of them with align_corners=False",
    "claim": "the image is not where its boxes or the claimed matrix say; use interpolation="
    "InterpolationMode.BILINEAR and no expand=True, or correct the matrix",
    "pairs": "align them: ta.PCC(), or ta.AlignToFirst() in a model; if they came registered, check what augments "
    "them: check.wrap(augment)",
    None: "give every input the same crop, flip and rotation, resize all with align_corners=False, and "
    + _APART,
}
_WORKERS = 'what the workers of a DataLoader record stays there: use action="warn" or "raise" in them'


class AlignmentWarning(UserWarning):
    """What :class:`AlignmentCheck` warns of."""


class MisregistrationError(RuntimeError):
    """What :class:`AlignmentCheck` raises."""


class Step(NamedTuple):
    """One step of a pipeline, checked by itself.

    Attributes:
        number: its position, from 0.
        name: what it says of itself.
        residual: the misregistration it adds, in pixels; inf if what comes out cannot be matched, NaN if it could
            not be measured.
        slips: whether that is certainly beyond the tolerance.
        cure: what usually helps; empty where it does not slip.
    """

    number: int
    name: str
    residual: float
    slips: bool
    cure: str = ""


def _probe_aligner() -> PCC:
    aligner = PCC(max_translation=8.0)
    aligner.expects_defects = False  # an augmentation enlarges and fills probes: that is to be measured
    return aligner


class AlignmentCheck(nn.Module):
    r"""Check, while training, that images, masks and dates stay registered.

    Half-pixel slips in an augmentation (``align_corners``, resize conventions, a crop off by one, a flip of one
    input alone) lower accuracy and raise no error. There are two ways to find them:

    **Of the data**, given the pairs that go into the model (two dates, two sensors)::

        check = ta.AlignmentCheck(tolerance=0.25)
        for image, other in loader:
            check(image, other)              # no synchronisation
            ...
        print(check.summary())

    **Of an augmentation**, by *probes*: every image and mask of the sample is replaced by the same artificial
    texture (black and white for a mask) and the augmentation runs on it. The outputs are compared with each other
    and with the geometry that the augmentation reports: kornia's ``transform_matrix``, what torchvision v2 does to
    bounding boxes (where the sample has boxes or keypoints, or one image only), or a ``matrix`` of your own::

        augment = check.wrap(augment)        # use it as before; every n-th call is checked
        print(check.locate(augment, sample)) # which step of a Compose is at fault

    Colours may change or be inverted. A step that hides the contours (solarising, noise as strong as the image)
    looks like a loss of registration and is reported as no match: check the pipeline without it.

    The probe works on a copy, and the random states of torch, numpy and Python are put back: training with and
    without the check is the same, bit for bit.

    A sample *slips* if any of five windows (corners and centre) is displaced by more than ``tolerance`` and two
    standard errors of the estimate. Residuals are recorded on the device, in tensors of fixed size. Nothing waits
    for the device before :meth:`summary`. ``"warn"`` and ``"raise"`` wait for it in every call that is checked; a
    larger ``every`` makes them cheaper.

    Args:
        aligner: what measures; ``None``: ``ta.PCC(max_translation=8)``.
        tolerance: in pixels of what comes out.
        every: check every n-th call.
        action: ``"record"``, ``"warn"`` (:class:`AlignmentWarning`) or ``"raise"`` (:class:`MisregistrationError`).
            In the workers of a DataLoader use the latter two: every worker has a copy of the check, and what it
            records stays there.
        samples: at most so many samples of a batch, others in each call.
        window: side of the windows, in pixels.
        max_unmatched: pairs without a match (clouds, water) are not measured; but if more than this share of the
            samples that show something finds no match, that is an alarm too.
        worst: how many of the worst samples are remembered.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range.

    Example:
        >>> check = ta.AlignmentCheck()
        >>> image = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> image = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
        >>> residual = check(image.roll(1, -1), image)
        >>> residual.round(decimals=2), check.summary().measured
        (tensor([1., 1.]), 2)
    """

    def __init__(
        self,
        aligner: Aligner | None = None,
        *,
        tolerance: float = 0.25,
        every: int = 1,
        action: Action = "record",
        samples: int = 8,
        window: int = 96,
        max_unmatched: float = 0.5,
        worst: int = 16,
    ) -> None:
        super().__init__()
        self.aligner = aligner_or(aligner, _probe_aligner)
        self.tolerance = check_number("tolerance", tolerance, minimum=0, inclusive=False)
        self.every = check_whole("every", every)
        self.action = check_option("action", action, Action)
        self.samples = check_whole("samples", samples)
        self.window = check_whole("window", window)
        self.max_unmatched = check_number("max_unmatched", max_unmatched, minimum=0, maximum=1)
        self.calls = 0
        self.received = 0  # samples
        self.step: Step | None = None  # the last one found at fault
        self.cause: probing.Cause | None = None  # the last one that is known
        # no buffers, which .half() rounds and DistributedDataParallel overwrites by those of the first process
        self.residuals = empty_residuals(check_whole("worst", worst))

    # ------------------------------------------------------------------------------------------------ of the data

    def forward(
        self,
        moving: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Measure a batch of pairs, in every n-th call.

        Args:
            moving: (..., C, H, W), floating; leading dimensions are samples.
            reference: (..., C, H, W); another number of bands is fine, another size is not.
            mask: bool, broadcastable to (..., H, W), True = usable.
            reference_mask: the same.
            ids: (...) int64, to recognise the worst samples by; default: the number of the sample among all that
                were given, in calls that were not checked too.

        Returns:
            (n,), the residuals of the samples that were measured, in pixels; NaN where there was no match. Empty
            where this call was not checked.

        Raises:
            MisregistrationError: a sample slips, and ``action="raise"``.
            TypeError, ValueError: a dtype or a shape does not fit.
        """
        samples = check_samples(moving, reference, mask, reference_mask, ids)
        count = samples.moving.shape[0]
        due, call = self._due()
        first, self.received = self.received, self.received + count
        if not due:
            return moving.new_empty(0)
        # other samples in every call that is checked
        number = min(count, self.samples)
        rows = (torch.arange(number, device=moving.device) + call * number) % max(count, 1)
        with torch.no_grad():
            chosen = each_field(samples, lambda part: part[rows.to(part.device)])
            found = measure_residuals(self.aligner, chosen, window=self.window)
        self.cause = self.cause or "pairs"
        self._record(found, first + rows if chosen.ids is None else chosen.ids)
        self._act(found, lambda: "the pairs are misregistered", "pairs")
        return found.residual

    # ------------------------------------------------------------------------------------------ of an augmentation

    def wrap(
        self,
        augment: Callable[..., Any],
        *,
        matrix: probing.Claim | None = None,
        ids: Callable[..., Tensor] | None = None,
    ) -> CheckedAugmentation:
        """The augmentation itself, every n-th call of which is checked by a probe.

        Args:
            augment: any callable on tensors, tv_tensors, numpy images (H, W, C), tuples and dicts of them.
            matrix: what it claims to do: (3, 3), (2, 3), or one per sample, or a callable that is given the
                augmentation (after its call) and returns that; points of the input → points of the output.
                ``None``: kornia's ``transform_matrix`` or torchvision's boxes, see the class.
            ids: is given what the augmentation is given, returns (samples,) int64, to recognise the worst samples
                by; default: see :meth:`inspect`.
        """
        return CheckedAugmentation(self, augment, matrix, ids)

    def inspect(
        self,
        augment: Callable[..., Any],
        *sample: Any,
        matrix: probing.Claim | None = None,
        ids: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """Probe an augmentation now, with samples of this structure, and record what it does.

        Args:
            augment: as in :meth:`wrap`.
            sample: as the augmentation takes it.
            matrix: as in :meth:`wrap`.
            ids: int64, one for each sample of the batch (or at least for those that are probed, the first ones),
                to recognise the worst by; default: the number of the sample among all that were recorded.
            named: as the augmentation takes it.

        Returns:
            (n,), the residuals, in pixels; inf where what comes out cannot be matched, or is blank.

        Raises:
            MisregistrationError: it slips, and ``action="raise"``; the step at fault is named.
            ValueError: nothing to compare: a single image, and no claimed matrix; or images that went in did not
                come out.
        """
        found, cause = self._probe(augment, probing.Given(sample, named), matrix)
        # a way of resizing may be one of some calls only, and stays
        if cause is not None or self.cause in ("claim", "pairs"):
            self.cause = cause
        count, device = found.residual.shape[0], found.residual.device
        if ids is None:
            ids = torch.arange(count, device=device) + self.received
        elif ids.numel() < count:
            expected = f"one for each of {count} samples"
            raise ValueError(message("ids", expected, tuple(ids.shape), "give a batch of them"))
        self.received += count
        self._record(found, ids.reshape(-1)[:count].to(device))

        def why() -> str:
            self.locate(augment, *sample, **named)  # the verdict names the step
            return "the augmentation misregisters"

        self._act(found, why)
        return found.residual

    def trace(self, pipeline: Callable[..., Any], *sample: Any, **named: Any) -> list[Step]:
        """The misregistration that every step of a pipeline adds, each probed by itself.

        Args:
            pipeline: ``v2.Compose``, ``nn.Sequential``, kornia's ``AugmentationSequential``, anything called
                ``Compose`` that has ``transforms``, or a sequence of callables. Anything else is one step.
            sample: as the pipeline takes it.
            named: as the pipeline takes it.
        """
        given = probing.Given(sample, named)
        with probing.isolated_randomness(given):
            steps = list(self._trace(_bare(pipeline), given))
        self.step = next((step for step in steps if step.slips), self.step)
        return steps

    def locate(
        self, pipeline: Callable[..., Any], *sample: Any, attempts: int = 8, **named: Any
    ) -> Step | None:
        """The first step of a pipeline that slips, or ``None``.

        A slip that is still there at the end is bisected: how far apart are the images after half of the steps?
        With n steps that takes 2 + log₂ n measurements, the last one of the step by itself. The steps are walked,
        with a measurement each, where that tells nothing: the end is registered (a later step may have undone the
        slip), half a pipeline cannot be measured (a single image without a claim), or no single step slips as far.

        Args:
            pipeline: as in :meth:`trace`.
            sample: as the pipeline takes it.
            attempts: how often the pipeline is run, for what happens only sometimes.
            named: as the pipeline takes it.
        """
        bare, given = probing.copied(_bare(pipeline)), probing.Given(sample, named)
        with probing.isolated_randomness(given):
            for attempt in range(attempts):
                if attempt:  # other random numbers, of generators of its own too
                    given.to(probing.chained([step for _, step in probing.steps_of(bare)]))
                with probing.isolated_randomness(given):
                    suspect = self._bisect(bare, given)
                if suspect is None:
                    continue
                with probing.isolated_randomness(given):
                    step = next(self._trace(bare, given, suspect.number))
                self.step = step if step.slips else self._walk(bare, given) or suspect
                return self.step
            return self._walk(bare, given)

    # ------------------------------------------------------------------------------------------------- statistics

    def summary(self) -> Verdict:
        """The verdict on all that was recorded; ``print`` it. This waits for the device.

        Returns:
            :class:`~torchalign.training.statistics.Verdict`: a NamedTuple of counts and residuals, how many samples
            slip, the step at fault where it is known (from :meth:`locate`, :meth:`trace`, or an alarm), and the
            usual cure. Its text says the same in words.
        """
        return self._judge(self.residuals)

    def reset(self) -> None:
        """Forget what was recorded."""
        self.residuals = empty_residuals(len(self.residuals.worst), self.residuals.worst.device)
        self.calls = self.received = 0
        self.step = self.cause = None

    def get_extra_state(self) -> Tensor:
        """What was recorded, for a ``state_dict``: in one float64 tensor on the host; last, samples and cause."""
        cause = list(_CURES).index(self.cause)
        kept = [one.double().flatten().cpu() for one in self.residuals]
        return torch.cat([*kept, torch.tensor([self.received, cause]).double()])

    def set_extra_state(self, state: Tensor) -> None:
        """What was recorded, of a ``state_dict``."""
        sizes = [*(kept.numel() for kept in self.residuals), 2]
        if state.numel() != sum(sizes):
            expected = f"the state of a check of worst={len(self.residuals.worst)}"
            got = f"{state.numel()} numbers"
            raise ValueError(message("state_dict", expected, got, "make the check with that worst="))
        *parts, rest = state.split(sizes)  # type: ignore[no-untyped-call]
        pairs = zip(self.residuals, parts, strict=True)
        self.residuals = Residuals(*(part.to(kept).reshape(kept.shape) for kept, part in pairs))
        self.received, self.cause = int(rest[0]), list(_CURES)[int(rest[1])]

    def extra_repr(self) -> str:
        """The options."""
        names = ("tolerance", "every", "action", "samples", "window", "max_unmatched")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    # ----------------------------------------------------------------------------------------------------- inside

    def _due(self) -> tuple[bool, int]:
        """Whether this call is checked, and how many were checked before."""
        call = self.calls
        self.calls += 1
        return call % self.every == 0, call // self.every

    def _record(self, found: Measured, ids: Tensor) -> None:
        device = found.residual.device
        here = each_field(self.residuals, lambda kept: kept.to(device, non_blocking=device.type == "cuda"))
        self.residuals = self._with_found(here, found, ids)

    def _with_found(self, state: Residuals, found: Measured, ids: Tensor | None = None) -> Residuals:
        ids = torch.zeros_like(found.residual, dtype=torch.int64) if ids is None else ids
        return record(state, found.residual, ids, found.seeing, found.excess > self.tolerance)

    def _bisect(self, pipeline: Any, given: probing.Given) -> Step | None:
        """The step after which images are no longer registered, though they were before, if they are not at the end."""

        @functools.cache
        def after(count: int) -> Step:
            # a copy each, in the same random state: the same numbers are drawn, up to there
            steps = probing.steps_of(probing.copied(pipeline))[:count]
            return self._step(count - 1, steps[-1][0], probing.chained([step for _, step in steps]), given)

        count = len(probing.steps_of(pipeline))
        if not count or not after(count).slips:
            return None

        def is_lost(count: int) -> bool:
            # what cannot be told is not where it begins: it is looked for before that
            return after(count).slips or math.isnan(after(count).residual)

        begins = bisect.bisect_left(range(1, count), True, key=is_lost)
        return after(begins + 1)._replace(cure=_CURES[None])

    def _walk(self, pipeline: Any, given: probing.Given) -> Step | None:
        step = next((step for step in self._trace(pipeline, given) if step.slips), None)
        self.step = step or self.step
        return step

    def _step(self, number: int, name: str, step: Callable[..., Any], given: probing.Given) -> Step:
        """The verdict on one step: this waits for the device."""
        try:
            found, cause = self._probe(step, given, None)
        except probing.NothingToCompareError:
            return Step(number, name, math.nan, False)
        known = [value for value in found.residual.tolist() if not math.isnan(value)]
        slips = bool((found.excess > self.tolerance).any())
        return Step(number, name, max(known, default=math.nan), slips, _CURES[cause] if slips else "")

    def _judge(self, state: Residuals, cause: probing.Cause | None = None) -> Verdict:
        """Read the statistics, and what is known beside them: of one cause, or of all that was recorded."""
        verdict = read_verdict(state)
        matched, showing = verdict.measured, verdict.measured + verdict.unmatched - verdict.blank
        mismatched = showing > 1 and showing - matched > self.max_unmatched * showing
        verdict = verdict._replace(tolerance=self.tolerance, mismatched=mismatched)
        if verdict.slipped:
            # for the step at fault, where it is known
            step = self.step if cause is None else None
            cure = _CURES[cause or self.cause] if step is None else step.cure
            return verdict._replace(step=step, cure=cure)
        if mismatched:
            return verdict._replace(cure="check whether one of each pair is flipped, or of another place")
        if not verdict.measured + verdict.unmatched:
            return verdict._replace(cure=f"record something; {_WORKERS}")
        return verdict

    def _act(self, found: Measured, why: Callable[[], str], cause: probing.Cause | None = None) -> None:
        """Read, and warn or raise; nothing is read where that is not asked for."""
        if self.action == "record":
            worker = get_worker_info()
            if worker is not None and worker.id == 0:  # one speaks for all
                warnings.warn(_WORKERS, AlignmentWarning, stacklevel=3)
            return
        state = self._with_found(empty_residuals(1, found.residual.device), found)
        verdict = self._judge(state, cause)
        if not (verdict.slipped or verdict.mismatched):
            return
        text = str(verdict)
        if verdict.slipped:
            reason = why()  # it may find the step at fault, which the verdict then names
            text = f"{reason}: {str(self._judge(state, cause)).partition(': ')[2]}"
        if self.action == "raise":
            raise MisregistrationError(text)
        warnings.warn(text, AlignmentWarning, stacklevel=3)

    def _probe(
        self, augment: Callable[..., Any], given: probing.Given, matrix: probing.Claim | None
    ) -> tuple[Measured, probing.Cause | None]:
        """What a probe measured, and why it may slip, where that is known."""
        with torch.no_grad(), probing.isolated_randomness(given):
            pairs = probing.probe(augment, given, matrix, samples=self.samples)
            found = [
                measure_residuals(self.aligner, samples, window=self.window, same_content=True)
                for samples in (Samples(*pair[:2], pair.usable, pair.usable) for pair in pairs)
            ]
        # the worst pair of every sample; NaN only where no pair could be measured
        residual, excess = (
            torch.stack([getattr(one, name).nan_to_num(-1.0, posinf=torch.inf) for one in found]).amax(0)
            for name in ("residual", "excess")
        )
        # what was textured and comes out blank is not registered with anything
        blank = torch.stack([pair.blank for pair in pairs]).any(0)
        seeing = torch.stack([one.seeing for one in found]).any(0) | blank
        residual, excess = (
            torch.where(seeing, torch.where(blank, torch.inf, value), torch.nan)
            for value in (residual, excess)
        )
        cause = next((pair.cause for pair in pairs if pair.cause is not None), None)
        return Measured(residual, excess, seeing), cause

    def _trace(self, pipeline: Any, given: probing.Given, first: int = 0) -> Iterator[Step]:
        """The steps from one on, each by itself."""
        steps = probing.steps_of(probing.copied(pipeline))
        given = given.after([step for _, step in steps[:first]])
        for number, (name, step) in enumerate(steps[first:], first):
            yield self._step(number, name, step, given)
            given = given.after([step])  # the next step sees what this one makes of the sample itself


class CheckedAugmentation(nn.Module):
    """An augmentation that is checked now and then, see :meth:`AlignmentCheck.wrap`. Its results are its own.

    In the workers of a DataLoader use ``action="warn"`` or ``"raise"``, see :class:`AlignmentCheck`.
    """

    def __init__(
        self,
        check: AlignmentCheck,
        augment: Callable[..., Any],
        matrix: probing.Claim | None = None,
        ids: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not callable(augment):
            raise TypeError(message("augment", "a callable", type(augment).__name__, "wrap what is called"))
        self.augment = augment
        self.matrix = matrix
        self.ids = ids
        self._check = (check,)  # not a child: its statistics are no part of a model's state

    @property
    def check(self) -> AlignmentCheck:
        """What checks it."""
        return self._check[0]

    def forward(self, *sample: Any, **named: Any) -> Any:
        """Check, in every n-th call, and augment."""
        due, _ = self.check._due()
        if due:
            ids = None if self.ids is None else self.ids(*sample, **named)
            self.check.inspect(self.augment, *sample, matrix=self.matrix, ids=ids, **named)
        return self.augment(*sample, **named)


def _bare(pipeline: Any) -> Any:
    return pipeline.augment if isinstance(pipeline, CheckedAugmentation) else pipeline
