"""Lazy cubes: chunk by chunk along time, once each, the same bits anywhere, in bounded memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from series import align, make_series
from torch import nn

import torchalign as ta
from torchalign.cube import chunks as _chunks
from torchalign.functional.affine import translation_warp
from torchalign.io import write_cube, write_stack
from torchalign.types import Alignment, Estimate

dask = pytest.importorskip("dask", reason='pip install "torchalign[dask]"')
import dask.array as da  # noqa: E402
from dask.callbacks import Callback  # noqa: E402

CALLS: list[int] = []  # frames of every call of Counting, wherever in this process


class Counting(nn.Module):
    """Moves by 1.5 pixels; counts its calls."""

    def forward(self, cube, reference, mask=None, reference_mask=None, *, init=None):
        CALLS.append(len(cube))
        warp = translation_warp(cube.new_tensor([1.5, 0.0]).expand(len(cube), 2))
        one, none = cube.new_ones(len(cube)), torch.zeros(len(cube), dtype=torch.int64)
        aligned = ta.warp(cube, warp, mask=mask)
        return Alignment(
            aligned, Estimate(warp, one, one, one, torch.diag_embed(warp[..., 2] * 0 + 1), none, none)
        )


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


@pytest.fixture(scope="module")
def series():
    return make_series(7, 48, cloud_fraction=0.1)


def counted(cube, chunks, reads):
    """The cube in chunks that note when they are read."""

    def read(block, block_info=None):
        reads.append(block_info[0]["chunk-location"][0])
        return block

    data = da.from_array(cube.values, chunks=chunks).map_blocks(
        read, dtype=cube.dtype, meta=np.empty(0, cube.dtype)
    )
    return cube.copy(data=data)


def assert_same(lazy, eager):
    """Bit for bit, but for the attributes that a lazy report cannot know yet."""
    for one, other in zip(lazy, eager, strict=True):
        one = one.compute()
        assert set(one.attrs) <= set(other.attrs)
        xr.testing.assert_identical(one.assign_attrs(other.attrs), other)


def summed_up(report):
    """What writing gives back: by then the report is known."""
    return report.assign_attrs(ta.summarize(report).attrs())


@pytest.mark.parametrize("reference", ["given", "per frame", "first", "median", "clearest", "iterative"])
def test_lazy_equals_eager_bit_for_bit(series, reference):
    given = {"given": series.reference, "per frame": series.cube.copy()}.get(reference, reference)
    options = {"mask": series.clear, "reference_mask": series.clear[0]}
    eager = align(series.cube, given, batch_size=3, **options)
    lazy = align(series.cube.chunk({"time": 3}), given, **options)
    assert lazy[0].chunksizes["time"] == (3, 3, 1)
    assert all(array.chunks for array in lazy[1].data_vars.values())
    assert_same(lazy, eager)
    assert_same(align(series.cube.chunk({"time": 7}), given, batch_size=3, **options), eager)
    masks = {name: mask.chunk({"y": 10}) for name, mask in options.items()}
    chunked = given.chunk({"y": 7}) if isinstance(given, xr.DataArray) else given
    assert_same(align(series.cube.chunk({"time": 3, "y": 20, "band": 1}), chunked, **masks), eager)


def test_the_default_aligner_is_shipped_to_the_tasks(series):
    eager = ta.align(series.cube[:4], series.reference, batch_size=2)
    assert_same(ta.align(series.cube[:4].chunk({"time": 2}), series.reference), eager)


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [
        ("uint8", ("y", "x", "band", "time")),
        ("int64", ("x", "time", "y", "band")),
        pytest.param("float64", ("y", "x", "band", "time"), marks=pytest.mark.slow),
        pytest.param("float32", ("x", "time", "y", "band"), marks=pytest.mark.slow),
    ],
)
def test_dims_in_any_order_and_every_dtype(dtype, dims):
    series = make_series(4, 32, dtype=dtype, gain=(0.02, 0.02), offset=0)
    series.cube[1] = 0
    cube, options = series.cube.transpose(*dims), {"aligner": ta.PCC(fill_value=0)}
    if dtype == "int64":
        cube = cube.copy()
        cube[{"time": 0}] += 2**30  # so that the eager one is computed in float64 as well
    eager = align(cube, series.cube[0], batch_size=2, **options)
    lazy = align(cube.chunk({"time": 2}), series.cube[0], **options)
    assert lazy[0].dims == dims
    assert lazy[0].dtype == dtype
    assert_same(lazy, eager)
    assert_same(
        align(cube.isel(band=0).chunk({"time": 2}), series.cube[0, 0]),
        align(cube.isel(band=0), series.cube[0, 0], batch_size=2),
    )


def test_nothing_is_read_before_it_is_needed(series):
    reads: list[int] = []
    lazy = counted(series.cube, (2, -1, -1, -1), reads)
    aligned, _ = align(lazy, series.reference, Counting(), mask=lazy.isel(band=0) > 0)
    assert (reads, CALLS) == ([], [])
    aligned.isel(time=[2, 3]).compute()
    assert CALLS == [2]
    assert set(reads) == {1}
    reads.clear()
    assert align(lazy, "first", Counting())[1].attrs["reference"] == "first"
    assert set(reads) == {0}  # of the reference, what it takes
    reads.clear()
    align(lazy, "median", Counting())
    assert sorted(reads) == [0, 0, 1, 1, 2, 2, 3, 3]  # for the pairs, and for their median: all rows fit


def test_each_chunk_is_aligned_once(series, tmp_path):
    lazy = series.cube.chunk({"time": 2})
    aligned, report = align(lazy, series.reference, Counting())
    dask.compute(aligned, report)
    assert sorted(CALLS) == [1, 2, 2, 2]
    for write, name in ((write_stack, "folder"), (write_cube, "cube.zarr"), (write_cube, "cube.nc")):
        CALLS.clear()
        _, found = write(aligned, tmp_path / name, report=report)
        assert sorted(CALLS) == [1, 2, 2, 2]
        assert isinstance(found.warp.data, np.ndarray)
        xr.testing.assert_identical(found, summed_up(report.compute()))
        CALLS.clear()
        waiting = write(aligned, tmp_path / name, report=report, overwrite=True, compute=False)
        assert CALLS == []
        _, again = dask.compute(*waiting)
        assert sorted(CALLS) == [1, 2, 2, 2]
        xr.testing.assert_identical(summed_up(again), found)


@pytest.mark.parametrize("name", ["folder", "cube.zarr", "cube.nc"])
def test_what_is_written_chunk_by_chunk_is_the_same(series, tmp_path, name):
    eager, expected = align(series.cube, series.reference, batch_size=2)
    aligned, report = align(series.cube.chunk({"time": 2}), series.reference)
    write = write_stack if name == "folder" else write_cube
    _, found = write(aligned, tmp_path / name, report=report)
    xr.testing.assert_identical(found.assign_attrs(expected.attrs), expected)
    if name == "folder":
        again = ta.open_stack(tmp_path / name)
    else:
        engine = {"engine": "zarr", "chunks": None} if name.endswith("zarr") else {"engine": "h5netcdf"}
        again = xr.open_dataset(tmp_path / name, mask_and_scale=False, **engine)["reflectance"].load()
    np.testing.assert_array_equal(again, eager)
    assert again.dtype == eager.dtype


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_packed_floats_are_packed_chunk_by_chunk(series, tmp_path, suffix):
    cube = (series.cube.astype("float32") / 10_000).chunk({"time": 3})
    cube.attrs = {}
    cube.encoding = {"dtype": "int16", "scale_factor": 1e-4, "add_offset": 0.1, "_FillValue": -1}
    path = write_cube(cube, tmp_path / f"cube.{suffix}")
    options = {"engine": "zarr", "chunks": None} if suffix == "zarr" else {"engine": "h5netcdf"}
    with xr.open_dataset(path, **options) as file:
        np.testing.assert_allclose(file["reflectance"], cube, atol=1e-4)
    with xr.open_dataset(path, mask_and_scale=False, **options) as file:
        assert file["reflectance"].dtype == np.int16


@pytest.mark.parametrize("name", ["folder", "cube.zarr"])
def test_pixels_leave_memory_before_the_next_come(tmp_path, name):
    """However long the series: what the scheduler holds is a few chunks, with the report asked for as well."""
    most = {}
    for frames in (4, 16):
        # made in tasks: the slices of an array in memory would be part of the graph
        cube = xr.DataArray(
            da.full((frames, 1, 32, 32), 7, chunks=(1, 1, 32, 32)), dims=("time", "band", "y", "x")
        )
        aligned, report = align(cube, np.zeros((1, 32, 32)), Counting(), verify=False)
        write = write_stack if name == "folder" else write_cube
        waiting = write(aligned, tmp_path / str(frames) / name, report=report, compute=False)

        class Watch(Callback):
            held = 0

            def _posttask(self, key, value, graph, state, worker):
                arrays = {
                    id(array): array.nbytes for entry in state["cache"].values() for array in walk(entry)
                }
                Watch.held = max(Watch.held, sum(arrays.values()))

        with Watch():
            dask.compute(*waiting, scheduler="sync")
        most[frames] = Watch.held
    assert most[4] >= cube[0].nbytes
    assert most[16] - most[4] < 4 * cube[0].nbytes  # 12 frames more; a report's row is small


def walk(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from walk(part)
    elif isinstance(value, dict):
        yield from walk(list(value.values()))


def test_a_lazy_report_is_summed_up_and_saved_when_it_is_known(series, tmp_path):
    _, eager = align(series.cube, series.reference, batch_size=2)
    _, lazy = align(series.cube.chunk({"time": 2}), series.reference)
    assert "status_counts" not in lazy.attrs
    np.testing.assert_equal(ta.summarize(lazy)._asdict(), ta.summarize(eager)._asdict())  # NaN too
    again = ta.load_report(ta.save_report(lazy, tmp_path / "report.csv"))
    assert again.attrs["status_counts"] == eager.attrs["status_counts"]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("lazy_report", [False, True])
def test_applying_stays_lazy(series, interpolation, lazy_report):
    _, report = align(series.cube, series.reference, verify=False)
    coarse = series.cube.coarsen(y=2, x=2).mean().astype("uint16")
    mask = series.clear.coarsen(y=2, x=2).min().astype(bool)
    expected = ta.apply(coarse, report, interpolation=interpolation, mask=mask, batch_size=3)
    given = (
        align(series.cube.chunk({"time": 3}), series.reference, verify=False)[1] if lazy_report else report
    )
    applied = ta.apply(coarse.chunk({"time": 3, "y": 5}), given, interpolation=interpolation, mask=mask)
    assert applied.chunks
    xr.testing.assert_identical(applied.compute(), expected)
    flags = (coarse > 900).chunk({"time": 2})
    nearest = ta.apply(flags, given, interpolation="nearest")
    assert nearest.dtype == bool
    assert nearest.chunks
    xr.testing.assert_identical(nearest.compute(), ta.apply(flags.compute(), report, interpolation="nearest"))


def test_georeferences_are_corrected_without_reading_pixels(series):
    reads: list[int] = []
    lazy = counted(series.cube, (2, -1, -1, -1), reads)
    _, report = align(series.cube, series.reference, verify=False)
    corrected = ta.apply(lazy, report, mode="shift-coords")
    assert (corrected.chunks, reads) == (lazy.chunks, [])
    assert corrected.geotransform.dtype.kind == "U"


def test_an_empty_lazy_cube():
    cube = make_series(2, 32).cube
    empty = cube.chunk({"time": 1}).isel(time=[])
    aligned, report = dask.compute(*align(empty, cube[0]))
    assert (aligned.sizes["time"], report.sizes["time"], aligned.dtype) == (0, 0, cube.dtype)


def test_tasks_compute_with_one_thread_and_leave_the_number_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen, inside, leave = [], threading.Barrier(2), threading.Barrier(2)

    def task():
        with _chunks.undisturbed(torch.device("cpu")):
            inside.wait()
            seen.append(torch.get_num_threads())
            leave.wait()

    try:
        tasks = [threading.Thread(target=task) for _ in range(2)]
        for thread in tasks:
            thread.start()
        for thread in tasks:
            thread.join()
        assert seen == [1, 1]
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start(), thread.join()
        assert (torch.get_num_threads(), later) == (3, [3])
        with pytest.raises(ZeroDivisionError), _chunks.undisturbed(torch.device("cpu")):
            _ = 1 / 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# --- a cluster ---


def test_tasks_can_be_pickled(series):
    """To workers in other processes tasks are sent so; the slow case below sends them."""
    cloudpickle = pytest.importorskip("cloudpickle", reason='pip install "torchalign[dask]"')
    lazy = align(series.cube.chunk({"time": 2}), "first", mask=series.clear)
    sent = pickle.loads(cloudpickle.dumps(lazy))
    for one, other in zip(dask.compute(*sent), dask.compute(*lazy), strict=True):
        xr.testing.assert_identical(one, other)


# two workers that exchange what they have; and one in a process of its own, to which all is pickled
@pytest.mark.parametrize(
    ("processes", "workers"),
    [pytest.param(False, 2, id="threads"), pytest.param(True, 1, id="processes", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # distributed's own
def test_distributed_equals_local_bit_for_bit(series, tmp_path, processes, workers):
    distributed = pytest.importorskip("distributed", reason='pip install "torchalign[dask]"')
    lazy = series.cube.chunk({"time": 2})
    local = dask.compute(*align(lazy, "first", mask=series.clear))
    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=processes, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster),
    ):
        aligned, report = align(lazy, "first", mask=series.clear)
        for one, other in zip(dask.compute(aligned, report), local, strict=True):
            xr.testing.assert_identical(one, other)
        path, found = write_cube(aligned, tmp_path / "cube.zarr", report=report)
        xr.testing.assert_identical(found, summed_up(local[1]))
        paths, _ = write_stack(aligned, tmp_path / "folder", report=report)
        assert [file.is_file() for file in paths] == [True] * 7
    written = xr.open_dataset(path, engine="zarr", chunks=None, mask_and_scale=False)["reflectance"]
    np.testing.assert_array_equal(written, local[0])
    np.testing.assert_array_equal(ta.open_stack(tmp_path / "folder"), local[0])


# --- memory ---

LARGE = """
import sys, resource
import numpy as np, dask, torch, xarray as xr
import torchalign as ta
from torchalign.io import write_cube

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

