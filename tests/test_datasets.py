import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from torchalign.datasets import demo_stack, open_demo_scene, simulate_stack, simulate_warped_stack
from torchalign.functional.affine import transform_points


def scene(size: int = 120, bands: int = 2) -> torch.Tensor:
    noise = torch.rand(1, bands, size, size, generator=torch.Generator().manual_seed(1))
    return F.avg_pool2d(noise, 5, 1, 2)[0]


def test_decimation_is_what_it_says():
    # three pixels of the scene are one of the frame: the shift, and nothing else, lies between the frames
    ground = scene()
    stack = simulate_stack(
        ground,
        frames=6,
        size=(32, 24),
        factor=3,
        max_shift=2,
        gain=(1, 1),
        offset=0,
        noise=0,
        origin=(10, 12),
    )
    for frame, (x, y) in zip(stack.cube, (stack.shift * 3).round().int().tolist(), strict=True):
        window = ground[:, 10 + y : 10 + y + 96, 12 + x : 12 + x + 72]
        torch.testing.assert_close(frame, F.avg_pool2d(window[None], 3)[0])


@pytest.mark.parametrize("motion", ["translation", "affine", "homography"])
def test_warped_frames_are_the_scene_under_their_warp(motion):
    # waves that a block of 3 × 3 hardly dims and a cubic follows: the scene can be asked anywhere
    size, factor, side = (40, 52), 3, 240

    def ground(points):  # (..., 2) in scene pixels
        return 0.5 + 0.2 * (points @ torch.tensor([0.07, 0.05])).sin() + 0.2 * (points[..., 0] * 0.06).cos()

    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    stack = simulate_warped_stack(
        ground(torch.stack((x, y), -1).float())[None],
        motion=motion,
        frames=3,
        size=size,
        factor=factor,
        gain=(1, 1),
        offset=0,
        noise=0,
        max_perspective=1e-3,
    )
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    points = torch.stack((x, y), -1).double().reshape(-1, 2)
    corner = torch.tensor([(side - factor * size[1]) / 2, (side - factor * size[0]) / 2]) + (factor - 1) / 2
    for frame, warp in zip(stack.cube, stack.warp, strict=True):
        seen = ground((factor * transform_points(warp, points) + corner).float()).reshape(size)
        still = ground((factor * points + corner).float()).reshape(size)
        assert (frame[0] - seen).abs().max() < 0.004
        assert (frame[0] - still).abs().max() > 0.012  # and it has moved
    assert torch.equal(stack.warp[:, 2, :2] != 0, torch.full((3, 2), motion == "homography"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"motion": "rigid"}, "motion"),
        ({"size": (80, 80)}, "at least"),
        ({"max_scale": 1.0}, "max_scale"),
        ({"max_perspective": 0.1}, "max_perspective"),
        ({"max_rotation": -1.0}, "max_rotation"),
    ],
    ids=lambda value: str(value),
)
def test_warped_stacks_that_cannot_be_made(options, expected):
    with pytest.raises(ValueError, match=expected):
        simulate_warped_stack(scene(), **({"size": (16, 16), "factor": 3} | options))


def test_sign_of_the_shift():
    stack = simulate_stack(
        scene(), frames=8, size=(40, 40), factor=1, max_shift=5, gain=(1, 1), offset=0, noise=0
    )
    assert (stack.shift != 0).any()
    for frame, (x, y) in zip(stack.cube, stack.shift.int().tolist(), strict=True):
        # aligned(p) = frame(p - shift) is the reference, inside
        assert torch.equal(frame[:, 20 - y, 20 - x], stack.reference[:, 20, 20])


def test_random_numbers_are_settled():
    # benchmarks quote figures by seed: whoever changes the order of the draws changes them all
    stack = simulate_stack(scene(), frames=2, size=(8, 8), factor=2, cloud_fraction=0.3, seed=7)
    again = simulate_stack(scene(), frames=2, size=(8, 8), factor=2, cloud_fraction=0.3, seed=7)
    other = simulate_stack(scene(), frames=2, size=(8, 8), factor=2, cloud_fraction=0.3, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(stack, again, strict=True))
    assert not torch.equal(stack.shift, other.shift)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(stack.shift, torch.randint(-6, 7, (2, 2), generator=generator) / 2)


