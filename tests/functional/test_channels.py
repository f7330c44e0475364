"""Every channel against its definition, on images small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from torchalign.functional.channels import center_crop, extract_channel, gradient_magnitude

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def cube():
    return torch.rand(2, 5, 6, 9, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "index",
    [
        0,
        2,
        5,
        -1,
        -6,
        np.int64(2),
        np.int8(-6),
        np.uint16(5),
        torch.tensor(3),
        torch.tensor(1, dtype=torch.uint8),
    ],
)
def test_band_index_of_any_integer_type(cube, index):
    assert torch.equal(extract_channel(cube, index), cube[:, :, int(index)])


def test_named_channels(cube):
    array = cube.numpy()
    red, green, blue = (array[:, :, band] for band in (3, 2, 1))
    expected = {
        "mean": array.mean(2),
        "rgb_mean": (red + green + blue) / 3,
        "luminance": 0.299 * red + 0.587 * green + 0.114 * blue,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(extract_channel(cube, name).numpy(), values, atol=1e-14)
    first = extract_channel(cube, "luminance", rgb_bands=(0, -1, np.int64(4)))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(first, (cube[:, :, [0, 5, 4]] * weights).sum(2))


def test_fewer_than_four_bands_are_taken_as_they_come(cube):
    three = cube[:, :, :3]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(extract_channel(three, "luminance"), (three * weights).sum(2))
    for bands in (1, 2, 3):
        few = cube[:, :, :bands]
        torch.testing.assert_close(extract_channel(few, "rgb_mean"), few.mean(2))
        if bands < 3:
            torch.testing.assert_close(extract_channel(few, "luminance"), few.mean(2))


def test_gradients_see_roads_of_every_direction():
    # satalign's channel is the mixed derivative: 0 on the first two
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    roads = {"north": (x - 12).abs() < 2, "east": (y - 9).abs() < 2, "north-east": (x - y - 2).abs() < 2}
    for name, road in roads.items():
        cube = road.float().expand(4, 20, 24)
        edges = extract_channel(cube, "gradients")
        assert edges.max() > 0.3, name
        assert (edges[4:-4, 4:-4] > 0.1).float().mean() < 0.5, name
    north = extract_channel(roads["north"].float().expand(4, 20, 24), "gradients")
    assert torch.equal(north, north[:1].expand_as(north))  # nothing changes along the road
    # the road covers columns 11 … 13: its edges lie between 10 and 11, and between 13 and 14
    assert (north[0] > 0).nonzero().flatten().tolist() == [10, 11, 13, 14]


def test_gradients_are_the_sobel_magnitude(cube):
    image = cube[:, :, 0]
    expected = [
        np.hypot(*(scipy.ndimage.sobel(frame, axis=axis, mode="nearest") / 8 for axis in (0, 1)))
        for frame in image.reshape(-1, 9, 10).numpy()
    ]
    np.testing.assert_allclose(gradient_magnitude(image).reshape(-1, 9, 10).numpy(), expected, atol=1e-14)
    torch.testing.assert_close(extract_channel(cube[:, :, :1], "gradients"), gradient_magnitude(image))
    # a plane: its slope, per pixel
    plane = 0.3 * torch.arange(8.0) + 0.4 * torch.arange(6.0)[:, None]
    torch.testing.assert_close(gradient_magnitude(plane)[1:-1, 1:-1], torch.full((4, 6), 0.5))


def test_gradients_have_a_derivative_everywhere():
    image = torch.zeros(1, 6, 7, dtype=torch.float64, requires_grad=True)
    gradient_magnitude(image).sum().backward()
    assert torch.equal(image.grad, torch.zeros_like(image))
    image = torch.rand(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient_magnitude, image)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 1), (2, 2)])
def test_gradients_of_tiny_images(size):
    assert gradient_magnitude(torch.rand(3, *size)).shape == (3, *size)
    assert gradient_magnitude(torch.zeros(0, *size)).shape == (0, *size)


def test_callables_and_modules(cube):
    assert torch.equal(extract_channel(cube, lambda bands: bands[..., 4, :, :]), cube[:, :, 4])
    module = torch.nn.Flatten(2)  # not a band reducer
    with pytest.raises(ValueError, match=r"channel\(cube\): expected .*, got .*; reduce the band axis"):
        extract_channel(cube, module)
    with pytest.raises(TypeError, match=r"channel\(cube\): expected a tensor, got ndarray; "):
        extract_channel(cube, lambda bands: bands[..., 0, :, :].numpy())
    with pytest.raises(ValueError, match="floating"):
        extract_channel(cube, lambda bands: bands[..., 0, :, :] > 0.5)

    class Ratio(torch.nn.Module):
        def forward(self, bands):
            return (bands[..., 1, :, :] - bands[..., 0, :, :]) / (bands[..., 1, :, :] + bands[..., 0, :, :])

    assert extract_channel(cube, Ratio()).shape == (2, 5, 9, 10)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_unusable_pixels_stay_unusable(cube, bad):
    cube[0, 1, 2, 4, 5] = bad
    for channel in ("mean", "rgb_mean", "luminance", 2):
        unusable = ~extract_channel(cube, channel).isfinite()
        assert unusable.sum() == 1, channel
        assert unusable[0, 1, 4, 5], channel
    unusable = ~extract_channel(cube, "gradients").isfinite()
    assert unusable[0, 1, 3:6, 4:7].sum() >= 8  # all that see it; the kernel's own centre counts 0
    assert unusable.sum() <= 9
    assert extract_channel(cube, 0).isfinite().all()  # a band that is not used does not matter


@pytest.mark.parametrize(
    ("channel", "bands", "kind", "cure"),
    [
        ("red", (3, 2, 1), ValueError, "choose"),
        (6, (3, 2, 1), ValueError, "6 bands"),
        (-7, (3, 2, 1), ValueError, "6 bands"),
        (1.0, (3, 2, 1), TypeError, "integer"),
        (None, (3, 2, 1), TypeError, "integer"),
        (torch.tensor(1.5), (3, 2, 1), TypeError, "integer"),
        (torch.tensor([1, 2]), (3, 2, 1), TypeError, "integer"),
        ("rgb_mean", (6, 2, 1), ValueError, "6 bands"),
        ("luminance", (3, 2, -7), ValueError, "6 bands"),
        ("gradients", (3, 2), ValueError, "three"),
        ("rgb_mean", (3, 2, 1.5), TypeError, "integer"),
    ],
    ids=str,
)
def test_bad_channels(cube, channel, bands, kind, cure):
    with pytest.raises(kind, match=f"(?s)(channel|rgb_bands): expected .*, got .*; .*{cure}"):
        extract_channel(cube, channel, rgb_bands=bands)


@pytest.mark.parametrize(
    ("size", "window", "origin"),
    [
        (None, (7, 8), (0, 0)),
        ((7, 8), (7, 8), (0, 0)),
        ((6, 7), (6, 7), (0, 0)),
        ((5, 6), (5, 6), (1, 1)),
        ((4, 4), (4, 4), (2, 1)),
        ((3, 3), (3, 3), (2, 2)),
        ((1, 1), (1, 1), (3, 3)),
        ((99, 3), (7, 3), (2, 0)),
        ((7, 99), (7, 8), (0, 0)),
    ],
)
def test_center_crop(size, window, origin):
    image = torch.arange(56.0).reshape(1, 7, 8)
    cropped, (x, y) = center_crop(image, size)
    assert cropped.shape == (1, *window)
    assert (x, y) == origin
    assert cropped[0, 0, 0] == image[0, y, x]
    right, below = 8 - x - window[1], 7 - y - window[0]
    assert 0 <= right - x <= 1
    assert 0 <= below - y <= 1
