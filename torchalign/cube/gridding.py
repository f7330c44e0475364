"""Files of other extents, origins, pixel sizes and CRS on one grid: by whole pixels, or through GDAL's warper."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import xarray as xr

from torchalign._check import message
from torchalign.cube import georeference
from torchalign.cube.finding import Source
from torchalign.cube.georeference import Georeference
from torchalign.cube.headers import CLOSE, Header, quiet
from torchalign.cube.labels import Array, Cube, role_of

GridWord = Literal["first", "union", "intersection"]
Resampling = Literal["nearest", "bilinear", "cubic", "average"]
_EDGE = 21  # points along each side, by which an extent is taken to another CRS
# pixels by which GDAL may approximate a projection; its default is 0.125, and 0 it refuses
_TOLERANCE = 0.002
_MOST_PIXELS = 2**31  # of a grid that is meant


class Reading(NamedTuple):
    """How the pixels of a file come onto a grid; it travels to dask's workers."""

    path: Source
    numbers: tuple[int, ...]
    header: Header
    grid: Georeference
    offset: tuple[int, int] | None  # (row, column) of the grid's first pixel in the file; None: it is warped
    resampling: str
    dtype: str
    scale: float = 1.0  # the grid's pixels in one of the file's

    @property
    def is_whole(self) -> bool:
        """Read as it is."""
        return self.offset == (0, 0) and self.grid.size == self.header.grid.size

    @property
    def leaves_gaps(self) -> bool:
        """Whether pixels may be missing that no nodata value can mark."""
        if self.is_whole or self._fill is not None:
            return False
        if self.offset is None:
            return True
        (top, left), (height, width), own = self.offset, self.grid.size, self.header.grid.size
        return top < 0 or left < 0 or top + height > own[0] or left + width > own[1]

    @property
    def _fill(self) -> float | None:
        """What marks a pixel that is missing."""
        if self.header.nodata is not None:
            return self.header.nodata
        return float("nan") if np.dtype(self.dtype).kind == "f" else None

    def pixels(self, rows: slice | None = None) -> Array:
        """(C, H, W), or rows of it."""
        return self._read(list(self.numbers), rows, self.dtype, self._fill or 0)

    def usable(self, rows: slice | None = None) -> Array:
        """(H, W) of an alpha band or a mask, 0 where nothing is usable, and outside the file."""
        if self.header.alpha:
            return self._read([self.header.alpha], rows, self.dtype, 0, "nearest")[0]
        return self._read("mask", rows, "uint8", 0, "nearest")[0]

    def _read(self, bands: Any, rows: slice | None, dtype: str, fill: Any, resampling: str = "") -> Array:
        import rasterio

        first, last = (0, self.grid.size[0]) if rows is None else (rows.start, rows.stop)
        try:
            with quiet(), rasterio.open(self.path) as file:
                if self.offset is None:
                    return self._warp(file, bands, (first, last), dtype, resampling or self.resampling)
                return self._copy(file, bands, (first, last), dtype, fill)
        except georeference.gdal_errors() as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            cure = 'fetch it again, or leave it out (errors="skip" without chunks does)'
            raise OSError(message(str(self.path), "pixels that can be read", reason, cure)) from error

    def _copy(self, file: Any, bands: Any, rows: tuple[int, int], dtype: str, fill: Any) -> Array:
        from rasterio.windows import Window

        assert self.offset is not None
        (top, left), width = self.offset, self.grid.size[1]
        shape = (1 if bands == "mask" else len(bands), rows[1] - rows[0], width)
        wanted = (top + rows[0], top + rows[1]), (left, left + width)
        there = [
            (max(first, 0), min(last, length))
            for (first, last), length in zip(wanted, file.shape, strict=True)
        ]
        if any(first >= last for first, last in there):
            return np.full(shape, fill, dtype)
        window = Window.from_slices(*there)
        own = (
            file.read_masks(self.numbers[0], window=window)[None]
            if bands == "mask"
            else file.read(bands, window=window)
        ).astype(dtype, copy=False)
        around = [(part[0] - whole[0], whole[1] - part[1]) for part, whole in zip(there, wanted, strict=True)]
        return own if own.shape == shape else np.pad(own, [(0, 0), *around], constant_values=fill)

    def _warp(self, file: Any, bands: Any, rows: tuple[int, int], dtype: str, resampling: str) -> Array:
        from rasterio.crs import CRS
        from rasterio.enums import Resampling as Kernel
        from rasterio.transform import Affine
        from rasterio.vrt import WarpedVRT
        from rasterio.windows import Window

        if self.header.gcps:
            return self._warp_by_points(file, bands, rows, dtype, resampling)
        height, width = self.grid.size
        crs = CRS.from_wkt(self.grid.crs) if self.grid.crs else None
        options: dict[str, Any] = {
            "transform": Affine(*self.grid.transform),
            "height": height,
            "width": width,
        }
        options |= {"crs": crs, "resampling": Kernel[resampling], "tolerance": _TOLERANCE, **self._scale}
        if not file.crs:
            options["src_crs"] = crs
        fill = self._fill
        if fill is not None:
            options |= {"nodata": fill, "src_nodata": fill}
        elif not self.header.alpha:
            options["add_alpha"] = True
        window = Window.from_slices(rows, (0, width))
        with WarpedVRT(file, **options) as warped:
            if bands == "mask":
                return warped.dataset_mask(window=window)[None]
            return warped.read(bands, window=window).astype(dtype, copy=False)

    @property
    def _scale(self) -> dict[str, float]:
        """GDAL would else tell the width of its kernels from each window anew, and blur those of a few rows."""
        return {"XSCALE": self.scale, "YSCALE": self.scale}

    def _warp_by_points(
        self, file: Any, bands: Any, rows: tuple[int, int], dtype: str, resampling: str
    ) -> Array:
        """By ground control points, which a WarpedVRT passes over; to an eighth of a pixel, rasterio's tolerance."""
        import rasterio
        from rasterio.crs import CRS
        from rasterio.enums import Resampling as Kernel
        from rasterio.transform import Affine
        from rasterio.warp import reproject

        own = CRS.from_wkt(self.header.grid.crs) if self.header.grid.crs else CRS.from_epsg(4326)
        crs = CRS.from_wkt(self.grid.crs) if self.grid.crs else own
        transform, fill = Affine(*self.grid.moved([(1, 0, 0), (0, 1, rows[0])]).transform), self._fill
        how: dict[str, Any] = {"dst_transform": transform, "dst_crs": crs, **self._scale}
        source: Any = rasterio.band(file, bands) if bands != "mask" else None
        if source is None or not self.header.grid.crs:  # else GDAL takes the points and the CRS of the file
            source = file.read_masks([self.numbers[0]]) if bands == "mask" else file.read(bands)
            how |= {"gcps": control_points(self.header.gcps), "src_crs": own}
        shape = (1 if bands == "mask" else len(bands), rows[1] - rows[0], self.grid.size[1])
        values = np.full(shape, 0 if fill is None else fill, dtype)
        if bands != "mask" and fill is not None:
            how |= {"src_nodata": fill, "dst_nodata": fill}
        reproject(source, values, resampling=Kernel[resampling], init_dest_nodata=True, **how)
        return values


