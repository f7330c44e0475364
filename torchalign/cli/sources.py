"""What the command line reads: cubes in netCDF, Zarr and GeoTIFFs, with the masks and references beside them."""

# No `from __future__ import annotations` here: typer reads the annotations of SourceOptions.

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import numpy as np
import typer
import xarray as xr

from torchalign._check import message
from torchalign.cube.files import NETCDF, is_store
from torchalign.cube.finding import is_remote
from torchalign.cube.labels import Array, band_labels, find_bands, find_dims, role_of
from torchalign.cube.reference import ReferenceName

_RASTERS = (".tif", ".tiff")
_LAZY_BYTES = 2**27  # a cube above this is not taken into memory whole
_CHUNK_BYTES = 2**24  # of a lazy one: several chunks are held, as floats, at the same time


Cube = xr.DataArray | xr.Dataset


class Source(NamedTuple):
    """A cube, lazily opened, and what was beside it."""

    cube: Any  # a DataArray, or a Dataset of several variables
    others: Mapping[str, xr.DataArray]  # of the same file; empty for GeoTIFFs
    attributes: Mapping[str, Any]  # of the whole file


def is_raster(path: Path) -> bool:
    """A GeoTIFF or a table of them, a folder that is no Zarr store, or what GDAL opens elsewhere."""
    if is_remote(str(path)) or path.suffix.lower() in (".jp2", ".csv"):
        return True
    return (path.is_dir() and not _is_zarr(path)) or path.suffix.lower() in _RASTERS


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is read.

    source: A folder of GeoTIFFs, one a date; or GeoTIFFs; or a table of them, NAME.csv with the columns path, time
        and band; or a netCDF file; or a Zarr store.
    variable: Variable of a netCDF file or Zarr store; several, as red,nir,SCL, go together, '*' is all. Default: the
        only one with time, y, x (and band).
    bands: Only these bands, as B04,B03,B02: names, or else numbers; in GeoTIFFs from 1, else from 0. Or, where there
        is a file a band and date, once for each band, as red='*_B4.TIF'.
    pattern: Names of the GeoTIFFs in a folder.
    skip_bad: Leave out GeoTIFFs that are unreadable, undated, of another grid, or (in memory) empty.
    recursive: Look for GeoTIFFs in subfolders, too.
    grid: Bring GeoTIFFs of other extents, pixel sizes or CRS onto one grid: first, union, intersection, or that of a
        file.
    overwrite: Replace files that exist.
    """

    source: Annotated[list[Path], typer.Argument(metavar="SRC")]
    variable: str | None = None
    bands: Annotated[list[str] | None, typer.Option(metavar="NAMES | NAME=PATTERN")] = None
    pattern: str = "*.tif*"
    skip_bad: bool = False
    recursive: bool = False
    grid: str | None = None
    overwrite: bool = False

    def stack_options(self) -> dict[str, Any]:
        """As :func:`torchalign.open_stack` takes them."""
        options = {name: getattr(self, name) for name in ("pattern", "recursive", "grid")}
        return options | {"bands": choose_bands(self.bands), "errors": "skip" if self.skip_bad else "raise"}

    @contextmanager
    def opened(
        self, *, lazy: bool | None = None, skip: str | None = None, masks: bool = False
    ) -> Iterator[Source]:
        """The cube in a netCDF file, a Zarr store, a folder of GeoTIFFs or a list of them.

        ``skip`` is a variable that is not the one, for it is the mask. With ``masks`` the cube may be one of masks or
        classes: empty GeoTIFFs are kept, and a variable that is bool is taken where there is none of numbers.
        """
        cube: Cube
        for path in self.source:
            if not path.exists() and not is_remote(str(path)):
                expected = "a folder of GeoTIFFs, GeoTIFFs, a netCDF file or a Zarr store"
                raise ValueError(message("SRC", expected, f"{path}, which is not there", "check the path"))
        if all(is_raster(path) for path in self.source):
            yield Source(_open_rasters(self, lazy, masks), {}, {})
            return
        if len(self.source) > 1:
            got = ", ".join(path.name for path in self.source[:4])
            raise ValueError(message("SRC", "one cube, or GeoTIFFs", got, "give one of them"))
        with _open_dataset(self.source[0]) as dataset:
            cube = _choose_variables(dataset, self.variable, self.source[0], skip, masks=masks)
            cube = cube if not self.bands else _select_bands(cube, self.bands)
            if lazy or (lazy is None and cube.nbytes > _LAZY_BYTES and find_spec("dask") is not None):
                time = _time_of(cube)  # whole frames, a few in a chunk
                cube = cube.chunk(dict.fromkeys(cube.dims, -1) | {time: _frames_in_a_chunk(cube)})
            taken = {*cube.data_vars} if isinstance(cube, xr.Dataset) else {cube.name}
            others = {str(name): dataset[name] for name in dataset.data_vars if name not in taken}
            yield Source(cube, others, dataset.attrs)


# --- GeoTIFFs ---


def _open_rasters(given: SourceOptions, lazy: bool | None, masks: bool) -> Any:
    from torchalign.io import open_stack

    with translated():
        source, options, chunks = raster_source(given.source), given.stack_options(), None
        if lazy or (lazy is None and find_spec("dask") is not None):
            headers = open_stack(source, chunks=1, **options)
            if lazy or headers.nbytes > _LAZY_BYTES:
                chunks = _frames_in_a_chunk(headers)
        return open_stack(source, chunks=chunks, keep_empty=masks, **options)


def raster_source(paths: Sequence[Path]) -> Any:
    """What :func:`torchalign.open_stack` takes: a folder, a manifest, or names of files."""
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        got = f"{folders[0]} beside {len(paths) - 1} more"
        cure = "give the files, as the shell lists them"
        raise ValueError(message("SRC", "one folder, or files", got, cure))
    if len(paths) == 1 and (folders or paths[0].suffix.lower() == ".csv"):
        return paths[0]
    # of a URL a path keeps one slash
    return [re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(path)) for path in paths]


def choose_bands(words: Sequence[str] | None) -> Any:
    """Labels or numbers, or a mapping of names to patterns."""
    if not words:
        return None
    if not any("=" in word for word in words):
        return _comma_separated(words)
    pairs = [word.partition("=") for word in words]
    if not all(name.strip() and equals and own for name, equals, own in pairs):
        cure = "give the option once for each band"
        raise ValueError(message("--bands", "NAME=PATTERN each, or names alone", " ".join(words), cure))
    return {name.strip(): own for name, _, own in pairs}


@contextmanager
def translated() -> Iterator[None]:
    """Python's options as those of the command line."""
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        words = str(error)
        for python, shell in (
            ('pass errors="skip" to leave them out', "add --skip-bad to leave them out"),
            (
                ", pattern= or a list to choose others, or time= to tell dates",
                ", or choose others with --pattern",
            ),
            ("give pattern=", "give --pattern"),
            ("pass recursive=True", "add --recursive"),
            ("pass overwrite=True", "add --overwrite"),
            ('pass grid="first", "union" or "intersection"', "add --grid first, union or intersection"),
            ("pass grid=", "add --grid "),
        ):
            words = words.replace(python, shell)
        raise ValueError(words) from error


