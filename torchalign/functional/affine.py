"""The algebra of warps: invert, compose, move the origin, change the pixel size, map points.

Convention (the whole library's):
    A *warp* maps **moving → reference**, ``p_ref = A · p_mov + t``, with points ``(x, y)`` in pixels: x to
    the right, y down, integers at pixel **centres**, ``(0, 0)`` the centre of the top-left pixel. It is
    stored as ``[A | t]``, shape ``(..., 2, 3)``, or as a homography, shape ``(..., 3, 3)``, in homogeneous
    coordinates. A frame is resampled with the inverse: ``aligned(p) = frame(warp⁻¹ p)``.

All functions are pure, differentiable, take any leading batch dimensions and never synchronise with the
device. Matrices of two or three rows are multiplied element by element: a matrix product would be rounded to
half precision under autocast and to TF32 on recent GPUs, worth tenths of a pixel at the far end of a large
scene.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchalign._check import check_floating, message
from torchalign._host import keeps_tables

__all__ = [
    "adjugate",
    "are_finite",
    "center_displacement",
    "change_origin",
    "compose_warps",
    "composed",
    "conjugated",
    "finite_warp",
    "from_homogeneous",
    "identity_warp",
    "invert_warp",
    "mapped",
    "multiply",
    "rescale_warp",
    "scaled",
    "split_at_center",
    "to_homogeneous",
    "transform_points",
    "translation_warp",
    "unit_corner",
    "unit_matrix",
]


def _check_warp(warp: Tensor, name: str = "warp") -> None:
    check_floating(name, warp, "(..., 2, 3) or (..., 3, 3)")
    if warp.ndim < 2 or tuple(warp.shape[-2:]) not in ((2, 3), (3, 3)):
        expected, cure = (
            "shape (..., 2, 3) or (..., 3, 3)",
            "build one with translation_warp or identity_warp",
        )
        raise ValueError(message(name, expected, tuple(warp.shape), cure))


def _check_pair(tensor: Tensor, name: str) -> None:
    check_floating(name, tensor, "(..., 2) in (x, y) order")
    if tensor.ndim < 1 or tensor.shape[-1] != 2:
        raise ValueError(f"{name}: expected shape (..., 2) in (x, y) order, got {tuple(tensor.shape)}")


def _check_same_kind(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    if first.dtype != second.dtype:
        expected, cure = f"the dtype of {first_name}, {first.dtype}", "convert one of them with .to(dtype)"
        raise TypeError(message(second_name, expected, second.dtype, cure))
    if first.device != second.device:
        expected, cure = f"the device of {first_name}, {first.device}", "move one of them with .to(device)"
        raise ValueError(message(second_name, expected, second.device, cure))


def _as_pair(value: Tensor | float | Sequence[float], like: Tensor, name: str) -> Tensor:
    """A number, an (x, y) pair, or a tensor (..., 2), on the device and dtype of ``like``."""
    if isinstance(value, Tensor):
        _check_pair(value, name)
        _check_same_kind(like, value, "warp", name)
        return value
    if isinstance(value, (int, float)):
        return like.new_full((2,), value)
    values = list(value)
    if len(values) != 2:
        raise ValueError(f"{name}: expected a pair (x, y), got {len(values)} values")
    return torch.stack([like.new_full((), component) for component in values])  # (2,)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Product of (..., n, k) and (..., k, m), element by element, in the operands' own precision."""
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)  # (..., n, k, 1) · (..., 1, k, m)


def _assemble(linear: Tensor, offset: Tensor) -> Tensor:
    """``[linear | offset]`` from (..., 2, 2) and (..., 2), batch dimensions broadcast."""
    column = offset.unsqueeze(-1)  # (..., 2, 1)
    # adding nothing broadcasts the batch dimensions, whichever of the two lacks some
    return torch.cat((linear + torch.zeros_like(column), column + torch.zeros_like(linear[..., :1])), -1)


