"""Every Triton kernel against the functions of torch that define it, on CPU tensors: run by test_kernels.py.

``TRITON_INTERPRET=1`` must be in the environment before Triton is imported, hence the process of its own.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from triton.runtime import interpreter

import torchalign as ta
from torchalign import _host, kernels
from torchalign.functional import (
    common_ground,
    defects,
    ecc,
    fourier,
    local,
    peak,
    phase,
    quality,
    sift,
    texture,
    uncertainty,
    warp,
)
from torchalign.functional.channels import extract_channel
from torchalign.functional.smoothing import enlarge
from torchalign.functional.working_grid import Window, WorkingGrid
from torchalign.kernels import defects as kernel_of_defects
from torchalign.kernels import launching
from torchalign.kernels.channel import channel_frames

# of the values that are met; both round, each in its own order
TOLERANCE = 2e-6

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """An operation takes as long of 8 pixels as of 8,000 here."""
    # (of a channel, whose strides are tested, several)
    monkeypatch.setattr(launching, "block_length", lambda kernel: 256 if kernel is channel_frames else 4096)
    monkeypatch.setattr(kernel_of_defects, "block_length", launching.block_length)


@pytest.fixture(autouse=True)
def _quick_interpreter(request, monkeypatch):
    """Half of its time is for what nothing here needs."""
    # a launch has put its own functions into Triton's language; each function called inside would do so again
    own = interpreter.InterpretedFunction.__call__

    def call(self, *given, **named):
        is_ours = self.fn.__module__.startswith("torchalign")
        return self.rewrite()(*given, **named) if is_ours else own(self, *given, **named)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    # that no sum or product of integers overflows, the slow cases look at
    options = interpreter.interpreter_builder.options
    if not request.config.getoption("--slow") and hasattr(options, "sanitize_overflow"):
        options = dataclasses.replace(options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def by_torch(monkeypatch):
    """What the functions of torch give, though kernels are there."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(_host, "HAS_TRITON", False)
            return function(*arguments, **options)

    return call


def generator(seed):
    return torch.Generator().manual_seed(seed)


def spoilt(shape, draw, dtype=torch.float32):
    """Values of order 1, some of them NaN, some infinite."""
    values = torch.randn(shape, generator=draw, dtype=torch.float64)
    values[torch.rand(shape, generator=draw) < 0.05] = torch.nan
    values[torch.rand(shape, generator=draw) < 0.02] = torch.inf
    values[torch.rand(shape, generator=draw) < 0.02] = -torch.inf
    return values.to(dtype)


def motions(kind, draw, dtype=torch.float32):
    """Three of a kind: a common one, one that is nearly nothing or singular, one that is far or no number."""
    shift = torch.tensor([[1.3, -0.6], [0.5, 2.0], [-40.0, 3e9]], dtype=dtype)
    if kind == "shift":
        return shift
    linear = torch.eye(3, dtype=dtype).repeat(3, 1, 1)
    linear[0, :2, :2] += 0.05 * torch.randn(2, 2, generator=draw)
    linear[:, :2, 2] = shift
    linear[1, :2, :2] = torch.tensor([[1.0, 2.0], [0.5, 1.0]])  # singular
    linear[2, 0, 0] = torch.nan
    if kind == "affine":
        return linear[:, :2].contiguous()
    linear[:2, 2, :2] = torch.tensor([[0.01, -0.02], [0.3, 0.2]])  # horizons that cross the frame
    return linear


def same(found, expected, scale=1.0):
    """Equal to rounding, NaN and infinities in the same places."""
    assert found.dtype == expected.dtype
    if not found.dtype.is_floating_point:
        # a tie is rounded by the last bit of what was interpolated
        assert (found.int() - expected.int()).abs().max() <= 1
        assert (found != expected).float().mean() < 0.01
        return
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=TOLERANCE, atol=scale * TOLERANCE, equal_nan=True
    )


SIZES = [(5, 7), (1, 1), (17, 1), (2, 300)]
# each kind, interpolation, padding and fill once; the others are slow
WARPS = [
    ("shift", "bicubic", "reflection", None, "mask"),
    ("affine", "bilinear", "zeros", None, "mask"),
    ("affine", "nearest", "reflection", math.nan, None),
    ("homography", "bilinear", "border", -3.0, None),
    *(
        pytest.param(*options, marks=pytest.mark.slow)
        for options in (
            ("shift", "bilinear", "border", None, None),
            ("shift", "nearest", "zeros", None, "mask"),
            ("shift", "bicubic", "border", 7.5, None),
            ("affine", "bicubic", "border", None, "mask"),
            ("affine", "bilinear", "border", -3.0, None),
            ("homography", "bilinear", "reflection", None, None),
            ("homography", "bicubic", "zeros", -math.inf, "mask"),
            ("homography", "nearest", "border", 2.0, "mask"),
        )
    ),
]


