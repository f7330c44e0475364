"""No host sync, no device mix, on a machine that has no GPU; and export, compile, vmap."""

from __future__ import annotations

import contextlib
import gc
import io
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from scenes import fractal_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import torchalign as ta
from torchalign.aligner import Aligner
from torchalign.types import Pair, combine

SIZE = (64, 72)


class Channel(torch.nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.weights = torch.nn.Parameter(0.5 - 0.1 * torch.arange(4, device=device))

    def forward(self, cube):
        return (cube * self.weights.to(cube)[:, None, None]).sum(-3)


class Proof(NamedTuple):
    """An aligner, with options, that is to be proved."""

    make: Callable[..., Aligner]
    forward_mode: bool = True  # derivatives; torch's grid_sample has only those of reverse mode
    thorough: bool = False  # one of each method: every dtype, layout and kind of argument
    size: tuple[int, int] = SIZE  # that of LGM spares a trace octaves of SIFT, which all take the same way


# a new aligner, or option of one, is one line
ALIGNERS = {
    "default": Proof(ta.PCC, thorough=True),
    # every option once, in few combinations: each is traced anew
    "once, wide, phase, plain, band": Proof(
        partial(
            ta.PCC,
            robust=False,
            max_frequency=0.5,
            weighting="phase",
            contrast="none",
            taper=0.0,
            channel=-1,
            min_score=0.2,
        )
    ),
    "none, rgb, crop, fill": Proof(
        partial(
            ta.PCC,
            robust=False,
            weighting="none",
            max_frequency=0.1,
            channel="rgb_mean",
            crop_center=(49, 64),
            fill_value=-1.0,
        )
    ),
    "sqrt, gradients, bicubic": Proof(
        partial(
            ta.PCC,
            robust=False,
            weighting="sqrt",
            taper=1.0,
            channel="gradients",
            interpolation="bicubic",
            padding_mode="reflection",
        )
    ),
    "grid, luminance, nearest": Proof(
        partial(
            ta.PCC, upsample_factor=20, channel="luminance", interpolation="nearest", padding_mode="zeros"
        ),
        forward_mode=False,
    ),
    "structure, module": Proof(
        lambda: ta.PCC(contrast="structure", robust=True, channel=Channel(), max_translation=20.0)
    ),
    # (derivatives of structure: above; of ECC: below)
    "ECC structure": Proof(
        partial(ta.ECC, contrast="structure", motion="euclidean", max_translation=20.0), forward_mode=False
    ),
    "ECC": Proof(ta.ECC, thorough=True),
    "ECC affine": Proof(partial(ta.ECC, motion="affine", robust="none", sigma_blur=1.0)),
    "ECC homography": Proof(
        partial(ta.ECC, motion="homography", robust="residual", gradients="unrolled"), forward_mode=False
    ),
    "LGM": Proof(partial(ta.LGM, max_num_keypoints=64), size=(40, 48)),
    "LGM structure": Proof(
        partial(ta.LGM, contrast="structure", motion="euclidean", max_num_keypoints=64),
        forward_mode=False,
        size=(40, 48),
    ),
    "LGM affine": Proof(
        partial(ta.LGM, motion="affine", matcher_model="mnn", refine=False, max_num_keypoints=64),
        forward_mode=False,
        size=(40, 48),
    ),
    # (its stages, which have derivatives, are above)
    "Cascade": Proof(lambda: ta.Cascade(ta.PCC(), ta.ECC(motion="euclidean")), forward_mode=False),
    "Local": Proof(partial(ta.Local, spacing=24)),
    "Cascade with LGM": Proof(
        lambda: ta.Cascade(ta.LGM(max_num_keypoints=64, refine=False), ta.PCC()),
        forward_mode=False,
        size=(40, 48),
    ),
}
each_aligner = pytest.mark.parametrize("proof", ALIGNERS.values(), ids=ALIGNERS.keys())


def layer(**options):
    return ta.AlignToFirst(ta.PCC(robust=False, contrast="none"), **options)


# modules of the training loop: what makes one, and whether it takes one series or pairs of frames
MODULES = {
    "AlignToFirst": (layer, "series"),
    "AlignToFirst, median": (partial(layer, onto="median"), "series"),
    "AlignmentLoss zncc": (partial(ta.AlignmentLoss, "zncc"), "pairs"),
    "AlignmentLoss ecc": (partial(ta.AlignmentLoss, "ecc", reduction="none"), "pairs"),
    "AlignmentLoss shift": (lambda: ta.AlignmentLoss("shift", aligner=ta.PCC(robust=False)), "pairs"),
    "AlignmentCheck": (ta.AlignmentCheck, "pairs"),
    "RandomMisregistration": (lambda: ta.RandomMisregistration(motion="homography", p=0.5), "frames"),
    "RandomMisregistration by band": (lambda: ta.RandomMisregistration(same_on_bands=False), "frames"),
    "RandomMisregistration2D": (lambda: ta.RandomMisregistration2D(motion="affine"), "frames"),
}
each_module = pytest.mark.parametrize("name", MODULES)
COMPILED = [
    "AlignToFirst",
    "AlignToFirst, median",
    "AlignmentLoss zncc",
    "AlignmentLoss ecc",
    "AlignmentLoss shift",
]


def real(frames=4):
    data = fractal_stack(frames, size=SIZE, bands=4, noise=0.003)
    return data.cube, data.reference


def assert_same(found, expected, tolerance=1e-3):
    assert torch.equal(found.status.cpu(), expected.status)
    torch.testing.assert_close(found.warp.cpu(), expected.warp, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.score.cpu(), expected.score, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------------------------ fake CUDA


def on_cuda(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="cuda", **options)


def on_gpu(module):
    """The module on the GPU; ``.to`` cannot move parameters that were made before the mode."""
    if isinstance(getattr(module, "channel", None), torch.nn.Module):
        module.channel = Channel("cuda")
    return module


def check(aligned, estimate, cube):
    assert aligned.device.type == "cuda"
    assert aligned.shape == cube.shape
    assert aligned.dtype == cube.dtype
    for field in estimate[:-1]:
        assert field.device.type == "cuda"
        assert field.shape[: cube.ndim - 3] == cube.shape[:-3]


def sent_to_cuda(built):
    """`.cuda()` swaps tensors, which fake ones do not like: each is replaced by one of its shape and dtype."""
    for part in built.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_weight = tensors is part._parameters
                    tensors[name] = torch.nn.Parameter(new, requires_grad=False) if is_weight else new
    return built


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (ta.PCC, True),
        (ta.ECC, True),
        (partial(ta.LGM, max_num_keypoints=64), True),
        (lambda: ta.Cascade(ta.PCC(), ta.ECC()), True),
        (partial(ta.ECC, motion="affine"), False),
        (lambda: ta.Cascade(ta.ECC(motion="affine"), ta.PCC()), False),
    ],
)
def test_translations_are_known_beforehand(make, known):
    # which a GPU cannot be asked
    cube, reference = (image.mean(-3) for image in real(2))
    aligner, turned = make(), torch.eye(2, 3).expand(2, 2, 3)

    def found(init):
        prepared = aligner.prepare_reference(reference[None], None)
        return aligner.estimate_motion(Pair(cube, None, reference[None], None), prepared, init).only_shifts

    assert found(None) is found(torch.zeros(2, 2)) is known
    assert found(turned) is False


