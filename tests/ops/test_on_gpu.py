"""The kernels that are registered for a GPU, over the host emulation: values, dtypes, and that they are what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relprop.ops import OPS, on_gpu
from relprop.ops.registry import PRODUCTS, SPECS, WITHOUT_OUT
from tests.ops.cases import arguments, random, results

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", SPECS)
def test_what_is_registered(name: str) -> None:
    with_kernel = name in on_gpu.CUDA or name in on_gpu.TRITON
    for op in (name, *(() if name in WITHOUT_OUT else (f"{name}_out",))):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"relprop::{op}", "CUDA") == with_kernel


@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.float32, None), *((dtype, half) for half in HALF for dtype in (torch.float32, half))]
)
@pytest.mark.parametrize("name", sorted(on_gpu.CUDA))
def test_kernel_equals_reference(
    ops_on_gpu: dict[str, int], name: str, dtype: torch.dtype, half: torch.dtype | None
) -> None:
    dtype = torch.float32 if name in PRODUCTS else dtype
    given = arguments(name, dtype, half)
    got, want = results(name, OPS[name](*given)), results(name, SPECS[name].reference(*given))
    assert ops_on_gpu == {name: 1}
    for one, other in zip(got, want, strict=True):
        assert one.dtype is other.dtype and one.shape == other.shape
        half_layer = half is not None and name == "attention_relevance"  # multiplies what the layer's dtype holds
        tolerance = max(2e-2 if half_layer else 1e-4, 4 * torch.finfo(one.dtype).eps)
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [None, *HALF])
@pytest.mark.parametrize("name", sorted(PRODUCTS & set(on_gpu.CUDA)))
def test_products(ops_on_gpu: dict[str, int], name: str, half: torch.dtype | None, operands: torch.dtype) -> None:
    given = tuple(operands if isinstance(item, torch.dtype) else item for item in arguments(name, half=half))
    got, want = results(name, OPS[name](*given)), results(name, SPECS[name].reference(*given))
    assert ops_on_gpu == {name: 1}
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
def test_shares_from_a_given_output(ops_on_gpu: dict[str, int], operands: torch.dtype) -> None:
    relevance, x, w = arguments("linear_alpha_beta_share_out_product")[:3]
    bias = random(5, seed=11)
    y = x.to(operands).float() @ w.to(operands).float().mT + bias
    op = OPS["linear_alpha_beta_share_out_product"]
    rest = (operands, 1.0, 1e-6, 0, 1e-6)
    torch.testing.assert_close(op(relevance, x, w, y, bias, *rest), op(relevance, x, w, None, None, *rest))


@pytest.mark.parametrize("name", sorted(on_gpu.CUDA))
def test_opcheck(ops_on_gpu: dict[str, int], name: str) -> None:
    torch.library.opcheck(OPS[name], arguments(name), test_utils=("test_schema", "test_faketensor"))
    if name not in WITHOUT_OUT:
        made = results(name, OPS[name](*arguments(name)))
        given = (*arguments(name), *(torch.full_like(one, float("nan")) for one in made))
        torch.library.opcheck(OPS[f"{name}_out"], given, test_utils=("test_schema", "test_faketensor"))
    assert ops_on_gpu[name] > 0


@pytest.mark.parametrize(
    "given",
    [
        ("add_gamma", arguments("add_gamma", torch.float64)),
        ("add_epsilon", (random(2, 3), random(3).bfloat16(), random(3).half(), 0, 1e-6)),
        ("fanout_epsilon", ([random(2, 3)] * 17, random(3), 0, 1e-6)),
        ("norm_sigma_constant", arguments("norm_sigma_constant")),
    ],
    ids=lambda given: given[0],
)
def test_what_no_kernel_takes_runs_the_reference(ops_on_gpu: dict[str, int], given: tuple[str, Any]) -> None:
    name, items = given
    got, want = results(name, OPS[name](*items)), results(name, SPECS[name].reference(*items))
    assert sum(ops_on_gpu.values()) == 0
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
