"""The field of local shifts: known fields on analytic scenes, dense linear algebra beside the blocks."""

from __future__ import annotations

import pytest
import torch
from scenes import Waves, assert_derivative, scene_with_field
from torch import Tensor

from torchalign.functional import local
from torchalign.functional.local import acceptable, estimate_shifts, lattice_size, prepare_ground
from torchalign.functional.shift_field import spline_basis

SIZE = (120, 136)
SPACING = 16


def start(frames: int, shift=(0.4, -0.3), dtype=torch.float32) -> Tensor:
    return torch.tensor(shift, dtype=dtype).expand(frames, 2)


def on_pixels(coefficients: Tensor, size=SIZE, spacing=SPACING) -> Tensor:
    rows, columns = (
        spline_basis(torch.arange(n, dtype=coefficients.dtype) / spacing + 1, nodes)
        for n, nodes in zip(size, coefficients.shape[-2:], strict=True)
    )
    return rows @ coefficients @ columns.mT


def errors(found, fields, margin=8, size=SIZE, spacing=SPACING) -> Tensor:
    error = (on_pixels(found.coefficients, size, spacing) - fields).norm(dim=1)
    return error[:, margin:-margin, margin:-margin].flatten(1)


@pytest.mark.parametrize(
    ("amplitude", "median", "largest"), [(1.0, 0.02, 0.1), (0.2, 0.01, 0.05), (3.0, 0.03, 0.15)]
)
def test_a_known_field(amplitude, median, largest):
    cube, reference, fields = scene_with_field(SIZE, amplitude=amplitude, frames=2)
    ground = prepare_ground(reference, spacing=SPACING)
    found = estimate_shifts(cube, ground, start(2), spacing=SPACING)
    error = errors(found, fields)
    assert error.median() < median
    assert error.quantile(0.95) < largest
    assert (found.evidence > 100).all()
    assert acceptable(found, 2 * amplitude).all()
    assert not acceptable(found, 0.5 * amplitude).any()
    torch.testing.assert_close(
        found.largest, on_pixels(found.coefficients).norm(dim=1).flatten(1).amax(1), atol=0.02, rtol=0.02
    )
    assert found.inliers.min() >= 0
    assert found.inliers.max() <= 1
    # half of a tenth to double of what was predicted: σ is calibrated by benchmarks/local.py
    within = error < 2.5 * found.sigma.mean((1, 2))[:, None]
    assert within.float().mean() > 0.7


@pytest.mark.parametrize("kind", ["shift", "warp", "tiles"])
def test_tie_points_tell_what_images_do_not(monkeypatch, kind):
    cube, reference, fields = scene_with_field(SIZE, amplitude=1.0, frames=2)
    fields[1], cube[1] = fields[0], cube[0]  # the points are of one field
    if kind == "tiles":
        monkeypatch.setattr(local, "_LARGEST_TILE", 6)
        monkeypatch.setattr(local, "_OVERLAP", 3)
    hidden = slice(60, 136)
    mask = torch.ones(2, *SIZE, dtype=torch.bool)
    mask[..., hidden] = False
    y, x = (
        part.flatten()
        for part in torch.meshgrid(torch.arange(4, 120, 12), torch.arange(64, 136, 12), indexing="ij")
    )
    at = torch.stack((x, y), 1).float()
    warp = start(2)
    seen = at - warp[0] + fields[0, :, y, x].mT
    points = torch.cat((at, seen, torch.full((len(at), 1), 0.02)), 1).float()
    if kind == "warp":
        warp = torch.cat((torch.eye(2).expand(2, 2, 2), warp[:, :, None]), 2)
    ground = prepare_ground(reference, spacing=SPACING)

    def error(points):
        found = estimate_shifts(cube, ground, warp, mask, spacing=SPACING, points=points)
        off = (on_pixels(found.coefficients) - fields).norm(dim=1)
        return off[..., 8:52].median(), off[:, 8:-8, 68:128].median()

    shown, blind = error(None)
    told_shown, told = error(points)
    assert blind > 0.1
    assert told < 0.03
    assert told_shown < shown + 0.005
    assert abs(error(points * torch.tensor([1, 1, 1, 1, 1e6]))[1] - blind) < 1e-3  # they know nothing


def test_where_there_is_no_field_there_is_no_evidence():
    cube, reference, _ = scene_with_field(SIZE, amplitude=0.0, frames=2, noise=0.01)
    found = estimate_shifts(cube, prepare_ground(reference, spacing=SPACING), start(2), spacing=SPACING)
    assert (found.evidence < 0).all()
    assert not acceptable(found, 3.0).any()


def test_a_general_warp_is_where_it_starts():
    cube, reference, fields = scene_with_field(SIZE, shift=(0.0, 0.0))
    ground = prepare_ground(reference, spacing=SPACING)
    plain = estimate_shifts(cube, ground, torch.zeros(1, 2), spacing=SPACING)
    turn = torch.tensor([[[1.002, 0.004, -0.5], [-0.003, 0.999, 0.4]]])
    found = estimate_shifts(cube, ground, turn, spacing=SPACING)
    # warp and field together are the same: W⁻¹ q + u'(q) = q + u(q)
    y, x = (torch.arange(float(n)) for n in SIZE)
    inverse = torch.linalg.inv(torch.cat((turn[0], torch.tensor([[0.0, 0.0, 1.0]]))))
    points = torch.stack((x.expand(SIZE), y[:, None].expand(SIZE), torch.ones(SIZE)))
    moved = (inverse @ points.flatten(1)).reshape(3, *SIZE)[:2] - points[:2]
    together = on_pixels(found.coefficients)[0] + moved
    difference = (together - on_pixels(plain.coefficients)[0]).norm(dim=0)[8:-8, 8:-8]
    assert difference.median() < 0.005
    homography = torch.cat((turn, torch.tensor([[[0.0, 0.0, 1.0]]])), 1)
    same = estimate_shifts(cube, ground, homography, spacing=SPACING)
    torch.testing.assert_close(same.coefficients, found.coefficients, atol=1e-3, rtol=0)
    assert errors(plain, fields).median() < 0.02


