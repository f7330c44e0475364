"""The command line: ``torchalign demo`` and ``torchalign align``. It says the same as the Python functions.

Exit codes: 0, all went well; 1, ``demo`` ran but did not find its shifts; 2, bad input or a missing package,
said in one line on stderr.
"""
# No `from __future__ import annotations` here: typer reads the annotations of functions that are nested in
# one another, so that importing this module does not need typer.

import csv
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer
    import xarray as xr

__all__ = ["build_app", "main"]

_NETCDF = (".nc", ".nc4", ".netcdf", ".h5")
_DEMO_TOLERANCE = 0.3  # pixels; every frame that the demo accepts is nearer to the truth than this


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the entry point of the script ``torchalign``.

    Args:
        arguments: as typed after ``torchalign``; default: those of the process.

    Returns:
        The exit code.

    """
    if find_spec("typer") is None:
        return _complain('the command line needs typer; pip install "torchalign[cli]"')
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without σ shows a question mark
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = build_app()(args=arguments, prog_name="torchalign", standalone_mode=False)
    except Exception as error:
        return _explain(error)
    return code if isinstance(code, int) else 0


def build_app() -> "typer.Typer":
    """The typer application; needs typer.

    Raises:
        ImportError: typer is not installed.

    """
    import typer

    app = typer.Typer(
        name="torchalign",
        help="Register image time series: a whole stack in one batch, to a hundredth of a pixel.",
        epilog='Python says the same: torchalign.align(cube, reference="median").',
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            import torchalign

            typer.echo(f"torchalign {torchalign.__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Say the version.")
        ] = False,
    ) -> None:
        pass

    device_option = typer.Option(help="Where to compute: cpu, cuda, cuda:1. Default: CUDA if there is any.")
    overwrite_option = typer.Option("--overwrite", help="Replace files that exist.")

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for the pictures and the report.")] = Path(
            "torchalign-demo"
        ),
        frames: Annotated[int, typer.Option(min=4, help="Number of frames.")] = 16,
        device: Annotated[str | None, device_option] = None,
        seed: Annotated[int, typer.Option(min=0, help="Of shifts, clouds and noise.")] = 0,
        overwrite: Annotated[bool, overwrite_option] = False,
    ) -> int:
        """Shift a real Sentinel-2 chip by known sub-pixel amounts, cloud it, and find the shifts again.

        Prints true against found for every frame, and writes summary.png, animation.gif, report.csv and
        report.nc. Exit code 1 if a shift was not found.
        """
        return _demo(out, frames, device, seed, overwrite)

    @app.command()
    def align(
        source: Annotated[Path, typer.Argument(metavar="INPUT", help="A cube: netCDF file or Zarr store.")],
        out: Annotated[Path, typer.Option(help="Where the aligned cube goes: NAME.nc or NAME.zarr.")],
        reference: Annotated[
            str, typer.Option(help="median, mean, first, or the label of one frame, as 2020-05-01.")
        ] = "median",
        aligner: Annotated[str, typer.Option(help="auto or pcc.")] = "auto",
        max_translation: Annotated[
            float | None,
            typer.Option(help="Largest shift in pixels; frames beyond are flagged. [default: 5]"),
        ] = None,
        channel: Annotated[
            str | None,
            typer.Option(help="What the estimate sees: mean, luminance, gradients, … or a band's position."),
        ] = None,
        crop_center: Annotated[
            int | None, typer.Option(help="Estimate on so many pixels in the frame's middle.")
        ] = None,
        variable: Annotated[
            str | None,
            typer.Option(help="Variable to align. Default: the only one with time, y, x (and band)."),
        ] = None,
        bands: Annotated[
            str | None, typer.Option(help="Align and write only these, as B04,B03,B02 or 2,1,0.")
        ] = None,
        mask: Annotated[
            str | None,
            typer.Option(
                help="Usable pixels (1 = usable): a variable of INPUT, or a file with one variable."
            ),
        ] = None,
        invert_mask: Annotated[
            bool, typer.Option("--invert-mask", help="The mask has 1 = unusable, as cloud masks do.")
        ] = False,
        device: Annotated[str | None, device_option] = None,
        batch_size: Annotated[
            int | None, typer.Option(help="Frames on the device at a time. Default: what fits.")
        ] = None,
        report: Annotated[
            Path | None, typer.Option(help="Where the report goes, one row a frame: NAME.csv or NAME.nc.")
        ] = None,
        overwrite: Annotated[bool, overwrite_option] = False,
    ) -> int:
        """Bring every frame of a cube onto one reference.

        The cube keeps its dims, coordinates, attributes, dtype and encoding. Frames that cannot be trusted
        are left as they came; the report says which and why.
        """
        given = {"max_translation": max_translation, "channel": channel, "crop_center": crop_center}
        options = {name: value for name, value in given.items() if value is not None}
        return _align(
            source,
            out,
            report,
            reference=reference,
            aligner=aligner,
            aligner_options=options,
            variable=variable,
            bands=bands,
            mask=mask,
            invert_mask=invert_mask,
            device=device,
            batch_size=batch_size,
            overwrite=overwrite,
        )

    return app


def _complain(sentence: object) -> int:
    print(f"torchalign: error: {sentence}", file=sys.stderr)
    return 2


def _explain(error: Exception) -> int:
    """One line for what the user can cure; anything else is a bug and keeps its traceback."""
    import typer

    if isinstance(error, typer.Abort):
        return _complain("interrupted")
    # typer's usage errors are those of click or, in newer releases, of its own copy of it
    say = getattr(error, "format_message", None)
    if say is not None:
        return _complain(f"{' '.join(say().split()).rstrip('.')}; try --help")
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        first = str(error).strip().splitlines() or [type(error).__name__]
        return _complain(first[0])
    raise error


def _require(extra: str, *packages: str) -> None:
    """Say what is missing before the work, not after it."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        cure = f'pip install "torchalign[{extra}]"'
        raise ImportError(_wrong("packages", ", ".join(packages), f"no {', '.join(missing)}", cure))


