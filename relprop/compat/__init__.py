"""relprop under other packages' signatures, one module per package: change the import, keep the code.

chefer: the authors' code of Transformer-Explainability and of Transformer-MM-Explainability; chefer_multimodal: the
latter's for two modalities alone, where `Generator` is DETR's. captum, gradcam, lxt, quantus, zennit: the packages of
these names. A module is imported when it is first used; what it needs beyond relprop is named in the error that says
so.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("captum", "chefer", "chefer_multimodal", "gradcam", "lxt", "quantus", "zennit")

__all__ = ["captum", "chefer", "chefer_multimodal", "gradcam", "lxt", "quantus", "zennit"]


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(_MODULES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
