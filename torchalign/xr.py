"""Labelled cubes: :func:`align` takes an ``xarray.DataArray`` and gives back its like and a report per frame.

Nothing is estimated here. Dimensions are found by name, raw pixels become what an aligner takes (floats, NaN
for nodata) and come back, frames stream through the device in batches, and what comes out is labelled.
"""

from __future__ import annotations

import copy
import datetime
import operator
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from torchalign._check import message
from torchalign.cascade import Cascade
from torchalign.ecc import ECC
from torchalign.functional.affine import center_displacement
from torchalign.functional.warp import warp as resample_frames
from torchalign.pcc import PCC
from torchalign.types import Estimate, Status

__all__ = ["align"]

# What `aligner=` knows by name.
_ALIGNERS: dict[str, Callable[[], nn.Module]] = {
    "auto": lambda: Cascade(PCC(), ECC()),
    "pcc": PCC,
    "ecc": ECC,
}

_NAMES = {
    "time": ("time", "t", "date"),
    "band": ("band", "bands", "channel", "wavelength", "variable"),
    "y": ("y", "lat", "latitude", "northing", "row"),
    "x": ("x", "lon", "longitude", "easting", "col"),
}
_CUBE = ("time", "band", "y", "x")  # (T, C, H, W)
_MASK = ("time", "y", "x")  # (T, H, W)
_PACKING = ("scale_factor", "add_offset")  # of an encoding; 1 and 0 where there are none
_GRID_TOLERANCE = 1e-3  # pixels; coordinates that agree to this are the same grid
_CPU_BATCH_BYTES, _CUDA_BATCH_BYTES = 2**26, 2**30
_REFERENCE_BYTES = 2**27  # of pixels held at once for a temporal median or mean
_UNITS_IN_METRES = dict.fromkeys(("m", "metre", "metres", "meter", "meters"), 1.0) | {"km": 1000.0}

Array = NDArray[Any]


