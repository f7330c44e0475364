"""The algebra of warps against NumPy's linear algebra, point by point."""

from __future__ import annotations

import doctest
import importlib

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from torchalign.functional import affine
from torchalign.functional.affine import (
    center_displacement,
    change_origin,
    compose_warps,
    from_homogeneous,
    identity_warp,
    invert_warp,
    rescale_warp,
    to_homogeneous,
    transform_points,
    translation_warp,
)


def random_warp(*batch: int, homography: bool, seed: int = 0) -> Tensor:
    """Well-conditioned warps in float64: near the identity, shifted by some pixels."""
    generator = torch.Generator().manual_seed(seed)
    warp = torch.eye(3, dtype=torch.float64).repeat(*batch, 1, 1)
    warp[..., :2, :2] += 0.2 * torch.randn(*batch, 2, 2, generator=generator, dtype=torch.float64)
    warp[..., :2, 2] += 5 * torch.randn(*batch, 2, generator=generator, dtype=torch.float64)
    if not homography:
        return warp[..., :2, :]
    warp[..., 2, :2] += 1e-3 * torch.randn(*batch, 2, generator=generator, dtype=torch.float64)
    return warp * 1.7  # a homography is defined up to a factor


def apply(matrix: np.ndarray, point: np.ndarray) -> np.ndarray:
    """One point through one 3 × 3 matrix, in NumPy."""
    mapped = matrix @ np.append(point, 1.0)
    return mapped[:2] / mapped[2]


both = pytest.mark.parametrize("homography", [False, True], ids=["affine", "homography"])


@both
def test_transform_points_agrees_with_matrix_products(homography: bool) -> None:
    warps = random_warp(4, homography=homography)
    points = 50 * torch.rand(4, 7, 2, dtype=torch.float64)
    mapped = transform_points(warps, points)
    for warp, frame_points, frame_mapped in zip(to_homogeneous(warps), points, mapped, strict=True):
        expected = [apply(warp.numpy(), point) for point in frame_points.numpy()]
        np.testing.assert_allclose(frame_mapped, expected, atol=1e-10)


def test_transform_points_broadcasts_over_batches() -> None:
    warps, points = random_warp(2, 3, homography=False), torch.rand(5, 2, dtype=torch.float64)
    assert transform_points(warps, points).shape == (2, 3, 5, 2)
    torch.testing.assert_close(transform_points(warps, points)[1, 2], transform_points(warps[1, 2], points))


