"""Capture: one graph for every spelling, roles from structure, rows hoisted, free sizes, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.capture import capture, lower
from relprop.graph import Graph
from tests.engine.models import Spelled, relative, vit


def graph_of(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    return lower(capture(model.eval(), args, kwargs, None))


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes if node.carrying]


IMAGES = torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("spelling", ["matmul", "bmm"])
def test_spellings_of_attention_are_one_op(spelling: str) -> None:
    plain, spelled = graph_of(Spelled("sdpa"), IMAGES), graph_of(Spelled(spelling), IMAGES)
    assert kinds(spelled).count("attention") == kinds(plain).count("attention") == 2
    assert "softmax" not in kinds(spelled) and "matmul" not in kinds(spelled)
    x = IMAGES.double()
    for method in ("transformer_attribution", "full", "attention_rollout", "attention_gradcam"):
        expected = relprop.explain(Spelled("sdpa").double().eval(), x, target=1, method=method).relevance
        found = relprop.explain(Spelled(spelling).double().eval(), x, target=1, method=method).relevance
        assert relative(found, expected) < 1e-9


class BiasedByQueries(nn.Module):
    """Attention whose mask is made from the queries, as relative positions often are."""

    def __init__(self, fused: bool, kv_heads: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.fused, self.kv_heads, self.head = fused, kv_heads, nn.Linear(24, 3)
        self.q, self.kv = nn.Linear(24, 24), nn.Linear(24, 12 * kv_heads)
        self.position = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = self.q(x).unflatten(-1, (4, 6)).transpose(1, 2), self.kv(x).chunk(2, -1)
        k, v = (t.unflatten(-1, (self.kv_heads, 6)).transpose(1, 2) for t in (k, v))
        bias = q @ self.position
        if self.fused:
            grouped = self.kv_heads != 4
            out = nn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=grouped)
        else:
            k, v = (t.repeat_interleave(4 // self.kv_heads, 1) for t in (k, v))
            out = (q @ k.mT / 6**0.5 + bias).softmax(-1) @ v
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_mask_made_from_the_input_has_its_relevance(kv_heads: int) -> None:
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    fused, plain = (BiasedByQueries(kind, kv_heads).double().eval() for kind in (True, False))
    for method in ("full", "attnlrp", "cp_lrp"):
        expected = relprop.explain(plain, x, target=1, method=method).relevance
        assert relative(relprop.explain(fused, x, target=1, method=method).relevance, expected) < 1e-9
    leaf = x.clone().requires_grad_()
    fused(leaf)[:, 1].sum().backward()
    found = relprop.explain(fused, x, target=1, method="gradient_x_input").relevance
    assert relative(found, (leaf.grad * x).sum(-1)) < 1e-12  # type: ignore[operator]


def test_matmul_attention_without_hoisting_is_the_same() -> None:
    """The slice of the class token may sit anywhere: hoisting it changes no number."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Spelled()

        def forward(self, images: Tensor) -> Tensor:
            body = self.body
            x = body.embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([body.token.expand(x.shape[0], -1, -1), x], 1) + body.position
            rows = body.head(body.norm(body.blocks(x)))
            # All rows reach the output; a target then picks the class token's.
            return rows

    late, body, x = Late().double().eval(), Spelled().double().eval(), IMAGES.double()
    late_graph = graph_of(late, x)
    assert all("query_rows" not in site.attributes for site in late_graph.attention_sites())
    hoisted = graph_of(body, x).attention_sites()
    assert hoisted[-1].attributes["query_rows"] == (0, 1) and "query_rows" not in hoisted[0].attributes
    for method in ("transformer_attribution", "full", "attention_rollout", "attention_gradcam"):
        found = relprop.compile(late, (x,), method=method, composite=_without_epsilon())(x, target=(0, 3))
        plain = relprop.compile(body, (x,), method=method, composite=_without_epsilon())(x, target=3)
        assert torch.allclose(found.relevance, plain.relevance, rtol=1e-9, atol=1e-12)
        assert torch.allclose(found.logits[:, 0], plain.logits)


def _without_epsilon() -> relprop.Composite:
    """chefer with plain sums at fan-outs and selections, so that a selection's place cannot matter."""
    from relprop.composites import find_composite

    return find_composite("chefer").overridden(
        relprop.entry("fanout", "epsilon"), relprop.entry("select", "epsilon"), name="chefer_plain"
    )


def test_last_layer_costs_one_row() -> None:
    engine = relprop.compile(vit(), (IMAGES,))
    flops = engine.program.flops()
    rows = [line for line in str(engine.program).split("\n") if "blocks.2.mlp.fc1" in line]
    assert rows and all(" 1 " in row for row in rows)
    whole = relprop.compile(vit(global_pool="avg", class_token=False), (IMAGES,)).program.flops()
    assert flops["forward"] < 0.9 * whole["forward"]


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class SpelledNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(dim)), nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6) * self.weight + self.bias


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


