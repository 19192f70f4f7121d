"""The Triton kernel of gradients through a linear layer, a gate and its activation, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.kernels.linear_back_gated import linear_back_gated
from tests.kernels.kernel_checks import DTYPES, TOLERANCE, assert_near, random

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


def case(dtype: torch.dtype, rows: int = 37, k: int = 70, n: int = 33) -> dict[str, Tensor]:
    made = {name: random(2, rows, k, seed=seed, dtype=dtype) for seed, name in enumerate("hu")}
    made["h"][0, 0, :3] = 0.0
    return made | {"gradients": random(3, 2, rows, n, seed=3), "w": random(n, k, seed=4, dtype=dtype)}


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_autograd(dtype: torch.dtype, name: str, gated: bool) -> None:
    given = case(dtype)
    f = FUNCTIONS[name](given["h"].double()).to(dtype)
    h, u = (given[name].double().requires_grad_() for name in "hu")
    m = FUNCTIONS[name](h) * (u if gated else 1.0)
    passed = 0.5 * given["gradients"].double() @ given["w"].double()
    wanted = [torch.autograd.grad(m, [h, u] if gated else [h], g, retain_graph=True) for g in passed]
    found = linear_back_gated(
        given["gradients"], given["w"], given["h"], f, given["u"] if gated else None, activation=name, factor=0.5
    )
    assert (found[1] is not None) == gated
    for got, want in zip(found, (torch.stack(parts) for parts in zip(*wanted, strict=True)), strict=False):
        assert got is not None and got.dtype == torch.float32
        assert_near(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 65])
def test_slope(rows: int) -> None:
    """f(h) / h, and 0 where h is."""
    given = case(torch.float32, rows)
    h, u = given["h"].double(), given["u"].double()
    f = F.silu(h)
    passed = given["gradients"].double() @ given["w"].double()
    at_h, at_u = linear_back_gated(given["gradients"], given["w"], given["h"], f.float(), given["u"])
    slope = torch.where(h == 0, 0.0, torch.sigmoid(h))
    assert at_u is not None
    assert_near(at_h, passed * u * slope, TOLERANCE[torch.float32])
    assert_near(at_u, passed * f, TOLERANCE[torch.float32])
    alone, nothing = linear_back_gated(given["gradients"], given["w"], given["h"], f.float())
    assert nothing is None
    assert_near(alone, passed * slope, TOLERANCE[torch.float32])


def test_bad_input() -> None:
    given = case(torch.float32)
    gradients, w, h, u = (given[name] for name in ("gradients", "w", "h", "u"))
    with pytest.raises(OptionError, match="activation: expected one of .*silu, relu, got 'tanh'"):
        linear_back_gated(gradients, w, h, h, activation="tanh")
    with pytest.raises(ShapeError, match=r"u: expected shape \[2, 37, 70\], got \[2, 37, 69\]"):
        linear_back_gated(gradients, w, h, h, u[..., :-1])
