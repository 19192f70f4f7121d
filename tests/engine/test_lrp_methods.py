"""AttnLRP and its relatives against the same models written out anew with detached pieces and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relprop
from relprop.errors import OptionError
from tests.engine.models import relative, vit

METHODS = ["attnlrp", "cp_lrp", "reslrp", "libragrad"]
SIZE, HEADS, WIDTH = 24, 3, 8


class Scale(torch.autograd.Function):
    """The identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


def scaled(x: Tensor, factor: float | Tensor) -> Tensor:
    return Scale.apply(x, torch.as_tensor(factor, dtype=x.dtype))  # type: ignore[no-untyped-call]


class Rules:
    """The published rules as changes of a forward pass whose gradient is then taken as it is."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.detached = method in ("cp_lrp", "libragrad")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.method == "plain":
            quarters = halves = 1.0
        else:
            quarters, halves = (0.0, 1.0) if self.detached else (0.25, 0.5)
        logits = scaled(q, quarters) @ scaled(k, quarters).mT / q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return logits.softmax(-1) @ scaled(v, halves)

    def activation(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return f(x) if self.method == "plain" else x * (f(x) / x).detach()

    def gate(self, gate: Tensor, value: Tensor) -> Tensor:
        if self.method == "plain":
            return gate * value
        return gate.detach() * value if self.method == "cp_lrp" else scaled(gate * value, 0.5)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        sigma = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        sigma = sigma if self.method == "plain" else sigma.detach()
        return (x - x.mean(-1, keepdim=True)) / sigma * norm.weight + norm.bias

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        sigma = (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x / (sigma if self.method == "plain" else sigma.detach()) * weight

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        if self.method != "reslrp":
            return a + b
        # Shares of R = (a + b) g by a'' and b'': what agrees with the sum's sign counts twice.
        total = (a + b).detach()
        weights = [1 + ((part * total) > 0).to(a.dtype) for part in (a.detach(), b.detach())]
        z = weights[0] * a.detach() + weights[1] * b.detach()
        return scaled(a, weights[0] * total / z) + scaled(b, weights[1] * total / z)


def vit_again(model: Any, images: Tensor, rules: Rules, position: Tensor | None = None) -> Tensor:
    """A timm ViT's forward pass under other rules."""
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + (model.pos_embed if position is None else position)
    for block in model.blocks:
        y = block.attn.qkv(rules.layer_norm(x, block.norm1)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = y.permute(2, 0, 3, 1, 4)
        x = rules.add(x, block.attn.proj(rules.attention(q, k, v).transpose(1, 2).flatten(2)))
        y = block.mlp.fc1(rules.layer_norm(x, block.norm2))
        x = rules.add(x, block.mlp.fc2(rules.activation(F.gelu, y)))
    return model.head(rules.layer_norm(x, model.norm)[:, 0])


class Decoder(nn.Module):
    """Rotary positions, RMS norms, gated MLPs and causal attention, as language models have them."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, SIZE)
        self.norms = nn.ParameterList(torch.rand(SIZE) + 0.5 for _ in range(2 * depth))
        self.projections = nn.ModuleList(nn.Linear(SIZE, n * SIZE) for _ in range(depth) for n in (3, 1))
        self.mlps = nn.ModuleList(
            nn.Linear(a, b) for _ in range(depth) for a, b in ((SIZE, 40), (SIZE, 40), (40, SIZE))
        )
        self.head = nn.Linear(SIZE, 50)
        self.rules = Rules("plain")
        angle = torch.arange(64)[:, None] / 10 ** (torch.arange(WIDTH // 2) / 2)
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1))
        self.register_buffer("sin", torch.cat([angle.sin(), angle.sin()], -1))

    def rotated(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        turned = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
        return x * self.cos[:length] + turned * self.sin[:length]

    def run(self, x: Tensor, rules: Rules) -> Tensor:
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for i in range(len(self.norms) // 2):
            y = self.projections[2 * i](rules.rms_norm(x, self.norms[2 * i])).unflatten(-1, (3, HEADS, WIDTH))
            q, k, v = y.permute(2, 0, 3, 1, 4)
            y = rules.attention(self.rotated(q), self.rotated(k), v, seen)
            x = rules.add(x, self.projections[2 * i + 1](y.transpose(1, 2).flatten(2)))
            y = rules.rms_norm(x, self.norms[2 * i + 1])
            gate, up, down = self.mlps[3 * i : 3 * i + 3]
            x = rules.add(x, down(rules.gate(rules.activation(F.silu, gate(y)), up(y))))
        return self.head(x)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for i in range(len(self.norms) // 2):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norms[2 * i]
            q, k, v = self.projections[2 * i](y).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, seen)
            x = x + self.projections[2 * i + 1](y.transpose(1, 2).flatten(2))
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norms[2 * i + 1]
            gate, up, down = self.mlps[3 * i : 3 * i + 3]
            x = x + down(F.silu(gate(y)) * up(y))
        return self.head(x)


def decoder() -> Decoder:
    model = Decoder().double().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return model


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("method", METHODS)
def test_a_stock_vit(method: str, backend: str) -> None:
    model = vit().double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = images.clone().requires_grad_()
    logits = vit_again(model, leaf, Rules(method))
    assert relative(logits.detach(), model(images).detach()) < 1e-12
    (gradient,) = torch.autograd.grad(logits[:, 4].sum(), leaf)
    engine = relprop.compile(model, (images,), method=method, backend=backend)
    assert engine.program.gradient_form
    assert relative(engine(images, target=4).relevance, (images * gradient).sum(1)) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_a_gated_causal_decoder(method: str) -> None:
    model = decoder()
    leaf = model.embed(IDS).detach().requires_grad_()
    logits = model.run(leaf, Rules(method))
    assert relative(logits.detach(), model(IDS).detach()) < 1e-12
    (gradient,) = torch.autograd.grad(logits[:, 5, 9].sum(), leaf)
    found = relprop.explain(model, IDS, method=method, target=(5, 9)).relevance
    assert relative(found, (leaf * gradient).sum(-1).detach()) < 1e-10


@pytest.mark.parametrize("method", [*METHODS, "pa_lrp"])
def test_walking_relevance_gives_the_same(method: str) -> None:
    """With a ledger relevance itself is walked, rule by rule; it starts as the score."""
    model = decoder()
    engine = relprop.compile(model, (IDS,), method=method)
    plain, booked = engine(IDS, target=(6, 3)), engine(IDS, target=(6, 3), ledger=True)
    assert relative(booked.relevance, plain.relevance) < 1e-9
    assert booked.ledger is not None
    assert torch.allclose(booked.ledger.seed[0], plain.logits[:, 6, 3])


def test_positions_have_a_sink_of_their_own() -> None:
    """Half of what reaches a rotated query or key belongs to its position, and nothing is lost or counted twice."""
    model = decoder()

    def explain(method: str, **options: Any) -> Any:
        return relprop.explain(model, IDS, method=method, target=(6, 3), ledger=True, method_options=options)

    added, alone, words = (explain("pa_lrp", positions=p) for p in ("added", "alone", "left out"))
    torch.testing.assert_close(added.relevance, alone.relevance + words.relevance)
    torch.testing.assert_close(alone.relevance.sum(-1), added.ledger.absorbed["position"][0])
    assert float(alone.relevance.abs().min()) > 0
    leaf, rules = model.embed(IDS).detach().requires_grad_(), Rules("attnlrp")
    rotated, tables = model.rotated, []

    def counted(x: Tensor) -> Tensor:
        length = x.shape[2]
        cos, sin = (t[:length].expand_as(x).clone().requires_grad_() for t in (model.cos, model.sin))
        tables.extend((cos, sin))
        turned = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
        return scaled(x * cos, 0.5) + scaled(turned * sin, 0.5)

    model.rotated = counted  # type: ignore[method-assign]
    score = model.run(leaf, rules)[:, 6, 3].sum()
    model.rotated = rotated  # type: ignore[method-assign]
    gradient, *others = torch.autograd.grad(score, [leaf, *tables])
    assert relative(words.relevance, (leaf * gradient).sum(-1).detach()) < 1e-10
    kept = sum((t * g).sum((1, 3)) for t, g in zip(tables, others, strict=True)).detach()  # type: ignore[attr-defined]
    assert relative(alone.relevance, kept) < 1e-10


def test_position_embeddings_of_an_image_model() -> None:
    model, images = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found, alone = (
        relprop.explain(model, images, method="pa_lrp", target=2, method_options={"positions": p}).relevance
        for p in ("left out", "alone")
    )
    assert relative(found, relprop.explain(model, images, method="attnlrp", target=2).relevance) < 1e-9
    position = model.pos_embed.detach().expand(2, -1, -1).clone().requires_grad_()
    score = vit_again(model, images, Rules("attnlrp"), position)[:, 2].sum()
    (gradient,) = torch.autograd.grad(score, position)
    share = (position * gradient).sum(-1).detach()[:, 1:].reshape(2, 4, 4) / 64  # a patch has 64 pixels
    assert relative(alone, share.repeat_interleave(8, 1).repeat_interleave(8, 2)) < 1e-9


@pytest.mark.parametrize("positions", ["added", "alone", "left out"])
def test_positions_of_kept_channels(positions: str) -> None:
    """Each channel has its own relevance and an even part of its position's."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model, given, axis, channels in ((vit().double(), images, 1, 3), (decoder(), IDS, -1, None)):
        summed, kept = (
            relprop.explain(
                model, given, method="pa_lrp", target=None if axis == 1 else (6, 3), method_options=options
            ).relevance
            for options in ({"positions": positions}, {"positions": positions, "channels": "kept"})
        )
        assert kept.ndim == summed.ndim + 1
        assert channels is None or kept.shape[axis] == channels
        assert relative(kept.sum(axis), summed) < 1e-10
        assert (float((kept - kept.mean(axis, keepdim=True)).abs().max()) < 1e-12) == (positions == "alone")


def test_wrong_option() -> None:
    with pytest.raises(OptionError, match=r"positions: expected one of added, alone, left out, got 'both'"):
        relprop.explain(vit(), torch.randn(2, 3, 32, 32), method="pa_lrp", method_options={"positions": "both"})


@pytest.mark.parametrize("composite", ["epsilon", "gamma", "epsilon_plus", "alpha2_beta1"])
def test_without_attention_they_are_the_classical_rules(composite: str) -> None:
    """A convolution and two linear layers, every contribution z[n, k] written out."""
    torch.manual_seed(0)
    conv, first, last = nn.Conv2d(2, 4, 2, 2), nn.Linear(16, 6), nn.Linear(6, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), first, nn.ReLU(), last).double().eval()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    found = relprop.explain(model, x, method="full", composite=composite, target=1, backend="torch").relevance
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # [B, 4 places, 8]
    hidden = conv(x).relu()
    inner = first(hidden.flatten(1)).relu()
    relevance = torch.zeros(2, 3, dtype=torch.float64)
    relevance[:, 1] = model(x)[:, 1].detach()
    dense = {"epsilon": epsilon, "gamma": gamma, "epsilon_plus": epsilon, "alpha2_beta1": alpha2_beta1}[composite]
    spatial = {"epsilon": epsilon, "gamma": gamma, "epsilon_plus": z_plus, "alpha2_beta1": alpha2_beta1}[composite]
    with torch.no_grad():
        relevance = dense(inner[:, None] * last.weight, last.bias, relevance)
        relevance = dense(hidden.flatten(1)[:, None] * first.weight, first.bias, relevance)
        at_places = relevance.reshape(2, 4, 4).transpose(1, 2)  # [B, places, channels]
        flat = spatial(patches[:, :, None] * conv.weight.flatten(1), conv.bias, at_places)
        expected = F.fold(flat.transpose(1, 2), (4, 4), 2, stride=2).sum(1)
    assert relative(found, expected) < 1e-9


