"""CUDA graphs: what is recorded when, and that played results are those of a call. A double records on the CPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from scenes import fractal_stack
from torch.utils._python_dispatch import TorchDispatchMode

import torchalign as ta
from torchalign import _graphs, _host
from torchalign._graphs import Graphs, may_record
from torchalign.cube import run as cube_run
from torchalign.training import streaming

SIZE = (64, 72)


def tensors_of(found):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Operators in order, with what they were given and where they wrote: Python is not asked again."""

    # of them the host reads the result: no recording can go on
    waits = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique", "unique_")

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__.startswith(self.waits):
            raise RuntimeError(f"{operator} waits for the device")
        found = operator(*args, **(kwargs or {}))
        aliases = [part.alias_info for part in operator._schema.returns]
        if not any(aliases):
            self.log.append((operator, args, kwargs or {}, tensors_of(found)))
        elif any(alias is not None and alias.is_write for alias in aliases) or not aliases:
            self.log.append((operator, args, kwargs or {}, []))  # it writes into what it was given
        return found  # of a view nothing is to be done again

    def wipe(self):
        """Nothing is computed yet."""
        for *_, own in self.log:
            for tensor in own:
                tensor.fill_(97)

    def play(self):
        for operator, args, kwargs, own in self.log:
            for tensor, new in zip(own, tensors_of(operator(*args, **kwargs)) if own else (), strict=True):
                tensor.copy_(new)
            if not own:
                operator(*args, **kwargs)


class Double:
    """Records as CUDA does: nothing is computed then, and what is played reads and writes the same memory each time."""

    def __init__(self, *, fails=False):
        self.recorded, self.played, self.apart_now, self.fails = 0, 0, False, fails

    @contextlib.contextmanager
    def apart(self):
        assert not self.apart_now
        self.apart_now = True
        try:
            yield
        finally:
            self.apart_now = False

    def record(self, call):
        assert self.apart_now
        if self.fails:
            try:
                raise RuntimeError("an operation that waits\nmore of it")
            except RuntimeError:
                raise RuntimeError("the recording ended") from None
        with Tape() as tape:
            found = call()
        tape.wipe()
        self.recorded += 1

        def play():
            assert self.apart_now
            self.played += 1
            tape.play()

        return found, play

    def hand_over(self, tensor):
        assert not self.apart_now


@pytest.fixture
def double(monkeypatch):
    made, own = [], _host.is_on_host

    def is_on_host(tensor):  # as on a device, which the host does not read
        return own(tensor) and not any(recorder.apart_now for recorder in made)

    monkeypatch.setattr(_host, "is_on_host", is_on_host)

    def recorder(device):
        made.append(Double())
        return made[-1]

    monkeypatch.setattr(_graphs, "_recorder_for", recorder)
    return made


def frames(count, seed=0):
    return torch.rand(count, 5, generator=torch.Generator().manual_seed(seed))


def twice(given, other=None):
    return {"whole": 2 * given, "sum": (given.sum(-1), None), "other": other, "rows": given[:1]}


def test_what_python_did_is_not_done_again():
    """Of the double: what is frozen on a GPU is frozen here too, and what waits is refused."""
    taken, double = iter(range(9)), Double()

    def function(given):
        rows = torch.empty_like(given)[:, :3]  # written through a view, and into a given result
        rows.copy_(given[:, 2:])
        torch.add(rows, next(taken), out=rows)
        return rows, (given + 0).chunk(2, -1)[0].mul_(2)

    graphs = Graphs(function, double)
    for seed, count in enumerate((0, 1, 1, 1)):
        given = frames(4, seed)
        rows, doubled = graphs(given)
        assert torch.equal(rows, given[:, 2:] + count)
        assert torch.equal(doubled, 2 * given[:, :3])
    looks = Graphs(lambda given: given * float(given.sum() > 0), Double())
    looks(frames(2))
    with pytest.warns(RuntimeWarning, match="_local_scalar_dense.* waits for the device"):
        looks(frames(2))


