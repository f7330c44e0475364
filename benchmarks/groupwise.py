"""A series without a reference against references: simulated seasons, sun, clouds and change, with a truth.

    python benchmarks/groupwise.py                 # all kinds, fresh seeds; some ten minutes on one core
    python benchmarks/groupwise.py --seeds 2 --kinds seasons relief

Errors are in pixels, after the common shift of all frames, which nothing defines, is taken off (their median).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict

import numpy as np
import torch
import xarray as xr
from common import RESULTS, machine, table, versions
from seasons import KINDS, SeasonalSeries, landsat_scene, simulate_seasons

import torchalign as ta

# seeds below were used for choosing thresholds
FIRST_SEED = 2000
REFERENCES = ("median", "iterative")
SEASONS = ("none", "report", "correct")


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
        start = time.perf_counter()
        _, report = ta.align(
            frames, word, ta.PCC(), mask=None if mask is None else mask.numpy(), device="cpu"
        )
        fields = [torch.from_numpy(report[name].values) for name in ("warp", "sigma", "status")]
        found[word] = (*fields, time.perf_counter() - start)
    for season in SEASONS:
        start = time.perf_counter()
        _, estimate = ta.Groupwise(ta.PCC(), season=season)(data.cube, mask, data.sun)
        name = f"groupwise, {season}"
        found[name] = (estimate.warp, estimate.sigma, estimate.status, time.perf_counter() - start)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scene = landsat_scene()
    results: dict[str, dict] = {}
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
    rows = [
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
        for kind, methods in results.items()
        for name, row in methods.items()
        if name != "p95 by series"
    ]
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
        "z rms",
        "s",
    ]
    print(table(header, rows))
    if options.save:
        what = {"machine": machine(), "versions": versions("torch", "torchalign"), "results": results}
        (RESULTS / "groupwise.json").write_text(json.dumps(what, indent=1) + "\n")


if __name__ == "__main__":
    main()