cube = xr.open_zarr(sys.argv[1])["cube"]
aligner = ta.PCC(crop_center=64)
few = ta.align(cube.isel(time=slice(0, 8)), cube[0], aligner)
dask.compute(*few)  # all that is loaded once is loaded
before = peak()
with dask.config.set(scheduler="threads", num_workers=2):
    aligned, report = ta.align(cube, "first", aligner)
    _, report = write_cube(aligned, sys.argv[2], report=report)
assert report.sizes["time"] == cube.sizes["time"]
print(cube.nbytes / 2**20, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
@pytest.mark.parametrize("megabytes", [32, pytest.param(400, marks=pytest.mark.slow)])
def test_memory_is_that_of_a_few_chunks(tmp_path, megabytes):
    """Of Zarr; 8 GB: `benchmarks/out_of_core.py`."""
    pytest.importorskip("zarr")
    frame = make_series(1, 256, bands=1).cube[0].values
    frame = np.tile(frame, (1, 2, 2))  # 0.5 MiB
    data = da.from_array(frame[None]).map_blocks(
        lambda block: np.repeat(block, 2, 0), dtype=frame.dtype, chunks=((2,), (1,), (512,), (512,))
    )
    data = da.concatenate([data] * megabytes)
    cube = xr.DataArray(data, dims=("time", "band", "y", "x"), name="cube")
    cube.to_dataset().to_zarr(tmp_path / "in.zarr", zarr_format=2, encoding={"cube": {"compressors": None}})
    path = [str(Path(ta.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / "in.zarr", tmp_path / "out.zarr"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.split())
    assert size >= 0.9 * megabytes
    # two chunks of 1 MiB, in floats, with what is made of them; a cube that is held shows as 32 at least
    assert grown < min(0.6 * megabytes, 40), f"{size} MB took {grown} MB"
    assert xr.open_zarr(tmp_path / "out.zarr")["cube"].shape == cube.shape
