"""The frames of a report on a map: a GeoJSON of their outlines, each with its shift and what it may be trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from torchalign._check import message, require
from torchalign.cube.files import atomic, plain_number, write_features
from torchalign.cube.labels import label_text
from torchalign.cube.solution import report_georeference
from torchalign.functional.affine import transform_points
from torchalign.types import Status


def write_footprints(report: xr.Dataset, path: Path) -> None:
    """One polygon a frame, in degrees, as the format wants: where its own pixels lie on the map once aligned.

    With its label, the status in words and all numbers of the report as properties.

    Raises:
        ValueError: a report without a grid or a CRS.
        ImportError: rasterio is not installed.
    """
    import torch

    grid = report_georeference(report)
    if grid is None or not grid.crs:
        got = "none" if grid is None else "one without"
        cure = "write a .csv, or align a cube with coordinates and a CRS"
        raise ValueError(message("report", "a grid with a CRS", got, cure))
    require("a GeoJSON", "io", "rasterio")
    from rasterio.warp import transform

    height, width = grid.size
    # a pixel's centre has whole numbers
    corners = np.array([(0, 0), (0, height), (width, height), (width, 0), (0, 0)], np.float64) - 0.5
    warp = torch.from_numpy(np.array(report["warp"].values, np.float64))
    moved = transform_points(warp, torch.from_numpy(corners)).numpy() + 0.5  # (T, 5, 2)
    places = moved @ grid.linear.T + grid.corner
    time = report["status"].dims[0]
    labels = report[time].values if time in report.coords else np.arange(report.sizes[time])
    fields = report.drop_vars("status_name", errors="ignore")
    numbers = {str(name): array.values for name, array in fields.items() if array.dims == (time,)}
    rings, told = [], []
    for row, outline in enumerate(places):
        x, y = transform(grid.crs, "EPSG:4326", outline[:, 0].tolist(), outline[:, 1].tolist())
        rings.append([[[round(lon, 9), round(lat, 9)] for lon, lat in zip(x, y, strict=True)]])
        own = {name: plain_number(values[row]) for name, values in numbers.items()}
        status = Status(int(report["status"].values[row])).name
        told.append({str(time): label_text(labels[row]), **own, "status": status})
    with atomic(path) as partial:
        write_features(partial, "Polygon", rings, told)
