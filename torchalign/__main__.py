"""``python -m torchalign``: the command line."""

import sys

from torchalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