def align(
    datacube: xr.DataArray,
    reference: xr.DataArray | Array | Tensor | Hashable = "median",
    aligner: nn.Module | str = "auto",
    *,
    mask: xr.DataArray | Array | Tensor | None = None,
    reference_mask: xr.DataArray | Array | Tensor | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    time_dim: Hashable | None = None,
    band_dim: Hashable | None = None,
    y_dim: Hashable | None = None,
    x_dim: Hashable | None = None,
) -> tuple[xr.DataArray, xr.Dataset]:
    """Bring every frame of a cube onto one reference, and report per frame how far it can be trusted.

    Dimensions are found by name, in any order: time (or t, date), band (bands, channel, wavelength,
    variable; may be missing), y (lat, latitude, northing, row), x (lon, longitude, easting, col). A lazy cube
    (dask, or a file) is read batch by batch, for ``"median"`` and ``"mean"`` by blocks of rows. The result is
    in memory, as large as the whole cube; what is needed beside it is set by ``batch_size``, not by T.
    Batches of another size give the same result to rounding, since sums are taken in another order: about
    1e-7 of a float32, and now and then a step of 1 in an integer.

    Integers are computed in float32 (float64 where values exceed 2²⁴) and come back rounded and clamped;
    floats that ``encoding`` packs into integers come back clamped to what these hold.
    Nodata (``_FillValue``, ``missing_value``, ``nodata`` in attrs or encoding, ``rio.nodata``) and NaN are
    not used and stay what they are; a valid pixel that would round to nodata takes the value beside it. (A
    float band with both NaN and nodata gets the latter for both.) An aligner's ``fill_value`` is for what
    comes from outside the frame or was masked. Frames of a ``status`` other than ``OK`` come back bit for
    bit.

    Args:
        datacube: time, y, x and maybe band; integer or floating.
        reference: ``"median"`` or ``"mean"`` over time of the usable pixels, ``"first"``, the label of
            exactly one frame (``"2020-05-01"``, a ``datetime64``), or pixels: a DataArray on the cube's
            grid (with time, one per frame; bands are matched by label; without band, one picture for every
            band), or an array (C, H, W) or (T, C, H, W). In pixels without a declared nodata value the
            cube's applies.
        aligner: a module, for example ``torchalign.PCC(channel="mean")``; it is neither changed nor moved.
            Or a name, for default options: ``"auto"`` or ``"pcc"``. ``"auto"`` stands for the best general
            choice of the installed release; in this one it is ``PCC()``.
        mask: bool, **True = usable**: a DataArray with some of time, y and x, on the cube's coordinates, or
            an array broadcastable to (T, H, W). Acts in the estimate, the warp and the reference taken over
            time.
        reference_mask: the same for the reference.
        device: where to compute. Default: where the aligner's parameters are if that is not the CPU, else
            CUDA if there is any, else the CPU.
        batch_size: frames on the device at a time. Default: what fits 64 MiB on the CPU, and 1 GiB (or 1/16
            of the free memory) on CUDA.
        progress: show a bar: yes, no, or (default) if tqdm is installed and it takes more than two seconds.
        time_dim: the name of the time dim, where it is none of the above.
        band_dim: the same for band.
        y_dim: the same for y.
        x_dim: the same for x.

    Returns:
        The aligned cube, with the same dims, coords, attrs, name, dtype and encoding. And the report along
        time, with the coords that the cube has along it: ``warp`` (T, 2, 3) or (T, 3, 3), moving → reference
        in pixels; ``shift_x`` and ``shift_y``, the displacement of the frame's centre in pixels, right and
        down; ``shift_x_metres`` and ``shift_y_metres``, the same along the map's axes (north is positive)
        where the grid is regular and has a unit of length; ``score``, ``score_before``, ``sigma`` (pixels),
        and ``status``, a
        :class:`~torchalign.Status`.

    Raises:
        TypeError: the cube is no DataArray of numbers, a mask is not bool, an argument is of another kind.
        ValueError: unknown, missing or ambiguous dims; coordinates other than the cube's; a label of no
            frame or of several; an unknown aligner, device or batch size; a fill value that the dtype
            cannot hold.
        ImportError: ``progress=True`` without tqdm.

    Example:
        A scene cut at two offsets, 2 pixels apart in x and 1 in y:

        >>> scene = np.random.default_rng(0).random((68, 68)).astype("float32")
        >>> scene = sum(np.roll(scene, (i, j), (0, 1)) for i in range(4) for j in range(4))
        >>> frames = np.stack([scene[:64, :64], scene[1:65, 2:66]])
        >>> cube = xr.DataArray(frames, dims=("time", "y", "x"), coords={"time": [2019, 2020]})
        >>> aligned, report = align(cube, reference=2019, aligner="pcc")
        >>> shift = report[["shift_x", "shift_y"]].sel(time=2020).round(1)
        >>> float(shift.shift_x), float(shift.shift_y), aligned.dims
        (2.0, 1.0, ('time', 'y', 'x'))

    """
    cube = _Cube.of(datacube, {"time": time_dim, "band": band_dim, "y": y_dim, "x": x_dim})
    where = _find_device(device, aligner)
    module = _find_aligner(aligner, where)
    pixels = _Pixels.of(cube, module)
    step = _frames_at_a_time(batch_size, cube, pixels, where)
    usable = _find_mask(mask, "mask", cube)
    reference_usable = _find_mask(reference_mask, "reference_mask", cube)
    out = np.empty(datacube.shape, datacube.dtype)
    estimates: list[Estimate] = []
    with torch.no_grad(), _progress_bar(progress, cube.sizes["time"]) as advance:
        reference_of, reference_name = _find_reference(reference, cube, pixels, usable, where)
        for start in range(0, max(cube.sizes["time"], 1), step):  # an empty cube is one empty batch
            batch = slice(start, start + step)
            raw = _load(cube.variable, _CUBE, time=batch)
            frames = pixels.decode(raw, where)
            aligned, estimate = module(
                frames,
                reference_of(batch),
                mask=_mask_tensor(usable, where, time=batch),
                reference_mask=_mask_tensor(reference_usable, where, time=batch),
            )
            if getattr(module, "fill_value", None) is not None:
                aligned = _keep_nodata(aligned, frames, estimate.warp)
            estimates.append(Estimate(*(field.cpu() for field in estimate)))
            kept = estimates[-1].valid.numpy()[:, None, None, None]
            cube.view(out)[batch] = np.where(kept, pixels.encode(aligned, raw), raw)
            advance(len(raw))
    estimate = Estimate(*(torch.cat(field) for field in zip(*estimates, strict=True)))
    return datacube.copy(data=out), _report(cube, estimate, module, reference_name)


# --- the cube: dims and pixels ---


@dataclass(frozen=True)
class _Cube:
    """A DataArray seen as (T, C, H, W), whatever its dims are called and their order; nothing is loaded."""

    array: xr.DataArray
    dims: Mapping[str, Hashable]  # "time", "y", "x" and maybe "band" → the name of the dim

    @classmethod
    def of(cls, array: object, given: Mapping[str, Hashable | None]) -> _Cube:
        if not isinstance(array, xr.DataArray):
            cure = "align tensors with aligner(cube, reference), or give the array dims with xarray.DataArray"
            if isinstance(array, xr.Dataset):
                cure = 'use dataset.to_dataarray("band")'
            raise TypeError(message("datacube", "an xarray.DataArray", type(array).__name__, cure))
        if array.dtype.kind not in "iuf":
            cure = 'convert it with .astype("uint8") or .astype("float32")'
            raise TypeError(message("datacube", "an integer or floating dtype", array.dtype, cure))
        return cls(array, _find_dims(array.dims, given))

    @property
    def sizes(self) -> dict[str, int]:
        return {role: self.array.sizes[self.dims[role]] if role in self.dims else 1 for role in _CUBE}

    @property
    def variable(self) -> xr.Variable:
        return _rename(self.array, {dim: role for role, dim in self.dims.items()})

    def view(self, values: Array) -> Array:
        """(T, C, H, W) of values that lie in the order of the array's own dims."""
        present = [role for role in _CUBE if role in self.dims]
        view = values.transpose([self.array.get_axis_num(self.dims[role]) for role in present])
        return view if "band" in self.dims else view[:, None]


