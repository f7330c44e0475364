"""The command line: ``torchalign align``, ``apply``, ``info``, ``demo`` and ``weights``. It says what Python says.

Exit codes: 0, all went well; 1, the command ran, but not one frame was aligned, or ``demo`` did not find its
shifts; 2, bad input or a missing package, said in one line on stderr.
"""
# No `from __future__ import annotations` here: typer reads the annotations of functions that are nested in
# one another, so that importing this module does not need typer.

import ast
import inspect
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchalign._check import message
from torchalign.cube.files import atomic, is_store

if TYPE_CHECKING:
    import typer
    import xarray as xr

    from torchalign._sources import Source

__all__ = ["build_app", "main"]

_TABLES = (".csv", ".json", ".nc", ".nc4", ".netcdf", ".h5")  # reports to be read again
_PAGES = (".html", ".htm")
# after \b a paragraph keeps its lines
_EXAMPLES = {
    "align": """\b
Examples:
  A folder of GeoTIFFs, their dates in the names, and a report to look at:
    torchalign align frames/ --out aligned/ --report report.html
  The reference is sharpened as the frames fall into place; clouds are masked:
    torchalign align frames/ -o aligned/ --reference iterative --mask clouds/ --invert-mask
  One band decides, all bands move; the solution is kept for others (see apply):
    torchalign align cube.nc -o aligned.zarr --channel B08 --report report.json --report report.html
  Onto a certain date, on a GPU, by up to 20 pixels, bicubic:
    torchalign align cube.zarr -o out.nc --reference 2020-05-01 --device cuda \\
      --max-translation 20 --option interpolation=bicubic
""",
    "apply": """\b
Examples:
  What was found at 10 m, for the bands of 20 m:
    torchalign apply frames20m/ -o aligned20m/ --report report.json
  For classes:
    torchalign apply scl/ -o aligned_scl/ --report report.json --interpolation nearest
  Correct the georeference only:
    torchalign apply frames/ -o shifted/ --report report.json --mode shift-coords
""",
    "info": """\b
Examples:
  torchalign info frames/
  torchalign info report.json
  torchalign info report.nc --html report.html
""",
}
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

    from torchalign.xr import _ALIGNERS

    app = typer.Typer(
        name="torchalign",
        help="""Register image time series: a whole stack in one batch, to a hundredth of a pixel.

        \b
        torchalign demo                            see it work, on a real Sentinel-2 chip
        torchalign info frames/                    what is in a folder of GeoTIFFs
        torchalign align frames/ --out aligned/    bring every frame onto the median
        torchalign align --help                    more examples
        """,
        epilog='Python says the same: aligned, report = torchalign.align(cube, "median").',
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain text: the examples keep their lines
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
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

    # what several commands take
    sources = Annotated[
        list[Path],
        typer.Argument(
            metavar="SRC",
            help="A folder of GeoTIFFs, one a date; or GeoTIFFs; or a netCDF file; or a Zarr store.",
            show_default=False,
        ),
    ]
    destination = Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Where the result goes: a folder for GeoTIFFs, NAME.zarr or NAME.nc.",
            show_default=False,
        ),
    ]
    bands_option = Annotated[
        str | None,
        typer.Option(
            help="Only these bands, as B04,B03,B02: names, or else numbers; in GeoTIFFs from 1, else from 0."
        ),
    ]
    variable_option = Annotated[
        str | None,
        typer.Option(
            help="Variable of a netCDF file or Zarr store. Default: the only one with time, y, x (and band)."
        ),
    ]
    pattern_option = Annotated[str, typer.Option(help="Names of the GeoTIFFs in a folder.")]
    skip_option = Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Leave out GeoTIFFs that are unreadable, undated, of another grid, or (in memory) empty.",
        ),
    ]
    device_option = Annotated[
        str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1. Default: CUDA if there is any.")
    ]
    batch_option = Annotated[
        int | None, typer.Option(help="Frames on the device at a time. Default: what fits.")
    ]
    lazy_option = Annotated[
        bool | None,
        typer.Option(
            "--lazy/--in-memory",
            help="Stream through dask, chunk by chunk, or take all into memory. Default: lazy above 128 MiB.",
            show_default=False,
        ),
    ]
    progress_option = Annotated[
        bool | None,
        typer.Option("--progress/--no-progress", help="A bar. Default: on a terminal.", show_default=False),
    ]
    overwrite_option = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
    template_option = Annotated[
        str | None,
        typer.Option(
            help="Names of GeoTIFFs written, as {file}_aligned.tif or {time:%Y%m%d}.tif. Default: as read."
        ),
    ]

    @app.command()
    def demo(
        out: Annotated[
            Path, typer.Option("--out", "-o", help="Folder for the pictures and the report.")
        ] = Path("torchalign-demo"),
        frames: Annotated[int, typer.Option(min=4, help="Number of frames.")] = 16,
        device: device_option = None,
        seed: Annotated[int, typer.Option(min=0, help="Of shifts, clouds and noise.")] = 0,
    ) -> int:
        """Shift a real Sentinel-2 chip by known sub-pixel amounts, cloud it, and find the shifts again.

        Prints true against found for every frame, and writes summary.png, animation.gif, report.html, report.csv
        and report.nc, in the place of those of an earlier run. Exit code 1 if a shift was not found.
        """
        return _demo(out, frames, device, seed)

    @app.command(epilog=_EXAMPLES["align"])
    def align(
        source: sources,
        out: destination,
        reference: Annotated[
            str,
            typer.Option(
                help="median, mean, first, clearest, iterative (the median of the aligned frames), the label "
                "of one frame, as 2020-05-01, or a file with the picture."
            ),
        ] = "median",
        aligner: Annotated[str, typer.Option(help=f"The method: {', '.join(_ALIGNERS)}.")] = "auto",
        max_translation: Annotated[
            float | None,
            typer.Option(help="Largest shift in pixels; frames beyond are flagged. [default: 5]"),
        ] = None,
        channel: Annotated[
            str | None,
            typer.Option(
                help="What the estimate sees: mean, luminance, gradients, ..., or one band, as B04 or -1. "
                "What is found is applied to all bands."
            ),
        ] = None,
        crop_center: Annotated[
            int | None, typer.Option(help="Estimate on so many pixels in the frame's middle.")
        ] = None,
        option: Annotated[
            list[str] | None,
            typer.Option(
                "--option",
                metavar="NAME=VALUE",
                help="Any other option of the method, as interpolation=bicubic.",
            ),
        ] = None,
        init: Annotated[
            Path | None, typer.Option(help="An earlier report to start from, of any bands and pixel size.")
        ] = None,
        verify: Annotated[
            bool, typer.Option(help="Measure what is left after alignment, once more, for the report.")
        ] = True,
        bands: bands_option = None,
        mask: Annotated[
            str | None,
            typer.Option(
                help="Usable pixels (1 = usable): a variable of SRC, a file, or a folder of GeoTIFFs of the "
                "same dates."
            ),
        ] = None,
        invert_mask: Annotated[
            bool, typer.Option("--invert-mask", help="The mask has 1 = unusable, as cloud masks do.")
        ] = False,
        report: Annotated[
            list[Path] | None,
            typer.Option(
                metavar="PATH",
                help="Where the report goes, one row a frame: NAME.csv, .json or .nc, which apply reads, or "
                ".html, to look at. May be given more than once.",
            ),
        ] = None,
        variable: variable_option = None,
        pattern: pattern_option = "*.tif*",
        skip_bad: skip_option = False,
        template: template_option = None,
        device: device_option = None,
        batch_size: batch_option = None,
        lazy: lazy_option = None,
        progress: progress_option = None,
        overwrite: overwrite_option = False,
    ) -> int:
        """Bring every frame of a cube onto one reference.

        Pixels are resampled once; dtype, nodata, CRS, transform, band names and attributes stay. Frames that
        cannot be trusted are left as they came, bit for bit; the report says which and why. Exit code 1 if that is
        every frame.
        """
        given = {"max_translation": max_translation, "channel": channel, "crop_center": crop_center}
        options = {name: value for name, value in given.items() if value is not None} | _parse_options(option)
        return _align(
            source,
            out,
            list(report or ()),
            reference=reference,
            aligner=aligner,
            aligner_options=options,
            init=init,
            verify=verify,
            mask=mask,
            invert_mask=invert_mask,
            device=device,
            batch_size=batch_size,
            progress=progress,
            template=template,
            overwrite=overwrite,
            reading={
                "variable": variable,
                "bands": bands,
                "pattern": pattern,
                "skip_bad": skip_bad,
                "lazy": lazy,
            },
        )

    @app.command(epilog=_EXAMPLES["apply"])
    def apply(
        source: sources,
        out: destination,
        report: Annotated[
            Path,
            typer.Option(help="The report that align wrote: NAME.csv, .json or .nc.", show_default=False),
        ],
        mode: Annotated[
            str,
            typer.Option(
                help="resample, or shift-coords: pixels are not touched, each GeoTIFF gets a georeference of "
                "its own."
            ),
        ] = "resample",
        interpolation: Annotated[
            str, typer.Option(help="bilinear, bicubic, or nearest, for classes and masks.")
        ] = "bilinear",
        bands: bands_option = None,
        variable: variable_option = None,
        pattern: pattern_option = "*.tif*",
        skip_bad: skip_option = False,
        template: template_option = None,
        device: device_option = None,
        batch_size: batch_option = None,
        lazy: lazy_option = None,
        progress: progress_option = None,
        overwrite: overwrite_option = False,
    ) -> int:
        """Apply one solution to another cube: other bands, another pixel size, a mask, a classification.

        Frames are matched by their dates, pixels by the two grids.
        """
        return _apply(
            source,
            out,
            report,
            mode=mode,
            interpolation=interpolation,
            device=device,
            batch_size=batch_size,
            progress=progress,
            template=template,
            overwrite=overwrite,
            reading={
                "variable": variable,
                "bands": bands,
                "pattern": pattern,
                "skip_bad": skip_bad,
                "lazy": lazy,
            },
        )

    @app.command(epilog=_EXAMPLES["info"])
    def info(
        source: Annotated[
            list[Path],
            typer.Argument(
                metavar="SRC",
                help="What align takes, or a report: .csv, .json or .nc.",
                show_default=False,
            ),
        ],
        variable: variable_option = None,
        pattern: pattern_option = "*.tif*",
        skip_bad: skip_option = False,
        html: Annotated[
            Path | None, typer.Option(help="Of a report, make the page to look at: NAME.html.")
        ] = None,
        overwrite: overwrite_option = False,
    ) -> int:
        """Say what is in a cube, or in a report, without reading the pixels."""
        return _info(
            source, html, overwrite, {"variable": variable, "pattern": pattern, "skip_bad": skip_bad}
        )

    @app.command()
    def weights(
        download: Annotated[
            list[str] | None,
            typer.Option(
                help="Fetch the weights of this name from their official address. May be given more than once."
            ),
        ] = None,
    ) -> int:
        """List the weights of the networks: where they are, what is missing, under which licence.

        Nothing is fetched unless --download says so.
        """
        return _weights(download or [])

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
        raise ImportError(message("packages", ", ".join(packages), f"no {', '.join(missing)}", cure))


