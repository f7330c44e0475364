"""Local: never worse than the warp, and its field through cubes, reports and files."""

from __future__ import annotations

import json
import pickle
import sqlite3
from io import BytesIO

import numpy as np
import pytest
import torch
import xarray as xr
from scenes import fractal_stack, scene_with_field
from torch.utils.data import DataLoader

import torchalign as ta
from torchalign.functional.quality import normalized_cross_correlation
from torchalign.functional.shift_field import field_at, is_zero
from torchalign.types import Status

SIZE = (120, 136)
NAN = float("nan")


@pytest.fixture(scope="module")
def frames():
    """A cube (3, 1, H, W) with fields, its reference (1, H, W), and the fields (3, 2, H, W)."""
    cube, reference, fields = scene_with_field(SIZE, 1.0, frames=3)
    return cube[:, None], reference, fields


def errors(estimate: ta.Estimate, fields, margin=8, shift=(0.4, -0.3)):
    """(T, K): of warp and field together."""
    assert estimate.field is not None
    y, x = (torch.arange(float(n)) for n in SIZE)
    found = torch.stack(field_at(estimate.field, x, y), 1) - estimate.warp[:, :2, 2, None, None]
    truth = fields - torch.tensor(shift)[:, None, None]
    return (found - truth).norm(dim=1)[:, margin:-margin, margin:-margin].flatten(1)


def aligners(**options):
    return {
        "alone": ta.Local(**options),
        "after PCC": ta.Cascade(ta.PCC(), ta.Local(**options)),
        "after an affine warp": ta.Cascade(ta.PCC(), ta.ECC(motion="affine"), ta.Local(**options)),
    }


@pytest.mark.parametrize(("name", "stage"), [("alone", 0), ("after PCC", 1)])
def test_fields_are_found(frames, name, stage):
    cube, reference, fields = frames
    aligned, estimate = aligners(spacing=16)[name](cube, reference)
    assert estimate.valid.all()
    assert (estimate.stage == stage).all()
    assert errors(estimate, fields).median() < 0.03
    globally, _ = ta.PCC()(cube, reference)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    score, without = (
        normalized_cross_correlation(one[inner][:, 0], reference[inner[1:]]) for one in (aligned, globally)
    )
    assert (score > without + 0.02).all()
    # one resampling of both
    again = ta.warp(cube, estimate.warp, field=estimate.field)
    torch.testing.assert_close(again, aligned)


def test_on_top_of_an_affine_warp(frames):
    cube, reference, _ = frames
    aligned, estimate = aligners(spacing=16)["after an affine warp"](cube, reference)
    assert (estimate.stage == 2).all()
    inner = (slice(None), slice(8, -8), slice(8, -8))
    assert (normalized_cross_correlation(aligned[:, 0][inner], reference[inner]) > 0.995).all()


@pytest.mark.parametrize("name", ["alone", "after PCC"])
@pytest.mark.parametrize("kind", ["nothing local", "too far", "unrelated", "flat"])
def test_without_a_field_a_frame_is_as_without_the_method(frames, name, kind):
    cube, reference, _ = frames
    options = {}
    if kind == "nothing local":
        data = fractal_stack(3, size=SIZE, bands=1)
        cube, reference = data.cube, data.reference
    elif kind == "too far":
        options = {"max_deviation": 0.5}
    elif kind == "unrelated":
        cube = fractal_stack(3, size=SIZE, bands=1).cube
    else:
        cube = torch.full_like(cube, 0.3)
    aligned, estimate = aligners(spacing=16, **options)[name](cube, reference)
    expected_aligned, expected = ta.PCC()(cube, reference)
    assert estimate.field is not None
    assert is_zero(estimate.field).all()
    assert estimate.field.sigma.isinf().all()
    assert torch.equal(aligned, expected_aligned)
    for mine, theirs in zip(estimate[:-1], expected[:-1], strict=True):
        assert torch.equal(mine, theirs)


def test_a_frame_does_not_know_of_the_others(frames):
    cube, reference, _ = frames
    mixed = torch.cat((cube, fractal_stack(2, size=SIZE, bands=1).cube, torch.zeros_like(cube[:1])))
    together = ta.Local(spacing=16).estimate(mixed, reference)
    for t in range(len(mixed)):
        alone = ta.Local(spacing=16).estimate(mixed[t : t + 1], reference)
        assert torch.equal(alone.status, together.status[t : t + 1])
        torch.testing.assert_close(
            alone.field.coefficients, together.field.coefficients[t : t + 1], atol=1e-3, rtol=0
        )


