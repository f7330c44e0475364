r"""Least squares over a lattice of cubic B-splines: normal equations, prior, solution, evidence and posterior.

A field of two components on (n, m) nodes has as many unknowns as nodes, twice. The matrix of their products is block
tridiagonal, for splines four rows of nodes apart do not overlap: a block holds three rows. (On a device small
lattices are one block, for launches cost more than additions.)

References:
    MacKay 1992, doi:10.1162/neco.1992.4.3.415 (the evidence for a smoothness).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchalign._host import keeps_tables, launches_kernels
from torchalign.functional.shift_field import spline_basis

__all__ = [
    "ROWS",
    "Blocks",
    "Factor",
    "Prior",
    "ProductTables",
    "arrange",
    "evidence_of",
    "factorize",
    "from_blocks",
    "lattice_prior",
    "likeliest_smoothness",
    "normal_matrix",
    "posterior",
    "product_tables",
    "solve_blocks",
    "spline_products",
    "to_blocks",
    "with_prior",
]

# Rows of nodes in one block: cubic splines overlap those of three rows on, not of four.
ROWS = 3
# On a device, unknowns that are one block.
_MOST_AT_ONCE = 512
# The smoothness that is tried, λ of the prior precision: powers of 6, from this one on.
_LEAST_POWER, _TRIED = -2, 8
# The prior: energy of the third derivatives, so much bending and membrane energy, and so much of the shift itself.
# (Of bending alone the likeliest smoothness, which the many high frequencies decide, is too smooth for the low ones:
# what is told of water is then too sure.)
_BENDING, _MEMBRANE, _PIN = 0.1, 0.1, 1e-4


class Blocks(NamedTuple):
    """A symmetric block tridiagonal matrix."""

    diagonal: Tensor  # (N, B, s, s)
    beside: Tensor  # (N, B - 1, s, s), of a block and the one after it


class Factor(NamedTuple):
    """Its Cholesky factor, block by block."""

    lower: list[Tensor]  # B of (N, s, s)
    coupling: list[Tensor]  # B − 1 of (N, s, s): L⁻¹ E
    half: list[Tensor]  # B of (N, s, 1): L⁻¹ y
    failures: list[Tensor]  # B of (N,), 0 where all went well

    def half_log_determinant(self) -> Tensor:
        """(N,)."""
        pivots = torch.stack([factor.diagonal(dim1=-2, dim2=-1) for factor in self.lower], -1)
        return pivots.log().sum((-2, -1))

    def failed(self) -> Tensor:
        """(N,) bool: the matrix is not positive definite."""
        return (torch.stack(self.failures) != 0).any(0)


def factorize(matrix: Blocks, right: Tensor | None = None) -> Factor:
    """Cholesky of (..., B, s, s), and L⁻¹ of the right side (..., B, s), if there is one."""
    count = matrix.diagonal.shape[-3]
    if right is None:
        right = torch.zeros_like(matrix.diagonal[..., 0])
    lower, coupling, half, failures = [], [], [], []
    block, side = matrix.diagonal[..., 0, :, :], right[..., 0, :, None]
    for index in range(count):
        factor, info = torch.linalg.cholesky_ex(block)
        failures.append(info)
        lower.append(factor)
        if index == count - 1:
            half.append(torch.linalg.solve_triangular(factor, side, upper=False))
            break
        both = torch.cat((matrix.beside[..., index, :, :].expand(factor.shape), side), -1)
        both = torch.linalg.solve_triangular(factor, both, upper=False)
        half.append(both[..., -1:])
        coupling.append(both[..., :-1])
        update = torch.matmul(coupling[-1].mT, both)
        block = matrix.diagonal[..., index + 1, :, :] - update[..., :-1]
        side = right[..., index + 1, :, None] - update[..., -1:]
    return Factor(lower, coupling, half, failures)


class Prior(NamedTuple):
    """The energy of a field's differences on the lattice."""

    blocks: Blocks  # of one smoothness unit, (1, B, s, s)
    half_log_determinant: Tensor  # ()
    unknowns: int


