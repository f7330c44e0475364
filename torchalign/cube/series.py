"""A series without a reference: the frames of a labelled cube placed by their pairs, and where the sun stood."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from torchalign._check import message
from torchalign._host import give_back_memory, waiting
from torchalign.aligner import Aligner
from torchalign.cube.chunks import chunk_sizes, is_lazy
from torchalign.cube.georeference import find_georeference, in_degrees
from torchalign.cube.labels import Array, Cube
from torchalign.cube.reference import STILL, Found, FrameReader
from torchalign.cube.solution import report_fields
from torchalign.cube.sun import sun_position
from torchalign.functional.affine import center_displacement, compose_warps, identity_warp
from torchalign.functional.network import shadow_direction
from torchalign.functional.uncertainty import largest_sigma
from torchalign.groupwise import Frames, Groupwise, Solution
from torchalign.pcc import PCC
from torchalign.types import Estimate, combine

_READ_BYTES = 2**26  # of computed pixels, seen at once
_MOST_PARTS = 4  # of a chunk, times as much
# Dates without a time of day are taken at this hour of local solar time, when most optical satellites pass.
_OVERPASS = 10.5
# Pixels of all frames by which their pairs are compared for a reference, but of each at least so many a side.
_PLACED_SAMPLES, _LEAST_PLACED = 2**25, 256
# Frames of which two solutions tell which is better, and by how much of its misfit.
_FEWEST_JUDGED, _BETTER = 3, 0.9


def see_frames(module: Groupwise, reader: FrameReader) -> Frames:
    """What is kept of all frames, which are read once, a batch at a time: chunk by chunk where they are lazy."""
    if is_lazy(reader.cube.array) and not module.keeps_textures:
        cure = "use torchalign.PCC(), or load the cube with .load()"
        got = f"{type(module.aligner).__name__} and a cube of dask"
        raise ValueError(message("aligner", "PCC, which keeps little of a frame", got, cure))
    with waiting():  # hot pixels and fills are looked for on a device too
        parts = [module.see(frames) for frames in _batches(reader)]
    give_back_memory()
    return module.join(parts)


def _batches(reader: FrameReader) -> Iterator[Tensor]:
    """(t, C, H, W), NaN wherever a pixel is not to be used: the frames, each read once."""
    cube = reader.cube
    frame = reader.pixels.compute.itemsize * cube.sizes["band"] * cube.sizes["y"] * cube.sizes["x"]
    step = max(1, _READ_BYTES // max(1, frame))
    first = 0
    for size in chunk_sizes(cube, None) if is_lazy(cube.array) else (reader.frames,):
        # a chunk is read at once, unless it is much larger than what is worked on
        part = size if is_lazy(cube.array) and size <= _MOST_PARTS * step else step
        for start in range(0, max(size, 1), max(part, 1)):
            yield reader.read(slice(first + start, first + min(start + part, size)))
        first += size


def chain_frames(module: nn.Module, reader: FrameReader) -> Estimate:
    """Every frame on the last one before it that was accepted; the warps follow one another onto the first.

    Errors add up along the chain, and so does ``sigma``. A frame that fits nothing is passed over.
    """
    found: list[Estimate] = []
    previous: Tensor | None = None
    warp = covariance = torch.empty(0)
    for frames in _batches(reader):
        for frame in frames:
            one = module.estimate(frame[None], frame if previous is None else previous)  # type: ignore[operator]
            if previous is None:
                warp, covariance = one.warp[0].double(), torch.zeros_like(one.covariance[0])
            if bool(one.valid[0]):
                warp = compose_warps(one.warp[0].double(), warp) if previous is not None else warp
                covariance = covariance + one.covariance[0]
                sigma = largest_sigma(covariance)[None]
                one = one._replace(warp=warp.to(one.warp)[None], covariance=covariance[None], sigma=sigma)
                previous = frame
            found.append(one)
    if not found:
        bands = reader.cube.sizes["band"]
        blank = torch.zeros(1, bands, *reader.cube.size, dtype=reader.pixels.compute, device=reader.device)
        return module.estimate(blank[:0], blank[0])  # type: ignore[operator]
    return combine(torch.cat, found)


def series_fields(
    solution: Solution, size: tuple[int, int], metres: Mapping[str, float], sun: Array | None = None
) -> dict[str, Array]:
    """The fields of a report of a series, on the host; with where the sun stood, (T, 2), if that is known."""
    season = solution.season_shift
    others = {
        "closure": solution.closure,
        "support": solution.support,
        "sigma_season": solution.sigma_season,
        "season_shift_x": season[:, 0],
        "season_shift_y": season[:, 1],
    }
    found = {name: np.asarray(tensor.detach().cpu().numpy()) for name, tensor in others.items()}
    if sun is not None:
        found |= {"sun_elevation": sun[:, 0], "sun_azimuth": sun[:, 1]}
    return report_fields(solution.estimate, None, size, metres) | found


class PairPositions:
    """Where pairs of frames place the frames of a series, which no reference has a part in.

    The pairs are compared as ``module`` sees frames, by :class:`torchalign.PCC`; of large frames by their centres.
    """

    def __init__(self, reader: FrameReader, module: nn.Module) -> None:
        self.reader, self.module = reader, module

    @functools.cached_property
    def estimate(self) -> Estimate:
        """Of all frames; the median of the positions is 0."""
        side = max(_LEAST_PLACED, math.isqrt(_PLACED_SAMPLES // max(1, self.reader.frames)))
        seen: dict[str, Any] = {}
        if isinstance(self.module, Aligner):
            seen = {"channel": self.module.channel, "rgb_bands": self.module.rgb_bands}
            crop = self.module.crop_center
            seen["crop_center"] = crop and tuple(min(length, side) for length in crop)
            # two frames may be that far from the reference, each on its side
            seen["max_translation"] = min(2 * self.module.max_translation, 1e6)
        groupwise = Groupwise(PCC(**seen), season="none")
        return groupwise.place(see_frames(groupwise, self.reader.centre(side))).estimate

    @property
    def found(self) -> Found:
        """The same; frames that lie there already are not moved."""
        warp = self.estimate.warp
        near = warp[:, :, 2].norm(dim=-1) < STILL
        still = torch.where(near[:, None, None], identity_warp(dtype=warp.dtype, device=warp.device), warp)
        return Found(still, self.estimate.valid)

    def prefers(self, first: Found, second: Found) -> bool:
        """Whether the second fits clearly better, by a tenth, over the frames that all have, three at least."""
        place, sigma = self.estimate.warp[:, :, 2].cpu(), self.estimate.sigma.cpu()
        valid = self.estimate.valid.cpu() & first.valid.cpu() & second.valid.cpu()
        if int(valid.sum()) < _FEWEST_JUDGED:
            return False
        misfits = []
        for found in (first, second):
            away = center_displacement(found.warp[valid].double().cpu(), self.reader.cube.size) - place[valid]
            # where all lie in common is not told by pairs
            residual = (away - away.median(0).values).norm(dim=-1)
            deviation = residual / torch.hypot(sigma[valid], torch.full_like(sigma[valid], 0.03))
            huber = torch.where(deviation < 1, 0.5 * deviation.square(), deviation - 0.5)
            misfits.append(float(huber.mean()))
        return misfits[1] < _BETTER * misfits[0]


# --- the sun ---


def find_sun(given: Any, cube: Cube) -> Array | None:
    """(T, 2), elevation and azimuth in degrees, the latter clockwise from the image's up; ``None`` if that is not known.

    Of what the user gives, azimuths clockwise from north; else computed, of dates in UTC and a CRS. Dates that all lack a
    time of day are taken at half past ten, local solar time.
    """
    grid = find_georeference(cube)
    if given is not None:
        values = np.asarray(getattr(given, "values", given))
        expected = "numbers (T, 2), elevation and azimuth in degrees"
        if values.dtype.kind not in "iuf":
            raise TypeError(message("sun", expected, values.dtype, "give an array, a tensor or a DataArray"))
        if values.shape != (cube.sizes["time"], 2):
            raise ValueError(message("sun", expected, values.shape, "one row for each frame"))
        return _from_image_up(values.astype(float), None if grid is None else grid.linear)
    labels = cube.coordinate("time")
    if grid is None or not grid.crs or labels is None or labels.dtype.kind != "M":
        return None
    height, width = grid.size
    x, y = grid.linear @ np.array([width / 2, height / 2]) + grid.corner
    try:
        [longitude], [latitude] = in_degrees(grid.crs, [x], [y])
    except ImportError:  # without rasterio nobody knows where that is
        return None
    time = labels.values.astype("datetime64[s]")
    day = time.astype("datetime64[D]").astype("datetime64[s]")
    if (time == day).all():
        time = day + np.timedelta64(round((_OVERPASS - longitude / 15) * 3600), "s")
    return _from_image_up(np.stack(sun_position(time, latitude, longitude), -1), grid.linear)


def _from_image_up(sun: Array, linear: Array | None) -> Array:
    """Azimuths from north become those from the image's up, by the step of one pixel on the map."""
    if linear is None:
        return sun
    azimuth = np.deg2rad(sun[:, 1])
    right, down = np.linalg.solve(linear, np.stack([np.sin(azimuth), np.cos(azimuth)]))
    return np.stack([sun[:, 0], np.rad2deg(np.arctan2(right, -down)) % 360], -1)


