"""The levels of a reference's pyramid, from fine to coarse: its texture, derivatives and their products.

All levels share one system of coordinates: the frame's centre is 0, its longer half is 1. None has a half pixel of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchalign._host import keeps_tables
from torchalign.functional.fourier import irfft2, rfft2
from torchalign.functional.motion import MotionModel, half_length, jacobian
from torchalign.functional.texture import Contrast, Texture, extract_pyramid
from torchalign.functional.working_grid import Window, WorkingGrid, working_size

__all__ = [
    "Level",
    "band_response",
    "derivatives_of",
    "every_second",
    "extract_textures",
    "far_level",
    "for_parts",
    "inner",
    "joined",
    "level_frequencies",
    "prepare_level",
    "prepare_levels",
    "unflatten",
]

# The coarsest level still has this many samples along the frame's shorter side, and of frames whose finest has
# enough this many; so few of a small frame lead astray.
_COARSEST, _COARSEST_OF_LARGE, _LARGE = 20, 8, 100
# A climb alone comes from as far as this share of the period at the coarsest level's highest frequency.
_WITHIN_REACH = 0.25
# Of motions that scale: the share of the mean local variance that is as good as none.
_FLOOR = {"similarity": 0.1, "affine": 0.1, "homography": 0.1}
# What is off any hole is at least this share of what is mostly usable, or else its surroundings are taken too.
_LEAST_COVER = 0.5


class Level(NamedTuple):
    """What a level of the pyramid keeps of the reference, see :func:`prepare_level`.

    Attributes:
        grid: the samples, n = h · w of them, or 2h · w of a vector.
        field: (..., 1 or T, h, w), the reference's texture.
        products: (..., 1 or T, (2 + P)(3 + P) / 2, n), of the regressors with each other: the upper triangle, row
            by row. The first regressor is 1, so the first row holds the regressors.
        weights: (..., 1 or T, h · w) in [0, 1]: the window, and what is usable.
        flat: (..., 1 or T) bool.
        x: (h · w,), where the samples are, in halves of the frame from its centre.
        y: (h · w,), likewise.
        corners: (8, P), how each parameter displaces the frame's corners, x of the four and then y, in pixels.
        motion: what the parameters are of.
        vector: the texture has two parts, one below the other: field, products and weights are of 2h · w samples.
    """

    grid: WorkingGrid
    field: Tensor
    products: Tensor
    weights: Tensor
    flat: Tensor
    x: Tensor
    y: Tensor
    corners: Tensor
    motion: MotionModel
    vector: bool

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the samples; the second part of a vector lies below the first."""
        rows, columns = self.grid.size
        return (2 * rows if self.vector else rows), columns

    @property
    def regressors(self) -> Tensor:
        """(..., 1 or T, 2 + P, n): 1, the texture, and its derivatives by the P parameters."""
        return self.products[..., : 2 + self.corners.shape[-1], :]

    @property
    def texture(self) -> Tensor:
        """(..., 1 or T, n), the field."""
        return self.products[..., 1, :]

    @property
    def squares(self) -> Tensor:
        """(..., 1 or T, n), of the texture."""
        return self.products[..., 2 + self.corners.shape[-1], :]


def level_frequencies(
    frame: tuple[int, int], max_frequency: float = 0.25, levels: int | None = None
) -> tuple[float, ...]:
    """The highest frequency of every level, finest first, each half of the one before.

    Args:
        frame: (H, W) in pixels.
        max_frequency: of the finest level, in cycles per pixel.
        levels: how many; ``None`` for as many as leave 20 samples along the shorter side, 8 of frames
            of 100 and more.

    >>> level_frequencies((256, 300)), level_frequencies((128, 128)), level_frequencies((256, 300), levels=1)
    ((0.25, 0.125, 0.0625, 0.03125, 0.015625), (0.25, 0.125), (0.25,))
    """
    if levels is None:
        shortest = min(working_size(frame, max_frequency))
        levels = 1
        least = _COARSEST_OF_LARGE if shortest >= _LARGE else _COARSEST
        while shortest >= least * 2**levels:  # torch.export notes for which sizes this holds
            levels += 1
    return tuple(max_frequency / 2**level for level in range(levels))