@pytest.mark.parametrize(
    "proof",
    [
        # (structure and LGM are in others, and so are cascades)
        pytest.param(
            proof,
            id=name,
            marks=[pytest.mark.slow] * (name in ("ECC structure", "LGM structure", "Cascade with LGM")),
        )
        for name, proof in ALIGNERS.items()
    ],
)
def test_fake_cuda(fake, proof):
    # with everything here; one reference for all, without masks or init, in the test of gradients
    aligner = on_gpu(proof.make())
    cube = on_cuda(4, 4, *proof.size)
    mask, init = on_cuda(4, *proof.size, dtype=torch.bool), on_cuda(4, 2, 3)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        check(*aligner(cube, cube, mask, mask[:1], init=init), cube)


@pytest.mark.parametrize(
    "proof", [proof for proof in ALIGNERS.values() if proof.thorough], ids=["PCC", "ECC"]
)
def test_fake_cuda_takes_every_kind_of_argument(fake, proof):
    aligner = proof.make()
    mask = on_cuda(4, *SIZE, dtype=torch.bool)
    for dtype in (torch.float64, torch.bfloat16):
        cube, reference = on_cuda(4, 4, *SIZE, dtype=dtype), on_cuda(4, *SIZE, dtype=dtype)
        check(*aligner(cube, reference, mask), cube)
    cube = on_cuda(4, 4, *SIZE)
    check(*aligner(cube, cube, mask, mask, init=on_cuda(4, 3, 3)), cube)
    # in another layout, and enough frames that the CPU would have cut them into blocks
    many = on_cuda(1200, 4, *SIZE).to(memory_format=torch.channels_last)
    check(*aligner(many, reference.float()), many)