@pytest.mark.parametrize(("kind", "interpolation", "padding", "fill", "masked"), WARPS)
def test_resample(kind, interpolation, padding, fill, masked, by_torch):
    draw = generator(len(kind) + len(interpolation) + len(padding))
    for number, size in enumerate([SIZES[0], SIZES[1 + len(kind + padding) % 3]]):
        cube = spoilt((3, 2, *size), draw)
        mask = torch.rand(3, *size, generator=draw) > 0.2 if masked else None
        motion = motions(kind, draw)
        step = 1 + number % 2
        found = kernels.resample(cube, motion, mask, interpolation, padding, fill, step)
        expected = by_torch(
            warp.resample,
            cube,
            motion,
            interpolation=interpolation,
            padding_mode=padding,
            fill_value=fill,
            mask=mask,
            step=step,
        )
        same(found[0], expected.values, scale=10)
        assert torch.equal(found[1], expected.validity)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.uint16, torch.int32],
)
def test_resample_dtypes(dtype, by_torch):
    draw = generator(3)
    values = torch.randn(3, 1, 9, 11, generator=draw, dtype=torch.float64)
    cube = values.to(dtype) if dtype.is_floating_point else (values * 60 + 90).clamp(0, 255).to(dtype)
    mask = torch.rand(3, 9, 11, generator=draw) > 0.2
    motion = motions("affine", draw)
    for interpolation, fill in (("bicubic", 3.0), ("nearest", None)):
        found = kernels.resample(cube, motion, mask, interpolation, "border", fill, 1)
        expected = by_torch(
            warp.resample, cube, motion, interpolation=interpolation, fill_value=fill, mask=mask
        )
        if cube.dtype.itemsize == 2 and dtype.is_floating_point:
            assert (found[0].float() - expected.values.float()).abs().max() <= torch.finfo(dtype).eps * 4
        else:
            same(found[0], expected.values)
        assert torch.equal(found[1], expected.validity)


def test_a_tie_goes_to_the_even_number_and_large_ones_are_clamped(by_torch):
    cube = torch.tensor([[[[0, 1, 2, 3, 255, 0, 255]]]], dtype=torch.uint8)
    half = torch.tensor([[0.5, 0.0]])
    found = kernels.resample(cube, half, None, "bilinear", "border", None, 1)[0]
    assert found.flatten().tolist() == [0, 0, 2, 2, 129, 128, 128]
    overshot = kernels.resample(cube, half, None, "bicubic", "border", None, 1)[0]
    expected = by_torch(warp.warp, cube, half, interpolation="bicubic")
    assert torch.equal(overshot, expected)


def test_identities_and_whole_pixels_copy_far_from_the_origin():
    frame = torch.randn(1, 1, 1, 4096, generator=generator(5))
    frame[..., 3] = torch.nan
    cases = (
        (torch.zeros(1, 2), "bicubic"),
        (torch.eye(3)[None, :2], "bilinear"),
        (torch.eye(3)[None, :2], "nearest"),
        (torch.eye(3)[None], "bicubic"),
    )
    for motion, interpolation in cases:
        values, validity = kernels.resample(frame, motion, None, interpolation, "border", None, 1)
        assert torch.equal(values.nan_to_num(9.0), frame.nan_to_num(9.0))
        assert torch.equal(validity, frame[0].isfinite())
    moved = kernels.resample(frame, torch.tensor([[-7.0, 0.0]]), None, "bicubic", "border", None, 1)[0]
    assert torch.equal(moved[..., :4089], frame[..., 7:])
    # the fraction is that of the displacement: at x = 4000 a coordinate in float32 has steps of 2⁻¹² px
    ramp = torch.arange(4096, dtype=torch.float64).reshape(1, 1, 1, -1)
    moved = kernels.resample(ramp, torch.tensor([[0.1, 0.0]]), None, "bilinear", "border", None, 1)[0]
    assert (moved - (ramp - 0.1))[..., 1:].abs().max() < 1e-8


