"""One-line mutations of the package, and the tests that must notice each. Run by hand, not in CI.

    python tests/mutate.py                    # all, some ten minutes on a quiet core
    python tests/mutate.py --only 'gate-*'    # some, by name
    python tests/mutate.py --list
    python tests/mutate.py --texts            # are the old texts there? in a second

The package, the tests and their configuration are copied to a temporary folder; the tree is never touched. One
mutation at a time is applied there, the tests that must notice it are run, and the file is put back. Python, torch
and what the tests import are loaded once, and every run is a fork of that process, so it needs a POSIX system.

A mutation is *killed* when a selected test fails, and *survives* when all of them pass. It is an *error* when its
old text is not there exactly once, when nothing is selected, when the tests cannot be collected, or when they fail
without it (``--unchecked`` saves the half of the time that this takes). A mutation whose code has moved is to be
brought along, not dropped.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import gc
import importlib
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

_TREE = Path(__file__).resolve().parents[1]
_COPIED = ("torchalign", "tests", "conftest.py", "pyproject.toml", "README.md", "docs", "benchmarks")
# loaded before the first fork; what is missing is left out, as the tests do
_PRELOADED = (
    "numpy", "torch", "torch.func", "torch.distributed.tensor", "torch._subclasses.fake_tensor", "scipy.ndimage",
    "scipy.signal", "scipy.optimize", "xarray", "pandas", "rioxarray", "rasterio", "dask.array", "skimage",
    "skimage.registration", "cv2", "PIL.Image", "pytest",
)  # fmt: skip
_TIMEOUT = 900  # seconds; a mutation may make a loop endless
_NO_TESTS, _FAILED, _CRASHED = 5, 1, 99  # of pytest's exit codes, and one of our own


class Mutation(NamedTuple):
    name: str
    file: str  # within torchalign/
    old: str  # occurs exactly once
    new: str
    tests: str  # arguments of pytest


_F = "tests/functional"
_CONTRACT = "tests/test_contract.py"

MUTATIONS = [
    # --- functional/affine, motion ---
    Mutation(
        "affine-compose-order", "functional/affine.py",
        "return multiply(to_homogeneous(second), to_homogeneous(first))",
        "return multiply(to_homogeneous(first), to_homogeneous(second))",
        f"{_F}/test_affine.py -k compose",
    ),
    Mutation(
        "affine-inverse-offset", "functional/affine.py",
        "numerator = torch.stack((d, -b, b * y - d * x, -c, a, c * x - a * y), -1)",
        "numerator = torch.stack((d, -b, b * y - d * x, -c, a, a * y - c * x), -1)",
        f"{_F}/test_affine.py -k inverse",
    ),
    Mutation(
        "affine-rescale-half-pixel", "functional/affine.py",
        "return change_origin(scaled, (0.5, 0.5))", "return change_origin(scaled, (0.0, 0.0))",
        f"{_F}/test_affine.py -k rescale",
    ),
    Mutation(
        "affine-conjugate-sign", "functional/affine.py",
        "for move in (-offset, offset))", "for move in (offset, -offset))",
        f"{_F}/test_affine.py -k change_origin",
    ),
    Mutation(
        "affine-centre-half-pixel", "functional/affine.py",
        "center = ((width - 1) / 2, (height - 1) / 2)", "center = (width / 2, height / 2)",
        f"{_F}/test_affine.py -k center",
    ),
    Mutation(
        "affine-split-sign", "functional/affine.py",
        "centred = compose_warps(warp, translation_warp(-translation))",
        "centred = compose_warps(warp, translation_warp(translation))",
        f"{_F}/test_affine.py {_CONTRACT} -k 'split or examples or init_with_a_rotation and PCC'",
    ),
    Mutation(
        "affine-points-divide", "functional/affine.py",
        "return moved if warp.shape[-2] == 2 else moved[..., :2] / moved[..., 2:]",
        "return moved[..., :2]",
        f"{_F}/test_affine.py -k transform_points",
    ),
    Mutation(
        "affine-homogeneous-scale", "functional/affine.py",
        "return warp if warp.shape[-2] == 2 else warp[..., :2, :] / warp[..., 2:, 2:]",
        "return warp[..., :2, :]",
        f"{_F}/test_affine.py -k homogeneous",
    ),
    Mutation(
        "affine-adjugate-column", "functional/affine.py",
        "torch.linalg.cross(third, first),", "torch.linalg.cross(first, third),",
        f"{_F}/test_motion.py -k adjugate",
    ),
    Mutation(
        "motion-rotation-sign", "functional/motion.py",
        "columns.append((-y, x))", "columns.append((y, x))",
        f"{_F}/test_motion.py -k jacobian",
    ),
    Mutation(
        "motion-perspective-sign", "functional/motion.py",
        "columns += [(-x * x, -x * y), (-x * y, -y * y)]", "columns += [(x * x, x * y), (x * y, y * y)]",
        f"{_F}/test_motion.py -k jacobian",
    ),
    Mutation(
        "motion-shorter-side", "functional/motion.py",
        "return max(size) / 2", "return min(size) / 2",
        f"{_F}/test_motion.py -k normalised",
    ),
    Mutation(
        "motion-last-entry", "functional/motion.py",
        "return unit_corner(conjugated(scaled(warp, half_length(size)), -_frame_centre(size, warp)))",
        "return conjugated(scaled(warp, half_length(size)), -_frame_centre(size, warp))",
        f"{_F}/test_motion.py tests/test_ecc.py -k 'normalised or last_entry'",
    ),
    # --- functional: transforms, means, windows ---
    Mutation(
        "fourier-wave-sign", "functional/fourier.py",
        "turn = 2 * math.pi * shift", "turn = -2 * math.pi * shift",
        f"{_F}/test_phase.py -k sign_axes",
    ),
    Mutation(
        "smoothing-border", "functional/smoothing.py",
        'result = F.pad(flat, (length - 1,) * 4, mode="replicate")',
        "result = F.pad(flat, (length - 1,) * 4)",
        f"{_F}/test_smoothing.py",
    ),
    Mutation(
        "smoothing-sum", "functional/smoothing.py",
        "return (result * (1 / length**4)).reshape(image.shape)",
        "return (result * (1 / length**3)).reshape(image.shape)",
        f"{_F}/test_smoothing.py",
    ),
    Mutation(
        "smoothing-missing-sides", "functional/smoothing.py",
        "image = F.pad(image, (0, missing[1], 0, missing[0]))",
        "image = F.pad(image, (missing[1], 0, missing[0], 0))",
        f"{_F}/test_smoothing.py",
    ),
    Mutation(
        "smoothing-odd-row", "functional/smoothing.py",
        "image = torch.cat((image, image[..., -1:, :]), -2)",
        "image = torch.cat((image, 0 * image[..., -1:, :]), -2)",
        f"{_F}/test_smoothing.py",
    ),
    Mutation(
        "smoothing-upper-median", "functional/smoothing.py",
        "return ordered.gather(dim, (count - 1).clamp(min=0) // 2).squeeze(dim)",
        "return ordered.gather(dim, count // 2).squeeze(dim)",
        f"{_F}/test_smoothing.py",
    ),
    Mutation(
        "smoothing-corners", "functional/smoothing.py",
        'scale_factor=float(times), mode="bilinear", align_corners=False)',
        'scale_factor=float(times), mode="bilinear", align_corners=True)',
        f"{_F}/test_smoothing.py",
    ),
    Mutation(
        "window-ramp", "functional/working_grid.py",
        "return max(0.5 * taper * length, min(_LEAST_RAMP, 0.25 * length))",
        "return max(taper * length, min(_LEAST_RAMP, 0.25 * length))",
        f"{_F}/test_working_grid.py",
    ),
    Mutation(
        "window-centre", "functional/working_grid.py",
        "from_middle = (position - 0.5 * (length - 1)).abs()",
        "from_middle = (position - 0.5 * length).abs()",
        f"{_F}/test_working_grid.py",
    ),
    Mutation(
        "window-common-sign", "functional/working_grid.py",
        "tukey(position - shift[..., 1 - axis, None], length, self.taper)",
        "tukey(position + shift[..., 1 - axis, None], length, self.taper)",
        f"{_F}/test_working_grid.py",
    ),
    Mutation(
        "grid-cycles", "functional/low_pass.py",
        "return y.to(like.dtype)[:, None] / frame[0]", "return y.to(like.dtype)[:, None] / frame[1]",
        f"{_F}/test_phase.py -k sign_axes",
    ),
    Mutation(
        "sizes-lags", "functional/sizes.py",
        "-min(furthest, samples // 2), min(furthest, (samples - 1) // 2) + 1, device=like.device",
        "-min(furthest, samples // 2), min(furthest, (samples - 1) // 2), device=like.device",
        f"{_F}/test_phase.py -k coarse_peak",
    ),
    # --- functional/phase, texture, common_ground, structure ---
    Mutation(
        "phase-conjugate", "functional/phase.py",
        "return moving.conj() * (reference * weight)", "return moving * (reference * weight).conj()",
        f"{_F}/test_phase.py -k sign_axes",
    ),
    Mutation(
        "phase-conjugate-of-a-quotient", "functional/phase.py",
        "power = moving.conj() * reference", "power = moving * reference.conj()",
        f"{_F}/test_phase.py -k cross_power",
    ),
    Mutation(
        "phase-weighting", "functional/phase.py",
        '(magnitude if weighting == "phase" else magnitude.sqrt())',
        '(magnitude if weighting == "sqrt" else magnitude.sqrt())',
        f"{_F}/test_phase.py -k cross_power",
    ),
    Mutation(
        "phase-start-too-far", "functional/peak.py",
        "peak.outside & ~better,", "peak.outside,",
        f"{_F}/test_phase.py -k start",
    ),
    Mutation(
        "phase-start-lower", "functional/peak.py",
        "better = height >= peak.height", "better = height <= peak.height",
        f"{_F}/test_phase.py -k start",
    ),
    Mutation(
        "phase-too-far", "functional/peak.py",
        "outside = (highest > OUTSIDE_MARGIN * inside.clamp(min=0)) & (highest >= MIN_SIGNIFICANCE * spread)",
        "outside = highest < 0",
        "tests/test_pcc.py -k each_status",
    ),
    Mutation(
        "phase-significance", "functional/phase.py",
        "torch.isfinite(sigma) & significant", "torch.isfinite(sigma)",
        f"{_F}/test_phase.py -k unrelated",
    ),
    Mutation(
        "phase-mixed-term", "functional/peak.py",
        "torch.linalg.cross(first, second)", "torch.linalg.cross(first, second * second.sign())",
        f"{_F}/test_phase.py -k 'refine_peak or gradients_are'",
    ),
    Mutation(
        "phase-exact-zero", "functional/peak.py",
        "none = fixed.abs() < 64 * torch.finfo(shift.dtype).eps",
        "none = fixed.abs() < 0",
        f"{_CONTRACT} -k 'identical_frames and PCC'",
    ),
    Mutation(
        "phase-dft-axes", "functional/peak.py",
        "torch.stack([centre[..., 0] + offsets[best % count], centre[..., 1] + offsets[best // count]], -1)",
        "torch.stack([centre[..., 0] + offsets[best // count], centre[..., 1] + offsets[best % count]], -1)",
        f"{_F}/test_phase.py -k dft",
    ),
    Mutation(
        "phase-multiplicity", "functional/peak.py",
        "return 1 + (frequency > 0).to(frequency.dtype)", "return 1 + (frequency >= 0).to(frequency.dtype)",
        f"{_F}/test_phase.py -k refine_peak",
    ),
    Mutation(
        "texture-weights", "functional/texture.py",
        "return contrast if weights is None else contrast * weights", "return contrast",
        f"{_F}/test_phase.py -k 'masks or local_contrast'",
    ),
    Mutation(
        "texture-flat", "functional/texture.py",
        "flat = ~((scale > noise) & (scale < torch.inf)) | empty", "flat = ~(scale < torch.inf) | empty",
        f"{_F}/test_phase.py -k flat",
    ),
    Mutation(
        "ground-negative-agrees", "functional/common_ground.py",
        "share = common.clamp(min=0).square() / (own * other + tiny)",
        "share = common.square() / (own * other + tiny)",
        f"{_F}/test_phase.py {_F}/test_common_ground.py -k 'agreement'",
    ),
    Mutation(
        "ground-not-reweighted", "functional/common_ground.py",
        "chosen = prior * ground", "chosen = prior",
        f"{_F}/test_common_ground.py",
    ),
    Mutation(
        "ground-misaligned", "functional/common_ground.py",
        "ground = residual <= _LARGEST_RESIDUAL * scale + forgiven * alpha.abs()",
        "ground = residual <= _LARGEST_RESIDUAL * scale",
        f"{_F}/test_common_ground.py -k edges",
    ),
    Mutation(
        "ground-small-holes", "functional/common_ground.py",
        "return torch.where(mask, image, filled), mask | (share > _FILLED)",
        "return torch.where(mask, image, filled), mask",
        f"{_F}/test_common_ground.py -k holes",
    ),
    Mutation(
        "ground-holes-of-zero", "functional/common_ground.py",
        "return torch.where(mask, centred, local)", "return torch.where(mask, centred, 0.0)",
        f"{_F}/test_common_ground.py -k holes",
    ),
    Mutation(
        "structure-mask-edge", "functional/structure.py",
        "inside = erode(mask, _SUPPORT)", "inside = mask",
        f"{_F}/test_structure.py -k mask",
    ),
    Mutation(
        "structure-single-angle", "functional/structure.py",
        "torch.stack(((xx - yy) * length, 2 * x * y * length))",
        "torch.stack(((xx - yy) * length, x * y * length))",
        f"{_F}/test_structure.py -k 'angle or scipy'",
    ),
    # --- functional/quality, uncertainty ---
    Mutation(
        "gate-move-not-made", "functional/quality.py",
        "left = (0.5 * displacement.square()).masked_fill(~(near > gained), 0.0)",
        "left = torch.zeros_like(displacement)",
        f"{_F}/test_quality.py -k in_place",
    ),
    Mutation(
        "gate-in-place-pixels", "functional/quality.py",
        "_IN_PLACE_PIXELS = 0.25", "_IN_PLACE_PIXELS = 25.0",
        f"{_F}/test_quality.py -k 'worse or in_place'",
    ),
    Mutation(
        "gate-in-place-sigmas", "functional/quality.py",
        "_IN_PLACE_SIGMAS = 3.0", "_IN_PLACE_SIGMAS = 0.0",
        f"{_F}/test_quality.py -k in_place",
    ),
    Mutation(
        "gate-negative-scores", "functional/quality.py",
        "gained = (score >= score_before) & (score > 0)", "gained = score >= score_before",
        f"{_F}/test_quality.py -k 'negative'",
    ),
    Mutation(
        "gate-limit", "functional/quality.py",
        "status = motion.status.masked_fill(trusted > (displacement <= limit), int(Status.TOO_FAR))",
        "status = motion.status",
        f"{_F}/test_quality.py -k limit",
    ),
    Mutation(
        "gate-sigma-no-number", "functional/quality.py",
        "known = motion.warp.flatten(-2).sum(-1) + motion.sigma",
        "known = motion.warp.flatten(-2).sum(-1)",
        f"{_F}/test_quality.py -k no_number",
    ),
    Mutation(
        "gate-worse-stage", "functional/quality.py",
        "worse = result.valid & (judged.score < result.score - WORSE)",
        "worse = torch.zeros_like(result.valid)",
        "tests/test_ecc.py -k makes_a_frame_worse",
    ),
    Mutation(
        "gate-min-score", "functional/quality.py",
        "(status == 0) & (result.score < min_score)",
        "(status == 0) & (result.score_before < min_score)",
        f"{_F}/test_quality.py -k min_score",
    ),
    Mutation(
        "gate-untrusted-inliers", "functional/quality.py",
        "if not all_true(trusted):", "if False:",
        f"{_F}/test_quality.py -k not_trusted",
    ),
    Mutation(
        "score-flat", "functional/quality.py",
        "flat = variance <= 16 * torch.finfo(square.dtype).eps * square", "flat = variance < 0",
        f"{_F}/test_quality.py -k nothing_to_score",
    ),
    Mutation(
        "sigma-smaller-axis", "functional/uncertainty.py",
        "return (0.5 * (a + b) + torch.hypot(apart, c))",
        "return (0.5 * (a + b) - torch.hypot(apart, c))",
        f"{_F}/test_quality.py -k 'largest_sigma'",
    ),
    # --- functional/ecc ---
    Mutation(
        "ecc-lambda-sign", "functional/normal_equations.py",
        "good = (along > 0) & (system.rest > 0)", "good = (along != 0) & (system.rest > 0)",
        f"{_F}/test_enhanced_correlation.py -k turn_back",
    ),
    Mutation(
        "ecc-sigma-blocks", "functional/ecc.py",
        "while times < _BLOCK and min(size) >= 16 * 2**times:", "while times < _BLOCK:",
        f"{_F}/test_enhanced_correlation.py -k sigma",
    ),
    Mutation(
        "ecc-coarse-level", "functional/ecc.py",
        "worse = scores[1] > scores[0]", "worse = scores[1] > 2 + scores[0]",
        f"{_F}/test_enhanced_correlation.py -k leads_astray",
    ),
    Mutation(
        "ecc-significance", "functional/ecc.py",
        "converged = sound & (state.reach <= search.tolerance) & told",
        "converged = sound & (state.reach <= search.tolerance)",
        f"{_F}/test_enhanced_correlation.py -k unrelated",
    ),
    Mutation(
        "ecc-blocks", "functional/ecc.py",
        "if search.far is not None and not level.vector:", "if False:",
        "tests/test_ecc.py -k few_spots",
    ),
    Mutation(
        "ecc-nan-init", "functional/ecc.py",
        "converged=found.converged & finite,", "converged=found.converged,",
        f"{_F}/test_enhanced_correlation.py -k no_number",
    ),
    Mutation(
        "ecc-shifted-mask", "functional/moving_frames.py",
        "common = common * level.grid.move(self.weights, shift).clamp(0, 1).flatten(-2)", "pass",
        f"{_F}/test_enhanced_correlation.py -k no_evidence",
    ),
    Mutation(
        "ecc-reference-weights", "functional/moving_frames.py",
        "return torch.minimum(level.weights, own)", "return own",
        f"{_F}/test_enhanced_correlation.py -k no_evidence",
    ),
    Mutation(
        "ecc-perspective-slope", "functional/moving_frames.py",
        "by_x = (slope_x * (a - x * g) + slope_y * (d - y * g)) / depth",
        "by_x = (slope_x * a + slope_y * d) / depth",
        f"{_F}/test_enhanced_correlation.py -k implicit_derivatives",
    ),
    Mutation(
        "ecc-implicit-sign", "functional/ecc.py",
        "step = -(inverse * increment[..., None, :]).sum(-1)",
        "step = (inverse * increment[..., None, :]).sum(-1)",
        f"{_F}/test_enhanced_correlation.py -k implicit_derivatives",
    ),
    Mutation(
        "ecc-blind-direction", "functional/normal_equations.py",
        "_BLIND = 1e-2", "_BLIND = 1e6",
        f"{_F}/test_enhanced_correlation.py -k one_direction",
    ),
    Mutation(
        "ecc-biweight", "functional/ecc.py",
        "return (1 - ratio.square()).clamp(min=0).square()", "return torch.ones_like(ratio)",
        f"{_F}/test_enhanced_correlation.py -k robust",
    ),
    Mutation(
        "ecc-moves-on", "functional/ecc.py",
        "warp = torch.where(moves[..., None, None], stepped, warp)", "warp = stepped",
        f"{_F}/test_enhanced_correlation.py -k while_others",
    ),
    # --- functional/matching ---
    Mutation(
        "matching-mirrored", "functional/matching.py",
        "sound = sound & (area * image_area > 0)", "sound = sound & (area != 0)",
        f"{_F}/test_matching.py -k mirrored",
    ),
    Mutation(
        "matching-radius", "functional/matching.py",
        "allowed = allowed & (dx.square() + dy.square() <= radius**2)",
        "allowed = allowed & (dx.square() + dy.square() <= radius)",
        f"{_F}/test_matching.py -k mutual",
    ),
    Mutation(
        "matching-first-of-ties", "functional/matching.py",
        "mutual = mutual & (first.gather(-1, index) == own)", "mutual = mutual & (index >= 0)",
        f"{_F}/test_matching.py -k alike",
    ),
    Mutation(
        "matching-mode", "functional/matching.py",
        "score = ((1 - square / _MODE_RADIUS**2).clamp(min=0) * weight.unsqueeze(-2)).sum(-1)",
        "score = ((1 - square / _MODE_RADIUS**2) * weight.unsqueeze(-2)).sum(-1)",
        f"{_F}/test_matching.py -k mode_survives",
    ),
    Mutation(
        "matching-chance", "functional/matching.py",
        "return (inliers - fixed - expected) / (expected + 1) ** 0.5",
        "return (inliers - fixed) / (expected + 1) ** 0.5",
        f"{_F}/test_matching.py -k significance",
    ),
    Mutation(
        "matching-sigma-freedom", "functional/matching.py",
        "determined = (freedom > 0) & affine.are_finite(covariance)",
        "determined = affine.are_finite(covariance)",
        f"{_F}/test_matching.py -k too_little",
    ),
    Mutation(
        "matching-window-weight", "functional/matching.py",
        "emphasis = self.used * correlation.square()", "emphasis = self.used * torch.ones_like(correlation)",
        f"{_F}/test_matching.py -k without_weight",
    ),
    Mutation(
        "matching-window-overlap", "functional/matching.py",
        "return torch.matmul(pulls.mT, torch.matmul(along_x * along_y, pulls))",
        "return torch.matmul(pulls.mT, pulls)",
        f"{_F}/test_matching.py -k same_place",
    ),
    # --- functional/warp, sampling, keypoints, sift, channels ---
    Mutation(
        "warp-inside", "functional/sampling.py",
        "return ((row >= 0) & (row < self.size[0])) & ((column >= 0) & (column < self.size[1]))",
        "return ((row >= 0) & (row <= self.size[0])) & ((column >= 0) & (column <= self.size[1]))",
        f"{_F}/test_warp.py -k 'fast_path or padding_and_fill'",
    ),
    Mutation(
        "warp-reflection", "functional/sampling.py",
        "index = torch.minimum(index, 2 * length - 1 - index)",
        "index = torch.minimum(index, 2 * length - 2 - index)",
        f"{_F}/test_warp.py -k affine_agrees_with_scipy",
    ),
    Mutation(
        "warp-cubic", "functional/sampling.py",
        "_CUBIC_A = -0.5", "_CUBIC_A = -0.75",
        f"{_F}/test_warp.py -k quadratic",
    ),
    Mutation(
        "warp-lines-fraction", "functional/sampling.py",
        "return torch.lerp(left, right, self.x)", "return torch.lerp(left, right, self.y)",
        f"{_F}/test_warp.py -k fast_path",
    ),
    Mutation(
        "warp-spline", "functional/sampling.py",
        "return ((0.5 - fraction * (1 / 3)) * fraction + 0.5) * fraction + (1 / 6)",
        "return ((0.5 - fraction * (1 / 4)) * fraction + 0.5) * fraction + (1 / 6)",
        f"{_F}/test_enhanced_correlation.py -k spline",
    ),
    Mutation(
        "warp-bicubic-beside-holes", "functional/warp.py",
        "values = torch.where(sampler.all_usable(weights), sampler.bicubic(taps), values)",
        "values = sampler.bicubic(taps)",
        f"{_F}/test_warp.py -k gives_way",
    ),
    Mutation(
        "warp-normalised", "functional/warp.py",
        "values = sampler.bilinear(taps) / sampler.bilinear(weights).clamp(min=0.25)",
        "values = sampler.bilinear(taps)",
        f"{_F}/test_warp.py -k normalised",
    ),
    Mutation(
        "warp-bad-pixel-kept", "functional/warp.py",
        "return torch.where(near_usable, values, _as_signed(sampler.nearest, frames))", "return values",
        f"{_F}/test_warp.py -k 'one_bad_pixel or sentinel'",
    ),
    Mutation(
        "warp-bool-rounding", "functional/warp.py",
        "return values > 0.5", "return values >= 0.5",
        f"{_F}/test_warp.py -k half_to_even",
    ),
    Mutation(
        "warp-integers-wrap", "functional/warp.py",
        "return values.round().clamp(lowest, highest).to(dtype)", "return values.round().to(dtype)",
        f"{_F}/test_warp.py -k never_wrapped",
    ),
    Mutation(
        "warp-affine-numerator", "functional/warp.py",
        "down = -d * x + (d * c - a * f), (b * d - a * (e - 1)) * y",
        "down = -d * x + (d * c - a * f), (b * d - a * e) * y",
        f"{_F}/test_warp.py -k opencv",
    ),
    Mutation(
        "keypoints-mixed-term", "functional/keypoints.py",
        "xy = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 4",
        "xy = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 2",
        f"{_F}/test_keypoints.py -k quadratics",
    ),
    Mutation(
        "trust-misfit", "functional/uncertainty.py",
        "return self._replace(covariance=self.covariance + misfit), trace(misfit)",
        "return self._replace(covariance=self.covariance), trace(misfit)",
        "tests/test_trust.py -k 'motion_that_the_model_lacks and PCC'",
    ),
    Mutation(
        "trust-chance", "functional/uncertainty.py",
        "(times * _BEYOND_CHANCE) ** 2 * (chance / found)", "0.0",
        "tests/test_trust.py -k pulls_of_blocks",
    ),
    Mutation(
        "trust-pulls", "functional/uncertainty.py",
        "(own - reference).mul_(root)", "own * root",
        "tests/test_trust.py -k pulls_of_blocks",
    ),
    Mutation(
        "trust-stripes-by-their-phase", "functional/stripes.py",
        "across = (line * turn).imag", "across = line.imag",
        "tests/test_trust.py -k weak_stripes",
    ),
    Mutation(
        "trust-stripes-of-moved-frames", "lgm.py",
        "fixed_at=-whole", "fixed_at=None",
        "tests/test_trust.py -k brought_together",
    ),
    Mutation(
        "gate-parts-that-disagree", "functional/quality.py",
        "result.valid & distorted", "result.valid & ~result.valid",
        "tests/test_trust.py -k model_lacks",
    ),
    Mutation(
        "gate-a-shift-after-a-shift", "functional/quality.py",
        "extra = extra + _misfit_before(motions[number], kept, accepted)", "pass",
        "tests/functional/test_quality.py -k disagreed_by",
    ),
    Mutation(
        "gate-what-the-result-stands-for", "functional/quality.py",
        "kept = replaced(kept, motions[number], accepted)", "kept = motions[number]",
        "tests/functional/test_quality.py -k casts_no_doubt",
    ),
    Mutation(
        "defects-beside-masked", "functional/defects.py",
        "return (off.detach().abs() > _HOT * typical) & across & down, off",
        "return (off.detach().abs() > _HOT * typical) & usable, off",
        "tests/test_trust.py -k beside_masked",
    ),
    Mutation(
        "network-last-steps", "functional/network.py", "_LAST_STEPS = 2", "_LAST_STEPS = 0",
        "tests/functional/test_network.py -k long_chain",
    ),
    Mutation(
        "gate-shifts-that-disagree", "functional/quality.py",
        "result, lost = _widened(result, extra)", "lost = result.valid & False",
        "tests/test_trust.py -k two_shifts",
    ),
    Mutation(
        "keypoints-plateau", "functional/keypoints.py",
        "return scores > torch.maximum(others", "return scores >= torch.maximum(others",
        f"{_F}/test_keypoints.py -k 'plateaus'",
    ),
    Mutation(
        "keypoints-allowed", "functional/keypoints.py",
        "value, index = scores.masked_fill(~allowed, -torch.inf).topk(found, -1)",
        "value, index = scores.topk(found, -1)",
        f"{_F}/test_keypoints.py -k highest",
    ),
    Mutation(
        "sift-edges", "functional/sift.py",
        "valid = valid & (contrast.abs() >= _MIN_CONTRAST) & (edge < (max_edge_ratio + 1) ** 2 / max_edge_ratio)",
        "valid = valid & (contrast.abs() >= _MIN_CONTRAST)",
        f"{_F}/test_sift.py -k long_and_thin",
    ),
    Mutation(
        "sift-orientation-sign", "functional/sift.py",
        "rotated = sigma * (cosine * x - sine * y), sigma * (sine * x + cosine * y)",
        "rotated = sigma * (cosine * x + sine * y), sigma * (cosine * y - sine * x)",
        f"{_F}/test_sift.py -k turns",
    ),
    Mutation(
        "channels-sobel", "functional/channels.py",
        "gx = (smooth_y[..., 2:] - smooth_y[..., :-2]) / 8", "gx = (smooth_y[..., 2:] - smooth_y[..., :-2]) / 4",
        f"{_F}/test_channels.py -k sobel",
    ),
    Mutation(
        "channels-nan", "functional/channels.py",
        "return torch.where(met, torch.nan, magnitude).reshape(image.shape)",
        "return magnitude.reshape(image.shape)",
        f"{_F}/test_channels.py -k unusable",
    ),
    Mutation(
        "channels-crop-origin", "functional/channels.py",
        "top, left = (height - crop_height) // 2, (width - crop_width) // 2",
        "top, left = (height - crop_height + 1) // 2, (width - crop_width + 1) // 2",
        f"{_F}/test_channels.py -k center_crop",
    ),
    # --- the aligners ---
    Mutation(
        "aligner-mask-and-nan", "aligner.py",
        "usable, image = usable & mask, torch", "usable, image = mask, torch",
        f"{_CONTRACT} -k 'missing_pixels and PCC and not once and not grid'",
    ),
    Mutation(
        "aligner-nan-init", "aligner.py",
        "return motion._replace(status=torch.where(block.finite, motion.status, int(Status.NOT_CONVERGED)))",
        "return motion",
        f"{_CONTRACT} -k 'bad_init and PCC'",
    ),
    Mutation(
        "aligner-fill-of-the-rejected", "aligner.py",
        "kept = torch.where(estimate.valid[..., None, None, None], aligned, job.cube)", "kept = aligned",
        "tests/test_pcc.py -k not_filled",
    ),
    Mutation(
        "aligner-crop-homography", "aligner.py",
        "back = unit_corner(change_origin(estimate.warp, corner))",
        "back = change_origin(estimate.warp, corner)",
        "tests/test_ecc.py -k last_entry",
    ),
    Mutation(
        "aligner-crop-back", "aligner.py",
        "corner = (-self.origin[0], -self.origin[1])", "corner = self.origin",
        f"{_CONTRACT} -k 'init_with_a_rotation and PCC'",
    ),
    Mutation(
        "aligner-crop-init", "aligner.py",
        "init = change_origin(init, origin)", "pass",
        "tests/test_ecc.py -k crop_starts",
    ),
    Mutation(
        "aligner-masked-gradients", "aligner.py",
        "window = torch.where(mask.unsqueeze(-3), window, torch.nan)", "pass",
        f"{_CONTRACT} -k 'masked_object or gradients and (missing or mask)'",
    ),
    Mutation(
        "aligner-undone-validity", "aligner.py",
        "return undone.values.squeeze(-3).nan_to_num(), undone.validity, start, about_centre",
        "return undone.values.squeeze(-3).nan_to_num(), usable, start, about_centre",
        "tests/test_pcc.py -k 'init'",
    ),
    Mutation(
        "pcc-max-sigma", "pcc.py",
        "sure = found.converged & (found.sigma.square() - found.misfit <= self.max_sigma**2)",
        "sure = found.converged",
        "tests/test_pcc.py -k max_sigma",
    ),
    Mutation(
        "pcc-too-far", "pcc.py",
        "status = status.masked_fill(found.outside, int(Status.TOO_FAR))", "pass",
        "tests/test_pcc.py -k each_status",
    ),
    Mutation(
        "pcc-flat", "pcc.py",
        "status = status.masked_fill(found.flat, int(Status.NO_TEXTURE))", "pass",
        "tests/test_pcc.py -k each_status",
    ),
    Mutation(
        "pcc-init-order", "pcc.py",
        "warp = compose_warps(about_centre, warp)", "warp = compose_warps(warp, about_centre)",
        "tests/test_pcc.py -k turn_that_is_known",
    ),
    Mutation(
        "ecc-gauss-kernel", "ecc.py",
        "blur = 0.3 * ((self.gauss_kernel_size - 1) / 2 - 1) + 0.8",
        "blur = 0.3 * ((self.gauss_kernel_size - 1) / 2) + 0.8",
        "tests/test_ecc.py -k gauss",
    ),
    Mutation(
        "ecc-flat", "ecc.py",
        "status = status.masked_fill(found.flat, int(Status.NO_TEXTURE))", "pass",
        "tests/test_ecc.py -k flat",
    ),
    Mutation(
        "lgm-too-far", "lgm.py",
        "too_far = beyond & clearly & (far_evidence >= _LEAST_EVIDENCE)",
        "too_far = beyond & clearly & (far_evidence >= 1e9)",
        "tests/test_lgm.py -k half_a_frame",
    ),
    Mutation(
        "lgm-shared-ground", "lgm.py",
        "ground = usable & shared_ground(on_it, part.reference, same, usable & there)", "ground = usable",
        "tests/test_lgm.py -k shared_ground",
    ),
    Mutation(
        "lgm-refined", "lgm.py",
        "shift = torch.where(better.unsqueeze(-1), whole + refined.shift, rough[..., 2])",
        "shift = rough[..., 2]",
        "tests/test_lgm.py -k 'hundredths and 0.0'",
    ),
    Mutation(
        "lgm-too-few", "lgm.py",
        "status = torch.where(evidence >= _LEAST_EVIDENCE, 0, int(Status.TOO_FEW_MATCHES))",
        "status = torch.zeros_like(evidence, dtype=torch.int64)",
        "tests/test_lgm.py -k other_places",
    ),
    Mutation(
        "lgm-matches-crop", "lgm.py",
        "offset = torch.stack([points.new_full((), side) for side in origin])",
        "offset = torch.stack([points.new_full((), 0 * side) for side in origin])",
        "tests/test_lgm.py -k what_the_warp_says",
    ),
    Mutation(
        "cascade-beyond-its-limit", "cascade.py",
        "near = centre_moves(motion, size) <= stage.max_translation",
        "near = motion.warp.isfinite().flatten(-2).all(-1)",
        "tests/test_ecc.py -k beyond_its_limit",
    ),
    Mutation(
        "cascade-nan-init", "cascade.py",
        "init, _ = affine.finite_warp(init)", "pass",
        "tests/test_ecc.py -k no_number",
    ),
    Mutation(
        "cascade-crop", "cascade.py",
        "block = block._replace(init=_change_origin(init, block.origin), finite=None)",
        "block = block._replace(init=init, finite=None)",
        "tests/test_ecc.py -k 'crop and stage'",
    ),
    Mutation(
        "cascade-inliers-of-another-crop", "cascade.py",
        "inliers=motion.inliers if own.is_over(block) else None", "inliers=motion.inliers",
        "tests/test_ecc.py -k inliers_of_another",
    ),
    Mutation(
        "cascade-last-trusted", "cascade.py",
        "trusted = second.status == 0", "trusted = second.status >= 0",
        "tests/test_ecc.py -k 'one_image'",
    ),
    # --- CUDA graphs ---
    Mutation(
        "graphs-results-alias", "_graphs.py",
        "return tree_map_only(Tensor, torch.clone, shape.found)", "return shape.found",
        "tests/test_graphs.py -k of_a_call_and_stay",
    ),
    Mutation(
        "graphs-first-aliases", "_graphs.py",
        "return tree_map_only(Tensor, torch.clone, found)", "return found",
        "tests/test_graphs.py -k of_a_call_and_stay",
    ),
    Mutation(
        "graphs-stale-input", "_graphs.py",
        "own.copy_(tensor)", "pass",
        "tests/test_graphs.py -k of_a_call_and_stay",
    ),
    Mutation(
        "graphs-dtypes", "_graphs.py",
        "(tensor.shape, tensor.dtype)", "(tensor.shape,)",
        "tests/test_graphs.py -k kept_apart",
    ),
    Mutation(
        "graphs-gradient", "_graphs.py",
        "if carries_gradient(*_tensors_in(tree_leaves(found))):", "if False:",
        "tests/test_graphs.py -k gradient",
    ),
    Mutation(
        "graphs-streams", "_graphs.py",
        "self._playing.wait_stream(here)", "pass",
        "tests/test_graphs.py -k driver",
    ),
    Mutation(
        "graphs-callable-channel", "_graphs.py",
        "callable(channel) and not isinstance(channel, nn.Module)", "False",
        "tests/test_graphs.py -k may_be_recorded",
    ),
    Mutation(
        "graphs-defects", "cube/run.py",
        "            with waiting():\n                result", "            if True:\n                result",
        "tests/test_graphs.py -k defects",
    ),
    Mutation(
        "graphs-owner", "_graphs.py",
        "recorder.hand_over(tensor)", "pass",
        "tests/test_graphs.py -k until_it_was_read",
    ),
    Mutation(
        "graphs-reference", "cube/run.py",
        "fixed.keys() >= {0, 2}", "False",
        "tests/test_graphs.py -k looked_at_once",
    ),
    # --- labelled cubes ---
    Mutation(
        "run-padding-of-the-residual", "cube/run.py",
        '{"interpolation": "nearest", "padding_mode": "zeros", "field": found.field}',
        '{"interpolation": "nearest", "padding_mode": "border", "field": found.field}',
        "tests/test_series.py -k 'left_is_measured or borders'",
    ),
    Mutation(
        "run-residual-measured", "cube/run.py",
        "measured = found.valid & remaining.converged & ~remaining.flat & ~remaining.outside",
        "measured = remaining.converged & ~remaining.flat & ~remaining.outside",
        "tests/test_series.py -k summary_in_numbers",
    ),
    Mutation(
        "run-rejected-bits", "cube/run.py",
        "encoded[rejected] = raw[rejected]", "pass",
        "tests/test_xr.py -k 'bit_for_bit'",
    ),
    Mutation(
        "run-apply-identity", "cube/run.py",
        "return np.where(kept, self.pixels.encode(aligned, raw), raw), {}",
        "return self.pixels.encode(aligned, raw), {}",
        "tests/test_series.py -k 'bit_for_bit'",
    ),
    Mutation(
        "run-bands-in-order", "cube/run.py",
        "encoded = self.pixels.encode(aligned, raw)", "encoded = self.pixels.encode(aligned.flip(-3), raw)",
        "tests/test_xr.py -k 'floats_keep or rounded or masks_are_matched or exact_shifts'",
    ),
    Mutation(
        "pixels-beside-nodata", "cube/pixels.py",
        "beside = value + 1 if value < limits.max else value - 1", "beside = value",
        "tests/test_xr.py -k do_not_become_nodata",
    ),
    Mutation(
        "pixels-rounding", "cube/pixels.py",
        "rounded = values.round().clamp_(float(limits.min), float(top))",
        "rounded = values.floor().clamp_(float(limits.min), float(top))",
        "tests/test_xr.py -k integers_are_rounded",
    ),
    Mutation(
        "pixels-keep-nodata", "cube/pixels.py",
        "return aligned.masked_fill(footprint > 0, torch.nan)", "return aligned",
        "tests/test_xr.py -k nodata_stays",
    ),
    Mutation(
        "pixels-nodata-of-other-bands", "cube/pixels.py",
        "encoded[np.isnan(encoded) & had_nodata] = self.nodata[0]", "encoded[np.isnan(encoded)] = self.nodata[0]",
        "tests/test_xr.py -k mixes_with_no_nodata",
    ),
    Mutation(
        "grid-corner", "cube/georeference.py",
        'corner = float(centres["x"][0]) - 0.5 * dx, float(centres["y"][0]) - 0.5 * dy',
        'corner = float(centres["x"][0]), float(centres["y"][0])',
        "tests/test_series.py -k georeference",
    ),
    Mutation(
        "grid-origin-sign", "cube/georeference.py",
        "return change_origin(rescale_warp(warp.double(), scale), origin).to(warp.dtype)",
        "return change_origin(rescale_warp(warp.double(), scale), (-origin[0], -origin[1])).to(warp.dtype)",
        "tests/test_series.py -k grids_of_any",
    ),
    Mutation(
        "grid-frames-corner", "cube/georeference.py",
        "cornered = change_origin(warp, (-0.5, -0.5)).numpy()", "cornered = warp.numpy()",
        "tests/test_series.py -k georeference",
    ),
    Mutation(
        "grid-metres-sign", "cube/georeference.py",
        "found[role] = step * metres", "found[role] = abs(step) * metres",
        "tests/test_xr.py -k metres",
    ),
    Mutation(
        "reference-anchor", "cube/reference.py",
        "anchored = compose_warps(warp, invert_warp(middle).expand_as(warp))", "anchored = warp",
        "tests/test_series.py -k relative_to_their_median",
    ),
    Mutation(
        "reference-placed", "cube/reference.py",
        "values = over_time(word, reader, found)", "values = over_time(word, reader)",
        "tests/test_series.py -k hold_frames",
    ),
    Mutation(
        "reference-median-of-even", "cube/reference.py",
        "return ((below + above) / 2).masked_fill(count == 0, torch.nan).squeeze(1)",
        "return below.masked_fill(count == 0, torch.nan).squeeze(1)",
        "tests/test_xr.py -k 'over_time and median'",
    ),
    Mutation(
        "reference-rejected-frames", "cube/reference.py",
        "chosen = np.arange(frames) if found is None else np.flatnonzero(found.valid.cpu().numpy())",
        "chosen = np.arange(frames)",
        "tests/test_series.py -k 'iterative_leaves_out or by_blocks'",
    ),
    Mutation(
        "reference-clearest", "cube/reference.py",
        "clearness = float(ground.double().mean()) * float(correlation.clamp(min=0))",
        "clearness = float(ground.double().mean())",
        "tests/test_series.py -k clearest_frame",
    ),
    Mutation(
        "report-shift-of-the-centre", "cube/solution.py",
        "shift = center_displacement(estimate.warp, size)", "shift = estimate.warp[..., :2, 2]",
        "tests/test_xr.py -k shift_is_that_of_the_centre",
    ),
    Mutation(
        "report-frames-by-label", "cube/solution.py",
        "warp = warp.isel({there: order})", "pass",
        "tests/test_series.py -k matched_by_date",
    ),
    Mutation(
        "report-ce90", "cube/solution.py",
        'percentile("residual", 90),', 'percentile("residual", 40),',
        "tests/test_series.py -k summary_in_numbers",
    ),
    Mutation(
        "chunks-rest", "cube/chunks.py",
        "return tuple(int(size) for size in chunks) or (0,)", "return tuple(sorted(map(int, chunks))) or (0,)",
        "tests/test_xr_lazy.py -k 'eager_bit_for_bit and given'",
    ),
    Mutation(
        "labels-same-grid", "cube/labels.py",
        "rtol=0, atol=SAME_GRID * pixel))", "rtol=0, atol=2 * pixel))",
        "tests/test_xr.py -k 'bad_masks'",
    ),
    Mutation(
        "labels-bands-in-order", "cube/labels.py",
        "return other.sel({dim: wanted})", "return other",
        "tests/test_xr.py -k references_as_data_arrays",
    ),
    Mutation(
        "regrid-averaged", "cube/regrid.py",
        "averaged = there.crs == here.crs and steps[1] > _FINER * steps[0]", "averaged = False",
        "tests/test_sensors.py -k averaged",
    ),
    Mutation(
        "xr-own-georeference", "xr.py",
        'return moved if codes is datacube else moved.copy(data=moved.data.astype(datacube.dtype))',
        'return moved',
        "tests/test_series.py -k classes_stay",
    ),
    Mutation(
        "xr-valid-frames", "xr.py",
        'return Found(told["warp"], told["status"] == 0, field)',
        'return Found(told["warp"], told["status"] >= 0, field)',
        "tests/test_series.py -k next_median",
    ),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="a name, or a pattern of names")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument(
        "--texts", action="store_true", help="look whether the old texts are there, and run nothing"
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the tests without the mutation first"
    )
    options = parser.parse_args()
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names)), "every mutation has a name of its own"
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.only or any(fnmatch.fnmatch(mutation.name, pattern) for pattern in options.only)
    ]
    if not chosen:
        parser.error(f"no mutation is called {options.only}")
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:<34}{mutation.file:<32}{mutation.tests}")
        print(f"{len(chosen)} mutations")
        return 0
    if options.texts:
        lost = [f"{mutation.name}: {reason}" for mutation in chosen if (reason := _lost(mutation, _TREE))]
        print(*lost, f"{len(chosen) - len(lost)} of {len(chosen)} are there", sep="\n")
        return int(bool(lost))
    with tempfile.TemporaryDirectory(prefix="torchalign-mutate-") as folder:
        copy = _copied(Path(folder))
        results = [_tell(mutation, copy, check=not options.unchecked) for mutation in chosen]
    counts = {word: results.count(word) for word in ("killed", "survived", "error")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return int(counts["killed"] < len(results))


def _tell(mutation: Mutation, copy: Path, *, check: bool) -> str:
    began = time.monotonic()
    word, reason = _judge(mutation, copy, check=check)
    print(f"{word:<10}{mutation.name:<34}{time.monotonic() - began:5.1f} s  {reason}", flush=True)
    return word


def _judge(mutation: Mutation, copy: Path, *, check: bool) -> tuple[str, str]:
    """killed, survived or error; and what there is to say."""
    if reason := _lost(mutation, copy):
        return "error", reason
    path = copy / "torchalign" / mutation.file
    text = path.read_text(encoding="utf-8")
    if check and (code := _unmutated(copy, mutation.tests)):
        return "error", f"without the mutation pytest exits with {code}: {mutation.tests}"
    try:
        _write(path, text.replace(mutation.old, mutation.new))
        code = _run(copy, mutation.tests)
    finally:
        _write(path, text)
    if code == _FAILED:
        return "killed", ""
    if code == 0:
        return "survived", mutation.tests
    if code is None:
        return "killed", f"no end after {_TIMEOUT} s"
    reason = "no test is selected" if code == _NO_TESTS else f"pytest exits with {code}"
    return "error", f"{reason}: {mutation.tests}"


def _lost(mutation: Mutation, tree: Path) -> str:
    """Why it cannot be made; empty where it can."""
    path = tree / "torchalign" / mutation.file
    if not path.exists():
        return f"there is no {mutation.file}"
    found = path.read_text(encoding="utf-8").count(mutation.old)
    return "" if found == 1 else f"the old text occurs {found} times in {mutation.file}"


@functools.cache
def _unmutated(copy: Path, tests: str) -> int | None:
    return _run(copy, tests)


def _copied(folder: Path) -> Path:
    """A checkout of its own; the real data are where the tests look for them, beside it."""
    copy = folder / "tree"
    copy.mkdir()
    for name in _COPIED:
        source = _TREE / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif source.is_file():
            shutil.copy2(source, copy / name)
    data = _TREE.parent / "shared"
    if data.is_dir():
        (folder / "shared").symlink_to(data)
    return copy


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # bytecode goes by whole seconds and sizes, of which two texts may have the same
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        stale.unlink()


def _run(copy: Path, tests: str) -> int | None:
    """pytest's exit code, in a fork of this process; ``None`` where it did not end."""
    _preload()
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(copy, tests))
    process.start()
    process.join(_TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


@functools.cache
def _preload() -> None:
    for name in _PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    import torch

    torch.set_num_threads(1)  # before anything starts threads, which a fork would not have
    gc.freeze()  # what is loaded is there to stay
    assert "torchalign" not in sys.modules


def _pytest(copy: Path, tests: str) -> None:
    import pytest

    os.chdir(copy)
    # the copy, and not the tree this script lies in
    sys.path[:] = [str(copy), *(entry for entry in sys.path if not Path(entry or ".").is_relative_to(_TREE))]
    os.environ["PYTHONPATH"] = str(copy)
    silent = os.open(os.devnull, os.O_WRONLY)
    if not os.environ.get("MUTATE_VERBOSE"):
        os.dup2(silent, 1)
        os.dup2(silent, 2)
    code = _CRASHED  # of pytest itself, which is no failed test
    # plugins cost more than most of the tests
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    try:
        code = int(pytest.main([*options, *shlex.split(tests)]))
        if not Path(sys.modules["torchalign"].__file__ or "").is_relative_to(copy):
            code = _CRASHED
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
