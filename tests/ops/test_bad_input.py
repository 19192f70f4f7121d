"""Bad input through the custom ops: a clear error or a right answer, on the kernels and on the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from relprop import native
from relprop.errors import DeviceError, DTypeError, OptionError, RelpropError, ShapeError
from relprop.ops.registry import PRODUCTS, SPECS, WITHOUT_OUT
from tests.ops.cases import arguments, random, results

# Kernels without a matrix product inside: any dtype, every size.
ELEMENTWISE = sorted(set(SPECS) - PRODUCTS)
WITH_OUT = sorted(set(SPECS) - WITHOUT_OUT)
IMPLEMENTATIONS = ["reference", *(["kernel"] if native.available()[0] else [])]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "reference":
        monkeypatch.setattr(native, "available", lambda: (False, "left out"))
    yield request.param


def overload(name: str) -> Any:
    return getattr(torch.ops.relprop, name).default


def tensors_of(given: tuple[Any, ...]) -> list[int]:
    return [i for i, item in enumerate(given) if isinstance(item, Tensor)]


def replaced(given: tuple[Any, ...], place: int, item: Any) -> tuple[Any, ...]:
    return (*given[:place], item, *given[place + 1 :])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_wrong_dtype(implementation: str, name: str) -> None:
    given = arguments(name)
    for place in tensors_of(given):
        for dtype in (torch.int32, torch.complex64):
            with pytest.raises(DTypeError, match=r": expected .*torch\.float32.*, got torch\.(int32|complex64)"):
                overload(name)(*replaced(given, place, given[place].to(dtype)))
    stream = 0 if not isinstance(given[0], list) else None
    for place in tensors_of(given):
        if place != stream and name not in ("linear_alpha_beta_select", "linear_epsilon_select"):
            with pytest.raises(DTypeError, match=": expected "):
                overload(name)(*replaced(given, place, given[place].double()))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_wrong_shape(implementation: str, name: str) -> None:
    given = arguments(name)
    for place in tensors_of(given):
        for wrong in (given[place].narrow(-1, 0, 3), given[place][None], torch.zeros(())):
            with pytest.raises(RelpropError, match=r": expected shape \[.*, got \["):
                overload(name)(*replaced(given, place, wrong))


@pytest.mark.parametrize("name", SPECS)
def test_wrong_device(name: str) -> None:
    given = arguments(name)
    places = tensors_of(given)
    if len(places) < 2:
        given = replaced(given, places[0], given[places[0]].to("meta"))
        places = []
        with pytest.raises(DeviceError):
            overload(name)(*given)
    for place in places:
        with pytest.raises(DeviceError, match=r": expected a tensor on (cpu|meta), got one on (cpu|meta)"):
            overload(name)(*replaced(given, place, given[place].to("meta")))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_any_strides(implementation: str, name: str) -> None:
    given = arguments(name)
    want = results(name, overload(name)(*given))
    for place in tensors_of(given):
        tensor = given[place]
        room = torch.full((*tensor.shape, 2), float("nan"))
        room[..., 0] = tensor
        for view in (room[..., 0], torch._neg_view(-tensor), tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor):
            made = results(name, overload(name)(*replaced(given, place, view)))
            assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(made, want, strict=True))
        expanded = tensor[..., :1].expand(tensor.shape)
        made = results(name, overload(name)(*replaced(given, place, expanded)))
        same = results(name, overload(name)(*replaced(given, place, expanded.clone())))
        assert all(torch.equal(a, b) for a, b in zip(made, same, strict=True))


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, one byte off their alignment."""
    flat = torch.empty(tensor.nbytes + 16, dtype=torch.uint8)
    start = 1 + (-flat.data_ptr()) % 16
    buffer = memoryview(flat.numpy())[start : start + tensor.nbytes]
    view = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
    view.copy_(tensor)
    assert view.data_ptr() % tensor.element_size() == 1
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_misaligned_inputs(name: str, dtype: torch.dtype) -> None:
    given = arguments(name, dtype)
    want = results(name, overload(name)(*given))
    for place in tensors_of(given):
        made = results(name, overload(name)(*replaced(given, place, misaligned(given[place]))))
        assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))


@pytest.mark.skipif("kernel" not in IMPLEMENTATIONS, reason="the reference writes anywhere")
@pytest.mark.parametrize("name", WITH_OUT)
def test_places_to_write(name: str) -> None:
    given = arguments(name)
    shape = results(name, overload(name)(*given))[0].shape
    others = [torch.empty(shape)] * (SPECS[name].results - 1)
    write = overload(f"{name}_out")
    for place, error, text in [
        (misaligned(torch.empty(shape)), OptionError, "expected memory aligned to 4 bytes, got the address 0x"),
        (torch.empty(shape).mT.contiguous().mT, ShapeError, "expected a contiguous tensor to write to, got strides"),
        (torch.empty(()).expand(shape), ShapeError, "expected a contiguous tensor to write to, got strides"),
        (torch.empty(shape[1:]), ShapeError, "expected shape"),
        (torch.empty(shape, dtype=torch.float64), DTypeError, "got torch.float64"),
        (torch.empty(shape, dtype=torch.int32), DTypeError, "got torch.int32"),
    ]:
        with pytest.raises(error) as raised:
            write(*given, place, *others)
        assert text in str(raised.value)
    if others:
        with pytest.raises(OptionError, match="out: expected two different tensors, got the same one twice"):
            write(*given, others[0], others[0])


