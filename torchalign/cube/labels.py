"""A DataArray as a cube: its dims, bands and frames found by name, masks and references matched with it by label.

Nothing is estimated here and nothing is loaded before it is needed.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from pandas.errors import InvalidIndexError
from torch import Tensor

from torchalign._check import message

_NAMES = {
    "time": ("time", "t", "date", "valid_time", "timestamp", "datetime", "acquisition_time"),
    "band": ("band", "bands", "channel", "wavelength", "variable"),
    "y": ("y", "lat", "latitude", "northing", "row"),
    "x": ("x", "lon", "longitude", "easting", "col"),
}
CUBE = ("time", "band", "y", "x")  # (T, C, H, W)
MASK = ("time", "y", "x")  # (T, H, W)
# the coordinate over time, y and x of what an alpha band or a file's mask says: 0 = not usable
USABLE = "usable"
SAME_GRID = 1e-3  # pixels; coordinates that agree to this are the same grid

Array = NDArray[Any]
Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset)


@dataclass(frozen=True)
class Cube:
    """A DataArray seen as (T, C, H, W), whatever its dims are called and their order; nothing is loaded."""

    array: xr.DataArray
    dims: Mapping[str, Hashable]  # "time", "y", "x" and maybe "band" → the name of the dim

    @classmethod
    def of(
        cls, array: object, given: Mapping[str, Hashable | None] | None = None, name: str = "datacube"
    ) -> Cube:
        """Find the dims, but for those that are given by role; ``name`` is what the user calls the array."""
        dims = find_dims(array, name, given)
        assert isinstance(array, xr.DataArray)  # as find_dims has seen
        if array.dtype.kind not in "iuf":
            cure = 'convert it with .astype("uint8") or .astype("float32")'
            raise TypeError(message(name, "an integer or floating dtype", array.dtype, cure))
        return cls(array, dims)

    @property
    def sizes(self) -> dict[str, int]:
        """Role → length; 1 for a band dim that is not there."""
        return {role: self.array.sizes[self.dims[role]] if role in self.dims else 1 for role in CUBE}

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.sizes["y"], self.sizes["x"]

    @property
    def variable(self) -> xr.Variable:
        """With the roles as dims."""
        return rename_dims(self.array, {dim: role for role, dim in self.dims.items()})

    def coordinate(self, role: str, *, local: bool = False) -> xr.DataArray | None:
        """The labels along a role, of :func:`with_plain_dates`; ``None`` where there are none."""
        dim = self.dims.get(role)
        return plain_labels(self.array, dim, local=local) if dim in self.array.coords else None

    def view(self, values: Array) -> Array:
        """(T, C, H, W) of values that lie in the order of the array's own dims."""
        present = [role for role in CUBE if role in self.dims]
        view = values.transpose([self.array.get_axis_num(self.dims[role]) for role in present])
        return view if "band" in self.dims else view[:, None]


# --- dims ---


def find_dims(
    array: object, name: str = "datacube", given: Mapping[str, Hashable | None] | None = None
) -> dict[str, Hashable]:
    """Role → name of the dim, found by name but for those ``given``; "band" is left out where there is none."""
    if not isinstance(array, xr.DataArray):
        cure = "align tensors with aligner(cube, reference), or give the array dims with xarray.DataArray"
        if isinstance(array, xr.Dataset):
            cure = "choose a variable, dataset[name]"
        raise TypeError(message(name, "an xarray.DataArray", type(array).__name__, cure))
    dims = array.dims
    found = {role: dim for role, dim in (given or {}).items() if dim is not None}
    for role, dim in found.items():
        if not isinstance(dim, Hashable) or dim not in dims or list(found.values()).count(dim) > 1:
            raise ValueError(message(f"{role}_dim", f"one dim of {dims}", repr(dim), "name each dim once"))
    for role in (role for role in CUBE if role not in found):
        named = [dim for dim in dims if role_of(dim) == role and dim not in found.values()]
        if len(named) > 1:
            cure = f"say which with {role}_dim=, and what the other is, or select from it with .isel"
            raise ValueError(message(name, f"one {role} dim", f"{named} among {dims}", cure))
        found |= dict.fromkeys([role] * len(named), *named)
    unknown = [dim for dim in dims if dim not in found.values()]
    missing = [role for role in MASK if role not in found]
    if missing or unknown:
        cures = [f"name it with {role}_dim={dim!r}" for role in missing or ["band"] for dim in unknown]
        cures += [f"or select from it with .isel({dim}=…)" for dim in unknown]
        cures += [f'add it with .expand_dims("{role}")' for role in missing if not unknown]
        got = f"{dims} with unknown {unknown}"
        if missing:
            known = "; ".join(f"{role} may be called {', '.join(_NAMES[role])}" for role in missing)
            got = f"{dims} without {' and '.join(missing)} ({known})"
        raise ValueError(message(name, "the dims time, y, x and maybe band", got, ", ".join(cures)))
    return found


