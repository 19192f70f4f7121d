"""The generic attention updates on stock two-stream and encoder-decoder models, written out anew for each wiring.

Chefer, Gur and Wolf, ICCV 2021: eq. 5 (E), 6 and 7 (within a sequence), 8-9 (bar), 10 and 11 (between sequences).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import relprop
from relprop.errors import OptionError, UnsupportedTopologyError
from tests.engine.models import relative
from tests.families.text_models import FAMILIES, Inputs, build, inputs

pytestmark = [pytest.mark.filterwarnings("ignore")]

LENGTH = 9


def attention_maps(name: str, given: Inputs) -> list[Tensor]:
    """E_h((grad A * A)+) of every attention layer in the order of execution, by autograd. Each [B, Nq, Nk]"""
    maps: list[Tensor] = []
    softmax = F.softmax

    def kept(found: Tensor) -> Tensor:
        if found.ndim == 4:
            found = found if found.requires_grad else found.detach().requires_grad_()
            found.retain_grad()
            maps.append(found)
        return found

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *args: Any, **options: Any) -> Tensor:
        scores = q @ k.mT * (options.get("scale") or 1 / math.sqrt(q.shape[-1]))
        if options.get("is_causal"):
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        return kept(scores.softmax(-1)) @ v

    family = FAMILIES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", lambda *args, **options: kept(softmax(*args, **options)))
        patch.setattr(F, "scaled_dot_product_attention", attend)
        output = build(name)(**given)[family.output or "logits"]
    target = family.target(LENGTH)
    index = target if isinstance(target, tuple) else (target,)
    score = output.diagonal().sum() if target is None else output[(slice(None), *index)].sum()
    score.backward()
    build(name).zero_grad()
    gradients = [torch.zeros_like(m) if m.grad is None else m.grad for m in maps]
    return [(grad * m).clamp(min=0).mean(1).detach() for grad, m in zip(gradients, maps, strict=True)]


def bar(matrix: Tensor) -> Tensor:
    """R - I with rows that sum to 1, plus I."""
    rest = matrix - torch.eye(matrix.shape[-1])
    sums = rest.sum(-1, keepdim=True)
    return rest / sums.where(sums != 0, torch.ones_like(sums)) + torch.eye(matrix.shape[-1])


def eye(size: int) -> Tensor:
    return torch.eye(size).expand(2, -1, -1)


def encoded(*edges: Tensor) -> Tensor:
    found = eye(edges[0].shape[-1])
    for edge in edges:
        found = found + edge @ found
    return found


Matrices = dict[tuple[str, str], Tensor]


def lxmert(edges: list[Tensor]) -> tuple[Matrices, dict[str, Tensor]]:
    """Two cross-modal layers: both sides look at the other as it came, then each at itself."""
    r_tt, r_ii = encoded(*edges[:2]), encoded(edges[2])
    r_ti, r_it = torch.zeros(2, LENGTH, 6), torch.zeros(2, 6, LENGTH)
    for to_regions, to_words, words, regions in (edges[3:7], edges[7:]):
        meeting = (
            r_tt + to_regions @ r_it,
            r_ti + bar(r_tt).mT @ to_regions @ bar(r_ii),
            r_ii + to_words @ r_ti,
            r_it + bar(r_ii).mT @ to_words @ bar(r_tt),
        )
        r_tt, r_ti, r_ii, r_it = meeting
        r_tt, r_ti = r_tt + words @ r_tt, r_ti + words @ r_ti
        r_ii, r_it = r_ii + regions @ r_ii, r_it + regions @ r_it
    regions = ("visual_feats", "visual_pos")
    matrices = {("input_ids", "input_ids"): r_tt}
    for name in regions:
        matrices |= {("input_ids", name): r_ti, (name, "input_ids"): r_it}
        matrices |= {(name, other): r_ii for other in regions}
    return matrices, {"input_ids": r_tt[:, 0], "visual_feats": r_ti[:, 0], "visual_pos": r_ti[:, 0]}


def clip(edges: list[Tensor]) -> tuple[Matrices, dict[str, Tensor]]:
    image, text = encoded(*edges[:2]), encoded(*edges[2:])
    matrices = {("input_ids", "input_ids"): text, ("pixel_values", "pixel_values"): image}
    return matrices, {"input_ids": text[:, -1], "pixel_values": image[:, 0]}


def detr(edges: list[Tensor]) -> tuple[Matrices, dict[str, Tensor]]:
    """The decoder's first self-attention sees learned queries alone: no relevance of the image is in it."""
    first, second, _, cross, own, last = edges
    r_ii, r_qq = encoded(first, second), eye(3)
    r_qi = bar(r_qq).mT @ cross @ bar(r_ii)
    r_qq, r_qi = r_qq + own @ r_qq, r_qi + own @ r_qi
    r_qi = r_qi + bar(r_qq).mT @ last @ bar(r_ii)
    matrices = {("pixel_values", "pixel_values"): r_ii, ("learned", "learned"): r_qq, ("learned", "pixel_values"): r_qi}
    return matrices, {"pixel_values": r_qi[:, 1]}


