"""Execute every notebook of this folder and fail if a cell of any raises.

python notebooks/run.py [NAME.ipynb ...] [--jobs 2] [--timeout 600] [--write]

Each is executed by itself, as many at a time as there are jobs, which share the cores evenly. Nothing is written
back, unless ``--write`` is given: then the outputs go into the notebooks, with small pictures and without paths of
this machine, so that a reader of the repository and of the site sees them.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent

# The widest picture that is committed, in pixels, and how many colours it has.
WIDEST, COLOURS = 840, 256


def without_paths(text: str) -> str:
    """The text without the folders of this machine, and without addresses in memory."""
    temporary = re.escape(tempfile.gettempdir()) + r"/[^/\s'\"]+/?"
    for folder in (temporary, re.escape(str(HERE.parent)) + "/?", re.escape(str(Path.home())) + "/?"):
        text = re.sub(folder, "", text)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def small_picture(encoded: str) -> tuple[str, str]:
    """A picture no wider than ``WIDEST``, base64 in and out, and its type.

    It is a PNG of few colours or, if that is much smaller, a JPEG.
    """
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(encoded))) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDEST:
        size = (WIDEST, round(picture.height * WIDEST / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.quantize(COLOURS, kmeans=4, dither=Image.Dither.NONE).save(png, "png", optimize=True)
    picture.save(jpeg, "jpeg", quality=82, optimize=True)
    kind, made = ("image/jpeg", jpeg) if 1.5 * jpeg.tell() < png.tell() else ("image/png", png)
    return kind, base64.b64encode(made.getvalue()).decode()


def small_gif(encoded: str) -> str:
    """An animation of 320 pixels and 48 colours, base64 in and out."""
    from PIL import Image, ImageSequence

    made = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as opened:
        duration = opened.info.get("duration", 200)
        size = (min(320, opened.width), round(opened.height * min(320, opened.width) / opened.width))
        frames = [
            frame.convert("RGB").resize(size, Image.Resampling.LANCZOS).quantize(48)
            for frame in ImageSequence.Iterator(opened)
        ]
    frames[0].save(
        made, "gif", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True
    )
    return base64.b64encode(made.getvalue()).decode()


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keep of the outputs what a reader sees, and nothing that differs from run to run or tells of the machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output["text"] = without_paths(output["text"])
            data = output.get("data", {})
            if "xr-wrap" in data.get("text/html", ""):  # as text it says the same, in a tenth of the bytes
                del data["text/html"]
            for kind in data:
                if kind.startswith("text/"):
                    data[kind] = without_paths(data[kind])
            if "image/png" in data:
                kind, picture = small_picture(data.pop("image/png"))
                data[kind] = picture
            if "image/gif" in data:
                data["image/gif"] = small_gif(data["image/gif"])


def execute(path: Path, timeout: int, threads: int, write: bool) -> str | None:
    """Run it in its own folder, with the kernel of this environment, whatever its metadata ask for.

    Returns what went wrong, if anything did.
    """
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    )
    try:
        client.execute(env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return f"{path.name}: {error}"
    if write:
        tidy(notebook)
        nbformat.write(notebook, path)
    print(f"{path.name}: executed in {time.perf_counter() - start:.0f} s", flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of this folder")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=min(cores, 4), help="notebooks at a time")
    parser.add_argument("--write", action="store_true", help="put the outputs into the notebooks")
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted(HERE.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebook in {HERE.name}/")
    jobs = max(1, min(arguments.jobs, len(paths)))
    threads = max(1, cores // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        errors = pool.map(lambda path: execute(path, arguments.timeout, threads, arguments.write), paths)
        failed = [error for error in errors if error is not None]
    if failed:
        sys.exit("\n\n".join(failed))


if __name__ == "__main__":
    main()
