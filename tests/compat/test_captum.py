"""Captum's conventions, and its own classes on the same models."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import (
    MissingDependencyError,
    ModelStateError,
    OptionError,
    TargetError,
    UnsupportedTopologyError,
)
from tests.engine.models import relative, vit

pytestmark = pytest.mark.filterwarnings("ignore")


class ImageClassifier(nn.Module):
    """As in the examples of Captum's documentation: images [N, 3, 32, 32] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.relu = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()
        self.lin1, self.lin2 = nn.Linear(900, 30), nn.Linear(30, 10)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.relu2(self.lin1(self.relu(self.conv1(x)).flatten(1))))


class TwoInputs(nn.Module):
    """Two explained inputs, a third one that is not, and an output with two axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 12)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.out(torch.relu(self.a(a) * scale + self.b(b))).unflatten(1, (4, 3))


@pytest.fixture
def ours() -> Any:
    pytest.importorskip("captum")
    from relprop.compat import captum

    return captum


def test_example_of_the_documentation(ours: Any) -> None:
    """Of captum.attr.LRP and LayerLRP, with only the import changed; their numbers are Captum's."""
    import captum.attr

    LRP, LayerLRP = ours.LRP, ours.LayerLRP
    net = ImageClassifier().double().eval()
    lrp = LRP(net)
    input = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    attribution = lrp.attribute(input, target=5)
    assert attribution.shape == input.shape
    assert relative(attribution, captum.attr.LRP(net).attribute(input, target=5)) < 1e-6
    layer_lrp = LayerLRP(net, net.conv1)
    attribution = layer_lrp.attribute(input, target=5)
    assert relative(attribution, captum.attr.LayerLRP(net, net.conv1).attribute(input, target=5)) < 1e-6
    both = LayerLRP(net, [net.conv1, net.lin1]).attribute(input, target=5, return_convergence_delta=True)
    theirs = captum.attr.LayerLRP(net, [net.conv1, net.lin1])
    expected = theirs.attribute(input, target=5, return_convergence_delta=True)
    for found, wanted in zip((*both[0], *both[1]), (*expected[0], *expected[1]), strict=True):
        assert relative(found, wanted) < 1e-6


def test_convergence_delta(ours: Any) -> None:
    import captum.attr

    net, x = ImageClassifier().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    lrp = ours.LRP(net)
    assert lrp.has_convergence_delta() and lrp.multiplies_by_inputs
    attribution, delta = lrp.attribute(x, target=[1, 2, 3], return_convergence_delta=True)
    _, expected = captum.attr.LRP(net).attribute(x, target=[1, 2, 3], return_convergence_delta=True)
    assert delta.shape == (3,)
    assert relative(delta, expected) < 1e-6
    score = net(x)[torch.arange(3), torch.tensor([1, 2, 3])]
    assert torch.allclose(delta, lrp.compute_convergence_delta(attribution, score))
    walked = ours.Relevance(vit(), "transformer_attribution")
    assert not walked.has_convergence_delta()
    with pytest.raises(OptionError, match="return_convergence_delta: expected a method whose relevance adds up"):
        walked.attribute(torch.randn(1, 3, 32, 32), target=1, return_convergence_delta=True)


@pytest.mark.parametrize(
    "target", [5, torch.tensor(5), torch.tensor([5]), [1, 2, 3], torch.tensor([1, 2, 3]), -1, (4,), [(1,), (2,), (3,)]]
)
def test_targets_of_a_classifier(ours: Any, target: Any) -> None:
    import captum.attr

    net, x = ImageClassifier().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = ours.Relevance(net, "gradient_x_input").attribute(x, target=target)
    assert relative(found, captum.attr.InputXGradient(net).attribute(x, target=target)) < 1e-9


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_no_target_where_there_is_one_score(ours: Any, shape: tuple[int, ...]) -> None:
    """None, for outputs [B] and [B, 1], is the one score of each sample."""
    import captum.attr

    class OneScore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ImageClassifier()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[:, 3].reshape(-1, *shape)

    net, x = OneScore().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = ours.Relevance(net, "gradient_x_input").attribute(x)
    assert relative(found, captum.attr.InputXGradient(net).attribute(x)) < 1e-9
    attribution, delta = ours.LRP(net).attribute(x, target=None, return_convergence_delta=True)
    expected, wanted = ours.LRP(net.net).attribute(x, target=3, return_convergence_delta=True)
    assert relative(attribution, expected) < 1e-9
    assert delta.shape == (3,) and torch.allclose(delta, wanted)
    layer = ours.LayerLRP(net, net.net.lin1).attribute(x)
    assert relative(layer, ours.LayerLRP(net.net, net.net.lin1).attribute(x, target=3)) < 1e-9