def test_strides_are_respected(by_torch):
    draw = generator(7)
    cube = torch.randn(3, 9, 11, 2, generator=draw).permute(0, 3, 1, 2)[..., 1:8, 2:10]
    mask = (torch.rand(9, 11, generator=draw) > 0.2)[1:8, 2:10].expand(3, 7, 8)
    motion = motions("affine", draw)
    found = kernels.resample(cube, motion, mask, "bilinear", "border", None, 1)
    expected = by_torch(warp.resample, cube, motion, mask=mask)
    same(found[0], expected.values)
    assert torch.equal(found[1], expected.validity)


def test_nothing_is_given_for_nothing():
    values, validity = kernels.resample(
        torch.zeros(0, 2, 5, 5), torch.zeros(0, 2), None, "bilinear", "border", None, 1
    )
    assert values.shape == (0, 2, 5, 5)
    assert validity.shape == (0, 5, 5)
    assert kernels.score(
        torch.zeros(0, 5, 5), torch.zeros(1, 5, 5), torch.zeros(1, 0, 2), None, None, None, 1
    ).shape == (
        0,
        2,
    )
    assert kernels.see(torch.zeros(0, 2, 5, 5), None, "mean", ())[0].shape == (0, 5, 5)
    assert (
        kernels.resample(torch.zeros(1, 1, 2, 2).bool(), torch.zeros(1, 2), None, "nearest", "border", None)
        is None
    )


