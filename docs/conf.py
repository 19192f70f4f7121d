"""The site: `make docs`. Nothing is fetched: no inventories of other projects, no fonts or scripts from elsewhere."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = Path(__file__).parent / "_generated"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "extensions")]

import relprop  # noqa: E402

project = "relprop"
author = copyright = "relprop contributors"
release = version = relprop.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docstrings",
    "methods",
    "pictures",
    "rows",
]
exclude_patterns = ["_build", "extensions"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars that miss their widgets

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_custom_sections = [("Conservation", "returns_style"), "Source"]
default_role = "code"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"relprop {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"sidebar_hide_name": False}

GENERATED.mkdir(exist_ok=True)
shutil.copy(ROOT / "notebooks" / "quickstart.ipynb", GENERATED / "quickstart.ipynb")