def test_results_are_those_of_a_call_and_stay():
    double = Double()
    graphs = Graphs(twice, double)
    given = [frames(4, seed) for seed in range(5)] + [frames(3)]
    found = [graphs(part) for part in given]
    for part, own in zip(given, found, strict=True):  # none was overwritten by a later one
        torch.testing.assert_close(own, twice(part), rtol=0, atol=0)
    # the first of a shape is called, the second is recorded and played; the last comes once
    assert (double.recorded, double.played) == (1, 4)
    given[0].zero_()
    torch.testing.assert_close(found[0]["rows"], 0.5 * found[0]["whole"][:1])


def test_shapes_dtypes_and_what_is_missing_are_kept_apart():
    double = Double()
    graphs = Graphs(lambda given, mask: given if mask is None else given * mask, double)
    mask = torch.tensor([True, False, True, True])[:, None]
    turns = [None, mask, None, ~mask, None, mask]
    for seed, other in enumerate(turns):
        part = frames(4, seed)
        assert torch.equal(graphs(part, other), part if other is None else part * other)
    assert double.recorded == 2
    wide = frames(4).double()
    assert torch.equal(graphs(wide, mask), wide * mask)
    assert graphs(frames(4)[:, ::2], mask.expand(4, 3)).shape == (4, 3)
    assert double.recorded == 2
    # no more than three are kept, and the one that was used longest ago goes
    assert len(graphs._shapes) == 3
    graphs(frames(4), None)
    assert double.recorded == 2
    graphs(frames(4), None)
    assert double.recorded == 3


def test_modes_that_change_in_between_are_kept_apart(monkeypatch):
    double = Double()
    graphs = Graphs(twice, double)
    with torch.inference_mode():
        graphs(frames(2))
        assert graphs(frames(2))["whole"].is_inference()
    assert not graphs(frames(2))["whole"].is_inference()
    assert double.recorded == 1
    with torch.no_grad():
        graphs(frames(2))
    assert double.recorded == 1
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    for dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind, dtype=dtype: dtype)
        graphs(frames(2))
    assert double.recorded == 1
    graphs(frames(2))
    assert double.recorded == 2


def test_what_cannot_be_recorded_runs_as_it_is_called_and_says_so():
    graphs = Graphs(twice, Double(fails=True))
    graphs(frames(4))
    with pytest.warns(RuntimeWarning, match=r"graph: .* got the recording ended; .* graph=False"):
        second = graphs(frames(4, 1))
    third = graphs(frames(4, 2))  # and says it once
    torch.testing.assert_close([second, third], [twice(frames(4, seed)) for seed in (1, 2)])
    assert not graphs._shapes


def test_the_first_complaint_is_told():
    complains = []

    def function(given):
        if complains:
            raise RuntimeError("it waits here\nand more")
        return given

    class Ends(Double):
        def record(self, call):
            complains.append(True)
            try:
                return super().record(call)
            except RuntimeError:
                raise RuntimeError("the recording was invalid") from None
            finally:
                complains.clear()

    graphs = Graphs(function, Ends())
    graphs(frames(2))
    with pytest.warns(RuntimeWarning, match="got it waits here;"):
        graphs(frames(2))


def test_no_memory_for_a_recording():
    tight = [True]

    def function(given):
        if tight.pop() if tight else False:
            raise torch.OutOfMemoryError("no memory")
        return 2 * given

    with pytest.warns(RuntimeWarning, match="no memory"):
        assert torch.equal(Graphs(function, Double())(frames(2)), 2 * frames(2))


def test_errors_of_the_function_are_its_own():
    def function(given):
        raise ValueError("wrong")

    double = Double()
    graphs = Graphs(function, double)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="wrong"):
        graphs(frames(2))
    assert not double.apart_now


def test_a_gradient_is_never_recorded():
    double = Double()
    weight = torch.ones(5, requires_grad=True)
    of_parameter = Graphs(lambda given: given * weight, double)
    of_input = Graphs(twice, double)
    for seed in range(3):
        of_parameter(frames(2, seed)).sum().backward()
        leaf = frames(2, seed).requires_grad_()
        of_input(leaf)["whole"].sum().backward()
        assert torch.equal(leaf.grad, torch.full((2, 5), 2.0))
    torch.testing.assert_close(weight.grad, sum(frames(2, seed).sum(0) for seed in range(3)))
    assert double.recorded == 0
    without = Graphs(lambda given: given * weight, double)
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(without(frames(2, seed)), frames(2, seed) * weight)
    assert double.recorded == 1