def test_one_gather_reads_as_sixteen(monkeypatch):
    cube, reference, _ = scene_with_field(SIZE, amplitude=1.0, frames=2)
    ground = prepare_ground(reference, spacing=SPACING)
    found = []
    for wide in (False, True):
        monkeypatch.setattr(local, "launches_kernels", lambda tensor, wide=wide: wide)
        found.append(on_pixels(estimate_shifts(cube, ground, start(2), spacing=SPACING).coefficients))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_masks_act():
    cube, reference, fields = scene_with_field(SIZE)
    other = Waves(1, shortest=4.0, longest=30.0, seed=9)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SIZE), indexing="ij")
    strange = other.at(torch.stack((x, y), -1))[0].float()
    mask = torch.ones(1, *SIZE, dtype=torch.bool)
    mask[:, 30:70, 40:90] = False
    masked_ground = prepare_ground(torch.where(mask, reference, strange), mask, spacing=SPACING)
    clear = estimate_shifts(cube, prepare_ground(reference, spacing=SPACING), start(1), spacing=SPACING)
    by_reference = estimate_shifts(cube, masked_ground, start(1), spacing=SPACING)
    by_frame = estimate_shifts(
        torch.where(mask, cube, 0.0),
        prepare_ground(reference, spacing=SPACING),
        start(1),
        mask,
        spacing=SPACING,
    )
    for found in (by_reference, by_frame):
        assert errors(found, fields)[:, :].median() < 0.02
        assert found.sigma[0, 3:5, 4:6].mean() > 3 * clear.sigma[0, 3:5, 4:6].mean()


def test_flat_frames_and_a_flat_reference():
    cube, reference, _ = scene_with_field(SIZE, frames=3)
    cube[0], cube[1] = 0.5, torch.nan_to_num(cube[1] * float("nan"))
    ground = prepare_ground(reference, spacing=SPACING)
    found = estimate_shifts(cube, ground, start(3), spacing=SPACING)
    assert found.flat.tolist() == [True, True, False]
    assert acceptable(found, 3.0).tolist() == [False, False, True]
    none = estimate_shifts(
        cube, prepare_ground(torch.ones(1, *SIZE), spacing=SPACING), start(3), spacing=SPACING
    )
    assert none.flat.all()
    alone = estimate_shifts(cube[2:], ground, start(1), spacing=SPACING)
    torch.testing.assert_close(alone.coefficients, found.coefficients[2:], atol=1e-4, rtol=0)


def test_tiles_agree_with_the_whole(monkeypatch):
    size = (200, 150)
    cube, reference, fields = scene_with_field(size)
    whole = estimate_shifts(cube, prepare_ground(reference, spacing=8), start(1), spacing=8)
    monkeypatch.setattr(local, "_LARGEST_TILE", 11)
    windows = local.Mosaic(size, 8).windows()
    assert len(windows) >= 4
    assert all(part.start % 8 == 0 for window in windows for part in window)
    assert windows[-1][0].stop == size[0]
    tiled = estimate_shifts(cube, prepare_ground(reference, spacing=8), start(1), spacing=8)
    difference = (on_pixels(whole.coefficients - tiled.coefficients, size, 8)).norm(dim=1)[:, 8:-8, 8:-8]
    assert difference.median() < 0.005
    assert difference.flatten().quantile(0.95) < 0.02
    assert errors(tiled, fields, size=size, spacing=8).median() < 0.02
    assert tiled.sigma.shape == whole.sigma.shape
    assert 0.3 < tiled.evidence / whole.evidence < 3
    turn = torch.tensor([[[1.0005, 0.0008, 0.3], [-0.0005, 0.9996, -0.2]]])
    general = estimate_shifts(cube, prepare_ground(reference, spacing=8), turn, spacing=8)
    monkeypatch.undo()
    general_whole = estimate_shifts(cube, prepare_ground(reference, spacing=8), turn, spacing=8)
    difference = on_pixels(general_whole.coefficients - general.coefficients, size, 8).norm(dim=1)
    assert difference.median() < 0.005


def test_lattice_covers_the_frame():
    for length in (1, 2, 16, 17, 100):
        rows, columns = lattice_size((length, length), 16)
        assert rows % 3 == 0
        assert (columns - 3) * 16 >= length - 1


# --------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("rounds", "tolerance"), [(4, 1e-2), (9, 1e-4)])
def test_derivatives_by_frame_reference_and_warp(monkeypatch, rounds, tolerance):
    size = (40, 44)
    cube, reference, _ = scene_with_field(size, 0.3, dtype=torch.float64)
    # each of the rounds that carry the gradient comes nearer to that of the implicit function theorem
    monkeypatch.setattr(local, "_WITH_GRADIENT", rounds)
    monkeypatch.setattr(local, "_ROUNDS", (3, 12))

    def found(cube, reference, shift):
        ground = prepare_ground(reference, spacing=16)
        coefficients = estimate_shifts(cube, ground, shift, spacing=16, smoothness=36.0).coefficients
        return on_pixels(coefficients, size, 16)[..., ::4, ::4]

    inputs = (cube, reference, start(1, dtype=torch.float64))
    assert_derivative(found, inputs, directions=2, tolerance=tolerance)
