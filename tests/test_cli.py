import csv
import dataclasses
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import xarray as xr

pytest.importorskip("typer")
pytest.importorskip("h5py")

import torchalign as ta
from torchalign import _check, cli
from torchalign.cube.files import atomic
from torchalign.datasets import simulate_stack
from torchalign.io import write_cube


@pytest.fixture(scope="module")
def dataset():
    """A cube as agencies deliver it: packed integers, nodata, a CRS, a mask, and a second variable."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scene = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 300, 300, generator=generator), 9, 1, 4)[0]
    stack = simulate_stack(scene, frames=5, size=(64, 64), factor=3, noise=0.001, gain=(1, 1), offset=0)
    values = (stack.cube.numpy() * 10_000).round()
    values[1, :, :6, :6] = np.nan
    clouds = np.zeros((5, 64, 64), np.int8)
    clouds[3, :20] = 1
    coords = {
        "time": np.datetime64("2020-01-01", "ns") + np.arange(5) * np.timedelta64(5, "D"),
        "band": ["B02", "B03", "B04"],
        "y": ("y", 5000.0 - 10 * np.arange(64), {"units": "m"}),
        "x": ("x", 300.0 + 10 * np.arange(64), {"units": "m"}),
    }
    cube = xr.DataArray(values.astype(np.float32), coords, ("time", "band", "y", "x"), attrs={"note": "kept"})
    cube.encoding = {"dtype": "uint16", "_FillValue": 65535, "grid_mapping": "spatial_ref"}
    crs = ((), 0, {"crs_wkt": 'PROJCRS["x",LENGTHUNIT["metre",1]]'})
    variables = {"reflectance": cube, "clouds": (("time", "y", "x"), clouds)}
    return xr.Dataset(variables).assign_coords(spatial_ref=crs)


@pytest.fixture(scope="module")
def written(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "cube.nc"
    dataset.to_netcdf(path, engine="h5netcdf")
    return path


@pytest.fixture
def source(written, tmp_path):
    return shutil.copy(written, tmp_path / "cube.nc")


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def align(*arguments) -> int:
    """With the fast aligner, where it is not the aligner that is tested."""
    return run("align", *arguments, "--aligner", "pcc")


DEMO = {"animation.gif", "report.csv", "report.html", "report.nc", "summary.png"}


def test_demo(tmp_path, capsys):
    pytest.importorskip("spyndex")
    out = tmp_path
    # from before: its own files are replaced, others stay
    (out / "report.nc").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert run("demo", "--out", out, "--frames", 6, "--device", "cpu", "--seed", 1) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {path.name for path in out.iterdir()} == DEMO | {"notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"
    rows = [line.split() for line in printed[1:7]]
    assert [row[0] for row in rows] == list("012345")
    assert [row[-1] for row in rows].count("OK") == 5
    for row in rows:
        if row[-1] == "OK":  # frame, date, clear, true x, true y, found x, found y, error
            assert np.hypot(*(float(row[3 + axis]) - float(row[5 + axis]) for axis in (0, 1))) < 0.05
    median = float(next(line for line in printed if line.startswith("median")).split()[2])
    assert median < 0.02
    with xr.open_dataset(out / "report.nc", engine="h5netcdf") as report:
        assert (report.status == 0).sum() == 5


def test_demo_says_when_it_failed(tmp_path, capsys, monkeypatch):
    pytest.importorskip("spyndex")
    align = ta.align

    def wrong(*arguments, **options):
        aligned, report = align(*arguments, **options)
        report["shift_x"][1] += 0.5
        report["status"][:] = 0
        return aligned, report

    monkeypatch.setattr(ta, "align", wrong, raising=False)
    out = tmp_path / "new" / "demo"
    assert run("demo", "--out", out, "--frames", 4) == 1
    assert {path.name for path in out.iterdir()} == DEMO  # to see what went wrong
    said = capsys.readouterr().err
    assert "frame 1 is 0.5" in said
    assert "shows no ground and was not flagged" in said


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_align_is_what_python_does(source, dataset, tmp_path, capsys, suffix):
    out, table = tmp_path / f"out{suffix}", tmp_path / "report.csv"
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    arguments = ("--mask", "clouds", "--invert-mask", "--batch-size", 2, "--device", "cpu", "--report", table)
    assert run("align", source, "--out", out, *arguments) == 0
    assert "frames aligned" in capsys.readouterr().out
    with xr.open_dataset(source, decode_coords="all", engine="h5netcdf") as opened:
        usable = opened["clouds"] == 0
        expected, report = ta.align(opened["reflectance"].load(), mask=usable, batch_size=2)
    with xr.open_dataset(
        out, decode_coords="all", engine="zarr" if suffix == ".zarr" else "h5netcdf"
    ) as result:
        cube = result["reflectance"].load()
    # packed integers on disk: what Python has as floats, to half a number
    np.testing.assert_allclose(cube.values, expected.values, atol=0.5)
    assert cube.encoding["dtype"] == np.uint16
    assert cube.encoding["_FillValue"] == 65535
    assert cube.attrs["note"] == "kept"
    assert cube.spatial_ref.attrs["crs_wkt"].startswith("PROJCRS")
    for name in ("time", "band", "y", "x"):
        assert (cube[name] == dataset[name]).all()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == [ta.Status(int(code)).name for code in report.status]
    for name in ("shift_x", "shift_y", "sigma", "score", "score_before"):
        np.testing.assert_allclose([float(row[name]) for row in rows], report[name], rtol=1e-6)
    np.testing.assert_allclose([float(row["warp_02"]) for row in rows], report["warp"][:, 0, 2], rtol=1e-6)
    assert rows[0]["time"].startswith("2020-01-01")


def test_options_reach_the_aligner(source, tmp_path):
    report = tmp_path / "report.nc"
    options = ("--max-translation", 2.5, "--channel", 1, "--crop-center", 48, "--reference", "first")
    arguments = ("--bands", "B04,B03", "--report", report, *options)
    assert run("align", source, "--out", tmp_path / "out.nc", "--aligner", "pcc", *arguments) == 0
    with xr.open_dataset(report, engine="h5netcdf") as found:
        assert "max_translation=2.5" in found.attrs["aligner"]
        assert "channel=1" in found.attrs["aligner"]
        assert found.attrs["reference"] == "first"
    with xr.open_dataset(tmp_path / "out.nc", engine="h5netcdf") as out:
        assert out.band.values.tolist() == ["B04", "B03"]


def test_options_reach_every_stage_of_a_cascade(source, tmp_path):
    report = tmp_path / "report.nc"
    options = (
        "--max-translation",
        7,
        "--channel",
        "B03",
        "--option",
        "interpolation=bicubic",
        "--option",
        "taper=0.2",
    )
    assert run("align", source, "--out", tmp_path / "out.nc", "--report", report, *options) == 0
    with xr.open_dataset(report, engine="h5netcdf") as found:
        said = found.attrs["aligner"]
        with xr.open_dataset(source, decode_coords="all", engine="h5netcdf") as opened:
            _, expected = ta.align(
                opened["reflectance"].load(), "median", ta.PCC(max_translation=7, channel=1)
            )
        np.testing.assert_allclose(found.shift_x, expected.shift_x, atol=0.05)
    for stage in ("PCC(", "ECC("):
        if stage in said:  # "auto" may be either, or both
            own = said[said.index(stage) :].partition(")")[0]
            assert "interpolation='bicubic'" in said
            assert "taper=0.2" in own
            assert "max_translation=7.0" in said
            assert "channel=1" in own


def test_mask_in_a_file(source, dataset, tmp_path):
    clear = (dataset["clouds"] == 0).rename("clear")
    clear.to_netcdf(tmp_path / "mask.nc", engine="h5netcdf")
    for number, mask in enumerate((["--mask", tmp_path / "mask.nc"], ["--mask", "clouds", "--invert-mask"])):
        assert align(source, "--out", tmp_path / f"{number}.nc", *mask) == 0
    with (
        xr.open_dataset(tmp_path / "0.nc", engine="h5netcdf") as a,
        xr.open_dataset(tmp_path / "1.nc", engine="h5netcdf") as b,
    ):
        assert a.identical(b)


def test_python_and_command_line_have_the_same_defaults():
    import inspect

    import typer

    from torchalign.cli.commands import app

    command = typer.main.get_command(app).commands["align"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    python = inspect.signature(ta.align).parameters
    for name in ("reference", "aligner", "mask", "init", "verify", "device", "batch_size", "progress"):
        assert defaults[name] == python[name].default, name
    # and what is None there is left to the aligner's own default
    assert all(defaults[name] is None for name in ("max_translation", "channel", "crop_center"))


@pytest.fixture(scope="module")
def untidy(written, tmp_path_factory):
    """A folder that no command of the next test may change, hence one for all of them."""
    folder = tmp_path_factory.mktemp("untidy")
    shutil.copy(written, folder / "cube.nc")
    (folder / "folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "image.tif").write_bytes(b"II*")
    (folder / "table.csv").write_text("1")
    (folder / "broken.nc").write_bytes(b"this is no HDF5")
    shares = xr.DataArray(np.full((5, 64, 64), 0.5), dims=("time", "y", "x"), name="share")
    shares.to_netcdf(folder / "shares.nc", engine="h5netcdf")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("align CUBE", "--out"),
        ("align missing.nc --out out.nc", "not there"),
        ("align FOLDER --out out.nc", "files like *.tif*"),
        ("align image.tif --out out.nc", "date"),
        ("align CUBE image.tif --out out.nc", "one cube, or GeoTIFFs"),
        ("align table.csv --out out.nc", "a path in every line"),
        ("align CUBE --out out.tar", "a folder for GeoTIFFs"),
        ("align CUBE --out image.tif", "a folder for GeoTIFFs"),
        ("align CUBE --out full", "not empty"),
        ("align CUBE --out out.nc --template {file}.tif", "--template"),
        ("align CUBE --out out.nc --aligner pcc --option motion=affine", "max_frequency"),
        ("align CUBE --out out.nc --option speed=11", "max_frequency"),
        ("align CUBE --out out.nc --option bicubic", "NAME=VALUE"),
        ("align CUBE --out out.nc --option interpolation=cubic", "bilinear"),
        ("align CUBE --out out.nc --init missing.json", "not there"),
        ("apply CUBE --out out.nc", "--report"),
        ("apply CUBE --out out.nc --report missing.json", "not there"),
        ("apply CUBE --out out.nc --report report.txt", "ending in"),
        ("apply CUBE --out shifted.nc --report missing.json --mode shift-coords", "folder of GeoTIFFs"),
        ("info missing", "not there"),
        ("info CUBE --html page.html", "a report to show"),
        ("info missing.json", "not there"),
        ("align broken.nc --out out.nc", "readable"),
        ("align CUBE --out out.tif", ".zarr"),
        ("align CUBE --out CUBE --overwrite", "new names"),
        ("align CUBE --out a.nc --report a.nc", "new names"),
        ("align CUBE --out out.nc --report out.txt", ".csv"),
        ("align CUBE --out out.nc --variable nothing", "reflectance"),
        ("align CUBE --out out.nc --variable spatial_ref", "dims"),
        ("align CUBE --out out.nc --aligner magic", "pcc"),
        ("align CUBE --out out.nc --reference 2031", "reference"),
        ("align CUBE --out out.nc --bands B02,B99", "B99"),
        ("align CUBE --out out.nc --mask nothing", "--mask"),
        ("align CUBE --out out.nc --mask reflectance", "one band"),
        ("align CUBE --out out.nc --mask shares.nc", "0 and 1"),
        ("align CUBE --out out.nc --invert-mask", "--mask"),
        ("align CUBE --out out.nc --device abacus", "device"),
        ("align CUBE --out out.nc --batch-size 0", "batch_size"),
        ("align CUBE --out out.nc --max-translation -1", "max_translation"),
        ("align CUBE --out out.nc --channel nonsense", "channel"),
        ("align CUBE --out out.nc --crop-center many", "crop"),
        ("demo --frames 3", "frames"),
        ("demolish", "demolish"),
        ("--nonsense", "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_two(arguments, words, untidy, monkeypatch, capsys):
    monkeypatch.chdir(untidy)
    before = sorted(untidy.rglob("*"))
    typed = arguments.replace("CUBE", str(untidy / "cube.nc")).replace("FOLDER", "folder").split()
    assert run(*typed) == 2
    said = capsys.readouterr().err
    assert said.startswith("torchalign: error: ")
    assert said.count("\n") == 1
    assert words in said
    assert sorted(untidy.rglob("*")) == before


def test_nothing_is_overwritten_unasked(source, tmp_path, capsys):
    out = tmp_path / "out.nc"
    out.write_text("precious")
    assert align(source, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert align(source, "--out", out, "--overwrite") == 0
    with xr.open_dataset(out, engine="h5netcdf") as result:
        assert "reflectance" in result


def test_a_store_is_replaced_whole(source, tmp_path):
    pytest.importorskip("zarr")
    out = tmp_path / "out.zarr"
    assert align(source, "--out", out) == 0
    (out / "stale").write_text("from before")
    assert align(out, "--out", tmp_path / "again.nc") == 0  # and a store can be read
    assert align(source, "--out", out, "--overwrite") == 0
    assert not (out / "stale").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"cube.nc", "out.zarr", "again.nc"}


@pytest.mark.parametrize("name", ["out.nc", "out.zarr", "out.csv"])
def test_a_failure_half_way_leaves_what_was(name, tmp_path):
    path = tmp_path / name

    def write(where, text):
        if name.endswith(".zarr"):
            where.mkdir()
            (where / ".zgroup").write_text("{}")
            where = where / "chunk"
        where.write_text(text)

    write(path, "old")

    def interrupted():
        with atomic(path) as partial:
            write(partial, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "chunk" if path.is_dir() else path).read_text() == "old"
    with atomic(path) as partial:
        write(partial, "new")
    assert (path / "chunk" if path.is_dir() else path).read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]

    def idle():
        with atomic(path):
            pass

    with pytest.raises((ValueError, OSError)):
        idle()
    assert (path / "chunk" if path.is_dir() else path).read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def make_store(path, text):
    path.mkdir()
    (path / ".zgroup").write_text(text)
    return path


def test_a_store_moved_away_comes_back(tmp_path, monkeypatch):
    path = make_store(tmp_path / "out.zarr", "old")
    replace, failing = os.replace, {"new"}

    def fail(source, target):
        text = (source / ".zgroup").read_text()
        if text in failing and target == path:
            raise OSError("disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)

    def overwrite():
        with atomic(path) as partial:
            make_store(partial, "new")

    with pytest.raises(OSError, match="full"):
        overwrite()
    assert (path / ".zgroup").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    failing.add("old")  # and where it cannot come back, it is kept beside
    with pytest.raises(OSError, match="full"):
        overwrite()
    assert [mark.read_text() for mark in tmp_path.rglob("*.old/.zgroup")] == ["old"]


@pytest.mark.parametrize(
    "arguments",
    [
        "outer.zarr/in.zarr --out outer.zarr",  # holds the input
        "cube.nc --out new.nc --report outer.zarr/in.zarr/report.csv --mask outer.zarr/in.zarr",  # lies in it
        "outer.zarr/in.zarr --out outer.zarr/in.zarr/out.zarr",
        "cube.nc --out cube.nc",
        "cube.nc --out ./linked/cube.nc",
        "cube.nc --mask m.nc --out m.nc",
        "cube.nc --mask m.nc --out new.nc --report m.nc",
        "cube.nc --out new.zarr --report new.zarr/report.csv",
        "cube.nc --out new.nc --report ./linked/new.nc",
        "cube.nc --out folder.nc",  # of another kind
        "cube.nc --out folder.zarr",
        "cube.nc --out file.zarr",
        "cube.nc --out outer.nc",
        "cube.nc --out new.nc --report folder.nc",
    ],
)
def test_overwriting_destroys_nothing_else(arguments, source, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("outer.zarr", "outer.nc"):
        make_store(tmp_path / name, '{"zarr_format": 2}')
    make_store(tmp_path / "outer.zarr" / "in.zarr", '{"zarr_format": 2}')
    for name in ("folder.nc", "folder.zarr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    (tmp_path / "file.zarr").write_text("mine")
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    (dataset["clouds"] == 0).rename("clear").to_netcdf("m.nc", engine="h5netcdf")

    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def work(*arguments, **options):
        raise RuntimeError("too late")

    monkeypatch.setattr(ta, "align", work, raising=False)
    before = contents()
    assert run("align", *arguments.split(), "--overwrite") == 2
    assert "output: expected" in capsys.readouterr().err
    assert contents() == before


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("zarr_format", [None, 2, 3])
def test_formats_and_attributes(dataset, tmp_path, suffix, zarr_format):
    zarr = pytest.importorskip("zarr")
    if zarr_format == 3 and int(zarr.__version__.split(".")[0]) < 3:
        pytest.skip("this zarr writes version 2 only")
    path, out = tmp_path / f"in{'.zarr' if zarr_format else '.nc'}", tmp_path / f"out{suffix}"
    dataset = dataset.copy(deep=True).assign_attrs(title="kept too", levels=[1, 2])
    dataset["reflectance"].encoding |= {"scale_factor": 0.5, "add_offset": 1.0}
    dataset["time"].encoding = {"units": "hours since 1999-01-01", "dtype": "int64"}
    if zarr_format is None:
        dataset["reflectance"].encoding |= {"zlib": True, "chunksizes": (1, 3, 16, 16)}
        dataset.to_netcdf(path, engine="h5netcdf")
    else:
        options = {"zarr_format": zarr_format} if int(zarr.__version__.split(".")[0]) >= 3 else {}
        dataset = dataset.assign_attrs(nested={"a": [1, None]}, flag=True)
        if zarr_format == 3:  # which has no settled strings
            dataset = dataset.assign_coords(band=[2, 3, 4])
        dataset.to_zarr(path, consolidated=False, **options)
    assert align(path, "--out", out, "--bands", "3,4" if zarr_format == 3 else "1,2") == 0
    engine = "zarr" if suffix == ".zarr" else "h5netcdf"
    source_engine = {"engine": "zarr", "consolidated": False} if zarr_format else {"engine": "h5netcdf"}
    with (
        xr.open_dataset(path, decode_coords="all", **source_engine) as given,
        xr.open_dataset(out, decode_coords="all", engine=engine) as found,
    ):
        cube = found["reflectance"].load()
        for name in ("time", "y", "x"):
            assert (cube[name] == given[name]).all()
        # a label goes before an index
        assert cube.band.values.tolist() == given.band.values.tolist()[1:]
        assert cube.encoding["dtype"] == np.uint16
        assert cube.encoding["_FillValue"] == 65535
        assert cube.encoding["scale_factor"] == 0.5
        assert cube.encoding["add_offset"] == 1.0
        assert np.isnan(cube.values[1, :, 0, 0]).all()
        assert cube.spatial_ref.attrs["crs_wkt"].startswith("PROJCRS")
        assert cube.attrs["note"] == "kept"
        assert cube.time.encoding["units"].startswith("hours since 1999")
        assert found.attrs["title"] == "kept too"
        assert np.array_equal(found.attrs["levels"], [1, 2])
        assert cube.encoding.get("zlib", False) == (zarr_format is None and suffix == ".nc")
        if zarr_format:
            nested = found.attrs["nested"]
            assert (json.loads(nested) if suffix == ".nc" else nested) == {"a": [1, None]}


@pytest.mark.parametrize(("channel", "index"), [("B04", 2), ("-1", -1), ("1", 1), ("luminance", None)])
def test_channel_by_label_index_or_name(source, tmp_path, channel, index):
    report = tmp_path / "report.nc"
    arguments = ("--out", tmp_path / "out.nc", "--report", report, "--channel", channel)
    assert align(source, *arguments) == 0
    with xr.open_dataset(report, engine="h5netcdf") as found:
        wanted = channel if index is None else index
        assert (
            f"channel={wanted!r}" in found.attrs["aligner"] or f"channel={wanted}" in found.attrs["aligner"]
        )


@pytest.mark.parametrize("channel", ["B99", "3", "-4", "--1"])
def test_a_bad_channel_says_what_may_be(source, tmp_path, channel, capsys):
    assert run("align", source, "--out", tmp_path / "out.nc", "--channel", channel) == 2
    said = capsys.readouterr().err
    for word in ("an index", "label", "B04", "name", "luminance", repr(channel)):
        assert word in said


def test_python_m(monkeypatch, capsys):
    # (that a new interpreter says nothing of its own: test_layout.py)
    monkeypatch.setattr(sys, "argv", ["torchalign", "demolish"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("torchalign", run_name="__main__", alter_sys=True)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("torchalign: error: ")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_while_writing(source, tmp_path):
    # the process is killed after the bytes are out and before the name is given
    out = tmp_path / "killed" / "out.nc"
    code = (
        "import sys, time, torchalign.cli as cli\n"
        "import torchalign.cube.stores as stores\n"
        "store = stores._store\n"
        "def slow(*arguments):\n"
        "    store(*arguments); print('written', flush=True); time.sleep(60)\n"
        "stores._store = slow\n"
        "cli.main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", code, "align", str(source), "--out", str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.suffix for path in out.parent.iterdir()] == [
        ".partial"
    ]  # and the rest is seen to be partial


def test_help_version_and_no_arguments(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"torchalign {ta.__version__}\n"
    for arguments in ((), ("--help",), ("-h",)):
        assert run(*arguments) == 0
        assert "demo" in capsys.readouterr().out
    assert run("align", "--help") == 0
    said = capsys.readouterr().out
    assert "--reference" in said
    assert "median" in said


INTERRUPTED_IMPORT = """
import sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from torchalign.cli import main
sys.exit(main(["info", "nothing"]))
"""


def test_an_interruption_leaves_no_traceback(source, tmp_path, monkeypatch, capsys):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "torchalign: error: interrupted\n")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ta, "align", interrupted, raising=False)
    assert align(source, "--out", tmp_path / "out.nc") == 130
    assert capsys.readouterr().err.strip() == "torchalign: error: interrupted"
    assert not (tmp_path / "out.nc").exists()


def test_importing_the_package_imports_no_typer_and_no_torch():
    code = "import sys, torchalign.cli; print({'typer', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_typer(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torchalign.cli.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert run("--help") == 2
    assert 'pip install "torchalign[cli]"' in capsys.readouterr().err


def test_missing_packages_are_named_before_the_work(monkeypatch, capsys, source, tmp_path):
    find = _check.find_spec
    monkeypatch.setattr(_check, "find_spec", lambda name: None if name in ("h5py", "spyndex") else find(name))

    def work(*arguments, **options):
        raise RuntimeError("too late")

    monkeypatch.setattr(ta, "align", work, raising=False)
    monkeypatch.setattr("torchalign.datasets.demo_stack", work)
    assert run("demo", "--out", tmp_path / "demo") == 2
    assert 'pip install "torchalign[demo]"' in capsys.readouterr().err
    assert run("align", source, "--out", tmp_path / "out.nc") == 2
    assert 'pip install "torchalign[io]"' in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_bugs_keep_their_traceback(monkeypatch, source, tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ta, "align", fail, raising=False)
    with pytest.raises(RuntimeError, match="a bug"):
        run("align", source, "--out", tmp_path / "out.nc")
    assert not (tmp_path / "out.nc").exists()


def test_two_candidates_are_asked_about(dataset, tmp_path, capsys):
    path = tmp_path / "two.nc"
    dataset.assign(angle=dataset["reflectance"].isel(band=0, drop=True))[["clouds", "angle"]].to_netcdf(
        path, engine="h5netcdf"
    )
    assert run("align", path, "--out", tmp_path / "out.nc") == 2
    said = capsys.readouterr().err
    assert "'angle'" in said
    assert "--variable" in said
    # the mask is no candidate
    assert run("align", path, "--out", tmp_path / "out.nc", "--mask", "clouds", "--invert-mask") == 0


# --- folders of GeoTIFFs ---


BANDS = ["B2", "B3", "B4", "B8"]


def write_frames(folder, values, names, *, descriptions=BANDS, pixel=10.0, nodata=0):
    """GeoTIFFs on one grid, whose corner is no round number; (T, C, H, W)."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import Affine

    folder.mkdir()
    transform = Affine(pixel, 0.0, 300_123.456789, 0.0, -pixel, 8_432_198.7654321)
    for frame, name in zip(values, names, strict=True):
        count, height, width = frame.shape
        profile = {"count": count, "height": height, "width": width, "dtype": frame.dtype.name}
        profile |= {"crs": "EPSG:32718", "transform": transform, "nodata": nodata}
        with rasterio.open(folder / name, "w", driver="GTiff", **profile) as file:
            file.write(frame)
            file.descriptions = descriptions
    return folder