def test_memory_is_given_back_at_the_end():
    graphs = Graphs(twice, Double())
    for seed in range(3):
        graphs(frames(2, seed))
    (shape,) = graphs._shapes.values()
    kept = weakref.ref(shape.given[0])
    del graphs, shape
    assert kept() is None  # without a collection


def test_what_may_be_recorded():
    pcc = ta.PCC()
    for function in (
        pcc,
        pcc.estimate,
        functools.partial(pcc, reference=frames(1)),
        ta.Cascade(pcc, ta.ECC()),
    ):
        assert may_record(function)
    assert may_record(ta.PCC(channel=torch.nn.Flatten()))
    strange = ta.PCC(channel=lambda cube: cube[..., 0, :, :])
    for function in (
        strange,
        ta.Cascade(strange, pcc),
        torch.nn.Identity(),
        lambda part: pcc(part, part),
        print,
    ):
        assert not may_record(function)


class Driver:
    """What torch.cuda is asked for, in order."""

    def __init__(self, monkeypatch):
        self.log, self.now, self.ends_badly = [], "here", False
        names = iter(("playing", "recording"))

        def stream(device):
            name = next(names)
            return SimpleNamespace(
                name=name, wait_stream=lambda other: self.log.append(f"{name} after {other.name}")
            )

        here = SimpleNamespace(
            name="here", wait_stream=lambda other: self.log.append(f"here after {other.name}")
        )
        graph = SimpleNamespace(replay=lambda: self.log.append(f"replay on {self.now}"))
        for name, made in {
            "Stream": stream,
            "stream": self.on,
            "graph": self.recording,
            "CUDAGraph": lambda: graph,
            "current_stream": lambda device: here,
            "current_device": lambda: 1,
            "graph_pool_handle": lambda: (0, 7),
            "synchronize": lambda device: self.log.append("synchronize"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, made)
        monkeypatch.setattr(_graphs, "settle_tables", lambda: self.log.append("tables"))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(_graphs, "_streams", functools.cache(_graphs._streams.__wrapped__))

    @contextlib.contextmanager
    def on(self, stream):
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def recording(self, graph, *, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode, gc.isenabled()) == ((0, 7), "thread_local", False)
        before, self.now = self.now, stream.name  # which torch leaves so, where a recording ends badly
        try:
            yield
        finally:
            if self.ends_badly:
                raise RuntimeError("the recording was invalid")
            self.now = before

    def end(self, index, pool):
        self.log.append(f"end {index} {pool}")
        raise RuntimeError("not recording")


def test_what_the_driver_is_asked_for(monkeypatch):
    driver = Driver(monkeypatch)

    def function(given):
        driver.log.append(f"call on {driver.now}")
        return 2 * given

    graphs = _graphs.recorded(function, torch.device("cuda"), 3)
    for seed in range(3):
        graphs(frames(2, seed))
        driver.log.append("")
    first, second, third = " | ".join(driver.log).split("|  |")
    assert first.strip() == "playing after here | call on playing | here after playing"
    assert second.strip(" |") == (
        "playing after here | synchronize | tables | call on recording | replay on playing | here after playing"
    )
    assert third.strip(" |") == "playing after here | replay on playing | here after playing"
    assert graphs._recorder._device == torch.device("cuda", 1)


def test_memory_of_results_is_the_callers_until_it_was_read(fake, monkeypatch):
    driver = Driver(monkeypatch)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: driver.log.append(f"{len(tensor)} used by {stream.name} on {driver.now}"),
    )
    graphs = _graphs.recorded(
        lambda given: {"all": 2 * given, "some": (given[:1], None)}, torch.device("cuda:0"), 3
    )
    for _ in range(2):  # as it is called, and played
        graphs(torch.empty(4, 5, device="cuda:0"))
        assert driver.log[-3:] == ["here after playing", "4 used by here on here", "1 used by here on here"]
        driver.log.clear()
    count = len(driver.log)
    _graphs.used_by(
        torch.empty(3), torch.device("cuda:0")
    )  # of the host's own memory there is nothing to say
    assert len(driver.log) == count


