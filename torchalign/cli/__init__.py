"""The command line: ``torchalign align``, ``apply``, ``info``, ``demo`` and ``weights``. It says what Python says.

Exit codes: 0, all went well; 1, the command ran, but not one frame was aligned, or ``demo`` did not find its
shifts; 2, bad input or a missing package, said in one line on stderr; 130, interrupted.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the entry point of the script ``torchalign``.

    Args:
        arguments: as typed after ``torchalign``; default: those of the process.

    Returns:
        The exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without σ shows a question mark
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        from torchalign.cli.commands import app

        code = app(args=arguments, prog_name="torchalign", standalone_mode=False)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        return _explain(error)
    if code == 130:  # what newer releases of typer make of Ctrl-C; older ones raise Abort
        return _fail("interrupted", code)
    return code if isinstance(code, int) else 0


def _fail(sentence: str, code: int = 2) -> int:
    print(f"torchalign: error: {sentence}", file=sys.stderr)
    return code


def _explain(error: Exception) -> int:
    """One line for what the user can cure; anything else is a bug and keeps its traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name == "typer":
        return _fail('the command line needs typer; pip install "torchalign[cli]"')
    if type(error).__name__ == "Abort":
        return _fail("interrupted", 130)
    # typer's usage errors are those of click or, in newer releases, of its own copy of it
    say = getattr(error, "format_message", None)
    if say is not None:
        return _fail(f"{' '.join(say().split()).rstrip('.')}; try --help")
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        first = str(error).strip().splitlines() or [type(error).__name__]
        return _fail(first[0])
    raise error
