r"""What of an image is registered: band-limited, locally normalised, on the coarsest grid that holds the band.

* :func:`~torchalign.functional.low_pass.low_pass`: beyond about a quarter of the sampling rate a real sensor's
  spectrum is mostly folded (aliased), and folded frequencies pull every estimate towards whole pixels. The frames
  are resampled onto the coarser grid that holds just the band that is kept: no kept frequency is lost, and every
  later step costs a quarter.
* :func:`local_contrast`: high-passed and divided by its local standard deviation, so that bright clouds,
  shadows and gains get no more weight than fields and roads.

:func:`extract_texture` is the chain of the two, :func:`extract_pyramid` the same for several bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import kernels_for
from torchalign.functional.common_ground import LEAST_WEIGHT, fill_holes
from torchalign.functional.low_pass import low_pass
from torchalign.functional.sizes import square_root
from torchalign.functional.smoothing import nanmedian, triangle_mean
from torchalign.functional.structure import orientation_field
from torchalign.functional.working_grid import WorkingGrid, working_size

__all__ = ["Brightness", "Contrast", "Texture", "extract_pyramid", "extract_texture", "local_contrast"]

Brightness = Literal["local", "none"]
Contrast = Literal["local", "none", "structure"]

# Share of usable pixels around a sample (in 15 × 15 samples) at which its weight is 0, and from which it is 1.
# A soft weight as wide as a hole leaves no pattern of its own to be correlated.
_COVERAGE = (0.3, 0.9)
# Frames with less than this share of usable pixels are empty.
_MIN_USABLE = 1 / 64


class Texture(NamedTuple):
    """What of an image is correlated, see :func:`extract_texture`."""

    #: (..., h, w), band-limited and locally normalised; of ``contrast="structure"`` (2, ..., h, w), the two parts
    #: of a vector
    field: Tensor
    weights: Tensor | None  #: (..., h, w) in [0, 1], small where little is usable; ``None`` if all is
    flat: Tensor  #: (...,) bool, nothing to see: no texture, or too few usable pixels
    #: (..., h, w), the field before it was multiplied by the weights; ``None`` if that is not known
    detail: Tensor | None = None
    #: (..., h, w) in [0, 1], 0 in holes and 1 from two samples off; ``None`` if not asked for, or all is usable
    cover: Tensor | None = None

    @property
    def is_vector(self) -> bool:
        """Whether the field has two parts, which are correlated as one vector."""
        return self.field.ndim > self.flat.ndim + 2


def extract_texture(
    image: Tensor,
    mask: Tensor | None = None,
    *,
    max_frequency: float = 0.25,
    contrast: Contrast = "local",
    cover: bool = False,
) -> Texture:
    """Fill holes, limit the band, normalise the contrast.

    Args:
        image: (..., H, W), finite.
        mask: bool, broadcastable, True = usable.
        max_frequency: in cycles per pixel.
        contrast: ``"local"`` for :func:`local_contrast`, ``"none"`` for the mean removed, ``"structure"`` for
            :func:`~torchalign.functional.structure.orientation_field`.
        cover: keep what a correlation needs that is divided by the overlap of the holes, if there is a mask.

    Returns:
        :class:`Texture` on the grid of :func:`working_size`.
    """
    frame = (image.shape[-2], image.shape[-1])
    grid = WorkingGrid.of(frame, working_size(frame, max_frequency), max_frequency, image)
    return extract_pyramid(image, mask, grids=(grid,), contrast=contrast, cover=cover)[0]


def extract_pyramid(
    image: Tensor,
    mask: Tensor | None = None,
    *,
    grids: Sequence[WorkingGrid],
    contrast: Contrast = "local",
    blur: float = 0.0,
    cover: bool = False,
    floor: float = 0.0,
) -> list[Texture]:
    """:func:`extract_texture` for several bands.

    The first sample of every level lies on the first pixel, whatever the level's sampling: there is no half pixel
    to be kept in mind between them.

    Args:
        image: (..., H, W), finite.
        mask: bool, broadcastable, True = usable.
        grids: what each level is sampled on, over frames of this size; the first one has the widest band.
        contrast: as in :func:`extract_texture`.
        blur: σ of a Gaussian in pixels, applied with the band limit.
        cover: as in :func:`extract_texture`, of the first level.
        floor: the share of the mean local variance that the c of :func:`local_contrast` is at least. Flat ground beside
            an edge shows the edge's window, which does not scale as the ground does.

    Returns:
        One :class:`Texture` a grid.
    """
    mean, centred, empty = centre(image, mask)
    seen = orientation_field(centred, mask) if contrast == "structure" else centred
    # a frame whose deviation is the rounding error of its mean is flat
    noise = 32 * torch.finfo(image.dtype).eps * mean[..., 0, 0].abs()
    if contrast == "structure":  # which does not tell how strong the contrast is
        empty, noise = empty | (_deviation(centred) <= noise), torch.zeros_like(noise)
    bands = [(grid.size, grid.max_frequency) for grid in grids]
    textures: list[Texture] = []
    for grid, limited in zip(grids, low_pass(seen, bands, blur=blur), strict=True):
        weights = own = None
        if mask is not None:
            weights, own = _shares(_coverage(mask, grid), cover=cover and not textures)
        texture = _standardized(limited, weights, noise, empty, contrast, floor)._replace(cover=own)
        textures.append(texture)
    return textures


def local_contrast(image: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""High-passed and normalised by the local standard deviation.

    .. math:: \frac{x - g * x}{\sqrt{g * (x - g * x)^2 + c}}

    with g a triangle of 7 × 7 samples and c the frame's median of the local variance, which keeps noise on flat
    ground from being blown up. Invariant to gain and offset.

    Args:
        image: (..., H, W).
        weights: in [0, 1], broadcastable; the median is taken where they exceed one half, and the result is
            multiplied by them.

    Returns:
        (..., H, W), about [−3, 3].
    """
    kernels = kernels_for(image, weights)
    if kernels is not None:
        unit = torch.ones_like(image[..., 0, 0])
        return kernels.contrast(image, unit, weights, partial(_typical, weights=weights))[1]
    contrast = _local_contrast(image, weights)
    return contrast if weights is None else contrast * weights


