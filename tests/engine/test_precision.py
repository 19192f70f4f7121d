"""precision="medium": bfloat16 products where the hardware has them; torch's own flags decide nothing."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import relprop
from relprop import native
from relprop.backends import cpp, products
from relprop.rules import LinearAlphaBeta, linear_map
from relprop.torch_flags import exact_products
from tests.engine.models import relative, vit
from tests.engine.test_memory import allocated
from tests.rules.rule_checks import Op, random

needs_products = pytest.mark.skipif(
    not (linear_map.native_bfloat16() and native.available()[0] and native.products_fast(torch.bfloat16)),
    reason="needs a CPU with bfloat16 products",
)


def _flags() -> tuple[object, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
def test_medium_with_bfloat16_products(composite: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with bfloat16 instructions; torch emulates the products elsewhere."""
    monkeypatch.setattr(linear_map, "native_bfloat16", lambda: True)
    model, x = vit(), torch.randn(4, 3, 32, 32)
    truth = relprop.explain(copy.deepcopy(model).double(), x.double(), target=1, composite=composite).relevance
    before = _flags()
    engine = relprop.compile(model, (x,), precision="medium", composite=composite, backend=backend)
    found = engine(x, target=1).relevance
    assert _flags() == before
    assert found.dtype == torch.float32
    high = relprop.explain(model, x, target=1, composite=composite, backend=backend).relevance
    errors = [relative(found[i, 1:], truth[i, 1:]) for i in range(4)]
    # bfloat16 rounds to 2^-9: visible, and small on typical samples.
    assert 1e-4 < sorted(errors)[1] < 0.1
    assert relative(high, truth) < relative(found, truth)


def test_medium_without_bfloat16_instructions_is_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_map, "native_bfloat16", lambda: False)
    model, x = vit(), torch.randn(2, 3, 32, 32)
    medium = relprop.explain(model, x, target=1, precision="medium").relevance
    assert torch.equal(medium, relprop.explain(model, x, target=1).relevance)


