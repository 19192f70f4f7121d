from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.backends.cpp import KERNELS
from relprop.composites import COMPOSITES, find_composite
from relprop.errors import OptionError, UnknownNameError, UnsupportedOpError
from relprop.rules import REGISTRY, Call, LinearEpsilon, Rule, Stabiliser, make_rule, register_rule
from relprop.rules.base import Relevances

ROOT = Path(__file__).parents[2]
RULES = sorted(set(REGISTRY.values()), key=lambda rule: rule.__name__)
NO_RULES = {"__init__", "base", "linear_map", "modified_gradient", "vjp"}  # machinery that rule files share
STEMS = sorted(path.stem for path in (ROOT / "relprop" / "rules").glob("*.py") if path.stem not in NO_RULES)
# Kernels that are named after the product they fuse.
COMPOSED = {"attention_composed": "matmul_half", "gradient": "norm_gradient"}


def stem_of(rule: type[Rule]) -> str:
    return rule.__module__.rpartition(".")[2]


@pytest.fixture
def registry() -> Iterator[None]:
    """The registry, given back as it was."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def test_every_rule_file_has_its_test() -> None:
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert not set(STEMS) - tests


def test_every_rule_file_registers_a_rule() -> None:
    assert {stem_of(rule) for rule in RULES} == set(STEMS) - {"stabiliser"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_docstring_names_source_and_conservation(rule: type[Rule]) -> None:
    text = inspect.getdoc(rule) or ""
    assert re.search(r"^Source: \S", text, re.MULTILINE)
    assert re.search(r"^Conservation:\n +\S", text, re.MULTILINE)
    assert f"{rule.name}" == rule.name and rule.name in {name for _, name in REGISTRY}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_is_plain_data(rule: type[Rule]) -> None:
    """Composites compare, hash and print rules."""
    assert rule() == rule() and hash(rule()) == hash(rule())
    assert rule().describe().startswith(rule.name) or rule.name == "composed"


def test_every_kernel_has_its_source() -> None:
    sources = {path.name.removesuffix("_cpu.cpp") for path in (ROOT / "csrc").glob("*_cpu.cpp")}
    wanted = {COMPOSED.get(stem_of(rule), stem_of(rule)) for rule in KERNELS}
    assert not wanted - sources
    assert all((ROOT / "csrc" / f"{stem}.h").is_file() for stem in wanted)
    assert set(KERNELS) <= set(RULES)


def test_composites_name_registered_rules() -> None:
    for composite in COMPOSITES.values():
        for line in composite.entries:
            rule = REGISTRY.get((line.kind, line.rule.name)) or REGISTRY.get(("any", line.rule.name))
            assert rule is type(line.rule)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).eval().double()


def test_a_rule_of_ones_own(registry: None) -> None:
    """In a few lines, used through a composite by name, its effect visible in the relevance and in the books."""

    @register_rule
    class Winner(Rule):
        """All relevance to the input that contributes most."""

        kind: ClassVar = "linear"
        name: ClassVar = "winner"
        share: float = 1.0

        def propagate(self, call: Call, relevance: Tensor) -> Relevances:
            weight = call.operand(1)
            assert weight is not None
            best = (call.x[:, None, :] * weight).argmax(-1)  # [B, N]
            back = torch.zeros(len(relevance), *call.x.shape, dtype=relevance.dtype)
            back.scatter_add_(-1, best.expand_as(relevance), self.share * relevance)
            call.absorb("winner", (1 - self.share) * relevance)
            return back, None, None

    model, x = network(), torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    composite = find_composite("chefer").overridden(relprop.entry("linear", "winner", share=0.5), name="mine")
    found = relprop.compile(model, (x,), method="full", composite=composite)(x, target=2, ledger=True)
    usual = relprop.compile(model, (x,), method="full")(x, target=2)

    hidden = torch.relu(model[0](x))
    for sample in range(4):
        unit = int((hidden[sample] * model[2].weight[2]).argmax())
        pixel = int((x[sample] * model[0].weight[unit]).argmax())
        want = torch.zeros(7, dtype=torch.float64)
        want[pixel] = 0.25  # half of half of a seed of 1
        assert torch.equal(found.relevance[sample], want)
    assert not torch.allclose(found.relevance, usual.relevance)
    assert found.composite == "mine"
    assert found.ledger is not None
    assert torch.equal(found.ledger.absorbed["winner"], torch.full((1, 4), 0.75, dtype=torch.float64))
    assert not found.ledger.imbalance.abs().max()
    assert [entry.rule for entry in found.ledger.entries if entry.kind == "linear"] == ["winner(share=0.5)"] * 2


def test_a_rule_for_a_kind_that_had_none(registry: None) -> None:
    model, x = network(), torch.ones(2, 7, dtype=torch.float64)
    bare = relprop.Composite("bare", (relprop.entry("linear", "epsilon"),))
    with pytest.raises(UnsupportedOpError, match=r"composite 'bare' has no rule for 1 operation\(s\) of this model"):
        relprop.compile(model, (x,), method="full", composite=bare)

    @register_rule
    class Rectified(Rule):
        kind: ClassVar = ("activation", "norm")
        name: ClassVar = "rectified"

        def propagate(self, call: Call, relevance: Tensor) -> Relevances:
            return (relevance * (call.x > 0),)

    assert REGISTRY["activation", "rectified"] is REGISTRY["norm", "rectified"] is Rectified
    whole = bare.overridden(relprop.entry("activation", "rectified"))
    found = relprop.compile(model, (x,), method="full", composite=whole)(x, target=0).relevance
    usual = bare.overridden(relprop.entry("activation", "identity"))
    want = relprop.compile(model, (x,), method="full", composite=usual)(x, target=0).relevance
    # The epsilon rule hands nothing to a unit that is off: both agree.
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_name_that_is_taken(registry: None) -> None:
    class Other(Rule):
        kind: ClassVar = "linear"
        name: ClassVar = "epsilon"

    with pytest.raises(OptionError) as error:
        register_rule(Other)
    assert str(error.value) == "rule Other: expected a new name for kind 'linear', got 'epsilon', which is taken"
    assert REGISTRY["linear", "epsilon"] is LinearEpsilon


def test_the_same_class_again(registry: None) -> None:
    """A notebook cell that is run twice."""

    def define() -> type[Rule]:
        @register_rule
        class Mine(Rule):
            kind: ClassVar = "linear"
            name: ClassVar = "mine"

        return Mine

    define()
    again = define()
    assert REGISTRY["linear", "mine"] is again


def test_missing_name_and_kind(registry: None) -> None:
    class Nameless(Rule):
        kind: ClassVar = "linear"

    class Kindless(Rule):
        name: ClassVar = "something"

    with pytest.raises(OptionError) as error:
        register_rule(Nameless)
    assert str(error.value) == "rule Nameless: expected class attributes kind and name, got ('linear',) and None"
    with pytest.raises(OptionError) as error:
        register_rule(Kindless)
    assert str(error.value) == "rule Kindless: expected class attributes kind and name, got None and 'something'"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        make_rule("matmul", "alpha_betta")
    expected = "unknown rule for matmul: expected one of alpha_beta, gradient, half, got 'alpha_betta'"
    assert str(error.value) == f"{expected}; did you mean 'alpha_beta'?"
    with pytest.raises(UnknownNameError, match=r"got 'zzz'$"):
        make_rule("linear", "zzz")


def test_unknown_parameter() -> None:
    with pytest.raises(OptionError) as error:
        make_rule("linear", "epsilon", gamma=1.0)
    text = "rule epsilon for linear: expected parameters among ['stabiliser', 'bias'], got ['gamma']"
    assert str(error.value).startswith(text)


def test_made_by_name() -> None:
    assert make_rule("conv", "epsilon", stabiliser=Stabiliser(0.5)) == LinearEpsilon(Stabiliser(0.5))
    assert make_rule("pool", "gradient") == make_rule("linear", "gradient")
    assert make_rule("linear", "gamma", gamma=0.5).describe() == "gamma(gamma=0.5)"
    assert make_rule("linear", "gamma").describe() == "gamma"
