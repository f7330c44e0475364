"""How well two images agree, and the gate that keeps an alignment from making a frame worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import all_true, in_pieces, keeps_tables, kernels_for
from torchalign.functional.affine import center_displacement, identity_warp, to_homogeneous
from torchalign.functional.shift_field import is_zero, lattice_shifts
from torchalign.functional.sizes import stride_for
from torchalign.functional.structure import turn_orientations
from torchalign.functional.uncertainty import beyond_chance, isotropic, largest_sigma
from torchalign.functional.warp import resample
from torchalign.types import Estimate, Motion, ShiftField, Status, combine

__all__ = [
    "WORSE",
    "centre_moves",
    "choose_rows",
    "gate",
    "gate_stages",
    "kept_field",
    "normalized_cross_correlation",
    "parts_disagree",
    "rejected",
    "replaced",
]

# A frame whose score does not gain by a move this small (in σ, in pixels) is left in place; a larger move without
# a gain is a mistake. Below a quarter of a pixel the seasons change a score more than the move does.
_IN_PLACE_SIGMAS = 3.0
_IN_PLACE_PIXELS = 0.25
# Scores are taken from every second, third, … pixel, as long as so many a side remain: their correlation tells as
# well, and sampling dominates the cost.
_LATTICE = 128
# A later stage moves a frame by hundredths of a pixel, which a score feels less than this.
WORSE = 1e-3
# A frame whose σ is larger than this, in pixels, because two methods disagree, is not known.
_LARGEST_DOUBT = 0.15
# Nor is one whose σ, which was larger before, has grown by this factor.
_MORE_DOUBT = 1.5


def normalized_cross_correlation(first: Tensor, second: Tensor, usable: Tensor | None = None) -> Tensor:
    r"""Zero-normalised cross-correlation over the usable pixels.

    .. math:: \frac{\sum (a - \bar a)(b - \bar b)}{\sqrt{\sum (a - \bar a)^2 \sum (b - \bar b)^2}}

    Args:
        first: (..., H, W).
        second: (..., H, W), broadcastable.
        usable: bool, broadcastable; what is not usable may be anything, NaN too.

    Returns:
        (...,), in [−1, 1]; 0 where an image is flat or nothing is usable.

    Example:
        >>> ramp = torch.arange(4.0).reshape(2, 2)
        >>> normalized_cross_correlation(ramp, 5 - 2 * ramp)
        tensor(-1.)
    """
    if usable is not None:
        first, second = torch.where(usable, first, 0.0), torch.where(usable, second, 0.0)
    first, second = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]  # torch has no types for it
    weight = torch.ones_like(first) if usable is None else usable.to(first.dtype).expand(first.shape)
    return _correlate(second, first, weight.flatten(-2))[..., 0]


def _correlate(reference: Tensor, *images_and_weight: Tensor) -> Tensor:
    """The same (..., K) for K finite images (..., H, W) and weights ≥ 0 (..., H · W)."""
    *images, weight = images_and_weight
    count = weight.sum(-1) + torch.finfo(weight.dtype).tiny
    sums = in_pieces(_sums, reference.expand(images[0].shape), *images, count, weight)
    product, square, total = sums.unbind(-1)  # (..., 1 + K)
    count = count[..., None]
    variance = square - total.square() / count
    flat = variance <= 16 * torch.finfo(square.dtype).eps * square  # no more than rounding
    norm = variance.masked_fill(flat, 1.0).sqrt()
    found = (product - total * (total[..., :1] / count)) / (norm * norm[..., :1])
    return found.masked_fill(flat | flat[..., :1], 0.0).clamp(-1, 1)[..., 1:]


def _sums(*images_count_and_weight: Tensor) -> Tensor:
    """(..., K, 3): of centred and scaled images the weighted products with the first, squares, and sums.

    Correlations do not depend on means and scales, so those that keep sums of squares from cancelling and from overflow
    carry no gradient.
    """
    *images, count, weight = images_count_and_weight
    rows = torch.stack(images).flatten(-2)  # (K, ..., N)
    centred = rows - (torch.linalg.vecdot(rows.detach(), weight) / count)[..., None]
    weighted = centred * weight
    # what has no weight may be of any size; the rest sums to 0, so that what is below is not much larger
    largest = weighted.detach().amax(-1)
    scale = torch.where(largest > 0, largest, 1.0).reciprocal()
    weighted = weighted * scale[..., None]
    product, square = (torch.linalg.vecdot(weighted, other) for other in (centred[:1], centred))
    return torch.stack((product * scale[:1], square * scale, weighted.sum(-1)), -1).movedim(0, -2)


def gate(
    warp: Tensor,
    sigma: Tensor,
    status: Tensor,
    moving: Tensor,
    reference: Tensor,
    *,
    moving_usable: Tensor | None = None,
    reference_usable: Tensor | None = None,
    inliers: Tensor | None = None,
    max_translation: float = 5.0,
    min_score: float | None = None,
) -> Estimate:
    """Score every frame before and after, and reset frames to the identity whose score does not improve.

    In this order, a frame keeps the first verdict: the method's own ``status``; ``TOO_FAR`` if its centre moves
    by more than ``max_translation``; ``NOT_BETTER`` if its score does not gain, unless the move is within 3 σ
    or 0.25 px of none: such a frame is in place as far as the score can tell, stays as it is, and is ``OK``, the
    move that was not made part of its ``sigma``; ``LOW_SCORE`` below ``min_score``. Every accepted frame
    therefore has ``score >= score_before``.

    Both scores are taken over the same ground: usable in both, inside the frame, and an inlier. Of frames of 256
    pixels and more a side, they are taken from a lattice of at least 128 × 128 pixels.

    Args:
        warp: (..., T, 2, 3) or (..., T, 3, 3), in the coordinates of ``moving``.
        sigma: (..., T), in pixels.
        status: (..., T) int64.
        moving: (..., T, H, W), the channel.
        reference: (..., 1 or T, H, W).
        moving_usable: bool, broadcastable to ``moving``; ``None`` if all is.
        reference_usable: bool, broadcastable to ``moving``.
        inliers: (..., T, h, w), weights in [0, 1] over the reference's frame, on any grid: what the method found
            to be no common ground (clouds, changed fields) counts little in both scores.
        max_translation: in pixels.
        min_score: or ``None``.

    Returns:
        :class:`~torchalign.types.Estimate`.
    """
    return gate_stages(
        [Motion(warp, sigma, status, inliers)],
        moving,
        reference,
        moving_usable=moving_usable,
        reference_usable=reference_usable,
        max_translations=[max_translation],
        min_score=min_score,
    )


def gate_stages(
    stages: Sequence[Motion],
    moving: Tensor,
    reference: Tensor,
    *,
    max_translations: Sequence[float],
    moving_usable: Tensor | None = None,
    reference_usable: Tensor | None = None,
    min_score: float | None = None,
    vector: bool = False,
) -> Estimate:
    """:func:`gate` for several motions of one stack, each found from the one before.

    A frame keeps its last acceptable motion; a later one that lowers the score by more than 0.001 is undone, and
    one with a field of local shifts needs one before it that was accepted. Where none is acceptable, or the first
    is ``AMBIGUOUS`` and the later did not search, the verdict is that on the first. A motion that is kept though parts of
    the frame disagree about it by more than it asks for makes the frame ``AMBIGUOUS``. All scores are taken over the same
    ground: what lies inside the frame for every stage that was trusted, and is an inlier for the last of them that tells
    inliers.

    Args:
        stages: at least one :class:`~torchalign.types.Motion`.
        moving: (..., T, H, W), the channel seen; of ``vector`` (2, ..., T, H, W).
        reference: (..., 1 or T, H, W), likewise.
        max_translations: in pixels, one a stage.
        moving_usable: bool, broadcastable to ``moving``; ``None`` if all is.
        reference_usable: bool, broadcastable to ``moving``.
        min_score: or ``None``.
        vector: the images have two parts, and scores are the correlation of vectors: products are inner products.

    Returns:
        :class:`~torchalign.types.Estimate`.
    """
    size = (moving.shape[-2], moving.shape[-1])
    step = stride_for(size, _LATTICE)
    homography = any(stage.warp.shape[-2] == 3 for stage in stages)
    if homography:
        stages = [stage._replace(warp=to_homogeneous(stage.warp)) for stage in stages]
    identity, _ = _nothing_known(homography, like=stages[0].warp)

    weight: Tensor | None = None
    motions, displacements = [], []
    for stage, limit in zip(stages, max_translations, strict=True):
        motion, displacement = _screened(stage, limit, size, identity)
        if stage.inliers is not None:
            # the root of an inlier weight is the squared local correlation
            root = stage.inliers.detach().nan_to_num(0.0).sqrt()
            found = _resize(root, (-(-size[0] // step), -(-size[1] // step)))
            # what a stage that is not trusted took for common ground judges no other
            trusted = motion.status == 0
            if not all_true(trusted):
                found = torch.where(trusted[..., None, None], found, 1.0 if weight is None else weight)
            weight = found
        motions.append(motion)
        displacements.append(displacement)
    usable = moving_usable, reference_usable
    *scores, score_before = _scores(moving, reference, motions, usable, weight, step, vector=vector)

    result: Estimate | None = None
    distorted = torch.zeros_like(motions[0].status, dtype=torch.bool)
    for number, row in enumerate(zip(motions, displacements, scores, strict=True)):
        judged = _judge(number, *row, score_before, identity)
        apart = parts_disagree(motions[number])
        if result is None:
            result, distorted = judged, apart
            kept = motions[number]._replace(status=result.status)  # what the result stands for
            continue
        worse = result.valid & (judged.score < result.score - WORSE)
        accepted = judged.valid & ~worse
        if not motions[number].searched:
            # where more than one place fits, it climbs to the one it happens to start near
            accepted = accepted & (result.status != int(Status.AMBIGUOUS))
        if judged.field is not None:  # a field is added to a motion that was accepted without it
            accepted = accepted & result.valid & ~is_zero(judged.field)
        extra: Tensor | None = None
        if all(motion.only_shifts and motion.field is None for motion in motions[: number + 1]):
            # a shift after a shift measures the same: where they differ the first, which searched further, stays
            extra = _disagreement(motions[number], kept, accepted)
            accepted = accepted & ~(result.valid & (extra > 0).flatten(-2).any(-1))
            extra = extra + _misfit_before(motions[number], kept, accepted)
            kept = replaced(kept, motions[number], accepted)
        result = choose_rows(accepted, judged, result)
        distorted = torch.where(accepted, apart, distorted)
        if extra is not None:
            result, lost = _widened(result, extra)
            distorted = distorted | lost
    assert result is not None
    status = result.status.masked_fill(result.valid & distorted, int(Status.AMBIGUOUS))
    if min_score is not None:
        status = status.masked_fill((status == 0) & (result.score < min_score), int(Status.LOW_SCORE))
    return rejected(result._replace(status=status))


def _scores(
    moving: Tensor,
    reference: Tensor,
    motions: Sequence[Motion],
    usable: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    step: int,
    *,
    vector: bool,
) -> Sequence[Tensor]:
    """Correlations with the reference, under each motion and under none, over the ground that all of them see."""
    warps = [motion.warp for motion in motions]
    if all(motion.only_shifts for motion in motions):
        warps = [warp[..., :2, 2] for warp in warps]
    size = (moving.shape[-2], moving.shape[-1])
    plain = not vector and all(motion.field is None for motion in motions[:-1])
    last = motions[-1].field
    kernels = kernels_for(moving, reference, weight, *warps, *(last or ())) if plain else None
    if kernels is not None:
        local = None if last is None else lattice_shifts(last, size, step, moving)
        stacked = torch.stack(warps).to(moving.dtype)
        return kernels.score(moving, reference, stacked, *usable, weight, step, local).unbind(-1)
    overlap: Tensor | None = None
    for part in usable:
        if part is not None:
            overlap = _thin(part, step) if overlap is None else overlap & _thin(part, step)
    images = []
    for motion in motions:
        # bilinear interpolation smooths, which a score would take for misregistration
        path = motion.warp[..., :2, 2] if motion.only_shifts else motion.warp
        options: dict[str, Any] = {"mask": usable[0], "step": step, "field": motion.field, "finite": True}
        if usable[0] is not None:  # what is not usable has no weight
            options["fill_value"] = 0.0
        aligned, inside = resample(moving.unsqueeze(-3), path, interpolation="bicubic", **options)
        inside = inside[0] if vector else inside
        overlap = inside if overlap is None else overlap & inside
        aligned = aligned.squeeze(-3)
        images.append(turn_orientations(aligned, path) if vector and not motion.only_shifts else aligned)
    assert overlap is not None  # there is at least one stage
    ground = overlap.to(moving.dtype) if weight is None else weight * overlap
    compared = [_thin(reference, step), *images, _thin(moving, step)]
    if vector:
        ground, *compared = torch.cat((ground, ground), -2), *(torch.cat((*parts,), -2) for parts in compared)
    first, *others = compared
    return _correlate(first, *others, ground.flatten(-2)).unbind(-1)


def centre_moves(motion: Motion, size: tuple[int, int]) -> Tensor:
    """(..., T): how far the centre of frames of (H, W) moves, in pixels; all of it where they are only shifted."""
    shift = motion.warp[..., :2, 2] if motion.only_shifts else center_displacement(motion.warp, size)
    return shift.norm(dim=-1)


def _screened(motion: Motion, limit: float, size: tuple[int, int], identity: Tensor) -> tuple[Motion, Tensor]:
    """The motion after the verdicts that need no score, without a warp where there is one; and how far it moves."""
    displacement, trusted = centre_moves(motion, size), motion.status == 0
    known = motion.warp.flatten(-2).sum(-1) + motion.sigma  # no number where one of them is none, or infinite
    status = motion.status.masked_fill(trusted > (displacement <= limit), int(Status.TOO_FAR))
    status = status.masked_fill(trusted > (known - known == 0), int(Status.NOT_CONVERGED))
    kept = status == 0
    warp = torch.where(kept[..., None, None], motion.warp, identity)
    return motion._replace(warp=warp, status=status, field=kept_field(motion.field, kept)), displacement


def _judge(
    number: int, motion: Motion, displacement: Tensor, score: Tensor, score_before: Tensor, identity: Tensor
) -> Estimate:
    """One motion against none, see :func:`gate`; what is rejected is not reset yet."""
    sigma, status = motion.sigma, motion.status
    covariance = _covariance_of(motion)
    # without a positive correlation there is no common ground to be better on
    gained = (score >= score_before) & (score > 0)
    near = (score_before > 0) & (displacement <= (_IN_PLACE_SIGMAS * sigma).clamp(min=_IN_PLACE_PIXELS))
    status = status.masked_fill((status == 0) > (gained | near), int(Status.NOT_BETTER))
    moved = gained & (status == 0)
    # a move that was not made is part of the error, in all directions: only its length is known
    left = (0.5 * displacement.square()).masked_fill(~(near > gained), 0.0)
    return Estimate(
        torch.where(moved[..., None, None], motion.warp, identity),
        torch.where(moved, score, score_before),
        score_before,
        (sigma.square() + left).sqrt(),
        torch.addcmul(covariance, left[..., None, None], identity[:2, :2]),
        status,
        torch.full_like(status, number),
        kept_field(motion.field, moved),
    )


def parts_disagree(motion: Motion) -> Tensor:
    """(...,) bool: parts of the frame disagree about the motion, if the method measures that."""
    return torch.zeros_like(motion.status, dtype=torch.bool) if motion.distorted is None else motion.distorted


def _disagreement(motion: Motion, before: Motion, accepted: Tensor) -> Tensor:
    """(..., 2, 2): of a shift that is accepted and one that was trusted, as far as chance does not explain it."""
    both = ((before.status == 0) & accepted)[..., None, None]
    way = (motion.warp[..., :2, 2] - before.warp[..., :2, 2]).detach()
    expected = _covariance_of(motion) + _covariance_of(before)
    square = torch.where(both, way[..., :, None] * way[..., None, :], 0.0)
    return beyond_chance(square, torch.where(both, expected, 1.0), times=1.0)


def _covariance_of(motion: Motion) -> Tensor:
    return isotropic(motion.sigma) if motion.covariance is None else motion.covariance


def replaced(kept: Motion, motion: Motion, accepted: Tensor) -> Motion:
    """The warps that are kept, and what is known of them, after those that were accepted."""
    nothing = torch.zeros_like(kept.sigma)
    misfit, before = (nothing if each.misfit is None else each.misfit for each in (motion, kept))
    return kept._replace(
        warp=torch.where(accepted[..., None, None], motion.warp, kept.warp),
        sigma=torch.where(accepted, motion.sigma, kept.sigma),
        status=torch.where(accepted, 0, kept.status),
        covariance=torch.where(accepted[..., None, None], _covariance_of(motion), _covariance_of(kept)),
        misfit=torch.where(accepted, misfit, before),
    )


def _misfit_before(motion: Motion, before: Motion, accepted: Tensor) -> Tensor:
    """(..., 2, 2): by what parts of the frame disagreed about a shift before, and do not about one that is accepted."""
    if before.misfit is None:
        return isotropic(torch.zeros_like(motion.sigma))
    rest = before.misfit if motion.misfit is None else (before.misfit - motion.misfit).clamp(min=0)
    return isotropic(torch.where((before.status == 0) & accepted, 0.5 * rest, 0.0).sqrt())


def _widened(estimate: Estimate, extra: Tensor) -> tuple[Estimate, Tensor]:
    """The estimate with a covariance (..., 2, 2) added; and where its σ is too large after that."""
    told = (extra > 0).flatten(-2).any(-1)
    covariance = estimate.covariance + extra
    sigma = torch.where(told, largest_sigma(covariance), estimate.sigma)
    # (a method that asks for less knew its shift worse before)
    limit = torch.where(estimate.sigma <= _LARGEST_DOUBT, _LARGEST_DOUBT, _MORE_DOUBT * estimate.sigma)
    return estimate._replace(covariance=covariance, sigma=sigma), told & (sigma > limit)


def rejected(estimate: Estimate) -> Estimate:
    """The estimate, its rejected frames set to the identity and the scores of that."""
    identity, unknown = _nothing_known(estimate.warp.shape[-2] == 3, like=estimate.warp)
    valid = estimate.valid
    rows, lost = valid[..., None, None], ~valid
    return estimate._replace(
        warp=torch.where(rows, estimate.warp, identity),
        score=torch.where(valid, estimate.score, estimate.score_before),
        sigma=estimate.sigma.masked_fill(lost, torch.inf),
        covariance=torch.where(rows, estimate.covariance, unknown),
        stage=estimate.stage.masked_fill(lost, -1),
        field=kept_field(estimate.field, valid),
    )


@keeps_tables
def _nothing_known(homography: bool, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """The identity, and the covariance of what may be anything."""
    identity = identity_warp(homography=homography, device=like.device, dtype=like.dtype)
    return identity, torch.full_like(identity[0, :2], torch.inf).diag()


def kept_field(field: ShiftField | None, kept: Tensor) -> ShiftField | None:
    """No shifts, of a σ of inf, where a frame's field is not kept."""
    if field is None:
        return None
    rows = kept[..., None, None]
    return field._replace(
        coefficients=torch.where(rows[..., None], field.coefficients, 0.0),
        sigma=torch.where(rows, field.sigma, torch.inf),
    )


def choose_rows(condition: Tensor, first: Estimate, second: Estimate) -> Estimate:
    """Frame by frame: ``first`` where the condition holds, else ``second``."""

    def choose(pair: tuple[Tensor, ...]) -> Tensor:
        rows = condition.reshape(*condition.shape, *[1] * (pair[0].ndim - condition.ndim))
        return torch.where(rows, pair[0], pair[1])

    fields = [estimate.field for estimate in (first, second) if estimate.field is not None]
    if len(fields) == 1:  # the other one shifts nothing
        none = kept_field(fields[0], torch.zeros_like(condition))
        first, second = (
            one if one.field is not None else one._replace(field=none) for one in (first, second)
        )
    return combine(choose, [first, second])


def _thin(image: Tensor, step: int) -> Tensor:
    """Every ``step``-th pixel of (..., H, W)."""
    return image if step == 1 else image[..., ::step, ::step]


def _resize(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., h, w) → (..., *size): every point takes the sample at or before it."""
    if (weights.shape[-2], weights.shape[-1]) == size:
        return weights
    flat = weights.reshape(-1, 1, *weights.shape[-2:])
    return F.interpolate(flat, size=size, mode="nearest").reshape(*weights.shape[:-2], *size)
