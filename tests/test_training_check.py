"""AlignmentCheck: planted slips are found and named, correct pipelines cause no alarm, training is undisturbed."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from scenes import fractal_stack
from torch.nn import functional as F
from torch.utils.data import DataLoader

import torchalign as ta
from torchalign.functional.affine import translation_warp
from torchalign.training.check import AlignmentWarning, MisregistrationError
from torchalign.training.misregistration import misregister
from torchalign.training.probe import isolated_randomness, texture

v2 = pytest.importorskip("torchvision.transforms.v2")
tv = pytest.importorskip("torchvision.tv_tensors")

SIDE = 160


def image(bands=3, side=SIDE):
    return tv.Image(torch.rand(bands, side, side))


def mask(side=SIDE):
    return tv.Mask(torch.randint(0, 4, (side, side)))


def batch(number=4, side=SIDE):
    return torch.rand(number, 3, side, side), torch.randint(0, 4, (number, side, side))


def shift(frame, x, y=0.0):
    return misregister(frame, translation_warp(torch.tensor([-x, -y])), kernel="bicubic")


# ----------------------------------------------------------------------------------------------- the planted slips


def resize_with_corners(x, y):
    """The image with align_corners, the label without."""
    size = (2 * SIDE, 2 * SIDE)
    return F.interpolate(x, size, mode="bilinear", align_corners=True), F.interpolate(
        y[:, None].float(), size
    )[:, 0]


def resize_two_ways(x, y):
    size = (96, 96)
    return (
        F.interpolate(x, size, mode="bilinear", align_corners=True, antialias=True),
        F.interpolate(y, size, mode="bilinear", align_corners=False, antialias=True),
    )


def grid_bug(x, y):
    """The grid is made for one convention and sampled with the other."""
    grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=True, padding_mode="border"), y


def half_a_pixel(x, y):
    return shift(x, 0.5), y


def a_quarter_pixel_and_a_bit(x, y):
    return shift(x, 0.2, 0.2), y


def decimated(x, y):
    """Every second pixel of one, the mean of four of the other."""
    return x[..., ::2, ::2], F.avg_pool2d(y, 2)


def crop_off_by_one(x, y):
    return x[..., 10:138, 10:138], y[..., 10:138, 11:139]


def flip_of_the_image_alone(x, y):
    return x.flip(-1), y


def turned_the_other_way(x, y):
    return torch.rot90(x, 1, (-2, -1)), torch.rot90(y, 3, (-2, -1))


def rows_and_columns_swapped(x, y):
    top, left = 4, 20
    return x[..., top : top + 120, left : left + 120], y[..., left : left + 120, top : top + 120]


def padded_on_the_other_side(x, y):
    return F.pad(x, (1, 0, 0, 0)), F.pad(y, (0, 1, 0, 0))


def a_tile_a_row_too_low(x, y):
    """A mosaic of four tiles, one of which was cached with an offset."""
    wrong = x.clone()
    wrong[..., SIDE // 2 :, SIDE // 2 :] = x.roll(1, -2)[..., SIDE // 2 :, SIDE // 2 :]
    return wrong, y


def zoomed_about_the_corner(x, y):
    """1.5 % of zoom on one input only: its centre moves, too little to be seen by eye."""
    warp = torch.tensor([[1.015, 0.0, 0.0], [0.0, 1.015, 0.0]])
    return misregister(x, warp.expand(len(x), 2, 3), kernel="bicubic"), y


def rotated_about_the_centre(x, y):
    """By 0.4°: the mean displacement is 0."""
    angle, middle = math.radians(0.4), (SIDE - 1) / 2
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = torch.full((2,), middle)
    warp = torch.cat((turn, (centre - turn @ centre)[:, None]), -1)
    return misregister(x, warp.expand(len(x), 2, 3), kernel="bicubic"), y


IMAGES, LABELLED = "two images", "image and label"
SLIPS = {
    resize_with_corners: LABELLED, resize_two_ways: IMAGES, grid_bug: LABELLED, half_a_pixel: LABELLED,
    a_quarter_pixel_and_a_bit: LABELLED, decimated: IMAGES, crop_off_by_one: LABELLED,
    flip_of_the_image_alone: LABELLED, turned_the_other_way: LABELLED, rows_and_columns_swapped: LABELLED,
    padded_on_the_other_side: LABELLED, a_tile_a_row_too_low: IMAGES, zoomed_about_the_corner: IMAGES,
    rotated_about_the_centre: LABELLED,
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.__name__)
def test_planted_slips_are_found(slip):
    x, y = batch()
    check = ta.AlignmentCheck(tolerance=0.2, action="raise")
    sample = (x, y) if SLIPS[slip] == LABELLED else (x, x.clone())
    with pytest.raises(MisregistrationError, match=f"number 0, {slip.__name__}"):
        check.inspect(slip, *sample)
    assert check.summary().median > 0.25
    # and in the data that come out, where they can be compared
    if SLIPS[slip] == IMAGES:
        ground = texture(4, (SIDE, SIDE))[:, None]
        residual = ta.AlignmentCheck(tolerance=0.2)(*slip(ground, ground))
        assert (residual > 0.2).all()


def test_slips_of_the_libraries_themselves():
    # what users of these call every day: masks are resized by the pixel at or before, images about the centre
    check = ta.AlignmentCheck(tolerance=0.2)
    resized = check.inspect(v2.Resize(125), image(), mask())
    assert 0.4 < float(resized) < 0.9
    # torchvision moves boxes by the exact size of a rotated frame, and images by the rounded one
    expanded = check.inspect(v2.RandomRotation((45, 45), expand=True), image())
    assert 0.3 < float(expanded) < 2
    kornia = pytest.importorskip("kornia.augmentation")
    x, y = batch()
    pipeline = kornia.AugmentationSequential(kornia.Resize((320, 320)), data_keys=["input", "mask"])
    assert (check.inspect(pipeline, x, y[:, None].float()) > 0.4).all()


# ----------------------------------------------------------------------------------------- pipelines that are right


def correct_pipelines():
    bilinear = v2.InterpolationMode.BILINEAR
    pair, labelled = (image(), image()), (image(), mask())
    yield "v2 horizontal flip", v2.RandomHorizontalFlip(1.0), labelled
    yield "v2 vertical flip", v2.RandomVerticalFlip(0.5), labelled
    yield "v2 quarter turn", v2.RandomRotation((90, 90)), labelled
    yield "v2 half turn", v2.RandomRotation((180, 180)), labelled
    yield "v2 crop", v2.RandomCrop(128), labelled
    yield "v2 centre crop, odd", v2.CenterCrop(131), labelled
    yield "v2 pad", v2.Pad([3, 5, 8, 1]), labelled
    yield "v2 rotation", v2.RandomRotation(30, interpolation=bilinear), labelled
    yield "v2 affine", v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5, interpolation=bilinear), labelled
    yield "v2 perspective", v2.RandomPerspective(0.2, p=1.0, interpolation=bilinear), labelled
    yield "v2 elastic", v2.ElasticTransform(20.0, interpolation=bilinear), labelled
    yield "v2 resize down", v2.Resize(100, antialias=True), pair
    yield "v2 resize up", v2.Resize(2 * SIDE, antialias=True), labelled
    yield "v2 down and up", v2.Compose([v2.Resize(96, antialias=True), v2.Resize(SIDE, antialias=True)]), pair
    yield "v2 resized crop", v2.RandomResizedCrop(128, (0.5, 1.0), antialias=True), pair
    colours = v2.Compose(
        [v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.GaussianBlur(5), v2.Normalize([0.5] * 3, [0.2] * 3)]
    )
    yield "v2 colours", colours, labelled
    yield "v2 inverted", v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomInvert(1.0)]), labelled
    yield (
        "v2 all",
        v2.Compose([v2.RandomCrop(144), v2.RandomVerticalFlip(), v2.RandomRotation(15), colours]),
        labelled,
    )
    kornia = pytest.importorskip("kornia.augmentation")

    def both(*steps):
        return kornia.AugmentationSequential(*steps, data_keys=["input", "mask"])

    x, y = batch()
    y = y[:, None].float()
    yield "kornia flips", both(kornia.RandomHorizontalFlip(), kornia.RandomVerticalFlip()), (x, y)
    yield "kornia quarter turns", both(kornia.RandomRotation90((1, 3), p=1.0)), (x, y)
    yield "kornia crop", both(kornia.RandomCrop((128, 112), p=1.0)), (x, y)
    yield "kornia affine", both(kornia.RandomAffine(10.0, (0.1, 0.1), (0.9, 1.1), 5.0, p=1.0)), (x, y)
    yield "kornia rotation", both(kornia.RandomRotation(30.0, p=0.5)), (x, y)
    yield "kornia perspective", kornia.RandomPerspective(0.2, p=1.0), (x,)
    down, up = (kornia.Resize((s, s), align_corners=False, antialias=True) for s in (96, 2 * SIDE))
    yield "kornia resize down", down, (x,)
    yield "kornia resize up", up, (x,)
    yield (
        "kornia resized crop",
        kornia.RandomResizedCrop((128, 128), (0.5, 1.0), p=1.0, align_corners=False),
        (x,),
    )
    # (a label that moves by the nearest pixel is up to half a pixel off, which the check says, rightly)
    yield "kornia misregistration", ta.RandomMisregistration2D(1.5, motion="affine"), (x,)
    colours = both(
        kornia.ColorJiggle(0.3, 0.3, 0.3, 0.1, p=1.0), kornia.RandomGaussianBlur((5, 5), (0.5, 1.5), p=1.0)
    )
    yield "kornia colours", colours, (x, y)


def test_correct_pipelines_raise_no_alarm():
    torch.manual_seed(1)
    names, worst = [], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        for name, pipeline, sample in correct_pipelines():
            check = ta.AlignmentCheck(tolerance=0.2, action="raise")
            check.inspect(pipeline, *sample)
            names.append(name)
            worst[name] = check.summary().worst[0][1]
    assert len(names) >= 20
    assert max(worst.values()) < 0.15, worst
    assert all(math.isfinite(value) for value in worst.values())


# ----------------------------------------------------------------------------------------------- naming the culprit


class Off(v2.Transform):
    """A crop that treats masks with an offset."""

    def transform(self, inpt, params):
        moved = inpt[..., 8:136, 8:136] if isinstance(inpt, tv.Image) else inpt[..., 8:136, 9:137]
        return tv.wrap(moved, like=inpt)


def test_names_the_step_of_a_compose():
    pipeline = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.2), v2.Compose([Off(), v2.Pad(2)])])
    check = ta.AlignmentCheck(tolerance=0.2)
    step = check.locate(pipeline, image(), mask())
    assert (step.number, step.name) == (2, "Off()")
    assert step.residual == pytest.approx(1.0, abs=0.1)
    assert [one.slips for one in check.trace(pipeline, image(), mask())] == [False, False, True, False]
    assert check.locate(v2.Compose(pipeline.transforms[:2]), image(), mask()) is None


def test_names_a_step_that_slips_only_sometimes():
    pipeline = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomApply([Off()], p=0.3)])
    check = ta.AlignmentCheck(tolerance=0.2)
    assert check.locate(pipeline, image(), mask(), attempts=20).number == 1


def measured(monkeypatch):
    """Counts the measurements: two images a sample are one each."""
    from torchalign.training import check as module

    counted, real = [], module.measure_residuals

    def counting(*given, **named):
        counted.append(1)
        return real(*given, **named)

    monkeypatch.setattr(module, "measure_residuals", counting)
    return counted


@pytest.mark.parametrize("fault", [0, 6, 15])
def test_bisects_a_long_pipeline(monkeypatch, fault):
    def step(number):
        def right(x, y):
            return x.flip(-1), y.flip(-1)

        def wrong(x, y):
            return x.flip(-1), y.flip(-1).roll(1, -1)

        return wrong if number == fault else right

    x, y = batch(2)
    counted = measured(monkeypatch)
    found = ta.AlignmentCheck(tolerance=0.2).locate([step(number) for number in range(16)], x, y)
    assert found.number == fault
    assert "wrong" in found.name
    assert found.residual == pytest.approx(1, abs=0.1)
    assert len(counted) == 2 + 4  # the end, log2 of 16, and the step by itself
    counted.clear()
    assert (
        sum(one.slips for one in ta.AlignmentCheck(tolerance=0.2).trace([step(n) for n in range(16)], x, y))
        == 1
    )
    assert len(counted) == 16


def test_walks_where_halves_tell_nothing(monkeypatch):
    def there(x, y):
        return x, y.roll(1, -1)

    def back(x, y):
        return x, y.roll(-1, -1)

    def a_bit(x, y):
        return shift(x, 0.15), y

    x, y = batch(2)
    counted = measured(monkeypatch)
    check = ta.AlignmentCheck(tolerance=0.2)
    # undone at the end: the first of the two is named all the same
    assert check.locate([lambda x, y: (x, y), there, back], x, y, attempts=1).number == 1
    assert len(counted) == 1 + 2
    # no step slips by itself, but two of them together do: where it is too much
    found = check.locate([a_bit, a_bit, lambda x, y: (x, y)], x, x.clone(), attempts=1)
    assert found.number == 1
    assert found.residual == pytest.approx(0.3, abs=0.05)


def test_what_comes_out_blank_is_an_alarm():
    x, y = batch()
    half = torch.eye(3)
    for blank in (lambda x, y: (x, 0 * y), lambda x, y: (0 * x, 0 * y), lambda x, y: (x * torch.nan, y)):
        check = ta.AlignmentCheck(tolerance=0.2)
        assert (check.inspect(blank, x, y) == torch.inf).all()
        with pytest.raises(MisregistrationError, match="blank"):
            ta.AlignmentCheck(action="raise").inspect(blank, x, y)
        assert check.locate([lambda x, y: (x, y), blank], x, y, attempts=1).number == 1
    # beside one that shows something, and against a claim
    assert (ta.AlignmentCheck().inspect(lambda x: 0 * x, x, matrix=half) == torch.inf).all()
    assert (ta.AlignmentCheck().inspect(lambda x, y: (x, 0 * y), x, y, matrix=half) == torch.inf).all()
    # a small part of a label may be of one class
    small = ta.AlignmentCheck().inspect(lambda x, y: (x[..., :20, :20], 0 * y[..., :20, :20]), x, y)
    assert not (small == torch.inf).any()


def test_an_image_that_is_dropped_is_named():
    x, y = batch()
    with pytest.raises(
        ValueError, match="augmentation: expected as many images and masks as went in, 2, got 1"
    ):
        ta.AlignmentCheck().inspect(lambda x, y: x, x, y)
    assert (ta.AlignmentCheck().inspect(lambda x, y: x, x, y, matrix=torch.eye(3)) < 0.05).all()
    assert not ta.AlignmentCheck().trace([lambda x, y: (x,)], x, y)[0].slips


def test_ids_of_probes():
    x, y = batch()
    check = ta.AlignmentCheck(samples=3)
    for _ in range(2):
        check.inspect(crop_off_by_one, x, y)
    assert sorted(name for name, _ in check.summary().worst) == [0, 1, 2, 3, 4, 5]
    check.reset()
    check.inspect(crop_off_by_one, x, y, ids=torch.arange(40, 44))
    check.wrap(crop_off_by_one, ids=lambda x, y: torch.arange(70, 70 + len(x)))(x, y)
    assert sorted(name for name, _ in check.summary().worst) == [40, 41, 42, 70, 71, 72]
    with pytest.raises(ValueError, match="ids: expected"):
        check.inspect(crop_off_by_one, x, y, ids=torch.arange(2))


def test_names_the_step_of_kornia():
    kornia = pytest.importorskip("kornia.augmentation")
    x, y = batch()
    pipeline = kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=1.0), kornia.Resize((320, 320)), kornia.RandomCrop((128, 128), p=1.0),
        data_keys=["input", "mask"],
    )  # fmt: skip
    step = ta.AlignmentCheck(tolerance=0.2).locate(pipeline, x, y[:, None].float())
    assert step.number == 1
    assert step.name.startswith("Resize(")


class Albumentations:
    """A step as albumentations has it: keyword arguments, numpy images (H, W, C), a dict back."""

    def __init__(self, on_image, on_mask):
        self.on_image, self.on_mask = on_image, on_mask

    def __call__(self, image, mask):
        return {"image": self.on_image(image), "mask": self.on_mask(mask)}

    def __repr__(self):
        return f"Albumentations({self.on_image.__name__})"


def test_albumentations_like():
    class Compose:
        def __init__(self, *transforms):
            self.transforms = list(transforms)

        def __call__(self, **sample):
            for step in self.transforms:
                sample = step(**sample)
            return sample

    def crop(values):
        return values[5:133, 5:133]

    def other(values):
        return values[5:133, 6:134]

    for dtype in (np.uint8, np.float32):
        sample = {"image": np.zeros((SIDE, SIDE, 3), dtype), "mask": np.zeros((SIDE, SIDE), np.uint8)}
        check = ta.AlignmentCheck(tolerance=0.2)
        flip = Albumentations(np.fliplr, np.fliplr)
        assert float(check.inspect(Compose(flip, Albumentations(crop, crop)), **sample)) < 0.1
        wrong = Compose(flip, Albumentations(crop, other))
        assert float(check.inspect(wrong, **sample)) == pytest.approx(1, abs=0.1)
        assert check.locate(wrong, **sample).name == "Albumentations(crop)"


# ------------------------------------------------------------------------------------------------------ claims


def test_a_claimed_matrix_of_ones_own():
    x, _ = batch()
    half = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]])

    def move(frames):
        return shift(frames, 0.5, -0.5)

    check = ta.AlignmentCheck(tolerance=0.2)
    assert (check.inspect(move, x, matrix=half) < 0.05).all()
    assert (check.inspect(move, x, matrix=lambda augment: half.expand(4, 2, 3)) < 0.05).all()
    assert (check.inspect(move, x, matrix=torch.eye(3)) > 0.6).all()
    # numpy's are claims too, and not left unchecked beside a second image
    for claim in (np.eye(3), lambda augment: np.eye(3)):
        moved_both = check.inspect(lambda a, b: (move(a), move(b)), x, x, matrix=claim)
        assert (moved_both > 0.6).all()
    with pytest.raises(ValueError, match="claimed matrix"):
        check.inspect(move, x)


@pytest.mark.parametrize("zoom", [0.4, 1.0, 1.7])
def test_a_claimed_resize(zoom):
    x, _ = batch()
    side = round(zoom * SIDE)
    s = side / SIDE

    def resize(frames):
        return F.interpolate(frames, (side, side), mode="bilinear", antialias=True)

    right = torch.tensor([[s, 0, 0.5 * (s - 1)], [0, s, 0.5 * (s - 1)]])  # corners stay in place
    wrong = torch.tensor([[s, 0, 0.5 * (s - 1) + 0.3], [0, s, 0.5 * (s - 1)]])
    check = ta.AlignmentCheck()
    assert (check.inspect(resize, x, matrix=right) < 0.006).all()
    assert (check.inspect(resize, x, matrix=wrong) > 0.25).all()


def test_torchvision_claims_by_boxes():
    # a single image: its geometry is what torchvision does to boxes
    check = ta.AlignmentCheck(tolerance=0.2)
    assert float(check.inspect(v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1)), image())) < 0.1
    pipeline = v2.Compose([v2.RandomCrop(128), v2.RandomRotation((45, 45), expand=True)])
    assert float(check.inspect(pipeline, image())) > 0.3

    class ImageOnly(v2.Transform):
        """One's own steps may not know what a box is, and are not given one."""

        def transform(self, inpt, params):
            return tv.wrap(F.interpolate(inpt[None], (96, 96))[0], like=inpt)

    with pytest.raises(ValueError, match="claimed matrix"):
        check.inspect(ImageOnly(), image())
    with pytest.raises(ValueError, match="claimed matrix"):  # which takes one set of boxes
        check.inspect(v2.RandomIoUCrop(), image(), boxes())
    assert [step.slips for step in check.trace(v2.Compose([v2.Pad(2), ImageOnly()]), image())] == [
        False,
        False,
    ]


