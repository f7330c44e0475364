"""What both benchmarks share: the machine in words, tables, results as JSON, the README made from them."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def machine() -> dict[str, Any]:
    """The kind of machine, and nothing that names it."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].strip() if names else model
    described = {
        "cpu": model,
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "from a checkout" if package == "torchalign" else "not installed"
    return found


def described(results: Mapping[str, Any]) -> str:
    """One line: where and with what the numbers were made."""
    host = results["machine"]
    gpu = f", {host['gpu']}" if "gpu" in host else ""
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{host['cpu']}, {host['cores']} cores{gpu}, {host['system']}, Python {host['python']}; {packages}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pixels(value: float | None) -> str:
    """A length with two significant digits where it is small; None and infinity are a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.0995:
        return f"{value:.2f}"
    return f"{value:.4f}" if value < 0.00995 else f"{value:.3f}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_finite(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run the benchmark first")
    return dict(json.loads(path.read_text()))


def update_readme(name: str, text: str, *, check: bool = False, path: Path = README) -> None:
    """Put the text between the markers of that name, or (check) exit if it is not what stands there."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    readme = path.read_text()
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise SystemExit(f"{path} needs the markers {begin} and {end}, once each")
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    updated = f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"
    if updated == readme:
        print(f"{path.parent.name}/{path.name}: the figures of {name} are those of results/{name}.json")
    elif check:
        raise SystemExit(
            f"{path.parent.name}/{path.name} and results/{name}.json differ: "
            f"run benchmarks/{name}.py --update-readme"
        )
    else:
        path.write_text(updated)
        print(f"{path.parent.name}/{path.name}: the tables of {name} were updated")


def readme_or_run(
    arguments: Any,
    name: str,
    report: Callable[[Mapping[str, Any]], str],
    headline: Callable[[Mapping[str, Any]], str] | None = None,
) -> bool:
    """Handle --update-readme and --check-readme, which measure nothing; whether one was given.

    The report goes to the README of the benchmarks. A headline, of the one benchmark that has one, goes to that of
    the project.
    """
    if not (arguments.update_readme or arguments.check_readme):
        return False
    results = read_results(name)
    update_readme(name, report(results), check=arguments.check_readme)
    if headline is not None:
        update_readme(name, headline(results), check=arguments.check_readme, path=HERE.parent / "README.md")
    return True


def add_readme_options(parser: Any) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--update-readme", action="store_true", help="measure nothing; write the last results to README.md"
    )
    group.add_argument(
        "--check-readme", action="store_true", help="measure nothing; fail if README.md shows other numbers"
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null; six significant digits are enough of a float."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
