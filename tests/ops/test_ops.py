"""Custom ops: schema and fake kernels, both implementations against each other, torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relprop import native
from relprop.ops import OPS
from relprop.ops.registry import PRODUCTS, SPECS, WHOLE_LAYERS, WITHOUT_OUT
from tests.ops.cases import arguments, random, results

HALF = [torch.bfloat16, torch.float16]
needs_kernels = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


def overload(name: str) -> Any:
    return getattr(torch.ops.relprop, name).default


def places(name: str) -> list[Tensor]:
    """Tensors of NaN for an op's results."""
    made = results(name, overload(name)(*arguments(name)))
    return [torch.full_like(one, float("nan")) for one in made]


def test_every_kernel_has_its_op() -> None:
    """What the C++ wrappers offer is what is registered, under the names of the compiled module."""
    compiled = {name for name in dir(native._C) if name.split("_")[0] in ("add", "fanout", "softmax", "activation")}
    assert compiled <= set(SPECS)
    assert set(OPS) == set(SPECS) | {f"{name}_out" for name in SPECS if name not in WITHOUT_OUT}


@pytest.mark.parametrize("name", SPECS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OPS[name], arguments(name))
    torch.library.opcheck(OPS[name], arguments(name, torch.bfloat16))
    torch.library.opcheck(OPS[name], arguments(name, half=torch.float16))


@pytest.mark.parametrize("name", sorted(set(SPECS) - WITHOUT_OUT))
def test_opcheck_of_out_variants(name: str) -> None:
    torch.library.opcheck(OPS[f"{name}_out"], (*arguments(name), *places(name)))


@needs_kernels
@pytest.mark.parametrize("half", [None, *HALF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("name", sorted(set(SPECS) - WHOLE_LAYERS))
def test_kernel_equals_reference(name: str, dtype: torch.dtype, half: torch.dtype | None) -> None:
    if half is not None and dtype in HALF:
        half = dtype
    given = arguments(name, dtype, half)
    got, want = results(name, overload(name)(*given)), results(name, SPECS[name].reference(*given))
    eps = torch.finfo(dtype).eps
    for one, other in zip(got, want, strict=True):
        assert one.dtype is dtype and one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=64 * eps, atol=64 * eps)


@needs_kernels
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [None, *HALF])
@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_products_equal_reference(name: str, half: torch.dtype | None, operands: torch.dtype) -> None:
    given = tuple(operands if isinstance(item, torch.dtype) else item for item in arguments(name, half=half))
    got, want = results(name, overload(name)(*given)), results(name, SPECS[name].reference(*given))
    rounded = [torch.bfloat16, torch.float32] if name == "linear_apply_rounded" else [torch.float32]
    assert [one.dtype for one in got] == rounded
    for one, other in zip(got, want, strict=True):
        rtol = 2**-7 if one.dtype is torch.bfloat16 else 1e-4  # a sum between two bfloat16 numbers may go to either
        torch.testing.assert_close(one.float(), other.float(), rtol=rtol, atol=1e-4)


ATTENTION = [
    {"mask": None, "causal": True, "qk": "half"},
    {"mask": random(2, 1, 5, 6, seed=3) > 0, "qk": "detached", "edge": "relevance"},
    {"gradient": None, "edge": "", "row": None, "exact_output": True},
    {"relevance": None, "output": None, "edge": "gradient_x_attention", "row": random(1, 2, 5).abs()},
    {"gradient": None, "relevance": None, "edge": "attention", "row": random(4, 2, 5)},
    {"gradients_wanted": (False, True, False), "relevances_wanted": (True, False, True), "edge": ""},
]