# Those that take longest; what they add is in others too, or in test_fake_cuda.
_SLOW = (
    "structure, module",
    "ECC structure",
    "ECC affine",
    "LGM",
    "LGM structure",
    "LGM affine",
    "Local",
    "Cascade with LGM",
)


@pytest.mark.parametrize(
    "proof",
    [
        pytest.param(proof, id=name, marks=[pytest.mark.slow] * (name in _SLOW))
        for name, proof in ALIGNERS.items()
    ],
)
def test_fake_cuda_gradients(fake, proof):
    aligner = on_gpu(proof.make())
    cube, reference = on_cuda(4, 4, *proof.size), on_cuda(4, *proof.size)
    if not proof.forward_mode:  # not differentiable, as documented, or in reverse mode only
        check(*aligner(cube, reference), cube)
        return
    # forward mode: autograd's engine wants a driver for its streams
    for parameter in aligner.parameters():
        parameter.requires_grad_(False)
    masks = (on_cuda(*SIZE, dtype=torch.bool),) * 2
    with forward_ad.dual_level():
        cube, reference = (forward_ad.make_dual(image, on_cuda(*image.shape)) for image in (cube, reference))
        for given in ((), masks) if proof.thorough else ((),):
            aligned, estimate = aligner(cube, reference, *given)
            check(aligned, estimate, cube)
            for output in (aligned, estimate.warp, estimate.score):
                assert forward_ad.unpack_dual(output).tangent.device.type == "cuda"


@each_module
def test_fake_cuda_in_training(fake, name):
    make, takes = MODULES[name]
    module = sent_to_cuda(make())
    frames, mask = on_cuda(4, 3, *SIZE), on_cuda(4, *SIZE, dtype=torch.bool)
    for _ in range(2):
        if takes == "series":
            outputs = [module(on_cuda(2, 4, 3, *SIZE)), module(frames, mask)]
        elif takes == "frames":
            outputs = [module(frames)]
        elif name.startswith("AlignmentLoss"):
            outputs = [module(frames, frames), module(frames, frames, on_cuda(4, 2, 3), mask, mask[:1])]
        else:
            outputs = [module(frames, on_cuda(4, 2, *SIZE), mask[0]), module(frames, frames)]
        tensors = torch.utils._pytree.tree_leaves(outputs)
        assert tensors
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
    kept = [*module.buffers(), *getattr(module, "residuals", ())]
    assert {tensor.device.type for tensor in kept} <= {"cuda"}
    assert len(kept) >= (6 if name == "AlignmentCheck" else 0)


@pytest.fixture
def metric():
    """Made before the fake mode begins: torchmetrics deep-copies its states, and fake tensors have no deep copy."""
    pytest.importorskip("torchmetrics")
    return ta.RegistrationError(worst=4)


