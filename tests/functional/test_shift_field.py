"""Fields of local shifts against scipy's B-splines, and against what they mean point by point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.ndimage import map_coordinates

import torchalign as ta
from torchalign.functional.affine import invert_warp, transform_points, translation_warp
from torchalign.functional.shift_field import (
    compose_fields,
    field_at,
    field_at_points,
    fit_nodes,
    invert_field,
    move_origin,
    rescale_field,
    sigma_at,
    spline_basis,
    spline_slope,
    warp_points,
)
from torchalign.functional.warp import resample, warp

SIZE = (40, 50)
SPACING = 8.0


def smooth_field(frames=2, size=SIZE, seed=0, amplitude=1.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    n, m = (int(length / SPACING) + 4 for length in size)
    coefficients = amplitude * torch.randn(frames, 2, n, m, generator=random, dtype=dtype)
    corner = torch.full((frames, 2), -SPACING, dtype=dtype)
    return ta.ShiftField(
        coefficients, torch.rand(frames, n, m, generator=random, dtype=dtype), corner, -corner
    )


def grid(size=SIZE, dtype=torch.float64):
    return torch.arange(size[1], dtype=dtype), torch.arange(size[0], dtype=dtype)


def points_of(size=SIZE):
    x, y = grid(size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, -1, 2)


@pytest.mark.parametrize(("ours", "order"), [(spline_basis, 0), (spline_slope, 1)])
def test_splines_are_scipys(ours, order):
    at = torch.linspace(1, 5, 41, dtype=torch.float64)
    found = ours(at, 7).numpy()
    for node in range(7):
        knots = np.arange(node - 2, node + 3, dtype=float)
        expected = (
            BSpline.basis_element(knots, extrapolate=False).derivative(order)(at.numpy())
            if order
            else (BSpline.basis_element(knots, extrapolate=False)(at.numpy()))
        )
        np.testing.assert_allclose(found[:, node], np.nan_to_num(expected), atol=1e-12)


def test_the_field_is_scipys_tensor_product():
    field = smooth_field(1)
    x, y = grid()
    dx, dy = field_at(field, x, y)
    n, m = field.coefficients.shape[-2:]
    for axis, found in enumerate((dx, dy)):
        # node k of a uniform cubic B-spline has its knots from k − 2 to k + 2
        rows = BSpline(np.arange(-2.0, n + 2), field.coefficients[0, axis].numpy(), 3)(
            (y.numpy() + 8) / SPACING
        )
        expected = BSpline(np.arange(-2.0, m + 2), rows.T, 3)((x.numpy() + 8) / SPACING).T
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-12)
    points = points_of()
    at_points = field_at_points(field, points)
    torch.testing.assert_close(at_points[0, :, 0], dx.flatten())
    torch.testing.assert_close(at_points[0, :, 1], dy.flatten())


def test_beyond_its_nodes_a_field_goes_on():
    field = smooth_field(1)
    outside, border = (field_at(field, torch.tensor([x]), torch.tensor([3.0]))[0] for x in (-30.0, 0.0))
    torch.testing.assert_close(outside.double(), border.double())


def test_values_at_the_nodes():
    values = torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coefficients = fit_nodes(values)
    rows, columns = (torch.arange(1, n - 1, dtype=torch.float64) for n in (7, 9))
    there = spline_basis(rows, 7) @ coefficients @ spline_basis(columns, 9).mT
    torch.testing.assert_close(there, values[:, 1:-1, 1:-1])


def test_sigma_is_linear_between_the_nodes():
    field = smooth_field(2)
    n, m = field.sigma.shape[-2:]
    at_nodes = sigma_at(
        field, SPACING * (torch.arange(m) - 1.0).double(), SPACING * (torch.arange(n) - 1.0).double()
    )
    torch.testing.assert_close(at_nodes, field.sigma)
    half = sigma_at(field, torch.tensor([4.0]).double(), torch.tensor([0.0]).double())[:, 0, 0]
    torch.testing.assert_close(half, field.sigma[:, 1, 1:3].mean(-1))


@pytest.mark.parametrize("scale", [2.0, 0.5, (3.0, 2.0)])
def test_another_pixel_size(scale):
    field = smooth_field()
    sx, sy = scale if isinstance(scale, tuple) else (scale, scale)
    finer = rescale_field(field, scale)
    points = points_of()
    there = torch.stack(((points[..., 0] + 0.5) * sx - 0.5, (points[..., 1] + 0.5) * sy - 0.5), -1)
    expected = field_at_points(field, points) * torch.tensor([sx, sy])
    torch.testing.assert_close(field_at_points(finer, there), expected)


def test_another_origin():
    field = smooth_field()
    points = points_of()
    seen = move_origin(field, (3, 5))
    torch.testing.assert_close(
        field_at_points(seen, points - torch.tensor([3.0, 5.0])), field_at_points(field, points)
    )


def turned():
    angle = torch.tensor([0.02, -0.01], dtype=torch.float64)
    warps = translation_warp(torch.tensor([[1.5, -0.7], [0.3, 2.0]], dtype=torch.float64))
    warps[:, 0, 1], warps[:, 1, 0] = -angle, angle
    return warps


def test_points_go_there_and_back():
    field, warps = smooth_field(amplitude=0.4), turned()
    reference = points_of().expand(2, -1, -1)
    moving = transform_points(invert_warp(warps), reference) + field_at_points(field, reference)
    torch.testing.assert_close(warp_points(warps, field, moving), reference, atol=1e-6, rtol=0)
    torch.testing.assert_close(warp_points(warps, None, moving), transform_points(warps, moving))


def test_the_inverse_undoes_it():
    field, warps = smooth_field(amplitude=0.2), turned()
    back, back_field = invert_field(warps, field)
    points = points_of((30, 40)).expand(2, -1, -1) + 5
    there = warp_points(warps, field, points)
    home = warp_points(back, back_field, there)
    assert (home - points).norm(dim=-1).max() < 0.06  # a spline again, exact at its nodes
    nodes = SPACING * torch.tensor([[[2.0, 2.0], [3.0, 2.0]]]).double().expand(2, -1, -1)
    exact = transform_points(invert_warp(back), nodes) + field_at_points(back_field, nodes)
    torch.testing.assert_close(exact, warp_points(warps, field, nodes), atol=1e-6, rtol=0)


def test_two_in_one():
    first, second = smooth_field(amplitude=0.3), smooth_field(amplitude=0.3, seed=5)
    warps = turned()
    combined, field = compose_fields(warps, first, warps.flip(0), second)
    points = points_of((24, 32)).expand(2, -1, -1) + 8
    one_by_one = warp_points(warps.flip(0), second, warp_points(warps, first, points))
    assert (warp_points(combined, field, points) - one_by_one).norm(dim=-1).max() < 0.05
    assert (field.sigma >= second.sigma).all()


# ------------------------------------------------------------------------------------------------- resampling


def image(frames=3, size=SIZE, bands=2, seed=3):
    return torch.rand(frames, bands, *size, generator=torch.Generator().manual_seed(seed))


def test_resampled_by_warp_and_field_as_scipy_does():
    cube, field, warps = image(2).double(), smooth_field(), turned()
    found, validity = resample(cube, warps, field=field)
    points = points_of()
    source = transform_points(invert_warp(warps), points.expand(2, -1, -1)) + field_at_points(
        field, points.expand(2, -1, -1)
    )
    for t in range(2):
        x, y = source[t].T.numpy()
        for band in range(2):
            expected = map_coordinates(cube[t, band].numpy(), [y, x], order=1, mode="nearest")
            np.testing.assert_allclose(found[t, band].flatten().numpy(), expected, atol=1e-9)
        inside = (x >= -0.5) & (x < SIZE[1] - 0.5) & (y >= -0.5) & (y < SIZE[0] - 0.5)
        np.testing.assert_array_equal(validity[t].flatten().numpy(), inside)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", ["shift", "warp"])
def test_frames_that_are_not_moved_are_as_without_a_field(interpolation, traced, kind):
    cube = image(4, (80, 96))
    shift = torch.tensor([[0.3, -0.6], [0.0, 0.0], [2.0, 1.0], [-0.4, 0.2]])
    motion = shift if kind == "shift" else translation_warp(shift)
    field = smooth_field(4, (80, 96), dtype=torch.float32)
    field.coefficients[1:] = 0

    def run(cube, motion, field):
        return resample(cube, motion, interpolation=interpolation, field=field)

    if traced:  # what the host may not read: as on a GPU
        from torch.func import vmap

        run_all = vmap(run)
        cube, motion = cube[None], motion[None]
        field = ta.ShiftField(*(part[None] for part in field))
        none = vmap(lambda cube, motion: run(cube, motion, None))(cube, motion)
        found = run_all(cube, motion, field)
        found, none = (type(one)(one.values[0], one.validity[0]) for one in (found, none))
    else:
        none, found = run(cube, motion, None), run(cube, motion, field)
    assert not torch.equal(found.values[0], none.values[0])
    assert torch.equal(found.values[1:], none.values[1:])
    assert torch.equal(found.validity[1:], none.validity[1:])


def test_a_step_takes_pixels_of_the_same_result():
    cube, field, warps = image(2), smooth_field(dtype=torch.float32), turned().float()
    whole = resample(cube, warps, field=field).values
    torch.testing.assert_close(resample(cube, warps, field=field, step=3).values, whole[..., ::3, ::3])


def test_derivatives_by_the_field():
    cube, field = image(1, (12, 14), 1).double(), smooth_field(1, (12, 14))
    motion = torch.tensor([[0.3, -0.6]], dtype=torch.float64)

    def moved(cube, coefficients):
        return warp(cube, translation_warp(motion), field=field._replace(coefficients=coefficients))

    inputs = (cube.requires_grad_(), field.coefficients.requires_grad_())
    assert torch.autograd.gradcheck(moved, inputs)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda field: "a field", TypeError),
        (lambda field: tuple(field), TypeError),
        (lambda field: field._replace(coefficients=field.coefficients.long()), TypeError),
        (lambda field: field._replace(coefficients=field.coefficients[:, :1]), ValueError),
        (lambda field: field._replace(coefficients=field.coefficients[..., :2]), ValueError),
        (lambda field: ta.ShiftField(*(part[:2] for part in field)), ValueError),
    ],
)
def test_what_is_no_field(change, kind):
    cube = image(3)
    with pytest.raises(kind, match=r"field.*: expected .*, got .*; "):
        warp(cube, torch.zeros(3, 2), field=change(smooth_field(3, dtype=torch.float32)))
