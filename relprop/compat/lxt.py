"""LXT's way of working, without patched classes: the model's own backward pass carries relevance.

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, x = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
>>> from relprop.compat import lxt
>>> with lxt.attnlrp(model):
...     logits = model(x.requires_grad_())
...     logits[0, 3].backward()
>>> relevance = x * x.grad

Inside the block this one model, in this thread, runs with AttnLRP's modified gradients. Nothing else changes: other
models of the same class, other threads, and the model itself after the block. As it is plain autograd, hooks see
relevance's gradients, and parameters get theirs.

Losses on relevance can be trained. With `create_graph=True` relevance is a differentiable function of inputs and
parameters, to any order: slopes of activations, spreads of norms, attention and gates, which rules hold constant while
relevance is passed down, have their own derivatives. A backward pass through recorded relevance takes plain derivatives
of all that the model computed, for other losses in that pass too. At an activation's input of exactly 0 the slope is 0,
and so is its derivative; what the model itself detaches stays constant. torch has no second derivative of fused
attention: compute such relevance under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. (LXT saves slopes and spreads
as constants: its gradients of such a loss lack their part.)

Rules come from a composite of relprop: what `relprop.explain(model, x, method="attnlrp")` gives is the same, from
compiled kernels; use that where nothing but the relevance is needed.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from relprop.compat.lxt_gradients import RelevanceMode, Rules
from relprop.composites import Composite, find_composite
from relprop.errors import ModelStateError, OptionError

__all__ = ["attnlrp", "cp_lrp", "libragrad", "modified_gradients"]

Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def modified_gradients(model: Model, composite: str | Composite = "attnlrp") -> Iterator[Model]:
    """Within the block, backward passes through this model are relevance passes: R = x * x.grad.

    Args:
        model: only calls of it, `model(...)`, in this thread are affected; a block without any ends with a warning.
        composite: "attnlrp", "cp_lrp", "libragrad", or one with their rules.
    Raises:
        OptionError: a composite with rules that are no modified gradients here.
        ModelStateError: gradient checkpointing, whose second forward pass would run without the rules, or a model
            that torch.compile has wrapped.
        UnsupportedOpError: the model is called and computes something that is neither linear nor has a rule.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    block = _Block(model, Rules(find_composite(composite)))
    for name, module in model.named_modules():
        _check_runs_as_written(name or type(model).__name__, module)
    _hook(model)
    _ACTIVE.set(MappingProxyType({**_ACTIVE.get(), id(block): block}))
    try:
        yield model
        if not block.called:
            warnings.warn(
                f"modified gradients: expected a call of this {type(model).__name__} in the block and its thread, got"
                " none; calls of its methods or submodules and of what torch.compile made of it have plain gradients",
                RuntimeWarning,
                stacklevel=3,
            )
    finally:
        _ACTIVE.set(MappingProxyType({key: one for key, one in _ACTIVE.get().items() if one is not block}))
        _unhook(model)
        _THREAD.go_on([call for call in _THREAD.calls if call is not block])  # where an interrupt has skipped the hook


def _check_runs_as_written(name: str, module: nn.Module) -> None:
    again = getattr(module, "grad_checkpointing", False) or (
        getattr(module, "gradient_checkpointing", False) and module.training
    )
    if again:
        raise ModelStateError(f"{name}: expected no gradient checkpointing, got it switched on")
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise ModelStateError(f"{name}: expected a module that torch.compile has not wrapped, got one that it has")


def attnlrp(model: Model) -> Any:
    """AttnLRP (Achtibat et al., ICML 2024), as LXT's efficient implementation has it; see `modified_gradients`."""
    return modified_gradients(model, "attnlrp")


def cp_lrp(model: Model) -> Any:
    """CP-LRP (Ali et al., ICML 2022): softmax and gates held constant; see `modified_gradients`."""
    return modified_gradients(model, "cp_lrp")


def libragrad(model: Model) -> Any:
    """LibraGrad (Mehri et al., CVPR 2025); see `modified_gradients`."""
    return modified_gradients(model, "libragrad")


@dataclass(eq=False)
class _Block:
    model: nn.Module
    rules: Rules
    called: bool = False


# Blocks of this context by their own id, the innermost last.
_ACTIVE: ContextVar[MappingProxyType[int, _Block]] = ContextVar("relprop_lxt", default=MappingProxyType({}))


class _Thread(threading.local):
    """Calls of models with rules that this thread is in, and the one mode that serves them all."""

    def __init__(self) -> None:
        self.mode: RelevanceMode | None = None
        self.calls: list[_Block] = []

    def open(self, block: _Block, inputs: list[Any]) -> None:
        if self.mode is None:
            weights = frozenset(id(weight) for weight in block.model.parameters())
            self.mode = RelevanceMode(block.rules, weights, inputs)
            self.mode.__enter__()
        self.go_on([*self.calls, block])

    def go_on(self, calls: list[_Block]) -> None:
        """With these calls alone."""
        self.calls = calls
        if self.mode is not None and calls:
            self.mode.rules = calls[-1].rules
        elif self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None


_THREAD = _Thread()


# By a model's id, how many blocks of all threads it is in, and the hooks that they share: these stay as they are while
# any thread calls the model in a block, as torch adds and removes a hook in several steps.
_HOOKS: dict[int, tuple[int, tuple[RemovableHandle, ...]]] = {}
_HOOKS_LOCK = threading.Lock()


def _hook(model: nn.Module) -> None:
    with _HOOKS_LOCK:
        blocks, hooks = _HOOKS.get(id(model), (0, ()))
        _HOOKS[id(model)] = (
            blocks + 1,
            hooks
            or (
                model.register_forward_pre_hook(_enter, with_kwargs=True),
                model.register_forward_hook(_leave, prepend=True, always_call=True),
            ),
        )


def _unhook(model: nn.Module) -> None:
    with _HOOKS_LOCK:
        blocks, hooks = _HOOKS.pop(id(model))
        if blocks > 1:
            _HOOKS[id(model)] = blocks - 1, hooks
            return
        for hook in hooks:
            hook.remove()


# Hooks are functions of this module, so that a model copied or pickled inside a block takes along nothing of it.
def _enter(module: nn.Module, args: Any, kwargs: Any = None) -> None:
    """Without kwargs it comes to threads that are in no block, from between two steps of another's."""
    if torch.compiler.is_dynamo_compiling():
        return
    block = next((block for block in reversed([*_ACTIVE.get().values()]) if block.model is module), None)
    if block is not None:
        block.called = True
        if not torch.compiler.is_compiling():
            _THREAD.open(block, pytree.tree_leaves((args, kwargs)))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _THREAD.calls and _THREAD.calls[-1].model is module:
        _THREAD.go_on(_THREAD.calls[:-1])
