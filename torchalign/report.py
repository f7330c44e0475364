"""The report of an alignment: one row a frame. Summed up, put in a table, written to files and read back."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from torchalign._check import check_bool, check_path
from torchalign.cube.displacements import write_footprints
from torchalign.cube.files import check_free
from torchalign.cube.solution import ReportSummary, as_report, check_report, summarize
from torchalign.cube.tables import PAGES, PICTURED, check_suffix, read_report, to_table, write_report
from torchalign.types import Estimate

__all__ = ["ReportSummary", "as_report", "load_report", "save_report", "summarize", "to_table"]


def __dir__() -> list[str]:
    return sorted(__all__)


def save_report(
    report: xr.Dataset | Estimate,
    path: str | Path,
    *,
    like: xr.DataArray | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a report, whole or not at all; a lazy one is computed.

    ``.nc`` keeps everything. ``.json`` keeps everything but coordinates along time beside the labels. ``.csv`` is
    a table for spreadsheets, one row a frame: its label, the status in words, the numbers, the warp row by row,
    the grid that its pixels are of and the dtype of the labels; no other attributes, and of local shifts their
    length. All three give :func:`torchalign.apply` the same warps, to the last bit, and the first two the same
    fields.

    Two more are to look at, and cannot be read back: ``.html`` is the page of :func:`torchalign.html.save_html`,
    ``.geojson`` the outlines of the frames where they lie on the map once aligned, each with its shifts and status.

    Args:
        report: of :func:`torchalign.align`, or a plain :class:`~torchalign.Estimate` of one series.
        path: ending in ``.nc``, ``.json``, ``.csv``, ``.html`` or ``.geojson``.
        like: the cube that a plain estimate was made on, for dates, grid and metres.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        TypeError: neither a report nor an estimate.
        ValueError: another suffix; a Dataset that is no report; a .geojson of a report without a CRS.
        FileExistsError: the file is there.
        ImportError: netCDF without h5netcdf, GeoJSON without rasterio, HTML without matplotlib.
    """
    path = check_path("path", path)
    check_bool("overwrite", overwrite)
    suffix = path.suffix.lower()
    check_suffix(path, PICTURED)
    given = as_report(report, like) if isinstance(report, Estimate) else report
    check_report(given)
    check_free(path, overwrite)
    made = given.compute()
    made = made.assign_attrs(summarize(made).attrs())
    if suffix in PAGES:
        from torchalign.html import save_html

        return save_html(made, path, overwrite=overwrite)
    (write_footprints if suffix == ".geojson" else write_report)(made, path)
    return path


def load_report(path: str | Path) -> xr.Dataset:
    """Read what :func:`save_report` wrote, into memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, or no report.
        ImportError: netCDF without h5netcdf.
    """
    return read_report(check_path("path", path))