def sun_tensor(sun: Array | None, device: torch.device) -> Tensor | None:
    """The same where it is computed with."""
    return None if sun is None else torch.from_numpy(np.ascontiguousarray(sun)).to(device)


def pair_attrs(solution: Solution) -> dict[str, Any]:
    """The pairs that count, as attributes of a report: what plots of the network are made of."""
    counts = solution.weight > 0
    kept = {"pair_moving": solution.moving, "pair_reference": solution.reference}
    kept |= {"pair_weight": solution.weight, "pair_residual": solution.residual}
    return {name: values[counts].detach().cpu().numpy() for name, values in kept.items()}


class ArchivePositions(NamedTuple):
    """Where the frames of an archive lie, by their report."""

    shift: Tensor  # (T, 2), in pixels, the sun's part not taken off
    sigma: Tensor  # (T,)
    accepted: Tensor  # (T,)
    slope: Array  # (3,): of the sun's part that was taken off, per unit of the shadow; and the shadow where it is 0

    @classmethod
    def of(cls, report: xr.Dataset, sun: Tensor | None, device: torch.device) -> ArchivePositions:
        """From a report in memory, and where the sun stood, (T, 2)."""
        known = report.compute()
        shift = np.stack([known["shift_x"].values, known["shift_y"].values], -1).astype(float)
        accepted = known["status"].values == 0
        slope = np.zeros(3)
        if known.attrs.get("season") == "correct" and (known["season_shift_x"].values != 0).any():
            if sun is None:
                cure = "give sun= and a cube with dates and a CRS, as when the archive was aligned"
                expected, got = "frames whose sun is known", "no dates or no place"
                raise ValueError(message("archive", expected, got, cure))
            season = np.stack([known["season_shift_x"].values, known["season_shift_y"].values], -1)
            shift = shift + season * accepted[:, None]
            along = shadow_direction(sun).cpu().numpy()
            usable = np.isfinite(along).all(-1) & accepted
            along, season = along[usable], season[usable]
            centred = along - along.mean(0)
            slope[0] = (centred * season).sum() / (centred**2).sum()
            slope[1:] = (along - season / slope[0]).mean(0)
        sigma = np.where(accepted, known["sigma"].values, 0.0).astype(float)
        tensors = [torch.from_numpy(np.array(one)).to(device) for one in (shift, sigma, accepted)]
        return cls(tensors[0], tensors[1], tensors[2], slope)

    def season_shift(self, sun: Tensor | None, frames: int) -> Tensor:
        """(N, 2), the sun's part of new frames, as it was taken off the old ones."""
        if not self.slope[0] or sun is None:
            return torch.zeros(frames, 2, dtype=torch.float64, device=self.shift.device)
        along = shadow_direction(sun) - torch.from_numpy(self.slope[1:]).to(self.shift.device)
        return torch.where(along.isfinite(), self.slope[0] * along, 0.0)


def without_season(solution: Solution, season: Tensor) -> Solution:
    """New frames with the sun's part taken off, where they were placed."""
    valid = solution.estimate.valid[:, None]
    warp = solution.estimate.warp.clone()
    taken = torch.where(valid, season.to(warp), 0.0)
    warp[..., 2] = warp[..., 2] - taken
    return solution._replace(estimate=solution.estimate._replace(warp=warp), season_shift=taken)