def fastcubo_names(count):
    """Sentinel-2 products of Earth Engine: sensing and processing time, and the tile."""
    days = np.datetime64("2016-06-08") + 10 * np.arange(count)
    stamps = [str(day).replace("-", "") for day in days]
    return [f"{stamp}T064632_{stamp}T070007_T39PVM.tif" for stamp in stamps]


@pytest.fixture(scope="module")
def series():
    """60 frames of a scene with known shifts, as uint16 with nodata 0 in a corner; (T, C, H, W), (T, 2)."""
    import torch

    generator = torch.Generator().manual_seed(3)
    scene = torch.nn.functional.avg_pool2d(torch.rand(1, 4, 600, 600, generator=generator), 11, 1, 5)[0]
    options = {"gain": (0.9, 1.1), "offset": 0.02, "noise": 0.001, "seed": 4, "max_shift": 2.0}
    stack = simulate_stack(scene, frames=60, size=(96, 96), factor=5, **options)
    values = (stack.cube.numpy() * 8000 + 500).round().clip(1, 65535).astype(np.uint16)
    values[7, :, :30, :12] = 0
    return values, stack.shift.numpy()


@pytest.mark.slow
def test_a_folder_of_60_geotiffs(series, tmp_path, capsys):
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("matplotlib")
    values, truth = series
    names = fastcubo_names(60)
    frames = write_frames(tmp_path / "frames", values, names)
    out, table, page = tmp_path / "aligned", tmp_path / "report.json", tmp_path / "report.html"
    reports = ("--report", table, "--report", page, "--report", tmp_path / "report.csv")
    assert run("align", frames, "--out", out, "--reference", "first", *reports) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("60 of 60 frames aligned")
    assert "CE90" in printed
    # the shifts, in pixels and in metres: x grows to the east, y to the north
    report = ta.load_report(table)
    expected = truth - truth[0]
    found = np.stack([report.shift_x, report.shift_y], -1)
    assert np.abs(found - expected).max() < 0.02
    np.testing.assert_allclose(report.shift_x_metres, 10 * found[:, 0], atol=1e-4)
    np.testing.assert_allclose(report.shift_y_metres, -10 * found[:, 1], atol=1e-4)
    assert str(report.time.values[1]).startswith("2016-06-18T06:46:32")
    # the files: the same names, and everything beside the pixels bit for bit
    assert sorted(path.name for path in out.iterdir()) == names
    for number, name in enumerate(names):
        with rasterio.open(frames / name) as before, rasterio.open(out / name) as after:
            for field in ("transform", "crs", "dtypes", "nodata", "descriptions", "shape", "count"):
                assert getattr(before, field) == getattr(after, field), field
            pixels = after.read()
        if number == 0:
            assert np.array_equal(pixels, values[0])  # the reference
        elif number == 7:
            corner = pixels[:, 4:20, 4:8]
            assert (corner == 0).all()  # nodata stays
    # python does the same
    cube = ta.open_stack(frames)
    aligned, _ = ta.align(cube, "first")
    assert np.array_equal(ta.open_stack(out).values, aligned.values)
    assert "60 of 60 frames aligned" in page.read_text("utf-8")
    assert len(list(tmp_path.iterdir())) == 5