def test_a_recording_that_ends_badly_leaves_nothing_behind(monkeypatch):
    driver = Driver(monkeypatch)
    graphs = _graphs.recorded(twice, torch.device("cuda:0"), 3)
    graphs(frames(2))
    driver.ends_badly = True
    with pytest.warns(RuntimeWarning, match="the recording was invalid"):
        graphs(frames(2))
    assert driver.log[-2:] == ["end 0 (0, 7)", "here after playing"]
    assert (driver.now, gc.isenabled(), _graphs._one_recording.locked()) == ("here", True, False)


# ------------------------------------------------------------------------------------------------- ta.align, ta.stream


def cube(count=11, *, holes=False):
    values = fractal_stack(count, size=SIZE, bands=2, noise=0.003).cube.numpy()
    if holes:
        values[1, :, 5:9, 6:12] = np.nan
    return xr.DataArray(values, dims=("time", "band", "y", "x"))


@pytest.mark.parametrize("aligner", ["pcc", "auto"])
def test_align_records_whole_batches(double, aligner):
    mask = xr.ones_like(cube()[:, 0], dtype=bool)
    mask[4, 20:] = False
    for options in ({}, {"mask": mask, "init": np.zeros((11, 2, 3)) + np.eye(2, 3)}, {"verify": False}):
        double.clear()
        given = {"aligner": aligner, "batch_size": 3, "device": "cpu", "progress": False, **options}
        found, report = ta.align(cube(holes=True), "median", **given)
        assert [(own.recorded, own.played) for own in double] == [(1, 2)]
        expected, known = ta.align(cube(holes=True), "median", graph=False, **given)
        assert len(double) == 1
        xr.testing.assert_allclose(found, expected, atol=1e-6)
        xr.testing.assert_allclose(report, known, atol=1e-5)
        assert (report.status == 0).sum() >= 9


@pytest.mark.parametrize("make", [ta.PCC, lambda: ta.Cascade(ta.PCC(), ta.ECC())], ids=["PCC", "Cascade"])
def test_nothing_that_is_recorded_waits(fake, make):
    on_cuda = functools.partial(torch.empty, device="cuda")
    operation = cube_run.AlignFrames(None, None, None, make(), True, {})
    mask = on_cuda(3, *SIZE, dtype=torch.bool)
    for masks, init in (((None, None), None), ((mask, mask[:1]), on_cuda(3, 2, 3))):
        given = on_cuda(3, 2, *SIZE), on_cuda(2, *SIZE), *masks, init
        aligned, found, left, suspect = operation._align_and_look(*given)
        assert aligned.shape == (3, 2, *SIZE)
        assert {part.device.type for part in (*found[:-1], *left, suspect)} == {"cuda"}


def test_estimates_of_an_iterative_reference_are_recorded_too(double):
    given = {"aligner": "pcc", "batch_size": 2, "device": "cpu", "progress": False}
    _, report = ta.align(cube(7), "iterative", **given)
    assert len(double) > 2
    assert {own.recorded for own in double} == {1}
    _, known = ta.align(cube(7), "iterative", graph=False, **given)
    xr.testing.assert_allclose(report, known, atol=1e-5)


def test_align_runs_few_batches_and_other_modules_as_they_are_called(double):
    class Other(torch.nn.Module):
        def forward(self, frames, reference, mask=None, reference_mask=None):
            return ta.PCC()(frames, reference, mask, reference_mask)

    options = {"device": "cpu", "progress": False}
    ta.align(cube(5), "median", "pcc", batch_size=2, **options)
    ta.align(cube(6), "median", Other(), batch_size=2, **options)
    ta.align(cube(6), "median", ta.PCC(channel=lambda frames: frames.mean(-3)), batch_size=2, **options)
    assert double == []
    with pytest.raises(TypeError, match="graph"):
        ta.align(cube(2), "median", "pcc", graph=1)