@pytest.mark.parametrize("target", [(2, 1), [(0, 1), (3, 2)]])
def test_tuples_in_and_out(ours: Any, target: Any) -> None:
    import captum.attr

    net = TwoInputs().double().eval()
    inputs = (torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))
    for more in (None, 2.0, (2.0,)):
        found = ours.Relevance(net, "gradient_x_input").attribute(inputs, target, more)
        expected = captum.attr.InputXGradient(net).attribute(inputs, target, more)
        assert isinstance(found, tuple)
        for got, wanted in zip(found, expected, strict=True):
            assert got.shape == wanted.shape
            assert relative(got, wanted) < 1e-9
    single = ours.LRP(net).attribute(inputs, target=target, return_convergence_delta=True)
    assert [part.shape for part in single[0]] == [part.shape for part in inputs]
    assert isinstance(ours.LRP(ImageClassifier().eval()).attribute((torch.randn(1, 3, 32, 32),), target=1), tuple)


def test_integrated_gradients(ours: Any) -> None:
    import captum.attr

    net, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = ours.Relevance(net, "integrated_gradients", method_options={"steps": 20}).attribute(x, target=1)
    assert relative(found, captum.attr.IntegratedGradients(net).attribute(x, target=1, n_steps=20)) < 1e-6

    quick = ours.Relevance(net, "integrated_gradients", method_options={"steps": 5, "baseline": 0.5})
    assert quick.has_convergence_delta()
    attributions, delta = quick.attribute(x, target=[1, 3], return_convergence_delta=True)
    whole = captum.attr.IntegratedGradients(net)
    expected = whole.compute_convergence_delta(attributions, torch.full_like(x, 0.5), x, target=[1, 3])
    assert float(expected.abs().min()) > 0
    assert torch.allclose(delta, expected.to(delta), rtol=1e-4, atol=1e-12)


def test_integrated_gradients_of_several_inputs(ours: Any) -> None:
    """All inputs come from the baseline together; what is not attributed to stays, as in Captum."""
    import captum.attr

    net = TwoInputs().double().eval()
    inputs = (torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))
    scale = 1 + torch.rand(2, 1, dtype=torch.float64)
    quick = ours.Relevance(net, "integrated_gradients", method_options={"steps": 7, "baseline": 0.25})
    theirs = captum.attr.IntegratedGradients(net)
    for given, more in ((inputs, None), (inputs, scale), (inputs[:1], (inputs[1],)), (inputs[:1], (inputs[1], scale))):
        options = {"target": (2, 1), "additional_forward_args": more, "return_convergence_delta": True}
        found, delta = quick.attribute(given, **options)
        baselines = (0.25,) * len(given)
        expected, wanted = theirs.attribute(given, baselines=baselines, n_steps=7, **options)
        for got, other in zip(found, expected, strict=True):
            assert relative(got, other) < 1e-6
        assert float(wanted.abs().max()) > 1e-6
        assert torch.allclose(delta, wanted.to(delta), rtol=1e-4, atol=1e-12)