def boxes():
    return tv.BoundingBoxes(torch.tensor([[20.0, 30, 80, 90]]), format="XYXY", canvas_size=(SIDE, SIDE))


def test_boxes_judge_only_what_they_go_with():
    # turned by 0.3°, the nearest pixel is half a pixel beside the box in whole parts of the frame
    turn, both = v2.RandomRotation((0.3, 0.3)), (image(), mask())
    smooth = v2.RandomRotation((0.3, 0.3), interpolation=v2.InterpolationMode.BILINEAR)
    out = turn(tv.Image(both[1][None]), both[1])
    assert torch.equal(torch.as_tensor(out[0][0]), torch.as_tensor(out[1]))
    check = ta.AlignmentCheck(tolerance=0.2, action="raise")
    assert float(check.inspect(turn, *both)) < 0.01
    for sample in ((image(),), (image(), boxes()), (image(), mask(), {"boxes": boxes()})):
        with pytest.raises(MisregistrationError, match="RandomRotation"):
            check.inspect(turn, *sample)
    assert check.locate(turn, image(), boxes()).cure.count("BILINEAR") == 1
    assert float(check.inspect(smooth, image(), boxes())) < 0.1


def test_frames_of_a_video_and_of_a_series():
    class Jitter(v2.Transform):
        def transform(self, inpt, params):
            return tv.wrap(torch.stack([frame.roll(t % 2, -1) for t, frame in enumerate(inpt)]), like=inpt)

    video = tv.Video(torch.rand(3, 2, SIDE, SIDE))
    check = ta.AlignmentCheck(tolerance=0.2)
    assert float(check.inspect(v2.RandomHorizontalFlip(1.0), video)) < 0.05
    assert float(check.inspect(Jitter(), video)) == pytest.approx(1, abs=0.05)
    series = torch.rand(2, 3, 4, SIDE, SIDE)
    assert (check.inspect(lambda cube: cube.flip(-1), series) < 0.05).all()

    def jitter(cube):
        return torch.stack([cube[:, 0], cube[:, 1].roll(1, -1), cube[:, 2]], 1)

    assert check.inspect(jitter, series).sub(1).abs().max() < 0.05


