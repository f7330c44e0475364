r"""The motion models, once: how many parameters each has, how they move points, which warp they make.

Parameters are small and dimensionless: coordinates have their origin at the frame's centre and half of its longer
side as their unit (*normalised*), so every parameter displaces the frame's edge by about itself. In this order:

.. math:: (t_x, t_y),\quad (\theta),\ (\theta, s),\ (a_{xx}, a_{xy}, a_{yx}, a_{yy}),\quad (h_x, h_y)

the translation, then the rotation, the rotation and the zoom, or what the linear part has beyond the identity, then
the last row of a homography, :math:`p' = (A p + t) / (1 + h \cdot p)`. An increment is composed on the left of a
warp, :math:`W \leftarrow \Delta W \circ W`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from torchalign.functional.affine import conjugated, scaled, unit_corner

__all__ = [
    "PARAMETERS",
    "MotionModel",
    "denormalize",
    "half_length",
    "jacobian",
    "normalize",
    "only_shifts",
    "warp_of",
]

# What a warp may do.
MotionModel = Literal["translation", "euclidean", "similarity", "affine", "homography"]
# Degrees of freedom of each.
PARAMETERS: dict[MotionModel, int] = {
    "translation": 2, "euclidean": 3, "similarity": 4, "affine": 6, "homography": 8,
}  # fmt: skip


def only_shifts(motion: MotionModel, init: Tensor | None) -> bool:
    """Whether every warp that may be found is a shift, for any data.

    From an ``init`` (..., T, 2), (..., T, 2 or 3, 3), of which the linear part is kept, or ``None``.

    Example:
        >>> only_shifts("translation", None), only_shifts("translation", torch.eye(3))
        (True, False)
    """
    return motion == "translation" and (init is None or init.shape[-1] == 2)


def jacobian(motion: MotionModel, x: Tensor, y: Tensor, *, dim: int = 0) -> tuple[Tensor, Tensor]:
    """How each of P parameters displaces points, at the identity.

    Args:
        motion: what may move.
        x: of the points, normalised, any shape.
        y: likewise.
        dim: where the P parameters stand in the result.

    Returns:
        The derivatives of x and of y, each of the points' shape and P in ``dim``.

    Example:
        >>> jacobian("similarity", torch.tensor(2.0), torch.tensor(3.0))
        (tensor([ 1.,  0., -3.,  2.]), tensor([0., 1., 2., 3.]))
    """
    one, none = torch.ones_like(x), torch.zeros_like(x)
    columns = [(one, none), (none, one)]
    if motion in ("euclidean", "similarity"):
        columns.append((-y, x))
    if motion == "similarity":
        columns.append((x, y))
    if motion in ("affine", "homography"):
        columns += [(x, none), (y, none), (none, x), (none, y)]
    if motion == "homography":
        columns += [(-x * x, -x * y), (-x * y, -y * y)]
    by_x, by_y = zip(*columns, strict=True)
    return torch.stack(by_x, dim), torch.stack(by_y, dim)


def warp_of(parameters: Tensor, motion: MotionModel) -> Tensor:
    """The warp of parameters, in normalised coordinates, whose derivative at 0 is :func:`jacobian`.

    Args:
        parameters: (..., P).
        motion: what may move.

    Returns:
        (..., 2, 3), or (..., 3, 3) for a homography.

    Example:
        >>> warp_of(torch.tensor([0.5, 0.25, 0.125, -0.5]), "similarity")
        tensor([[ 0.5000, -0.1250,  0.5000],
                [ 0.1250,  0.5000,  0.2500]])
    """
    x, y, *rest = parameters.unbind(-1)
    one, none = torch.ones_like(x), torch.zeros_like(x)
    a, b, c, d = one, none, none, one
    if motion == "euclidean":
        cosine, sine = rest[0].cos(), rest[0].sin()
        a, b, c, d = cosine, -sine, sine, cosine
    elif motion == "similarity":
        a, b, c, d = 1 + rest[1], -rest[0], rest[0], 1 + rest[1]
    elif motion in ("affine", "homography"):
        a, b, c, d = 1 + rest[0], rest[1], rest[2], 1 + rest[3]
    entries = [a, b, x, c, d, y]
    if motion == "homography":
        entries += [rest[4], rest[5], one]
    return torch.stack(entries, dim=-1).reshape(*x.shape, len(entries) // 3, 3)


def half_length(size: tuple[int, int]) -> float:
    """The unit of normalised coordinates of a frame (H, W), in pixels."""
    return max(size) / 2


def normalize(warp: Tensor, size: tuple[int, int]) -> Tensor:
    """A warp (..., 2 or 3, 3) of frames (H, W): in pixels → in normalised coordinates, the last entry 1."""
    centred = conjugated(warp, _frame_centre(size, warp))
    return unit_corner(scaled(centred, 1 / half_length(size)))


def denormalize(warp: Tensor, size: tuple[int, int]) -> Tensor:
    """The way back."""
    return unit_corner(conjugated(scaled(warp, half_length(size)), -_frame_centre(size, warp)))


def _frame_centre(size: tuple[int, int], like: Tensor) -> Tensor:
    """(2,): the centre (x, y) of a frame of ``size``."""
    return torch.stack([like.new_full((), (side - 1) / 2) for side in reversed(size)])
