import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

import torchalign as ta
from torchalign import plot
from torchalign.datasets import simulate_stack


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
    assert labels(ax) == ["truth", "OK (5), with σ", "NO_TEXTURE (1)"]
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
    assert "4" in labels(ax)[0]
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
    looks = {(plot._STATUS_COLOUR[code], plot._STATUS_MARKER[code]) for code in ta.Status}
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
    assert "5 frames, bands B04, B03, B02" in figure.get_suptitle()
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
    np.testing.assert_allclose(image[0, 0], plot._NODATA_GREY)
    assert len(np.unique(image)) > 100


def test_zoom(stack):
    cube, aligned, *_ = stack
    figure = plot.before_after(cube, aligned, zoom=(5, 7, 20))
    whole, part = figure.axes[1].images[0].get_array(), figure.axes[3].images[0].get_array()
    assert np.array_equal(part, whole[5:25, 7:27])
    picture = np.zeros((64, 80, 3))
    picture[40:56, 20:36] = np.random.default_rng(0).random((16, 16, 1))
    row, column, side = plot._find_zoom(picture)
    assert side == 16
    assert abs(row - 40) <= 1
    assert abs(column - 20) <= 1


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


def test_no_global_state():
    # pyplot keeps figures alive and picks a window system; a library must not
    code = (
        "import sys, numpy as np, xarray as xr, torchalign.plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "z = xr.Variable('time', np.zeros(2)); names = 'shift_x shift_y score score_before sigma status'\n"
        "torchalign.plot.shift_scatter(xr.Dataset(dict.fromkeys(names.split(), z)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_figure_shows_itself_in_a_notebook(stack):
    *_, report, _ = stack
    assert plot.shift_scatter(report)._repr_png_().startswith(b"\x89PNG")
