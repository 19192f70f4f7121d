"""Shapes that come again are replayed from a tape without being asked for; the plan's bits, whoever answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import relprop
from relprop import native
from relprop.engine import Engine
from relprop.lowering import PassFunction
from relprop.recurring import Recurring
from relprop.tape import NotTaped
from tests.engine.models import vit
from tests.engine.test_tape import images


def pair(**options: Any) -> tuple[Engine, Recurring, Engine]:
    """One as it comes, its pool, and one that never replays."""
    model = vit(depth=2)
    engine, plain = (relprop.compile(model, (images(2),), tape=tape, **options) for tape in (None, False))
    assert isinstance(engine._replays, Recurring) and plain._replays is None
    return engine, engine._replays, plain


class Runs:
    """Counts how the calls of an engine were answered."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan = 0
        explain = engine._explain

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.plan += 1
            return explain(*args, **kwargs)

        monkeypatch.setattr(engine, "_explain", counted)


@pytest.mark.parametrize("method", ["transformer_attribution", "full", "attnlrp", "attention_gradcam"])
def test_same_bits_whoever_answers(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shapes in turns: the plan, then the recording of each."""
    engine, pool, plain = pair(method=method)
    runs = Runs(engine, monkeypatch)
    several = torch.tensor([[1, 2], [3, 4]])
    for turn in range(4):
        for batch, target in ((1, 3), (2, several), (2, None)):
            x = images(batch, turn)
            found, want = engine(x, target=target), plain(x, target=target)
            assert torch.equal(found.relevance, want.relevance) and torch.equal(found.logits, want.logits)
            assert torch.equal(found.target, want.target) and found.token_kinds == want.token_kinds
            assert found.grid == want.grid and found.relevances.keys() == want.relevances.keys()
        assert len(pool.recordings) == (0 if turn == 0 else 3)
    assert runs.plan == 3


def test_nothing_is_padded() -> None:
    engine, pool, _ = pair()
    for _ in range(2):
        engine(images(5), target=1)
    assert [key[0][0] for key in pool.shapes] == [5]


def test_changing_weights_are_not_recorded_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training: calls 2, 4, 8 and 16 record, every other one is the plan's."""
    engine, pool, plain = pair()
    runs, made = Runs(engine, monkeypatch), []
    record = pool._record
    monkeypatch.setattr(pool, "_record", lambda *args: made.append(len(seen)) or record(*args))  # type: ignore[func-returns-value]
    seen: list[Tensor] = []
    for _ in range(17):
        with torch.no_grad():
            engine._model.blocks[0].mlp.fc1.weight.mul_(1.01)
        seen.append(engine(images(1), target=1).relevance)
        assert torch.equal(seen[-1], plain(images(1), target=1).relevance)
    assert made == [1, 3, 7, 15] and runs.plan == 13


def test_the_recorded_run_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass in all, and an answer of its own that replays leave alone."""
    engine, pool, plain = pair()
    engine(images(2), target=1)
    runs: list[int] = []
    function = PassFunction.__call__
    monkeypatch.setattr(PassFunction, "__call__", lambda *args: runs.append(1) or function(*args))  # type: ignore[func-returns-value]
    first = engine(images(2, 1), target=1)
    engine(images(2, 2), target=1)
    assert runs == [1] and len(pool.recordings) == 1
    want = plain(images(2, 1), target=1)
    assert torch.equal(first.relevance, want.relevance) and torch.equal(first.logits, want.logits)


@pytest.mark.parametrize("enough", [False, True])
def test_what_needs_more_than_is_kept_is_the_plans(enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by one recording, whose answer counts."""
    engine, pool, plain = pair()
    for _ in range(2):
        engine(images(3), target=1)
    recording: Any = pool.recordings[-1]
    monkeypatch.setattr("relprop.recurring.kept_limit", lambda: recording.nbytes - 1 + enough)
    pool.clear()
    pool._came.clear()
    runs = Runs(engine, monkeypatch)
    for seed in range(5):
        x = images(3, seed)
        assert torch.equal(engine(x, target=1).relevance, plain(x, target=1).relevance)
    assert len(pool.recordings) == enough and runs.plan == (1 if enough else 4)


def test_memory_goes_back_after_every_call() -> None:
    """To the kernels' results, and from there to the system; the next replay has other memory, and the same bits."""
    model = vit(depth=2, embed_dim=96)
    engine, plain = (relprop.compile(model, (images(2),), tape=tape) for tape in (None, False))
    taken: list[Tensor] = []
    for seed in range(5):
        x = images(16, seed)
        assert torch.equal(engine(x, target=1).relevance, plain(x, target=1).relevance)
        if seed > 1:
            recording: Any = engine.recordings[-1]
            assert native._C.block_use()[0] >= recording.nbytes > native.SMALLEST_KEPT
            taken.append(native.empty((recording.nbytes // 4,), torch.float32).fill_(7))
            relprop.empty_cache()
            assert native._C.block_use()[0] == 0
    assert len(taken) == 3 and all((t == 7).all() for t in taken)


def test_two_engines_on_the_same_memory() -> None:
    """What one leaves there the other does not read."""
    pairs = [pair(method=method) for method in ("transformer_attribution", "attnlrp")]
    for seed in range(4):
        for engine, _, plain in pairs:
            x = images(16, seed)
            assert torch.equal(engine(x, target=1).relevance, plain(x, target=1).relevance)


def test_a_call_does_not_wait_for_another_threads_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pool, plain = pair()
    for _ in range(2):
        engine(images(1), target=1)
    runs = Runs(engine, monkeypatch)
    with pool._turn:
        found: list[Tensor] = []
        other = threading.Thread(target=lambda: found.append(engine(images(1), target=1).relevance))
        other.start()
        other.join(60)
    assert runs.plan == 1 and torch.equal(found[0], plain(images(1), target=1).relevance)
    engine(images(1), target=1)
    assert runs.plan == 1


def test_whoever_watches_operations_sees_them() -> None:
    class Watching(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Watching.seen += 1
            return func(*args, **(kwargs or {}))

    engine, pool, _ = pair()
    counts = []
    for _ in range(3):
        before = Watching.seen
        with Watching():
            engine(images(1), target=1)
        counts.append(Watching.seen - before)
    assert counts[1] == counts[2] > 100 and not pool.recordings


def test_a_pass_that_cannot_be_taped_is_the_plans() -> None:
    engine, pool, plain = pair()
    tries: list[int] = []

    def refused(run: Any) -> Any:
        tries.append(1)
        raise NotTaped("tape: expected a pass that depends on no value and no chance, got one")

    pool.recorder = refused
    for _ in range(9):
        assert torch.equal(engine(images(1), target=1).relevance, plain(images(1), target=1).relevance)
    assert tries == [1]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relprop.recurring._REMEMBERED", 3)
    engine, pool, _ = pair()
    for batch in range(1, 8):
        engine(images(batch), target=1)
        assert len(pool._came) <= 3


CASES: Sequence[dict[str, Any]] = (
    {"tape": False},
    {"latents": ("blocks.0.mlp",), "method": "full"},
    {"method": "smoothgrad"},
    {"compile": True},
)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_where_there_is_none(options: dict[str, Any]) -> None:
    assert not isinstance(relprop.compile(vit(depth=1), (images(1),), **options)._replays, Recurring)
