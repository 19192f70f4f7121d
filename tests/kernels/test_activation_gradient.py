"""The Triton kernel of activations' gradients against autograd in float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from relprop.errors import OptionError, ShapeError
from relprop.kernels.activation_gradient import activation_gradient
from tests.kernels.kernel_checks import DTYPES, assert_near, poisoned, random, spread_out

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": torch.relu,
}


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("size", [1, 63, 1023])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_equals_autograd(activation: str, dtype: torch.dtype, size: int, targets: int) -> None:
    h = random(2, size, seed=1, dtype=dtype) * 3
    h[0, :: max(1, size - 1)] = 20.0
    h[1, :: max(1, size - 1)] = -20.0
    gradient = random(targets, 2, size, seed=2)
    leaf = h.double().requires_grad_()
    y = FUNCTIONS[activation](leaf)
    want = torch.stack([torch.autograd.grad(y, leaf, g.double(), retain_graph=True)[0] for g in gradient])
    got = activation_gradient(gradient, h, activation, out=poisoned(targets, 2, size))
    assert_near(got, want, 1e-5)


def test_strides_and_in_place() -> None:
    h, gradient = random(2, 40, seed=1), random(2, 2, 40, seed=2)
    want = activation_gradient(gradient, h, "gelu")
    assert torch.equal(activation_gradient(spread_out(gradient), spread_out(h), "gelu"), want)
    assert activation_gradient(gradient, h, "gelu", out=gradient) is gradient
    assert torch.equal(gradient, want)


def test_bad_input() -> None:
    h = random(2, 5, seed=1)
    with pytest.raises(OptionError, match="activation: expected one of gelu, gelu_tanh, silu, relu, got 'tanh'"):
        activation_gradient(h[None], h, "tanh")
    with pytest.raises(ShapeError, match=r"gradient: expected shape \[1, 2, 5\], got \[1, 2, 4\]"):
        activation_gradient(h[None, :, :4], h, "gelu")
