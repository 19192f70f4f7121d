"""The custom ops on Triton's kernels: launchers with the ops' own signatures.

Kernels are imported when the first one is needed. A linear layer's products take their operands as the op says: float32
in three tf32 products, or bfloat16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relprop.native.norm import ACTIVATIONS, NORMS
from relprop.ops import attention

LARGEST_HEAD = 256  # channels
LONGEST_ROW = 8192  # of a norm
_QK = {"half": "half", "positive": "alpha_beta", "detached": "none"}


def _kernel(name: str, module: str = "") -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(f"relprop.kernels.{module or name}"), name)
    return found


def _add(name: str) -> Callable[..., Any]:
    """One of relevance, a, b and a stabiliser; a `b` that all samples share is read as it is."""

    def call(relevance: Tensor, a: Tensor, b: Tensor, kind: int, epsilon: float) -> tuple[Tensor, Tensor]:
        first, second = _kernel(name)(relevance, a, b, stabiliser=(kind, epsilon))[:2]
        return first, second

    return call


def _add_gamma(
    relevance: Tensor, a: Tensor, b: Tensor, gamma: float, kind: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    parts: tuple[Tensor, Tensor] = _kernel("add_gamma")(relevance, a, b, gamma=gamma, stabiliser=(kind, epsilon))
    return parts


def _fanout_epsilon(relevances: list[Tensor], x: Tensor, kind: int, epsilon: float) -> Tensor:
    found: Tensor = _kernel("fanout_epsilon")(relevances, x, stabiliser=(kind, epsilon))
    return found


def _norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor | None, norm: str, epsilon: float) -> Tensor:
    found: Tensor = _kernel("norm_gradient")(gradient, x, weight, kind=norm, eps=epsilon)
    return found


def _norm_sigma_constant(relevance: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    norm, norm_epsilon, kind, epsilon = rest
    options = {"kind": norm, "eps": norm_epsilon, "stabiliser": (kind, epsilon)}
    found: Tensor = _kernel("norm_sigma_constant")(relevance, x, y, weight, **options)
    return found


def _transpose(stream: Tensor, weight: Tensor, operands: torch.dtype) -> Tensor:
    found: Tensor = _kernel("linear_back")(None, None, None, weight.to(operands), stream)[1]
    return found


def _share_out_product(
    relevance: Tensor, x: Tensor, weight: Tensor, y: Any, bias: Any, operands: torch.dtype, *rest: Any
) -> Tensor:
    """In float32 z+ is made of y; of bfloat16 factors it is summed by itself, from products of which none cancels."""
    alpha, tolerance, kind, epsilon = rest
    if y is None or operands is torch.bfloat16:
        y = bias = None
    share_out = _kernel("linear_alpha_beta_share_out", "linear_alpha_beta")
    options = {"alpha": alpha, "tolerance": tolerance, "stabiliser": (kind, epsilon)}
    found: Tensor = share_out(relevance, x.to(operands), weight.to(operands), y, bias, **options)[0]
    return found


def _back_product(shares: Tensor, x: Tensor, weight: Tensor, operands: torch.dtype) -> Tensor:
    """What is multiplied is rounded inside the kernel where x, which chooses and scales, is not of that dtype."""
    back, precision = _kernel("linear_alpha_beta_back", "linear_alpha_beta"), "highest"
    if {x.dtype, weight.dtype} != {operands}:
        x, weight = x.float(), weight.float()
        precision = "highest" if operands is torch.float32 else "medium"
    found: Tensor = back(shares, shares, x, weight, precision=precision)[0]
    return found


def _attention_relevance(
    q: Tensor, k: Tensor, v: Tensor, *, output: Tensor, exact_output: bool, qk: str, relevances_wanted: Any, **rest: Any
) -> Any:
    wanted = (False, False, relevances_wanted[2]) if qk == "detached" else relevances_wanted
    return _kernel("attention_relevance")(q, k, v, output, qk=_QK[qk], relevances_wanted=wanted, **rest)


def _attention(*arguments: Any) -> list[Tensor]:
    parts = attention.through(_attention_relevance, *arguments)
    return [attention.token_by_token(part) if part.dim() == 5 else part for part in parts]


LAUNCHERS: dict[str, Callable[..., Any]] = {
    "linear_transpose": _transpose,
    "linear_alpha_beta_share_out_product": _share_out_product,
    "linear_alpha_beta_back_product": _back_product,
    "add_normalised": _add("add_normalised"),
    "add_epsilon": _add("add_epsilon"),
    "add_gamma": _add_gamma,
    "fanout_epsilon": _fanout_epsilon,
    "attention_relevance": _attention,
    "softmax_taylor": lambda relevance, logits, probabilities: _kernel("softmax_taylor")(
        relevance, logits, probabilities
    ),
    "activation_gradient": lambda gradient, x, name: _kernel("activation_gradient")(gradient, x, name),
    "norm_gradient": _norm_gradient,
    "norm_sigma_constant": _norm_sigma_constant,
}


def takes(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a call whose dtypes fit has the kernel's sizes and options; the reference names what no kernel takes.

    Attention's kernel reads the gradient's own O where CUDA's computes it anew: it wants one that was not rounded.
    """
    if name == "attention_relevance":
        return _attention_taken(arguments)
    if name in ("norm_gradient", "norm_sigma_constant"):
        x, epsilon = arguments["x"], arguments["norm_epsilon"]
        known = arguments["norm"] in NORMS and 0.0 <= epsilon < float("inf")
        return known and x.dim() > 0 and x.shape[-1] <= LONGEST_ROW
    if name == "activation_gradient":
        return arguments["activation"] in ACTIVATIONS
    if name == "add_normalised":
        return bool(arguments["a"].dim() > 0)
    if name == "softmax_taylor":
        return bool(arguments["logits"].dim() > 0)
    if name == "linear_transpose":
        passed, weight = arguments["stream"], arguments["weight"]
        return bool(passed.dim() > 1 and passed.shape[-1] == weight.shape[0])
    if "operands" in arguments:
        stream: Tensor = arguments["relevance" if "relevance" in arguments else "shares"]
        return stream.shape[1:] == (*arguments["x"].shape[:-1], arguments["weight"].shape[0])
    return True


def _attention_taken(arguments: dict[str, Any]) -> bool:
    q, v = arguments["q"], arguments["v"]
    row: Any = arguments["row"]
    streams = [arguments[name] for name in ("gradient", "relevance") if arguments[name] is not None]
    if arguments["output"] is None or (arguments["gradient"] is not None and not arguments["exact_output"]):
        return False
    if arguments["qk"] not in _QK or any(t.dim() != 4 or not 0 < t.shape[3] <= LARGEST_HEAD for t in (q, v)):
        return False
    # Its own row of every target would be read for all of them.
    if arguments["edge"] != "attention" or row is None or not streams:
        return True
    return bool(row.shape[0] == streams[0].shape[0])
