import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

pytest.importorskip("typer")
pytest.importorskip("h5py")

import torchalign as ta
from torchalign import cli
from torchalign.datasets import simulate_stack


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


@pytest.fixture
def source(dataset, tmp_path):
    path = tmp_path / "cube.nc"
    dataset.to_netcdf(path, engine="h5netcdf")
    return path


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_demo(tmp_path, capsys):
    pytest.importorskip("spyndex")
    out = tmp_path / "new" / "demo"
    assert run("demo", "--out", out, "--frames", 6, "--device", "cpu", "--seed", 1) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in out.iterdir()) == [
        "animation.gif",
        "report.csv",
        "report.nc",
        "summary.png",
    ]
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
    # as the README has it, twice: its own files are replaced, others stay
    (out / "report.nc").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert run("demo", "--out", out, "--frames", 6, "--device", "cpu") == 0
    with xr.open_dataset(out / "report.nc", engine="h5netcdf") as report:
        assert report.sizes["time"] == 6
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.iterdir())) == 5


def test_demo_says_when_it_failed(tmp_path, capsys, monkeypatch):
    pytest.importorskip("spyndex")
    align = ta.align

    def wrong(*arguments, **options):
        aligned, report = align(*arguments, **options)
        report["shift_x"][1] += 0.5
        report["status"][:] = 0
        return aligned, report

    monkeypatch.setattr(ta, "align", wrong, raising=False)
    assert run("demo", "--out", tmp_path, "--frames", 4) == 1
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
        expected, report = ta.align(opened["reflectance"].load(), mask=usable)
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


def test_mask_in_a_file(source, dataset, tmp_path):
    clear = (dataset["clouds"] == 0).rename("clear")
    clear.to_netcdf(tmp_path / "mask.nc", engine="h5netcdf")
    for number, mask in enumerate((["--mask", tmp_path / "mask.nc"], ["--mask", "clouds", "--invert-mask"])):
        assert run("align", source, "--out", tmp_path / f"{number}.nc", *mask) == 0
    with (
        xr.open_dataset(tmp_path / "0.nc", engine="h5netcdf") as a,
        xr.open_dataset(tmp_path / "1.nc", engine="h5netcdf") as b,
    ):
        assert a.identical(b)


def test_python_and_command_line_have_the_same_defaults():
    import inspect

    import typer

    command = typer.main.get_command(cli.build_app()).commands["align"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    python = inspect.signature(ta.align).parameters
    for name in ("reference", "aligner", "mask", "device", "batch_size"):
        assert defaults[name] == python[name].default, name
    # and what is None there is left to the aligner's own default
    assert all(defaults[name] is None for name in ("max_translation", "channel", "crop_center"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("align CUBE", "--out"),
        ("align missing.nc --out out.nc", "not there"),
        ("align FOLDER --out out.nc", "GeoTIFFs come with a later release"),
        ("align image.tif --out out.nc", "GeoTIFFs come with a later release"),
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
        ("align CUBE --out out.nc --mask reflectance", "0 and 1"),
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
def test_bad_input_is_one_line_and_two(arguments, words, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.tif").write_bytes(b"II*")
    (tmp_path / "broken.nc").write_bytes(b"this is no HDF5")
    before = sorted(tmp_path.rglob("*"))
    typed = arguments.replace("CUBE", str(source)).replace("FOLDER", "folder").split()
    assert run(*typed) == 2
    said = capsys.readouterr().err
    assert said.startswith("torchalign: error: ")
    assert said.count("\n") == 1
    assert words in said
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten_unasked(source, tmp_path, capsys):
    out = tmp_path / "out.nc"
    out.write_text("precious")
    assert run("align", source, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert run("align", source, "--out", out, "--overwrite") == 0
    with xr.open_dataset(out, engine="h5netcdf") as result:
        assert "reflectance" in result


def test_a_store_is_replaced_whole(source, tmp_path):
    pytest.importorskip("zarr")
    out = tmp_path / "out.zarr"
    assert run("align", source, "--out", out) == 0
    (out / "stale").write_text("from before")
    assert run("align", out, "--out", tmp_path / "again.nc") == 0  # and a store can be read
    assert run("align", source, "--out", out, "--overwrite") == 0
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
        with cli._atomic(path) as partial:
            write(partial, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "chunk" if path.is_dir() else path).read_text() == "old"
    with cli._atomic(path) as partial:
        write(partial, "new")
    assert (path / "chunk" if path.is_dir() else path).read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]

    def idle():
        with cli._atomic(path):
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
        with cli._atomic(path) as partial:
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
    assert run("align", path, "--out", out, "--bands", "3,4" if zarr_format == 3 else "1,2") == 0
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
    assert run("align", source, *arguments) == 0
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


def test_python_m(tmp_path):
    arguments = [sys.executable, "-m", "torchalign", "--version"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"torchalign {ta.__version__}\n"
    done = subprocess.run([*arguments[:-1], "demolish"], capture_output=True, text=True, check=False)
    assert done.returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_while_writing(source, tmp_path):
    # the process is killed after the bytes are out and before the name is given
    out = tmp_path / "killed" / "out.nc"
    code = (
        "import sys, time, torchalign.cli as cli\n"
        "write = cli._to_netcdf\n"
        "def slow(dataset, path):\n"
        "    write(dataset, path); print('written', flush=True); time.sleep(60)\n"
        "cli._to_netcdf = slow\n"
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


def test_without_typer(monkeypatch, capsys):
    find = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "typer" else find(name))
    assert run("--help") == 2
    assert 'pip install "torchalign[cli]"' in capsys.readouterr().err


def test_missing_packages_are_named_before_the_work(monkeypatch, capsys, source, tmp_path):
    find = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("h5py", "spyndex") else find(name))

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
