"""A series without a reference against references: simulated seasons, sun, clouds and change, with a truth.

    python benchmarks/groupwise.py                 # all of it, fresh seeds; some ten minutes on one core
    python benchmarks/groupwise.py --only kinds --seeds 2 --kinds seasons relief
    python benchmarks/groupwise.py --update-readme

* **kinds**: simulated series of 48 frames of 192², see seasons.py. Errors are in pixels, after the common shift of all
  frames, which nothing defines, is taken off (their median).
* **archive**: the last 12 frames of a series on the 36 before them, against all 48 solved anew.
* **real**: the Sentinel-2 NDVI series. Parts of the frame, aligned each by itself, should agree on where a date lies.
  What they disagree by (root mean square over parts and dates) with no reference, and with each of the clear dates as
  the only one, on the dates that both accept.
* **long**: 2,000 frames of 256², lazy: seconds of CPU, and the largest memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from common import (
    RESULTS,
    add_readme_options,
    described,
    machine,
    read_results,
    readme_or_run,
    table,
    versions,
    write_results,
)
from real_series import ROOT, load
from seasons import KINDS, SeasonalSeries, landsat_scene, simulate_seasons

import torchalign as ta

# seeds from 3000 to 3300 were used for choosing thresholds
FIRST_SEED = 6000
REFERENCES = ("median", "iterative")
SEASONS = ("report", "correct")
PARTS = ("kinds", "archive", "real", "long")


def errors(warp: torch.Tensor, valid: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(n, 2) of the accepted frames."""
    error = warp[valid][:, :2, 2].double() - truth[valid]
    return error - error.median(0).values if len(error) else error


def outcomes(data: SeasonalSeries, masked: bool) -> dict[str, dict]:
    """What each method says of one series."""
    mask = data.clear if masked else None
    frames = xr.DataArray(data.cube[:, 0].numpy(), dims=("time", "y", "x"))
    found = {}
    for word in REFERENCES:
        start = time.process_time()
        _, report = ta.align(
            frames, word, ta.PCC(), mask=None if mask is None else mask.numpy(), device="cpu"
        )
        fields = [torch.from_numpy(report[name].values) for name in ("warp", "sigma", "status")]
        found[word] = (*fields, time.process_time() - start)
    for season in SEASONS:
        start = time.process_time()
        _, estimate = ta.Groupwise(ta.PCC(), season=season)(data.cube, mask, data.sun)
        name = f"groupwise, {season}"
        found[name] = (estimate.warp, estimate.sigma, estimate.status, time.process_time() - start)
    result = {}
    for name, (warp, sigma, status, seconds) in found.items():
        valid = status == 0
        error = errors(warp, valid, data.shift)
        result[name] = {
            "error": error.norm(dim=-1).tolist(),
            "z": (error / sigma[valid][:, None].double()).flatten().tolist(),
            "accepted": int(valid.sum()),
            "frames": len(valid),
            "seconds": seconds,
        }
    return result


def summarized(series: list[dict]) -> dict[str, float]:
    error = np.concatenate([one["error"] for one in series])
    z = np.abs(np.concatenate([one["z"] for one in series]))
    return {
        "median": float(np.median(error)),
        "p95": float(np.quantile(error, 0.95)),
        "worst series, p95": max(float(np.quantile(one["error"], 0.95)) for one in series),
        "over 0.5 px": int((error > 0.5).sum()),
        "accepted": sum(one["accepted"] for one in series),
        "frames": sum(one["frames"] for one in series),
        "within 1 sigma": float((z < 1).mean()),
        "within 2 sigma": float((z < 2).mean()),
        "z rms": float(np.sqrt((z**2).mean())),
        "seconds": sum(one["seconds"] for one in series) / len(series),
    }


def run_kinds(options: argparse.Namespace, scene: np.ndarray) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in options.kinds:
        gathered, single = defaultdict(list), []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            data = simulate_seasons(scene, seed=seed, **KINDS[kind])
            outcome = outcomes(data, masked=kind == "everything")
            single.append(
                {name: round(float(np.quantile(one["error"], 0.95)), 3) for name, one in outcome.items()}
            )
            print(kind, seed, single[-1], flush=True)
            for name, one in outcome.items():
                gathered[name].append(one)
        results[kind] = {name: summarized(series) for name, series in gathered.items()} | {
            "p95 by series": single
        }
    return results