def plan_reading(
    path: Source,
    header: Header,
    numbers: Sequence[int],
    grid: Georeference,
    resampling: str,
    dtype: np.dtype[Any],
) -> Reading:
    """By whole pixels where the file lies on the grid to 0.01 px, else by GDAL's warper."""
    offset: tuple[int, int] | None = None
    if not header.gcps and georeference.is_same_grid(grid, header.grid, CLOSE):
        offset = (0, 0)
    elif not header.gcps and georeference.is_same_grid(grid, header.grid, CLOSE, extent=False):
        column, row = np.rint(np.linalg.solve(header.grid.linear, grid.corner - header.grid.corner))
        offset = int(row), int(column)
    scale = 1.0 if offset is not None else _pixels_in_one(_grid_of_header(path, header), grid)
    return Reading(path, tuple(numbers), header, grid, offset, resampling, dtype.name, scale)


def _pixels_in_one(own: Georeference, grid: Georeference) -> float:
    """How long a pixel of a file is in pixels of a grid, at most 1; the root of the ratio of areas."""
    pixels = _outline(own, grid)
    top, bottom = pixels[:, :_EDGE], pixels[:, _EDGE : 2 * _EDGE]
    ring = np.concatenate([top, bottom[:, ::-1], top[:, :1]], 1)
    area = abs(np.sum(ring[0, :-1] * ring[1, 1:] - ring[0, 1:] * ring[1, :-1])) / 2
    side = float(np.sqrt(area / (own.size[0] * own.size[1])))
    return side if side < 0.95 else 1.0


# --- which grid ---


