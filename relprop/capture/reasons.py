"""Why a model cannot be captured: what in it prevents that, where, and what its user can do."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

_FOREIGN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


def export_failure(model: str, error: BaseException) -> str:
    """The message for an error that torch.export raised."""
    first = str(error).strip().split("\n")[0] or type(error).__name__
    place = model_line(error)
    where = f" at {place}" if place else ""
    what, remedy = _kind(error)
    return (
        f"torch.export could not capture {model}: {what}{where}: {first}. Expected a forward without control flow that"
        f" depends on tensor values; {remedy}. The cause is in this error's __cause__"
    )


def _kind(error: BaseException) -> tuple[str, str]:
    text = str(error)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text:
        return (
            "a branch or a size depends on the values of a tensor",
            "choose with torch.where, keep sizes fixed with a mask, or explain the part of the model after that choice",
        )
    if "fake impl" in text or "Meta kernel" in text or "meta kernel" in text:
        return (
            "a custom operation does not say which shape it returns",
            "register that with torch.library.register_fake, and a rule for it with relprop.register_rule, or use the"
            " model's plain PyTorch path",
        )
    if ".numpy()" in text or "data_ptr" in text or "tensor subclasses" in text:
        return (
            "the forward leaves PyTorch (NumPy, data pointers, an extension that takes no fake tensors)",
            "compute that part with torch, or before the model is called",
        )
    return ("its forward cannot be traced", "torch.export.draft_export lists all places that stand in the way")


def model_line(error: BaseException) -> str:
    """`file:line` of the model's code that an error came through, innermost; empty where there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*_FOREIGN, "<"))]
    inside = [f for f in frames if f.name not in ("<module>",)]
    return f"{inside[-1].filename}:{inside[-1].lineno}" if inside and inside[-1].name == "forward" else ""


def first_fixed(graph: fx.Graph, batch: int) -> fx.Node | None:
    """The first operation that takes samples apart, else the first that holds the example's batch size as a number."""

    def holds(argument: Any) -> bool:
        if isinstance(argument, (list, tuple)):
            return any(holds(item) for item in argument)
        return argument == batch and isinstance(argument, int) and not isinstance(argument, bool)

    calls = [n for n in graph.nodes if n.op == "call_function"]
    apart = (n for n in calls if n.target is torch.ops.aten.unbind.int and (*n.args, 0)[1] == 0)
    apart = (n for n in apart if n.args[0].meta["val"].shape[0] == batch)
    return next(apart, None) or next((n for n in calls if holds(n.args)), None)