def run_archive(options: argparse.Namespace, scene: np.ndarray) -> dict[str, Any]:
    """Pixels between where new frames come to lie on an archive, and where they do if all is solved anew."""
    apart: list[float] = []
    for seed in range(options.first_seed, options.first_seed + max(1, options.seeds // 4)):
        data = simulate_seasons(scene, seed=seed, **KINDS["seasons"])
        module = ta.Groupwise(ta.PCC(), season="none")
        old, new = module.see(data.cube[:36]), module.see(data.cube[36:])
        first = module.place(old).estimate
        added = module.extend(new, old, first.warp[..., 2].double(), first.sigma, first.valid).estimate
        anew = module.place(module.join([old, new])).estimate
        gauge = (anew.warp[:36, :, 2] - first.warp[..., 2])[first.valid].median(0).values
        difference = anew.warp[36:, :, 2] - added.warp[..., 2] - gauge
        apart += difference[added.valid].norm(dim=-1).tolist()
    return {
        "frames": len(apart),
        "median": float(np.median(apart)),
        "p95": float(np.quantile(apart, 0.95)),
    }


def run_real() -> dict[str, Any]:
    ndvi, clear = load(ROOT / "../shared/data/sentinel2_ndvi")
    share = clear.mean(("y", "x")).values
    chosen = share > 0.98
    _, report = ta.align(ndvi, "groupwise", mask=clear, device="cpu")
    status = report["status"].values
    cube = torch.from_numpy(ndvi.where(clear).values[chosen]).float()[:, None]
    height, width = cube.shape[-2:]
    rows, columns = (
        (slice(0, height // 2), slice(height // 2, None)),
        (slice(0, width // 2), slice(width // 2, None)),
    )
    whole = slice(None)
    cuts = {
        "halves": [(part, whole) for part in rows] + [(whole, part) for part in columns],
        "quarters": [(one, other) for one in rows for other in columns],
    }
    found: dict[str, Any] = {
        "clear dates": int(chosen.sum()),
        "clear dates accepted": int((status[chosen] == 0).sum()),
        "overcast dates accepted": int((status[share < 0.02] == 0).sum()),
        "dates accepted": int((status == 0).sum()),
        "dates": len(status),
    }
    for name, parts in cuts.items():
        seen = [cube[..., y, x] for y, x in parts]
        own = [ta.Groupwise(ta.PCC(), season="none").estimate(one) for one in seen]
        medians = [ta.PCC().estimate(one, one.nanmedian(0).values) for one in seen]
        rivals = [[ta.PCC().estimate(one, one[date]) for one in seen] for date in range(len(cube))]
        ratios, own_all, rival_all = [], [], []
        for date, rival in enumerate(rivals):
            common = torch.stack([one.valid for one in [*own, *rival]]).all(0)
            common[date] = False  # of which the reference knows by construction
            if common.sum() < 8:
                continue
            ours, theirs = (disagreement(one, common) for one in (own, rival))
            ratios.append(ours / theirs)
            own_all.append(ours)
            rival_all.append(theirs)
        common = torch.stack([one.valid for one in [*own, *medians]]).all(0)
        found[name] = {
            "no reference": disagreement(own, common),
            "median": disagreement(medians, common),
            "dates": int(common.sum()),
            "references": len(ratios),
            "single reference, best": min(rival_all),
            "single reference, median": float(np.median(rival_all)),
            "no reference, on the same dates": float(np.median(own_all)),
            "worse than so many": sum(ratio > 1 for ratio in ratios),
            "largest ratio": max(ratios),
        }
    return found


def disagreement(parts: list[ta.Estimate], dates: torch.Tensor) -> float:
    place = torch.stack([one.warp[dates][..., 2] for one in parts])  # (parts, dates, 2)
    place = place - place.median(1, keepdim=True).values
    return float((place - place.mean(0)).square().sum(-1).mean().sqrt())


def run_long(frames: int = 2000, size: int = 256, chunk: int = 50) -> dict[str, Any]:
    import dask.array

    scene = torch.rand(1, 1, size + 40, size + 40, generator=torch.Generator().manual_seed(0))
    scene = 3 * torch.nn.functional.avg_pool2d(scene, 9, 1)[0, 0].numpy()

    def block(block_info: Any = None) -> np.ndarray:
        (first, last), *_ = block_info[None]["array-location"]
        random = np.random.default_rng(first)
        made = 0.05 * random.random((last - first, size, size), dtype=np.float32)
        for frame in made:
            y, x = random.integers(0, 4, 2)
            frame += scene[y : y + size, x : x + size]
        return made

    chunks = ((chunk,) * (frames // chunk), (size,), (size,))
    lazy = dask.array.map_blocks(block, chunks=chunks, dtype=np.float32)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with dask.config.set(scheduler="synchronous"):
        _, report = ta.align(xr.DataArray(lazy, dims=("time", "y", "x")), "groupwise", device="cpu")
        status = report["status"].values
    return {
        "frames": frames,
        "size": size,
        "accepted": int((status == 0).sum()),
        "CPU seconds": time.process_time() - begun,
        "GB before": before * 1024 / 1e9,
        "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def report(results: Mapping[str, Any]) -> str:
    """For benchmarks/README.md: of the parts that were run."""
    found = [described(results)]
    if "kinds" in results:
        count = len(next(iter(results["kinds"].values()))["p95 by series"])
        header = [
            "series",
            "method",
            "median",
            "p95",
            "worst p95",
            "> 0.5 px",
            "accepted",
            "in 1 σ",
            "in 2 σ",
        ]
        found += [
            f"{count} series of each kind, from seed {results['first seed']} on; errors in pixels:",
            table([*header, "z rms", "CPU s"], kind_rows(results["kinds"])),
        ]
    if "archive" in results:
        archive = results["archive"]
        found.append(
            f"An archive that grows: {archive['frames']} new frames, {archive['median']:.3f} / {archive['p95']:.3f} px "
            "(median / p95) from where they lie if all is solved anew."
        )
    if "real" in results:
        real = results["real"]
        header = ["parts", "no reference", "median", "no reference, common dates", "one date, best / median"]
        found += [
            f"Real Sentinel-2 NDVI: {real['clear dates accepted']} of {real['clear dates']} clear dates accepted, "
            f"{real['overcast dates accepted']} overcast ones. What parts of the frame disagree by, in pixels:",
            table([*header, "one date is better"], real_rows(real)),
        ]
    if "long" in results:
        long = results["long"]
        found.append(
            f"{long['frames']:,} frames of {long['size']}², lazy: {long['accepted']:,} accepted, "
            f"{long['CPU seconds']:.0f} s on one core, {long['GB']:.2f} GB for the whole process "
            f"({long['GB before']:.2f} before)."
        )
    return "\n\n".join(found)


def kind_rows(kinds: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            kind,
            name,
            f"{row['median']:.4f}",
            f"{row['p95']:.3f}",
            f"{row['worst series, p95']:.3f}",
            str(row["over 0.5 px"]),
            f"{row['accepted']}/{row['frames']}",
            f"{row['within 1 sigma']:.2f}",
            f"{row['within 2 sigma']:.2f}",
            f"{row['z rms']:.2f}",
            f"{row['seconds']:.2f}",
        ]
        for kind, methods in kinds.items()
        for name, row in methods.items()
        if name != "p95 by series"
    ]


def real_rows(real: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{cut['no reference']:.3f}",
            f"{cut['median']:.3f}",
            f"{cut['no reference, on the same dates']:.3f}",
            f"{cut['single reference, best']:.3f} / {cut['single reference, median']:.3f}",
            f"{cut['worse than so many']} of {cut['references']}, by {100 * (cut['largest ratio'] - 1):.0f} % at most",
        ]
        for name, cut in real.items()
        if isinstance(cut, Mapping)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, default=PARTS, help="the rest of the last results stays"
    )
    add_readme_options(parser)
    options = parser.parse_args()
    if readme_or_run(options, "groupwise", report):
        return
    torch.set_num_threads(1)
    results = read_results("groupwise") if (RESULTS / "groupwise.json").exists() else {}
    results |= {"machine": machine(), "versions": versions("torch", "torchalign")}
    runs = {
        "long": run_long,  # first: memory is counted from the start
        "real": run_real,
        "kinds": lambda: run_kinds(options, landsat_scene()),
        "archive": lambda: run_archive(options, landsat_scene()),
    }
    for part in runs:
        if part in options.only:
            results[part] = runs[part]()
            if part == "kinds":
                results["first seed"] = options.first_seed
            print(part, results[part] if part != "kinds" else "", flush=True)
            write_results("groupwise", results)
    print(report(results))


if __name__ == "__main__":
    main()
