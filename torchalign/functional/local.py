r"""Local shifts: a smooth field on top of a global warp, by regularised least squares on the texture.

The chain, each link a function that works alone:

1. :func:`prepare_ground`, and the same for the frames: the band limit, kept as cubic B-spline coefficients, so that
   a frame can be read at any position without an interpolation that would pull towards whole pixels.
2. :func:`estimate_shifts`: Gauss–Newton on all samples at once. The field is a cubic B-spline over a lattice of
   nodes, the frame is read at :math:`W^{-1} q + u(q)`, its local contrast compared with the reference's, every
   sample weighted by similarity, masks and its own residual variance. First in a part of the band.
3. The prior: the energy of the field's derivatives to the third, times a smoothness that is chosen for every frame
   by marginal likelihood, among eight values.
4. The posterior: the predicted error of the field at every node, and the evidence in nats for a field against none.

Convention:
    The field u is the *backward* residual over the reference, in pixels (x, y):
    ``aligned(q) = frame(W⁻¹ q + u(q))``. Coefficient (i, j) belongs to the point ``origin + (j, i) · spacing``.

References:
    Lucas & Kanade 1981 (least squares on a linearised image); Unser 1999, doi:10.1109/79.799930 (B-splines in image
    processing); MacKay 1992, doi:10.1162/neco.1992.4.3.415 (the evidence for a smoothness).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import keeps_tables, kernels_for, launches_kernels
from torchalign.functional import lattice
from torchalign.functional.affine import change_origin
from torchalign.functional.common_ground import agreement
from torchalign.functional.fourier import irfft2, rfft2
from torchalign.functional.lattice import ROWS, Blocks, Factor, ProductTables
from torchalign.functional.low_pass import band_response
from torchalign.functional.sampling import Taps, spline_response, spline_weights, weighted_sum
from torchalign.functional.shift_field import spline_basis, spline_slope
from torchalign.functional.smoothing import triangle_mean
from torchalign.functional.texture import centre, local_contrast, usable_share
from torchalign.functional.warp import backward_displacement
from torchalign.functional.working_grid import WorkingGrid, working_size

__all__ = [
    "Ground",
    "LatticeOptions",
    "LocalShifts",
    "Mosaic",
    "acceptable",
    "estimate_shifts",
    "lattice_size",
    "prepare_ground",
]

# The bands, in cycles per pixel, and the rounds in each.
# (Wider than where shifts of a whole frame are estimated: there is less ground to average over, and what is folded
# back pulls by less than what is missing.)
_BANDS = (0.125, 0.32)
_ROUNDS = (2, 4)
# The smoothness before the first round in the last band, in which it is chosen.
_FIRST_SMOOTHNESS = 36.0
# The last rounds carry the gradient. Each comes ten times as near to that of the implicit function theorem.
_WITH_GRADIENT = 4
# What is predicted of errors is that of a field of this share of the smoothness, which is known to a factor; and of
# that, errors on simulated frames of all kinds are this share (benchmarks/local.py).
_SIGMA_SMOOTHNESS, _SIGMA_CALIBRATION = 1 / 3, 0.8
# Ground counts by half in the score where the field is known to so many pixels only.
_KNOWN = 0.1
# A field must make the frame so much likelier, in nats, and nowhere fold it: det(I + ∂u) exceeds this.
_LEAST_EVIDENCE, _LEAST_JACOBIAN = 20.0, 0.5
# Larger frames are cut into tiles of so many nodes a side at most, which overlap by so many.
_LARGEST_TILE, _OVERLAP = 34, 6
# Samples of the working grid are correlated: so many of them say as much as one.
_REDUNDANCY = 1.1
# The residual variance of a sample is that around it, but no less than this share of the frame's.
_LEAST_VARIANCE = 0.25
# Pixels by which the frame is continued, mirrored, beyond its border.
_PAD = 16
# The outermost pixels are made of what was mirrored: weights rise over so many.
_EDGE = 6.0
# No coefficient moves by more pixels in one round.
_LARGEST_STEP = 1.5


class _TileGround(NamedTuple):
    """Of one tile, one row a band."""

    fields: tuple[Tensor, ...]  # (N, h, w), local contrast on the working grid
    weights: tuple[Tensor, ...]  # (N, h, w) in [0, 1]
    flat: Tensor  # (N,) bool


class Ground(NamedTuple):
    """What local shifts need of a reference, tile by tile, see :func:`prepare_ground`."""

    tiles: tuple[_TileGround, ...]


class LocalShifts(NamedTuple):
    """What :func:`estimate_shifts` finds, one row a frame."""

    coefficients: Tensor  #: (N, 2, n, m), of cubic B-splines, in pixels (x, y)
    sigma: Tensor  #: (N, n, m), predicted 1-σ error per axis of the field at every node, in pixels
    covariance: Tensor  #: (N, 2, 2), of the field at the frame's centre, px²
    evidence: Tensor  #: (N,), the logarithm of how much likelier the frame is with a field than without
    largest: Tensor  #: (N,), of the field's length, in pixels
    least_jacobian: Tensor  #: (N,), the smallest determinant of the derivative of ``q + u(q)``
    flat: Tensor  #: (N,) bool, frame or reference has no texture
    inliers: Tensor  #: (N, h, w), weights of common ground over the reference


# ------------------------------------------------------------------------------------------------ the lattice


def lattice_size(size: tuple[int, int], spacing: int) -> tuple[int, int]:
    """Nodes (n, m) of the lattice over a frame (H, W): one beyond each border at least, rows in multiples of three.

    They are so many pixels apart, the first one at (−spacing, −spacing).

    >>> lattice_size((256, 256), 24)
    (15, 14)
    """
    rows, columns = (-(-(length - 1) // spacing) + 3 for length in size)
    return -(-rows // ROWS) * ROWS, columns


# ----------------------------------------------------------------------------------- what is compared with what


class _Level(NamedTuple):
    """One band: its working grid over the frame, and the lattice's splines there."""

    grid: WorkingGrid
    y: Tensor  # (h,), of the samples, in pixels
    x: Tensor  # (w,)
    at: Tensor  # (2, h, w), the same, (x, y)
    size: Tensor  # (2, 1, 1), (width, height) of the frame
    edge: Tensor  # (h, w), what a sample of the reference counts: less at the border
    down: Tensor  # (h, n)
    along: Tensor  # (w, m)
    tables: ProductTables
    gain: Tensor  # (H + 2P, (W + 2P) // 2 + 1), from the padded frame's spectrum to that of B-spline coefficients
    spacing: int


