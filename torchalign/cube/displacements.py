"""What moved each frame, for a GIS: tie points, rasters of the displacement, outlines of the frames on the map."""

from __future__ import annotations

import math
import sqlite3
import struct
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from torchalign._check import message, require
from torchalign.cube.files import atomic, check_free, plain_number, write_features
from torchalign.cube.georeference import Georeference, in_degrees
from torchalign.cube.labels import Array, label_text
from torchalign.cube.solution import check_report, report_georeference, report_labels, unpack_field
from torchalign.cube.tables import to_table
from torchalign.functional.affine import invert_warp, transform_points
from torchalign.functional.shift_field import field_at, field_at_points
from torchalign.functional.warp import backward_displacement
from torchalign.types import ShiftField, Status

# A point counts as right if it is off by no more pixels than this.
_RIGHT = 0.1
_TIE_POINT_SUFFIXES = (".geojson", ".csv", ".gpkg")


def field_of(report: xr.Dataset) -> ShiftField | None:
    """The field of local shifts that a report holds, (T, …) float64; ``None`` if it holds none."""
    check_report(report)
    if "field" not in report:
        return None
    coefficients, lattice, sigma = (
        torch.from_numpy(np.array(report[name].values, np.float64))
        for name in ("field", "field_lattice", "field_sigma")
    )
    return unpack_field(coefficients, lattice)._replace(sigma=sigma)


def known_field(report: xr.Dataset) -> ShiftField:
    """The field of local shifts, or an error."""
    field = field_of(report)
    if field is None:
        cure = "align with torchalign.Cascade(torchalign.PCC(), torchalign.Local())"
        raise ValueError(message("report", "the field of an aligner with Local", "none", cure))
    return field


def _known_grid(report: xr.Dataset, cure: str = "", *, needs_crs: bool = True) -> Georeference:
    """Where the frames lie on the map, or an error."""
    grid = report_georeference(report)
    if grid is None or (needs_crs and not grid.crs):
        expected, got = ("a grid with a CRS", "one without") if needs_crs else ("a grid", "none")
        whole = f"align a cube with coordinates{' and a CRS' * needs_crs}"
        cure = f"{cure}, or {whole}" if cure else whole
        raise ValueError(message("report", expected, "none" if grid is None else got, cure))
    return grid


def displacement_of(report: xr.Dataset, size: tuple[int, int]) -> Array:
    """(T, 2, H, W): how far the ground that lies at a pixel of the reference was moved to come there, (x, y) in px."""
    warp = torch.from_numpy(np.array(report["warp"].values, np.float64))
    y, x = (torch.arange(length, dtype=torch.float64) for length in size)
    dx, dy = backward_displacement(warp, x, y[:, None])
    field = field_of(report)
    if field is not None:
        shift_x, shift_y = field_at(field, x, y)
        dx, dy = dx + shift_x, dy + shift_y
    shape = (len(warp), *size)
    return -np.stack((dx.expand(shape).numpy(), dy.expand(shape).numpy()), 1)