@keeps_tables
def lattice_prior(nodes: tuple[int, int], *, like: Tensor) -> Prior:
    """The precision of the coefficients of both components at λ = 1."""
    rows, columns = nodes

    def energy(count: int, order: int) -> Tensor:
        matrix = torch.eye(count, device=like.device, dtype=like.dtype)
        for _ in range(order):
            matrix = matrix[1:] - matrix[:-1]
        return matrix.mT @ matrix

    weights = (_PIN, _MEMBRANE, _BENDING, 1.0)
    terms = [
        (order - along, along, math.comb(order, along) * weight)
        for order, weight in enumerate(weights)
        for along in range(order + 1)
    ]
    block = _block_rows(nodes, like)
    count = rows // block

    def blocks(shift: int) -> Tensor:
        """(count − shift, s, s): of block rows b and b + shift."""
        parts = []
        for down, along, weight in terms:
            y = energy(rows, down).reshape(count, block, count, block)
            y = y.diagonal(shift, 0, 2).permute(2, 0, 1)  # (blocks, b, b)
            parts.append(weight * torch.einsum("brs,jk->brjsk", y, energy(columns, along)))
        both = torch.eye(2, device=like.device, dtype=like.dtype)
        total = torch.einsum("ac,brjsk->barjcsk", both, functools.reduce(torch.add, parts))
        side = 2 * block * columns
        return total.reshape(1, count - shift, side, side)

    matrix = Blocks(blocks(0), blocks(1))
    return Prior(matrix, factorize(matrix).half_log_determinant()[0], 2 * rows * columns)


def _block_rows(nodes: tuple[int, int], like: Tensor) -> int:
    rows, columns = nodes
    return rows if launches_kernels(like) and 2 * rows * columns <= _MOST_AT_ONCE else ROWS


class ProductTables(NamedTuple):
    """Where the products of two splines stand in the normal equations, see :func:`product_tables`."""

    down: Tensor  # (h, 4n + 1): of a spline and the one 0 … 3 rows on; the last is 0
    along: Tensor  # (w, 4m + 1)
    places: Tensor  # of the matrix's entries, (B + B − 1, s, s), in the sums (3, 4n + 1, 4m + 1)


def product_tables(down: Tensor, along: Tensor) -> ProductTables:
    """Of the splines of (h, n) and (w, m) at the samples of a grid."""
    nodes = down.shape[-1], along.shape[-1]
    block, device = _block_rows(nodes, down), down.device

    def pairs(first: Tensor, second: Tensor, count: int) -> Tensor:
        lag = (first - second).abs()
        return torch.where(lag < 4, lag * count + torch.minimum(first, second), 4 * count)

    i, j = (torch.arange(count, device=device) for count in nodes)
    i, component = i.reshape(-1, block), torch.arange(2, device=device)
    rows = torch.cat(
        [pairs(i[:, :, None], i[:, None], nodes[0]), pairs(i[:-1, :, None], i[1:, None], nodes[0])]
    )
    plane = rows[:, :, None, :, None] * (4 * nodes[1] + 1) + pairs(j[:, None], j, nodes[1])[:, None]
    first = (component[:, None] + component) * ((4 * nodes[0] + 1) * (4 * nodes[1] + 1))
    places = first[:, None, None, :, None, None] + plane[:, None, :, :, None]
    side = 2 * block * nodes[1]
    return ProductTables(spline_products(down), spline_products(along), places.reshape(-1, side, side))


def spline_products(basis: Tensor) -> Tensor:
    """(L, n) → (L, 4n + 1): of a spline and the one 0 … 3 nodes on; and 0."""
    nodes = basis.shape[-1]
    padded = F.pad(basis, (0, 3))
    parts = [basis * padded[:, lag : lag + nodes] for lag in range(4)]
    return torch.cat([*parts, torch.zeros_like(basis[:, :1])], -1)


def normal_matrix(products: Tensor, tables: ProductTables) -> Blocks:
    """(N, 3, h, w), the weighted products xx, xy, yy of the gradients, summed against pairs of splines."""
    return arrange(torch.matmul(tables.down.mT, torch.matmul(products, tables.along)), tables)


def arrange(sums: Tensor, tables: ProductTables) -> Blocks:
    """(N, 3, 4n + 1, 4m + 1), sums xx, xy, yy of :func:`spline_products`, in their places."""
    matrix = sums.flatten(1).index_select(1, tables.places.flatten())
    matrix = matrix.reshape(-1, *tables.places.shape)
    count = (matrix.shape[1] + 1) // 2
    return Blocks(matrix[:, :count], matrix[:, count:])


