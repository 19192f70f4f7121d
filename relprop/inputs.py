"""What an engine is given, held to what it was made for: the model's state and place, a call's arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relprop.capture import Captured
from relprop.capture.export import InputSpec, bind_arguments
from relprop.capture.reasons import check_own_call
from relprop.errors import (
    DeviceError,
    DTypeError,
    ModelStateError,
    NonFiniteError,
    OptionError,
    RelpropError,
    ShapeError,
)
from relprop.graph import Graph


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that torch.compile, DataParallel or DistributedDataParallel wraps.

    Raises:
        OptionError: TorchScript, whose code torch.export does not see.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(
            f"model: expected a torch.nn.Module with its Python code, got TorchScript ({type(model).__name__}); give"
            " the module that it was traced or scripted from"
        )
    inner = _inside(model)
    return model if inner is None else unwrapped(inner)


def _inside(model: nn.Module) -> nn.Module | None:
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return model._modules.get("module" if parallel else "_orig_mod")  # the latter is torch.compile's


@contextlib.contextmanager
def telling_own_errors(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Where a pass fails because the model itself does not take these inputs, say so: ids beyond its vocabulary, say.

    Raises:
        InputError: instead of the pass's error, where the model raises one of its own.
    """
    try:
        yield
    except (RelpropError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        if "memory" not in str(error):
            check_own_call(model, args, kwargs)
        raise


def check_mode(model: nn.Module) -> None:
    """Raises:
    ModelStateError: a part of the model is in training mode.
    """
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ModelStateError(
            f"{type(model).__name__}: expected a model in evaluation mode, got {len(training)} module(s) in training"
            f" mode, the first {training[0]!r}; call model.eval()"
        )


def check_weights(model: nn.Module) -> None:
    """Raises:
    ModelStateError: bitsandbytes holds weights, in a form that torch.export cannot see through.
    """
    packed = [(name, type(p).__name__) for name, p in model.named_parameters() if _package(p) == "bitsandbytes"]
    if packed:
        (name, kind), count = packed[0], len(packed)
        raise ModelStateError(
            f"{type(model).__name__}: expected weights that torch.export sees through, got {count} of bitsandbytes, the"
            f" first {name!r} ({kind}); call model.dequantize(), or quantise with torchao's Int8WeightOnlyConfig"
        )


def _package(tensor: Tensor) -> str:
    return type(tensor).__module__.split(".")[0]


def placement(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.device, torch.dtype]:
    """Where a model and its example inputs are, and the dtype of its streams.

    Raises:
        DeviceError: they are on several devices.
    """
    tensors = [*model.parameters(), *model.buffers()]
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise DeviceError(
            f"model: expected all weights on one device, got {', '.join(sorted(map(str, devices)))}; load a model that"
            ' device_map spreads or offloads with device_map={"": device}, or move it with model.to(device)'
        )
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = devices.pop() if devices else (given[0].device if given else torch.device("cpu"))
    for tensor in given:
        if tensor.device != device:
            raise DeviceError(f"example inputs: expected tensors on {device}, where the model is, got {tensor.device}")
    floating = {t.dtype for t in tensors if t.dtype.is_floating_point} or {torch.float32}
    return device, torch.float64 if torch.float64 in floating else torch.float32


def bind_inputs(
    model: nn.Module, captured: Captured, graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int, Tensor]:
    """Inputs by value index, checked against the capture.

    Args:
        args, kwargs: as the model takes them.
    Raises:
        ModelStateError: the model is in training mode. ShapeError: names, structure or sizes of the inputs.
        OptionError: another plain value than when compiled. DTypeError, DeviceError, NonFiniteError: a tensor.
    """
    if model.training:
        raise ModelStateError(f"{type(model).__name__}: expected a model in evaluation mode, got one in training mode")
    named = bind_arguments(model, args, dict(kwargs))
    given, expected = set(named), set(captured.signature)
    if given != expected:
        raise ShapeError(f"inputs: expected {', '.join(sorted(expected))}, got {', '.join(sorted(given)) or 'none'}")
    leaves, spec = pytree.tree_flatten({name: named[name] for name in captured.signature})
    if spec != captured.in_spec:
        raise ShapeError(f"inputs: expected the structure {captured.in_spec}, got {spec}")
    tensors = []
    for leaf, plain in zip(leaves, captured.in_leaves, strict=True):
        if plain is None and isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif plain != leaf:
            raise OptionError(f"inputs: expected {plain!r} as when compiled, got {leaf!r}; compile again for it")
    bound: dict[int, Tensor] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for spec_, tensor in zip(captured.inputs, tensors, strict=True):
        _check_input(spec_, tensor, sizes)
        value = graph.inputs.get(spec_.placeholder)
        if value is not None:
            bound[value.index] = tensor
    return bound


def _check_input(spec: InputSpec, tensor: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
    """Hold a tensor to its capture. sizes: of the inputs before it, by the capture's names, with the input's path."""
    if tensor.device != spec.device:
        raise DeviceError(f"input {spec.path}: expected a tensor on {spec.device}, got one on {tensor.device}")
    if tensor.dtype != spec.dtype:
        raise DTypeError(f"input {spec.path}: expected {spec.dtype}, got {tensor.dtype}")
    names = ["B" if i == 0 else "N" for i in range(len(spec.shape))]
    expected = "[" + ", ".join(names[i] if s is None else str(s) for i, s in enumerate(spec.shape)) + "]"
    fits = tensor.ndim == len(spec.shape) and all(
        want is None or want == size for want, size in zip(spec.shape, tensor.shape, strict=False)
    )
    if not fits or 0 in tensor.shape:
        raise ShapeError(f"input {spec.path}: expected shape {expected}, got {list(tensor.shape)}")
    for axis, (want, name) in enumerate(zip(spec.shape, spec.sizes, strict=True)):
        if want is None:
            size, first = sizes.setdefault(name, (tensor.shape[axis], spec.path))
            if tensor.shape[axis] != size:
                what = "tokens" if axis else "samples"
                raise ShapeError(f"input {spec.path}: expected {size} {what} as in {first}, got {tensor.shape[axis]}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        finite = torch.isfinite(tensor).reshape(tensor.shape[0], -1).all(-1)
        bad = torch.nonzero(~finite).flatten().tolist()
        raise NonFiniteError(f"input {spec.path}: expected finite numbers, got NaN or infinity in sample(s) {bad}")