def tie_points(report: xr.Dataset) -> pd.DataFrame:
    """One row for every node of the field of every frame that lies inside the frame.

    Columns: ``frame`` (its label), ``column`` and ``row`` (of the point on the reference, in pixels), ``x`` and
    ``y`` (on the map, where the grid is known), ``shift_x`` and ``shift_y`` (of warp and field together, moving →
    reference, in pixels), ``local_x`` and ``local_y`` (of the field alone), ``sigma`` (of the field, in pixels;
    that of the warp where the frame has no field), ``reliability`` (the probability that the point is right to
    0.1 px, of normal errors) and ``kept`` (whether the frame was moved).

    Args:
        report: of :func:`torchalign.align` with :class:`torchalign.Local`.

    Raises:
        TypeError: no Dataset.
        ValueError: no report, or one without a field.
    """
    field = known_field(report)
    warp = torch.from_numpy(np.array(report["warp"].values, np.float64))
    n, m = field.coefficients.shape[-2:]
    rows, columns = np.divmod(np.arange(n * m), m)
    steps = torch.from_numpy(np.stack((columns, rows), -1).astype(float))
    points = field.origin[:, None] + steps * field.spacing[:, None]  # (T, K, 2)
    height, width = (float(length) for length in report.attrs.get("grid_size", (math.inf, math.inf)))
    inside = ((points >= 0) & (points <= torch.tensor([width - 1, height - 1]))).all(-1).numpy()
    local = -field_at_points(field, points)
    shift = points - transform_points(invert_warp(warp), points) + local
    own = field.sigma.flatten(1)
    of_warp = torch.from_numpy(np.array(report["sigma"].values, np.float64))[:, None]
    sigma = torch.where(own.isfinite(), own, of_warp).numpy()
    with np.errstate(divide="ignore"):
        reliability = 1 - np.exp(-0.5 * (_RIGHT / sigma) ** 2)
    kept = np.broadcast_to((report["status"].values == Status.OK)[:, None], inside.shape)
    texts = np.array([label_text(label) for label in report_labels(report)])
    table = {"frame": np.broadcast_to(texts[:, None], inside.shape)[inside]}
    named = {"column": points[..., 0], "row": points[..., 1]}
    named |= {"shift_x": shift[..., 0], "shift_y": shift[..., 1]}
    named |= {"local_x": local[..., 0], "local_y": local[..., 1]}
    table |= {name: values.numpy()[inside] for name, values in named.items()}
    table |= {"sigma": sigma[inside], "reliability": reliability[inside], "kept": kept[inside]}
    grid = report_georeference(report)
    if grid is not None:
        pixels = np.stack((table["column"], table["row"]), 1) + 0.5  # whole numbers are centres of pixels
        table["x"], table["y"] = (pixels @ grid.linear.T + grid.corner).T
    return pd.DataFrame(table)