def test_fake_cuda_metric(metric, fake):
    for name, state in metric.metric_state.items():
        setattr(metric, name, torch.empty(state.shape, dtype=state.dtype, device="cuda"))
    frames, mask = on_cuda(4, 3, *SIZE), on_cuda(4, *SIZE, dtype=torch.bool)
    metric.update(frames, on_cuda(4, 2, *SIZE))
    metric.update(frames, frames, mask, mask[0], on_cuda(4, dtype=torch.int64))
    found = metric.compute()
    assert {"measured", "blank", "median", "p95", "worst_ids"} <= set(found)
    assert {tensor.device.type for tensor in (*found.values(), *metric.metric_state.values())} == {"cuda"}


def test_fake_cuda_sees_a_check_that_reads(fake):
    # the teeth of the test above: to warn is to read
    frames, check = on_cuda(4, 3, *SIZE), sent_to_cuda(ta.AlignmentCheck(action="warn"))
    with pytest.raises(Exception, match=r"(?i)data.dependent|item|local_scalar|tolist"):
        check(frames, frames)


def test_fake_cuda_sees_what_it_should(fake):
    # the test's own teeth: a host sync and a mix of devices do raise
    cube = on_cuda(2, 1, *SIZE)
    for channel in (
        lambda cube: cube[..., 0, :, :] * float(cube.max()),
        lambda cube: cube[..., 0, :, :] - cube[cube > 0].mean(),
        lambda cube: cube[..., 0, :, :] + torch.zeros(SIZE),
        lambda cube: cube[..., 0, :, :] + torch.tensor([1.0], device="cuda"),
        lambda cube: cube[..., 0, :, :].index_fill(-1, torch.tensor([1]).cuda(), 0.0),
        lambda cube: torch.cholesky_inverse(cube[..., 0, :64, :64]).mean() + cube[..., 0, :, :],
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


@each_aligner
def test_device_agrees_with_the_cpu(device, proof):
    if device.type == "cpu":
        pytest.skip("the CPU would be compared with itself: pytest --device cuda")
    cube, reference = real()
    cube[2] = float("nan")
    mask = torch.ones(4, *SIZE, dtype=torch.bool)
    mask[1, :20, :30] = False
    aligner = proof.make()
    expected = aligner(cube, reference, mask)
    found = aligner.to(device)(cube.to(device), reference.to(device), mask.to(device))
    assert_same(found.estimate, expected.estimate)
    torch.testing.assert_close(found.aligned.cpu(), expected.aligned, atol=5e-3, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("proof", "dtype"),
    [pytest.param(proof, torch.bfloat16, id=name) for name, proof in ALIGNERS.items()]
    + [
        pytest.param(proof, torch.float16, id=f"{name}, float16")
        for name, proof in ALIGNERS.items()
        if proof.thorough
    ],
)
def test_autocast_changes_nothing(device, proof, dtype):
    cube, reference = (image.to(device) for image in real())
    aligner = proof.make().to(device)
    expected = aligner(cube, reference)
    with torch.autocast(device.type, dtype=dtype):
        found = aligner(cube, reference)
        # in a network: what comes before is in half precision, and is worth no more
        half = aligner.estimate(cube.to(dtype), reference.to(dtype))
    assert found.aligned.dtype == torch.float32
    assert_same(found.estimate, expected.estimate.map(lambda field: field.cpu()))
    assert half.warp.dtype == torch.float32
    coarse = {torch.float16: 0.02, torch.bfloat16: 0.2}[dtype]
    both = half.valid & expected.estimate.valid
    moved = half.warp[both] - expected.estimate.warp[both]
    assert both.any()
    assert moved.abs().max() < coarse


@pytest.mark.parametrize("name", COMPILED)
def test_layouts_and_inference_mode_in_training(device, name):
    make, takes = MODULES[name]
    module = make().to(device)
    cube, reference = (image.to(device) for image in real())
    given = (cube,) if takes == "series" else (cube, reference.expand_as(cube))
    expected = module(*given)
    strided = [image.repeat_interleave(2, -1)[..., ::2] for image in given]
    last = [image.contiguous(memory_format=torch.channels_last) for image in given]
    for other in (strided, last):
        torch.testing.assert_close(module(*other), expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(module(*given), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(module(*given), expected, atol=1e-3, rtol=1e-3)


@each_aligner
def test_captured_in_a_cuda_graph(cuda, proof):
    cube, reference = (image.to(cuda) for image in real())
    aligner = proof.make().to(cuda)
    buffer, against = torch.rand_like(cube), reference.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            aligner(buffer, against)
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        found = aligner(buffer, against)
    # other data, of another kind, through what was captured
    for data in (cube, torch.full_like(cube, float("nan")), cube.flip(0)):
        buffer.copy_(data)
        graph.replay()
        expected = aligner(data, reference)
        assert_same(
            found.estimate.map(lambda field: field.clone()),
            expected.estimate.map(lambda field: field.cpu()),
        )
        torch.testing.assert_close(found.aligned, expected.aligned, atol=1e-4, rtol=0, equal_nan=True)


@contextlib.contextmanager
def nothing_waits():
    """What makes the host wait for the GPU raises, a copy from memory that is not pinned among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_aligner
def test_the_host_waits_for_nothing(cuda, proof):
    cube, reference = (image.to(cuda) for image in real())
    mask = torch.rand(4, *SIZE, device=cuda) > 0.02
    init = torch.eye(2, 3, device=cuda).expand(4, 2, 3)
    aligner = proof.make().to(cuda)
    aligner(cube, reference)  # libraries wait when they start
    with nothing_waits():
        found = aligner(cube, reference, mask, mask[0], init=init)
        aligner(cube, reference)
    assert found.estimate.valid.any()
    with pytest.raises(RuntimeError, match="synchronizing"), nothing_waits():
        found.estimate.status.cpu()  # it has teeth


@each_module
def test_the_host_waits_for_nothing_in_training(cuda, name):
    make, takes = MODULES[name]
    module = make().to(cuda)
    cube, reference = (image.to(cuda) for image in real())
    given = (cube,) if takes in ("series", "frames") else (cube, reference.expand_as(cube))
    module(*given)
    with nothing_waits():
        found = module(*given)
    tensors = torch.utils._pytree.tree_leaves(found)
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert all(tensor.isfinite().all() for tensor in tensors)


@each_aligner
def test_graphed_by_torch(cuda, proof):
    # the README's way to one launch a call
    cube, reference = (image.to(cuda) for image in real())
    aligner = proof.make().to(cuda)
    expected = [aligner(part, reference) for part in (cube, cube.flip(0))]
    aligner.requires_grad_(False)  # or its backward pass is captured too
    gc.collect()  # a graph of another test that is freed during the capture would end it
    graphed = torch.cuda.make_graphed_callables(aligner, (cube, reference))
    for part, (aligned, estimate) in zip((cube, cube.flip(0)), expected, strict=True):
        found = graphed(part, reference)
        assert isinstance(found, ta.Alignment)
        assert_same(*(one.map(lambda field: field.cpu()) for one in (found.estimate, estimate)))
        torch.testing.assert_close(found.aligned, aligned, atol=1e-4, rtol=0)


@each_aligner
def test_precision_of_matrix_products_changes_nothing(cuda, proof):
    cube, reference = (image.to(cuda) for image in real())
    aligner = proof.make().to(cuda)
    expected = aligner.estimate(cube, reference)
    torch.set_float32_matmul_precision("medium")  # TF32: a thousandth of every factor is lost
    try:
        found = aligner.estimate(cube, reference)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(*(one.map(lambda field: field.cpu()) for one in (found, expected)))


@pytest.mark.parametrize("name", ["default", "ECC", "ECC affine", "ECC homography", "Cascade"])
def test_gradients_on_a_device(cuda, name):
    cube, reference = real()
    slopes = []
    for place in (torch.device("cpu"), cuda):
        leaves = [image.to(place, copy=True).requires_grad_() for image in (cube, reference)]
        found = ALIGNERS[name].make().to(place)(*leaves)
        loss = found.estimate.warp[..., :2, 2].sum() + found.aligned.square().mean()
        slopes.append([slope.cpu() for slope in torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*reversed(slopes), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["default", "ECC", "ECC affine", "LGM", "Cascade"])
def test_frames_of_a_device_do_not_know_of_each_other(cuda, name):
    cube, reference = (image.to(cuda) for image in real(12))
    aligner = ALIGNERS[name].make().to(cuda)
    together = aligner.estimate(cube, reference)
    apart = [aligner.estimate(part, reference) for part in cube.split(5)]
    for found, expected in zip(combine(torch.cat, apart)[:-1], together[:-1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reference", ["median", "clearest", "iterative"])
def test_align_on_a_device(device, reference):
    values = real(6)[0].numpy()
    values[1, :, :9] = np.nan
    cube = xr.DataArray(values, dims=("time", "band", "y", "x"))
    mask = xr.ones_like(cube[:, 0], dtype=bool)
    mask[2, 40:] = False
    options = {"mask": mask, "batch_size": 4, "progress": False}
    found, report = ta.align(cube, reference, "auto", device=device, **options)
    expected, known = ta.align(cube, reference, "auto", device="cpu", **options)
    np.testing.assert_allclose(report.warp, known.warp, atol=1e-3)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert (report.status == 0).all()


def test_check_on_a_device(device):
    cube, reference = (image.to(device) for image in real())
    check = ta.AlignmentCheck()
    found = check(cube, reference.expand_as(cube))
    assert {kept.device.type for kept in check.residuals} == {device.type}
    expected = ta.AlignmentCheck()(cube.cpu(), reference.cpu().expand_as(cube.cpu()))
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=0)
    assert check.summary().measured == 4


# -------------------------------------------------------------------------------------------- deterministic torch


class Operators(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.called.add(str(operator).removeprefix("aten."))
        return operator(*args, **(kwargs or {}))


# what torch.use_deterministic_algorithms refuses on CUDA, of all that a forward pass could use (its docstring)
REFUSED = {
    "median.dim",
    "nanmedian.dim",
    "kthvalue.default",
    "put_.default",
    "histc.default",
    "bincount.default",
}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["default", "ECC", "ECC homography", "Cascade", "LGM"])
def test_deterministic_algorithms(deterministic, device, name):
    cube, reference = (image.to(device) for image in real())
    mask = torch.rand(4, *SIZE, device=device) > 0.02
    aligner = ALIGNERS[name].make().to(device)
    with Operators() as operators:
        aligned, estimate = aligner(cube, reference, mask)
        again = aligner(cube, reference, mask)
    assert len(operators.called) > 20
    assert not operators.called & REFUSED
    assert torch.equal(estimate.warp, again.estimate.warp)
    torch.use_deterministic_algorithms(False)
    with Operators() as operators:
        expected = aligner(cube, reference, mask)
    assert operators.called & REFUSED  # the teeth: the quick way is such a one
    rounding = 0.0 if device.type == "cpu" else 1e-5  # a GPU's quick ways add up in any order
    torch.testing.assert_close(estimate.warp, expected.estimate.warp, atol=rounding, rtol=0)
    torch.testing.assert_close(aligned, expected.aligned)


def test_deterministic_algorithms_in_training(deterministic):
    cube, reference = real()
    cube[1, 0, :20] = torch.nan
    check = ta.AlignmentCheck()
    with Operators() as operators:
        median = ta.AlignToFirst(onto="median")(cube)
        check(cube, reference.expand_as(cube))
        ta.AlignmentLoss("zncc")(cube[2:], reference.expand_as(cube[2:]))
        summary = check.summary()
    assert not operators.called & REFUSED
    assert summary.measured + summary.unmatched == 4
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(median, ta.AlignToFirst(onto="median")(cube), equal_nan=True)


# ------------------------------------------------------------------------------------------ export, compile, vmap


@pytest.fixture
def quiet():
    """torch's own machinery warns of its own deprecations while tracing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_export_with_any_number_of_frames(quiet):
    # (other options of PCC: within the layer that is exported below; the defaults: with masks of any size)
    cube, reference = real(6)
    mask = torch.rand(6, *SIZE) > 0.02
    aligner = ta.PCC(robust=False).eval()
    frames = torch.export.Dim("frames", min=2, max=4096)
    # traced with as many frames as there are bands, which must not be taken for the same number
    shapes = ({0: frames}, None, {0: frames})
    module = torch.export.export(aligner, (cube[:4], reference, mask[:4]), dynamic_shapes=shapes).module()
    for count in (2, 4, 6):
        aligned, estimate = module(cube[:count], reference, mask[:count])
        expected = aligner(cube[:count], reference, mask[:count])
        assert_same(estimate, expected.estimate, 2e-3)
        torch.testing.assert_close(aligned, expected.aligned, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {
            "max_frequency": 0.5,
            "weighting": "phase",
            "contrast": "none",
            "taper": 0.0,
            "upsample_factor": 20,
            "channel": Channel(),
            "crop_center": (49, 64),
            "max_translation": 20.0,
            "robust": False,
        },
        pytest.param(
            {
                "channel": "gradients",
                "interpolation": "bicubic",
                "padding_mode": "reflection",
                "fill_value": -1.0,
                "weighting": "sqrt",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain, module", "gradients"],
)
def test_compile_is_one_graph(quiet, options):
    # tracing takes its time: every option once, in few combinations
    cube, reference = real()
    aligner = ta.PCC(**options)
    compiled = torch.compile(aligner, fullgraph=True, backend="eager")
    found, expected = compiled(cube, reference), aligner(cube, reference)
    assert_same(found.estimate, expected.estimate)
    torch.testing.assert_close(found.aligned, expected.aligned, atol=5e-3, rtol=0)


FEW = {"max_iterations": 2, "tolerance": 0.1}


def local():
    """Local on a start that is quickly traced: PCC with all of its passes is traced above."""
    aligner = ta.Local(spacing=32)
    aligner.start = ta.PCC(robust=False, contrast="none", max_translation=aligner.max_translation)
    return aligner


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        # frames that are shifted, and frames that are warped
        # two steps are as many as there are kinds: a first and a next one
        lambda: ta.Cascade(ta.PCC(robust=False, contrast="none"), ta.ECC(levels=1, **FEW)),
        partial(ta.ECC, motion="homography", robust="residual", levels=1, **FEW),
        local,
    ],
    ids=["cascade", "homography", "local"],
)
def test_compile_of_other_methods_is_one_graph(quiet, make, monkeypatch):
    monkeypatch.setattr("torchalign.functional.local._ROUNDS", (1, 3))  # of a kind, all but the last
    cube, reference = real()
    aligner = make()
    found = torch.compile(aligner, fullgraph=True, backend="eager")(cube, reference)
    expected = aligner(cube, reference)
    assert expected.estimate.valid.any()
    assert_same(found.estimate, expected.estimate)
    torch.testing.assert_close(found.aligned, expected.aligned, atol=5e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"robust": False, "contrast": "none"}, {}], ids=["one pass", "default"])
def test_compile_with_masks_and_gradients(quiet, options):
    cube, reference = real()
    mask = torch.rand(4, *SIZE) > 0.02
    aligner = ta.PCC(**options)
    compiled = torch.compile(aligner, fullgraph=True, backend="aot_eager")
    slopes, results = [], []
    for run in (compiled, aligner):
        leaf = cube.clone().requires_grad_()
        results.append(run(leaf, reference, mask, mask[0]).estimate)
        results[-1].warp[..., 2].sum().backward()
        slopes.append(leaf.grad)
    assert_same(*(result.map(lambda field: field.detach()) for result in results))
    torch.testing.assert_close(*slopes, atol=1e-3 * float(slopes[1].abs().max()), rtol=1e-2)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "name", [pytest.param("AlignToFirst, median", marks=pytest.mark.slow), "AlignmentLoss zncc"]
)
def test_compile_is_one_graph_in_training(quiet, name):
    make, takes = MODULES[name]
    module = make()
    cube, reference = real()
    given = (cube,) if takes == "series" else (cube, reference.expand_as(cube))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), module(*given), atol=2e-3, rtol=1e-3)


