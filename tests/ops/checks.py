"""What holds for the custom ops of a GPU, whichever kernels are behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relprop.ops import OPS, on_gpu, registry
from relprop.ops.registry import SPECS, WITHOUT_OUT
from tests.ops.cases import arguments, random, results

HALF = [torch.bfloat16, torch.float16]
OPERANDS = [torch.float32, torch.bfloat16]
DTYPES = [(torch.float32, None), *((dtype, half) for half in HALF for dtype in (torch.float32, half))]


def run_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is registered for the GPU runs on the CPU's tensors; how often each kernel was taken."""
    taken: dict[str, int] = {}

    def launcher(name: str, given: dict[str, Any]) -> Any:
        found = choose(name, given)
        taken[name] = taken.get(name, 0) + (found is not None)
        return found

    choose = on_gpu.launcher
    monkeypatch.setattr(on_gpu, "launcher", launcher)
    monkeypatch.setattr(registry, "run_on_cpu", registry.run_on_gpu)
    return taken


def check_kernel(taken: dict[str, int], name: str, given: tuple[Any, ...], half: torch.dtype | None) -> None:
    """One call equals the reference in values, dtypes and layouts, and a kernel made it."""
    got, want = results(name, OPS[name](*given)), results(name, SPECS[name].reference(*given))
    assert taken == {name: 1}
    for one, other in zip(got, want, strict=True):
        assert one.dtype is other.dtype and one.shape == other.shape and one.stride() == other.stride()
        half_layer = half is not None and name == "attention_relevance"  # multiplies what the layer's dtype holds
        tolerance = max(2e-2 if half_layer else 1e-4, 4 * torch.finfo(one.dtype).eps)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(float(other.abs().max()), 1.0))


def check_products(taken: dict[str, int], name: str, half: torch.dtype | None, operands: torch.dtype) -> None:
    """The same of an op that makes its products, with operands in a dtype of their own."""
    given = tuple(operands if isinstance(item, torch.dtype) else item for item in arguments(name, half=half))
    got, want = results(name, OPS[name](*given)), results(name, SPECS[name].reference(*given))
    assert taken == {name: 1}
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def check_shares_from_a_given_output(taken: dict[str, int], operands: torch.dtype) -> None:
    """z⁺ takes the layer's output, or makes it."""
    relevance, x, w = arguments("linear_alpha_beta_share_out_product")[:3]
    bias = random(5, seed=11)
    y = x.to(operands).float() @ w.to(operands).float().mT + bias
    op = OPS["linear_alpha_beta_share_out_product"]
    rest = (operands, 1.0, 1e-6, 0, 1e-6)
    torch.testing.assert_close(op(relevance, x, w, y, bias, *rest), op(relevance, x, w, None, None, *rest))
    assert taken == {"linear_alpha_beta_share_out_product": 2}


def check_schema(taken: dict[str, int], name: str, given: tuple[Any, ...]) -> None:
    """`torch.library.opcheck` of an op and of the variant that writes into tensors given, NaN before."""
    torch.library.opcheck(OPS[name], given, test_utils=("test_schema", "test_faketensor"))
    if name not in WITHOUT_OUT:
        made = results(name, OPS[name](*given))
        written = (*given, *(torch.full_like(one, float("nan")) for one in made))
        torch.library.opcheck(OPS[f"{name}_out"], written, test_utils=("test_schema", "test_faketensor"))
    assert taken[name] > 0