@both
def test_inverse_agrees_with_numpy_and_undoes_the_warp(homography: bool) -> None:
    warps = random_warp(3, 4, homography=homography)
    inverse = invert_warp(warps)
    assert inverse.shape == warps.shape
    expected = np.linalg.inv(to_homogeneous(warps).numpy())
    np.testing.assert_allclose(to_homogeneous(inverse), expected, atol=1e-12)
    points = 50 * torch.rand(3, 4, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(transform_points(inverse, transform_points(warps, points)), points)


@both
def test_singular_warp_neither_raises_nor_touches_its_neighbours(homography: bool) -> None:
    warps = random_warp(3, homography=homography)
    expected = invert_warp(warps)
    warps[1] = 0
    inverse = invert_warp(warps)
    assert not inverse[1].isfinite().any()
    assert torch.equal(inverse[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("first_homography", [False, True])
@pytest.mark.parametrize("second_homography", [False, True])
def test_compose_applies_first_then_second(first_homography: bool, second_homography: bool) -> None:
    first = random_warp(5, homography=first_homography, seed=1)
    second = random_warp(5, homography=second_homography, seed=2)
    composed = compose_warps(first, second)
    assert composed.shape[-2] == (3 if first_homography or second_homography else 2)
    points = 50 * torch.rand(5, 6, 2, dtype=torch.float64)
    expected = transform_points(second, transform_points(first, points))
    torch.testing.assert_close(transform_points(composed, points), expected)


def test_compose_broadcasts_batch_dimensions() -> None:
    single, many = random_warp(homography=False, seed=1), random_warp(4, homography=False, seed=2)
    torch.testing.assert_close(compose_warps(single, many)[2], compose_warps(single, many[2]))
    torch.testing.assert_close(compose_warps(many, single)[2], compose_warps(many[2], single))


@both
def test_warp_composed_with_its_inverse_is_the_identity(homography: bool) -> None:
    warp = random_warp(4, homography=homography)
    product = from_homogeneous(compose_warps(warp, invert_warp(warp)))
    torch.testing.assert_close(product, identity_warp(4, dtype=torch.float64), atol=1e-12, rtol=0)


@both
def test_change_origin_is_the_same_motion_in_a_crop(homography: bool) -> None:
    warp = random_warp(4, homography=homography)
    origin = torch.tensor([30.0, -12.5], dtype=torch.float64)
    in_crop = change_origin(warp, origin)
    points = 50 * torch.rand(4, 6, 2, dtype=torch.float64)
    expected = transform_points(warp, points) - origin
    torch.testing.assert_close(transform_points(in_crop, points - origin), expected)
    torch.testing.assert_close(change_origin(in_crop, -origin), warp)
    torch.testing.assert_close(change_origin(warp, (30, -12.5)), in_crop)


def test_change_origin_per_frame_and_of_a_translation() -> None:
    warp = random_warp(3, homography=False)
    origins = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(change_origin(warp, origins)[1], change_origin(warp[1], (3.0, 4.0)))
    translation = translation_warp(torch.tensor([1.3, -2.7]))
    assert torch.equal(change_origin(translation, (5000.0, 7000.0)), translation)


@both
@pytest.mark.parametrize("scale", [2.0, 0.5, (2.0, 3.0)])
def test_rescale_keeps_half_pixels(homography: bool, scale: float | tuple[float, float]) -> None:
    warp = random_warp(4, homography=homography)
    rescaled = rescale_warp(warp, scale)
    factor = torch.tensor(scale, dtype=torch.float64)
    points = 50 * torch.rand(4, 6, 2, dtype=torch.float64)
    expected = factor * (transform_points(warp, points) + 0.5) - 0.5
    torch.testing.assert_close(transform_points(rescaled, factor * (points + 0.5) - 0.5), expected)


@both
@pytest.mark.parametrize("size", [(10, 10), (7, 12), (1, 1)])
def test_center_displacement_moves_the_centre(homography: bool, size: tuple[int, int]) -> None:
    warp = random_warp(4, homography=homography)
    center = torch.tensor([[(size[1] - 1) / 2, (size[0] - 1) / 2]], dtype=torch.float64)
    expected = (transform_points(warp, center) - center)[:, 0]
    torch.testing.assert_close(center_displacement(warp, size), expected)


def test_center_displacement_of_a_rotation_about_the_centre_is_zero() -> None:
    size = (101, 201)
    matrix = cv2.getRotationMatrix2D(((size[1] - 1) / 2, (size[0] - 1) / 2), 33.0, 1.2)
    assert center_displacement(torch.from_numpy(matrix), size).abs().max() < 1e-12


def test_identity_is_exact_and_writable() -> None:
    warp = identity_warp(2, 3, homography=True, dtype=torch.float64)
    assert warp.shape == (2, 3, 3, 3)
    assert warp.dtype == torch.float64
    warp[0, 0, 0, 2] = 1  # memory of its own
    assert warp[1, 0, 0, 2] == 0
    assert torch.equal(identity_warp(), translation_warp(torch.zeros(2)))


def test_homogeneous_and_back() -> None:
    warp = random_warp(3, homography=False)
    assert torch.equal(from_homogeneous(to_homogeneous(warp)), warp)
    torch.testing.assert_close(from_homogeneous(3 * to_homogeneous(warp)), warp)


@both
def test_gradients(homography: bool) -> None:
    warp = random_warp(2, homography=homography).requires_grad_()
    points = torch.rand(2, 3, 2, dtype=torch.float64).requires_grad_()
    for function in (invert_warp, lambda w: change_origin(w, (3.0, 4.0)), lambda w: rescale_warp(w, 2.0)):
        assert torch.autograd.gradcheck(function, warp)
    assert torch.autograd.gradcheck(compose_warps, (warp, warp.detach().clone().requires_grad_()))
    assert torch.autograd.gradcheck(transform_points, (warp, points))


def test_autocast_leaves_precision_alone() -> None:
    warp, points = random_warp(2, homography=False).float(), torch.rand(2, 3, 2)
    expected = (transform_points(warp, points), compose_warps(warp, warp), invert_warp(warp))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = (transform_points(warp, points), compose_warps(warp, warp), invert_warp(warp))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@both
def test_compiles_whole_and_maps(homography: bool) -> None:
    warp = random_warp(3, homography=homography)

    def chain(warp: Tensor) -> Tensor:
        moved = rescale_warp(change_origin(invert_warp(warp), (3.0, 4.0)), (2.0, 3.0))
        return center_displacement(compose_warps(moved, warp), (5, 6))

    expected = chain(warp)
    torch.testing.assert_close(torch.compile(chain, fullgraph=True, backend="eager")(warp), expected)
    torch.testing.assert_close(torch.func.vmap(chain)(warp), expected)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of torch (no GPU)")
def test_stays_on_its_device_without_synchronising() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        for rows in (2, 3):
            warp = torch.rand(4, rows, 3, device="cuda")
            moved = rescale_warp(change_origin(invert_warp(warp), (3.0, 4.0)), 2.0)
            assert center_displacement(compose_warps(moved, warp), (5, 6)).device.type == "cuda"
            assert transform_points(warp, torch.rand(4, 5, 2, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: invert_warp([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), TypeError, "expected a torch.Tensor"),
        (lambda: invert_warp(torch.eye(3).long()), TypeError, "expected a floating dtype"),
        (lambda: invert_warp(torch.eye(2)), ValueError, r"expected shape \(..., 2, 3\)"),
        (lambda: translation_warp(torch.zeros(3)), ValueError, r"\(x, y\)"),
        (lambda: compose_warps(identity_warp(), identity_warp(dtype=torch.float64)), TypeError, "second"),
        (lambda: compose_warps(identity_warp(), identity_warp(device="meta")), ValueError, "device"),
        (lambda: change_origin(identity_warp(), (1.0, 2.0, 3.0)), ValueError, "pair"),
        (lambda: transform_points(identity_warp(), torch.zeros(2)), ValueError, "N, 2"),
    ],
)
def test_bad_input_names_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(importlib.import_module(affine.__name__)).failed == 0