# ------------------------------------------------------------------------------------------------------ the data


def pair(frames=6, **options):
    data = fractal_stack(frames, size=(128, 128), bands=2, noise=0.003, **options)
    return data.cube, data.reference.expand_as(data.cube), data.shift


def test_residuals_of_pairs():
    moving, reference, truth = pair()
    check = ta.AlignmentCheck()
    residual = check(moving, reference)
    assert (residual - truth.norm(dim=-1)).abs().max() < 0.06
    # another sensor: other bands
    other = check(moving, torch.cat((reference, reference[:, :1]), 1))
    assert (other - truth.norm(dim=-1)).abs().max() < 0.1
    summary = check.summary()
    assert summary.measured == 12
    assert summary.unmatched == 0
    assert summary.worst[0][1] == pytest.approx(float(torch.cat((residual, other)).max()), rel=1e-5)


def test_what_cannot_be_measured_is_not():
    moving, reference, _ = pair()
    moving = moving.clone()
    moving[1] = float("nan")
    moving[2] = 0.3
    mask = torch.ones(6, 128, 128, dtype=torch.bool)
    mask[4] = False
    check = ta.AlignmentCheck(action="warn", tolerance=10)
    residual = check(moving, reference, mask)
    assert residual.isnan().tolist() == [False, True, True, False, True, False]
    summary = check.summary()
    assert (summary.measured, summary.unmatched, summary.blank, summary.unmeasured) == (3, 3, 3, 0.5)
    assert {name for name, _ in check.summary().worst} == {0, 3, 5}
    with pytest.warns(AlignmentWarning, match="do not match"):
        check(pair()[0].flip(-1), reference)
    assert check.summary().unmatched - check.summary().blank >= 3  # they show something