@pytest.mark.parametrize("half", [None, *HALF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("changes", [{}, *ATTENTION], ids=str)
def test_attention(changes: dict[str, Any], dtype: torch.dtype, half: torch.dtype | None) -> None:
    """The kernel, the fake kernel and the reference agree on what comes back, in which dtype and layout."""
    name = "attention_relevance"
    names = [argument.split()[-1] for argument in SPECS[name].arguments.split(", ")]
    changes = {key: item.to(dtype) if key == "row" and item is not None else item for key, item in changes.items()}
    given = list((dict(zip(names, arguments(name, dtype, half), strict=True)) | changes).values())
    got, want = overload(name)(*given), SPECS[name].reference(*given)
    torch.library.opcheck(OPS[name], tuple(given), test_utils=("test_schema", "test_faketensor"))
    for one, other in zip(got, want, strict=True):
        assert one.dtype is other.dtype and one.stride() == other.stride()
        tolerance = max(1e-4, 8 * torch.finfo(one.dtype).eps)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", sorted(set(SPECS) - WITHOUT_OUT))
def test_out_variants(name: str, dtype: torch.dtype) -> None:
    given = arguments(name, dtype)
    want = results(name, overload(name)(*given))
    out = [torch.full_like(one, float("nan")) for one in want]
    assert overload(f"{name}_out")(*given, *out) is None
    assert all(torch.equal(one, other) for one, other in zip(out, want, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_without_the_compiled_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: (False, "left out"))
    monkeypatch.setattr(native.module, "_C", None)
    made = results(name, overload(name)(*arguments(name)))
    assert all(one.isfinite().all() for one in made)
    if name not in WITHOUT_OUT:
        out = [torch.empty_like(one) for one in made]
        overload(f"{name}_out")(*arguments(name), *out)
        assert all(torch.equal(one, other) for one, other in zip(out, made, strict=True))


class Block(nn.Module):
    """A few ops in a row with plain aten between them, as a lowered sweep has them."""

    def forward(self, relevance: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        op = torch.ops.relprop
        y = x @ weight.mT
        absolute = x.abs() @ weight.abs().mT
        shares = op.linear_alpha_beta_share_out(relevance, y, None, absolute, 1.0, 0.0, None, 0, 1e-6)[0]
        passed = op.linear_alpha_beta_select(x, shares @ weight, shares @ weight.abs())
        first, second = op.add_gamma(passed, x, x + 1, 1.0, 0, 1e-6)
        return op.fanout_epsilon([first, second], x, 1, 1e-9)


def block_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = [(2, batch, 5), (batch, 7), (5, 7)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_sees_through(backend: str) -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for batch in (3, 4):
        assert torch.equal(compiled(*block_inputs(batch)), block(*block_inputs(batch)))


def test_compile_of_a_variant_that_writes() -> None:
    def into(relevance: Tensor, x: Tensor) -> Tensor:
        out = torch.empty_like(relevance)
        torch.ops.relprop.activation_gradient_out(relevance, x, "silu", out)
        return out + 1

    r, x = torch.randn(2, 3), torch.randn(3)
    compiled = torch.compile(into, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(r, x), into(r, x))


def test_export_sees_through() -> None:
    batch = torch.export.Dim("batch", min=2)
    shapes = ({1: batch}, {0: batch}, None)
    exported = torch.export.export(Block(), block_inputs(3), dynamic_shapes=shapes)
    names = {str(node.target) for node in exported.graph.nodes if "relprop" in str(node.target)}
    assert names == {
        f"relprop.{name}.default"
        for name in ("linear_alpha_beta_share_out", "linear_alpha_beta_select", "add_gamma", "fanout_epsilon")
    }
    assert torch.equal(exported.module()(*block_inputs(4)), Block()(*block_inputs(4)))


def test_one_or_two_shares() -> None:
    r, y, bias, absz = arguments("linear_alpha_beta_share_out")[:4]
    share_out = torch.ops.relprop.linear_alpha_beta_share_out
    assert len(share_out(r, y, bias, absz, 1.0, 0.0, None, 0, 1e-6)) == 1
    assert len(share_out(r, y, bias, absz, 2.0, 1.0, None, 0, 1e-6)) == 2


def test_a_backward_pass_is_refused() -> None:
    r, x = torch.randn(1, 3, requires_grad=True), torch.randn(3)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.relprop.linear_epsilon_select(x, r).sum().backward()


def test_a_kernel_for_another_device_can_be_registered() -> None:
    """What the CUDA and Triton sides do, shown on a device that has no hardware."""

    @OPS["linear_epsilon_select"].register_kernel("xpu")
    def launcher(x: Tensor, c: Tensor) -> Tensor:
        return c

    assert torch._C._dispatch_has_kernel_for_dispatch_key("relprop::linear_epsilon_select", "XPU")
