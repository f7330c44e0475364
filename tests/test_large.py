"""Scenes larger than memory, from file to file: the same answer as in memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

import torchalign as ta

rasterio = pytest.importorskip("rasterio", reason='pip install "torchalign[io]"')
from rasterio.transform import Affine  # noqa: E402

from torchalign.cube import tiles  # noqa: E402
from torchalign.cube.displacements import displacement_of  # noqa: E402
from torchalign.cube.gridding import Reading  # noqa: E402
from torchalign.functional import local  # noqa: E402

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
    assert report.covariance[1, 0, 0] > 0
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
    _, whole = ta.align(ta.open_stack(tmp_path / "in"), "first", ta.PCC())
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "again", "first", ta.PCC())
    np.testing.assert_allclose(report.covariance, whole.covariance, rtol=1e-4)
    np.testing.assert_allclose(report.sigma, whole.sigma, rtol=1e-4)


@pytest.mark.parametrize("word", ["median", "mean"])
def test_a_median_is_made_tile_by_tile(tmp_path, monkeypatch, word):
    monkeypatch.setattr(tiles, "_TILE", 128)
    truth = make_files(tmp_path / "in", (300, 290))
    for number, row in ((3, 2.0), (4, -1.0)):  # two more dates, whole pixels off the first
        with rasterio.open(tmp_path / "in" / "20200101.tif") as file:
            moved, profile = np.roll(file.read(), int(row), 1), file.profile
        with rasterio.open(tmp_path / "in" / f"2020010{number}.tif", "w", **profile) as file:
            file.write(moved)
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", word, ta.PCC())
    assert (report.status == 0).all()
    assert report.attrs["reference"] == word
    found = np.stack([report.shift_x, report.shift_y], 1)
    np.testing.assert_allclose(found[1:] - found[0], [truth, (0, -2), (0, 1)], atol=0.05)
    cube = ta.open_stack(tmp_path / "in")
    pixels = getattr(cube.where(cube != 0), word)("time")  # out of core no frame is placed before
    _, whole = ta.align(cube, pixels, ta.PCC())
    np.testing.assert_allclose(found, np.stack([whole.shift_x, whole.shift_y], 1), atol=0.02)


def test_a_reference_of_pixels_and_its_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 128)
    truth = make_files(tmp_path / "in", (300, 290))
    cube = ta.open_stack(tmp_path / "in")
    reference = cube[0].copy()
    reference[:, 100:200] = reference[:, 100:200].values[:, ::-1]  # other ground, which the mask leaves out
    clear = np.ones((300, 290), bool)
    clear[95:205] = False
    _, report = ta.io.align_scenes(
        tmp_path / "in", tmp_path / "out", reference, ta.PCC(), reference_mask=clear
    )
    np.testing.assert_allclose([report.shift_x[1], report.shift_y[1]], truth, atol=0.01)
    with pytest.raises(TypeError, match="reference_mask: expected bool"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "x", reference_mask=clear.astype("uint8"))


def test_a_mask_over_time_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 96)
    make_files(tmp_path / "in", (300, 290))
    usable = ta.open_stack(tmp_path / "in")[:, 0, 0, 0].drop_vars(["y", "x", "band"])
    usable = usable.copy(data=np.array([True, False]))
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", ta.PCC(), mask=usable)
    assert report.status.values.tolist() == [0, int(ta.Status.NO_TEXTURE)]


@pytest.mark.parametrize("chunks", [None, 1])
def test_a_mask_acts_in_the_estimate_and_in_the_pixels(tmp_path, monkeypatch, chunks):
    monkeypatch.setattr(tiles, "_TILE", 96)
    monkeypatch.setattr(tiles, "_ROW_BYTES", 4 * 290 * 2 * 40)
    truth = make_files(tmp_path / "in", (300, 290))
    cube = ta.open_stack(tmp_path / "in", chunks=chunks)
    clouded = ta.open_stack(tmp_path / "in")
    clear = np.ones((2, 300, 290), bool)
    clear[1, 30:270, 40:200] = False
    drawn = np.random.default_rng(3).integers(4000, 9000, (2, 240, 160))
    clouded[1, :, 30:270, 40:200] = gaussian_filter(drawn.astype(float), (0, 2, 2)).astype("uint16")
    ta.write_stack(clouded, tmp_path / "clouded", driver="GTiff")
    mask = cube[:, 0].copy(data=clear if chunks is None else cube[:, 0].data.map_blocks(
        lambda block, block_info=None: clear[slice(*block_info[0]["array-location"][0])], dtype=bool))  # fmt: skip
    aligner = ta.PCC(fill_value=0)
    _, report = ta.io.align_scenes(tmp_path / "clouded", tmp_path / "out", "first", aligner, mask=mask)
    np.testing.assert_allclose([report.shift_x[1], report.shift_y[1]], truth, atol=0.02)
    written = ta.open_stack(tmp_path / "out")
    np.testing.assert_array_equal(written, ta.apply(clouded, report, mask=clear, fill_value=0))
    assert (written[1, 0, 100:200, 60:180] == 0).all()


def test_a_direction_that_little_fixes_is_known_worse(tmp_path, monkeypatch):
    """Ground that is smooth along x: the covariance says along which axis the shift is known less."""
    monkeypatch.setattr(tiles, "_TILE", 128)
    random = np.random.default_rng(1)
    make_files(tmp_path / "in", (420, 420))
    ground = gaussian_filter(random.normal(size=(420, 420)), (1.5, 5))
    for path in sorted((tmp_path / "in").iterdir()):
        with rasterio.open(path, "r+") as file:
            noisy = 2000 + 300 * ground / ground.std() + random.normal(0, 30, (420, 420))
            file.write(np.stack([noisy, noisy]).astype("uint16"))
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", ta.PCC())
    assert report.status.values.tolist() == [0, 0]
    covariance = report.covariance.values[1]
    assert covariance[0, 0] > 3 * covariance[1, 1]
    assert report.sigma[1] == pytest.approx(np.sqrt(np.linalg.eigvalsh(covariance)[-1]), rel=1e-4)
    _, whole = ta.align(ta.open_stack(tmp_path / "in"), "first", ta.PCC())
    assert 0.3 < np.sqrt(covariance[0, 0] / whole.covariance.values[1, 0, 0]) < 3


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


@pytest.mark.parametrize(("aligner", "tile"), [("auto", 512), ("local", 512), ("local", 64)])
def test_frames_that_cannot_be_aligned_come_back_bit_for_bit(tmp_path, monkeypatch, aligner, tile):
    monkeypatch.setattr(tiles, "_TILE", tile)
    make_files(tmp_path / "in", (130, 140))
    with rasterio.open(tmp_path / "in" / "20200102.tif", "r+") as file:
        file.write(np.random.default_rng(1).integers(1, 9000, (2, 130, 140)).astype("uint16"))
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", aligner=aligner)
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
    with pytest.raises(ValueError, match="'first', 'median', 'mean', the label of one frame"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "iterative")
    with pytest.raises(ValueError, match="a motion up to affine"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", ta.ECC(motion="homography"))
    for aligner in (ta.Groupwise(ta.PCC()), ta.Cascade(ta.ECC(motion="homography"), ta.Local())):
        with pytest.raises(ValueError, match="aligner: expected"):
            ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", aligner)
    with pytest.raises(ValueError, match="crop_center: expected None for scenes"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", ta.Local(crop_center=40))
    with pytest.raises(TypeError, match="a mapping"):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out", bands={"a": "*.tif"})
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "20200101.tif").touch()
    with pytest.raises(FileExistsError):
        ta.io.align_scenes(tmp_path / "in", tmp_path / "out")


def warped_files(folder, size, spacing, length=1.0):
    """Two dates; the second is off by a shift and a smooth field of up to so many pixels."""
    folder.mkdir()
    random = np.random.default_rng(4)
    ground = gaussian_filter(random.normal(size=(size[0] + 40, size[1] + 40)), 1.5)
    ground = 2000 + 300 * ground / ground.std()
    field = gaussian_filter(random.normal(size=(2, *size)), (0, 2 * spacing, 2 * spacing))
    field *= length / np.abs(field).max()
    y, x = np.mgrid[: size[0], : size[1]] + 20.0
    for number, (right, down) in enumerate([(0, 0), (0.7, -1.3)]):
        at = [y + down + number * field[1], x + right + number * field[0]]
        values = map_coordinates(ground, at, order=5) + random.normal(0, 3, size)
        profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "height": size[0], "width": size[1],
                   "crs": "EPSG:32633", "transform": TRANSFORM}  # fmt: skip
        with rasterio.open(folder / f"2020010{number + 1}.tif", "w", **profile) as file:
            file.write(values[None].clip(1).astype("uint16"))


@pytest.mark.parametrize(
    "aligner",
    [
        pytest.param(ta.Local(spacing=8), marks=pytest.mark.slow),
        ta.Cascade(ta.PCC(), ta.Local(spacing=8)),
    ],
)
def test_local_shifts_are_those_of_the_cube_in_memory(tmp_path, monkeypatch, aligner):
    """Tiles of as many nodes, with as many in common, as of scenes of 4096² (but for a third of them)."""
    monkeypatch.setattr(local, "_LARGEST_TILE", 12)
    monkeypatch.setattr(tiles, "_TILE", 96)
    monkeypatch.setattr(tiles, "_ROW_BYTES", 4 * 210 * 40)
    warped_files(tmp_path / "in", (230, 210), 8)
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", aligner)
    assert report.status.values.tolist() == [0, 0]
    cube = ta.open_stack(tmp_path / "in")
    aligned, whole = ta.align(cube, "first", aligner)
    assert len(local.Mosaic((230, 210), 8).windows()) >= 9
    assert float(whole.local_shift_p95[1]) > 0.3
    moves, expected = (displacement_of(one, (230, 210))[1][..., 12:-12, 12:-12] for one in (report, whole))
    apart = np.hypot(*(moves - expected))
    assert np.median(apart) < 0.005
    assert np.quantile(apart, 0.99) < 0.02
    written = ta.open_stack(tmp_path / "out")
    np.testing.assert_array_equal(written[0], cube[0])
    np.testing.assert_array_equal(written, ta.apply(cube, report))  # row by row as at once
    difference = np.abs(written[1, 0].astype(float) - aligned[1, 0].astype(float)).values[15:-15, 15:-15]
    assert np.median(difference) < 3
    assert np.quantile(difference, 0.99) < 15


@pytest.mark.parametrize(
    ("tile", "before"),
    [
        (115, ()),
        (70, (ta.PCC(),)),
        pytest.param(115, (ta.PCC(),), marks=pytest.mark.slow),
        pytest.param(70, (), marks=pytest.mark.slow),
    ],
)
def test_long_local_shifts_do_not_speak_against_their_start(tmp_path, monkeypatch, tile, before):
    """Tiles disagree by more than half a pixel, and parts of one too; the field is what they disagree by."""
    monkeypatch.setattr(tiles, "_TILE", tile)
    warped_files(tmp_path / "in", (230, 210), 8, length=2.5)
    last = ta.Local(spacing=8, max_deviation=5)
    aligner = ta.Cascade(*before, last) if before else last
    _, start = ta.io.align_scenes(tmp_path / "in", tmp_path / "start", "first", ta.PCC())
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", aligner)
    _, whole = ta.align(ta.open_stack(tmp_path / "in"), "first", aligner)
    assert start.status[1] != ta.Status.OK
    assert report.status.values.tolist() == whole.status.values.tolist() == [0, 0]
    assert 0 < report.sigma[1] < 0.05
    assert report.score[1] > 0.99
    moves, expected = (displacement_of(one, (230, 210))[1][..., 20:-20, 20:-20] for one in (report, whole))
    assert np.abs(expected - expected.mean((1, 2), keepdims=True)).max() > 2
    assert np.median(np.hypot(*(moves - expected))) < 0.02


@pytest.mark.parametrize("reason", ["too long", "no gain"])
def test_where_the_field_is_not_kept_the_start_is_judged_alone(tmp_path, monkeypatch, reason):
    monkeypatch.setattr(tiles, "_TILE", 115)
    if reason == "no gain":  # by start and field over no warp at all
        monkeypatch.setattr(ta.Local, "compare", lambda *_: torch.tensor([[0.1, 0.1]]))
    warped_files(tmp_path / "in", (230, 210), 8, length=2.5)
    aligner = ta.Local(spacing=8, max_deviation=0.5 if reason == "too long" else 5)
    _, report = ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", aligner)
    assert report.status.values.tolist() == [0, int(ta.Status.AMBIGUOUS)]
    assert np.isinf(report.sigma[1])
    np.testing.assert_array_equal(ta.open_stack(tmp_path / "out"), ta.open_stack(tmp_path / "in"))


def test_strips_are_read_once_and_counted(tmp_path, monkeypatch):
    """A strip of the reference and one of the other frame, for a row of tiles; rows are written one by one."""
    monkeypatch.setattr(local, "_LARGEST_TILE", 12)
    monkeypatch.setattr(tiles, "_TILE", 96)
    warped_files(tmp_path / "in", (230, 210), 8)
    told, reads, read = [], [], Reading.pixels

    @contextlib.contextmanager
    def progress(wanted, steps, *words):
        told.append(steps)
        yield lambda steps: told.append(-steps)

    monkeypatch.setattr(ta.io, "progress_bar", progress)
    monkeypatch.setattr(Reading, "pixels", lambda self, rows: reads.append(rows) or read(self, rows))
    ta.io.align_scenes(tmp_path / "in", tmp_path / "out", "first", ta.Local(spacing=8))
    windows = local.Mosaic((230, 210), 8).windows()
    down, across = (len({part.start for part in parts}) for parts in zip(*windows, strict=True))
    rows, blocks = len(tiles._grid((230, 210))), len(tiles._row_blocks((230, 210), 1))
    assert across > 1
    assert sum(told) == 0
    assert told[0] == 2 * rows + down + rows + 2 * blocks
    assert len(reads) == 2 * rows + 2 * (down + rows) + 2 * blocks


@pytest.mark.slow
def test_a_large_scene(tmp_path, monkeypatch):
    check(tmp_path / "in", tmp_path / "out", (3000, 3000), ta.PCC(), monkeypatch, 0.01)
