"""Least squares over a lattice of splines: dense linear algebra beside the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchalign import _host
from torchalign.functional import lattice, local
from torchalign.functional.local import lattice_size
from torchalign.functional.shift_field import spline_basis


@pytest.fixture(params=["blocks", "one block"], autouse=True)
def _kind(request, monkeypatch):
    """On a device small lattices are one block."""
    monkeypatch.setattr(lattice, "launches_kernels", lambda tensor: request.param == "one block")
    monkeypatch.setattr(_host, "_TABLES", {})


def dense(matrix: lattice.Blocks) -> Tensor:
    count, side = matrix.diagonal.shape[-3:-1]
    whole = torch.zeros(*matrix.diagonal.shape[:-3], count * side, count * side, dtype=matrix.diagonal.dtype)
    for b in range(count):
        here = slice(b * side, (b + 1) * side)
        whole[..., here, here] = matrix.diagonal[..., b, :, :]
        if b + 1 < count:
            after = slice((b + 1) * side, (b + 2) * side)
            whole[..., here, after] = matrix.beside[..., b, :, :]
            whole[..., after, here] = matrix.beside[..., b, :, :].mT
    return whole


def vector(field: Tensor, matrix: lattice.Blocks) -> Tensor:
    return lattice.to_blocks(field, matrix.diagonal.shape[-3]).flatten(-2)


def system(frames=2, size=(70, 40)):
    like = torch.zeros((), dtype=torch.float64)
    level = local._level(size, 0.32, 16, like=like)
    nodes = lattice_size(size, 16)
    random = torch.Generator().manual_seed(0)
    g = torch.randn(frames, 2, *level.grid.size, generator=random, dtype=torch.float64)
    products = torch.stack((g[:, 0] ** 2, g[:, 0] * g[:, 1], g[:, 1] ** 2), 1)
    matrix = lattice.normal_matrix(products, lattice.product_tables(level.down, level.along))
    return level, nodes, g, matrix


def test_the_normal_matrix_is_the_sum_over_samples(request):
    level, (n, m), g, matrix = system()
    assert matrix.diagonal.shape[1] == (1 if "one block" in request.node.name else n // 3)
    splines = torch.einsum("yi,xj->yxij", level.down, level.along)
    rows = torch.stack((g[:, 0, ..., None, None] * splines, g[:, 1, ..., None, None] * splines), 3)
    jacobian = vector(rows.flatten(1, 2), matrix)  # (T, samples, unknowns)
    torch.testing.assert_close(dense(matrix), jacobian.mT @ jacobian)
    field = torch.randn(3, 2, n, m)
    count = matrix.diagonal.shape[1]
    assert torch.equal(lattice.from_blocks(lattice.to_blocks(field, count), (n, m)), field)


def test_the_prior_is_the_energy_of_derivatives():
    _, (n, m), _, _ = system()
    prior = lattice.lattice_prior((n, m), like=torch.zeros((), dtype=torch.float64))
    field = torch.randn(1, 2, n, m, dtype=torch.float64)

    def energy(first, second):
        return field.diff(n=first, dim=-2).diff(n=second, dim=-1).square().sum()

    third = energy(3, 0) + 3 * energy(2, 1) + 3 * energy(1, 2) + energy(0, 3)
    bending = energy(2, 0) + 2 * energy(1, 1) + energy(0, 2)
    lower = lattice._MEMBRANE * (energy(1, 0) + energy(0, 1)) + lattice._PIN * energy(0, 0)
    expected = third + lattice._BENDING * bending + lower
    one = vector(field, prior.blocks)[0]
    torch.testing.assert_close(one @ dense(prior.blocks)[0] @ one, expected)
    torch.testing.assert_close(prior.half_log_determinant, 0.5 * torch.logdet(dense(prior.blocks)[0]))


def test_solution_determinant_and_posterior_are_the_dense_ones():
    _, (n, m), _, matrix = system()
    prior = lattice.lattice_prior((n, m), like=torch.zeros((), dtype=torch.float64))
    smoothness = torch.tensor([5.0, 36.0], dtype=torch.float64)
    right = torch.randn(2, 2, n, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, factor = lattice.solve_blocks(matrix, right, prior, smoothness)
    whole = dense(matrix) + smoothness[:, None, None] * dense(prior.blocks)
    expected = torch.linalg.solve(whole, vector(right, matrix)[..., None])[..., 0]
    torch.testing.assert_close(vector(found, matrix), expected)
    torch.testing.assert_close(factor.half_log_determinant(), 0.5 * torch.logdet(whole))
    assert not factor.failed().any()

    variance = lattice.posterior(factor, (n, m))
    inverse = torch.linalg.inv(whole)
    for i, j in ((1, 1), (3, 2), (4, 3), (n - 2, m - 2)):
        at = torch.einsum(
            "i,j->ij",
            spline_basis(torch.tensor(float(i)).double(), n),
            spline_basis(torch.tensor(float(j)).double(), m),
        )
        zero = torch.zeros_like(at)
        x, y = (vector(torch.stack(parts), matrix) for parts in ((at, zero), (zero, at)))
        for k, (first, second) in enumerate(((x, x), (x, y), (y, y))):
            torch.testing.assert_close(
                variance[:, k, i, j], torch.einsum("a,tab,b->t", first, inverse, second)
            )
    assert torch.equal(variance[:, :, 0, 0], variance[:, :, 1, 1])


def test_the_likeliest_smoothness_has_the_largest_evidence():
    _, (n, m), _, matrix = system()
    prior = lattice.lattice_prior((n, m), like=torch.zeros((), dtype=torch.float64))
    precision = dense(prior.blocks)[0]
    fields = torch.randn(2, n * m * 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fields = torch.linalg.solve_triangular(torch.linalg.cholesky(precision).mT, fields.mT, upper=True).mT
    fields = fields * torch.tensor([[0.2], [3.0]], dtype=torch.float64)  # of λ 25 and 1/9
    right = (dense(matrix) @ fields[..., None])[..., 0]
    count = matrix.diagonal.shape[1]
    sides = lattice.from_blocks(right.reshape(2, count, -1), (n, m))
    found = lattice.likeliest_smoothness(matrix, sides, prior)
    tried = 6.0 ** torch.arange(-2, 6, dtype=torch.float64)
    full = dense(matrix)[:, None] + tried[:, None, None] * precision
    gain = torch.linalg.solve(full, right[:, None, :, None])[..., 0] * right[:, None]
    evidence = 0.5 * (gain.sum(-1) + torch.logdet(tried[:, None, None] * precision) - torch.logdet(full))
    assert torch.equal(found, tried[evidence.argmax(-1)])
    assert found[0] > found[1]


def test_a_matrix_that_is_none_is_told():
    matrix = system()[-1]
    broken = lattice.Blocks(-matrix.diagonal, matrix.beside)
    factor = lattice.factorize(broken, matrix.diagonal[..., 0])
    assert factor.failed().all()