def far_level(levels: Sequence[Level], max_translation: float, init: Tensor | None = None) -> int | None:
    """The level on which all translations are compared first; ``None`` where a climb alone reaches far enough.

    Where a shift is sought and there is an init, it was. Arguments as in :func:`enhanced_correlation`.
    """
    near = max_translation <= _WITHIN_REACH / levels[-1].grid.max_frequency
    if near or (levels[0].motion == "translation" and init is not None):
        return None
    number = len(levels) - 1
    # compared, not computed: a size may be a symbol
    while number > 0 and min(levels[number].grid.size) < _COARSEST:
        number -= 1
    return number


def prepare_levels(
    reference: Tensor,
    mask: Tensor | None = None,
    *,
    motion: MotionModel = "affine",
    max_frequency: float = 0.25,
    levels: int | None = None,
    contrast: Contrast = "local",
    sigma_blur: float = 0.0,
    taper: float = 0.15,
) -> list[Level]:
    """Every level of the reference, finest first, for motions of a kind; arguments as in :func:`enhanced_correlation`."""
    frame = (reference.shape[-2], reference.shape[-1])
    frequencies = level_frequencies(frame, max_frequency, levels)
    grids = [
        WorkingGrid.of(frame, working_size(frame, highest), highest, reference) for highest in frequencies
    ]
    textures = extract_textures(reference, mask, grids, motion, contrast=contrast, sigma_blur=sigma_blur)
    return [
        prepare_level(texture, grid, motion, taper) for texture, grid in zip(textures, grids, strict=True)
    ]


def extract_textures(
    image: Tensor,
    mask: Tensor | None,
    grids: Sequence[WorkingGrid],
    motion: MotionModel,
    *,
    contrast: Contrast,
    sigma_blur: float,
) -> list[Texture]:
    """:func:`~torchalign.functional.texture.extract_pyramid`, its fields not weighted yet: a hole's edge would pull.

    Samples beside a hole show what filled it: on the finest level they count nothing where enough are left.
    """
    options: dict[str, Any] = {"contrast": contrast, "blur": sigma_blur, "floor": _FLOOR.get(motion, 0.0)}
    finest, *coarser = (
        texture if texture.detail is None else texture._replace(field=texture.detail)
        for texture in extract_pyramid(image, mask, grids=grids, cover=True, **options)
    )
    if finest.weights is not None and finest.cover is not None:
        enough = torch.sub(finest.cover, finest.weights, alpha=_LEAST_COVER).mean((-2, -1)) >= 0
        weights = torch.where(enough[..., None, None], finest.cover, finest.weights)
        finest = finest._replace(weights=weights)
    return [finest, *coarser]


def prepare_level(texture: Texture, grid: WorkingGrid, motion: MotionModel, taper: float = 0.15) -> Level:
    r"""The reference's derivatives by the parameters, :math:`\nabla r \cdot \partial W / \partial p`, on a grid."""
    vector = texture.is_vector
    band = grid.frame, grid.size, grid.max_frequency
    spectrum = rfft2(texture.field) * band_response(*band, vector, like=grid.radius)
    field = joined(irfft2(spectrum, grid.size), vector, dim=-2)
    slope_x, slope_y = (joined(slope, vector) for slope in derivatives_of(spectrum, grid))
    x, y, basis_x, basis_y, corners = _coordinates(grid.frame, grid.size, motion, like=grid.radius)
    basis_x, basis_y = (for_parts(basis, vector) for basis in (basis_x, basis_y))
    derivatives = slope_x[..., None, :] * basis_x + slope_y[..., None, :] * basis_y  # (..., P, n)
    values = field.flatten(-2)[..., None, :]
    rows = torch.cat([torch.ones_like(values), values, derivatives], dim=-2)
    # row by row of the triangle: views, of which neither memory nor autograd keeps copies
    products = torch.cat(
        [rows, *(rows[..., i : i + 1, :] * rows[..., i:, :] for i in range(1, rows.shape[-2]))], dim=-2
    )
    weights = Window.of(grid, taper).whole.flatten(-2).expand(*texture.flat.shape, -1)
    if texture.weights is not None:
        weights = weights * texture.weights.flatten(-2)
    return Level(grid, field, products, weights, texture.flat, x, y, corners, motion, vector)


