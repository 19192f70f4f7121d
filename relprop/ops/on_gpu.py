"""The custom ops on a GPU: tables from op to the launchers of its CUDA and of its Triton kernel.

A launcher has the op's own signature. Where both kernels take a call, the one that was measured to be the faster runs
(`choices.json`, which the engine's steps are chosen by too), CUDA's where nothing was measured; what was measured to be
slower than plain PyTorch does not run. Ops without a kernel, and calls that no kernel takes (float64, layer tensors of
different dtypes, heads too large for the device), run `relprop.ops.reference`. `relprop info` says which ops have a
kernel. Left out are the elementwise halves of the linear rules, which on a GPU are inside the products' kernels, and
what is a product and nothing else (`linear_apply`); shares of a product and of maps of attention have CUDA's alone, for
Triton has them inside attention's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relprop import native_cuda
from relprop.native_cuda import Back
from relprop.native_cuda.attention_relevance import largest_head
from relprop.ops import attention, on_triton
from relprop.torch_flags import exact_products

_FACTORS = (torch.float32, torch.bfloat16)


def _stabilised(kernel: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """A kernel whose last arguments are `names`, then the stabiliser's kind and epsilon."""

    def call(*arguments: Any) -> Any:
        count = len(arguments) - len(names) - 2
        options = dict(zip(names, arguments[count:], strict=False))
        return kernel(*arguments[:count], stabiliser=tuple(arguments[-2:]), **options)

    return call


