"""``python -m autoflip``: the same as the command ``autoflip``."""

import sys

from autoflip.cli import main

if __name__ == "__main__":
    sys.exit(main())
