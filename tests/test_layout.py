"""Imports point down only, as design has it, and importing the package imports nothing that is optional."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import torchalign

ROOT = Path(torchalign.__file__).parent

# what may import what: a layer sees the layers below its own
LAYERS = [
    {"kernels", "kernels.alike", "kernels.ascend", "kernels.assess", "kernels.blur", "kernels.channel", "kernels.climb",
     "kernels.defects", "kernels.language", "kernels.launching", "kernels.local", "kernels.peak", "kernels.resample",
     "kernels.sampling", "kernels.score", "kernels.texture", "kernels.turn"},
    {"types", "_check"},
    {"_host"},
    {"functional.affine", "functional.motion", "functional.sampling", "functional.warp", "functional.channels",
     "functional.fourier", "functional.texture", "functional.working_grid", "functional.smoothing",
     "functional.common_ground", "functional.structure", "functional.sizes",
     "functional.phase", "functional.ecc", "functional.matching", "functional.quality", "functional.keypoints",
     "functional.low_pass", "functional.masked_correlation", "functional.defects", "functional.misfit",
     "functional.uncertainty", "functional.shift_field", "functional.local", "functional.network",
     "functional.lattice", "functional.levels", "functional.peak", "functional.stripes",
     "functional.moving_frames", "functional.normal_equations", "functional.sift", "functional"},
    {"models", "models.superpoint", "models.extractors", "models.lightglue", "models.weights"},
    {"aligner"},
    {"_graphs"},
    {"pcc", "ecc", "lgm"},
    {"local"},
    {"cascade", "groupwise"},
    {"training", "training.check", "training.embed", "training.kornia", "training.lightning", "training.loss",
     "training.measure", "training.metric", "training.misregistration", "training.probe", "training.statistics",
     "training.streaming"},
    {"cube", "cube.files", "cube.labels", "cube.sun"},
    {"cube.chunks", "cube.georeference", "cube.pixels"},
    {"cube.regrid"},
    {"cube.hints", "cube.reference", "cube.solution", "cube.variables"},
    {"cube.finding", "cube.run", "cube.series", "cube.stores", "cube.tables"},
    {"cube.displacements", "cube.headers"},
    {"cube.gridding"},
    {"cube.rasters"},
    {"cube.writing"},
    {"cube.tiles"},
    {"datasets", "io", "xr"},
    {"pictures", "pictures.animation", "pictures.columns", "pictures.frames", "pictures.style"},
    {"plot"},
    {"html"},
    {"report"},
    {"cli", "cli.commands", "cli.demo", "cli.outputs", "cli.sources"},
    {"__main__"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# within functional: these are the ground of the others, keypoints that of sift
GROUND = {
    "functional.affine",
    "functional.motion",
    "functional.sampling",
    "functional.warp",
    "functional.fourier",
    "functional.sizes",
    "functional.smoothing",
    "functional.shift_field",
    "functional.uncertainty",
    "functional.low_pass",
    "functional.masked_correlation",
    "functional.lattice",
}
WITHIN = {"functional.texture", "functional.working_grid", "functional.common_ground", "functional.structure",
          "functional.phase", "functional.quality", "functional.matching", "functional.ecc",
          "functional.sift", "functional.local", "functional.network", "functional.uncertainty",
          "functional.misfit", "functional.defects", "functional.levels", "functional.moving_frames",
          "functional.normal_equations", "functional.peak", "functional.stripes"}  # fmt: skip
# what a layer may use besides torch and the standard library
FOREIGN = {
    **{
        name: set()
        for name in (
            "types",
            "_check",
            "_graphs",
            "_host",
            "functional",
            "aligner",
            "pcc",
            "local",
            "ecc",
            "lgm",
            "cascade",
            "groupwise",
        )
    },
    "kernels": {"triton"},
    "training": {"numpy", "kornia", "torchvision", "torchmetrics", "lightning", "pytorch_lightning"},
    "models": {"kornia", "torchvision"},
    "cube": {
        "rioxarray",
        "numpy",
        "pandas",
        "xarray",
        "dask",
        "rasterio",
        "pyproj",
        "zarr",
        "h5netcdf",
        "tqdm",
    },
    "report": {"xarray"},
    "xr": {"numpy", "xarray"},
    "io": {"numpy", "xarray"},
    "datasets": {"numpy", "xarray", "kornia", "spyndex"},
    "pictures": {"numpy", "xarray", "matplotlib", "PIL"},
    "plot": {"numpy", "xarray", "matplotlib"},
    "html": {"numpy", "xarray", "matplotlib", "PIL", "jinja2"},
    "__main__": set(),
    "cli": {"numpy", "xarray", "typer", "dask"},
}


@functools.cache
def modules():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT) != Path("__init__.py")
    }


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


@functools.cache
def imports(name: str) -> list[str]:
    """Names of the modules that a module imports, anywhere but under TYPE_CHECKING."""
    found, todo = [], [tree(name)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        # expressions hold no statements
        todo += (inner for inner in ast.iter_child_nodes(node) if not isinstance(inner, ast.expr))
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide their direction"
            if node.module == "torchalign":
                found += (f"torchalign.{alias.name}" for alias in node.names)
            else:
                found.append(node.module or "")
                # `from torchalign.functional import warp` may name a module
                if f"{node.module}".startswith("torchalign"):
                    found += (f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_point_down(name):
    assert name in LEVEL, f"{name}: give it a layer here, and in design.md"
    for imported in imports(name):
        own = imported.removeprefix("torchalign.")
        if imported == own or own not in LEVEL or own == name:
            continue
        below = LEVEL[own] < LEVEL[name]
        beside = name.split(".")[0] == own.split(".")[0] != "cube"
        assert below or beside, f"{name} imports {own}, which is above or beside it"
        if name.startswith("functional.") and own.startswith("functional."):
            assert own in GROUND or name in WITHIN, f"{name} imports {own}"


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_foreign_packages_stay_where_they_belong(name):
    allowed = FOREIGN[name.split(".")[0]]
    for imported in imports(name):
        package = imported.split(".")[0]
        if package in ("torch", "torchalign") or package in sys.stdlib_module_names:
            continue
        assert package in allowed, f"{name} imports {imported}"


def test_functional_is_pure():
    # no Module, no numpy, no input or output, no state
    for name in modules():
        if not name.startswith("functional."):
            continue
        for node in ast.walk(tree(name)):
            assert not isinstance(node, ast.Global), name
            if isinstance(node, ast.ClassDef):
                assert not any("Module" in ast.unparse(base) for base in node.bases), f"{name}.{node.name}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("open", "print"), name
                assert not ast.unparse(node.func).endswith(".numpy"), name


FRESH = """
import json, sys
import torch
before = set(sys.modules)
import torchalign
torchalign.PCC()
seen = {"package": sorted(set(sys.modules) - before)}