# --- align and apply ---


def _align(
    source: Sequence[Path],
    out: Path,
    reports: Sequence[Path],
    *,
    reference: str,
    aligner: str,
    aligner_options: Mapping[str, Any],
    init: Path | None,
    verify: bool,
    mask: str | None,
    invert_mask: bool,
    device: str | None,
    batch_size: int | None,
    progress: bool | None,
    template: str | None,
    overwrite: bool,
    reading: Mapping[str, Any],
) -> int:
    from typing import get_args

    import torchalign
    from torchalign._sources import open_mask, open_reference, open_source
    from torchalign.cube.reference import ReferenceName

    # a mask may be a variable of SRC, and a reference a word or a label
    named = [mask, None if reference in get_args(ReferenceName) else reference]
    beside = [path for path in map(Path, filter(None, named)) if path.exists()]
    beside += [] if init is None else [init]
    _check_apart([*source, *beside], [out, *reports])
    _check_cube_output(out, template, overwrite)
    for path in reports:
        _check_report_output(path, overwrite)
    if invert_mask and mask is None:
        raise ValueError(message("--invert-mask", "a mask to invert", "none", "add --mask"))
    with open_source(source, **reading, skip=mask) as opened:
        cube = opened.cube
        module = _find_aligner(aligner, aligner_options, cube)
        usable = None
        if mask is not None:
            usable = open_mask(mask, opened, invert=invert_mask, pattern=reading["pattern"])
        aligned, report = torchalign.align(
            cube,
            open_reference(reference, reading["pattern"]),
            module,
            mask=usable,
            init=init,
            verify=verify,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
        report = _write(aligned, out, opened, report, template, overwrite, progress)
        for path in reports:
            if path.suffix.lower() in _PAGES:
                _write_page(report, path, cube, aligned, out, overwrite)
            else:
                torchalign.save_report(report, path, overwrite=overwrite)
    summary = torchalign.summarize(report)
    print(summary)
    _say_written(out, *reports)
    if summary.frames and not summary.counts.get("OK"):
        print("torchalign: not one frame was aligned; see the report for the reasons", file=sys.stderr)
        return 1
    return 0


def _apply(
    source: Sequence[Path],
    out: Path,
    report: Path,
    *,
    mode: str,
    interpolation: str,
    device: str | None,
    batch_size: int | None,
    progress: bool | None,
    template: str | None,
    overwrite: bool,
    reading: Mapping[str, Any],
) -> int:
    import torchalign
    from torchalign._sources import CUBES, is_raster, open_source

    _check_apart([*source, report], [out])
    _check_cube_output(out, template, overwrite)
    if mode == "shift-coords" and out.suffix.lower() in CUBES:
        cure = "name a folder, or use --mode resample"
        raise ValueError(message("--out", "a folder of GeoTIFFs for shift-coords", out.name, cure))
    solution = torchalign.load_report(report)
    with open_source(source, **reading, masks=True) as opened:
        cube = opened.cube
        if reading["skip_bad"] and all(map(is_raster, source)):
            cube = _without_unknown_empty(cube, solution)
        applied = torchalign.apply(
            cube,
            solution,
            mode=mode,  # type: ignore[arg-type]  # checked there
            interpolation=interpolation,  # type: ignore[arg-type]
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
        _write(applied, out, opened, None, template, overwrite, progress)
    _say_written(out)
    return 0


def _without_unknown_empty(cube: "xr.DataArray", solution: "xr.Dataset") -> "xr.DataArray":
    """Without the empty frames that a report has not, for ``align --skip-bad`` has left them out."""
    import numpy as np

    from torchalign.cube.labels import find_dims, label_text
    from torchalign.cube.pixels import find_nodata

    time, there = find_dims(cube)["time"], solution["status"].dims[0]
    if there not in solution.coords:
        return cube
    known = {label_text(label) for label in solution[there].values}
    labels = [label_text(label) for label in cube[time].values]
    nothing = find_nodata(cube) or (0,)

    def is_empty(number: int) -> bool:
        frame = cube.isel({time: number}).to_numpy()
        return bool((np.isin(frame, nothing) | np.isnan(frame)).all())

    left = [number for number, label in enumerate(labels) if label not in known and is_empty(number)]
    if not left or len(left) == len(labels):  # a report of other dates: apply says so
        return cube
    listed = ", ".join(labels[number] for number in left)
    print(f"torchalign: left out, for they are empty and not in the report: {listed}", file=sys.stderr)
    return cube.isel({time: [number for number in range(len(labels)) if number not in left]})


def _say_written(*paths: Path) -> None:
    print("wrote " + ", ".join(map(str, paths)))


def _write(
    cube: "xr.DataArray",
    out: Path,
    source: "Source",
    report: "xr.Dataset | None",
    template: str | None,
    overwrite: bool,
    progress: bool | None,
) -> Any:
    """The cube, as GeoTIFFs or one file; a lazy one is computed here, once, together with its report."""
    from torchalign._sources import CUBES, portable, portable_attributes
    from torchalign.io import write_cube, write_stack

    suffix = out.suffix.lower()
    with _bar(progress if cube.chunks is not None else False):
        if suffix in CUBES:
            attrs = portable_attributes(source.attributes, suffix)
            done = write_cube(portable(cube, suffix), out, attrs=attrs, report=report, overwrite=overwrite)
        else:
            done = write_stack(cube, out, template=template, report=report, overwrite=overwrite)
    return None if report is None else done[1]


@contextmanager
def _bar(progress: bool | None) -> Iterator[None]:
    """Dask's, for what is lazy."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield
        return
    from dask.diagnostics.progress import ProgressBar

    with ProgressBar(out=sys.stderr):  # type: ignore[no-untyped-call]
        yield


def _write_page(
    report: "xr.Dataset",
    path: Path,
    cube: "xr.DataArray",
    aligned: "xr.DataArray",
    out: Path,
    overwrite: bool,
) -> None:
    from torchalign._sources import open_source
    from torchalign.html import save_html

    if aligned.chunks is None:
        save_html(report, path, cube, aligned, overwrite=overwrite)
        return
    # what was lazy is read from where it has been written, in place of being computed anew for every picture
    with open_source([out], lazy=True) as written:
        save_html(report, path, cube, written.cube, overwrite=overwrite)


def _parse_options(words: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE, the value as Python writes it, or else text."""
    options = {}
    for word in words or ():
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(message("--option", "NAME=VALUE", word, "write it as interpolation=bicubic"))
        try:
            options[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[name] = text.strip()
    return options


def _find_aligner(name: str, options: Mapping[str, Any], cube: "xr.DataArray") -> Any:
    """A name for ``torchalign.align``, or the module of that name where there are options."""
    from torchalign.xr import _ALIGNERS

    if not options or name not in _ALIGNERS:
        return name  # align knows how to complain of the name
    options = dict(options)
    if "channel" in options:
        options["channel"] = _find_channel(str(options["channel"]), cube)
    module: Any = _ALIGNERS[name]()
    stages = getattr(module, "stages", None)  # of a cascade: each gets those options that it knows
    parts = [module] if stages is None else list(stages)
    known = [{*inspect.signature(type(part)).parameters} for part in parts]
    unknown = {*options} - set().union(*known)
    if unknown:
        expected = f"options of {name} ({', '.join(sorted(set().union(*known)))})"
        cure = "choose one of these, or another --aligner"
        raise ValueError(message("--option", expected, ", ".join(sorted(unknown)), cure))
    made = []
    for part, names in zip(parts, known, strict=True):
        given = {key: value for key, value in options.items() if key in names}
        made.append(type(part)(**(part._options() | given)))
    return made[0] if stages is None else type(module)(*made)


def _find_channel(wanted: str, cube: "xr.DataArray") -> int | str:
    """A channel's name as it is; the label or the index of a band as an index."""
    from typing import get_args

    from torchalign.cube.labels import band_labels
    from torchalign.functional.channels import ChannelName

    if wanted in get_args(ChannelName):
        return wanted
    labels, count = band_labels(cube)
    if wanted in labels:
        return labels.index(wanted)
    if wanted.removeprefix("-").isdecimal() and -count <= int(wanted) < count:
        return int(wanted)
    listed = f", a label of {labels}" if labels else ", a label where bands have any"
    expected = f"an index in [{-count}, {count}){listed}, or a name of {list(get_args(ChannelName))}"
    raise ValueError(message("--channel", expected, repr(wanted), "choose one"))


# --- where results may go ---


def _check_cube_output(path: Path, template: str | None, overwrite: bool) -> None:
    """NAME.zarr, NAME.nc, or a folder for GeoTIFFs."""
    from torchalign._sources import CUBES

    suffix = path.suffix.lower()
    if suffix in CUBES:
        if template is not None:
            cure = "name a folder, or leave --template out"
            raise ValueError(message("--template", "GeoTIFFs to name", f"--out {path.name}", cure))
        _require("io", *(("zarr",) if suffix == ".zarr" else ("h5netcdf", "h5py")))
        _check_output(path, overwrite)
        return
    is_folder = path.is_dir() and not is_store(path)
    if path.suffix and not is_folder:
        expected = f"a folder for GeoTIFFs, or a name ending in {', '.join(CUBES)}"
        cure = "a folder's name has no dot, unless it is there already"
        raise ValueError(message("--out", expected, path.name, cure))
    _require("io", "rasterio")
    if path.exists() and not is_folder:
        raise ValueError(message("output", "a folder", f"{path}, which is none", "choose another name"))
    if is_folder and not overwrite and any(path.iterdir()):
        cure = "add --overwrite, which replaces files of the same names, or choose another folder"
        raise ValueError(message("output", "a new or empty folder", f"{path}, which is not empty", cure))


def _check_report_output(path: Path, overwrite: bool) -> None:
    suffix = path.suffix.lower()
    names = (*_TABLES, *_PAGES)
    if suffix not in names:
        raise ValueError(message("--report", f"a name ending in {', '.join(names)}", path.name, "rename it"))
    if suffix in _PAGES:
        _require("plot", "matplotlib", "PIL")
    elif suffix not in (".csv", ".json"):
        _require("io", "h5netcdf", "h5py")
    _check_output(path, overwrite)


def _check_output(path: Path, overwrite: bool) -> None:
    """A file may take the place of a file, and a Zarr store that of a Zarr store; nothing else is deleted."""
    if path.exists() and not overwrite:
        cure = "add --overwrite or choose a name"
        raise ValueError(message("output", "a new file", f"{path}, which exists", cure))
    store = path.suffix.lower() == ".zarr"
    if not path.exists() or (path.is_file() and not store) or (store and is_store(path)):
        return
    expected = "no file or a Zarr store" if store else "no file or a file to replace"
    kind = "a folder" if path.is_dir() else "a file"
    raise ValueError(message("output", expected, f"{path}, {kind}", "remove it or choose another name"))


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
                raise ValueError(message("output", "new names, apart from every input", got, cure))


# --- info and weights ---


def _info(source: Sequence[Path], html: Path | None, overwrite: bool, reading: Mapping[str, Any]) -> int:
    from torchalign._sources import open_source

    if len(source) == 1 and _is_report(source[0]):
        return _info_report(source[0], html, overwrite)
    if html is not None:
        raise ValueError(message("--html", "a report to show", ", ".join(map(str, source)), "give a report"))
    with open_source(source, **reading, lazy=find_spec("dask") is not None) as opened:
        for line in _describe(opened.cube):
            print(line)
        if opened.others:
            print("beside it: " + ", ".join(f"{name} {array.dims}" for name, array in opened.others.items()))
    return 0


def _is_report(path: Path) -> bool:
    if path.suffix.lower() in (".csv", ".json"):
        return True
    if path.suffix.lower() not in _TABLES or not path.is_file():
        return False
    import xarray as xr

    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            return {"warp", "status"} <= {*dataset.data_vars}
    except (OSError, ValueError, ImportError):  # no HDF5, no netCDF, no reader: told of where cubes are read
        return False


def _info_report(path: Path, html: Path | None, overwrite: bool) -> int:
    import torchalign

    if html is not None:
        _check_apart([path], [html])
        _check_report_output(html, overwrite)
    report = torchalign.load_report(path)
    print(torchalign.summarize(report))
    for name in ("reference", "aligner"):
        if name in report.attrs:
            print(f"{name}: {report.attrs[name]}")
    if html is not None:
        from torchalign.html import save_html

        save_html(report, html, overwrite=overwrite)
        _say_written(html)
    return 0


def _describe(cube: "xr.DataArray") -> Iterator[str]:
    """Lines about dates, bands, grid and pixels."""
    import numpy as np

    from torchalign.cube.georeference import crs_name, find_georeference
    from torchalign.cube.labels import Cube, band_labels, find_dims, time_labels
    from torchalign.cube.pixels import find_nodata

    dims = find_dims(cube)
    time = dims["time"]
    labels = time_labels(cube, time)
    span = f", {labels[0]} to {labels[-1]}" if labels else ""
    if time in cube.coords and cube[time].dtype.kind == "M" and len(labels) > 1:
        days = np.diff(np.sort(cube[time].values)) / np.timedelta64(1, "D")
        span += f", every {np.median(days):.3g} days (median), longest gap {days.max():.3g}"
    yield f"{len(labels)} frames{span}"
    names, count = band_labels(cube)
    yield f"{count} band{'s' if count > 1 else ''}{': ' + ', '.join(names) if names else ''}"
    grid = find_georeference(Cube(cube, dims))
    place = ""
    if grid is not None:
        a, b, _, d, e, _ = grid.transform
        place = f" of {abs(a):g} × {abs(e):g} map units, " + (
            "north up" if e < 0 and not (b or d) else "not north up"
        )
        place += f", {crs_name(grid.crs) or 'no CRS'}"
    yield f"{cube.sizes[dims['y']]} rows × {cube.sizes[dims['x']]} columns{place}"
    nodata = ", ".join(f"{value:g}" for value in find_nodata(cube)) or (
        "NaN" if cube.dtype.kind == "f" else "none"
    )
    yield f"{cube.dtype}, nodata {nodata}, {cube.nbytes / 2**20:.4g} MiB"
    for reason in cube.attrs.get("skipped_files", ()):
        yield f"left out: {reason}"


def _weights(download: Sequence[str]) -> int:
    from torchalign.models.weights import load_weights, weights_table

    for name in download:
        load_weights(name, allow_download=True)
    print(weights_table())
    return 0


# --- demo ---


def _demo(out: Path, frames: int, device: str | None, seed: int) -> int:
    _require("demo", "spyndex", "matplotlib", "PIL", "h5netcdf", "h5py")
    import numpy as np

    import torchalign
    from torchalign import plot
    from torchalign.datasets import demo_stack
    from torchalign.html import save_html

    names = ("summary.png", "animation.gif", "report.html", "report.csv", "report.nc")
    summary, animation, page, table, dataset = outputs = [out / name for name in names]
    for path in outputs:
        _check_output(path, True)
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
    with atomic(summary) as path:
        figure.savefig(path, dpi=110, format="png")
    zoom = ((height - side) // 2, (width - side) // 2, side)
    plot.animate(stack.cube, aligned, animation, report=report, zoom=zoom)
    for path in (table, dataset):
        torchalign.save_report(report, path, overwrite=True)
    save_html(report, page, stack.cube, aligned, title=title, overwrite=True)
    print(
        f"median error {median:.4f} px, worst {worst:.4f} px, over {int(rest.sum())} frames and no cloud mask"
    )
    print("wrote " + ", ".join(str(path) for path in outputs))

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


if __name__ == "__main__":
    sys.exit(main())
