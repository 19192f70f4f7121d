"""`python -m relprop` is the command `relprop`."""

from __future__ import annotations

import sys

from relprop.cli import main

if __name__ == "__main__":
    sys.exit(main())
