"""Kernels run under Triton's interpreter here; the rest of the process does not notice.

The choice is made when `relprop.kernels.launch` is imported, so it is imported with TRITON_INTERPRET set, and the
variable is given back at once. Triton itself is imported before, as any other test would import it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is not None:
    importlib.import_module("triton")

    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("relprop.kernels.launch")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Triton, or where something imported the kernels for a GPU before, there is nothing to run here."""
    found = sys.modules.get("relprop.kernels.launch")
    if found is not None and found.interpreted:
        return
    why = "triton is not installed" if found is None else "the kernels were imported without the interpreter before"
    for item in items:
        if "tests/kernels/" in item.nodeid.replace("\\", "/") and "interpreter" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """What torch allocates and nothing has written to is NaN, however it was asked for.

    Launchers allocate results, and what one kernel leaves for the next, themselves.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled
