"""The commands and their options, each named once: a field of a dataclass is an option of the command line."""
# No `from __future__ import annotations` here: typer reads the annotations of these classes.

import ast
import copy
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer
import xarray as xr

import torchalign
from torchalign._check import message
from torchalign.cascade import Cascade
from torchalign.cli import outputs, sources
from torchalign.cube.georeference import crs_name, find_georeference
from torchalign.cube.headers import describe_files
from torchalign.cube.labels import Cube, band_labels, find_dims, label_text, time_labels
from torchalign.cube.pixels import find_nodata
from torchalign.cube.reference import ReferenceName
from torchalign.cube.run import ALIGNERS
from torchalign.cube.tables import PAGES, REPORT_SUFFIXES
from torchalign.cube.variables import Variables, take_apart
from torchalign.functional.channels import ChannelName
from torchalign.local import Local
from torchalign.models.weights import load_weights, weights_table

Option, Argument = typer.Option, typer.Argument

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


def command(name: str, options: type, epilog: str | None = None) -> Callable[[Any], Any]:
    """Register a function of one dataclass as a command whose options are the fields of that dataclass.

    What an option does stands in the docstring of its class, as ``name: text``; what else typer is to know of it,
    beside its type.
    """

    def register(function: Callable[[Any], int]) -> Callable[[Any], int]:
        own, told = inspect.get_annotations(options), _help_of(options)
        # those of the command itself before those that it shares
        ordered = sorted(fields(options), key=lambda field: field.name not in own)
        unlike = told.keys() - {field.name for field in ordered}
        parameters = []
        for field in ordered:
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            kind, *more = get_args(field.type) if hasattr(field.type, "__metadata__") else (field.type,)
            info = copy.copy(more[0]) if more else Option()
            if field.default is False and not info.param_decls:  # there is nothing to switch off
                info.param_decls = (f"--{field.name.replace('_', '-')}",)
            info.help = info.help or told.get(field.name)
            info.show_default = field.default not in (MISSING, None)
            unlike |= set() if info.help else {field.name}
            how: dict[str, Any] = {"default": default, "annotation": Annotated[kind, info]}
            parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, **how))
        if unlike and sys.flags.optimize < 2:  # with -OO there are no docstrings, and options have no text
            cure = "write `name: text` in the docstring of its class"
            raise TypeError(message(options.__name__, "a text for each field", sorted(unlike), cure))

        def run(**typed: Any) -> int:
            return function(options(**typed))

        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(name, epilog=epilog)(run)
        return function

    return register


