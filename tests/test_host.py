"""The eager CPU's blocks and threads leave no trace: neither in the result nor in the process."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import torchalign as ta
from torchalign import _host, aligner


@pytest.fixture
def stack() -> tuple[torch.Tensor, torch.Tensor]:
    """24 frames of 64 × 72, whole-pixel shifts of one scene, and its reference."""
    generator = torch.Generator().manual_seed(3)
    scene = F.avg_pool2d(torch.rand(1, 1, 90, 98, generator=generator), 5, 1, 2)[0, 0]
    frames = [scene[10 + t % 5 : 74 + t % 5, 8 + t % 3 : 80 + t % 3] for t in range(24)]
    return torch.stack(frames)[:, None], scene[None, 12:76, 9:81]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(aligner, "_BLOCK_PIXELS", 3 * 64 * 72)


def run_in_a_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_map_keeps_order_modes_and_errors(two_threads):
    with torch.inference_mode():
        modes = _host.map_on_host(lambda item: (item, torch.is_inference_mode_enabled()), range(5))
    assert modes == [(item, True) for item in range(5)]
    with torch.no_grad():
        assert _host.map_on_host(lambda _: torch.is_grad_enabled(), range(3)) == [False] * 3
    assert _host.map_on_host(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
    with pytest.raises(ZeroDivisionError):
        _host.map_on_host(lambda item: 1 / item, [1, 0])


def test_only_numbers_that_may_be_read_are_read():
    number, flags = torch.tensor(2.5), torch.tensor([True, True])
    assert _host.all_finite(torch.ones(3))
    assert not _host.all_finite(torch.tensor([1.0, torch.nan]))
    assert _host.all_true(flags)
    assert not _host.all_true(torch.tensor([True, False]))
    assert _host.may_read(number, None, flags)
    # with a gradient, mapped, or elsewhere they are not asked
    assert not _host.may_read(number.clone().requires_grad_())
    assert not _host.all_finite(torch.ones(3, requires_grad=True))
    assert not _host.may_read(number, flags.to("meta"))
    seen = []
    torch.func.vmap(lambda flag: flag & (seen.append(_host.all_true(flag)) is None))(flags)
    assert seen == [False]
    assert _host.launches_kernels(flags.to("meta"))
    assert not _host.launches_kernels(flags)


def test_pieces_are_what_the_whole_is(monkeypatch):
    one, other = torch.rand(7, 3, 10), torch.rand(7, 10)
    sizes = []

    def function(field, weight):
        sizes.append(len(weight))
        return field.sum(1) * weight

    whole = _host.in_pieces(function, one, other)
    monkeypatch.setattr(_host, "_PIECE", 30)
    assert torch.equal(_host.in_pieces(function, one, other), whole)
    assert sizes == [7, 3, 3, 1]
    # what differs in length, or is traced, is not cut
    assert torch.equal(_host.in_pieces(function, one[:1], other), one[:1].sum(1) * other)
    assert sizes[4:] == [7]


def test_threads_are_put_back(stack, small_blocks, two_threads):
    ta.PCC()(*stack)
    assert torch.get_num_threads() == 2
    assert run_in_a_thread(torch.get_num_threads) == 2


def test_blocks_give_what_the_whole_gives(stack, small_blocks, two_threads, monkeypatch):
    blocks = ta.PCC()(*stack)
    monkeypatch.setattr(aligner, "_BLOCK_PIXELS", 2**30)
    whole = ta.PCC()(*stack)
    torch.testing.assert_close(blocks.estimate.warp, whole.estimate.warp, atol=1e-5, rtol=0)
    torch.testing.assert_close(blocks.aligned, whole.aligned, atol=1e-5, rtol=0)
    assert torch.equal(blocks.estimate.status, whole.estimate.status)
    assert (blocks.estimate.status == 0).all()


def test_small_frames_are_estimated_twice_as_many_at_a_time(monkeypatch):
    aligner_of_shifts, cube = ta.PCC(), torch.rand(70, 1, 32, 32)
    for frames, sizes in ((20, [40, 30]), (15, [15, 15, 15, 15, 10])):
        monkeypatch.setattr(aligner, "_BLOCK_PIXELS", frames * 32 * 32)
        job = aligner_of_shifts._check(cube, cube[0], None, None, None)
        blocks = aligner_of_shifts._blocks(job)
        assert [part.stop - part.start for part in blocks] == sizes
        assert [part.start for part in blocks[1:]] == [part.stop for part in blocks[:-1]]


@pytest.mark.parametrize("batch", [(24, 1), (6, 4), (2, 12), (2, 3, 4)])
def test_series_in_a_batch_are_cut_into_blocks_too(stack, small_blocks, batch):
    cube, reference = stack
    single = ta.PCC()(cube, reference)
    series = cube.reshape(*batch, *cube.shape[1:])
    shared = ta.PCC()(series, reference)
    own = ta.PCC()(series, reference.expand(*batch[:-1], *reference.shape))
    for result in (shared, own):
        torch.testing.assert_close(result.aligned.reshape(cube.shape), single.aligned, atol=1e-5, rtol=0)
        warp = result.estimate.warp.reshape(-1, 2, 3)
        torch.testing.assert_close(warp, single.estimate.warp, atol=1e-5, rtol=0)


def test_a_users_channel_is_called_from_one_thread(stack, small_blocks, two_threads):
    callers = set()

    def channel(cube):
        callers.add(threading.get_ident())
        return cube.mean(-3)

    ta.PCC(channel=channel)(*stack)
    assert callers == {threading.get_ident()}


@pytest.mark.parametrize(
    "aligner",
    [
        ta.PCC(),
        ta.PCC(upsample_factor=10),
        ta.ECC(),
        ta.ECC(motion="affine"),
        ta.LGM(max_num_keypoints=48),
    ],
)
def test_default_dtype_and_device_do_not_matter(stack, aligner):
    cube, reference = stack
    expected = aligner(cube[:3], reference)
    try:
        torch.set_default_dtype(torch.float64)
        wide = aligner(cube[:3], reference)
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        torch.set_default_device("meta")
        elsewhere = aligner(cube[:3], reference)
    finally:
        torch.set_default_device(None)
    for result in (wide, elsewhere):
        assert result.estimate.warp.dtype == torch.float32
        assert torch.equal(result.estimate.warp, expected.estimate.warp)
        assert torch.equal(result.aligned, expected.aligned)


@pytest.mark.parametrize(("scale", "offset"), [(0.1, 290.0), (1e-9, 0.0), (1e4, 0.0)])
@pytest.mark.parametrize("which", ["frames", "reference"])
def test_units_do_not_matter_under_a_mask(stack, scale, offset, which):
    cube, reference = stack
    half = torch.ones(64, 72, dtype=torch.bool)
    half[:, :30] = False
    masks = (half, None) if which == "frames" else (None, half)
    plain = ta.PCC().estimate(cube, reference, *masks)
    scaled = ta.PCC().estimate(cube * scale + offset, reference * scale + offset, *masks)
    assert (plain.status == 0).all()
    assert torch.equal(scaled.status, plain.status)
    torch.testing.assert_close(scaled.warp, plain.warp, atol=5e-3, rtol=0)
    torch.testing.assert_close(scaled.score, plain.score, atol=5e-3, rtol=0)


def test_gradients_channel_has_gradients_beside_nan(stack):
    cube, reference = stack[0][:2].clone(), stack[1]
    cube[0, 0, 30, 30] = torch.nan
    cube.requires_grad_()
    estimate = ta.PCC(channel="gradients").estimate(cube, reference)
    (gradient,) = torch.autograd.grad(estimate.warp.sum() + estimate.score.sum(), cube)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_freed_memory_goes_back_to_the_system(monkeypatch):
    """Small blocks below one that stays, which glibc would keep; where there is no glibc, nothing."""
    if _host._find_in_libc("malloc_trim") is None:
        pytest.skip("needs glibc")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(b"1" * 2**16) for _ in range(1000)]  # 63 MiB
    keep = bytearray(b"1" * 2**16)  # above them: the heap cannot shrink from its end
    before = resident()
    blocks.clear()
    _host.give_back_memory()
    assert resident() < before - 2**25
    assert len(keep) == 2**16
    monkeypatch.setattr(_host, "_find_in_libc", lambda name: None)
    _host.give_back_memory()


_FAULTS = """
import ctypes, resource, sys, torch
from torchalign import _host

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: one fault a page
torch.set_num_threads(2)
kept = _host.fast_memory() if sys.argv[1:] else False

