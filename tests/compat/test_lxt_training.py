"""Losses on relevance: their gradients against finite differences of relevance computed without a graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from relprop.compat import lxt
from tests.engine.models import Block, relative, vit

pytestmark = pytest.mark.filterwarnings("ignore")
F = nn.functional
STEP = 1e-5


class Twice(nn.Module):
    """A function between linear layers, twice, so that what one computes depends on the other."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.head, self.function = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3), function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.b(self.function(self.a(x))))).mean(1)


def relevance(block: Any, model: nn.Module, leaf: Tensor, target: int = 1, graph: bool = True) -> Tensor:
    with block(model), sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf, create_graph=graph)
    return leaf * gradient


def loss_of(relevance: Tensor) -> Tensor:
    probe = torch.linspace(-1.0, 1.0, relevance.numel(), dtype=relevance.dtype).view_as(relevance)
    return (relevance * probe).sum() + relevance.square().sum()


def check_gradients(block: Any, model: nn.Module, x: Tensor, tolerance: float = 1e-6) -> None:
    """Along one direction of every parameter and of the input."""
    leaf = x.clone().requires_grad_()
    values = {"input": leaf, **dict(model.named_parameters())}
    loss = loss_of(relevance(block, model, leaf))
    gradients = torch.autograd.grad(loss, [*values.values()], allow_unused=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(0)
    for (name, value), gradient in zip(values.items(), gradients, strict=True):
        direction = torch.randn(value.shape, dtype=value.dtype, generator=generator)
        there = []
        for step in (STEP, -STEP):
            with torch.no_grad():
                value.add_(direction, alpha=step)
            there.append(float(loss_of(relevance(block, model, leaf, graph=False))))
            with torch.no_grad():
                value.sub_(direction, alpha=step)
        expected = (there[0] - there[1]) / (2 * STEP)
        found = float((gradient * direction).sum())
        assert abs(found - expected) < tolerance * max(abs(expected), abs(float(loss.detach()))), name


def spelled_layer_norm(h: Tensor) -> Tensor:
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def spelled_attention(h: Tensor) -> Tensor:
    return (h @ (h * 0.7).transpose(-2, -1)).softmax(-1) @ h


def fused_attention(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h * 0.7, h)


def in_place_silu(h: Tensor) -> Tensor:
    h = h.clone()
    return h.mul_(h.sigmoid())


def softmax_in_place(h: Tensor) -> Tensor:
    weights = (h @ h.transpose(-2, -1)).softmax(-1)
    weights *= 0.5
    return weights @ h


def gated(h: Tensor) -> Tensor:
    return F.silu(h) * h.roll(1, -1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": lambda h: torch.sigmoid(h.square() + 1),
    "softplus": lambda h: F.softplus(h.square() + 1),
    "relu in place": lambda h: F.relu(h.clone(), inplace=True),
    "silu in place": in_place_silu,
    "square in place": lambda h: torch.Tensor.mul_(*[h.clone()] * 2),
    "quick gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "spelled gelu": lambda h: 0.5 * h * (1 + torch.tanh(0.79788456 * (h + 0.044715 * torch.pow(h, 3.0)))),
    "sum of one value": lambda h: h + torch.relu(h),
    "gate": gated,
    "quotient": lambda h: h / (2 + torch.tanh(h.roll(1, -1))),
    "layer norm": lambda h: F.layer_norm(h, (6,)),
    "spelled layer norm": spelled_layer_norm,
    "rms norm": lambda h: F.rms_norm(h, (6,)),
    "spelled rms norm": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "group norm": lambda h: F.group_norm(h, 2),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "length": lambda h: h / (h.norm(dim=-1, keepdim=True) + 1e-6),
    "softmax": lambda h: h.softmax(-1),
    "exp": lambda h: (0.1 * h.square() - 1).exp(),
    "attention": fused_attention,
    "spelled attention": spelled_attention,
    "einsum": lambda h: torch.einsum("bij,bkj,bkl->bil", h, h, h),
}
METHODS = [(name, lxt.attnlrp) for name in FUNCTIONS] + [
    (name, block) for name in ("attention", "spelled attention", "gate") for block in (lxt.cp_lrp, lxt.libragrad)
]


@pytest.mark.parametrize(("name", "block"), METHODS)
def test_gradients_are_those_of_finite_differences(name: str, block: Any) -> None:
    x = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    check_gradients(block, Twice(FUNCTIONS[name]), x)


def test_a_constant_that_the_model_writes_to() -> None:
    """Relevance needs it no more; what it was is gone for gradients of relevance, and torch says so."""
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    outside = Twice(lambda h: (h @ h.transpose(-2, -1)).softmax(-1) * 0.5 @ h)
    expected = relevance(lxt.cp_lrp, outside, x, graph=False)
    assert relative(relevance(lxt.cp_lrp, Twice(softmax_in_place), x, graph=False), expected) < 1e-12
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        relevance(lxt.cp_lrp, Twice(softmax_in_place), x).sum().backward()


class Powers(nn.Module):
    """Pooling by a power that is trained, and layers that torch has as modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.power = nn.Parameter(torch.tensor(2.5))
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.RMSNorm(6, 1e-6))
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).square().add(0.1).pow(self.power).mean(1))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=2, n_positions=8, use_cache=False)

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, embeds: Tensor) -> Tensor:
            return self.model(inputs_embeds=embeds).logits[:, -1]

    return Embedded()


@pytest.mark.parametrize("block", [lxt.attnlrp, lxt.cp_lrp])
@pytest.mark.parametrize("name", ["powers", "spelled block", "timm", "gpt2"])
def test_gradients_of_whole_models(name: str, block: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator)
    if name == "powers":
        model, x = Powers(), tokens[..., :5]
    elif name == "spelled block":
        torch.manual_seed(0)
        model, x = nn.Sequential(Block("matmul", 8, 2), nn.Flatten(1), nn.Linear(32, 3)), tokens
    elif name == "timm":
        model = vit(img_size=16, embed_dim=16, depth=2, num_heads=2)
        x = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=generator)
    else:
        model, x = gpt2(), tokens
    check_gradients(block, model.double().eval(), x)


def rules_of_lxt() -> Any:
    found = importlib.util.find_spec("lxt")
    if found is None or not found.submodule_search_locations:
        pytest.skip("LXT is not installed")
    path = (
        Path(found.submodule_search_locations[0]) / "efficient" / "rules.py"
    )  # its package imports older transformers
    spec = importlib.util.spec_from_file_location("lxt_rules", path)
    assert spec is not None and spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    return rules


def test_the_derivative_of_one_activation() -> None:
    """R = x w v sigmoid(w x), whose derivative by w is x v sigmoid + x^2 v w sigmoid'."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.w * x)

    model, leaf = One(), torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    relevance(lxt.attnlrp, model, leaf, target=0).sum().backward()
    sigmoid = float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    assert model.w.grad is not None
    assert float(model.w.grad) == pytest.approx(sigmoid + sigmoid * (1 - sigmoid), abs=1e-12)  # 0.928
    y = rules_of_lxt().identity_rule_implicit(F.silu, model.w * leaf)
    (theirs,) = torch.autograd.grad((leaf * torch.autograd.grad(y, leaf, create_graph=True)[0]).sum(), model.w)
    assert float(theirs) == pytest.approx(sigmoid, abs=1e-6)  # 0.731: its slope is a constant


@pytest.mark.parametrize("name", ["silu", "spelled gelu", "layer norm", "spelled rms norm", "spelled attention"])
def test_derivatives_of_derivatives(name: str) -> None:
    """What a loss's gradients are computed from is differentiable in turn."""
    model = Twice(FUNCTIONS[name])
    x = torch.randn(1, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)

    def found(weight: Tensor, x: Tensor) -> Tensor:
        holder = Twice(FUNCTIONS[name])
        del holder.a.weight
        holder.a.weight = weight  # type: ignore[assignment]
        return relevance(lxt.attnlrp, holder, x)

    weight = model.a.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(found, (weight, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(found, (weight, x), fast_mode=True)


@pytest.mark.parametrize("name", ["sqrt", "silu", "tanh", "gelu"])
def test_zeros_have_finite_derivatives(name: str) -> None:
    function = getattr(torch, name, None) or getattr(F, name)

    class Direct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    leaf = torch.tensor([[0.0, 0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    found = relevance(lxt.attnlrp, Direct(), leaf)
    assert torch.equal(found[0, 0], torch.zeros_like(found[0, 0]))
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert bool(gradient.isfinite().all())


def test_other_losses_in_the_same_backward_pass() -> None:
    """They get their plain gradients; relevance of another target is relevance still."""
    model, x = vit(img_size=16, embed_dim=16, depth=1, num_heads=2).double(), torch.randn(2, 3, 16, 16).double()
    parameters, labels, leaf = [*model.parameters()], torch.tensor([1, 2]), x.clone().requires_grad_()
    plain = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters)
    alone = torch.autograd.grad(loss_of(relevance(lxt.attnlrp, model, leaf)), parameters, materialize_grads=True)
    with lxt.attnlrp(model), sdpa_kernel(SDPBackend.MATH):
        logits = model(leaf)
    found = [leaf * torch.autograd.grad(logits[:, k].sum(), leaf, create_graph=True)[0] for k in (1, 2)]
    for k, one in zip((1, 2), found, strict=True):
        assert relative(one.detach(), relevance(lxt.attnlrp, model, leaf, k, graph=False).detach()) < 1e-12
    (logits_alone,) = torch.autograd.grad(logits[:, 2].sum(), leaf, retain_graph=True)
    assert relative((leaf * logits_alone).detach(), found[1].detach()) < 1e-12
    both = torch.autograd.grad(F.cross_entropy(logits, labels) + loss_of(found[0]), parameters)
    for one, first, second in zip(both, plain, alone, strict=True):
        assert torch.allclose(one, first + second, atol=1e-12)


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_low_precision(kind: str) -> None:
    model, x = vit(img_size=16, embed_dim=16, depth=1, num_heads=2), torch.randn(2, 3, 16, 16)
    parameters = [*model.parameters()]
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(relevance(lxt.attnlrp, model, leaf).sum(), parameters, materialize_grads=True)
    if kind == "bfloat16":
        model, leaf = model.bfloat16(), x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found_relevance = relevance(lxt.attnlrp, model, leaf)
    found = torch.autograd.grad(found_relevance.float().sum(), parameters, materialize_grads=True)
    flat = [torch.cat([g.float().flatten() for g in gradients]) for gradients in (found, expected)]
    assert relative(*flat) < 0.1


def test_a_training_loop() -> None:
    """A loss on relevance itself: its gradients reach the weights, and it goes down."""
    model, x = vit(), torch.randn(2, 3, 32, 32)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        outside = relevance(lxt.attnlrp, model, x.clone().requires_grad_(), target=3)[..., :16].square().sum()
        optimiser.zero_grad()
        outside.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "qkv.weight" in n)
        optimiser.step()
        losses.append(float(outside))
    assert losses[-1] < losses[0]
