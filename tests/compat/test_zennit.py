"""zennit's interface: its example's lines, and its own numbers for every composite and rule that has a counterpart."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import relprop
from relprop.compat import zennit as ours
from relprop.compat.zennit import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, Gradient, SequentialMergeBatchNorm
from relprop.errors import (
    ModelStateError,
    OptionError,
    ShapeError,
    TargetError,
    UnknownNameError,
    UnsupportedOpError,
)
from relprop.rules import Stabiliser
from tests.engine.models import GOLDEN, relative, vit

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
        *(nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 10)),
    ]
    return nn.Sequential(*layers).double().eval()


def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.3


COMPOSITES: dict[str, tuple[str, dict[str, Any]]] = {
    "EpsilonPlus": ("EpsilonPlus", {}),
    "EpsilonPlus, large epsilon": ("EpsilonPlus", {"epsilon": 0.3, "stabilizer": 0.01}),
    "EpsilonAlpha2Beta1": ("EpsilonAlpha2Beta1", {}),
    "EpsilonPlusFlat": ("EpsilonPlusFlat", {}),
    "EpsilonAlpha2Beta1Flat": ("EpsilonAlpha2Beta1Flat", {"stabilizer": 1e-3}),
    "EpsilonGammaBox": ("EpsilonGammaBox", {"low": -0.5, "high": 1.0, "gamma": 0.4}),
    "EpsilonGammaBox, by channel": (
        "EpsilonGammaBox",
        {
            "low": torch.tensor([-0.5, -0.4, -0.3])[None, :, None, None],
            "high": torch.tensor([[1.0], [1.5], [0.9]])[None, ..., None],
        },
    ),
    "ExcitationBackprop": ("ExcitationBackprop", {}),
    "EpsilonPlus, no bias": ("EpsilonPlus", {"zero_params": "bias", "epsilon": 0.1}),
    "EpsilonAlpha2Beta1, no bias": ("EpsilonAlpha2Beta1", {"zero_params": ["bias"], "layer_map": None}),
    "EpsilonPlusFlat, no bias": ("EpsilonPlusFlat", {"zero_params": "bias", "first_map": []}),
    "EpsilonAlpha2Beta1Flat, no bias": ("EpsilonAlpha2Beta1Flat", {"zero_params": "bias", "canonizers": []}),
    "EpsilonGammaBox, no bias": ("EpsilonGammaBox", {"low": -0.5, "high": 1.0, "zero_params": "bias"}),
    "ExcitationBackprop, no bias": ("ExcitationBackprop", {"zero_params": "bias"}),
}


README = """
canonizers = [SequentialMergeBatchNorm()]
composite = EpsilonGammaBox(low=-3., high=3., canonizers=canonizers)

with Gradient(model=model, composite=composite) as attributor:
    out, relevance = attributor(data, torch.eye(1000)[[0]])
