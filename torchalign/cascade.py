"""Cascade: one method after the other, each from where the last one arrived; one resampling at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchalign._check import check_kind, message
from torchalign.aligner import Aligner, Block, Job, Judged, Pair, flagged
from torchalign.functional import affine
from torchalign.functional.quality import centre_moves, parts_disagree, replaced
from torchalign.functional.shift_field import move_origin
from torchalign.functional.texture import Contrast
from torchalign.local import Local
from torchalign.types import Estimate, Motion

__all__ = ["Cascade"]

_ONE_BY_ONE = "give them one by one: Cascade(PCC(), ECC())"


class Cascade(Aligner):
    """Aligners in sequence: what one finds is the next one's ``init``.

    A method with a long reach first, then one that is precise or has a richer motion model:
    ``Cascade(PCC(max_translation=32), ECC(motion="affine"))``. Local shifts come last:
    ``Cascade(PCC(), Local())``. Every stage sees the cube as it came, through its
    own channel and crop, and is judged by its own ``max_translation``; the cube is resampled once, at the end.

    For every frame the last stage counts that was accepted: one that fails, or lowers the score, is undone for that
    frame. Where none was accepted, the status is that of the first. Scores are those of the last stage's channel
    and crop, and so are ``min_score``, ``interpolation``, ``padding_mode`` and ``fill_value``.

    Args:
        *stages: aligners, at least one.

    Raises:
        TypeError: a stage is no :class:`~torchalign.aligner.Aligner`.
        ValueError: there is none.

    Example:
        >>> import torchalign as ta
        >>> scene = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
        >>> scene = torch.nn.functional.avg_pool2d(scene, 9, 1, 4)
        >>> reference, cube = scene[0, :, 16:144, 16:144], scene[:, :, 29:157, 3:131]
        >>> estimate = ta.Cascade(ta.PCC(max_translation=32), ta.ECC(max_translation=32)).estimate(cube, reference)
        >>> estimate.warp[0, :, 2].round(decimals=2)
        tensor([-13.,  13.])
    """

    stages: nn.ModuleList

    def __init__(self, *stages: Aligner) -> None:
        if not stages:
            raise ValueError(message("stages", "at least one aligner", "none", "give e.g. PCC(), ECC()"))
        for stage in stages:
            check_kind("stages", stage, Aligner, "aligners", _ONE_BY_ONE, optional=False)
        last = stages[-1]
        super().__init__(
            max_translation=last.max_translation,
            min_score=last.min_score,
            interpolation=last.interpolation,
            padding_mode=last.padding_mode,
            fill_value=last.fill_value,
        )
        # a cascade in a cascade is its stages
        flat: list[Aligner] = []
        for stage in stages:
            flat += stage._stages() if isinstance(stage, Cascade) else [stage]
        for stage in flat[:-1]:
            if isinstance(stage, Local):
                cure = "the methods after it know no field to start from"
                raise ValueError(message("stages", "Local as the last one", type(flat[-1]).__name__, cure))
        self.stages = nn.ModuleList(flat)
        self.motion = last.motion

    def prepare_reference(self, image: Tensor, usable: Tensor | None) -> list[Any]:
        """What every stage needs of one image, see :meth:`Aligner.prepare_reference`."""
        return [stage.prepare_reference(image, usable) for stage in self._stages()]

    def estimate_motion(self, pair: Pair, prepared: list[Any], init: Tensor | None) -> Motion:
        """The stages' chain on one image that all of them are given, see :meth:`Aligner.estimate_motion`."""
        size = (pair.moving.shape[-2], pair.moving.shape[-1])
        found: Motion | None = None
        for stage, ready in zip(self._stages(), prepared, strict=True):
            motion = stage.estimate_motion(pair, ready, init)
            init = _next_init(init, motion, stage, size)
            found = motion if found is None else _last_trusted(found, motion)
        assert found is not None  # there is at least one stage
        return found

    @property
    def score_contrast(self) -> Contrast:
        """That of the last stage, see :attr:`Aligner.score_contrast`."""
        return self._stages()[-1].score_contrast

    def field_nodes(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Of the last stage, see :meth:`Aligner.field_nodes`."""
        return self._stages()[-1].field_nodes(size)

    def _stages(self) -> list[Aligner]:
        return list(self.stages)  # type: ignore[arg-type]  # a ModuleList of aligners

    def _check(self, *given: Any, **named: Any) -> _Jobs:
        """One job a stage, for each has its own channel and crop."""
        return _Jobs(tuple(stage._check(*given, **named) for stage in self._stages()))

    def _estimate(self, jobs: _Jobs) -> Judged:
        whole = (jobs.cube.shape[-2], jobs.cube.shape[-1])
        motions: list[tuple[Motion, Block]] = []
        init = None
        for stage, job in zip(self._stages(), jobs.jobs, strict=True):
            block = stage._prepare_block(job)
            if init is not None:
                block = block._replace(init=_change_origin(init, block.origin), finite=None)
            motion = stage._find_motion(job, block)
            motion = _move_origin(motion, (-block.origin[0], -block.origin[1]))
            start = job.init.to(motion.warp.dtype) if init is None and job.init is not None else init
            init = _next_init(start, motion, stage, whole)
            motions.append((motion, block))
        # the channel and crop of the last stage decide; inliers over another crop would be in the wrong place
        judged = [
            _move_origin(motion, block.origin)._replace(
                inliers=motion.inliers if own.is_over(block) else None
            )
            for motion, own in motions
        ]
        limits = [stage.max_translation for stage in self._stages()]
        estimate = self._judge(judged, limits, job, block)
        factor = self._common_enlargement(job, block)
        # every k-th pixel of one channel serves all stages only if all are given the same
        first = motions[0][1]
        seen = {(str(stage.channel), stage.rgb_bands) for stage in self._stages()}
        if len(seen) == 1 and first.is_over(block) and not callable(self._stages()[0].channel):
            estimate = self._with_true_samples(
                estimate, factor, job, block._replace(init=first.init, finite=first.finite)
            )
        else:
            estimate = flagged(estimate, factor > 1)
        return Judged(estimate, all(motion.only_shifts for motion in judged))

    def _job_of(self, job: Job) -> _Jobs:
        return _Jobs((job,) * len(self.stages))

    def _at_scale(self, scale: float) -> Cascade:
        return Cascade(*(stage._at_scale(scale) for stage in self._stages()))

    def _map(self, function: Callable[[slice], Estimate], blocks: list[slice]) -> list[Estimate]:
        stateful = any(callable(stage.channel) for stage in self._stages())
        return list(map(function, blocks)) if stateful else super()._map(function, blocks)

    def _block_pixels(self) -> int:
        return min(stage._block_pixels() for stage in self._stages())

    def _options(self) -> dict[str, Any]:
        return {}  # the stages show theirs


class _Jobs(NamedTuple):
    """A checked call: one job a stage."""

    jobs: tuple[Job, ...]

    @property
    def cube(self) -> Tensor:
        return self.jobs[0].cube

    @property
    def mask(self) -> Tensor | None:
        return self.jobs[0].mask

    def tensors(self) -> list[Tensor]:
        return [tensor for job in self.jobs for tensor in job.tensors()]

    def part(self, rows: slice) -> _Jobs:
        return _Jobs(tuple(job.part(rows) for job in self.jobs))


def _next_init(init: Tensor | None, motion: Motion, stage: Aligner, size: tuple[int, int]) -> Tensor:
    """The next stage's start: what this stage found where it is trusted, else this stage's own start.

    It stays (..., T, 2) while all results are translations, so that the next stage knows.
    """
    near = centre_moves(motion, size) <= stage.max_translation
    trusted = (motion.status == 0) & near & affine.are_finite(motion.warp)
    if stage.motion == "translation" and motion.warp.shape[-2] == 2 and (init is None or init.shape[-1] == 2):
        shift = motion.warp[..., 2]
        return torch.where(trusted[..., None], shift, 0.0 if init is None else init)
    warp = motion.warp
    if init is None:
        init = affine.identity_warp(homography=warp.shape[-2] == 3, device=warp.device, dtype=warp.dtype)
    elif init.shape[-1] == 2:
        init = affine.translation_warp(init)
    if init.shape[-2] != warp.shape[-2]:
        init, warp = affine.to_homogeneous(init), affine.to_homogeneous(warp)
    init, _ = affine.finite_warp(init)
    return torch.where(trusted[..., None, None], warp, init)


def _last_trusted(first: Motion, second: Motion) -> Motion:
    """Frame by frame the second where it is trusted, else the first; inliers and field are the second's."""
    if first.warp.shape[-2] != second.warp.shape[-2]:
        first, second = (one._replace(warp=affine.to_homogeneous(one.warp)) for one in (first, second))
    trusted = second.status == 0
    return replaced(first, second, trusted)._replace(
        inliers=second.inliers,
        only_shifts=first.only_shifts and second.only_shifts,
        field=second.field,
        distorted=torch.where(trusted, parts_disagree(second), parts_disagree(first)),
    )


def _move_origin(motion: Motion, origin: tuple[int, int]) -> Motion:
    """The same motion in the coordinates of a crop, or back."""
    if motion.field is not None:
        motion = motion._replace(field=move_origin(motion.field, origin))
    return motion._replace(warp=_change_origin(motion.warp, origin))


def _change_origin(warp: Tensor, origin: tuple[int, int]) -> Tensor:
    """:func:`change_origin`; a shift (..., T, 2) is the same everywhere."""
    return warp if warp.shape[-1] == 2 or origin == (0, 0) else affine.change_origin(warp, origin)