def test_statistics_against_numpy():
    check = ta.AlignmentCheck(samples=4, worst=3)
    random = np.random.default_rng(0)
    values = random.gamma(2.0, 0.1, 1000)
    from torchalign.training.statistics import merge_residuals, read_verdict, record

    state = check.residuals
    for first in range(0, 1000, 100):
        part = torch.tensor(values[first : first + 100])
        state = record(state, part, torch.arange(first, first + 100))
    state = record(state, torch.tensor([float("nan")]), torch.tensor([7]))
    summary = read_verdict(state)
    assert (summary.measured, summary.unmatched) == (1000, 1)
    assert summary.mean == pytest.approx(values.mean(), rel=1e-6)
    assert summary.median == pytest.approx(np.median(values), rel=0.016)
    assert summary.p95 == pytest.approx(np.quantile(values, 0.95), rel=0.016)
    assert [name for name, _ in summary.worst] == np.argsort(-values)[:3].tolist()
    twice = read_verdict(merge_residuals(state, state))
    assert (twice.measured, twice.median) == (2000, summary.median)
    infinite = read_verdict(record(state, torch.full((2000,), float("inf")), torch.arange(2000)))
    assert infinite.median == float("inf")
    empty = read_verdict(ta.AlignmentCheck().residuals)
    assert empty.measured == 0
    assert math.isnan(empty.median)
    assert empty.worst == ()


