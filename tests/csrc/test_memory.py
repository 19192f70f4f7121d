"""Memory of results: kept when a tensor dies, given to the next of its size, and within the limit."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

import relprop
from relprop import native
from relprop.native.tensors import empty, fresh_results

SMALLEST = native._C.SMALLEST_BLOCK
SHAPE = (SMALLEST // 4 + 5, 3)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    gc.collect()
    relprop.empty_cache()
    limit = native._C.block_use()[1]
    yield
    native._C.limit_blocks(limit)
    relprop.empty_cache()


def kept() -> int:
    return int(native._C.block_use()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_result_is_a_plain_tensor(dtype: torch.dtype) -> None:
    found = empty(SHAPE, dtype)
    assert found.shape == SHAPE and found.dtype == dtype and found.is_contiguous() and found.is_cpu
    assert found.data_ptr() % 64 == 0
    found.fill_(2)
    assert found.double().sum() == 2 * found.numel()


def test_memory_goes_to_the_next_result_of_its_size() -> None:
    first = empty(SHAPE, torch.float32)
    place = first.data_ptr()
    del first
    assert kept() >= 4 * SHAPE[0] * SHAPE[1]
    second = empty(SHAPE, torch.float32)
    assert second.data_ptr() == place and kept() == 0


def test_fresh_results_are_one_threads_matter() -> None:
    with fresh_results():
        empty(SHAPE, torch.float32)
        assert kept() == 0
        other = threading.Thread(target=lambda: empty(SHAPE, torch.float32))
        other.start()
        other.join(60)
        assert kept() > 0
        with fresh_results():
            pass
        relprop.empty_cache()
        empty(SHAPE, torch.float32)
        assert kept() == 0
    empty(SHAPE, torch.float32)
    assert kept() > 0


def test_a_view_keeps_the_memory() -> None:
    whole = empty(SHAPE, torch.float32)
    part = whole[-1]
    part.fill_(5)
    del whole
    assert kept() == 0
    other = empty(SHAPE, torch.float32).fill_(7)
    assert (part == 5).all() and (other == 7).all()


def test_what_nobody_took_is_not_lost() -> None:
    native._C.result(list(SHAPE), 0)
    assert kept() > 0


def test_small_and_empty_results_are_torch_s() -> None:
    for shape in ((3, 4), (0, 1 << 40), ()):
        assert empty(shape, torch.float32).shape == shape
    assert kept() == 0


def test_no_more_than_the_limit_is_kept() -> None:
    native._C.limit_blocks(3 * SMALLEST)
    results = [empty((SMALLEST // 4,), torch.float32) for _ in range(5)]
    del results
    assert kept() == 3 * SMALLEST
    native._C.limit_blocks(SMALLEST)
    assert kept() == SMALLEST
    empty((SMALLEST,), torch.float32)
    assert kept() == SMALLEST  # the larger went
    with pytest.raises(ValueError, match="limit: expected a size >= 0, got -1"):
        native._C.limit_blocks(-1)


def test_empty_cache_keeps_the_limit() -> None:
    limit = native._C.block_use()[1]
    empty(SHAPE, torch.float32)
    assert kept() > 0
    relprop.empty_cache()
    assert native._C.block_use() == (0, limit)


def test_sizes_that_no_machine_has() -> None:
    with pytest.raises(MemoryError):
        empty((1 << 50,), torch.float32)
    with pytest.raises(ValueError, match="expected a tensor of fewer than 2\\^63 elements"):
        native._C.result([1 << 40, 1 << 40], 0)
    with pytest.raises(ValueError, match="dtype: expected 0, 1, 2 or 3, got 9"):
        native._C.result([1], 9)


def test_threads_do_not_share_a_living_result() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for round_ in range(200):
            mine = [empty(SHAPE, torch.float32).fill_(number) for _ in range(1 + round_ % 3)]
            wrong.extend(number for tensor in mine if not bool((tensor == number).all()))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
