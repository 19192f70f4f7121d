"""Backends: who runs a rule. `torch` is the rule itself and runs everything; the others hold kernels for some rules.

Capabilities are data: each backend says for a node, a rule, a dtype and a device whether it has a kernel, and if not,
all the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from relprop.backends import cpp, cpp_attention, products
from relprop.errors import BackendError, unknown_name
from relprop.graph import Node
from relprop.program import ChooseJoint, ForwardKernel, JointKernel, Kernel
from relprop.rules import Rule

BACKENDS = ("torch", "cpp")
_LOG = logging.getLogger("relprop")
_SAID: set[str] = set()


def choose_backend(
    name: str, dtype: torch.dtype, device: torch.device
) -> Callable[[Node, Rule], tuple[str, Kernel | None]]:
    """A chooser of kernels for a plan.

    Args:
        name: "auto" takes the fastest that can run; a backend's name asks for it where it has a kernel.
        dtype: of the streams.
        device: of the model.
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
        return lambda node, rule: ("torch", None)

    def choose(node: Node, rule: Rule) -> tuple[str, Kernel | None]:
        kernel = cpp.KERNELS.get(type(rule))
        if kernel is None or cpp.kernel_reasons(node, rule):
            return "torch", None
        return "cpp", kernel

    return choose


def choose_forward(
    name: str, dtype: torch.dtype, device: torch.device, precision: str
) -> Callable[[Node], ForwardKernel | None]:
    """A chooser of forward kernels for a plan: None leaves an operation to the model's own.

    Only `precision="medium"` changes the forward pass. Its linear layers then multiply what their relevance rules will
    multiply, so that the parts of a z+ come from the same numbers.
    """
    if precision != "medium" or name == "torch" or cpp.reasons_against(dtype, device):
        return lambda node: None
    return lambda node: products.forward if node.kind == "linear" else None


def choose_joint(name: str, dtype: torch.dtype, device: torch.device) -> ChooseJoint:
    """A chooser of kernels that take all streams of an operation at once; arguments as in `choose_backend`."""
    usable = name != "torch" and not cpp.reasons_against(dtype, device)

    def choose(node: Node, rules: Mapping[str, Rule], edge: str | None) -> tuple[str, JointKernel] | None:
        if not usable or node.kind != "attention" or cpp_attention.kernel_reasons(node, rules, edge):
            return None
        return "cpp (tiles)", cpp_attention.attention

    return choose


def backends() -> dict[str, str]:
    """Every backend and, where it cannot run on this machine, why."""
    usable, reason = cpp.available()
    return {"torch": "available", "cpp": "available" if usable else f"unavailable: {reason}"}


__all__ = ["BACKENDS", "backends", "choose_backend", "choose_forward", "choose_joint"]