"""


class SmallVGG(nn.Module):
    """Built as torchvision's vgg16_bn, with statistics as of training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = []
        for before, after in ((3, 6), (6, 8), (8, 8)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers[:6], nn.MaxPool2d(2, 2), *layers[6:], nn.MaxPool2d(2, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        hidden = [nn.Linear(32, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 20), nn.ReLU(True), nn.Dropout()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(20, 1000))
        trained(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def trained(model: nn.Module) -> nn.Module:
    """Batch norms that are not the identity."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5), module.running_var.uniform_(0.3, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, -1.0, 2.0), nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def readme(model: nn.Module, data: Tensor, package: Any) -> tuple[Tensor, Tensor]:
    """What the lines of zennit's README give with a package's names."""
    names = {"torch": torch, "model": model, "data": data} | {
        name: getattr(package, name) for name in ("EpsilonGammaBox", "Gradient", "SequentialMergeBatchNorm")
    }
    exec(README, names)
    return names["out"], names["relevance"]  # type: ignore[return-value]


@pytest.mark.usefixtures("float64")
def test_example_of_the_documentation() -> None:
    """zennit's README with the imports changed, on a small network of the same layers in evaluation mode."""
    model, data = SmallVGG(), torch.randn(1, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    out, relevance = readme(model, data, ours)
    assert relevance.shape == data.shape
    assert relative(out, model(data)) < 1e-3  # a merged batch norm divides by sqrt(1 + eps)
    assert not data.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ModelStateError, match="evaluation mode"):  # as vgg16_bn() comes
        readme(model.train(), data, ours)


@pytest.mark.usefixtures("float64")
def test_example_of_the_documentation_beside_zennit() -> None:
    pytest.importorskip("zennit")
    import zennit.attribution
    import zennit.canonizers
    import zennit.composites

    class Theirs:
        EpsilonGammaBox = zennit.composites.EpsilonGammaBox
        Gradient = zennit.attribution.Gradient
        SequentialMergeBatchNorm = zennit.canonizers.SequentialMergeBatchNorm

    class Mixed(Theirs):
        EpsilonGammaBox, Gradient = EpsilonGammaBox, Gradient

    class Instance(Theirs):
        Gradient = Gradient

    model, data = SmallVGG(), torch.randn(1, 3, 16, 16)
    expected = readme(model, data.clone(), Theirs)
    for package in (ours, Mixed, Instance):
        for found, wanted in zip(readme(model, data, package), expected, strict=True):
            assert relative(found, wanted) < 1e-9
    with Gradient(model, EpsilonGammaBox(low=-3.0, high=3.0)) as attributor:
        assert relative(attributor(data, torch.eye(1000)[[0]])[1], expected[1]) > 0.01  # what merging is for


class Merging(nn.Module):
    """What is merged: after a layer with or without a bias; and what is not: after an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.late, self.mean, self.flat = nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear, self.norm, self.out = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 10)
        trained(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.linear(self.flat(self.mean(self.late(self.first(x)))))))


@pytest.mark.usefixtures("float64")
def test_batch_norms_are_merged_as_by_zennit() -> None:
    canonizers = pytest.importorskip("zennit.canonizers")
    model = Merging()
    found, expected = copy.deepcopy(model), copy.deepcopy(model)
    handles = SequentialMergeBatchNorm().apply(found)
    canonizers.SequentialMergeBatchNorm().apply(expected)
    assert len(handles) == 2 and set(found.state_dict()) == {*model.state_dict(), "first.0.bias"}
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert set(found.state_dict()) == set(model.state_dict())


@pytest.mark.usefixtures("float64")
def test_batch_norms_without_weights() -> None:
    """They are merged here, and fail in zennit."""
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(1176, 10)]
    plain = trained(nn.Sequential(*layers))
    merged = copy.deepcopy(plain)
    SequentialMergeBatchNorm().apply(merged)
    data = torch.randn(2, 3, 16, 16)
    assert relative(merged(data), plain(data)) < 1e-4
    assert float(merged[1].running_mean.abs().max()) == 0.0  # type: ignore[index, union-attr, operator]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["EpsilonPlusFlat", "ExcitationBackprop"])
def test_canonizers_of_a_residual_network(name: str) -> None:
    """zennit's, which give blocks another forward and put modules in; ours and zennit's composite against zennit."""
    pytest.importorskip("zennit")
    import zennit.attribution
    import zennit.composites
    from torchvision.models.resnet import BasicBlock, ResNet
    from zennit.torchvision import ResNetCanonizer

    torch.manual_seed(0)
    model, data = trained(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)), torch.randn(2, 3, 32, 32)
    seed, theirs = torch.eye(10)[[3, 4]], getattr(zennit.composites, name)(canonizers=[ResNetCanonizer()])
    with zennit.attribution.Gradient(model, theirs) as attributor:
        expected = attributor(data.clone(), seed)[1]
    for composite in (theirs, getattr(ours, name)(canonizers=[ResNetCanonizer()])):
        assert relative(Gradient(model, composite)(data, seed)[1], expected) < 1e-6
    assert not hasattr(model.layer1[0], "canonizer_sum")  # type: ignore[index]


@pytest.mark.usefixtures("float64")
def test_canonizers_follow_the_weights() -> None:
    """One attributor, whose model is trained on in between; without a change the copy stays the same."""
    model, data, seed = SmallVGG(), torch.randn(2, 3, 16, 16), torch.eye(1000)[[0, 1]]
    attributor = Gradient(model, EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]))
    first = attributor(data, seed)[1]
    kept = attributor._engines(attributor.composite.canonizers)
    assert torch.equal(attributor(data, seed)[1], first)
    assert attributor._engines(attributor.composite.canonizers) is kept
    with torch.no_grad():
        model.features[1].weight.mul_(0.5)  # type: ignore[union-attr, operator]
    changed = attributor(data, seed)[1]
    assert relative(changed, first) > 0.01
    assert torch.equal(changed, Gradient(model, attributor.composite)(data, seed)[1])


def test_composites_register_no_hooks() -> None:
    """zennit's other way says what to write instead."""
    composite, model = EpsilonPlusFlat(), network()
    for use in (composite.context, composite.register):
        message = rf"composite.{use.__name__}: expected Gradient\(model, composite\)\(input, attr_output\)"
        with pytest.raises(OptionError, match=message):
            use(model)


@pytest.mark.parametrize("given", ["ours", "theirs"])
@pytest.mark.parametrize("name", sorted(COMPOSITES))
def test_composites(name: str, given: str) -> None:
    """The same composite by its name here, and an instance of zennit's own, against zennit."""
    pytest.importorskip("zennit")
    import zennit.attribution
    import zennit.composites

    kind, options = COMPOSITES[name]
    model, data, seed = network(), images(), torch.randn(3, 10, dtype=torch.float64)
    theirs = getattr(zennit.composites, kind)(**options)
    with zennit.attribution.Gradient(model, theirs) as attributor:
        expected_output, expected = attributor(data.clone(), seed)
    composite = getattr(ours, kind)(**options) if given == "ours" else theirs
    output, found = Gradient(model, composite)(data, seed)
    assert torch.allclose(output, expected_output)
    assert relative(found, expected) < 1e-6


def test_every_activation_of_zennits_list_is_here() -> None:
    listed = pytest.importorskip("zennit.types").Activation.__subclass__
    assert set(ours._ACTIVATIONS) == set(listed) - {nn.MultiheadAttention}


ONE_OPERATION_WITHOUT_A_RULE = (nn.PReLU, nn.RReLU, nn.Hardshrink, nn.Softshrink, nn.Threshold)
SEVERAL_OPERATIONS = (nn.Softsign, nn.Tanhshrink)


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.ELU(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardswish(), nn.LeakyReLU(), nn.LogSigmoid(), nn.ReLU6()),
        *(nn.SELU(), nn.CELU(), nn.GELU(), nn.Sigmoid(), nn.SiLU(), nn.Softplus(), nn.Tanh(), nn.Mish()),
        *(nn.PReLU(), nn.RReLU(), nn.Hardshrink(), nn.Softshrink(), nn.Softsign(), nn.Tanhshrink()),
        nn.Threshold(0.1, 0.05),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("name", ["EpsilonPlus", "ExcitationBackprop"])
def test_activations_and_batch_norms(name: str, activation: nn.Module) -> None:
    """Against zennit; what has no rule here says so."""
    pytest.importorskip("zennit")
    import zennit.attribution
    import zennit.composites

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(294, 10)]
    model = nn.Sequential(*layers).double().eval()
    model[1].running_mean.uniform_(-0.1, 0.1), model[1].running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    data, seed = images(), torch.randn(3, 10, dtype=torch.float64)
    try:
        _, found = Gradient(model, getattr(ours, name)())(data, seed)
    except UnsupportedOpError as error:
        assert isinstance(activation, (*ONE_OPERATION_WITHOUT_A_RULE, *SEVERAL_OPERATIONS))
        assert re.search("activations that are one operation|prelu|rrelu|shrink|threshold", str(error))
        return
    with zennit.attribution.Gradient(model, getattr(zennit.composites, name)()) as attributor:
        _, expected = attributor(data.clone(), seed)
    assert relative(found, expected) < 1e-6


def everywhere(rule: str, **parameters: Any) -> ours.LayerMap:
    """One rule for all linear layers and convolutions; relevance passes activations as it is."""
    layers = ((nn.Linear, nn.Conv2d), rule, {"stabiliser": Stabiliser(1e-6), **parameters})
    return ours.LayerMap((((nn.ReLU,), "identity", {}), layers))


GOLDEN_COMPOSITES = {
    "EpsilonPlus": EpsilonPlus(),
    "EpsilonPlusFlat": EpsilonPlusFlat(),
    "EpsilonAlpha2Beta1": ours.EpsilonAlpha2Beta1(),
    "EpsilonAlpha2Beta1Flat": ours.EpsilonAlpha2Beta1Flat(),
    "EpsilonGammaBox": EpsilonGammaBox(low=-3.0, high=3.0),
    "LayerMap_all_Epsilon1e-6": everywhere("epsilon"),
    "LayerMap_all_Epsilon0.25": everywhere("epsilon", stabiliser=Stabiliser(0.25)),
    "LayerMap_all_Gamma0.25": everywhere("gamma", gamma=0.25),
    "LayerMap_all_ZPlus": everywhere("alpha_beta", alpha=1.0, beta=0.0, bias=True),
    "LayerMap_all_AlphaBeta2_1": everywhere("alpha_beta", alpha=2.0, beta=1.0, bias=True),
}
GOLDEN_CASES = {c["case"]: c for c in json.loads((GOLDEN / "manifest_zennit.json").read_text())["cases"]}
NETWORKS = {
    "zennit_mlp": lambda: nn.Sequential(
        *(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()),
        *(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)),
    ),
    "zennit_cnn": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    ),
}