@dataclass(frozen=True)
class _Packing:
    """How a file would hold floats as integers, ``code * scale + offset``."""

    scale: float
    offset: float
    low: float  # of the values; what lies beyond these two would wrap when written
    high: float
    fills: tuple[int, ...]  # codes that are read as NaN
    dtype: np.dtype[Any]  # of the codes

    @classmethod
    def of(cls, array: xr.DataArray) -> _Packing | None:
        """As ``array.encoding`` has it; None where it packs nothing."""
        encoding = array.encoding
        with suppress(TypeError, ValueError, OverflowError):  # no number; the write will complain
            dtype = np.dtype(encoding.get("dtype"))
            if array.dtype.kind == "f" and dtype.kind in "iu" and "dtype" in encoding:
                sign = {"true": "u", "false": "i"}.get(str(encoding.get("_Unsigned")).lower(), dtype.kind)
                dtype = np.dtype(f"{sign}{dtype.itemsize}")
                scale, offset = (float(encoding.get(key, 1 - i)) for i, key in enumerate(_PACKING))
                declared = [encoding.get("_FillValue"), encoding.get("missing_value")]
                given = [float(value) for entry in declared if entry is not None for value in np.ravel(entry)]
                fills = tuple(int(np.array(int(fill)).astype(dtype)) for fill in given if np.isfinite(fill))
                if scale != 0 and np.isfinite([scale, offset]).all():
                    return cls(
                        scale, offset, *_packed_range(array.dtype, dtype, scale, offset, fills), fills, dtype
                    )
        return None

    def holds(self, value: float) -> bool:
        return bool(np.isnan(value)) or self.low <= value <= self.high

    def fit(self, values: Array) -> Array:
        """The values that a write keeps: within the range, and beside the codes that are read as NaN."""
        fitted = np.clip(values, self.low, self.high)
        for fill in self.fills:
            if self.low < fill * self.scale + self.offset < self.high:  # the ends are without it already
                code = np.rint((fitted.astype(np.float64) - self.offset) / self.scale)
                fitted[code == fill] = (fill + 1) * self.scale + self.offset
        return fitted


def _packed_range(
    dtype: np.dtype[Any], codes: np.dtype[Any], scale: float, offset: float, fills: tuple[int, ...]
) -> tuple[float, float]:
    """The least and the greatest value, floats of dtype, that the codes hold beside the fills."""
    bottom, top = int(np.iinfo(codes).min), int(np.iinfo(codes).max)
    while bottom in fills:
        bottom += 1
    while top in fills:
        top -= 1
    # large codes, or a large offset, are not exact in short floats: stay clear of the ends by the rounding
    limits = np.finfo(dtype)
    slack = 4 * float(limits.eps) * max(-bottom, top, abs(offset / scale))
    slack = slack if slack > 0.25 else 0.0  # less does not change a rounded code
    ends = sorted(end * scale + offset for end in (bottom + slack, top - slack))
    return max(ends[0], float(limits.min)), min(ends[1], float(limits.max))


