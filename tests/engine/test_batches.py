"""Right in every batch: samples, targets, threads, modes, and a model left as it was."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from tests.engine.models import Spelled, relative, vit

METHODS = sorted(relprop.methods())


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
@pytest.mark.parametrize("method", METHODS)
def test_batched_equals_alone(method: str, composite: str, backend: str) -> None:
    model, x = vit().double(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x[:1],), method=method, composite=composite, backend=backend)
    together = engine(x, target=torch.arange(5)).relevance
    for i in range(5):
        alone = engine(x[i : i + 1], target=i).relevance[0]
        assert relative(together[i], alone) < 1e-9


def test_a_sample_does_not_feel_its_neighbours() -> None:
    """A neighbour with huge values changes nothing: sums run over one sample."""
    model, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x,))
    calm = engine(x, target=3).relevance[0]
    x[1] *= 1e4
    assert relative(engine(x, target=3).relevance[0], calm) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_several_targets_share_one_pass(method: str) -> None:
    model, x = vit().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x,), method=method)
    targets = torch.tensor([[1, 2], [0, 9], [4, 4]])
    found = engine(x, target=targets)
    assert found.relevance.shape[:2] == (3, 2)
    assert torch.equal(found.target, targets)
    for t in range(2):
        assert relative(found.relevance[:, t], engine(x, target=targets[:, t]).relevance) < 1e-9


def test_target_forms_agree() -> None:
    model, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x,))
    best = engine(x).target
    assert torch.equal(best, model(x).argmax(-1))
    as_int = engine(x, target=4).relevance
    forms: list[Any] = [torch.tensor([4, 4]), [4, 4], (4,), -6, lambda logits: logits[:, 4]]
    for form in forms:
        assert relative(engine(x, target=form).relevance, as_int) < 1e-12


def test_callable_target_is_the_scores_gradient() -> None:
    model, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x,), method="gradient_x_input")
    found = engine(x, target=lambda logits: logits[:, 1] - 2 * logits[:, 2]).relevance
    parts = engine(x, target=[[1, 2], [1, 2]]).relevance
    assert relative(found, parts[:, 0] - 2 * parts[:, 1]) < 1e-12


class _Detector(nn.Module):
    """An output with two axes per sample: queries and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vit(num_classes=12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"boxes": x.mean((1, 2, 3)), "logits": self.body(x).view(-1, 3, 4)}


def test_index_tuples() -> None:
    model, x = _Detector().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    engine, flat = relprop.compile(model, (x,)), relprop.compile(model.body, (x,))
    assert relative(engine(x, target=(2, 1)).relevance, flat(x, target=9).relevance) < 1e-12
    several = engine(x, target=[[[0, 0], [2, 3]], [[1, 1], [0, 2]]])
    assert several.relevance.shape == (2, 2, 17)
    assert relative(several.relevance, flat(x, target=[[0, 11], [5, 2]]).relevance) < 1e-12


def test_output_by_name_and_function() -> None:
    model, x = _Detector().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    by_function = relprop.compile(model, (x,), output=lambda out: out["logits"])
    assert relative(by_function(x, target=(0, 1)).relevance, relprop.explain(model, x, target=(0, 1)).relevance) < 1e-12
    with pytest.raises(relprop.RelpropError, match=r"expected output= to name one floating-point tensor of .*'boxes'"):
        relprop.compile(model, (x,), output="scores")