def work(number):
    blocks = [torch.ones(2**19) for _ in range(12)]  # 24 MiB, all of it freed at the end

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(4):  # until every thread finds a heap that has been used
    _host.map_on_host(work, range(8))
before = faults()
_host.map_on_host(work, range(8))
print(faults() - before, kept)
"""
_PAGES = 24 * 2**20 // os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def _faults(*asked: str) -> tuple[int, bool]:
    named = {
        name: value for name, value in os.environ.items() if name not in (*_host._LIMITS, "GLIBC_TUNABLES")
    }
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, *asked],
        env=named,
        check=True,
        capture_output=True,
        text=True,
    )
    count, kept = done.stdout.split()
    return int(count), kept == "True"


@pytest.mark.slow
@pytest.mark.skipif(_host._find_in_libc("mallopt") is None, reason="needs glibc")
def test_worker_threads_keep_the_memory_of_their_blocks_if_asked():
    count, kept = _faults("ask")
    assert kept
    assert count < 3 * _PAGES


def test_nothing_is_set_without_being_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(_host, "_find_in_libc", lambda name: asked.append(name))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert _host.map_on_host(lambda item: 2 * item, range(8)) == [2 * item for item in range(8)]
    finally:
        torch.set_num_threads(threads)
    assert asked == []
    _host.fast_memory.cache_clear()
    assert not _host.fast_memory()  # which asks, and is told that there is no such function
    assert asked == ["mallopt"]
    _host.fast_memory.cache_clear()


def test_the_environment_has_the_last_word_on_memory(monkeypatch):
    told = []
    monkeypatch.setattr(_host, "_find_in_libc", lambda name: lambda *limit: told.append(limit) or 1)
    for name in (*_host._LIMITS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    fast_memory = _host.fast_memory.__wrapped__  # what was found for this process stays
    assert fast_memory()
    assert len(told) == 2
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not fast_memory()
    assert len(told) == 2  # nothing more was set


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="results are then plain tensors")
def test_a_freed_result_gives_its_memory_to_the_next_one_if_asked(monkeypatch):
    shape = (3, _host._HUGE_RESULT // 4)
    monkeypatch.setattr(_host, "_RESULTS", {})
    first, other = (_host.empty_on_host(shape, torch.float32) for _ in range(2))
    part, place = first[1].fill_(7.0), first.data_ptr()
    del first
    assert not _host._RESULTS  # a part of it is in use
    assert len({part.data_ptr(), other.data_ptr(), _host.empty_on_host(shape, torch.float32).data_ptr()}) == 3
    _host._RESULTS.clear()
    del part
    assert _host.empty_on_host(shape, torch.float32).data_ptr() == place
    monkeypatch.setattr(_host, "_RESULTS", None)
    del other
    _host.empty_on_host(shape, torch.float32)
    assert _host._RESULTS is None


@pytest.mark.parametrize(
    ("environment", "theirs"),
    [
        ({}, False),
        ({"MALLOC_TOP_PAD_": "1"}, True),
        ({"MALLOC_MMAP_MAX_": "0"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, True),
        ({"GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=2048"}, False),
    ],
)
def test_what_of_the_environment_is_about_memory(environment, theirs):
    assert _host._memory_is_users(environment) is theirs


@pytest.fixture
def some_products():
    """Lightning advises it: matrix products of float32 in TF32."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


