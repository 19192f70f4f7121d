"""Composites: named maps from the kind and role of an operation to its rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from relprop.errors import OptionError, UnsupportedOpError, unknown_name
from relprop.graph import Graph, Node
from relprop.rules import EXACT, REFERENCE, AddIdentity, LinearAlphaBeta, MatmulHalf, Rule, Stabiliser, make_rule
from relprop.rules.attention_composed import AttentionComposed

_REGISTER = "Register one with relprop.register_rule and name it in a Composite"
_REMEDIES = {  # by words of an operation's name
    "grouped_mm": "It sorts the tokens of all samples by their expert: call"
    ' model.set_experts_implementation("batched_mm"), which computes the same'
}


@dataclass(frozen=True)
class Entry:
    """One line of a composite: operations of `kind` (and of `role` and `module`, where given) get `rule`.

    Args:
        kind: canonical kind: linear, conv, matmul, softmax, add, mul, norm, activation, embedding, pool, fanout,
            select, movement.
        rule: the rule itself.
        role: "residual", "positional", "bias", "mask", "offset" or "rope" for add; "gate" or "scale" for mul;
            "input" for a first layer; "qk" or "av" for a product inside attention, "weights" for one with a constant.
        module: a pattern over module paths, as in `fnmatch`.
    """

    kind: str
    rule: Rule
    role: str | None = None
    module: str | None = None

    def matches(self, kind: str, role: str, module: str) -> bool:
        """Whether this line decides for an operation."""
        return (
            self.kind == kind
            and (self.role is None or self.role == role)
            and (self.module is None or fnmatch(module, self.module))
        )


@dataclass(frozen=True)
class Composite:
    """A named list of entries; the first that matches decides.

    Args:
        name: as in `relprop.composites()`.
        entries: in order of precedence.
        summary: one line on what it is for.
        source: paper or code.
        seed: relevance of the explained output: "one", or "score" for the output itself, so that relevance adds up to
            the score.
    """

    name: str
    entries: tuple[Entry, ...]
    summary: str = ""
    source: str = ""
    seed: str = "one"

    def rule_for(self, kind: str, role: str = "", module: str = "") -> Rule | None:
        """The rule of one operation, None where no entry matches."""
        return next((e.rule for e in self.entries if e.matches(kind, role, module)), None)

    def overridden(self, *entries: Entry, name: str | None = None) -> Composite:
        """This composite with entries that take precedence over its own."""
        return Composite(name or f"{self.name}+", (*entries, *self.entries), self.summary, self.source, self.seed)

    def assign(self, graph: Graph) -> dict[Node, Rule]:
        """A rule for every carrying node.

        Raises:
            UnsupportedOpError: naming every node that has none.
        """
        rules: dict[Node, Rule] = {}
        missing: list[Node] = []
        for node in graph.nodes:
            if not node.carrying:
                continue
            rule = (
                self._attention(node) if node.kind == "attention" else self.rule_for(node.kind, node.role, node.module)
            )
            if rule is None:
                missing.append(node)
            else:
                rules[node] = rule
        if missing:
            lines = "\n".join(f"  {node.kind}: {node.describe()}" for node in missing)
            remedy = next((_REMEDIES[op] for op in _REMEDIES if op in lines), _REGISTER)
            raise UnsupportedOpError(
                f"composite {self.name!r} has no rule for {len(missing)} operation(s) of this model; expected one for"
                f" each, got none for\n{lines}\n{remedy}"
            )
        return rules

    def _attention(self, node: Node) -> Rule | None:
        whole = self.rule_for("attention", node.role, node.module)
        if whole is not None:
            return whole
        parts = [self.rule_for(*at, node.module) for at in (("matmul", "qk"), ("softmax", ""), ("matmul", "av"))]
        if any(part is None for part in parts):
            return None
        qk, softmax, av = parts
        assert qk is not None and softmax is not None and av is not None
        qk = qk.at_scale(node.args[4]) if isinstance(qk, MatmulHalf) else qk
        masks = (e.rule for e in self.entries if e.role == "mask" and e.matches("add", "mask", node.module))
        return AttentionComposed(qk=qk, softmax=softmax, av=av, mask=next(masks, AddIdentity()))


def entry(kind: str, rule: str, role: str | None = None, module: str | None = None, **parameters: Any) -> Entry:
    """An entry by the rule's registered name; see `Entry`."""
    return Entry(kind, make_rule(kind, rule, **parameters), role, module)


