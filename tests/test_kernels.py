"""The Triton kernels on a machine without a GPU: each is compiled, each is what the functions of torch are."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels; this torch has none")

HERE = Path(__file__).resolve().parent
# kernels: the module, the pointers that are no float32, and the constants but for the number of places at a time
KERNELS = {
    "resample_frames": (
        "resample",
        {"mask": "*u8", "validity": "*u8"},
        {
            "ENTRIES": 6,
            "INTERPOLATION": 1,
            "PADDING": 0,
            "FLOATING": True,
            "HAS_MASK": True,
            "FILLED": True,
            "HAS_LOCAL": True,
            "LOWEST": 0,
            "HIGHEST": 0,
            "COMPUTE": "float32",
            "POSITION": "float32",
            "INDEX": "int32",
        },
    ),
    "score_frames": (
        "score",
        {"moving_usable": "*u8", "reference_usable": "*u8"},
        {
            "STAGES": 1,
            "ENTRIES": 2,
            "HAS_MOVING_USABLE": True,
            "HAS_REFERENCE_USABLE": True,
            "HAS_WEIGHT": True,
            "HAS_LOCAL": True,
            "COMPUTE": "float32",
        },
    ),
    "read_frames": ("local", {}, {"HAS_WEIGHTS": True, "COMPUTE": "float32"}),
    "weigh_frames": ("local", {}, {"HAS_USABLE": True, "TINY": 1e-14, "COMPUTE": "float32"}),
    "differentiate_frames": ("local", {}, {"COMPUTE": "float32"}),
    "channel_frames": (
        "channel",
        {"frames": "*fp16", "mask": "*u8", "usable": "*u8"},
        {"MODE": 1, "HAS_MASK": True, "COMPUTE": "float32"},
    ),
    "climb_frames": (
        "climb",
        {"peaks": "*u8"},
        {"DIVIDED": True, "COMPUTE": "float32", "EPSILON": 1e-07},
    ),
    "peak_frames": ("peak", {"outsides": "*u8"}, {"TINY": 1e-38, "COMPUTE": "float32"}),
    "turn_frames": ("turn", {}, {}),
    "cross_frames": ("turn", {}, {}),
    "alike_frames": ("alike", {}, {"STEP": 4, "REACH": 1, "TINY": 1e-14, "COMPUTE": "float32"}),
    "pull_frames": ("turn", {}, {"COMPUTE": "float32"}),
    "window_frames": ("turn", {}, {"COMPUTE": "float32"}),
    "mean_frames": ("texture", {"usable": "*u8"}, {"COMPUTE": "float32"}),
    "fill_frames": ("texture", {"usable": "*u8"}, {"COMPUTE": "float32"}),
    "cover_frames": ("texture", {"usable": "*u8"}, {"COMPUTE": "float32"}),
    "assess_frames": ("assess", {}, {"COMPUTE": "float32", "TINY": 1e-38, "EPSILON": 1e-07}),
    "overlap_frames": ("climb", {}, {"HAS_COVER": True, "HAS_OTHER_COVER": True}),
    "profile_frames": ("defects", {"usable": "*u8"}, {"HAS_USABLE": True, "COMPUTE": "float32"}),
    "repeat_frames": ("defects", {"factor": "*i64"}, {"COMPUTE": "float32", "TINY": 1e-38, "FACTORS": 8}),
    "unit_frames": ("texture", {"empty": "*u8", "flat": "*u8"}, {"COMPUTE": "float32"}),
    "smooth_frames": ("texture", {}, {"SQUARED": False, "COMPUTE": "float32"}),
    "contrast_frames": ("texture", {}, {"HAS_WEIGHTS": True, "LEAST": 1e-19}),
    "share_frames": ("texture", {}, {"COMPUTE": "float32"}),
    "blur_frames": ("blur", {}, {"DOWN": True, "MIRRORED": True, "COMPUTE": "float32"}),
    "look_frames": (
        "ascend",
        {},
        {"HAS_USABLE": True, "TAPERED": True, "PROJECTIVE": True, "SPLINE": False, "COMPUTE": "float32"},
    ),
    "step_warped": (
        "ascend",
        {"moves": "*u8"},
        {
            "PARAMETERS": 6,
            "PADDED": 8,
            "MOTION": 3,
            "PROJECTIVE": False,
            "SPLINE": False,
            "COMPUTE": "float32",
        },
    ),
    "step_shifted": ("ascend", {"moves": "*u8"}, {"COMPUTE": "float32"}),
}
POINTERS = (  # noqa: SIM905
    "frames motion mask values validity moving reference motions moving_usable reference_usable weight scores seen "
    "usable power fy fx start found last derivatives surface spectrum shift turned window image mean means filled share "
    "spline warp level_x level_y level_weights common moves weights regressors inverses solutions rests corners "
    "warps reaches weighted shifts blurred together fields spectra own other moved cover other_cover profile factor "
    "field noise empty unit flat result detail variance typical contrast coverage root local coefficients at inside "
    "similarity around whole products pull significances outsides heights spreads settled_shift covariance curvatures "
    "fixed inverse"
).split()
# of cubes and of masks
STRIDES = {"strides": ("i64",) * 4, "mask_strides": ("i64",) * 3}


def compiled(name: str, capability: int, **constants: object):
    """The kernel for a GPU of that capability, as it is launched."""
    from triton import language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchalign.kernels import launching

    module, pointers, fixed = KERNELS[name]
    kernel = getattr(importlib.import_module(f"torchalign.kernels.{module}"), name)
    fixed = fixed | constants
    signature = {}
    for parameter in kernel.params:
        own = parameter.name
        if own in fixed or own == "BLOCK":
            signature[own] = "constexpr"
        elif own in STRIDES:
            signature[own] = STRIDES[own]
        elif "float" in parameter.annotation or parameter.annotation == "fp64":
            signature[own] = "fp64"
        else:
            signature[own] = pointers.get(own, "*fp32" if own in POINTERS else "i32")
    kinds = {
        key: getattr(language, value) if isinstance(value, str) else value for key, value in fixed.items()
    }
    kinds["BLOCK"] = launching.block_length(kernel)
    source = ASTSource(fn=kernel, signature=signature, constexprs=kinds)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}
    )


def functions_of_triton():
    for path in (HERE.parent / "torchalign" / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and {"kernel", "triton.jit"} & {
                *map(ast.unparse, node.decorator_list)
            }:
                yield node


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "capability",
    [80, *(pytest.param(other, marks=pytest.mark.slow) for other in (75, 90, 100))],
)
def test_every_kernel_compiles(name, capability):
    found = compiled(name, capability)
    assert len(found.asm["cubin"]) > 1000
    # sine and cosine in full precision, division as torch rounds it
    assert "cos.approx" not in found.asm["ptx"]
    assert "sin.approx" not in found.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("resample_frames", {"ENTRIES": 9, "INTERPOLATION": 2, "PADDING": 2}),
        ("resample_frames", {"INTERPOLATION": 0, "PADDING": 1, "FILLED": False, "HAS_MASK": False}),
        ("resample_frames", {"COMPUTE": "float64", "POSITION": "float64", "INDEX": "int64"}),
        ("resample_frames", {"FLOATING": False, "LOWEST": 0, "HIGHEST": 255}),
        ("climb_frames", {"DIVIDED": False}),
    ],
)
def test_kernels_compile_in_other_kinds(name, constants):
    assert len(compiled(name, 90, **constants).asm["cubin"]) > 1000


def test_every_kernel_is_named_here():
    """A function of Triton that no other one calls is launched."""
    written, called = set(), set()
    for node in functions_of_triton():
        written.add(node.name)
        called |= {ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
    assert len(written & called) > 20
    assert written - called == set(KERNELS)


def test_no_loop_assigns_what_it_counts_by():
    """Triton up to 3.5 takes it for a variable that goes from turn to turn, and changes its kind: no kernel then."""
    loops = 0
    for node in functions_of_triton():
        for loop in ast.walk(node):
            if isinstance(loop, ast.For):
                names = [
                    inner for part in loop.body for inner in ast.walk(part) if isinstance(inner, ast.Name)
                ]
                assert ast.unparse(loop.target) not in {
                    name.id for name in names if isinstance(name.ctx, ast.Store)
                }, node.name
                loops += 1
    assert loops > 20


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--slow", "-m", "slow"], marks=pytest.mark.slow)],
    ids=["each", "together"],
)
def test_kernels_equal_the_functions_of_torch(options):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            *options,
            str(HERE / "interpreted.py"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels_run_where_their_tensors_lie(monkeypatch):
    # of two GPUs the current one may be the other
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torchalign.kernels import launching

    runs = []

    class Kernel:
        arg_names = ("values", "columns", "WIDE", "COMPUTE", "BLOCK")

        @staticmethod
        def fn(values, columns, WIDE, COMPUTE, BLOCK=64):
            raise AssertionError("it is not called")

        def __getitem__(self, grid):
            return lambda *arguments, **constants: runs.append((grid, arguments, constants))

    places = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: places.append(index) or contextlib.nullcontext())
    with FakeTensorMode():
        flags, values = (
            torch.empty(4, 5, dtype=torch.bool, device="cuda:1"),
            torch.empty(4, 5, device="cuda:1").mT,
        )
        launching.launch(Kernel(), (3,), (4, 25), (flags, None, values), (7,), WIDE=True)
        launching.launch(Kernel(), (0,), (), (flags, values))
    assert places == [1]
    ((grid, given, constants),) = runs
    assert grid == (6,)  # two blocks of 64 for each of three frames
    assert [tensor.dtype for tensor in given[:3]] == [torch.uint8, torch.uint8, torch.float32]
    assert given[2].is_contiguous()
    assert given[3:] == (7,)
    computes = launching.tl.float32
    assert constants == {"WIDE": True, "COMPUTE": computes, "BLOCK": 64, "enable_fp_fusion": False}


@pytest.fixture
def trials(monkeypatch):
    """What becomes of each try to launch a kernel on a GPU: an error, or nothing."""
    import torch

    from torchalign import kernels

    outcomes, clock = [], [100.0]

    def blur(*arguments):
        error = outcomes.pop(0)
        if error is not None:
            raise error

    monkeypatch.setattr(kernels, "blur", blur)
    monkeypatch.setattr(kernels, "_known", {})
    monkeypatch.setattr(kernels.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.empty(shape))
    known = {"is_available": True, "is_current_stream_capturing": False, "get_device_capability": (9, 0)}
    for name, answer in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda *index, answer=answer: answer)
    return outcomes, clock


@pytest.mark.parametrize(
    ("version", "error", "reason"),
    [
        ("3.2.1", None, "ImportError: Triton 3.2.1, which is too old"),
        (
            None,
            RuntimeError("Failed to find C compiler.\nand more"),
            "RuntimeError: Failed to find C compiler.",
        ),
    ],
)
def test_where_triton_does_not_work_it_is_said_once(monkeypatch, trials, version, error, reason):
    from torchalign import _host, kernels

    outcomes, clock = trials
    outcomes += [None] if error is None else [error, None]
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", version or triton.__version__)
        with pytest.warns(RuntimeWarning) as told:
            assert not _host._runs_triton(0)
    text = f"kernels: expected a Triton of 3.3 or later that compiles for this GPU, got {reason}; all runs without"
    assert [str(warning.message).startswith(text) for warning in told] == [True]
    assert told[0].filename == __file__  # which is the user's, and neither ours nor torch's
    clock[0] += 1e9
    assert not _host._runs_triton(0)
    assert kernels.work_on(0, tries=False) == (False, "")
    assert outcomes == [None]  # it was not tried again


def test_what_may_pass_is_tried_again(trials):
    import torch

    from torchalign import _host, kernels

    outcomes, clock = trials
    works, fails = (True, ""), (False, "")
    assert kernels.work_on(0, tries=False) == works  # nothing is known against it
    outcomes += [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left on device"), None]
    with pytest.warns(RuntimeWarning, match="got OutOfMemoryError: CUDA out of memory; all runs without it"):
        assert not _host._runs_triton(0)
    assert kernels.work_on(0) == fails  # not dozens of times in one call of an aligner
    assert kernels.work_on(0, tries=False) == fails
    assert len(outcomes) == 2
    clock[0] += 60
    assert kernels.work_on(0) == fails  # and it is said once
    clock[0] += 60
    assert kernels.work_on(0) == works
    assert outcomes == []
    assert kernels.work_on(0) == works
    assert kernels.work_on(0, tries=False) == works
    outcomes.append(None)
    assert kernels.work_on(1) == works  # each GPU on its own


def test_a_recording_tries_nothing_and_goes_by_what_is_known(monkeypatch, trials):
    import torch

    from torchalign import _host, kernels

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _host._runs_triton(0)
    kernels._known[0] = False, 0.0
    assert not _host._runs_triton(0)
    kernels._known[0] = True, float("inf")
    assert _host._runs_triton(0)


def test_threads_try_a_gpu_once(trials, monkeypatch):
    import threading
    import time

    from torchalign import kernels

    tried, found = [], []
    monkeypatch.setattr(kernels, "blur", lambda *arguments: tried.append(time.sleep(0.05)))
    threads = [threading.Thread(target=lambda: found.append(kernels.work_on(0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(True, "")] * 4
    assert len(tried) == 1


class Driver:
    """Of a GPU that is not there: kernels are compiled for it."""

    @staticmethod
    def get_current_target():
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device):
        return 0


@pytest.mark.slow
def test_calls_compile_what_they_launch_once_for_a_size(monkeypatch):
    """What is given to kernels is what they take; and a stack of any length, of any size, is not compiled anew."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    import torchalign as ta
    from torchalign import _host

    made = set()

    def compiles(kernel, grid):
        def launch(*arguments, **options):
            found = kernel.warmup(*arguments, grid=grid, **options)
            made.add((kernel.fn.__name__, found.hash))

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", compiles)
    monkeypatch.setattr(_host, "_KERNELS_ON", "cpu")
    # (nothing is computed: all is 1)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda own, *shape, **kind: own.new_ones(*shape, **kind))
    driver.set_active(Driver())

    def new(aligner, *shape):
        before = len(made)
        cube = torch.rand(shape)
        with torch.no_grad():
            aligner(cube, cube[0])
        return len(made) - before

    try:
        assert 20 < new(ta.PCC(), 3, 4, 96, 80) < 30
        assert new(ta.PCC(), 7, 4, 96, 80) == 0
        assert new(ta.PCC(), 7, 2, 96, 80) == 0
        assert new(ta.PCC(), 2, 4, 101, 97) < 20  # sizes that 16 does not divide
        assert new(ta.PCC(), 5, 4, 67, 105) == 0
        assert new(ta.ECC(motion="affine"), 3, 4, 96, 80) > 1
        assert new(ta.Local(), 3, 4, 96, 80) > 2
    finally:
        driver.set_active(None)  # the next one who asks looks for a real one
