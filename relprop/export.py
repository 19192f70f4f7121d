"""A forward and relevance pass as one `.pt2` file of aten operations, which runs without relprop."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from relprop.lowering import PassFunction, plain
from relprop.program import Program
from relprop.weights import Derive


class _Exported(nn.Module):
    """The traced pass, with its weights as buffers."""

    def __init__(self, traced: Any, weights: Sequence[Tensor], inputs: int) -> None:
        super().__init__()
        # Not named `graph`: exported modules have one, and constants of the trace would be looked for there.
        self.traced, self.inputs, self.count = traced, inputs, len(weights)
        for i, tensor in enumerate(weights):
            self.register_buffer(f"weight_{i}", tensor.detach())

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = [getattr(self, f"weight_{i}") for i in range(self.count)]
        found: tuple[Tensor, Tensor, Tensor] = self.traced(*given[: self.inputs], *weights, *given[self.inputs :])
        return found


def export_program(
    program: Program,
    indices: Sequence[int],
    inputs: Sequence[Tensor],
    batched: Sequence[bool],
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    precision: str,
    targets: int | None,
) -> torch.export.ExportedProgram:
    """Trace the pass over its plain-PyTorch rules.

    Args:
        indices: of the values that inputs, then weights, are.
        inputs: an example; its batch, which should equal no other size, stays free.
        targets: how many indices per sample the result takes after its inputs; None to explain the largest output.
    """
    function = PassFunction(plain(program), indices, dtype, precision)
    several = targets is not None
    batch = next(len(t) for t, is_batch in zip(inputs, batched, strict=True) if is_batch)
    axes = program.graph.output.rank - 1
    aim = [torch.zeros(batch, targets, *([axes] if axes > 1 else []), dtype=torch.int64)] if several else []  # type: ignore[list-item]
    aim = [t.to(inputs[0].device) for t in aim]
    function([*inputs, *weights], _index(aim, axes), Derive())
    assert function.layout is not None
    explained = function.layout.explained_tokens

    def flat(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = len(inputs) + len(weights)
        outcome = function(given[:count], _index(given[count:], axes), Derive(), explained)
        relevance, index = outcome.relevance.transpose(0, 1), outcome.index
        if not several:
            relevance, index = relevance[:, 0], index[:, 0]
        return relevance.contiguous(), outcome.logits, index

    traced = make_fx(flat, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs, *weights, *aim)
    for node in traced.graph.nodes:
        # The strides that a trace saw are not those of every decomposition of the operation before.
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.recompile()
    module = _Exported(traced, weights, len(inputs))
    free = torch.export.Dim("batch", min=1)
    shapes = tuple({0: free} if is_batch else {} for is_batch in (*batched, *(True for _ in aim)))
    made = torch.export.export(module, (*inputs, *aim), dynamic_shapes=(shapes,), strict=False)
    return made.run_decompositions()


def example_batch(*tensors: Tensor, targets: int | None) -> int:
    """A batch size that no other size equals: a trace takes equal sizes for the same."""
    taken = {size for tensor in tensors for size in tensor.shape} | {targets or 0}
    return next(size for size in itertools.count(2) if size not in taken)


def _index(aim: Sequence[Tensor], axes: int) -> Tensor | None:
    """[B, T] or [B, T, k] -> [B, T, k]"""
    if not aim:
        return None
    return aim[0].unsqueeze(-1) if axes == 1 else aim[0]


def save(exported: torch.export.ExportedProgram, path: str | Path, *, compiled: bool = False) -> Path:
    """Write a `.pt2` file: the graph, or with `compiled` a shared library made of it by AOTInductor."""
    path = Path(path)
    if compiled:
        from torch._inductor import aoti_compile_and_package

        aoti_compile_and_package(exported, package_path=str(path))
    else:
        torch.export.save(exported, path)
    return path