def test_the_gate_undoes_a_field_that_lowers_the_score(frames, monkeypatch):
    from torchalign import local

    cube, reference, _ = frames
    estimate = local.estimate_shifts

    def spoiled(*given, **options):
        found = estimate(*given, **options)
        return found._replace(coefficients=-found.coefficients)

    monkeypatch.setattr(local, "estimate_shifts", spoiled)
    # parts of these frames disagree by more than PCC accepts alone
    undone = ta.Cascade(ta.PCC(max_sigma=1.0), ta.Local(spacing=16))(cube, reference)
    expected = ta.PCC(max_sigma=1.0)(cube, reference)
    assert torch.equal(undone.aligned, expected.aligned)
    assert (undone.estimate.stage == 0).all()


def test_a_crop_puts_the_lattice_in_its_place(frames):
    cube, reference, fields = frames
    estimate = ta.Local(spacing=16, crop_center=(100, 110)).estimate(cube, reference)
    assert estimate.field.origin[0].tolist() == [13 - 16, 10 - 16]
    assert errors(estimate, fields, margin=20).median() < 0.03
    plain = ta.Cascade(ta.PCC(), ta.Local(spacing=16, crop_center=(100, 110))).estimate(cube, reference)
    assert errors(plain, fields, margin=20).median() < 0.03


def test_a_series_of_series_vmap_pickle_and_collate(frames):
    cube, reference, _ = frames
    aligner = ta.Local(spacing=16)
    plain = aligner.estimate(cube, reference)
    series = aligner.estimate(torch.stack((cube, cube.flip(0))), torch.stack((reference, reference)))
    torch.testing.assert_close(series.field.coefficients[0], plain.field.coefficients, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        series.field.coefficients[1].flip(0), plain.field.coefficients, atol=1e-3, rtol=0
    )
    mapped = torch.vmap(aligner.estimate)(
        torch.stack((cube, cube.flip(0))), torch.stack((reference, reference))
    )
    torch.testing.assert_close(mapped.field.coefficients, series.field.coefficients, atol=1e-3, rtol=0)
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again.field.sigma, plain.field.sigma)
    batch = next(iter(DataLoader([plain, plain], batch_size=2)))
    assert batch.field.coefficients.shape == (2, *plain.field.coefficients.shape)
    assert plain.map(lambda rows: rows[:1]).field.origin.shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"spacing": 7}, ValueError),
        ({"spacing": 24.5}, TypeError),
        ({"smoothness": "smooth"}, ValueError),
        ({"smoothness": 0}, ValueError),
        ({"smoothness": NAN}, ValueError),
        ({"max_deviation": 0.0}, ValueError),
        ({"max_deviation": "3"}, TypeError),
        ({"tie_points": [[0, 0, 0, 0]]}, TypeError),
        ({"tie_points": torch.zeros(3, 3)}, ValueError),
        ({"tie_points": torch.zeros(3, 5)}, ValueError),
        ({"tie_points": torch.full((3, 4), NAN)}, ValueError),
    ],
)
def test_bad_options(options, kind):
    (name,) = options
    with pytest.raises(kind, match=rf"{name}: expected .*, got .*; "):
        ta.Local(**options)


def test_tie_points_of_all_frames(frames):
    cube, reference, fields = frames
    cube, truth = cube[:1].repeat(2, 1, 1, 1), fields[:1]
    cube[1, :, :, 60:] = 0.5 + 0.1 * torch.rand(1, SIZE[0], SIZE[1] - 60)  # a cloud that nobody marked
    y, x = (
        part.flatten()
        for part in torch.meshgrid(torch.arange(4, 120, 10), torch.arange(4, 136, 10), indexing="ij")
    )
    at = torch.stack((x, y), 1).float()
    seen = at - torch.tensor([0.4, -0.3]) + truth[0, :, y, x].mT
    points = torch.cat((at, seen, torch.full((len(at), 1), 0.05)), 1)
    told = ta.Local(spacing=16, tie_points=points)
    estimate = pickle.loads(pickle.dumps(told)).estimate(cube, reference)
    assert estimate.valid.all()
    assert errors(estimate, truth).median(1).values.max() < 0.03
    assert "tie_points=(168, 5)" in repr(told)
    assert not told.state_dict()
    half = ta.Local(spacing=16, tie_points=points).half().to(torch.bfloat16)
    assert torch.equal(
        half.tie_points, told.tie_points
    )  # a hundredth of a pixel has no place in half precision
    assert half.to("meta").tie_points.is_meta
    with pytest.raises(ValueError, match="crop_center: expected None with tie_points"):
        ta.Local(tie_points=points, crop_center=64)