# --- netCDF and Zarr ---


def _is_zarr(path: Path) -> bool:
    return path.suffix.lower() == ".zarr" or is_store(path)


@contextmanager
def _open_dataset(path: Path) -> Iterator[xr.Dataset]:
    options: dict[str, Any] = {"decode_coords": "all"}  # grid mappings (the CRS) travel with the cube
    if _is_zarr(path):
        options |= {"engine": "zarr", "chunks": None}
    elif path.suffix.lower() not in NETCDF:
        kind = f"a {path.suffix or 'nameless'} file"
        expected = f"a folder of GeoTIFFs, GeoTIFFs, a netCDF file ({', '.join(NETCDF)}) or a Zarr store"
        raise ValueError(message("SRC", expected, kind, "convert it, for example with gdal_translate"))
    try:
        with warnings.catch_warnings():  # a store without consolidated metadata is slower to open, no more
            warnings.filterwarnings("ignore", "Failed to open Zarr store with consolidated", RuntimeWarning)
            dataset = xr.open_dataset(path, **options)
    except Exception as error:  # each engine raises its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = f'check the file; pip install "torchalign[io]" brings the readers ({reason})'
        raise ValueError(message("SRC", "a readable netCDF file or Zarr store", path, cure)) from error
    with dataset:
        yield dataset


def _choose_variables(
    dataset: xr.Dataset, name: str | None, source: Path, skip: str | None, *, masks: bool
) -> Cube:
    if name is not None and name in dataset:
        return dataset[name]
    if name is not None:
        names = [own for own in dataset.data_vars if own != skip] if name == "*" else _comma_separated([name])
        for own in names:
            if own not in dataset:
                known = f"some of {sorted(map(str, dataset.data_vars))}"
                raise ValueError(message("--variable", known, own, "choose one, or several as red,nir"))
        return dataset[names]
    candidates = []
    for key, array in dataset.data_vars.items():
        try:
            find_dims(array)
        except ValueError:
            continue
        if array.dtype.kind in ("biuf" if masks else "iuf") and key != skip:
            candidates.append(str(key))
    # numbers before what is bool, which is the mask beside them
    candidates = [key for key in candidates if dataset[key].dtype != np.bool_] or candidates
    # a cube with bands before its masks and angles without
    most = max((dataset[key].ndim for key in candidates), default=0)
    candidates = [key for key in candidates if dataset[key].ndim == most]
    if len(candidates) != 1:
        listed = {str(key): array.dims for key, array in dataset.data_vars.items()}
        got = f"{candidates or 'none'} in {source.name} with {listed}"
        cure = "say which with --variable, several as red,nir, all as '*'; or rename dims to time, band, y, x"
        raise ValueError(message("SRC", "one variable with time, y and x", got, cure))
    return dataset[candidates[0]]