@pytest.mark.parametrize(
    ("kind", "masked"),
    [
        ("shift", True),
        ("affine", False),
        ("homography", True),
        *(
            pytest.param(*others, marks=pytest.mark.slow)
            for others in (("shift", False), ("affine", True), ("homography", False))
        ),
    ],
)
def test_score(kind, masked, by_torch):
    draw = generator(11 + masked)
    size, step = ((41, 37), 2) if masked else ((5, 7), 1)
    moving = torch.rand(3, *size, generator=draw) + 3
    reference = torch.rand(1, *size, generator=draw) + 0.7 * moving[:1]
    usable = other = None
    if masked:
        usable = torch.rand(3, *size, generator=draw) > 0.1
        other = torch.rand(1, *size, generator=draw) > 0.1
        moving, reference = moving.where(usable, 0.0), reference.where(other, 0.0)
    first = motions(kind, draw)
    first[2] = first[0]
    second = first.clone()
    second[..., 0, -1] += 0.25 if kind != "shift" else 0.0
    if kind == "shift":
        second[:, 0] += 0.25
    weight = torch.rand(3, -(-size[0] // step), -(-size[1] // step), generator=draw) if masked else None
    found = kernels.score(moving, reference, torch.stack((first, second)), usable, other, weight, step)

    ground = torch.ones(3, -(-size[0] // step), -(-size[1] // step), dtype=torch.bool)
    images = []
    for motion in (first, second):
        values, validity = by_torch(
            warp.resample,
            moving.double()[:, None],
            motion.double(),
            interpolation="bicubic",
            mask=usable,
            step=step,
        )
        ground = ground & validity
        images.append(values[:, 0])
    if masked:
        ground = ground & usable[:, ::step, ::step] & other[:, ::step, ::step]
    expected = quality._correlate(
        reference.double()[:, ::step, ::step],
        *images,
        moving.double()[:, ::step, ::step],
        (ground.double() if weight is None else ground * weight.double()).flatten(-2),
    )
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE, atol=20 * TOLERANCE)
    assert found.abs().max() > 0.1


@pytest.mark.slow
def test_score_of_flat_frames_large_numbers_and_one_reference_each():
    draw = generator(13)
    scene = torch.rand(2, 3, 9, 8, generator=draw)
    moving = scene.clone()
    moving[0, 1] = 4.0  # flat
    moving[1, 2] *= 1e25  # whose squares overflow
    none = torch.zeros(2, 3, 2)
    found = kernels.score(moving, scene, none[None], None, None, None, 1)
    expected = torch.ones(2, 3, 2)
    expected[0, 1] = 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    nothing = kernels.score(moving, scene, none[None] + 100, None, None, None, 1)
    assert (nothing == 0).all()
    # one reference for each series of a batch, usable in part of the second
    usable = torch.ones(2, 1, 9, 8, dtype=torch.bool)
    usable[1, :, 4:] = False
    found = kernels.score(scene, scene[:, :1], none[None], None, usable, None, 1)
    expected = quality.normalized_cross_correlation(scene, scene[:, :1], usable)
    torch.testing.assert_close(found[..., 0], expected, rtol=1e-5, atol=1e-6)


def local_shifts(draw):
    """Over some 40 × 40 pixels; the second of three is none."""
    coefficients = 2 * torch.randn(3, 2, 6, 6, generator=draw)
    coefficients[1] = 0
    return ta.ShiftField(
        coefficients, torch.zeros(3, 6, 6), torch.full((3, 2), -12.0), torch.full((3, 2), 12.0)
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("shift", torch.uint8),
        ("affine", torch.float32),
        pytest.param("shift", torch.float32, marks=pytest.mark.slow),
        pytest.param("affine", torch.uint8, marks=pytest.mark.slow),
    ],
)
def test_resample_by_local_shifts(kind, dtype, by_torch):
    draw = generator(14)
    values = torch.rand(3, 2, 37, 41, generator=draw) * 200
    cube, motion, field = values.to(dtype), motions(kind, draw), local_shifts(draw)
    mask = torch.rand(3, 37, 41, generator=draw) > 0.1
    options = {"interpolation": "bicubic" if kind == "shift" else "bilinear", "mask": mask}
    for step in (1, 3):
        found = warp.resample(cube, motion, field=field, step=step, **options)
        expected = by_torch(warp.resample, cube, motion, field=field, step=step, **options)
        if dtype == torch.uint8:
            assert (found.values.int() - expected.values.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=2e-2)
        assert (found.validity != expected.validity).float().mean() < 1e-3
        plain = warp.resample(cube, motion, step=step, **options)
        assert torch.equal(found.values[1], plain.values[1])
        assert not torch.equal(found.values[0], plain.values[0])


@pytest.mark.parametrize("masked", [False, True])
def test_score_of_local_shifts(masked, by_torch):
    draw = generator(12)
    size = (41, 37)
    reference = torch.rand(1, *size, generator=draw)
    moving = torch.rand(3, *size, generator=draw) + reference
    usable = torch.rand(3, *size, generator=draw) > 0.1 if masked else None
    if usable is not None:
        moving = moving.where(usable, 0.0)
    field = local_shifts(draw)
    status, shift = torch.zeros(3, dtype=torch.int64), motions("shift", draw)
    warps = torch.cat((torch.eye(2).expand(3, 2, 2), shift[:, :, None]), -1)
    stages = [
        quality.Motion(warps, torch.zeros(3), status, only_shifts=True, field=one) for one in (None, field)
    ]
    given = (moving, reference, stages, (usable, None), None, 2)
    found, expected = (
        torch.stack(tuple(scores)) for scores in (
            quality._scores(*given, vector=False), by_torch(quality._scores, *given, vector=False)
        )
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0, 1], found[1, 1])
    assert (found[0, 0] - found[1, 0]).abs() > 0.01


@pytest.mark.parametrize(
    ("dtype", "masked"),
    [
        (torch.float32, True),
        pytest.param(torch.float64, False, marks=pytest.mark.slow),
        pytest.param(torch.float32, False, marks=pytest.mark.slow),
        pytest.param(torch.float64, True, marks=pytest.mark.slow),
    ],
)
def test_local_shifts_round_by_round(dtype, masked, by_torch):
    draw = generator(19)
    size = (36, 33)
    level = local._level(size, 0.32, 12, like=torch.zeros((), dtype=dtype))
    grid = level.grid.size
    coefficients = torch.randn(2, 68, 65, generator=draw, dtype=dtype)
    weights = torch.rand(2, *grid, generator=draw, dtype=dtype) if masked else None
    frames = local._Frames(coefficients, weights)
    shifts = 3 * torch.randn(2, 2, *grid, generator=draw, dtype=dtype)
    shifts[0, 0, 3, 4] = torch.nan
    shifts[0, 1, 5, 6] = 1e9
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-9}
    for at in (level.at[None], level.at + shifts):
        found = local._read_frames(frames, level, at)
        expected = by_torch(local._read_frames, frames, level, at)
        assert 0.3 < expected[1].mean() <= 1
        assert (found[2] is None) is not masked
        for one, other in zip(found[: 2 + masked], expected, strict=False):
            torch.testing.assert_close(one, other, **tolerance)
    field = torch.randn(1, *grid, generator=draw, dtype=dtype)
    own, inside, usable = expected
    own = own + field
    for reference in (field, field.repeat(2, 1, 1)):
        counts = torch.rand(reference.shape, generator=draw, dtype=dtype)
        given = own, reference, inside, usable, counts
        expected = by_torch(local._weigh, *given)
        for one, other in zip(local._weigh(*given), expected, strict=True):
            torch.testing.assert_close(one, other, **tolerance)
        given = own, reference, expected[1], shifts.nan_to_num(0.0), level
        expected = by_torch(local._products_and_pull, *given)
        for one, other in zip(local._products_and_pull(*given), expected, strict=True):
            torch.testing.assert_close(
                one, other, rtol=tolerance["rtol"], atol=1e-6 * other.abs().max().item()
            )


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, (8, 5)), (torch.float32, (24, 31))])
def test_climb(dtype, size, by_torch):
    draw = generator(17)
    height, width = size
    exact = (
        torch.fft.fftfreq(height, dtype=torch.float64) / 2,
        torch.fft.rfftfreq(width, dtype=torch.float64) / 2,
    )
    spectrum = torch.fft.rfft2(torch.randn(4, height, width, generator=draw, dtype=torch.float64))
    truth = torch.tensor([[1.3, -2.2], [0.0, 0.0], [0.7, 3.0], [0.4, 0.1]], dtype=torch.float64)
    moved = by_torch(fourier.shift_phase, spectrum, exact, truth)
    power = moved.conj() * spectrum
    power[3] = 0  # nothing to climb
    start = truth + torch.tensor([0.2, -0.15], dtype=torch.float64)
    start[1] = 0
    kind = torch.complex64 if dtype == torch.float32 else torch.complex128
    power, start, frequencies = power.to(kind), start.to(dtype), tuple(part.to(dtype) for part in exact)

    shift, last, found = kernels.climb(power, frequencies, start, 4, False)
    expected_shift, expected_last, curved = by_torch(peak.refine_peak, power, frequencies, start, steps=3)
    assert shift[1].tolist() == [0.0, 0.0]  # identical frames, exactly
    assert torch.equal(shift[3], start[3])
    torch.testing.assert_close(shift, expected_shift, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(last, expected_last, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(found, curved)


@pytest.mark.parametrize(
    ("dtype", "channel", "bands"),
    [
        (torch.float32, "mean", ()),
        (torch.float64, "mean", ()),
        (torch.float16, "band", (2,)),
        (torch.float64, "band", (2,)),
        (torch.float32, "rgb_mean", (3, 2, 1)),
        (torch.float16, "luminance", (3, 2, 1)),
    ],
)
def test_see(dtype, channel, bands):
    draw, masked = generator(19), dtype != torch.float64
    cube = spoilt((2, 3, 5, 7, 9), draw, dtype)[..., 1:, :-2]
    cube = torch.cat([cube, spoilt((2, 3, 1, 6, 7), draw, dtype)], -3)[:, :, :5]
    mask = (torch.rand(2, 3, 6, 7, generator=draw) > 0.3) if masked else None
    seen, usable = kernels.see(cube, mask, channel, bands)
    wide = cube if dtype == torch.float64 else cube.float()
    expected = extract_channel(wide, bands[0] if channel == "band" else channel, rgb_bands=(3, 2, 1))
    good = expected.isfinite() if mask is None else expected.isfinite() & mask
    assert torch.equal(usable, good)
    same(seen, torch.where(good, expected, 0.0))


@pytest.mark.parametrize(("size", "frame"), [((16, 24), (32, 48)), ((9, 11), (17, 22))])
def test_peak_turn_and_window(size, frame, by_torch):
    draw = generator(23)
    surface = torch.randn(4, *size, generator=draw)
    surface[0] = 0  # no peak
    surface[1, -2, -1] = 9.0  # at a negative lag
    surface[2, size[0] // 2, size[1] // 2] = 30.0  # out of reach
    found = peak.coarse_peak(surface, frame, 5.0)
    expected = by_torch(peak.coarse_peak, surface, frame, 5.0)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.outside.tolist() == [False, False, True, found.outside[3].item()]

    grid = WorkingGrid.of(frame, size, 0.25, surface)
    shift = 3 * torch.randn(4, 2, generator=draw)
    for spectrum in (torch.fft.rfft2(surface), torch.fft.rfft2(surface[3])):
        own = fourier.shift_phase(spectrum, grid.frequencies, shift)
        other = by_torch(fourier.shift_phase, spectrum, grid.frequencies, shift)
        torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=float(spectrum.abs().max()) * TOLERANCE)
    window = Window.of(grid, 0.15)
    torch.testing.assert_close(
        window.common(shift), by_torch(window.common, shift), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("frame", "size"), [pytest.param((17, 23), (16, 16), marks=pytest.mark.slow), ((5, 7), (5, 7))], ids=str
)
def test_texture_with_holes(frame, size, by_torch):
    draw = generator(29)
    mask = torch.rand(3, *frame, generator=draw) > 0.3
    mask[0, :10, :9] = False
    mask[1] = True
    mask[2] = False
    image = (torch.randn(3, *frame, generator=draw) + 5).where(mask, 0.0)
    found = texture.centre(image, mask)
    for own, other in zip(found, by_torch(texture.centre, image, mask), strict=True):
        torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=5 * TOLERANCE)
    grid = WorkingGrid.of(frame, size, 0.25, image)
    own, other = texture.usable_share(mask, grid), by_torch(texture.usable_share, mask, grid)
    torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=TOLERANCE)
    field, share = torch.randn(4, *size, generator=draw), torch.rand(4, *size, generator=draw)
    field[1], field[2, 0, 0], share[3] = 1e-3 * field[1], torch.nan, 0.2
    options = torch.tensor([0.0, 0.01, 0.0, 0.0]), torch.tensor([False, False, False, False]), "local", 0.0
    for weights in (None, share):
        own, other = (
            call(texture._standardized, field, weights, *options)
            for call in (lambda function, *rest: function(*rest), by_torch)
        )
        assert torch.equal(own.flat, other.flat)
        assert own.flat.tolist() == [False, True, True, False]
        for one, theirs in ((own.field, other.field), (own.detail, other.detail)):
            torch.testing.assert_close(one, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    own, other = texture._shares(share, cover=True), by_torch(texture._shares, share, cover=True)
    torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("dtype", "shared"), [(torch.float32, True), (torch.float64, False)])
