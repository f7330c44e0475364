"""Synthetic misregistration, losses, the layer, the metric, the callback, streaming."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import multiprocessing
import pickle
import warnings

import numpy as np
import pytest
import spawned
import torch
from scenes import Waves, _pixels, assert_derivative, fractal, fractal_stack, pairs
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torchalign as ta
from torchalign.datasets import simulate_stack
from torchalign.functional.affine import (
    center_displacement,
    identity_warp,
    invert_warp,
    rescale_warp,
    transform_points,
    translation_warp,
)
from torchalign.training.misregistration import misregister, random_warp
from torchalign.training.streaming import _run

v2 = pytest.importorskip("torchvision.transforms.v2")
tv = pytest.importorskip("torchvision.tv_tensors")

MOTIONS = ["translation", "euclidean", "similarity", "affine", "homography"]
SIZE = (96, 120)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------- synthetic misregistration


@pytest.mark.parametrize("motion", MOTIONS)
def test_random_warps_keep_their_bounds(motion):
    warp = random_warp(
        (3, 700), SIZE, max_translation=2.0, max_deformation=1.5, motion=motion, p=0.8, generator=seeded(),
        dtype=torch.float64,
    )  # fmt: skip
    warp = warp.flatten(0, 1)
    assert warp.shape[-2:] == ((3, 3) if motion == "homography" else (2, 3))
    centre = center_displacement(warp, SIZE)
    assert 1.9 < float(centre.norm(dim=-1).max()) <= 2
    # uniform in the disc: half of the area lies beyond 1/√2 of the radius; and no direction is preferred
    moved = centre[centre.norm(dim=-1) > 0]
    assert abs(len(moved) / 2100 - 0.8) < 0.03
    assert abs(float((moved.norm(dim=-1) > math.sqrt(2)).double().mean()) - 0.5) < 0.05
    assert moved.mean(0).abs().max() < 0.1
    points = _pixels(SIZE).reshape(-1, 2)[::37]
    relative = transform_points(warp, points) - points - centre[:, None]
    largest = float(relative.norm(dim=-1).max())
    assert largest < 1e-9 if motion == "translation" else 0.8 < largest < 1.5 * 1.05
    assert torch.equal(
        warp[centre.norm(dim=-1) == 0][0], identity_warp(homography=motion == "homography").double()
    )


@pytest.mark.parametrize("motion", MOTIONS)
def test_truth_against_an_analytic_scene(motion):
    # the scene itself, evaluated where the returned warp says: no interpolation kernel at all
    scene = Waves(1, shortest=4.0, seed=5)
    frame = scene.at(_pixels(SIZE)).float()
    transform = ta.RandomMisregistration(1.5, motion=motion, generator=seeded(1))
    moved, warp = transform(tv.Video(frame.expand(8, 1, *SIZE)))
    truth = pairs(warp.double(), SIZE, scene=scene).cube
    moved = moved.as_subclass(torch.Tensor)
    estimate = ta.PCC().estimate(moved, truth)
    assert estimate.valid.all()
    # the gate calls a frame in place that cannot be made better, its σ then says by how much
    assert (estimate.warp[..., 2].norm(dim=-1) + estimate.sigma).max() < 0.01
    inside = (..., slice(10, -10), slice(10, -10))
    assert (moved - truth)[inside].abs().max() < 0.02 * float(frame.std())


@pytest.mark.parametrize("scene", ["landsat", "fractal"])
def test_truth_against_high_resolution(scene, request):
    # windows of a scene of five times the resolution, cut at whole pixels of it and averaged
    ground = request.getfixturevalue("landsat") if scene == "landsat" else fractal((768, 768))
    data = simulate_stack(
        ground, frames=10, size=(128, 128), factor=5, noise=0, gain=(1, 1), offset=0, max_shift=1.5
    )
    original = data.reference.expand_as(data.cube)

    def errors(kernel):
        moved = misregister(original, translation_warp(data.shift), kernel=kernel)
        estimate = ta.PCC().estimate(moved, data.cube)
        assert estimate.valid.all()
        return estimate.warp[..., 2].norm(dim=-1)

    assert errors("sinc").max() < 0.01
    # the teeth of this test: the kernel that everyone uses fails it
    assert errors("bicubic").max() > 0.012


def test_an_aligner_finds_the_returned_warp():
    data = fractal_stack(1, size=(128, 128), bands=3, noise=0.0)
    frames = data.reference.expand(8, *data.reference.shape)
    moved, warp = ta.RandomMisregistration(2.0, generator=seeded(3))(tv.Video(frames))
    estimate = ta.PCC().estimate(moved.as_subclass(torch.Tensor), frames)
    assert (estimate.warp - warp).abs().max() < 0.04
    # and the warp brings the frame back
    back = ta.warp(moved.as_subclass(torch.Tensor), warp, interpolation="bicubic")
    inside = (..., slice(8, -8), slice(8, -8))
    assert (back - frames)[inside].abs().mean() < 0.2 * (moved - frames)[inside].abs().mean()


def test_one_geometry_for_all_kinds_of_inputs():
    spot = torch.zeros(1, 64, 64)
    spot[:, 20:23, 30:33] = 1
    sample = {
        "image": tv.Image(spot), "mask": tv.Mask((spot[0] > 0).long()), "label": 3,
        "boxes": tv.BoundingBoxes([[30.0, 20.0, 33.0, 23.0]], format="XYXY", canvas_size=(64, 64)),
        "xywh": tv.BoundingBoxes([[30, 20, 3, 3]], format="XYWH", canvas_size=(64, 64)),
        "points": tv.KeyPoints([[31.5, 21.5]], canvas_size=(64, 64)),
        "extra": torch.arange(4.0),
    }  # fmt: skip
    out, warp = ta.RandomMisregistration(6.0, motion="affine", generator=seeded(2))(sample)
    x, y = transform_points(invert_warp(warp), torch.tensor([[31.0, 21.0]]))[0].tolist()
    assert abs(x - 31) + abs(y - 21) > 2
    rows, columns = torch.arange(64.0)[:, None], torch.arange(64.0)
    image = out["image"][0].as_subclass(torch.Tensor)
    assert float((image * columns).sum() / image.sum()) == pytest.approx(x, abs=0.02)
    assert float((image * rows).sum() / image.sum()) == pytest.approx(y, abs=0.02)
    mask = out["mask"].as_subclass(torch.Tensor)
    assert set(mask.unique().tolist()) == {0, 1}
    assert float((mask * columns).sum() / mask.sum()) == pytest.approx(x, abs=0.6)
    x0, y0, x1, y1 = out["boxes"][0].tolist()
    assert ((x0 + x1) / 2 - 0.5, (y0 + y1) / 2 - 0.5) == pytest.approx((x, y), abs=1e-3)
    assert x1 - x0 == pytest.approx(3, abs=0.1)
    assert out["xywh"].format.value == "XYWH"
    assert (out["xywh"][0, :2] - torch.tensor([x0, y0])).abs().max() <= 1
    assert out["points"][0].sub(0.5).tolist() == pytest.approx([x, y], abs=1e-3)
    assert out["label"] == 3
    assert torch.equal(out["extra"], sample["extra"])
    for name in ("image", "mask", "boxes", "points"):
        assert type(out[name]) is type(sample[name]), name


def test_inputs_of_another_size_move_by_the_same_share():
    fine, coarse = torch.rand(1, 96, 96), torch.rand(1, 48, 48)
    (_, moved), warp = ta.RandomMisregistration(3.0, generator=seeded())(tv.Image(fine), tv.Image(coarse))
    expected = misregister(coarse, rescale_warp(warp, 0.5))
    assert torch.equal(moved.as_subclass(torch.Tensor), expected)


def test_per_frame_per_sample_per_band():
    frames = torch.rand(2, 3, 4, 40, 40)
    for options, rows in ((({"per": "frame"}), 6), ({"per": "sample"}, 2)):
        moved, warp = ta.RandomMisregistration(**options)(frames)
        assert warp.shape == (2, 3, 2, 3)
        assert len(warp.flatten(0, 1).unique(dim=0)) == rows
        assert torch.equal(moved, misregister(frames, warp))
    moved, warp = ta.RandomMisregistration(same_on_bands=False)(frames)
    assert warp.shape == (2, 3, 4, 2, 3)
    assert len(warp.flatten(0, 2).unique(dim=0)) == 24
    one = misregister(frames[1, 2, 3][None], warp[1, 2, 3])[0]
    torch.testing.assert_close(moved[1, 2, 3], one)
    image, mask = tv.Image(frames[0, 0]), tv.Mask(torch.ones(40, 40).long())
    (_, kept), _ = ta.RandomMisregistration(same_on_bands=False)(image, mask)
    assert kept is mask
    masks = tv.Mask(torch.randint(0, 5, (3, 40, 40)))
    (_, moved), warp = ta.RandomMisregistration(3.0)(tv.Video(frames[0]), masks)
    for t in range(3):
        expected = misregister(masks[t][None].as_subclass(torch.Tensor), warp[t], kernel="nearest")[0]
        assert torch.equal(moved[t].as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("kernel", ["sinc", "bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["reflection", "border", "zeros"])
def test_kernels(kernel, padding_mode):
    options = {"kernel": kernel, "padding_mode": padding_mode}
    frames = torch.rand(2, 3, 40, 46)
    assert torch.equal(misregister(frames, identity_warp(2), **options), frames)
    whole = translation_warp(torch.tensor([[2.0, -1.0], [0.0, 3.0]]))
    moved = misregister(frames, whole, **options)
    torch.testing.assert_close(moved[0, :, 4:-4, 4:-4], frames[0, :, 3:-5, 6:-2], atol=1e-5, rtol=0)
    for dtype, high in ((torch.uint8, 255), (torch.int16, 3000), (torch.bool, 1)):
        numbers = (frames * high).round().to(dtype)
        half = misregister(numbers, whole * 0.5 + identity_warp(2) * 0.5, **options)
        assert half.dtype == dtype
    holed = frames.clone()
    holed[:, :, 15, 15] = float("nan")
    half = misregister(holed, translation_warp(torch.tensor([[0.5, 0.5], [0.2, 0.0]])), **options)
    clean = misregister(frames, translation_warp(torch.tensor([[0.5, 0.5], [0.2, 0.0]])), **options)
    assert half.isnan().sum() == 6  # one pixel of every band, as it was
    far = (..., slice(26, None), slice(None))
    torch.testing.assert_close(half[far], clean[far], atol=1e-6, rtol=0)
    assert half.nan_to_num(0.5).sub(0.5).abs().max() < 1.5


def test_seeded_and_p():
    frame = torch.rand(2, 32, 32)
    first, second = (ta.RandomMisregistration(generator=seeded(4)) for _ in range(2))
    for _ in range(3):
        assert all(torch.equal(one, two) for one, two in zip(first(frame), second(frame), strict=True))
    torch.manual_seed(9)
    expected = ta.RandomMisregistration()(frame)
    torch.manual_seed(9)
    assert torch.equal(ta.RandomMisregistration()(frame)[1], expected[1])
    moved, warp = ta.RandomMisregistration(p=0.0)(frame)
    assert torch.equal(moved, frame)
    assert torch.equal(warp, identity_warp())
    assert ta.RandomMisregistration(return_warp=False)(frame).shape == frame.shape
    pipeline = v2.Compose([ta.RandomMisregistration(return_warp=False), v2.RandomHorizontalFlip(1.0)])
    assert pipeline(tv.Image(frame)).shape == frame.shape
    assert "max_translation=2.5" in repr(ta.RandomMisregistration(2.5))


@pytest.mark.parametrize("motion", MOTIONS)
def test_kornia_form(motion):
    kornia = pytest.importorskip("kornia.augmentation")
    frames = torch.rand(4, 3, 48, 56)
    augment = ta.RandomMisregistration2D(1.5, motion=motion, generator=seeded(1))
    moved = augment(frames)
    # one core: the same numbers as the other shell
    other, warp = ta.RandomMisregistration(1.5, motion=motion, generator=seeded(1))(frames)
    torch.testing.assert_close(augment.warp[:, : warp.shape[-2]], warp)
    torch.testing.assert_close(moved, other)
    # kornia's word is the other way round
    product = augment.transform_matrix @ augment.warp
    product = product / product[:, 2:, 2:]
    torch.testing.assert_close(product, torch.eye(3).expand(4, 3, 3), atol=1e-4, rtol=0)
    back = augment.inverse(moved)
    inside = (..., slice(10, -10), slice(10, -10))
    assert (back - frames)[inside].square().mean() < 0.6 * (moved - frames)[inside].square().mean()
    sequence = kornia.AugmentationSequential(
        ta.RandomMisregistration2D(3.0, motion=motion), data_keys=["input", "mask", "keypoints"]
    )
    spot = torch.zeros(4, 1, 48, 56)
    spot[:, :, 20:25, 30:35] = 1
    image, mask, points = sequence(spot, spot, torch.full((4, 1, 2), 22.0) + torch.tensor([10.0, 0.0]))
    rows, columns = torch.arange(48.0)[:, None], torch.arange(56.0)
    for axis, index in ((0, columns), (1, rows)):
        found = (image * index).sum((1, 2, 3)) / image.sum((1, 2, 3))
        torch.testing.assert_close(found, points[:, 0, axis], atol=0.03, rtol=0)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    same = ta.RandomMisregistration2D(same_on_batch=True)
    same(frames)
    assert len(same.warp.unique(dim=0)) == 1
    with pytest.raises(TypeError, match=r"RandomMisregistration2D.* unexpected keyword argument 'per'"):
        ta.RandomMisregistration2D(per="sample")  # an option of the other shell alone


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"max_translation": -1}, ValueError), ({"max_translation": "1"}, TypeError),
        ({"max_deformation": -1}, ValueError), ({"motion": "shear"}, ValueError), ({"p": 1.1}, ValueError),
        ({"kernel": "lanczos"}, ValueError), ({"padding_mode": "wrap"}, ValueError), ({"generator": 3}, TypeError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_of_misregistration(options, kind):
    for form in (ta.RandomMisregistration, ta.RandomMisregistration2D):
        with pytest.raises(kind, match=f"{next(iter(options))}: expected .* got .*;"):
            form(**options)
    with pytest.raises(ValueError, match="per: "):
        ta.RandomMisregistration(per="band")


def test_bad_samples_of_misregistration():
    transform = ta.RandomMisregistration()
    image = pytest.importorskip("PIL.Image").new("RGB", (32, 32))
    with pytest.raises(TypeError, match="ToImage"):
        transform(image)
    with pytest.raises(ValueError, match="band axis"):
        transform(torch.rand(32, 32))
    with pytest.raises(ValueError, match="leading dimensions"):
        transform(tv.Video(torch.rand(2, 1, 32, 32)), tv.Image(torch.rand(1, 32, 32)))
    with pytest.raises(ValueError, match="mask"):
        transform(tv.Video(torch.rand(2, 1, 32, 32)), tv.Mask(torch.ones(32, 32)))
    boxes = tv.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(32, 32))
    with pytest.raises(ValueError, match="frame by frame"):
        transform(tv.Video(torch.rand(2, 1, 32, 32)), boxes)


# ------------------------------------------------------------------------------------------------ workers, imports


class Frames(Dataset):
    def __init__(self, generator=None):
        self.transform = ta.RandomMisregistration(generator=generator)
        self.align = ta.AlignToFirst()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        moved, warp = self.transform(torch.rand(2, 1, 48, 48, generator=seeded(index)))
        return self.align(moved), warp


def warps_of(dataset, context, epochs=1, seed=5):
    torch.manual_seed(seed)
    loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context=context)
    return [torch.cat([warp for _, warp in loader]).flatten(0, 1) for _ in range(epochs)]


@pytest.mark.slow
def test_forked_workers():
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    for generator in (None, seeded(3)):
        first, second = warps_of(Frames(generator), "fork", epochs=2)
        # no two workers, frames or epochs draw the same
        assert len(torch.cat((first, second)).unique(dim=0)) == 32
    # and yet all is as seeded
    assert torch.equal(warps_of(Frames(), "fork")[0], warps_of(Frames(), "fork")[0])
    once, again = (warps_of(Frames(seeded(3)), "fork")[0] for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, warps_of(Frames(seeded(4)), "fork")[0])


def test_spawned_workers_and_no_cuda():
    loader = DataLoader(spawned.Frames(), 1, num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    assert len(batches) == 2
    for aligned, warp, woken in batches:
        assert aligned.shape == (1, 2, 1, 64, 64)
        assert warp.shape == (1, 2, 2, 3)
        assert not woken.any()


def test_modules_copy_and_pickle():
    series = fractal_stack(3, size=(64, 64), bands=2).cube
    moving, reference = series[:2], series[1:]
    modules = {
        "layer": (ta.AlignToFirst(onto=1), (series,)),
        "loss": (ta.AlignmentLoss("shift"), (moving, reference)),
        "zncc": (ta.AlignmentLoss(), (moving, reference)),
        "transform": (ta.RandomMisregistration(generator=seeded()), (series,)),
        "kornia": (ta.RandomMisregistration2D(generator=seeded()), (series,)),
    }
    for name, (module, given) in modules.items():
        others = [
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module),
            copy.deepcopy(module).to("cpu").half().float(),
        ]
        fresh = copy.deepcopy(module)
        fresh.load_state_dict(module.state_dict())
        expected = module(*given)
        for other in (*others, fresh):
            for one, two in zip(
                torch.utils._pytree.tree_leaves(other(*given)),
                torch.utils._pytree.tree_leaves(expected),
                strict=True,
            ):
                assert torch.equal(one, two), name
        assert repr(fresh) == repr(module)


# --------------------------------------------------------------------------------------------------------- losses


def images(seed=0, size=(24, 28), count=2):
    random = seeded(seed)
    smooth = torch.nn.functional.avg_pool2d(
        torch.randn(count, 2, size[0] + 4, size[1] + 4, generator=random, dtype=torch.float64), 5, 1
    )
    return smooth, smooth + 0.1 * torch.randn(smooth.shape, generator=random, dtype=torch.float64)


def test_losses_against_numpy():
    moving, reference = images()
    by_band = [
        [np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1] for a, b in zip(*pair, strict=True)]
        for pair in zip(moving, reference, strict=True)
    ]
    zncc = ta.AlignmentLoss("zncc", reduction="none")(moving, reference)
    assert zncc.tolist() == pytest.approx([1 - np.mean(values) for values in by_band], abs=1e-10)
    whole = []
    for a, b in zip(moving.numpy(), reference.numpy(), strict=True):
        a, b = (x.ravel() - x.mean() for x in (a, b))
        whole.append(np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2))
    ecc = ta.AlignmentLoss("ecc", reduction="none")(moving, reference)
    assert ecc.tolist() == pytest.approx(whole, abs=1e-10)
    assert float(ta.AlignmentLoss("ecc")(moving, reference)) == pytest.approx(np.mean(whole))
    assert float(ta.AlignmentLoss("ecc", reduction="sum")(moving, reference)) == pytest.approx(np.sum(whole))


@pytest.mark.parametrize("kind", ["zncc", "ecc"])
def test_gradcheck_of_correlations(kind):
    moving, reference = images(size=(4, 5), count=1)
    mask = torch.rand(4, 5) > 0.2
    warp = torch.tensor([[[1.02, 0.01, 0.3], [-0.02, 0.99, 0.45]]], dtype=torch.float64)
    loss = ta.AlignmentLoss(kind)
    inputs = tuple(tensor.requires_grad_() for tensor in (moving, reference, warp))
    assert torch.autograd.gradcheck(lambda m, r, w: loss(m, r, w, mask), inputs)
    assert torch.autograd.gradcheck(loss, inputs[:2])


def test_gradient_of_shift():
    data = fractal_stack(2, size=(64, 64), bands=1, noise=0.002)
    moving, reference = data.cube.double(), data.reference.expand_as(data.cube).double()
    loss = ta.AlignmentLoss("shift", reduction="none", aligner=ta.PCC(robust=False))
    assert_derivative(loss, (moving, reference), directions=2, tolerance=2e-3)
    warp = translation_warp(torch.tensor([[0.4, -0.3], [-0.6, 0.2]], dtype=torch.float64))
    assert_derivative(lambda w: loss(moving, reference, w), (warp,), directions=2, tolerance=2e-2)


@pytest.mark.parametrize("kind", ["zncc", "ecc", "shift"])
def test_losses_of_bad_data(kind):
    data = fractal_stack(4, size=(64, 64), bands=2)
    moving, reference = data.cube.clone(), data.reference.expand_as(data.cube)
    expected = ta.AlignmentLoss(kind, reduction="none")(moving, reference)
    moving[1] = float("nan")
    moving[2] = 0.5
    moving.requires_grad_()
    mask = torch.ones(4, 64, 64, dtype=torch.bool)
    mask[3] = False
    loss = ta.AlignmentLoss(kind, reduction="none")(moving, reference, None, mask)
    torch.testing.assert_close(loss[0], expected[0], atol=1e-4, rtol=1e-4)
    unrelated = {"zncc": 1.0, "ecc": 2.0, "shift": 0.0}[kind]
    torch.testing.assert_close(loss[1:], torch.full((3,), unrelated), atol=1e-5, rtol=0)
    loss.sum().backward()
    assert moving.grad.isfinite().all()
    assert moving.grad[0].abs().sum() > 0
    assert moving.grad[1:].abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["zncc", "ecc", "shift"])
def test_losses_mask_scale_and_fall(kind):
    data = fractal_stack(1, size=(96, 96), bands=2, noise=0)
    reference = data.reference[None].double()
    loss = ta.AlignmentLoss(kind)
    shifts = torch.tensor([0.0, 0.4, 0.8, 1.6], dtype=torch.float64)
    moved = [
        misregister(reference, translation_warp(torch.tensor([[s, 0]], dtype=torch.float64))) for s in shifts
    ]
    values = [float(loss(3 * frame - 7, reference)) for frame in moved]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values == sorted(values)
    assert values[3] > 3 * values[1] > 0
    # the warp undoes it
    undone = loss(moved[2], reference, translation_warp(torch.tensor([[0.8, 0]], dtype=torch.float64)))
    assert float(undone) < 0.05 * values[2]
    # what is masked does not count
    mask = torch.ones(96, 96, dtype=torch.bool)
    mask[:30, :30] = False
    spoilt = moved[1].clone()
    spoilt[..., :30, :30] = 1e3
    clean = torch.where(mask, moved[1], float("nan"))
    assert float(loss(spoilt, reference, None, mask)) == pytest.approx(
        float(loss(clean, reference)), rel=1e-6
    )
    # half precision in, float32 within
    half = loss(moved[1].half(), reference.half())
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(values[1], rel=0.03, abs=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(loss(moved[1].float(), reference.float())) == pytest.approx(
            values[1], rel=1e-3, abs=1e-4
        )


def test_a_network_learns_warps_from_the_loss():
    data = fractal_stack(4, size=(64, 64), bands=1, noise=0.002, max_shift=1.5)
    torch.manual_seed(0)
    shift = nn.Parameter(torch.zeros(4, 2))
    optimiser = torch.optim.Adam([shift], 0.1)
    loss = ta.AlignmentLoss("zncc")
    reference = data.reference.expand_as(data.cube)
    for _ in range(60):
        optimiser.zero_grad()
        loss(data.cube, reference, translation_warp(shift)).backward()
        optimiser.step()
    assert (shift.detach() - data.shift).norm(dim=-1).max() < 0.08


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"kind": "mse"}, ValueError), ({"reduction": "max"}, ValueError), ({"aligner": 3}, TypeError),
        ({"interpolation": "nearest"}, ValueError), ({"max_shift": 0}, ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_of_losses(options, kind):
    with pytest.raises(kind, match=f"{next(iter(options))}: expected .* got .*;"):
        ta.AlignmentLoss(**{"kind": "shift", **options})


def test_bad_arguments_of_losses():
    frames = torch.rand(2, 3, 32, 32)
    loss = ta.AlignmentLoss()
    for given, kind in (
        ((frames, frames[:, :2]), ValueError), ((frames, frames.double()), TypeError),
        ((frames.long(), frames), TypeError), ((frames[0, 0], frames[0, 0]), ValueError),
        ((frames, frames, identity_warp(3)), ValueError), ((frames, frames, None, frames), TypeError),
        ((frames, frames.to("meta")), ValueError),
    ):  # fmt: skip
        with pytest.raises(kind, match=r"expected .* got .*;"):
            loss(*given)


# ------------------------------------------------------------------------------------------------------ the layer


def test_align_to_first():
    data = fractal_stack(4, size=(96, 96), bands=2, noise=0.002)
    series = torch.stack([data.cube, data.cube.flip(0)])  # (B, T, C, H, W)
    truth = torch.stack([data.shift, data.shift.flip(0)])
    for onto, index in (("first", 0), (2, 2), (-1, 3)):
        aligned = ta.AlignToFirst(onto=onto)(series)
        assert torch.equal(aligned[:, index], series[:, index])
        left = ta.PCC().estimate(aligned, aligned[:, index])
        assert left.valid.all()
        assert center_displacement(left.warp, (96, 96)).norm(dim=-1).max() < 0.05
        expected = ta.PCC(interpolation="bicubic")(series, series[:, index])
        assert torch.equal(aligned, expected.aligned)
        moved = expected.estimate.warp[..., 2] - (truth - truth[:, index, None])
        assert moved.norm(dim=-1).max() < 0.05
    aligned = ta.AlignToFirst(ta.PCC(max_translation=8), onto="median")(series)
    left = ta.PCC().estimate(aligned, aligned[:, 0])
    assert center_displacement(left.warp, (96, 96)).norm(dim=-1).max() < 0.15
    network = nn.Sequential(ta.AlignToFirst(), nn.Flatten(1, 2), nn.Conv2d(8, 1, 1))
    assert network(series).shape == (2, 1, 96, 96)
    assert not ta.AlignToFirst().state_dict()


def test_align_to_first_with_clouds():
    data = fractal_stack(5, size=(96, 96), bands=2)
    series = data.cube.clone()
    series[2] = float("nan")
    series[3] = 0.7
    for onto in ("first", "median"):
        aligned = ta.AlignToFirst(onto=onto)(series)
        assert aligned[2].isnan().all()
        assert torch.equal(aligned[3], series[3])
        assert aligned[[0, 1, 4]].isfinite().all()
        assert not torch.equal(aligned[1], series[1])  # clear frames are aligned beside the others
    mask = torch.ones(5, 96, 96, dtype=torch.bool)
    mask[:, :20] = False
    spoilt = series.clone()
    spoilt[..., :20, :] = torch.linspace(0, 5, 5)[:, None, None, None]
    expected = ta.AlignToFirst(onto="median")(torch.where(mask[:, None], series, float("nan")))
    aligned = ta.AlignToFirst(onto="median")(spoilt, mask)
    rows = (slice(0, 2), slice(None), slice(30, 90))
    torch.testing.assert_close(aligned[rows], expected[rows], atol=1e-3, rtol=0)


def test_gradients_through_the_layer():
    data = fractal_stack(2, size=(64, 64), bands=1)
    gain = nn.Parameter(torch.ones(()))
    leaf = data.cube.clone().requires_grad_()
    ta.AlignToFirst()(gain * leaf).square().mean().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[1].abs().sum() > 0
    assert gain.grad.abs() > 0


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"onto": "last"}, ValueError), ({"onto": 1.5}, TypeError), ({"onto": True}, TypeError),
        ({"aligner": 1}, TypeError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_of_the_layer(options, kind):
    with pytest.raises(kind, match=f"{next(iter(options))}: expected .* got .*;"):
        ta.AlignToFirst(**options)
    with pytest.raises(ValueError, match="onto: expected an index"):
        ta.AlignToFirst(onto=5)(torch.rand(3, 1, 32, 32))


# ----------------------------------------------------------------------------------------- the metric, the callback


def test_registration_error():
    torchmetrics = pytest.importorskip("torchmetrics")
    data = fractal_stack(8, size=(96, 96), bands=2)
    reference = data.reference.expand_as(data.cube)
    metric = ta.RegistrationError(worst=3)
    assert isinstance(metric, torchmetrics.Metric)
    metric(data.cube[:4], reference[:4])
    metric.update(data.cube[4:], reference[4:], torch.ones(96, 96, dtype=torch.bool))
    result = metric.compute()
    truth = data.shift.norm(dim=-1)
    assert int(result["measured"]) == 8
    assert float(result["mean"]) == pytest.approx(float(truth.mean()), abs=0.05)
    assert float(result["median"]) == pytest.approx(float(truth.quantile(0.5)), abs=0.6)
    assert result["worst_ids"].tolist() == truth.topk(3).indices.tolist()
    torch.testing.assert_close(result["worst"], truth.topk(3).values, atol=0.08, rtol=0)
    again = pickle.loads(pickle.dumps(metric)).compute()
    assert all(torch.equal(again[name], result[name]) for name in result)
    metric.reset()
    metric.update(torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 64, 64))
    assert (int(metric.compute()["measured"]), int(metric.compute()["unmatched"])) == (0, 2)
    assert metric.compute()["median"].isnan()
    with pytest.raises(ValueError, match="window"):
        ta.RegistrationError(window=0)


def _gathered(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
    data = fractal_stack(8, size=(64, 64), bands=1)
    part = slice(4 * rank, 4 * rank + 4)
    metric = ta.RegistrationError(worst=3)
    metric.update(data.cube[part], data.reference.expand_as(data.cube)[part], ids=torch.arange(8)[part])
    results[rank] = {name: value.tolist() for name, value in metric.compute().items()}
    torch.distributed.destroy_process_group()


def test_registration_error_over_two_processes(tmp_path):
    pytest.importorskip("torchmetrics")
    if not torch.distributed.is_available() or "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs torch.distributed and fork")
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        jobs = [
            context.Process(target=_gathered, args=(rank, tmp_path / "store", results)) for rank in range(2)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
        both = dict(results)
    data = fractal_stack(8, size=(64, 64), bands=1)
    alone = ta.RegistrationError(worst=3)
    alone.update(data.cube, data.reference.expand_as(data.cube))
    expected = {name: value.tolist() for name, value in alone.compute().items()}
    assert both[0] == both[1]
    for name, value in expected.items():
        assert both[0][name] == pytest.approx(value), name


def test_lightning_callback(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    data = fractal_stack(8, size=(64, 64), bands=1)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def training_step(self, batch, index):
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    check = ta.AlignmentCheck()
    callback = ta.AlignmentCallback(check, pair=lambda batch: (batch[0], batch[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning's own
        loader = DataLoader(list(zip(data.cube, data.reference.expand_as(data.cube), strict=True)), 4)
        trainer = lightning.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
            callbacks=[callback, ta.AlignmentCallback(ta.AlignmentCheck())],
        )  # fmt: skip
        trainer.fit(Model(), loader)
    logged = trainer.callback_metrics
    truth = data.shift.norm(dim=-1)
    assert 0 < float(logged["registration/median"]) <= float(logged["registration/p95"])
    assert float(logged["registration/p95"]) == pytest.approx(float(truth.max()), abs=0.3)
    assert check.summary().measured == 0  # a new epoch
    with pytest.raises(TypeError, match="pair"):
        ta.AlignmentCallback(check).on_train_batch_start(None, None, torch.rand(2), 0)
    with pytest.raises(TypeError, match="check"):
        ta.AlignmentCallback(3)


# ------------------------------------------------------------------------------------------------------ streaming


class Recorder:
    """A device of which only the order of what it is asked for is real."""

    there, back = "there", "back"

    def __init__(self):
        self.log, self.side = [], "work"

    def on(self, side):
        @contextlib.contextmanager
        def switched():
            before, self.side = self.side, side
            yield
            self.side = before

        return switched()

    def event(self, side=None):
        recorder, name = self, f"{side or 'work'}{len(self.log)}"
        self.log.append(("event", name))

        class Event:
            def synchronize(self):
                recorder.log.append(("host waits", name))

        event = Event()
        event.name = name
        return event

    def wait(self, event, side=None):
        self.log.append((f"{side or 'work'} waits", event.name))

    def pinned(self, shape, dtype):
        self.log.append(("pinned", tuple(shape)))
        return torch.empty(shape, dtype=dtype)

    def send(self, part):
        assert self.side == "there"
        self.log.append(("send", len(part)))
        return part.clone()

    def used_by(self, tensor, side=None):
        self.log.append(("used by", side or "work"))


def test_stream_on_the_cpu():
    cube, mask = torch.rand(10, 2, 32, 32), torch.rand(10, 32, 32) > 0.1
    reference = cube[0]
    aligner = ta.PCC()
    expected = aligner(cube, reference, mask)
    run = ta.stream(
        lambda part, usable: aligner(part, reference, usable), cube, mask, batch_size=4, device="cpu"
    )
    parts = list(run)
    assert [len(aligned) for aligned, _ in parts] == [4, 4, 2]
    assert isinstance(parts[0], ta.Alignment)
    torch.testing.assert_close(torch.cat([part.aligned for part in parts]), expected.aligned)
    torch.testing.assert_close(torch.cat([part.estimate.warp for part in parts]), expected.estimate.warp)
    assert list(ta.stream(lambda part, none: none, cube, None, batch_size=6, device="cpu")) == [None, None]
    assert list(ta.stream(len, cube[:0], batch_size=6, device="cpu")) == []


@pytest.mark.parametrize("buffers", [2, 3])
def test_stream_overlaps_copies_and_work(buffers):
    cube = torch.rand(10, 3)
    recorder = Recorder()

    def work(part):
        recorder.log.append(("work", len(part)))
        return {"double": 2 * part, "sum": part.sum(-1)}

    parts = [slice(first, first + 3) for first in range(0, 10, 3)]
    results = list(_run(work, (cube,), parts, recorder, buffers))
    assert torch.equal(torch.cat([result["double"] for result in results]), 2 * cube)
    log = recorder.log
    order = [entry for entry in log if entry[0] in ("send", "work")]
    sent_before = [
        sum(entry[0] == "send" for entry in order[: index + 1])
        for index, entry in enumerate(order)
        if entry[0] == "work"
    ]
    # when part i is worked on, the copies of the parts after it have been asked for
    assert sent_before == [min(index + buffers, 4) for index in range(4)]
    # work waits for the copy of its part, the copy back for the work; the host for what it hands out
    works = [index for index, entry in enumerate(log) if entry[0] == "work"]
    for index in works:
        assert log[index - 1][0] == "work waits"
        assert log[index - 1][1].startswith("there")
        after = next(entry for entry in log[index:] if entry[0] == "back waits")
        assert after[1].startswith("work")
    pinned = [entry for entry in log if entry[0] == "pinned"]
    assert len(pinned) == buffers + 2 * 4  # buffers for the way there are used again; two results a part
    # a pinned buffer is written again only after the copy out of it is done
    waits = [entry[1] for entry in log if entry[0] == "host waits"]
    assert sum(name.startswith("there") for name in waits) == max(0, 4 - buffers)
    assert sum(name.startswith("back") for name in waits) == 4
    assert sum(entry == ("used by", "back") for entry in log) == 8
    assert sum(entry == ("used by", "work") for entry in log) == 4
    # results are handed out while there is more to come
    first_out = log.index(
        next(entry for entry in log if entry[0] == "host waits" and entry[1].startswith("back"))
    )
    assert first_out < works[-1]


def test_stream_on_a_device(device):
    cube = torch.rand(50, 2, 64, 64)
    reference = cube[0].to(device)
    aligner = ta.PCC().to(device)
    run = ta.stream(lambda part: aligner(part, reference), cube, batch_size=8, device=device)
    parts = list(run)
    expected = aligner(cube.to(device), reference)
    assert all(part.aligned.device.type == "cpu" and not part.aligned.is_pinned() for part in parts)
    torch.testing.assert_close(
        torch.cat([part.aligned for part in parts]), expected.aligned.cpu(), atol=2e-3, rtol=0
    )


def test_stream_of_what_is_one_launch(cuda):
    cube = torch.rand(50, 2, 64, 64)  # two frames are left over
    reference, aligner = cube[0].to(cuda), ta.PCC()
    gc.collect()  # a graph of another test that is freed during the capture would end it
    graphed = torch.cuda.make_graphed_callables(ta.PCC(), (cube[:8].to(cuda), reference))

    def align(part):
        aligned, estimate = (graphed if len(part) == 8 else aligner)(part, reference)
        return aligned.clone(), estimate.warp.clone()  # the next call overwrites them

    found = [
        torch.cat(parts) for parts in zip(*ta.stream(align, cube, batch_size=8, device=cuda), strict=True)
    ]
    expected = ta.PCC()(cube.to(cuda), reference)
    torch.testing.assert_close(found[0], expected.aligned.cpu(), atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1], expected.estimate.warp.cpu(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"batch_size": 0}, ValueError), ({"batch_size": "8"}, TypeError), ({"buffers": 1}, ValueError),
        ({"device": "meta"}, ValueError), ({"cubes": (torch.zeros(3), torch.zeros(4))}, ValueError),
        ({"cubes": ()}, ValueError), ({"cubes": (np.ones(3),)}, TypeError),
        ({"cubes": (torch.zeros(()),)}, ValueError), ({"cubes": (torch.zeros(3, device="meta"),)}, ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_streams(given, kind):
    given = {"batch_size": 2, "device": "cpu", "cubes": (torch.rand(3),), **given}
    with pytest.raises(kind, match=r"expected .* got .*;"):
        ta.stream(lambda part: part, *given.pop("cubes"), **given)


def test_names():
    for name in ("RandomMisregistration", "AlignmentCheck", "AlignmentLoss", "AlignToFirst", "stream"):
        assert getattr(ta, name) is getattr(ta.training, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = ta.training.nothing
    assert "AlignmentCheck" in dir(ta.training)
    assert all(getattr(ta, name).__doc__ for name in ta.__all__)


def test_masks_of_another_shape_are_named():
    pytest.importorskip("torchmetrics")
    frames, wrong = torch.rand(2, 3, 64, 64), torch.ones(5, 64, 64, dtype=torch.bool)
    metric, layer = ta.RegistrationError(), ta.AlignToFirst()
    for call in (lambda: metric.update(frames, frames, wrong), lambda: layer(frames, wrong)):
        with pytest.raises(ValueError, match="mask: expected"):
            call()
    for call in (lambda: metric.update([1], frames), lambda: layer(frames, [1])):
        with pytest.raises(TypeError, match="expected"):
            call()


@pytest.mark.parametrize("kind", ["zncc", "ecc", "shift"])
def test_the_loss_of_no_pairs(kind):
    none = torch.rand(0, 3, 64, 64)
    assert ta.AlignmentLoss(kind, reduction="none")(none, none).shape == (0,)
