"""Why a model cannot be captured: what in it prevents that, where, and what its user can do."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.utils import _pytree as pytree

from relprop.errors import InputError

_FOREIGN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep, "<")
_STANDARD = os.path.dirname(os.__file__) + os.sep  # site-packages may lie in it

_BRANCH = "a branch or a size depends on the values of a tensor"


def export_failure(model: nn.Module, error: BaseException) -> str:
    """The message for an error that torch.export raised."""
    place = model_line(error)
    where = f" at {place}" if place else ""
    what, remedy = _kind(error)
    if what == _BRANCH and any(t.dtype == torch.float16 for t in model.parameters()):
        remedy += "; some models take such a branch in float16 alone, and can be captured in bfloat16"
    return (
        f"torch.export could not capture {type(model).__name__}: {what}{where}: {_first_line(error)}. Expected"
        f" {remedy}. The cause is in this error's __cause__"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _kind(error: BaseException) -> tuple[str, str]:
    """What stands in the way, and what is expected instead."""
    text = str(error)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text:
        return (
            _BRANCH,
            "a forward without control flow that depends on them; choose with torch.where, keep sizes fixed with a"
            " mask, or explain the part of the model after that choice",
        )
    if "fake impl" in text or "Meta kernel" in text or "meta kernel" in text:
        return (
            "a custom operation does not say which shape it returns",
            "one that does; register that with torch.library.register_fake, and a rule for it with"
            " relprop.register_rule, or use the model's plain PyTorch path",
        )
    if ".numpy()" in text or "data_ptr" in text or "tensor subclasses" in text:
        return (
            "the forward leaves PyTorch (NumPy, data pointers, an extension that takes no fake tensors)",
            "a forward of torch's operations; compute that part with torch, or before the model is called",
        )
    return (
        "its forward cannot be traced",
        "one that torch.export takes; torch.export.draft_export lists all places that stand in the way",
    )


def model_line(error: BaseException) -> str:
    """`file:line` of the innermost code of the model that an error came through; empty where there is none."""
    places = [f for f in traceback.extract_tb(error.__traceback__) if not _is_foreign(f.filename)]
    return f"{places[-1].filename}:{places[-1].lineno}" if places else ""


def _is_foreign(file: str) -> bool:
    """torch's, this package's, or Python's own."""
    return file.startswith(_FOREIGN) or (file.startswith(_STANDARD) and "site-packages" not in file)


def check_own_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Call a model as its user would, to tell an error of its own from one of explaining it.

    Raises:
        InputError: the model itself does not take these inputs.
    """
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        place = model_line(error)
        given = pytree.tree_flatten_with_path((args, dict(kwargs)))[0]
        tensors = [f"{_name(path)} {list(t.shape)} {t.dtype}" for path, t in given if isinstance(t, Tensor)]
        raise InputError(
            f"{type(model).__name__}: expected inputs that the model takes, got {', '.join(tensors) or 'no tensor'};"
            f" the model itself refuses them{f' at {place}' if place else ''}: {type(error).__name__}:"
            f" {_first_line(error)}"
        ) from error


def _name(path: Any) -> str:
    """An argument's name, or where it stands."""
    which, *inner = path
    return f"argument {inner[0].idx}" if which.idx == 0 else pytree.keystr(tuple(inner)).strip("[]'")


def sized_by_values(value: Any) -> bool:
    """Whether a fake value's shape depends on the values of a tensor."""
    return any(free_unbacked_symbols(t) for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


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