def _common(stabiliser: Stabiliser, gather: Stabiliser) -> tuple[Entry, ...]:
    """What every Chefer-type composite shares."""
    return (
        entry("conv", "z_box", role="input", stabiliser=stabiliser),
        entry("conv", "alpha_beta", stabiliser=stabiliser),
        entry("linear", "alpha_beta", stabiliser=stabiliser),
        entry("softmax", "identity"),
        entry("add", "identity", role="bias"),
        entry("add", "identity", role="mask"),
        entry("add", "identity", role="offset"),
        entry("add", "epsilon", role="rope"),
        entry("mul", "half"),
        entry("norm", "identity"),
        entry("activation", "identity"),
        entry("embedding", "sum"),
        entry("pool", "epsilon", stabiliser=stabiliser),
        entry("fanout", "epsilon", stabiliser=gather),
        entry("select", "epsilon", stabiliser=gather),
        entry("movement", "adjoint"),
    )


def _gradient_entries() -> Iterable[Entry]:
    kinds = (
        *("linear", "conv", "matmul", "softmax", "attention", "add", "mul", "norm", "activation", "embedding"),
        *("pool", "fanout", "select", "movement"),
    )
    return (entry(kind, "gradient") for kind in kinds)


def _replace(entries: tuple[Entry, ...], *new: Entry) -> tuple[Entry, ...]:
    return (*new, *entries)


COMPOSITES: dict[str, Composite] = {}


def register_composite(composite: Composite) -> Composite:
    """Make a composite known by its name.

    Raises:
        OptionError: the name is taken by another composite.
    """
    if COMPOSITES.get(composite.name, composite) != composite:
        raise OptionError(f"composite: expected a new name, got {composite.name!r}, which is taken")
    COMPOSITES[composite.name] = composite
    return composite


register_composite(
    Composite(
        "chefer",
        (
            entry("matmul", "alpha_beta", role="weights", stabiliser=REFERENCE),
            entry("matmul", "half", stabiliser=REFERENCE),
            entry("add", "normalised", role="residual", stabiliser=REFERENCE),
            entry("add", "normalised", role="positional", stabiliser=REFERENCE),
            *_common(REFERENCE, REFERENCE),
        ),
        "z+ for linear layers, normalised residual adds, half to each side of a product; the authors' own epsilons",
        "Chefer et al., CVPR 2021",
    )
)
register_composite(
    Composite(
        "chefer_stable",
        (
            entry("softmax", "detached"),
            entry("matmul", "alpha_beta", role="weights"),
            entry("matmul", "alpha_beta", role="qk"),  # of a copy with the softmax rule "identity"
            entry("matmul", "half"),
            entry("add", "gamma", role="residual", gamma=1.0),
            entry("add", "gamma", role="positional", gamma=1.0),
            *_common(Stabiliser(), EXACT),
        ),
        "the well-conditioned sibling of chefer: gamma residual adds, and nothing through queries and keys",
        "docs/design.md, numerics",
    )
)
_chefer = COMPOSITES["chefer"].entries
register_composite(
    Composite(
        "chefer_bert",
        _replace(_chefer, entry("add", "normalised", role="mask", stabiliser=REFERENCE)),
        "chefer as its authors wrote it for BERT: the addition of the attention mask is an add like any other",
        "Chefer et al., CVPR 2021, code (BERT)",
    )
)
register_composite(
    Composite(
        "chefer_detr",
        _replace(
            _chefer,
            entry("add", "identity", role="positional"),
            entry("linear", "rescaled", inner=LinearAlphaBeta(stabiliser=REFERENCE), stabiliser=REFERENCE),
            entry("matmul", "half", role="qk", stabiliser=REFERENCE, scaled=True),
        ),
        "chefer as its authors wrote it for DETR: position embeddings take no share, linear layers hand on all",
        "Chefer et al., ICCV 2021, code (DETR)",
    )
)
register_composite(
    Composite(
        "chefer_original",
        _replace(
            _chefer,
            entry("add", "epsilon", role="residual", stabiliser=REFERENCE),
            entry("add", "epsilon", role="positional", stabiliser=REFERENCE),
            entry("linear", "alpha_beta", stabiliser=REFERENCE, joint=False),
        ),
        "the authors' earlier rules (their full LRP baseline): separate z+ denominators, plain residual shares",
        "Chefer et al., CVPR 2021, code",
    )
)
register_composite(Composite("gradient", tuple(_gradient_entries()), "the gradient through every operation"))