ON_A_GPU = SimpleNamespace(device=torch.device("cuda"))
BY_BACKEND = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and later


def use_tf32():
    """Whether cuBLAS does."""
    if BY_BACKEND:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def test_matrix_products_are_exact_until_the_last_thread_is_out(some_products):
    inside, done, seen = threading.Event(), threading.Event(), []

    def other():
        with _host.full_precision(ON_A_GPU):
            inside.set()
            done.wait(10)
            seen.append(use_tf32())

    thread = threading.Thread(target=other)
    with _host.full_precision(ON_A_GPU), torch.autocast("cpu"):
        thread.start()
        assert inside.wait(10)
        with _host.full_precision(ON_A_GPU):
            assert not use_tf32()
    done.set()
    thread.join()
    assert seen == [False]
    assert use_tf32()
    with pytest.raises(ZeroDivisionError), _host.full_precision(ON_A_GPU):
        raise ZeroDivisionError
    assert use_tf32()
    with _host.full_precision(torch.ones(1)):  # the CPU has its own ways
        assert use_tf32()


matmul = torch.backends.cuda.matmul
CHOICES = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allowed": lambda: setattr(matmul, "allow_tf32", True),
    "by backend": lambda: setattr(matmul, "fp32_precision", "tf32"),
    "everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "of the CPU": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