def _local_contrast(image: Tensor, weights: Tensor | None, floor: float = 0.0) -> Tensor:
    """The same before it is multiplied by the weights."""
    detail = image - triangle_mean(image, 2)
    variance = triangle_mean(detail.square(), 2)
    # below this the derivative of the root overflows
    least = torch.finfo(image.dtype).tiny ** 0.5
    typical = _typical(variance, weights, floor).nan_to_num(0.0) + least
    return detail * torch.rsqrt(variance + typical[..., None, None])


def _typical(variance: Tensor, weights: Tensor | None, floor: float = 0.0) -> Tensor:
    """(...,): the median where the weights exceed one half, or a share of the mean; NaN where they nowhere do."""
    # a sixteenth of the samples has the same median, and sorting dominates the cost
    sampled = variance[..., ::4, ::4]
    if weights is not None:
        sampled = sampled.masked_fill(weights[..., ::4, ::4] < 0.5, torch.nan)
    sampled = sampled.flatten(-2)
    median = nanmedian(sampled)
    return torch.maximum(median, floor * sampled.nanmean(-1)) if floor > 0 else median


def centre(image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of what is usable (..., 1, 1), the image less it with its holes filled, and whether it is empty."""
    if mask is None:
        mean = image.mean((-2, -1), keepdim=True)
        return mean, image - mean, torch.zeros_like(mean[..., 0, 0], dtype=torch.bool)
    kernels = kernels_for(image, mask)
    found = None if kernels is None else kernels.fill(image, mask, LEAST_WEIGHT)
    if found is not None:
        filled, (mean, share) = found[0], found[1].unbind(-1)
        return mean[..., None, None], filled, share < _MIN_USABLE
    share = mask.to(image.dtype).mean((-2, -1), keepdim=True)
    one_pixel = 1 / (image.shape[-2] * image.shape[-1])
    mean = torch.where(mask, image, 0.0).mean((-2, -1), keepdim=True) / share.clamp(min=one_pixel)
    centred = fill_holes(torch.where(mask, image - mean, 0.0), mask)
    return mean, centred, share[..., 0, 0] < _MIN_USABLE


def _standardized(
    limited: Tensor,
    weights: Tensor | None,
    noise: Tensor,
    empty: Tensor,
    contrast: Contrast,
    floor: float = 0.0,
) -> Texture:
    """Units of any size become 1; then the local contrast."""
    kernels = kernels_for(limited, weights, noise, empty) if contrast == "local" else None
    units = None if kernels is None else kernels.units(limited, noise, empty)
    if kernels is not None and units is not None:
        typical = partial(_typical, weights=weights, floor=floor)
        detail, field = kernels.contrast(limited, units[0], weights, typical)
        return Texture(field, weights, units[1], detail)
    scale = _deviation(limited)
    if contrast == "structure":
        scale = torch.linalg.vector_norm(scale, dim=0)
    flat = ~((scale > noise) & (scale < torch.inf)) | empty
    # squares of what follows neither vanish nor overflow
    normal = limited / scale.masked_fill(flat, 1.0)[..., None, None]
    detail = _local_contrast(normal, weights, floor) if contrast == "local" else normal
    return Texture(detail if weights is None else detail * weights, weights, flat, detail)


def _deviation(centred: Tensor) -> Tensor:
    """(...,): the root of the mean square, without its gradient."""
    samples = centred.shape[-2] * centred.shape[-1]
    return torch.linalg.vector_norm(centred.detach(), dim=(-2, -1)) / square_root(samples)


def _coverage(mask: Tensor, grid: WorkingGrid) -> Tensor:
    """(..., h, w): the share of a sample's pixels that is usable."""
    height, width = grid.size
    shape = mask.shape[:-2]
    kernels = kernels_for(mask)
    if kernels is not None:
        return kernels.coverage(mask.expand(*shape, *grid.frame), (height, width), grid.radius.dtype)
    share = mask.expand(*shape, *grid.frame).reshape(-1, 1, *grid.frame).to(grid.radius.dtype)
    return F.interpolate(share, size=(height, width), mode="area").reshape(*shape, height, width)


def usable_share(mask: Tensor, grid: WorkingGrid) -> Tensor:
    """(..., h, w) in [0, 1]: how much of what lies around a sample is usable."""
    return _shares(_coverage(mask, grid))[0]


def _shares(coverage: Tensor, *, cover: bool = False) -> tuple[Tensor, Tensor | None]:
    """Of the share of each sample what is usable around it; and if asked 0 where a neighbour has a hole, with a ramp.

    (..., h, w) each, in [0, 1].
    """
    lowest, highest = _COVERAGE
    mean = triangle_mean(coverage, 3)
    kernels = kernels_for(coverage) if cover else None
    if kernels is not None:
        return kernels.shares(coverage, mean, lowest, highest)
    weights = ((mean - lowest) / (highest - lowest)).clamp(0, 1)
    if not cover:
        return weights, None
    flat = coverage.reshape(-1, 1, *coverage.shape[-2:])
    least = -F.max_pool2d(-flat, 3, 1, 1).reshape(coverage.shape)
    return weights, (2 * triangle_mean(least, 1) - 1).clamp(0, 1)