def test_batches_with_defects_are_looked_at_as_on_the_host(double, monkeypatch):
    """As on a device: the aligner reads nothing by itself."""
    spoilt = cube(9).copy()
    spoilt[4, :, 10, 11], spoilt[4, :, 20, 30] = 40.0, -40.0
    given = {"aligner": "pcc", "batch_size": 3, "device": "cpu", "progress": False}
    expected, known = ta.align(spoilt, "first", graph=False, **given)
    own = _host.may_look
    monkeypatch.setattr("torchalign.aligner.may_look", lambda image: _host._WAITING.get() and own(image))
    blind, wrong = ta.align(
        spoilt, "first", ta.PCC(), graph=False, batch_size=3, device="cpu", progress=False
    )
    monkeypatch.setattr(cube_run, "_looks_itself", lambda frames: False)
    monkeypatch.setattr("torchalign.functional.defects.all_true", lambda tensor: False)
    found, report = ta.align(spoilt, "first", **given)
    xr.testing.assert_allclose(report, known, atol=1e-5)
    xr.testing.assert_allclose(found, expected, atol=1e-6)
    # all are played, and the one with defects is then aligned as on the host
    assert (double[0].recorded, double[0].played) == (1, 2)
    assert abs(wrong.score[4] - known.score[4]) > 1e-3
    assert abs(blind[4] - expected[4]).max() > 1e-3
    xr.testing.assert_allclose(blind.drop_isel(time=4), expected.drop_isel(time=4), atol=1e-6)


@pytest.mark.parametrize(("hot", "played"), [("xxxxxx", 2), ("xx.xx.", 5), ("...xxx", 5)])
def test_batches_are_not_played_in_vain_for_ever(double, monkeypatch, hot, played):
    """Of a series that is spoilt throughout no batch but the first three pays twice."""
    spoilt = cube(18).copy()
    for number, kind in enumerate(hot):
        if kind == "x":
            spoilt[3 * number + 1, :, 10, 11] = 40.0
    given = {"aligner": "pcc", "batch_size": 3, "device": "cpu", "progress": False}
    expected, known = ta.align(spoilt, "median", graph=False, **given)
    own = _host.may_look
    monkeypatch.setattr("torchalign.aligner.may_look", lambda image: _host._WAITING.get() and own(image))
    monkeypatch.setattr(cube_run, "_looks_itself", lambda frames: False)
    monkeypatch.setattr("torchalign.functional.defects.all_true", lambda tensor: False)
    for number in (1, 2) if "." not in hot else (1,):  # a call starts anew
        found, report = ta.align(spoilt, "median", **given)
        xr.testing.assert_allclose(report, known, atol=1e-5)
        xr.testing.assert_allclose(found, expected, atol=1e-6)
        assert [(recorder.recorded, recorder.played) for recorder in double] == [(1, played)] * number


@pytest.mark.parametrize("kind", ["good", "hot", "masked", "constant"])
def test_a_reference_is_looked_at_once(double, monkeypatch, kind):
    values, looks, masks = cube(9), [], {}
    reference = cube(9).isel(time=0) + 0.01 * np.random.default_rng(0).standard_normal(SIZE, np.float32)
    if kind in ("hot", "masked"):
        reference[:, 17, 11], reference[:, 33, 30] = 40.0, -40.0
    if kind == "constant":  # it is looked at closely: no pixel is hot, nothing is filled
        reference[:, 17, 11:18] = reference[:, 17, 11:12]
    if kind == "masked":
        masks["reference_mask"] = abs(reference[0]) < 40
    given = {"aligner": "pcc", "batch_size": 3, "device": "cpu", "progress": False, **masks}
    expected, known = ta.align(values, reference, graph=False, **given)
    own = _host.may_look
    monkeypatch.setattr("torchalign.aligner.may_look", lambda image: _host._WAITING.get() and own(image))
    monkeypatch.setattr(cube_run, "_looks_itself", lambda frames: False)
    seen = cube_run.suspects
    monkeypatch.setattr(
        cube_run, "suspects", lambda image, usable: looks.append(len(image)) or seen(image, usable)
    )
    found, report = ta.align(values, reference, **given)
    xr.testing.assert_allclose(report, known, atol=1e-5)
    xr.testing.assert_allclose(found, expected, atol=1e-6)
    assert [(recorder.recorded, recorder.played) for recorder in double] == [
        (0, 0) if kind == "hot" else (1, 2)
    ]
    # frames are looked at where they are aligned, in Python for the first and for the recording
    assert looks == ([1] if kind == "hot" else [1, 3, 3])


