"""Backends: who runs a rule. `torch` is the rule itself and runs everything; the others hold kernels for some rules.

Capabilities are data: each backend says for a node, a rule, a dtype and a device whether it has a kernel, and if not,
all the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from relprop.backends import cpp, cpp_attention, products
from relprop.errors import BackendError, unknown_name
from relprop.graph import Node
from relprop.program import ForwardKernel, JointKernel, Kernel, Kernels
from relprop.rules import Rule

BACKENDS = ("torch", "cpp")
_LOG = logging.getLogger("relprop")
_SAID: set[str] = set()


def choose_kernels(name: str, dtype: torch.dtype, device: torch.device, precision: str) -> Kernels:
    """The kernels that a plan may use.

    Args:
        name: "auto" takes the fastest that can run; a backend's name asks for it where it has a kernel.
        dtype: of the streams.
        device: of the model.
        precision: of the matrix products. Only "medium" changes the forward pass: its linear layers then multiply what
            their relevance rules will multiply, so that the parts of a z+ come from the same numbers.
    Raises:
        UnknownNameError: no such backend. BackendError: it cannot run here, with all the reasons.
    """
    if name not in (*BACKENDS, "auto"):
        raise unknown_name("backend", name, (*BACKENDS, "auto"))
    reasons = cpp.reasons_against(dtype, device)
    if name == "cpp" and reasons:
        raise BackendError(f"backend cpp: expected to run on {device} in {dtype}, but " + "; ".join(reasons))
    if name == "auto" and reasons:
        text = "; ".join(reasons)
        if text not in _SAID:
            _SAID.add(text)
            _LOG.info("backend cpp is not used: %s", text)
    if name == "torch" or reasons:
        return Kernels()
    if precision != "medium":
        return Kernels(_stream_kernel, _joint_kernel)
    return Kernels(_stream_kernel, _joint_kernel, _medium_forward)


def _stream_kernel(node: Node, rule: Rule) -> tuple[str, Kernel | None]:
    kernel = cpp.KERNELS.get(type(rule))
    if kernel is None or cpp.kernel_reasons(node, rule):
        return "torch", None
    return "cpp", kernel


def _joint_kernel(node: Node, rules: Mapping[str, Rule], edge: str | None) -> tuple[str, JointKernel] | None:
    if node.kind != "attention" or cpp_attention.kernel_reasons(node, rules, edge):
        return None
    return "cpp (tiles)", cpp_attention.attention


def _medium_forward(node: Node) -> ForwardKernel | None:
    return products.forward if node.kind == "linear" else None


def backends() -> dict[str, str]:
    """Every backend and, where it cannot run on this machine, why."""
    usable, reason = cpp.available()
    return {"torch": "available", "cpp": "available" if usable else f"unavailable: {reason}"}


__all__ = ["BACKENDS", "backends", "choose_kernels"]
