"""Coming from satalign: every row of the table in docs/migrate, done. Where it is installed, satalign is the oracle."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import torchalign as ta
from torchalign.datasets import simulate_stack
from torchalign.functional.channels import center_crop, extract_channel

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migrate" / "satalign.md"
ROWS: dict[str, str] = {}  # name in satalign → the test of its row

# satalign 0.1.17, all that is public
CLASSES = {"PCC", "ECC", "LGM", "SatAlign"}
METHODS = {
    *("run", "run_xarray", "run_numpy", "run_multicore", "run_multicore_xarray", "run_multicore_numpy"),
    *("get_warped_image", "find_warp", "warp_feature", "create_layer", "is_translation_large"),
    *("spatial_setup_model", "get_reference_points"),
}
OPTIONS = {
    *(
        "datacube",
        "reference",
        "channel",
        "interpolation",
        "crop_center",
        "rgb_bands",
        "border_mode",
        "num_threads",
    ),
    *("max_translations", "border_value", "warning_status", "upsample_factor", "space", "disambiguate"),
    *(
        "overlap_ratio",
        "criteria",
        "gauss_kernel_size",
        "feature_model",
        "matcher_model",
        "max_num_keypoints",
    ),
    "device",
}
HELPERS = {
    *("create_array", "load_array", "warp2df", "plot_s2_scatter", "plot_rgb", "plot_profile"),
    *("plot_animation1", "plot_animation2"),
}


def row(*names):
    """A test of what these are in torchalign."""

    def mark(function):
        ROWS.update(dict.fromkeys(names, function.__name__))
        return function

    return mark


@pytest.fixture(scope="module")
def stack():
    """A scene in four bands at known shifts: (T, C, H, W) float32 and uint16 with dates, and the truth."""
    generator = torch.Generator().manual_seed(1)
    scene = torch.nn.functional.avg_pool2d(torch.rand(1, 4, 330, 330, generator=generator), 9, 1, 4)[0]
    return simulate_stack(
        scene, frames=6, size=(96, 88), factor=3, noise=0.001, gain=(1, 1), offset=0, seed=2
    )


@pytest.fixture(scope="module")
def cube(stack):
    time = np.datetime64("2022-01-01", "ns") + np.arange(6) * np.timedelta64(10, "D")
    coords = {"time": time, "band": ["B2", "B3", "B4", "B8"]}
    return xr.DataArray(stack.cube.numpy(), coords, ("time", "band", "y", "x"), name="reflectance")


@pytest.fixture(scope="module")
def reference(stack):
    return xr.DataArray(stack.reference.numpy(), dims=("band", "y", "x"))


@pytest.fixture(scope="module")
def pair(cube, reference):
    return ta.align(cube, reference, ta.PCC())


def satalign():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("satalign", reason="satalign, the oracle, is not installed")


# --- classes and methods ---


@row("PCC", "run", "run_xarray", "run_numpy", "datacube", "reference")
def test_pcc(cube, reference, stack, pair):
    aligned, report = pair
    assert np.abs(report.warp.values[..., 2] - stack.shift.numpy()).max() < 0.02
    from_tensors, estimate = ta.PCC()(torch.from_numpy(cube.values), torch.from_numpy(reference.values))
    np.testing.assert_allclose(from_tensors, aligned, atol=1e-5)
    np.testing.assert_allclose(estimate.warp, report.warp, atol=1e-4)


def test_the_matrices_are_those_of_satalign(cube, reference, pair):
    pcc = satalign().PCC(datacube=cube, reference=reference, channel="mean", max_translations=5.0)
    warped, warps = pcc.run()
    aligned, report = pair
    np.testing.assert_allclose(report.warp, np.stack(warps), atol=0.15)  # satalign pulls towards whole pixels
    inside = (..., slice(8, -8), slice(8, -8))
    again = ta.apply(cube, np.stack(warps))
    assert np.abs(again.values[inside] - warped.values[inside]).max() < 0.01  # OpenCV's table has 1/32 pixel
    assert aligned.dims == warped.dims


@row("ECC", "criteria", "gauss_kernel_size")
def test_ecc(cube, reference, stack):
    aligner = ta.ECC(motion="translation", max_iterations=10, tolerance=0.005, gauss_kernel_size=3)
    _, report = ta.align(cube, reference, aligner)
    assert np.abs(report.warp.values[..., 2] - stack.shift.numpy()).max() < 0.05


@row(
    "LGM",
    "feature_model",
    "matcher_model",
    "max_num_keypoints",
    "spatial_setup_model",
    "get_reference_points",
)
def test_lgm(cube, reference, stack):
    if not hasattr(ta, "LGM"):
        pytest.skip("this release has no LGM yet")
    aligner = ta.LGM(feature_model="sift", matcher_model="guided", max_num_keypoints=256)
    _, report = ta.align(cube, reference, aligner)
    assert np.abs(report.warp.values[..., 2] - stack.shift.numpy()).max() < 0.05


@row("SatAlign")
def test_a_method_of_ones_own(stack):
    from torchalign.aligner import Aligner, Motion
    from torchalign.functional.affine import translation_warp

    class Known(Aligner):
        """The truth, as `find_warp` would return it, for all frames at once."""

        def estimate_motion(self, pair, prepared, init):
            zeros = pair.moving.new_zeros(pair.moving.shape[:-2])
            return Motion(translation_warp(stack.shift.to(pair.moving)), zeros, zeros.long())

    _, estimate = Known()(stack.cube, stack.reference)
    assert estimate.valid.all()
    assert torch.equal(estimate.warp[..., 2], stack.shift)


@row("run_multicore", "run_multicore_xarray", "run_multicore_numpy", "num_threads")
def test_threads_change_nothing(stack):
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(ta.PCC()(stack.cube, stack.reference)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@row("get_warped_image", "find_warp")
def test_one_frame(stack):
    aligner = ta.PCC()
    aligned, estimate = aligner(stack.cube[1:2], stack.reference)
    everything, all_warps = aligner(stack.cube, stack.reference)
    torch.testing.assert_close(aligned, everything[1:2], atol=1e-4, rtol=0)
    torch.testing.assert_close(aligner.estimate(stack.cube[1:2], stack.reference).warp, estimate.warp)
    torch.testing.assert_close(estimate.warp, all_warps.warp[1:2], atol=1e-3, rtol=0)


@row("warp_feature", "interpolation", "border_mode", "border_value")
def test_warp(stack):
    cv2 = pytest.importorskip("cv2")
    image, matrix = stack.cube[0], torch.tensor([[1.0, 0.0, 1.25], [0.0, 1.0, -0.5]])
    cases = [
        ("nearest", cv2.INTER_NEAREST, torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])),
        ("bilinear", cv2.INTER_LINEAR, matrix),
    ]
    for name, flag, warp in cases:
        expected = np.stack(
            [
                cv2.warpAffine(b, warp.numpy(), (88, 96), flags=flag, borderMode=cv2.BORDER_REPLICATE)
                for b in image.numpy()
            ]
        )
        ours = ta.warp(image[None], warp[None], interpolation=name, padding_mode="border")[0]
        assert np.abs(ours.numpy() - expected).max() < 0.01
    filled = ta.warp(image[None], matrix[None], fill_value=7.0)[0]
    assert (filled[:, -1, 0] == 7).all()
    assert set(inspect.signature(ta.PCC).parameters) >= {"interpolation", "padding_mode", "fill_value"}


def test_integers_are_rounded_and_never_wrap():
    values = np.array([[[[0, 65535, 0, 0, 0, 7, 0, 0]] * 8]], np.uint16)
    cube = xr.DataArray(values, dims=("time", "band", "y", "x"))
    warp = np.array([[[1.0, 0.0, 0.3], [0.0, 1.0, 0.0]]])
    moved = ta.apply(cube, warp, interpolation="bicubic").values[0, 0, 4]
    exact = ta.warp(
        torch.from_numpy(values.astype(np.float64)), torch.from_numpy(warp), interpolation="bicubic"
    )
    expected = exact[0, 0, 4].round().clamp(0, 65535).numpy()
    assert (exact < -1).any()  # bicubic undershoots, which satalign wraps to 60 000
    assert np.array_equal(moved, expected)


@row("create_layer", "channel", "rgb_bands", "crop_center")
def test_channels_and_crops(stack, cube, reference):
    image = stack.cube[0]
    for name in ("mean", "luminance", "rgb_mean", 2):
        ours = center_crop(extract_channel(image, name, rgb_bands=(3, 2, 1)), (48, 48))[0]
        assert ours.shape == (48, 48)
        assert ta.PCC(channel=name, rgb_bands=(3, 2, 1), crop_center=48)(stack.cube, stack.reference)[
            1
        ].valid.all()
    assert center_crop(image, (96, 96))[0].shape == (4, 96, 88)  # where satalign's is empty
    road = torch.zeros(3, 9, 9)
    road[:, :, 4:] = 1
    assert extract_channel(road, "gradients").abs().max() > 0.1  # satalign's mixed derivative is 0


def test_channels_are_those_of_satalign(stack, cube, reference):
    module = satalign()
    for name in ("mean", "luminance", "rgb_mean", 2):
        theirs = module.PCC(cube, reference, channel=name, crop_center=48).create_layer(cube.values[0])
        ours = center_crop(extract_channel(stack.cube[0], name, rgb_bands=(3, 2, 1)), (48, 48))[0]
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@row("max_translations", "is_translation_large", "warning_status")
def test_a_frame_too_far_is_left_alone(cube, reference, stack):
    far = np.abs(stack.shift.numpy()).max(1) > 1.5
    assert far.any()
    assert not far.all()
    aligned, report = ta.align(cube, reference, ta.PCC(max_translation=1.5))
    beyond = np.hypot(*stack.shift.numpy().T) > 1.55
    assert np.array_equal(report.status == ta.Status.TOO_FAR, beyond)
    assert np.array_equal(aligned.values[beyond], cube.values[beyond])
    assert (report.warp.values[beyond] == np.eye(2, 3)).all()


@row("upsample_factor")
def test_upsample_factor(stack):
    _, estimate = ta.PCC(upsample_factor=50)(stack.cube, stack.reference)
    steps = estimate.warp[..., 2] * 50
    assert (steps - steps.round()).abs().max() < 1e-3
    assert (estimate.warp[..., 2] - stack.shift).abs().max() < 0.03


@row("space", "disambiguate", "overlap_ratio")
def test_nothing_to_disambiguate(stack):
    # a shift of 40 of 96 pixels would be ambiguous modulo the frame; here it is found, or known to be too far
    moved = torch.roll(stack.reference[None], (0, 40), (-2, -1))
    _, estimate = ta.PCC(max_translation=5)(moved, stack.reference)
    assert estimate.warp[0, :, 2].abs().max() <= 5
    assert not {"space", "disambiguate", "overlap_ratio"} & set(inspect.signature(ta.PCC).parameters)


@row("device")
def test_device(cube, reference, stack):
    _, report = ta.align(cube, reference, device="cpu")
    assert (report.status == 0).all()
    aligned, estimate = ta.PCC()(stack.cube, stack.reference)
    assert aligned.device == estimate.warp.device == stack.cube.device


# --- helpers ---


@pytest.fixture
def folder(cube, tmp_path):
    """As fastcubo writes them: float GeoTIFFs, the date in the name."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import Affine

    transform = Affine(10.0, 0.0, 300_000.0, 0.0, -10.0, 8_000_000.0)
    (tmp_path / "frames").mkdir()
    for frame, date in zip(cube.values, cube.time.values, strict=True):
        path = tmp_path / "frames" / f"{str(date)[:10].replace('-', '')}_S2.tif"
        profile = {"count": 4, "height": 96, "width": 88, "dtype": "float32", "transform": transform}
        with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32718", **profile) as file:
            file.write(frame)
    return tmp_path / "frames"