def _lrp(
    *,
    softmax: str = "taylor",
    gate: str = "half",
    stabiliser: Stabiliser = EXACT,
) -> tuple[Entry, ...]:
    """AttnLRP's rules and what other composites change of them; without stabilisers a modified gradient."""
    return (
        entry("linear", "epsilon", stabiliser=stabiliser),
        entry("conv", "epsilon", stabiliser=stabiliser),
        entry("matmul", "half", stabiliser=stabiliser),
        entry("softmax", softmax),
        entry("add", "epsilon", stabiliser=stabiliser),
        entry("mul", gate),
        entry("norm", "sigma_constant", stabiliser=stabiliser),
        entry("activation", "slope", stabiliser=EXACT) if stabiliser.is_exact else entry("activation", "identity"),
        entry("embedding", "sum"),
        entry("pool", "epsilon", stabiliser=stabiliser),
        entry("fanout", "epsilon", stabiliser=EXACT),
        entry("select", "epsilon", stabiliser=EXACT),
        entry("movement", "adjoint"),
    )


_STABLE = Stabiliser(1e-6)
_ZENNIT_PLUS: dict[str, Any] = {"alpha": 1.0, "beta": 0.0, "bias": True, "stabiliser": _STABLE}
_ZENNIT_ALPHA_BETA: dict[str, Any] = {"alpha": 2.0, "beta": 1.0, "bias": True, "stabiliser": _STABLE}

for _composite in (
    Composite(
        "attnlrp",
        _lrp(),
        "epsilon without an epsilon, half to each factor of a product, softmax by its Taylor expansion",
        "Achtibat et al., ICML 2024 (AttnLRP), as its authors' efficient code",
        "score",
    ),
    Composite(
        "cp_lrp",
        _lrp(softmax="detached", gate="detached_gate"),
        "softmax and gates held constant: relevance flows through values alone",
        "Ali et al., ICML 2022 (CP-LRP), with the detached gate of AttnLRP's code",
        "score",
    ),
    Composite(
        "reslrp",
        _replace(_lrp(), entry("add", "gamma", role="residual", gamma=1.0, stabiliser=EXACT)),
        "attnlrp with gamma = 1 at every residual add: no add amplifies by more than 3",
        "Berend et al. 2026 (ResLRP), eq. 3",
        "score",
    ),
    Composite(
        "libragrad",
        _lrp(softmax="detached"),
        "gradients that balance: softmax, sigma and self-gates pruned, products of two activations halved",
        "Mehri et al., CVPR 2025 (LibraGrad)",
        "score",
    ),
    Composite(
        "pa_lrp",
        _replace(
            _lrp(),
            entry("add", "positional", role="positional", stabiliser=EXACT),
            entry("mul", "positional", role="rope"),
        ),
        "attnlrp with position embeddings and rotations as inputs of their own, which keep their share per token",
        "Bakish et al. 2025 (PA-LRP)",
        "score",
    ),
    Composite(
        "epsilon",
        _lrp(stabiliser=_STABLE),
        "epsilon = 1e-6 wherever something is divided; attention as in attnlrp",
        "Bach et al., PLoS ONE 2015",
        "score",
    ),
    Composite(
        "gamma",
        _replace(
            _lrp(stabiliser=_STABLE),
            entry("linear", "gamma", gamma=0.25, stabiliser=_STABLE),
            entry("conv", "gamma", gamma=0.25, stabiliser=_STABLE),
        ),
        "gamma = 0.25 for linear layers and convolutions; the rest as in epsilon",
        "Montavon et al. 2019; Anders et al. 2021 (zennit)",
        "score",
    ),
    Composite(
        "epsilon_plus",
        _replace(_lrp(stabiliser=_STABLE), entry("conv", "alpha_beta", **_ZENNIT_PLUS)),
        "z+ for convolutions, the rest as in epsilon",
        "zennit, EpsilonPlus; Kohlbrenner et al. 2020",
        "score",
    ),
    Composite(
        "alpha2_beta1",
        _replace(
            _lrp(stabiliser=_STABLE),
            entry("linear", "alpha_beta", **_ZENNIT_ALPHA_BETA),
            entry("conv", "alpha_beta", **_ZENNIT_ALPHA_BETA),
        ),
        "alpha = 2, beta = 1 for linear layers and convolutions, biases included; the rest as in epsilon",
        "Bach et al., PLoS ONE 2015, eq. 60",
        "score",
    ),
):
    register_composite(_composite)


def find_composite(composite: str | Composite) -> Composite:
    """A composite by name, or the given one.

    Raises:
        UnknownNameError: no composite has that name.
    """
    if isinstance(composite, Composite):
        return composite
    if not isinstance(composite, str) or composite not in COMPOSITES:
        raise unknown_name("composite", composite, COMPOSITES)
    return COMPOSITES[composite]


def composites() -> dict[str, str]:
    """Every composite's name and what it is for."""
    return {name: composite.summary for name, composite in COMPOSITES.items()}


__all__ = ["COMPOSITES", "Composite", "Entry", "composites", "entry", "find_composite", "register_composite"]