def every_second(level: Level) -> Level:
    """The level with every second sample along both axes, where there are enough."""
    (rows, columns), grid = level.grid.size, level.grid
    if rows % 2 or columns % 2 or min(rows, columns) < 4 * _COARSEST:
        return level

    def thin(values: Tensor, size: tuple[int, int] = (rows, columns)) -> Tensor:
        return unflatten(values, size)[..., ::2, ::2].flatten(-2)

    return level._replace(
        grid=WorkingGrid.of(grid.frame, (rows // 2, columns // 2), grid.max_frequency, level.field),
        field=level.field[..., ::2, ::2],
        products=thin(level.products, level.size),
        weights=thin(level.weights),
        x=thin(level.x),
        y=thin(level.y),
    )


@keeps_tables
def _coordinates(
    frame: tuple[int, int], size: tuple[int, int], motion: MotionModel, *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(n,) x and y of the samples, in halves of the frame from its centre, (P, n) their jacobian, (8, P) the corners."""
    (height, width), half = frame, half_length(frame)
    kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    x = (torch.arange(size[1], **kind) * (width / size[1]) - (width - 1) / 2) / half
    y = (torch.arange(size[0], **kind) * (height / size[0]) - (height - 1) / 2) / half
    x, y = x.expand(size).flatten(), y[:, None].expand(size).flatten()
    sign = 2 * torch.arange(4, device=like.device) - 3  # −3, −1, 1, 3: left, left, right, right
    far_x = sign.sign().to(like.dtype) * ((width - 1) / 2 / half)
    far_y = (sign % 4 - 2).to(like.dtype) * ((height - 1) / 2 / half)  # up and down in turns
    return x, y, *jacobian(motion, x, y), half * torch.cat(jacobian(motion, far_x, far_y), dim=-1).mT


@keeps_tables
def band_response(
    frame: tuple[int, int], size: tuple[int, int], max_frequency: float, vector: bool, *, like: Tensor
) -> Tensor:
    """(h, w//2+1): the root of the ramp ``|f|``, within the band; 1 for vectors, whose fields have no 1/f spectrum."""
    share = WorkingGrid.of(frame, size, max_frequency, like).radius / max_frequency
    band = share < 1
    return band.to(share.dtype) if vector else share.sqrt() * band


def derivatives_of(spectrum: Tensor, grid: WorkingGrid) -> tuple[Tensor, Tensor]:
    """(..., n) twice, the derivatives of a field by x and y, per half of the frame."""
    by_x, by_y = (
        irfft2(spectrum * slope, grid.size).flatten(-2)
        for slope in _derivatives_along(grid.frame, grid.size, like=grid.radius)
    )
    return by_x, by_y


@keeps_tables
def _derivatives_along(
    frame: tuple[int, int], size: tuple[int, int], *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(w//2+1,) and (h, 1): iω, per half of the frame."""
    y, x = WorkingGrid.of(frame, size, 0.5, like).frequencies
    omega_x, omega_y = (2 * math.pi * half_length(frame) * frequency for frequency in (x, y[:, None]))
    return 1j * omega_x, 1j * omega_y


def for_parts(values: Tensor, vector: bool) -> Tensor:
    """(..., n) from (..., h · w): the same for both parts of a vector."""
    return torch.cat((values, values), -1) if vector else values


def joined(parts: Tensor, vector: bool, *, dim: int = -1) -> Tensor:
    """(..., n) from a vector's (2, ..., h · w): its parts one after the other; a scalar field as it is."""
    return torch.cat((*parts,), dim) if vector else parts


def unflatten(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """(..., h, w), of (..., h · w)."""
    return values.unflatten(-1, size)  # type: ignore[no-untyped-call]  # torch has no types for it


def inner(weighted: Tensor, rows: Tensor) -> Tensor:
    """(..., T, n) by (..., 1 or T, K, n): (..., T, K)."""
    if weighted.ndim > 2 and rows.shape[-3] == 1:
        return torch.matmul(weighted, rows.squeeze(-3).mT)
    # frame by frame: its sums do not depend, not even in the last bit, on how many others there are
    return torch.matmul(weighted.unsqueeze(-2), rows.mT).squeeze(-2)