def test_a_peak_assessed_and_divided(dtype, shared, by_torch):
    cube, _, mask = series()
    image = cube.nan_to_num(0.0, 0.0, 0.0).mean(1).to(dtype)
    mask[0, 10:30, 5:30] = False
    still = image[1:2] if shared else image[[1, 1, 0]]
    textures = [
        by_torch(texture.extract_texture, part, usable, cover=True)
        for part, usable in ((image, mask), (still, None if shared else mask))
    ]
    grid = WorkingGrid.of((64, 72), (32, 40), 0.25, image)
    pair = phase._Pair(*textures, grid, Window.of(grid, 0.15), "ramp")
    together = torch.tensor([[-0.9, 0.8], [0.0, 0.0], [3.1, -2.2]], dtype=dtype)
    same = torch.rand(3, 8, 10, generator=generator(41)).to(dtype)
    back, weights = pair.moved_back(together), enlarge(same, 4, (32, 40))
    windows = tuple(by_torch(pair.tapering.common, way) for way in (-together, together))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-7
    fields, expected = (
        phase._divided_fields(pair, same, windows, back),
        by_torch(phase._divided_fields, pair, same, windows, back),
    )
    moving, still = (torch.fft.rfft2(part.field) for part in textures)
    own, other = (
        call(uncertainty.block_pulls, moving, still, together, grid)
        for call in (lambda function, *rest: function(*rest), by_torch)
    )
    torch.testing.assert_close(own, other, rtol=tolerance, atol=float(other.abs().max()) * tolerance)
    torch.testing.assert_close(fields, expected, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)
    for own, other in zip(
        phase._refine_divided(pair, together, same, windows, back),
        by_torch(phase._refine_divided, pair, together, same, windows, back),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)
    *_, power = by_torch(pair.correlate, pair.tapering.whole, weights)
    power[1] = 0  # nothing to climb
    found = phase._refine_plain(power, weights, together, together + 0.1, grid, None, 2.0)
    other = by_torch(phase._refine_plain, power, weights, together, together + 0.1, grid, None, 2.0)
    for own, theirs in zip((*found[:3], *found[3]), (*other[:3], *other[3]), strict=True):
        torch.testing.assert_close(own, theirs, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_enlargement(dtype, by_torch):
    draw = generator(43)
    frames = torch.rand(6, 150, 170, generator=draw)[:, :60, :70]
    for number, factor in ((1, 2), (2, 3), (3, 5)):
        large = frames[number].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        frames[number] = large[1:61, 2:72]
    frames[4] = 3.0
    frames[5] = torch.arange(70.0)
    frames = frames.to(dtype)
    mask = torch.rand(frames.shape, generator=draw) > 0.1
    for usable in (None, mask):
        own = defects.enlargement(frames, usable)
        assert torch.equal(own, by_torch(defects.enlargement, frames, usable))
    assert own.tolist()[:3] == [1, 2, 3]


@pytest.mark.parametrize("size", [(20, 33), (5, 40)])
def test_blur(size, by_torch):
    image = torch.randn(2, *size, generator=generator(31))
    own, other = sift._blur(image, 1.7), by_torch(sift._blur, image, 1.7)
    torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=TOLERANCE)


