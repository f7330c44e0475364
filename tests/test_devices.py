"""No host sync, no device mix, on a machine that has no GPU; and export, compile, vmap."""

from __future__ import annotations

import io
import os
import shutil
import warnings

import pytest
import torch
from scenes import fractal_stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import torchalign as ta

SIZE = (64, 72)


class Channel(torch.nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.5, 0.2, 0.2, 0.1], device=device))

    def forward(self, cube):
        return (cube * self.weights.to(cube)[:, None, None]).sum(-3)


OPTIONS = {
    "default": {},
    "once": {"robust": False},
    "wide, phase, plain": {"max_frequency": 0.5, "weighting": "phase", "contrast": "none", "taper": 0.0},
    "sqrt": {"weighting": "sqrt", "taper": 1.0},
    "none": {"weighting": "none", "max_frequency": 0.1},
    "grid": {"upsample_factor": 20},
    "band": {"channel": -1, "min_score": 0.2},
    "luminance, nearest": {"channel": "luminance", "interpolation": "nearest", "padding_mode": "zeros"},
    "gradients, bicubic": {"channel": "gradients", "interpolation": "bicubic", "padding_mode": "reflection"},
    "rgb, crop, fill": {"channel": "rgb_mean", "crop_center": (49, 64), "fill_value": -1.0},
    "module": {"channel": Channel(), "max_translation": 20.0},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def real(frames=4):
    data = fractal_stack(frames, size=SIZE, bands=4, noise=0.003)
    return data.cube, data.reference


def assert_same(found, expected, tolerance=1e-3):
    assert torch.equal(found.status.cpu(), expected.status)
    torch.testing.assert_close(found.warp.cpu(), expected.warp, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.score.cpu(), expected.score, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------------------------ fake CUDA


@pytest.fixture
def fake():
    """Tensors on a GPU that is not there: a tensor on the wrong device raises, `.item()` and `nonzero` too."""
    if torch.version.cuda is None:
        pytest.skip("fake CUDA tensors need a build of torch with CUDA; this one has none")
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with FakeTensorMode() as mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the missing driver
            yield mode
    finally:
        torch.backends.cudnn.enabled = before


def on_cuda(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="cuda", **options)


def pcc_on_cuda(options):
    aligner = ta.PCC(**options)
    if isinstance(aligner.channel, torch.nn.Module):
        aligner.channel = Channel("cuda")
    return aligner


def check(aligned, estimate, cube):
    assert aligned.device.type == "cuda"
    assert aligned.shape == cube.shape
    assert aligned.dtype == cube.dtype
    for field in estimate:
        assert field.device.type == "cuda"
        assert field.shape[: cube.ndim - 3] == cube.shape[:-3]


@each_option
def test_fake_cuda(fake, options):
    aligner = pcc_on_cuda(options)
    mask = on_cuda(4, *SIZE, dtype=torch.bool)
    init = on_cuda(4, 2, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16) if not options else (torch.float32,):
        cube, reference = on_cuda(4, 4, *SIZE, dtype=dtype), on_cuda(4, *SIZE, dtype=dtype)
        check(*aligner(cube, reference), cube)
        check(*aligner(cube, reference, mask, mask[:1]), cube)
    cube, reference = on_cuda(4, 4, *SIZE), on_cuda(4, *SIZE)
    check(*aligner(cube, reference, init=init), cube)
    check(*aligner(cube, cube, mask, mask, init=on_cuda(4, 3, 3)), cube)
    if options:
        return
    with torch.autocast("cuda", dtype=torch.bfloat16):
        check(*aligner(cube, reference, mask), cube)
    # enough frames that the CPU would have cut them into blocks
    many = on_cuda(1200, 4, *SIZE)
    check(*aligner(many, reference), many)


@each_option
def test_fake_cuda_gradients(fake, options):
    if options.get("interpolation") == "nearest" or "upsample_factor" in options:
        pytest.skip("not differentiable, as documented")
    # forward mode: autograd's engine wants a driver for its streams
    aligner = pcc_on_cuda(options)
    for parameter in aligner.parameters():
        parameter.requires_grad_(False)
    cube, reference, mask = on_cuda(4, 4, *SIZE), on_cuda(4, *SIZE), on_cuda(*SIZE, dtype=torch.bool)
    with forward_ad.dual_level():
        cube, reference = (forward_ad.make_dual(image, on_cuda(*image.shape)) for image in (cube, reference))
        aligned, estimate = aligner(cube, reference, mask, mask)
        for output in (aligned, estimate.warp, estimate.score):
            assert forward_ad.unpack_dual(output).tangent.device.type == "cuda"


def test_fake_cuda_sees_what_it_should(fake):
    # the test's own teeth: a host sync and a mix of devices do raise
    cube = on_cuda(2, 1, *SIZE)
    for channel in (
        lambda cube: cube[..., 0, :, :] * float(cube.max()),
        lambda cube: cube[..., 0, :, :] - cube[cube > 0].mean(),
        lambda cube: cube[..., 0, :, :] + torch.zeros(SIZE),
    ):
        with pytest.raises(Exception, match=r"(?i)data.dependent|dynamic|device|item|local_scalar|nonzero"):
            ta.PCC(channel=channel)(cube, cube)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_fake_cuda_warp(fake, interpolation):
    cube, warp = on_cuda(2, 3, 4, *SIZE), on_cuda(2, 3, 2, 3)
    mask = on_cuda(2, 3, *SIZE, dtype=torch.bool)
    for fill in (None, 0.0):
        assert ta.warp(cube, warp, interpolation=interpolation, fill_value=fill).device.type == "cuda"
        assert ta.warp(cube, warp, interpolation=interpolation, mask=mask).shape == cube.shape


# ---------------------------------------------------------------------------------------------------- a real device


@each_option
def test_device_agrees_with_the_cpu(device, options):
    cube, reference = real()
    cube[2] = float("nan")
    mask = torch.ones(4, *SIZE, dtype=torch.bool)
    mask[1, :20, :30] = False
    aligner = ta.PCC(**options)
    expected = aligner(cube, reference, mask)
    found = aligner.to(device)(cube.to(device), reference.to(device), mask.to(device))
    aligner.to("cpu")
    assert_same(found.estimate, expected.estimate)
    torch.testing.assert_close(found.aligned.cpu(), expected.aligned, atol=5e-3, rtol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------ export, compile, vmap


@pytest.fixture
def quiet():
    """torch's own machinery warns of its own deprecations while tracing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [{}, {"robust": False, "upsample_factor": 10, "channel": "gradients", "crop_center": 50}],
    ids=str,
)
def test_export_with_any_number_of_frames(quiet, options):
    cube, reference = real(6)
    mask = torch.rand(6, *SIZE) > 0.02
    aligner = ta.PCC(**options).eval()
    frames = torch.export.Dim("frames", min=2, max=4096)
    masks = () if options else (mask,)
    # traced with as many frames as there are bands, which must not be taken for the same number
    given = (cube[:4], reference, *(part[:4] for part in masks))
    shapes = ({0: frames}, None, *({0: frames} for _ in masks))
    program = torch.export.export(aligner, given, dynamic_shapes=shapes)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    module = torch.export.load(saved).module()
    for count in (2, 4, 6):
        given = (cube[:count], reference, *(part[:count] for part in masks))
        aligned, estimate = module(*given)
        expected = aligner(*given)
        assert_same(estimate, expected.estimate, 2e-3)
        torch.testing.assert_close(aligned, expected.aligned, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    "name", ["wide, phase, plain", "grid", "rgb, crop, fill", "gradients, bicubic", "module"]
)
def test_compile_is_one_graph(quiet, name):
    # tracing takes its time: every option once, in few combinations
    cube, reference = real()
    aligner = ta.PCC(**OPTIONS[name])
    compiled = torch.compile(aligner, fullgraph=True, backend="eager")
    found, expected = compiled(cube, reference), aligner(cube, reference)
    assert_same(found.estimate, expected.estimate)
    torch.testing.assert_close(found.aligned, expected.aligned, atol=5e-3, rtol=0)


def test_compile_with_masks_and_gradients(quiet):
    cube, reference = real()
    mask = torch.rand(4, *SIZE) > 0.02
    aligner = ta.PCC()
    compiled = torch.compile(aligner, fullgraph=True, backend="aot_eager")
    slopes, results = [], []
    for run in (compiled, aligner):
        leaf = cube.clone().requires_grad_()
        results.append(run(leaf, reference, mask, mask[0]).estimate)
        results[-1].warp[..., 2].sum().backward()
        slopes.append(leaf.grad)
    assert_same(*(ta.Estimate(*(field.detach() for field in result)) for result in results))
    torch.testing.assert_close(*slopes, atol=1e-3 * float(slopes[1].abs().max()), rtol=1e-2)


@pytest.mark.skipif(
    "TORCHALIGN_INDUCTOR" not in os.environ, reason="takes a minute: set TORCHALIGN_INDUCTOR to run"
)
def test_inductor(quiet):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler for torch.compile's inductor")
    cube, reference = real()
    aligner = ta.PCC(robust=False, contrast="none")
    found = torch.compile(aligner.estimate, fullgraph=True)(cube, reference)
    assert_same(found, aligner.estimate(cube, reference))


@pytest.mark.parametrize(
    "options", [{}, {"robust": False, "weighting": "phase"}, {"upsample_factor": 20}], ids=str
)
def test_vmap_over_series(quiet, options):
    cube, reference = real(6)
    cube = cube.reshape(2, 3, *cube.shape[1:])
    references = torch.stack([reference, reference.flip(0)])
    mask = torch.rand(2, 3, *SIZE) > 0.02
    aligner = ta.PCC(**options)
    for masks in ((), (mask,)):
        found = torch.vmap(aligner)(cube, references, *masks)
        expected = aligner(cube, references, *masks)
        assert_same(found.estimate, expected.estimate)
        torch.testing.assert_close(found.aligned, expected.aligned, atol=5e-3, rtol=0)


def test_per_sample_gradients(quiet):
    cube, reference = real(2)

    def loss(frame):
        return ta.PCC().estimate(frame[None], reference).warp[0, :, 2].sum()

    each = torch.vmap(torch.func.grad(loss))(cube)
    for t in range(2):
        torch.testing.assert_close(each[t], torch.func.grad(loss)(cube[t]), atol=1e-4, rtol=1e-2)