def test_clouds():
    options = {"frames": 4, "size": (48, 48), "factor": 2, "cloud_fraction": 0.4, "noise": 0.0, "offset": 0.0}
    stack = simulate_stack(scene(), **options, cloud_brightness=(2, 2))
    assert stack.clear.shape == (4, 48, 48)
    torch.testing.assert_close(stack.clear.float().mean((1, 2)), torch.full((4,), 0.6), atol=0.01, rtol=0)
    assert (stack.cube[:, 0][~stack.clear] == 2).all()
    assert (stack.cube[:, 0][stack.clear] < 2).all()

    def edges(clear: torch.Tensor) -> int:
        return int((clear[:, 1:] != clear[:, :-1]).sum())

    assert edges(simulate_stack(scene(), **options, cloud_scale=1.0).clear) > 2 * edges(stack.clear)
    default = simulate_stack(scene(), **options, cloud_scale=48 / 20, cloud_brightness=(2, 2))
    assert torch.equal(default.clear, stack.clear)


def test_no_frames_and_a_blurred_scene():
    stack = simulate_stack(scene(), frames=0, size=(8, 9), factor=2, cloud_fraction=0.5)
    assert stack.cube.shape == (0, 2, 8, 9)
    assert stack.clear.shape == (0, 8, 9)
    smooth = simulate_stack(scene(), frames=1, size=(16, 16), factor=2, blur=3.0, noise=0)
    sharp = simulate_stack(scene(), frames=1, size=(16, 16), factor=2, noise=0)
    assert smooth.reference.std() < sharp.reference.std() / 2


def test_every_origin_is_checked():
    options = {"frames": 20, "size": (20, 30), "factor": 2, "max_shift": 3.0}
    for origin in ((6, 6), (120 - 40 - 6, 120 - 60 - 6)):  # the outermost that are allowed
        assert simulate_stack(scene(), **options, origin=origin).cube.shape == (20, 2, 20, 30)
    for origin in ((5, 6), (6, 5), (120 - 40 - 5, 20), (20, 120 - 60 - 5), (119, 119)):
        with pytest.raises(
            ValueError, match=r"origin: expected y in 6 … 74 and x in 6 … 54.*got .*; move it"
        ):
            simulate_stack(scene(), **options, origin=origin)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"size": (70, 8)}, ValueError, "scene"),
        ({"size": (8, 8, 8)}, ValueError, "size"),
        ({"size": (0, 8)}, ValueError, "size"),
        ({"size": (8.0, 8)}, TypeError, "size"),
        ({"frames": -1}, ValueError, "frames"),
        ({"frames": 2.5}, TypeError, "frames"),
        ({"factor": 0}, ValueError, "factor"),
        ({"max_shift": -1.0}, ValueError, "max_shift"),
        ({"max_shift": float("nan")}, ValueError, "max_shift"),
        ({"noise": -0.1}, ValueError, "noise"),
        ({"noise": "much"}, TypeError, "noise"),
        ({"gain": (1.3, 0.7)}, ValueError, "gain"),
        ({"gain": 1.0}, ValueError, "gain"),
        ({"cloud_fraction": 1.5}, ValueError, "cloud_fraction"),
        ({"cloud_brightness": (1.0,)}, ValueError, "cloud_brightness"),
        ({"cloud_scale": 0.0}, ValueError, "cloud_scale"),
        ({"cloud_scale": 9.0}, ValueError, "cloud_scale"),
        ({"blur": -1.0}, ValueError, "blur"),
        ({"origin": (-1, 20)}, ValueError, "origin"),
        ({"origin": (20.5, 20)}, TypeError, "origin"),
        ({"origin": (20,)}, ValueError, "origin"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=f"{words}.*expected .*got .*; ") as caught:
        simulate_stack(scene(), **{"frames": 2, "size": (16, 16), "factor": 2} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "error"), [(np.zeros((1, 9, 9)), TypeError), (torch.zeros(1, 9, 9).int(), TypeError)]
)
def test_bad_scene(bad, error):
    with pytest.raises(error, match=r"scene: expected a floating.*got .*; "):
        simulate_stack(bad)
    with pytest.raises(ValueError, match="scene: expected shape"):
        simulate_stack(torch.zeros(9, 9))


