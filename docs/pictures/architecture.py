"""The picture of docs/architecture.md, drawn from the imports of the package: python docs/pictures/architecture.py.

A box is a group of modules; an arrow says that a module of one group imports a module of the other. Groups are
stacked so that imports point down.
"""

from __future__ import annotations

import ast
import functools
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "torchalign"

# what a group is called, by the first part of a module's name; a method is a module of its own at the top
METHODS = {"pcc", "ecc", "lgm", "local", "cascade", "groupwise"}
FACES = {"xr", "io", "report", "datasets"}
PICTURES = {"plot", "html", "pictures"}
BASE = {"types", "_check", "_host"}
TITLES = {
    "cli": "cli: the command line",
    "pictures": "pictures and pages",
    "faces": "faces: xarray, files, reports",
    "cube": "cube: labelled cubes, the one loop over frames",
    "training": "training: checks, losses, layers",
    "methods": "methods: options of one estimator each",
    "aligner": "aligner: check → channel → estimate → gate → warp",
    "models": "models: local features",
    "functional": "functional: the mathematics, on plain tensors",
    "kernels": "kernels: one launch on a GPU",
    "base": "results, checks, the host",
}
WIDTH, LINE, CHARACTER = 1000, 17, 6.3


def group(module: str) -> str:
    """The box that a module is in."""
    first = module.split(".")[0]
    for name, members in (("methods", METHODS), ("faces", FACES), ("pictures", PICTURES), ("base", BASE)):
        if first in members:
            return name
    return {"__main__": "cli", "_graphs": "aligner"}.get(first, first)


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, but for those that only a type checker reads."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchalign."):
            names.add(node.module.removeprefix("torchalign."))
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("torchalign.")
                for alias in node.names
                if alias.name.startswith("torchalign.")
            }
    return names


@functools.cache
def graph() -> tuple[dict[str, list[str]], set[tuple[str, str]]]:
    """The modules of every group, and the arrows between groups."""
    members: dict[str, list[str]] = {}
    arrows = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":
            continue
        own = group(module)
        short = module.split(".")[-1] if "." in module else module
        members.setdefault(own, [])
        if "." in module or own in ("methods", "faces", "pictures", "base") or module == own == "aligner":
            members[own].append(short)
        arrows |= {(own, group(name)) for name in imported(path) if group(name) != own}
    return members, arrows


def levels(members: dict[str, list[str]], arrows: set[tuple[str, str]]) -> dict[str, int]:
    """How far a group stands above the ground: one more than the highest that it imports."""
    level = dict.fromkeys(members, 0)
    for _ in members:
        for upper, lower in arrows:
            # an import inside a function, of a layer above, is no arrow down: do not follow circles
            if lower in level and (lower, upper) not in arrows:
                level[upper] = max(level[upper], level[lower] + 1)
    return level


def wrapped(names: list[str], width: float) -> list[str]:
    """Lines of names that fit."""
    lines, line = [], ""
    for name in names:
        longer = f"{line}  {name}" if line else name
        if len(longer) * CHARACTER > width - 20 and line:
            lines.append(line)
            longer = name
        line = longer
    return [*lines, line] if line else lines


def draw() -> str:
    """The picture as SVG."""
    members, arrows = graph()
    level = levels(members, arrows)
    rows = [sorted(name for name in members if level[name] == at) for at in sorted(set(level.values()))]
    rows.reverse()
    boxes: dict[str, tuple[float, float, float, float]] = {}
    parts, top = [], 12.0
    for row in rows:
        width = (WIDTH - 24 - 26 * (len(row) - 1)) / len(row)
        texts = [wrapped(members[name], width) for name in row]
        height = 30 + LINE * max(1, *(len(lines) for lines in texts))
        for place, (name, lines) in enumerate(zip(row, texts, strict=True)):
            left = 12 + place * (width + 26)
            boxes[name] = left, top, width, height
            title = TITLES.get(name, name)
            parts.append(
                f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" rx="7" '
                'fill="#eef4fa" stroke="#0072b2"/>'
                f'<text x="{left + 10:.0f}" y="{top + 19:.0f}" font-weight="bold">{escape(title)}</text>'
            )
            parts += [
                f'<text x="{left + 10:.0f}" y="{top + 37 + LINE * number:.0f}" fill="#444">{escape(line)}</text>'
                for number, line in enumerate(lines)
            ]
        top += height + 42
    lines = []
    for upper, lower in sorted(arrows):
        if upper not in boxes or lower not in boxes or level[upper] <= level[lower]:
            continue
        # an arrow that other arrows make already says nothing new
        if any((upper, via) in arrows and (via, lower) in arrows and level[upper] > level[via] > level[lower]
               for via in boxes):  # fmt: skip
            continue
        (x, y, w, h), (u, v, s, _) = boxes[upper], boxes[lower]
        start = min(max(u + s / 2, x + 20), x + w - 20)
        end = min(max(start, u + 20), u + s - 20)
        if (
            len(rows) - 1 - level[upper] + 1 < len(rows) - 1 - level[lower]
        ):  # past a row of boxes: beside them
            start = end = min(x + w, u + s) - 8
        lines.append(
            f'<line x1="{start:.0f}" y1="{y + h:.0f}" x2="{end:.0f}" y2="{v - 3:.0f}" stroke="#777" '
            'marker-end="url(#tip)"/>'
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - 26:.0f}" '
            'font-family="sans-serif" font-size="12.5">',
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
            '<path d="M0,0 L7,3 L0,6 z" fill="#777"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{top - 26:.0f}" fill="white"/>',
            *parts,
            *lines,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(draw())