@keeps_tables
def _level(frame: tuple[int, int], band: float, spacing: int, *, like: Tensor) -> _Level:
    grid = WorkingGrid.of(frame, working_size(frame, band), band, like)
    y, x = (
        torch.arange(samples, device=like.device, dtype=like.dtype) * (length / samples)
        for samples, length in zip(grid.size, frame, strict=True)
    )
    rows, columns = lattice_size(frame, spacing)
    down, along = spline_basis(y / spacing + 1, rows), spline_basis(x / spacing + 1, columns)
    at = torch.stack(torch.broadcast_tensors(x, y[:, None]))  # type: ignore[no-untyped-call]
    size = torch.stack([like.new_full((1, 1), length) for length in frame[::-1]])
    edge = _edge(y, frame[0])[:, None] * _edge(x, frame[1])
    padded = (frame[0] + 2 * _PAD, frame[1] + 2 * _PAD)
    whole = WorkingGrid.of(padded, padded, band, like)
    by_y, by_x = (spline_response(frequency) for frequency in whole.frequencies)
    gain = band_response(whole.radius, band) / (by_y[:, None] * by_x)
    tables = lattice.product_tables(down, along)
    return _Level(grid, y, x, at, size, edge, down, along, tables, gain, spacing)


def _edge(position: Tensor, length: int) -> Tensor:
    from_border = torch.minimum(position, length - 1 - position)
    return ((from_border + 1) / _EDGE).clamp(0, 1)