@dataclass(frozen=True)
class _Pixels:
    """How raw pixels become what an aligner takes, floats with NaN for nodata, and how they come back."""

    dtype: np.dtype[Any]
    compute: torch.dtype
    nodata: tuple[Any, ...]  # values of dtype; the first is the one written
    packing: _Packing | None = None  # of floats

    @classmethod
    def of(cls, cube: _Cube, aligner: nn.Module) -> _Pixels:
        nodata = _find_nodata(cube.array)
        packing = _Packing.of(cube.array)
        pixels = cls(cube.array.dtype, _find_compute_dtype(cube, nodata), nodata, packing)
        fill_value = getattr(aligner, "fill_value", None)
        if fill_value is not None and packing is not None and not packing.holds(fill_value):
            expected = f"what the packed {packing.dtype} holds, {packing.low} … {packing.high}, or NaN"
            cure = "choose such a value, or pass datacube.drop_encoding()"
            raise ValueError(message("aligner.fill_value", expected, fill_value, cure))
        if fill_value is not None and pixels.dtype.kind != "f" and not (np.isnan(fill_value) and nodata):
            limits = np.iinfo(pixels.dtype)
            if not limits.min <= fill_value <= limits.max:
                expected = (
                    f"what {pixels.dtype} holds, {limits.min} … {limits.max}, or NaN where there is nodata"
                )
                cure = "choose such a value, or declare datacube.attrs['_FillValue']"
                raise ValueError(message("aligner.fill_value", expected, fill_value, cure))
        return pixels

    @property
    def native(self) -> np.dtype[Any]:
        """The nearest dtype that torch knows: this machine's byte order, no long double."""
        too_long = self.dtype.kind == "f" and self.dtype.itemsize > 8
        return np.dtype(np.float64) if too_long else self.dtype.newbyteorder("=")

    def decode(self, raw: Array, device: torch.device) -> Tensor:
        host = torch.from_numpy(
            np.array(raw, dtype=self.native, order="C")
        )  # a copy, never the caller's memory
        if device.type == "cuda":
            host = host.pin_memory()
        values = host.to(device, non_blocking=True).to(self.compute)
        for value in self.nodata:
            values = values.masked_fill(values == float(value), torch.nan)
        return values

    def encode(self, values: Tensor, raw: Array) -> Array:
        """Back to the dtype of raw; NaN to nodata, in floats only in those bands of raw that had nodata."""
        if self.dtype.kind == "f":
            encoded = values.cpu().numpy().astype(self.dtype)
            if self.packing is not None:
                encoded = self.packing.fit(encoded)
            if self.nodata:
                had_nodata = np.isin(raw, self.nodata).any((-2, -1), keepdims=True)
                encoded[np.isnan(encoded) & had_nodata] = self.nodata[0]
            return encoded
        limits, number = np.iinfo(self.dtype), np.float64 if self.compute == torch.float64 else np.float32
        top = number(limits.max)  # may have been rounded up, beyond what the integers hold
        top = top if int(top) <= limits.max else np.nextafter(top, number(0))
        rounded = values.round().clamp(float(limits.min), float(top))
        for value in map(int, self.nodata):  # a valid pixel must not become nodata by rounding or clamping
            beside = value + 1 if value < limits.max else value - 1
            rounded = rounded.masked_fill((rounded == float(value)) & (values != float(value)), float(beside))
        integer = torch.from_numpy(np.empty(0, self.native)).dtype
        encoded = rounded.nan_to_num().to(integer).cpu().numpy()
        if self.nodata:
            encoded[values.isnan().cpu().numpy()] = self.nodata[0]
        return encoded


def _keep_nodata(aligned: Tensor, frames: Tensor, warp: Tensor) -> Tensor:
    """NaN where the frame's nearest pixel is NaN; a warp with a fill value has put that there."""
    footprint = resample_frames(
        frames.isnan().to(frames.dtype), warp, interpolation="nearest", padding_mode="zeros"
    )
    return aligned.masked_fill(footprint > 0, torch.nan)


def _find_dims(dims: Sequence[Hashable], given: Mapping[str, Hashable | None]) -> dict[str, Hashable]:
    """Role → name of the dim; "band" is left out where there is none."""
    found = {role: dim for role, dim in given.items() if dim is not None}
    for role, dim in found.items():
        if dim not in dims or list(found.values()).count(dim) > 1:
            raise ValueError(
                message(f"{role}_dim", f"one dim of {tuple(dims)}", repr(dim), "name each dim once")
            )
    for role in (role for role in _CUBE if role not in found):
        named = [dim for dim in dims if str(dim).lower() in _NAMES[role] and dim not in found.values()]
        if len(named) > 1:
            cure = f"say which with {role}_dim=, and what the other is, or select from it with .isel"
            raise ValueError(message("datacube", f"one {role} dim", f"{named} among {tuple(dims)}", cure))
        found |= dict.fromkeys([role] * len(named), *named)
    unknown = [dim for dim in dims if dim not in found.values()]
    missing = [role for role in _MASK if role not in found]
    if missing or unknown:
        cures = [f"name it with {role}_dim={dim!r}" for role in missing or ["band"] for dim in unknown]
        cures += [f"or select from it with .isel({dim}=…)" for dim in unknown]
        cures += [f'add it with .expand_dims("{role}")' for role in missing if not unknown]
        known = "".join(f", {role} ({', '.join(_NAMES[role])})" for role in missing)
        got = f"{tuple(dims)} without{known}" if missing else f"{tuple(dims)} with unknown {unknown}"
        raise ValueError(message("datacube", "the dims time, y, x and maybe band", got, ", ".join(cures)))
    return found


def _rename(array: xr.DataArray, names: Mapping[Hashable, str]) -> xr.Variable:
    """The array's variable under other dim names, neither loaded nor copied."""
    variable = array.variable.copy(deep=False)
    variable.dims = [names[dim] for dim in array.dims]
    return variable


def _load(source: xr.Variable, roles: Sequence[str], **parts: slice) -> Array:
    """A part of source in memory, one axis for each role, of size 1 where source lacks it."""
    part = source.isel({role: rows for role, rows in parts.items() if role in source.dims}).load()
    values: Array = part.transpose(*(role for role in roles if role in part.dims)).to_numpy()
    return values[tuple(slice(None) if role in part.dims else None for role in roles)]