@pytest.mark.parametrize("name", sorted(GOLDEN_COMPOSITES))
@pytest.mark.parametrize("case", sorted(GOLDEN_CASES))
def test_golden(case: str, name: str) -> None:
    """Numbers that zennit gave, of small networks of plain torch."""
    methods = set(GOLDEN_CASES[case]["methods"])
    assert methods <= {f"zennit/{known}" for known in GOLDEN_COMPOSITES}
    if f"zennit/{name}" not in methods:
        assert name == "EpsilonGammaBox" and case.startswith("zennit_mlp")  # a box is of pixels
        return
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    model = NETWORKS[case.rsplit("_", 1)[0]]()
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    x, targets = tensors["inputs/x"].double(), tensors["inputs/targets"]
    attributor = Gradient(model.double().eval(), GOLDEN_COMPOSITES[name])
    for t in range(targets.shape[1]):
        logits, found = attributor(x, torch.eye(10, dtype=torch.float64)[targets[:, t]])
        assert relative(found, tensors[f"expected/zennit/{name}"][:, t]) < 1e-12
        assert float((logits - tensors["expected/logits"]).abs().max()) < 1e-12


def test_composites_by_their_names() -> None:
    pytest.importorskip("zennit")
    from zennit.composites import COMPOSITES

    model, data = network(), images()
    for name, composite in ours.COMPOSITES.items():
        assert COMPOSITES[name].__name__ == composite.__name__
        if name != "epsilon_gamma_box":
            assert torch.equal(Gradient(model, name)(data)[1], Gradient(model, composite())(data)[1])
    known, transformer, patches = relprop.find_composite("epsilon_plus"), vit().double(), torch.randn(1, 3, 32, 32)
    found = [Gradient(transformer, composite)(patches.double())[1] for composite in (known, "epsilon_plus")]
    assert relative(*found) > 0.1  # relprop's has rules for attention, too
    with pytest.raises(OptionError, match="expected EpsilonGammaBox\\(low, high\\), whose bounds have no defaults"):
        Gradient(model, "epsilon_gamma_box")(data)