def test_gdal_reads_what_is_written(series, tmp_path):
    if shutil.which("gdalinfo") is None:
        pytest.skip("no gdalinfo on this machine")
    frames = write_frames(tmp_path / "frames", series[0][:4], fastcubo_names(4))
    assert align(frames, "-o", tmp_path / "out", "--reference", "first") == 0
    told = []
    for folder in (frames, tmp_path / "out"):
        path = folder / fastcubo_names(4)[2]
        done = subprocess.run(["gdalinfo", "-json", path], capture_output=True, text=True, check=True)
        told.append(json.loads(done.stdout))
    for field in ("size", "geoTransform", "cornerCoordinates"):
        assert told[0][field] == told[1][field]
    assert told[0]["coordinateSystem"]["wkt"] == told[1]["coordinateSystem"]["wkt"]
    for before, after in zip(told[0]["bands"], told[1]["bands"], strict=True):
        assert [before[key] for key in ("type", "noDataValue", "description")] == [
            after[key] for key in ("type", "noDataValue", "description")
        ]


def test_files_bands_masks_and_templates(series, tmp_path):
    values, _ = series
    names = fastcubo_names(6)
    frames = write_frames(tmp_path / "frames", values[:6], names)
    clouds = np.zeros((6, 1, 96, 96), np.uint8)
    clouds[2, :, :40] = 1
    values = values[:6].copy()
    values[2, :, :40] = 9000
    cloudy = write_frames(tmp_path / "cloudy", values, names)
    masks = write_frames(tmp_path / "clouds", clouds, names, descriptions=["cloud"], nodata=None)
    arguments = ("--bands", "B8,B3", "--template", "{file}_aligned.tif", "--mask", masks, "--invert-mask")
    listed = sorted(cloudy.glob("*.tif"))
    assert align(*listed, "-o", tmp_path / "out", "--reference", "first", *arguments) == 0
    out = ta.open_stack(tmp_path / "out")
    assert out.band.values.tolist() == ["B8", "B3"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        name.replace(".tif", "_aligned.tif") for name in names
    ]
    cube = ta.open_stack(cloudy, bands=["B8", "B3"])
    usable = (ta.open_stack(masks, keep_empty=True) == 0).isel(band=0, drop=True)
    expected, _ = ta.align(cube, "first", "pcc", mask=usable)
    assert np.array_equal(out.values, expected.values)
    # the reference may be a file, and a cube of another format comes of it
    reference = frames / names[0]
    assert align(cloudy, "-o", tmp_path / "out.nc", "--reference", reference) == 0
    with xr.open_dataset(tmp_path / "out.nc", engine="h5netcdf", mask_and_scale=False) as found:
        whole, _ = ta.align(ta.open_stack(cloudy), "first", "pcc")
        assert np.array_equal(found["cube"].values, whole.values)
        assert found["cube"].attrs["_FillValue"] == 0


