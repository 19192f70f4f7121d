"""Streams taken through several steps in one Triton kernel: the same answers, the kernels really run, and when not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU

import relprop
from relprop.engine import Engine
from relprop.kernels import launch
from tests.engine.models import vit
from tests.rules.rule_checks import assert_near, random

IMAGES = random(2, 3, 32, 32, seed=2).float()


def unfused(engine: Engine) -> Engine:
    engine.program = replace(engine.program, reverse=tuple(replace(s, fused=None) for s in engine.program.reverse))
    return engine


def engines(model: Any = None, **options: Any) -> tuple[Engine, Engine]:
    model = vit(depth=2).float() if model is None else model
    made = [
        relprop.compile(model, (IMAGES.to(model.head.weight.dtype),), backend="triton", **options) for _ in range(2)
    ]
    return made[0], unfused(made[1])


def fused_kinds(engine: Engine) -> Counter[str]:
    """Kinds of the steps that lie in a kernel, joined."""
    return Counter(" ".join(n.kind for n in s.fused.nodes) for s in engine.program.reverse if s.fused is not None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches by kernel."""
    counted: Counter[str] = Counter()
    from relprop.kernels import (
        activation_gradient,
        add_normalised,
        linear_back,
        linear_back_add,
        linear_back_gated,
        linear_products,
    )

    def noted(kernel: Any, *rest: Any, **named: Any) -> None:
        counted[kernel.__name__] += 1
        launch.launch(kernel, *rest, **named)

    fused = (linear_back_add, linear_back_gated)
    for module in (activation_gradient, add_normalised, linear_back, linear_products, *fused):
        monkeypatch.setattr(module, "launch", noted)
    return counted


FULL = pytest.mark.full


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=FULL)], ids=str)
def test_same_answers(dtype: torch.dtype, launched: Counter[str]) -> None:
    """Two targets; the tokens of a sample do not fill a tile."""
    fused, plain = engines(vit(depth=2).to(dtype))
    assert fused_kinds(fused) == {"linear activation": 2, "linear fanout add": 3, "linear": 2}
    given = {"target": torch.tensor([[0, 9]] * 2)}
    found = fused(IMAGES.to(dtype), **given).relevance
    by_fused = Counter(launched)
    launched.clear()
    want = plain(IMAGES.to(dtype), **given).relevance
    assert by_fused["_linear_back_add_kernel"] == 3 and launched["_linear_back_add_kernel"] == 0
    # Of four adds the last one's relevance comes from no linear layer.
    assert by_fused["_add_normalised_sums_kernel"] == 1 and launched["_add_normalised_sums_kernel"] == 4
    assert by_fused["_linear_back_kernel"] + 3 == launched["_linear_back_kernel"]
    if dtype == torch.float32:
        assert_near(found, want, 2e-2)


def test_against_float64() -> None:
    """Where nothing is divided by what cancels, float32 is near to the rules in float64."""
    model = vit(depth=2)
    for parameter in model.parameters():
        parameter.data.abs_()
    exact = relprop.compile(model.double(), (IMAGES.double(),), method="full", backend="torch")(
        IMAGES.double(), target=3
    )
    fused, plain = engines(model.float(), method="full")
    assert fused_kinds(fused)["linear fanout add"] == 3
    errors = [
        float((engine(IMAGES, target=3).relevance - exact.relevance).norm() / exact.relevance.norm())
        for engine in (fused, plain)
    ]
    assert errors[0] < max(1e-4, 3 * errors[1]), errors


@pytest.mark.parametrize(
    ("method", "composite", "expected"),
    [
        ("gradient_x_input", None, {"linear activation": 2}),
        pytest.param("transformer_attribution", "chefer_stable", {"linear activation": 2}, marks=FULL),
        pytest.param("relevance_rollout", "chefer", {"linear fanout add": 3, "linear": 3}, marks=FULL),
        ("attention_rollout", "chefer", {}),
    ],
)
def test_other_methods(method: str, composite: str | None, expected: dict[str, int]) -> None:
    fused, plain = engines(method=method, composite=composite)
    assert fused_kinds(fused) == expected
    assert_near(fused(IMAGES, target=3).relevance, plain(IMAGES, target=3).relevance, 2e-2)


