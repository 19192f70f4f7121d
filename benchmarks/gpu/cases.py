"""Every kernel's cases: small ones that float64 checks quickly, large ones that a model has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.attention_cases import Layer, attention, variants
from benchmarks.gpu.case import Case
from benchmarks.gpu.elementwise_cases import elementwise, maps
from benchmarks.gpu.linear_cases import linear, residual
from benchmarks.gpu.machine import Machine

HALF = ((torch.bfloat16, "highest"), (torch.float16, "highest"))
SINGLE = tuple((torch.float32, precision) for precision in ("highest", "high", "ieee"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _small(machine: Machine) -> Iterator[Case]:
    """Every kernel, dtype and variant."""
    rows, n, k = machine.size(197, 9), machine.size(384, 20), machine.size(192, 17)
    base = Layer(machine.size(2, 1), machine.size(3, 2), machine.size(197, 12), machine.size(64, 16))
    for dtype, precision in (*HALF, *SINGLE, (torch.float32, "medium")):
        yield from linear(machine, dtype, precision, rows, n, k)
        yield residual(machine, dtype, precision, base.batch, machine.size(197, 5), n, machine.size(k, 16))
        if precision != "ieee":
            yield attention(machine, dtype, precision, base)
    for dtype, precision in ((torch.bfloat16, "highest"), (torch.float32, "highest")):
        yield from linear(machine, dtype, precision, rows, n, k, targets=3)
        for layer in variants(base, machine):
            yield attention(machine, dtype, precision, layer)
    for dtype in DTYPES:
        yield from elementwise(machine, dtype)
        yield from elementwise(machine, dtype, targets=2)
        yield from maps(machine, dtype, targets=2)


def _large(machine: Machine) -> Iterator[Case]:
    """ViT-B/16 at batch 64, and the attention layers of other models."""
    rows, n, k = machine.size(64 * 197, 9), machine.size(3072, 20), machine.size(768, 17)
    base = Layer(machine.size(64, 1), machine.size(12, 2), machine.size(197, 12), machine.size(64, 16))
    for dtype, precision in (*HALF[:1], *SINGLE):
        yield from linear(machine, dtype, precision, rows, n, k)
        yield residual(machine, dtype, precision, base.batch, machine.size(197, 5), n, machine.size(k, 16))
        if precision != "ieee":
            yield attention(machine, dtype, precision, base)
    yield from linear(machine, torch.bfloat16, "highest", rows, n, k, targets=3)
    for layer in variants(base, machine):
        yield attention(machine, torch.bfloat16, "highest", layer)
    long = replace(base, batch=1, queries=machine.size(4096, 12))
    yield attention(machine, torch.bfloat16, "highest", long)
    llama = replace(long, heads=machine.size(32, 4), key_heads=machine.size(8, 2), causal=True)
    yield attention(machine, torch.bfloat16, "highest", replace(llama, variant="causal_grouped"))
    for dtype in (torch.bfloat16, torch.float32):
        yield from elementwise(machine, dtype)
        yield from maps(machine, dtype, targets=2)


def cases(machine: Machine, *, large: bool) -> Iterator[Case]:
    """Every kernel at sizes of models, or at sizes that float64 checks quickly."""
    return _large(machine) if large else _small(machine)