def test_labels_of_any_type():
    x, y = batch()
    check = ta.AlignmentCheck(tolerance=0.2)
    labelled = ((x, y.to(torch.uint8)), (tv.Image(x), tv.Mask(y)), (x, y.float()))
    for sample in labelled:
        assert (check.inspect(lambda a, b: (a.flip(-1), b.flip(-1)), *sample) < 0.1).all()
        assert (check.inspect(flip_of_the_image_alone, *sample) > 1).all()
    from PIL import Image

    picture = Image.new("RGB", (SIDE, SIDE)), Image.new("1", (SIDE, SIDE))
    assert float(check.inspect(v2.RandomHorizontalFlip(1.0), *picture)) < 0.1


def test_running_numbers_of_batches_of_any_size():
    moving, reference, _ = pair()
    check = ta.AlignmentCheck(every=2)
    for size in (6, 4, 2):  # the last batch of an epoch is a smaller one
        check(moving[:size], reference[:size])
    assert {name for name, _ in check.summary().worst} == {0, 1, 2, 3, 4, 5, 10, 11}


def test_every_and_samples():
    moving, reference, truth = pair()
    check = ta.AlignmentCheck(every=3, samples=4)
    sizes = [len(check(moving, reference)) for _ in range(7)]
    assert sizes == [4, 0, 0, 4, 0, 0, 4]
    # other samples in every turn, and the ids say which
    check = ta.AlignmentCheck(samples=4)
    first, second = check(moving, reference), check(moving, reference)
    assert (first - truth.norm(dim=-1)[:4]).abs().max() < 0.06
    assert (second - truth.norm(dim=-1)[[4, 5, 0, 1]]).abs().max() < 0.06
    assert {name for name, _ in check.summary().worst} == {0, 1, 2, 3, 10, 11, 6, 7}
    check.reset()
    check(moving, reference, ids=torch.arange(100, 106))
    assert {name for name, _ in check.summary().worst} == {100, 101, 102, 103}


