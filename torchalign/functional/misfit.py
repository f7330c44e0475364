"""How far parts of a frame disagree with its warp, beyond their own σ: a motion that the model lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from torchalign.functional.phase import phase_correlation
from torchalign.functional.texture import Contrast
from torchalign.functional.uncertainty import trace

__all__ = ["misfit"]

# Blocks along each axis, as many as keep this many pixels a side; and how many must be measured.
_BLOCKS, _LEAST_SIDE, _LEAST_MEASURED = 4, 48, 4
# Shifts of a block that are looked for, in pixels.
_REACH = 3.0


def misfit(
    aligned: Tensor,
    reference: Tensor,
    aligned_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    *,
    contrast: Contrast = "local",
) -> Tensor:
    r"""The spread of the shifts of blocks of aligned frames, per axis, less what their σ explain.

    .. math:: \sqrt{\max\left(0, \tfrac{1}{2 (n - 1)} \sum_b |t_b - \bar t|^2 - \overline{\sigma_b^2}\right)}

    It is about 0 for a frame that is only shifted. For a frame that is distorted, tilted or moved in parts it is about
    the root mean square displacement of its parts.

    Args:
        aligned: (..., H, W), the channel seen, aligned; finite.
        reference: (..., H, W), broadcastable.
        aligned_mask: bool, (..., H, W), True = usable; ``None`` if all is.
        reference_mask: bool, broadcastable.
        contrast: see :func:`~torchalign.functional.texture.extract_texture`.

    Returns:
        (...,), in pixels; NaN where fewer than four blocks could be measured.

    Example:
        >>> scene = torch.rand(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
        >>> scene = torch.nn.functional.avg_pool2d(scene, 7, 1, 3)[0, 0]
        >>> halves = torch.cat((scene[:100].roll(1, 1), scene[100:]))
        >>> misfit(scene, scene).item(), round(misfit(halves, scene).item(), 1)
        (0.0, 0.4)
    """
    size = (aligned.shape[-2], aligned.shape[-1])
    rows, columns = (max(1, min(_BLOCKS, length // _LEAST_SIDE)) for length in size)
    height, width = size[0] // rows, size[1] // columns

    def blocks(image: Tensor | None) -> Tensor | None:
        """(..., n, height, width)."""
        if image is None:
            return None
        cut = image[..., : rows * height, : columns * width]
        cut = cut.reshape(*cut.shape[:-2], rows, height, columns, width).movedim(-2, -3)
        return cut.flatten(-4, -3)

    moving, still = blocks(aligned), blocks(reference)
    assert moving is not None
    assert still is not None
    found = phase_correlation(
        moving,
        still,
        blocks(aligned_mask),
        blocks(reference_mask),
        max_translation=_REACH,
        contrast=contrast,
    )
    sure = found.converged & ~found.flat & ~found.outside & ~found.ambiguous
    weight = sure.to(aligned.dtype)
    count = weight.sum(-1)
    shift = torch.where(sure[..., None], found.shift, 0.0)
    mean = shift.sum(-2) / count.clamp(min=1)[..., None]
    apart = (shift - mean[..., None, :]).square().sum(-1) * weight
    spread = apart.sum(-1) / (2 * (count - 1).clamp(min=1))
    variance = 0.5 * (trace(found.covariance) - found.misfit)  # per axis
    noise = torch.where(sure, variance, 0.0).sum(-1) / count.clamp(min=1)
    value = (spread - noise).clamp(min=0).sqrt()
    return torch.where(count >= _LEAST_MEASURED, value, torch.nan)
