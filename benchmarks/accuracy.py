"""How far off is each estimate, and is it said? torchalign's PCC, satalign's and scikit-image's, same data.

Ground truth without an interpolation kernel: windows of a real 30 m scene at whole-pixel offsets, averaged in
blocks of 5 × 5 (`torchalign.datasets.simulate_stack`). Then what happens to real series happens to them.
Every method gets the mean of the bands, since that is what satalign and torchalign see by default.

    python benchmarks/accuracy.py [--scene ../shared/data/landsat7_rgb.tif] [--frames 64]
    python benchmarks/accuracy.py --update-readme

Flags: torchalign's `status`; satalign's `warning_status` (an exception, or a shift beyond the limit);
scikit-image has none. Errors are those of unflagged frames. A **loss** is a condition where a peer's median
or 95th percentile is lower than that of the default `PCC()`, a flagged frame counting as an infinite error.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    HERE,
    add_readme_options,
    described,
    machine,
    percent,
    pixels,
    readme_or_run,
    table,
    versions,
    write_results,
)
from torch import Tensor
from torch.nn import functional as F

import torchalign as ta
from torchalign.datasets import open_demo_scene, simulate_stack
from torchalign.functional.channels import extract_channel
from torchalign.functional.phase import phase_correlation

NAME = "accuracy"
DEFAULT = "PCC()"
SILENT = 0.3  # pixels: an error above this is a wrong answer, and must be flagged
LIMIT = 5.0  # the default max_translation of torchalign and satalign
FAR, FAR_LIMIT = 20.0, 32.0
OTHER_BAND = "another band"
TRUSTED = 0.7  # scores of real pairs of dates


class Part(NamedTuple):
    """Frames and their one reference."""

    cube: Tensor  # (T, C, H, W), NaN where there is no data
    reference: Tensor  # (C, H, W)
    shift: Tensor  # (T, 2), (x, y) of the warp moving → reference
    mask: Tensor | None = None  # (T, H, W), given to those who take one
    limit: float = LIMIT


class Found(NamedTuple):
    shift: Tensor  # (T, 2) as found, even where flagged
    flagged: Tensor  # (T,) bool
    sigma: Tensor | None = None  # (T,)
    status: Tensor | None = None  # (T,)
    score: Tensor | None = None  # (T,)


class Protocol(NamedTuple):
    """What a scene is large enough for."""

    scene: Tensor  # (C, Hs, Ws), about [0, 1]
    name: str
    factor: int
    size: int
    small: int
    far: bool
    frames: int
    seed: int


# --- the scenes ---


def open_scene(path: Path, frames: int, seed: int) -> Protocol:
    if path.exists():
        from PIL import Image

        values = np.asarray(Image.open(path), dtype=np.float32).transpose(2, 0, 1) / 255
        return Protocol(torch.from_numpy(values), "Landsat-7 RGB, 30 m", 5, 256, 100, True, frames, seed)
    chip = torch.from_numpy(np.array(open_demo_scene().values))
    name = "spyndex's Sentinel-2 chip, 10 m: the smaller protocol"
    return Protocol(chip / chip.quantile(0.999), name, 3, 92, 48, False, frames, seed)


def _coarse_field(scene: Tensor, cell: int, random: torch.Generator, mode: str) -> Tensor:
    """(1, Hs, Ws): normal deviates on a grid of cells, brought to the scene's size."""
    shape = [math.ceil(length / cell) + 1 for length in scene.shape[-2:]]
    noise = torch.randn(1, 1, *shape, generator=random)
    large = F.interpolate(noise, scale_factor=cell, mode=mode)
    return large[0, :, : scene.shape[-2], : scene.shape[-1]]


def another_season(scene: Tensor, cell: int, random: torch.Generator) -> Tensor:
    """A smooth gain field, and a third of the fields (square cells) inverted and lighter or darker."""
    gain = torch.exp(0.3 * _coarse_field(scene, 2 * cell, random, "bicubic"))
    changed = _coarse_field(scene, cell, random, "nearest") > 0.43  # a third
    level = 0.2 * _coarse_field(scene, cell, random, "nearest")
    mean = scene.mean((-2, -1), keepdim=True)
    return torch.where(changed, 2 * mean - scene + level, scene * gain)


def _ramps(frames: int, size: tuple[int, int], random: torch.Generator) -> Tensor:
    """(T, 1, H, W): planes from −1 to 1 in random directions."""
    angle = 2 * math.pi * torch.rand(frames, 1, 1, 1, generator=random)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in size), indexing="ij")
    return (x * angle.cos() + y * angle.sin()) / math.sqrt(2)


def _smooth(frames: int, size: tuple[int, int], random: torch.Generator) -> Tensor:
    """(T, 1, H, W): smooth blobs in [0, 1]."""
    return F.interpolate(torch.rand(frames, 1, 5, 5, generator=random), size=size, mode="bicubic").clamp(0, 1)


# --- the conditions ---


