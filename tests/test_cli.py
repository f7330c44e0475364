import csv
import os
import signal
import subprocess
import sys
import time

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
    assert run("demo", "--out", out, "--frames", 6) == 2
    assert "--overwrite" in capsys.readouterr().err


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
    start = time.perf_counter()
    assert run("demo", "--out", tmp_path / "demo") == 2
    assert 'pip install "torchalign[demo]"' in capsys.readouterr().err
    assert run("align", source, "--out", tmp_path / "out.nc") == 2
    assert 'pip install "torchalign[io]"' in capsys.readouterr().err
    assert time.perf_counter() - start < 2
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
