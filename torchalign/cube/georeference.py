"""Where the pixels of a labelled cube lie on the map, and how a warp changes from one pixel grid to another."""

from __future__ import annotations

import re
from collections.abc import Hashable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from torchalign._check import message
from torchalign.cube.labels import SAME_GRID, Cube
from torchalign.functional.affine import change_origin, from_homogeneous, rescale_warp
from torchalign.functional.shift_field import move_origin, rescale_field
from torchalign.types import ShiftField

FRAME_TRANSFORM = "geotransform"  # the coordinate along time of frames that have a georeference each

# what grid mappings are called
_MAPPINGS = ("spatial_ref", "crs", "transverse_mercator", "latitude_longitude")
_UNITS_IN_METRES = dict.fromkeys(("m", "metre", "metres", "meter", "meters"), 1.0) | {"km": 1000.0}


class Georeference(NamedTuple):
    """A raster's georeference.

    The transform is in the order of rasterio's ``Affine``; the corner (column, row) of a pixel, counted from the raster's
    outer corner, lies at ``(a·column + b·row + c, d·column + e·row + f)``.
    """

    transform: tuple[float, ...]  # (a, b, c, d, e, f)
    size: tuple[int, int]  # (H, W)
    crs: str = ""  # as WKT; none where it is not known

    @property
    def linear(self) -> np.ndarray:
        """(2, 2) float64, the step of one pixel."""
        a, b, _, d, e, _ = self.transform
        return np.array([[a, b], [d, e]])

    @property
    def corner(self) -> np.ndarray:
        """(2,) float64, the outer corner of the first pixel."""
        return np.array([self.transform[2], self.transform[5]])

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3) float64, the transform in homogeneous coordinates."""
        return np.array([*self.transform, 0.0, 0.0, 1.0]).reshape(3, 3)

    def to_gdal(self) -> str:
        """As text in GDAL's order, each number such that it is read back to the last bit."""
        a, b, c, d, e, f = self.transform
        return " ".join(repr(float(value)) for value in (c, a, b, f, d, e))

    @classmethod
    def from_gdal(cls, text: str, size: tuple[int, int]) -> Georeference:
        """The inverse of :meth:`to_gdal`."""
        c, a, b, f, d, e = map(float, text.split())
        return cls((a, b, c, d, e, f), size)

    @classmethod
    def of_raster(cls, file: Any) -> Georeference:
        """Of a file that rasterio has opened."""
        wkt = file.crs.to_wkt() if file.crs else ""
        return cls(tuple(map(float, file.transform[:6])), (file.height, file.width), wkt)

    @property
    def is_placed(self) -> bool:
        """Whether it lies anywhere."""
        return bool(self.crs) or self.transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def moved(self, matrix: Any) -> Georeference:
        """Whose pixels (from the corner) are those that ``matrix``, (2 or 3, 3), makes of them in this one."""
        whole = np.vstack((np.asarray(matrix)[:2], (0.0, 0.0, 1.0)))
        return self._replace(transform=tuple((self.matrix @ whole)[:2].ravel().tolist()))


def find_georeference(cube: Cube) -> Georeference | None:
    """The grid of a cube, from its coordinates, to the last bit from its ``GeoTransform`` where it agrees."""
    array, size = cube.array, cube.size
    attrs = _mapping_attrs(array)
    exact = None
    with suppress(ValueError, AttributeError):
        exact = Georeference.from_gdal(str(attrs["GeoTransform"]), size) if "GeoTransform" in attrs else None
    crs = _find_crs(array)
    coordinates = [cube.coordinate(role) for role in ("y", "x")]
    if all(coordinate is None for coordinate in coordinates):
        return None if exact is None else exact._replace(crs=crs)
    centres = {
        role: coordinate.values
        for role, coordinate in zip(("y", "x"), coordinates, strict=True)
        if coordinate is not None and coordinate.ndim == 1 and coordinate.dtype.kind in "iuf"
    }
    if len(centres) < 2 or not all(map(len, centres.values())):
        return None
    if exact is not None and _agrees(exact, centres["x"], centres["y"]):
        return exact._replace(crs=crs)
    steps = {role: _regular_step(values) for role, values in centres.items()}
    if exact is not None:  # a crop: the steps are those of the file, the corner moved by whole pixels
        for role, own in (("x", exact.transform[0]), ("y", exact.transform[4])):
            count, step = len(centres[role]), steps[role]
            if own and (count == 1 or (step is not None and abs(step - own) <= SAME_GRID * abs(own) / count)):
                steps[role] = own
    dx, dy = steps["x"], steps["y"]
    if dx is None or dy is None:
        return None
    corner = float(centres["x"][0]) - 0.5 * dx, float(centres["y"][0]) - 0.5 * dy
    return Georeference((dx, 0.0, corner[0], 0.0, dy, corner[1]), size, crs)


