"""The command line: ``torchalign demo``, ``align`` and ``weights``. It says the same as the Python functions.

Exit codes: 0, all went well; 1, ``demo`` ran but did not find its shifts; 2, bad input or a missing package,
said in one line on stderr.
"""
# No `from __future__ import annotations` here: typer reads the annotations of functions that are nested in
# one another, so that importing this module does not need typer.

import csv
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
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
_STORE_MARKS = (".zgroup", "zarr.json", ".zmetadata")  # one of these is in every Zarr store
# what every format can keep of how a variable was stored; chunks and codecs are the format's own
_PORTABLE = {
    *("dtype", "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"),
    *("units", "calendar", "grid_mapping", "coordinates"),
}
_COMPRESSION = {"zlib", "complevel", "shuffle", "compression", "compression_opts"}  # from netCDF to netCDF
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

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for the pictures and the report.")] = Path(
            "torchalign-demo"
        ),
        frames: Annotated[int, typer.Option(min=4, help="Number of frames.")] = 16,
        device: Annotated[str | None, device_option] = None,
        seed: Annotated[int, typer.Option(min=0, help="Of shifts, clouds and noise.")] = 0,
    ) -> int:
        """Shift a real Sentinel-2 chip by known sub-pixel amounts, cloud it, and find the shifts again.

        Prints true against found for every frame, and writes summary.png, animation.gif, report.csv and
        report.nc, in the place of those of an earlier run. Exit code 1 if a shift was not found.
        """
        return _demo(out, frames, device, seed)

    @app.command()
    def weights() -> None:
        """List the weights of the networks: which are here, which are missing, under which licence."""
        from torchalign.models.weights import weights_table

        typer.echo(weights_table())

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
            typer.Option(
                help="What the estimate sees: mean, luminance, gradients, …, or one band, as B04 or -1."
            ),
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
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
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


def _demo(out: Path, frames: int, device: str | None, seed: int) -> int:
    _require("demo", "spyndex", "matplotlib", "PIL", "h5netcdf", "h5py")
    import numpy as np

    import torchalign
    from torchalign import plot
    from torchalign.datasets import demo_stack

    names = ("summary.png", "animation.gif", "report.csv", "report.nc")
    summary, animation, table, dataset = (_check_output(out / name, True, names=()) for name in names)
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
    _check_apart([source, *([] if mask is None else [Path(mask)])], outputs)
    _check_output(out, overwrite, names=(*_NETCDF, ".zarr"))
    if report_path is not None:
        _check_output(report_path, overwrite, names=(".csv", *_NETCDF))
    for path in outputs:
        if path.suffix.lower() != ".csv":
            _require("io", *(("zarr",) if path.suffix.lower() == ".zarr" else ("h5netcdf", "h5py")))
    if invert_mask and mask is None:
        raise ValueError(_wrong("--invert-mask", "a mask to invert", "none", "add --mask"))
    with _open_cube(source) as dataset:
        cube = _find_variable(dataset, variable, source, skip=mask)
        cube = cube if bands is None else _select_bands(cube, bands)
        module = _find_aligner(aligner, aligner_options, cube)
        cube = _make_portable(cube, out)
        attributes = _portable_attributes(dataset.attrs, out)
        usable = None if mask is None else _open_mask(mask, dataset, invert_mask)
        aligned, report = torchalign.align(
            cube, reference, module, mask=usable, device=device, batch_size=batch_size
        )
        _write_cube(aligned, out, attributes)
    if report_path is not None:
        _write_report(report, report_path)
    counts = report.attrs
    print(f"{counts['frames_aligned']} of {counts['frames']} frames aligned: {counts['status_counts']}")
    print("wrote " + ", ".join(map(str, outputs)))
    return 0


def _find_aligner(name: str, options: dict[str, Any], cube: "xr.DataArray") -> Any:
    """A name for ``torchalign.align``, or the module of that name where there are options."""
    from torchalign.xr import _ALIGNERS

    if not options or name not in _ALIGNERS:
        return name  # align knows how to complain of the name
    if "channel" in options:
        options = {**options, "channel": _find_channel(options["channel"], cube)}
    return _ALIGNERS[name](**options)


def _find_channel(wanted: str, cube: "xr.DataArray") -> int | str:
    """A channel's name as it is; the label or the index of a band as an index."""
    from typing import get_args

    from torchalign.functional.channels import ChannelName

    if wanted in get_args(ChannelName):
        return wanted
    labels, count = _find_bands(cube)
    if wanted in labels:
        return labels.index(wanted)
    if wanted.removeprefix("-").isdecimal() and -count <= int(wanted) < count:
        return int(wanted)
    listed = f", a label of {labels}" if labels else ", a label where bands have any"
    expected = f"an index in [{-count}, {count}){listed}, or a name of {list(get_args(ChannelName))}"
    raise ValueError(_wrong("--channel", expected, repr(wanted), "choose one"))


