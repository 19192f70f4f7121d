"""A capture that fails says what in the model prevents it, where, and what its user can do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import CaptureError
from tests.engine.models import relative


class Made(nn.Module):
    """A forward from a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(5, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : int(x.sum().item())]


class Leaving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x[:, None]], 1).sum(1)


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 6)
        out[:, 1:] = x
        return out * 2


@torch.library.custom_op("relprop_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        (Branching(), ("could not capture Branching: a branch or a size depends on the values of a tensor", "where")),
        (Sized(), ("a branch or a size depends on the values of a tensor", "keep sizes fixed with a mask")),
        (Leaving(), ("the forward leaves PyTorch", "compute that part with torch")),
        (Made(twice), ("a custom operation does not say which shape it returns", "torch.library.register_fake")),
        (Counting(), ("Counting fixes its batch size", "first in aten.expand.default at ", "not from len(x)")),
        (Writing(), ("updates a tensor in place", "aten.copy_.default", "torch.cat, torch.stack or torch.where")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_it_says_why(model: nn.Module, texts: tuple[str, ...]) -> None:
    with pytest.raises(CaptureError) as caught:
        relprop.explain(model.eval(), torch.randn(3, 5), method="full")
    for text in texts:
        assert text in str(caught.value)
    if not isinstance(model, Made):
        assert "test_capture_failures.py:" in str(caught.value)


def test_a_write_through_a_view_is_refused() -> None:
    def update(h: Tensor) -> Tensor:
        h[:, :2].mul_(3.0)
        return h

    with pytest.raises(CaptureError, match=r"updates a tensor in place at .* \(aten.mul_.Tensor\)"):
        relprop.explain(Made(update).eval(), torch.randn(3, 5), method="full")


@pytest.mark.parametrize("rebound", [True, False])
def test_a_whole_tensor_may_be_updated_in_place(rebound: bool) -> None:
    """Also where the updated name is read again; the engine's forward must not overwrite what it keeps."""

    def update(h: Tensor) -> Tensor:
        other = h.mul_(2.0) if rebound else h
        if not rebound:
            h.mul_(2.0)
        other += 0.5 * h
        return 3 * other + h

    model, x = Made(update).double().eval(), torch.randn(3, 5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    Made.forward(model, leaf)[:, 1].sum().backward()
    found = relprop.explain(model, x, target=1, method="gradient_x_input")
    assert torch.allclose(found.logits, model(x))
    assert leaf.grad is not None and relative(found.relevance, x * leaf.grad) < 1e-12
    books = relprop.explain(model, x, target=1, method="full", ledger=True).ledger
    assert books is not None and float(books.imbalance.abs().max()) < 1e-12


def test_constants_may_be_built_in_place() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = x.new_zeros(5)
            mask[1:3] = 1
            return x * mask

    x = torch.randn(3, 5)
    found = relprop.explain(Masked().eval(), x, target=1, method="gradient_x_input").relevance
    assert torch.allclose(found, torch.where(torch.arange(5) == 1, x, 0.0))