def test_vmap_in_training(quiet):
    cube, reference = real(4)
    pairs = cube, reference.expand_as(cube)
    for name in COMPILED:
        make, takes = MODULES[name]
        if takes == "series":
            series = torch.stack((cube, cube.flip(0)))
            found, expected = torch.vmap(make())(series), make()(series)
            torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
        else:
            module = make()
            module.reduction = "none"
            torch.testing.assert_close(torch.vmap(module)(*pairs), module(*pairs), atol=2e-3, rtol=1e-3)


SIZES = (("T", 2), ("H", 32), ("W", 32))  # the least of each


def exported(module, given, shapes):
    """The program of a module, saved and reloaded."""
    # what sizes must fulfil, torch checks when the program runs: that a working grid is coarser, and the like
    program = torch.export.export(
        module.eval(), given, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    return torch.export.load(saved).module()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: ta.Cascade(ta.PCC(robust=False), ta.ECC(motion="affine", levels=1, channel=0)), (48, 56)),
        (lambda: ta.LGM(max_num_keypoints=64), (64, 72)),
        (lambda: ta.ECC(levels=1), (48, 56)),
        (lambda: ta.Local(spacing=16), (64, 72)),
    ],
    ids=["cascade of general warps", "local features", "enhanced correlation", "local shifts"],
)
def test_export_of_other_methods_with_any_number_of_frames(quiet, make, size, monkeypatch):
    # of local shifts one round of each kind
    monkeypatch.setattr("torchalign.functional.local._ROUNDS", (1, 1))
    monkeypatch.setattr("torchalign.functional.local._WITH_GRADIENT", 1)
    module = make()

    def series(frames):
        data = fractal_stack(frames, size=size, bands=2, noise=0.003)
        return data.cube, data.reference

    frames = torch.export.Dim("frames", min=2, max=4096)
    loaded = exported(module, series(3), ({0: frames}, None))
    cube, reference = series(6)
    aligned, estimate = loaded(cube, reference)
    expected = module(cube, reference)
    assert expected.estimate.valid.all()
    assert_same(ta.Estimate(*estimate), expected.estimate)
    torch.testing.assert_close(aligned, expected.aligned, atol=5e-3, rtol=0)