def _find_bands(cube: "xr.DataArray") -> tuple[list[str], int]:
    """The labels, none where there are none, and the number of the bands."""
    from torchalign._labelled import find_dims as _find_dims

    band = _find_dims(cube.dims, dict.fromkeys(("time", "band", "y", "x"))).get("band")
    if band is None:
        return [], 1
    return [str(label) for label in cube[band].values] if band in cube.coords else [], cube.sizes[band]


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
    if path.suffix.lower() == ".zarr" or _is_store(path):
        options |= {"engine": "zarr", "chunks": None}
    elif path.is_dir() or path.suffix.lower() not in _NETCDF:
        kind = "a folder" if path.is_dir() else f"a {path.suffix or 'nameless'} file"
        cure = (
            "GeoTIFFs come with a later release; until then stack them with rioxarray and xarray.concat, "
            "and save with to_netcdf"
        )
        raise ValueError(_wrong("INPUT", f"a netCDF file ({', '.join(_NETCDF)}) or a Zarr store", kind, cure))
    try:
        with warnings.catch_warnings():  # a store without consolidated metadata is slower to open, no more
            warnings.filterwarnings("ignore", "Failed to open Zarr store with consolidated", RuntimeWarning)
            dataset = xr.open_dataset(path, **options)
    except Exception as error:  # each engine raises its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = f'check the file; pip install "torchalign[io]" brings the readers ({reason})'
        raise ValueError(_wrong("INPUT", "a readable netCDF file or Zarr store", path, cure)) from error
    with dataset:
        yield dataset


def _is_store(path: Path) -> bool:
    return any((path / name).exists() for name in _STORE_MARKS)


def _make_portable(cube: "xr.DataArray", out: Path) -> "xr.DataArray":
    """The cube without the attributes and the encoding that the format of ``out`` cannot take."""
    keys = _PORTABLE if out.suffix.lower() == ".zarr" else _PORTABLE | _COMPRESSION
    cleaned = cube.copy(deep=False)
    for variable in (cleaned.variable, *(array.variable for array in cleaned.coords.values())):
        is_text = variable.dtype.kind not in "biufcmM"  # each format has one way to store it
        dropped = {"dtype", "_FillValue", *_COMPRESSION} if is_text else set()
        variable.encoding = {key: variable.encoding[key] for key in (keys - dropped) & {*variable.encoding}}
        variable.attrs = _portable_attributes(variable.attrs, out)
    return cleaned


def _portable_attributes(attributes: dict[Any, Any], out: Path) -> dict[Any, Any]:
    """Of JSON, netCDF has numbers, text and lists of them; the rest is written as its text."""
    if out.suffix.lower() == ".zarr":
        return dict(attributes)

    def is_plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            kinds = {type(item) for item in value}
            return len(kinds) == 1 and kinds <= {int, float, str}
        return value is not None and not isinstance(value, (dict, bool))

    return {
        key: value if is_plain(value) else json.dumps(value, default=str) for key, value in attributes.items()
    }


def _find_variable(dataset: "xr.Dataset", name: str | None, source: Path, skip: str | None) -> "xr.DataArray":
    from torchalign._labelled import find_dims as _find_dims

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
    from torchalign._labelled import find_dims as _find_dims

    dims = _find_dims(cube.dims, dict.fromkeys(("time", "band", "y", "x")))
    if "band" not in dims:
        raise ValueError(_wrong("--bands", "a cube with bands", f"one with {cube.dims}", "leave --bands out"))
    labels, count = _find_bands(cube)
    numbers = []
    for wanted in (word.strip() for word in bands.split(",")):
        if wanted in labels:
            numbers.append(labels.index(wanted))
        elif wanted.isdecimal() and int(wanted) < count:
            numbers.append(int(wanted))
        else:
            expected = f"some of {labels}" if labels else f"numbers below {count}"
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
    _check_replaceable(path, path.suffix.lower() == ".zarr")
    return path


def _check_replaceable(path: Path, by_folder: bool) -> None:
    """A file may take the place of a file, and a Zarr store that of a Zarr store; nothing else is deleted."""
    if not path.exists() or (path.is_file() and not by_folder) or (by_folder and _is_store(path)):
        return
    expected = "no file or a Zarr store" if by_folder else "no file or a file to replace"
    kind = "a folder" if path.is_dir() else "a file"
    raise ValueError(_wrong("output", expected, f"{path}, {kind}", "remove it or choose another name"))


def _check_apart(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
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
                raise ValueError(_wrong("output", "new names, apart from every input", got, cure))


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file or a folder to, which then takes the place of ``path``.

    Whatever happens before the end, nothing is ever seen at ``path`` that is not complete, and what was there
    is there again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    written, old = workshop / path.name, workshop / f"{path.name}.old"
    try:
        yield written
        _check_replaceable(path, written.is_dir())
        try:
            if path.is_dir():  # a folder cannot be replaced in one step: out of the way first
                os.replace(path, old)
            os.replace(written, path)
        finally:
            if os.path.lexists(old) and not os.path.lexists(path):
                os.replace(old, path)
    finally:
        if os.path.lexists(path) or not os.path.lexists(old):  # else it keeps the only copy
            shutil.rmtree(workshop, ignore_errors=True)


def _write_cube(cube: "xr.DataArray", path: Path, attributes: dict[Any, Any]) -> None:
    dataset = cube.to_dataset(name=cube.name if cube.name is not None else "aligned").assign_attrs(attributes)
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