def test_local_comes_last():
    with pytest.raises(ValueError, match="stages: expected Local as the last one"):
        ta.Cascade(ta.Local(), ta.ECC())
    assert "spacing=32" in repr(ta.Cascade(ta.PCC(), ta.Local(spacing=32)))


# -------------------------------------------------------------------------------------------- cubes and reports


@pytest.fixture(scope="module")
def labelled(frames):
    cube, reference, _ = frames
    coords = {"y": 5000 - 10.0 * np.arange(SIZE[0]), "x": 600000 + 10.0 * np.arange(SIZE[1])}
    dates = np.array(["2020-01-01", "2020-02-01", "2020-03-01"], "datetime64[ns]")
    attrs = {"crs": "EPSG:32633"}
    array = xr.DataArray(
        cube[:, 0].numpy(), dims=("time", "y", "x"), coords={"time": dates, **coords}, attrs=attrs
    )
    still = xr.DataArray(reference[0].numpy(), dims=("y", "x"), coords=coords)
    aligner = ta.Cascade(ta.PCC(), ta.Local(spacing=16))
    return array, still, aligner, *ta.align(array, still, aligner)


def test_what_the_report_tells(labelled):
    report = labelled[-1]
    assert report["field"].dims == ("time", "component", "node_y", "node_x")
    assert (report["local_shift_median"] > 0.2).all()
    assert (report["local_shift_p95"] < 2.0).all()
    assert (report["local_shift_p95"] > report["local_shift_median"]).all()
    assert abs(report["residual_x"]).max() < 0.05
    assert "local_shift_p95" in ta.to_table(report)


@pytest.mark.parametrize("suffix", [".nc", ".json"])
def test_files_keep_the_field(labelled, tmp_path, suffix):
    array, _, _, aligned, report = labelled
    path = ta.save_report(report, tmp_path / f"report{suffix}")
    again = ta.load_report(path)
    for name in ("field", "field_sigma", "field_lattice"):
        xr.testing.assert_equal(again[name].drop_vars("time"), report[name].drop_vars("time"))
    np.testing.assert_array_equal(ta.apply(array, path).values, aligned.values)


def test_a_table_does_not_keep_it_and_says_so(labelled, tmp_path):
    array, *_, report = labelled
    path = ta.save_report(report, tmp_path / "report.csv")
    with pytest.raises(ValueError, match=r"local shifts, got none; save the report as \.nc or \.json"):
        ta.apply(array, path)
    # of frames without local shifts the warps are all there is
    none = report.assign(
        field=0 * report["field"], local_shift_median=0 * report["sigma"], local_shift_p95=0 * report["sigma"]
    )
    path = ta.save_report(none, tmp_path / "none.csv")
    np.testing.assert_array_equal(ta.apply(array, path).values, ta.apply(array, none).values)


def test_other_bands_pixel_sizes_axes_and_frames(labelled):
    array, still, _, aligned, report = labelled
    np.testing.assert_array_equal(ta.apply(array, report).values, aligned.values)
    upside_down = ta.apply(array.isel(y=slice(None, None, -1)), report).isel(y=slice(None, None, -1))
    np.testing.assert_allclose(upside_down.values, aligned.values, atol=1e-4)
    one = ta.apply(array.isel(time=[2]), report)
    np.testing.assert_array_equal(one.values, aligned.isel(time=[2]).values)

    def score(cube, reference, part):
        first, second = (torch.tensor(one.values[..., part, part].copy()) for one in (cube, reference))
        return normalized_cross_correlation(first, second).min()

    coarse, coarse_still = (one.coarsen(y=2, x=2).mean() for one in (array, still))
    moved = ta.apply(coarse, report)
    only_warps = ta.apply(coarse, report.drop_vars(["field", "local_shift_p95"]))
    inner = slice(6, -6)
    assert score(moved, coarse_still, inner) > 0.985
    assert score(moved, coarse_still, inner) > score(only_warps, coarse_still, inner) + 0.02
    classes = (array > 0.5).astype("uint8")
    assert set(np.unique(ta.apply(classes, report, interpolation="nearest"))) <= {0, 1}
    with pytest.raises(ValueError, match='mode: expected "resample" for local shifts'):
        ta.apply(array, report, mode="shift-coords")


