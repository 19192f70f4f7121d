"""Text and multimodal models explained by capture alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.engine import Engine
from relprop.errors import CaptureError, UnsupportedOpError, UnsupportedTopologyError
from relprop.explanation import Explanation
from tests.engine.models import relative
from tests.families.text_models import FAMILIES, Inputs, build, inputs, refused

pytestmark = [pytest.mark.filterwarnings("ignore")]

COMPOSITES = ("chefer", "chefer_stable", "gradient")
AT_INPUT = ("full", "gradient_x_input")
WALKS = ("transformer_attribution", "attention_rollout", "relevance_rollout")
LENGTH = 9


def families(*columns: tuple[str, ...], only: Any = lambda family: True) -> list[Any]:
    """Every family that is captured, crossed with the columns; all but the quick ones are marked `full`."""
    rows: list[tuple[Any, ...]] = [(n,) for n, family in FAMILIES.items() if not refused(n) and only(family)]
    for column in columns:
        rows = [(*row, item) for row in rows for item in column]
    marks = {name: () if family.quick else pytest.mark.full for name, family in FAMILIES.items()}
    return [pytest.param(*row, id="-".join(row), marks=marks[row[0]]) for row in rows]


@cache
def engine(name: str, method: str, composite: str | None = None) -> Engine:
    family = FAMILIES[name]
    return relprop.compile(
        build(name), (), inputs(name, 2, LENGTH), method=method, composite=composite, output=family.output
    )


def explained(name: str, method: str, composite: str | None, given: Inputs, length: int, **options: Any) -> Explanation:
    return engine(name, method, composite)(**given, target=FAMILIES[name].target(length), **options)


def output_of(name: str, given: Inputs) -> Tensor:
    found = build(name)(**given)
    return found[FAMILIES[name].output or "logits"]


def maps(found: Explanation) -> dict[str, Tensor]:
    return found.relevances or {"": found.relevance}


@pytest.mark.parametrize(("name", "composite"), families(COMPOSITES))
def test_every_input_is_answered_for(name: str, composite: str) -> None:
    given = inputs(name, 2, LENGTH)
    for method in AT_INPUT:
        found = explained(name, method, composite, given, LENGTH)
        assert set(found.relevances) == set(FAMILIES[name].entries)
        for entry, relevance in found.relevances.items():
            shape = given[entry].shape
            expected = {2: shape, 3: shape[:2], 4: (shape[0], *shape[2:])}[len(shape)]
            assert relevance.shape == expected
            assert torch.isfinite(relevance).all()
            assert (relevance.abs().flatten(1).amax(1) > 0).all()
        with torch.no_grad():
            assert relative(found.logits, output_of(name, given)) < 1e-12


@pytest.mark.parametrize(("name", "composite"), families(COMPOSITES))
def test_walks(name: str, composite: str) -> None:
    given = inputs(name, 2, LENGTH)
    for method in WALKS:
        if FAMILIES[name].refusal:
            with pytest.raises((UnsupportedTopologyError, UnsupportedOpError), match=FAMILIES[name].refusal):
                engine(name, method, composite)
            continue
        found = explained(name, method, composite, given, LENGTH)
        assert found.relevance.shape == (2, len(found.token_kinds))
        assert torch.isfinite(found.relevance).all()
        assert (found.relevance.abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", families(only=lambda family: not family.refusal))
def test_relevance_of_maps_by_gradient_rules_is_their_gradient(name: str) -> None:
    given = inputs(name, 2, LENGTH)
    walk = engine(name, "transformer_attribution", "gradient")
    maps = walk.trace(**given, target=FAMILIES[name].target(LENGTH)).maps
    sites = {module for module, _ in maps}
    assert sites
    for module in sites:
        assert relative(maps[module, "relevance"], maps[module, "gradient"]) < 1e-12
    booked = explained(name, "transformer_attribution", "gradient", given, LENGTH, ledger=True)
    assert (
        relative(explained(name, "transformer_attribution", "gradient", given, LENGTH).relevance, booked.relevance)
        < 1e-9
    )


@pytest.mark.parametrize("name", families(only=lambda family: family.refusal))
def test_several_sequences(name: str) -> None:
    """Both sides are answered for: CLIP's image and its text, an encoder's tokens and a decoder's."""
    given = inputs(name, 2, LENGTH)
    for method in ("generic_attention", "attnlrp"):
        if method == "generic_attention" and not FAMILIES[name].apart:
            with pytest.raises(UnsupportedTopologyError, match="queries and keys of one sequence each, got several"):
                engine(name, method)
            continue
        together = maps(explained(name, method, None, given, LENGTH))
        assert set(together) == set(FAMILIES[name].entries)
        alone = maps(explained(name, method, None, cut(given, slice(1, 2), LENGTH), LENGTH))
        for entry, relevance in together.items():
            assert torch.isfinite(relevance).all() and (relevance.abs().flatten(1).amax(1) > 0).all()
            assert relative(relevance[1:], alone[entry]) < FAMILIES[name].tolerance, (method, entry)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in FAMILIES if refused(name) not in ("", "skipped")])