@pytest.mark.parametrize("grad", [True, False])
def test_grad_modes_and_frozen_parameters(grad: bool) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    expected = relprop.explain(model, x, target=1).relevance
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.set_grad_enabled(grad):
        found = relprop.explain(frozen, x, target=1).relevance
    assert not found.requires_grad
    assert torch.equal(found, expected)
    with torch.inference_mode():
        assert relative(relprop.explain(frozen, x, target=1).relevance, expected) < 1e-6


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "requires": {k: p.requires_grad for k, p in model.named_parameters()},
        "versions": {k: p._version for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "hooks": {
            k: [len(getattr(m, name)) for name in vars(m) if name.endswith("_hooks")] for k, m in model.named_modules()
        },
        "forwards": {k: m.forward for k, m in model.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
    }


def test_the_model_is_left_as_it_was() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    calls: list[int] = []
    handle = model.norm.register_forward_hook(lambda *_: calls.append(1))
    before, logits = _state(model), model(x)
    for method in ("transformer_attribution", "full", "attention_gradcam"):
        relprop.explain(model, x, method=method, ledger=method != "attention_gradcam", check=True)
    after = _state(model)
    for key in ("tensors", "grads"):
        assert all(torch.equal(before[key][k], after[key][k]) for k in before[key])
    for key in ("requires", "versions", "training", "hooks", "forwards", "attributes"):
        assert before[key] == after[key]
    assert torch.equal(model(x), logits)
    handle.remove()


def test_threads_share_a_model() -> None:
    model, inputs = vit(), [torch.randn(b, 3, 32, 32) for b in (1, 2, 3, 4)]
    engine = relprop.compile(model, (inputs[0],))
    expected = [engine(x, target=2).relevance for x in inputs]
    failures: list[str] = []

    def work(worker: int) -> None:
        for _ in range(5):
            for x, want in zip(inputs, expected, strict=True):
                found = relprop.explain(model, x, target=2) if worker % 2 else engine(x, target=2)
                if relative(found.relevance, want) > 1e-4:
                    failures.append(f"worker {worker}, batch {len(x)}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Weights that change are never explained with stale copies.


def _fresh(model: nn.Module, x: Tensor, precision: str = "highest") -> Tensor:
    backend = "torch" if precision == "highest" else "cpp"
    return relprop.explain(copy.deepcopy(model), x, target=1, backend=backend, precision=precision).relevance


EVERY_CACHE = pytest.mark.parametrize(
    ("backend", "precision"), [("torch", "highest"), ("cpp", "highest"), ("cpp", "medium")]
)


@EVERY_CACHE
@pytest.mark.parametrize("change", ["optimiser", "load_state_dict", "assign", "in_place", "replaced", "module"])
def test_changed_weights_are_noticed(change: str, backend: str, precision: str) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (x,), backend=backend, precision=precision)
    before = engine(x, target=1).relevance
    if change == "optimiser":
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        model(x).square().sum().backward()
        optimiser.step()
    elif change == "load_state_dict":
        model.load_state_dict(vit(seed=1).state_dict())
    elif change == "assign":
        model.load_state_dict(vit(seed=1).state_dict(), assign=True)
    elif change == "in_place":
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight.mul_(-1.5)
    elif change == "module":
        model.blocks[1].mlp = copy.deepcopy(vit(seed=2).blocks[1].mlp)
    else:
        model.blocks[1].mlp.fc1.weight = nn.Parameter(torch.randn_like(model.blocks[1].mlp.fc1.weight))
    after = engine(x, target=1).relevance
    assert relative(after, before) > 1e-3
    assert relative(after, _fresh(model, x, precision)) < 1e-4


@EVERY_CACHE
def test_a_write_through_data_needs_refresh(backend: str, precision: str) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (x,), backend=backend, precision=precision)
    engine(x, target=1)
    for block in model.blocks:
        block.mlp.fc1.weight.data.mul_(-1.5)
    engine.refresh()
    assert relative(engine(x, target=1).relevance, _fresh(model, x, precision)) < 1e-4


def test_second_compile_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    first = relprop.compile(model, (x,))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr("relprop.plans.capture", refuse)
    assert relprop.compile(model, (x[:1],)).program is first.program
    relprop.compile(model, (x,), method="full")  # one capture serves all methods
    with pytest.raises(AssertionError, match="captured again"):
        relprop.compile(vit(), (x,))
    model.global_pool = "avg"  # the forward now means something else
    with pytest.raises(AssertionError, match="captured again"):
        relprop.compile(model, (x,))


def test_a_cached_model_can_be_dropped() -> None:
    import gc
    import weakref

    model, x = Spelled().eval(), torch.randn(1, 3, 32, 32)
    relprop.explain(model, x)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, x = vit().to(dtype), torch.randn(3, 3, 32, 32, dtype=dtype)
    found = relprop.explain(model, x, target=1, composite="chefer_stable")
    assert found.relevance.dtype == torch.float32
    truth = relprop.explain(copy.deepcopy(model).double(), x.double(), target=1, composite="chefer_stable")
    assert relative(found.relevance[:, 1:], truth.relevance[:, 1:]) < 0.1
    alone = relprop.explain(model, x[1:2], target=1, composite="chefer_stable")
    assert relative(found.relevance[1:2], alone.relevance) < 0.05