def near(found, expected, least=0.0):
    """Equal to 2e-6 of the largest number, or of the least that counts; NaN, infinities and bool ones exactly."""
    for own, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        if not own.dtype.is_floating_point and not own.dtype.is_complex:
            assert torch.equal(own, other)
            continue
        known = other.abs()[other.isfinite()]
        scale = max(float(known.max()) if known.numel() else 0.0, least)
        torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=scale * TOLERANCE, equal_nan=True)


def tensors_of(found):
    return [part for part in torch.utils._pytree.tree_leaves(found) if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((1, 1), torch.float64),
        ((1, 4096), torch.float64),
        pytest.param(
            tuple(torch.randint(2, 30, (2,), generator=generator(51)).tolist()),
            torch.float64,
            marks=pytest.mark.slow,
        ),
        ((5, 7), torch.float32),
    ],
    ids=str,
)
def test_any_size(size, dtype, by_torch):
    """Every kernel that takes any size; the warp's are above."""
    draw = generator(sum(size))

    def random(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    def both(function, *arguments, **options):
        near(function(*arguments, **options), by_torch(function, *arguments, **options))

    image, field, share = random(3, *size) + 5, random(3, *size), random(3, *size).clamp(0, 1)
    mask = torch.rand(3, *size, generator=draw) > 0.2
    mask[2] = False
    cube, aligner = spoilt((3, 2, *size), draw, dtype), ta.PCC()
    aligner.expects_defects = False
    both(aligner._extract_channel, cube, mask[:1])  # one mask for all
    both(aligner._extract_channel, cube[:1], mask)  # and one frame under several
    both(texture.centre, image.where(mask, 0.0), mask)
    both(texture._shares, share, cover=True)
    if min(size) > 1:  # else there is no contrast but rounding
        known = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=torch.bool)
        both(texture._standardized, field, share, *known, "local", 0.01)
    both(sift._blur, image, 1.7)
    frame = (2 * size[0] + 1, 2 * size[1])
    grid = WorkingGrid.of(frame, size, 0.25, image)
    both(texture._coverage, torch.rand(3, *frame, generator=draw) > 0.3, grid)
    both(peak.coarse_peak, field, frame, 5.0)
    shift = 3 * random(3, 2)
    if dtype == torch.float64:  # else a phase of thousands of turns is no number to compare
        shift[1] = torch.tensor([-4000.0, 3000.5])
    both(Window.of(grid, 0.15).common, shift)
    spectrum = torch.fft.rfft2(field)
    both(fourier.shift_phase, spectrum, grid.frequencies, shift)
    still = torch.fft.rfft2(image[:1])
    both(uncertainty.block_pulls, spectrum, still, shift, grid)
    both(common_ground.agreement_of_blocks, field + 0.5 * image, field[0])
    both(common_ground.agreement, field + 0.5 * image, image, fine=True)
    for other, weighting in ((still, "ramp"), (torch.fft.rfft2(image), "none"), (still[0], "ramp")):
        both(phase.cross_power, spectrum, other, grid.radius, 0.25, weighting)
    both(
        phase.cross_power, spectrum[:1], torch.fft.rfft2(image).conj(), grid.radius, 0.25
    )  # one frame, of three
    power = spectrum.abs().square().to(spectrum.dtype)  # its peak is at 0
    climb = partial(peak.refine_peak, steps=2)
    given = power, grid.frequencies, torch.full((3, 2), 0.1, dtype=dtype)
    near(climb(*given), by_torch(climb, *given), least=1.0)  # pixels