def test_maps_by_layers_and_names() -> None:
    """zennit's general composites, rule by rule."""
    pytest.importorskip("zennit")
    from zennit import composites, rules
    from zennit.attribution import Gradient as Theirs

    model, data, seed = network(), images(), torch.eye(10, dtype=torch.float64)[[1, 2, 3]]
    by_name = composites.NameMapComposite([(["0", "3"], rules.ZPlus()), (["9"], rules.Epsilon(0.1))])
    layers = [(nn.Linear, rules.Epsilon(0.1)), (nn.Conv2d, rules.Gamma(0.3))]
    for composite in (
        by_name,
        composites.LayerMapComposite(layers),
        composites.SpecialFirstLayerMapComposite(layers, [(nn.Conv2d, rules.Flat())]),
        composites.MixedComposite([by_name, composites.EpsilonPlusFlat()]),
        composites.NameLayerMapComposite(name_map=[(["9"], rules.Epsilon(0.2))], layer_map=layers),
    ):
        with Theirs(model=model, composite=composite) as attributor:
            expected = attributor(data.clone(), seed)[1]
        with Gradient(model=model, composite=composite) as attributor:
            assert relative(attributor(data, seed)[1], expected) < 1e-12, type(composite).__name__


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_transformers(kind: str, dtype: torch.dtype) -> None:
    """Attention, norms, residual adds and BERT's activations have no hook in zennit: their gradient, here as there."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient as Theirs
    from zennit.composites import EpsilonPlus as Composite

    model, data = vit().to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    if kind == "bert":
        model, data = bert().to(dtype), torch.randn(2, 7, 16, dtype=dtype)
    seed = torch.eye(10, dtype=dtype)[[3, 4]]
    for epsilon in (0.25, 1e-6):
        if epsilon == 0.25 or dtype == torch.float64:  # with 1e-6 float32 is rounding, see docs/dropin/zennit.md
            _, expected = Theirs(model, Composite(epsilon=epsilon))(data.clone(), seed)
            _, found = Gradient(model, EpsilonPlus(epsilon))(data, seed)
            assert relative(found, expected) < (1e-5 if dtype == torch.float32 else 1e-7)


def bert() -> nn.Module:
    """A text classifier from its embeddings [B, N, 16] to ten classes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=30, num_labels=10, **sizes)
    inner = transformers.BertForSequenceClassification(config)

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, embeddings: Tensor) -> Tensor:
            return self.inner(inputs_embeds=embeddings).logits

    return Embedded().eval()


