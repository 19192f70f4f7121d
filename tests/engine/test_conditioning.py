"""Cancellation and amplification of residual adds: where a relevance pass is ill-conditioned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.ledger import Ledger
from tests.engine.models import vit


class Opposed(nn.Module):
    """A residual add whose branch takes back a share of the input."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.head, self.branch = nn.Linear(6, 2), nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            self.branch.weight.copy_(-share * torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.branch(x))


def ledger_of(model: nn.Module, x: Tensor, composite: str) -> Ledger:
    found = relprop.explain(model, x, method="full", composite=composite, target=1, ledger=True).ledger
    assert found is not None
    return found


@pytest.mark.parametrize("share", [0.5, 0.875, 1 - 2**-7])
def test_known_cancellation(share: float) -> None:
    """x - share x: C and the amplification by plain shares are both (1 + share) / (1 - share); by gamma-shares not."""
    torch.manual_seed(0)
    model, x = Opposed(share).double().eval(), torch.randn(3, 6, dtype=torch.float64)
    plain = ledger_of(model, x, "attnlrp").residual_sites()
    assert len(plain) == 1 and plain[0].cancellation is not None
    expected = torch.full((1, 3), (1 + share) / (1 - share), dtype=torch.float64)
    torch.testing.assert_close(plain[0].cancellation, expected)
    torch.testing.assert_close(plain[0].amplification, expected)
    bounded = ledger_of(model, x, "reslrp").residual_sites()[0]
    # Of a'' = 2 and b'' = -share: (2 + share) / (2 - share), below 1 + 2 / gamma.
    torch.testing.assert_close(bounded.amplification, torch.full_like(expected, (2 + share) / (2 - share)))


def test_table_and_sites_of_a_model() -> None:
    model, x = vit().double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    books = {name: ledger_of(model, x, name) for name in ("attnlrp", "reslrp")}
    sites = books["attnlrp"].residual_sites()
    assert [site.module for site in sites] == [f"blocks.{i}" for i in (0, 0, 1, 1, 2, 2)]
    assert all(site.cancellation is not None and bool((site.cancellation >= 1).all()) for site in sites)
    assert max(float(site.amplification.max()) for site in books["reslrp"].residual_sites()) <= 3
    lines = books["attnlrp"].conditioning().splitlines()
    assert len(lines) == 7 and lines[0].split()[:3] == ["step", "C", "median"]
    worst = max(float(site.amplification.max()) for site in sites)
    assert any(f"{worst:.4g}" in line for line in lines)


def test_picture() -> None:
    pytest.importorskip("matplotlib")
    from relprop.pictures import conditioning_picture

    model, x = vit(), torch.randn(2, 3, 32, 32)
    drawn = conditioning_picture({name: ledger_of(model, x, name) for name in ("attnlrp", "reslrp")})
    assert drawn.size == (900, 360)
    assert len(drawn.getcolors(1 << 20)) > 50
