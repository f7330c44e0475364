"""What every aligner returns: an :class:`Alignment` of the aligned cube and its :class:`Estimate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data._utils import collate

__all__ = ["Alignment", "Estimate", "Motion", "ShiftField", "Status"]

Fields = TypeVar("Fields", bound=tuple[Any, ...])


class Status(IntEnum):
    """Why a frame was aligned (``OK``) or left as it came (anything else).

    >>> Status.OK == 0, Status(5).name
    (True, 'NOT_BETTER')
    """

    OK = 0
    TOO_FAR = 1  # the displacement of the frame's centre exceeds `max_translation`
    NOT_CONVERGED = 2  # no stable, distinct optimum was found
    NO_TEXTURE = 3  # flat, empty or (almost) wholly masked
    TOO_FEW_MATCHES = 4  # local features: not enough agreeing matches
    NOT_BETTER = 5  # the score did not improve on the identity
    LOW_SCORE = 6  # the score stayed below `min_score`
    AMBIGUOUS = (
        7  # more than one place fits: a second peak, a blind direction, a pattern, parts that disagree
    )
    NOT_CONNECTED = 8  # groupwise: no consistent chain of pairs ties the frame to the others


class ShiftField(NamedTuple):
    """Local shifts on top of a warp W, one row a frame: ``aligned(q) = frame(W⁻¹ q + field(q))``.

    A cubic B-spline over the reference, the residual of the *backward* map, in pixels (x, y). Coefficient (i, j),
    and its σ, belongs to the point ``origin + (j, i) · spacing``. A field of no coefficients (n = m = 0) is none.

    Attributes:
        coefficients: (..., T, 2, n, m), of the spline, x then y.
        sigma: (..., T, n, m), predicted 1-σ error of the field there, in pixels.
        origin: (..., T, 2), (x, y) of the first coefficient, in pixels of the frame.
        spacing: (..., T, 2), between two coefficients along x and y, in pixels.
    """

    coefficients: Tensor
    sigma: Tensor
    origin: Tensor
    spacing: Tensor

    @classmethod
    def empty_like(cls, warp: Tensor) -> ShiftField:
        """The field of no coefficients for warps (..., T, 2 or 3, 3)."""
        lead = warp.shape[:-2]
        none, points = warp.new_zeros((*lead, 2, 0, 0)), warp.new_zeros((*lead, 2))
        return cls(none, none[..., 0, :, :], points, points)


class Estimate(NamedTuple):
    """One row a frame; a NamedTuple of tensors, so compile, vmap, export and collate keep it.

    Attributes:
        warp: (..., T, 2, 3), or (..., T, 3, 3) for a homography; moving → reference,
            ``p_ref = A · p_mov + t`` in pixels (x, y); the exact identity where ``status != 0``.
        score: (..., T), zero-normalised cross-correlation with the reference after alignment.
        score_before: (..., T), the same with the identity.
        sigma: (..., T), predicted 1-σ error of the translation, in pixels: the root of the larger eigenvalue of
            ``covariance``; inf where ``status != 0``.
        covariance: (..., T, 2, 2), of the translation (x, y) of the frame's centre, in px²: a frame that shows only
            stripes is known across them and not along them. inf on the diagonal where ``status != 0``.
        status: (..., T) int64, a :class:`Status` for every frame.
        stage: (..., T) int64, which stage of a cascade the warp is of: 0 for one method, −1 where none was
            accepted.
        field: local shifts on top of ``warp``; ``None`` where the method finds none (under a transform of
            ``torch.func``, which can return nothing but tensors, a field of no coefficients).
    """

    warp: Tensor
    score: Tensor
    score_before: Tensor
    sigma: Tensor
    covariance: Tensor
    status: Tensor
    stage: Tensor
    field: ShiftField | None = None

    @property
    def valid(self) -> Tensor:
        """(..., T) bool: the frames that were aligned, ``status == Status.OK``."""
        return self.status == 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The same with every tensor put through ``function``, those of the field too.

        >>> import torch
        >>> one = torch.ones(3)
        >>> estimate = Estimate(torch.eye(2, 3).expand(3, 2, 3), one, one, one, torch.eye(2).expand(3, 2, 2),
        ...     torch.tensor([0, 3, 0]), torch.tensor([0, -1, 0]))
        >>> estimate.map(lambda rows: rows[1:]).status
        tensor([3, 0])
        """
        return each_field(self, function)


