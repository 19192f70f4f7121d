"""What a rule is, what it sees of one operation, and the registry that rules are found in."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from relprop.errors import OptionError, unknown_name
from relprop.graph import Node, Value, substitute
from relprop.rules.stabiliser import Stabiliser
from relprop.weights import Derive

Relevances = tuple[Tensor | None, ...]


class Absorbed:
    """What one step keeps for itself, by cause: each a tensor [T, B]."""

    def __init__(self) -> None:
        self.causes: dict[str, Tensor] = {}

    def add(self, cause: str, amount: Tensor) -> None:
        self.causes[cause] = self.causes[cause] + amount if cause in self.causes else amount


class Call:
    """One operation at one moment of the reverse sweep: its tensors, and what is wanted of it.

    Relevance and gradients carry a leading axis of T targets: [T, *shape].
    """

    __slots__ = (
        "absorbed",
        "derive",
        "dtype",
        "maps",
        "memo",
        "node",
        "positions",
        "precision",
        "samples",
        "shapes",
        "tensors",
        "wanted",
    )

    def __init__(
        self,
        node: Node,
        tensors: dict[int, Tensor],
        shapes: dict[int, torch.Size],
        wanted: tuple[bool, ...],
        dtype: torch.dtype,
        derive: Derive,
        absorbed: Absorbed | None = None,
        precision: str = "highest",
    ) -> None:
        self.node = node
        self.tensors = tensors
        self.shapes = shapes
        self.wanted = wanted  # per operand
        self.dtype = dtype  # of the streams
        self.derive = derive
        self.absorbed = absorbed
        self.precision = precision
        self.memo: dict[Any, Any] = {}  # shared by the streams of this step
        self.maps: dict[str, Tensor] = {}  # attention maps, for the read-out
        self.samples: int | None = None  # the batch size, for axes that merge samples with something else
        self.positions: list[Tensor] | None = None  # relevance that positions keep, each [T, B, N], where one asks

    def operand(self, position: int) -> Tensor | None:
        """Operand in the streams' dtype; a cast of a parameter is made once per model, not once per call."""
        value = self.node.operands[position]
        return None if value is None else self.tensor(value)

    def tensor(self, value: Value, transform: str = "") -> Tensor:
        """A saved tensor in the streams' dtype, optionally transformed ("abs", "positive", "negative")."""
        return self.derive(value, self.tensors[value.index], transform, self.dtype)

    def packed(self, position: int, transpose: bool, dtype: torch.dtype) -> Tensor | None:
        """A weight as the CPU kernels' products of this dtype read it; None where it is not the model's own."""
        value = self.node.operands[position]
        return None if value is None else self.derive.packed(value, self.tensors[value.index], transpose, dtype)

    def at_precision(self, precision: str) -> Call:
        """The same moment, with matrix products at another precision."""
        other = copy.copy(self)
        other.precision = precision
        return other

    @property
    def x(self) -> Tensor:
        """The first operand. [*shape]"""
        found = self.operand(0)
        assert found is not None
        return found

    @property
    def y(self) -> Tensor:
        """The output. [*shape]"""
        return self.tensor(self.node.outputs[0])

    def raw(self, structure: Any) -> Any:
        """Nested arguments with the saved tensors themselves, in the model's dtype."""
        return substitute(structure, lambda v: self.tensors[v.index])

    def shape(self, position: int) -> torch.Size:
        value = self.node.operands[position]
        assert value is not None
        return self.shapes[value.index]

    def share(self, stabiliser: Stabiliser, relevance: Tensor, z: Tensor, value: Value | None = None) -> Tensor:
        """relevance / stab(z); what the stabiliser keeps is booked when a ledger is open."""
        s = stabiliser.share(relevance, z)
        if self.absorbed is not None:
            self.absorb("epsilon", relevance - s * z, value)
        return s

    def absorb(self, cause: str, amount: Tensor, value: Value | None = None) -> None:
        """Book relevance that stays here. amount: [T, *shape of value], the node's output by default."""
        if self.absorbed is not None:
            value = value or self.node.outputs[0]
            self.absorbed.add(cause, self.per_sample(value, amount).sum(-1, dtype=torch.float64))

    def per_sample(self, value: Value, stream: Tensor) -> Tensor:
        """[T, *shape of value] -> [T, B, rest]."""
        return value.per_sample(stream, self.samples)

    def factor(self, value: Value) -> int:
        """How many entries of a value's sample axis belong to one sample."""
        sample = value.sample
        assert sample is not None
        if sample.factor is not None:
            return sample.factor
        assert self.samples is not None
        return self.shapes[value.index][sample.axis] // self.samples

    def keep_position(self, amount: Tensor, shape: torch.Size | None) -> None:
        """Book relevance that belongs to positions, and keep it per token.

        Args:
            amount: [T, *output shape].
            shape: of the constant that says where a token is; the axis along which it varies is that of the tokens.
        """
        self.absorb("position", amount)
        output = self.node.outputs[0]
        if self.positions is None or shape is None or output.sample is None or output.sample.axis != 0:
            return
        rank = amount.ndim - 1
        aligned = [1] * (rank - len(shape)) + list(shape)
        axes = [axis for axis in range(1, rank - 1) if aligned[axis] != 1]
        if not axes:
            return
        batch = amount.shape[1] // self.factor(output)
        tokens = amount.movedim(axes[-1] + 1, 1)  # [T, N, B * factor, ...]
        kept = tokens.reshape(amount.shape[0], tokens.shape[1], batch, -1).sum(-1)
        self.positions.append(kept.transpose(1, 2))