class Gated(nn.Module):
    """A classifier whose layers are scaled and shifted by a second argument, or by a constant."""

    def __init__(self, constant: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        scale = self.constant if scale is None else scale  # type: ignore[assignment]
        return self.head(torch.relu(self.first(x)) * scale + scale)


@pytest.mark.parametrize("method", ["attnlrp", "full", "gradient_x_input"])
def test_additional_arguments_take_no_relevance(ours: Any, method: str) -> None:
    """As if they were constants of the model, whatever the method."""
    x, scale = torch.randn(2, 6, dtype=torch.float64), 1 + torch.rand(8, dtype=torch.float64)
    found = ours.Relevance(Gated().double().eval(), method).attribute(
        x, target=1, additional_forward_args=scale.repeat(2, 1)
    )
    expected = ours.Relevance(Gated(scale).double().eval(), method).attribute(x, target=1)
    assert float(expected.abs().sum()) > 0.1
    assert relative(found, expected) < 1e-10


def test_answers_per_token(ours: Any) -> None:
    """Of token ids as they are, of embeddings spread over their channels; of another input there is none."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    ids, mask = torch.randint(0, 30, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    attribution = ours.Relevance(model, "transformer_attribution")
    expected = attribution.attribute(ids, target=1, additional_forward_args=mask)
    assert expected.shape == ids.shape
    with pytest.raises(OptionError, match="expected those that carry relevance .*input_ids.*got attention_mask"):
        attribution.attribute((ids, mask), target=1)

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, embeddings: Tensor) -> Tensor:
            return self.model(inputs_embeds=embeddings).logits

    embeddings = model.get_input_embeddings()(ids).detach()
    found = ours.Relevance(Embedded().eval(), "transformer_attribution").attribute(embeddings, target=1)
    assert found.shape == embeddings.shape
    assert torch.allclose(found.sum(-1), expected, atol=1e-6)


def test_what_smoothgrad_says_of_itself(ours: Any) -> None:
    plain = ours.Relevance(vit(), "smoothgrad", "attnlrp")
    assert not plain.has_convergence_delta() and not plain.multiplies_by_inputs
    assert ours.Relevance(vit(), "smoothgrad", method_options={"times_input": True}).multiplies_by_inputs
    assert ours.Relevance(vit(), "attnlrp").multiplies_by_inputs


@pytest.mark.parametrize("baseline", [np.zeros(3), [0.0], torch.zeros(3), "black", True], ids=str)
def test_baselines_that_are_no_number(ours: Any, baseline: Any) -> None:
    attribution = ours.Relevance(vit(), "integrated_gradients", method_options={"baseline": baseline})
    with pytest.raises(OptionError, match="method_options: expected plain values|baseline: expected a number, got"):
        attribution.attribute(torch.randn(1, 3, 32, 32), target=1)


def test_noise_is_on_inputs_alone(ours: Any) -> None:
    """A factor in front of a linear layer is the factor of its gradient, unless it is noisy itself."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.head(x) * scale

    torch.manual_seed(0)
    net, x, scale = Scaled().double().eval(), torch.randn(2, 6, dtype=torch.float64), torch.rand(2, 3).double()
    found = ours.Relevance(net, "smoothgrad", method_options={"samples": 3}).attribute(x, 1, scale)
    assert relative(found, net.head.weight[1] * scale[:, 1:2]) < 1e-6


@pytest.mark.parametrize("method", relprop.methods())
def test_every_method_has_the_shape_and_dtype_of_the_input(ours: Any, method: str) -> None:
    """As NoiseTunnel and layers need it; in sum over channels it is the method's own map."""
    from captum.attr import NoiseTunnel

    model, images = vit(), torch.randn(2, 3, 32, 32)
    steps = {"integrated_gradients": {"steps": 2}, "smoothgrad": {"samples": 2}}.get(method, {})
    attribution = ours.Relevance(model, method, method_options=steps)
    found = attribution.attribute(images, target=[1, 4])
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    own = relprop.explain(model, images, target=torch.tensor([1, 4]), method=method, method_options=steps).image_map()
    assert relative(found.sum(1), own) < 1e-5
    assert NoiseTunnel(attribution).attribute(images, nt_samples=2, target=[1, 4]).shape == images.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(ours: Any, dtype: torch.dtype) -> None:
    """Attributions in the inputs' dtype, rounded once; sums of the delta are not."""
    model, images = vit().to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    found, delta = ours.LRP(model).attribute(images, target=1, return_convergence_delta=True)
    exact = relprop.explain(model, images, target=1, method="attnlrp", method_options={"channels": "kept"})
    assert torch.equal(found, exact.relevance.to(dtype))
    assert torch.equal(delta, exact.logits[:, 1] - exact.relevance.flatten(1).sum(1))
    assert ours.LayerLRP(model, model.get_submodule("blocks.1")).attribute(images, target=1).dtype == dtype


def test_forward_of_a_model(ours: Any) -> None:
    net, x = ImageClassifier().eval(), torch.randn(2, 3, 32, 32)
    expected = ours.LRP(net).attribute(x, target=1)
    for function in (net.forward, net.__call__):
        assert torch.equal(ours.LRP(function).attribute(x, target=1), expected)
    assert torch.equal(
        ours.LayerLRP(net.forward, net.lin1).attribute(x, 1), ours.LayerLRP(net, net.lin1).attribute(x, 1)
    )


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(ours: Any, kind: str) -> None:
    """Captum's own methods on top: noise in, answers averaged, as on Captum's class."""
    import captum.attr

    net, x = ImageClassifier().double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    options = {"nt_type": kind, "nt_samples": 4, "nt_samples_batch_size": 2, "stdevs": 0.1, "target": 2}
    torch.manual_seed(0)
    expected, theirs = captum.attr.NoiseTunnel(captum.attr.LRP(net)).attribute(
        x, **options, return_convergence_delta=True
    )
    torch.manual_seed(0)
    found, delta = captum.attr.NoiseTunnel(ours.LRP(net)).attribute(x, **options, return_convergence_delta=True)
    assert relative(found, expected) < 1e-5
    assert delta.shape == theirs.shape
    torch.manual_seed(0)
    layer = captum.attr.NoiseTunnel(ours.LayerLRP(net, net.conv1)).attribute(x, **options)
    assert torch.isfinite(layer).all()


def test_transformer(ours: Any) -> None:
    """Where Captum's LRP has no rules; layers come whole, also above the last attention layer."""
    net, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found, delta = ours.LRP(net).attribute(x, target=3, return_convergence_delta=True)
    expected = relprop.explain(net, x, target=3, method="attnlrp")
    assert relative(found.sum(1), expected.relevance) < 1e-9
    assert torch.allclose(delta, expected.logits[:, 3] - found.sum((1, 2, 3)))
    walked = ours.Relevance(net, "transformer_attribution").attribute(x, target=3)
    assert relative(walked.sum(1), relprop.explain(net, x, target=3).image_map()) < 1e-6
    blocks = [net.blocks[0], net.blocks[2].mlp, net.norm]  # type: ignore[index, union-attr]
    for layer, part in zip(blocks, ours.LayerLRP(net, blocks).attribute(x, target=3), strict=True):
        kept = []
        handle = layer.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        net(x)
        handle.remove()
        assert part.shape == kept[0].shape
    assert float(part[:, 1:].abs().max()) == 0.0


def test_token_ids(ours: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(0, 30, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    changed = ours.Relevance(model, "integrated_gradients", method_options={"steps": 2})
    with pytest.raises(OptionError, match="expected an input that can be a baseline, got torch.int64"):
        changed.attribute(ids, target=1, additional_forward_args=(mask,), return_convergence_delta=True)
    found = ours.LRP(model).attribute(ids, target=1, additional_forward_args=(mask,))
    assert found.shape == ids.shape
    assert torch.allclose(found, relprop.explain(model, ids, mask, target=1, method="attnlrp").relevance)


def test_bad_input_is_captums(ours: Any) -> None:
    """Captum's errors where it has some, an error where it is silent."""
    import captum.attr

    net, x = ImageClassifier().eval(), torch.randn(3, 3, 32, 32)
    for bad in (None, [1, 2], torch.tensor([1, 2]), 10, (1, 1)):
        with pytest.raises(Exception) as theirs:
            captum.attr.InputXGradient(net).attribute(x, target=bad)
        with pytest.raises(type(theirs.value)):
            ours.LRP(net).attribute(x, target=bad)
    for inputs, got in (([x], "list"), (x.detach().numpy(), "ndarray"), ((), "none"), ((x, 1), "Tensor, int")):
        with pytest.raises(OptionError, match=f"inputs: expected a tensor or a tuple of tensors, got {got}"):
            ours.LRP(net).attribute(inputs, target=1)
    with pytest.raises(TargetError, match="expected integers, got torch.float32"):
        ours.LRP(net).attribute(x, target=torch.tensor([1.0, 2.0, 3.0]))
    for function, name in ((lambda x: net(x), "<lambda>"), (vit().forward_features, "forward_features"), (7, "int")):
        with pytest.raises(OptionError, match=f"forward_func: expected a torch.nn.Module or its forward, got .*{name}"):
            ours.LRP(function)
    with pytest.raises(OptionError, match="layer: expected a module inside ImageClassifier, got ReLU"):
        ours.LayerLRP(net, nn.ReLU()).attribute(x, target=1)
    with pytest.raises(OptionError, match="layer: expected a module inside ImageClassifier, got NoneType"):
        ours.LayerLRP(net, None).attribute(x, target=1)
    with pytest.raises(ModelStateError, match="evaluation mode"):
        ours.LRP(ImageClassifier()).attribute(x, target=1)
    with pytest.raises(NotImplementedError):
        ours.LRP(net).attribute_future()


class Pooled(nn.Module):
    """Layers of every type that Captum's LRP has a rule for, but its own addition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.relu, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        self.mean, self.out = nn.AdaptiveAvgPool2d((2, 3)), nn.Linear(24, 10)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mean(self.pool(self.relu(self.norm(self.conv(x))))).flatten(1))


def test_layer_inputs(ours: Any) -> None:
    import captum.attr

    net, x = Pooled().double().eval(), torch.randn(3, 3, 11, 13, dtype=torch.float64)
    layers = [net.conv, net.norm, net.pool, net.mean, net.out]
    options: dict[str, Any] = {"target": [1, 2, 3], "attribute_to_layer_input": True, "return_convergence_delta": True}
    found, expected = (package.LayerLRP(net, layers).attribute(x, **options) for package in (ours, captum.attr))
    for part, wanted in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert part.shape == wanted.shape
        assert relative(part, wanted) < 1e-6
    single, delta = ours.LayerLRP(net, net.pool).attribute(x, **options)
    assert torch.equal(single, found[0][2]) and torch.equal(delta, found[1][2])
    above = ours.LayerLRP(net, net.pool).attribute(x, target=[1, 2, 3])
    assert above.shape != single.shape
    net, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    part = ours.LayerLRP(net, net.blocks[2].mlp).attribute(x, target=3, attribute_to_layer_input=True)  # type: ignore[index, union-attr]
    assert part.shape == (2, 17, 48)  # whole, though only the class token's row carries anything
    assert float(part[:, 1:].abs().max()) == 0.0 < float(part[:, 0].abs().max())


class Forked(nn.Module):
    """A layer with two outputs, and one with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fork, self.join, self.out = Fork(), Join(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.join(*self.fork(x))))


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Join(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_layers_with_several_outputs_or_inputs(ours: Any) -> None:
    """Captum gives a tuple, of which we never give one part alone."""
    import captum.attr

    net, x = Forked().eval(), torch.randn(2, 6)
    for layer, of_input, end in ((net.fork, False, "output"), (net.join, True, "input")):
        theirs = captum.attr.LayerGradientXActivation(net, layer)
        assert len(theirs.attribute(x, 1, attribute_to_layer_input=of_input)) == 2
        message = f"expected a module with one {end} that carries relevance, got {'join:input' if of_input else 'fork'}"
        with pytest.raises(UnsupportedTopologyError, match=f"{message} with 2"):
            ours.LayerRelevance(net, layer).attribute(x, 1, attribute_to_layer_input=of_input)
    parts = ours.LayerRelevance(net, [net.fork.a, net.fork.b], "gradient_x_input").attribute(x, 1)
    expected = captum.attr.LayerGradientXActivation(net, net.fork).attribute(x, 1)
    for part, wanted in zip(parts, expected, strict=True):
        assert relative(part, wanted) < 1e-5


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.layer(torch.relu(self.layer(x)))))


@pytest.mark.parametrize("of_input", [False, True])
def test_layer_that_is_called_twice(ours: Any, of_input: bool) -> None:
    """Captum raises a RuntimeError for it, and so do we; what goes into the model is explained all the same."""
    import captum.attr

    net, x = Shared().eval(), torch.randn(2, 6)
    for package in (captum.attr, ours):
        with pytest.raises(RuntimeError, match="more than once|expected a module that is called once, got layer"):
            package.LayerLRP(net, net.layer).attribute(x, target=1, attribute_to_layer_input=of_input)
    assert torch.isfinite(ours.LRP(net).attribute(x, target=1)).all()


def test_rules_on_layers(ours: Any) -> None:
    """Set as Captum's documentation says; those that would change the answer are not passed over."""
    from captum.attr._utils import lrp_rules

    net, x = ImageClassifier().eval(), torch.randn(3, 3, 32, 32)
    plain = ours.LRP(net).attribute(x, target=1)
    net.lin1.rule = lrp_rules.EpsilonRule()  # type: ignore[assignment]
    assert torch.equal(ours.LRP(net).attribute(x, target=1), plain)
    for rule in (lrp_rules.EpsilonRule(0.1), lrp_rules.GammaRule(), lrp_rules.IdentityRule()):
        net.lin1.rule = rule
        for attribution in (ours.LRP(net), ours.LayerLRP(net, net.conv1)):
            with pytest.raises(OptionError, match=f"lin1.rule: expected none, .*got {type(rule).__name__}"):
                attribution.attribute(x, target=1)


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.delitem(sys.modules, "captum.attr", raising=False)
    monkeypatch.delitem(sys.modules, "relprop.compat.captum", raising=False)
    monkeypatch.delitem(vars(relprop.compat), "captum", raising=False)
    with pytest.raises(MissingDependencyError, match="expected the package 'captum'.*pip install captum"):
        relprop.compat.captum  # noqa: B018