def combine(function: Callable[[tuple[Tensor, ...]], Any], several: Sequence[Fields]) -> Fields:
    """One tuple of several of a kind: field by field what ``function`` makes of their tensors, e.g. ``torch.cat``.

    Tuples in a tuple are combined likewise. Where some have a field and others ``None``, there is none; what is no
    tensor is the first one's.
    """

    def together(column: tuple[Any, ...]) -> Any:
        if any(field is None for field in column):
            return None
        if isinstance(column[0], Tensor):
            return function(column)
        return combine(function, column) if isinstance(column[0], tuple) else column[0]

    kind: Any = type(several[0])
    fields = [together(column) for column in zip(*several, strict=True)]
    return kind(*fields) if hasattr(kind, "_fields") else kind(fields)


def each_field(fields: Fields, change: Callable[[Tensor], Any]) -> Fields:
    """A tuple of the same kind, every tensor of it put through ``change``."""
    return combine(lambda tensors: change(tensors[0]), [fields])


class Pair(NamedTuple):
    """What a method is given: the channel of the frames and of their reference, finite, 0 where unusable.

    Attributes:
        moving: (..., T, H, W).
        usable: (..., T, H, W) bool, or ``None`` if all of it is.
        reference: (..., 1 or T, H, W).
        reference_usable: (..., 1 or T, H, W) bool, or ``None``.
    """

    moving: Tensor
    usable: Tensor | None
    reference: Tensor
    reference_usable: Tensor | None


class Motion(NamedTuple):
    """What a method hands to the gate, one row a frame.

    Attributes:
        warp: (..., T, 2, 3) or (..., T, 3, 3), in the coordinates of the images it was given.
        sigma: (..., T), in pixels.
        status: (..., T) int64; 0 where the method trusts its result.
        inliers: (..., T, h, w) weights of common ground over the reference, or ``None``.
        only_shifts: every warp is a translation, whatever the data: a GPU, which is not asked for its numbers, then
            resamples with one row and one column of indices a frame.
        covariance: (..., T, 2, 2), of the translation of the frame's centre, in px²; ``None``: σ² everywhere.
        field: local shifts on top of the warps, or ``None``.
        distorted: (..., T) bool, parts of the frame disagree about the warp, which is known no better than is asked
            for: ``AMBIGUOUS``, unless a later method, which starts from it, is accepted. ``None``: none does.
        misfit: (..., T), px², what of the trace of ``covariance`` comes from that, or ``None``.
        searched: all places were compared, under more than shifts: what was ambiguous to a method before, need not be.
    """

    warp: Tensor
    sigma: Tensor
    status: Tensor
    inliers: Tensor | None = None
    only_shifts: bool = False
    covariance: Tensor | None = None
    field: ShiftField | None = None
    distorted: Tensor | None = None
    misfit: Tensor | None = None
    searched: bool = False


class Alignment(NamedTuple):
    """The aligned cube, (..., T, C, H, W), and the :class:`Estimate` it was made with."""

    aligned: Tensor
    estimate: Estimate


# an exported program that returns these can then be saved and loaded; torch has no public name for it yet
if hasattr(pytree, "_register_namedtuple"):
    for _kind in (ShiftField, Estimate, Alignment):
        pytree._register_namedtuple(_kind, serialized_type_name=f"torchalign.types.{_kind.__name__}")


def _collate(batch: Sequence[Estimate], *, collate_fn_map: Any = None) -> Estimate:
    """A batch of a DataLoader, which by itself knows no ``None``."""
    return combine(lambda tensors: collate.collate(tensors, collate_fn_map=collate_fn_map), batch)


# torch's table of how types are collated is where a library adds its own
collate.default_collate_fn_map[Estimate] = _collate
