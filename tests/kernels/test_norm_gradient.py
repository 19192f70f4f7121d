"""The Triton kernel of norms' gradients against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.kernels.norm_gradient import norm_gradient
from tests.kernels.kernel_checks import DTYPES, assert_near, poisoned, random, spread_out


def forward(kind: str, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, None, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("n", [1, 63, 1023])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_autograd(dtype: torch.dtype, n: int, kind: str, with_weight: bool) -> None:
    x = random(2, 5, n, seed=1, dtype=dtype) + 1
    weight = random(n, seed=2, dtype=dtype) if with_weight else None
    gradient = random(3, 2, 5, n, seed=3)
    leaf = x.double().requires_grad_()
    y = forward(kind, leaf, None if weight is None else weight.double(), 1e-5)
    want = torch.stack([torch.autograd.grad(y, leaf, g.double(), retain_graph=True)[0] for g in gradient])
    got = norm_gradient(gradient, x, weight, kind=kind, eps=1e-5, out=poisoned(3, 2, 5, n))
    if n == 1 and kind == "layer":  # a constant
        assert not got.any() and want.abs().max() < 1e-12
    else:
        assert_near(got, want, 2e-5)


def test_strides() -> None:
    x, weight, gradient = random(2, 5, 40, seed=1), random(40, seed=2), random(2, 2, 5, 40, seed=3)
    got = norm_gradient(spread_out(gradient), spread_out(x), spread_out(weight))
    assert torch.equal(got, norm_gradient(gradient, x, weight))


def test_bad_input() -> None:
    x = random(2, 5, seed=1)
    with pytest.raises(OptionError, match="kind: expected one of layer, rms, got 'batch'"):
        norm_gradient(x[None], x, kind="batch")
    with pytest.raises(ShapeError, match=r"weight: expected shape \[5\], got \[4\]"):
        norm_gradient(x[None], x, x[0, :4])
    with pytest.raises(ShapeError, match=r"x: expected shape \[..., N\] with N at most 8192, got \[1, 8193\]"):
        long = torch.zeros(1, 8193)
        norm_gradient(long[None], long)
