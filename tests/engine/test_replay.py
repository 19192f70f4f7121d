"""Runs of fixed shapes: padding, the pool's bounds, changed weights, threads; recordings by a stand-in for a graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop import replay
from relprop.engine import Engine
from relprop.errors import BackendError, TargetError
from relprop.replay import CudaRecorder, Replays, padded, padded_size
from tests.engine.models import vit


class FakeRecorder:
    """Replays by running again on the recorded inputs, into one memory that all recordings share."""

    holds = True

    def __init__(self) -> None:
        self.recorded = 0
        self.replays: list[object] = []
        self.busy = threading.Lock()
        self.memory: list[Tensor] = []

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> FakeRecording:
        self.recorded += 1
        return FakeRecording(self, run)

    def release(self) -> None:
        pass


class FakeRecording:
    def __init__(self, recorder: FakeRecorder, run: Callable[[], Sequence[Tensor]]) -> None:
        self.recorder, self.run = recorder, run
        self.outputs = [t.clone() for t in run()]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        assert self.recorder.busy.acquire(blocking=False), "two recordings at once"
        yield
        self.recorder.busy.release()

    def replay(self) -> None:
        for t in self.recorder.memory:  # what another recording left there is gone
            t.fill_(torch.nan) if t.is_floating_point() else t.fill_(-1)
        for own, made in zip(self.outputs, self.run(), strict=True):
            own.copy_(made)
        self.recorder.memory = list(self.outputs)
        self.recorder.replays.append(self)


class FakeCuda:
    """Notes what is asked of `torch.cuda`, and on which device."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.at = "cuda:0"
        self.options: dict[str, Any] = {}

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.at = self.at, str(device)
        yield
        self.at = before

    @contextlib.contextmanager
    def graph(self, graph: object, **options: Any) -> Iterator[None]:
        self.note("graph")
        self.options = options
        yield

    def note(self, name: str, *rest: object) -> FakeCuda:
        self.asked.append((name, self.at))
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *rest: contextlib.nullcontext() if name == "stream" else self.note(name, *rest)


def test_cuda_recordings_are_of_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device is the current one."""
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    runs: list[str] = []

    def run() -> list[Tensor]:
        runs.append(cuda.at)
        assert replay._RECORDING.locked()  # torch records one graph at a time in a process
        return []

    recorder = CudaRecorder(torch.device("cuda:1"))
    recording = recorder(run)
    assert cuda.options["stream"] is recorder.stream  # not torch's one for all, nor its libraries' workspaces
    assert not replay._RECORDING.locked()
    with recording.turn():
        recording.replay()
    assert runs == ["cuda:1"] * 3  # twice to warm up, once to record
    assert {at for name, at in cuda.asked if name in ("graph", "replay", "CUDAGraph", "Event")} == {"cuda:1"}
    assert cuda.options["capture_error_mode"] == "thread_local"
    assert [name for name, _ in cuda.asked][-3:] == ["replay", "current_stream", "record"]


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(100 * seed + batch))


def recorded(model: nn.Module, **options: Any) -> tuple[Engine, FakeRecorder, Engine]:
    """An engine whose runs are recorded by the stand-in, and a plain one."""
    settings = {"composite": "chefer_stable", "tape": False, **options}
    engine, plain = (relprop.compile(model, (images(2),), **settings) for _ in range(2))
    recorder = FakeRecorder()
    engine._replay(False, recorder)
    return engine, recorder, plain


def test_padded_sizes() -> None:
    assert [padded_size(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 17, 33, 48, 49, 64)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 24, 48, 48, 64, 64,
    ]  # fmt: skip
    assert all(n <= padded_size(n) <= max(1.5 * n, n + 1) for n in range(1, 65))
    assert padded_size(9, largest=10) == 10


def test_padding_repeats_the_last_sample() -> None:
    given = images(3)
    assert torch.equal(padded(given, 5), torch.cat([given, given[2:], given[2:]]))
    assert padded(given, 3) is given


@pytest.mark.parametrize("method", ["transformer_attribution", "attention_gradcam", "full", "attention_rollout"])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_same_answers(method: str, backend: str) -> None:
    engine, recorder, plain = recorded(vit(), method=method, backend=backend)
    several = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [0, 9]])
    for batch, target in ((2, None), (5, 3), (5, several), (1, [4]), (5, several)):
        found, want = engine(images(batch), target=target), plain(images(batch), target=target)
        torch.testing.assert_close(found.relevance, want.relevance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.logits, want.logits, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.target, want.target)
        assert found.token_kinds == want.token_kinds and found.grid == want.grid
    assert recorder.recorded == 4 and len(recorder.replays) == 5


def test_batches_above_the_largest_take_several_runs() -> None:
    engine, recorder, plain = recorded(vit())
    engine._replays.largest = 4  # type: ignore[union-attr]
    torch.testing.assert_close(engine(images(11)).relevance, plain(images(11)).relevance, rtol=1e-4, atol=1e-6)
    assert len(recorder.replays) == 3 and recorder.recorded == 2  # 4, 4 and 3


def test_the_pool_is_bounded_and_forgets_the_oldest() -> None:
    engine, recorder, _ = recorded(vit(depth=1))
    replays = engine._replays
    assert isinstance(replays, Replays)
    replays.kept = 2
    for batch in (1, 2, 1, 4):
        engine(images(batch))
    assert [key[0][0] for key in replays.shapes] == [1, 4]
    engine(images(1))
    assert recorder.recorded == 3
    engine(images(2))
    assert recorder.recorded == 4


def test_changed_weights_are_noticed() -> None:
    model = vit()
    engine, recorder, plain = recorded(model, backend="torch")
    engine(images(2))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(-1.5)
    torch.testing.assert_close(engine(images(2)).relevance, plain(images(2)).relevance, rtol=1e-4, atol=1e-6)
    model.head = nn.Linear(48, 10)
    torch.testing.assert_close(engine(images(2)).logits, plain(images(2)).logits, rtol=1e-4, atol=1e-6)
    engine.refresh()
    engine(images(2))
    assert recorder.recorded == 4


def test_threads_take_turns() -> None:
    engine, _, plain = recorded(vit(depth=1))
    calls = [(1 + i % 5, i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: engine(images(*call)).relevance, calls))
    for call, relevance in zip(calls, found, strict=True):
        torch.testing.assert_close(relevance, plain(images(*call)).relevance, rtol=1e-4, atol=1e-6)


def test_what_is_not_replayed() -> None:
    engine, recorder, plain = recorded(vit())
    assert engine(images(2), ledger=True).ledger is not None
    assert engine(images(2), check=True).trustworthy is not None
    found, want = (e(images(2), target=lambda output: output[:, 1] - output[:, 2]) for e in (engine, plain))
    torch.testing.assert_close(found.relevance, want.relevance)
    assert recorder.recorded == 0


def test_bad_targets_are_named_before_a_run() -> None:
    engine, recorder, _ = recorded(vit())
    with pytest.raises(TargetError, match=r"expected indices within an output of shape \[B, 10\], got 10"):
        engine(images(2), target=10)
    assert recorder.recorded == 0


def test_cuda_graphs_want_cuda() -> None:
    with pytest.raises(BackendError, match="cuda_graph: expected a model on a CUDA device, got one on cpu"):
        relprop.compile(vit(), (images(2),), cuda_graph=True)
