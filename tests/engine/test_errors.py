"""Bad input gets the specific error, with what was expected, what came, and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop import errors
from tests.engine.models import Spelled, vit


@pytest.fixture(scope="module")
def engine() -> relprop.Engine:
    return relprop.compile(vit(), (torch.randn(2, 3, 32, 32),))


def test_training_mode() -> None:
    model = vit()
    model.blocks[1].train()
    with pytest.raises(errors.ModelStateError, match=r"expected a model in evaluation mode, got \d+ module\(s\) in"):
        relprop.compile(model, (torch.randn(2, 3, 32, 32),))
    with pytest.raises(errors.ModelStateError, match="the first 'blocks.1'"):
        relprop.explain(model, torch.randn(2, 3, 32, 32))
    model.eval()
    compiled = relprop.compile(model, (torch.randn(2, 3, 32, 32),))
    model.train()
    with pytest.raises(errors.ModelStateError, match="expected a model in evaluation mode"):
        compiled(torch.randn(2, 3, 32, 32))


def test_not_a_module() -> None:
    with pytest.raises(errors.OptionError, match=r"model: expected a torch.nn.Module, got str"):
        relprop.compile("vit", (torch.randn(1),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        (torch.randn(2, 3, 32, 31), errors.ShapeError, r"expected shape \[B, 3, 32, 32\], got \[2, 3, 32, 31\]"),
        (torch.randn(3, 32, 32), errors.ShapeError, r"expected shape \[B, 3, 32, 32\], got \[3, 32, 32\]"),
        (torch.randn(0, 3, 32, 32), errors.ShapeError, r"expected shape \[B, 3, 32, 32\], got \[0, 3, 32, 32\]"),
        (torch.randn(2, 3, 32, 32).double(), errors.DTypeError, r"input x: expected torch.float32, got torch.float64"),
        (torch.empty(2, 3, 32, 32, device="meta"), errors.DeviceError, r"expected a tensor on cpu, got one on meta"),
    ],
)
def test_wrong_tensor(engine: relprop.Engine, inputs: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        engine(inputs)


def test_wrong_device_at_compile_time() -> None:
    with pytest.raises(
        errors.DeviceError, match="example inputs: expected tensors on cpu, where the model is, got meta"
    ):
        relprop.compile(vit(), (torch.empty(1, 3, 32, 32, device="meta"),))


def test_wrong_arguments(engine: relprop.Engine) -> None:
    with pytest.raises(errors.ShapeError, match="missing a required argument: 'x'"):
        engine()
    with pytest.raises(errors.ShapeError, match="unexpected keyword argument 'pixels'"):
        engine(torch.randn(1, 3, 32, 32), pixels=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(engine: relprop.Engine, bad: float) -> None:
    x = torch.randn(3, 3, 32, 32)
    x[1, 0, 0, 0] = bad
    with pytest.raises(
        errors.NonFiniteError, match=r"expected finite numbers, got NaN or infinity in sample\(s\) \[1\]"
    ):
        engine(x)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (10, r"expected indices within an output of shape \[B, 10\], got 10"),
        (-11, r"expected indices within an output of shape \[B, 10\], got -11"),
        ([3, 12], r"got 12"),
        (1.0, r"expected None, an int, \[B\], \[B, T\] or a callable, got 1.0"),
        (True, r"got True"),
        (torch.tensor([1.0, 2.0]), r"expected integers .*, got torch.float32"),
        (torch.tensor([1, 2, 3]), r"with B = 2 for an output of shape \[2, 10\], got shape \[3\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"got shape \[2, 0\]"),
        (torch.zeros(2, 1, 1, 1, dtype=torch.int64), r"got shape \[2, 1, 1, 1\]"),
        ((1, 2), r"got \(1, 2\)"),
        ("cat", r"got str"),
        (
            lambda logits: logits,
            r"expected a callable from the output to one score per sample \[B\], got shape \[2, 10\]",
        ),
        (lambda logits: logits.sum(), r"expected one score per sample, shape \[2\], got a single score"),
        (lambda logits: 1.0, r"got float"),
    ],
)
def test_target(engine: relprop.Engine, target: Any, text: str) -> None:
    with pytest.raises(errors.TargetError, match=text):
        engine(torch.randn(2, 3, 32, 32), target=target)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "transformer_atribution"}, "unknown method.*did you mean 'transformer_attribution'"),
        ({"composite": "chefer_stabel"}, "unknown composite.*did you mean 'chefer_stable'"),
        ({"backend": "cp"}, "unknown backend.*did you mean 'cpp'"),
    ],
)
def test_unknown_names(options: dict[str, str], text: str) -> None:
    with pytest.raises(errors.UnknownNameError, match=text):
        relprop.compile(vit(), (torch.randn(1, 3, 32, 32),), **options)  # type: ignore[arg-type]


def test_unknown_rule() -> None:
    with pytest.raises(errors.UnknownNameError, match="unknown rule for linear: .*did you mean 'epsilon'"):
        relprop.entry("linear", "epsilom")
    with pytest.raises(errors.OptionError, match="expected parameters among .*'alpha'"):
        relprop.entry("linear", "alpha_beta", alfa=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"method_options": {"start": 1}},
            "method_options of transformer_attribution: expected count_padding, normalise, read_tokens, start_layer,"
            " got start",
        ),
        ({"method_options": {"start_layer": 3}}, "start_layer: expected one of 3 attention layers, got 3"),
        ({"method_options": {"start_layer": "one"}}, "start_layer: expected an int, got 'one'"),
        ({"precision": "low"}, "precision: expected one of highest, high, medium, got 'low'"),
        ({"output": "scores"}, "expected output= to name one floating-point tensor"),
    ],
)
def test_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.OptionError, match=text):
        relprop.compile(vit(), (torch.randn(1, 3, 32, 32),), **options)


def test_topology() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    with pytest.raises(errors.UnsupportedTopologyError, match="method 'transformer_attribution' reads attention maps"):
        relprop.explain(flat, torch.randn(1, 3, 32, 32))
    one = vit(depth=1)
    with pytest.raises(errors.UnsupportedTopologyError, match=r"expected a model with attention layer 1, got 1 layer"):
        relprop.explain(one, torch.randn(1, 3, 32, 32), method="second_layer")


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Spelled()

    def forward(self, images: Tensor) -> Tensor:
        out = torch.cumsum(self.body(images), 1)
        return torch.sort(out, dim=1)[0] + torch.cumprod(out, 1)


def test_unsupported_ops_are_all_listed() -> None:
    with pytest.raises(errors.UnsupportedOpError) as caught:
        relprop.explain(_Odd().eval(), torch.randn(1, 3, 32, 32))
    text = str(caught.value)
    assert "composite 'chefer' has no rule for 3 operation(s)" in text
    for op in ("cumsum", "sort", "cumprod"):
        assert op in text
    assert "test_errors.py:" in text  # the model's own source line


def test_patches_of_a_pixel_map() -> None:
    found = relprop.explain(vit(), torch.randn(1, 3, 32, 32), method="full")
    assert found.image_map().shape == (1, 32, 32)
    with pytest.raises(errors.ShapeError, match="patches: expected relevance over the patches of an image"):
        _ = found.patches


def test_parameter_of_another_shape() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    compiled = relprop.compile(model, (x,))
    model.head = nn.Linear(48, 7).eval()
    with pytest.raises(errors.ShapeError, match=r"parameter head.weight: expected shape \[10, 48\] as captured, got"):
        compiled(x)
    assert relprop.explain(model, x).logits.shape == (1, 7)  # compiled anew
    model.head.weight = None
    with pytest.raises(errors.ModelStateError, match="parameter head.weight: expected a tensor as captured, got None"):
        compiled(x)
