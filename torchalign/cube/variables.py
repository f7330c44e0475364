"""The variables of a Dataset: which the estimate sees, which are moved, which are classes that nothing may blend.

A DataArray whose bands are not of one kind (a classification among them, a nodata value each) is taken apart here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from torchalign._check import check_kind, message
from torchalign.cube.labels import CUBE, MASK, Cube, as_list, band_labels, find_bands, find_dims, role_of
from torchalign.cube.pixels import as_floats, find_nodata, find_packing

# what the quality and scene classifications of Sentinel-2, Landsat, HLS, MODIS, Planet and eo-learn are called
_CLASS_NAMES = re.compile(
    r"scl|clm|clouds?_?masks?|f_?mask|b?qa|qa_?(60|pixel|radsat|aerosol)|(pixel|radsat|sr|st|cloud)_?qa(_.*)?|"
    r"qa_.*|.*_qa|state_1km|udm2?|(is_?|valid_?)?data_?mask|(is_?data|valid)|land_?cover|(.*_)?(labels?|class(es)?)",
    re.IGNORECASE,
)
_NODATA_COORDS = ("nodata", "_FillValue", "missing_value", "fill_value")  # along the bands of a DataArray


@dataclass(frozen=True)
class Variables:
    """What becomes of every variable of a Dataset."""

    dataset: xr.Dataset
    seen: tuple[Hashable, ...]  # by the estimate; resampled like those that are moved
    moved: tuple[Hashable, ...]
    classes: tuple[Hashable, ...]  # copied from the nearest pixel
    dims: Mapping[str, Hashable | None]  # role → dim, where the user says it

    @classmethod
    def of(
        cls, dataset: xr.Dataset, bands: Any, classes: Any, dims: Mapping[str, Hashable | None]
    ) -> Variables:
        """Sort them; those without time, y or x stay as they are."""
        frames = [name for name in dataset.data_vars if _has_frames(dataset, name, dims)]
        if not frames:
            listed = [f"{name} {tuple(array.dims)}" for name, array in dataset.data_vars.items()]
            got = ", ".join([*listed[:4], *["…"] * (len(listed) > 4)]) or "one without any"
            cure = "choose variables with time, y and x, or name the dims with time_dim=, y_dim=, x_dim="
            raise ValueError(message("datacube", "a Dataset with variables over time, y and x", got, cure))
        named = [] if classes is None else _choose_names(classes, frames, "classes")
        kinds = {name: name in named or is_class(dataset[name], name) for name in frames}
        wanted = [name for name in frames if not kinds[name]]
        wanted = wanted if bands is None else _choose_names(bands, frames, "bands")
        for name in wanted:
            if name in named:
                cure = "name each variable once"
                raise ValueError(message("bands", "variables that are no classes", repr(name), cure))
            kinds[name] = False
        for name in frames:
            kind = dataset[name].dtype.kind
            if kind not in ("iuf" if not kinds[name] else "iufbmM"):
                cure = "convert it with .astype, or drop it with .drop_vars"
                expected = "an integer or floating dtype"
                raise TypeError(message(f"datacube[{name!r}]", expected, dataset[name].dtype, cure))
        moved = [name for name in frames if not kinds[name] and name not in wanted]
        return cls(dataset, tuple(wanted), tuple(moved), tuple(n for n in frames if kinds[n]), dims)

    def given(self, name: Hashable) -> dict[str, Hashable | None]:
        """The dims that the user names, of those that a variable has."""
        return {role: dim for role, dim in self.dims.items() if dim in self.dataset[name].dims}

    def check_known(self, other: xr.Dataset, argument: str) -> None:
        """Another Dataset must have what the estimate sees."""
        missing = [name for name in self.seen if name not in other]
        if missing:
            expected = f"a cube with the bands {[*map(str, self.seen)]}"
            cure = "name those that both have in bands="
            raise ValueError(message(argument, expected, f"none called {missing[0]!r}", cure))

    def cube(self, name: Hashable) -> Cube:
        """A variable as a cube."""
        array = self.dataset[name]
        return Cube.of(array, self.given(name), f"datacube[{name!r}]")


def _has_frames(dataset: xr.Dataset, name: Hashable, given: Mapping[str, Hashable | None]) -> bool:
    """Whether a variable lies over time, y and x; an error if it is a series of images whose y and x cannot be told."""
    dims = dataset[name].dims
    roles = {role_of(dim) for dim in dims} | {role for role, dim in given.items() if dim in dims}
    if {*MASK} <= roles:
        return True
    if "time" in roles and len(dims) > 2 and not {"y", "x"} & roles:
        find_dims(dataset[name], f"datacube[{name!r}]", {r: d for r, d in given.items() if d in dims})
    return False


def _choose_names(wanted: Any, names: Sequence[Hashable], argument: str) -> list[Hashable]:
    wanted = as_list(wanted)
    missing = [name for name in wanted if name not in names]
    if missing or (not wanted and argument == "bands"):
        got = repr(missing[0]) if missing else "none"
        raise ValueError(message(argument, f"some of {[*map(str, names)]}", got, "choose among these"))
    return list(dict.fromkeys(wanted))


def is_class(array: xr.DataArray, name: Hashable | None = None) -> bool:
    """Whether a mean of two pixels has no meaning: bool, flags, or a classification by its name."""
    if array.dtype.kind in "bmM" or {"flag_values", "flag_masks"} & {*array.attrs}:
        return True
    name = array.name if name is None else name
    return isinstance(name, str) and is_class_name(name)


def is_class_name(name: str) -> bool:
    """Whether a band is called like a classification: SCL, QA_PIXEL, Fmask and their like."""
    return _CLASS_NAMES.fullmatch(name) is not None


def stack_variables(variables: Variables) -> tuple[xr.DataArray, dict[Hashable, slice]]:
    """What the estimate sees, as one cube (time, band, y, x), and which of its bands are those of each variable.

    No slices where the variables are not of one kind: their pixels are floats there, with NaN for nodata.
    """
    if not variables.seen:
        cure = "name the variables that the estimate is to see: bands=[…]"
        expected = "a variable that is no classification"
        raise ValueError(message("datacube", expected, [*variables.dataset], cure))
    cubes = [variables.cube(name) for name in variables.seen]
    first = cubes[0]
    dims = {role: first.dims[role] for role in MASK}
    kinds = {(one.array.dtype, find_nodata(one.array), find_packing(one.array)) for one in cubes}
    alike = len(kinds) == 1
    parts, labels, slices, count = [], [], {}, 0
    for name, one in zip(variables.seen, cubes, strict=True):
        own, number = band_labels(one.array, one.dims)
        words = [f"{name}/{label}" for label in own or range(number)]
        labels += words if "band" in one.dims else [str(name)]
        slices[name] = slice(count, count + number)
        count += number
        variable: Any = one.variable if alike else Cube(as_floats(one.array), one.dims).variable
        variable = variable if "band" in one.dims else variable.expand_dims("band")
        parts.append(xr.Variable(CUBE, variable.transpose(*CUBE).data))
    concat: Any = xr.Variable.concat  # which has no types
    whole = parts[0] if len(parts) == 1 else concat(parts, "band")
    names = (dims["time"], "band", dims["y"], dims["x"])
    coords = {
        key: value
        for key, value in variables.dataset.coords.items()
        if {*value.dims} <= {*dims.values()} and key != "band"
    }
    stacked = xr.DataArray(whole.data, coords, names).assign_coords(band=labels)
    if alike:
        stacked.attrs, stacked.encoding = dict(first.array.attrs), dict(first.array.encoding)
        return stacked, slices
    for source, target in ((first.array.attrs, stacked.attrs), (first.array.encoding, stacked.encoding)):
        target |= {"grid_mapping": source["grid_mapping"]} if "grid_mapping" in source else {}
    return stacked, {}


def stack_reference(reference: xr.Dataset, variables: Variables) -> xr.DataArray:
    """The bands that the estimate sees of a Dataset that is the reference, as one DataArray of floats."""
    variables.check_known(reference, "reference")
    parts = []
    for name in variables.seen:
        floats = as_floats(reference[name])
        own = variables.cube(name).dims.get("band")
        if own in floats.dims:
            floats = floats.rename({own: "band"}).drop_vars("band", errors="ignore")
        parts.append(floats if "band" in floats.dims else floats.expand_dims("band"))
    return xr.concat(parts, "band", coords="minimal", compat="override").drop_vars("band", errors="ignore")


def stack_archive(archive: Any, variables: Variables, dims: Mapping[str, Hashable | None]) -> xr.DataArray:
    """The bands of an archive that are compared with those of new frames."""
    if isinstance(archive, xr.DataArray):
        dims = find_dims(archive, "archive", dims)
        archive, _, _ = _split_bands(archive, dims, None, None)
    variables.check_known(archive, "archive")
    own = {role: dims.get(role) for role in MASK}
    return stack_variables(Variables.of(archive[list(variables.seen)], list(variables.seen), None, own))[0]


# --- a DataArray of bands that are not of one kind ---


def take_apart(
    datacube: Any, bands: Any, classes: Any, dims: Mapping[str, Hashable | None]
) -> tuple[Variables | None, Callable[[xr.Dataset], Any]]:
    """The variables of a cube, and how they go together again; ``None`` of a DataArray whose bands are of one kind."""
    for role, dim in dims.items():
        check_kind(f"{role}_dim", dim, Hashable, "the name of a dim", "give it as in datacube.dims")
    if isinstance(datacube, xr.Dataset):
        return Variables.of(datacube, bands, classes, dims), lambda moved: moved
    found = find_dims(datacube, "datacube", dims)
    if _needs_splitting(datacube, found, bands, classes):
        dataset, bands, classes = _split_bands(datacube, found, bands, classes)
        variables = Variables.of(dataset, bands, classes, {role: found[role] for role in MASK})
        if len(variables.seen) < len(dataset) or _needs_splitting(datacube, found, None, None):
            return variables, lambda moved: _join_bands(moved, datacube, found)
    return None, lambda moved: moved


def _needs_splitting(array: xr.DataArray, dims: Mapping[str, Hashable], bands: Any, classes: Any) -> bool:
    """Whether the bands of a cube must be told apart: by the user's word, their names or a nodata value each."""
    if bands is not None or classes is not None:
        return True
    labels, _ = band_labels(array, dims)
    return any(map(is_class_name, labels)) or _nodata_of_bands(array, dims) is not None


