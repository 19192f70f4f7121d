"""The custom ops on Triton's kernels, under the interpreter: values, dtypes, layouts, and that they are what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from relprop import native_cuda
from relprop.backends import choices
from relprop.errors import OptionError
from relprop.ops import OPS, on_gpu, on_triton, registry
from relprop.ops.registry import PRODUCTS, SPECS
from tests.ops import checks
from tests.ops.cases import arguments, random, results
from tests.ops.checks import DTYPES, HALF, OPERANDS

# Parts of attention's step, which its kernel has inside.
WITHOUT_TRITON = {"matmul_half_share", "matmul_half_attention_shares"}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each Triton kernel ran."""
    monkeypatch.setattr(native_cuda, "available", lambda: (False, "not built"))
    return checks.run_as_on_a_gpu(monkeypatch)


def call_of(name: str, dtype: torch.dtype = torch.float32, half: torch.dtype | None = None) -> tuple[Any, ...]:
    """The example call, attention's with the output that its layer has, and products q k that do not cancel."""
    given = list(arguments(name, dtype, half))
    if name == "attention_relevance":
        given[:2] = [given[0].abs() + 0.1, given[1].abs() + 0.1]
        q, k, v, mask = (given[i].float() for i in (0, 1, 2, 4))
        output = F.scaled_dot_product_attention(q, k, v, mask, scale=given[8], enable_gqa=True)
        given[3], given[10] = output.to(given[0].dtype), True
        given[6] = given[6] * output.to(dtype)
    return tuple(given)


def test_every_op_with_a_kernel_has_a_launcher() -> None:
    assert set(on_gpu.TRITON) == (set(on_gpu.CUDA) | {"norm_sigma_constant"}) - WITHOUT_TRITON == set(on_gpu.STEPS)


@pytest.mark.parametrize(("dtype", "half"), DTYPES)
@pytest.mark.parametrize("name", sorted(on_triton.LAUNCHERS))
def test_kernel_equals_reference(
    taken: dict[str, int], name: str, dtype: torch.dtype, half: torch.dtype | None
) -> None:
    checks.check_kernel(taken, name, call_of(name, torch.float32 if name in PRODUCTS else dtype, half), half)


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("half", [None, *HALF])
@pytest.mark.parametrize("name", sorted(PRODUCTS & set(on_triton.LAUNCHERS)))
def test_products(taken: dict[str, int], name: str, half: torch.dtype | None, operands: torch.dtype) -> None:
    checks.check_products(taken, name, half, operands)


@pytest.mark.parametrize("operands", OPERANDS)
def test_shares_from_a_given_output(taken: dict[str, int], operands: torch.dtype) -> None:
    checks.check_shares_from_a_given_output(taken, operands)


@pytest.mark.parametrize("name", sorted(on_triton.LAUNCHERS))
def test_opcheck(taken: dict[str, int], name: str) -> None:
    checks.check_schema(taken, name, call_of(name))


def changed(name: str, **values: Any) -> tuple[str, tuple[Any, ...]]:
    names = registry._names(SPECS[name])
    return name, tuple(values.get(key, item) for key, item in zip(names, call_of(name), strict=True))


@pytest.mark.parametrize(
    "given",
    [
        ("add_gamma", arguments("add_gamma", torch.float64)),
        changed("attention_relevance", exact_output=False),
        changed("norm_gradient", gradient=random(1, 2, 8200), x=random(2, 8200), weight=random(8200)),
        changed("add_normalised", relevance=random(2), a=random(), b=random()),
    ],
    ids=["float64", "rounded_output", "long_row", "scalar"],
)
def test_what_no_kernel_takes_runs_the_reference(taken: dict[str, int], given: tuple[str, Any]) -> None:
    name, items = given
    if name == "add_normalised":  # samples have no axis: the reference says so in its own way, or takes it
        items = (*items[:3], 0, 1e-6)
    outcome = [_outcome(run, items) for run in (OPS[name], SPECS[name].reference)]
    assert sum(taken.values()) == 0
    assert outcome[0][0] == outcome[1][0]
    assert all(torch.equal(one, other) for one, other in zip(outcome[0][1], outcome[1][1], strict=True))


def _outcome(run: Any, items: tuple[Any, ...]) -> tuple[str, list[torch.Tensor]]:
    try:
        return "", results("", run(*items))
    except Exception as error:
        return f"{type(error).__name__}: {error}", []


@pytest.mark.parametrize(
    ("name", "place", "value", "text"),
    [
        ("activation_gradient", 2, "relu", "activation: expected .*, got 'relu'"),
        ("norm_gradient", 3, "batch", "norm: expected .*, got 'batch'"),
    ],
)
def test_bad_options(taken: dict[str, int], name: str, place: int, value: str, text: str) -> None:
    given = [value if i == place else item for i, item in enumerate(arguments(name))]
    with pytest.raises(OptionError, match=text):
        OPS[name](*given)


@pytest.mark.parametrize("name", sorted(on_gpu.TRITON))
def test_what_was_measured_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "available", lambda: (True, ""))
    monkeypatch.setattr(on_gpu, "_cuda_takes", lambda name, given: True)
    table: dict[str, str] = {}
    monkeypatch.setattr(choices, "choices_for", lambda device: (table, ""))
    with FakeTensorMode():
        moved = [_on_a_gpu(item) for item in call_of(name)]
    given = dict(zip(registry._names(SPECS[name]), moved, strict=True))
    kernels = {"cuda": on_gpu.CUDA.get(name), "triton": on_gpu.TRITON[name], "torch": None}
    unmeasured = on_gpu.launcher(name, given)
    assert unmeasured is (kernels["cuda"] or kernels["triton"])
    for backend, launcher in kernels.items():
        table.clear()
        table[choices.key(*on_gpu.STEPS[name], torch.float32, 1)] = backend
        assert on_gpu.launcher(name, given) is unmeasured  # these are of several samples
        table[choices.key(*on_gpu.STEPS[name], torch.bfloat16, 3)] = backend
        assert on_gpu.launcher(name, given) is unmeasured
        table[choices.key(*on_gpu.STEPS[name], torch.float32, 3)] = backend
        if launcher is not None or backend == "torch":
            assert on_gpu.launcher(name, given) is launcher


def _on_a_gpu(item: Any) -> Any:
    if isinstance(item, list):
        return [_on_a_gpu(part) for part in item]
    if not isinstance(item, torch.Tensor):
        return item
    return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="cuda")