@needs_products
@pytest.mark.parametrize("tape", [False, True])
@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
def test_the_sums_of_a_bfloat16_layer_are_not_formed_twice(
    composite: str, tape: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 model's forward leaves x w before it is rounded: the share-out divides by what it would form."""
    formed = []

    def share_out_product(*args: Any, **kwargs: Any) -> torch.Tensor:
        formed.append(args[3] is None)
        return share_out(*args, **kwargs)

    share_out = native.share_out_product
    monkeypatch.setattr(products.native, "share_out_product", share_out_product)
    model, x = vit(embed_dim=72).bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    found = relprop.compile(model, (x,), precision="medium", composite=composite, tape=tape)(x, target=1)
    assert formed and not any(formed)

    def without_sums(*args: Any) -> Any:
        return forward_with_sums(*args)[0], None

    forward_with_sums = products.forward_with_sums
    monkeypatch.setattr(products, "forward_with_sums", without_sums)
    again = relprop.compile(copy.deepcopy(model), (x,), precision="medium", composite=composite)(x, target=1)
    assert formed[-1] and torch.equal(again.logits, found.logits) and torch.equal(again.relevance, found.relevance)


@needs_products
@torch.no_grad()
def test_logits_of_a_bfloat16_model_are_rounded_no_more_than_its_own() -> None:
    """Its sums are added up in another order; each output is rounded once, as the model's own are."""
    own, ours = [], []
    for seed in range(6):
        model, x = vit(seed, embed_dim=72), torch.randn(4, 3, 32, 32).bfloat16()
        half = copy.deepcopy(model).bfloat16()
        engine = relprop.compile(half, (x,), precision="medium", composite="chefer_stable")
        truth = copy.deepcopy(half).double()(x.double())
        own.append(relative(half(x).double(), truth))
        ours.append(relative(engine(x, target=1).logits.double(), truth))
        assert torch.equal(relprop.explain(half, x, target=1, composite="chefer_stable").logits, half(x))
    assert sum(ours) < 1.25 * sum(own)


@needs_products
@torch.no_grad()
def test_few_rows_take_the_model_s_own_product() -> None:
    """Below the fewest rows that the kernels take, nothing is kept, and the sweep forms x w."""
    model = vit(img_size=16, embed_dim=72).bfloat16()
    x = torch.randn(2, 3, 16, 16).bfloat16()
    engine = relprop.compile(model, (x,), precision="medium", composite="chefer_stable")
    alone = engine(x[:1], target=1)
    assert torch.equal(alone.logits, model(x[:1]))
    truth = relprop.explain(model, x, target=1, composite="chefer_stable", backend="torch").relevance
    assert relative(alone.relevance[0, 1:], truth[0, 1:]) < 0.05
    assert relative(engine(x, target=1).relevance[0, 1:], truth[0, 1:]) < 0.05


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_both_parts_of_z_plus_are_of_the_same_factors(
    backend: str, beta: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A z+ of about 2 % of |x| |w|, whose factors bfloat16 holds and whose sums it does not."""
    monkeypatch.setattr(linear_map, "native_bfloat16", lambda: True)
    x, layer = torch.randint(1, 256, (rows, 256)).double() / 256, nn.Linear(256, 32, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(1, 256, (32, 256)) / 256 * torch.where(torch.arange(256) < 5, 1, -1))
    rule, op, relevance = LinearAlphaBeta(alpha=1 + beta, beta=beta), Op(layer, x, kind="linear"), random(2, rows, 32)
    (want, *_) = rule.propagate(op.call((x,)), relevance)
    call = op.call((x.float(),), torch.float32).at_precision("medium")
    run = rule.propagate if backend == "torch" else functools.partial(cpp.linear_alpha_beta, rule)
    (found, *_) = run(call, relevance.float())
    # bfloat16 rounds to 2^-9 on the way back, where with beta both products cancel.
    assert relative(found, want) < (0.03 if beta else 0.01)


@needs_products
def test_memory_counts_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit(embed_dim=96).bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    options: dict[str, Any] = {"precision": "medium", "composite": "chefer_stable", "tape": False}
    engine = relprop.compile(model, (x,), **options)
    assert "(sums)" in str(engine.program)
    kept = {i for step in engine.program.reverse for i in step.tensors if i < 0}
    assert kept and kept <= {i for step in engine.program.reverse for i in step.frees}
    for batch in (7, 32):
        images = torch.randn(batch, 3, 32, 32).bfloat16()
        target = torch.zeros(batch, dtype=torch.int64)
        real = allocated(lambda images=images, target=target: engine(images, target=target))
        predicted = engine.memory(batch) - engine._weights.derived.nbytes
        assert abs(predicted - real) < 0.1 * real, (batch, predicted, real)
    monkeypatch.setattr(cpp, "divides_by_sums", lambda *step: False)
    without = relprop.compile(copy.deepcopy(model), (x,), **options)
    assert "(sums)" not in str(without.program)
    grown = engine.memory(32) - without.memory(32)
    assert grown > 0, grown


aten = torch.ops.aten


@pytest.fixture
def flag() -> Iterator[None]:
    """torch's own flag for float32 products as it is set to round them."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


class Rounding(TorchDispatchMode):
    """A device that rounds the factors of float32 products to bfloat16 where torch's flag lets it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.linear.default)
        if func in products and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            args = [t.bfloat16().to(t.dtype) if isinstance(t, torch.Tensor) and t.dim() > 1 else t for t in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_torch_s_flag_does_not_round_what_z_plus_is_made_of(backend: str, flag: None) -> None:
    """z+ of products that are all negative is the rounding of x w: with its own exact |x| |w| it would be noise."""
    model, x = vit(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (x,), backend=backend, tape=False)
    with Rounding():
        found = engine(x, target=1)
        rounded = model(x)
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(rounded, model(x))
    want = engine(x, target=1)
    assert torch.equal(found.relevance, want.relevance) and torch.equal(found.logits, want.logits)


@pytest.mark.parametrize("tape", [False, True])
def test_torch_s_flag_changes_no_bit(tape: bool) -> None:
    """Of a pass that is run, taped under another flag, and replayed."""
    model, x = vit(embed_dim=72), torch.randn(4, 3, 32, 32)
    engine = relprop.compile(model, (x,), tape=tape)
    want = relprop.compile(copy.deepcopy(model), (x,), tape=False)(x, target=1).relevance
    try:
        for precision in ("medium", "highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(engine(x, target=1).relevance, want)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_flags_come_back_when_the_last_pass_has_ended(flag: None) -> None:
    before, entered, leave = _flags(), threading.Event(), threading.Event()

    def other() -> None:
        with exact_products():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with exact_products():
        thread.start()
        entered.wait()
    assert torch.get_float32_matmul_precision() == "highest"
    leave.set()
    thread.join()
    assert _flags() == before


@pytest.mark.parametrize("of", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv])
def test_flags_by_their_newer_names(of: Any) -> None:
    before, others = of.fp32_precision, _flags()[1]
    rounded = "tf32" if of is torch.backends.cuda.matmul else "bf16"
    of.fp32_precision = rounded
    try:
        with exact_products():
            assert of.fp32_precision in ("ieee", "none")
        assert of.fp32_precision == rounded
    finally:
        of.fp32_precision = before
    assert _flags()[1] == others


def test_an_allowance_for_gpus_alone_comes_back() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    before = _flags()
    try:
        with exact_products():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 and _flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")