def divided(part: Tensor, whole: Tensor, relevance: Tensor) -> Tensor:
    """Sum over outputs n of part[n, k] R[n] / (whole[n] +- 1e-6)."""
    stable = torch.where(whole < 0, whole - 1e-6, whole + 1e-6)
    share = torch.where(part.abs().sum(-1) > 0, relevance / stable, 0.0)
    return (part * share[..., None]).sum(-2)


def epsilon(z: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
    assert bias is not None
    return divided(z, z.sum(-1) + bias, relevance)


def gamma(z: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
    assert bias is not None
    sign = (z.sum(-1) + bias).sign()
    liked = z * (1 + 0.25 * (z * sign[..., None] > 0))
    return divided(liked, liked.sum(-1) + bias * (1 + 0.25 * (bias * sign > 0)), relevance)


def z_plus(z: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
    assert bias is not None
    return divided(z.clamp(min=0), z.clamp(min=0).sum(-1) + bias.clamp(min=0), relevance)


def alpha2_beta1(z: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
    assert bias is not None
    against = z.clamp(max=0)
    return 2 * z_plus(z, bias, relevance) - divided(against, against.sum(-1) + bias.clamp(max=0), relevance)


@pytest.mark.parametrize("method", ["full", "gradient_x_input", "attnlrp", "integrated_gradients", "smoothgrad"])
def test_channels_kept(method: str) -> None:
    """The answer in the input's shape adds up to the summed one; two targets have an axis of their own."""
    model, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    target = torch.tensor([[1, 2], [3, 4]])
    kept = relprop.explain(model, x, target=target, method=method, method_options={"channels": "kept"}).relevance
    assert kept.shape == (2, 2, 3, 32, 32)
    assert relative(kept.sum(2), relprop.explain(model, x, target=target, method=method).relevance) < 1e-12
    with pytest.raises(OptionError, match="channels: expected 'summed' or 'kept', got 'all'"):
        relprop.explain(model, x, method=method, method_options={"channels": "all"})
