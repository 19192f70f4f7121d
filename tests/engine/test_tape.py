"""Explanations replayed from a tape against the plan itself, to the bit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.engine import Engine
from relprop.errors import BackendError, OptionError
from relprop.tape import CpuRecorder
from tests.engine.models import vit

CASES = [
    ("transformer_attribution", {}),
    ("transformer_attribution", {"composite": "chefer_stable", "backend": "torch"}),
    ("relevance_rollout", {}),
    ("full", {}),
    ("full", {"composite": "chefer_stable", "precision": "medium"}),
    ("attnlrp", {}),
    ("reslrp", {}),
    ("attention_rollout", {}),
    ("attention_gradcam", {"backend": "torch"}),
    ("generic_attention", {}),
]


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(100 * seed + batch))


def engines(model: nn.Module, example: Tensor, **options: Any) -> tuple[Engine, Engine]:
    """One that replays and one that does not."""
    taped, plain = (relprop.compile(model, (example,), tape=tape, **options) for tape in (True, False))
    return taped, plain


def assert_same(taped: Engine, plain: Engine, x: Tensor, target: Any) -> None:
    found, want = taped(x, target=target), plain(x, target=target)
    assert torch.equal(found.relevance, want.relevance) and torch.equal(found.logits, want.logits)
    assert torch.equal(found.target, want.target) and found.token_kinds == want.token_kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("method", "options"), CASES)
def test_same_bits(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Every replay, of several shapes on one block of memory, in turns."""
    model = vit(depth=2).to(dtype)
    if dtype == torch.float64:
        options = {**options, "precision": "highest"}
    taped, plain = engines(model, images(2).to(dtype), method=method, **options)
    several = torch.tensor([[1, 2], [3, 4]])
    for seed, (batch, target) in enumerate([(1, 3), (2, several), (1, 5), (2, None), (2, several), (1, 9)]):
        assert_same(taped, plain, images(batch, seed).to(dtype), target)


def test_nothing_of_an_earlier_run_is_read() -> None:
    """The block is poisoned between two replays."""
    model, x = vit(depth=2), images(2)
    taped, plain = engines(model, x)
    want = plain(x, target=1).relevance
    taped(x, target=1)
    recording: Any = taped.recordings[-1]
    recording._block.fill_(0xFF)  # NaN in every format
    assert torch.equal(taped(x, target=1).relevance, want)


def test_memory_is_used_again() -> None:
    """The block is far smaller than what the run makes in all, and lives on one boundary of cache lines."""
    taped, _ = engines(vit(depth=6), images(2))
    taped(images(2), target=1)
    recording: Any = taped.recordings[-1]
    storages = recording._memory.storages.values()
    assert recording._block.data_ptr() % 64 == 0
    assert recording._block.nbytes < 0.35 * sum(s.nbytes for s in storages)
    used = [s for s in storages if s.first >= 0 and s.nbytes]
    for i, a in enumerate(used):
        for b in used[:i]:
            apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
            assert apart or a.last < b.first or b.last < a.first


def test_weights_that_change() -> None:
    model, x = vit(depth=2), images(2)
    taped, plain = engines(model, x, precision="medium")
    assert_same(taped, plain, x, 1)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(-1.5)
    assert_same(taped, plain, x, 1)
    model.head = nn.Linear(48, 10)
    assert_same(taped, plain, x, 1)
    plain.refresh()  # what is derived is the model's: the tape holds on to what it reads
    assert_same(taped, plain, x, 1)


def test_inference_mode() -> None:
    """Recorded within, replayed without, and the other way round."""
    model, x = vit(depth=1), images(2)
    for first, then in ((True, False), (False, True)):
        taped, plain = engines(model, x)
        for within in (first, then):
            with torch.inference_mode(within):
                assert_same(taped, plain, x.clone(), 1)


def test_number_of_threads() -> None:
    model, x = vit(depth=2), images(2)
    taped, plain = engines(model, x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert_same(taped, plain, x, 1)
    finally:
        torch.set_num_threads(before)


def test_threads() -> None:
    """Recordings and plain runs at once, each in its own thread: a tape has the calls of its own thread only."""
    model = vit(depth=1)
    taped, plain = engines(model, images(2))
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            plain(images(3), target=2)

    with ThreadPoolExecutor(4) as pool:
        disturbing = pool.submit(disturb)
        calls = [(1 + i % 4, i) for i in range(16)]
        found = list(pool.map(lambda call: taped(images(*call), target=0).relevance, calls))
        stop.set()
        disturbing.result()
    for call, relevance in zip(calls, found, strict=True):
        assert torch.allclose(relevance, plain(images(*call), target=0).relevance, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_taped() -> None:
    with pytest.raises(OptionError, match="tape: expected it without compile, got both"):
        relprop.compile(vit(), (images(2),), tape=True, compile=True)
    with pytest.raises(BackendError, match="tape: expected a model on the CPU, got one on meta"):
        relprop.compile(vit().to("meta"), (images(2).to("meta"),), tape=True)
    with pytest.raises(BackendError, match="tape: expected a backend among auto, cpp, torch, got triton"):
        relprop.compile(vit(), (images(2),), tape=True, backend="triton")
    recorder = CpuRecorder()
    with pytest.raises(
        OptionError, match="tape: expected a pass that depends on no value and no chance, got aten.rand"
    ):
        recorder(lambda: [torch.rand(3)])
    with pytest.raises(OptionError, match="got aten.nonzero"):
        recorder(lambda: [torch.ones(3).nonzero()])
