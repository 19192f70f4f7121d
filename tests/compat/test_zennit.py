"""zennit's interface: its example's lines, and its own numbers for every composite and rule that has a counterpart."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import relprop
from relprop.compat import zennit as ours
from relprop.compat.zennit import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, Gradient
from relprop.errors import OptionError, ShapeError, TargetError, UnknownNameError, UnsupportedOpError
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


def test_example_of_the_documentation() -> None:
    """zennit's README, with only the import changed."""
    model, data = network(), images()[:1]
    composite = EpsilonPlusFlat()
    with Gradient(model=model, composite=composite) as attributor:
        out, relevance = attributor(data, torch.eye(10, dtype=torch.float64)[[0]])
    assert relevance.shape == data.shape
    assert torch.allclose(out, model(data))
    assert not data.requires_grad


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
        (ours.ExcitationBackprop, "canonizers"),
    ):
        with pytest.raises(OptionError, match=f"{name}: expected none, got .*; give an instance of zennit's composite"):
            maker(**{name: [((nn.Linear,), None)]})
    with pytest.raises(OptionError, match="first_map: expected none"):
        EpsilonGammaBox(0.0, 1.0, first_map=[1])
    for stabiliser in (Stabilizer(clip=True), lambda z: z + 1):
        with pytest.raises(UnsupportedOpError, match="expected stabilizers that add epsilon.* for epsilon"):
            EpsilonPlus(stabiliser)
    with pytest.raises(OptionError, match="stabilizer: expected a number or a zennit.core.Stabilizer, got 'a'"):
        EpsilonPlusFlat(stabilizer="a")
    with pytest.raises(UnsupportedOpError, match="expected zero_params None or 'bias', got \\['weight'\\]"):
        EpsilonPlus(zero_params="weight")


def test_unmapped_rules_are_named() -> None:
    pytest.importorskip("zennit")
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlus as Theirs
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
    with pytest.raises(OptionError, match="expected no canonizers, which change the model, got SequentialMergeBatch"):
        Gradient(model, Theirs(canonizers=[SequentialMergeBatchNorm()]))(data)