@pytest.mark.parametrize(
    ("motion", "robust"),
    [
        ("translation", "agreement"),
        pytest.param("homography", "none", marks=pytest.mark.slow),
        pytest.param("euclidean", "agreement", marks=pytest.mark.slow),
    ],
)
def test_search(motion, robust, by_torch):
    """The samples of a warped frame, and the steps of shifted and of warped ones."""
    draw = generator(61)
    scene = torch.nn.functional.avg_pool2d(torch.rand(1, 60, 75, generator=draw, dtype=torch.float64), 5, 1)[
        0
    ]
    size = (33, 46)
    moving = torch.stack(
        [scene[y : y + size[0], x : x + size[1]] for y, x in ((4, 4), (5, 3), (3, 6), (4, 5))]
    )
    mask = torch.rand(4, *size, generator=draw) > 0.05
    mask[1, 10:20, 5:30] = False
    moving, reference = moving.where(mask, 0.0), moving[:1].clone()
    init = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    init[1, :2, 2] = torch.tensor([0.4, -0.8])
    init[2, 0, 2] = torch.nan
    init[3, :2, 2] = torch.tensor([-300.0, 200.0])  # far
    init = init if motion == "homography" else init[:, :2, 2] if motion == "translation" else init[:, :2]
    options = {"motion": motion, "init": init, "levels": 1, "robust": robust}
    found = ecc.enhanced_correlation(moving, reference, mask, **options)
    expected = by_torch(ecc.enhanced_correlation, moving, reference, mask, **options)
    near(found, expected)
    assert found.converged.any()


