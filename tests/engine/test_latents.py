"""Relevance inside the model, from the one pass that explains its output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import OptionError, ShapeError, UnknownNameError, UnsupportedTopologyError
from tests.engine.models import Spelled, relative, vit

IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_neurons_by_hooks_and_autograd() -> None:
    """After the last block there is nothing but a norm and a linear layer."""
    model = vit().double()
    found = relprop.explain(model, IMAGES, method="attnlrp", target=3, latents=["blocks.*.mlp", "blocks.2", "norm"])
    assert set(found.latents) == {"blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.2", "norm"}
    kept: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        kept["norm"] = output

    handle = model.norm.register_forward_hook(keep)
    model(IMAGES)
    handle.remove()
    at_norm = found.at("norm")
    row = kept["norm"][:, 0].detach()
    assert torch.allclose(at_norm.activation.reshape(2, -1), row)
    assert torch.allclose(at_norm.relevance.reshape(2, -1), row * model.head.weight[3])  # R = x w


def test_what_flows_through_a_layer_is_what_reaches_the_residual_stream() -> None:
    """Without biases and norms' bias in the way: relevance of the sum is that of its summands."""
    model = vit().double()
    found = relprop.explain(model, IMAGES, method="cp_lrp", target=3, latents=["blocks.*"], ledger=True)
    books = found.ledger
    assert books is not None
    for depth in range(3):
        entry = next(e for e in books.entries if e.module == f"blocks.{depth}" and e.kind == "add")
        total = found.at(f"blocks.{depth}").relevance.flatten(1).sum(1)
        assert torch.allclose(total, entry.arriving[0])


@pytest.mark.parametrize("spelling", ["sdpa", "bmm"])
def test_heads(spelling: str) -> None:
    model = Spelled(spelling).double().eval()
    found = relprop.explain(model, IMAGES, method="attnlrp", target=[[0, 1]] * 2, latents=["*:heads", "blocks.0.proj"])
    name = next(path for path in found.latents if path.startswith("blocks.0") and path.endswith(":heads"))
    heads = found.at(name)
    assert heads.per_token().shape == (2, 2, 4, 17)  # batch, targets, heads, tokens
    # The projection's bias keeps a part; its input is the heads, side by side.
    joined = heads.activation.transpose(1, 2).flatten(2)
    projected = found.at("blocks.0.proj")
    expected = joined.unsqueeze(1) * (projected.coefficient @ model.blocks[0].proj.weight)
    assert relative(heads.relevance.transpose(2, 3).flatten(3), expected.detach()) < 1e-10


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Parallel(nn.Module):
    """One norm feeds an attention module, which uses it three times, and a gated one, which uses it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(12), Attention(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y) + self.mlp(y)


class Blocks(nn.Module):
    """Two parallel blocks, a layer that is called twice, and one with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Parallel(), Parallel())
        self.shared, self.pair, self.head = nn.Linear(12, 12), nn.Bilinear(12, 12, 12), nn.Linear(12, 5)
        self.pair.forward = lambda a, b: a * b  # type: ignore[method-assign, assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(self.pair(self.shared(torch.tanh(self.shared(x))), x).mean(1))


INPUTS = ("blocks", "blocks.0", "blocks.1", "blocks.1.norm", "blocks.1.attn", "blocks.1.attn.k", "blocks.0.mlp", "head")


def test_what_goes_into_a_module() -> None:
    """All that a module takes of a value, however often it uses it, and nothing that goes past it."""
    model, x = Blocks().double().eval(), torch.randn(2, 7, 12, dtype=torch.float64)
    latents = [f"{path}:input" for path in INPUTS]
    found = relprop.explain(model, x, target=3, method="gradient_x_input", latents=latents)
    assert set(found.latents) == set(latents)
    kept: dict[str, Tensor] = {}

    def cut(path: str) -> Callable[..., tuple[Tensor, ...]]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept[path] = args[0].clone()  # a value of its own, so that its gradient is what this module sends back
            kept[path].retain_grad()
            return (kept[path], *args[1:])

        return keep

    modules = dict(model.named_modules())
    handles = [modules[path].register_forward_pre_hook(cut(path)) for path in INPUTS]
    model(x.clone().requires_grad_())[:, 3].sum().backward()
    for handle in handles:
        handle.remove()
    for path in INPUTS:
        value, gradient = kept[path].detach(), kept[path].grad
        assert gradient is not None
        latent = found.at(f"{path}:input")
        assert relative(latent.activation, value) < 1e-12, path
        assert relative(latent.relevance, value * gradient) < 1e-10, path