def test_refusal_says_why(name: str) -> None:
    with pytest.raises(CaptureError, match=refused(name)):
        engine(name, "full")


@contextmanager
def leaves_at_embeddings(model: nn.Module, given: Inputs, entries: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Leaves of autograd where the explained token ids are embedded; floating-point inputs are leaves themselves."""
    leaves: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for entry in entries:
            ids = given[entry]  # some position embeddings are called with them too, for their shape alone
            fits = args[0].shape == ids.shape == output.shape[:-1]
            if entry not in leaves and fits and torch.equal(args[0], ids):
                leaves[entry] = output.detach().requires_grad_()
                return leaves[entry]
        return output

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Embedding)]
    for entry in entries:
        if given[entry].is_floating_point():
            given[entry] = leaves[entry] = given[entry].detach().requires_grad_()
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", families())
def test_gradient_is_the_models_own(name: str) -> None:
    family, given = FAMILIES[name], inputs(name, 2, LENGTH)
    found = explained(name, "gradient_x_input", None, given, LENGTH).relevances
    with leaves_at_embeddings(build(name), given, family.entries) as leaves:
        output = output_of(name, given)
        target = family.target(LENGTH)
        index = () if target is None else (target if isinstance(target, tuple) else (target,))
        score = output.diagonal().sum() if target is None else output[(slice(None), *index)].sum()
        gradients = torch.autograd.grad(score, [leaves[entry] for entry in family.entries])
    for entry, gradient in zip(family.entries, gradients, strict=True):
        expected = (gradient * leaves[entry]).detach()
        expected = expected.sum(1 if expected.ndim == 4 else -1)
        assert relative(found[entry], expected) < family.tolerance


@pytest.mark.parametrize("name", families())
def test_relevance_by_gradient_rules_is_the_gradient(name: str) -> None:
    given = inputs(name, 2, LENGTH)
    streams = {
        stream: engine(name, method, composite).trace(**given, target=FAMILIES[name].target(LENGTH)).streams
        for stream, method, composite in (("gradient", "gradient_x_input", None), ("relevance", "full", "gradient"))
    }
    for value, _ in engine(name, "full", "gradient").program.requirements.values:
        expected = streams["gradient"][value.name, "gradient"]
        assert relative(streams["relevance"][value.name, "relevance"], expected) < 1e-12


@pytest.mark.parametrize(("name", "composite"), families(COMPOSITES))
def test_ledger(name: str, composite: str) -> None:
    family, given = FAMILIES[name], inputs(name, 2, LENGTH)
    for method in ("full",) if family.refusal else ("full", "transformer_attribution"):
        books = explained(name, method, composite, given, LENGTH, ledger=True).ledger
        assert books is not None
        scale = max(1.0, *(float(e.arriving.abs().max()) for e in books.entries))
        amplified = max(1.0, *(float(e.amplification.max()) for e in books.entries))
        assert float(books.imbalance.abs().max()) < 1e-11 * scale * amplified
        for entry in books.entries:
            assert float(entry.rounding.abs().max()) < 1e-11 * scale * amplified, entry.step


def cut(given: Inputs, rows: slice, length: int) -> Inputs:
    """Some samples of a call, and the first tokens of its text."""
    tokens = {"input_ids", "attention_mask"}
    return {k: (v[rows, :length] if k in tokens else v[rows]) if isinstance(v, Tensor) else v for k, v in given.items()}


def methods_of(name: str) -> tuple[str, ...]:
    return ("full",) if FAMILIES[name].refusal else ("full", "transformer_attribution", "attention_rollout")


@pytest.mark.parametrize("name", families())
def test_batch_and_length_are_free(name: str) -> None:
    family = FAMILIES[name]
    length = LENGTH if family.fixed else 12
    given = inputs(name, 3, length, seed=1)
    for method in methods_of(name):
        together = maps(explained(name, method, "chefer_stable", given, length))
        for i in range(3):
            alone = cut(given, slice(i, i + 1), length)
            for entry, found in maps(explained(name, method, "chefer_stable", alone, length)).items():
                assert relative(together[entry][i : i + 1], found) < family.tolerance, (method, entry)


FEW_POINTS = {"integrated_gradients": {"steps": 3}, "smoothgrad": {"samples": 3, "times_input": True}}
AMPLIFIES = {"transformer_attribution", "relevance_rollout", "full", "last_layer", "second_layer"}  # rules of `chefer`


def answers(name: str, method: str, given: Inputs, length: int) -> dict[str, Tensor]:
    """What a method says, with rules that do not amplify rounding and few points."""
    family = FAMILIES[name]
    composite = "chefer_stable" if method in AMPLIFIES else None
    options: dict[str, Any] = {"method_options": FEW_POINTS.get(method), "output": family.output}
    plan = relprop.compile(build(name), (), inputs(name, 2, LENGTH), method=method, composite=composite, **options)
    return maps(plan(**given, target=family.target(length)))


@pytest.mark.parametrize("name", families(only=lambda family: family.pads))
def test_padding_leaves_no_trace(name: str) -> None:
    family = FAMILIES[name]
    short = inputs(name, 1, 6, seed=2)
    given = inputs(name, 2, LENGTH, seed=3)
    for entry, tensor in short.items():
        if isinstance(tensor, Tensor):
            text = entry in ("input_ids", "attention_mask")
            given[entry][0, : tensor.shape[1]] = tensor[0]
            if text:
                given[entry][0, 6:] = 0
    for method in relprop.methods():
        try:
            padded = answers(name, method, given, 6)
        except UnsupportedTopologyError:
            continue
        for entry, expected in answers(name, method, short, 6).items():
            found = padded[entry][0]
            if entry in ("input_ids", "") and found.ndim == 1 and family.kept_after_text == 0:
                assert torch.equal(found[6:], torch.zeros_like(found[6:])), (method, entry)
                found = found[:6]
            elif entry in ("input_ids", ""):  # other tokens follow the text
                found = torch.cat([found[:6], found[LENGTH:]])
            distance = float((found - expected[0]).norm())  # Grad-CAM's positive part may be empty
            assert distance <= family.tolerance * float(expected.norm()), (method, entry)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ("llama", "qwen3") if name in FAMILIES])
def test_padding_on_the_left_leaves_no_trace(name: str) -> None:
    """Where positions are relative, a decoder's prompt may be anywhere."""
    short, given = inputs(name, 1, 6, seed=2), inputs(name, 2, LENGTH, seed=3)
    for entry in ("input_ids", "attention_mask"):
        given[entry][0] = 0
        given[entry][0, -6:] = short[entry][0]
    for method in relprop.methods():
        try:
            padded = answers(name, method, given, LENGTH)
        except UnsupportedTopologyError:
            continue
        for entry, expected in answers(name, method, short, 6).items():
            found = padded[entry][0]
            assert torch.equal(found[:-6], torch.zeros_like(found[:-6])), method
            distance = float((found[-6:] - expected[0]).norm())
            assert distance <= FAMILIES[name].tolerance * float(expected.norm()), method