@pytest.mark.parametrize(
    ("method", "gated", "kind"),
    [
        ("attnlrp", False, "linear activation"),
        ("attnlrp", True, "linear mul activation"),
        ("gradient_x_input", True, "linear mul activation"),
    ],
)
def test_slopes_and_gates(method: str, gated: bool, kind: str, launched: Counter[str]) -> None:
    """An activation and a gate in the kernel of the layer above, as gradients and as AttnLRP has them."""
    model = vit(depth=2, **({"mlp_layer": SwiGLU} if gated else {}))
    exact = relprop.compile(model.double(), (IMAGES.double(),), method=method, backend="torch")
    want = exact(IMAGES.double(), target=[[0, 9]] * 2).relevance
    fused, plain = engines(model.float(), method=method)
    assert fused_kinds(fused)[kind] == 2
    for engine in (fused, plain):
        launched.clear()
        assert_near(engine(IMAGES, target=[[0, 9]] * 2).relevance, want, 1e-3)
        assert launched["_linear_back_gated_kernel"] == (2 if engine is fused else 0)


def test_a_gate_that_is_read_is_not_passed() -> None:
    name = "blocks.0.mlp.act"
    model = vit(depth=2, mlp_layer=SwiGLU).float()
    fused, plain = engines(model, method="attnlrp", latents=[name])
    assert fused_kinds(fused)["linear mul activation"] == 1
    found, want = (engine(IMAGES, target=3).at(name).relevance for engine in (fused, plain))
    assert_near(found, want, 1e-4)


def test_not_where_something_is_read_in_between() -> None:
    """A latent at the activation, and one at a branch of the add."""
    names = {"blocks.0.mlp.act": "linear activation", "blocks.0.mlp": "linear fanout add"}
    for name, kind in names.items():
        fused, plain = engines(latents=[name])
        everything, _ = engines()
        assert fused_kinds(fused)[kind] == fused_kinds(everything)[kind] - 1
        found, want = (engine(IMAGES, target=3) for engine in (fused, plain))
        assert_near(found.at(name).relevance, want.at(name).relevance, 2e-2)


def test_ledger_and_trace_see_every_step() -> None:
    fused, plain = engines()
    with_books, want = (engine(IMAGES, target=3, ledger=True).ledger for engine in (fused, plain))
    assert with_books is not None and want is not None
    assert len(with_books.entries) == len(want.entries)


def test_program_names_them() -> None:
    fused, _ = engines()
    printed = str(fused.program)
    assert "triton (fused)" in printed and "in step " in printed


def test_never_taped() -> None:
    """A tape does not see what the kernels do."""
    fused, plain = engines()
    assert fused._replays is None and plain._replays is None


def test_behind_a_custom_op() -> None:
    """As one graph, for `torch.compile`."""
    model = vit(depth=1).float()
    fused = relprop.compile(model, (IMAGES,), backend="triton", method="full")
    assert fused_kinds(fused)["linear fanout add"] == 1
    fused._replay(True, None)
    compiled = relprop.compile(model, (IMAGES,), backend="triton", method="full")
    replays = fused._replays
    replays._compile = _eager(replays._compile)  # type: ignore[method-assign]
    assert_near(fused(IMAGES, target=3).relevance, compiled(IMAGES, target=3).relevance, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "composite"), [("transformer_attribution", "chefer_stable"), ("attnlrp", "attnlrp")]
)
def test_through_the_compiler(method: str, composite: str) -> None:
    """The element-wise rest in code that torch.compile writes for the CPU, the kernels as they are."""
    model, options = vit(depth=1).float(), {"backend": "triton", "method": method, "composite": composite}
    compiled = relprop.compile(model, (IMAGES,), compile=True, **options)  # type: ignore[arg-type]
    plain = relprop.compile(model, (IMAGES,), **options)  # type: ignore[arg-type]
    for target in (3, 1):
        assert_near(compiled(IMAGES, target=target).relevance, plain(IMAGES, target=target).relevance, 1e-4)
    replays: Any = compiled._replays
    assert len(replays.shapes) == 1


def _eager(compile_run: Any) -> Any:
    """The lowered graph as it is, without the compiler."""

    def run(*arguments: Any) -> Any:
        before = torch.compile
        torch.compile = lambda graph, dynamic: graph  # type: ignore[assignment]
        try:
            return compile_run(*arguments)
        finally:
            torch.compile = before  # type: ignore[assignment]

    return run