class _Around(nn.Module):
    """embed, then the module in question, then a head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(6, 8), inner, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)).mean(1))


@pytest.mark.parametrize(
    ("inner", "kind"), [(RMSNorm(8), "norm"), (QuickGELU(), "activation"), (TanhGELU(), "activation")]
)
def test_spelled_norms_and_activations_are_one_op(inner: nn.Module, kind: str) -> None:
    found = kinds(graph_of(_Around(inner), torch.randn(2, 5, 6)))
    assert found.count(kind) == 1
    assert "fanout" not in found
    model, x = _Around(inner).double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    relevance = relprop.explain(model, x, target=1, method="full").relevance
    assert relevance.shape == (2, 5)
    gradient = relprop.explain(model, x, target=1, method="gradient_x_input").relevance
    leaf = x.clone().requires_grad_()
    model(leaf)[:, 1].sum().backward()
    assert relative(gradient, (leaf.grad * x).sum(-1)) < 1e-12  # type: ignore[operator]


def test_spelled_layer_norm() -> None:
    model, x = _Around(SpelledNorm(8)).double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    assert "norm" in kinds(graph_of(model, x))
    assert relprop.explain(model, x, target=1, method="full").relevance.isfinite().all()


def test_roles() -> None:
    graph = graph_of(vit(), IMAGES)
    roles = [node.role for node in graph.nodes if node.kind == "add" and node.carrying]
    assert roles == ["positional"] + ["residual"] * 6
    assert [n.role for n in graph.nodes if n.kind == "conv"] == ["input"]


def test_eval_dropout_and_copies_vanish() -> None:
    class Copies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(x.contiguous().to(x.dtype), 0.5, self.training)
            return torch.relu(x[:, :].detach_().clone() if False else x[:]).sum(1)

    names = [str(node.target) for node in graph_of(Copies(), torch.randn(2, 4)).nodes]
    assert not any("dropout" in name or "slice" in name or "aten.to" in name for name in names)


def test_fanout_is_explicit() -> None:
    graph = graph_of(vit(), IMAGES)
    uses: dict[int, int] = {}
    for node in graph.nodes:
        if node.carrying:
            for value in node.operands:
                if value is not None and value.carrying:
                    uses[value.index] = uses.get(value.index, 0) + 1
    assert set(uses.values()) == {1}


def test_provenance() -> None:
    node = next(n for n in graph_of(vit(), IMAGES).nodes if n.kind == "activation")
    assert node.module == "blocks.0.mlp.act"
    assert node.source.split(":")[-1].isdigit()


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_the_batch_is_free(batch: int) -> None:
    model = vit()
    engine = relprop.compile(model, (IMAGES[:1],))
    x = torch.randn(batch, 3, 32, 32)
    assert torch.allclose(engine(x).logits, model(x), atol=1e-5)


class Text(nn.Module):
    """A two-layer encoder with an attention mask, spelled with nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        return self.head(x[:, 0])


def test_token_inputs_have_a_free_length() -> None:
    model = Text().double().eval()
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    engine = relprop.compile(model, (ids, mask))
    for batch, length in ((1, 9), (3, 5), (2, 20)):
        ids, mask = torch.randint(0, 50, (batch, length)), torch.ones(batch, length, dtype=torch.long)
        found = engine(ids, mask, target=1)
        assert found.relevance.shape == (batch, length)
        assert torch.allclose(found.logits, model(ids, mask))
        assert found.token_kinds[0] == "word"


def test_padding_changes_nothing_and_gets_nothing() -> None:
    model = Text().double().eval()
    ids = torch.randint(0, 50, (1, 9))
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[:, 6:] = 0
    engine = relprop.compile(model, (ids, mask))
    for method in ("transformer_attribution", "attention_rollout"):
        engine = relprop.compile(model, (ids, mask), method=method)
        padded = engine(ids, mask, target=1).relevance
        alone = engine(ids[:, :6], mask[:, :6], target=1).relevance
        assert torch.equal(padded[:, 6:], torch.zeros_like(padded[:, 6:]))
        assert relative(padded[:, :6], alone) < 1e-9


def test_global_average_pool_reads_all_patches() -> None:
    model = vit(global_pool="avg", class_token=False, reg_tokens=2).double()
    found = relprop.explain(model, IMAGES.double(), target=1)
    assert found.token_kinds == ("register",) * 2 + ("patch",) * 16
    # Each patch keeps its own 1 / 16 of the identity's path.
    assert torch.allclose(found.relevance.sum(-1) > 1, torch.tensor([True, True]))
    assert float(found.relevance[:, 2:].min()) >= 1 / 16 - 1e-12


def test_gradient_stream_is_the_gradient() -> None:
    model, x = vit().double(), IMAGES.double()
    found = relprop.explain(model, x, target=2, method="gradient_x_input").relevance
    leaf = x.clone().requires_grad_()
    model(leaf)[:, 2].sum().backward()
    assert relative(found, (leaf.grad * x).sum(1)) < 1e-12  # type: ignore[operator]


def test_relevance_with_the_gradient_composite_is_gradient_too() -> None:
    model, x = vit().double(), IMAGES.double()
    relevance = relprop.compile(model, (x,), method="full", composite="gradient")(x, target=2).relevance
    leaf = x.clone().requires_grad_()
    model(leaf)[:, 2].sum().backward()
    assert relative(relevance, leaf.grad.sum(1)) < 1e-12  # type: ignore[union-attr]