def test_inputs_and_outputs_meet() -> None:
    """What goes into a block is what came out of the one before; patterns select inputs alone."""
    latents = ["blocks.0", "blocks.1:input", "blocks.*.mlp:input"]
    found = relprop.explain(vit().double(), IMAGES, method="attnlrp", target=[[3, 1]] * 2, latents=latents)
    assert set(found.latents) == {"blocks.0", "blocks.1:input", *(f"blocks.{i}.mlp:input" for i in range(3))}
    assert found.at("blocks.1:input").relevance.shape == (2, 2, 17, 48)
    assert torch.equal(found.at("blocks.1:input").relevance, found.at("blocks.0").relevance)


def test_every_call_of_a_module() -> None:
    """A layer that is called twice has two outputs and two inputs, against autograd."""
    model, x = Blocks().double().eval(), torch.randn(3, 5, 12, dtype=torch.float64)
    asked = ["shared", "sha*:input", "shared@1:input", "head"]
    found = relprop.explain(model, x, target=2, method="gradient_x_input", latents=asked)
    assert set(found.latents) == {"shared@0", "shared@1", "shared@0:input", "shared@1:input", "head"}
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        args[0].retain_grad()
        kept.append((args[0], output))

    # What goes into the first call goes past it, too: a clone of its own.
    handles = [
        model.shared.register_forward_pre_hook(lambda module, args: (args[0].clone(),)),
        model.shared.register_forward_hook(keep),
    ]
    model(x.clone().requires_grad_())[:, 2].sum().backward()
    for handle in handles:
        handle.remove()
    for call, pair in enumerate(kept):
        for end, value in zip((":input", ""), pair, strict=True):
            assert value.grad is not None
            expected = value.detach() * value.grad
            assert relative(found.at(f"shared@{call}{end}").relevance, expected) < 1e-10, (call, end)
    with pytest.raises(UnknownNameError, match="did you mean 'shared@"):
        found.at("shared")


class Twice(nn.Module):
    """The same attention layer, two times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.attn, self.head = Attention(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(torch.tanh(self.attn(x)[:, 1:])).mean(1))


def test_every_call_of_an_attention_layer() -> None:
    """Heads and whole maps of both, told apart by their numbers of tokens."""
    model, x = Twice().double().eval(), torch.randn(2, 7, 12, dtype=torch.float64)
    found = relprop.explain(model, x, target=2, method="attnlrp", latents="*:heads")
    shapes = {path: tuple(latent.per_token().shape) for path, latent in found.latents.items()}
    assert shapes == {"attn@0:heads": (2, 3, 7), "attn@1:heads": (2, 3, 6)}
    maps = relprop.compile(model, (x,), method="generic_attention").trace(x, target=2).maps
    assert maps["attn@0", "attention"].shape[1:] == (2, 3, 7, 7)
    assert maps["attn@1", "attention"].shape[1:] == (2, 3, 6, 6)


def test_one_name_and_what_is_none() -> None:
    model = vit().double()
    one = relprop.explain(model, IMAGES, target=1, method="attnlrp", latents="blocks.0.mlp")
    assert set(one.latents) == {"blocks.0.mlp"}
    for wrong in (None, 5, [3]):
        with pytest.raises(OptionError, match="latents: expected module paths, got"):
            relprop.explain(model, IMAGES, target=1, latents=wrong)  # type: ignore[arg-type]


class Mixed(nn.Module):
    """Attention whose heads are mixed after the softmax, with samples and heads on one axis or on two."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))
        self.mix, self.head, self.joined = nn.Linear(3, 3), nn.Linear(12, 5), joined

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.joined:
            heads = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, 3))
        else:
            heads = weights @ v
        return self.head(self.proj(heads.transpose(1, 2).flatten(2)).mean(1))


@pytest.mark.parametrize("joined", [False, True])
def test_heads_of_a_softmax_and_a_product(joined: bool) -> None:
    """After the mixing: what goes into the projection, head by head."""
    model = nn.Sequential(nn.Linear(12, 12), Mixed(joined)).double().eval()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    asked = ["*:heads", "1.proj:input"]
    for method in ("attnlrp", "gradient_x_input"):
        found = relprop.explain(model, x, target=[[1, 3]] * 2, method=method, latents=asked)
        (name,) = (path for path in found.latents if path.endswith(":heads"))
        heads, entering = found.at(name), found.at("1.proj:input")
        assert heads.per_token().shape == (2, 2, 3, 7)
        expected = entering.relevance.unflatten(-1, (3, 4)).sum(-1).transpose(2, 3)
        assert relative(heads.per_token(), expected) < 1e-10