@row("create_array", "load_array")
def test_create_and_load(folder, cube, tmp_path):
    pytest.importorskip("zarr")
    from torchalign.io import write_cube

    stacked = ta.open_stack(folder)
    assert np.array_equal(stacked.values, cube.values)
    assert np.array_equal(stacked.time, cube.time)
    assert stacked.x.values[0] == 300_005.0  # the centre
    path = write_cube(stacked, tmp_path / "cube.zarr")
    with xr.open_zarr(path) as opened:
        assert np.array_equal(opened[str(next(iter(opened.data_vars)))].values, cube.values)


def test_what_create_array_reads(folder, tmp_path):
    theirs = satalign().utils.create_array(folder, tmp_path / "cube.pickle")
    ours = ta.open_stack(folder)
    assert np.array_equal(ours.values, theirs.values)
    assert [str(day)[:10].replace("-", "") for day in ours.time.values] == theirs.time.values.tolist()
    np.testing.assert_allclose(ours.x - 5, theirs.x)  # half a pixel
    np.testing.assert_allclose(ours.y + 5, theirs.y)


@row("warp2df")
def test_the_table(pair):
    _, report = pair
    table = report[["shift_x", "shift_y"]].to_dataframe()
    after = report["time"] > np.datetime64("2022-01-31")
    assert after.values.tolist() == [False] * 4 + [True] * 2
    np.testing.assert_allclose(table[["shift_x", "shift_y"]], report.warp[..., 2], atol=1e-5)
    module = satalign()
    theirs = module.utils.warp2df(list(report.warp.values), report.time.values)
    np.testing.assert_allclose(theirs[["x", "y"]], table[["shift_x", "shift_y"]], atol=1e-5)
    assert theirs["after"].tolist() == after.values.tolist()