def _nodata_of_bands(array: xr.DataArray, dims: Mapping[str, Hashable]) -> list[Any] | None:
    """One value a band, where they differ: of a coordinate, or of rioxarray's attribute."""
    band = dims.get("band")
    if band is None:
        return None
    for name in _NODATA_COORDS:
        coordinate = array.coords.get(name)
        if coordinate is not None and coordinate.dims == (band,) and coordinate.dtype.kind in "iufO":
            return list(coordinate.values)
    own = array.attrs.get("nodatavals")
    if isinstance(own, (tuple, list)) and len(own) == array.sizes[band] and len({*map(str, own)}) > 1:
        return list(own)
    return None


def _split_bands(
    array: xr.DataArray, dims: Mapping[str, Hashable], bands: Any, classes: Any
) -> tuple[xr.Dataset, Any, Any]:
    """A Dataset with one variable a band, called by its label; and bands and classes by these names."""
    band = dims.get("band")
    if band is None:
        cure = 'give it a band dim with .expand_dims("band"), or leave bands= and classes= out'
        raise ValueError(message("datacube", "a band dim", array.dims, cure))
    labels, count = band_labels(array, dims)
    names = labels if len({*labels}) == count else [str(number) for number in range(count)]
    nodata = _nodata_of_bands(array, dims)
    variables = {}
    for number, name in enumerate(names):
        one = array.isel({band: number}, drop=True)
        one.attrs, one.encoding = dict(array.attrs), dict(array.encoding)
        if nodata is not None:
            for key in ("_FillValue", "missing_value", "nodata", "nodatavals"):
                one.attrs.pop(key, None)
                one.encoding.pop(key, None)
            value = nodata[number]
            one.attrs |= {} if value is None or value != value else {"_FillValue": value}
        variables[name] = one.drop_vars([key for key in one.coords if band in array[key].dims])
    chosen = [
        wanted
        if wanted is None
        else [names[position] for position in find_bands(wanted, names, count, name=what)]
        for wanted, what in ((bands, "bands"), (classes, "classes"))
    ]
    return xr.Dataset(variables), chosen[0], chosen[1]


def _join_bands(dataset: xr.Dataset, like: xr.DataArray, dims: Mapping[str, Hashable]) -> xr.DataArray:
    """The inverse of :func:`_split_bands`."""
    band = dims["band"]
    parts = [array.variable.expand_dims(band) for array in dataset.data_vars.values()]
    concat: Any = xr.Variable.concat  # which has no types
    whole = concat(parts, band).transpose(*like.dims)
    joined = like.copy(data=whole.data)
    return joined.assign_coords({name: dataset[name] for name in dataset.coords if name not in joined.coords})
