"""What a pass is predicted to take, against what torch's allocator reports; batches in pieces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import relprop
from relprop import memory
from relprop.errors import OptionError
from relprop.native.tensors import fresh_results
from tests.engine.models import vit


def allocated(run: Callable[[], object], warm: bool = True) -> int:
    """Peak bytes that torch's allocator handed out during a call, without what it made once, if that was made."""
    if warm:
        run()
    with fresh_results(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    alive = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("method", ["transformer_attribution", "attention_gradcam", "full"])
@pytest.mark.parametrize("targets", [1, 3])
def test_prediction(backend: str, method: str, targets: int) -> None:
    engine = relprop.compile(vit(embed_dim=96), (images(2),), backend=backend, method=method, tape=False)
    # What a convolution takes within itself is not seen; it does not grow with the batch.
    for batch in (7, 32) if method == "full" else (1, 7, 32):
        index = torch.zeros(batch, targets, dtype=torch.int64)
        real = allocated(lambda batch=batch, index=index: engine(images(batch), target=index))
        predicted = engine.memory(batch, targets=targets) - engine._weights.derived.nbytes
        assert abs(predicted - real) < 0.1 * real, (batch, predicted, real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "method"), [("bert", "transformer_attribution"), ("llama", "attnlrp")])
def test_prediction_for_texts(name: str, method: str, dtype: torch.dtype) -> None:
    """An encoder and a decoder, whose logits are the largest tensor."""
    pytest.importorskip("transformers")
    from tests.engine import test_text

    given = test_text.inputs(name, 2, 24)
    model = copy.deepcopy(test_text.model(name)).to(dtype)
    engine = relprop.compile(model, (), given, method=method, output="logits", backend="torch", tape=False)
    target = 1 if name == "bert" else (23, 7)
    for batch in (3, 16):
        more = test_text.inputs(name, batch, 24, seed=batch)
        real = allocated(lambda more=more: engine(**more, target=target))
        predicted = engine.memory(batch) - engine._weights.derived.nbytes
        assert abs(predicted - real) < 0.1 * real, (batch, predicted, real)


@pytest.mark.parametrize("method", ["transformer_attribution", "full", "attnlrp"])
def test_recording_and_replaying_take_what_the_plan_takes(method: str) -> None:
    """But for the inputs' copy and the gaps between places."""
    engine = relprop.compile(vit(embed_dim=96, depth=6), (images(2),), method=method)
    predicted = engine.memory(19) - engine._weights.derived.nbytes
    for calls in range(1, 5):
        taken = allocated(lambda: engine(images(19), target=1), warm=False)
        assert 0.7 * predicted < taken < 1.1 * predicted + 2 * images(19).nbytes, (calls, predicted, taken)
        assert len(engine.recordings) == (calls > 1)


@pytest.mark.parametrize("batch", [33, 48, 112, 200])
@pytest.mark.parametrize("method", ["transformer_attribution", "full", "attnlrp"])
def test_prediction_of_padded_runs(method: str, batch: int) -> None:
    """33 samples are 48 that run, 112 are 64 and then 48, 200 are 64 three times and then 8."""
    engine = relprop.compile(vit(embed_dim=96, depth=6), (images(2),), method=method, tape=True)
    predicted = engine.memory(batch) - engine.derived_memory
    real = allocated(lambda: engine(images(batch), target=1), warm=False)
    assert abs(predicted - real) < 0.1 * real, (predicted, real)
    assert len(engine.recordings) == (1 if batch < 64 else 2)


def test_prediction_of_large_answers() -> None:
    """They are copied out of the recording, where the plan had its seed; those of several runs are joined."""
    model = vit(embed_dim=96, depth=6, num_classes=30000)
    real, predicted = {}, {}
    for batch in (33, 80):
        engine = relprop.compile(model, (images(2),), tape=True)
        predicted[batch] = engine.memory(batch) - engine.derived_memory
        real[batch] = allocated(lambda e=engine, b=batch: e(images(b), target=1), warm=False)
    assert abs(predicted[33] - real[33]) < 0.1 * real[33], (predicted, real)
    assert real[80] < predicted[80] < 1.25 * real[80], (predicted, real)  # a tape is tighter than the plan