def test_heads_where_there_are_none() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1), nn.Linear(6, 2)).eval()
    with pytest.raises(UnsupportedTopologyError, match=r"attention heads for '\*:heads', got a model .* softmax in 1"):
        relprop.explain(model, torch.randn(2, 6), target=1, method="attnlrp", latents=["*:heads"])


def test_inputs_that_are_not_one() -> None:
    model, x = Blocks().eval(), torch.randn(2, 7, 12)
    message = "latents: expected a module with one input that carries relevance, got pair:input with 2"
    with pytest.raises(UnsupportedTopologyError, match=message):
        relprop.explain(model, x, target=1, method="gradient_x_input", latents=["pair:input"])
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks\.1\.mlp:input'\?"):
        relprop.explain(model, x, target=1, method="gradient_x_input", latents=["blocks.1.mpl:input"])


class Several(nn.Module):
    """Modules whose outputs are several: both used, one of them used, parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.two, self.one, self.parts, self.part = Two(), Two(), Parts(), Parts()
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.two(x)
        c, _ = self.one(torch.tanh(a) + b)
        d, e = self.parts(torch.tanh(c))
        f = torch.cat([e, d * e], -1)
        return self.out(torch.cat([self.part(f)[1], f[:, :3]], -1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Parts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (2 * x).chunk(2, -1)
        return first, second


def test_outputs_that_are_not_one() -> None:
    """None of several that the model uses is taken for the module's; of several of which it uses one, that one is."""
    model, x = Several().double().eval(), torch.randn(2, 6, dtype=torch.float64)
    for path in ("two", "parts"):
        message = f"latents: expected a module with one output that carries relevance, got {path} with 2"
        with pytest.raises(UnsupportedTopologyError, match=message):
            relprop.explain(model, x, target=1, method="gradient_x_input", latents=[path])
    found = relprop.explain(model, x, target=1, method="gradient_x_input", latents=["one", "part", "two.?"])
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        kept[name] = output

    hooks = {"one": lambda *given: keep("one", given[2][0]), "part": lambda *given: keep("part", given[2][1])}
    hooks |= {"two.a": lambda *given: keep("two.a", given[2]), "two.b": lambda *given: keep("two.b", given[2])}
    for path, hook in hooks.items():
        model.get_submodule(path).register_forward_hook(hook)
    model(x.clone().requires_grad_())[:, 1].sum().backward()
    assert set(found.latents) == set(kept)
    for path, value in kept.items():
        assert value.grad is not None
        assert relative(found.at(path).relevance, value.detach() * value.grad) < 1e-10, path


class Borrowed(nn.Module):
    """A part of a module is called before, from outside it, as a language model's embedding by a larger model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.inner, self.out = Inner(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inner(torch.tanh(self.inner.layers[0](x)))))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](x)


def test_a_part_that_is_called_on_its_own_is_no_output() -> None:
    model, x = Borrowed().double().eval(), torch.randn(2, 6, dtype=torch.float64)
    found = relprop.explain(model, x, target=1, method="gradient_x_input", latents=["inner"])
    value = model.inner(torch.tanh(model.inner.layers[0](x))).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.out(torch.relu(value))[:, 1].sum(), value)
    assert relative(found.at("inner").relevance, value.detach() * gradient) < 1e-10
    with pytest.raises(UnsupportedTopologyError, match=r"got inner\.layers with 2"):  # a list has no call of its own
        relprop.explain(model, x, target=1, method="gradient_x_input", latents=["inner.layers"])


class Pooled(nn.Module):
    """The first row of a residual branch is read, and of what goes past it; nothing mixes rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.norm, self.mlp, self.out = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(1, keepdim=True) * self.token, x], 1)
        return self.out((self.mlp(self.norm(x)) + x)[:, 0])