def _backward(warp: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The displacement W⁻¹ q − q, broadcastable to (N, 2, h, w), of q = (x, y); ``warp`` may be a shift (N, 2)."""
    return (
        -warp[..., None, None] if warp.shape[-1] == 2 else torch.stack(backward_displacement(warp, x, y), 1)
    )


class _Frames(NamedTuple):
    """The moving frames in one band: what can be read at any position."""

    coefficients: Tensor  # (N, H + 2P, W + 2P), of cubic B-splines
    weights: Tensor | None  # (N, h, w) in [0, 1]


def _prepare_frames(image: Tensor, mask: Tensor | None, levels: list[_Level]) -> tuple[list[_Frames], Tensor]:
    """The spline coefficients of (N, H, W) in every band, in units of their deviation; and what is flat."""
    mean, centred, empty = centre(image, mask)
    size = (image.shape[-2] + 2 * _PAD, image.shape[-1] + 2 * _PAD)
    spectrum = rfft2(_continue(centred))
    noise = 32 * torch.finfo(image.dtype).eps * mean[..., 0, 0].abs()
    frames, flat = [], empty
    for level in levels:
        coefficients = irfft2(spectrum * level.gain, size)
        scale = coefficients.detach().square().mean((-2, -1)).sqrt()
        blank = (scale <= noise) | ~torch.isfinite(scale)
        coefficients = coefficients / torch.where(blank, 1.0, scale)[..., None, None]
        weights = None if mask is None else usable_share(mask, level.grid)
        frames.append(_Frames(coefficients, weights))
        flat = flat | blank
    return frames, flat


def _continue(image: Tensor) -> Tensor:
    """(N, H, W) → (N, H + 2·_PAD, W + 2·_PAD): mirrored, and where a small frame ends, its border goes on."""
    rows, columns = (min(_PAD, length - 1) for length in image.shape[-2:])
    mirrored = F.pad(image.unsqueeze(1), (columns, columns, rows, rows), mode="reflect")
    rest = (_PAD - columns, _PAD - columns, _PAD - rows, _PAD - rows)
    return F.pad(mirrored, rest, mode="replicate").squeeze(1)


def prepare_ground(image: Tensor, mask: Tensor | None = None, *, spacing: int = 24) -> Ground:
    """What local shifts need of a reference, made once for all frames that share it.

    Args:
        image: (N, H, W), finite.
        mask: bool, (N, H, W), True = usable, or ``None``.
        spacing: pixels from one node to the next.
    """
    windows = Mosaic((image.shape[-2], image.shape[-1]), spacing).windows()
    masks = [None if mask is None else mask[:, rows, columns] for rows, columns in windows]
    parts = zip(windows, masks, strict=True)
    return Ground(
        tuple(_tile_ground(image[:, rows, columns], usable, spacing) for (rows, columns), usable in parts)
    )


def _tile_ground(image: Tensor, mask: Tensor | None, spacing: int) -> _TileGround:
    size = (image.shape[-2], image.shape[-1])
    levels = [_level(size, band, spacing, like=image) for band in _BANDS]
    frames, flat = _prepare_frames(image, mask, levels)
    fields, weights = [], []
    for level, frame in zip(levels, frames, strict=True):
        field = _read_frames(frame, level, level.at[None])[0]
        fields.append(local_contrast(field, frame.weights))
        edge = level.edge.expand(field.shape)
        weights.append(edge if frame.weights is None else edge * frame.weights)
    return _TileGround(tuple(fields), tuple(weights), flat)


def _read_frames(frames: _Frames, level: _Level, at: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The frames at (1 or N, 2, h, w), (x, y); 1 inside, 0 outside; and how usable it is there; all (N, h, w)."""
    kernels = kernels_for(frames.coefficients, frames.weights, at)
    if kernels is not None:
        values, within, weights = kernels.read_splines(
            frames.coefficients, frames.weights, at, level.grid.frame
        )
        return values, within, None if frames.weights is None else weights
    (height, width), pad = level.grid.frame, _PAD
    count, (h, w) = frames.coefficients.shape[0], level.grid.size
    inside = ((at > -0.5) & (at < level.size - 0.5)).all(1)
    at = torch.minimum(at.nan_to_num(-pad).clamp(min=2 - pad), level.size + (pad - 3))
    whole = at.detach().floor()
    line = width + 2 * pad
    column, row = whole.long().unbind(1)
    first = row * line + column + (pad - 1) * (line + 1)
    first = first.expand(count, h, w).reshape(count, h * w)
    value = _sum_taps(frames.coefficients.flatten(1), first, line, at - whole)
    usable: Tensor | None = None
    if frames.weights is not None:
        near_y = ((row + 0.5) * (h / height) + 0.5).long().clamp(0, h - 1)
        near_x = ((column + 0.5) * (w / width) + 0.5).long().clamp(0, w - 1)
        near = (near_y * w + near_x).expand(count, h, w).reshape(count, h * w)
        usable = frames.weights.flatten(1).gather(1, near).reshape(count, h, w)
    return value, inside.to(value.dtype).expand(value.shape), usable


@keeps_tables
def _cubics(*, like: Tensor) -> Tensor:
    """(4, 4, 1, 1, 1): of the four spline weights the coefficients of 1, f, f² and f³, times 6."""
    entries = (1, 4, 1, 0), (-3, 0, 3, 0), (3, -6, 3, 0), (-1, 3, -3, 1)
    # made on the device, to which the host would have to copy them
    return (
        torch.stack([like.new_full((), entry) for row in entries for entry in row]).reshape(4, 4, 1, 1, 1) / 6
    )


def _sum_taps(flat: Tensor, first: Tensor, line: int, fraction: Tensor) -> Tensor:
    """(N, h, w): 4 × 4 coefficients from ``first`` (N, h·w) on, weighted for their fractions (N, 2, h, w)."""
    shape = (flat.shape[0], *fraction.shape[-2:])
    if launches_kernels(flat):  # all at once
        steps = torch.arange(4, device=flat.device)
        places = first[:, None] + (steps[:, None] * line + steps).flatten()[:, None]
        taps = flat.gather(1, places.flatten(1)).reshape(shape[0], 4, 4, *shape[1:])
        one, linear, square, cube = _cubics(like=flat)
        power = fraction[:, None]  # against (4, 1, 1, 1)
        wide = torch.addcmul(one, torch.addcmul(linear, torch.addcmul(square, cube, power), power), power)
        along, down = wide.unbind(2)  # (N, 4, h, w)
        return ((taps * along[:, None]).sum(2) * down).sum(1)
    tap = Taps(flat, line, first).at  # one by one, from the cache
    across, lines = (spline_weights(part) for part in fraction.unbind(1))
    return weighted_sum(lambda i, j: tap(i, j).reshape(shape), across, lines)


def _slopes(image: Tensor, level: _Level) -> tuple[Tensor, Tensor]:
    """Along x and y, per pixel: central differences of fourth order."""
    (rows, columns), (height, width) = level.grid.size, level.grid.frame
    padded = F.pad(image.unsqueeze(1), (2, 2, 2, 2), mode="replicate").squeeze(1)

    def slope(lines: Tensor, dim: int, samples_per_pixel: float) -> Tensor:
        two, one, _, other, far = (lines.narrow(dim, tap, image.shape[dim]) for tap in range(5))
        near = (other - one) * (2 / 3 * samples_per_pixel)
        return torch.sub(near, far - two, alpha=samples_per_pixel / 12)

    return slope(padded[..., 2:-2, :], -1, columns / width), slope(padded[..., 2:-2], -2, rows / height)


# ------------------------------------------------------------------------------------------------- the estimate


class _Equations(NamedTuple):
    """The linearised least squares of one round."""

    matrix: Blocks
    right: Tensor  # (N, 2, n, m)
    similarity: Tensor  # (N, h, w)


def _linearize(
    frames: _Frames, level: _Level, field: Tensor, weights: Tensor, start: Tensor, offset: Tensor
) -> _Equations:
    """Residuals of the local contrast, and their derivatives, at the field of coefficients ``offset`` (N, 2, n, m).

    The reference's contrast ``field`` and its weights are (1 or N, h, w), ``start`` (N, 2, h, w) is W⁻¹ q.
    """
    local = torch.matmul(torch.matmul(level.down, offset), level.along.mT)  # (N, 2, h, w)
    own, inside, usable = _read_frames(frames, level, start + local)
    own = local_contrast(own, usable)
    similarity, weighted = _weigh(own, field, inside, usable, weights)
    products, pull = _products_and_pull(own, field, weighted, local, level)
    matrix = lattice.normal_matrix(products, level.tables)
    right = torch.matmul(torch.matmul(level.down.mT, pull), level.along)
    return _Equations(matrix, right, similarity)


def _weigh(
    own: Tensor, field: Tensor, inside: Tensor, usable: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The similarity (N, h, w); and (2, N, h, w), the squared residuals times what they count, and that."""
    kernels = kernels_for(own, field, inside, usable, weights)
    if kernels is not None:
        return kernels.weigh(own, field, inside, usable, weights)
    similarity = agreement(own, field.expand(own.shape), fine=True)
    weight = similarity * inside * (weights if usable is None else usable * weights)
    return similarity, torch.stack((weight * (field - own).square(), weight))


def _products_and_pull(
    own: Tensor, field: Tensor, weighted: Tensor, local: Tensor, level: _Level
) -> tuple[Tensor, Tensor]:
    """(N, 3, h, w), products xx, xy, yy of the derivatives by a shift; (N, 2, h, w), those times the residual.

    The residual is that as a function of the whole field, not of the step; the products carry no gradient.
    """
    around = triangle_mean(weighted, 3)
    whole = weighted.sum((-2, -1))
    kernels = kernels_for(own, field, weighted, local)
    if kernels is not None:
        samples = [n / length for n, length in zip(level.grid.size, level.grid.frame, strict=True)]
        numbers = [*samples, _LEAST_VARIANCE, _REDUNDANCY]
        return kernels.differentiate(own, field, weighted[1], around, whole, local, numbers)
    square, count = whole[..., None, None].unbind()
    typical = square / count.clamp(min=1e-6)
    square, count = around.unbind()
    variance = (square / (count + 1e-3)).maximum(_LEAST_VARIANCE * typical) + 1e-6
    precision = weighted[1] / (variance * _REDUNDANCY)
    gx, gy = _slopes(torch.lerp(own, field.expand(own.shape), 0.5), level)
    px, py = precision * gx, precision * gy
    products = torch.stack((px * gx, px * gy, py * gy), 1).detach()
    residual, (ux, uy), (xx, xy, yy) = field - own, local.unbind(1), products.unbind(1)
    pull_x = torch.addcmul(torch.addcmul(px * residual, xx, ux), xy, uy)
    pull_y = torch.addcmul(torch.addcmul(py * residual, xy, ux), yy, uy)
    return products, torch.stack((pull_x, pull_y), 1)


def _point_equations(points: Tensor, warp: Tensor, level: _Level) -> _Equations:
    """What tie points (K, 5) add in every round, see :func:`estimate_shifts`."""
    x, y = points[None, :, 0], points[None, :, 1]
    at, seen, precision = points[:, :2], points[:, 2:4], points[:, 4].reciprocal().square()
    down = spline_basis(y[0] / level.spacing + 1, level.down.shape[-1])
    along = spline_basis(x[0] / level.spacing + 1, level.along.shape[-1])
    sums = torch.matmul(
        (lattice.spline_products(down) * precision[:, None]).mT, lattice.spline_products(along)
    )
    alone = torch.stack((sums, torch.zeros_like(sums), sums))[None]
    pull = precision * ((seen - at).mT[:, None] - _backward(warp, x, y))  # (N, 2, 1, K)
    right = torch.matmul(down.mT * pull, along)
    return _Equations(lattice.arrange(alone, level.tables), right, right.new_zeros(()))


class _Fitted(NamedTuple):
    """The least squares over a frame, or a tile of one."""

    coefficients: Tensor  # (N, 2, n, m)
    variance: Tensor  # (N, 3, n, m), xx, xy, yy at the nodes
    evidence: Tensor  # (N,)
    flat: Tensor  # (N,)


class LatticeOptions(NamedTuple):
    """See :func:`estimate_shifts`."""

    spacing: int
    smoothness: float | None
    points: Tensor | None

    def seen_from(self, x: int, y: int) -> LatticeOptions:
        """The same for a tile whose corner lies there."""
        if self.points is None:
            return self
        columns = zip(self.points.unbind(1), (x, y, x, y, 0), strict=True)
        return self._replace(points=torch.stack([column - corner for column, corner in columns], 1))


def estimate_shifts(
    moving: Tensor,
    ground: Ground,
    warp: Tensor,
    mask: Tensor | None = None,
    *,
    spacing: int = 24,
    smoothness: float | None = None,
    points: Tensor | None = None,
) -> LocalShifts:
    r"""The field on top of a global warp. See the module's docstring.

    .. math:: \hat u = \arg\min_u \sum_q \frac{w(q)}{\kappa s^2(q)} \big(r(q) - m_u(q)\big)^2
        + \lambda \, (\|\nabla^3 u\|^2 + \mu \|\nabla^2 u\|^2 + \mu \|\nabla u\|^2)

    with r and :math:`m_u` the local contrast of the reference and of the frame read at :math:`W^{-1} q + u(q)`, w
    the squared local correlation, squared, times masks, and :math:`s^2` the local variance of the residuals.

    The last four rounds carry the gradient: each brings it ten times as near to that of the implicit function
    theorem. λ, and the error that is predicted, carry none.

    Scenes larger than some 40 nodes a side are cut into tiles that overlap; their coefficients are blended where
    they do, so that there is no seam and the work grows as the area.

    Args:
        moving: (N, H, W), float32 or float64, finite.
        ground: of the reference, one or N rows, see :func:`prepare_ground`, with the same ``spacing``.
        warp: the global one, (N, 2 or 3, 3), moving → reference; or (N, 2), a shift.
        mask: bool, (N, H, W), True = usable, or ``None``.
        spacing: pixels from one node to the next.
        smoothness: λ, or ``None`` for the likeliest of eight.
        points: (K, 5), tie points that somebody measured: (x, y) on the reference, (x, y) of the same ground in the
            frame, and σ per axis, all in pixels. Each adds :math:`|W^{-1} q + u(q) - p|^2 / \sigma^2`.

    Returns:
        :class:`LocalShifts`.
    """
    frame = (moving.shape[-2], moving.shape[-1])
    options = LatticeOptions(spacing, smoothness, points)
    if len(ground.tiles) == 1:
        found, similarity, level = _fit(moving, ground.tiles[0], warp, mask, options)
        known = torch.matmul(torch.matmul(level.down, _known(found.variance)), level.along.mT)
        return _conclude(found, similarity * known.clamp(0, 1), frame, spacing)
    mosaic = Mosaic(frame, spacing)
    for index, (rows, columns) in enumerate(mosaic.windows()):
        usable = None if mask is None else mask[:, rows, columns]
        mosaic.add(index, moving[:, rows, columns], ground.tiles[index], warp, usable, options)
    return mosaic.conclude()


def acceptable(shifts: LocalShifts, max_deviation: float) -> Tensor:
    """(N,) bool: the fields that the data ask for, that stay within the limit and fold nothing."""
    return (
        ~shifts.flat
        & (shifts.evidence > _LEAST_EVIDENCE)
        & (shifts.largest <= max_deviation)
        & (shifts.least_jacobian > _LEAST_JACOBIAN)
        & shifts.coefficients.isfinite().flatten(1).all(1)
        & shifts.sigma.isfinite().flatten(1).all(1)
    )


class Mosaic:
    """A large frame in tiles of one size, their corners on nodes, whose fields are blended at the nodes: no seam.

    Args:
        frame: (H, W).
        spacing: pixels from one node to the next.
    """

    def __init__(self, frame: tuple[int, int], spacing: int) -> None:
        (height, tops), (width, lefts) = (_tile_starts(length, spacing) for length in frame)
        self._frame, self._size, self._spacing = frame, (height, width), spacing
        self._corners = [(top, left) for top in tops for left in lefts]
        self._nodes = lattice_size(frame, spacing)
        self._sums: tuple[Tensor, Tensor] | None = None  # what is blended, and the evidence
        self._flat: list[Tensor] = []

    def windows(self) -> list[tuple[slice, slice]]:
        """Rows and columns of every tile."""
        height, width = self._size
        return [(slice(top, top + height), slice(left, left + width)) for top, left in self._corners]

    def add(
        self,
        index: int,
        moving: Tensor,
        ground: _TileGround,
        warp: Tensor,
        mask: Tensor | None,
        options: LatticeOptions,
    ) -> None:
        """What one tile (N, h, w) says; the warp and the tie points are those of the whole frame."""
        top, left = self._corners[index]
        there = warp if warp.shape[-1] == 2 else change_origin(warp, (left, top))
        found, similarity, level = _fit(moving, ground, there, mask, options.seen_from(left, top))
        # the similarity at the nodes
        weight = level.down.sum(0)[:, None] * level.along.sum(0) + 1e-6
        near = torch.matmul(torch.matmul(level.down.mT, similarity), level.along) / weight
        last = torch.stack((near, torch.ones_like(near)), 1)
        stack = torch.cat((found.coefficients, found.variance, last), 1) * self._blend(level, top, left)
        first = (top // self._spacing, left // self._spacing)
        count = stack.shape[-2:]
        beyond = (self._nodes[0] - first[0] - count[0], self._nodes[1] - first[1] - count[1])
        # (the last tile's lattice can have more rows than the frame's, far outside: cut)
        stack = F.pad(stack, (first[1], beyond[1], first[0], beyond[0]))
        # what of a tile is not also its neighbour's, on average
        share = math.prod(self._frame) / (len(self._corners) * math.prod(self._size))
        # a flat tile says nothing for a field, nor against it
        evidence = torch.where(found.flat, 0.0, found.evidence) * share
        before = self._sums
        self._sums = (stack, evidence) if before is None else (before[0] + stack, before[1] + evidence)
        self._flat.append(found.flat)

    def _blend(self, level: _Level, top: int, left: int) -> Tensor:
        """(n, m): how much each node of a tile counts, less towards its borders, but for the frame's."""
        profiles = []
        for start, basis, size, length in zip(
            (top, left), (level.down, level.along), self._size, self._frame, strict=True
        ):
            node = torch.arange(basis.shape[-1], device=basis.device, dtype=basis.dtype)
            far = torch.full_like(node, _OVERLAP)
            before = node - 1 if start > 0 else far
            after = (size - 1) / self._spacing + 1 - node if start + size < length else far
            inner = torch.minimum(before, after).clamp(0, _OVERLAP) / _OVERLAP
            profiles.append(inner.square() * (3 - 2 * inner) + 1e-6)
        return profiles[0][:, None] * profiles[1]

    def conclude(self) -> LocalShifts:
        """Of all tiles together."""
        assert self._sums is not None
        (sums, evidence), flat = self._sums, torch.stack(self._flat).all(0)
        blended = sums[:, :-1] / sums[:, -1:].clamp(min=1e-12)
        coefficients, variance, near = blended[:, :2], blended[:, 2:5].detach(), blended[:, 5].detach()
        y, x = (
            torch.arange(0, length, 8, device=near.device, dtype=near.dtype) / self._spacing + 1
            for length in self._frame
        )
        down, along = spline_basis(y, self._nodes[0]), spline_basis(x, self._nodes[1])
        inliers = torch.matmul(torch.matmul(down, (near * _known(variance)).clamp(0, 1)), along.mT)
        return _conclude(_Fitted(coefficients, variance, evidence, flat), inliers, self._frame, self._spacing)


def _tile_starts(length: int, spacing: int) -> tuple[int, list[int]]:
    """The size and the starts of the tiles along one axis."""
    longest, overlap = _LARGEST_TILE * spacing, _OVERLAP * spacing
    if length <= longest + overlap:
        return length, [0]
    count = -(-(length - overlap) // (longest - overlap))
    least = -(-(length + (count - 1) * overlap) // count)
    steps = (length - least) // spacing  # whole nodes from the first tile's start to the last one's
    return length - steps * spacing, [steps * index // (count - 1) * spacing for index in range(count)]


def _fit(
    moving: Tensor, ground: _TileGround, warp: Tensor, mask: Tensor | None, options: LatticeOptions
) -> tuple[_Fitted, Tensor, _Level]:
    """The rounds; and the similarity (N, h, w) in the last one, on what level."""
    frame = (moving.shape[-2], moving.shape[-1])
    spacing, smoothness, points = options
    nodes = lattice_size(frame, spacing)
    levels = [_level(frame, band, spacing, like=moving) for band in _BANDS]
    frames, flat = _prepare_frames(moving, mask, levels)
    starts = [level.at + _backward(warp, level.x[None, :], level.y[:, None]) for level in levels]
    rounds = list(zip(frames, levels, ground.fields, ground.weights, starts, strict=True))
    told = None if points is None else _point_equations(points, warp, levels[0])

    def equations(offset: Tensor, level: int) -> _Equations:
        found = _linearize(*rounds[level], offset)
        if told is None:
            return found
        matrix = Blocks(*(own + added for own, added in zip(found.matrix, told.matrix, strict=True)))
        return found._replace(matrix=matrix, right=found.right + told.right)

    offset, chosen, found, factor = _go_rounds(equations, moving, nodes, smoothness)
    prior = lattice.lattice_prior(nodes, like=moving)
    with torch.no_grad():
        evidence = lattice.evidence_of(factor, prior, chosen)
        looser = lattice.factorize(lattice.with_prior(found.matrix, prior, _SIGMA_SMOOTHNESS * chosen))
        variance = _SIGMA_CALIBRATION**2 * lattice.posterior(looser, nodes)
    return _Fitted(offset, variance, evidence, flat | ground.flat), found.similarity, levels[-1]


def _go_rounds(
    equations: Callable[[Tensor, int], _Equations],
    like: Tensor,
    nodes: tuple[int, int],
    smoothness: float | None,
) -> tuple[Tensor, Tensor, _Equations, Factor]:
    """The coefficients, their smoothness, and the last round's equations."""
    schedule = [level for level, count in enumerate(_ROUNDS) for _ in range(count)]
    prior = lattice.lattice_prior(nodes, like=like)
    offset = like.new_zeros(like.shape[0], 2, *nodes)
    chosen = torch.full_like(offset[:, 0, 0, 0], _FIRST_SMOOTHNESS if smoothness is None else smoothness)
    without = len(schedule) - _WITH_GRADIENT
    # (one region for all: between two torch.export makes an empty piece, which cannot be loaded)
    with torch.no_grad():
        for level in schedule[:without]:
            found = equations(offset, level)
            offset = _step_towards(offset, lattice.solve_blocks(found.matrix, found.right, prior, chosen)[0])
    for step, level in enumerate(schedule[without:], without):
        found = equations(offset, level)
        if smoothness is None and step == len(schedule) - _ROUNDS[-1]:
            chosen = lattice.likeliest_smoothness(found.matrix, found.right, prior)
        solution, factor = lattice.solve_blocks(found.matrix, found.right, prior, chosen)
        offset = _step_towards(offset, solution)
    return offset, chosen, found, factor


def _step_towards(offset: Tensor, found: Tensor) -> Tensor:
    """Towards what was found, where it is a number, by so many pixels at most."""
    return offset + (found - offset).nan_to_num(0.0, 0.0, 0.0).clamp(-_LARGEST_STEP, _LARGEST_STEP)


def _known(variance: Tensor) -> Tensor:
    """(N, n, m), near 1 where the field is known well, near 0 where it is not."""
    return 1 / (1 + 0.5 * (variance[:, 0] + variance[:, 2]).clamp(min=0) / _KNOWN**2).square()


class _Axis(NamedTuple):
    """The splines of the nodes along one axis of a frame."""

    middle: Tensor  # (1, n)
    basis: Tensor  # (k, n), at four points a node, which tell the extremes of a cubic spline
    slope: Tensor  # (k, n), per pixel


@keeps_tables
def _extremes(length: int, spacing: int, count: int, *, like: Tensor) -> _Axis:
    last, points = 1 + (length - 1) / spacing, 4 * (count - 3) + 1
    middle = like.new_full((1,), 0.5 * (1 + last))
    at = torch.linspace(1, last, points, device=like.device, dtype=like.dtype)
    return _Axis(spline_basis(middle, count), spline_basis(at, count), spline_slope(at, count) / spacing)


def _conclude(found: _Fitted, inliers: Tensor, frame: tuple[int, int], spacing: int) -> LocalShifts:
    """What was found, and what there is to say about it."""
    coefficients, variance, evidence, flat = found
    nodes = (coefficients.shape[-2], coefficients.shape[-1])
    with torch.no_grad():
        sigma = (0.5 * (variance[:, 0] + variance[:, 2])).clamp(min=0).sqrt()
        down, along = (
            _extremes(length, spacing, count, like=coefficients)
            for length, count in zip(frame, nodes, strict=True)
        )
        # (a spline over the values at the nodes is a little smoother than they are)
        centre = torch.matmul(torch.matmul(down.middle, variance), along.middle.mT)[..., 0, 0]
        xx, xy, yy = centre.unbind(-1)
        covariance = torch.stack((xx, xy, xy, yy), -1).reshape(-1, 2, 2)

        def on_grid(rows: Tensor, columns: Tensor) -> Tensor:
            return torch.matmul(torch.matmul(rows, coefficients), columns.mT)

        field = on_grid(down.basis, along.basis)
        xx, yx = on_grid(down.basis, along.slope).unbind(1)
        xy, yy = on_grid(down.slope, along.basis).unbind(1)
        jacobian = (1 + xx) * (1 + yy) - xy * yx
        return LocalShifts(
            coefficients,
            sigma,
            covariance,
            torch.where(evidence.isfinite(), evidence, -torch.inf),
            torch.linalg.vector_norm(field, dim=1).flatten(1).amax(1),
            jacobian.flatten(1).amin(1),
            flat,
            inliers.detach(),
        )