def conditions(protocol: Protocol) -> Iterator[tuple[str, list[Part]]]:
    scene, factor = protocol.scene, protocol.factor
    seed = protocol.seed
    size = (protocol.size, protocol.size)

    def stack(part: int = 0, *, source: Tensor = scene, **options: Any) -> Any:
        given: dict[str, Any] = {"frames": protocol.frames, "size": size, "factor": factor}
        return simulate_stack(source, **(given | {"seed": seed + part} | options))

    def plain(**options: Any) -> list[Part]:
        made = stack(**options)
        return [Part(made.cube, made.reference, made.shift)]

    yield "clean", plain()
    yield "20 % cloud", plain(cloud_fraction=0.2)
    yield "50 % cloud", plain(cloud_fraction=0.5)
    yield "80 % cloud", plain(cloud_fraction=0.8)
    clouded = stack(cloud_fraction=0.5)
    yield "50 % cloud, mask given", [Part(clouded.cube, clouded.reference, clouded.shift, clouded.clear)]

    clouded = stack(cloud_fraction=0.3)
    random = torch.Generator().manual_seed(seed)
    # σ 0.1 over 5 × 5 pixels: the contrast of the ground
    billows = 0.5 * F.avg_pool2d(torch.randn(*clouded.clear.shape, generator=random), 5, 1, 2)[:, None]
    textured = torch.where(clouded.clear[:, None], clouded.cube, clouded.cube + billows)
    yield "30 % textured cloud", [Part(textured, clouded.reference, clouded.shift)]

    yield "smooth, blur σ 1.5 px", plain(blur=1.5)
    yield "smooth, blur σ 3 px", plain(blur=3.0)
    yield "noise × 5 (0.05)", plain(noise=0.05)
    yield "contrast × 0.1, same noise", plain(source=0.1 * scene, noise=0.01)
    quantised = stack(source=0.02 * scene, noise=0.0, offset=0.01)
    yield (
        "contrast × 0.02, 12 bit",
        [
            Part(
                (quantised.cube * 4095).round() / 4095,
                (quantised.reference * 4095).round() / 4095,
                quantised.shift,
            )
        ],
    )

    moving = stack(source=scene[-1:])
    for band, name in enumerate(("first", "second")):
        reference = stack(source=scene[band : band + 1], frames=0).reference
        yield f"{OTHER_BAND} (last on {name})", [Part(moving.cube, reference, moving.shift)]
    parts = []
    for season in range(4):
        random = torch.Generator().manual_seed(seed + season)
        changed = another_season(scene, 20 * factor, random)
        moving = stack(season, source=changed, frames=protocol.frames // 4)
        reference = stack(season, frames=0)
        parts.append(Part(moving.cube, reference.reference, moving.shift))
    yield "another season (gain field, ⅓ of fields changed)", parts

    made, random = stack(), torch.Generator().manual_seed(seed)
    lit = made.cube * (1 + 0.5 * _ramps(protocol.frames, size, random))
    yield "illumination gradient ± 50 %", [Part(lit, made.reference, made.shift)]
    haze = 0.7 * _smooth(protocol.frames, size, random)
    yield "haze, up to 70 %", [Part(made.cube * (1 - haze) + 0.9 * haze, made.reference, made.shift)]

    made = stack()
    stripe = slice(size[1] // 3, size[1] // 3 + size[1] // 8)
    cube, reference = made.cube.clone(), made.reference.clone()
    cube[..., stripe] = torch.nan
    reference[..., stripe] = torch.nan
    yield "static NaN stripe, ⅛ of the width", [Part(cube, reference, made.shift)]

    if protocol.far:
        for name, blur in (("shifts ± 20 px", 0.0), ("shifts ± 20 px, blur σ 3 px", 3.0)):
            made = stack(max_shift=FAR / math.sqrt(2), blur=blur)
            yield name, [Part(made.cube, made.reference, made.shift, None, FAR_LIMIT)]
    small = (protocol.small, protocol.small)
    for name, fraction in (("", 0.0), (", 20 % cloud", 0.2), (", 60 % cloud", 0.6)):
        parts = []
        for corner in range(4):
            origin = _corner(scene, protocol, corner)
            made = stack(
                corner, size=small, frames=protocol.frames // 4, origin=origin, cloud_fraction=fraction
            )
            parts.append(Part(made.cube, made.reference, made.shift))
        yield f"frames of {small[0]}²{name}", parts


def _corner(scene: Tensor, protocol: Protocol, number: int) -> tuple[int, int]:
    """(y, x) of small windows around the scene's centre, which do not overlap where there is room."""
    wanted = protocol.small * protocol.factor
    margin = 3 * protocol.factor
    places = []
    for length, side in zip(scene.shape[-2:], (number // 2, number % 2), strict=True):
        start = length // 2 - (wanted + margin if side == 0 else -margin)
        places.append(min(max(start, margin), length - wanted - margin))
    return places[0], places[1]


def hopeless(protocol: Protocol) -> Iterator[tuple[str, Part]]:
    """Frames that have nothing to be aligned with: every one that is not flagged is a false answer."""
    size = (protocol.size, protocol.size)
    options: dict[str, Any] = {
        "frames": protocol.frames,
        "size": size,
        "factor": protocol.factor,
        "seed": protocol.seed,
    }
    made = simulate_stack(protocol.scene, **options)
    random = torch.Generator().manual_seed(protocol.seed)
    shape = (protocol.frames, 1, *size)
    flat = (0.9 + 0.01 * torch.randn(made.cube.shape, generator=random)).float()
    yield "overcast, plain", Part(flat, made.reference, made.shift)
    billows = 0.2 * F.avg_pool2d(torch.randn(shape, generator=random), 7, 1, 3) * 7
    yield "overcast, billowing", Part(flat + billows, made.reference, made.shift)
    other = simulate_stack(protocol.scene.flip(-1), **options)
    yield "another place", Part(made.cube, other.reference, made.shift)
    yield "constant frames", Part(torch.full_like(flat, 0.5), made.reference, made.shift)


# --- the methods ---


def torchalign(part: Part, **options: Any) -> Found:
    aligner = ta.PCC(max_translation=part.limit, **options)
    estimate = aligner.estimate(part.cube, part.reference, part.mask)
    # a flagged frame comes back with the identity; what was found is told by the method itself
    moving, reference = (extract_channel(image, aligner.channel) for image in (part.cube, part.reference))
    usable, reference_usable = moving.isfinite(), reference.isfinite()
    if part.mask is not None:
        usable = usable & part.mask
    moving, reference = (
        moving.where(usable, torch.zeros(())),
        reference.where(reference_usable, torch.zeros(())),
    )
    raw = phase_correlation(
        moving,
        reference[None],
        usable,
        reference_usable[None],
        max_translation=aligner.max_translation,
        max_frequency=aligner.max_frequency,
        contrast=aligner.contrast,
        weighting=aligner.weighting,
        taper=aligner.taper,
        robust=aligner.robust,
    )
    found = torch.where(estimate.valid[:, None], estimate.warp[:, :, 2], raw.shift)
    return Found(found, ~estimate.valid, estimate.sigma, estimate.status, estimate.score)


def satalign(part: Part) -> Found:
    from satalign import PCC

    shifts, flagged = [], []
    reference = part.reference.numpy()
    for frame in part.cube.numpy():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # one object a frame: its warning_status never goes back to False
            job = PCC(frame[None], reference, max_translations=part.limit)
            _, warp = job.run()
        shifts.append(torch.from_numpy(warp[0][:2, 2].copy()))
        flagged.append(job.warning_status)
    return Found(torch.stack(shifts), torch.tensor(flagged))


def _tukey(length: int, share: float) -> Tensor:
    from_edge = torch.minimum(torch.arange(length) + 0.5, length - 0.5 - torch.arange(length))
    return 0.5 - 0.5 * torch.cos(math.pi * (from_edge / (0.5 * share * length)).clamp(0, 1))


def scikit_image(part: Part, normalization: str | None, taper: float, upsample_factor: int) -> Found:
    """With a taper, the mean goes first; unusable pixels take the mean of the others."""
    from skimage.registration import phase_cross_correlation

    height, width = part.reference.shape[-2:]
    window = _tukey(height, taper)[:, None] * _tukey(width, taper) if taper else torch.ones(height, width)

    def prepared(image: Tensor, mask: Tensor | None) -> np.ndarray:
        usable = image.isfinite() if mask is None else image.isfinite() & mask
        centred = torch.where(usable, image - image[usable].mean(), 0.0)
        return np.asarray((centred * window).numpy())

    reference = prepared(part.reference.mean(0), None)
    shifts = []
    for number, frame in enumerate(part.cube.mean(1)):
        moving = prepared(frame, None if part.mask is None else part.mask[number])
        shift, _, _ = phase_cross_correlation(
            reference, moving, upsample_factor=upsample_factor, normalization=normalization
        )
        shifts.append(torch.tensor([shift[1], shift[0]]))
    return Found(torch.stack(shifts), torch.zeros(len(shifts), dtype=torch.bool))


def scikit_image_masked(part: Part) -> Found:
    """Its masked mode (Padfield 2012), to whole pixels."""
    from skimage.registration import phase_cross_correlation

    reference = part.reference.mean(0)
    shifts = []
    for number, frame in enumerate(part.cube.mean(1)):
        usable = frame.isfinite() if part.mask is None else frame.isfinite() & part.mask[number]
        shift = phase_cross_correlation(
            reference.nan_to_num().numpy(),
            frame.nan_to_num().numpy(),
            reference_mask=reference.isfinite().numpy(),
            moving_mask=usable.numpy(),
        )[0]
        shifts.append(torch.tensor([shift[1], shift[0]]))
    return Found(torch.stack(shifts), torch.zeros(len(shifts), dtype=torch.bool))


OWN: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    'weighting="sqrt"': {"weighting": "sqrt"},
    'weighting="phase"': {"weighting": "phase"},
    "robust=False": {"robust": False},
    'contrast="none"': {"contrast": "none"},
    "max_frequency=0.5": {"max_frequency": 0.5},
}
TAPERS = {"no taper": 0.0, "Tukey 0.25": 0.25, "Tukey 0.5": 0.5, "Hann": 1.0}
SEARCH: dict[str, tuple[str | None, float, int]] = {
    f"{normalization}, {taper}": (normalization, share, 100)
    for normalization in ("phase", None)
    for taper, share in TAPERS.items()
}
SATALIGN, SKIMAGE, MASKED = "satalign", "scikit-image, factor 50", "scikit-image, masked mode"
BEST = "scikit-image, best setting"


def methods(part: Part) -> dict[str, Callable[[Part], Found]]:
    def own(options: Mapping[str, Any]) -> Callable[[Part], Found]:
        return lambda part: torchalign(part, **options)

    def peer(setting: tuple[str | None, float, int]) -> Callable[[Part], Found]:
        return lambda part: scikit_image(part, *setting)

    found: dict[str, Callable[[Part], Found]] = {name: own(options) for name, options in OWN.items()}
    found[SATALIGN] = satalign
    # its defaults but for the factor of 1, which gives whole pixels: satalign's, which asks for 50
    found[SKIMAGE] = peer(("phase", 0.0, 50))
    found |= {f"scikit-image: {name}": peer(setting) for name, setting in SEARCH.items()}
    if part.mask is not None or not bool(part.cube.isfinite().all()):
        found[MASKED] = scikit_image_masked
    return found


# --- figures ---


def _quantiles(errors: Tensor) -> dict[str, float]:
    if not len(errors):
        return dict.fromkeys(("median", "p95", "max"), math.inf)
    # the nearest frame: infinite errors must not be interpolated with
    ordered = errors.double().sort().values
    at = {"median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: float(ordered[math.ceil(share * len(ordered)) - 1]) for name, share in at.items()}


def figures(found: Found, truth: Tensor) -> dict[str, Any]:
    difference = found.shift.double() - truth.double()
    errors = difference.norm(dim=-1)
    accepted = ~found.flagged
    strict = _quantiles(torch.where(accepted, errors, math.inf))
    wrong = errors > SILENT
    summary: dict[str, Any] = {
        "frames": len(errors),
        **_quantiles(errors[accepted]),
        "flagged": int(found.flagged.sum()),
        "median_strict": strict["median"],
        "p95_strict": strict["p95"],
        "wrong": int(wrong.sum()),
        "wrong_and_flagged": int((wrong & found.flagged).sum()),
        "correct_but_flagged": int((~wrong & found.flagged).sum()),
    }
    if found.sigma is not None:
        ratio = difference[accepted].abs() / found.sigma[accepted, None].double()
        summary |= {"axes": ratio.numel(), **{f"within_{n}_sigma": int((ratio <= n).sum()) for n in (1, 2)}}
        summary["median_sigma"] = (
            float(found.sigma[accepted].double().median()) if accepted.any() else math.inf
        )
    if found.status is not None:
        summary["status"] = _counts(found.status)
    return summary


def _counts(status: Tensor) -> dict[str, int]:
    return {code.name: int((status == code).sum()) for code in ta.Status if (status == code).any()}


def measure(parts: list[Part]) -> dict[str, Any]:
    measured = {}
    for name, method in methods(parts[0]).items():
        found = [method(part) for part in parts]
        columns = [list(column) for column in zip(*found, strict=True)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        measured[name] = figures(Found(*joined), torch.cat([part.shift for part in parts]))
    return measured


def _searched(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in measured.items() if name.startswith("scikit-image: ")}


def best_setting(table_: Mapping[str, Mapping[str, Any]]) -> str:
    """The one setting of scikit-image with the lowest geometric mean of the 95th percentiles."""
    names = list(_searched(next(iter(table_.values()))))

    def total(name: str) -> float:
        return sum(math.log(max(row[name]["p95"], 1e-4)) for row in table_.values())

    return min(names, key=total)


def losses(table_: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where a peer, at any of its settings, is ahead of the default in median or 95th percentile."""
    lost = []
    for condition, row in table_.items():
        own = row[DEFAULT]
        for figure in ("median", "p95"):
            peers = {name: entry for name, entry in row.items() if name not in OWN}
            name = min(peers, key=lambda peer: float(peers[peer][f"{figure}_strict"]))
            theirs, ours = peers[name][f"{figure}_strict"], own[f"{figure}_strict"]
            if theirs < ours:
                lost.append(
                    {
                        "condition": condition,
                        "figure": figure,
                        "peer": name,
                        "theirs": theirs,
                        "ours": ours,
                        "verdict": "loss",
                    }
                )
    return lost


def bias(protocol: Protocol, setting: str) -> dict[str, Any]:
    """Mean signed error against the fraction of a pixel of the true shift, per axis."""
    size = (protocol.size, protocol.size)
    made = simulate_stack(
        protocol.scene, frames=4 * protocol.frames, size=size, factor=protocol.factor, seed=protocol.seed + 99
    )
    part = Part(made.cube, made.reference, made.shift)
    chosen = methods(part)
    names = [DEFAULT, 'weighting="phase"', "max_frequency=0.5", SATALIGN, setting]
    steps = (made.shift * protocol.factor).round().long() % protocol.factor  # (T, 2)
    table_: dict[str, Any] = {}
    for name in names:
        found = chosen[name](part)
        error = (found.shift - made.shift).double()
        kept = ~found.flagged
        table_[name] = {
            axis: [
                float(error[kept & (steps[:, column] == step), column].mean())
                for step in range(protocol.factor)
            ]
            for column, axis in enumerate("xy")
        }
    return {"fractions": [step / protocol.factor for step in range(protocol.factor)], "bias": table_}


# --- real dates, no truth ---


def real_dates(folder: Path, setting: tuple[str | None, float, int]) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    cube = torch.from_numpy(np.load(folder / "NDVI.npy")).permute(0, 3, 1, 2).contiguous()  # (T, 1, H, W)
    clouded = torch.from_numpy(np.load(folder / "CLM.npy")[..., 0].astype(bool))  # (T, H, W)
    share = clouded.float().mean((1, 2))
    stamps = [stamp[:10] for stamp in json.loads((folder / "timestamps.json").read_text())]
    clear = share < 0.02
    reference = cube[clear].masked_fill(clouded[clear, None], torch.nan).nanmedian(0).values

    classes = {
        "clear (< 2 % cloud)": clear,
        "clouded (2–98 %)": (share >= 0.02) & (share < 0.98),
        "fully clouded (≥ 98 %)": share >= 0.98,
    }
    statuses = {}
    for name, mask in (("cloud mask given", ~clouded), ("no mask", None)):
        _, estimate = ta.PCC()(cube, reference, mask)
        rows = {}
        for group, chosen in classes.items():
            accepted = chosen & estimate.valid
            length = estimate.warp[accepted][:, :, 2].norm(dim=-1)
            rows[group] = {
                "dates": int(chosen.sum()),
                "status": _counts(estimate.status[chosen]),
                "score_rose": int((estimate.score > estimate.score_before)[accepted].sum()),
                "shift": _quantiles(length),
                "score_before": _quantiles(estimate.score_before[accepted])["median"],
                "score": _quantiles(estimate.score[accepted])["median"],
                "sigma": _quantiles(estimate.sigma[accepted])["median"],
            }
        statuses[name] = rows

    dates = clear.nonzero()[:, 0].tolist()
    days = torch.tensor([np.datetime64(stamps[date]).astype(int) for date in dates])
    shifts, scores = {}, torch.full((len(dates), len(dates)), torch.nan, dtype=torch.float64)
    sigmas = scores.clone()
    pairs = {
        DEFAULT: torchalign,
        SATALIGN: satalign,
        BEST: lambda part: scikit_image(part, *setting),
    }
    for name, method in pairs.items():
        shift = torch.full((len(dates), len(dates), 2), torch.nan, dtype=torch.float64)  # [moving, reference]
        for column, date in enumerate(dates):
            found = method(Part(cube[dates], cube[date], torch.zeros(len(dates), 2)))
            shift[:, column] = found.shift.double().masked_fill(found.flagged[:, None], torch.nan)
            if found.score is not None and found.sigma is not None:
                scores[:, column], sigmas[:, column] = found.score.double(), found.sigma.double()
        shifts[name] = shift
    closures = closure(shifts, days, scores, sigmas)
    return {"statuses": statuses, "clear_dates": len(dates), **closures}


def closure(shifts: Mapping[str, Tensor], days: Tensor, scores: Tensor, sigmas: Tensor) -> dict[str, Any]:
    """a→b→c against a→c, in sets of triples that are the same for every method.

    Args:
        shifts: by method, (N, N, 2), [moving, reference], NaN where flagged.
        days: (N,), when the dates were.
        scores: (N, N), of torchalign.
        sigmas: (N, N), of torchalign.
    """

    def triples(of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return of[:, :, None], of[None, :, :], of[:, None, :]  # a→b, b→c, a→c, each over (a, b, c)

    count = len(days)
    a, b, c = torch.meshgrid(*[torch.arange(count)] * 3, indexing="ij")
    different = (a != b) & (b != c) & (a != c)
    successive = (b == a + 1) & (c == a + 2)
    span = torch.where(successive, days[c] - days[a], days.max() + 1)
    lowest = torch.stack([score.expand(count, count, count) for score in triples(scores)]).amin(0)
    trusted = different
    gaps = {}
    for name, shift in shifts.items():
        there, on, direct = triples(shift)
        gaps[name] = there + on - direct  # (N, N, N, 2)
        if name == DEFAULT:
            trusted = different & gaps[name].isfinite().all(-1)
    nearest = torch.zeros_like(different).view(-1).index_fill(0, span.argmin(), True).view_as(different)
    sets = {
        "the 3 nearest clear dates": nearest,
        "3 successive clear dates": successive,
        "all triples": different,
        "all triples that `PCC()` accepts": trusted,
        f"the same, its scores ≥ {TRUSTED}": trusted & (lowest >= TRUSTED),
        f"the same, its scores < {TRUSTED}": trusted & (lowest < TRUSTED),
    }
    rows: dict[str, Any] = {}
    for label, chosen in sets.items():
        rows[label] = {"triples": int(chosen.sum())}
        for name, gap in gaps.items():
            lengths = gap[chosen].norm(dim=-1)
            finite = lengths[lengths.isfinite()]
            rows[label][name] = {"accepted": len(finite), **_quantiles(finite)}
        predicted = torch.stack([sigma.expand(count, count, count) for sigma in triples(sigmas)]).norm(dim=0)
        ratio = gaps[DEFAULT][chosen] / predicted[chosen][:, None]
        ratio = ratio.abs()[ratio.isfinite()]
        rows[label]["axes"] = ratio.numel()
        rows[label] |= {f"within_{number}_sigma": int((ratio <= number).sum()) for number in (1, 2)}
    spreads = {}
    for name, shift in shifts.items():
        there, on, _ = triples(shift)
        paths = (there + on).permute(0, 2, 1, 3)  # (a, c, b, 2)
        kept = (paths.isfinite().all(-1) & different.permute(0, 2, 1))[..., None]
        number = kept.sum(2).clamp(min=1)
        mean = torch.where(kept, paths, 0.0).sum(2) / number
        variance = torch.where(kept, (paths - mean[:, :, None]).square(), 0.0).sum(2) / number
        spreads[name] = _quantiles(variance.sum(-1).sqrt()[kept.sum((2, 3)) > 2])
    moves = {
        name: float(shift.norm(dim=-1)[shift.isfinite().all(-1)].median()) for name, shift in shifts.items()
    }
    return {"closure": rows, "spread": spreads, "median_shift": moves}


# --- the report ---


def _triple(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return " / ".join(pixels(row[key]) for key in ("median", "p95", "max"))


def report(results: Mapping[str, Any]) -> str:
    conditions_: Mapping[str, Any] = results["conditions"]
    overall = results["scikit_image_best"]
    lost = {(loss["condition"], loss["figure"]) for loss in results["losses"]}
    rows, options, honesty = [], [], []
    counted = ("frames", "axes", "within_1_sigma", "within_2_sigma", "wrong", "wrong_and_flagged")
    total = dict.fromkeys(counted, 0)
    same_band = total.copy()
    for name, row in conditions_.items():
        own, hers = row[DEFAULT], _searched(row)
        if MASKED in row:
            hers = hers | {MASKED: row[MASKED]}
        best = min(hers, key=lambda setting: float(hers[setting]["median"]))
        best_name = best.removeprefix("scikit-image: ").removeprefix("scikit-image, ")
        marks = [f"**loss** ({word})" for word in ("median", "p95") if (name, word) in lost]
        theirs = row[SATALIGN]
        gain = f"{theirs['median'] / own['median']:.0f} ×" if own["median"] and theirs["median"] else "–"
        rows.append(
            [
                name,
                f"**{_triple(own)}**",
                percent(own["flagged"], own["frames"]),
                f"{_triple(theirs)} ({percent(theirs['flagged'], theirs['frames'])})",
                _triple(row[SKIMAGE]),
                _triple(row[overall]),
                f"{_triple(hers[best])} ({best_name})",
                ", ".join(marks) or gain,
            ]
        )
        options.append(
            [
                name,
                *(
                    f"{pixels(row[key]['median'])} / {pixels(row[key]['p95'])}"
                    + (
                        f" ({percent(row[key]['flagged'], row[key]['frames'])})"
                        if row[key]["flagged"]
                        else ""
                    )
                    for key in OWN
                ),
            ]
        )
        total = {key: value + own[key] for key, value in total.items()}
        if not name.startswith(OTHER_BAND):
            same_band = {key: value + own[key] for key, value in same_band.items()}
        honesty.append(
            [
                name,
                f"{own['wrong'] - own['wrong_and_flagged']} of {own['frames']}",
                f"{theirs['wrong'] - theirs['wrong_and_flagged']} of {theirs['frames']}",
                str(own["correct_but_flagged"]),
                pixels(own["median_sigma"]),
                percent(own["within_1_sigma"], own["axes"]),
                percent(own["within_2_sigma"], own["axes"]),
            ]
        )
    honesty += [
        [
            f"**{name}**",
            f"{part['wrong'] - part['wrong_and_flagged']} of {part['frames']}",
            "",
            "",
            "",
            f"**{percent(part['within_1_sigma'], part['axes'])}**",
            f"**{percent(part['within_2_sigma'], part['axes'])}**",
        ]
        for name, part in (("all", total), (f"all but {OTHER_BAND}", same_band))
    ]
    own_best = overall.removeprefix("scikit-image: ")
    lines = [
        f"{results['scene']}; {results['protocol']} Seed {results['seed']}. {described(results)}",
        "### Error, pixels: median / 95th percentile / largest",
        table(
            [
                "condition",
                "torchalign `PCC()`",
                "flagged",
                "satalign `PCC` (flagged)",
                "scikit-image, factor 50",
                f"scikit-image, best single setting ({own_best})",
                "scikit-image, best of 8 + masked for this row",
                "satalign ÷ torchalign",
            ],
            rows,
        ),
        "### What the options do, pixels: median / 95th percentile (flagged)",
        table(["condition", *(f"`{name}`" for name in OWN)], options),
        f"### Wrong (> {SILENT} px) and not said; predicted σ against true errors, per axis",
        f"Of {total['wrong']} estimates of torchalign that were off by more than {SILENT} px, "
        f"{total['wrong_and_flagged']} were flagged ({percent(total['wrong_and_flagged'], total['wrong'])}). "
        "A normal law has 68 % within 1 σ and 95 % within 2 σ.",
        table(
            [
                "condition",
                "torchalign: silent errors",
                "satalign: silent errors",
                "right but flagged",
                "median σ",
                "within 1 σ",
                "within 2 σ",
            ],
            honesty,
        ),
        *_report_bias(results["bias"]),
        "### Nothing to align with: frames that were not flagged",
        table(
            ["frames", "torchalign", "torchalign's verdicts", "satalign"],
            [
                [name, str(row["own"]), _spelled(row["status"]), str(row["satalign"])]
                for name, row in results["hopeless"].items()
            ],
        ),
    ]
    if results["beyond"]:
        beyond = results["beyond"]
        lines.append(
            f"Shifts beyond the limit ({beyond['frames']} frames between {LIMIT:g} and {FAR:g} px): "
            f"{_spelled(beyond['status'])}; identity returned for {beyond['identity']}."
        )
    lines += _report_real(results["real"])
    lines += ["### Losses"]
    if results["losses"]:
        lines.append(
            "\n".join(
                f"- **loss**, {loss['condition']}, {loss['figure']}: "
                f"{loss['peer']} {pixels(loss['theirs'])} px, `PCC()` {pixels(loss['ours'])} px"
                for loss in results["losses"]
            )
        )
    else:
        lines.append(
            "None in this run: no peer, at any of its settings, is ahead in median or 95th percentile."
        )
    return "\n\n".join(lines)


def _spelled(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "–"


def _report_bias(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, axes in results["bias"].items():
        worst = max(abs(value) for values in axes.values() for value in values)
        cells = [f"{x:+.4f} / {y:+.4f}" for x, y in zip(axes["x"], axes["y"], strict=True)]
        rows.append([name, *cells, f"{worst:.4f}"])
    header = ["method", *(f"{fraction:.1f}" for fraction in results["fractions"]), "worst"]
    return ["### Bias against the true fraction of a pixel, clean frames, pixels: x / y", table(header, rows)]


def _report_real(real: Mapping[str, Any] | None) -> list[str]:
    if real is None:
        return ["### Real dates", "Not run: the NDVI series was not there."]
    rows = [
        [
            mask,
            group,
            str(row["dates"]),
            _spelled(row["status"]),
            f"{pixels(row['shift']['median'])} / {pixels(row['shift']['max'])}",
            "–" if row["score"] is None else f"{row['score_before']:.3f} → {row['score']:.3f}",
            str(row["score_rose"]),
            pixels(row["sigma"]),
        ]
        for mask, groups in real["statuses"].items()
        for group, row in groups.items()
    ]
    methods_ = list(real["spread"])
    paths = [
        [
            label,
            str(row["triples"]),
            *(
                f"{pixels(row[name]['median'])} / {pixels(row[name]['p95'])} ({row[name]['accepted']})"
                + (" **loss**" if name == DEFAULT and _lost(row) else "")
                for name in methods_
            ),
            f"{percent(row['within_1_sigma'], row['axes'])} / {percent(row['within_2_sigma'], row['axes'])}",
        ]
        for label, row in real["closure"].items()
    ]
    spread = "; ".join(
        f"{name} {pixels(row['median'])} / {pixels(row['p95'])}" for name, row in real["spread"].items()
    )
    moves = ", ".join(f"{name} {pixels(value)}" for name, value in real["median_shift"].items())
    return [
        "### Real Sentinel-2 NDVI, 68 dates against the median of the clear ones",
        table(
            [
                "",
                "dates",
                "number",
                "status",
                "shift: median / largest (px)",
                "score: median before → after",
                "score rose for",
                "median σ (px)",
            ],
            rows,
        ),
        f"Closure, no truth needed: a → b → c against a → c, {real['clear_dates']} clear dates of 2½ years, "
        "pixels, median / 95th percentile (triples without a flag). Last: the share of the closures of "
        "`PCC()`, per axis, within 1 and 2 of its σ, the three taken as independent. To answer 0 always, or "
        f"whole pixels, would close perfectly; nobody does quite: the median shift is {moves}.",
        table(["triples", "number", *methods_, "within 1 σ / 2 σ"], paths),
        f"Spread of one a → c over all ways a → b → c, median / 95th percentile: {spread}.",
    ]


def _lost(row: Mapping[str, Any]) -> bool:
    """Whether a peer closes better in the median, in one set of triples."""
    own = row[DEFAULT]["median"]
    others = [row[name]["median"] for name in (SATALIGN, BEST)]
    return any(other is not None and (own is None or other < own) for other in others)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    protocol = open_scene(arguments.scene, arguments.frames, arguments.seed)
    measured = {}
    with torch.no_grad():
        for name, parts in conditions(protocol):
            measured[name] = measure(parts)
            own, theirs = measured[name][DEFAULT], measured[name][SATALIGN]
            print(
                f"{time.perf_counter() - start:5.0f} s  {name}: {_triple(own)}, satalign {_triple(theirs)}",
                flush=True,
            )
        overall = best_setting(measured)
        lost = {}
        for name, part in hopeless(protocol):
            found = torchalign(part)
            lost[name] = {
                "frames": len(found.flagged),
                "own": int((~found.flagged).sum()),
                "satalign": int((~satalign(part).flagged).sum()),
                "status": _counts(found.status) if found.status is not None else {},
            }
        results = {
            "machine": machine(),
            "versions": versions(
                "torchalign", "torch", "numpy", "satalign", "scikit-image", "opencv-python-headless"
            ),
            "seed": protocol.seed,
            "scene": protocol.name,
            "protocol": (
                f"decimated by {protocol.factor}, {protocol.frames} frames of {protocol.size}², "
                "shifts ± 3 px, gain 0.7–1.3 and offset ± 0.1 per band and frame, noise 0.01 of a scene in "
                "[0, 1], opaque clouds of 0.8–1.0."
            ),
            "conditions": measured,
            "scikit_image_best": overall,
            "losses": losses(measured),
            "bias": bias(protocol, overall),
            "hopeless": lost,
            "beyond": beyond(protocol) if protocol.far else None,
            "real": real_dates(
                arguments.scene.parent / "sentinel2_ndvi", SEARCH[overall.removeprefix("scikit-image: ")]
            ),
        }
    results["seconds"] = time.perf_counter() - start
    return results


def beyond(protocol: Protocol) -> dict[str, Any]:
    made = simulate_stack(
        protocol.scene,
        frames=protocol.frames,
        size=(protocol.size, protocol.size),
        factor=protocol.factor,
        max_shift=FAR / math.sqrt(2),
        seed=protocol.seed,
    )
    chosen = made.shift.norm(dim=-1) > LIMIT
    estimate = ta.PCC().estimate(made.cube[chosen], made.reference)
    identity = (estimate.warp == torch.eye(2, 3)).flatten(1).all(1)
    return {"frames": int(chosen.sum()), "status": _counts(estimate.status), "identity": int(identity.sum())}


HEADLINE = {
    "clean": "clean",
    "50 % cloud": "50 % under opaque cloud",
    "smooth, blur σ 1.5 px": "smooth (blurred by 1.5 px)",
    "another season (gain field, ⅓ of fields changed)": "another season (⅓ of the fields changed)",
    "shifts ± 20 px": "shifts of ± 20 px, `max_translation=32`",
}


def headline(results: Mapping[str, Any]) -> str:
    """The few numbers of the project's README."""

    def cell(entry: Mapping[str, Any]) -> str:
        return f"{entry['median']:.2g} / {entry['p95']:.2g}"

    rows = [
        [
            words,
            f"**{cell(results['conditions'][name]['PCC()'])}**",
            cell(results["conditions"][name]["satalign"]),
        ]
        for name, words in HEADLINE.items()
    ]
    worst = {
        method: max(abs(value) for axis in results["bias"]["bias"][method].values() for value in axis)
        for method in ("PCC()", "satalign")
    }
    frames = results["conditions"]["clean"]["PCC()"]["frames"]
    return "\n\n".join(
        [
            table([f"{frames} frames of 256²", "torchalign `PCC()`", "satalign `PCC`"], rows),
            "Worst bias at any fraction of a pixel: "
            f"{worst['PCC()']:.2g} px; satalign's {worst['satalign']:.2g} px.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scene", type=Path, default=HERE.parent / "../shared/data/landsat7_rgb.tif", help="an RGB GeoTIFF"
    )
    parser.add_argument("--frames", type=int, default=64, help="per condition, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    add_readme_options(parser)
    arguments = parser.parse_args()
    if readme_or_run(arguments, NAME, report, headline):
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = write_results(NAME, run(arguments))
    print(f"\n{report(json.loads(path.read_text()))}\n\nwritten to {path.name}")


if __name__ == "__main__":
    main()
