"""The generic attention updates on hand-written two-stream and encoder-decoder models, written out anew by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import UnsupportedTopologyError
from tests.engine.models import relative

SIZE, HEADS = 12, 2


class Attend(nn.Module):
    """Attention of queries x to keys y, in ordinary products; remembers its maps where autograd is on."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(SIZE, SIZE) for _ in range(4))
        self.map: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (f(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, t in ((self.q, x), (self.k, y), (self.v, y)))
        scores = q @ k.transpose(-2, -1) / (SIZE / HEADS) ** 0.5
        if causal:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        found = scores.softmax(-1)
        if not torch.compiler.is_compiling() and found.requires_grad:
            self.map = found
            self.map.retain_grad()
        return self.out((found @ v).transpose(1, 2).flatten(2))

    def edge(self) -> Tensor:
        """E_h((grad A * A)+). [B, Nq, Nk]"""
        assert self.map is not None and self.map.grad is not None
        return (self.map.grad * self.map).clamp(min=0).mean(1).detach()


class TwoStreams(nn.Module):
    """Words and regions, each attending to itself, to the other (both read the state before), and to itself again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attend() for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(4))
        self.mlp, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3)

    def forward(self, words: Tensor, regions: Tensor) -> Tensor:
        a, b, c, d, e, f = self.layers
        x, y = words + a(words, words), regions + b(regions, regions)
        x, y = self.norms[0](x), self.norms[1](y)
        x, y = x + c(x, y), y + d(y, x)
        x, y = x + self.mlp(self.norms[2](x)).tanh(), self.norms[3](y)
        x, y = x + e(x, x), y + f(y, y)
        x = x + self.layers[2](x, y)
        return self.head(x[:, 0])


class EncoderDecoder(nn.Module):
    """A source that is encoded, and a target that looks back at itself and at all of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attend() for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(6))
        self.head = nn.Linear(SIZE, 3)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = source, target
        for layer, norm in zip(self.layers[:2], self.norms[:2], strict=True):
            x = x + layer(norm(x), norm(x))
        for i in (0, 1):
            own, cross = self.layers[2 + 2 * i : 4 + 2 * i]
            before, after = self.norms[2 + 2 * i : 4 + 2 * i]
            y = y + own(before(y), before(y), causal=True)
            y = y + cross(after(y), x)
        return self.head(y)


def bar(matrix: Tensor) -> Tensor:
    """R - I with rows that sum to 1, plus I (eq. 8-9)."""
    rest = matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    sums = rest.sum(-1, keepdim=True)
    return rest / sums.where(sums != 0, torch.ones_like(sums)) + torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def same(matrix: Tensor) -> Tensor:
    return matrix


def built(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    model = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.4)
    return model


def given(first: int, second: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(3, n, SIZE, generator=generator, dtype=torch.float64) for n in (first, second)]
    return made[0], made[1]


@pytest.mark.parametrize("normalise", [True, False])
def test_two_modalities(normalise: bool) -> None:
    """The layer `c` is used twice: two layers of the graph share its weights."""
    model, (words, regions) = built(TwoStreams), given(4, 6)
    keep = bar if normalise else same
    maps: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: maps.append(module.map))
    model(words, regions)[:, 2].sum().backward()
    edges = [(m.grad * m).clamp(min=0).mean(1).detach() for m in maps]  # type: ignore[operator]
    a, b, c, d, e, f, g = edges
    t, i = torch.eye(4, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    r_tt, r_ii = t + a @ t, i + b @ i
    r_ti, r_it = torch.zeros(3, 4, 6, dtype=torch.float64), torch.zeros(3, 6, 4, dtype=torch.float64)

    def meet(r_ss: Tensor, r_sq: Tensor, r_qq: Tensor, r_qs: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        return r_ss + edge @ r_qs, r_sq + keep(r_ss).mT @ edge @ keep(r_qq)  # eq. 11 and 10

    (r_tt, r_ti), (r_ii, r_it) = meet(r_tt, r_ti, r_ii, r_it, c), meet(r_ii, r_it, r_tt, r_ti, d)
    r_tt, r_ti = r_tt + e @ r_tt, r_ti + e @ r_ti  # eq. 6 and 7
    r_ii, r_it = r_ii + f @ r_ii, r_it + f @ r_it
    r_tt, r_ti = meet(r_tt, r_ti, r_ii, r_it, g)
    found = relprop.explain(
        model, words, regions, method="generic_attention", target=2, method_options={"normalise_between": normalise}
    )
    assert set(found.relevances) == {"words", "regions"}
    assert torch.equal(found.relevance, found.relevances["words"])
    assert relative(found.relevances["words"], r_tt[:, 0]) < 1e-10
    assert relative(found.relevances["regions"], r_ti[:, 0]) < 1e-10


def test_encoder_and_decoder() -> None:
    model, (source, target) = built(EncoderDecoder), given(5, 4)
    model(source, target)[:, 2, 1].sum().backward()
    enc0, enc1, own0, cross0, own1, cross1 = (layer.edge() for layer in model.layers)
    s, t = torch.eye(5, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    r_ss = s + enc0
    r_ss = r_ss + enc1 @ r_ss
    r_tt = t + own0
    r_ts = bar(r_tt).mT @ cross0 @ bar(r_ss)
    r_tt, r_ts = r_tt + own1 @ r_tt, r_ts + own1 @ r_ts
    r_ts = r_ts + bar(r_tt).mT @ cross1 @ bar(r_ss)
    found = relprop.explain(model, source, target, method="generic_attention", target=(2, 1))
    assert relative(found.relevances["source"], r_ts[:, 2]) < 1e-10
    assert relative(found.relevances["target"], r_tt[:, 2]) < 1e-10


def test_targets_and_samples_alone() -> None:
    model, (words, regions) = built(TwoStreams), given(4, 6)
    engine = relprop.compile(model, (words, regions), method="generic_attention")
    several = engine(words, regions, target=[[0, 2]] * 3)
    assert several.relevances["regions"].shape == (3, 2, 6)
    alone = engine(words[1:2], regions[1:2], target=2)
    assert relative(alone.relevances["regions"][0], several.relevances["regions"][1, 1]) < 1e-10


def test_sequences_that_merge_are_refused() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attend(), Attend()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            both = torch.cat([x + self.first(x, x), y], 1)
            return (both + self.second(both, both))[:, 0]

    with pytest.raises(UnsupportedTopologyError, match="queries and keys of one sequence each, got several at"):
        relprop.explain(built(Merged), *given(4, 6), method="generic_attention")