def write_tie_points(report: xr.Dataset, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the nodes of the local shifts as points, see :func:`tie_points`; whole or not at all.

    Args:
        report: of :func:`torchalign.align` with :class:`torchalign.Local`.
        path: ending in ``.geojson`` (in degrees, as the format wants; needs a CRS), ``.gpkg`` (in the CRS of the
            grid) or ``.csv`` (a table with both).
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        TypeError: no Dataset.
        ValueError: no report, or one without a field; another suffix; a GeoJSON or a GeoPackage without a grid.
        FileExistsError: the file is there.
        ImportError: without rasterio.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _TIE_POINT_SUFFIXES:
        expected = f"a name ending in {', '.join(_TIE_POINT_SUFFIXES)}"
        raise ValueError(message("path", expected, path.name, "rename it"))
    table = tie_points(report)
    check_free(path, overwrite)
    if suffix == ".csv":
        with atomic(path) as partial:
            table.to_csv(partial, index=False, encoding="utf-8")
        return path
    cure = "write a .csv" if suffix == ".gpkg" else "write a .csv or a .gpkg"
    grid = _known_grid(report, cure, needs_crs=suffix == ".geojson")
    write = _write_geojson if suffix == ".geojson" else _write_geopackage
    with atomic(path) as partial:
        write(table, grid, partial)
    return path


def write_ground_control(report: xr.Dataset, paths: Sequence[str | Path]) -> None:
    """Put the nodes of the local shifts into the frames' own files, as ground control points.

    What ``mode="shift-coords"`` is for warps: pixels are not touched, and GDAL puts them in their places
    (``gdalwarp -tps``, ``rasterio.vrt.WarpedVRT``). The file's CRS stays, its transform gives way to the points.

    Args:
        report: of :func:`torchalign.align` with :class:`torchalign.Local`.
        paths: a GeoTIFF a frame, in the report's order, of frames as they were before they were aligned.

    Raises:
        TypeError: no Dataset.
        ValueError: no report, one without a field or without a grid; as many paths as there are no frames; a file of
            another size.
        ImportError: without rasterio.
    """
    table = tie_points(report)
    require("ground control points", "io", "rasterio")
    import rasterio
    from rasterio.control import GroundControlPoint

    grid, labels = _known_grid(report), [label_text(label) for label in report_labels(report)]
    if len(paths) != len(labels):
        raise ValueError(message("paths", f"{len(labels)} paths, one a frame", len(paths), "give them all"))
    own = dict(iter(table.groupby("frame", sort=False)))
    for label, path in zip(labels, paths, strict=True):
        points = own[label]
        column, row = (
            points[name] - points[f"shift_{axis}"] + 0.5 for name, axis in (("column", "x"), ("row", "y"))
        )
        control = [
            GroundControlPoint(*numbers, id=str(number))
            for number, numbers in enumerate(zip(row, column, points["x"], points["y"], strict=True), 1)
        ]
        with rasterio.open(path, "r+") as raster:
            if (raster.height, raster.width) != grid.size:
                got = f"{(raster.height, raster.width)} in {Path(path).name}"
                cure = "give the files of this cube"
                raise ValueError(message("paths", f"frames of {grid.size}", got, cure))
            raster.gcps = (control, rasterio.crs.CRS.from_string(grid.crs))


def _write_geojson(table: pd.DataFrame, grid: Georeference, path: Path) -> None:
    require("a GeoJSON", "io", "rasterio")
    places = np.round(in_degrees(grid.crs, table["x"], table["y"]), 9).T.tolist()
    told = [{name: plain_number(value) for name, value in row.items()} for row in table.to_dict("records")]
    write_features(path, "Point", places, told)


def _write_geopackage(table: pd.DataFrame, grid: Georeference, path: Path) -> None:
    """A table of points in SQLite, as the OGC's GeoPackage 1.2 wants it."""
    srs = -1  # of no CRS, or of one without a code
    if grid.crs:
        require("a GeoPackage", "io", "rasterio")
        from rasterio.crs import CRS

        srs = CRS.from_string(grid.crs).to_epsg() or -1
    bounds = (table["x"].min(), table["y"].min(), table["x"].max(), table["y"].max())
    with closing(sqlite3.connect(path)) as base, base:
        base.executescript(_SCHEMA)
        if srs > 0:
            known = ("CRS of the grid", srs, "EPSG", srs, grid.crs)
            base.execute("INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, NULL)", known)
        base.execute(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier, min_x, min_y, max_x, max_y, srs_id) "
            "VALUES ('tie_points', 'features', 'tie_points', ?, ?, ?, ?, ?)",
            (*map(float, bounds), srs),
        )
        place = ("tie_points", "geom", "POINT", srs, 0, 0)
        base.execute("INSERT INTO gpkg_geometry_columns VALUES (?, ?, ?, ?, ?, ?)", place)
        rows = table.replace([np.inf, -np.inf], np.nan)
        rows.insert(0, "geom", [_geometry(srs, x, y) for x, y in table[["x", "y"]].to_numpy()])
        rows.insert(0, "fid", range(1, len(rows) + 1))
        kinds = {"fid": "INTEGER PRIMARY KEY", "geom": "BLOB", "kept": "BOOLEAN"}
        rows.to_sql("tie_points", base, index=False, dtype=kinds)


def _geometry(srs: int, x: float, y: float) -> bytes:
    """A point: the GeoPackage's header, little endian and without an envelope, then well-known binary."""
    return struct.pack("<2sBBi", b"GP", 0, 1, srs) + struct.pack("<BIdd", 1, 1, x, y)


# GeoPackage 1.2: "GPKG", and its version, in the header of the SQLite file
_SCHEMA = """
PRAGMA application_id = 1196444487;
PRAGMA user_version = 10200;
CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT NOT NULL, srs_id INTEGER PRIMARY KEY, organization TEXT NOT NULL,
    organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT);
CREATE TABLE gpkg_contents (table_name TEXT PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE,
    description TEXT DEFAULT '', last_change DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
    min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE, srs_id INTEGER);
CREATE TABLE gpkg_geometry_columns (table_name TEXT NOT NULL, column_name TEXT NOT NULL,
    geometry_type_name TEXT NOT NULL, srs_id INTEGER NOT NULL, z TINYINT NOT NULL, m TINYINT NOT NULL,
    PRIMARY KEY (table_name, column_name));
INSERT INTO gpkg_spatial_ref_sys VALUES
    ('undefined cartesian', -1, 'NONE', -1, 'undefined', NULL), ('undefined', 0, 'NONE', 0, 'undefined', NULL);
"""


