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
from relprop.ops.registry import PRODUCTS, SPECS, WITHOUT_OUT
from tests.ops.cases import arguments, random, results

HALF = [torch.bfloat16, torch.float16]
# Parts of attention's step, which its kernel has inside.
WITHOUT_TRITON = {"matmul_half_share", "matmul_half_attention_shares"}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is registered for the GPU runs on the CPU's tensors; how often each Triton kernel was."""
    counted: dict[str, int] = {}

    def launcher(name: str, given: dict[str, Any]) -> Any:
        found = choose(name, given)
        counted[name] = counted.get(name, 0) + (found is not None)
        return found

    choose = on_gpu.launcher
    monkeypatch.setattr(native_cuda, "available", lambda: (False, "not built"))
    monkeypatch.setattr(on_gpu, "launcher", launcher)
    monkeypatch.setattr(registry, "run_on_cpu", registry.run_on_gpu)
    return counted


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


@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.float32, None), *((dtype, half) for half in HALF for dtype in (torch.float32, half))]
)
@pytest.mark.parametrize("name", sorted(on_triton.LAUNCHERS))
def test_kernel_equals_reference(
    taken: dict[str, int], name: str, dtype: torch.dtype, half: torch.dtype | None
) -> None:
    given = call_of(name, torch.float32 if name in PRODUCTS else dtype, half)
    got, want = results(name, OPS[name](*given)), results(name, SPECS[name].reference(*given))
    assert taken == {name: 1}
    for one, other in zip(got, want, strict=True):
        assert one.dtype is other.dtype and one.shape == other.shape and one.stride() == other.stride()
        half_layer = half is not None and name == "attention_relevance"
        tolerance = max(2e-2 if half_layer else 1e-4, 4 * torch.finfo(one.dtype).eps)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(float(other.abs().max()), 1.0))


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [None, *HALF])
@pytest.mark.parametrize("name", sorted(PRODUCTS & set(on_triton.LAUNCHERS)))
def test_products(taken: dict[str, int], name: str, half: torch.dtype | None, operands: torch.dtype) -> None:
    given = tuple(operands if isinstance(item, torch.dtype) else item for item in arguments(name, half=half))
    got, want = results(name, OPS[name](*given)), results(name, SPECS[name].reference(*given))
    assert taken == {name: 1}
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
def test_shares_from_a_given_output(taken: dict[str, int], operands: torch.dtype) -> None:
    relevance, x, w = arguments("linear_alpha_beta_share_out_product")[:3]
    bias = random(5, seed=11)
    y = x.to(operands).float() @ w.to(operands).float().mT + bias
    op = OPS["linear_alpha_beta_share_out_product"]
    rest = (operands, 1.0, 1e-6, 0, 1e-6)
    torch.testing.assert_close(op(relevance, x, w, y, bias, *rest), op(relevance, x, w, None, None, *rest))
    assert taken == {"linear_alpha_beta_share_out_product": 2}


@pytest.mark.parametrize("name", sorted(on_triton.LAUNCHERS))
def test_opcheck(taken: dict[str, int], name: str) -> None:
    torch.library.opcheck(OPS[name], call_of(name), test_utils=("test_schema", "test_faketensor"))
    if name not in WITHOUT_OUT:
        given = call_of(name)
        made = results(name, OPS[name](*given))
        given = (*given, *(torch.full_like(one, float("nan")) for one in made))
        torch.library.opcheck(OPS[f"{name}_out"], given, test_utils=("test_schema", "test_faketensor"))
    assert taken[name] > 0


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