from torchalign.models.weights import find_weights
names = ("disk", "aliked-n16", "xfeat", "lightglue-aliked")
seen["weights"] = [find_weights(name) is not None for name in names]
seen["located"] = [name for name in sys.modules if name.startswith("scm_")]
seen["deterministic"] = torch.backends.cudnn.deterministic

import numpy, xarray, torchalign.plot
seen["matplotlib"] = "matplotlib" in sys.modules
columns = "shift_x shift_y score score_before sigma status".split()
report = xarray.Dataset(dict.fromkeys(columns, xarray.Variable("time", numpy.zeros(2))))
torchalign.plot.shift_scatter(report)
seen["pyplot"] = "matplotlib.pyplot" in sys.modules
print(json.dumps(seen))
"""


def test_importing_imports_nothing_optional_and_changes_no_global_state():
    optional = {"xarray", "matplotlib", "rasterio", "rioxarray", "cv2", "dask", "kornia", "torchvision", "typer",
                "PIL.Image", "scipy", "skimage", "pandas", "spyndex",
                "torchmetrics", "lightning", "torchalign.training"}  # fmt: skip
    # what a new interpreter imports, in one process, for to start one costs more than all else here
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stderr == ""
    seen = json.loads(done.stdout)
    assert "torchalign.pcc" in seen["package"]
    assert not optional & set(seen["package"])
    # packages that hold weights are located and not imported: they change torch's global state
    assert seen["located"] == []
    assert not seen["deterministic"]
    assert all(seen["weights"]) or not any(seen["weights"])
    # pyplot keeps figures alive and picks a window system; a library must not
    assert not seen["matplotlib"]
    assert not seen["pyplot"]


def test_names_of_the_package():
    assert set(torchalign.__all__) <= set(dir(torchalign))
    for name in torchalign.__all__:
        assert getattr(torchalign, name) is not None
    for name in ("datasets", "html", "io", "plot", "report", "training", "xr"):
        module = getattr(torchalign, name)
        assert dir(module) == sorted(module.__all__)  # what it uses itself is not shown
        assert name in dir(torchalign)
    assert not [name for name in dir(torchalign) if name.startswith("_") and name != "__version__"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = torchalign.nothing
    assert torchalign.align.__module__ == "torchalign.xr"
    assert torchalign.open_stack.__module__ == "torchalign.io"
    assert torchalign.load_report.__module__ == "torchalign.report"


def test_every_public_function_is_documented():
    for name in modules():
        module = tree(name)
        assert ast.get_docstring(module) or not module.body, name
        for node in module.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                    continue  # the types of one that comes after
                assert ast.get_docstring(node), f"{name}.{node.name}"


def test_typed():
    assert (ROOT / "py.typed").is_file()