def test_actions():
    moving, reference, _ = pair()
    for action, kind in (("raise", MisregistrationError), ("warn", AlignmentWarning)):
        check = ta.AlignmentCheck(tolerance=0.2, action=action)
        assert (check(reference, reference) == 0).all()
        context = pytest.raises(kind) if action == "raise" else pytest.warns(kind)
        with context as caught:
            check(moving, reference)
        text = str(caught.value if action == "raise" else caught[0].message)
        assert "of 6 samples" in text
        assert "0.2 px" in text
    assert ta.AlignmentCheck(tolerance=0.2)(moving, reference).numel() == 6  # recording says nothing


# ----------------------------------------------------------------------------------------------- as if it were not


def test_training_is_the_same_with_and_without():
    pipeline = v2.Compose([v2.RandomCrop(128), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3)])

    def noisy(frame, label):
        random.random()
        return frame + np.random.rand() * torch.rand(()), label  # noqa: NPY002

    for augment in (pipeline, noisy):
        results = []
        for check in (None, ta.AlignmentCheck(tolerance=0.2, action="raise", every=2)):
            torch.manual_seed(3)
            np.random.seed(3)  # noqa: NPY002
            random.seed(3)
            run = augment if check is None else check.wrap(augment)
            results.append([run(image(), mask()) for _ in range(4)])
        for plain, checked in zip(*results, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(plain, checked, strict=True))
    with isolated_randomness():
        inside = torch.rand(1)
    assert torch.equal(torch.rand(1), inside)


def test_a_generator_of_its_own_is_not_used_up():
    augment = ta.RandomMisregistration2D(generator=torch.Generator().manual_seed(5))
    x, _ = batch()
    expected = ta.RandomMisregistration2D(generator=torch.Generator().manual_seed(5))(x)
    checked = ta.AlignmentCheck().wrap(augment)
    assert torch.equal(checked(x), expected)
    assert checked.check.summary().measured == 4


def test_wrap_checks_every_nth_call():
    x, y = batch()
    check = ta.AlignmentCheck(tolerance=0.2, action="warn", every=2)
    augment = check.wrap(crop_off_by_one)
    with pytest.warns(AlignmentWarning, match="crop_off_by_one"):
        out = augment(x, y)
    assert torch.equal(out[0], crop_off_by_one(x, y)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment(x, y)
    with pytest.warns(AlignmentWarning):
        augment(x, y)
    assert check.summary().measured == 8


def test_the_module_behaves():
    moving, reference, _ = pair()
    check = ta.AlignmentCheck(tolerance=0.3)
    check(moving, reference)
    before = check.summary()
    for other in (
        copy.deepcopy(check),
        pickle.loads(pickle.dumps(check)),
        copy.deepcopy(check).half().double(),
    ):
        assert other.summary() == before
        assert other.residuals.histogram.dtype == torch.int64
        assert other.residuals.total.dtype == torch.float64
    loaded = ta.AlignmentCheck(tolerance=0.3)
    loaded.load_state_dict(check.state_dict())
    assert loaded.summary() == before
    assert all(isinstance(state, torch.Tensor) for state in check.state_dict().values())
    with pytest.raises(ValueError, match=r"expected the state of a check of worst=4, got \d+ numbers"):
        ta.AlignmentCheck(worst=4).load_state_dict(check.state_dict())
    assert "tolerance=0.3" in repr(check)
    check.reset()
    assert check.summary().measured == 0
    model = torch.nn.Sequential(check.wrap(torch.nn.Identity()))
    assert not model.state_dict()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"tolerance": 0}, ValueError), ({"tolerance": "1"}, TypeError), ({"every": 0}, ValueError),
        ({"every": 1.5}, TypeError), ({"samples": 0}, ValueError), ({"action": "print"}, ValueError),
        ({"aligner": "pcc"}, TypeError), ({"max_unmatched": 2}, ValueError), ({"worst": 0}, ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options, kind):
    with pytest.raises(kind, match=f"{next(iter(options))}: expected .* got .*;"):
        ta.AlignmentCheck(**options)


