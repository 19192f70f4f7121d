"""The adjoint of every movement op against automatic differentiation of the module that holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relprop.capture import ops
from relprop.rules import MovementAdjoint
from relprop.rules.movement_adjoint import _ADJOINTS, _FORMS
from tests.rules.rule_checks import (
    SIZES,
    Op,
    assert_near,
    assert_parts,
    by_autograd,
    call_by_hand,
    check_gradient,
    check_ledger,
    check_rule,
    module_of,
    random,
)

ROWS = torch.tensor([3, 0, 3])

# As a model would write it: op name, function, shapes of one sample's inputs.
CASES: dict[str, tuple[str, Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "view": ("view", lambda x: x.view(x.shape[0], 3, 2, 7), ((6, 7),)),
    "view-all": ("view", lambda x: x.view(x.shape[0], -1), ((6, 7),)),
    "reshape": ("reshape", lambda x: x.reshape(-1, 7), ((6, 7),)),
    "flatten": ("flatten", lambda x: x.flatten(1), ((6, 7),)),
    "unflatten": ("unflatten", lambda x: x.unflatten(1, (2, 3)), ((6, 7),)),
    "permute": ("permute", lambda x: x.permute(0, 3, 1, 2), ((3, 1, 7),)),
    "permute-negative": ("permute", lambda x: x.permute(0, -1, 1, -2), ((3, 2, 7),)),
    "permute-batch": ("permute", lambda x: x.permute(2, 0, 1), ((3, 7),)),
    "transpose": ("transpose", lambda x: x.transpose(1, 2), ((3, 7),)),
    "transpose-negative": ("transpose", lambda x: x.transpose(-1, 1), ((3, 5, 7),)),
    "transpose-batch": ("transpose", lambda x: x.transpose(0, 1), ((3, 7),)),
    "slice": ("slice", lambda x: x[:, 1:], ((7, 5),)),
    "slice-negative": ("slice", lambda x: x[:, -3:-1], ((7, 5),)),
    "slice-step": ("slice", lambda x: x[:, 1::3], ((7, 5),)),
    "slice-last-axis": ("slice", lambda x: x[..., :4], ((7, 63),)),
    "cat": ("cat", lambda a, b: torch.cat([a, b], 1), ((1, 5), (6, 5))),
    "cat-negative": ("cat", lambda a, b: torch.cat([a, b], -1), ((3, 1), (3, 63))),
    "stack": ("stack", lambda a, b: torch.stack([a, b], 1), ((3, 7), (3, 7))),
    "stack-last": ("stack", lambda a, b: torch.stack([a, b], -1), ((3, 7), (3, 7))),
    "unbind": ("unbind", lambda x: x.unbind(1), ((3, 7),)),
    "unbind-qkv": ("unbind", lambda x: x.reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0), ((5, 24),)),
    "split": ("split", lambda x: x.split(3, -1), ((2, 7),)),
    "split-sizes": ("split_with_sizes", lambda x: x.split([1, 4, 2], 2), ((2, 7),)),
    "chunk": ("chunk", lambda x: x.chunk(3, dim=-1), ((2, 7),)),
    "chunk-first": ("chunk", lambda x: x.chunk(2, 1), ((5, 7),)),
    "expand": ("expand", lambda x: x.expand(-1, 4, 7), ((1, 7),)),
    "expand-new": ("expand", lambda x: x.expand(3, *x.shape), ((1, 7),)),
    "roll": ("roll", lambda x: x.roll(2, 1), ((7, 5),)),
    "roll-two": ("roll", lambda x: x.roll((-1, 2), (1, -1)), ((7, 5),)),
    "flip": ("flip", lambda x: x.flip(1, -1), ((7, 5),)),
    "squeeze": ("squeeze", lambda x: x.squeeze(1), ((1, 7),)),
    "squeeze-all": ("squeeze", lambda x: x.squeeze(), ((1, 7, 1),)),
    "unsqueeze": ("unsqueeze", lambda x: x.unsqueeze(-2), ((3, 7),)),
    "contiguous": ("contiguous", lambda x: x.mT.contiguous(), ((3, 7),)),
    "pad": ("pad", lambda x: F.pad(x, (1, 2, 0, 3)), ((3, 7),)),
    "pad-reflect": ("pad", lambda x: F.pad(x, (2, 1), mode="reflect"), ((3, 7),)),
    "pad-crop": ("pad", lambda x: F.pad(x, (-1, 2)), ((3, 7),)),
    "repeat": ("repeat", lambda x: x.repeat(1, 3, 2), ((3, 7),)),
    "repeat-interleave": ("repeat_interleave", lambda x: x.repeat_interleave(3, 1), ((3, 7),)),
    "index-select": ("index_select", lambda x, rows: x.index_select(1, rows), ((5, 7),)),
    "index": ("index", lambda x, rows: x[:, rows], ((5, 7),)),
    "gather": ("gather", lambda x, rows: x.gather(1, rows[None, :, None].expand(x.shape[0], 3, 7)), ((5, 7),)),
    "pixel-shuffle": ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), ((8, 3, 3),)),
    "unfold": ("unfold", lambda x: x.unfold(1, 3, 2), ((7, 5),)),
    "im2col": ("im2col", lambda x: F.unfold(x, 3, padding=1, stride=2), ((2, 5, 5),)),
    "masked-scatter": (
        "masked_scatter",
        lambda x, source, rows: x.masked_scatter((torch.arange(5) < rows[0])[None, :, None], source),
        ((5, 7), (3, 7)),
    ),
    "movedim": ("movedim", lambda x: x.movedim(1, -1), ((3, 5, 7),)),
}


def movement_op(name: str) -> Op:
    target, function, shapes = CASES[name]

    def whole(*inputs: Tensor, **constants: Tensor) -> Tensor:
        """One tensor out of several outputs, each used once and in its own way."""
        outputs = function(*inputs, *constants.values())
        if isinstance(outputs, Tensor):
            return outputs
        return torch.cat([(i + 1.0) * out.flatten(1) for i, out in enumerate(outputs)], 1)

    constants = {"rows": ROWS.clone()} if name in ("index-select", "index", "gather", "masked-scatter") else {}
    inputs = [random(2, *shape) for shape in shapes]
    return Op(module_of(whole, len(shapes), **constants), *inputs, kind="movement", target=f".{target}.")


def moves_samples(op: Op) -> bool:
    values = [*op.node.outputs, *(v for v in op.node.operands if v is not None and v.carrying)]
    return any(v.sample is None or (v.sample.axis, v.sample.factor) != (0, 1) for v in values)


@pytest.mark.parametrize("name", CASES)
def test_formula(name: str) -> None:
    op = movement_op(name)
    for batch, targets in SIZES:
        inputs = [random(batch, *shape, seed=batch + i) for i, shape in enumerate(CASES[name][2])]
        relevance = op.relevance(inputs, targets)
        if name == "squeeze-all" and batch == 1:
            continue  # a batch of one would be squeezed too
        if not moves_samples(op):
            check_rule(op, MovementAdjoint(), inputs, relevance, lambda r, *x, op=op: by_autograd(op, r, x))
            continue
        got = MovementAdjoint().propagate(op.call(inputs), relevance)
        assert_parts(got, by_autograd(op, relevance, inputs), 1e-13)


@pytest.mark.parametrize("name", ["unbind", "unbind-qkv", "split", "split-sizes", "chunk", "chunk-first"])
def test_output_that_nothing_arrived_at(name: str) -> None:
    op = movement_op(name)
    inputs = [random(4, *shape) for shape in CASES[name][2]]
    whole = op.relevance(inputs, 3)
    for missing in range(len(whole)):
        relevance = tuple(None if i == missing else r for i, r in enumerate(whole))
        got = MovementAdjoint().propagate(op.call(inputs), relevance)
        assert_parts(got, by_autograd(op, relevance, inputs), 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str) -> None:
    op = movement_op(name)
    if moves_samples(op):
        return  # the sums here are over the first axis
    inputs = [random(4, *shape) for shape in CASES[name][2]]
    pads = name.startswith("pad") or name == "im2col"
    entry = check_ledger(op, MovementAdjoint(), inputs, op.relevance(inputs, 3), ["constant"] if pads else [])
    if not pads or name == "pad-reflect":
        torch.testing.assert_close(entry.passed, entry.arriving, rtol=1e-12, atol=1e-12)


class WithClassToken(nn.Module):
    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(random(1, 1, 5))
        self.stacked = stacked

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        return torch.stack([token, x], 2) if self.stacked else torch.cat([token, x], 1)


@pytest.mark.parametrize("stacked", [False, True])
def test_constant_part_is_absorbed(stacked: bool) -> None:
    rows = 1 if stacked else 7
    op = Op(WithClassToken(stacked), random(2, rows, 5), kind="movement", target="stack" if stacked else "cat")
    x = random(4, rows, 5)
    relevance = op.relevance([x], 3)
    token, rest = (
        (relevance[:, :, :, 0], relevance[:, :, :, 1]) if stacked else (relevance[:, :, :1], relevance[:, :, 1:])
    )
    got = MovementAdjoint().propagate(op.call([x]), relevance)
    assert_parts(got, (None, rest), 1e-15)
    entry = check_ledger(op, MovementAdjoint(), [x], relevance, ["constant"])
    assert_near(entry.absorbed["constant"], token.sum((-1, -2)), 1e-12)


# Every overload of the table of closed forms, on [2, 3, 1, 4] where no other shape is needed: arguments after x.
X = random(2, 3, 1, 4)
OVERLOADS: dict[str, list[tuple[Any, ...]]] = {
    "view": [(X, [6, 4])],
    "reshape": [(X, [2, -1])],
    "flatten.using_ints": [(X,), (X, 1, 2)],
    "unflatten.int": [(X, 3, [2, 2])],
    "_unsafe_view": [(X, [6, 4])],
    "squeeze": [(X,)],
    "squeeze.dim": [(X, 2), (X, -2), (X, 1)],
    "squeeze.dims": [(X, [2])],
    "unsqueeze": [(X, 0), (X, -1)],
    "view_as": [(X, random(6, 4))],
    "permute": [(X, [3, 0, 2, 1]), (X, [-1, -3, 0, 2])],
    "transpose.int": [(X, 0, 3), (X, -1, 1)],
    "swapaxes": [(X, 1, -1)],
    "mT": [(X,)],
    "t": [(random(3, 4),), (random(5),)],
    "slice.Tensor": [(X,), (X, 1, 1), (X, -1, -3, -1), (X, 3, 0, 2**63 - 1, 2), (X, 1, 2, 100)],
    "select.int": [(X, 1, 2), (X, -1, -2)],
    "cat": [([X, random(2, 5, 1, 4), X], 1), ([X, X],)],
    "concat": [([X, random(2, 3, 1, 1)], -1)],
    "stack": [([X, X, X],), ([X, X], -1), ([X, X], 2)],
    "unbind.int": [(X,), (X, 1), (X, -1)],
    "split.Tensor": [(X, 1), (X, 3, -1)],
    "split_with_sizes": [(X, [1, 2], 1)],
    "split.sizes": [(X, [3, 1], -1)],
    "chunk": [(X, 2), (X, 2, 1)],
    "expand": [(X, [2, 3, 5, 4]), (X, [6, 2, 3, -1, 4]), (random(1, 3), [4, 3])],
    "expand_as": [(X, random(2, 3, 5, 4))],
    "broadcast_to": [(X, [7, 2, 3, 5, 4])],
    "to.dtype": [(X, torch.float64)],
    "to.device": [(X, torch.device("cpu"), torch.float64)],
    "to.dtype_layout": [(X,)],
    "_to_copy": [(X,)],
    "contiguous": [(X,)],
    "clone": [(X,)],
    "alias": [(X,)],
    "type_as": [(X, random(1))],
    "roll": [(X, [1, -2], [1, -1]), (X, [1], [3]), (X, [2])],
    "flip": [(X, [1, -1]), (X, [0])],
    "masked_fill.Scalar": [(X, random(3, 1, 4, seed=1) > 0, -7.0), (random(3, 1, 1), random(2, 3, 1, 4) > 0, 0.0)],
    "masked_scatter": [
        (X, random(2, 3, 1, 1, seed=1) > 0, random(30)),
        (random(3, 1, 4), random(2, 3, 1, 4) > 0, random(6, 4)),
    ],
    "topk": [(X, 2), (X, 3, 1), (X, 1, -2)],
}


def test_every_closed_form_is_listed() -> None:
    names = [name for line in _FORMS.values() for name in line.split()]
    assert sorted(OVERLOADS) == sorted(names)
    assert {op for name in names for op in ops.overloads(name)} == set(_ADJOINTS)


@pytest.mark.parametrize("name", OVERLOADS)
def test_closed_form_of_every_overload(name: str) -> None:
    found = ops.overloads(name)
    if not found:
        pytest.skip(f"this torch has no aten.{name}")
    (target,) = found
    for args in OVERLOADS[name]:
        leaves: list[Tensor] = []

        def leaf(item: Any, leaves: list[Tensor] = leaves) -> Any:
            if isinstance(item, Tensor):
                leaves.append(item.clone().requires_grad_(item.is_floating_point()))
                return leaves[-1]
            return [leaf(i) for i in item] if isinstance(item, list) else item

        outputs = target(*[leaf(item) for item in args])
        several = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        call = call_by_hand("movement", target, args, [out.detach() for out in several])
        carrying = [out for out in several if out.is_floating_point()]
        relevance = tuple(random(3, *out.shape, seed=i) for i, out in enumerate(carrying))
        wanted = [item for item in leaves if item.requires_grad]
        rows = [
            torch.autograd.grad(carrying, wanted, [r[t] for r in relevance], retain_graph=True, allow_unused=True)
            for t in range(3)
        ]
        found = [None if row[0] is None else torch.stack(row) for row in zip(*rows, strict=True)]  # type: ignore[arg-type]
        want = [found.pop(0) if item.requires_grad else None for item in leaves]
        arrived = relevance + (None,) * (len(several) - len(carrying))
        got = MovementAdjoint().propagate(call, arrived if len(several) > 1 else relevance[0])
        assert_parts(got, tuple(want), 1e-15)


def test_padding_keeps_its_part() -> None:
    """Relevance at padding belongs to no input."""
    op, x = movement_op("pad"), random(4, 3, 7)
    relevance = op.relevance([x], 3)
    got = MovementAdjoint().propagate(op.call([x]), relevance)
    assert_parts(got, (relevance[:, :, :3, 1:8],), 1e-15)
    entry = check_ledger(op, MovementAdjoint(), [x], relevance, ["constant"])
    outside = relevance.clone()
    outside[:, :, :3, 1:8] = 0.0
    assert_near(entry.absorbed["constant"], outside.sum((-1, -2)), 1e-12)


def test_gradient() -> None:
    for name in ("cat", "roll", "pad"):
        op = movement_op(name)
        inputs = [random(2, *shape) for shape in CASES[name][2]]
        check_gradient(op, MovementAdjoint(), inputs, op.relevance(inputs, 2))
