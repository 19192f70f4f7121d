"""One row of relevance per generated token: stock decoders and encoder-decoders, against one token at a time."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop import memory
from relprop.errors import DTypeError, OptionError, ShapeError, TargetError
from relprop.native.tensors import fresh_results
from tests.engine.models import relative
from tests.families.test_text import leaves_at_embeddings
from tests.families.text_models import FAMILIES, IMAGE_TOKEN, VOCABULARY, build, ids, inputs, refused

pytestmark = [pytest.mark.filterwarnings("ignore")]

NEW = 6
DECODERS = ("gpt2", "llama")
MODELS = (*DECODERS, "t5", "bart")
QUICK = ("gpt2", "bart")


def models(names: tuple[str, ...] = MODELS) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in names]


@cache
def written(name: str, prompt: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, its prompt or source, and what it writes."""
    model = build(name)
    given = ids(2, prompt, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, given, model.generate(given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def call(name: str, given: Tensor, read: Tensor) -> dict[str, Any]:
    """The model's arguments where the decoder has read so far."""
    if name in DECODERS:
        return {"input_ids": read, "use_cache": False}
    return {"input_ids": given, "decoder_input_ids": read, "use_cache": False}


@pytest.mark.parametrize("method", ["attnlrp", "generic_attention"])
@pytest.mark.parametrize("name", models())
def test_rows_are_explanations_of_one_token(name: str, method: str) -> None:
    """Each row is what `explain` gives for that token with nothing after it."""
    model, given, found = written(name)
    start = 1 if name not in DECODERS else given.shape[1]
    made = {
        size: relprop.explain_generation(model, given, found, method=method, targets_at_a_time=size)
        for size in (1, 4, "auto")
    }
    for place in range(start, found.shape[1]):
        read = found[:, :place]
        alone = relprop.explain(
            model,
            method=method,
            target=torch.stack([torch.tensor([place - 1, int(token)]) for token in found[:, place]])[:, None],
            **call(name, given, read),
        )
        expected = alone.relevances.get("input_ids" if name in DECODERS else "decoder_input_ids", alone.relevance)
        for size, generation in made.items():
            assert generation.prompt_length == start
            row = generation.relevance[:, place - start]
            assert relative(row[:, :place], expected[:, 0]) < max(1e-9, FAMILIES[name].tolerance), (size, place)
            assert not row[:, place:].any()
            if generation.source is not None:
                of_source = generation.source[:, place - start]
                assert relative(of_source, alone.relevances["input_ids"][:, 0]) < 1e-9
            scores = alone.logits[torch.arange(2), place - 1, found[:, place]]
            assert relative(generation.logits[:, place - start], scores) < 1e-9
    assert (made[4].source is None) == (name in DECODERS)


@pytest.mark.parametrize("name", models())
def test_gradients_are_autograds(name: str) -> None:
    model, given, found = written(name)
    generation = relprop.explain_generation(model, given, found, method="gradient_x_input", targets_at_a_time=NEW)
    start = generation.prompt_length
    entries = ("input_ids",) if name in DECODERS else ("input_ids", "decoder_input_ids")
    made = call(name, given, found)
    with leaves_at_embeddings(model, made, entries) as leaves:
        logits = model(**made).logits
        for place in range(start, found.shape[1]):
            score = logits[torch.arange(2), place - 1, found[:, place]].sum()
            for entry, leaf in leaves.items():
                (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
                expected = (gradient * leaf).sum(-1).detach()
                rows = generation.relevance if entry == entries[-1] else generation.source
                assert rows is not None
                row = rows[:, place - start]
                assert relative(row, expected) < max(1e-9, FAMILIES[name].tolerance)


@pytest.mark.parametrize("name", models())
def test_why_this_token_and_not_that_one(name: str) -> None:
    """The difference of two explanations of each token; one rival for all, or one for each."""
    model, given, found = written(name)
    start = 1 if name not in DECODERS else given.shape[1]
    rivals = (found[:, start:] + torch.arange(1, NEW + 1)) % VOCABULARY
    instead = torch.cat([found[:, :start], rivals], 1)
    for against, size in ((rivals, 4), (7, "auto")):
        rows = relprop.explain_generation(model, given, found, against=against, targets_at_a_time=size)
        for place in range(start, found.shape[1]):
            other = instead[:, place] if against is rivals else torch.full((2,), 7)
            tokens = torch.stack([found[:, place], other], 1)
            target = torch.stack([torch.full_like(tokens, place - 1), tokens], -1)
            both = relprop.explain(model, method="attnlrp", target=target, **call(name, given, found[:, :place]))
            relevance = both.relevances.get("input_ids" if name in DECODERS else "decoder_input_ids", both.relevance)
            expected = relevance[:, 0] - relevance[:, 1]
            got = rows.relevance[:, place - start, :place]
            assert relative(got, expected) < max(1e-8, 10 * FAMILIES[name].tolerance), (place, size)
            if rows.source is not None:
                source = both.relevances["input_ids"]
                assert relative(rows.source[:, place - start], source[:, 0] - source[:, 1]) < 1e-8
            score = both.logits[torch.arange(2)[:, None], place - 1, tokens]
            assert relative(rows.logits[:, place - start], score[:, 0] - score[:, 1]) < 1e-8


@pytest.mark.parametrize("name", models(DECODERS))
def test_padded_prompts(name: str) -> None:
    """A shorter prompt, padded on the left: what it would be alone, and nothing for the padding."""
    model, given, _ = written(name)
    mask = torch.ones_like(given)
    mask[0, :2] = 0
    with torch.no_grad():
        found = model.generate(given, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    together = relprop.explain_generation(model, given, found, attention_mask=mask, targets_at_a_time=4)
    alone = relprop.explain_generation(model, given[:1, 2:], found[:1, 2:], targets_at_a_time=4)
    assert not together.relevance[0, :, :2].any()
    assert relative(together.relevance[:1, :, 2:], alone.relevance) < max(1e-9, FAMILIES[name].tolerance)


def test_rows_after_the_end_are_empty() -> None:
    model, given, found = written("gpt2")
    ended = found.clone()
    ended[0, 7:] = 0
    generation = relprop.explain_generation(model, given, ended, targets_at_a_time=3)
    assert generation.written.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert not generation.relevance[0, 3:].any()
    whole = relprop.explain_generation(model, given, found, targets_at_a_time=3)
    assert relative(generation.relevance[0, :2], whole.relevance[0, :2]) < 1e-12


def test_memory_is_predicted_and_bounded() -> None:
    model, given, found = written("gpt2", 40)
    whole = relprop.explain_generation(model, given, found)
    assert whole.targets_at_a_time == NEW and whole.memory is not None
    bounded = relprop.explain_generation(model, given, found, memory_limit=whole.memory * 2 // 3)
    assert bounded.targets_at_a_time < NEW and bounded.memory is not None
    assert bounded.memory <= whole.memory * 2 // 3
    assert relative(bounded.relevance, whole.relevance) < 1e-9
    for generation in (whole, bounded):
        relprop.explain_generation(model, given, found, targets_at_a_time=generation.targets_at_a_time)
        with fresh_results(), memory.Allocations() as counted:
            relprop.explain_generation(model, given, found, targets_at_a_time=generation.targets_at_a_time)
        assert generation.memory is not None
        assert max(counted.history) < 1.1 * generation.memory + 8 * generation.relevance.numel()


def test_memory_counts_what_is_derived_from_the_weights() -> None:
    """Casts of a half-precision model, made in the first pass, are within the forecast and its limit."""
    model, given, found = written("gpt2", 40)
    half = deepcopy(model).to(torch.bfloat16)
    with fresh_results(), memory.Allocations() as counted:  # the capture in it allocates nothing
        generation = relprop.explain_generation(half, given, found)
    derived = sum(4 * p.numel() for name, p in half.named_parameters() if p.ndim == 2 and "wte" not in name)
    assert generation.memory is not None
    assert 0.9 * generation.memory < max(counted.history) < 1.1 * generation.memory + 8 * generation.relevance.numel()
    assert generation.memory > derived > generation.memory / 20
    limit = generation.memory * 3 // 4
    bounded = relprop.explain_generation(half, given, found, memory_limit=limit)
    assert bounded.memory is not None and bounded.memory <= limit


def test_picture() -> None:
    pytest.importorskip("matplotlib")
    from relprop.pictures import token_matrix

    model, given, found = written("gpt2")
    relevance = relprop.explain_generation(model, given, found, targets_at_a_time=NEW).relevance[0]
    texts = [f"t{token}" for token in found[0].tolist()]
    drawn = token_matrix(relevance, texts[5:], texts)
    assert drawn.width > drawn.height > 100 and len(drawn.getcolors(1 << 20)) > 50
    with pytest.raises(ShapeError, match=r"token_matrix: expected relevance \[6, 5\] for as many texts, got \[6, 11\]"):
        token_matrix(relevance, texts[5:], texts[:5])


def test_bad_input() -> None:
    model, given, found = written("gpt2")
    with pytest.raises(ShapeError, match="expected the prompt's 5 tokens and at least one generated after them"):
        relprop.explain_generation(model, given, given)
    with pytest.raises(ShapeError, match="start otherwise"):
        relprop.explain_generation(model, given + 1, found)
    with pytest.raises(ShapeError, match="expected shapes"):
        relprop.explain_generation(model, given[:1], found)
    for wrong in (0, "all", 1.5, True):
        with pytest.raises(OptionError, match="targets_at_a_time: expected 'auto' or a positive int, got"):
            relprop.explain_generation(model, given, found, targets_at_a_time=wrong)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    """What a caller would try, and what to do instead."""
    model, given, found = written("gpt2")
    mask = torch.ones_like(given)

    def refused(error: type[Exception], message: str, *ids: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            relprop.explain_generation(model, *(ids or (given, found)), **options)

    refused(DTypeError, "input_ids: expected a tensor of integers", given.tolist(), found)
    refused(DTypeError, "generated_ids: expected a tensor of integers", given, found.tolist())
    refused(DTypeError, r"attention_mask: expected integers \[B, N\], got torch.float32", attention_mask=mask.float())
    refused(ShapeError, r"input_ids.repeat_interleave\(2, 0\)", given, found.repeat_interleave(2, 0))
    refused(ShapeError, r"\[2, 5\], got \[2, 11\]; what was generated", attention_mask=torch.ones_like(found))
    mask[1, 3:] = 0
    refused(ShapeError, "padded on the left, got one that ends in padding in sample 1", attention_mask=mask)
    for rivals in (True, "seven", torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6)):
        refused(
            TargetError, r"against: expected a token id, or a tensor of integers \[B, G\] = \[2, 6\]", against=rivals
        )
    refused(TargetError, "contrast: against: expected indices within", against=VOCABULARY)
    for limit in ("1GB", 0, True, 1.5):
        refused(OptionError, "memory_limit: expected None or a positive int, bytes", memory_limit=limit)


def test_a_source_may_be_padded_on_either_side() -> None:
    model, given, found = written("bart")
    mask = torch.ones_like(given)
    mask[0, 3:], mask[1, :1] = 0, 0
    generation = relprop.explain_generation(model, given, found, attention_mask=mask.bool())
    assert generation.source is not None
    assert not (generation.source * (1 - mask).unsqueeze(1)).any()
    assert generation.source.abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("name", ["paligemma", pytest.param("vipllava", marks=pytest.mark.full)])
@pytest.mark.skipif(bool(refused("paligemma")), reason="not captured under this transformers")
def test_images_have_their_part(name: str) -> None:
    """Relevance of the pixels for each generated token is that of `explain` for it alone; ended rows are empty."""
    model = build(name)
    made = inputs(name, 2, 9)
    given = made.pop("input_ids")
    call = {entry: made[entry] for entry in ("pixel_values", "token_type_ids") if entry in made}
    with torch.no_grad():
        options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE_TOKEN])
        found = model.generate(given, **options, **call)
    generation = relprop.explain_generation(model, given, found, targets_at_a_time=2, **call)
    assert set(generation.others) == {"pixel_values"}
    assert generation.others["pixel_values"].shape == (2, 3, 16, 16)
    for place in range(3):
        target = torch.stack([torch.tensor([8 + place, int(token)]) for token in found[:, 9 + place]])[:, None]
        read = {"input_ids": found[:, : 9 + place], "use_cache": False, **call}
        if "token_type_ids" in call:  # what was written is no prefix
            read["token_type_ids"] = nn.functional.pad(call["token_type_ids"], (0, place), value=1)
        alone = relprop.explain(model, method="attnlrp", target=target, **read)
        for rows, entry in ((generation.others["pixel_values"], "pixel_values"), (generation.relevance, "input_ids")):
            expected = alone.relevances[entry][:, 0]
            got = rows[:, place][..., : 9 + place] if entry == "input_ids" else rows[:, place]
            assert expected.any()
            assert relative(got, expected) < FAMILIES[name].tolerance, (place, entry)
    ended = found.clone()
    ended[0, 10:] = model.generation_config.eos_token_id
    rows = relprop.explain_generation(model, given, ended, **call).others["pixel_values"]
    assert rows[0, 1].any() and not rows[0, 2:].any() and rows[1, 2].any()