def role_of(dim: Hashable) -> str | None:
    """The role that a dim's name tells, ``None`` for an unknown one."""
    name = str(dim).lower()
    if name.startswith("band_"):  # of a Dataset whose variables have bands of their own
        return "band"
    return next((role for role in CUBE if name in _NAMES[role]), None)


def frame_names(dataset: xr.Dataset, cure: str, *, kinds: str = "") -> list[Hashable]:
    """The variables over time, y and x, of some kinds of dtypes; an error where there are none."""
    names = [
        name
        for name, array in dataset.data_vars.items()
        if {*MASK} <= {role_of(dim) for dim in array.dims} and (not kinds or array.dtype.kind in kinds)
    ]
    if not names:
        raise ValueError(message("cube", "variables over time, y and x", [*map(str, dataset)], cure))
    return names


def as_numbers(array: Any) -> Any:
    """Bool as the numbers that files hold; what else it may be as it is."""
    return array.astype(np.uint8) if isinstance(array, xr.DataArray) and array.dtype == np.bool_ else array


def rename_dims(array: xr.DataArray, names: Mapping[Hashable, str]) -> xr.Variable:
    """The array's variable under other dim names, neither loaded nor copied."""
    variable = array.variable.copy(deep=False)
    variable.dims = [names[dim] for dim in array.dims]
    return variable


def axes_of(variable: xr.Variable, roles: Sequence[str]) -> tuple[str, ...]:
    """The roles, the first of which is time; without it where the variable is the same for all frames."""
    return tuple(roles if "time" in variable.dims else roles[1:])


def load(source: xr.Variable, roles: Sequence[str], **parts: slice | Array) -> Array:
    """A part of source in memory, one axis for each role, of size 1 where source lacks it."""
    part = source.isel({role: rows for role, rows in parts.items() if role in source.dims}).load()
    values: Array = part.transpose(*(role for role in roles if role in part.dims)).to_numpy()
    return values[tuple(slice(None) if role in part.dims else None for role in roles)]


# --- labels ---


def with_plain_dates(array: Labelled, dim: Hashable, *, local: bool = False) -> Labelled:
    """With ``datetime64`` for labels along ``dim`` that are dates of Python, periods, or have a time zone.

    Of a period its start; in UTC, as what is stored, or with ``local`` as the labels themselves read.
    """
    index = array.indexes.get(dim)
    if index is None or not len(index):
        return array
    if isinstance(index, pd.PeriodIndex):
        starts = index.asfreq("s", "start").strftime("%Y-%m-%dT%H:%M:%S").fillna("NaT")
        dates = pd.DatetimeIndex(starts.to_numpy("datetime64[us]"))
    elif isinstance(index, pd.DatetimeIndex) and index.tz is not None:
        dates = index.tz_localize(None) if local else index.tz_convert(None)
    elif index.dtype == object and all(isinstance(label, datetime.date) for label in index):
        naive = [None if pd.isna(label) else _without_zone(label, local) for label in index]
        dates = pd.DatetimeIndex(np.array(naive, "datetime64[us]"))
    else:
        return array
    with suppress(pd.errors.OutOfBoundsDatetime):  # of years that nanoseconds do not reach
        dates = dates.as_unit("ns")
    return array.assign_coords({dim: (dim, dates, array[dim].attrs)})


def _without_zone(label: Any, local: bool) -> Any:
    if getattr(label, "tzinfo", None) is None:
        return label
    return (label if local else label.astimezone(datetime.timezone.utc)).replace(tzinfo=None)


def plain_labels(array: xr.DataArray, dim: Hashable, *, local: bool = False) -> xr.DataArray:
    """The coordinate ``dim`` of :func:`with_plain_dates`; the positions where there is none."""
    return with_plain_dates(array[dim], dim, local=local)[dim]


def label_text(label: Hashable | np.generic) -> str:
    """A coordinate's entry as text; a date in ISO 8601, as short as it can be."""
    return str(np.datetime_as_string(label, unit="auto") if isinstance(label, np.datetime64) else label)