@pytest.mark.slow
def test_export_of_the_layer_with_any_size(quiet):
    def series(frames, height, width):
        return fractal_stack(frames, size=(height, width), bands=4, noise=0.003).cube

    module = torch.nn.Sequential(layer(), torch.nn.Conv2d(4, 2, 1))
    frames, height, width = (torch.export.Dim(name, min=low, max=4096) for name, low in SIZES)
    loaded = exported(module, (series(4, 64, 72),), (({0: frames, 2: height, 3: width},)))
    for size in ((2, 64, 72), (5, 77, 99), (3, 120, 50)):
        cube = series(*size)
        torch.testing.assert_close(loaded(cube), module(cube), atol=5e-3, rtol=0)
        assert (module[0](cube) - cube).abs().max() > 0.05  # it does something
    with pytest.raises(Exception, match="32"):
        loaded(series(2, 12, 72))


@pytest.mark.slow
def test_export_with_masks_of_any_size(quiet):
    def given(*size):
        data = fractal_stack(size[0], size=size[1:], bands=4, noise=0.003)
        return data.cube, data.reference, torch.rand(*size) > 0.02

    frames, height, width = (torch.export.Dim(name, min=low, max=4096) for name, low in SIZES)
    shapes = {0: frames, 2: height, 3: width}, {1: height, 2: width}, {0: frames, 1: height, 2: width}
    module = ta.PCC()
    loaded = exported(module, given(4, 64, 72), shapes)
    for size in ((4, 64, 72), (3, 75, 97), (2, 130, 61)):
        arguments = given(*size)
        found, expected = loaded(*arguments)[1], module(*arguments).estimate
        assert_same(found, expected)
        assert expected.valid.all()


def test_per_sample_gradients(quiet):
    cube, reference = real(2)

    def loss(frame):
        return ta.PCC().estimate(frame[None], reference).warp[0, :, 2].sum()

    each = torch.vmap(torch.func.grad(loss))(cube)
    for t in range(2):
        torch.testing.assert_close(each[t], torch.func.grad(loss)(cube[t]), atol=1e-4, rtol=1e-2)