def series():
    """Three frames of 64 × 72 that are moved against their reference, with noise, holes and a mask."""
    draw = generator(37)
    ground = torch.nn.functional.avg_pool2d(torch.rand(2, 80, 88, generator=draw), 7, 1)
    reference = ground[:, 4:68, 4:76]
    cube = torch.stack([ground[:, 3:67, 5:77], reference, ground[:, 6:70, 1:73]])
    cube = cube + 0.003 * torch.randn(cube.shape, generator=draw)
    cube[0, :, 10:20, 5:30] = torch.nan
    cube[2, 0, 40, 40] = torch.inf
    return cube, reference, torch.rand(3, 64, 72, generator=draw) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        partial(ta.PCC, fill_value=-1.0, interpolation="bicubic", channel=0, crop_center=60),
        ta.ECC,
        partial(ta.ECC, motion="homography", robust="none"),
        lambda: ta.Cascade(ta.PCC(), ta.ECC(motion="affine")),
    ],
    ids=["PCC", "ECC", "homography", "Cascade"],
)
def test_aligners(make, by_torch):
    cube, reference, mask = series()
    aligner = make()
    own, other = aligner(cube, reference, mask), by_torch(aligner, cube, reference, mask)
    assert torch.equal(own.estimate.status, other.estimate.status)
    assert (own.estimate.status == 0).any()
    for name in ("warp", "score", "score_before", "sigma", "covariance"):
        torch.testing.assert_close(
            getattr(own.estimate, name), getattr(other.estimate, name), rtol=1e-4, atol=2e-5
        )
    torch.testing.assert_close(own.aligned, other.aligned, rtol=1e-4, atol=2e-5, equal_nan=True)


def test_a_gradient_takes_the_functions_of_torch(by_torch, monkeypatch):
    cube, reference, _ = series()
    cube, reference = cube.nan_to_num(0.5, 0.5, 0.5).requires_grad_(), reference.clone().requires_grad_()
    expected = by_torch(ta.PCC().estimate, cube, reference).warp
    launched = []

    def watched(operator):
        def call(*given):
            leaves = torch.utils._pytree.tree_leaves(given)
            launched.append(any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves))
            return operator(*given)

        return call

    for name, operator in list(vars(kernels).items()):
        if f"{getattr(operator, '__module__', '')}".startswith("torchalign.kernels."):
            monkeypatch.setattr(kernels, name, watched(operator))
    found = ta.PCC().estimate(cube, reference).warp
    # what no gradient flows through, such as the share of usable pixels, is still a kernel's, equal to rounding
    assert launched
    assert not any(launched)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(warp.sum(), cube)[0] for warp in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 0.01
    mapped = torch.func.vmap(lambda frames: ta.warp(frames, torch.zeros(1, 2)))(cube.detach()[:, None])
    assert torch.equal(mapped[:, 0], cube.detach())


@pytest.mark.slow
def test_operators_are_kept_by_export():
    cube, reference, _ = series()
    cube = cube[:2, :, :40, :48].nan_to_num(0.5)
    aligner = ta.PCC()
    aligner.expects_defects = False  # which a program does not look for
    program = torch.export.export(aligner, (cube, reference[:, :40, :48]), strict=False)
    parts = [part for part in program.graph_module.modules() if hasattr(part, "graph")]
    names = {str(node.target) for part in parts for node in part.graph.nodes}
    for operator in (
        "see",
        "usable_mean",
        "filled_holes",
        "coverage",
        "turn",
        "common_window",
        "peak",
        "climb",
        "score",
        "resample",
    ):
        assert f"torchalign.{operator}.default" in names
    found = program.module()(cube, reference[:, :40, :48])
    # (eager frames without a hole need no mask, which a program always has)
    expected = aligner(cube, reference[:, :40, :48]).estimate.warp
    torch.testing.assert_close(found.estimate.warp, expected, rtol=0, atol=1e-3)