def state_of_products():
    def told(function):
        try:
            return function()
        except RuntimeError as error:  # ways that are mixed
            return str(error)

    backends = torch.backends
    parts = (backends, matmul, backends.mkldnn, backends.mkldnn.matmul, backends.cudnn, backends.cudnn.conv)
    legacy = told(torch.get_float32_matmul_precision), told(lambda: matmul.allow_tf32)
    return [*legacy, *(part.fp32_precision for part in parts)]


@pytest.fixture
def nothing_chosen():
    def reset():
        torch.set_float32_matmul_precision("highest")
        for part in (torch.backends, matmul, torch.backends.mkldnn.matmul):
            part.fp32_precision = "none"

    reset()
    yield
    reset()


@pytest.mark.skipif(not BY_BACKEND, reason="torch 2.9 and later")
@pytest.mark.filterwarnings("ignore:Please use the new API:UserWarning")  # the user's way is the older one
@pytest.mark.parametrize("choice", [*CHOICES, "high, but not here", "high, and here"])
def test_whatever_is_chosen_for_matrix_products_comes_back(nothing_chosen, choice):
    CHOICES[choice.split(",")[0]]()
    if "," in choice:  # the two ways are mixed
        matmul.fp32_precision = "ieee" if "not" in choice else "tf32"
    before = state_of_products()
    with _host.full_precision(ON_A_GPU):
        assert not use_tf32()
    assert state_of_products() == before
    if choice == "everywhere":  # and is followed as before
        torch.backends.fp32_precision = "ieee"
        assert not use_tf32()


@pytest.mark.skipif(not BY_BACKEND, reason="torch 2.9 and later")
def test_what_is_chosen_meanwhile_stands(nothing_chosen):
    matmul.fp32_precision = "tf32"
    with _host.full_precision(ON_A_GPU):
        matmul.fp32_precision = "none"
    assert matmul.fp32_precision == "none"


def test_what_cannot_turn_tf32_off_does_not_keep_it_on(some_products, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_host, "_turn_off_tf32", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError), _host.full_precision(ON_A_GPU):
            raise AssertionError("not reached")
    with _host.full_precision(ON_A_GPU):
        assert not use_tf32()
    assert use_tf32()


TRANSFORMS = {
    "grad": lambda function, frame: torch.func.grad(lambda own: function(own).sum())(frame),
    "jvp": lambda function, frame: torch.func.jvp(function, (frame,), (torch.ones_like(frame),)),
    "vmap": lambda function, frame: torch.func.vmap(function)(frame[None]),
    "functionalize": lambda function, frame: torch.func.functionalize(function)(frame),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:Warning"
)  # of torch's own, at its first derivative forwards
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_tables_of_a_transform_are_not_kept(stack, transform, monkeypatch):
    monkeypatch.setattr(_host, "_TABLES", {})
    frames, reference = stack[0][:1], stack[1]
    transform(lambda own: ta.PCC()(own, reference).aligned, frames)
    found = ta.PCC()(frames, reference)
    assert found.estimate.status.tolist() == [0]
    kept = torch.utils._pytree.tree_leaves(list(_host._TABLES.values()))
    tables = [table for table in kept if isinstance(table, torch.Tensor)]
    assert len(tables) > 10
    for table in tables:
        assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
        assert not torch._is_functional_tensor(table)


def test_tables_are_shared_once_they_are_made(monkeypatch):
    """Of a GPU, whose streams do not wait for each other, and which records."""
    made, done, now = [], [], SimpleNamespace(stream_id=1, recording=False)
    event = SimpleNamespace(query=lambda: bool(done))
    monkeypatch.setattr(
        _host, "_stream_of", lambda like: SimpleNamespace(stream_id=now.stream_id, record_event=lambda: event)
    )
    monkeypatch.setattr(_host, "_is_recording", lambda like: now.recording)
    monkeypatch.setattr(_host, "_TABLES", {})
    monkeypatch.setattr(_host, "_COMING", {})

    @_host.keeps_tables
    def table(length, *, like):
        made.append(length)
        return torch.arange(length)

    like = torch.ones(1)
    first = table(3, like=like)
    assert table(3, like=like) is first
    now.stream_id = 2  # which may come before the first is there
    assert table(3, like=like) is not first
    now.recording = True
    assert table(3, like=like) is not first
    assert made == [3, 3, 3]
    _host.settle_tables()
    table(3, like=like)
    assert len(made) == 4
    done.append(True)
    _host.settle_tables()
    assert table(3, like=like) is first
    now.recording, now.stream_id = False, 3
    assert table(3, like=like) is first
    assert len(made) == 4
    assert not _host._COMING