def match_labels(wanted: Array, known: Array) -> list[int | None]:
    """Where each wanted label is among the known ones; ``None`` where it is not, or more than once.

    A date that is not is matched by the second, else by the day, where both sides have one such date and it is within an
    hour, or has no time of day: names of files drop it, and granules of one scene differ by seconds.
    """
    exact = [[label_text(label) for label in labels] for labels in (wanted, known)]
    if exact[0] == exact[1]:  # whatever occurs twice
        return list(range(len(known)))
    found: list[int | None] = [None] * len(wanted)
    seconds, days = (
        [[_cut_date(label, length) for label in labels] for labels in (wanted, known)] for length in (19, 10)
    )
    for here, there in (days, seconds, exact):  # what is nearer goes before
        often, alone = Counter(there), Counter(here)
        numbers = {text: number for number, text in enumerate(there) if text is not None and often[text] == 1}
        for position, text in enumerate(here):
            if text not in numbers or (here is not exact[0] and alone[text] > 1):
                continue
            if here is not days[0] or _are_near(seconds[0][position], seconds[1][numbers[text]]):
                found[position] = numbers[text]
    return found


def _are_near(first: str | None, second: str | None) -> bool:
    """Whether two dates of one day are within an hour, or one of them has no time of day."""
    times = (datetime.time.fromisoformat(str(date)[11:] or "00:00") for date in (first, second))
    one, other = (60 * (60 * time.hour + time.minute) + time.second for time in times)
    return 0 in (one, other) or abs(one - other) <= 3600


def _cut_date(label: Any, length: int) -> str | None:
    """The first letters of a date in ISO 8601; of no date ``None``."""
    if isinstance(label, np.datetime64):
        return str(np.datetime_as_string(label, unit="s"))[:length]
    return str(label.isoformat())[:length] if hasattr(label, "isoformat") else None  # of cftime


def time_labels(array: xr.DataArray, dim: Hashable) -> list[str]:
    """Days in ISO 8601, or whatever the time coordinate holds, or the positions."""
    values = plain_labels(array, dim, local=True).values
    if values.dtype.kind == "M":
        days = np.datetime_as_string(values, unit="D").tolist()
        # two frames of one day are told apart by the hour
        return days if len(set(days)) == len(days) else np.datetime_as_string(values, unit="m").tolist()
    return [str(value) for value in values.tolist()]


def labels_in_words(array: xr.DataArray, dim: Hashable) -> str:
    """How many labels there are along a dim, and some of them."""
    if dim not in array.coords:
        return f"{array.sizes[dim]} without labels"
    values = plain_labels(array, dim, local=True).values
    ends = [label_text(value) for value in (values if len(values) < 5 else values[[0, 1, -1]])]
    shown = ", ".join(ends if len(values) < 5 else (*ends[:2], "…", ends[2]))
    return f"{len(values)} labels ({shown})"


def band_labels(cube: xr.DataArray, dims: Mapping[str, Hashable] | None = None) -> tuple[list[str], int]:
    """The labels, none where there are none, and the number of the bands; ``dims`` of :func:`find_dims`."""
    band = (find_dims(cube) if dims is None else dims).get("band")
    if band is None:
        return [], 1
    return [str(label) for label in cube[band].values] if band in cube.coords else [], cube.sizes[band]


def find_bands(
    wanted: Any, labels: Sequence[Hashable | None], count: int, *, first: int = 0, name: str = "bands"
) -> list[int]:
    """Positions, from 0, of bands that are wanted by label or by number, of which ``first`` is the least.

    A label goes before a number, and text may hold a number.
    """
    found = []
    for band in as_list(wanted):
        if band is not None and band in labels:
            found.append(labels.index(band))
        elif str(band).isdecimal() and first <= int(band) < first + count:
            found.append(int(band) - first)
        else:
            named = [label for label in labels if label is not None]
            numbers = f"the numbers {first} … {first + count - 1}"
            expected = f"some of {named} or of {numbers}" if named else numbers
            raise ValueError(message(name, expected, repr(band), "choose among these"))
    return found


def as_list(wanted: Any) -> list[Any]:
    """One name or number, or several."""
    try:
        return [wanted] if isinstance(wanted, str) else list(wanted)
    except TypeError:
        return [wanted]