def test_rules_by_the_modules_name() -> None:
    """A composite of one's own, with every rule that has a counterpart."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient as Theirs
    from zennit.composites import NameMapComposite
    from zennit.rules import AlphaBeta, Epsilon, Gamma, Norm, ZPlus

    model, data, seed = network(), images(), torch.randn(3, 10, dtype=torch.float64)
    rules = [
        (["0"], AlphaBeta(alpha=3.0, beta=2.0, stabilizer=1e-4)),
        (["3"], Gamma(gamma=0.7, zero_params="bias")),
        (["2", "5"], Norm()),
        (["7"], ZPlus(zero_params=["bias"])),
        (["9"], Epsilon(epsilon=0.1, zero_params="bias")),
    ]
    composite = NameMapComposite(rules)
    _, expected = Theirs(model, composite)(data.clone(), seed)
    assert relative(Gradient(model, composite)(data, seed)[1], expected) < 1e-6


@pytest.mark.parametrize("attr_output", [None, lambda output: output.softmax(-1), "given"])
def test_forms_of_the_output_attribution(attr_output: Any) -> None:
    model, data = network(), images().requires_grad_()
    seed = torch.randn(3, 10, dtype=torch.float64) if attr_output == "given" else attr_output
    output = model(data)
    arrived = output.detach() if seed is None else seed(output.detach()) if callable(seed) else seed
    (expected,) = torch.autograd.grad(output, data, arrived)
    for attributor, last in ((Gradient(model), seed), (Gradient(model, attr_output=seed), None)):
        _, found = attributor(data, last)
        assert relative(found, expected) < 1e-9


def test_composites_of_relprop() -> None:
    model, data = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    one_hot = torch.eye(10, dtype=torch.float64)[[3, 4]]
    score = (model(data) * one_hot).sum(-1)
    for composite in ("attnlrp", relprop.find_composite("epsilon")):
        _, found = Gradient(model, composite)(data, lambda output: output * one_hot)
        expected = relprop.explain(model, data, target=torch.tensor([3, 4]), method="full", composite=composite)
        assert relative(found.sum(1), expected.relevance) < 1e-6
    assert score.shape == (2,)
    alone = Gradient(model, "epsilon")(data[:1], one_hot[:1])[1]
    assert relative(alone, Gradient(model, "epsilon")(data, one_hot)[1][:1]) < 1e-9


def test_bad_input() -> None:
    model, data = network(), images()
    with pytest.raises(ShapeError, match="attr_output: expected \\[3, 10\\] as the output has, got \\[1, 10\\]"):
        Gradient(model)(data, torch.ones(1, 10))
    with pytest.raises(TargetError, match="attr_output: expected a tensor, got int"):
        Gradient(model)(data, lambda output: 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match="composite: expected None, a name.*got int"):
        Gradient(model, 1)(data)
    for several in (torch.tensor([0.0, 1.0]), torch.rand(1, 3, 16, 16), torch.arange(2.0).reshape(2, 1, 1)):
        with pytest.raises(OptionError, match=r"low: expected one value for the input or one for each channel.*\["):
            EpsilonGammaBox(low=several, high=1.0)
    with pytest.raises(ShapeError, match="z_box: expected bounds for 3 channels, got 2"):
        Gradient(model, EpsilonGammaBox(low=torch.tensor([0.0, 1.0])[None, :, None, None], high=1.0))(data)
    with pytest.raises(OptionError, match="create_graph"):
        Gradient(model, EpsilonPlus(), create_graph=True)


def test_names_of_zennit() -> None:
    """Every name that zennit registers is a composite here, or refused by its rule's name."""
    pytest.importorskip("zennit")
    from zennit.composites import COMPOSITES

    assert set(COMPOSITES) == {*ours.COMPOSITES, "beta_smooth", "deconvnet", "guided_backprop"}
    for name in set(COMPOSITES) - set(ours.COMPOSITES):
        rule = type(COMPOSITES[name]().layer_map[-1][1]).__name__
        listed = "expected epsilon_alpha2_beta1, .*excitation_backprop of zennit or alpha2_beta1, .* of relprop"
        with pytest.raises(UnsupportedOpError, match=f"{listed}, got {name!r}, whose rule {rule} has no counterpart"):
            Gradient(network(), name)(images())
    with pytest.raises(UnknownNameError, match="attnlrp.*epsilon_plus_flat.*got 'epsilon_plus_flt'; did you mean"):
        Gradient(network(), "epsilon_plus_flt")(images())