class Forgetful:
    """A recorder that keeps every recording's memory, as one of graphs does."""

    holds = True

    def __call__(self, run: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError


def test_prediction_where_recordings_hold_their_memory() -> None:
    """The second shape's pass is made beside the first one's."""
    engine = relprop.compile(vit(embed_dim=96), (images(2),), tape=True)
    engine.memory(1)
    apart = {batch: engine.memory(batch) - engine.derived_memory for batch in (48, 64, 112)}
    engine._replays.recorder = Forgetful()  # type: ignore[union-attr]
    held = {batch: engine.memory(batch) - engine.derived_memory for batch in apart}
    answer = engine._forecast(engine._sizes(), 1).answer
    for batch in (48, 64):  # one run: its answer is copied out beside what the recording holds
        assert 0 <= held[batch] - apart[batch] <= answer.at(batch) < batch * 1000, (held, apart)
    assert apart[112] + 0.8 * apart[48] < held[112] < apart[112] + apart[48]


def test_derived_weights_count() -> None:
    engine = relprop.compile(vit(), (images(2),), backend="torch")
    engine.memory(1)
    held = engine._weights.derived.nbytes
    assert held > 0
    assert engine.memory(1) > held


def test_no_second_copy_of_the_weights() -> None:
    """Neither in a pass of the kernels, which make |w| in registers, nor while books are kept of the plain rules."""
    model = vit(embed_dim=192, depth=6)
    size = sum(parameter.nbytes for parameter in model.parameters())
    for method in ("transformer_attribution", "attnlrp"):
        engine = relprop.compile(model, (images(2),), method=method, tape=False)
        for ledger in (False, True):
            real = allocated(lambda engine=engine, ledger=ledger: engine(images(1), target=1, ledger=ledger))
            assert real < 0.5 * size, (method, ledger, real, size)
            assert engine.derived_memory < 0.15 * size  # of the last of 6 blocks, where one row alone is computed


def test_automatic_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = relprop.compile(vit(), (images(2),), composite="chefer_stable")
    given, target = images(11), [i % 10 for i in range(11)]
    whole = engine(given, target=target)
    budget = engine.memory(4) - engine._weights.derived.nbytes
    monkeypatch.setattr(memory, "available", lambda device: int(budget / memory.SHARE) + 1)
    seen: list[int] = []
    explain = engine._explain

    def noted(inputs: dict[int, torch.Tensor], *rest: object, **named: object) -> object:
        seen.append(len(next(iter(inputs.values()))))
        return explain(inputs, *rest, **named)

    monkeypatch.setattr(engine, "_explain", noted)
    found = engine(given, target=target, batch_size="auto", check=True)
    assert seen == [4, 4, 4, 4, 4, 4, 3, 3, 3]  # each piece once, and twice more for the check
    torch.testing.assert_close(found.relevance, whole.relevance)
    assert torch.equal(found.target, whole.target)
    assert found.trustworthy is not None and found.trustworthy.shape == (11,)


@pytest.mark.parametrize(("batch", "sizes"), [(49, [48, 1]), (130, [48, 48, 34]), (40, [40])])
def test_automatic_batches_take_no_padding(monkeypatch: pytest.MonkeyPatch, batch: int, sizes: list[int]) -> None:
    """Where 48 fit and 64 do not, 49 are no piece: they would run as 64."""
    engine = relprop.compile(vit(embed_dim=96), (images(2),), tape=True)
    budget = (engine.memory(48) + engine.memory(64)) // 2 - engine.derived_memory
    monkeypatch.setattr(memory, "available", lambda device: int(budget / memory.SHARE) + 1)
    seen: list[int] = []
    explained = engine._explained

    def noted(inputs: dict[int, torch.Tensor], *rest: Any) -> Any:
        seen.append(len(next(iter(inputs.values()))))
        return explained(inputs, *rest)

    monkeypatch.setattr(engine, "_explained", noted)
    engine(images(batch), target=1, batch_size="auto")
    assert seen == sizes


def test_automatic_batches_leave_room_for_derived_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forecast's own passes derive them: what is free is asked after that."""
    engine = relprop.compile(vit(), (images(2),), backend="torch")
    asked: list[int] = []

    def available(device: torch.device) -> int:
        asked.append(engine.derived_memory)
        return 10**9

    monkeypatch.setattr(memory, "available", available)
    engine(images(3), batch_size="auto")
    assert asked == [engine.derived_memory] and asked[0] > 0


def test_pieces_of_a_given_size() -> None:
    engine = relprop.compile(vit(), (images(2),), composite="chefer_stable")
    given, target = images(5), torch.arange(10).reshape(5, 2)
    whole, found = engine(given, target=target), engine(given, target=target, batch_size=2)
    torch.testing.assert_close(found.relevance, whole.relevance)
    torch.testing.assert_close(found.logits, whole.logits)
    assert torch.equal(found.target, target)


@pytest.mark.parametrize("size", [0, -2, True, "all", 1.5])
def test_bad_batch_sizes(size: object) -> None:
    engine = relprop.compile(vit(), (images(2),))
    with pytest.raises(OptionError, match="batch_size: expected None, 'auto' or a positive int, got"):
        engine(images(2), batch_size=size)


def test_a_ledger_wants_one_piece() -> None:
    engine = relprop.compile(vit(), (images(2),))
    with pytest.raises(OptionError, match="ledger: expected a batch in one piece, got batch_size 1 for 2 samples"):
        engine(images(2), batch_size=1, ledger=True)


@pytest.mark.parametrize("count", [0, -3, 1.5, "a", True, None], ids=str)
def test_counts_that_are_none(count: Any) -> None:
    engine = relprop.compile(vit(), (images(2),), tape=False)
    for name, call in (("batch", lambda: engine.memory(count)), ("targets", lambda: engine.memory(2, targets=count))):
        with pytest.raises(OptionError) as raised:
            call()
        assert str(raised.value) == f"{name}: expected a positive int, got {count!r}"