def find_frame(
    array: xr.DataArray,
    dim: Hashable,
    label: Any,
    name: str = "frame",
    *,
    words: Sequence[str] = (),
    positions: bool = True,
) -> int:
    """The position of the one frame of that label, or with ``positions`` of that number, if it is no label.

    A date is that of all frames of the day. Without a time zone a label is in that of the cube's labels, but datetime64
    in UTC; nothing is near enough. ``words`` are what else the user may say.
    """
    count = array.sizes[dim]
    local = getattr(label, "tzinfo", None) is None and not isinstance(label, np.datetime64)
    if isinstance(label, (np.datetime64, pd.Period)) or type(label) is datetime.date:
        label = str(label)  # its unit is its resolution
    label = _without_zone(label, local)
    matches: list[int] = []
    if dim in array.coords:
        numbers = xr.DataArray(np.arange(count), {dim: plain_labels(array, dim, local=local)}, [dim])
        with suppress(KeyError, TypeError, ValueError, IndexError, InvalidIndexError):
            matches = numbers.sel({dim: label}).values.ravel().tolist()
    is_number = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
    if positions and is_number and len(matches) != 1 and -count <= label < count:
        return int(label) % count
    if len(matches) != 1:
        others = f", or a position below {count}" if positions else ""
        expected = f"{', '.join([*map(repr, words), 'the label of exactly one frame'])}{others}"
        got = f"{label!r}, found {len(matches)} times among {labels_in_words(array, dim)}"
        known = array[dim].values[matches] if matches else []
        pick = f"datacube.isel({dim}={(matches or [0])[0]})"
        cure = f"write the label of {dim!r} in full, or pass a frame, {pick}"
        if len({*map(label_text, known)}) == 1:  # it was in full
            cure = f"give a position, {matches[0]}" if positions else f"pass one of them, {pick}"
        raise ValueError(message(name, expected, got, cure))
    return matches[0]


# --- what goes with a cube ---


def own_codes(cube: Cube) -> xr.Variable | None:
    """Over time, y and x what files with an alpha band or a mask say, the coordinate ``usable``: 0 = not usable."""
    own = cube.array.coords.get(USABLE)
    if own is None or not {*own.dims} <= {cube.dims[role] for role in MASK} or own.ndim < 2:
        return None
    codes: Any = rename_dims(own, {dim: role for role, dim in cube.dims.items()})
    if codes.dims == MASK:  # nothing is read
        return codes
    return codes.set_dims({role: cube.sizes[role] for role in MASK})


def find_usable(mask: object, name: str, cube: Cube) -> xr.Variable | None:
    """A bool variable over some of time, y, x, of a mask and of what the files say; ``None`` if all is usable."""
    given, codes = find_mask(mask, name, cube), own_codes(cube)
    if codes is None or given is None:
        return given if codes is None else codes != 0
    return given & (codes != 0)


def find_mask(mask: object, name: str, cube: Cube) -> xr.Variable | None:
    """A bool variable over some of time, y, x."""
    if mask is None:
        return None
    labelled = label_axes(mask, name, cube, MASK)
    if labelled.dtype != np.bool_:
        cure = "cloud masks are mostly 1 = cloud: pass `mask == 0`; if 1 = usable, `mask.astype(bool)`"
        raise TypeError(message(name, "bool, True = usable", labelled.dtype, cure))
    return match(labelled, name, cube, MASK)


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
    single = [dim for dim, size in labelled.sizes.items() if size == 1 != cube.array.sizes[dim]]
    return labelled.isel(dict.fromkeys(single, 0))


def spatial_dims(other: xr.DataArray, cube: Cube) -> dict[str, Hashable]:
    """Role → dim of another array, by its names and by those of the cube; what has no role is left out."""
    own = {dim: role for role, dim in cube.dims.items()}
    named = {dim: role for dim in other.dims if (role := role_of(dim)) is not None}
    known = named | own
    return {known[dim]: dim for dim in other.dims if dim in known}


def match(other: xr.DataArray, name: str, cube: Cube, roles: Sequence[str]) -> xr.Variable:
    """A DataArray on the cube's coordinates, over some of the roles; or an error that says why not."""
    found = spatial_dims(other, cube)
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
            expected = f"the cube's {cube.dims[role]!r}, {labels_in_words(cube.array, cube.dims[role])}"
            cure = "bring it onto the cube's coordinates with .sel, .reindex_like or .rio.reproject_match"
            raise ValueError(message(name, expected, labels_in_words(other, found[role]), cure))
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
        expected = f"the bands of {labels_in_words(cube.array, own)}"
    elif other.sizes[dim] == cube.sizes["band"]:
        return other
    cure = f"align the bands that both have, or compare all with one, {name}.isel({dim}=0)"
    raise ValueError(message(name, expected, labels_in_words(other, dim), cure))


def _same_coordinate(first: xr.DataArray, dim: Hashable, second: xr.DataArray, other_dim: Hashable) -> bool:
    if first.sizes[dim] != second.sizes[other_dim]:
        return False
    if dim not in first.coords or other_dim not in second.coords:
        return True
    a, b = plain_labels(first, dim).values, plain_labels(second, other_dim).values
    if a.dtype.kind == b.dtype.kind == "M":
        return match_labels(a, b) == list(range(len(a)))
    if len(a) < 2 or a.dtype.kind not in "iuf" or b.dtype.kind not in "iuf":
        return bool(np.array_equal(a, b))
    pixel = abs(float(a[-1]) - float(a[0])) / (len(a) - 1)
    return bool(np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=0, atol=SAME_GRID * pixel))