def _agrees(grid: Georeference, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the grid's first and last pixel centres are these, to a thousandth of a pixel."""
    a, b, c, d, e, f = grid.transform
    if b or d or not (a and e):
        return False
    for step, corner, values in ((a, c, x), (e, f, y)):
        expected = corner + step * (np.array([0, len(values) - 1]) + 0.5)
        if not np.abs(expected - values[[0, -1]].astype(np.float64)).max() <= SAME_GRID * abs(step):
            return False
    return True


def _regular_step(values: np.ndarray) -> float | None:
    """The step of a regular coordinate; ``None`` if it is irregular, or has a single value."""
    if len(values) < 2 or values.dtype.kind not in "iuf":
        return None
    numbers = values.astype(np.float64)
    step = (numbers[-1] - numbers[0]) / (len(numbers) - 1)
    noise = 4 * np.abs(numbers).max() * np.finfo(np.result_type(values.dtype, np.float16)).eps
    if step == 0 or not np.abs(np.diff(numbers) - step).max() <= SAME_GRID * abs(step) + noise:
        return None
    return float(step)


def metres_per_pixel(cube: Cube) -> dict[str, float]:
    """Along "x" and "y"; signed: negative along y of a north-up grid.

    Degrees of a geographic grid are metres on the ellipsoid of WGS 84 at the latitude of the grid's centre. Without
    those where the grid is irregular, or has no such unit.
    """
    found: dict[str, float] = {}
    degrees = {}
    for role in ("x", "y"):
        coordinate = cube.coordinate(role)
        step = None if coordinate is None else _regular_step(coordinate.values)
        if coordinate is None or step is None:
            continue
        units = str(coordinate.attrs.get("units", "")).lower()
        metres = _UNITS_IN_METRES.get(units)
        if metres is None and not units.startswith("deg"):
            metres = _metres_of_crs(cube.array)
        if metres is not None:
            found[role] = step * metres
        elif units.startswith("deg") or _is_geographic(cube, role):
            degrees[role] = step
    if len(degrees) == 2:
        latitude = np.radians(float(np.mean(cube.array[cube.dims["y"]].values[[0, -1]].astype(np.float64))))
        if abs(latitude) <= np.pi / 2:
            for role, metres in zip(("x", "y"), _metres_of_a_degree(latitude), strict=True):
                found[role] = degrees[role] * metres
    return found


def _is_geographic(cube: Cube, role: str) -> bool:
    """A CRS of longitude and latitude; without a CRS, coordinates that are called so."""
    wkt = _find_crs(cube.array)
    names = {"x": ("lon", "longitude"), "y": ("lat", "latitude")}[role]
    return wkt.startswith(("GEOGCS", "GEOGCRS")) or (not wkt and str(cube.dims[role]).lower() in names)


def _metres_of_a_degree(latitude: float) -> tuple[float, float]:
    """Along a parallel, and along a meridian, of the ellipsoid of WGS 84; latitude in radians.

    With N = a/√(1 − e² sin² φ) and M = a(1 − e²)/(1 − e² sin² φ)^(3/2): N cos φ · π/180 and M · π/180 (Snyder 1987,
    Map Projections: A Working Manual, USGS Professional Paper 1395, eq. 4-20 and 4-18).
    """
    axis, squared = 6_378_137.0, 0.0066943799901413165  # a in metres, e²
    within = 1 - squared * np.sin(latitude) ** 2
    along = axis / np.sqrt(within) * np.cos(latitude), axis * (1 - squared) / within**1.5
    return float(np.radians(along[0])), float(np.radians(along[1]))


def _mapping_attrs(array: xr.DataArray) -> dict[Hashable, object]:
    """Of the grid mapping that the array names, or of a coordinate that is called like one."""
    named = array.encoding.get("grid_mapping", array.attrs.get("grid_mapping"))
    for name in (named, *_MAPPINGS):
        if name in array.coords and {"crs_wkt", "spatial_ref", "GeoTransform"} & {*array.coords[name].attrs}:
            return array.coords[name].attrs
    return {}


def _find_crs(array: xr.DataArray) -> str:
    """WKT, from the grid mapping, or from rioxarray."""
    attrs = _mapping_attrs(array)
    wkt = str(attrs.get("crs_wkt") or attrs.get("spatial_ref") or "") or _bare_crs(array)
    if not wkt and hasattr(array, "rio") and array.rio.crs:
        wkt = array.rio.crs.to_wkt()
    return wkt


def _bare_crs(array: xr.DataArray) -> str:
    """WKT of what is only a name or a number: coordinates ``crs``, ``epsg``, ``proj:epsg``, the attribute ``crs``.

    Such are those of stackstac, cubo, xcube and older xarray; other words than a CRS's name are not taken for one.
    """
    try:
        from rasterio.crs import CRS
        from rasterio.errors import CRSError
    except ImportError:
        return ""
    for name in ("crs", "spatial_ref", "epsg", "proj:epsg"):
        own = array.coords.get(name)
        value = None if own is None or own.dims else own.values[()]
        value = array.attrs.get(name) if value is None or value == 0 else value
        if isinstance(value, (str, int, np.integer)) and value and not isinstance(value, bool):
            text = value.removeprefix("+init=").strip() if isinstance(value, str) else f"EPSG:{value}"
            with suppress(CRSError):
                return str(CRS.from_string(text).to_wkt())
    return ""


def _metres_of_crs(array: xr.DataArray) -> float | None:
    """The unit of a projected CRS."""
    wkt = _find_crs(array)
    # the projection's unit comes last
    units = re.findall(r'(?<![A-Z])(?:LENGTH)?UNIT\["[^"]*",\s*([0-9.eE+-]+)', wkt)
    return float(units[-1]) if units and wkt.startswith(("PROJCS", "PROJCRS")) else None


def gdal_errors() -> tuple[type[Exception], ...]:
    """What rasterio raises: errors of its own, and of GDAL and PROJ, which it lets through here and there."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    return RasterioError, CPLE_BaseError


def is_same_crs(first: str, second: str) -> bool:
    """Whether two WKT mean the same; unknown ones are given the benefit of the doubt."""
    if not first or not second or first == second:
        return True
    try:
        from rasterio.crs import CRS
    except ImportError:
        plain = [re.sub(r"\W+", " ", crs_name(wkt)).strip().lower() for wkt in (first, second)]
        return plain[0] == plain[1]
    return bool(CRS.from_wkt(first) == CRS.from_wkt(second))


def crs_name(wkt: str) -> str:
    """What a CRS is called; ``""`` where it is not known."""
    found = re.search(r'"([^"]*)"', wkt)
    return found.group(1) if found else wkt


def is_same_grid(
    first: Georeference, second: Georeference, tolerance: float = SAME_GRID, *, extent: bool = True
) -> bool:
    """The same pixels, to a thousandth of one; with ``extent=False``, of grids of other extents, to whole pixels."""
    if (extent and first.size != second.size) or not is_same_crs(first.crs, second.crs):
        return False
    height, width = second.size
    corners = np.array([(0, 0, 1), (width, 0, 1), (0, height, 1), (width, height, 1)], np.float64).T
    try:
        apart = (np.linalg.solve(first.matrix, second.matrix @ corners) - corners)[:2]
    except np.linalg.LinAlgError:
        return first.transform == second.transform
    if not extent:
        apart = apart - np.rint(apart[:, :1])
    return bool(np.abs(apart).max() <= tolerance)


def in_degrees(crs: str, x: Any, y: Any) -> tuple[list[float], list[float]]:
    """Longitudes and latitudes of points of a CRS."""
    from rasterio.warp import transform

    longitude, latitude = transform(crs, "EPSG:4326", list(map(float, x)), list(map(float, y)))[:2]
    return longitude, latitude


def regrid_warp(warp: Tensor, source: Georeference, target: Georeference) -> Tensor:
    """The same motion of the ground, moving → reference, from pixels of one grid to pixels of another.

    Pixel sizes may differ, and so may origins, extents and the direction of the axes; both grids must be of one
    CRS and not rotated against each other. An identity stays an exact identity.
    """
    moved = _between(source, target)
    if moved is None:
        return warp
    # first the size of the pixels, with the source's corner kept, and then the corner
    scale, origin = moved
    return change_origin(rescale_warp(warp.double(), scale), origin).to(warp.dtype)


def regrid_field(field: ShiftField, source: Georeference, target: Georeference) -> ShiftField:
    """The same local shifts of the ground, from pixels of one grid to pixels of another; as :func:`regrid_warp`."""
    moved = _between(source, target)
    if moved is None:
        return field
    scale, origin = moved
    return move_origin(rescale_field(field, scale), origin)


def _between(
    source: Georeference, target: Georeference
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Old pixel size / new pixel size, and the target's corner from the source's; ``None`` if they are the same."""
    if not is_same_crs(source.crs, target.crs):
        got = f"{crs_name(source.crs)!r} and {crs_name(target.crs)!r}"
        raise ValueError(message("grid", "one CRS", got, "reproject one of them with .rio.reproject"))
    if is_same_grid(source, target):
        return None
    scale = np.linalg.solve(target.linear, source.linear)
    height, width = target.size
    rotated = abs(scale[0, 1]) * height + abs(scale[1, 0]) * width
    if not rotated <= SAME_GRID:
        cure = "reproject one of them with .rio.reproject_match"
        raise ValueError(message("grid", "grids with the same axes", f"{source} and {target}", cure))
    origin = np.linalg.solve(target.linear, target.corner - source.corner)
    return (float(scale[0, 0]), float(scale[1, 1])), (float(origin[0]), float(origin[1]))


# --- a georeference for each frame ---


def georeference_frames(cube: Cube, warp: Tensor) -> xr.Variable:
    """Of every frame GDAL's six numbers that put its pixels where the warp would have; and the grid that they correct."""
    grid = find_georeference(cube)
    if grid is None:
        got = f"{cube.array.dims} without a regular grid"
        cure = "give it coordinates along y and x, or pass mode='resample'"
        raise ValueError(message("datacube", "a georeference to correct", got, cure))
    warp = warp.double()
    if warp.shape[-2] == 3:
        if not bool((warp[:, 2, :2] == 0).all()):
            expected, cure = (
                "warps that a georeference can express",
                "pass mode='resample', or another motion",
            )
            raise ValueError(message("estimate", expected, "homographies", cure))
        warp = from_homogeneous(warp)
    cornered = change_origin(warp, (-0.5, -0.5)).numpy()  # a georeference counts from the outer corner
    moved = [grid if np.array_equal(matrix, np.eye(2, 3)) else grid.moved(matrix) for matrix in cornered]
    texts = [own.to_gdal() for own in moved]
    of = {"grid": grid.to_gdal(), "height": grid.size[0], "width": grid.size[1]}
    return xr.Variable((cube.dims["time"],), np.array(texts, dtype=np.str_), of)


def frame_transforms(cube: Cube) -> list[tuple[float, ...] | None]:
    """The transform of every frame: its own, or that of the cube; ``None`` where there is neither."""
    grid, own = find_georeference(cube), cube.array.coords.get(FRAME_TRANSFORM)
    if own is None or own.dims != (cube.dims["time"],):
        return [None if grid is None else grid.transform] * cube.sizes["time"]
    frames = [Georeference.from_gdal(str(text), cube.size) for text in own.values]
    if grid is None or "grid" not in own.attrs:
        return [frame.transform for frame in frames]
    size = (int(own.attrs["height"]), int(own.attrs["width"]))
    before = Georeference.from_gdal(str(own.attrs["grid"]), size)
    labelled = all(cube.coordinate(role) is not None for role in ("y", "x"))
    if not labelled and before.size != grid.size:
        got = f"{grid.size}, without y and x coordinates that tell where"
        cure = 'crop before apply(…, mode="shift-coords")'
        raise ValueError(message("cube", f"the size of its georeferences, {before.size}", got, cure))
    if not labelled or before.transform == grid.transform:
        return [frame.transform for frame in frames]
    # the cube was cropped, or its pixels made larger: the frames' grids with it
    back = np.linalg.inv(before.matrix)
    return [frame.moved(back @ grid.matrix).transform for frame in frames]