def _find_nodata(array: xr.DataArray) -> tuple[Any, ...]:
    """The declared nodata values that pixels of this dtype can have; NaN needs no declaring."""
    attrs, encoding = array.attrs, array.encoding
    declared = [attrs.get(key) for key in ("_FillValue", "missing_value", "nodata", "nodatavals")]
    unpacked = array.dtype.kind == "f" and set(_PACKING) & set(encoding)
    if not unpacked:  # else what is encoded is that of the packed integers
        declared += [encoding.get("_FillValue"), encoding.get("missing_value")]
    if hasattr(array, "rio") and "_FillValue" not in encoding:  # with it, rio.nodata is NaN, or made up
        with suppress(OverflowError, TypeError, ValueError):  # not of this dtype
            declared.append(array.rio.nodata)
    found: dict[Any, None] = {}
    for value in (value for entry in declared if entry is not None for value in np.ravel(entry)):
        with suppress(OverflowError, TypeError, ValueError), np.errstate(all="ignore"):
            scalar = array.dtype.type(value)
            if np.isfinite(scalar) and (array.dtype.kind == "f" or scalar == float(value)):
                found[scalar] = None
    return tuple(found)


def _find_compute_dtype(cube: _Cube, nodata: tuple[Any, ...]) -> torch.dtype:
    """The float that holds the pixels; for 32- and 64-bit integers that takes one look at all of them."""
    dtype = cube.array.dtype
    if dtype.kind == "f" or dtype.itemsize <= 2:
        return torch.float64 if dtype.itemsize > 4 else torch.float32
    for time in range(cube.sizes["time"]):
        raw = _load(cube.variable, _CUBE, time=slice(time, time + 1))
        valid = raw[~np.isin(raw, nodata)]
        if valid.size and max(int(valid.max()), -int(valid.min())) > 2**24:
            return torch.float64
    return torch.float32


# --- the other arguments ---


def _find_device(device: torch.device | str | None, aligner: object) -> torch.device:
    if device is None:
        state = [*aligner.parameters(), *aligner.buffers()] if isinstance(aligner, nn.Module) else []
        moved = [tensor.device for tensor in state if tensor.device.type != "cpu"]
        device = moved[0] if moved else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        cure = 'use device="cpu", or None to choose'
        raise ValueError(message("device", "a torch device of this machine", repr(device), cure)) from error


def _find_aligner(aligner: object, device: torch.device) -> nn.Module:
    if isinstance(aligner, str):
        if aligner not in _ALIGNERS:
            expected = f"a module, or in this release one of {', '.join(map(repr, _ALIGNERS))}"
            raise ValueError(message("aligner", expected, repr(aligner), "choose one of these"))
        aligner = _ALIGNERS[aligner]()
    if not isinstance(aligner, nn.Module):
        cure = "make an instance, for example torchalign.PCC()"
        raise TypeError(message("aligner", "a torch.nn.Module or a name", repr(aligner), cure))
    there = all(tensor.device == device for tensor in (*aligner.parameters(), *aligner.buffers()))
    return aligner if there else copy.deepcopy(aligner).to(device)