@row("plot_s2_scatter")
def test_scatter(pair):
    pytest.importorskip("matplotlib")
    from torchalign import plot

    _, report = pair
    ax = plot.shift_scatter(report, split="2022-01-31").axes[0]
    before, after = (np.stack(bars.lines[0].get_data(), -1) for bars in ax.containers)
    np.testing.assert_allclose(before, report.warp.values[:4, :, 2], atol=1e-5)
    np.testing.assert_allclose(after, report.warp.values[4:, :, 2], atol=1e-5)


@row("plot_rgb", "rgb_band", "intensity_factor", "index", "dates", "figsize")
def test_rgb(cube, pair):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from torchalign import plot

    axes = Figure(figsize=(10, 5)).subplots(1, 2)
    figure = plot.before_after(cube, pair[0], frame=1, bands=(3, 2, 1), stretch=(2, 98), ax=axes)
    assert figure is axes[0].figure
    picture = np.asarray(axes[0].images[0].get_array())
    raw = cube.values[1, [3, 2, 1]].transpose(1, 2, 0)
    for band in range(3):
        inside = (picture[..., band] > 0.02) & (picture[..., band] < 0.98)
        assert np.corrcoef(picture[..., band][inside], raw[..., band][inside])[0, 1] > 0.9999
    assert plot.before_after(cube, pair[0], frame="2022-01-11").get_suptitle().startswith("2022-01-11")


