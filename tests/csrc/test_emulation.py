"""The host emulation of CUDA: that right kernels give what a GPU gives, and that wrong ones are caught."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc import emulated

if emulated.reason_against():
    pytest.skip(emulated.reason_against(), allow_module_level=True)

PROBES = [Path(__file__).with_name("emulation_probes.cu")]
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


@pytest.fixture(scope="module")
def probes() -> Any:
    return emulated.load("emulation_probes", emulated.build("emulation_probes", PROBES))


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, probes: Any) -> Iterator[str]:
    probes.set_order(ORDERS[request.param])
    yield request.param
    probes.set_order(0)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def message(probes: Any, name: str, *arguments: int) -> str:
    with pytest.raises(RuntimeError) as raised:
        probes.probe(name, *arguments)
    return str(raised.value)


def test_barriers(probes: Any, order: str) -> None:
    x, out = random(512), poisoned(512)
    probes.probe("reverse", out.data_ptr(), x.data_ptr(), argument=1)
    assert torch.equal(out, x.view(2, 256).flip(1).flatten())


def test_a_missing_barrier_is_nan_in_every_order(probes: Any, order: str) -> None:
    x, out = random(512), poisoned(512)
    probes.probe("reverse", out.data_ptr(), x.data_ptr(), argument=0)
    assert out.isnan().any() and not out.isnan().all()


def test_warp_operations(probes: Any, order: str) -> None:
    x, out = random(32), poisoned(5, 32)
    probes.probe("warp", out.data_ptr(), x.data_ptr())
    lane = torch.arange(32)
    assert torch.equal(out[0], x[lane ^ 5])
    assert torch.equal(out[1], x[torch.where(lane + 3 < 32, lane + 3, lane)])
    assert torch.equal(out[2], x[torch.where(lane >= 3, lane - 3, lane)])
    assert torch.equal(out[3], x[7].expand(32))
    assert torch.equal(out[4], (lane % 5 == 0).float())


def test_atomics(probes: Any, order: str) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    probes.probe("count", out.data_ptr())
    assert out.item() == 3 * sum(range(64))


def test_copies_arrive_at_the_wait(probes: Any, order: str) -> None:
    x, out = random(128), poisoned(128)
    probes.probe("copy", out.data_ptr(), x.data_ptr(), argument=1)
    assert torch.equal(out[:126], x[:126]) and out[126:].tolist() == [0, 0]
    probes.probe("copy", out.data_ptr(), x.data_ptr(), argument=0)
    assert out.isnan().all()


@pytest.mark.parametrize("kind", ["tf32", "bf16", "fp16"])
def test_tensor_core_product(probes: Any, order: str, kind: str) -> None:
    depth = 8 if kind == "tf32" else 16
    a, b, c = random(16, depth), random(depth, 8).neg(), poisoned(16, 8)
    probes.probe(f"mma_{kind}", c.data_ptr(), a.data_ptr(), b.data_ptr())
    if kind == "tf32":
        a, b = ((t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for t in (a, b))
    else:
        a, b = (t.to(torch.bfloat16 if kind == "bf16" else torch.float16) for t in (a, b))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
def test_load_matrices(probes: Any, order: str, transposed: int) -> None:
    tiles = torch.arange(256, dtype=torch.int16)
    out = torch.full_like(tiles, -1)
    probes.probe("load_matrices", out.data_ptr(), tiles.data_ptr(), argument=transposed)
    assert torch.equal(out, tiles)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounding_is_torch_s(probes: Any, name: str, dtype: torch.dtype) -> None:
    scales = torch.logspace(-42, 38, 4000, base=10.0).repeat(3)
    ties = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    limits = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 1e39, -1e39, 5.9e-8, 2.9e-8, 3.1e-8, float("nan")])
    halfway = (ties[:-1] + ties[1:]) / 2
    x = torch.cat([random(12000) * scales, ties, halfway, limits])
    out = poisoned(len(x))
    probes.probe(f"round_{name}", out.data_ptr(), x.data_ptr(), argument=len(x))
    torch.testing.assert_close(out, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_what_a_gpu_would_let_pass_is_caught(probes: Any) -> None:
    out, x = torch.zeros(512), random(512)
    probes.probe("read_unwritten", out.data_ptr())
    assert out[:32].isnan().all()
    assert "a write next to a shared array" in message(probes, "write_past_end")
    assert "cp.async: misaligned by its size of 16" in message(probes, "misaligned_copy", out.data_ptr(), x.data_ptr())
    assert "expected 1 to 1024 threads in a block" in message(probes, "too_many_threads", out.data_ptr())


def test_shared_memory_is_a_gpu_s(probes: Any) -> None:
    out = torch.zeros(32)
    try:
        probes.set_most_shared(99 * 1024)
        for asked in (99 * 1024 + 1, 1 << 20):
            with pytest.raises(RuntimeError, match=r"read: invalid argument \(cudaErrorInvalidValue\)"):
                probes.probe("memory", out.data_ptr(), argument=asked)
        probes.probe("memory", out.data_ptr(), argument=99 * 1024)
    finally:
        probes.set_most_shared(163 * 1024)
    probes.probe("memory", out.data_ptr(), argument=163 * 1024)
    with pytest.raises(ValueError, match=r"most_shared: expected 49152 to 232448 bytes, got 1"):
        probes.set_most_shared(1)


def test_a_failed_launch_is_not_the_next_one_s_error(probes: Any) -> None:
    x, out = random(512), poisoned(512)
    with pytest.raises(RuntimeError, match=r"read: invalid argument \(cudaErrorInvalidValue\)"):
        probes.probe("memory", out.data_ptr(), argument=1 << 20)
    probes.probe("reverse", out.data_ptr(), x.data_ptr(), argument=1)
    assert torch.equal(out, x.view(2, 256).flip(1).flatten())


def test_a_barrier_that_not_all_reach_is_an_error(probes: Any, order: str) -> None:
    assert "emulated kernel divergent: standstill" in message(probes, "divergent_barrier")


@pytest.mark.full
def test_address_sanitizer_names_the_access() -> None:
    built = emulated.build("emulation_probes", PROBES, sanitize=True)
    if not emulated.sanitizer_libraries():
        pytest.skip("the compiler has no AddressSanitizer library")
    load = f"from tests.csrc import emulated; probe = emulated.load('emulation_probes', {str(built)!r}).probe"
    right = emulated.run_sanitized(
        "-c", f"{load}; import array; a = array.array('i', [0]); probe('count', a.buffer_info()[0]); print(a[0])"
    )
    assert right.returncode == 0 and right.stdout.strip() == str(3 * sum(range(64))), right.stderr
    wrong = emulated.run_sanitized("-c", f"{load}; probe('write_past_end')")
    assert wrong.returncode != 0 and "use-after-poison" in wrong.stderr and "write_past_end_kernel" in wrong.stderr


@pytest.mark.full
@pytest.mark.parametrize("tests", ["test_cuda_linear.py", "test_cuda_kernels.py", "test_cuda_attention_relevance.py"])
def test_kernels_under_address_and_undefined_behaviour_sanitizers(tests: str) -> None:
    if not emulated.sanitizer_libraries():
        pytest.skip("the compiler has no AddressSanitizer library")
    emulated.build_cuda_module(sanitize=True)
    path = str(Path(__file__).with_name(tests))
    flags = ["-q", "-x", "--capture=no", "-m", "not full", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = emulated.run_sanitized("-m", "pytest", path, *flags, **{emulated.SANITIZE_KERNELS: "1"})
    assert done.returncode == 0 and "runtime error" not in done.stderr, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
