"""A DataArray as a cube: its dims found by name, its pixels as what an aligner takes, and back.

Nothing is estimated here and nothing is loaded before it is needed. Raw pixels become floats with NaN for nodata,
and come back rounded, clamped and with their nodata; masks and references are matched with the cube by label.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from torchalign._check import message
from torchalign.functional.warp import warp as resample_frames

__all__ = [
    "CUBE",
    "MASK",
    "Array",
    "Cube",
    "Pixels",
    "describe",
    "find_dims",
    "find_mask",
    "find_nodata",
    "keep_nodata",
    "label_axes",
    "load",
    "mask_tensor",
    "match",
    "rename_dims",
]

_NAMES = {
    "time": ("time", "t", "date"),
    "band": ("band", "bands", "channel", "wavelength", "variable"),
    "y": ("y", "lat", "latitude", "northing", "row"),
    "x": ("x", "lon", "longitude", "easting", "col"),
}
CUBE = ("time", "band", "y", "x")  # (T, C, H, W)
MASK = ("time", "y", "x")  # (T, H, W)
_PACKING = ("scale_factor", "add_offset")  # of an encoding; 1 and 0 where there are none
_GRID_TOLERANCE = 1e-3  # pixels; coordinates that agree to this are the same grid

Array = NDArray[Any]


@dataclass(frozen=True)
class Cube:
    """A DataArray seen as (T, C, H, W), whatever its dims are called and their order; nothing is loaded."""

    array: xr.DataArray
    dims: Mapping[str, Hashable]  # "time", "y", "x" and maybe "band" → the name of the dim

    @classmethod
    def of(cls, array: object, given: Mapping[str, Hashable | None]) -> Cube:
        """Find the dims, but for those that are given by role.

        Raises:
            TypeError: no DataArray of numbers.
            ValueError: dims that cannot be told.
        """
        if not isinstance(array, xr.DataArray):
            cure = "align tensors with aligner(cube, reference), or give the array dims with xarray.DataArray"
            if isinstance(array, xr.Dataset):
                cure = 'use dataset.to_dataarray("band")'
            raise TypeError(message("datacube", "an xarray.DataArray", type(array).__name__, cure))
        if array.dtype.kind not in "iuf":
            cure = 'convert it with .astype("uint8") or .astype("float32")'
            raise TypeError(message("datacube", "an integer or floating dtype", array.dtype, cure))
        return cls(array, find_dims(array.dims, given))

    @property
    def sizes(self) -> dict[str, int]:
        """Role → length; 1 for a band dim that is not there."""
        return {role: self.array.sizes[self.dims[role]] if role in self.dims else 1 for role in CUBE}

    @property
    def variable(self) -> xr.Variable:
        """With the roles as dims."""
        return rename_dims(self.array, {dim: role for role, dim in self.dims.items()})

    def view(self, values: Array) -> Array:
        """(T, C, H, W) of values that lie in the order of the array's own dims."""
        present = [role for role in CUBE if role in self.dims]
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
class Pixels:
    """How raw pixels become what an aligner takes, floats with NaN for nodata, and how they come back."""

    dtype: np.dtype[Any]
    compute: torch.dtype
    nodata: tuple[Any, ...]  # values of dtype; the first is the one written
    packing: _Packing | None = None  # of floats

    @classmethod
    def of(cls, cube: Cube, fill_value: float | None = None, name: str = "fill_value") -> Pixels:
        """How the pixels of a cube are computed; ``fill_value``, ``name`` to the user, must fit their dtype."""
        nodata = find_nodata(cube.array)
        packing = _Packing.of(cube.array)
        pixels = cls(cube.array.dtype, _find_compute_dtype(cube, nodata), nodata, packing)
        if fill_value is not None and packing is not None and not packing.holds(fill_value):
            expected = f"what the packed {packing.dtype} holds, {packing.low} … {packing.high}, or NaN"
            cure = "choose such a value, or pass datacube.drop_encoding()"
            raise ValueError(message(name, expected, fill_value, cure))
        if fill_value is not None and pixels.dtype.kind != "f" and not (np.isnan(fill_value) and nodata):
            limits = np.iinfo(pixels.dtype)
            if not limits.min <= fill_value <= limits.max:
                expected = (
                    f"what {pixels.dtype} holds, {limits.min} … {limits.max}, or NaN where there is nodata"
                )
                cure = "choose such a value, or declare datacube.attrs['_FillValue']"
                raise ValueError(message(name, expected, fill_value, cure))
        return pixels

    @property
    def native(self) -> np.dtype[Any]:
        """The nearest dtype that torch knows: this machine's byte order, no long double."""
        too_long = self.dtype.kind == "f" and self.dtype.itemsize > 8
        return np.dtype(np.float64) if too_long else self.dtype.newbyteorder("=")

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """``compute`` as numpy has it."""
        return np.dtype(np.float64 if self.compute == torch.float64 else np.float32)

    def decode(self, raw: Array, device: torch.device) -> Tensor:
        """Floats on the device, NaN for nodata."""
        # a copy, never the caller's memory; the conversion makes one where the dtype changes
        converted = self.native != self.compute_dtype and raw.flags.writeable
        native = (
            np.asarray(raw, self.native, order="C") if converted else np.array(raw, self.native, order="C")
        )
        host = torch.from_numpy(native)
        if device.type == "cuda":
            host = host.pin_memory()
        values = host.to(device, non_blocking=True).to(self.compute)
        for value in self.nodata:
            values.masked_fill_(values == float(value), torch.nan)  # of our own copy
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
        rounded = values.round().clamp_(float(limits.min), float(top))
        for value in map(int, self.nodata):  # a valid pixel must not become nodata by rounding or clamping
            beside = value + 1 if value < limits.max else value - 1
            rounded.masked_fill_((rounded == float(value)) & (values != float(value)), float(beside))
        integer = torch.from_numpy(np.empty(0, self.native)).dtype
        encoded = rounded.nan_to_num_().to(integer).cpu().numpy()
        if self.nodata:
            encoded[values.isnan().cpu().numpy()] = self.nodata[0]
        return encoded