def test_stream_records_aligners(double, monkeypatch):
    values = torch.from_numpy(cube(11).values)
    aligner = functools.partial(ta.PCC(), reference=values[0])
    options = {"batch_size": 3, "device": "cuda"}
    monkeypatch.setattr(streaming, "_Device", NoDevice)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    parts = list(ta.stream(aligner, values, **options))
    assert [(own.recorded, own.played) for own in double] == [(1, 2)]
    for own, part in zip(parts, values.split(3), strict=True):
        torch.testing.assert_close(own.estimate.warp, aligner(part).estimate.warp, atol=1e-5, rtol=0)
        torch.testing.assert_close(own.aligned, aligner(part).aligned, atol=1e-6, rtol=0)

    taken = iter(range(9))

    def numbered(part):
        return part[:, 0, 0, 0] * 0 + next(taken)

    assert torch.cat(list(ta.stream(numbered, values, **options))).tolist() == 3 * [0] + 3 * [1] + 3 * [
        2
    ] + 2 * [3]
    list(ta.stream(aligner, values, graph=False, **options))
    list(ta.stream(aligner, values[:8], **options))
    assert len(double) == 1
    doubled = torch.cat(list(ta.stream(lambda part: 2 * part, values, graph=True, **options)))
    assert torch.equal(doubled, 2 * values)
    assert double[1].recorded == 1
    taken = iter(range(9))
    frozen = torch.cat(list(ta.stream(numbered, values, graph=True, **options)))
    assert frozen.tolist() == 3 * [0] + 6 * [1] + 2 * [2]
    with pytest.raises(TypeError, match="graph"):
        ta.stream(aligner, values, graph="yes", **options)


class NoDevice:
    """The host in place of a GPU: nothing is on its way."""

    def __init__(self, device):
        self.there = self.back = None

    def on(self, side):
        return contextlib.nullcontext()

    def event(self, side=None):
        return self

    def synchronize(self):
        pass

    def wait(self, event, side=None):
        pass

    def pinned(self, shape, dtype):
        return torch.empty(shape, dtype=dtype)

    def send(self, part):
        return part.clone()

    def used_by(self, tensor, side=None):
        pass


# ------------------------------------------------------------------------------------------------------- a real device


@pytest.mark.parametrize("aligner", ["pcc", "auto", "ecc", "lgm", "local", "cross"])
def test_align_on_a_gpu(cuda, aligner):
    options = {"aligner": aligner, "batch_size": 3, "device": cuda, "progress": False}
    found, report = ta.align(cube(13), "median", **options)  # a warning would be an error
    expected, known = ta.align(cube(13), "median", graph=False, **options)
    np.testing.assert_array_equal(report.status, known.status)
    np.testing.assert_allclose(report.warp, known.warp, atol=1e-3)
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_stream_on_a_gpu(cuda):
    values = torch.from_numpy(cube(26).values)
    aligner = functools.partial(ta.PCC(), reference=values[0].to(cuda))
    found = list(ta.stream(aligner, values, batch_size=4, device=cuda))
    expected = list(ta.stream(aligner, values, batch_size=4, device=cuda, graph=False))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.aligned, other.aligned, atol=1e-4, rtol=0)
        torch.testing.assert_close(own.estimate.warp, other.estimate.warp, atol=1e-4, rtol=0)


def test_a_host_that_looks_is_told_of_on_a_gpu(cuda):
    class Looks(torch.nn.Module):
        def forward(self, frames):
            return frames[..., 0, :, :] * float(frames.mean().item() > -1)

    options = {"batch_size": 2, "device": cuda, "progress": False}
    with pytest.warns(RuntimeWarning, match="graph: expected what a CUDA graph can record"):
        _, report = ta.align(cube(9), "median", ta.PCC(channel=Looks()), **options)
    _, known = ta.align(cube(9), "median", ta.PCC(channel=Looks()), graph=False, **options)
    np.testing.assert_allclose(report.warp, known.warp, atol=1e-3)
    # and the GPU goes on as before, with graphs too
    ta.align(cube(9), "median", "pcc", **options)


def test_memory_of_graphs_is_given_back_on_a_gpu(cuda):
    options = {"batch_size": 3, "device": cuda, "progress": False}
    ta.align(cube(12), "median", "pcc", **options)  # tables are kept
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ta.align(cube(12), "median", "pcc", **options)
    assert torch.cuda.memory_allocated() <= before
