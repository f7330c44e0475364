"""Raw pixels as what an aligner takes, floats with NaN for nodata; and back: rounded, clamped, with nodata."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from torchalign._check import message
from torchalign.cube.labels import CUBE, Array, Cube, load
from torchalign.functional.warp import warp as resample_frames
from torchalign.types import ShiftField

_PACKING = ("scale_factor", "add_offset")  # of an encoding; 1 and 0 where there are none


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
                    ends = _packed_range(array.dtype, dtype, scale, offset, fills)
                    return cls(scale, offset, *ends, fills, dtype)
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


def find_packing(array: xr.DataArray) -> Any:
    """How ``array.encoding`` packs floats into integers; ``None`` where it does not."""
    return _Packing.of(array)


@dataclass(frozen=True)
class Pixels:
    """How raw pixels become what an aligner takes, floats with NaN for nodata, and how they come back."""

    dtype: np.dtype[Any]
    compute: torch.dtype
    nodata: tuple[Any, ...]  # values of dtype; the first is the one written
    packing: _Packing | None = None  # of floats

    @classmethod
    def of(
        cls, cube: Cube, fill_value: float | None = None, name: str = "fill_value", *, look: bool = True
    ) -> Pixels:
        """How the pixels of a cube are computed; ``fill_value``, ``name`` to the user, must fit their dtype.

        With ``look``, large integers are read, so that float32 is taken where it holds them.
        """
        nodata = find_nodata(cube.array)
        packing = _Packing.of(cube.array)
        pixels = cls(cube.array.dtype, _find_compute_dtype(cube, nodata, look), nodata, packing)
        if fill_value is not None and packing is not None and not packing.holds(fill_value):
            expected = f"what the packed {packing.dtype} holds, {packing.low} … {packing.high}, or NaN"
            cure = "choose such a value, or pass datacube.drop_encoding()"
            raise ValueError(message(name, expected, fill_value, cure))
        if fill_value is not None and pixels.dtype.kind != "f" and not (np.isnan(fill_value) and nodata):
            limits = np.iinfo(pixels.dtype)
            if not limits.min <= fill_value <= limits.max:
                held = f"{limits.min} … {limits.max}, or NaN where there is nodata"
                expected = f"what {pixels.dtype} holds, {held}"
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
        take = np.asarray if converted else np.array
        host = torch.from_numpy(take(raw, self.native, order="C"))
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


def keep_nodata(aligned: Tensor, frames: Tensor, warp: Tensor, field: ShiftField | None = None) -> Tensor:
    """NaN where the frame's nearest pixel is NaN; a warp with a fill value has put that there."""
    footprint = resample_frames(
        frames.isnan().to(frames.dtype),
        warp,
        interpolation="nearest",
        padding_mode="zeros",
        field=field,
    )
    return aligned.masked_fill(footprint > 0, torch.nan)


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


def as_floats(array: xr.DataArray) -> xr.DataArray:
    """NaN for nodata; in float64 what float32 does not hold."""
    dtype = np.float64 if array.dtype.itemsize > (4 if array.dtype.kind == "f" else 2) else np.float32
    floats = array.astype(dtype)
    for value in find_nodata(array):
        floats = floats.where(array != value)
    return floats.astype(dtype)


def _find_compute_dtype(cube: Cube, nodata: tuple[Any, ...], look: bool) -> torch.dtype:
    """The float that holds the pixels; for 32- and 64-bit integers all of them are read."""
    dtype = cube.array.dtype
    if dtype.kind == "f" or dtype.itemsize <= 2:
        return torch.float64 if dtype.itemsize > 4 else torch.float32
    if not look or cube.array.chunks is not None:  # dask computes when it is told to, not before
        return torch.float64
    for time in range(cube.sizes["time"]):
        raw = load(cube.variable, CUBE, time=slice(time, time + 1))
        valid = raw[~np.isin(raw, nodata)]
        if valid.size and max(int(valid.max()), -int(valid.min())) > 2**24:
            return torch.float64
    return torch.float32