def _help_of(options: type) -> dict[str, str]:
    """Field → what the docstring of its class says of it; of a field that is told twice, the heir's."""
    told = {}
    for kind in reversed(options.__mro__):
        for part in re.split(r"\n(?=\w+: )", inspect.cleandoc(kind.__doc__ or ""))[1:]:
            name, _, text = part.partition(": ")
            told[name] = " ".join(text.split())
    return told


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchalign {torchalign.__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- options that several commands share ---


@dataclass(frozen=True, kw_only=True)
class CubeOptions(sources.SourceOptions):
    """What is read, how it is computed, and where the result goes.

    out: Where the result goes: a folder for GeoTIFFs, NAME.zarr or NAME.nc.
    classes: Bands or variables, as SCL,QA, that are copied from the nearest pixel and not seen by the estimate. Those
        of the usual names are, without being named.
    template: Names of GeoTIFFs written, as {file}_aligned.tif or {time:%Y%m%d}.tif. Default: as read.
    device: Where to compute: cpu, cuda, cuda:1. Default: CUDA if there is any.
    batch_size: Frames on the device at a time. Default: what fits.
    lazy: Stream through dask, chunk by chunk, or take all into memory. Default: lazy above 128 MiB.
    progress: A bar. Default: on a terminal.
    """

    out: Annotated[Path, Option("--out", "-o")]
    classes: str | None = None
    template: str | None = None
    device: str | None = None
    batch_size: int | None = None
    lazy: Annotated[bool | None, Option("--lazy/--in-memory")] = None
    progress: Annotated[bool | None, Option("--progress/--no-progress")] = None

    def computing(self) -> dict[str, Any]:
        """Options that ``torchalign.align`` and ``torchalign.apply`` share."""
        options = {name: getattr(self, name) for name in ("device", "batch_size", "progress")}
        return options | {"classes": self.class_names}

    @property
    def class_names(self) -> list[str] | None:
        """Of ``--classes``."""
        return None if self.classes is None else [word.strip() for word in self.classes.split(",")]

    def write(self, cube: Any, source: sources.Source, report: xr.Dataset | None = None) -> Any:
        """Write the result; returns its report, computed."""
        names = ("template", "overwrite", "progress")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return outputs.write_result(cube, self.out, source, report, **options)


# --- align ---


@dataclass(frozen=True, kw_only=True)
class AlignOptions(CubeOptions):
    """Options of ``torchalign align``.

    reference: median, mean, first, clearest, iterative (the median of the aligned frames), groupwise (none: all frames
        by their pairs), previous (a chain), the label of one frame, as 2020-05-01, or a file with the picture.
    local: Local shifts on top, of terrain or jitter; kept only where they are sure.
    max_translation: Largest shift in pixels; frames beyond are flagged. [default: 5]
    channel: What the estimate sees: mean, luminance, gradients, ..., or one band, as B04 or -1. What is found is
        applied to all bands.
    crop_center: Estimate on so many pixels in the frame's middle.
    option: Any other option of the method, as interpolation=bicubic.
    init: An earlier report to start from, of any bands and pixel size.
    verify: Measure what is left after alignment, for the report.
    large: GeoTIFFs larger than memory: estimated from tiles, resampled and written by rows. The reference is first,
        median, mean or a label; no local shifts, no --init.
    mask: Usable pixels (1 = usable): a variable of SRC, a file, or a folder of GeoTIFFs of the same dates.
    invert_mask: The mask has 1 = unusable, as cloud masks do.
    report: Where the report goes, one row a frame: NAME.csv, .json or .nc, which apply reads, or .html or .geojson, to
        look at. May be given more than once.
    """

    reference: str = "median"
    aligner: Annotated[str, Option(help=f"The method: {', '.join(ALIGNERS)}.")] = "auto"
    local: bool = False
    max_translation: float | None = None
    channel: str | None = None
    crop_center: int | None = None
    option: Annotated[list[str] | None, Option(metavar="NAME=VALUE")] = None
    init: Path | None = None
    verify: bool = True
    large: bool = False
    mask: str | None = None
    invert_mask: bool = False
    report: Annotated[list[Path] | None, Option(metavar="PATH")] = None


_ALIGN_EXAMPLES = """\b
Examples:
  A folder of GeoTIFFs, their dates in the names, and a report to look at:
    torchalign align frames/ --out aligned/ --report report.html
  The reference is sharpened as the frames fall into place; clouds are masked:
    torchalign align frames/ -o aligned/ --reference iterative --mask clouds/ --invert-mask
  One band decides, all bands move; the solution is kept for others (see apply):
    torchalign align cube.nc -o aligned.zarr --channel B08 --report report.json --report report.html
  Landsat, a file a band and date; and Sentinel-2 tiles of two UTM zones on the grid of the first:
    torchalign align landsat/ -o out/ --bands red='*_SR_B4.TIF' --bands qa='*_QA_PIXEL.TIF'
    torchalign align S2/ -o out/ --recursive --pattern '*_TCI.jp2' --grid first
  Two full tiles, larger than memory:
    torchalign align T33UUP/ -o out/ --large --reference first --report report.html
  Onto a certain date, on a GPU, by up to 20 pixels, bicubic:
    torchalign align cube.zarr -o out.nc --reference 2020-05-01 --device cuda \\
      --max-translation 20 --option interpolation=bicubic
"""


@command("align", AlignOptions, _ALIGN_EXAMPLES)
def align_files(given: AlignOptions) -> int:
    """Bring every frame of a cube onto one reference.

    Pixels are resampled once; dtype, nodata, CRS, transform, band names and attributes stay. Frames that
    cannot be trusted are left as they came, bit for bit; the report says which and why. Exit code 1 if that is
    every frame.
    """
    reports = list(given.report or ())
    # a mask may be a variable of SRC, and a reference a word or a label
    named = [given.mask, None if given.reference in get_args(ReferenceName) else given.reference]
    beside = [path for path in map(Path, filter(None, named)) if path.exists()]
    beside += [] if given.init is None else [given.init]
    outputs.check_apart([*given.source, *beside], [given.out, *reports])
    outputs.check_cube_output(given.out, given.template, given.overwrite)
    for path in reports:
        outputs.check_report_output(path, given.overwrite)
    if given.invert_mask and given.mask is None:
        raise ValueError(message("--invert-mask", "a mask to invert", "none", "add --mask"))
    # of frames that do not fit into memory the lazy cube tells the dates and bands, and no pixels are read of it
    with given.opened(skip=given.mask, lazy=given.large or given.lazy) as opened:
        cube = opened.cube
        module = _choose_aligner(given, cube)
        usable = None
        if given.mask is not None:
            usable = sources.open_mask(given.mask, opened, invert=given.invert_mask, pattern=given.pattern)
        reference = sources.open_reference(given.reference, given.pattern)
        if given.large:
            report = _align_large(given, module, reference, usable)
            for path in reports:
                torchalign.save_report(report, path, overwrite=given.overwrite)
            return _sum_up(given, report, reports)
        aligned, report = torchalign.align(
            cube, reference, module, mask=usable, init=given.init, verify=given.verify, **given.computing()
        )
        report = given.write(aligned, opened, report)
        for path in reports:
            if path.suffix.lower() in PAGES:
                how: dict[str, Any] = {"classes": given.class_names, "overwrite": given.overwrite}
                outputs.write_page(report, path, (cube, aligned), given.out, **how)
            else:
                torchalign.save_report(report, path, overwrite=given.overwrite)
    return _sum_up(given, report, reports)


def _sum_up(given: AlignOptions, report: xr.Dataset, reports: Sequence[Path]) -> int:
    summary = torchalign.summarize(report)
    print(summary)
    outputs.print_written(given.out, *reports)
    if summary.frames and not summary.counts.get("OK"):
        print("torchalign: not one frame was aligned; see the report for the reasons", file=sys.stderr)
        return 1
    return 0


def _align_large(given: AlignOptions, module: Any, reference: Any, usable: Any) -> xr.Dataset:
    if given.out.suffix.lower() in outputs.CUBES or not all(map(sources.is_raster, given.source)):
        got, cure = f"{given.source[0]} to {given.out}", "leave --large out, or name GeoTIFFs and a folder"
        raise ValueError(message("--large", "GeoTIFFs, and a folder for --out", got, cure))
    if given.init is not None:
        raise ValueError(message("--init", "no report with --large", given.init, "leave one of them out"))
    with sources.translated():
        names = ("template", "overwrite", "device", "progress")
        options: dict[str, Any] = {name: getattr(given, name) for name in names} | given.stack_options()
        source = sources.raster_source(given.source)
        _, report = torchalign.io.align_scenes(source, given.out, reference, module, mask=usable, **options)
    return report


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


def _choose_aligner(given: AlignOptions, cube: Any) -> Any:
    """A name for ``torchalign.align``, or the module of that name where there are options."""
    name = given.aligner
    common = {key: getattr(given, key) for key in ("max_translation", "channel", "crop_center")}
    options = {key: value for key, value in common.items() if value is not None}
    options |= _parse_options(given.option)
    if name not in ALIGNERS or not (options or given.local):
        return name  # align knows how to complain of the name
    if "channel" in options:
        options["channel"] = _choose_channel(str(options["channel"]), cube, given.class_names)
    module: Any = ALIGNERS[name]()
    if given.local and name != "local":
        module = Cascade(module, Local())
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
        own = {key: value for key, value in options.items() if key in names}
        made.append(type(part)(**(part._options() | own)))
    return made[0] if stages is None else type(module)(*made)


def _choose_channel(wanted: str, cube: Any, classes: Any) -> int | str:
    """A channel's name as it is; the label or the index of a band that the estimate sees as an index."""
    if wanted in get_args(ChannelName):
        return wanted
    variables, _ = take_apart(cube, None, classes, {})
    if variables is None:
        labels, count = band_labels(cube)
    else:
        labels, count = [*map(str, variables.seen)], len(variables.seen)
    if wanted in labels:
        return labels.index(wanted)
    if wanted.removeprefix("-").isdecimal() and -count <= int(wanted) < count:
        return int(wanted)
    listed = f", a label of {labels}" if labels else ", a label where bands have any"
    expected = f"an index in [{-count}, {count}){listed}, or a name of {list(get_args(ChannelName))}"
    raise ValueError(message("--channel", expected, repr(wanted), "choose one"))


# --- apply ---


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(CubeOptions):
    """Options of ``torchalign apply``.

    report: The report that align wrote: NAME.csv, .json or .nc.
    mode: resample, or shift-coords: pixels are not touched, each GeoTIFF gets a georeference of its own.
    interpolation: bilinear, bicubic or nearest. Default: nearest for masks and classes, else bilinear.
    """

    report: Path
    mode: str = "resample"
    interpolation: str | None = None


_APPLY_EXAMPLES = """\b
Examples:
  What was found at 10 m, for the bands of 20 m:
    torchalign apply frames20m/ -o aligned20m/ --report report.json
  For classes:
    torchalign apply scl/ -o aligned_scl/ --report report.json --interpolation nearest
  Correct the georeference only:
    torchalign apply frames/ -o shifted/ --report report.json --mode shift-coords
"""


@command("apply", ApplyOptions, _APPLY_EXAMPLES)
def apply_to_files(given: ApplyOptions) -> int:
    """Apply one solution to another cube: other bands, another pixel size, a mask, a classification.

    Frames are matched by their dates, pixels by the two grids.
    """
    outputs.check_apart([*given.source, given.report], [given.out])
    outputs.check_cube_output(given.out, given.template, given.overwrite)
    if given.mode == "shift-coords" and given.out.suffix.lower() in outputs.CUBES:
        cure = "name a folder, or use --mode resample"
        raise ValueError(message("--out", "a folder of GeoTIFFs for shift-coords", given.out.name, cure))
    solution = torchalign.load_report(given.report)
    with given.opened(masks=True, lazy=given.lazy) as opened:
        cube = opened.cube
        if given.skip_bad and all(map(sources.is_raster, given.source)) and isinstance(cube, xr.DataArray):
            cube = _without_unknown_empty(cube, solution)
        applied = torchalign.apply(
            cube,
            solution,
            mode=given.mode,  # type: ignore[arg-type]  # checked there
            interpolation=given.interpolation,  # type: ignore[arg-type]
            **given.computing(),
        )
        given.write(applied, opened)
    outputs.print_written(given.out)
    return 0


def _without_unknown_empty(cube: xr.DataArray, solution: xr.Dataset) -> xr.DataArray:
    """Without the empty frames that a report has not, for ``align --skip-bad`` has left them out."""
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


# --- info, weights and demo ---


@dataclass(frozen=True, kw_only=True)
class InfoOptions(sources.SourceOptions):
    """Options of ``torchalign info``.

    source: What align takes, or a report: .csv, .json or .nc.
    html: Of a report, make the page to look at: NAME.html.
    """

    source: Annotated[list[Path], Argument(metavar="SRC")]
    html: Path | None = None


_INFO_EXAMPLES = """\b
Examples:
  torchalign info frames/
  torchalign info report.json
  torchalign info report.nc --html report.html
"""


@command("info", InfoOptions, _INFO_EXAMPLES)
def show_info(given: InfoOptions) -> int:
    """Say what is in a cube, or in a report, without reading the pixels."""
    if len(given.source) == 1 and _is_report(given.source[0]):
        return _show_report(given.source[0], given.html, given.overwrite)
    if given.html is not None:
        got = ", ".join(map(str, given.source))
        raise ValueError(message("--html", "a report to show", got, "give a report"))
    try:
        with given.opened(lazy=find_spec("dask") is not None) as opened:
            for line in _cube_lines(opened.cube):
                print(line)
            if opened.others:
                listed = ", ".join(f"{name} {array.dims}" for name, array in opened.others.items())
                print(f"beside it: {listed}")
    except (ValueError, FileNotFoundError) as error:
        if not all(map(sources.is_raster, given.source)):
            raise
        folders = [path for path in given.source if path.is_dir()]
        everything = folders[0] if len(folders) == len(given.source) == 1 else list(given.source)
        try:  # of any files a table of their kinds, and what keeps them from being one cube
            lines = describe_files(everything, given.pattern, given.recursive)
        except (ValueError, FileNotFoundError):
            raise error from None
        print(*lines, f"no cube yet: {error}", sep="\n")
    return 0


def _is_report(path: Path) -> bool:
    if path.suffix.lower() == ".csv" and path.is_file():  # or it is a table of GeoTIFFs
        with path.open(encoding="utf-8", errors="replace") as file:
            return "path" not in file.readline().strip().lower().split(",")
    if path.suffix.lower() in (".csv", ".json"):
        return True
    if path.suffix.lower() not in REPORT_SUFFIXES or not path.is_file():
        return False
    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            return {"warp", "status"} <= {*dataset.data_vars}
    except (OSError, ValueError, ImportError):  # no HDF5, no netCDF, no reader: told of where cubes are read
        return False


def _show_report(path: Path, html: Path | None, overwrite: bool) -> int:
    if html is not None:
        outputs.check_apart([path], [html])
        outputs.check_report_output(html, overwrite)
    report = torchalign.load_report(path)
    print(torchalign.summarize(report))
    for name in ("reference", "aligner"):
        if name in report.attrs:
            print(f"{name}: {report.attrs[name]}")
    if html is not None:
        from torchalign.html import save_html

        save_html(report, html, overwrite=overwrite)
        outputs.print_written(html)
    return 0


def _cube_lines(source: xr.DataArray | xr.Dataset) -> Iterator[str]:
    """Lines about dates, bands, grid and pixels; the first three of the first variable."""
    every: list[Any] = [source]
    if isinstance(source, xr.Dataset):
        known = Variables.of(source, None, None, {})
        every = [source[name] for name in (*known.seen, *known.moved, *known.classes)]
    cube: Any = every[0]
    dims = find_dims(cube)
    time = dims["time"]
    labels = time_labels(cube, time)
    span = f", {labels[0]} to {labels[-1]}" if labels else ""
    if time in cube.coords and cube[time].dtype.kind == "M" and len(labels) > 1:
        days = np.diff(np.sort(cube[time].values)) / np.timedelta64(1, "D")
        span += f", every {np.median(days):.3g} days (median), longest gap {days.max():.3g}"
    yield f"{len(labels)} frames{span}"
    names, count = band_labels(cube)
    if isinstance(source, xr.Dataset):
        names, count = [str(array.name) for array in every], len(every)
    yield f"{count} band{'s' if count > 1 else ''}{': ' + ', '.join(names) if names else ''}"
    grid = find_georeference(Cube(cube, dims))
    place = ""
    if grid is not None:
        a, b, _, d, e, _ = grid.transform
        way = "north up" if e < 0 and not (b or d) else "not north up"
        place = f" of {abs(a):g} × {abs(e):g} map units, {way}, {crs_name(grid.crs) or 'no CRS'}"
    yield f"{cube.sizes[dims['y']]} rows × {cube.sizes[dims['x']]} columns{place}"
    for array in every:
        missing = "NaN" if array.dtype.kind == "f" else "none"
        nodata = ", ".join(f"{value:g}" for value in find_nodata(array)) or missing
        name = f"{array.name}: " if array is not source else ""
        yield f"{name}{array.dtype}, nodata {nodata}, {array.nbytes / 2**20:.4g} MiB"
    for reason in source.attrs.get("skipped_files", ()):
        yield f"left out: {reason}"


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """Options of ``torchalign weights``.

    download: Fetch the weights of this name from their official address. May be given more than once.
    """

    download: list[str] | None = None


@command("weights", WeightsOptions)
def show_weights(given: WeightsOptions) -> int:
    """List the weights of the networks: where they are, what is missing, under which licence.

    Nothing is fetched unless --download says so.
    """
    for name in given.download or ():
        load_weights(name, allow_download=True)
    print(weights_table())
    return 0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of ``torchalign demo``.

    out: Folder for the pictures and the report.
    frames: Number of frames.
    device: Where to compute: cpu, cuda, cuda:1. Default: CUDA if there is any.
    seed: Of shifts, clouds and noise.
    """

    out: Annotated[Path, Option("--out", "-o")] = Path("torchalign-demo")
    frames: Annotated[int, Option(min=4)] = 16
    device: str | None = None
    seed: Annotated[int, Option(min=0)] = 0


@command("demo", DemoOptions)
def show_demo(given: DemoOptions) -> int:
    """Shift a real Sentinel-2 chip by known sub-pixel amounts, cloud it, and find the shifts again.

    Prints true against found for every frame, and writes summary.png, animation.gif, report.html, report.csv
    and report.nc, in the place of those of an earlier run. Exit code 1 if a shift was not found.
    """
    from torchalign.cli.demo import run_demo

    return run_demo(given.out, given.frames, given.device, given.seed)
