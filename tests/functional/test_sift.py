"""SIFT against analytic truth, against OpenCV's, and against itself turned and moved."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scenes import fractal
from scipy import ndimage

from torchalign.functional.sift import describe, detect_blobs, dominant_orientation, patches_at, scale_space
from torchalign.models.extractors import SIFT


def extract(image, count=256, usable=None):
    space = scale_space(image)
    blobs = detect_blobs(space, usable, count)
    orientation = dominant_orientation(space, blobs)
    return blobs, orientation, describe(space, blobs, orientation)


def nearest_to(points, others):
    """Distance to the nearest other, and which it is."""
    return (points.double().unsqueeze(1) - others.double()).norm(dim=-1).min(1)


@pytest.fixture(scope="module")
def picture():
    """(96, 112) in [0, 1], with the spectrum of a landscape and real aliasing."""
    scene = fractal((480, 560), bands=1)[0]
    frame = scene.reshape(96, 5, 112, 5).mean((1, 3))
    return ((frame - frame.min()) / (frame.max() - frame.min()))[None]


def blob(centre, sigma, size=(80, 90)):
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    return torch.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize("sigma", [1.2, 2.0, 3.1, 5.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_blobs_are_found_where_and_as_large_as_they_are(sigma, sign):
    places = [(41.0, 38.0), (41.27, 38.61), (40.5, 37.5), (40.83, 38.25)]
    images = torch.stack([sign * 0.5 * blob(place, sigma) for place in places])
    found = detect_blobs(scale_space(images), None, 8)
    assert found.valid[:, 0].all()
    error = found.points[:, 0] - torch.tensor(places, dtype=torch.float64)
    assert float(error.norm(dim=-1).max()) < 0.02 * sigma
    assert float(error.mean(0).norm()) < 0.005 * sigma, "no pull to one side"
    # The difference of Gaussians of a blob of σ_b at the levels s and 2^(1/3) s, of an image that is taken to have
    # been blurred by 0.5 px, peaks where s · 2^(1/6) ≈ √(σ_b² - 0.25).
    ratio = found.sigma[:, 0] * 2 ** (1 / 6) / math.sqrt(sigma**2 - 0.25)
    assert float((ratio - 1).abs().max()) < 0.06


def test_what_is_long_and_thin_is_no_blob():
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (80, 90)), indexing="ij")
    long = 0.5 * torch.exp(-((x - 45) ** 2 / (2 * 12**2) + (y - 40) ** 2 / (2 * 2**2)))
    space = scale_space(long[None])
    near = {
        ratio: ((found.points - torch.tensor([45.0, 40.0])).norm(dim=-1) < 4) & found.valid
        for ratio in (10.0, 1e4)
        for found in [detect_blobs(space, None, 8, max_edge_ratio=ratio)]
    }
    assert not near[10.0].any()
    assert near[1e4].any()


def test_against_opencv(picture):
    cv2 = pytest.importorskip("cv2")
    blobs, orientation, descriptors = extract(picture, 300)
    levels = (picture[0] * 255).round().to(torch.uint8).numpy()
    theirs, descriptors2 = cv2.SIFT_create(contrastThreshold=0.006, edgeThreshold=10).detectAndCompute(
        levels, None
    )
    # OpenCV's doubled image lies a quarter of a pixel to the side
    points2 = np.array([point.pt for point in theirs]) + 0.0
    points2, sizes2 = torch.from_numpy(points2), torch.tensor([point.size for point in theirs])
    angles2 = torch.deg2rad(torch.tensor([point.angle for point in theirs]))
    points, sigma = blobs.points[0].double(), blobs.sigma[0]
    apart = torch.cdist(points, points2) + 5 * (2 * sigma[:, None] / sizes2).log().abs()
    distance, nearest = apart.min(1)
    same = blobs.valid[0] & (distance < 0.6)
    assert int(same.sum()) > 0.5 * int(blobs.valid.sum()), (
        "half of them are OpenCV's, which relocates and repeats"
    )
    turn = (orientation[0] - angles2[nearest] + math.pi) % (2 * math.pi) - math.pi
    agree = same & (turn.abs() < 0.15)
    assert int(agree.sum()) > 0.7 * int(same.sum())
    # their descriptor has the second-strongest orientations too, is rounded to bytes, and is not a root yet
    root = torch.from_numpy(descriptors2)[nearest]
    root = torch.nn.functional.normalize(torch.nn.functional.normalize(root, p=1, dim=1).sqrt(), dim=1)
    alike = (root * descriptors[0]).sum(-1)[agree]
    assert float(alike.median()) > 0.98
    assert float(alike.quantile(0.1)) > 0.9


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turns_with_the_picture(picture, quarters):
    height, width = picture.shape[-2:]
    blobs, orientation, descriptors = extract(picture)
    turned, orientation2, descriptors2 = extract(picture.rot90(quarters, (-2, -1)))
    # where the pixels of the turned picture come from; (x, y) from the middle
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    angle = quarters * math.pi / 2
    back = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle2 = middle.flip(0) if quarters % 2 else middle
    points2 = (turned.points[0] - middle2) @ back.T + middle
    distance, nearest = nearest_to(blobs.points[0], points2)
    same = blobs.valid[0] & (distance < 0.05)
    assert int(same.sum()) > 0.9 * int(blobs.valid.sum())
    turn = (orientation2[0][nearest] + angle - orientation[0] + math.pi) % (2 * math.pi) - math.pi
    same = same & (turn.abs() < 0.02)
    assert int(same.sum()) > 0.85 * int(blobs.valid.sum())
    alike = (descriptors[0] * descriptors2[0][nearest]).sum(-1)[same]
    assert float(alike.quantile(0.05)) > 0.97


def test_moves_with_the_picture():
    scene = fractal((640, 640), bands=1)[0]
    # windows 10 and 15 fine pixels apart: 2 and 3 coarse ones, exactly
    first, second = (
        scene[y : y + 560, x : x + 560].reshape(112, 5, 112, 5).mean((1, 3))[None]
        for y, x in ((0, 0), (15, 10))
    )
    one, two = SIFT(400)(first), SIFT(400)(second)
    distance, nearest = nearest_to(one.keypoints[0], two.keypoints[0] + torch.tensor([2.0, 3.0]))
    within = (
        (one.keypoints[0] > 16).all(-1) & (one.keypoints[0] < 96).all(-1) & (one.scales[0] < 3) & one.valid[0]
    )
    assert int(within.sum()) > 50
    assert float((distance[within] < 0.02).float().mean()) > 0.9
    alike = (one.descriptors[0] * two.descriptors[0][nearest]).sum(-1)[within & (distance < 0.02)]
    assert float(alike.quantile(0.1)) > 0.97


def test_upright_descriptors_do_not_turn(picture):
    space = scale_space(picture)
    blobs = detect_blobs(space, None, 64)
    upright = describe(space, blobs, None)
    torch.testing.assert_close(upright, describe(space, blobs, torch.zeros(1, 64)))
    assert float((upright - describe(space, blobs, torch.full((1, 64), 1.0))).norm(dim=-1).min()) > 0.05


def test_levels_are_gaussian(picture):
    # against scipy, from the doubled image on: σ = 1.6 · 2^(i/3) in doubled pixels
    space = scale_space(picture.double())
    height, width = space.sizes[0]
    assert (height, width) == (191, 223)
    levels = space.levels[0, : 6 * height * width].view(6, height, width)
    doubled = torch.nn.functional.interpolate(
        picture.double()[None], (191, 223), mode="bilinear", align_corners=True
    )
    for i, level in enumerate(levels):
        # the image is taken to have been blurred by 0.5 px; scipy's "mirror" is the edge's reflection
        sigma = math.sqrt((1.6 * 2 ** (i / 3)) ** 2 - 1)
        expected = ndimage.gaussian_filter(doubled[0, 0].numpy(), sigma, mode="mirror", truncate=5)
        np.testing.assert_allclose(level[12:-12, 12:-12], expected[12:-12, 12:-12], atol=3e-3)
    # the next octave is every second pixel of level 3
    second = space.levels[0, 6 * height * width :][: 96 * 112].view(96, 112)
    torch.testing.assert_close(second, levels[3, ::2, ::2])


def test_in_double_precision(picture):
    expected = SIFT(100)(picture)
    found = SIFT(100)(picture.double())
    assert found.keypoints.dtype == found.descriptors.dtype == torch.float64
    distance, nearest = nearest_to(expected.keypoints[0], found.keypoints[0])
    assert float((distance < 1e-3).double().mean()) > 0.97
    same = distance < 1e-3
    alike = (expected.descriptors[0].double() * found.descriptors[0][nearest]).sum(-1)[same]
    assert float(alike.median()) > 0.9999


def test_patches_show_what_is_there():
    # a picture whose value tells its place: x + 1000 y, smooth, so that averages are exact
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    image = (x + 1000 * y)[None].double()
    points = torch.tensor([[[60.25, 50.5], [64.0, 48.0], [63.5, 47.5]]], dtype=torch.float64)
    sigma = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)  # the last two are read from coarser levels
    turn = torch.tensor([[0.0, math.pi / 2, 0.3]], dtype=torch.float64)
    patches = patches_at(image, points, sigma, turn, side=8, reach=6.0)
    line = (torch.arange(8, dtype=torch.float64) - 3.5) * 1.5
    for k in range(3):
        v, u = torch.meshgrid(line * sigma[0, k], line * sigma[0, k], indexing="ij")
        cosine, sine = turn[0, k].cos(), turn[0, k].sin()
        expected = (points[0, k, 0] + cosine * u - sine * v) + 1000 * (
            points[0, k, 1] + sine * u + cosine * v
        )
        torch.testing.assert_close(patches[0, k], expected, atol=1e-6, rtol=1e-9)