def keep_nodata(aligned: Tensor, frames: Tensor, warp: Tensor) -> Tensor:
    """NaN where the frame's nearest pixel is NaN; a warp with a fill value has put that there."""
    footprint = resample_frames(
        frames.isnan().to(frames.dtype), warp, interpolation="nearest", padding_mode="zeros"
    )
    return aligned.masked_fill(footprint > 0, torch.nan)


def find_dims(dims: Sequence[Hashable], given: Mapping[str, Hashable | None]) -> dict[str, Hashable]:
    """Role → name of the dim; "band" is left out where there is none."""
    found = {role: dim for role, dim in given.items() if dim is not None}
    for role, dim in found.items():
        if dim not in dims or list(found.values()).count(dim) > 1:
            raise ValueError(
                message(f"{role}_dim", f"one dim of {tuple(dims)}", repr(dim), "name each dim once")
            )
    for role in (role for role in CUBE if role not in found):
        named = [dim for dim in dims if str(dim).lower() in _NAMES[role] and dim not in found.values()]
        if len(named) > 1:
            cure = f"say which with {role}_dim=, and what the other is, or select from it with .isel"
            raise ValueError(message("datacube", f"one {role} dim", f"{named} among {tuple(dims)}", cure))
        found |= dict.fromkeys([role] * len(named), *named)
    unknown = [dim for dim in dims if dim not in found.values()]
    missing = [role for role in MASK if role not in found]
    if missing or unknown:
        cures = [f"name it with {role}_dim={dim!r}" for role in missing or ["band"] for dim in unknown]
        cures += [f"or select from it with .isel({dim}=…)" for dim in unknown]
        cures += [f'add it with .expand_dims("{role}")' for role in missing if not unknown]
        known = "".join(f", {role} ({', '.join(_NAMES[role])})" for role in missing)
        got = f"{tuple(dims)} without{known}" if missing else f"{tuple(dims)} with unknown {unknown}"
        raise ValueError(message("datacube", "the dims time, y, x and maybe band", got, ", ".join(cures)))
    return found


def rename_dims(array: xr.DataArray, names: Mapping[Hashable, str]) -> xr.Variable:
    """The array's variable under other dim names, neither loaded nor copied."""
    variable = array.variable.copy(deep=False)
    variable.dims = [names[dim] for dim in array.dims]
    return variable


def load(source: xr.Variable, roles: Sequence[str], **parts: slice) -> Array:
    """A part of source in memory, one axis for each role, of size 1 where source lacks it."""
    part = source.isel({role: rows for role, rows in parts.items() if role in source.dims}).load()
    values: Array = part.transpose(*(role for role in roles if role in part.dims)).to_numpy()
    return values[tuple(slice(None) if role in part.dims else None for role in roles)]


