"""How far apart are two batches of images? Per sample, in windows, so that a zoom about the centre shows too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchalign._check import check_kind, check_mask, message
from torchalign._host import is_on_host
from torchalign.aligner import Aligner
from torchalign.functional.affine import transform_points
from torchalign.functional.channels import extract_channel
from torchalign.types import Status, each_field

# A window of a small frame is at least this long, so that there is something to correlate.
_LEAST_WINDOW = 48
# Windows of which less is usable are not measured.
_LEAST_USABLE = 0.5


class Measured(NamedTuple):
    """One row a sample."""

    residual: Tensor  # (N,), the largest misregistration of any window, in pixels; NaN where none is measured
    excess: Tensor  # (N,), the same less two standard errors of that window's estimate: what is certain of it
    seeing: Tensor  # (N,) bool, there was something to match: texture, and enough of it usable


class Samples(NamedTuple):
    """Pairs to be measured, one row a sample."""

    moving: Tensor  # (N, C, H, W), floating
    reference: Tensor  # (N, C or another number of bands, H, W)
    mask: Tensor | None  # (N, H, W) bool, True = usable
    reference_mask: Tensor | None
    ids: Tensor | None = None  # (N,), by which they are told apart


def measure_residuals(
    aligner: Aligner, samples: Samples, *, window: int, same_content: bool = False
) -> Measured:
    """The residual misregistration of every sample of a batch.

    An aligner of translations cannot see a zoom or a rotation about the centre, nor what half of the frame does
    against the other. So the four corners and the centre are measured, each by itself.

    Args:
        aligner: what measures.
        samples: the pairs; where their numbers of bands differ, means are compared.
        window: length of the windows' sides, in pixels; at most half the frame, but no less than 48.
        same_content: both are known to show the same: most windows that find no match are then a residual of
            infinity instead of a question without an answer.

    Returns:
        :class:`Measured`. No synchronisation.
    """
    moving, reference = samples[:2]
    kind = torch.promote_types(torch.promote_types(moving.dtype, reference.dtype), torch.float32)
    moving, reference = moving.detach().to(kind), reference.detach().to(kind)
    if moving.shape[-3] != reference.shape[-3]:
        moving, reference = moving.mean(-3, keepdim=True), reference.mean(-3, keepdim=True)
    size = moving.shape[-2:]
    places = _window_slices((size[0], size[1]), window)
    count = len(places)

    def windows(image: Tensor) -> Tensor:
        """(N, ..., H, W) → (N·windows, ..., h, w)."""
        return torch.stack([image[..., rows, columns] for rows, columns in places], 1).flatten(0, 1)

    own, other = each_field(samples[2:4], windows)
    found = aligner.estimate(windows(moving), windows(reference), own, other)
    displacement = _largest_displacement(found.warp, places)  # (N·windows,)
    seeing = found.status != int(Status.NO_TEXTURE)
    sigma, matched = found.sigma, found.valid
    if same_content and not (is_on_host(matched) and bool(matched.all())):
        # colours that were inverted keep the lengths of their gradients
        lengths = [extract_channel(image, "gradients").unsqueeze(-3) for image in (moving, reference)]
        again = aligner.estimate(windows(lengths[0]), windows(lengths[1]), own, other)
        displacement = torch.where(matched, displacement, _largest_displacement(again.warp, places))
        sigma, matched = torch.where(matched, sigma, again.sigma), matched | again.valid
    for part in (own, other):
        if part is not None:
            seeing = seeing & (part.to(torch.float32).mean((-2, -1)) >= _LEAST_USABLE)
    matched = matched & seeing
    displacement, sigma = (value.detach().reshape(-1, count) for value in (displacement, sigma))
    matched, seeing = (value.reshape(-1, count) for value in (matched, seeing))

    residual = torch.where(matched, displacement, -1.0).amax(-1)
    excess = torch.where(matched, displacement - 2 * sigma, -1.0).amax(-1).clamp(min=0)
    unmatched = (2 * matched.sum(-1) < seeing.sum(-1)) if same_content else ~matched.any(-1)
    nothing = torch.inf if same_content else torch.nan
    without_match = torch.where(seeing.any(-1), nothing, torch.nan)
    return Measured(
        torch.where(unmatched | (residual < 0), without_match, residual),
        torch.where(unmatched | (residual < 0), without_match, excess),
        seeing.any(-1),
    )


def aligner_or(aligner: object, default: Callable[[], Aligner]) -> Aligner:
    """The aligner, or the default where it is ``None``."""
    if aligner is None:
        return default()
    check_kind("aligner", aligner, Aligner, "an aligner such as ta.PCC()", "None is the default")
    return aligner  # type: ignore[return-value]  # as was checked


def check_samples(
    moving: Any,
    reference: Any,
    mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    ids: Tensor | None = None,
) -> Samples:
    """Pairs (..., C, H, W), their masks (..., H, W) and ids (...), as N samples."""
    for name, image in (("moving", moving), ("reference", reference)):
        if not isinstance(image, Tensor):
            expected, cure = "a tensor (..., C, H, W)", "convert it first"
            raise TypeError(message(name, expected, type(image).__name__, cure))
        if image.ndim < 3:
            cure = "add the band axis: image[None]"
            raise ValueError(message(name, "shape (..., C, H, W)", tuple(image.shape), cure))
    lead, size = moving.shape[:-3], moving.shape[-2:]
    if lead != reference.shape[:-3] or size != reference.shape[-2:]:
        expected = f"samples and size of moving, {tuple(moving.shape)}"
        cure = "resample one of them; a slip in that is a slip to be found"
        raise ValueError(message("reference", expected, tuple(reference.shape), cure))

    def per_sample(name: str, usable: Tensor | None) -> Tensor | None:
        usable = check_mask(name, usable, (*lead, *size), moving)
        return None if usable is None else usable.expand(*lead, *size).reshape(lead.numel(), *size)

    if ids is not None and ids.numel() != lead.numel():
        expected = f"one for each of {lead.numel()} samples"
        raise ValueError(message("ids", expected, tuple(ids.shape), "reshape it"))
    return Samples(
        moving.reshape(lead.numel(), *moving.shape[-3:]),
        reference.reshape(lead.numel(), *reference.shape[-3:]),
        per_sample("mask", mask),
        per_sample("reference_mask", reference_mask),
        None if ids is None else ids.reshape(-1),
    )


def _window_slices(size: tuple[int, int], window: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the four corners and the centre; of a small frame, all of it."""
    starts, lengths = [], []
    for full in size:
        length = min(full, window, max(_LEAST_WINDOW, full // 2))
        lengths.append(length)
        starts.append((0, full - length, (full - length) // 2))
    (top, bottom, middle), (left, right, centre) = starts
    corners = [(top, left), (top, right), (bottom, left), (bottom, right), (middle, centre)]
    return [(slice(y, y + lengths[0]), slice(x, x + lengths[1])) for y, x in dict.fromkeys(corners)]


def _largest_displacement(warp: Tensor, places: list[tuple[slice, slice]]) -> Tensor:
    """How far a warp moves any corner of its window."""
    height, width = (part.stop - part.start for part in places[0])
    number = torch.arange(4, device=warp.device)  # made there: for a copy from the host it would have to wait
    corners = torch.stack(((number % 2) * (width - 1), (number // 2) * (height - 1)), -1).to(warp.dtype)
    return (transform_points(warp, corners) - corners).norm(dim=-1).amax(-1)