def test_dask_gives_the_same(labelled):
    array, still, aligner, aligned, report = labelled
    lazy, lazy_report = ta.align(array.chunk(time=1), still, aligner)
    np.testing.assert_allclose(lazy.compute().values, aligned.values, atol=1e-5)
    np.testing.assert_allclose(lazy_report["field"].compute(), report["field"], atol=1e-4)
    again = ta.apply(array.chunk(time=1), lazy_report)
    np.testing.assert_allclose(again.compute().values, aligned.values, atol=1e-5)


def test_a_reference_made_of_the_aligned_frames(labelled):
    array, _, aligner, *_ = labelled
    aligned, report = ta.align(array, "iterative", aligner)
    assert (report["status"] == Status.OK).all()
    spread = aligned.isel(y=slice(10, -10), x=slice(10, -10))
    before = ta.align(array, "iterative", "pcc")[0].isel(y=slice(10, -10), x=slice(10, -10))
    assert spread.std("time").mean() < 0.5 * before.std("time").mean()


def test_an_estimate_of_tensors(labelled, frames):
    array, _, aligner, aligned, _ = labelled
    cube, reference, _ = frames
    estimate = aligner.estimate(cube, reference)
    np.testing.assert_allclose(ta.apply(array, estimate).values, aligned.values, atol=1e-5)


def test_tie_points(labelled, frames, tmp_path):
    pytest.importorskip("rasterio")
    from torchalign import io

    report = labelled[-1].assign_attrs(grid_crs="EPSG:32633")
    fields = frames[-1].numpy()
    table = io.tie_points(report)
    assert set(table["frame"]) == {"2020-01-01", "2020-02-01", "2020-03-01"}
    first = table[(table["frame"] == "2020-01-01") & (table["sigma"] < 0.05)]
    row, column = first["row"].astype(int), first["column"].astype(int)
    truth = -(fields[0][:, row, column] - np.array([[0.4], [-0.3]]))
    assert np.median(np.hypot(first["shift_x"] - truth[0], first["shift_y"] - truth[1])) < 0.03
    np.testing.assert_allclose(first["x"], 600000 + 10 * first["column"])
    np.testing.assert_allclose(first["y"], 5000 - 10 * first["row"])
    assert table["reliability"].between(0, 1).all()
    assert table["kept"].all()

    csv = io.write_tie_points(report, tmp_path / "points.csv")
    assert len(csv.read_text().splitlines()) == len(table) + 1
    document = json.loads(io.write_tie_points(report, tmp_path / "points.geojson").read_text())
    longitude, latitude = document["features"][0]["geometry"]["coordinates"]
    assert 15 < longitude < 17
    assert 0 < latitude < 1
    package = io.write_tie_points(report, tmp_path / "points.gpkg")
    with sqlite3.connect(package) as base:
        assert base.execute("SELECT count(*), min(x) FROM tie_points").fetchone() == (len(table), 600000.0)
        assert base.execute("PRAGMA application_id").fetchone() == (0x47504B47,)
    base.close()
    with pytest.raises(FileExistsError):
        io.write_tie_points(report, package)
    with pytest.raises(ValueError, match="path: expected a name ending in"):
        io.write_tie_points(report, tmp_path / "points.shp")
    with pytest.raises(ValueError, match="report: expected the field"):
        io.write_tie_points(report.drop_vars("field"), tmp_path / "none.csv")