def _comma_separated(words: Sequence[str]) -> list[str]:
    return [word.strip() for text in words for word in text.split(",")]


def _select_bands(cube: Cube, bands: Sequence[str]) -> Cube:
    if isinstance(cube, xr.Dataset) or isinstance(choose_bands(bands), dict):
        got, cure = " ".join(bands), "choose the variables of one file with --variable"
        raise ValueError(message("--bands", "bands of one variable", got, cure))
    dims = find_dims(cube)
    if "band" not in dims:
        got = f"one with {cube.dims}"
        raise ValueError(message("--bands", "a cube with bands", got, "leave --bands out"))
    return cube.isel({dims["band"]: find_bands(_comma_separated(bands), *band_labels(cube), name="--bands")})


def _time_of(cube: Cube) -> Any:
    return next((dim for dim in cube.dims if role_of(dim) == "time"), next(iter(cube.dims), None))


def _frames_in_a_chunk(cube: Cube) -> int:
    frame_bytes = cube.nbytes // max(1, cube.sizes[_time_of(cube)])
    return max(1, _CHUNK_BYTES // max(1, frame_bytes))


# --- beside the cube ---


def open_mask(mask: str, source: Source, *, invert: bool, pattern: str) -> xr.DataArray:
    """True = usable, from a variable of the input, another file, or GeoTIFFs of one band."""
    if mask in source.others:
        array = source.others[mask]
    else:
        expected = f"a variable of SRC ({sorted(source.others)}), a file or a folder"
        array = _open_array("--mask", mask, pattern, expected)
    dims = find_dims(array) if array.ndim == 4 else {}
    if "band" in dims:
        if array.sizes[dims["band"]] != 1:
            got = f"{array.sizes[dims['band']]} bands"
            raise ValueError(message("--mask", "one band", got, "keep the one that says what is usable"))
        array = array.isel({dims["band"]: 0}, drop=True)
    usable = xr.apply_ufunc(
        _as_usable,
        array,
        kwargs={"invert": invert},
        dask="parallelized",
        output_dtypes=[bool],
        keep_attrs=False,
    )
    return usable if source.cube.chunks else usable.load()


def _as_usable(values: Array, *, invert: bool) -> Array:
    if values.dtype.kind not in "biuf" or not ((values == 0) | (values == 1)).all():
        cure = "make it 1 = usable and 0 = not, and save it as int8 without a fill value"
        raise ValueError(message("--mask", "values 0 and 1", f"{values.dtype} with others", cure))
    return np.asarray((values == 0) if invert else (values == 1))


def open_reference(reference: str, pattern: str) -> str | xr.DataArray:
    """A word or a label as it is; of a path that is there the picture, or the pictures, in it."""
    if reference in get_args(ReferenceName):  # whatever lies around under that name
        return reference
    path = Path(reference)
    if not path.exists() or not (is_raster(path) or _is_zarr(path) or path.suffix.lower() in NETCDF):
        return reference
    array = _open_array("--reference", reference, pattern, "a file")
    dim = find_dims(array)["time"] if array.ndim == 4 else None
    return array.isel({dim: 0}, drop=True) if dim is not None and array.sizes[dim] == 1 else array


def _open_array(name: str, text: str, pattern: str, expected: str) -> xr.DataArray:
    path = Path(text)
    if not path.exists():
        raise ValueError(message(name, expected, text, "check the name"))
    if path.is_file() and is_raster(path):  # one picture, whose date, if it has any, does not matter
        from torchalign.io import open_stack

        return open_stack([path], time=lambda _: "1970-01-01", keep_empty=True).isel(time=0, drop=True)
    if is_raster(path):
        return _open_rasters(SourceOptions(source=[path], pattern=pattern), None, True)
    with _open_dataset(path) as other:
        if len(other.data_vars) != 1:
            got = f"{path} with {sorted(map(str, other.data_vars))}"
            raise ValueError(message(name, "a file with one variable", got, "drop the others"))
        return next(iter(other.data_vars.values())).load()