@row("plot_profile")
def test_profile(cube, pair):
    pytest.importorskip("matplotlib")
    from torchalign import plot

    figure = plot.temporal_profile(cube, pair[0], row=3, bands=(3, 2, 1))
    assert figure.axes[0].images[0].get_array().shape == (6, 88, 3)  # time down, x to the right
    figure = plot.temporal_profile(cube, pair[0], column=3, bands=(3, 2, 1))
    assert figure.axes[0].images[0].get_array().shape == (96, 6, 3)  # y down, time to the right


def test_profiles_lie_as_those_of_satalign(cube, pair):
    pytest.importorskip("matplotlib")
    from torchalign import plot

    module = satalign()
    from matplotlib import pyplot

    for name, axes in (("row", {"x_axis": 3}), ("column", {"y_axis": 3})):
        figure, (ax, _) = module.utils.plot_profile(
            cube.values, cube.values, rgb_band=[3, 2, 1], intensity_factor=1, **axes
        )
        theirs = np.asarray(ax.images[0].get_array())
        pyplot.close(figure)
        options = {"bands": (3, 2, 1), "equalize": False, name: 3}
        ours = np.asarray(plot.temporal_profile(cube, cube, **options).axes[0].images[0].get_array())
        assert ours.shape == theirs.shape
        inside = (ours[..., 0] > 0.15) & (ours[..., 0] < 0.69)
        assert np.corrcoef(ours[..., 0][inside], theirs[..., 0][inside])[0, 1] > 0.999


@row("plot_animation1", "plot_animation2", "gif_delay", "gif_loop", "png_output_folder")
def test_animations(cube, pair, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from torchalign import plot

    small = [array.isel(y=slice(0, 24), x=slice(0, 20)) for array in (cube, pair[0])]
    options = {"bands": (3, 2, 1), "panel": 40, "frames_per_second": 100 / 20}
    for along, count in (("time", 6), ("y", 24), ("x", 20)):
        path = plot.animate(*small, tmp_path / f"{along}.gif", along=along, loop=0, **options)
        with image.open(path) as gif:
            assert gif.n_frames == count
            assert gif.info["duration"] == 200  # milliseconds, of `gif_delay=20`
            assert gif.info["loop"] == 0
    assert len(list(tmp_path.iterdir())) == 3


# --- the table itself ---


def table_rows() -> dict[str, str]:
    """Name in satalign → the torchalign side, of the table in the docs."""
    rows = {}
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) >= 2:
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1])
    return rows


def test_every_row_has_its_test_and_every_name_its_row():
    rows = table_rows()
    assert set(rows) == set(ROWS)
    assert set(rows) >= CLASSES | METHODS | OPTIONS | HELPERS
    assert all(rows.values())
    assert all(callable(globals()[name]) for name in ROWS.values())


def test_the_names_are_those_of_satalign():
    module = satalign()
    base = module.PCC.__mro__[1]
    public = {
        name
        for each in (module.PCC, module.ECC, module.LGM)
        for name in dir(each)
        if not name.startswith("_")
    }
    assert public == METHODS
    options = {
        name
        for each in (base, module.PCC, module.ECC, module.LGM)
        for name in inspect.signature(each.__init__).parameters
        if name not in ("self", "kwargs")
    }
    assert options == OPTIONS
    helpers = {
        name
        for name, each in vars(module.utils).items()
        if inspect.isfunction(each) and each.__module__ == "satalign.utils"
    }
    assert helpers == HELPERS
    assert {*module.__all__} - {"utils"} | {base.__name__} == CLASSES


def test_the_names_on_the_right_are_there():
    right = " ".join(table_rows().values())
    for name in re.findall(r"\bta\.(\w+)", right):
        if name != "LGM":  # see the footnote
            assert hasattr(ta, name), name
    pytest.importorskip("matplotlib")
    from torchalign import plot

    for name in re.findall(r"\bplot\.(\w+)", right):
        assert hasattr(plot, name), name