def write_displacements(report: xr.Dataset, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """A GeoTIFF a frame, of how far the ground at each pixel of the reference was moved to come there.

    Bands ``shift_x`` and ``shift_y``, of warp and field together, in pixels to the right and down; where the grid
    has metres also ``shift_x_metres`` and ``shift_y_metres``, along the map's axes. A frame that was not aligned
    is 0.

    Args:
        report: of :func:`torchalign.align`.
        folder: where ``displacement_<label>.tif`` go; made if it is not there.
        overwrite: replace files that are there.

    Returns:
        The paths, one a frame.

    Raises:
        TypeError: no Dataset.
        ValueError: no report, or one without a grid.
        FileExistsError: a file is there.
        ImportError: without rasterio.
    """
    check_report(report)
    require("a GeoTIFF", "io", "rasterio")
    import rasterio

    grid, time, folder = _known_grid(report, needs_crs=False), report["status"].dims[0], Path(folder)
    # no colon in a file's name
    names = [label_text(label).replace(":", "") for label in report_labels(report, local=True)]
    paths = [folder / f"displacement_{name}.tif" for name in names]
    for path in paths:
        check_free(path, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["shift_x", "shift_y"]
    metres = [f"{name}_metres" for name in names] if "shift_x_metres" in report else []
    steps = np.array([grid.linear[0, 0], grid.linear[1, 1]])
    profile = {"driver": "GTiff", "dtype": "float32", "count": len(names + metres), "compress": "deflate"}
    profile |= {"height": grid.size[0], "width": grid.size[1], "predictor": 3}
    profile |= {"transform": rasterio.Affine(*grid.transform), "crs": grid.crs or None}
    for number, path in enumerate(paths):
        moved = displacement_of(report.isel({time: [number]}), grid.size)[0]
        bands = np.concatenate((moved, moved * steps[:, None, None])) if metres else moved
        with atomic(path) as partial, rasterio.open(partial, "w", **profile) as raster:
            raster.write(bands.astype(np.float32))
            raster.descriptions = (*names, *metres)
            raster.units = ("pixel", "pixel", "m", "m")[: len(bands)]
    return paths


def write_footprints(report: xr.Dataset, path: Path) -> None:
    """A GeoJSON of one polygon a frame, in degrees: where its own pixels lie on the map once aligned.

    With its label, the status in words and all numbers of the report as properties.

    Raises:
        ValueError: a report without a grid or a CRS.
        ImportError: rasterio is not installed.
    """
    grid = _known_grid(report, "write a .csv")
    height, width = grid.size
    # a pixel's centre has whole numbers
    corners = torch.tensor([(0, 0), (0, height), (width, height), (width, 0), (0, 0)], dtype=torch.float64)
    warp = torch.from_numpy(np.array(report["warp"].values, np.float64))
    moved = transform_points(warp, corners - 0.5).numpy() + 0.5  # (T, 5, 2)
    places = moved @ grid.linear.T + grid.corner
    degrees = np.round(in_degrees(grid.crs, *places.reshape(-1, 2).T), 9).T.reshape(places.shape)
    table = to_table(report)
    numbers = table[[name for name in table.columns if name in report and report[name].ndim == 1]]
    told = [
        {str(table.index.name): label_text(label)}
        | {name: plain_number(value) for name, value in row.items()}
        for label, row in zip(report_labels(report), numbers.to_dict("records"), strict=True)
    ]
    with atomic(path) as partial:
        write_features(partial, "Polygon", [[ring] for ring in degrees.tolist()], told)
