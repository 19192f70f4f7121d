"""Bad input through the custom ops: a clear error or a right answer, on the kernels and on the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from relprop import native
from relprop.errors import DeviceError, DTypeError, OptionError, RelpropError, ShapeError
from relprop.ops.registry import PRODUCTS, SPECS, WHOLE_LAYERS, WITHOUT_OUT
from tests.ops.cases import arguments, misaligned, random, results

# Kernels without a matrix product inside: any mix of dtypes.
ELEMENTWISE = sorted(set(SPECS) - WHOLE_LAYERS)
WITH_OUT = sorted(set(SPECS) - WITHOUT_OUT)
IMPLEMENTATIONS = ["reference", "gpu", *(["kernel"] if native.available()[0] else [])]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "reference":
        monkeypatch.setattr(native, "available", lambda: (False, "left out"))
    if request.param == "gpu":
        request.getfixturevalue("ops_on_gpu")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_misaligned_inputs(implementation: str, name: str, dtype: torch.dtype) -> None:
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


def views(tensor: Tensor) -> list[Tensor]:
    """The same numbers laid out otherwise: one byte off, negated lazily, transposed, every other element."""
    room = torch.full((*tensor.shape, 2), float("nan"))
    room[..., 0] = tensor
    found = [misaligned(tensor), torch._neg_view(-tensor), room[..., 0]]
    return found + ([tensor.mT.contiguous().mT] if tensor.ndim > 1 else [])


def assert_near(made: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(made, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(WHOLE_LAYERS))
def test_whole_layers(implementation: str, name: str) -> None:
    given = arguments(name)
    want = results(name, overload(name)(*given))
    for place in tensors_of(given):
        tensor = given[place]
        for dtype in (torch.int32, torch.float64):
            with pytest.raises(DTypeError, match=r": expected .*torch\.float.*, got torch\."):
                overload(name)(*replaced(given, place, tensor.to(dtype)))
        for wrong in (torch.zeros(3, 4, 5, 6, 7, 9), torch.zeros(9, 9)):
            with pytest.raises(ShapeError, match=r": expected (a )?shape .*\[.*, got \["):
                overload(name)(*replaced(given, place, wrong))
        for view in views(tensor):
            assert_near(results(name, overload(name)(*replaced(given, place, view))), want)
        expanded = tensor[..., :1].expand(tensor.shape)
        copied = results(name, overload(name)(*replaced(given, place, expanded.clone())))
        assert_near(results(name, overload(name)(*replaced(given, place, expanded))), copied)


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_operands_of_products(implementation: str, name: str) -> None:
    given = arguments(name)
    place = next(i for i, item in enumerate(given) if isinstance(item, torch.dtype))
    with pytest.raises(OptionError) as raised:
        overload(name)(*replaced(given, place, torch.float16))
    assert str(raised.value) == "operands: expected torch.float32 or torch.bfloat16, got torch.float16"


@pytest.mark.parametrize("sizes", [(0, 8, 5), (3, 0, 5), (3, 8, 0)])
@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_products_of_zero_size(implementation: str, name: str, sizes: tuple[int, int, int]) -> None:
    """Rows, K, N: nothing to sum gives 0, or the bias; nothing to hold gives nothing."""
    rows, k, n = sizes
    x, w, own = random(rows, k), random(n, k), random(2, rows, n)
    given = {
        "linear_apply": (x, w, random(n), torch.float32),
        "linear_apply_rounded": (x, w, random(n), torch.float32),
        "linear_transpose": (own, w, torch.float32),
        "linear_alpha_beta_share_out_product": (own, x, w, None, None, torch.float32, 1.0, 1e-6, 0, 1e-6),
        "linear_alpha_beta_back_product": (own, x, w, torch.float32),
    }[name]
    made, *sums = results(name, overload(name)(*given))
    applied = name in ("linear_apply", "linear_apply_rounded")
    want = random(n).expand(rows, n) if applied else torch.zeros(made.shape)
    assert made.shape[-1] == (n if applied or name == "linear_alpha_beta_share_out_product" else k)
    assert torch.equal(made, want.to(made.dtype))
    assert all(torch.equal(one, torch.zeros(rows, n)) for one in sums)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("place", [0, 1])
def test_attention_of_zero_size(implementation: str, place: int, axis: int) -> None:
    """No samples, no queries, no keys."""
    given = list(arguments("attention_relevance"))
    q, k, v, output, mask, gradient, relevance, row = given[:8]
    if axis == 0:
        given[:8] = (*(t[:0] for t in (q, k, v, output)), None, gradient[:, :0], relevance[:, :0], row[:, :0])
    elif place == 0:
        streams = (stream[:, :, :, :0] for stream in (gradient, relevance))
        given[:8] = (q[:, :, :0], k, v, output[:, :, :0], mask[:0], *streams, row[:, :, :0])
    else:
        given[:8] = (q, k[:, :, :0], v[:, :, :0], output, mask[:, :0], gradient, relevance, row)
    made = overload("attention_relevance")(*given)
    assert [one.shape[3] for one in made[:3]] == [given[i].shape[2] for i in range(3)]
    assert all(torch.equal(one, torch.zeros_like(one)) for one in made)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"qk": "whole"}, "qk: expected one of half, positive, detached, got 'whole'"),
        ({"edge": "all"}, "edge: expected one of gradient_x_relevance, gradient_x_attention, relevance, attention"),
        ({"row": None}, "row: expected a tensor, which the edge 'gradient_x_relevance' needs, got None"),
        ({"output": None}, "output: expected a tensor, which the relevance stream needs, got None"),
        ({"gradient": None}, "gradient: expected a tensor, which the edge 'gradient_x_relevance' needs, got None"),
        ({"qk_stabiliser_kind": 2}, "stabiliser_kind: expected 0 (signed) or 1 (reference), got 2"),
        ({"av_epsilon": -1.0}, "epsilon: expected a finite number >= 0, got -1"),
    ],
    ids=str,
)
def test_bad_options_of_attention(implementation: str, changes: dict[str, Any], text: str) -> None:
    names = [argument.split()[-1] for argument in SPECS["attention_relevance"].arguments.split(", ")]
    given = dict(zip(names, arguments("attention_relevance"), strict=True)) | changes
    with pytest.raises(ValueError) as raised:
        overload("attention_relevance")(*given.values())
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("places", [(0, 1), (2, 3, 5, 6), (0, 1, 2, 3, 5, 6)], ids=["d", "dv", "both"])
def test_heads_without_channels(implementation: str, places: tuple[int, ...]) -> None:
    """What has no channels is empty; the rest is as the formulas with whole maps have it."""
    given = arguments("attention_relevance")
    for place in places:
        given = replaced(given, place, given[place][..., :0])
    made, want = overload("attention_relevance")(*given), SPECS["attention_relevance"].reference(*given)
    assert [one.shape for one in made] == [one.shape for one in want]
    assert 0 in made[0].shape or 0 in made[2].shape
    assert_near(made, want)


def test_attention_without_heads(implementation: str) -> None:
    q, k, v, output, mask, gradient, relevance, *rest = arguments("attention_relevance")
    with pytest.raises(ShapeError) as raised:
        overload("attention_relevance")(
            q[:, :0], k, v, output[:, :0], mask, gradient[:, :, :0], relevance[:, :, :0], *rest
        )
    assert str(raised.value) == "q: expected at least one head, got none"


@pytest.mark.parametrize("name", SPECS)
def test_numbers_that_are_not_finite(implementation: str, name: str) -> None:
    given = arguments(name)
    for place, argument in enumerate(SPECS[name].arguments.split(", ")):
        if argument.split()[0] == "float":
            for number in (float("nan"), float("inf")):
                with pytest.raises(OptionError) as raised:
                    overload(name)(*replaced(given, place, number))
                assert str(raised.value).startswith(f"{argument.split()[-1]}: expected a finite number")
                assert str(raised.value).endswith(f", got {number}")


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_sparse_tensors(implementation: str, name: str) -> None:
    given = arguments(name)
    for place in tensors_of(given):
        with pytest.raises(OptionError) as raised:
            overload(name)(*replaced(given, place, given[place].to_sparse()))
        assert str(raised.value).endswith(": expected a dense tensor (torch.strided), got torch.sparse_coo")


@pytest.mark.parametrize("name", WITH_OUT)
def test_places_on_another_device(implementation: str, name: str) -> None:
    given = arguments(name)
    made = results(name, overload(name)(*given))
    for wrong in range(len(made)):
        out = [one.to("meta") if i == wrong else one for i, one in enumerate(made)]
        with pytest.raises(DeviceError, match="out: expected a tensor on (cpu|meta), got one on (cpu|meta)"):
            overload(f"{name}_out")(*given, *out)


def test_strides_beyond_an_int32() -> None:
    """Views over 8 GiB of which a few pages are touched: whole layers read their strides as 64 bits."""
    room = torch.empty(2**31 + 2**16)
    for name, places in {
        "attention_relevance": (0, 1, 2, 5, 6),
        "linear_apply": (1,),
        "linear_apply_rounded": (1,),
        "linear_transpose": (1,),
    }.items():
        given = arguments(name)
        want = results(name, overload(name)(*given))
        for place in places:
            tensor = given[place]
            axis = next(i for i, size in enumerate(tensor.shape) if size > 1)
            step = 2**31 // (tensor.shape[axis] - 1)
            strides = [step if i == axis else stride for i, stride in enumerate(tensor.stride())]
            view = room.as_strided(tensor.shape, strides).copy_(tensor)
            made = results(name, overload(name)(*replaced(given, place, view)))
            assert all(torch.equal(one, other) for one, other in zip(made, want, strict=True))


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
