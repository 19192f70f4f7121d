"""The way back of a linear layer fused with the residual add below it, against the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.kernels.linear_back_add import linear_back_add
from tests.kernels.kernel_checks import DTYPES, TOLERANCE, assert_near, random, spread_out


def case(dtype: torch.dtype, targets: int, batch: int, tokens: int, n: int, k: int) -> dict[str, Tensor]:
    """Everything positive but the shares: what is checked is the kernel, not how sums cancel."""
    named = {
        name: random(batch, tokens, k, seed=i, dtype=dtype).abs() + 0.1 for i, name in enumerate(("x", "f", "a", "b"))
    }
    return {
        **named,
        "p1": random(targets, batch, tokens, n, seed=5),
        "p2": random(targets, batch, tokens, n, seed=6),
        "w": random(n, k, seed=7, dtype=dtype),
        "other": random(targets, batch, tokens, k, seed=8) + 2.0,
        "other_scale": random(targets, batch, seed=9) + 3.0,
    }


def share(r: Tensor, z: Tensor, stabiliser: tuple[int, float]) -> Tensor:
    kind, epsilon = stabiliser
    found = r / (z + epsilon) if kind else r / (z + torch.where(z < 0, -epsilon, epsilon))
    return torch.where(z == 0, 0.0, found)


def by_hand(
    given: dict[str, Tensor],
    plain: float,
    magnified: float,
    gather: tuple[int, float],
    stabiliser: tuple[int, float],
    **rest: object,
) -> tuple[Tensor, Tensor]:
    """R_a and R_b in float64. [T, B, N, K]"""
    x, f, a, b, p1, p2, w, other = (given[n].double() for n in ("x", "f", "a", "b", "p1", "p2", "w", "other"))
    r = plain * x * (p1 @ w) + magnified * x.abs() * (p2 @ w.abs())
    scale = given.get("other_scale")
    r = r + (other if scale is None else other * scale.double()[..., None, None])
    if gather[1]:
        r = f * share(r, f, gather)
    s = share(r, a + b, stabiliser)
    parts = (a * s, b * s)
    whole, sum_a, sum_b = (t.flatten(2).sum(-1)[..., None, None] for t in (r, *parts))
    size = sum_a.abs() + sum_b.abs()
    return tuple(  # type: ignore[return-value]
        part * share(share(total.abs(), size, stabiliser) * whole, total, stabiliser)
        for part, total in zip(parts, (sum_a, sum_b), strict=True)
    )


def scaled(found: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    return tuple(part * found[2][..., i, None, None] for i, part in enumerate(found[:2]))  # type: ignore[return-value]


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 63, 48), (2, 37, 20, 65), (5, 1, 33, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_formulas(dtype: torch.dtype, shape: tuple[int, ...], targets: int) -> None:
    """Tiles of rows that hold several samples, and samples of several tiles."""
    given = case(dtype, targets, *shape)
    for options in (
        {"plain": 0.5, "magnified": 0.5, "gather": (1, 1e-9), "stabiliser": (1, 1e-9)},
        {"plain": 1.0, "magnified": 0.0, "gather": (0, 0.0), "stabiliser": (0, 1e-6)},
    ):
        want = by_hand(given, **options)  # type: ignore[arg-type]
        named = {("gather_stabiliser" if k == "gather" else k): v for k, v in options.items()}
        found = linear_back_add(**given, **named)  # type: ignore[arg-type]
        assert found[3] is None
        for got, expected in zip(scaled(found), want, strict=True):
            assert_near(got, expected, TOLERANCE[dtype])


def test_gradients_and_one_share() -> None:
    given = case(torch.float32, 2, 3, 7, 40, 32)
    given["p2"] = given["p1"]
    del given["other_scale"]
    g = random(2, 3, 7, 40, seed=11)
    options: dict[str, Any] = {"plain": 0.5, "magnified": 0.5, "stabiliser": (1, 1e-9)}
    found = linear_back_add(**given, gradients=g, gather_stabiliser=(1, 1e-9), **options)
    for got, want in zip(scaled(found), by_hand(given, gather=(1, 1e-9), **options), strict=True):
        assert_near(got, want, 2e-5)
    assert found[3] is not None
    assert_near(found[3], g.double() @ given["w"].double(), 2e-5)


def alone(given: dict[str, Tensor], samples: slice, **options: Any) -> tuple[Tensor, ...]:
    per_target = {"p1", "p2", "other", "other_scale"}
    part = {n: t if n == "w" else t[:, samples] if n in per_target else t[samples] for n, t in given.items()}
    return linear_back_add(**part, **options)[:3]


def test_same_bits_in_batches_of_one_class() -> None:
    """More than 32 rows, whose sum over n takes several steps, with others around a sample or without."""
    given = case(torch.float32, 2, 5, 9, 100, 80)
    options: dict[str, Any] = {"magnified": 0.5, "stabiliser": (1, 1e-9)}
    whole, again = (linear_back_add(**given, **options)[:3] for _ in range(2))
    for one, same, own in zip(whole, again, alone(given, slice(2, 4), **options), strict=True):
        assert torch.equal(one, same) and torch.equal(one[:, 2:4], own)


def test_the_classes_differ_by_rounding() -> None:
    """A sample alone has 18 rows, and tiles that cut the sum over n in other places."""
    given = case(torch.float32, 2, 5, 9, 100, 80)
    options: dict[str, Any] = {"magnified": 0.5, "stabiliser": (1, 1e-9)}
    whole, own = scaled((*linear_back_add(**given, **options)[:3], None)), alone(given, slice(2, 3), **options)
    for one, same in zip(whole, scaled((*own, None)), strict=True):  # type: ignore[arg-type]
        assert_near(one[:, 2:3], same.double(), TOLERANCE[torch.float32])


def test_strides() -> None:
    given = case(torch.float32, 2, 3, 5, 17, 32)
    options: dict[str, Any] = {"magnified": 0.5, "stabiliser": (0, 1e-9), "gather_stabiliser": (0, 1e-9)}
    want = linear_back_add(**given, **options)
    found = linear_back_add(**{name: spread_out(tensor) for name, tensor in given.items()}, **options)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], want[:3], strict=True))


def test_empty() -> None:
    found = linear_back_add(**case(torch.float32, 2, 0, 5, 17, 32), stabiliser=(0, 1e-9))
    assert found[0].shape == (2, 0, 5, 32) and found[2].shape == (2, 0, 2)


def test_bad_input() -> None:
    given = case(torch.float32, 2, 3, 5, 17, 32)
    with pytest.raises(ShapeError, match=r"f: expected shape \[3, 5, 32\], got \[3, 4, 32\]"):
        linear_back_add(**{**given, "f": given["f"][:, :4]}, stabiliser=(0, 1e-9))
    with pytest.raises(ShapeError, match=r"other_scale: expected shape \[2, 3\], got \[2, 1\]"):
        linear_back_add(**{**given, "other_scale": given["other_scale"][:, :1]}, stabiliser=(0, 1e-9))
    with pytest.raises(OptionError, match=r"gradients: expected one per target \(2\), got 1"):
        linear_back_add(**given, gradients=given["p1"][:1], stabiliser=(0, 1e-9))