def identity_warp(
    *batch_shape: int,
    homography: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The warp that moves nothing.

    Args:
        *batch_shape: leading sizes, for example the number of frames.
        homography: make (3, 3) matrices instead of (2, 3).
        device: where to make it; torch's default if ``None``.
        dtype: a floating dtype; torch's default if ``None``.

    Returns:
        ``(*batch_shape, 2, 3)`` or ``(*batch_shape, 3, 3)``, a tensor of its own (no shared memory).

    Example:
        >>> identity_warp(5).shape
        torch.Size([5, 2, 3])
        >>> identity_warp(homography=True)
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    identity = torch.eye(3 if homography else 2, 3, device=device, dtype=dtype)
    return identity.expand(*batch_shape, *identity.shape).clone()


@keeps_tables
def unit_matrix(length: int, *, like: Tensor) -> Tensor:
    """The unit matrix, in the dtype and on the device of ``like``; made once, not to be changed."""
    return torch.eye(length, dtype=like.dtype, device=like.device)


def translation_warp(shift: Tensor) -> Tensor:
    """The warp ``p_ref = p_mov + shift``.

    Args:
        shift: (..., 2), the displacement (x, y) in pixels of the content, from moving to reference.

    Returns:
        (..., 2, 3).

    Raises:
        TypeError: ``shift`` is no floating tensor.
        ValueError: its last dimension is not 2.

    Example:
        >>> translation_warp(torch.tensor([1.5, -2.0]))
        tensor([[ 1.0000,  0.0000,  1.5000],
                [ 0.0000,  1.0000, -2.0000]])
    """
    _check_pair(shift, "shift")
    linear = torch.eye(2, device=shift.device, dtype=shift.dtype)
    return _assemble(linear, shift)  # (..., 2, 3)


def to_homogeneous(warp: Tensor) -> Tensor:
    """Append the row (0, 0, 1); a (..., 3, 3) warp is returned as it is.

    Args:
        warp: (..., 2, 3) or (..., 3, 3).

    Returns:
        (..., 3, 3).

    Example:
        >>> to_homogeneous(translation_warp(torch.tensor([1.5, -2.0])))
        tensor([[ 1.0000,  0.0000,  1.5000],
                [ 0.0000,  1.0000, -2.0000],
                [ 0.0000,  0.0000,  1.0000]])
    """
    _check_warp(warp)
    if warp.shape[-2] == 3:
        return warp
    last_row = torch.eye(3, device=warp.device, dtype=warp.dtype)[2:]  # (1, 3)
    return torch.cat((warp, last_row.expand(*warp.shape[:-2], 1, 3)), -2)


def from_homogeneous(warp: Tensor) -> Tensor:
    """Drop the last row of an **affine** (..., 3, 3) warp; a (..., 2, 3) warp is returned as it is.

    The row must be (0, 0, s): the rest is divided by s. That the first two entries are 0 is the caller's
    knowledge; it is not checked, as the check would make the host wait for the device.

    Args:
        warp: (..., 2, 3) or (..., 3, 3).

    Returns:
        (..., 2, 3).

    Example:
        >>> from_homogeneous(2 * torch.eye(3))
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    _check_warp(warp)
    return warp if warp.shape[-2] == 2 else warp[..., :2, :] / warp[..., 2:, 2:]


def unit_corner(warp: Tensor) -> Tensor:
    """A homography divided by its last entry, which does not change it; a (..., 2, 3) warp is returned as it is."""
    return warp if warp.shape[-2] == 2 else warp / warp[..., 2:, 2:]


def are_finite(matrices: Tensor) -> Tensor:
    """(...,) bool: of (..., n, m), all of whose entries are finite."""
    return torch.linalg.vector_norm(matrices.detach(), torch.inf, dim=(-2, -1)) < torch.inf


def finite_warp(warp: Tensor) -> tuple[Tensor, Tensor]:
    """The identity instead of warps (..., 2 or 3, 3) that are not finite; and which are, (...,) bool."""
    finite = are_finite(warp)
    identity = identity_warp(homography=warp.shape[-2] == 3, device=warp.device, dtype=warp.dtype)
    return torch.where(finite[..., None, None], warp, identity), finite


def invert_warp(warp: Tensor) -> Tensor:
    r"""The warp of the way back, reference → moving.

    .. math:: p_{mov} = A^{-1} p_{ref} - A^{-1} t

    in closed form (adjugate over determinant). A singular matrix does not raise, for one bad frame must not
    stop a batch: that matrix comes back with infinities and NaN, the others are not touched.

    Args:
        warp: (..., 2, 3) or (..., 3, 3).

    Returns:
        The inverse, in the shape of ``warp``.

    Example:
        >>> invert_warp(torch.tensor([[2.0, 0.0, 4.0], [0.0, 4.0, 8.0]]))
        tensor([[ 0.5000, -0.0000, -2.0000],
                [-0.0000,  0.2500, -2.0000]])
    """
    _check_warp(warp)
    if warp.shape[-2] == 3:
        numerator, determinant = adjugate(warp)
        return numerator / determinant[..., None, None]
    (a, b, x), (c, d, y) = (row.unbind(-1) for row in warp.unbind(-2))
    numerator = torch.stack((d, -b, b * y - d * x, -c, a, c * x - a * y), -1)
    return numerator.reshape(warp.shape) / (a * d - b * c)[..., None, None]


def adjugate(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Adjugate (..., 3, 3) and determinant (...,) of (..., 3, 3); its columns are cross products of rows."""
    first, second, third = matrix.unbind(-2)
    columns = (
        torch.linalg.cross(second, third),
        torch.linalg.cross(third, first),
        torch.linalg.cross(first, second),
    )
    return torch.stack(columns, -1), (first * columns[0]).sum(-1)


def compose_warps(first: Tensor, second: Tensor) -> Tensor:
    """One warp that does ``first`` and then ``second``: ``p → second(first(p))``, the product S·F.

    Args:
        first: (..., 2, 3) or (..., 3, 3), what is applied to the moving frame's points first.
        second: the same, applied to what comes out; batch dimensions broadcast.

    Returns:
        (..., 2, 3) if both are, else (..., 3, 3).

    Raises:
        TypeError: the dtypes differ, or one is not floating.
        ValueError: a shape is no warp's, or the devices differ.

    Example:
        >>> zoom = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> shift = translation_warp(torch.tensor([1.0, 0.0]))
        >>> compose_warps(zoom, shift)[0], compose_warps(shift, zoom)[0]
        (tensor([2., 0., 1.]), tensor([2., 0., 2.]))
    """
    _check_warp(first, "first")
    _check_warp(second, "second")
    _check_same_kind(first, second, "first", "second")
    return composed(first, second)


def composed(first: Tensor, second: Tensor) -> Tensor:
    """:func:`compose_warps` of warps that are known to be some, for the loops of an estimate."""
    if first.shape[-2] == 2 and second.shape[-2] == 2:
        linear = multiply(second[..., :2], first[..., :2])
        return _assemble(linear, _apply_linear(second, first[..., 2]) + second[..., 2])
    return multiply(to_homogeneous(second), to_homogeneous(first))


def _apply_linear(warp: Tensor, vector: Tensor) -> Tensor:
    """``A · vector`` for (..., 2, ≥2) and (..., 2)."""
    return (warp[..., :2, :2] * vector.unsqueeze(-2)).sum(-1)


def transform_points(warp: Tensor, points: Tensor) -> Tensor:
    """Where points of the moving frame lie in the reference, ``A · p + t`` (a homography divides).

    Args:
        warp: (..., 2, 3) or (..., 3, 3).
        points: (..., N, 2) in (x, y), in the moving frame's pixels; batch dimensions broadcast.

    Returns:
        (..., N, 2) in the reference's pixels. Infinite or NaN where a homography sends a point to infinity.

    Raises:
        TypeError: the dtypes differ, or one is not floating.
        ValueError: a shape does not fit, or the devices differ.

    Example:
        >>> warp = translation_warp(torch.tensor([1.5, -2.0]))
        >>> transform_points(warp, torch.tensor([[0.0, 0.0], [10.0, 20.0]]))
        tensor([[ 1.5000, -2.0000],
                [11.5000, 18.0000]])
    """
    _check_warp(warp)
    _check_pair(points, "points")
    _check_same_kind(warp, points, "warp", "points")
    if points.ndim < 2:
        raise ValueError(f"points: expected shape (..., N, 2), got {tuple(points.shape)}; use points[None]")
    return mapped(warp, points)


def mapped(warp: Tensor, points: Tensor) -> Tensor:
    """:func:`transform_points` of what is known to be a warp and points, for the loops of an estimate."""
    x, y = points.unbind(-1)  # (..., N)
    rows = warp[..., None, :, :]  # (..., 1, 2 or 3, 3), one matrix for all N points
    moved = torch.addcmul(rows[..., 2], rows[..., 0], x.unsqueeze(-1))
    moved = torch.addcmul(moved, rows[..., 1], y.unsqueeze(-1))  # (..., N, 2 or 3)
    return moved if warp.shape[-2] == 2 else moved[..., :2] / moved[..., 2:]


def change_origin(warp: Tensor, origin: Tensor | Sequence[float]) -> Tensor:
    r"""The same motion, in coordinates whose origin sits at ``origin`` of the old ones (a crop, for example).

    With T(o) the translation by o, new coordinates are ``p' = p − o``, so the warp is conjugated:

    .. math:: W' = T(-o) \; W \; T(o), \qquad A' = A, \quad t' = t + A\,o - o

    if affine. A warp estimated on a crop whose top-left pixel is (x₀, y₀) of the whole frame goes back to
    the whole frame's coordinates with ``origin=(-x₀, -y₀)``. A pure translation does not change.

    Args:
        warp: (..., 2, 3) or (..., 3, 3).
        origin: the new origin (x, y), in old pixels: a pair, or a tensor (..., 2) of the warp's dtype and
            device.

    Returns:
        (..., 2, 3) or (..., 3, 3), like ``warp``; batch dimensions broadcast.

    Example:
        >>> half_turn = torch.tensor([[-1.0, 0.0, 10.0], [0.0, -1.0, 6.0]])  # about (5, 3)
        >>> change_origin(half_turn, (5, 3))
        tensor([[-1.,  0.,  0.],
                [ 0., -1.,  0.]])
    """
    _check_warp(warp)
    return conjugated(warp, _as_pair(origin, warp, "origin"))


def conjugated(warp: Tensor, offset: Tensor) -> Tensor:
    """:func:`change_origin` of what is known to be a warp and an offset (..., 2), for the loops of an estimate."""
    if warp.shape[-2] == 2:
        # (A − I)·o, not A·o − o: for a warp near the identity the two large terms would cancel
        identity = torch.eye(2, device=warp.device, dtype=warp.dtype)
        moved = ((warp[..., :2] - identity) * offset.unsqueeze(-2)).sum(-1)
        return _assemble(warp[..., :2], warp[..., 2] + moved)
    there, back = (to_homogeneous(translation_warp(move)) for move in (-offset, offset))
    return multiply(multiply(there, warp), back)


def scaled(warp: Tensor, factor: float) -> Tensor:
    """The same motion, or shift (..., 2), in units that are 1 / factor as long, about the same origin: S W S⁻¹."""
    if warp.shape[-1] == 2:
        return factor * warp
    upper = torch.cat((warp[..., :2, :2], warp[..., :2, 2:] * factor), -1)
    if warp.shape[-2] == 2:
        return upper
    return torch.cat((upper, torch.cat((warp[..., 2:, :2] / factor, warp[..., 2:, 2:]), -1)), -2)


def rescale_warp(warp: Tensor, scale: Tensor | float | Sequence[float]) -> Tensor:
    r"""The same motion on another pixel size, corners of the frame kept in place.

    Integers are pixel centres, so a point moves to ``p' = s (p + 0.5) − 0.5``, and with S that map

    .. math:: W' = S \; W \; S^{-1}

    Args:
        warp: (..., 2, 3) or (..., 3, 3).
        scale: **old pixel size / new pixel size** = new width / old width: 2 takes a warp from 20 m to 10 m
            pixels. A number, a pair (x, y), or a tensor (..., 2) of the warp's dtype and device. Not 0.

    Returns:
        (..., 2, 3) or (..., 3, 3), like ``warp``; batch dimensions broadcast.

    Example:
        >>> rescale_warp(translation_warp(torch.tensor([1.5, -2.0])), 2)
        tensor([[ 1.,  0.,  3.],
                [ 0.,  1., -4.]])
    """
    _check_warp(warp)
    factor = _as_pair(scale, warp, "scale")  # (..., 2)
    # From corner to corner the rescaling is linear: go there by half a pixel, scale, and come back.
    cornered = change_origin(warp, (-0.5, -0.5))
    if warp.shape[-2] == 3:
        factor = torch.cat((factor, torch.ones_like(factor[..., :1])), -1)  # (..., 3)
        scaled = cornered * factor.unsqueeze(-1) / factor.unsqueeze(-2)
    else:
        linear = cornered[..., :2] * factor.unsqueeze(-1) / factor.unsqueeze(-2)
        scaled = _assemble(linear, cornered[..., 2] * factor)
    return change_origin(scaled, (0.5, 0.5))


def center_displacement(warp: Tensor, size: tuple[int, int]) -> Tensor:
    """How far the centre of a frame moves, ``W(c) − c`` with ``c = ((W − 1) / 2, (H − 1) / 2)``.

    It means the same for every motion model, whereas the last column of a rotation about a corner does not.

    Args:
        warp: (..., 2, 3) or (..., 3, 3).
        size: (H, W) in pixels.

    Returns:
        (..., 2), (x, y) in pixels.

    Example:
        >>> quarter_turn = torch.tensor([[0.0, -1.0, 9.0], [1.0, 0.0, 0.0]])  # about (4.5, 4.5)
        >>> center_displacement(quarter_turn, (10, 10))
        tensor([0., 0.])
    """
    _check_warp(warp)
    height, width = size
    center = ((width - 1) / 2, (height - 1) / 2)
    moved = change_origin(warp, center)  # seen from the centre, the centre is (0, 0)
    return moved[..., 2] if warp.shape[-2] == 2 else moved[..., :2, 2] / moved[..., 2:, 2]


def split_at_center(warp: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A warp as a motion that leaves the frame's centre in place, and then a translation.

    Args:
        warp: (..., 2, 3) or (..., 3, 3).
        size: (H, W) in pixels.

    Returns:
        The translation (..., 2), and the centred motion, in the shape of ``warp``, which is
        ``translation ∘ centred``. That of a pure translation is the exact identity.

    Example:
        >>> shift, centred = split_at_center(torch.tensor([[0.0, -1.0, 10.0], [1.0, 0.0, 0.0]]), (10, 10))
        >>> shift, transform_points(centred, torch.tensor([[4.5, 4.5]]))
        (tensor([1., 0.]), tensor([[4.5000, 4.5000]]))
    """
    translation = center_displacement(warp, size)
    centred = compose_warps(warp, translation_warp(-translation))
    # for a pure translation the two cancel to the last bit only if told so
    identity = identity_warp(homography=warp.shape[-2] == 3, device=warp.device, dtype=warp.dtype)
    plain = (warp[..., :2] == identity[..., :2]).flatten(-2).all(-1)
    return translation, torch.where(plain[..., None, None], identity, centred)
