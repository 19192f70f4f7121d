from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from relprop.rules import NormSigmaConstant, Stabiliser
from tests.rules.rule_checks import (
    SIZES,
    Op,
    Parts,
    assert_near,
    check_gradient,
    check_ledger,
    check_rule,
    divide,
    module_of,
    random,
)


class SpelledRMSNorm(nn.Module):
    """As language models write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


# Module, shape of a sample, number of normalised axes, whether the mean is taken out, epsilon.
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool, float]] = {
    "layer": (lambda: nn.LayerNorm(63), (7, 63), 1, True, 1e-5),
    "layer-epsilon": (lambda: nn.LayerNorm(7, eps=1e-2), (7,), 1, True, 1e-2),
    "layer-no-bias": (lambda: nn.LayerNorm(7, bias=False), (3, 7), 1, True, 1e-5),
    "layer-plain": (lambda: nn.LayerNorm(7, elementwise_affine=False), (3, 7), 1, True, 1e-5),
    "layer-two-axes": (lambda: nn.LayerNorm((3, 7)), (3, 7), 2, True, 1e-5),
    "rms": (lambda: nn.RMSNorm(63, eps=1e-3), (7, 63), 1, False, 1e-3),
    "rms-default": (lambda: nn.RMSNorm(7), (7,), 1, False, torch.finfo(torch.float64).eps),
    "rms-plain": (lambda: nn.RMSNorm(7, elementwise_affine=False, eps=1e-3), (7,), 1, False, 1e-3),
    "rms-spelled": (lambda: SpelledRMSNorm(7), (3, 7), 1, False, 1e-6),
}
RULES = {"default": NormSigmaConstant(), "coarse": NormSigmaConstant(Stabiliser(0.1))}


@functools.cache
def norm_op(name: str) -> Op:
    torch.manual_seed(0)
    module = NORMS[name][0]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) + 1.0)
    return Op(module, random(2, *NORMS[name][1]), kind="norm")


def linear_part(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of flattened vectors [..., n] as y = M x + b with 1 / sigma in M. [..., n, n], [n]"""
    module, size = norm_op(name).module, x.shape[-1]
    centre = torch.eye(size, dtype=x.dtype) - (1.0 / size if NORMS[name][3] else 0.0)
    sigma = ((x @ centre.T).square().mean(-1) + NORMS[name][4]).sqrt()
    # Spelled out, the norm is x / sigma alone: the weight is a product of its own.
    weight = None if name == "rms-spelled" else getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    scale = torch.ones(size, dtype=x.dtype) if weight is None else weight.detach().reshape(-1)
    offset = torch.zeros(size, dtype=x.dtype) if bias is None else bias.detach().reshape(-1)
    return scale[:, None] * centre / sigma[..., None, None], offset


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", NORMS)
def test_formula(name: str, rule: NormSigmaConstant, batch: int, targets: int) -> None:
    _, shape, axes, _, _ = NORMS[name]
    op, x = norm_op(name), random(batch, *shape, zeros=True)

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        flat, arriving = x.flatten(-axes), relevance.flatten(-axes)
        matrix, offset = linear_part(name, flat)
        contributions = matrix * flat[..., None, :]  # [..., i, j]
        s = divide(arriving, contributions.sum(-1) + offset, rule.stabiliser)
        back = (contributions * s[..., None]).sum(-2)
        return (back.reshape(relevance.shape), *[None] * (len(op.node.operands) - 1))

    def settled(x: Tensor) -> Tensor:
        return op.output([x]).abs() > 0.05

    # A float32 RMS norm without an epsilon takes float32's own, which these inputs do not notice.
    check_rule(op, rule, [x], op.relevance([x], targets), oracle, settled)


@pytest.mark.parametrize("name", ["layer", "rms", "rms-spelled"])
def test_ledger(name: str) -> None:
    op, x = norm_op(name), random(4, *NORMS[name][1])
    relevance = op.relevance([x], 3)
    entry = check_ledger(
        op, NormSigmaConstant(), [x], relevance, [*(["bias"] if name == "layer" else []), "epsilon", "rule"]
    )
    offset = linear_part(name, x)[1]
    share = divide(relevance, op.output([x]), NormSigmaConstant().stabiliser) * offset
    kept = entry.absorbed["bias"] if name == "layer" else entry.absorbed["rule"]
    torch.testing.assert_close(kept, share.flatten(2).sum(-1), rtol=1e-7, atol=1e-6)


def test_epsilon_may_be_left_to_its_default() -> None:
    """The functional form leaves trailing arguments out."""
    weight, bias = random(7, seed=1), random(7, seed=2)
    x, relevance = random(4, 7), random(3, 4, 7, seed=3)
    functions = (
        lambda x, weight, bias: torch.layer_norm(x, (7,), weight, bias),
        lambda x, weight, bias: torch.layer_norm(x, (7,), weight, bias, 1e-5),
    )
    found = []
    for function in functions:
        op = Op(module_of(function, weight=weight.clone(), bias=bias.clone()), x, kind="norm")
        found.append(NormSigmaConstant().propagate(op.call([x]), relevance)[0])
    assert found[0] is not None and found[1] is not None
    assert_near(found[0], found[1], 1e-14)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("groups", "shape"), [(2, (4, 3)), (3, (9, 5, 7)), (1, (5, 2)), (4, (4, 6))])
def test_group_norms(groups: int, shape: tuple[int, ...], affine: bool) -> None:
    """A layer norm of every group for itself, a channel's weight and bias afterwards."""
    module = nn.GroupNorm(groups, shape[0], eps=1e-3, affine=affine).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=1.0)
    op, x = Op(module, random(2, *shape), kind="norm"), random(3, *shape)
    relevance = op.relevance([x], 2)
    ones, zeros = torch.ones(shape[0], dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
    weight, bias = (module.weight.detach(), module.bias.detach()) if affine else (ones, zeros)
    width = x[0].numel() // groups
    per_entry = [t.repeat_interleave(x[0].numel() // shape[0]).reshape(groups, width) for t in (weight, bias)]
    flat, arriving = x.reshape(3, groups, width), relevance.reshape(2, 3, groups, width)
    centre = torch.eye(width, dtype=torch.float64) - 1.0 / width
    sigma = ((flat @ centre.T).square().mean(-1) + 1e-3).sqrt()
    contributions = per_entry[0][..., None] * centre / sigma[..., None, None] * flat[..., None, :]  # [B, G, i, j]
    s = divide(arriving, contributions.sum(-1) + per_entry[1], NormSigmaConstant().stabiliser)
    expected = (contributions * s[..., None]).sum(-2).reshape(relevance.shape)
    found = NormSigmaConstant().propagate(op.call([x]), relevance)[0]
    assert found is not None
    assert_near(found, expected, 1e-9)
    if affine:
        entry = check_ledger(op, NormSigmaConstant(), [x], relevance, ["bias", "epsilon", "rule"])
        torch.testing.assert_close(entry.absorbed["bias"], (s * per_entry[1]).sum((-2, -1)), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", ["layer-no-bias", "layer-two-axes", "rms-plain"])
def test_gradient(name: str) -> None:
    op, x = norm_op(name), random(2, *NORMS[name][1])
    check_gradient(op, NormSigmaConstant(Stabiliser(0.1)), [x], op.relevance([x], 1))
