"""The kernels that are registered for a GPU, over the host emulation: values, dtypes, and that they are what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relprop.ops import OPS, on_gpu
from relprop.ops.registry import PRODUCTS, SPECS, WITHOUT_OUT
from tests.ops import checks
from tests.ops.cases import arguments, random, results
from tests.ops.checks import DTYPES, HALF, OPERANDS


@pytest.mark.parametrize("name", SPECS)
def test_what_is_registered(name: str) -> None:
    with_kernel = name in on_gpu.CUDA or name in on_gpu.TRITON
    for op in (name, *(() if name in WITHOUT_OUT else (f"{name}_out",))):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"relprop::{op}", "CUDA") == with_kernel


@pytest.mark.parametrize(("dtype", "half"), DTYPES)
@pytest.mark.parametrize("name", sorted(on_gpu.CUDA))
def test_kernel_equals_reference(
    ops_on_gpu: dict[str, int], name: str, dtype: torch.dtype, half: torch.dtype | None
) -> None:
    checks.check_kernel(ops_on_gpu, name, arguments(name, torch.float32 if name in PRODUCTS else dtype, half), half)


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("half", [None, *HALF])
@pytest.mark.parametrize("name", sorted(PRODUCTS & set(on_gpu.CUDA)))
def test_products(ops_on_gpu: dict[str, int], name: str, half: torch.dtype | None, operands: torch.dtype) -> None:
    checks.check_products(ops_on_gpu, name, half, operands)


@pytest.mark.parametrize("operands", OPERANDS)
def test_shares_from_a_given_output(ops_on_gpu: dict[str, int], operands: torch.dtype) -> None:
    checks.check_shares_from_a_given_output(ops_on_gpu, operands)


@pytest.mark.parametrize("name", sorted(on_gpu.CUDA))
def test_opcheck(ops_on_gpu: dict[str, int], name: str) -> None:
    checks.check_schema(ops_on_gpu, name, arguments(name))


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


def test_an_output_that_the_op_makes_is_not_rounded_by_torchs_flags(
    ops_on_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside |x| |w| in float32 it would leave noise."""
    linear, seen, before = torch.nn.functional.linear, [], torch.get_float32_matmul_precision()

    def watched(*given: Any) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return linear(*given)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        OPS["linear_alpha_beta_share_out_product"](*arguments("linear_alpha_beta_share_out_product"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
