"""Backends: who runs a rule. `torch` is the rule itself and runs everything; the others hold kernels for some rules.

Capabilities are data: each backend says for a node, a rule, a dtype and a device whether it has a kernel, and if not,
all the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from relprop.backends import cpp, cpp_attention, forward, products, triton
from relprop.errors import BackendError, unknown_name
from relprop.graph import Node
from relprop.program import ChooseJoint, ForwardKernel, JointKernel, Kernel
from relprop.rules import Rule

BACKENDS = ("torch", "cpp", "triton")
_REASONS: dict[str, Callable[[torch.dtype, torch.device], list[str]]] = {
    "cpp": cpp.reasons_against,
    "triton": triton.reasons_against,
}
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
    wanted = _wanted(name, device)
    reasons = _REASONS[wanted](dtype, device) if wanted != "torch" else []
    if name != "auto" and reasons:
        raise BackendError(f"backend {name}: expected to run on {device} in {dtype}, but " + "; ".join(reasons))
    if reasons:
        text = f"backend {wanted} is not used: {'; '.join(reasons)}"
        if text not in _SAID:
            _SAID.add(text)
            _LOG.info(text)
    used = _used(name, dtype, device)
    if used == "torch":
        return lambda node, rule: ("torch", None)
    backend: Any = cpp if used == "cpp" else triton

    def choose(node: Node, rule: Rule) -> tuple[str, Kernel | None]:
        kernel = backend.KERNELS.get(type(rule))
        if kernel is None or backend.kernel_reasons(node, rule):
            return "torch", None
        return used, kernel

    return choose


def _wanted(name: str, device: torch.device) -> str:
    """The backend that a name stands for on a device."""
    if name != "auto":
        return name
    # The GPU kernels are not chosen unasked before they have been measured on a GPU.
    return "torch" if device.type == "cuda" else "cpp"


def _used(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that runs where an automatic choice gives way to torch."""
    wanted = _wanted(name, device)
    return "torch" if wanted == "torch" or _REASONS[wanted](dtype, device) else wanted


def choose_forward(
    name: str, dtype: torch.dtype, device: torch.device, precision: str
) -> Callable[[Node], ForwardKernel | None]:
    """A chooser of forward kernels for a plan: None leaves an operation to the model's own.

    Only `precision="medium"` changes the numbers of the forward pass. Its linear layers then multiply what their
    relevance rules will multiply, so that the parts of a z+ come from the same numbers.
    """
    if _used(name, dtype, device) != "cpp":
        return lambda node: None

    def choose(node: Node) -> ForwardKernel | None:
        if node.kind == "linear" and precision == "medium":
            return products.forward
        return forward.run if forward.takes(node) else None

    return choose


def choose_joint(name: str, dtype: torch.dtype, device: torch.device) -> ChooseJoint:
    """A chooser of kernels that take all streams of an operation at once; arguments as in `choose_backend`."""
    used = _used(name, dtype, device)

    def choose(node: Node, rules: Mapping[str, Rule], edge: str | None) -> tuple[str, JointKernel] | None:
        if used == "triton":
            kernel = triton.joint_kernel(node, rules, edge)
            return None if kernel is None else ("triton (joint)", kernel)
        if used != "cpp" or node.kind != "attention" or cpp_attention.kernel_reasons(node, rules, edge):
            return None
        return "cpp (tiles)", cpp_attention.attention

    return choose


def backends() -> dict[str, str]:
    """Every backend and, where it cannot run on this machine, why."""
    found = {"torch": "available"}
    for name, (usable, reason) in (("cpp", cpp.available()), ("triton", triton.available())):
        found[name] = "available" if usable else f"unavailable: {reason}"
    return found


__all__ = ["BACKENDS", "backends", "choose_backend", "choose_forward", "choose_joint"]
