"""What every aligner returns: an :class:`Alignment` of the aligned cube and its :class:`Estimate`."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["Alignment", "Estimate", "Motion", "Status"]


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


class Estimate(NamedTuple):
    """One row a frame; a NamedTuple of tensors, so compile, vmap, export and collate keep it.

    Attributes:
        warp: (..., T, 2, 3), or (..., T, 3, 3) for a homography; moving → reference,
            ``p_ref = A · p_mov + t`` in pixels (x, y); the exact identity where ``status != 0``.
        score: (..., T), zero-normalised cross-correlation with the reference after alignment.
        score_before: (..., T), the same with the identity.
        sigma: (..., T), predicted 1-σ error of the translation per axis, in pixels; inf where ``status != 0``.
        status: (..., T) int64, a :class:`Status` for every frame.
    """

    warp: Tensor
    score: Tensor
    score_before: Tensor
    sigma: Tensor
    status: Tensor

    @property
    def valid(self) -> Tensor:
        """(..., T) bool: the frames that were aligned, ``status == Status.OK``."""
        return self.status == 0


class Motion(NamedTuple):
    """What a method hands to the gate, one row a frame.

    Attributes:
        warp: (..., T, 2, 3) or (..., T, 3, 3), in the coordinates of the images it was given.
        sigma: (..., T), in pixels.
        status: (..., T) int64; 0 where the method trusts its result.
        inliers: (..., T, h, w) weights of common ground over the reference, or ``None``.
        only_shifts: every warp is a translation, whatever the data: a GPU, which is not asked for its numbers, then
            resamples with one row and one column of indices a frame.
    """

    warp: Tensor
    sigma: Tensor
    status: Tensor
    inliers: Tensor | None = None
    only_shifts: bool = False


class Alignment(NamedTuple):
    """The aligned cube, (..., T, C, H, W), and the :class:`Estimate` it was made with."""

    aligned: Tensor
    estimate: Estimate


# an exported program that returns these can then be saved and loaded; torch has no public name for it yet
if hasattr(pytree, "_register_namedtuple"):
    for _kind in (Estimate, Alignment):
        pytree._register_namedtuple(_kind, serialized_type_name=f"torchalign.types.{_kind.__name__}")
