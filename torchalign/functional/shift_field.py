"""Fields of local shifts: cubic B-splines over a lattice of nodes, read, moved, rescaled, composed and inverted.

Convention:
    A :class:`~torchalign.types.ShiftField` u is the *backward* residual of a warp W over the reference, in pixels
    (x, y): ``aligned(q) = frame(W⁻¹ q + u(q))``. Coefficient (i, j) belongs to the point
    ``origin + (j, i) · spacing``. Beyond its nodes a field keeps the value at its border. Fields are of lead
    (..., T), warps (..., T, 2 or 3, 3), points (..., T, K, 2), all in pixels (x, y).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchalign.functional.affine import compose_warps, invert_warp, transform_points
from torchalign.types import ShiftField

__all__ = [
    "compose_fields",
    "field_at",
    "field_at_points",
    "field_lengths",
    "fit_nodes",
    "invert_field",
    "is_zero",
    "lattice_shifts",
    "move_origin",
    "rescale_field",
    "sigma_at",
    "spline_basis",
    "spline_slope",
    "warp_points",
]

# Fixed-point steps of an inverse: each is as much nearer as the field's derivative is smaller than 1.
_INVERSE_STEPS = 12


def spline_basis(position: Tensor, nodes: int) -> Tensor:
    """(..., L) positions in units of nodes → (..., L, nodes): the cubic B-spline of every node there.

    >>> spline_basis(torch.tensor([1.0]), 3)
    tensor([[0.1667, 0.6667, 0.1667]])
    """
    distance = (position[..., None] - torch.arange(nodes, device=position.device)).abs()
    near = 2 / 3 - distance.square() * (1 - 0.5 * distance)
    far = (2 - distance).clamp(min=0).pow(3) / 6
    return torch.where(distance < 1, near, far)


def spline_slope(position: Tensor, nodes: int) -> Tensor:
    """The derivative of :func:`spline_basis`, per unit of nodes.

    >>> spline_slope(torch.tensor([1.0]), 3) + 0.0  # of no sign
    tensor([[-0.5000,  0.0000,  0.5000]])
    """
    signed = position[..., None] - torch.arange(nodes, device=position.device)
    distance = signed.abs()
    near = distance * (1.5 * distance - 2)
    far = -0.5 * (2 - distance).clamp(min=0).square()
    return torch.where(distance < 1, near, far) * signed.sign()


def _bases(field: ShiftField, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The splines of the nodes at rows y (h,) and columns x (w,), in pixels, (..., T, h, n) and (..., T, w, m).

    Or at those of points, both (..., T, K).
    """
    bases = []
    for axis, at in ((1, y), (0, x)):
        nodes = field.coefficients.shape[-1 - axis]
        origin, spacing = field.origin[..., axis, None], field.spacing[..., axis, None]
        bases.append(spline_basis(((at - origin) / spacing).clamp(1, nodes - 2), nodes))
    return bases[0], bases[1]


