"""The pictures of the README and of "How it works", made from real and simulated data.

python docs/pictures/make.py [NAME ...]      (needs the extra `demo`; `network` also the real series in ../shared)

`hero`, `peak`, `second_pass`, `bias`, `cascade`, `network`: each writes NAME.png beside this file.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import torchalign as ta
from torchalign.datasets import demo_stack, open_demo_scene, simulate_stack, simulate_warped_stack
from torchalign.functional.affine import to_homogeneous, transform_points
from torchalign.functional.phase import phase_correlation

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BLUE, ORANGE, GREY, GREEN = "#0072b2", "#e69f00", "#888888", "#009e73"
plt.rcParams |= {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}


def colour(image: np.ndarray) -> np.ndarray:
    """(bands B02, B03, B04, B08; H, W) → (H, W, 3), stretched."""
    rgb = image[[2, 1, 0]]
    low, high = np.nanpercentile(rgb, (1, 99))
    return np.clip((rgb - low) / (high - low), 0, 1).transpose(1, 2, 0)


def show(ax, image, title="", **options) -> None:
    """An image without axes."""
    ax.imshow(image, **options)
    ax.set_title(title)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def hero():
    """A real Sentinel-2 chip on 16 dates with known shifts and clouds: the median before and after; the shifts."""
    cube, truth, _ = demo_stack()
    aligned, report = ta.align(cube, "iterative", ta.PCC(interpolation="bicubic"), progress=False)
    ok = report["status"].values == 0
    window = {"y": slice(78, 168), "x": slice(82, 172)}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), width_ratios=(1, 1, 1.35), layout="constrained")
    for ax, stack, title in zip(axes, (cube, aligned), ("before", "after one call"), strict=False):
        median = stack.isel(time=ok, **window).median("time").transpose("band", "y", "x").values
        show(ax, colour(median), f"Median of the dates, {title}", interpolation="nearest")
    dates = mdates.date2num(report["time"].values)
    found = np.stack([report["shift_x"], report["shift_y"]], -1)
    origin = np.median((found - truth.values)[ok], axis=0)
    ax = axes[2]
    for axis, (name, tint) in enumerate((("x, right", BLUE), ("y, down", ORANGE))):
        expected = truth.values[:, axis] + origin[axis]
        ax.plot(dates, expected, "_", color="black", markersize=13, label="truth" if axis else None, zorder=3)
        ax.plot(dates[ok], found[ok, axis], "o", color=tint, markersize=6, label=name)
    for number, date in enumerate(dates[~ok]):
        ax.axvspan(date - 3.5, date + 3.5, color=GREY, alpha=0.35, lw=0)
        name = ta.Status(int(report["status"].values[~ok][number])).name
        ax.text(date, 0.02, f" {name}", rotation=90, va="bottom", ha="center", fontsize=8,
                transform=ax.get_xaxis_transform())  # fmt: skip
    ax.axhline(0, color=GREY, lw=0.8)
    ax.xaxis.set_major_locator(mdates.MonthLocator())
    ax.xaxis.set_major_formatter(mdates.DateFormatter("%b %Y"))
    ax.tick_params("x", rotation=30)
    ax.set_ylabel("shift (pixels)")
    error = np.hypot(*(found - truth.values - origin)[ok].T)
    ax.set_title(f"{ok.sum()} dates aligned, {(~ok).sum()} overcast: flagged, untouched")
    title = f"median error {np.median(error):.3f} px (smaller than the dots)"
    ax.legend(title=title, fontsize=9, title_fontsize=9, ncols=3, loc="upper left", framealpha=0.95)
    ax.set_ylim(-5.4, 6.9)
    return figure


def correlation(moving: np.ndarray, reference: np.ndarray, band: float) -> np.ndarray:
    """The correlation surface of two frames, all frequencies up to ``band`` alike (classic phase correlation)."""
    window = np.outer(*(np.hanning(side) for side in moving.shape))
    spectra = [np.fft.fft2((image - image.mean()) * window) for image in (moving, reference)]
    power = spectra[1] * spectra[0].conj()
    fy, fx = (np.fft.fftfreq(side) for side in moving.shape)
    kept = np.hypot(fy[:, None], fx) <= band
    power = np.where(kept, power / (np.abs(power) + 1e-12), 0)
    pad = 8  # interpolate the surface: zero padding of its spectrum
    height, width = power.shape
    padded = np.zeros((height * pad, width * pad), complex)
    shifted = np.fft.fftshift(power)
    top, left = (height * pad - height) // 2, (width * pad - width) // 2
    padded[top : top + height, left : left + width] = shifted
    surface = np.fft.ifft2(np.fft.ifftshift(padded)).real
    surface = np.fft.fftshift(surface)
    return surface / surface.max()


def peak():
    """The surface of a pair shifted by (1.5, −0.75) px: the peak stands at minus the shift of the frame."""
    scene = torch.from_numpy(np.array(open_demo_scene().values))
    stack = simulate_stack(scene, frames=40, size=(136, 136), factor=2, noise=0.003, max_shift=2.0, seed=7)
    wanted = torch.tensor([1.5, -1.0])
    number = int((stack.shift - wanted).norm(dim=1).argmin())
    moving, reference = stack.cube[number].mean(0).numpy(), stack.reference.mean(0).numpy()
    x, y = stack.shift[number].tolist()
    figure, axes = plt.subplots(
        1, 4, figsize=(12, 3.4), width_ratios=(1, 1, 1.15, 1.15), layout="constrained"
    )
    for ax, image, name in zip(axes, (reference, moving), ("Reference", "Frame"), strict=False):
        show(ax, image, name, cmap="gray")
    for ax, band, name in zip(
        axes[2:], (0.5, 0.25), ("All frequencies", "Up to ¼ cycle per pixel"), strict=True
    ):
        surface = correlation(moving, reference, band)
        middle, reach = np.array(surface.shape) // 2, 4 * 8
        part = surface[middle[0] - reach : middle[0] + reach + 1, middle[1] - reach : middle[1] + reach + 1]
        ax.imshow(part, extent=(-4.06, 4.06, 4.06, -4.06), cmap="magma", vmin=-0.1)
        ax.plot(x, y, "+", color="#00e5ff", markersize=12, markeredgewidth=1.6)
        ax.set_title(name)
        ax.set_xlabel("shift x (pixels)")
    axes[2].set_ylabel("shift y (pixels)")
    figure.suptitle(
        f"The peak of the correlation is the shift; + is the truth, ({x:.2f}, {y:.2f}) px", fontsize=12
    )
    return figure


def second_pass():
    """A clouded frame: what the second correlation looks at, and what that does to the errors."""
    scene = torch.from_numpy(np.array(open_demo_scene().values))
    stack = simulate_stack(scene, frames=24, size=(250, 250), factor=1, cloud_fraction=0.35, noise=0.003,
                           offset=0.0, gain=(0.9, 1.1), seed=11)  # fmt: skip
    estimates = {
        "one correlation": ta.PCC(robust=False, max_sigma=9.0).estimate(stack.cube, stack.reference),
        "two, the second weighted": ta.PCC().estimate(stack.cube, stack.reference),
    }
    errors = {name: (one.warp[:, :, 2] - stack.shift).norm(dim=1).numpy() for name, one in estimates.items()}
    number = 3
    weights = phase_correlation(stack.cube[number].mean(0), stack.reference.mean(0)).inliers
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), width_ratios=(1, 1, 1, 1.35), layout="constrained")
    show(axes[0], colour(stack.reference.numpy()), "Reference")
    show(axes[1], colour(stack.cube[number].numpy().clip(0, 0.35)), "Frame, no mask given")
    show(axes[2], weights.numpy(), "Weights of the second correlation", cmap="gray", vmin=0)
    ax = axes[3]
    for (name, one), tint in zip(estimates.items(), (GREY, BLUE), strict=True):
        ok = one.valid.numpy()
        label = f"{name}:\n{ok.sum()} accepted, median {np.median(errors[name][ok]):.3f} px"
        ax.semilogy(np.flatnonzero(ok), errors[name][ok], "o", color=tint, label=label, markersize=5)
    ax.set_xlabel("frame (24, each 35 % under cloud)")
    ax.set_ylabel("error (pixels)")
    ax.set_ylim(1e-3, 4)
    ax.legend(fontsize=8.5, loc="upper right")
    ax.set_title("Errors")
    return figure


def bias():
    """Peak locking: the bias against the true fraction of a pixel, from the results of benchmarks/accuracy.py."""
    results = json.loads((ROOT / "benchmarks/results/accuracy.json").read_text())["bias"]
    figure, ax = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    shown = {
        "satalign": ("satalign, scikit-image: all frequencies", ORANGE, "s-"),
        "max_frequency=0.5": ("PCC, all frequencies", GREY, "^-"),
        "PCC()": ("PCC, up to ¼ cycle per pixel (default)", BLUE, "o-"),
    }
    for name, (label, tint, style) in shown.items():
        values = np.mean([results["bias"][name][axis] for axis in ("x", "y")], axis=0)
        ax.plot([*results["fractions"], 1.0], [*values, values[0]], style, color=tint, label=label)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set_xlabel("true fraction of a pixel")
    ax.set_ylabel("mean error (pixels)")
    ax.set_title("Peak locking: aliased frequencies pull the estimate to whole pixels")
    ax.legend(fontsize=9)
    return figure


def cascade():
    """Turned, scaled and far frames: what PCC leaves, and what ECC after it leaves, over the frame."""
    scene = torch.from_numpy(np.array(open_demo_scene().values))
    stack = simulate_warped_stack(
        scene,
        motion="affine",
        frames=12,
        size=(120, 120),
        factor=2,
        max_shift=8.0,
        max_rotation=3.0,
        max_scale=0.02,
        noise=0.003,
        offset=0.0,
        seed=3,
    )
    size = stack.cube.shape[-1]
    line = torch.linspace(8, size - 9, 8, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    stages = {
        "As they came": torch.eye(2, 3).expand(12, 2, 3),
        "After PCC, which finds shifts only": ta.PCC(max_translation=16, max_sigma=9.0)
        .estimate(stack.cube, stack.reference)
        .warp,
        "After PCC, ECC: the affine warp": ta.Cascade(
            ta.PCC(max_translation=16, max_sigma=9.0), ta.ECC(motion="affine", max_translation=16)
        )
        .estimate(stack.cube, stack.reference)
        .warp,
    }
    truth = transform_points(to_homogeneous(stack.warp.double()), points)
    left = {
        name: transform_points(to_homogeneous(warp.double()), points) - truth for name, warp in stages.items()
    }
    worst = [apart.norm(dim=-1).amax(-1) for apart in left.values()]
    number = int((worst[0] - worst[1]).argmax())
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.1), layout="constrained")
    picture = stack.reference.mean(0).numpy()
    for ax, (name, apart) in zip(axes, left.items(), strict=True):
        arrows = apart[number].numpy()
        show(ax, picture, cmap="gray", alpha=0.55)
        ax.quiver(points[:, 0], points[:, 1], arrows[:, 0], arrows[:, 1], color=ORANGE, angles="xy",
                  scale_units="xy", scale=0.4, width=0.007)  # fmt: skip
        ax.set_title(f"{name}\nworst point off by {np.hypot(*arrows.T).max():.3g} px")
    return figure


def network():
    """The real series: every date is compared with those that look most like it, and with a few others."""
    folder = ROOT / "../shared/data/sentinel2_ndvi"
    dates = np.array([s[:10] for s in json.loads((folder / "timestamps.json").read_text())], "datetime64[D]")
    clear = np.load(folder / "CLM.npy")[..., 0] == 0
    kept = clear.mean((1, 2)) > 0.98
    ndvi, dates = np.load(folder / "NDVI.npy")[kept, ..., 0], dates[kept]
    contrast = np.stack([image - gaussian_filter(image, 6) for image in ndvi])
    contrast = np.stack([image / np.sqrt(gaussian_filter(image**2, 6) + 1e-4) for image in contrast])
    flat = contrast.reshape(len(contrast), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    similar = flat @ flat.T
    np.fill_diagonal(similar, -1)
    day = (dates - dates.astype("datetime64[Y]")).astype(int)
    angle = 2 * np.pi * day / 365.25
    year = dates.astype("datetime64[Y]").astype(int) + 1970
    radius = 1 + 0.42 * (year - year.min()) + 0.06 * (np.arange(len(day)) % 3)
    x, y = radius * np.sin(angle), radius * np.cos(angle)
    order = np.random.default_rng(0).permutation(len(day))
    figure, (ax, beside) = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
    for i, j in zip(order, np.roll(order, 1), strict=True):
        ax.plot(x[[i, j]], y[[i, j]], color=ORANGE, lw=0.7, alpha=0.8)
    for i in range(len(day)):
        for j in np.argsort(similar[i])[-4:]:
            ax.plot(x[[i, j]], y[[i, j]], color=BLUE, lw=0.8, alpha=0.55)
    ax.plot(x, y, "o", color="black", markersize=5)
    reach = radius.max() + 0.3
    for month, name in enumerate(("Jan", "Apr", "Jul", "Oct")):
        ax.text(
            reach * np.sin(month * np.pi / 2),
            reach * np.cos(month * np.pi / 2),
            name,
            ha="center",
            va="center",
        )
    ax.plot([], [], color=BLUE, label="most similar frames")
    ax.plot([], [], color=ORANGE, label="random ring")
    ax.legend(loc="lower left", fontsize=9, bbox_to_anchor=(-0.12, -0.02))
    ax.set_title(f"Network of pairs: {len(day)} clear dates by day of year,\none ring per year\n")
    ax.set_axis_off()
    ax.set_aspect("equal")
    season = np.argsort(day)
    drawn = beside.imshow(
        np.where(similar < -0.5, 1, similar)[np.ix_(season, season)], cmap="viridis", vmin=0
    )
    ticks = np.linspace(0, len(day) - 1, 8).round().astype(int)
    labels = [dates[season][tick].astype(object).strftime("%d %b") for tick in ticks]
    beside.set_xticks(ticks, labels, rotation=45, ha="right")
    beside.set_yticks(ticks, labels)
    beside.set_title("Similarity of the frames, by day of year")
    figure.colorbar(drawn, ax=beside, shrink=0.8, label="correlation of local contrast")
    return figure


PICTURES = {function.__name__: function for function in (hero, peak, second_pass, bias, cascade, network)}


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="default: all")
    for name in parser.parse_args().names or PICTURES:
        with torch.no_grad():
            figure = PICTURES[name]()
        made = io.BytesIO()
        figure.savefig(made, dpi=110)
        plt.close(figure)
        with Image.open(made) as picture:  # few colours make a small file
            few = picture.convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE)
            few.save(HERE / f"{name}.png", optimize=True)
        print(f"{name}.png: {(HERE / f'{name}.png').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