# --- demo ---


def _demo(out: Path, frames: int, device: str | None, seed: int, overwrite: bool) -> int:
    _require("demo", "spyndex", "matplotlib", "PIL", "h5netcdf", "h5py")
    import numpy as np

    import torchalign
    from torchalign import plot
    from torchalign.datasets import demo_stack

    names = ("summary.png", "animation.gif", "report.csv", "report.nc")
    summary, animation, table, dataset = (_check_output(out / name, overwrite, names=()) for name in names)
    stack = demo_stack(frames=frames, seed=seed)
    aligned, report = torchalign.align(stack.cube, "first", device=device)
    truth = stack.shift.values.copy()
    found = np.stack([report["shift_x"].values, report["shift_y"].values], -1)
    error = np.hypot(*(found - truth).T)
    accepted = report["status"].values == torchalign.Status.OK
    _print_demo(stack.clear.mean(("y", "x")).values, truth, found, error, report)
    rest = accepted.copy()
    rest[0] = False  # the reference itself: its error is 0 whatever the method
    median, worst = (
        float(function(error[rest])) if rest.any() else np.inf for function in (np.median, np.max)
    )
    height, width = stack.cube.sizes["y"], stack.cube.sizes["x"]
    side = min(144, height, width)

    out.mkdir(parents=True, exist_ok=True)
    truth[0] = np.nan  # not a measurement; the pictures leave it out
    title = (
        f"torchalign demo: Sentinel-2, {frames} frames, no cloud mask: {int(rest.sum())} of {frames - 1} "
        f"aligned to a median of {median:.4f} px, {int((~accepted).sum())} flagged"
    )
    figure = plot.summary(stack.cube, aligned, report, true_shift=truth, title=title)
    with _atomic(summary) as path:
        figure.savefig(path, dpi=110, format="png")
    zoom = ((height - side) // 2, (width - side) // 2, side)
    plot.animate(stack.cube, aligned, animation, report=report, zoom=zoom)
    _write_report(report, table)
    _write_report(report, dataset)
    print(
        f"median error {median:.4f} px, worst {worst:.4f} px, over {int(rest.sum())} frames and no cloud mask"
    )
    print("wrote " + ", ".join(str(path) for path in (summary, animation, table, dataset)))

    overcast = stack.clear.mean(("y", "x")).values < 0.01
    problems = [
        f"frame {number} shows no ground and was not flagged"
        for number in np.flatnonzero(overcast & accepted)
    ]
    problems += [f"frame {number} was not aligned" for number in np.flatnonzero(~overcast & ~accepted)]
    wrong = np.flatnonzero(accepted & ~(error < _DEMO_TOLERANCE) & ~overcast)
    problems += [f"frame {number} is {error[number]:.2f} px off" for number in wrong]
    for problem in problems:
        print(f"torchalign: demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _print_demo(clear: Any, truth: Any, found: Any, error: Any, report: "xr.Dataset") -> None:
    from torchalign.types import Status

    header = [
        "frame",
        "date",
        "clear",
        "true x",
        "true y",
        "found x",
        "found y",
        "error",
        "σ",
        "score",
        "status",
    ]
    rows, codes = [], []
    for number, code in enumerate(map(Status, report["status"].values)):
        moved = code == Status.OK
        date = str(report["time"].values[number])[:10]
        before, after = (float(report[name].values[number]) for name in ("score_before", "score"))
        rows.append(
            [
                str(number),
                date,
                f"{clear[number]:.0%}",
                *(f"{value:+.3f}" for value in truth[number]),
                *(f"{value:+.3f}" if moved else "–" for value in found[number]),
                f"{error[number]:.4f}" if moved else "–",
                f"{float(report['sigma'].values[number]):.4f}" if moved else "–",
                f"{before:.2f} → {after:.2f}",
                code.name,
            ]
        )
        codes.append(code)
    _print_table(header, rows, [code == Status.OK for code in codes])


def _print_table(header: list[str], rows: list[list[str]], good: list[bool]) -> None:
    """Plain columns; on a terminal, the rows that are not good in yellow."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("  ".join(f"{cell:>{width}}" for cell, width in zip(header, widths, strict=True)).rstrip())
    for row, is_good in zip(rows, good, strict=True):
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print(line if is_good or not colour else f"\033[33m{line}\033[0m")


# --- align ---


def _align(
    source: Path,
    out: Path,
    report_path: Path | None,
    *,
    reference: str,
    aligner: str,
    aligner_options: dict[str, Any],
    variable: str | None,
    bands: str | None,
    mask: str | None,
    invert_mask: bool,
    device: str | None,
    batch_size: int | None,
    overwrite: bool,
) -> int:
    import torchalign

    outputs = [path for path in (out, report_path) if path is not None]
    if any(path.resolve() == source.resolve() for path in outputs) or out == report_path:
        raise ValueError(
            _wrong("output", "new names", [str(path) for path in outputs], "name each file once")
        )
    _check_output(out, overwrite, names=(*_NETCDF, ".zarr"))
    if report_path is not None:
        _check_output(report_path, overwrite, names=(".csv", *_NETCDF))
    for path in outputs:
        if path.suffix.lower() != ".csv":
            _require("io", *(("zarr",) if path.suffix.lower() == ".zarr" else ("h5netcdf", "h5py")))
    if invert_mask and mask is None:
        raise ValueError(_wrong("--invert-mask", "a mask to invert", "none", "add --mask"))
    module = _find_aligner(aligner, aligner_options)
    with _open_cube(source) as dataset:
        cube = _find_variable(dataset, variable, source, skip=mask)
        cube = cube if bands is None else _select_bands(cube, bands)
        usable = None if mask is None else _open_mask(mask, dataset, invert_mask)
        aligned, report = torchalign.align(
            cube, reference, module, mask=usable, device=device, batch_size=batch_size
        )
        _write_cube(aligned, out)
    if report_path is not None:
        _write_report(report, report_path)
    counts = report.attrs
    print(f"{counts['frames_aligned']} of {counts['frames']} frames aligned: {counts['status_counts']}")
    print("wrote " + ", ".join(map(str, outputs)))
    return 0


def _find_aligner(name: str, options: dict[str, Any]) -> Any:
    """A name for ``torchalign.align``, or the module of that name where there are options."""
    from torchalign.xr import _ALIGNERS

    if not options or name not in _ALIGNERS:
        return name  # align knows how to complain of the name
    channel = options.get("channel")
    if isinstance(channel, str) and channel.isdigit():
        options = {**options, "channel": int(channel)}
    return _ALIGNERS[name](**options)


def _wrong(name: str, expected: str, got: object, cure: str) -> str:
    from torchalign._check import message

    return message(name, expected, got, cure)


@contextmanager
def _open_cube(path: Path) -> "Iterator[xr.Dataset]":
    """The dataset in a file or folder, lazily. Other formats are to be added here, and nowhere else."""
    import xarray as xr

    if not path.exists():
        raise ValueError(
            _wrong("INPUT", "a netCDF file or a Zarr store", f"{path}, which is not there", "check the path")
        )
    options: dict[str, Any] = {"decode_coords": "all"}  # grid mappings (the CRS) travel with the cube
    is_zarr = path.suffix.lower() == ".zarr" or any(
        (path / name).exists() for name in (".zgroup", "zarr.json")
    )
    if is_zarr:
        options |= {"engine": "zarr", "chunks": None}
    elif path.is_dir() or path.suffix.lower() not in _NETCDF:
        kind = "a folder" if path.is_dir() else f"a {path.suffix or 'nameless'} file"
        cure = (
            "GeoTIFFs come with a later release; until then stack them with rioxarray and xarray.concat, "
            "and save with to_netcdf"
        )
        raise ValueError(_wrong("INPUT", f"a netCDF file ({', '.join(_NETCDF)}) or a Zarr store", kind, cure))
    try:
        dataset = xr.open_dataset(path, **options)
    except Exception as error:  # each engine raises its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = f'check the file; pip install "torchalign[io]" brings the readers ({reason})'
        raise ValueError(_wrong("INPUT", "a readable netCDF file or Zarr store", path, cure)) from error
    with dataset:
        yield dataset


def _find_variable(dataset: "xr.Dataset", name: str | None, source: Path, skip: str | None) -> "xr.DataArray":
    from torchalign.xr import _find_dims

    roles = dict.fromkeys(("time", "band", "y", "x"))
    if name is not None:
        if name not in dataset:
            raise ValueError(
                _wrong("--variable", f"one of {sorted(map(str, dataset.data_vars))}", name, "choose one")
            )
        return dataset[name]
    candidates = []
    for key, array in dataset.data_vars.items():
        try:
            _find_dims(array.dims, roles)
        except ValueError:
            continue
        if array.dtype.kind in "iuf" and key != skip:
            candidates.append(str(key))
    # a cube with bands before its masks and angles without
    most = max((dataset[key].ndim for key in candidates), default=0)
    candidates = [key for key in candidates if dataset[key].ndim == most]
    if len(candidates) != 1:
        listed = {str(key): array.dims for key, array in dataset.data_vars.items()}
        got = f"{candidates or 'none'} in {source.name} with {listed}"
        cure = "say which with --variable, or rename its dims to time, band, y, x"
        raise ValueError(_wrong("INPUT", "one variable with time, y and x", got, cure))
    return dataset[candidates[0]]


def _select_bands(cube: "xr.DataArray", bands: str) -> "xr.DataArray":
    from torchalign.xr import _find_dims

    dims = _find_dims(cube.dims, dict.fromkeys(("time", "band", "y", "x")))
    if "band" not in dims:
        raise ValueError(_wrong("--bands", "a cube with bands", f"one with {cube.dims}", "leave --bands out"))
    labels = [str(label) for label in cube[dims["band"]].values] if dims["band"] in cube.coords else []
    numbers = []
    for wanted in (word.strip() for word in bands.split(",")):
        if wanted in labels:
            numbers.append(labels.index(wanted))
        elif wanted.isdigit() and int(wanted) < cube.sizes[dims["band"]]:
            numbers.append(int(wanted))
        else:
            expected = f"some of {labels}" if labels else f"numbers below {cube.sizes[dims['band']]}"
            raise ValueError(_wrong("--bands", expected, repr(wanted), "separate them by commas"))
    return cube.isel({dims["band"]: numbers})


def _open_mask(mask: str, dataset: "xr.Dataset", invert: bool) -> "xr.DataArray":
    """True = usable, from a variable of the input or the only variable of another file."""
    if mask in dataset:
        array = dataset[mask].load()
    else:
        path = Path(mask)
        if not path.exists():
            names = sorted(map(str, dataset.data_vars))
            raise ValueError(
                _wrong("--mask", f"a variable of INPUT ({names}) or a file", mask, "check the name")
            )
        with _open_cube(path) as other:
            if len(other.data_vars) != 1:
                names = sorted(map(str, other.data_vars))
                raise ValueError(
                    _wrong("--mask", "a file with one variable", f"{path} with {names}", "drop the others")
                )
            array = next(iter(other.data_vars.values())).load()
    values = array.values
    if values.dtype.kind == "f":
        values = values.astype("float64")
    if values.dtype.kind not in "biuf" or not ((values == 0) | (values == 1)).all():
        cure = "make it 1 = usable and 0 = not, and save it as int8 without a fill value"
        raise ValueError(_wrong("--mask", "values 0 and 1", f"{values.dtype} with others", cure))
    return array.copy(data=(values == 0) if invert else (values == 1))


# --- writing: whole or not at all ---


def _check_output(path: Path, overwrite: bool, *, names: Sequence[str]) -> Path:
    if names and path.suffix.lower() not in names:
        raise ValueError(_wrong("output", f"a name ending in {', '.join(names)}", path.name, "rename it"))
    if path.exists() and not overwrite:
        raise ValueError(
            _wrong("output", "a new file", f"{path}, which exists", "add --overwrite or choose a name")
        )
    return path


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file or a folder to, which then takes the place of ``path``.

    Whatever happens before the end, nothing is ever seen at ``path`` that is not complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        written = workshop / path.name
        yield written
        if path.is_dir():  # a folder cannot be replaced in one step: out of the way first
            os.replace(path, workshop / "old")
        os.replace(written, path)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _write_cube(cube: "xr.DataArray", path: Path) -> None:
    dataset = cube.to_dataset(name=cube.name if cube.name is not None else "aligned")
    with _atomic(path) as partial:
        if path.suffix.lower() == ".zarr":
            _to_zarr(dataset, partial)
        else:
            _to_netcdf(dataset, partial)


def _to_netcdf(dataset: "xr.Dataset", path: Path) -> None:
    dataset.to_netcdf(path, engine="h5netcdf")


def _to_zarr(dataset: "xr.Dataset", path: Path) -> None:
    import zarr

    # version 2 is what every reader knows, and the only one with settled rules for strings
    options: dict[str, Any] = {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) >= 3 else {}
    dataset.to_zarr(path, consolidated=True, **options)


def _write_report(report: "xr.Dataset", path: Path) -> None:
    with _atomic(path) as partial:
        if path.suffix.lower() == ".csv":
            _to_csv(report, partial)
        else:
            _to_netcdf(report, partial)


def _to_csv(report: "xr.Dataset", path: Path) -> None:
    """One row a frame: its label, the status in words, the numbers, and the warp row by row."""
    from torchalign.types import Status

    time = report["status"].dims[0]
    numbers = [
        str(name) for name, array in report.data_vars.items() if array.dims == (time,) and name != "status"
    ]
    rows, columns = report["warp"].shape[1:]
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    labels = report[time].values.astype(str) if time in report.coords else range(report["status"].size)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([time, "status", *numbers, *(f"warp_{row}{column}" for row, column in cells)])
        for number, label in enumerate(labels):
            values = [report[name].values[number] for name in numbers]
            warp = [report["warp"].values[number, row, column] for row, column in cells]
            status = Status(int(report["status"].values[number])).name
            writer.writerow([label, status, *(f"{float(value):.9g}" for value in (*values, *warp))])


if __name__ == "__main__":
    sys.exit(main())
