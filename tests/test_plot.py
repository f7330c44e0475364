import datetime
import math
import shutil
import subprocess

import numpy as np
import pytest
import xarray as xr

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from matplotlib.collections import EllipseCollection, PathCollection
from matplotlib.figure import Figure
from PIL import Image

import torchalign as ta
from torchalign import plot
from torchalign.datasets import simulate_stack
from torchalign.pictures import frames, style


@pytest.fixture(scope="module")
def stack():
    """What ta.align took and gave, with the truth; frame 2 is empty and hence flagged."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 4, 240, 240, generator=generator)
    scene = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)[0]
    simulated = simulate_stack(
        scene, frames=6, size=(72, 64), factor=2, noise=0.002, gain=(0.97, 1.03), offset=0
    )
    values = simulated.cube.numpy().copy()
    values[2] = 0.5
    values[3, :, :10, :10] = np.nan
    time = np.datetime64("2020-01-01", "ns") + np.arange(6) * np.timedelta64(5, "D")
    coords = {"time": time, "band": ["B02", "B03", "B04", "B08"]}
    cube = xr.DataArray(values, coords, ("time", "band", "y", "x"), name="reflectance")
    reference = xr.DataArray(simulated.reference.numpy(), dims=("band", "y", "x"))
    aligned, report = ta.align(cube, reference)
    return cube, aligned, report, simulated.shift.numpy()


def rendered(figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(50)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def labels(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_shift_scatter(stack):
    *_, report, truth = stack
    figure = plot.shift_scatter(report, true_shift=truth)
    assert isinstance(figure, Figure)
    ax = figure.axes[0]
    assert labels(ax) == ["truth", "OK (5), with 10 σ", "NO_TEXTURE (1)"]
    circles, flagged = (item for item in ax.collections if isinstance(item, PathCollection))
    np.testing.assert_allclose(circles.get_offsets(), truth, atol=1e-6)
    # a flagged frame is shown where it should have been found
    np.testing.assert_allclose(flagged.get_offsets(), truth[2:3], atol=1e-6)
    points = ax.containers[0].lines[0]
    found = np.stack([report.shift_x, report.shift_y], -1)[[0, 1, 3, 4, 5]]
    np.testing.assert_allclose(np.stack(points.get_data(), -1), found, atol=1e-6)
    assert ax.yaxis_inverted()  # y is down, as in the image
    assert "pixels" in ax.get_xlabel()
    assert (rendered(figure) < 255).any()


def test_ellipses_of_sigma(stack):
    *_, report, truth = stack
    count = len(truth)
    angle, axes = math.radians(30), np.array([0.5, 0.1])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    covariance = np.broadcast_to(turn @ np.diag(axes**2) @ turn.T, (count, 2, 2))
    wide = report.assign(covariance=(("time", "axis", "other_axis"), covariance))
    for figure in (plot.shift_scatter(wide), plot.shift_error(wide, truth)):
        (drawn,) = (item for item in figure.axes[0].collections if isinstance(item, EllipseCollection))
        np.testing.assert_allclose(drawn.get_widths(), 1.0)  # whole axes, in pixels
        np.testing.assert_allclose(drawn.get_heights(), 0.2)
        np.testing.assert_allclose(drawn.get_angles() % 180, 30)
        assert len(drawn.get_offsets()) == count - 1  # the flagged frame has none
    # bars along time are those of each axis
    bars = [part.lines[2][0].get_segments() for part in plot.shifts_over_time(wide).axes[0].containers]
    halves = [0.5 * np.ptp(np.array(axis), 1)[:, 1] for axis in bars]
    np.testing.assert_allclose(halves[0], math.sqrt(covariance[0, 0, 0]))
    np.testing.assert_allclose(halves[1], math.sqrt(covariance[0, 1, 1]))
    # small ones are magnified, and the legend says so
    small = report.assign(covariance=(("time", "axis", "other_axis"), 1e-4 * covariance))
    ax = plot.shift_scatter(small).axes[0]
    assert labels(ax)[0] == "OK (5), with 100 σ"
    (drawn,) = (item for item in ax.collections if isinstance(item, EllipseCollection))
    np.testing.assert_allclose(drawn.get_widths(), 1.0)


def test_shift_scatter_without_truth_puts_the_flagged_where_they_are(stack):
    *_, report, _ = stack
    ax = plot.shift_scatter(report).axes[0]
    (flagged,) = (item for item in ax.collections if isinstance(item, PathCollection))
    np.testing.assert_allclose(flagged.get_offsets(), [[0, 0]])


def test_shift_error_shows_the_error(stack):
    *_, report, truth = stack
    unknown = truth.copy()
    unknown[0] = np.nan
    ax = plot.shift_error(report, unknown).axes[0]
    points = np.stack(ax.containers[0].lines[0].get_data(), -1)
    found = np.stack([report.shift_x, report.shift_y], -1)
    np.testing.assert_allclose(points, (found - truth)[[1, 3, 4, 5]], atol=1e-6)
    # every frame is counted once
    assert labels(ax) == ["found − true, with σ (4)", "OK, no truth to compare with (1)", "NO_TEXTURE (1)"]
    assert f"{np.median(np.hypot(*points.T)):.4f}" in ax.get_title()


def test_functions_draw_into_given_axes(stack):
    *_, report, truth = stack
    figure = Figure()
    axes = figure.subplots(2, 2).ravel()
    assert plot.shift_scatter(report, ax=axes[0]) is figure
    assert plot.shift_error(report, truth, ax=axes[1]) is figure
    assert plot.shifts_over_time(report, true_shift=truth, ax=axes[2]) is figure
    assert plot.score_gain(report, ax=axes[3]) is figure
    assert all(ax.get_title() for ax in axes)
    rendered(figure)


def test_shifts_over_time_has_dates(stack):
    *_, report, truth = stack
    figure = plot.shifts_over_time(report, true_shift=truth)
    rendered(figure)
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert any("2020" in tick or "Jan" in tick for tick in ticks)


def test_every_status_has_its_own_look():
    looks = {(style.STATUS_COLOUR[code], style.STATUS_MARKER[code]) for code in ta.Status}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(ta.Status)
    count = len(ta.Status)
    fields = {
        name: ("time", np.linspace(0, 1, count)) for name in ("shift_x", "shift_y", "score", "score_before")
    }
    status = ("time", np.array(list(ta.Status), np.int8))
    report = xr.Dataset({**fields, "sigma": ("time", np.full(count, np.inf)), "status": status})
    for draw in (plot.shift_scatter, plot.shifts_over_time, plot.score_gain):
        figure = draw(report)
        rendered(figure)
        words = " ".join(labels(figure.axes[0]))
        assert all(code.name in words for code in ta.Status if code != ta.Status.OK)


def test_before_after_compares_the_same_frames_with_the_same_colours(stack):
    cube, aligned, report, _ = stack
    figure = plot.before_after(cube, aligned, report=report)
    before, after, *_ = figure.axes
    assert figure.get_suptitle() == "median over time of 5 frames (bands B04, B03, B02)"
    kept = report.status.values == 0
    median = np.nanmedian(aligned.values[kept], 0)[[2, 1, 0]].transpose(1, 2, 0)
    low, high = np.percentile(median.reshape(-1, 3), (1, 99), axis=0)
    expected = np.clip((median - low) / (high - low), 0, 1)
    np.testing.assert_allclose(after.images[0].get_array(), expected, atol=1e-4)
    median = np.nanmedian(cube.values[kept], 0)[[2, 1, 0]].transpose(1, 2, 0)
    expected = np.clip((median - low) / (high - low), 0, 1)
    np.testing.assert_allclose(before.images[0].get_array(), expected, atol=1e-4)
    # aligned frames make the sharper median, and the title says so
    assert float(after.get_title().split("×")[1]) > 1.1
    rendered(figure)


def test_bands_and_dims_are_found_by_name(stack):
    cube, aligned, *_ = stack
    by_label = plot.before_after(cube, aligned, bands=["B08", "B04", "B03"])
    by_number = plot.before_after(cube, aligned, bands=(3, 2, 1))
    turned = plot.before_after(
        cube.transpose("x", "band", "y", "time").rename(x="lon", y="lat", time="t"),
        aligned.transpose("x", "band", "y", "time").rename(x="lon", y="lat", time="t"),
        bands=(3, 2, 1),
    )
    pictures = [figure.axes[1].images[0].get_array() for figure in (by_label, by_number, turned)]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
    nameless = plot.before_after(
        cube.drop_vars("band"), aligned.drop_vars("band")
    )  # (3, 2, 1), the library's
    assert np.array_equal(nameless.axes[1].images[0].get_array(), pictures[0])
    grey = plot.before_after(cube.isel(band=0), aligned.isel(band=0), statistic="mean")
    image = grey.axes[1].images[0].get_array()
    assert np.array_equal(image[..., 0], image[..., 2])


def test_integers_with_nodata(stack):
    cube, aligned, *_ = stack
    raw = [(array.fillna(0) * 10_000).clip(0).astype(np.uint16) for array in (cube, aligned)]
    for array in raw:
        array.attrs["_FillValue"] = 0
    raw[0][:, :, 0, 0] = 0
    image = plot.before_after(*raw).axes[0].images[0].get_array()
    np.testing.assert_allclose(image[0, 0], frames.NODATA_GREY)
    assert len(np.unique(image)) > 100


def test_zoom(stack):
    cube, aligned, *_ = stack
    figure = plot.before_after(cube, aligned, zoom=(5, 7, 20))
    whole, part = figure.axes[1].images[0].get_array(), figure.axes[3].images[0].get_array()
    assert np.array_equal(part, whole[5:25, 7:27])
    picture = np.zeros((64, 80, 3))
    picture[40:56, 20:36] = np.random.default_rng(0).random((16, 16, 1))
    row, column, side = frames.find_zoom(picture)
    assert side == 16
    assert abs(row - 40) <= 1
    assert abs(column - 20) <= 1


def test_shift_scatter_splits_at_a_date(stack):
    *_, report, _ = stack  # 2020-01-01, -06, -11 (flagged), -16, -21, -26
    shift = np.stack([report.shift_x, report.shift_y], -1)
    for split in ("2020-01-06", np.datetime64("2020-01-06"), datetime.date(2020, 1, 6)):
        ax = plot.shift_scatter(report, split=split).axes[0]
        early, late = (np.stack(bars.lines[0].get_data(), -1) for bars in ax.containers)
        np.testing.assert_allclose(early, shift[:2], atol=1e-6)  # the day itself is before
        np.testing.assert_allclose(late, shift[3:], atol=1e-6)
        crosses = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "+"]
        np.testing.assert_allclose(crosses, [np.median(early, 0), np.median(late, 0)], atol=1e-6)
        assert "to 2020-01-06 (2)" in labels(ax)[0]
        assert "after 2020-01-06 (3)" in labels(ax)[1]
    early, late = (line.get_color() for line in ax.lines if line.get_marker() == "+")
    assert early != late
    # an hour of that day, and a time coordinate without dates
    hours = report.assign_coords(time=report.time + np.timedelta64(10, "h"))
    assert "to 2020-01-06 (2)" in labels(plot.shift_scatter(hours, split="2020-01-06").axes[0])[0]
    assert "(1)" in labels(plot.shift_scatter(hours, split="2020-01-06T09").axes[0])[0]
    numbers = report.assign_coords(time=np.arange(6) * 10)
    assert "to 20 (2)" in labels(plot.shift_scatter(numbers, split=20).axes[0])[0]
    assert "to 3 (3)" in labels(plot.shift_scatter(report.drop_vars("time"), split=3).axes[0])[0]


def test_before_after_of_one_frame(stack):
    cube, aligned, report, _ = stack
    by_label = plot.before_after(cube, aligned, frame="2020-01-16", report=report)
    by_number = plot.before_after(cube, aligned, frame=3, report=report)
    assert by_label.get_suptitle() == "2020-01-16 (bands B04, B03, B02)"
    assert np.array_equal(by_label.axes[0].images[0].get_array(), by_number.axes[0].images[0].get_array())
    after = aligned.values[3, [2, 1, 0]].transpose(1, 2, 0)
    low, high = np.percentile(after[np.isfinite(after).all(-1)], (1, 99), axis=0)
    for picture, ax in zip((cube, aligned), by_number.axes, strict=False):
        values = picture.values[3, [2, 1, 0]].transpose(1, 2, 0)
        expected = np.clip((values - low) / (high - low), 0, 1)
        seen = np.isfinite(values)
        np.testing.assert_allclose(ax.images[0].get_array()[seen], expected[seen], atol=1e-4)
    assert f"{float(report.score[3]):.2f}" in by_number.axes[1].get_title()
    assert "not moved: NO_TEXTURE" in plot.before_after(cube, aligned, frame=2, report=report).get_suptitle()


def test_pictures_go_into_given_axes(stack):
    cube, aligned, *_ = stack
    figure = Figure()
    axes = figure.subplots(3, 2)
    assert plot.before_after(cube, aligned, ax=axes[:2]) is figure
    assert plot.temporal_profile(cube, aligned, column=4, ax=axes[2]) is figure
    assert [len(ax.images) for ax in axes.ravel()] == [1] * 6
    assert not figure.get_suptitle()
    pair = Figure().subplots(1, 2)
    plot.before_after(cube, aligned, ax=pair)
    assert not pair[0].patches  # nothing is magnified, so nothing is marked
    assert np.array_equal(pair[0].images[0].get_array(), axes[0, 0].images[0].get_array())


def test_temporal_profile_is_a_slice(stack):
    cube, aligned, report, _ = stack
    kept = report.status.values == 0
    options = {"bands": ["B08"], "report": report, "equalize": False}
    figure = plot.temporal_profile(cube, aligned, row=30, column=-1, **options)
    pictures = [ax.images[0].get_array()[..., 0] for ax in figure.axes]
    row, column = (cube.values[kept, 3, 30], cube.values[kept, 3, :, -1])
    # time is down for a row, and to the right for a column; black and white are the median's
    for picture, values in ((pictures[0], row), (pictures[2], column.T)):
        inside = (picture > 0.12) & (picture < 0.7)  # what is brighter is compressed
        assert picture.shape == values.shape
        slope, offset = np.polyfit(values[inside], picture[inside], 1)
        np.testing.assert_allclose(slope * values[inside] + offset, picture[inside], atol=1e-3)
    # the shifts of up to three pixels are gone, and the number says so
    before, after = (float(ax.get_title().split()[-1]) for ax in figure.axes[:2])
    assert after > before + 0.1
    assert after > 0.97
    oracle = [np.corrcoef(stripe, np.median(row, 0))[0, 1] for stripe in row]
    assert before == pytest.approx(np.mean(oracle), abs=6e-4)
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks == [str(date)[:10] for date in cube.time.values[kept]]
    rendered(figure)


def test_temporal_profile_chooses_and_equalizes():
    values = np.zeros((5, 30, 40))
    values[:, 12] = np.arange(40) % 2
    values[:, :, 33] = (np.arange(30) % 3)[None]
    light = np.array([1, 3, 0.5, 2, 1])[:, None, None]
    lit = xr.DataArray(values * light + light, dims=("time", "y", "x"))
    titles = [ax.get_title() for ax in plot.temporal_profile(lit, lit).axes]
    assert "row 12" in titles[0]
    assert "column 33" in titles[2]
    picture = plot.temporal_profile(lit, lit, row=12).axes[0].images[0].get_array()
    assert np.abs(picture - picture[0]).max() < 1e-5  # the same in any light
    raw = plot.temporal_profile(lit, lit, row=12, equalize=False).axes[0].images[0].get_array()
    assert np.abs(raw - raw[0]).max() > 0.3


def test_a_profile_loads_one_row_only(stack):
    dask = pytest.importorskip("dask.array")
    cube, aligned, *_ = stack
    loaded = []

    def look(block, block_info=None):
        loaded.append(block.shape)
        return block

    watched = [
        array.copy(data=dask.from_array(array.values, chunks=(2, 4, 8, 64)).map_blocks(look, dtype="float32"))
        for array in (cube, aligned)
    ]
    loaded.clear()
    plot.temporal_profile(*watched, row=3)
    assert 0 < sum(np.prod(shape) for shape in loaded) <= 2 * cube.size // 9


@pytest.mark.parametrize("with_truth", [True, False])
def test_summary(stack, with_truth):
    cube, aligned, report, truth = stack
    figure = plot.summary(cube, aligned, report, true_shift=truth if with_truth else None)
    assert "5 of 6 frames aligned, 1 flagged" in figure.get_suptitle()
    titles = " ".join(ax.get_title() for ax in figure.axes)
    assert ("Error" in titles) == with_truth
    assert ("Score" in titles) != with_truth
    words = [ax.get_xlabel() for ax in figure.axes]
    assert words.count("NO_TEXTURE") == 1  # under its thumbnail
    image = rendered(figure)
    assert len(np.unique(image.reshape(-1, 4), axis=0)) > 1000


def test_summary_when_nothing_was_aligned(stack):
    cube, _, report, _ = stack
    report = report.copy()
    report["status"] = report.status * 0 + 3
    report["score"] = report.score * 0
    image = rendered(plot.summary(cube, cube, report))
    assert len(np.unique(image.reshape(-1, 4), axis=0)) > 1000  # a picture, not a blank page


def test_animate(stack, tmp_path):
    cube, aligned, report, _ = stack
    path = plot.animate(cube, aligned, tmp_path / "a.gif", report=report, panel=128, frames_per_second=4)
    with Image.open(path) as gif:
        assert gif.n_frames == 6
        assert gif.info["duration"] == 250
        assert gif.width == 2 * 128 + 6
        frames = [np.asarray((gif.seek(number), gif.convert("RGB"))[1]) for number in range(6)]
    assert (frames[0] != frames[1]).any()
    assert (frames[0][:26, -40:] == 255).all()  # paper stays white
    assert [item.name for item in tmp_path.iterdir()] == ["a.gif"]
    zoomed = plot.animate(cube, aligned, str(tmp_path / "b.gif"), zoom=(4, 4, 32), panel=64)
    with Image.open(zoomed) as gif:
        assert gif.size == (2 * 64 + 6, 64 + 26)


def gif_frames(path) -> list[np.ndarray]:
    with Image.open(path) as gif:
        return [np.asarray((gif.seek(number), gif.convert("RGB"))[1]) for number in range(gif.n_frames)]


@pytest.mark.parametrize(("along", "axis"), [("y", 1), ("x", 2)])
def test_animate_through_the_profiles(stack, tmp_path, along, axis):
    cube, aligned, report, _ = stack
    few = {"bands": [3], "zoom": (10, 10, 12), "panel": 48, "report": report}
    frames = gif_frames(plot.animate(cube, aligned, tmp_path / "a.gif", along=along, **few))
    assert len(frames) == 12
    part = cube.values[report.status.values == 0, 3, 10:22, 10:22]
    stripes = part[:, 5] if along == "y" else part[:, :, 5]
    stripes = (stripes - stripes.mean(1, keepdims=True)) / stripes.std(1, keepdims=True)
    shown = frames[5][26:, :48, 0].astype(float)
    shown = shown if along == "y" else shown.T  # time down
    step = shown.shape[0] // 5
    shown = shown[step // 2 :: step, 2::4][:5]
    assert np.corrcoef(shown.ravel(), stripes.ravel())[0, 1] > 0.95


def test_animate_counts_its_loops(stack, tmp_path):
    cube, aligned, *_ = stack
    for loop, written in ((0, 0), (1, None), (3, 2)):  # a GIF counts repetitions
        path = plot.animate(cube, aligned, tmp_path / "a.gif", loop=loop, panel=64)
        with Image.open(path) as gif:
            assert gif.info.get("loop") == written


def test_animate_mp4(stack, tmp_path):
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg on this machine")
    cube, aligned, report, _ = stack
    path = plot.animate(cube, aligned, tmp_path / "a.mp4", report=report, panel=64, zoom=(0, 0, 63))
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]
    still = tmp_path / "still-%d.png"
    done = subprocess.run(["ffmpeg", "-v", "error", "-i", path, still], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    stills = sorted(tmp_path.glob("still-*.png"))
    frames = gif_frames(
        plot.animate(cube, aligned, tmp_path / "a.gif", report=report, panel=64, zoom=(0, 0, 63))
    )
    assert len(stills) == len(frames) == 6
    for still, frame in zip(stills, frames, strict=True):
        height, width = frame.shape[:2]
        with Image.open(still) as image:
            assert image.size == (width + width % 2, height + height % 2)  # H.264 wants even sizes
            film = np.asarray(image.convert("L"), np.float64)[:height, :width]  # colour has half the pixels
        grey = np.asarray(Image.fromarray(frame).convert("L"), np.float64)
        assert np.abs(film - grey).mean() < 6


def test_mp4_without_ffmpeg_is_a_clear_error(stack, tmp_path, monkeypatch):
    cube, aligned, *_ = stack
    monkeypatch.setattr("matplotlib.animation.FFMpegWriter.isAvailable", lambda: False)
    with pytest.raises(ImportError, match=r"expected the program ffmpeg.*got none.*write a \.gif"):
        plot.animate(cube, aligned, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_animate_makes_the_folder_and_a_file_that_others_can_read(stack, tmp_path):
    cube, aligned, *_ = stack
    path = plot.animate(cube, aligned, tmp_path / "new" / "folder" / "a.gif", panel=64)
    assert [item.name for item in path.parent.iterdir()] == ["a.gif"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_animate_leaves_nothing_half_written(stack, tmp_path, monkeypatch):
    cube, aligned, *_ = stack
    path = tmp_path / "a.gif"
    path.write_bytes(b"an older picture")

    def fail(self, file, *args, **kwargs):
        file.write(b"GIF8")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        plot.animate(cube, aligned, path)
    assert path.read_bytes() == b"an older picture"
    assert [item.name for item in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda cube, report: plot.shift_scatter(cube), TypeError),
        (lambda cube, report: plot.shift_scatter(report.drop_vars("sigma")), ValueError),
        (lambda cube, report: plot.shift_scatter(report, true_shift=np.zeros((5, 2))), ValueError),
        (lambda cube, report: plot.shift_error(report, None), ValueError),
        (lambda cube, report: plot.before_after(cube.values, cube), TypeError),
        (lambda cube, report: plot.before_after(cube, cube.isel(time=slice(3))), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, report=report.isel(time=slice(3))), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, bands=(0, 1)), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, bands=(0, 1, 4)), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, bands=("B02", "B03", "B99")), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, statistic="mode"), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, stretch=(99, 1)), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, zoom=(60, 0, 20)), ValueError),
        (lambda cube, report: plot.before_after(cube.rename(x="u"), cube.rename(x="u")), ValueError),
        (lambda cube, report: plot.shift_scatter(report, split="soon"), ValueError),
        (lambda cube, report: plot.shift_scatter(report, split=3), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, frame="1999-01-01"), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, frame=6), ValueError),
        (lambda cube, report: plot.before_after(cube, cube, ax=Figure().subplots(1, 3)), ValueError),
        (lambda cube, report: plot.temporal_profile(cube.values, cube), TypeError),
        (lambda cube, report: plot.temporal_profile(cube[:0], cube[:0]), ValueError),
        (lambda cube, report: plot.temporal_profile(cube, cube.values), TypeError),
        (lambda cube, report: plot.temporal_profile(cube, cube.isel(x=slice(9))), ValueError),
        (lambda cube, report: plot.temporal_profile(cube, cube, row=72), ValueError),
        (lambda cube, report: plot.temporal_profile(cube, cube, column=1.5), TypeError),
        (
            lambda cube, report: plot.temporal_profile(cube, cube, row=1, ax=Figure().subplots(2, 2)),
            ValueError,
        ),
        (lambda cube, report: plot.animate(cube, cube, "a.gif", along="band"), ValueError),
        (lambda cube, report: plot.animate(cube, cube, "a.gif", loop=-1), ValueError),
        (lambda cube, report: plot.animate(cube, cube, "a.png"), ValueError),
        (lambda cube, report: plot.animate(cube.isel(time=[]), cube.isel(time=[]), "a.gif"), ValueError),
        (lambda cube, report: plot.animate(cube, cube, "a.gif", frames_per_second=0), ValueError),
    ],
)
def test_bad_input(stack, call, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cube, _, report, _ = stack
    with pytest.raises(error, match=r"expected .*got .*; "):
        call(cube, report)
    assert not list(tmp_path.iterdir())


def test_a_figure_shows_itself_in_a_notebook(stack):
    *_, report, _ = stack
    assert plot.shift_scatter(report)._repr_png_().startswith(b"\x89PNG")
