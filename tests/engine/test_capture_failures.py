"""A capture that fails says what in the model prevents it, where, and what its user can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import CaptureError, InputError, OptionError, UnsupportedOpError
from tests.engine.models import relative, vit


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


def halved(h: Tensor) -> Tensor:
    while h.norm() > 1:  # the line that is named
        h = h / 2
    return h


def unpadded(h: Tensor) -> Tensor:
    keep = h[:, 0] > -100
    out = torch.zeros_like(h)
    out[keep] = h[keep]
    return out


def experts(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for expert in range(5):
        rows = torch.where(h.argmax(-1) == expert)[0]
        out = out.index_add(0, rows, h[rows] * expert)
    return out


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        (Branching(), ("could not capture Branching: a branch or a size depends on the values of a tensor", "where")),
        (Sized(), ("a branch or a size depends on the values of a tensor", "keep sizes fixed with a mask")),
        (Leaving(), ("the forward leaves PyTorch", "compute that part with torch")),
        (Made(twice), ("a custom operation does not say which shape it returns", "torch.library.register_fake")),
        (Made(lambda h: halved(h)), ("a branch or a size depends on the values of a tensor at ",)),
        (Made(lambda h: h[h[:, 0] > 0]), ("the size of what index.Tensor", "keep every row and mask those")),
        (Made(lambda h: unpadded(h)), ("the size of what index.Tensor", "depends on the values of a tensor")),
        (Made(lambda h: experts(h)), ("the size of what index.Tensor", "let a mixture compute all its experts")),
        (Made(lambda h: torch.masked_select(h, h > 0)), ("the size of what masked_select", "an attention mask")),
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
    if not (isinstance(model, Made) and model.function is twice):
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


def test_the_line_in_a_helper_is_named() -> None:
    with pytest.raises(CaptureError) as caught:
        relprop.explain(Made(halved).eval(), torch.randn(3, 5), method="full")
    lines, first = inspect.getsourcelines(halved)
    line = first + next(i for i, text in enumerate(lines) if "is named" in text)
    assert f"test_capture_failures.py:{line}:" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(2, 3, 40, 40), r"argument 0 \[2, 3, 40, 40\] torch.float32.*patch_embed.py:\d+: .*doesn't match"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"torch.uint8; the model itself refuses them"),
        (torch.zeros(2, 3, 32, 32).half(), r"torch.float16; the model itself refuses them.*Half"),
    ],
)
def test_inputs_that_the_model_refuses_are_told_from_a_capture_that_fails(images: Tensor, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        relprop.explain(vit(), images, target=1)
    assert isinstance(caught.value.__cause__, (AssertionError, RuntimeError))


def test_ids_that_the_model_refuses_at_a_later_call() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.place = nn.Embedding(20, 6), nn.Parameter(torch.randn(1, 9, 6))

        def forward(self, ids: Tensor) -> Tensor:
            return (self.words(ids) + self.place[:, : ids.shape[1]]).tanh().mean(1)

    model = Words().eval()
    engine = relprop.compile(model, (torch.full((2, 5), 3),), method="full")
    for ids, text in ((torch.full((2, 4), 21), "IndexError: index out of range"), (torch.full((2, 12), 3), "12")):
        with pytest.raises(InputError, match=rf"Words: expected inputs that the model takes.*{text}") as caught:
            engine(ids, target=1)
        assert "test_capture_failures.py:" in str(caught.value)
    assert engine(torch.full((2, 4), 3), target=1).relevance.shape == (2, 4)
    # What the user's own target raises is no refusal of the model's.
    with pytest.raises(RuntimeError, match="my own"):
        engine(torch.full((2, 4), 3), target=_failing)


def _failing(output: Tensor) -> Tensor:
    raise RuntimeError("my own")


def test_wrapped_models_are_unwrapped() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    expected = relprop.explain(model, x, target=1, latents=["blocks.0"])
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        found = relprop.explain(wrapped.eval(), x, target=1, latents=["blocks.0"])
        assert torch.equal(found.relevance, expected.relevance) and "blocks.0" in found.latents


def test_torchscript_is_refused() -> None:
    plain, x = nn.Linear(5, 5).eval(), torch.randn(3, 5)
    for model in (torch.jit.trace(plain, x), torch.jit.script(plain)):
        with pytest.raises(OptionError, match="got TorchScript .*; give the module that it was traced"):
            relprop.explain(model, x, target=1, method="full")


@pytest.mark.parametrize("skipped", [False, True])
def test_complex_numbers_are_refused(skipped: bool) -> None:
    """Also where relevance could go around them: what they pass on would be missing."""
    model = Made(lambda h: torch.fft.fft(h).real + (h if skipped else 0))
    with pytest.raises(UnsupportedOpError, match=r"aten.fft_fft.default .*test_capture_failures.py:\d+ makes complex"):
        relprop.explain(model.eval(), torch.randn(3, 5), method="full")
