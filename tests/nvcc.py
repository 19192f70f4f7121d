"""nvcc as the build finds it, and the flags that it compiles relprop with: setup.py's own."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

SETUP: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "setup.py"), run_name="setup")
NVCC, NO_NVCC = SETUP["find_nvcc"]()  # its path, or an empty name and why there is none