def test_bad_arguments():
    check = ta.AlignmentCheck()
    frames = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="reference"):
        check(frames, frames[..., 1:])
    with pytest.raises(ValueError, match="ids: expected"):
        check(frames, frames, ids=torch.arange(3))
    with pytest.raises(ValueError, match="mask: expected"):
        check(frames, frames, torch.ones(3, 64, 64, dtype=torch.bool))
    with pytest.raises(TypeError, match="matrix: expected"):
        check.inspect(lambda frame: frame, frames, matrix=lambda augment: [1, 2])
    with pytest.raises(TypeError, match="augment"):
        check.wrap(3)
    with pytest.raises(ValueError, match="sample"):
        check.inspect(lambda label: label, 3)


def test_steps_keep_the_options_of_kornias_container():
    kornia = pytest.importorskip("kornia.augmentation")
    constants = pytest.importorskip("kornia.constants")
    other = {constants.DataKey.MASK: {"resample": constants.Resample.BILINEAR, "align_corners": True}}
    augment = kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=1.0),
        kornia.Resize((220, 220), align_corners=False),
        data_keys=["input", "mask"],
        extra_args=other,
    )
    found = ta.AlignmentCheck(tolerance=0.2).locate(
        augment, torch.rand(2, 3, 128, 128), torch.zeros(2, 1, 128, 128)
    )
    assert found is not None
    assert (found.number, found.slips) == (1, True)
    assert "Resize" in found.name


def test_a_mix_of_kornia_makes_no_claim_and_raises_nothing():
    kornia = pytest.importorskip("kornia.augmentation")
    augment = kornia.RandomMosaic((128, 128), p=1.0, data_keys=["input"])
    frames = torch.rand(2, 3, 128, 128)
    with pytest.raises(ValueError, match=r"single|claim|compare"):
        ta.AlignmentCheck().inspect(augment, frames)


# ------------------------------------------------------------------------------------------------------ the verdict


@pytest.mark.parametrize("shape", [(4, 3, SIDE, SIDE), (3, 4, SIDE, SIDE)], ids=["TCHW", "CTHW"])
@pytest.mark.parametrize("order", [True, False], ids=["image-first", "mask-first"])
def test_a_series_with_one_mask(shape, order):
    sample = {"image": torch.rand(shape), "mask": torch.randint(0, 4, (SIDE, SIDE))}
    sample = sample if order else dict(reversed(sample.items()))

    def right(given):
        return {name: values.flip(-1) for name, values in given.items()}

    def one_frame_slips(given):
        image = given["image"].clone()
        image[2, 1] = image[2, 1].roll(1, -1)
        return {**given, "image": image}

    def the_mask_slips(given):
        return {**given, "mask": given["mask"].roll(1, -1)}

    check = ta.AlignmentCheck()
    assert float(check.inspect(right, sample)) < 0.01
    assert check.summary().slipped == 0
    for slip in (one_frame_slips, the_mask_slips):
        assert float(check.inspect(slip, sample)) == pytest.approx(1, abs=0.05)
    assert (check.summary().measured, check.summary().slipped) == (3, 2)


def test_features_beside_a_batch_are_no_mask():
    images, features = torch.rand(16, 3, SIDE, SIDE), torch.rand(16, 32)
    check = ta.AlignmentCheck(samples=4)
    residual = check.inspect(
        lambda x, y, z: (x.flip(-1), y, z.flip(-1)), images, features, images[:, 0] > 0.5
    )
    assert len(residual) == 4
    assert (residual < 0.05).all()


def test_the_verdict_on_what_is_registered_is_exact():
    image = texture(3, (128, 128))[:, None]
    check = ta.AlignmentCheck()
    check(image, image)
    verdict = check.summary()
    largest = verdict.worst[0][1]
    assert (verdict.word, verdict.measured, verdict.slipped, verdict.cure) == ("registered", 3, 0, "")
    assert 0 <= verdict.median <= verdict.p95 <= largest < 1e-4
    assert verdict.mean <= largest
    assert str(verdict).startswith("registered: 0 of 3 samples slip beyond the tolerance of 0.25 px (median ")
    from torchalign.training.statistics import empty_residuals, read_verdict, record

    zeros = read_verdict(record(empty_residuals(), torch.zeros(5), torch.arange(5)))
    assert (zeros.mean, zeros.median, zeros.p95, zeros.largest) == (0, 0, 0, 0)
    mixed = torch.tensor([0.0, 0.0, 0.0, 5e-4, 1.0])
    mixed = read_verdict(record(empty_residuals(), mixed, torch.arange(5)))
    assert mixed.median == 0
    assert 0 < mixed.p95 <= 1


