from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from relprop.rules import EXACT, REFERENCE, Stabiliser

# stabiliser, relevance, z, share
TABLE = [
    (Stabiliser(0.5), 3.0, 1.0, 3.0 / 1.5),
    (Stabiliser(0.5), 3.0, -1.0, 3.0 / -1.5),
    (Stabiliser(0.5), 3.0, 0.0, 3.0 / 0.5),
    (Stabiliser(0.5), 3.0, -0.0, 3.0 / 0.5),
    (Stabiliser(0.5), 0.0, 0.0, 0.0),
    (EXACT, 3.0, 2.0, 1.5),
    (EXACT, 3.0, -2.0, -1.5),
    (EXACT, 3.0, 0.0, 0.0),
    (Stabiliser(0.5, "reference"), 3.0, 1.0, 3.0 / 1.5),
    (Stabiliser(0.5, "reference"), 3.0, -1.0, 3.0 / -0.5),
    (Stabiliser(0.5, "reference"), 3.0, 0.0, 0.0),
    (Stabiliser(0.5, "reference"), 3.0, -0.5, 3.0 / 0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("stabiliser", "relevance", "z", "share"), TABLE)
def test_definition(stabiliser: Stabiliser, relevance: float, z: float, share: float, dtype: torch.dtype) -> None:
    got = stabiliser.share(torch.tensor([relevance], dtype=dtype), torch.tensor([z], dtype=dtype))
    assert got.dtype == dtype
    assert math.isclose(float(got), share, rel_tol=1e-15 if dtype == torch.float64 else 1e-7)


def test_epsilon_is_not_rounded_to_float32() -> None:
    """0.1 has no short binary form: its nearest float32 is 1.5e-9 away."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert float(Stabiliser(0.1).share(one, zero)) == 1 / 0.1
    assert float(Stabiliser(0.1).share(one, zero - 1)) == 1 / (-1 - 0.1)
    assert float(Stabiliser(0.1, "reference").share(one, zero + 1)) == 1 / 1.1
    assert float(Stabiliser(0.1, "reference").share(one, zero - 0.1)) == 1 / 0.1


def test_odd_except_for_the_reference() -> None:
    relevance, z = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.25, -4.0, 1e-12])
    for stabiliser in (Stabiliser(1e-3), EXACT):
        assert torch.equal(stabiliser.share(relevance, -z), -stabiliser.share(relevance, z))
    reference = Stabiliser(1e-3, "reference")
    assert not torch.equal(reference.share(relevance, -z), -reference.share(relevance, z))


def test_targets_share_one_denominator() -> None:
    relevance, z = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0)), torch.full((4, 7), 2.0)
    for stabiliser in (Stabiliser(), EXACT, REFERENCE):
        assert torch.equal(stabiliser.share(relevance, z)[1], stabiliser.share(relevance[1], z))


@pytest.mark.parametrize("stabiliser", [Stabiliser(1e-3), EXACT, Stabiliser(1e-3, "reference")])
def test_gradient_is_finite_at_zero(stabiliser: Stabiliser) -> None:
    relevance = torch.ones(2, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    stabiliser.share(relevance, z).sum().backward()
    assert relevance.grad is not None and z.grad is not None
    assert bool(torch.isfinite(relevance.grad).all()) and bool(torch.isfinite(z.grad).all())


def test_is_plain_data() -> None:
    assert Stabiliser() == Stabiliser(1e-9, "signed") and hash(EXACT) == hash(Stabiliser(0.0))
    assert EXACT.is_exact and not REFERENCE.is_exact
    assert (Stabiliser(0.5).code, REFERENCE.code) == ((0, 0.5), (1, 1e-9))
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXACT.epsilon = 1.0  # type: ignore[misc]
