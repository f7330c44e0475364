"""Scenes larger than memory, from file to file: the same answer as in memory."""

from __future__ import annotations

import os

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import torchalign as ta

rasterio = pytest.importorskip("rasterio", reason='pip install "torchalign[io]"')
from rasterio.transform import Affine  # noqa: E402

from torchalign.cube import tiles  # noqa: E402

TRANSFORM = Affine(10, 0, 500_000, 0, -10, 5_000_000)


def make_files(folder, size, *, clouds=False, seed=0):
    """Two dates, two bands; the second is (2/3, −4/3) px off, by averages of three fine pixels."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    fine = gaussian_filter(random.normal(size=(3 * size[0] + 12, 3 * size[1] + 12)), 3)
    fine = 2000 + 300 * fine / fine.std()
    for number, (right, down) in enumerate([(4, 6), (6, 2)]):
        cut = fine[down : down + 3 * size[0], right : right + 3 * size[1]]
        values = cut.reshape(size[0], 3, size[1], 3).mean((1, 3)) + random.normal(0, 4, size)
        values = np.stack([values, values * 0.8]).clip(1).astype("uint16")
        values[:, : size[0] // 20] = 0
        if clouds and number:
            values[:, size[0] // 4 : size[0] // 2] = random.integers(
                8000, 9000, values[:, size[0] // 4 : size[0] // 2].shape
            )
        profile = {"driver": "GTiff", "dtype": "uint16", "count": 2, "height": size[0], "width": size[1],
                   "nodata": 0, "crs": "EPSG:32633", "transform": TRANSFORM}  # fmt: skip
        with rasterio.open(folder / f"2020010{number + 1}.tif", "w", **profile) as file:
            file.write(values)
            file.update_tags(SENSOR="S2")
    return np.array([2 / 3, -4 / 3])


def check(folder, out, size, aligner, monkeypatch, tolerance, **options):
    truth = make_files(folder, size, **options)
    monkeypatch.setattr(tiles, "_ROW_BYTES", 4 * size[1] * 2 * 100)  # blocks of 100 rows
    paths, report = ta.io.align_scenes(folder, out, "first", aligner)
    assert report.status.values.tolist() == [0, 0]
    found = np.array([report.shift_x[1], report.shift_y[1]])
    assert np.abs(found - truth).max() < tolerance
    assert float(report.sigma[1]) < 0.05
    cube = ta.open_stack(folder)
    aligned, whole = ta.align(cube, "first", aligner)
    assert abs(float(whole.shift_x[1]) - found[0]) < tolerance
    assert abs(float(whole.shift_y[1]) - found[1]) < tolerance
    assert report.shift_x_metres[1] == pytest.approx(10 * found[0])
    written = ta.open_stack(out)
    np.testing.assert_array_equal(written[0], cube[0])
    exact = ta.apply(cube, report)  # the same warp, in memory
    np.testing.assert_array_equal(written.values, exact.values)
    with rasterio.open(paths[1]) as file:
        assert file.tags()["SENSOR"] == "S2"
        assert tuple(file.transform) == tuple(TRANSFORM)
    return aligned, written


def test_the_same_as_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 128)
    check(tmp_path / "in", tmp_path / "out", (420, 560), ta.PCC(), monkeypatch, 0.01)


def test_a_frame_of_one_tile_is_bit_equal(tmp_path, monkeypatch):
    aligned, written = check(tmp_path / "in", tmp_path / "out", (150, 170), ta.PCC(), monkeypatch, 0.01)
    np.testing.assert_array_equal(aligned, written)


def test_tiles_under_clouds_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 96)
    check(tmp_path / "in", tmp_path / "out", (480, 420), ta.PCC(), monkeypatch, 0.02, clouds=True)


def test_affine_motions(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 128)
    make_files(tmp_path / "in", (420, 420))
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "2020-01-01", ta.ECC(motion="affine"))
    assert report.status.values.tolist() == [0, 0]
    assert abs(float(report.shift_x[1]) - 2 / 3) < 0.02
    np.testing.assert_allclose(report.warp[1, :, :2], np.eye(2), atol=2e-4)


def test_frames_that_cannot_be_aligned_come_back_bit_for_bit(tmp_path):
    make_files(tmp_path / "in", (130, 140))
    with rasterio.open(tmp_path / "in" / "20200102.tif", "r+") as file:
        file.write(np.random.default_rng(1).integers(1, 9000, (2, 130, 140)).astype("uint16"))
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out")
    assert report.status[1] != 0
    np.testing.assert_array_equal(ta.open_stack(tmp_path / "in"), ta.open_stack(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["alpha", "mask"])
def test_masks_go_with_their_frames(tmp_path, kind, monkeypatch):
    make_files(tmp_path / "in", (130, 140))
    monkeypatch.setattr(tiles, "_ROW_BYTES", 4 * 140 * 2 * 30)
    for path in sorted((tmp_path / "in").iterdir()):
        with rasterio.open(path) as file:
            values, profile = file.read(), file.profile
        seen = np.full((130, 140), 255 if kind == "mask" else 65535, profile["dtype"])
        seen[40:60, 40:60] = 0
        profile |= {"nodata": None, "count": 2 + (kind == "alpha")}
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as file:
            file.write(values, [1, 2])
            if kind == "alpha":
                file.colorinterp = [*file.colorinterp[:2], rasterio.enums.ColorInterp.alpha]
                file.write(seen, 3)
            else:
                file.write_mask(seen.astype("uint8"))
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", aligner="pcc")
    assert report.status.values.tolist() == [0, 0]
    exact, written = ta.apply(ta.open_stack(tmp_path / "in"), report), ta.open_stack(tmp_path / "out")
    np.testing.assert_array_equal(written, exact)
    np.testing.assert_array_equal(written.usable, exact.usable)


def test_what_cannot_be_done_is_said(tmp_path):
    make_files(tmp_path / "in", (64, 64))
    with pytest.raises(ValueError, match="'first', or the label of one frame"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "median")
    with pytest.raises(ValueError, match="a motion up to affine"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", ta.ECC(motion="homography"))
    with pytest.raises(TypeError, match="a mapping"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out", bands={"a": "*.tif"})
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "20200101.tif").touch()
    with pytest.raises(FileExistsError):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out")


@pytest.mark.skipif(
    "TORCHALIGN_TEST_PIXELS" not in os.environ, reason="TORCHALIGN_TEST_PIXELS=1500 makes it so large"
)
def test_a_large_scene(tmp_path, monkeypatch):
    size = int(os.environ["TORCHALIGN_TEST_PIXELS"])
    check(tmp_path / "in", tmp_path / "out", (size, size), ta.PCC(), monkeypatch, 0.01)