def test_the_verdict_counts_slips_and_names_no_match():
    image = texture(4, (128, 128))[:, None]
    moving = torch.cat((image[:1].roll(2, -1), image[1:]))
    check = ta.AlignmentCheck()
    assert check.summary().word == "not measured"
    assert 'use action="warn" or "raise"' in str(check.summary())
    check(moving, image)
    verdict = check.summary()
    assert (verdict.word, verdict.slipped, verdict.tolerance) == ("misregistered", 1, 0.25)
    assert "1 of 4 samples slip beyond the tolerance of 0.25 px" in str(verdict)
    assert "largest 2 px" in str(verdict)
    assert "usual cure: align them: ta.PCC(), or ta.AlignToFirst()" in str(verdict)  # these are data
    assert verdict[:3] == (4, 0, 0)  # a tuple still
    check.reset()
    assert check.summary().slipped == 0
    check(image.flip(-1), texture(5, (128, 128))[1:, None])
    assert check.summary().word == "no match"
    check.inspect(crop_off_by_one, *batch())  # and these are not
    assert "give every input the same crop" in check.summary().cure


def test_pairs_of_data_are_not_told_what_an_augmentation_was():
    check, image = ta.AlignmentCheck(action="warn"), texture(4, (128, 128))[:, None]
    with pytest.warns(AlignmentWarning, match="crop_off_by_one"):
        check.inspect(crop_off_by_one, *batch())
    cure = check.summary().cure
    with pytest.warns(AlignmentWarning, match="the pairs are misregistered") as told:
        check(image.roll(2, -1), image)
    assert "align them: ta.PCC()" in str(told[0].message)
    assert "crop_off_by_one" not in str(told[0].message)
    assert check.summary().cure == cure


def test_the_cure_of_masks_resized_by_nearest():
    class Resize(torch.nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.mode = mode

        def forward(self, x, y):
            x = F.interpolate(x, (112, 112), mode="bilinear", antialias=True)
            return x, F.interpolate(y[:, None].float(), (112, 112), mode=self.mode)[:, 0].long()

    class Mirror(torch.nn.Module):
        def forward(self, x, y):
            return x.flip(-1), y.flip(-1)

    check = ta.AlignmentCheck()
    step = check.locate([Mirror(), Resize("nearest")], *batch())
    assert (step.number, step.slips) == (1, True)
    assert "NEAREST_EXACT" in step.cure
    check.inspect(lambda x, y: Resize("nearest")(*Mirror()(x, y)), *batch())
    text = str(check.summary())
    assert "misregistered: 4 of 4" in text
    assert "the step at fault is number 1, Resize" in text
    assert 'mode="nearest"' in text
    # the cure is one
    assert check.locate([Mirror(), Resize("nearest-exact")], *batch()) is None
    other = ta.AlignmentCheck(tolerance=0.2, action="raise")
    with pytest.raises(MisregistrationError, match="all of them with align_corners=False"):
        other.inspect(resize_with_corners, *batch())


def test_the_cure_of_resized_crops():
    nearest = v2.InterpolationMode.NEAREST_EXACT
    check = ta.AlignmentCheck(tolerance=0.2)
    sample = (image(), mask())
    for options in ({}, {"interpolation": nearest}):  # which is for the image alone
        step = check.locate(v2.Compose([v2.RandomResizedCrop(128, (0.5, 1.0), **options)]), *sample)
        assert "whatever its interpolation" in step.cure
        assert "v2.functional.resize(mask, size, InterpolationMode.NEAREST_EXACT)" in step.cure
    check.reset()
    crop = v2.RandomResizedCrop(128, (0.5, 1.0))
    check.inspect(v2.Compose([crop, v2.RandomHorizontalFlip()]), *sample)
    assert "v2.functional.resize(mask, size" in check.summary().cure

    def apart(image, mask):
        part = crop.get_params(image, crop.scale, crop.ratio)
        image, mask = v2.functional.crop(image, *part), v2.functional.crop(mask, *part)
        return v2.functional.resize(image, [128, 128]), v2.functional.resize(mask, [128, 128], nearest)

    for seed in range(4):  # the cure is one
        torch.manual_seed(seed)
        assert not ta.AlignmentCheck(action="raise").inspect(apart, *sample).isnan()
    kornia = pytest.importorskip("kornia.augmentation")
    torch.manual_seed(0)
    x, y = batch()
    steps = [kornia.RandomResizedCrop((128, 128), p=1.0, align_corners=corners) for corners in (True, False)]
    found, right = (
        ta.AlignmentCheck().locate(
            kornia.AugmentationSequential(one, data_keys=["input", "mask"]), x, y[:, None].float()
        )
        for one in steps
    )
    assert found.cure.endswith("all of them with align_corners=False")
    assert right is None


class Rolled(torch.utils.data.Dataset):
    """An image that slips against its label."""

    def __init__(self, check):
        self.augment = check.wrap(lambda x, y: (x.roll(1, -1), y))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.augment(torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.int64))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize(
    ("action", "kind", "says"),
    [
        ("record", AlignmentWarning, 'use action="warn" or "raise"'),
        ("raise", MisregistrationError, "1 of 1 samples slip"),
    ],
)
def test_what_workers_find_is_not_lost_in_silence(action, kind, says):
    check = ta.AlignmentCheck(action=action)
    loader = DataLoader(Rolled(check), None, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(kind, match=says):  # a warning is an error here, which crosses over
        list(loader)
    assert check.summary().word == "not measured"
