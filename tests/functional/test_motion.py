"""The motion models against finite differences, and against the algebra of warps."""

from __future__ import annotations

import doctest

import pytest
import torch

from torchalign.functional import motion as module
from torchalign.functional.affine import (
    adjugate,
    compose_warps,
    invert_warp,
    to_homogeneous,
    transform_points,
    translation_warp,
)
from torchalign.functional.motion import (
    PARAMETERS,
    MotionModel,
    denormalize,
    half_length,
    jacobian,
    normalize,
    warp_of,
)

motions = pytest.mark.parametrize("motion", list(PARAMETERS))
POINTS = torch.tensor([[0.0, 0.0], [0.7, -0.4], [-1.0, 0.3], [0.2, 0.9]], dtype=torch.float64)


@motions
def test_the_jacobian_is_that_of_the_warp(motion: MotionModel) -> None:
    count = PARAMETERS[motion]
    step = 1e-6 * torch.eye(count, dtype=torch.float64)  # one parameter a row
    ahead, behind = (transform_points(warp_of(sign * step, motion), POINTS) for sign in (1, -1))
    numeric = (ahead - behind) / 2e-6  # (P, N, 2)
    by_x, by_y = jacobian(motion, *POINTS.unbind(-1))
    torch.testing.assert_close(torch.stack((by_x, by_y), -1), numeric, atol=1e-9, rtol=0)
    torch.testing.assert_close(jacobian(motion, *POINTS.unbind(-1), dim=-1)[1], by_y.mT)


@motions
def test_no_parameters_are_the_exact_identity(motion: MotionModel) -> None:
    warp = denormalize(warp_of(torch.zeros(3, PARAMETERS[motion]), motion), (47, 300))
    assert torch.equal(to_homogeneous(warp), torch.eye(3).expand(3, 3, 3))
    assert warp_of(torch.zeros(0, PARAMETERS[motion]), motion).shape[0] == 0


@motions
def test_the_product_of_two_of_a_kind_is_one_of_that_kind(motion: MotionModel) -> None:
    """A euclidean keeps lengths, a similarity angles, an affine parallels."""
    first, second = 0.1 * torch.randn(
        2, PARAMETERS[motion], generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    product = to_homogeneous(compose_warps(warp_of(first, motion), warp_of(second, motion)))
    linear = product[:2, :2]
    gram = linear @ linear.mT
    identity = torch.eye(2, dtype=torch.float64)
    if motion in ("translation", "euclidean"):
        torch.testing.assert_close(gram, identity)
    if motion == "similarity":
        torch.testing.assert_close(gram, gram[0, 0] * identity)
    if motion != "homography":
        assert torch.equal(product[2], torch.tensor([0, 0, 1], dtype=torch.float64))


def test_normalised_coordinates_have_the_centre_at_0_and_the_longer_edge_at_1() -> None:
    size = (40, 100)
    assert half_length(size) == 50
    moved = normalize(translation_warp(torch.tensor([10.0, -5.0])), size)
    torch.testing.assert_close(moved, translation_warp(torch.tensor([0.2, -0.1])))
    # a rotation about the centre has no translation there
    centre = torch.tensor([49.5, 19.5], dtype=torch.float64)
    turned = denormalize(warp_of(torch.tensor([0, 0, 0.3], dtype=torch.float64), "euclidean"), size)
    torch.testing.assert_close(transform_points(turned, centre[None])[0], centre)
    warp = to_homogeneous(turned)
    warp[2, :2] = torch.tensor([1e-3, -2e-3])
    torch.testing.assert_close(denormalize(normalize(warp, size), size), warp / warp[2, 2])


def test_the_adjugate_inverts() -> None:
    matrix = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numerator, determinant = adjugate(matrix)
    torch.testing.assert_close(determinant, torch.linalg.det(matrix))
    torch.testing.assert_close(numerator / determinant[:, None, None], torch.linalg.inv(matrix))
    torch.testing.assert_close(invert_warp(matrix), torch.linalg.inv(matrix))


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(module).failed == 0
