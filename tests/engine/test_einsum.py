"""einsum is the product that it spells: a Transformer written with it equals one written with @ and nn.Linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.capture import capture, lower
from relprop.errors import UnsupportedOpError
from tests.engine.models import relative

METHODS = ("transformer_attribution", "full", "generic_attention", "attnlrp", "cp_lrp", "gradient_x_input")
DIM, HEADS, SIZE = 20, 4, 5


class Transformer(nn.Module):
    """Two blocks on words, with a product over heads written as `spelling` says."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.spelling = spelling
        self.words, self.norm = nn.Embedding(31, DIM), nn.LayerNorm(DIM)
        self.qkv = nn.ParameterList(torch.randn(3, HEADS, SIZE, DIM) / DIM**0.5 for _ in range(2))
        self.out = nn.ParameterList(torch.randn(HEADS, SIZE, DIM) / DIM**0.5 for _ in range(2))
        self.mlp = nn.ParameterList(torch.randn(DIM, 2 * DIM) / DIM**0.5 for _ in range(2))
        self.head = nn.Linear(DIM, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        for qkv, out, mlp in zip(self.qkv, self.out, self.mlp, strict=True):
            x = x + getattr(self, self.spelling)(self.norm(x), mask, qkv, out)
            h = torch.einsum("bnc,cm->bnm", x, mlp) if self.spelling != "plain" else nn.functional.linear(x, mlp.t())
            x = x + nn.functional.gelu(h) @ mlp.t()
        return self.head(self.norm(x)[:, 0])

    def plain(self, x: Tensor, mask: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            nn.functional.linear(x, w.reshape(-1, DIM)).view(batch, tokens, HEADS, SIZE).transpose(1, 2) for w in qkv
        )
        scores = q @ k.transpose(-2, -1) * SIZE**-0.5
        maps = scores.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
        return nn.functional.linear((maps @ v).transpose(1, 2).reshape(batch, tokens, -1), out.reshape(-1, DIM).t())

    def einsum(self, x: Tensor, mask: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        q, k, v = (torch.einsum("b n c, h d c -> b n h d", x, w) for w in qkv)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * SIZE**-0.5
        maps = scores.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
        return torch.einsum("bihd,hdc->bic", torch.einsum("bhij,bjhd->bihd", maps, v), out)

    def turned(self, x: Tensor, mask: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        """Operands the other way round, ellipses, and an output that is not named."""
        q, k, v = (torch.einsum("hdc,...c->...hd", w, x).transpose(1, 2) for w in qkv)
        scores = torch.einsum("...jd,...id->...ij", k, q) * SIZE**-0.5
        maps = scores.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
        values = torch.einsum("bhjd,bhij->bhid", v, maps).transpose(1, 2).flatten(2)
        return torch.einsum("abc,cd", values, out.flatten(0, 1))


@pytest.mark.parametrize("spelling", ["einsum", "turned"])
def test_a_transformer_of_einsums_is_the_one_of_products(spelling: str) -> None:
    plain, spelled = Transformer("plain").double().eval(), Transformer(spelling).double().eval()
    ids = torch.randint(31, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    graph = lower(capture(spelled, (ids, mask), {}, None))
    kinds = [node.kind for node in graph.nodes if node.carrying]
    assert kinds.count("attention") == 2 and "matmul" not in kinds and "unknown" not in kinds
    for method in METHODS:
        expected = relprop.explain(plain, ids, mask, target=[0, 5, 2], method=method)
        found = relprop.explain(spelled, ids, mask, target=[0, 5, 2], method=method)
        assert relative(found.logits, expected.logits) < 1e-12
        assert relative(found.relevance, expected.relevance) < 1e-9, method
        alone = relprop.explain(spelled, ids[1:2, :5], mask[1:2, :5], target=5, method=method)
        assert relative(found.relevance[1, :5], alone.relevance[0]) < 1e-8, method


class Spelled(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.w = nn.Parameter(torch.randn(3, 2, 6))
        self.spelled = forward

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.spelled(self, x, y)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, y: torch.einsum("bnc,bmc,bmd->bnd", m.a(x), m.b(y), m.c(y)).flatten(1),
        lambda m, x, y: torch.einsum("bnc,bnc->bn", m.a(x), m.b(x)),
        lambda m, x, y: torch.einsum("bnc,bnd->bncd", m.a(x), m.b(x)).flatten(1),
        lambda m, x, y: torch.einsum("bnc->bc", m.a(x)),
        lambda m, x, y: torch.einsum("bnc->bcn", m.a(x)).flatten(1),
        lambda m, x, y: torch.einsum("bnc,bmd->bcd", m.a(x), m.b(y)).flatten(1),
        lambda m, x, y: torch.einsum("bnhc,hkc->bhnk", m.a(x).unflatten(-1, (2, 3)), m.w.permute(1, 2, 0)).flatten(1),
        lambda m, x, y: torch.einsum("bnc,c->bn", m.a(x), m.w[0, 0]),
        lambda m, x, y: torch.einsum("bnc,bmc->bnm", m.a(x), m.b(y)).transpose(1, 2).flatten(1),
        lambda m, x, y: torch.einsum("bnij,bmij->bnm", *(t.unflatten(-1, (2, 3)) for t in (m.a(x), m.b(y)))).flatten(1),
        lambda m, x, y: torch.einsum("bhc,hkd->bhkcd", m.a(x)[:, :3], m.w).flatten(1),
    ],
)
def test_every_form_has_its_gradient(forward: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    model = Spelled(forward).double().eval()
    x, y = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    found = relprop.explain(model, x, y, target=2, method="gradient_x_input")
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    output = model(*leaves)
    gradients = torch.autograd.grad(output[:, 2].sum(), leaves, materialize_grads=True)
    assert relative(found.logits, output.detach()) < 1e-12
    for leaf, gradient, name in zip(leaves, gradients, ("x", "y"), strict=True):
        relevance = found.relevances.get(name, found.relevance)
        if gradient.any():
            assert relative(relevance, (leaf * gradient).sum(-1).detach()) < 1e-12, name


def test_a_diagonal_is_refused_by_name() -> None:
    model = Spelled(lambda m, x, y: torch.einsum("bnn->bn", m.a(x)[:, :, :5]))
    with pytest.raises(UnsupportedOpError, match="einsum"):
        relprop.explain(model.eval(), torch.randn(2, 5, 6), torch.randn(2, 4, 6), method="full")