def test_rasters_of_the_displacement(labelled, frames, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from torchalign import io

    report = labelled[-1].assign_attrs(grid_crs="EPSG:32633")
    paths = io.write_displacements(report, tmp_path / "moved")
    assert paths[0].name == "displacement_2020-01-01.tif"
    with rasterio.open(paths[0]) as raster:
        bands = raster.read()
        assert raster.descriptions[:2] == ("shift_x", "shift_y")
        assert raster.crs.to_epsg() == 32633
    truth = -(frames[-1][0].numpy() - np.array([0.4, -0.3])[:, None, None])
    assert np.median(np.hypot(*(bands[:2] - truth))) < 0.03
    if len(bands) == 4:
        np.testing.assert_allclose(bands[3], -10 * bands[1], rtol=1e-5)


def test_ground_control_points(labelled, frames, tmp_path):
    pytest.importorskip("rasterio")
    import rasterio
    from rasterio.transform import GCPTransformer

    from torchalign import io

    array, *_, report = labelled
    report = report.assign_attrs(grid_crs="EPSG:32633")
    paths = [tmp_path / f"{number}.tif" for number in range(3)]
    profile = {"driver": "GTiff", "dtype": "float32", "count": 1, "height": SIZE[0], "width": SIZE[1]}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 599995, 0, -10, 5005)}
    for path, frame in zip(paths, array.values, strict=True):
        with rasterio.open(path, "w", **profile) as raster:
            raster.write(frame, 1)
    io.write_ground_control(report, paths)
    with rasterio.open(paths[1]) as raster:
        np.testing.assert_array_equal(raster.read(1), array.values[1])
        control, crs = raster.gcps
    assert crs.to_epsg() == 32633
    # what lies at a pixel of the reference lies in the frame where the truth says, and is put back from there
    row, column = (part.flatten() for part in np.mgrid[20:100:10, 20:116:10])
    seen = np.stack((column, row)) - np.array([[0.4], [-0.3]]) + frames[-1][1].numpy()[:, row, column]
    x, y = GCPTransformer(control, tps=True).xy(seen[1], seen[0])
    off = np.hypot((np.array(x) - array.x.values[column]) / 10, (np.array(y) - array.y.values[row]) / 10)
    assert np.median(off) < 0.03
    with pytest.raises(ValueError, match="paths: expected 3 paths"):
        io.write_ground_control(report, paths[:2])
    with rasterio.open(paths[2], "w", **profile | {"height": 50}):
        pass
    with pytest.raises(ValueError, match="paths: expected frames of"):
        io.write_ground_control(report, paths)


def test_pictures_and_the_page(labelled):
    pytest.importorskip("matplotlib")
    from torchalign import html, io, plot

    report = labelled[-1]
    figure = plot.local_shifts(report, "2020-02-01")
    arrows, lengths, by_row, _ = figure.axes[:4]
    quiver = arrows.collections[0]
    table = io.tie_points(report).query("frame == '2020-02-01'")
    np.testing.assert_allclose(quiver.U, table["local_x"], atol=1e-6)
    np.testing.assert_allclose(quiver.get_array(), table["sigma"], atol=1e-6)
    assert lengths.images[0].get_array().max() < 2
    assert len(by_row.lines) == 3
    assert "Local shifts on top of the warp" in html.to_html(report)
    # a frame without any is drawn without a warning of matplotlib's
    nothing = report.assign(field=0 * report.field, field_sigma=report.field_sigma + np.inf)
    plot.local_shifts(nothing, 0).savefig(BytesIO(), format="png")
    with pytest.raises(ValueError, match="ax: expected 4 axes, got 2; "):
        plot.local_shifts(report, ax=figure.axes[:2])
    with pytest.raises(ValueError, match="report: expected the field"):
        plot.local_shifts(report.drop_vars("field"))


def test_command_line(labelled, tmp_path):
    pytest.importorskip("rasterio")
    pytest.importorskip("typer")
    from torchalign.cli import main

    array, still, *_ = labelled
    cube = array.expand_dims(band=["a"], axis=1)
    ta.write_stack(cube, tmp_path / "in")
    picture = still.expand_dims(time=array["time"][:1], band=["a"])
    ta.write_stack(picture.transpose("time", "band", "y", "x"), tmp_path / "still")
    (reference,) = (tmp_path / "still").glob("*.tif")
    report = tmp_path / "report.json"
    given = ["align", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--reference", str(reference)]
    given += ["--aligner", "pcc", "--local", "--option", "spacing=16", "--report", str(report)]
    assert main(given) == 0
    found = ta.load_report(report)
    assert found.sizes["node_x"] == labelled[-1].sizes["node_x"]
    assert (found["local_shift_p95"] > 0.3).all()
    again = ["apply", str(tmp_path / "in"), "--out", str(tmp_path / "again"), "--report", str(report)]
    assert main(again) == 0
    first, second = (ta.open_stack(tmp_path / name).values for name in ("out", "again"))
    np.testing.assert_array_equal(first, second)
