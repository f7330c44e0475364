"""Where the results of a command may go, and how they get there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchalign._check import message, require
from torchalign.cli.sources import SourceOptions, translated
from torchalign.cube.files import check_free, is_store
from torchalign.cube.tables import PICTURED, check_suffix

if TYPE_CHECKING:
    import xarray as xr

    from torchalign.cli.sources import Source

CUBES = (".nc", ".nc4", ".zarr")  # names of outputs that are one cube

# --- before the work ---


def check_cube_output(path: Path, template: str | None, overwrite: bool) -> None:
    """NAME.zarr, NAME.nc, or a folder for GeoTIFFs."""
    suffix = path.suffix.lower()
    if suffix in CUBES:
        if template is not None:
            cure = "name a folder, or leave --template out"
            raise ValueError(message("--template", "GeoTIFFs to name", f"--out {path.name}", cure))
        require("a cube in one file", "io", *(("zarr",) if suffix == ".zarr" else ("h5netcdf", "h5py")))
        check_output(path, overwrite)
        return
    is_folder = path.is_dir() and not is_store(path)
    if path.suffix and not is_folder:
        expected = f"a folder for GeoTIFFs, or a name ending in {', '.join(CUBES)}"
        cure = "a folder's name has no dot, unless it is there already"
        raise ValueError(message("--out", expected, path.name, cure))
    require("GeoTIFF", "io", "rasterio")
    if path.exists() and not is_folder:
        raise ValueError(message("output", "a folder", f"{path}, which is none", "choose another name"))
    if is_folder and not overwrite and any(path.iterdir()):
        cure = "add --overwrite, which replaces files of the same names, or choose another folder"
        raise ValueError(message("output", "a new or empty folder", f"{path}, which is not empty", cure))


def check_report_output(path: Path, overwrite: bool) -> None:
    """A table or a page."""
    check_suffix(path, PICTURED, "--report")
    check_output(path, overwrite)


def check_output(path: Path, overwrite: bool) -> None:
    """A file may take the place of a file, and a Zarr store that of a Zarr store; nothing else is deleted."""
    with translated():
        check_free(path, overwrite, "output")


def check_apart(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    """No output is, holds or lies in an input or another output."""

    def is_same(one: Path, other: Path) -> bool:
        return one == other or (one.exists() and other.exists() and one.samefile(other))

    def is_within(one: Path, other: Path) -> bool:
        return any(is_same(part, other) for part in (one, *one.parents))

    resolved = [path.resolve() for path in (*inputs, *outputs)]
    for number in range(len(inputs), len(resolved)):
        for other in resolved[:number]:
            if is_within(resolved[number], other) or is_within(other, resolved[number]):
                got = f"{resolved[number]} beside {other}"
                cure = "name each file once, none inside another"
                raise ValueError(message("output", "new names, apart from every input", got, cure))


# --- after it ---


def write_result(
    cube: xr.DataArray | xr.Dataset,
    out: Path,
    source: Source,
    report: xr.Dataset | None = None,
    *,
    template: str | None,
    overwrite: bool,
    progress: bool | None,
) -> Any:
    """Write the cube, as GeoTIFFs or one file; a lazy one is computed here, once, together with its report.

    Returns:
        The report, computed; ``None`` without one.
    """
    from torchalign.io import write_cube, write_stack

    suffix = out.suffix.lower()
    with _dask_bar(progress if cube.chunks else False):
        if suffix in CUBES:
            done = write_cube(cube, out, attrs=source.attributes, report=report, overwrite=overwrite)
        else:
            done = write_stack(cube, out, template=template, report=report, overwrite=overwrite)
    return None if report is None else done[1]


def write_page(
    report: xr.Dataset, path: Path, pair: Sequence[Any], out: Path, *, classes: Any, overwrite: bool
) -> None:
    """Write the page of an alignment, a cube and itself aligned, whose result has been written to ``out``."""
    from torchalign.cube.variables import stack_variables, take_apart
    from torchalign.html import save_html

    cube, aligned = pair
    if aligned.chunks and not hasattr(aligned, "data_vars"):
        # what was lazy is read from where it has been written, in place of being computed anew for every picture
        with SourceOptions(source=[out]).opened(lazy=True) as written:
            save_html(report, path, cube, written.cube, overwrite=overwrite)
        return
    taken = [take_apart(one, None, classes, {})[0] for one in pair]
    shown = [one if part is None else stack_variables(part)[0] for one, part in zip(pair, taken, strict=True)]
    save_html(report, path, *shown, overwrite=overwrite)


def print_written(*paths: Path) -> None:
    """Say where the results are."""
    print("wrote " + ", ".join(map(str, paths)))


@contextmanager
def _dask_bar(progress: bool | None) -> Iterator[None]:
    """Dask's, for what is lazy."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield
        return
    from dask.diagnostics.progress import ProgressBar

    with ProgressBar(out=sys.stderr):  # type: ignore[no-untyped-call]
        yield