def field_at(field: ShiftField, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The field along x and y, two of (..., T, h, w), on a grid of columns x (w,) and rows y (h,) of the frame.

    >>> field = ShiftField(torch.full((2, 4, 4), 0.25), torch.zeros(4, 4), torch.tensor([-8.0, -8.0]),
    ...     torch.tensor([8.0, 8.0]))
    >>> field_at(field, torch.arange(3.0), torch.arange(2.0))[0]
    tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500]])
    """
    down, along = (basis.unsqueeze(-3) for basis in _bases(field, x, y))
    dx, dy = torch.matmul(torch.matmul(down, field.coefficients), along.mT).unbind(-3)
    return dx, dy


def lattice_shifts(field: ShiftField, size: tuple[int, int], step: int, like: Tensor) -> Tensor:
    """(..., T, 2, ⌈H / step⌉, ⌈W / step⌉): the field at every ``step``-th pixel of a frame of (H, W), as ``like``."""
    y, x = (torch.arange(0, length, step, device=like.device, dtype=like.dtype) for length in size)
    return torch.stack(field_at(ShiftField(*(part.to(like.dtype) for part in field)), x, y), -3)


def sigma_at(field: ShiftField, x: Tensor, y: Tensor) -> Tensor:
    """(..., T, h, w): the predicted error of the field on a grid of rows y (h,) and columns x (w,), in pixels.

    Linear between the nodes.
    """
    hats = []
    for axis, at in ((1, y), (0, x)):
        nodes = field.sigma.shape[-1 - axis]
        position = ((at - field.origin[..., axis, None]) / field.spacing[..., axis, None]).clamp(0, nodes - 1)
        hats.append((1 - (position[..., None] - torch.arange(nodes, device=at.device)).abs()).clamp(min=0))
    # where nothing is known it is inf, which must not spread beyond its neighbours
    known = field.sigma.nan_to_num(posinf=torch.finfo(field.sigma.dtype).max ** 0.5)
    return torch.matmul(torch.matmul(hats[0], known), hats[1].mT)


def field_at_points(field: ShiftField, points: Tensor) -> Tensor:
    """(..., T, K, 2): the field at single points of the reference."""
    down, along = (basis.unsqueeze(-3) for basis in _bases(field, *points.unbind(-1)))  # (..., T, 1, K, n)
    return (torch.matmul(down, field.coefficients) * along).sum(-1).mT


def field_lengths(field: ShiftField, size: tuple[int, int]) -> Tensor:
    """(..., T, K): how long the field is at every eighth pixel of a frame of (H, W), in pixels."""
    return torch.hypot(*lattice_shifts(field, size, 8, field.coefficients).unbind(-3)).flatten(-2)


def is_zero(field: ShiftField) -> Tensor:
    """(..., T) bool: frames that the field does not shift."""
    return (field.coefficients == 0).flatten(-3).all(-1)


def move_origin(field: ShiftField, origin: Tensor | Sequence[float]) -> ShiftField:
    """The same field seen from another origin, (x, y) in pixels: ``p' = p − origin``, as of a crop.

    >>> corner = torch.tensor([-8.0, -8.0])
    >>> field = ShiftField(torch.zeros(2, 4, 4), torch.zeros(4, 4), corner, -corner)
    >>> move_origin(field, (3, 5)).origin
    tensor([-11., -13.])
    """
    if isinstance(origin, Tensor):
        return field._replace(origin=field.origin - origin)
    # number by number: a list would be copied from the host
    x, y = field.origin.unbind(-1)
    return field._replace(origin=torch.stack((x - origin[0], y - origin[1]), -1))


def rescale_field(field: ShiftField, scale: float | Sequence[float]) -> ShiftField:
    """The same field on another pixel size, corners of the frame kept in place.

    Args:
        field: in pixels of the old size.
        scale: **old pixel size / new pixel size**, a number or a pair (x, y), as of
            :func:`~torchalign.functional.affine.rescale_warp`.

    >>> corner = torch.tensor([-8.0, -8.0])
    >>> field = ShiftField(torch.ones(2, 4, 4), torch.ones(4, 4), corner, -corner)
    >>> finer = rescale_field(field, 2)
    >>> finer.origin, finer.spacing, finer.coefficients[0, 0, 0]
    (tensor([-15.5000, -15.5000]), tensor([16., 16.]), tensor(2.))
    """
    sx, sy = (scale, scale) if isinstance(scale, (int, float)) else scale
    cx, cy = field.coefficients.unbind(-3)
    (ox, oy), (px, py) = field.origin.unbind(-1), field.spacing.unbind(-1)
    return ShiftField(
        torch.stack((cx * sx, cy * sy), -3),
        field.sigma * (0.5 * (sx * sx + sy * sy)) ** 0.5,
        torch.stack((sx * (ox + 0.5) - 0.5, sy * (oy + 0.5) - 0.5), -1),
        torch.stack((px * sx, py * sy), -1),
    )


def warp_points(warp: Tensor, field: ShiftField | None, points: Tensor) -> Tensor:
    """Where points of the moving frame come to lie on the reference, by fixed-point iteration.

    Of ``p = W⁻¹ q + u(q)``, q = W (p − u(q)).
    """
    found = transform_points(warp, points)
    if field is None:
        return found
    for _ in range(_INVERSE_STEPS):
        found = transform_points(warp, points - field_at_points(field, found))
    return found


def fit_nodes(values: Tensor) -> Tensor:
    """The coefficients of the field that has given values at its nodes.

    Args:
        values: (..., n, m), n and m ≥ 3, at the nodes; the outermost are those of the nodes next to them.

    >>> fit_nodes(torch.ones(4, 4)).allclose(torch.ones(4, 4))
    True
    """
    for _ in range(2):
        nodes = values.shape[-2]
        at = torch.arange(nodes, device=values.device, dtype=values.dtype)
        inner = at.clamp(1, nodes - 2)
        # beyond the last inner nodes straight on: no second difference there
        distance = (inner[:, None] - at).abs()
        straight = torch.where(distance == 0, -2.0, (distance == 1).to(at.dtype))
        outer = (at != inner)[:, None]
        matrix = torch.where(outer, straight, spline_basis(inner, nodes))
        values = torch.matmul(torch.linalg.inv_ex(matrix).inverse, torch.where(outer, 0.0, values)).mT
    return values


def _node_axes(field: ShiftField) -> tuple[Tensor, Tensor]:
    """X (..., T, m) and y (..., T, n) of the nodes, the outermost at those next to them."""
    axes = []
    for axis in (0, 1):
        count, like = field.coefficients.shape[-1 - axis], field.origin
        at = torch.arange(count, device=like.device, dtype=like.dtype).clamp(1, count - 2)
        axes.append(field.origin[..., axis, None] + at * field.spacing[..., axis, None])
    return axes[0], axes[1]


def _node_points(field: ShiftField) -> Tensor:
    """(..., T, n·m, 2): the same, node by node."""
    x, y = _node_axes(field)
    shape = (*field.coefficients.shape[:-3], *field.coefficients.shape[-2:])
    points = torch.stack((x[..., None, :].expand(shape), y[..., :, None].expand(shape)), -1)
    return points.flatten(-3, -2)


def _through_nodes(field: ShiftField, values: Tensor) -> ShiftField:
    """The field of values (..., T, n·m, 2) at the nodes of another one."""
    lattice = values.mT.reshape(field.coefficients.shape)
    return field._replace(coefficients=fit_nodes(lattice))


def compose_fields(
    first: Tensor, first_field: ShiftField, second: Tensor, second_field: ShiftField
) -> tuple[Tensor, ShiftField]:
    """One warp and field that do what two do, one after the other.

    With p = W₂⁻¹ q + u₂(q), ``aligned(q) = frame(W₁⁻¹ p + u₁(p))``. The result's field goes through the exact
    values at the second field's nodes, and is a spline between them. The warp is ``second ∘ first``.
    """
    warp = compose_warps(first, second)
    nodes = _node_points(second_field)
    between = transform_points(invert_warp(second), nodes) + field_at_points(second_field, nodes)
    source = transform_points(invert_warp(first), between) + field_at_points(first_field, between)
    values = source - transform_points(invert_warp(warp), nodes)
    combined = _through_nodes(second_field, values)
    sigma = torch.hypot(second_field.sigma, sigma_at(first_field, *_node_axes(second_field)))
    return warp, combined._replace(sigma=sigma)


def invert_field(warp: Tensor, field: ShiftField) -> tuple[Tensor, ShiftField]:
    """The inverse of a warp, and its field on the same nodes, by fixed-point iteration.

    From the reference back to the moving frame. The field's derivative must be below 1.
    """
    nodes = _node_points(field)
    values = warp_points(warp, field, nodes) - transform_points(warp, nodes)
    return invert_warp(warp), _through_nodes(field, values)