def to_blocks(lattice: Tensor, count: int) -> Tensor:
    """(..., 2, n, m) → (..., B, s)."""
    *lead, _, rows, columns = lattice.shape
    parts = lattice.reshape(*lead, 2, count, rows // count, columns).movedim(-3, -4)
    return parts.reshape(*lead, count, 2 * rows // count * columns)


def from_blocks(vector: Tensor, nodes: tuple[int, int]) -> Tensor:
    """(..., B, s) → (..., 2, n, m)."""
    (*lead, count, _), (rows, columns) = vector.shape, nodes
    parts = vector.reshape(*lead, count, 2, rows // count, columns).movedim(-3, -4)
    return parts.reshape(*lead, 2, rows, columns)


def with_prior(matrix: Blocks, prior: Prior, smoothness: Tensor) -> Blocks:
    """A + λ P, without a gradient; λ (N,), or several that are tried (K,) of (N, 1, ...)."""
    scale = smoothness[:, None, None, None]
    pairs = zip(matrix, prior.blocks, strict=True)
    return Blocks(*(torch.addcmul(part, scale, unit).detach() for part, unit in pairs))


def solve_blocks(matrix: Blocks, right: Tensor, prior: Prior, smoothness: Tensor) -> tuple[Tensor, Factor]:
    """(N, 2, n, m): the coefficients that the normal equations with the prior ask for; the matrix has no gradient."""
    factor = factorize(with_prior(matrix, prior, smoothness), to_blocks(right, matrix.diagonal.shape[1]))
    parts: list[Tensor] = []  # from the last block back
    for index in reversed(range(len(factor.lower))):
        side = factor.half[index]
        if parts:
            side = side - torch.matmul(factor.coupling[index], parts[-1])
        parts.append(torch.linalg.solve_triangular(factor.lower[index].mT, side, upper=True))
    solution = parts[0].mT if len(parts) == 1 else torch.cat(parts[::-1], -1).mT
    return from_blocks(solution, (right.shape[-2], right.shape[-1])), factor


def likeliest_smoothness(matrix: Blocks, right: Tensor, prior: Prior) -> Tensor:
    """(N,): the λ with the largest evidence."""
    powers = torch.arange(_TRIED, device=right.device, dtype=right.dtype)
    tried = 6.0 ** (powers + _LEAST_POWER)
    full = with_prior(Blocks(*(part[:, None] for part in matrix)), prior, tried)
    sides = to_blocks(right, matrix.diagonal.shape[1])[:, None].expand(-1, _TRIED, -1, -1)
    return tried[evidence_of(factorize(full, sides), prior, tried).argmax(-1)]


def evidence_of(factor: Factor, prior: Prior, smoothness: Tensor) -> Tensor:
    r"""How much likelier the data are with a field of that smoothness than with none, in nats.

    .. math:: \tfrac{1}{2} y^T (A + \lambda P)^{-1} y + \tfrac{1}{2} \ln |\lambda P|
        - \tfrac{1}{2} \ln |A + \lambda P|
    """
    evidence = (
        0.5 * torch.cat(factor.half, -1).square().sum((-2, -1))
        + prior.half_log_determinant
        + 0.5 * prior.unknowns * smoothness.log()
        - factor.half_log_determinant()
    )
    return torch.where(factor.failed() | ~evidence.isfinite(), -torch.inf, evidence)


def posterior(factor: Factor, nodes: tuple[int, int]) -> Tensor:
    r"""(N, 3, n, m): variances xx, xy, yy of the field at the nodes, px²: of :math:`L^{-1} b`, b the splines there."""
    like, (rows, columns) = factor.lower[0], nodes
    down, along = (
        spline_basis(torch.arange(count, device=like.device, dtype=like.dtype).clamp(1, count - 2), count)
        for count in nodes
    )
    both = torch.eye(2, device=like.device, dtype=like.dtype)
    variance: Tensor | None = None
    half: Tensor | None = None
    block = rows // len(factor.lower)
    for index, lower in enumerate(factor.lower):
        # of the nodes (i, d, k) the coefficients (c, r, j) of the block: those further down do not know it
        first, last = index * block, (index + 1) * block
        splines = torch.einsum("cd,ir,kj->crjidk", both, down[: last + 1, first:last], along)
        side = splines.reshape(lower.shape[-1], -1).expand(*lower.shape[:-1], -1)
        if half is not None:
            known = torch.matmul(factor.coupling[index - 1].mT, half)
            side = side - F.pad(known, (0, side.shape[-1] - known.shape[-1]))
        half = torch.linalg.solve_triangular(lower, side, upper=False)
        x, y = half.unflatten(-1, (-1, 2, columns)).unbind(-2)
        part = torch.stack([(one * other).sum(-3) for one, other in ((x, x), (x, y), (y, y))], -3)
        if variance is not None:
            part = part + F.pad(variance, (0, 0, 0, part.shape[-2] - variance.shape[-2]))
        variance = part
    assert variance is not None
    return variance
