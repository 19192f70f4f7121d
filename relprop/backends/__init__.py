"""Backends: who runs a rule. `torch` is the rule itself and runs everything; the others hold kernels for some rules.

Capabilities are data: each backend says for a node, a rule, a dtype and a device whether it has a kernel, and if not,
all the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType

import torch

from relprop.backends import choices, cpp, cuda, products, triton, triton_fused
from relprop.backends import forward as forward_kernels
from relprop.errors import BackendError, unknown_name
from relprop.graph import Node, Value
from relprop.program import ForwardKernel, FusedStep, JointKernel, Kernel, Kernels, ReverseStep
from relprop.rules import Rule

# Each holds KERNELS by rule, `kernel_reasons`, `joint_kernel`, `reasons_against` and `available`.
_MODULES: dict[str, ModuleType] = {"cpp": cpp, "triton": triton, "cuda": cuda}
BACKENDS = ("torch", *_MODULES)
_LOG = logging.getLogger("relprop")
_SAID: set[str] = set()


def choose_kernels(
    name: str, dtype: torch.dtype, device: torch.device, precision: str = "highest", batch: int = 1
) -> Kernels:
    """What a plan's steps run on.

    Args:
        name: "auto" takes the fastest that can run, on a GPU per operation where that was measured (`choices.json`) and
            plain PyTorch where it was not; a backend's name asks for it where it has a kernel.
        dtype: of the streams.
        device: of the model.
        precision: of matrix products.
        batch: samples of the example, for what was measured at one or at many.
    Raises:
        UnknownNameError: no such backend. BackendError: it cannot run here, with all the reasons.
    """
    if name not in (*BACKENDS, "auto"):
        raise unknown_name("backend", name, (*BACKENDS, "auto"))
    if name == "auto" and device.type == "cuda":
        return _measured(dtype, device, batch)
    used = name if name != "auto" else "cpp"
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
        kernel = backend.joint_kernel(node, rules, edge, device)
        return None if kernel is None else (f"{used} (joint)", kernel)

    def forward(node: Node) -> ForwardKernel | None:
        # Only `precision="medium"` changes the numbers of the forward pass. Its linear layers then multiply what their
        # relevance rules will multiply, so that the parts of a z+ come from the same numbers.
        if node.kind == "linear" and precision == "medium":
            return products.forward
        return forward_kernels.run if forward_kernels.takes(node) else None

    def sums(node: Node, rules: Mapping[str, Rule]) -> ForwardKernel | None:
        return products.forward_with_sums if precision == "medium" and cpp.divides_by_sums(node, rules) else None

    if used == "cpp":
        return Kernels(rule, joint, forward, sums)
    return Kernels(rule, joint, fused=triton_fused.fused_step if used == "triton" else None)


def _measured(dtype: torch.dtype, device: torch.device, batch: int) -> Kernels:
    """The backend of every operation that was the fastest on a GPU of this kind; the rules themselves elsewhere."""
    chosen, reason = choices.choices_for(device)
    usable = {}
    for name in sorted(set(chosen.values()) - {"torch"}):
        reasons = _MODULES[name].reasons_against(dtype, device)
        if not reasons:
            usable[name] = _MODULES[name]
        reason = "; ".join(reasons) or reason
    if not usable:
        _say_once(f"{device} runs the rules in plain PyTorch: {reason or 'they were the fastest'}")
        return Kernels()

    def rule(node: Node, rule: Rule) -> tuple[str, Kernel | None]:
        name = chosen.get(choices.key_of(node, rule, batch), "torch")
        backend = usable.get(name)
        kernel = None if backend is None or backend.kernel_reasons(node, rule) else backend.KERNELS.get(type(rule))
        return ("torch", None) if kernel is None else (name, kernel)

    def agreed(node: Node, rules: Mapping[str, Rule]) -> str:
        """The backend of all rules of a step, empty where they differ."""
        names = {chosen.get(choices.key_of(node, rule, batch), "torch") for rule in rules.values()}
        return names.pop() if len(names) == 1 and names <= set(usable) else ""

    def joint(node: Node, rules: Mapping[str, Rule], edge: str | None) -> tuple[str, JointKernel] | None:
        name = agreed(node, rules)
        kernel = usable[name].joint_kernel(node, rules, edge, device) if name else None
        return None if kernel is None else (f"{name} (joint)", kernel)

    def fused(
        step: ReverseStep, steps: Mapping[Node, ReverseStep], unseen: Callable[[Value], bool], alone: bool
    ) -> FusedStep | None:
        if agreed(step.node, {s.stream: s.rule for s in step.streams}) != "triton":
            return None
        return triton_fused.fused_step(step, steps, unseen, alone)

    return Kernels(rule, joint, fused=fused)


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