def find_nodata(array: xr.DataArray) -> tuple[Any, ...]:
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


def _find_compute_dtype(cube: Cube, nodata: tuple[Any, ...]) -> torch.dtype:
    """The float that holds the pixels; for 32- and 64-bit integers that takes a look at all of them."""
    dtype = cube.array.dtype
    if dtype.kind == "f" or dtype.itemsize <= 2:
        return torch.float64 if dtype.itemsize > 4 else torch.float32
    if cube.array.chunks is not None:  # dask computes when it is told to, not before
        return torch.float64
    for time in range(cube.sizes["time"]):
        raw = load(cube.variable, CUBE, time=slice(time, time + 1))
        valid = raw[~np.isin(raw, nodata)]
        if valid.size and max(int(valid.max()), -int(valid.min())) > 2**24:
            return torch.float64
    return torch.float32


def find_mask(mask: object, name: str, cube: Cube) -> xr.Variable | None:
    """A bool variable over some of time, y, x."""
    if mask is None:
        return None
    labelled = label_axes(mask, name, cube, MASK)
    if labelled.dtype != np.bool_:
        cure = "cloud masks are mostly 1 = cloud: pass `mask == 0`; if 1 = usable, `mask.astype(bool)`"
        raise TypeError(message(name, "bool, True = usable", labelled.dtype, cure))
    return match(labelled, name, cube, MASK)


def mask_tensor(usable: xr.Variable | None, device: torch.device, **parts: slice) -> Tensor | None:
    """(t or 1, H or 1, W or 1); without the first for a mask that has no time."""
    if usable is None:
        return None
    roles = MASK if "time" in usable.dims else MASK[1:]
    return torch.from_numpy(np.array(load(usable, roles, **parts))).to(device)


def label_axes(values: object, name: str, cube: Cube, roles: Sequence[str]) -> xr.DataArray:
    """Arrays get the cube's dims, from the last; a mask's axes of size 1 are dropped, to be broadcast."""
    if isinstance(values, xr.DataArray):
        return values
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if not isinstance(values, np.ndarray):
        expected = "a DataArray, an array or a tensor"
        if "band" in roles:  # a reference
            expected += ", 'median', 'mean', 'first', 'clearest', 'iterative' or a time label"
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


def match(other: xr.DataArray, name: str, cube: Cube, roles: Sequence[str]) -> xr.Variable:
    """A DataArray on the cube's coordinates, over some of the roles; or an error that says why not."""
    own = {dim: role for role, dim in cube.dims.items()}
    named = {dim: role for dim in other.dims for role in CUBE if str(dim).lower() in _NAMES[role]}
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
            expected = f"the cube's {cube.dims[role]!r}, {describe(cube.array, cube.dims[role])}"
            cure = "bring it onto the cube's coordinates with .sel, .reindex_like or .rio.reproject_match"
            raise ValueError(message(name, expected, describe(other, found[role]), cure))
    return rename_dims(other, {dim: role for role, dim in found.items()})


def _match_bands(other: xr.DataArray, name: str, cube: Cube, dim: Hashable) -> xr.DataArray:
    """The cube's bands of other, by label where both have labels, else by position."""
    own = cube.dims.get("band")
    expected = f"{cube.sizes['band']} bands"
    if own in cube.array.coords and dim in other.coords:
        wanted, labels = cube.array[own].values, other[dim].values
        if np.array_equal(wanted, labels):
            return other
        if len(set(labels)) == len(labels) and set(wanted) <= set(labels):
            return other.sel({dim: wanted})
        expected = f"the bands {describe(cube.array, own)}"
    elif other.sizes[dim] == cube.sizes["band"]:
        return other
    cure = f"align the bands that both have, or compare all with one, {name}.isel({dim}=0)"
    raise ValueError(message(name, expected, describe(other, dim), cure))


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


def describe(array: xr.DataArray, dim: Hashable) -> str:
    """How many labels there are along a dim, and some of them."""
    labels = array[dim].values.astype(str) if dim in array.coords else np.empty(0, str)
    shown = ", ".join(labels if len(labels) < 5 else (labels[0], labels[1], "…", labels[-1]))
    return f"{array.sizes[dim]} of them ({shown or 'without labels'})"
