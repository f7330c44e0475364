"""The one image of C bands that is registered: (..., C, H, W) → (..., H, W)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._check import check_bands, message
from torchalign._host import kernels_for

__all__ = [
    "Channel",
    "ChannelName",
    "center_crop",
    "check_channel",
    "extract_channel",
    "gradient_magnitude",
    "see_channel",
]

ChannelName = Literal["mean", "luminance", "rgb_mean", "gradients"]
Channel = SupportsIndex | ChannelName | Callable[[Tensor], Tensor]

# ITU-R BT.601 luma
_LUMINANCE = (0.299, 0.587, 0.114)


def extract_channel(
    cube: Tensor, channel: Channel = "mean", *, rgb_bands: Sequence[int] = (3, 2, 1)
) -> Tensor:
    r"""Reduce the bands of every frame to the one image that is registered.

    * an integer of any type (Python, NumPy, a 0-d integer tensor): that band; negative counts from the end;
    * ``"mean"``: the mean of all bands;
    * ``"rgb_mean"``: the mean of the three bands ``rgb_bands``;
    * ``"luminance"``: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601);
    * ``"gradients"``: :func:`gradient_magnitude` of ``"rgb_mean"``;
    * a callable or ``torch.nn.Module``: (..., C, H, W) → (..., H, W).

    With fewer than four bands the three names that need R, G, B take the bands as they come (one or two bands
    are averaged), as satalign does.

    A pixel that is NaN or infinite in a band that is used is NaN or infinite in the channel, hence unusable.

    Args:
        cube: (..., C, H, W).
        channel: see above.
        rgb_bands: the indices of R, G, B among the bands.

    Returns:
        (..., H, W).

    Raises:
        TypeError: ``channel`` is none of the above, or a callable returned no tensor.
        ValueError: a band index is out of range, or a callable returned another shape.

    Example:
        >>> cube = torch.arange(8.0).reshape(2, 4, 1, 1)
        >>> extract_channel(cube, "mean").flatten(), extract_channel(cube, -1).flatten()
        (tensor([1.5000, 5.5000]), tensor([3., 7.]))
    """
    check_channel(channel)
    if not isinstance(channel, str):
        if callable(channel):
            return _checked_result(channel(cube), cube)
        return cube[..., _band("channel", channel, cube.shape[-3]), :, :]
    if channel == "mean":
        return _mean(cube)
    rgb = cube
    if cube.shape[-3] > 3:
        rgb = torch.stack([cube[..., band, :, :] for band in _rgb_indices(cube, rgb_bands)], dim=-3)
    if channel == "rgb_mean" or (channel == "luminance" and rgb.shape[-3] < 3):
        return _mean(rgb)
    if channel == "luminance":
        red, green, blue = rgb.unbind(-3)
        return _LUMINANCE[0] * red + _LUMINANCE[1] * green + _LUMINANCE[2] * blue
    return gradient_magnitude(_mean(rgb))


def check_channel(channel: object) -> None:
    """Check an index, a name or a callable; the number of bands is only known with a cube.

    Raises:
        TypeError: none of these.
        ValueError: an unknown name.
    """
    expected = f"a band index, one of {get_args(ChannelName)}, or a callable"
    if isinstance(channel, str):
        if channel not in get_args(ChannelName):
            raise ValueError(message("channel", expected, repr(channel), "choose one"))
    elif not callable(channel):
        try:
            operator.index(None if isinstance(channel, bool) else channel)  # type: ignore[arg-type]
        except TypeError:
            got = f"{channel!r} ({type(channel).__name__})"
            raise TypeError(message("channel", expected, got, "give an integer or a name")) from None


def see_channel(
    cube: Tensor, mask: Tensor | None, channel: Channel = "mean", *, rgb_bands: Sequence[int] = (3, 2, 1)
) -> tuple[Tensor, Tensor] | None:
    """:func:`extract_channel`, 0 where it is unusable, and where it is usable, by one kernel where there is one.

    (..., H, W) in float32 or float64, and bool, by a mask (..., H, W), True = usable, or ``None`` if all of it is;
    ``None`` where there is no kernel for it.
    """
    kernels = kernels_for(cube)
    if kernels is None or callable(channel) or channel == "gradients":
        return None
    if not isinstance(channel, str):
        band = _band("channel", channel, cube.shape[-3]) % cube.shape[-3]
        return kernels.see(cube, mask, "band", (band,))
    if channel == "mean" or cube.shape[-3] < 3:
        return kernels.see(cube, mask, "mean", ())
    return kernels.see(cube, mask, channel, _rgb_indices(cube, rgb_bands))


def gradient_magnitude(image: Tensor) -> Tensor:
    r"""Magnitude of the Sobel gradient, :math:`\sqrt{g_x^2 + g_y^2}`, in image units per pixel.

    It sees edges of every direction. (satalign's ``"gradients"`` is the mixed derivative
    :math:`\partial_x\partial_y`, which is 0 on a road that runs north.) Borders are replicated; what touches an
    unusable pixel is NaN. Of (..., H, W).

    Example:
        >>> gradient_magnitude(torch.arange(5.0).expand(3, 5))[1]
        tensor([0.5000, 1.0000, 1.0000, 1.0000, 0.5000])
    """
    flat_image = image.reshape(-1, 1, *image.shape[-2:])
    # computed without the unusable pixels, not only masked afterwards: 0 · NaN would be NaN in the gradient
    unusable = ~flat_image.isfinite()
    padded = F.pad(torch.where(unusable, 0.0, flat_image), (1, 1, 1, 1), mode="replicate")
    smooth_y = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    smooth_x = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    gx = (smooth_y[..., 2:] - smooth_y[..., :-2]) / 8
    gy = (smooth_x[..., 2:, :] - smooth_x[..., :-2, :]) / 8
    square = gx.square() + gy.square()
    # the root has no derivative at 0: flat ground gets the gradient 0 instead of NaN
    flat = square == 0
    magnitude = torch.where(flat, 0.0, torch.where(flat, 1.0, square).sqrt())
    met = F.max_pool2d(unusable.to(image.dtype), 3, 1, 1) > 0
    return torch.where(met, torch.nan, magnitude).reshape(image.shape)


def center_crop(image: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    """The central window (..., min(h, H), min(w, W)), a view, and its origin (x, y) in pixels of the whole (..., H, W).

    Of ``None`` it is the whole. Where the margins cannot be equal, the upper and left one is the smaller.

    Example:
        >>> window, origin = center_crop(torch.zeros(7, 8), (4, 4))
        >>> window.shape, origin
        (torch.Size([4, 4]), (2, 1))
    """
    if size is None:
        return image, (0, 0)
    height, width = image.shape[-2:]
    crop_height, crop_width = min(size[0], height), min(size[1], width)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return image[..., top : top + crop_height, left : left + crop_width], (left, top)


def _mean(cube: Tensor) -> Tensor:
    cube = cube if cube.is_floating_point() else cube / 1
    return cube[..., 0, :, :] if cube.shape[-3] == 1 else cube.mean(-3)


def _rgb_indices(cube: Tensor, rgb_bands: Sequence[int]) -> tuple[int, ...]:
    """Of R, G, B, from 0 on, in a cube of at least three bands."""
    bands = cube.shape[-3]
    if bands == 3:
        return 0, 1, 2
    return tuple(_band("rgb_bands", band, bands) % bands for band in check_bands(rgb_bands))


def _band(name: str, band: SupportsIndex, bands: int) -> int:
    """The index of a band that is there."""
    index = operator.index(band)
    if not -bands <= index < bands:
        expected = f"a band index in [{-bands}, {bands - 1}]"
        raise ValueError(message(name, expected, index, f"the cube has {bands} bands"))
    return index


def _checked_result(channel: object, cube: Tensor) -> Tensor:
    """Check that a callable made one image per frame of the bands."""
    expected = (*cube.shape[:-3], *cube.shape[-2:])
    if not isinstance(channel, Tensor):
        raise TypeError(message("channel(cube)", "a tensor", type(channel).__name__, "return (..., H, W)"))
    if tuple(channel.shape) != tuple(expected) or not channel.is_floating_point():
        got, cure = f"{channel.dtype} {tuple(channel.shape)}", "reduce the band axis, dim=-3"
        raise ValueError(message("channel(cube)", f"a floating tensor {tuple(expected)}", got, cure))
    return channel
