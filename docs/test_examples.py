"""The examples of the pages, of the README and of docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import relprop
from relprop.methods import METHODS

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "```python" in path.read_text(encoding="utf-8")]
MODULES = [path for path in sorted((ROOT / "relprop").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]

pytestmark = pytest.mark.filterwarnings("ignore")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of `python` run one after the other; those of other packages' code are `py`, and only shown."""
    monkeypatch.chdir(tmp_path)  # where they write
    document = Sybil([PythonCodeBlockParser(doctest_optionflags=FLAGS)]).parse(path)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    found = doctest.testmod(module, optionflags=FLAGS)
    assert found.attempted and not found.failed


def test_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in relprop.__all__ if not re.search(rf":: relprop\.(\w+\.)?{name}\b", text)] == []


def test_every_method_has_its_part() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^```{method-card} (\w+)$", text, re.MULTILINE)) == sorted(METHODS)


def test_notebook_has_no_outputs() -> None:
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


def test_citation_names_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {relprop.__version__}\n" in text