def _frames_at_a_time(size: int | None, cube: _Cube, pixels: _Pixels, device: torch.device) -> int:
    if size is None:
        frame_bytes = pixels.compute.itemsize * cube.sizes["band"] * cube.sizes["y"] * cube.sizes["x"]
        budget = _CPU_BATCH_BYTES
        if device.type == "cuda":
            budget = min(_CUDA_BATCH_BYTES, torch.cuda.mem_get_info(device)[0] // 16)
        return max(1, budget // max(1, frame_bytes))
    complaint = message("batch_size", "a positive int or None", repr(size), "give a number of frames")
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(complaint)
    if operator.index(size) < 1:
        raise ValueError(complaint)
    return operator.index(size)


def _find_mask(mask: object, name: str, cube: _Cube) -> xr.Variable | None:
    """A bool variable over some of time, y, x."""
    if mask is None:
        return None
    labelled = _label(mask, name, cube, _MASK)
    if labelled.dtype != np.bool_:
        cure = "cloud masks are mostly 1 = cloud: pass `mask == 0`; if 1 = usable, `mask.astype(bool)`"
        raise TypeError(message(name, "bool, True = usable", labelled.dtype, cure))
    return _match(labelled, name, cube, _MASK)


def _mask_tensor(usable: xr.Variable | None, device: torch.device, **parts: slice) -> Tensor | None:
    """(t or 1, H or 1, W or 1); without the first for a mask that has no time."""
    if usable is None:
        return None
    roles = _MASK if "time" in usable.dims else _MASK[1:]
    return torch.from_numpy(np.array(_load(usable, roles, **parts))).to(device)


def _label(values: object, name: str, cube: _Cube, roles: Sequence[str]) -> xr.DataArray:
    """Arrays get the cube's dims, from the last; a mask's axes of size 1 are dropped, to be broadcast."""
    if isinstance(values, xr.DataArray):
        return values
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if not isinstance(values, np.ndarray):
        expected = "a DataArray, an array or a tensor"
        if "band" in roles:  # a reference
            expected += ", 'median', 'mean', 'first' or a time label"
        raise TypeError(message(name, expected, type(values).__name__, "wrap it with numpy.asarray"))
    present = [role for role in roles if role in cube.dims]
    if not 2 <= values.ndim <= len(present):
        expected = f"2 to {len(present)} axes, the last of ({', '.join(present)})"
        raise ValueError(message(name, expected, f"shape {values.shape}", "index or reshape it"))
    labelled = xr.DataArray(values, dims=[cube.dims[role] for role in present[-values.ndim :]])
    if "band" in roles:
        return labelled
    return labelled.isel(
        {dim: 0 for dim, size in labelled.sizes.items() if size == 1 != cube.array.sizes[dim]}
    )


def _match(other: xr.DataArray, name: str, cube: _Cube, roles: Sequence[str]) -> xr.Variable:
    """A DataArray on the cube's coordinates, over some of the roles; or an error that says why not."""
    own = {dim: role for role, dim in cube.dims.items()}
    named = {dim: role for dim in other.dims for role in _CUBE if str(dim).lower() in _NAMES[role]}
    known = named | own
    found = {known[dim]: dim for dim in other.dims if dim in known}
    is_mask = "band" not in roles
    if len(found) < other.ndim or not (is_mask or {"y", "x"} <= set(found)):
        cure = "rename its dims like the cube's, or select from them with .isel"
        raise ValueError(message(name, f"the dims {tuple(cube.dims.values())}", other.dims, cure))
    # a mask is for all bands; one reference is for all frames, of whatever date it is
    single = found.get("band" if is_mask else "time")
    if single is not None and other.sizes[single] == 1:
        other = other.isel({found.pop("band" if is_mask else "time"): 0})
    elif single is not None and is_mask:
        cure = f"reduce it, for example with {name}.all({single!r})"
        raise ValueError(message(name, "one mask for all bands", dict(other.sizes), cure))
    if "band" in found:
        other = _match_bands(other, name, cube, found["band"])
    for role in (role for role in found if role != "band"):
        if not _same_coordinate(cube.array, cube.dims[role], other, found[role]):
            expected = f"the cube's {cube.dims[role]!r}, {_describe(cube.array, cube.dims[role])}"
            cure = "bring it onto the cube's coordinates with .sel, .reindex_like or .rio.reproject_match"
            raise ValueError(message(name, expected, _describe(other, found[role]), cure))
    return _rename(other, {dim: role for role, dim in found.items()})


def _match_bands(other: xr.DataArray, name: str, cube: _Cube, dim: Hashable) -> xr.DataArray:
    """The cube's bands of other, by label where both have labels, else by position."""
    own = cube.dims.get("band")
    expected = f"{cube.sizes['band']} bands"
    if own in cube.array.coords and dim in other.coords:
        wanted, labels = cube.array[own].values, other[dim].values
        if np.array_equal(wanted, labels):
            return other
        if len(set(labels)) == len(labels) and set(wanted) <= set(labels):
            return other.sel({dim: wanted})
        expected = f"the bands {_describe(cube.array, own)}"
    elif other.sizes[dim] == cube.sizes["band"]:
        return other
    cure = f"align the bands that both have, or compare all with one, {name}.isel({dim}=0)"
    raise ValueError(message(name, expected, _describe(other, dim), cure))


def _same_coordinate(first: xr.DataArray, dim: Hashable, second: xr.DataArray, other_dim: Hashable) -> bool:
    if first.sizes[dim] != second.sizes[other_dim]:
        return False
    if dim not in first.coords or other_dim not in second.coords:
        return True
    a, b = first[dim].values, second[other_dim].values
    if len(a) < 2 or a.dtype.kind not in "iuf" or b.dtype.kind not in "iuf":
        return bool(np.array_equal(a, b))
    pixel = abs(float(a[-1]) - float(a[0])) / (len(a) - 1)
    return bool(np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=0, atol=_GRID_TOLERANCE * pixel))


def _describe(array: xr.DataArray, dim: Hashable) -> str:
    labels = array[dim].values.astype(str) if dim in array.coords else np.empty(0, str)
    shown = ", ".join(labels if len(labels) < 5 else (labels[0], labels[1], "…", labels[-1]))
    return f"{array.sizes[dim]} of them ({shown or 'without labels'})"


@contextmanager
def _progress_bar(progress: bool | None, total: int) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of frames done."""
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ImportError(message("progress", "tqdm", "no such package", "pip install tqdm")) from None
        progress = False
    if progress is False:
        yield lambda frames: None
        return
    # delay: seconds until it shows; disable=None: only on a terminal or in a notebook
    options: dict[str, Any] = {} if progress else {"delay": 2.0, "disable": None}
    with tqdm(total=total, desc="align", unit="frame", **options) as bar:
        yield bar.update


# --- the reference ---


def _find_reference(
    reference: Any, cube: _Cube, pixels: _Pixels, usable: xr.Variable | None, device: torch.device
) -> tuple[Callable[[slice], Tensor], str]:
    """A function from a batch of frames to their reference on the device, (C, H, W) or (t, C, H, W); its name."""
    shape, name = tuple(cube.sizes[role] for role in _CUBE[1:]), type(reference).__name__
    if isinstance(reference, (xr.DataArray, np.ndarray)) and reference.ndim == 0:
        reference = getattr(reference, "values", reference)[()]  # a label, `cube.time[3]`
    if isinstance(reference, (str, np.generic, datetime.date, int, float)) and not isinstance(
        reference, bool
    ):
        name = str(reference)
        if name in ("median", "mean"):
            fixed = _over_time(name, cube, pixels, usable, device)
        else:
            number = 0
            if name != "first":
                number = _frame_number(reference, cube)
                name = _label_text(cube.array[cube.dims["time"]].values[number])
            frame = _visible(cube, pixels, usable, device, time=slice(number, number + 1))
            fixed = frame[0] if len(frame) else frame.new_full(shape, torch.nan)
        return lambda batch: fixed, name
    labelled = _label(reference, "reference", cube, _CUBE)
    if labelled.dtype.kind not in "iuf":
        raise TypeError(
            message("reference", "an integer or floating dtype", labelled.dtype, "convert it with .astype")
        )
    source = _match(labelled, "reference", cube, _CUBE)
    given = _Pixels(labelled.dtype, pixels.compute, _find_nodata(labelled) or pixels.nodata)
    if "time" in source.dims:
        return lambda batch: given.decode(_load(source, _CUBE, time=batch), device).expand(-1, *shape), name
    fixed = given.decode(_load(source, _CUBE[1:]), device).expand(shape)
    return lambda batch: fixed, name


def _visible(
    cube: _Cube, pixels: _Pixels, usable: xr.Variable | None, device: torch.device, **parts: slice
) -> Tensor:
    """(t, C, h, w), NaN wherever a pixel is not to be used."""
    values = pixels.decode(_load(cube.variable, _CUBE, **parts), device)
    values = values.nan_to_num(torch.nan, torch.nan, torch.nan)  # infinities are not usable either
    if usable is not None:
        seen = torch.from_numpy(np.array(_load(usable, _MASK, **parts))).to(device)
        values = values.masked_fill(~seen[:, None], torch.nan)
    return values


def _over_time(
    word: str, cube: _Cube, pixels: _Pixels, usable: xr.Variable | None, device: torch.device
) -> Tensor:
    """(C, H, W), "median" or "mean" of the usable pixels, by blocks of rows; NaN where there are none."""
    frames, bands, height, width = (cube.sizes[role] for role in _CUBE)
    result = torch.full((bands, height, width), torch.nan, dtype=pixels.compute, device=device)
    row_bytes = pixels.compute.itemsize * frames * bands * width
    step = max(1, _REFERENCE_BYTES // max(1, row_bytes))
    for top in range(0, height if row_bytes else 0, step):
        rows = slice(top, top + step)
        values = _visible(cube, pixels, usable, device, y=rows)  # (T, C, h, W)
        over_time = values.nanmean(0, dtype=torch.float64) if word == "mean" else _nanmedian(values)
        result[:, rows] = over_time.to(result.dtype)
    return result


def _nanmedian(values: Tensor) -> Tensor:
    """Over the first axis; of an even number of values the mean of the two in the middle."""
    series = values.flatten(1).T.contiguous().nan_to_num(torch.inf)  # (C·h·W, T)
    # on the CPU, numpy's sort is ten times as fast as torch's
    ordered = series.sort(1).values if series.is_cuda else torch.from_numpy(np.sort(series.numpy(), axis=1))
    count = torch.searchsorted(ordered, ordered.new_full((len(ordered), 1), torch.inf))  # of what is no NaN
    below, above = ordered.gather(1, (count - 1).clamp(min=0) // 2), ordered.gather(1, count // 2)
    median = ((below + above) / 2).masked_fill(count == 0, torch.nan)
    return median.view(values.shape[1:])


def _frame_number(label: Any, cube: _Cube) -> int:
    """The one frame of that label; a date is that of all frames of the day, and nothing is near enough."""
    dim = cube.dims["time"]
    if isinstance(label, np.datetime64) or type(label) is datetime.date:
        label = str(label)  # its unit is its resolution
    matches: list[int] = []
    if dim in cube.array.coords:
        numbers = xr.DataArray(np.arange(cube.sizes["time"]), {dim: cube.array[dim]}, [dim])
        with suppress(KeyError, TypeError, ValueError):
            matches = numbers.sel({dim: label}).values.ravel().tolist()
    if len(matches) != 1:
        expected = "'median', 'mean', 'first' or the label of exactly one frame"
        got = f"{label!r}, that of {len(matches)} among {_describe(cube.array, dim)}"
        cure = f"write the label of {dim!r} in full, or pass a frame, datacube.isel({dim}=0)"
        raise ValueError(message("reference", expected, got, cure))
    return matches[0]


def _label_text(label: Any) -> str:
    """A time coordinate's entry as text; a date in ISO 8601, as short as it can be."""
    return str(np.datetime_as_string(label, unit="auto") if isinstance(label, np.datetime64) else label)


# --- the report ---


def _report(cube: _Cube, estimate: Estimate, aligner: nn.Module, reference: str) -> xr.Dataset:
    time, status = cube.dims["time"], estimate.status.numpy()
    shift = center_displacement(estimate.warp, (cube.sizes["y"], cube.sizes["x"])).numpy()  # (T, 2), (x, y)

    def field(values: Array | Tensor, units: str, long_name: str, **attrs: object) -> xr.Variable:
        axes = (time, "row", "col")[: values.ndim]
        return xr.Variable(axes, np.asarray(values), {"units": units, "long_name": long_name, **attrs})

    fields = {
        "warp": field(estimate.warp, "pixel", "matrix from moving to reference points (x, y)"),
        "shift_x": field(shift[:, 0], "pixel", "displacement of the frame's centre, to the right"),
        "shift_y": field(shift[:, 1], "pixel", "displacement of the frame's centre, downwards"),
        "score": field(estimate.score, "1", "correlation with the reference after alignment"),
        "score_before": field(estimate.score_before, "1", "correlation with the reference before alignment"),
        "sigma": field(estimate.sigma, "pixel", "predicted standard error of the translation"),
        "status": field(
            status.astype(np.int8),
            "1",
            "OK: aligned; else the frame was left as it came, and why",
            flag_values=np.array(list(Status), np.int8),
            flag_meanings=" ".join(code.name for code in Status),
        ),
    }
    for axis, role in enumerate(("x", "y")):
        metres = _metres_per_pixel(cube.array, cube.dims[role])
        if metres is not None:
            direction = f"displacement of the frame's centre, towards greater {cube.dims[role]}"
            fields[f"shift_{role}_metres"] = field(shift[:, axis] * metres, "m", direction)
    counts = {code.name: int((status == code).sum()) for code in Status}
    try:
        version = metadata.version("torchalign")
    except metadata.PackageNotFoundError:  # run from a checkout
        version = "unknown"
    attrs = {
        "Conventions": "CF-1.11",
        "title": "How each frame was aligned, and how far to trust it",
        "torchalign_version": version,
        "aligner": repr(aligner),
        "reference": reference,
        "frames": len(status),
        "frames_aligned": counts["OK"],
        "status_counts": ", ".join(f"{name}: {count}" for name, count in counts.items() if count),
    }
    along = cube.array[time]
    taken = {"row", "col", *fields} - {time}  # names that the report itself uses
    others = [name for name, coord in along.coords.items() if coord.dims != (time,) or name in taken]
    return xr.Dataset(fields, along.drop_vars(others).compute().coords, attrs)


def _metres_per_pixel(array: xr.DataArray, dim: Hashable) -> float | None:
    """Signed: negative along y of a north-up grid. None for an irregular grid, or one without such a unit."""
    if dim not in array.coords or array.sizes[dim] < 2 or array[dim].dtype.kind not in "iuf":
        return None
    values = array[dim].values.astype(np.float64)
    step = (values[-1] - values[0]) / (len(values) - 1)
    noise = 4 * np.abs(values).max() * np.finfo(np.result_type(array[dim].dtype, np.float16)).eps
    if step == 0 or not np.abs(np.diff(values) - step).max() <= _GRID_TOLERANCE * abs(step) + noise:
        return None
    units = str(array[dim].attrs.get("units", "")).lower()
    metres = _UNITS_IN_METRES.get(units)
    if metres is None and not units.startswith("deg"):
        metres = _metres_of_crs(array)
    return None if metres is None else float(step * metres)


def _metres_of_crs(array: xr.DataArray) -> float | None:
    """The unit of a projected CRS, from the WKT of its grid mapping, or from rioxarray."""
    mapping = array.encoding.get("grid_mapping", array.attrs.get("grid_mapping", "spatial_ref"))
    attrs = array.coords[mapping].attrs if mapping in array.coords else {}
    wkt = str(attrs.get("crs_wkt") or attrs.get("spatial_ref") or "")
    if not wkt and hasattr(array, "rio") and array.rio.crs:
        wkt = array.rio.crs.to_wkt()
    units = re.findall(
        r'(?<![A-Z])(?:LENGTH)?UNIT\["[^"]*",\s*([0-9.eE+-]+)', wkt
    )  # the projection's comes last
    return float(units[-1]) if units and wkt.startswith(("PROJCS", "PROJCRS")) else None