def test_demo_scene():
    pytest.importorskip("spyndex")
    chip = open_demo_scene()
    assert chip.dims == ("band", "y", "x")
    assert chip.shape == (4, 300, 300)
    assert chip.band.values.tolist() == ["B02", "B03", "B04", "B08"]
    assert chip.dtype == np.float32
    assert 0.01 < float(chip.min()) < float(chip.max()) < 0.6  # reflectance, not digital numbers
    assert (np.diff(chip.x) == 10).all()
    assert (np.diff(chip.y) == -10).all()


def test_demo_scene_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "spyndex", None)
    with pytest.raises(ImportError, match=r'pip install "torchalign\[demo\]"'):
        open_demo_scene()


def test_demo_stack():
    pytest.importorskip("spyndex")
    stack = demo_stack(seed=3)
    cube, shift, clear = stack
    assert cube.dims == ("time", "band", "y", "x")
    assert cube.shape == (16, 4, 256, 256)
    assert cube.dtype == np.float32
    assert clear.dtype == bool
    assert np.unique(np.diff(cube.time)).size == 1
    assert (shift[0] == 0).all()
    assert np.abs(shift).max() <= 3
    share = clear.mean(("y", "x")).values
    assert share[0] == 1
    assert (share < 0.01).sum() == 1  # overcast
    assert ((share > 0.2) & (share < 0.95)).sum() >= 5
    nodata = cube.isnull()
    assert nodata.any(("band", "y", "x")).sum() == 1
    assert not (nodata.any("band") & clear).any()
    assert demo_stack(seed=3).cube.identical(cube)


def test_demo_shift_is_exact_for_whole_pixels_and_for_waves():
    import xarray as xr

    from torchalign.datasets import _fourier_shift

    chip = scene(64, 1).numpy().astype(float)
    moved = _fourier_shift(chip, np.array([[2.0, -3.0]]), (40, 40))[0]
    # frame(p) = scene(p + shift), cut from the middle; the mirrored chip has no jump that could ring
    np.testing.assert_allclose(moved, chip[:, 12 - 3 : 52 - 3, 12 + 2 : 52 + 2], atol=1e-12)
    y, x = np.indices((64, 64))
    wave = np.cos(2 * np.pi * (x + 0.5) * 5 / 128) * np.cos(2 * np.pi * (y + 0.5) * 9 / 128)  # even: no kink
    moved = _fourier_shift(wave[None], np.array([[0.3, -1.7]]), (40, 40))[0, 0]
    expected = np.cos(2 * np.pi * (x + 0.8) * 5 / 128) * np.cos(2 * np.pi * (y - 1.2) * 9 / 128)
    np.testing.assert_allclose(moved, expected[12:52, 12:52], atol=1e-12)
    # and the whole function agrees with itself on any scene
    dims = ("band", "y", "x")
    stack = demo_stack(scene=xr.DataArray(chip, {"band": ["a"]}, dims), size=(40, 40), frames=4, noise=0)
    np.testing.assert_allclose(stack.cube[0, 0], chip[0, 12:52, 12:52], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"frames": 3}, ValueError), ({"size": (299, 299)}, ValueError), ({"noise": -1}, ValueError)],
)
def test_demo_bad_arguments(options, error):
    pytest.importorskip("spyndex")
    with pytest.raises(error, match=r"expected .*got .*; "):
        demo_stack(**options)


@pytest.mark.parametrize("frames", [4, 5, 6, 7, 9])
def test_demo_always_has_its_cast(frames):
    pytest.importorskip("spyndex")
    stack = demo_stack(frames=frames, size=(64, 64))
    share = stack.clear.mean(("y", "x")).values
    assert share[0] == 1
    assert (share < 0.01).sum() == 1
    assert stack.cube.isnull().any(("band", "y", "x")).sum() == 1
