"""Explanations replayed from a tape against the plan itself, to the bit."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop import memory, native
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
    with recording.turn():
        recording._block.view(torch.uint8).fill_(0xFF)  # NaN in every format
    assert torch.equal(taped(x, target=1).relevance, want)


def test_memory_is_used_again() -> None:
    """The block is far smaller than what the run makes in all, and lives on one boundary of cache lines."""
    taped, _ = engines(vit(depth=6), images(2))
    taped(images(2), target=1)
    recording: Any = taped.recordings[-1]
    with recording.turn():
        assert recording._block.data_ptr() % 64 == 0 and recording._block.nbytes == recording.nbytes
    used = [s for s in recording._storages if s.nbytes]
    assert recording.nbytes < 0.35 * sum(s.nbytes for s in used)
    for i, a in enumerate(used):
        for b in used[:i]:
            apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
            assert apart or a.last < b.first or b.last < a.first


def recorded(run: Callable[[], Sequence[Tensor]], *changing: Tensor) -> Any:
    """A run's recording; replays give the bits of the run itself, on other values of what it reads."""
    recording = CpuRecorder()(run)
    for seed in range(3):
        for tensor in changing:
            tensor.normal_(generator=torch.Generator().manual_seed(seed))
        with recording.turn():
            recording._block.view(torch.uint8).fill_(0xFF)
            recording.replay()
            for found, want in zip(recording.outputs, run(), strict=True):
                assert found.dtype == want.dtype and found.stride() == want.stride() and torch.equal(found, want)
    return recording


def test_an_address_is_anothers_later() -> None:
    """Tensors of many sizes and constants at the places of dead ones, read by torch and by kernels."""
    x = torch.randn(1, 8192)

    def overlapping(sizes: Sequence[int]) -> bool:
        """Whether the allocator put one tensor where a part of another had been."""

        def run() -> list[Tensor]:
            kept = []
            for i, size in enumerate(sizes):
                part = x[:, :size]
                left = part * (i + 1)
                factors = torch.tensor([float(i)] * (size - 1) + [1.0])
                right = left.abs() + factors
                found = native.select(part, native.select(part, left[None], right[None]), factors.expand(1, 1, size))
                if i % 4 == 0:
                    kept.append(found)
            return kept

        places = sorted((s.start, s.start + s.nbytes) for s in recorded(run, x)._storages)
        return any(a != b and b[0] < a[1] for a, b in itertools.pairwise(places))

    drawn = random.Random(0)
    assert any([overlapping(drawn.choices(range(4096, 8193), k=24)) for _ in range(4)])


def test_views_and_writes() -> None:
    """In place, through views, into given tensors, of no bytes, by operations that return what they got."""
    x, y = torch.randn(5, 7), torch.randn(7, 5)

    def run() -> list[Tensor]:
        a = x + 1
        b = a.t()
        b.mul_(y)
        a[1:3].copy_(y.t()[:2])
        c = torch.empty(5, 7)
        torch.mul(a, x, out=c)
        c.t_()
        c.unsqueeze_(0).relu_()
        none = torch.zeros(0, 7)
        d = torch.cat([none, a, none.clone()]) + torch.empty(0).sum()
        bits = d.view(torch.int16)[:, 1::2].clone()
        values, places = d.topk(3)
        e = torch.nn.functional.dropout(d, 0.5, training=False)
        return [b, c, d[2:, ::2], bits, values, places, e.contiguous(), torch.full((3,), 2.5), x[1], none]

    recorded(run, x, y)


def test_memory_of_a_recorded_run_is_freed() -> None:
    """Of 40 tensors that a run makes one after the other two are alive at a time."""
    x = torch.randn(1 << 16)

    def run() -> list[Tensor]:
        y = x
        for _ in range(40):
            y = y * 1.5
        return [y]

    with memory.Allocations() as counted:
        recording = CpuRecorder()(run)
    assert max(counted.history) == recording.nbytes == 2 * x.nbytes


def test_a_block_that_moves() -> None:
    """Whatever memory a replay gets; what is another's by now stays as it is."""
    x = torch.randn(3, 1 << 16)

    def run() -> list[Tensor]:
        y = x.exp() - 1
        return [native.select(x, y[None], y[None].abs()).sum(-1), y * 2]

    recorder = CpuRecorder(keep=False)
    recording = recorder(run)
    taken: list[Tensor] = []
    for _ in range(4):
        x.normal_()
        with recording.turn():
            recording.replay()
            assert all(torch.equal(found, want) for found, want in zip(recording.outputs, run(), strict=True))
        assert recorder._block is None and native._C.block_use()[0] >= recording.nbytes
        taken.append(native.empty((recording.nbytes // 4,), torch.float32).fill_(7))
    assert len({t.data_ptr() for t in taken}) == 4 and all((t == 7).all() for t in taken)


def test_what_is_derived_is_no_part_of_a_recording() -> None:
    """Made within the recorded run, as a weight changed before it."""
    model, x = vit(depth=2), images(2)
    lengths = []
    for changes in (False, True):
        engine, plain = (relprop.compile(model, (x,), tape=tape, backend="torch") for tape in (None, False))
        engine(x, target=1)
        if changes:
            with torch.no_grad():
                model.blocks[0].mlp.fc1.weight.mul_(-1.5)
        for seed in range(2):
            assert_same(engine, plain, images(2, seed), 1)
        recording: Any = engine.recordings[-1]
        lengths.append(len(recording._calls))
    assert lengths[0] == lengths[1]


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
    with pytest.raises(OptionError, match="tape: expected tensors that keep their memory, got a resized one from aten"):
        recorder(lambda: [torch.add(torch.ones(3), 1, out=torch.empty(0))])
    with pytest.raises(OptionError, match="tape: expected a replay within a turn"):
        recorder(lambda: [torch.ones(3)]).replay()