def test_a_folder_may_be_called_like_a_reference(series, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # (the mean of many frames: that of a few, displaced along one line, is smeared along it)
    frames = write_frames(tmp_path / "frames", series[0][:12], fastcubo_names(12))
    expected, _ = ta.align(ta.open_stack(frames), "mean", "pcc")
    for again in ([], ["--overwrite"]):  # the second time there is a folder of that name
        assert align(frames, "-o", "mean", "--reference", "mean", *again) == 0
        assert np.array_equal(ta.open_stack("mean").values, expected.values)


def test_bad_files_are_named_or_left_out(series, tmp_path, capsys):
    frames = write_frames(tmp_path / "frames", series[0][:4], fastcubo_names(4))
    (frames / "20190101_broken.tif").write_bytes(b"II*")
    assert align(frames, "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "20190101_broken.tif: it cannot be read" in said
    assert "--skip-bad" in said
    assert run("info", frames, "--skip-bad") == 0
    assert "left out: 20190101_broken.tif" in capsys.readouterr().out
    assert align(frames, "-o", tmp_path / "out", "--skip-bad") == 0
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_lazy_cube_gives_the_same_and_a_page(series, tmp_path, capsys):
    pytest.importorskip("dask")
    pytest.importorskip("matplotlib")
    frames = write_frames(tmp_path / "frames", series[0][:9], fastcubo_names(9))
    for name, words in (("memory", ["--in-memory"]), ("lazy", ["--lazy", "--batch-size", 4])):
        arguments = ("--report", tmp_path / f"{name}.json", "--report", tmp_path / f"{name}.html", *words)
        assert align(frames, "-o", tmp_path / f"{name}.zarr", "--reference", "first", *arguments) == 0
    memory, lazy = (
        xr.open_dataset(tmp_path / f"{name}.zarr", engine="zarr", mask_and_scale=False)["cube"].values.astype(
            int
        )
        for name in ("memory", "lazy")
    )
    assert np.abs(memory - lazy).max() <= 1
    reports = [ta.load_report(tmp_path / f"{name}.json") for name in ("memory", "lazy")]
    xr.testing.assert_allclose(*(report.drop_attrs() for report in reports), atol=1e-5)
    assert reports[1].attrs["frames_aligned"] == 9
    page = (tmp_path / "lazy.html").read_text("utf-8")
    assert "9 of 9 frames aligned" in page
    assert "median over time of 9 frames (bands B4, B3, B2)" in page


# --- apply, info, weights ---


def test_apply_to_another_pixel_size_and_to_classes(series, tmp_path, capsys):
    values, truth = series
    values, names = values[:5], fastcubo_names(5)
    frames = write_frames(tmp_path / "frames", values, names)
    coarse = values.reshape(5, 4, 48, 2, 48, 2).mean((3, 5)).round().astype(np.uint16)
    coarse_frames = write_frames(tmp_path / "coarse", coarse, names, pixel=20.0)
    classes = (values[:, :1] // 700).astype(np.uint8)
    write_frames(tmp_path / "classes", classes, names, descriptions=["scl"], nodata=None)
    report = tmp_path / "report.csv"
    assert align(frames, "-o", tmp_path / "out", "--reference", "first", "--report", report) == 0
    capsys.readouterr()
    for name, options in (("coarse", []), ("classes", ["--interpolation", "nearest"])):
        assert (
            run("apply", tmp_path / name, "-o", tmp_path / f"{name}_out", "--report", report, *options) == 0
        )
        assert f"{name}_out" in capsys.readouterr().out
    # names of files drop the hour that dates of a cube have
    hours = ta.load_report(report)
    hours = hours.assign_coords(time=hours.time.dt.floor("D"))
    ta.save_report(hours, tmp_path / "hours.nc")
    where = tmp_path / "hours_out"
    assert run("apply", tmp_path / "coarse", "-o", where, "--report", tmp_path / "hours.nc") == 0
    xr.testing.assert_identical(ta.open_stack(where), ta.open_stack(tmp_path / "coarse_out"))
    # the 10 m solution is the 20 m one
    _, native = ta.align(ta.open_stack(coarse_frames), "first", "pcc")
    _, left = ta.align(ta.open_stack(tmp_path / "coarse_out"), "first", "pcc")
    assert np.hypot(native.shift_x, native.shift_y).max() > 0.5
    assert np.hypot(left.shift_x, left.shift_y).max() < 0.05
    moved = ta.open_stack(tmp_path / "classes_out").values
    assert set(np.unique(moved)) <= set(np.unique(classes))
    x, y = (truth[1] - truth[0]).round().astype(int)
    inside = (slice(10, 80), slice(10, 80))
    came = classes[1, 0][
        tuple(slice(part.start - d, part.stop - d) for part, d in zip(inside, (y, x), strict=True))
    ]
    assert (moved[1, 0][inside] == came).mean() > 0.99


def test_apply_keeps_masks_in_which_nothing_is_set(series, tmp_path, capsys):
    values, names = series[0][:3].copy(), fastcubo_names(3)
    frames = write_frames(tmp_path / "frames", values, names)
    masks = (values[:, :1] > 2000).astype(np.uint8)
    masks[1] = 0
    write_frames(tmp_path / "masks", masks, names, descriptions=["clear"], nodata=None)
    report = tmp_path / "report.csv"
    assert align(frames, "-o", tmp_path / "out", "--reference", "first", "--report", report) == 0
    options = ("--report", report, "--interpolation", "nearest")
    for name, more in (("plain", []), ("skipping", ["--skip-bad"]), ("lazy", ["--lazy"])):
        assert run("apply", tmp_path / "masks", "-o", tmp_path / name, *options, *more) == 0
        moved = ta.open_stack(tmp_path / name, keep_empty=True).values
        assert moved.shape == masks.shape
        assert not moved[1].any()
        assert moved[2].any()
    # what align has left out, because it was empty, apply leaves out too, and says so
    values[1] = 0
    gaps = write_frames(tmp_path / "gaps", values, names)
    arguments = ("--reference", "first", "--report", report, "--skip-bad", "--overwrite")
    assert align(gaps, "-o", tmp_path / "filled", *arguments) == 0
    capsys.readouterr()
    assert run("apply", gaps, "-o", tmp_path / "again", "--report", report, "--skip-bad") == 0
    assert "not in the report: 2016-06-18" in capsys.readouterr().err
    assert len(list((tmp_path / "again").iterdir())) == 2
    assert run("apply", gaps, "-o", tmp_path / "never", "--report", report) == 2


@pytest.mark.parametrize(("suffix", "lazy"), [(".nc", False), (".zarr", True)])
def test_apply_to_masks_that_are_bool(suffix, lazy, dataset, source, tmp_path):
    pytest.importorskip("zarr") if suffix == ".zarr" else None
    pytest.importorskip("dask") if lazy else None
    report = tmp_path / "report.nc"
    assert align(source, "-o", tmp_path / "out.nc", "--variable", "reflectance", "--report", report) == 0
    clear = (dataset["clouds"] == 0).rename("clear")
    alone, beside = tmp_path / f"alone{suffix}", tmp_path / f"beside{suffix}"
    for given, path in ((clear.to_dataset(), alone), (dataset.assign(clear=clear), beside)):
        given.to_zarr(path, zarr_format=2) if suffix == ".zarr" else given.to_netcdf(path, engine="h5netcdf")
    options = ("--report", report, "--interpolation", "nearest", *(["--lazy"] if lazy else []))
    expected = ta.apply(clear, report, interpolation="nearest")
    for path, more in ((alone, []), (beside, ["--variable", "clear"])):
        for out in ("moved.nc", "moved.zarr"):
            assert run("apply", path, "-o", tmp_path / out, *options, *more, "--overwrite") == 0
            with xr.open_dataset(tmp_path / out) as moved:
                assert moved["clear"].dtype == bool
                np.testing.assert_array_equal(moved["clear"], expected)
    # numbers go before what is bool
    assert run("apply", beside, "-o", tmp_path / "numbers.nc", "--report", report) == 0
    with xr.open_dataset(tmp_path / "numbers.nc") as moved:
        assert "reflectance" in moved


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["mask.nc", "mask.zarr"])
def test_bool_is_written_and_read_as_bool(name, lazy, dataset, tmp_path):
    pytest.importorskip("zarr") if name.endswith("zarr") else None
    pytest.importorskip("dask") if lazy else None
    clear = (dataset["clouds"] == 0).rename("clear")
    # of the classes that it was made from, and wrong for what is bool
    clear.attrs = {"note": "kept", "_FillValue": 1}
    clear.encoding = {"dtype": "uint8", "_FillValue": 0}
    path = write_cube(clear.chunk(time=2) if lazy else clear, tmp_path / name)
    with xr.open_dataset(path) as again:
        assert again["clear"].dtype == bool
        np.testing.assert_array_equal(again["clear"], clear)
        assert again["clear"].attrs["note"] == "kept"
    assert clear.attrs["_FillValue"] == 1
    assert clear.encoding["_FillValue"] == 0


def test_apply_shifts_the_georeference_alone(series, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    values, names = series[0][:3], fastcubo_names(3)
    frames = write_frames(tmp_path / "frames", values, names)
    report = tmp_path / "report.json"
    assert align(frames, "-o", tmp_path / "out", "--reference", "first", "--report", report) == 0
    arguments = ("--report", report, "--mode", "shift-coords")
    assert run("apply", frames, "-o", tmp_path / "shifted", *arguments) == 0
    found = ta.load_report(report)
    for number, name in enumerate(names):
        with rasterio.open(frames / name) as before, rasterio.open(tmp_path / "shifted" / name) as after:
            assert np.array_equal(after.read(), values[number])
            moved = [after.transform.c - before.transform.c, after.transform.f - before.transform.f]
        metres = [float(found.shift_x_metres[number]), float(found.shift_y_metres[number])]
        np.testing.assert_allclose(moved, metres, atol=1e-3)


def test_info(source, series, tmp_path, capsys):
    frames = write_frames(tmp_path / "frames", series[0][:4], fastcubo_names(4))
    assert run("info", frames) == 0
    said = capsys.readouterr().out
    for words in (
        "4 frames, 2016-06-08 to 2016-07-08, every 10 days",
        "4 bands: B2, B3, B4, B8",
        "96 rows × 96 columns of 10 × 10 map units, north up, WGS 84 / UTM zone 18S",
        "uint16, nodata 0, 0.2812 MiB",
    ):
        assert words in said
    assert run("info", source) == 0
    said = capsys.readouterr().out
    assert "5 frames, 2020-01-01 to 2020-01-21" in said
    assert "beside it: clouds" in said
    report = tmp_path / "report.nc"
    assert align(source, "-o", tmp_path / "out.nc", "--report", report, "--init", "missing.nc") == 2
    assert align(source, "-o", tmp_path / "out.nc", "--report", report) == 0
    capsys.readouterr()
    assert run("info", report) == 0
    said = capsys.readouterr().out
    assert "5 of 5 frames aligned" in said
    assert "reference: median" in said
    pytest.importorskip("matplotlib")
    assert run("info", report, "--html", tmp_path / "page.html") == 0
    assert "5 of 5 frames aligned" in (tmp_path / "page.html").read_text("utf-8")


def write_product(folder, series, *, extent=96):
    """A file a band and date, with a classification beside them, as Landsat has it."""
    values = series[0][:4, :, :extent]
    folder.mkdir()
    for band, name in enumerate(("B4", "B8", "QA_PIXEL")):
        layer = values[:, band : band + 1] if name[0] == "B" else (values[:, :1] > 4000).astype("uint16") * 7
        names = [f"LC08_{day}_{name}.TIF" for day in ("20200105", "20200115", "20200125", "20200204")]
        write_frames(folder.parent / f"{folder.name}-{name}", layer, names, descriptions=[name])
        for path in (folder.parent / f"{folder.name}-{name}").iterdir():
            shutil.move(path, folder / path.name)
    return folder


BY_PATTERN = ("--bands", "red=*_B4.TIF", "--bands", "nir=*_B8.TIF", "--bands", "qa=*_QA_PIXEL.TIF")


@pytest.mark.parametrize("lazy", ["--lazy", "--in-memory"])
def test_a_file_a_band_and_date(series, tmp_path, capsys, lazy):
    folder = write_product(tmp_path / "in", series)
    patterns = dict(word.split("=") for word in BY_PATTERN[1::2])
    dataset = ta.open_stack(folder, bands=patterns)
    expected, report = ta.align(dataset, "first", "pcc")
    out, page = tmp_path / "out", tmp_path / "page.html"
    assert (
        align(folder, *BY_PATTERN, "-o", out, "--reference", "first", "--report", tmp_path / "r.json", lazy)
        == 0
    )
    written = ta.open_stack(out, bands=patterns)
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    for name in dataset:
        np.testing.assert_allclose(written[name], expected[name], atol=1)
        assert written[name].attrs["_FillValue"] == dataset[name].attrs["_FillValue"]
    assert set(np.unique(written.qa)) <= {0, 7}
    np.testing.assert_allclose(ta.load_report(tmp_path / "r.json").warp, report.warp, atol=1e-5)
    # one cube in one file, only one band decides; the page shows what is seen
    pytest.importorskip("matplotlib")
    assert (
        align(folder, *BY_PATTERN, "-o", tmp_path / "out.nc", "--channel", "nir", "--report", page, lazy) == 0
    )
    with xr.open_dataset(tmp_path / "out.nc", mask_and_scale=False) as made:
        assert made.red.dtype == np.uint16
        assert made.red.attrs["_FillValue"] == 0
    assert page.stat().st_size > 10_000
    # the solution applied to the same files, classes by name or named
    assert run("apply", folder, *BY_PATTERN[:4], "--bands", "other=*_QA_PIXEL.TIF", "--classes", "other",
               "--report", tmp_path / "r.json", "-o", tmp_path / "again") == 0  # fmt: skip
    again = ta.open_stack(tmp_path / "again", bands={"other": "*_QA_PIXEL.TIF"})
    np.testing.assert_array_equal(again.other, written.qa)
    capsys.readouterr()
    assert run("info", folder, *BY_PATTERN) == 0
    said = capsys.readouterr().out
    assert "3 bands: red, nir, qa" in said
    assert "qa: uint16, nodata 0" in said


def test_a_table_of_files(series, tmp_path, capsys):
    folder = write_product(tmp_path / "in", series)
    table = tmp_path / "list.csv"
    rows = [f"in/{path.name},{path.stem.split('_', 2)[2]}" for path in sorted(folder.iterdir())]
    table.write_text("path,band\n" + "\n".join(rows))
    assert align(table, "-o", tmp_path / "out", "--reference", "first") == 0
    assert len(list((tmp_path / "out").iterdir())) == 12
    assert run("info", table) == 0
    assert "B4, B8, QA_PIXEL" in capsys.readouterr().out


def test_files_of_other_extents_in_subfolders(series, tmp_path, capsys):
    write_product(tmp_path / "one", series)
    write_product(tmp_path / "two", (series[0][4:8], None), extent=90)
    for path in (tmp_path / "two").iterdir():
        (tmp_path / "all" / "b").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "all" / "b" / path.name.replace("2020", "2021"))
    (tmp_path / "all" / "a").mkdir()
    for path in (tmp_path / "one").iterdir():
        shutil.copy(path, tmp_path / "all" / "a" / path.name)
    arguments = (tmp_path / "all", *BY_PATTERN[:2], "-o", tmp_path / "out", "--reference", "first")
    assert align(*arguments) == 2
    assert "--recursive" in capsys.readouterr().err
    assert align(*arguments, "--recursive") == 2
    assert "--grid first, union or intersection" in capsys.readouterr().err
    assert align(*arguments, "--recursive", "--grid", "union") == 0
    written = ta.open_stack(tmp_path / "out")
    assert written.sizes["time"] == 8
    assert written.sizes["y"] == 96


def test_several_variables_of_one_file(source, tmp_path, capsys):
    with xr.open_dataset(source, engine="h5netcdf", decode_coords="all") as dataset:
        parts = dataset.reflectance.to_dataset("band").assign(clouds=dataset.clouds).load()
    parts.to_netcdf(tmp_path / "parts.nc", engine="h5netcdf")
    out = tmp_path / "out.nc"
    assert align(tmp_path / "parts.nc", "-o", out) == 2
    assert "several as red,nir" in capsys.readouterr().err
    for words in (
        ("--variable", "B02,B03", "--mask", "clouds", "--invert-mask"),
        ("--variable", "*", "--classes", "clouds"),
    ):
        assert align(tmp_path / "parts.nc", "-o", out, *words, "--overwrite") == 0
        with xr.open_dataset(out, engine="h5netcdf") as made:
            assert {"B02", "B03"} <= set(made)
            assert ("clouds" in made) == ("*" in words)
    assert align(tmp_path / "parts.nc", "-o", out, "--variable", "B02,B99", "--overwrite") == 2
    assert "B99" in capsys.readouterr().err
    assert (
        align(tmp_path / "parts.nc", "-o", out, "--variable", "B02,B03", "--bands", "a=b", "--overwrite") == 2
    )


def test_large_scenes_by_tiles(series, tmp_path, capsys):
    folder = write_frames(tmp_path / "in", series[0][:3], fastcubo_names(3))
    clear = write_frames(tmp_path / "clear", np.ones((3, 1, 96, 96), np.uint8), fastcubo_names(3), nodata=None,
                         descriptions=["clear"])  # fmt: skip
    assert align(folder, "-o", tmp_path / "out", "--large", "--reference", "first", "--mask", clear,
                 "--report", tmp_path / "r.csv", "--report", tmp_path / "r.html", "--no-progress") == 0  # fmt: skip
    assert "3 of 3 frames aligned" in capsys.readouterr().out
    assert align(folder, "-o", tmp_path / "map", "--large", "--reference", "first",
                 "--report", tmp_path / "r.geojson") == 0  # fmt: skip
    assert len(json.loads((tmp_path / "r.geojson").read_text())["features"]) == 3
    report = ta.load_report(tmp_path / "r.csv")
    truth = series[1][:3] - series[1][0]
    np.testing.assert_allclose(np.stack([report.shift_x, report.shift_y], 1), truth, atol=0.05)
    for words in (("-o", tmp_path / "out.nc"), ("-o", tmp_path / "o2", "--init", tmp_path / "r.csv")):
        assert align(folder, *words, "--large", "--reference", "first") == 2
        assert "--large" in capsys.readouterr().err


def test_nothing_aligned_is_one(tmp_path, capsys):
    flat = xr.DataArray(np.ones((3, 32, 32), np.float32), dims=("time", "y", "x"), name="flat")
    flat.to_netcdf(tmp_path / "flat.nc", engine="h5netcdf")
    assert align(tmp_path / "flat.nc", "-o", tmp_path / "out.nc") == 1
    said = capsys.readouterr()
    assert "0 of 3 frames aligned (NO_TEXTURE 3)" in said.out
    assert "not one frame was aligned" in said.err
    assert (tmp_path / "out.nc").exists()


def test_weights(capsys):
    weights = pytest.importorskip("torchalign.models.weights")
    assert run("weights") == 0
    assert capsys.readouterr().out.rstrip() == weights.weights_table()
    assert run("weights", "--download", "nothing") == 2
    assert "nothing" in capsys.readouterr().err


def test_progress_bars(series, tmp_path, capfd):
    pytest.importorskip("tqdm")
    frames = write_frames(tmp_path / "frames", series[0][:4], fastcubo_names(4))
    assert align(frames, "-o", tmp_path / "a", "--progress") == 0
    assert "4/4" in capfd.readouterr().err
    assert align(frames, "-o", tmp_path / "b", "--no-progress") == 0
    assert capfd.readouterr().err == ""
    pytest.importorskip("dask")
    assert align(frames, "-o", tmp_path / "c", "--progress", "--lazy") == 0
    assert "100% Completed" in capfd.readouterr().err


def test_every_option_has_a_text():
    import typer.main

    from torchalign.cli.commands import app, command

    for name, one in typer.main.get_command(app).commands.items():
        for option in one.params:
            assert option.help, f"{name} {option.name}"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of a command.

        sise: A typing error.
        """

        size: int = 1

    with pytest.raises(TypeError, match=r"Options: expected a text for each field.*'sise', 'size'"):
        command("wrong", Options)(lambda options: 0)


def test_without_docstrings(monkeypatch, capsys):
    """As with ``python -OO``: of what reads docstrings alone, for a new process would compile torch without any."""
    pytest.importorskip("torchmetrics")
    root, texts = Path(ta.__file__).parent, {}
    for path in sorted(root.rglob("*.py")):
        if re.search(r"__doc__|@like\(|show_shared\(", text := path.read_text()):
            name = ".".join(("torchalign", *path.relative_to(root).with_suffix("").parts))
            texts[name] = text
            importlib.import_module(name)  # what it needs is there when the bare ones are, and stays as it is
    assert next(iter(texts)) == "torchalign._check"  # which the others ask
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if not name.startswith("_")}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags | {"optimize": 2}))
    for name, text in texts.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        exec(compile(text, name, "exec", optimize=2), vars(sys.modules[name]))
    assert sys.modules["torchalign.aligner"].Aligner.__doc__ is None
    assert run("align", "--help") == 0
    assert "--max-translation" in capsys.readouterr().out


def test_help_teaches(capsys):
    for command in ("align", "apply", "info"):
        assert run(command, "--help") == 0
        said = capsys.readouterr().out
        assert "Examples:" in said
        lines = [
            line.strip() for line in said.splitlines() if line.strip().startswith(f"torchalign {command}")
        ]
        assert len(lines) >= 3
    assert run("align", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    from torchalign.cube.run import ALIGNERS

    assert f"The method: {', '.join(ALIGNERS)}." in said  # whatever xr knows
    for word in ("iterative", "--skip-bad", "[default: median]", "[default: 5]"):
        assert word in said
