"""Execute every notebook of this folder and fail if a cell of any raises. Nothing is written back.

python notebooks/run.py [NAME.ipynb ...] [--jobs 2] [--timeout 600]

Each is executed by itself, as many at a time as there are jobs, which share the cores evenly.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent


def execute(path: Path, timeout: int, threads: int) -> str | None:
    """Run it in its own folder, with the kernel of this environment, whatever its metadata ask for.

    Returns what went wrong, if anything did.
    """
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute(env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return f"{path.name}: {error}"
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
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted(HERE.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebook in {HERE.name}/")
    jobs = max(1, min(arguments.jobs, len(paths)))
    threads = max(1, cores // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        errors = pool.map(lambda path: execute(path, arguments.timeout, threads), paths)
        failed = [error for error in errors if error is not None]
    if failed:
        sys.exit("\n\n".join(failed))


if __name__ == "__main__":
    main()
