"""Backends: who runs a rule. `torch` is the rule itself and runs everything; the others hold kernels for some rules.

Capabilities are data: each backend says for a node, a rule, a dtype and a device whether it has a kernel, and if not,
all the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import ModuleType

import torch

from relprop.backends import cpp, cuda, products, triton, triton_fused
from relprop.backends import forward as forward_kernels
from relprop.errors import BackendError, unknown_name
from relprop.graph import Node
from relprop.program import ForwardKernel, JointKernel, Kernel, Kernels
from relprop.rules import Rule

# Each holds KERNELS by rule, `kernel_reasons`, `joint_kernel`, `reasons_against` and `available`.
_MODULES: dict[str, ModuleType] = {"cpp": cpp, "triton": triton, "cuda": cuda}
BACKENDS = ("torch", *_MODULES)
_LOG = logging.getLogger("relprop")
_SAID: set[str] = set()


def choose_kernels(name: str, dtype: torch.dtype, device: torch.device, precision: str = "highest") -> Kernels:
    """What a plan's steps run on.

    Args:
        name: "auto" takes the fastest that can run; a backend's name asks for it where it has a kernel.
        dtype: of the streams.
        device: of the model.
        precision: of matrix products.
    Raises:
        UnknownNameError: no such backend. BackendError: it cannot run here, with all the reasons.
    """
    if name not in (*BACKENDS, "auto"):
        raise unknown_name("backend", name, (*BACKENDS, "auto"))
    # The GPU kernels are not chosen unasked before they have been measured on a GPU.
    used = name if name != "auto" else "torch" if device.type == "cuda" else "cpp"
    if used == "torch":
        return Kernels()
    backend = _MODULES[used]
    reasons = backend.reasons_against(dtype, device)
    if name != "auto" and reasons:
        raise BackendError(f"backend {name}: expected to run on {device} in {dtype}, but " + "; ".join(reasons))
    if reasons:
        _say_once(f"backend {used} is not used: {'; '.join(reasons)}")
        return Kernels()

    def rule(node: Node, rule: Rule) -> tuple[str, Kernel | None]:
        kernel = backend.KERNELS.get(type(rule))
        if kernel is None or backend.kernel_reasons(node, rule):
            return "torch", None
        return used, kernel

    def joint(node: Node, rules: Mapping[str, Rule], edge: str | None) -> tuple[str, JointKernel] | None:
        kernel = backend.joint_kernel(node, rules, edge)
        return None if kernel is None else (f"{used} (joint)", kernel)

    def forward(node: Node) -> ForwardKernel | None:
        # Only `precision="medium"` changes the numbers of the forward pass. Its linear layers then multiply what their
        # relevance rules will multiply, so that the parts of a z+ come from the same numbers.
        if node.kind == "linear" and precision == "medium":
            return products.forward
        return forward_kernels.run if forward_kernels.takes(node) else None

    if used == "cpp":
        return Kernels(rule, joint, forward)
    return Kernels(rule, joint, fused=triton_fused.fused_step if used == "triton" else None)


def _say_once(text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        _LOG.info(text)


def backends() -> dict[str, str]:
    """Every backend and, where it cannot run on this machine, why."""
    found = {"torch": "available"}
    for name, backend in _MODULES.items():
        usable, reason = backend.available()
        found[name] = "available" if usable else f"unavailable: {reason}"
    return found


__all__ = ["BACKENDS", "backends", "choose_kernels"]