def encoder_decoder(edges: list[Tensor]) -> tuple[Matrices, dict[str, Tensor]]:
    first, second, own, cross, more_own, last = edges
    r_ss, r_tt = encoded(first, second), encoded(own)
    r_ts = bar(r_tt).mT @ cross @ bar(r_ss)
    r_tt, r_ts = r_tt + more_own @ r_tt, r_ts + more_own @ r_ts
    r_ts = r_ts + bar(r_tt).mT @ last @ bar(r_ss)
    source, target = "input_ids", "decoder_input_ids"
    matrices = {(source, source): r_ss, (target, target): r_tt, (target, source): r_ts}
    return matrices, {source: r_ts[:, 4], target: r_tt[:, 4]}


def one_sequence(edges: list[Tensor]) -> tuple[Matrices, dict[str, Tensor]]:
    found = encoded(*edges)
    return {("input_ids", "input_ids"): found}, {"input_ids": found[:, 0]}


WIRINGS: dict[str, Callable[[list[Tensor]], tuple[Matrices, dict[str, Tensor]]]] = {
    "lxmert, two cross-modal layers": lxmert,
    "clip": clip,
    "detr": detr,
    "bart": encoder_decoder,
    "t5": encoder_decoder,
    "bert": one_sequence,
}
QUICK = ("lxmert, two cross-modal layers", "bart", "bert")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in WIRINGS]
)
def test_matrices_between_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = replace(FAMILIES["lxmert"], sizes={**FAMILIES["lxmert"].sizes, "x_layers": 2})
    monkeypatch.setitem(FAMILIES, "lxmert, two cross-modal layers", two)
    family, given = FAMILIES[name], inputs(name, 2, LENGTH)
    asked = {"method": "generic_attention", "output": family.output, "target": family.target(LENGTH)}
    found = relprop.explain(build(name), **asked, **given)
    torch.set_default_dtype(torch.float64)
    try:
        matrices, expected = WIRINGS[name](attention_maps(name, given))
    finally:
        torch.set_default_dtype(torch.float32)
    whole = relprop.explain(build(name), **asked, method_options={"rows": "all"}, **given)
    assert set(whole.matrices) == set(matrices)
    for pair, matrix in matrices.items():
        assert relative(whole.matrices[pair], matrix) < 1e-9, pair
        assert float(matrix.abs().sum()) > 1e-3
    assert not found.matrices
    assert set(found.relevances) == set(expected)
    for entry, relevance in expected.items():
        assert relative(found.relevances[entry], relevance) < 1e-9, entry
        assert float(relevance.sum()) > float(relevance.shape[0]) * 1e-3
    assert torch.equal(found.relevance, found.relevances[next(iter(family.entries))])


@pytest.mark.parametrize(
    ("name", "targets"), [("lxmert", [[0, 3], [2, 1]]), ("bart", [[[4, 1], [4, 2]], [[3, 0], [2, 7]]])]
)
def test_matrices_of_batches_and_targets(name: str, targets: Any) -> None:
    """As of each sample and target alone, also where the batch is cut."""
    family, given = FAMILIES[name], inputs(name, 2, LENGTH)
    engine = relprop.compile(
        build(name), (), given, method="generic_attention", output=family.output, method_options={"rows": "all"}
    )
    index = torch.tensor(targets)
    together, cut = engine(**given, target=index), engine(**given, target=index, batch_size=1)
    for i in range(2):
        for t in range(2):
            one = {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in given.items()}
            alone = engine(**one, target=index[i : i + 1, t : t + 1])
            for pair, matrix in alone.matrices.items():
                assert relative(together.matrices[pair][i, t], matrix[0, 0]) < 1e-9
                assert relative(cut.matrices[pair][i, t], matrix[0, 0]) < 1e-9
    assert together.matrices.keys() == cut.matrices.keys()


def test_matrices_are_not_recorded() -> None:
    given = inputs("bert", 2, LENGTH)
    with pytest.raises(OptionError, match="without latents and matrices of sequences, got generic_attention with 0"):
        relprop.compile(build("bert"), (), given, method="generic_attention", tape=True, method_options={"rows": "all"})


def test_matrices_of_a_sequence_of_several_inputs_are_refused() -> None:
    given = inputs("visual_bert", 2, LENGTH)
    with pytest.raises(UnsupportedTopologyError, match="queries and keys of one sequence each, got several at"):
        relprop.explain(build("visual_bert"), method="generic_attention", method_options={"rows": "all"}, **given)