def test_arguments_of_zennits_composites() -> None:
    """A stabiliser may be zennit's own; what has no counterpart is refused by name, where zennit takes it."""
    pytest.importorskip("zennit")
    from zennit.core import Stabilizer

    model, data = network(), images()
    same = [Gradient(model, EpsilonPlus(epsilon, epsilon))(data)[1] for epsilon in (0.3, Stabilizer(0.3))]
    assert torch.equal(*same)
    for maker, name in (
        (EpsilonPlus, "layer_map"),
        (EpsilonPlusFlat, "first_map"),
        (ours.EpsilonAlpha2Beta1Flat, "layer_map"),
        (ours.ExcitationBackprop, "layer_map"),
    ):
        with pytest.raises(OptionError, match=f"{name}: expected none, got .*; give an instance of zennit's composite"):
            maker(**{name: [((nn.Linear,), None)]})
    with pytest.raises(OptionError, match="first_map: expected none"):
        EpsilonGammaBox(0.0, 1.0, first_map=[1])
    for canonizers in ("merge", [SequentialMergeBatchNorm], SequentialMergeBatchNorm, [SequentialMergeBatchNorm(), 1]):
        with pytest.raises(OptionError, match="canonizers: expected a list of zennit's canonizers or .*, got .* among"):
            ours.ExcitationBackprop(canonizers=canonizers)  # type: ignore[arg-type]
    for stabiliser in (Stabilizer(clip=True), lambda z: z + 1):
        with pytest.raises(UnsupportedOpError, match="expected stabilizers that add epsilon.* for epsilon"):
            EpsilonPlus(stabiliser)
    with pytest.raises(OptionError, match="stabilizer: expected a number or a zennit.core.Stabilizer, got 'a'"):
        EpsilonPlusFlat(stabilizer="a")
    with pytest.raises(UnsupportedOpError, match="expected zero_params None or 'bias', got \\['weight'\\]"):
        EpsilonPlus(zero_params="weight")


def test_unmapped_rules_are_named() -> None:
    pytest.importorskip("zennit")
    from zennit.composites import GuidedBackprop, NameMapComposite
    from zennit.core import Stabilizer
    from zennit.rules import Epsilon, Pass, WSquare

    model, data = network(), images()
    with pytest.raises(UnsupportedOpError, match="got ReLUGuidedBackprop for 1"):
        Gradient(model, GuidedBackprop())(data)
    with pytest.raises(UnsupportedOpError, match="got WSquare for 0"):
        Gradient(model, NameMapComposite([(["0"], WSquare())]))(data)
    with pytest.raises(UnsupportedOpError, match="expected stabilizers that add epsilon.*for 7"):
        Gradient(model, NameMapComposite([(["7"], Epsilon(Stabilizer(clip=True)))]))(data)
    with pytest.raises(UnsupportedOpError, match="got rule 'Epsilon' for 6 \\(Flatten\\)"):
        Gradient(model, NameMapComposite([(["6"], Epsilon())]))(data)
    with pytest.raises(UnsupportedOpError, match="that linear operations have .*, got rule 'Pass' for 7 \\(Linear\\)"):
        Gradient(model, NameMapComposite([(["7"], Pass())]))(data)