@pytest.mark.skipif("kernel" not in IMPLEMENTATIONS, reason="the reference copies at the end")
@pytest.mark.parametrize("name", WITH_OUT)
def test_overlapping_output(name: str) -> None:
    """Where the result may lie in place of the stream, nowhere else."""
    given = arguments(name)
    want = results(name, overload(name)(*given))
    size, write = want[0].numel(), overload(f"{name}_out")
    others = [torch.empty_like(one) for one in want[1:]]
    for place in tensors_of(given):
        tensor = given[place]
        room = torch.zeros(tensor.numel() + size)
        moved = room[: tensor.numel()].view(tensor.shape).copy_(tensor)
        out = room[tensor.numel() - 1 :][:size].view(want[0].shape)
        with pytest.raises(OptionError) as raised:
            write(*replaced(given, place, moved), out, *others)
        text = "expected memory apart from the inputs and other results, got an overlap"
        assert str(raised.value).endswith(text)
    stream = next(i for i, n in enumerate(SPECS[name].arguments.split(", ")) if n.split()[-1] == SPECS[name].stream)
    if name == "matmul_half_rollout_matrix":
        return
    tensor = given[stream][0] if isinstance(given[stream], list) else given[stream]
    write(*given, tensor, *others)  # in place
    assert torch.equal(tensor, want[0])


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_products(implementation: str, name: str) -> None:
    given = arguments(name)
    want = results(name, overload(name)(*given))
    for place in tensors_of(given):
        tensor = given[place]
        with pytest.raises(DTypeError, match=r": expected torch\.float32.*, got torch\.int32"):
            overload(name)(*replaced(given, place, tensor.int()))
        with pytest.raises(ShapeError, match=r": expected shape \[.*, got \["):
            overload(name)(*replaced(given, place, torch.zeros(3, 4, 5, 6)))
        for view in (
            misaligned(tensor),
            torch._neg_view(-tensor),
            tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor,
        ):
            made = results(name, overload(name)(*replaced(given, place, view)))
            for one, other in zip(made, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    operands = next(i for i, item in enumerate(given) if isinstance(item, torch.dtype))
    if implementation == "reference":
        with pytest.raises(OptionError) as raised:
            overload(name)(*replaced(given, operands, torch.float16))
        assert str(raised.value) == "operands: expected torch.float32 or torch.bfloat16, got torch.float16"


def emptied(item: Any, axis: int) -> Any:
    if isinstance(item, list):
        return [emptied(one, axis) for one in item]
    if not isinstance(item, Tensor):
        return item
    if item.ndim > -axis - 1:
        return item.narrow(axis, 0, 0)
    return item


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_zero_size(implementation: str, name: str, axis: int) -> None:
    given = arguments(name)
    if name == "add_gamma":
        given = replaced(given, 2, random(3, 8))
    made = results(name, overload(name)(*(emptied(item, axis) for item in given)))
    assert all(one.numel() == 0 and one.shape[axis] == 0 for one in made)


def test_no_targets(implementation: str) -> None:
    r, x = torch.empty(0, 3, 8), random(3, 8)
    assert torch.ops.relprop.add_gamma(r, x, x, 1.0, 0, 1e-6)[0].shape == (0, 3, 8)
    assert torch.ops.relprop.norm_gradient(r, x, None, "rms", 1e-6).shape == (0, 3, 8)


def test_bad_options(implementation: str) -> None:
    r, x = random(2, 3, 8), random(3, 8)
    op = torch.ops.relprop
    for call, text in [
        (lambda: op.add_epsilon(r, x, x, 7, 0.0), "stabiliser_kind: expected 0 (signed) or 1 (reference), got 7"),
        (lambda: op.add_epsilon(r, x, x, 0, -1.0), "epsilon: expected a finite number >= 0, got -1"),
        (lambda: op.add_epsilon(r, x, x, 0, float("nan")), "epsilon: expected a finite number >= 0, got nan"),
        (lambda: op.activation_gradient(r, x, "relu"), "activation: expected one of gelu, gelu_tanh, silu, got 'relu'"),
        (lambda: op.norm_gradient(r, x, None, "group", 0.0), "norm: expected one of layer, rms, got 'group'"),
        (lambda: op.norm_gradient(r, x, None, "rms", -1.0), "epsilon: expected a finite number >= 0, got -1"),
    ]:
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value).startswith(text)


@pytest.mark.full
@pytest.mark.parametrize("name", ["linear_epsilon_select", "activation_gradient", "fanout_epsilon"])
def test_more_elements_than_an_int32_counts(name: str) -> None:
    """In place in float16, 8 GiB: offsets are 64 bits wide."""
    size = 2**31 + 1025
    marks = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, size - 1]
    x = torch.ones(size, dtype=torch.float16)
    stream = torch.full((1, size), 2.0, dtype=torch.float16)
    x[marks], stream[0, marks] = random(len(marks)).half(), random(len(marks), seed=1).half()
    small = x[marks].clone(), stream[:, marks].clone()
    calls = {
        "linear_epsilon_select": lambda x, c, *out: overload(f"{name}{'_out' * len(out)}")(x, c, *out),
        "activation_gradient": lambda x, g, *out: overload(f"{name}{'_out' * len(out)}")(g, x, "silu", *out),
        "fanout_epsilon": lambda x, r, *out: overload(f"{name}{'_out' * len(out)}")([r], x, 0, 1e-6, *out),
    }
    calls[name](x, stream, stream)
    assert torch.equal(stream[:, marks], calls[name](*small))
    rest = calls[name](torch.ones(1, dtype=torch.float16), torch.full((1, 1), 2.0, dtype=torch.float16))
    for piece in stream[0].split(2**28):
        assert int((piece != rest.item()).sum()) <= len(marks)