def _add(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """One whose kernel wants b for every sample."""

    def call(relevance: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Any:
        shared = a.dim() > 0 and b.shape == (1, *a.shape[1:])
        return kernel(relevance, a, b.expand(a.shape) if shared else b, *rest)

    return call


def _attention_shares(attention: Tensor, sv: Tensor, dots: Tensor, kind: int, epsilon: float) -> Any:
    return native_cuda.attention_shares(attention, sv, dots, stabiliser=(kind, epsilon), want_relevance=True)


def _product(operands: torch.dtype) -> str:
    return "float32" if operands is torch.float32 else "bfloat16"


def _factors(operands: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """In one dtype that the product takes: as they are, or in float32, from which it rounds."""
    dtypes = {tensor.dtype for tensor in tensors}
    takes = _FACTORS if operands is torch.bfloat16 else (*_FACTORS, torch.float16)
    return list(tensors) if len(dtypes) == 1 and dtypes <= set(takes) else [tensor.float() for tensor in tensors]


def _transpose(stream: Tensor, weight: Tensor, operands: torch.dtype) -> Tensor:
    (weight,) = _factors(operands, weight)
    return native_cuda.linear_back([Back(stream)], None, weight, product=_product(operands))[0]


def _share_out_product(
    relevance: Tensor, x: Tensor, weight: Tensor, y: Any, bias: Any, operands: torch.dtype, *rest: Any
) -> Tensor:
    """In float32 z+ is made of y; of bfloat16 factors it is summed by itself, from products of which none cancels."""
    alpha, tolerance, kind, epsilon = rest
    if operands is torch.float32:
        x, weight = x.float(), weight.float()
        if y is None:
            with exact_products():
                y, bias = torch.nn.functional.linear(x, weight), None
    else:
        x, weight = _factors(operands, x, weight)
        y = bias = None
    return native_cuda.linear_alpha_beta_share_out(
        relevance,
        x,
        weight,
        y,
        bias,
        product=_product(operands),
        stabiliser=(kind, epsilon),
        alpha=alpha,
        tolerance=tolerance,
    )[0]


def _back_product(shares: Tensor, x: Tensor, weight: Tensor, operands: torch.dtype) -> Tensor:
    x, weight = _factors(operands, x, weight)
    return native_cuda.linear_back([Back(shares, shares, 0.5, 0.5)], x, weight, product=_product(operands))[0]


def _attention(*arguments: Any) -> list[Tensor]:
    """With an additive mask and a row in float32."""
    q, k, v, output, mask, gradient, relevance, row, *rest = arguments
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    row = None if row is None else row.float()
    return attention.through(native_cuda.attention_relevance, q, k, v, output, mask, gradient, relevance, row, *rest)


CUDA: dict[str, Callable[..., Any]] = {
    "linear_transpose": _transpose,
    "linear_alpha_beta_share_out_product": _share_out_product,
    "linear_alpha_beta_back_product": _back_product,
    "add_normalised": _stabilised(native_cuda.add_normalised),
    "add_epsilon": _add(_stabilised(native_cuda.add_epsilon)),
    "add_gamma": _add(_stabilised(native_cuda.add_gamma, "gamma")),
    "fanout_epsilon": _stabilised(native_cuda.fanout_epsilon),
    "matmul_half_share": _stabilised(native_cuda.share),
    "matmul_half_attention_shares": _attention_shares,
    "attention_relevance": _attention,
    "softmax_taylor": native_cuda.softmax_taylor,
    "activation_gradient": lambda gradient, x, name: native_cuda.activation_gradient(gradient, x, activation=name),
    "norm_gradient": lambda gradient, x, weight, norm, epsilon: native_cuda.norm_gradient(
        gradient, x, weight, norm=norm, epsilon=epsilon
    ),
}
TRITON = on_triton.LAUNCHERS
# An operation and its rule, as `choices.json` has them; a share alone, and maps of attention, are parts of a step.
STEPS = {
    "linear_transpose": ("linear", "gradient"),
    "linear_alpha_beta_share_out_product": ("linear", "alpha_beta"),
    "linear_alpha_beta_back_product": ("linear", "alpha_beta"),
    "add_normalised": ("add", "normalised"),
    "add_epsilon": ("add", "epsilon"),
    "add_gamma": ("add", "gamma"),
    "fanout_epsilon": ("fanout", "epsilon"),
    "attention_relevance": ("attention", "composed"),
    "softmax_taylor": ("softmax", "taylor"),
    "activation_gradient": ("activation", "gradient"),
    "norm_gradient": ("norm", "gradient"),
    "norm_sigma_constant": ("norm", "sigma_constant"),
}
STREAMS = {"relevance", "relevances", "gradient", "sv", "shares", "stream"}


def launcher(name: str, arguments: dict[str, Any]) -> Callable[..., Any] | None:
    """The kernel that runs this call of an op with these arguments by name, None for the reference."""
    found: dict[str, Callable[..., Any]] = {}
    if (name in CUDA or name in TRITON) and _taken(name, arguments):
        if name in CUDA and native_cuda.available()[0] and _cuda_takes(name, arguments):
            found["cuda"] = CUDA[name]
        if name in TRITON and _triton_runs(arguments) and on_triton.takes(name, arguments):
            found["triton"] = TRITON[name]
    measured = _measured(name, arguments) if found else ""
    if measured == "torch":
        return None
    return found.get(measured) or next(iter(found.values()), None)


def _first(arguments: dict[str, Any]) -> Tensor:
    """The first tensor of a call."""
    tensors = (item[0] if isinstance(item, list) and item else item for item in arguments.values())
    return next(item for item in tensors if isinstance(item, Tensor))


def _triton_runs(arguments: dict[str, Any]) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from relprop.kernels.launch import unusable

    return not unusable(_first(arguments).device)


def _measured(name: str, arguments: dict[str, Any]) -> str:
    """The backend that the table names for the step that this op is of; empty where nothing was measured."""
    device = _first(arguments).device
    if name not in STEPS or device.type != "cuda":
        return ""
    from relprop.backends import choices

    streams = [item for key, item in arguments.items() if key in STREAMS and item is not None]
    stream = (streams[0][0] if isinstance(streams[0], list) else streams[0]) if streams else None
    batch = stream.shape[1] if stream is not None and stream.dim() > 1 else 1
    return choices.choices_for(device)[0].get(choices.key(*STEPS[name], _layer_dtype(arguments), batch), "")


def _layer_dtype(arguments: dict[str, Any]) -> torch.dtype:
    """Of the model: of what is multiplied, or of the first tensor that is no stream."""
    operands: torch.dtype | None = arguments.get("operands")
    tensors = (item for key, item in arguments.items() if key not in STREAMS and isinstance(item, Tensor))
    return operands or next(tensors).dtype


def _cuda_takes(name: str, arguments: dict[str, Any]) -> bool:
    if "relevances" in arguments:
        return len(arguments["relevances"]) <= native_cuda.most_readers()
    if name == "attention_relevance":
        heads = [arguments[key] for key in "qv" if arguments[key].dim() == 4]
        return all(t.shape[3] <= largest_head(t.dtype, t.device) for t in heads)
    return True


def _taken(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the dtypes, numbers and sizes of a call are the kernel's; the reference names what no kernel takes."""
    given: dict[str, list[Tensor]] = {
        key: item if isinstance(item, list) else [item]
        for key, item in arguments.items()
        if isinstance(item, (Tensor, list)) and (isinstance(item, Tensor) or (item and isinstance(item[0], Tensor)))
    }
    flowing = [tensor for key, tensors in given.items() if key in STREAMS for tensor in tensors]
    layer = [tensor for key, tensors in given.items() if key not in STREAMS | {"mask", "row"} for tensor in tensors]
    if "operands" in arguments:
        return _product_taken(arguments, flowing, layer)
    values, moving = {tensor.dtype for tensor in layer}, {tensor.dtype for tensor in flowing}
    if len(values) != 1 or not values <= set(native_cuda.DTYPES) or len(moving) > 1:
        return False
    if not moving <= {torch.float32, *values}:
        return False
    if "relevances" in arguments:
        return len(arguments["relevances"]) > 0
    if name == "attention_relevance":
        others = [tensor for key in ("mask", "row") for tensor in given.get(key, [])]
        return all(tensor.dtype in (torch.bool, *native_cuda.DTYPES) for tensor in others)
    return True


def _product_taken(arguments: dict[str, Any], streams: list[Tensor], layer: list[Tensor]) -> bool:
    """Streams, y and the bias in float32, factors in what the kernels multiply, of shapes that fit."""
    weight, x = arguments["weight"], arguments.get("x")
    y, bias = arguments.get("y"), arguments.get("bias")
    fits = weight.dim() == 2 and (x is None or (x.dim() > 0 and x.shape[-1] == weight.shape[1]))
    if not fits or arguments["operands"] not in _FACTORS:
        return False
    single = [*streams, *(tensor for tensor in (y, bias) if tensor is not None)]
    return (
        (y is None or y.shape == (*arguments["x"].shape[:-1], weight.shape[0]))
        and (bias is None or bias.shape == weight.shape[:1])
        and all(tensor.dtype is torch.float32 for tensor in single)
        and all(tensor.dtype in native_cuda.DTYPES for tensor in layer)
        and all(tensor.device == weight.device for tensor in (*single, *layer))
    )