RuleType = TypeVar("RuleType", bound="type[Rule]")


class Rule:
    """How one kind of operation hands relevance from its output to its inputs.

    A subclass names its `kind` and `name` and defines `propagate`. Parameters are the fields of a frozen dataclass.

    Attributes:
        conserves: total relevance in equals total relevance out plus what is booked as absorbed. Where False, the
            ledger books the difference under "rule".
        needs_output: the step keeps the operation's output.
        needs_inputs: the step keeps the operation's inputs.
    """

    kind: ClassVar[str | tuple[str, ...]]
    name: ClassVar[str]
    conserves: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True
    needs_output: ClassVar[bool] = True

    def needs(self, node: Node) -> tuple[bool, bool]:
        """Whether the step keeps the operation's inputs and its output."""
        return self.needs_inputs, self.needs_output

    def gradient_form(self, node: Node) -> Rule | None:
        """The rule that does to a modified gradient g what this rule does to relevance R = x g; None if there is none.

        With such a rule for every operation, relevance is the input times one modified gradient: nothing is divided by
        what it was multiplied with, and no denominators are kept.
        """
        return None

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """Relevance at each operand (None where it carries none or none is wanted).

        Args:
            relevance: at the output. [T, *output shape]; for several outputs a tuple, None where nothing arrived.
        Returns:
            one [T, *operand shape] per operand of `call.node.operands`.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Name and the parameters that differ from their defaults."""
        if not dataclasses.is_dataclass(self):
            return self.name
        changed = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value != item.default and not isinstance(value, (Stabiliser, Rule)):
                changed.append(f"{item.name}={value:g}" if isinstance(value, float) else f"{item.name}={value}")
        return f"{self.name}({', '.join(changed)})" if changed else self.name


REGISTRY: dict[tuple[str, str], type[Rule]] = {}

ANY = "any"


@dataclass_transform(frozen_default=True)
def register_rule(rule: RuleType) -> RuleType:
    """Make a rule known by its kind and name; use as a decorator.

    The class becomes a frozen dataclass of its annotated parameters, so that composites can compare and hash it.

    Raises:
        OptionError: the class lacks a kind or a name, or the pair is taken.
    """
    kinds, name = getattr(rule, "kind", None), getattr(rule, "name", None)
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if not (isinstance(kinds, tuple) and kinds and isinstance(name, str)):
        raise OptionError(f"rule {rule.__name__}: expected class attributes kind and name, got {kinds!r} and {name!r}")
    made = rule if "__dataclass_fields__" in vars(rule) else dataclasses.dataclass(frozen=True)(rule)
    for kind in kinds:
        taken = REGISTRY.get((kind, name))
        if taken is not None and taken.__qualname__ != rule.__qualname__:
            raise OptionError(
                f"rule {rule.__name__}: expected a new name for kind {kind!r}, got {name!r}, which is taken"
            )
        REGISTRY[kind, name] = made
    return cast(RuleType, made)


def make_rule(kind: str, name: str, **parameters: Any) -> Rule:
    """The registered rule `name` for a kind, or for any kind.

    Raises:
        UnknownNameError: no such rule; the nearest name is suggested.
        OptionError: the rule does not take those parameters.
    """
    rule = REGISTRY.get((kind, name)) or REGISTRY.get((ANY, name))
    if rule is None:
        known = [n for k, n in REGISTRY if k in (kind, ANY)]
        raise unknown_name(f"rule for {kind}", name, known)
    try:
        return rule(**parameters)
    except TypeError as error:
        fields = [f.name for f in dataclasses.fields(rule)]  # type: ignore[arg-type]
        raise OptionError(
            f"rule {name} for {kind}: expected parameters among {fields}, got {sorted(parameters)} ({error})"
        ) from None


def plain_gradient() -> Rule:
    """The rule of the gradient, for operations whose modified gradient is their own."""
    return make_rule(ANY, "gradient")


def unbroadcast(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Sum a stream [T, *larger] down to [T, *shape], the adjoint of broadcasting."""
    if tensor.shape[1:] == shape:
        return tensor
    extra = tensor.ndim - 1 - len(shape)
    if extra:
        tensor = tensor.sum(tuple(range(1, extra + 1)))
    axes = [i + 1 for i, size in enumerate(shape) if size == 1 and tensor.shape[i + 1] != 1]
    return tensor.sum(axes, keepdim=True) if axes else tensor


def fold_targets(tensor: Tensor) -> Tensor:
    """[T, B, ...] -> [T * B, ...], for operations whose first axis is free."""
    return tensor.reshape(-1, *tensor.shape[2:])