def test_a_row_that_two_modules_read_is_the_output_of_neither() -> None:
    model, x = Pooled().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    found = relprop.explain(model, x, target=1, method="gradient_x_input", latents=["norm", "mlp"])
    row = torch.cat([x.mean(1, keepdim=True) * model.token, x], 1)[:, 0].detach()
    normed = model.norm(row).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.out(row + model.mlp(normed))[:, 1].sum(), normed)
    latent = found.at("norm")
    assert torch.allclose(latent.activation.reshape(2, -1, 6)[:, 0], normed)
    assert torch.allclose(latent.relevance.reshape(2, -1, 6)[:, 0], normed * gradient)
    assert found.at("mlp").activation.shape[0] == 2


def test_directions_of_a_dictionary() -> None:
    """Features whose directions add up to the activation share out all of its relevance."""
    model = vit().double()
    found = relprop.explain(model, IMAGES, method="attnlrp", target=3, latents=["blocks.1.mlp"]).at("blocks.1.mlp")
    basis = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0]
    features = found.directions(lambda x: x @ basis.T, basis)
    assert torch.allclose(features.sum(-1), found.per_token())
    neurons = found.directions(lambda x: x, torch.eye(48, dtype=torch.float64))
    assert torch.allclose(neurons, found.relevance)
    with pytest.raises(ShapeError, match=r"directions: expected a decoder \[K, 48\], got \[48, 5\]"):
        found.directions(lambda x: x, torch.zeros(48, 5))


def test_with_the_default_method() -> None:
    """The walk's relevance stream is kept too; it ends at the first attention map."""
    model = vit().double()
    plain = relprop.explain(model, IMAGES, target=1)
    found = relprop.explain(model, IMAGES, target=1, latents=["blocks.1"])
    assert torch.allclose(plain.relevance, found.relevance)
    latent = found.at("blocks.1")
    assert latent.relevance.shape == (2, 17, 48)
    assert torch.allclose(latent.activation * latent.coefficient, latent.relevance)


def test_gradient_times_what_is_inside() -> None:
    """Where the answer is the gradient times the input, so is a latent: the gradient times its value."""
    model = vit().double()
    found = relprop.explain(model, IMAGES, target=3, method="gradient_x_input", latents=["blocks.1.mlp", "*:heads"])
    kept: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept["mlp"] = output

    handle = model.blocks[1].mlp.register_forward_hook(keep)
    model(IMAGES)[:, 3].sum().backward()
    handle.remove()
    model.zero_grad()
    value, gradient = kept["mlp"].detach(), kept["mlp"].grad
    assert gradient is not None
    latent = found.at("blocks.1.mlp")
    assert relative(latent.relevance, value * gradient) < 1e-10
    assert relative(latent.coefficient, gradient) < 1e-10
    assert found.at("blocks.0.attn:heads").per_token().shape == (2, 4, 17)
    assert found.at("blocks.0.attn:heads").per_token().abs().max() > 0
    for method in ("integrated_gradients", "smoothgrad"):
        with pytest.raises(OptionError, match=f"latents: expected a method of one pass, got {method}, a mean over"):
            relprop.explain(model, IMAGES, method=method, latents=["blocks.1.mlp"])


def test_features_that_are_not_linear() -> None:
    """A sparse autoencoder's: relevance of each is its code times what its direction counts for."""
    model, generator = vit().double(), torch.Generator().manual_seed(2)
    encoder, decoder = (torch.randn(48, 60, dtype=torch.float64, generator=generator) for _ in range(2))
    targets = [[3, 1]] * 2
    found = relprop.explain(model, IMAGES, method="attnlrp", target=targets, latents=["blocks.1.mlp"])
    latent = found.at("blocks.1.mlp")
    features = latent.directions(lambda x: (x @ encoder - 0.5).relu(), decoder.T)
    assert features.shape == (2, 2, 17, 60)
    codes = (latent.activation @ encoder - 0.5).clamp(min=0)
    expected = torch.einsum("bnk,ck,btnc->btnk", codes, decoder, latent.relevance / latent.activation.unsqueeze(1))
    torch.testing.assert_close(features, expected)
    assert bool((features[..., 0] == 0).any())  # a feature that is absent somewhere


def test_unknown_paths() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks\.1\.mlp'\?"):
        relprop.explain(vit(), IMAGES.float(), latents=["blocks.1.mpl"])
    found = relprop.explain(vit(), IMAGES.float(), latents=["blocks.1.mlp"])
    with pytest.raises(UnknownNameError, match=r"name it in `latents` when compiling"):
        found.at("blocks.0.mlp")
