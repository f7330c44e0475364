"""Resampling against OpenCV, SciPy and analytic scenes; the traps of the field, one test each."""

from __future__ import annotations

import doctest
import importlib
import itertools

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from torchalign import _host
from torchalign.functional.affine import identity_warp, to_homogeneous, translation_warp
from torchalign.functional.warp import resample, warp

implementation = importlib.import_module("torchalign.functional.warp")
NAN, INF = float("nan"), float("inf")
SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (64, 64), (65, 97)]

interpolations = pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
smooth_interpolations = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
torch_own_warning = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
PADDINGS = ("border", "zeros", "reflection")
paddings = pytest.mark.parametrize("padding_mode", PADDINGS)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shifts(*values: tuple[float, float], dtype: torch.dtype = torch.float32) -> Tensor:
    return translation_warp(torch.tensor(values, dtype=dtype))


def affine_warps(count: int, *, homography: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    warps = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    warps[:, :2, :2] += 0.04 * noise(count, 2, 2, seed=1)
    warps[:, :2, 2] = 2 * noise(count, 2, seed=2)
    if homography:
        warps[:, 2, :2] = 4e-4 * noise(count, 2, seed=3)
    return (warps if homography else warps[:, :2]).to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; NaN equals NaN."""
    return one.dtype == other.dtype and np.array_equal(
        one.numpy(), other.numpy(), equal_nan=one.dtype.is_floating_point
    )


@pytest.fixture
def tensor_path(monkeypatch: pytest.MonkeyPatch):
    """A function that resamples on the traceable path, taken in eager mode on the CPU only under autograd."""

    def run(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(_host, "is_on_host", lambda tensor: False)
            return resample(*args, **options)

    return run


@pytest.fixture(params=["host", "tensor"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on both implementations, and let even tiny frames be sliced on the host."""
    if request.param == "tensor":
        monkeypatch.setattr(_host, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(implementation, "_SMALLEST_SLICED", 1)
    return request.param


# -------------------------------------------------------------------------------------------------- exactness


@pytest.mark.usefixtures("path")
@interpolations
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_identity_is_bit_exact(size, interpolation) -> None:
    cube = noise(2, 3, *size)
    cube[0, 0].flatten()[::5] = NAN
    cube[1, 1].flatten()[1::7] = INF
    mask = noise(2, *size, seed=1) > -1
    for given, padding_mode, homography in itertools.product((None, mask), PADDINGS, (False, True)):
        options = {"interpolation": interpolation, "padding_mode": padding_mode, "mask": given}
        values, validity = resample(cube, identity_warp(2, homography=homography), **options)
        assert same(values, cube)
        usable = cube.isfinite().all(1)
        assert torch.equal(validity, usable if given is None else usable & given)


@pytest.mark.usefixtures("path")
@interpolations
@pytest.mark.parametrize("shift", [(3, -2), (-4, 5), (0, 1), (7, 0), (-30, 20), (100, -100)], ids=str)
@pytest.mark.parametrize("size", [(33, 47), (64, 64)], ids=str)
def test_integer_shift_is_an_exact_copy_inside_and_the_border_outside(shift, size, interpolation) -> None:
    cube = noise(1, 2, *size)
    (x, y), (height, width) = shift, size
    rows, columns = (np.arange(n) - by for n, by in ((height, y), (width, x)))
    expected = cube[..., rows.clip(0, height - 1), :][..., columns.clip(0, width - 1)]
    values, validity = resample(cube, shifts(shift), interpolation=interpolation)
    assert same(values, expected)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    assert np.array_equal(validity[0].numpy(), inside)


def test_result_never_shares_memory_with_the_cube() -> None:
    cube = noise(2, 1, 80, 80)
    for interpolation in ("nearest", "bilinear", "bicubic"):
        before = cube.clone()
        warp(cube, identity_warp(2), interpolation=interpolation).zero_()
        assert torch.equal(cube, before)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_stays_constant(dtype: torch.dtype) -> None:
    cube = torch.full((3, 1, 40, 50), 0.1, dtype=dtype)
    assert same(warp(cube, affine_warps(3)), cube)
    assert same(warp(cube, shifts((0.3, 0.7), (-1.2, 2.6), (60.5, 0.1))), cube)


@pytest.mark.usefixtures("path")
def test_fractions_keep_their_precision_in_a_whole_tile() -> None:
    """Sentinel-2 width, float32: a coordinate would be rounded to 1e-3 px, a normalised grid to more."""
    width = 10980
    ramp = torch.arange(width, dtype=torch.float64).remainder(2).expand(1, 1, 2, width).contiguous()
    for fraction in (0.3, 0.30001):
        values = warp(ramp, shifts((-fraction, 0.0)))  # 0 → 1 → 0: the value is the fraction
        even = values[0, 0, 0, 0:-2:2]
        assert (even - fraction).abs().max() < 1e-7
    near_identity = shifts((-0.3, 0.0))
    near_identity[0, 1, 0] = 1e-9  # not sliced
    assert (warp(ramp, near_identity)[0, 0, 0, 0:-2:2] - 0.3).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------ right, by oracles


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shift", [(0.4, -1.7), (-2.25, 3.5), (-0.5, 0.5), (5.1, 0.0), (0.0, -0.9)], ids=str)
def test_bilinear_translation_agrees_with_scipy(shift) -> None:
    cube = noise(1, 2, 41, 53, dtype=torch.float64)
    values = warp(cube, shifts(shift, dtype=torch.float64))
    for band, got in zip(cube[0].numpy(), values[0].numpy(), strict=True):
        expected = scipy.ndimage.shift(band, shift[::-1], order=1, mode="nearest")  # (row, column), same sign
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("padding_mode", "mode"), [("border", "nearest"), ("reflection", "reflect")])
def test_bilinear_affine_agrees_with_scipy(padding_mode, mode) -> None:
    cube, warps = noise(3, 1, 41, 53, dtype=torch.float64), affine_warps(3, dtype=torch.float64)
    values = warp(cube, warps, padding_mode=padding_mode)
    for frame, matrix, got in zip(
        cube[:, 0].numpy(), to_homogeneous(warps).numpy(), values[:, 0], strict=True
    ):
        inverse = np.linalg.inv(matrix)  # SciPy wants output → input, in (row, column)
        swapped = inverse[[1, 0]][:, [1, 0, 2]]
        expected = scipy.ndimage.affine_transform(frame, swapped[:, :2], swapped[:, 2], order=1, mode=mode)
        np.testing.assert_allclose(got, expected, atol=1e-11)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("homography", [False, True], ids=["affine", "homography"])
def test_agrees_with_opencv_without_flags(homography: bool) -> None:
    """The same matrix as cv2.warpAffine(frame, M), fractions perhaps in steps of 1/32 px: a smooth scene."""
    y, x = np.mgrid[:90, :120]
    scene = (np.sin(x / 9) + np.cos(y / 11 + x / 23)).astype(np.float32)
    warps = affine_warps(4, homography=homography)
    values, validity = resample(torch.from_numpy(scene).expand(4, 1, 90, 120), warps)
    function = cv2.warpPerspective if homography else cv2.warpAffine
    for matrix, got, inside in zip(warps.numpy(), values[:, 0].numpy(), validity.numpy(), strict=True):
        expected = function(scene, matrix, (120, 90), borderMode=cv2.BORDER_REPLICATE)
        assert np.abs(got - expected)[inside].max() < 0.01  # half a pixel would be 0.07, the inverse 0.5
        ones = function(np.ones_like(scene), matrix, (120, 90), borderMode=cv2.BORDER_CONSTANT)
        assert np.abs(inside.astype(np.float32) - ones).max() <= 0.53  # inside where most of the weight is


@pytest.mark.usefixtures("path")
def test_linear_and_quadratic_scenes_are_met_exactly() -> None:
    """Bilinear reproduces planes; Keys' A = −1/2 paraboloids too (A = −3/4 not even planes)."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (40, 50)), indexing="ij")
    for warps in (affine_warps(1, dtype=torch.float64), shifts((1.3, -0.4), dtype=torch.float64)):
        inverse = np.linalg.inv(to_homogeneous(warps)[0].numpy())
        source_x, source_y = (inverse[i, 0] * x + inverse[i, 1] * y + inverse[i, 2] for i in (0, 1))
        for interpolation, power in (("bilinear", 1), ("bicubic", 2)):
            scene = (x**power + 2 * y**power)[None, None]
            expected = source_x**power + 2 * source_y**power
            got = warp(scene, warps, interpolation=interpolation)[0, 0]
            assert (got - expected)[8:-8, 8:-8].abs().max() < 1e-9


@pytest.mark.usefixtures("path")
@interpolations
@paddings
def test_homogeneous_affine_equals_affine(interpolation, padding_mode) -> None:
    cube, warps = noise(3, 2, 31, 37, dtype=torch.float64), affine_warps(3, dtype=torch.float64)
    options = {"interpolation": interpolation, "padding_mode": padding_mode}
    one, other = (resample(cube, motion, **options) for motion in (warps, 2.5 * to_homogeneous(warps)))
    torch.testing.assert_close(one.values, other.values, atol=1e-10, rtol=0)
    assert torch.equal(one.validity, other.validity)


@interpolations
@pytest.mark.parametrize("spoilt", [False, True], ids=["clean", "spoilt"])
@pytest.mark.parametrize("motion", ["translation", "affine", "homography"])
def test_fast_path_equals_general_path(tensor_path, motion, interpolation, spoilt) -> None:
    cube = noise(6, 2, 70, 61)
    mask = None
    if spoilt:
        cube[1, 0, 20:30, 10:40] = NAN
        cube[2, :, 60:] = INF
        mask = torch.ones(6, 70, 61, dtype=torch.bool)
        mask[3, 10:20, 30:] = False
        mask[4] = False
    if motion == "translation":
        warps = shifts((1.3, -2.6), (-0.5, 0.5), (0, 0), (3, -4), (-69.4, 0.2), (300.5, -2))
        warps = warps + 0
    else:
        warps = affine_warps(6, homography=motion == "homography")
        warps[2] = identity_warp(homography=motion == "homography")  # a mixture of sliced and gathered frames
    for padding_mode, fill_value in itertools.product(PADDINGS, (None, -7.0)):
        options = {
            "interpolation": interpolation,
            "padding_mode": padding_mode,
            "fill_value": fill_value,
            "mask": mask,
        }
        fast, general = resample(cube, warps, **options), tensor_path(cube, warps, **options)
        torch.testing.assert_close(fast.values, general.values, atol=1e-6, rtol=1e-6, equal_nan=True)
        assert torch.equal(fast.validity, general.validity)
        if motion == "translation":
            for shifted in (
                resample(cube, warps[:, :, 2], **options),
                tensor_path(cube, warps[:, :, 2], **options),
            ):
                torch.testing.assert_close(shifted.values, fast.values, atol=1e-6, rtol=1e-6, equal_nan=True)
                assert torch.equal(shifted.validity, fast.validity)


@interpolations
@pytest.mark.parametrize("motion", ["translation", "affine"])
@pytest.mark.parametrize("spoilt", [False, True], ids=["clean", "spoilt"])
@pytest.mark.parametrize(("step", "bands"), [(2, 1), (3, 1), (2, 2)])
def test_a_lattice_is_part_of_the_whole(
    tensor_path, interpolation, motion, spoilt, step, bands, monkeypatch
) -> None:
    cube, mask = noise(4, bands, 70, 61), None
    if spoilt:
        cube[1, 0, 20:30, 10:40] = NAN
        mask = torch.ones(4, 70, 61, dtype=torch.bool)
        mask[3, 10:20, 30:] = False
    warps = (
        shifts((1.3, -2.6), (0, 0), (300, -4), (-69.4, 0.2)) if motion == "translation" else affine_warps(4)
    )
    options = {"interpolation": interpolation, "mask": mask}
    whole = resample(cube, warps, **options)
    monkeypatch.setattr(implementation, "_BLOCK_SAMPLES", 1000)  # blocks of a few rows
    # known to be translations, they are shifts
    for known in (warps, warps[..., 2]) if motion == "translation" else (warps,):
        for lattice in (
            resample(cube, known, step=step, **options),
            tensor_path(cube, known, step=step, **options),
        ):
            torch.testing.assert_close(
                lattice.values, whole.values[..., ::step, ::step], atol=1e-6, rtol=1e-6, equal_nan=True
            )
            assert torch.equal(lattice.validity, whole.validity[..., ::step, ::step])


@pytest.mark.parametrize("sample", [2**10, 2**12, 2**30])
def test_result_does_not_depend_on_chunks_or_order(sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cube, warps = noise(7, 3, 40, 37), affine_warps(7)
    warps[2:4] = shifts((1.5, 0.25), (0.0, 0.0))
    cube[5, 1, 3:9, 4:30] = NAN
    expected = resample(cube, warps)
    monkeypatch.setattr(implementation, "_BLOCK_SAMPLES", sample)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    got = resample(cube[order], warps[order])
    assert same(got.values, expected.values[order])
    assert torch.equal(got.validity, expected.validity[order])
    single = resample(cube[5:6], warps[5:6])
    assert same(single.values[0], expected.values[5])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_values_are_written_where_they_are_wanted(motion: str) -> None:
    cube = noise(4, 2, 20, 24)
    cube[1, 0, 3:9, 4:20] = NAN
    warps = affine_warps(4) if motion == "affine" else shifts((1.3, -2.6), (0, 0), (0.5, 0.5), (-30, 4))
    expected = resample(cube, warps, fill_value=7.0)
    room = torch.full((6, 2, 20, 24), -1.0)
    got = resample(cube, warps, fill_value=7.0, out=room[1:5])
    assert same(room[1:5], expected.values)
    assert got.values.data_ptr() == room[1:5].data_ptr()
    assert torch.equal(got.validity, expected.validity)
    assert (room[[0, 5]] == -1).all()


def test_leading_dimensions_and_broadcasting() -> None:
    cube, warps = noise(2, 3, 2, 20, 24), affine_warps(6).reshape(2, 3, 2, 3)
    mask = noise(3, 20, 24, seed=5) > 0
    expected = torch.stack([warp(frames, w, mask=mask) for frames, w in zip(cube, warps, strict=True)])
    assert same(warp(cube, warps, mask=mask), expected)
    shared = warp(cube, warps[0], mask=mask[0])
    assert same(shared[1], warp(cube[1], warps[0], mask=mask[:1]))


def test_sizes_without_frames_or_bands() -> None:
    values, validity = resample(torch.empty(0, 3, 5, 6), torch.empty(0, 2, 3))
    assert values.shape == (0, 3, 5, 6)
    assert validity.shape == (0, 5, 6)
    values, validity = resample(torch.empty(2, 0, 5, 6), identity_warp(2))
    assert values.shape == (2, 0, 5, 6)
    assert validity.all()


def test_strided_cube_and_large_result() -> None:
    """A view in another memory order, and a result large enough for huge pages."""
    cube = noise(150, 150, 40, 3).permute(2, 3, 0, 1)
    warps = shifts(*((0.1 * t, -0.05 * t) for t in range(40)))
    values = warp(cube, warps)
    assert values.numel() * 4 >= _host._HUGE_RESULT
    assert same(values[17:18], warp(cube[17:18].contiguous(), warps[17:18]))


# ----------------------------------------------------------------------------------- unusable pixels, outside


@pytest.mark.usefixtures("path")
@smooth_interpolations
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_one_bad_pixel_stays_one_bad_pixel(bad, interpolation, motion) -> None:
    """grid_sample spreads it to 4 or 16. All but its nearest successors are finite, and right on a plane."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (30, 40)), indexing="ij")
    scene = (x + 2 * y).repeat(1, 2, 1, 1)
    motion = shifts((0.3, -0.4), dtype=torch.float64)
    if motion == "affine":
        motion[0, 0, 1] = 0.001
    clean = warp(scene, motion)
    scene[0, 0, 15, 20] = bad
    values, validity = resample(scene, motion, interpolation=interpolation)
    assert torch.equal(values.isfinite().logical_not().nonzero(), torch.tensor([[0, 0, 15, 20]]))
    assert values[0, 0, 15, 20].isnan() if np.isnan(bad) else values[0, 0, 15, 20] == bad
    assert torch.equal(validity, values.isfinite().all(1))
    difference = (values - clean).abs()[0, :, 3:-3, 3:-3].nan_to_num(posinf=0.0)
    assert difference[1].max() < 1e-12  # the other band: untouched
    assert difference[0].max() < 1.5  # neighbours come from fewer pixels, none from the bad one


@pytest.mark.usefixtures("path")
@smooth_interpolations
def test_validity_is_that_of_the_nearest_source_pixel(interpolation) -> None:
    usable = noise(4, 33, 29, seed=4) > 0
    cube = noise(4, 1, 33, 29)
    cube = torch.where(usable[:, None], cube, NAN)
    for warps in (affine_warps(4), shifts((0.4, 0.6), (-1.5, 0.5), (2.7, -3.1), (0, 0.2))):
        values, validity = resample(cube, warps, interpolation=interpolation)
        moved, inside = resample(usable[:, None], warps, interpolation="nearest")
        assert torch.equal(validity, moved[:, 0] & inside)
        assert torch.equal(values[:, 0].isfinite(), moved[:, 0])


@pytest.mark.usefixtures("path")
def test_masked_average_is_normalised() -> None:
    """By hand: taps 10 and 30 usable with weights 0.6 · 0.75 and 0.4 · 0.75, the lower row masked."""
    cube = torch.tensor([[10.0, 30.0], [1000.0, 2000.0]], dtype=torch.float64)[None, None]
    mask = torch.tensor([[True, True], [False, False]])
    values, validity = resample(cube, shifts((-0.4, -0.25), dtype=torch.float64), mask=mask)
    assert values[0, 0, 0, 0] == pytest.approx(18.0, abs=1e-6)
    assert validity[0].tolist() == [[True, True], [False, False]]
    assert values[0, 0, 1].tolist() == [1000.0, 2000.0]  # masked: a plain copy, not a blend


@pytest.mark.usefixtures("path")
@smooth_interpolations
@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_masked_sentinel_never_blends(interpolation, motion) -> None:
    sentinel = -3.4028234663852886e38  # the usual nodata of float rasters: a difference of two overflows
    cube = noise(1, 1, 50, 60).abs()
    cube[..., 20:30, 25:45] = sentinel
    warps = shifts((0.37, -0.61))
    if motion == "affine":
        warps[0, 1, 0] = 0.001
    values, validity = resample(cube, warps, mask=cube[:, 0] != sentinel, interpolation=interpolation)
    assert torch.equal(values == sentinel, ~validity[:, None] & (values < -1e30))
    assert (values == sentinel).sum() == pytest.approx(200, abs=20)  # neither grown nor shrunk
    assert values[values != sentinel].max() < 2 * cube.max()
    assert values[values != sentinel].min() > -cube.max()
    filled = resample(cube, warps, mask=cube[:, 0] != sentinel, fill_value=-1.0, interpolation=interpolation)
    assert torch.equal(filled.values[0, 0] == -1.0, ~filled.validity[0])


@pytest.mark.usefixtures("path")
def test_bicubic_gives_way_to_bilinear_beside_unusable_pixels() -> None:
    cube, warps = noise(1, 1, 30, 30), shifts((0.3, 0.4))
    mask = torch.ones(30, 30, dtype=torch.bool)
    mask[15, 15] = False
    masked = warp(cube, warps, mask=mask, interpolation="bicubic")[0, 0]
    plain = warp(cube, warps, interpolation="bicubic")[0, 0]
    bilinear = warp(cube, warps, mask=mask)[0, 0]
    near = torch.zeros(30, 30, dtype=torch.bool)
    near[14:18, 14:18] = True  # 16 outputs meet the pixel
    torch.testing.assert_close(masked[near], bilinear[near])
    torch.testing.assert_close(masked[~near], plain[~near])
    assert (masked[near] - plain[near]).abs().max() > 0.01


@pytest.mark.usefixtures("path")
@interpolations
def test_padding_and_fill_outside_the_frame(interpolation) -> None:
    cube = 5 + noise(1, 1, 6, 8).abs()
    warps = shifts((2.0, 0.0))
    border, zeros, reflection = (
        resample(cube, warps, padding_mode=mode, interpolation=interpolation)
        for mode in ("border", "zeros", "reflection")
    )
    for result in (border, zeros, reflection):
        assert torch.equal(result.validity[0], torch.arange(8).expand(6, 8) >= 2)
        assert torch.equal(result.values[..., 2:], cube[..., :-2])
    assert torch.equal(border.values[..., :2], cube[..., :1].expand(1, 1, 6, 2))
    assert not zeros.values[..., :2].any()
    assert torch.equal(reflection.values[..., :2], cube[..., :2].flip(-1))
    for mode in ("border", "zeros", "reflection"):
        filled = warp(cube, warps, padding_mode=mode, fill_value=-1, interpolation=interpolation)
        assert torch.equal(filled == -1, ~border.validity[:, None])


@pytest.mark.usefixtures("path")
def test_half_a_pixel_beyond_the_centres_is_still_inside() -> None:
    cube = noise(1, 1, 5, 5)
    for x, inside in ((0.5, True), (0.51, False)):
        values, validity = resample(cube, shifts((x, 0.0)), padding_mode="zeros")
        assert bool(validity[0, 0, 0]) is inside
        assert values[0, 0, 0, 0] == (cube[0, 0, 0, 0] if inside else 0)  # no blending with zeros


@pytest.mark.usefixtures("path")
@interpolations
def test_warps_without_a_place_are_outside_and_leave_the_others_alone(interpolation) -> None:
    cube = noise(5, 1, 20, 20)
    warps = affine_warps(5)
    expected = warp(cube, warps, interpolation=interpolation)
    warps[0] = 0
    warps[1] = NAN
    warps[2, 0, 2] = INF
    warps[3, :, 2] = 1e30
    values, validity = resample(cube, warps, interpolation=interpolation)
    assert not validity[:4].any()
    assert values.isfinite().all()
    assert torch.equal(values[4], expected[4])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_singular_warps_show_next_to_nothing(dtype) -> None:
    # huge displacements along x and along y of opposite sign must not cancel
    warps = torch.tensor([[[1, 1, 0], [1, 1 + 2**-20, 0]], [[0.1, 0.3, 0], [0.7, 2.1, 0]]], dtype=dtype)
    _, validity = resample(noise(2, 1, 40, 40).to(dtype), warps)
    assert validity.sum((-2, -1)).max() <= 40  # a line, where the truth is one


# ----------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.usefixtures("path")
@smooth_interpolations
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64"])
def test_integers_are_rounded_and_clamped_never_wrapped(dtype: str, interpolation) -> None:
    limits = np.iinfo(dtype)
    pixels = np.where(np.arange(32 * 40).reshape(32, 40) // 3 % 2, limits.max, limits.min).astype(dtype)
    cube = torch.from_numpy(pixels)[None, None]
    for warps in (shifts((0.3, 0.4)), affine_warps(1)):
        values = warp(cube, warps, interpolation=interpolation)
        assert values.dtype == cube.dtype
        exact = warp(
            torch.from_numpy(pixels.astype(np.float64))[None, None], warps, interpolation=interpolation
        )
        expected = exact.numpy().clip(float(limits.min), float(limits.max))
        scale = float(limits.max) - float(limits.min)
        assert np.abs(values.numpy().astype(np.float64) - expected).max() <= 0.5 + 1e-6 * scale
    assert same(warp(cube, identity_warp(1), interpolation=interpolation), cube)


@pytest.mark.usefixtures("path")
def test_integers_round_half_to_even() -> None:
    cube = torch.tensor([[0, 1, 2, 3, 4]], dtype=torch.int16)[None, None]
    assert warp(cube, shifts((-0.5, 0.0))).flatten().tolist() == [0, 2, 2, 4, 4]
    assert warp(cube > 1, shifts((-0.5, 0.0))).flatten().tolist() == [False, False, True, True, True]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int32", "uint32", "int64", "uint64", "bool", "float64"]
)
def test_nearest_keeps_labels(dtype: str) -> None:
    classes = np.array([0, 1, 2**24 + 1, 2**31 - 1, 2**62 + 1], dtype=np.uint64).astype(dtype)
    labels = torch.from_numpy(classes[np.random.default_rng(0).integers(0, 5, (2, 1, 30, 40))])
    warps = affine_warps(2)
    for motion in (warps, shifts((0.4, 1.6), (-3.3, 0.5))):
        moved = warp(labels, motion, interpolation="nearest")
        assert moved.dtype == labels.dtype
        assert set(np.unique(moved.numpy())) <= set(classes)
    moved = warp(labels, shifts((2.4, -1.4), (2.4, -1.4)), interpolation="nearest")
    assert np.array_equal(moved[..., :-1, 2:].numpy(), labels[..., 1:, :-2].numpy())


@pytest.mark.usefixtures("path")
def test_int64_beyond_float64_is_copied_exactly() -> None:
    cube = torch.tensor([[2**60 + 1, 2**60 + 3, 2**60 + 5]])[None, None]
    assert same(warp(cube, identity_warp(1)), cube)
    assert warp(cube, shifts((1.0, 0.0))).flatten().tolist() == [2**60 + 1, 2**60 + 1, 2**60 + 3]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """At W = 1024 a grid in half precision errs by up to 0.8 px."""
    cube = (torch.arange(1024.0) / 20).sin().expand(1, 2, 4, 1024).to(dtype)
    for warps in (shifts((0.37, 0.0)), affine_warps(1) * torch.tensor([[1, 0, 1], [0, 1, 1.0]])):
        values = warp(cube, warps)
        assert values.dtype == dtype
        assert same(values.float(), warp(cube.float(), warps).to(dtype).float())
        half_warps = warps.to(dtype)
        assert same(warp(cube, half_warps).float(), warp(cube, half_warps.float()).float())


def test_autocast_leaves_the_grid_in_float32() -> None:
    cube, warps = noise(2, 1, 20, 1024), affine_warps(2)
    for tensor in (cube, cube.clone().requires_grad_()):  # both paths
        expected = warp(tensor, warps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(warp(tensor, warps), expected)


# ----------------------------------------------------------------------------- gradients, transforms, devices


@smooth_interpolations
@pytest.mark.parametrize(
    ("padding_mode", "motion"), [("border", "shift"), ("zeros", "affine"), ("reflection", "homography")]
)
def test_gradients(interpolation, padding_mode, motion) -> None:
    cube = noise(2, 1, 5, 6, dtype=torch.float64).requires_grad_()
    if motion == "shift":
        warps = torch.tensor([[0.31, -0.42], [1.27, 0.63]], dtype=torch.float64)
    else:
        warps = affine_warps(2, homography=motion == "homography", dtype=torch.float64)
    warps.requires_grad_()

    def values(cube: Tensor, warps: Tensor) -> Tensor:
        return resample(cube, warps, interpolation=interpolation, padding_mode=padding_mode).values

    assert torch.autograd.gradcheck(values, (cube, warps))


def test_gradients_are_finite_and_right_beside_unusable_pixels() -> None:
    mask = torch.ones(1, 6, 7, dtype=torch.bool)
    mask[0, 3, 2:4] = False
    spoilt = noise(1, 1, 6, 7, dtype=torch.float64)
    spoilt[0, 0, 1, 4] = NAN
    warps = affine_warps(1, dtype=torch.float64).requires_grad_()
    spoilt.requires_grad_()
    values = warp(spoilt, warps, mask=mask, fill_value=0.0)
    gradients = torch.autograd.grad(values.sum(), (spoilt, warps))
    assert all(gradient.isfinite().all() for gradient in gradients)
    clean = noise(1, 1, 6, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda cube, motion: warp(cube, motion, mask=mask), (clean, warps))


@torch_own_warning
def test_forward_mode_gradients() -> None:
    cube, warps = noise(1, 1, 70, 70, dtype=torch.float64), shifts((0.3, 0.6), dtype=torch.float64)
    tangent = noise(1, 1, 70, 70, seed=3, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(cube, tangent)
        moved = torch.autograd.forward_ad.unpack_dual(warp(dual, warps)).tangent
    torch.testing.assert_close(moved, warp(tangent, warps))  # the warp is linear in the cube


@pytest.mark.parametrize(
    ("interpolation", "dtype", "motions"),
    [
        ("nearest", torch.float32, ["homography"]),
        ("bilinear", torch.float32, ["affine", "homography"]),
        pytest.param("bilinear", torch.int16, ["affine"], marks=pytest.mark.slow),
        # (bicubic is exported below)
        pytest.param("bicubic", torch.float32, ["affine"], marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(interpolation, dtype, motions) -> None:
    cube, warps = (20 * noise(3, 2, 70, 70)).to(dtype), affine_warps(3)
    mask = noise(3, 70, 70, seed=1) > -1
    torch._dynamo.reset()  # each case of this test recompiles the same function, up to a limit
    compiled = torch.compile(resample, fullgraph=True, backend="aot_eager")
    for kind in motions:
        motion = warps if kind == "affine" else to_homogeneous(warps)
        expected = resample(cube, motion, interpolation=interpolation, mask=mask, fill_value=0)
        got = compiled(cube, motion, interpolation=interpolation, mask=mask, fill_value=0)
        torch.testing.assert_close(got.values, expected.values)
        assert torch.equal(got.validity, expected.validity)


def test_exports_with_any_number_of_frames() -> None:
    class Warp(torch.nn.Module):
        def forward(self, cube: Tensor, warps: Tensor) -> Tensor:
            moved = warp(cube, warps, interpolation="bicubic")
            return torch.cat((moved, resample(cube, warps[..., 2], interpolation="bicubic").values))

    frames = torch.export.Dim("frames", min=2, max=64)
    example = (noise(3, 2, 20, 24), affine_warps(3))
    program = torch.export.export(Warp(), example, dynamic_shapes={"cube": {0: frames}, "warps": {0: frames}})
    cube, warps = noise(9, 2, 20, 24, seed=7), affine_warps(9)
    torch.testing.assert_close(program.module()(cube, warps), Warp()(cube, warps))


@interpolations
def test_maps(interpolation) -> None:
    cube, warps = noise(4, 3, 2, 66, 66), affine_warps(12).reshape(4, 3, 2, 3)
    moved = torch.func.vmap(lambda *given: resample(*given, interpolation=interpolation))(cube, warps[..., 2])
    expected = resample(cube, warps[..., 2], interpolation=interpolation)
    torch.testing.assert_close(tuple(moved), tuple(expected))
    function = torch.func.vmap(lambda cube, warps: warp(cube, warps, interpolation=interpolation))
    torch.testing.assert_close(function(cube, warps), warp(cube, warps, interpolation=interpolation))
    shared = torch.func.vmap(lambda motion: warp(cube[0], motion, interpolation=interpolation))(warps)
    torch.testing.assert_close(shared[2], warp(cube[0], warps[2], interpolation=interpolation))


@torch_own_warning
def test_jacobian_of_one_frame() -> None:
    cube, shift = noise(1, 1, 66, 66, dtype=torch.float64), torch.tensor([[0.3, 0.4]], dtype=torch.float64)

    def values(shift: Tensor) -> Tensor:
        return resample(cube, shift).values

    jacobian = torch.func.jacfwd(values)(shift)[0, 0, ..., 0, :]
    step = 1e-6 * torch.eye(2, dtype=torch.float64)
    for axis in (0, 1):
        numeric = (values(shift + step[axis]) - values(shift - step[axis]))[0, 0] / 2e-6
        torch.testing.assert_close(jacobian[..., axis], numeric, atol=1e-6, rtol=0)


def test_fake_cpu_tensors_are_not_read() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        values, validity = resample(torch.zeros(4, 2, 70, 70), torch.rand(4, 2, 3))
        assert (values.shape, validity.shape) == ((4, 2, 70, 70), (4, 70, 70))


@interpolations
@pytest.mark.parametrize(
    ("padding_mode", "dtype"),
    [
        ("border", torch.float16),
        ("zeros", torch.int16),
        ("reflection", torch.float32),
        ("border", torch.bool),
    ],
)
@pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of torch (no GPU)")
def test_stays_on_its_device_without_synchronising(interpolation, padding_mode, dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    options = {"interpolation": interpolation, "padding_mode": padding_mode}
    with torch._subclasses.fake_tensor.FakeTensorMode():
        cube = torch.zeros(4, 2, 70, 70, device="cuda", dtype=dtype)
        mask = torch.ones(4, 1, 70, device="cuda", dtype=torch.bool)
        for rows in (2, 3):
            motion = torch.rand(4, rows, 3, device="cuda")
            for given, fill_value in ((None, None), (mask, 1)):
                values, validity = resample(cube, motion, mask=given, fill_value=fill_value, **options)
                assert (values.device.type, values.dtype, values.shape) == ("cuda", dtype, cube.shape)
                assert (validity.device.type, validity.dtype) == ("cuda", torch.bool)
        assert resample(cube, torch.rand(4, 2, device="cuda"), **options).values.device.type == "cuda"


# -------------------------------------------------------------------------------------------------- bad input

CUBE, WARP = torch.zeros(2, 1, 4, 5), identity_warp(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: warp(CUBE.numpy(), WARP), TypeError, "cube: expected a torch.Tensor"),
        (lambda: warp(CUBE.to(torch.complex64), WARP), TypeError, "real"),
        (
            lambda: warp(CUBE[:, 0], WARP),
            ValueError,
            r"cube: expected shape \(..., T, C, H, W\), got \(2, 4, 5\)",
        ),
        (lambda: warp(CUBE[..., :0], WARP), ValueError, "at least one pixel"),
        (lambda: warp(CUBE, WARP.long()), TypeError, "warp: expected a floating dtype"),
        (lambda: warp(CUBE, WARP.numpy()), TypeError, "warp: expected a torch.Tensor"),
        (lambda: warp(CUBE, WARP[:, :, :2]), ValueError, "warp: expected shape"),
        (lambda: warp(CUBE, identity_warp(3)), ValueError, "leading dimensions"),
        (lambda: warp(CUBE, identity_warp(2, device="meta")), ValueError, "warp: expected the cube's device"),
        (lambda: warp(CUBE, torch.zeros(3, 2)), ValueError, "leading dimensions"),
        (lambda: warp(CUBE, WARP, interpolation="cubic"), ValueError, "'nearest', 'bilinear', 'bicubic'"),
        (lambda: warp(CUBE, WARP, padding_mode="wrap"), ValueError, "'border', 'zeros', 'reflection'"),
        (lambda: warp(CUBE.to(torch.uint8), WARP, fill_value=-1), ValueError, "0 … 255"),
        (lambda: warp(CUBE.to(torch.uint8), WARP, fill_value=NAN), ValueError, "whole number"),
        (lambda: warp(CUBE, WARP, mask=torch.ones(4, 5)), TypeError, "mask: expected a bool tensor"),
        (lambda: warp(CUBE, WARP, mask=torch.ones(2, 1, 4, 5) > 0), ValueError, "mask: expected a shape"),
        (lambda: warp(CUBE, WARP, mask=torch.ones(5, 4) > 0), ValueError, "mask: expected a shape"),
    ],
)
def test_bad_input_names_what_was_expected(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(implementation).failed == 0