def find_grid(grid: Any, headers: Mapping[Source, Header]) -> Georeference:
    """What ``grid`` of :func:`torchalign.open_stack` stands for; ``headers`` in the order of time."""
    own = [_grid_of_header(path, header) for path, header in headers.items()]
    if isinstance(grid, (xr.DataArray, xr.Dataset)):
        return _grid_of_labels(grid)
    if isinstance(grid, Georeference):
        return grid
    if not isinstance(grid, str) or grid not in get_args(GridWord):
        return _grid_of_file(grid)
    first = own[0]
    if grid == "first" or all(georeference.is_same_grid(first, other, CLOSE) for other in own):
        return first
    outlines = [_outline(other, first) for other in own]
    lows, highs = (np.array([reduce(one, 1) for one in outlines]) for reduce in (np.min, np.max))
    if grid == "union":
        start, stop = np.floor(lows.min(0) + CLOSE), np.ceil(highs.max(0) - CLOSE)
    else:
        start, stop = np.ceil(lows.max(0) - CLOSE), np.floor(highs.min(0) + CLOSE)
    width, height = (int(length) for length in stop - start)
    if width < 1 or height < 1:
        got, cure = (
            f"an {grid} of {height} × {width} pixels",
            'pass grid="union", or choose files that overlap',
        )
        raise ValueError(message("grid", "files that overlap", got, cure))
    if width * height > _MOST_PIXELS:
        got = f"a {grid} of {height} × {width} pixels"
        cure = 'pass grid="first" or a grid of your own, or leave out files that lie elsewhere'
        raise ValueError(message("grid", "a grid that is meant", got, cure))
    return first.moved([(1, 0, start[0]), (0, 1, start[1])])._replace(size=(height, width))


def _grid_of_header(path: Source, header: Header) -> Georeference:
    """The grid of a file; of one with ground control points alone, the one that GDAL would warp it to."""
    if not header.gcps:
        if not header.grid.is_placed:
            cure = "give it one with gdal_translate -a_ullr … -a_srs …, or leave grid= out"
            raise ValueError(message("grid", "files with a georeference", f"{path.name} without", cure))
        return header.grid
    from rasterio.crs import CRS
    from rasterio.warp import calculate_default_transform

    height, width = header.grid.size
    crs = CRS.from_wkt(header.grid.crs) if header.grid.crs else CRS.from_epsg(4326)
    points = control_points(header.gcps)
    try:
        transform, across, down = calculate_default_transform(crs, crs, width, height, gcps=points)
    except georeference.gdal_errors() as error:
        got, cure = f"{path.name} ({error})", "give it a grid with gdalwarp first"
        raise ValueError(message("grid", "control points that tell of a place", got, cure)) from error
    return Georeference(tuple(map(float, transform[:6])), (int(down), int(across)), crs.to_wkt())


def control_points(gcps: str) -> list[Any]:
    """rasterio's, of the text in a header."""
    from rasterio.control import GroundControlPoint

    return [GroundControlPoint(*point) for point in json.loads(gcps)]


def _outline(own: Georeference, grid: Georeference) -> Array:
    """(2, n), points along the border, in pixels of another grid."""
    from rasterio.crs import CRS
    from rasterio.warp import transform

    height, width = own.size
    along = np.linspace(0, 1, _EDGE)
    u = np.concatenate([along, along, np.zeros(_EDGE), np.ones(_EDGE)]) * width
    v = np.concatenate([np.zeros(_EDGE), np.ones(_EDGE), along, along]) * height
    places = (own.matrix @ np.stack([u, v, np.ones_like(u)]))[:2]
    if grid.crs and own.crs and grid.crs != own.crs:
        cause: Exception | None = None
        try:
            x, y = places.tolist()
            places = np.array(transform(CRS.from_wkt(own.crs), CRS.from_wkt(grid.crs), x, y))
        except georeference.gdal_errors() as error:
            cause = error
        if cause is not None or not np.isfinite(places).all():  # infinite where a projection does not reach
            names = " and ".join(georeference.crs_name(one.crs) for one in (own, grid))
            got = f"{names} ({cause or 'files outside its area'})"
            cure = "reproject the files, or leave out those that lie elsewhere"
            raise ValueError(message("grid", "CRS that can be brought together", got, cure)) from cause
    whole: Array = np.linalg.inv(grid.matrix) @ np.vstack([places, np.ones_like(u)])
    return whole[:2]


def _grid_of_labels(given: xr.DataArray | xr.Dataset) -> Georeference:
    array = given
    if isinstance(given, xr.Dataset):
        images = [one for one in given.data_vars.values() if {"y", "x"} <= {role_of(dim) for dim in one.dims}]
        array = images[0] if images else xr.DataArray()
    assert isinstance(array, xr.DataArray)
    dims = {role: dim for dim in array.dims if (role := role_of(dim)) is not None}
    found = georeference.find_georeference(Cube(array, dims)) if {"y", "x"} <= set(dims) else None
    if found is None:
        cure = "give one with coordinates along y and x, or with .rio.write_transform"
        raise ValueError(message("grid", "a DataArray on a regular grid", f"dims {array.dims}", cure))
    return found


def _grid_of_file(given: Any) -> Georeference:
    import rasterio

    expected = f"one of {', '.join(map(repr, get_args(GridWord)))}, a raster file or a DataArray"
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(message("grid", expected, type(given).__name__, "give one of these"))
    name = os.path.expanduser(os.fspath(given))
    try:
        with quiet(), rasterio.open(name) as file:
            return Georeference.of_raster(file)
    except georeference.gdal_errors() as error:
        raise ValueError(message("grid", expected, repr(str(given)), "give one of these")) from error
