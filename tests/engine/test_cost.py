"""What a step costs: the products of the method, and those that its kernels make."""

from __future__ import annotations

import pytest
import torch

import relprop
from relprop.cost import H200, Ceilings, forward_flops, predict, tiled_attention_products
from relprop.engine import Engine
from tests.engine.models import vit


def engine_of(dtype: torch.dtype, **options: object) -> Engine:
    given = torch.randn(2, 3, 32, 32, dtype=dtype)
    return relprop.compile(vit().to(dtype), (given,), backend="torch", **options)  # type: ignore[arg-type]


def units(engine: Engine, kind: str, **options: object) -> list[tuple[str, float, float]]:
    """Streams, and products in units of the forward's, of the method and executed, per reverse step."""
    symbols, found = engine.program.batch_symbols, []
    for step in predict(engine.program, H200, 1, **options):  # type: ignore[arg-type]
        if step.phase == "reverse" and step.node.kind == kind and step.streams:
            one = forward_flops(step.node, symbols)
            found.append((step.streams, step.flops / one, step.executed / one))
    return found


@pytest.mark.parametrize(("dtype", "extra"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=str)
def test_a_rounded_output_is_made_again(dtype: torch.dtype, extra: int) -> None:
    both = [step for step in units(engine_of(dtype), "linear") if step[0] == "gradient + relevance"]
    assert both and all(found[1:] == (4, 4 + extra) for found in both)
    gradients = units(engine_of(dtype, method="attention_gradcam"), "linear")
    assert gradients and all(found[1:] == (1, 1) for found in gradients)


def test_targets_share_what_is_shared_out() -> None:
    """|x||w| and x w once, then x (s w), |x| (s |w|) and g w for each target."""
    both = [step for step in units(engine_of(torch.bfloat16), "linear", targets=3) if step[0] == "gradient + relevance"]
    assert both and all(found[1:] == (12, 2 + 3 * 3) for found in both)


def test_attention_in_tiles() -> None:
    """q k three times, both streams' maps twice and their six sums: 13 products, of which two are a forward pass."""
    engine = engine_of(torch.bfloat16)
    own, tiled = (units(engine, "attention", **given) for given in ({}, {"kernels": "triton"}))
    inner = [i for i, step in enumerate(own) if step[1] == 5]
    assert inner and all(own[i][2] == 5 and tiled[i][2] == 6.5 for i in inner)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (((True,) * 3, (True,) * 3, "half", ("gradient", "relevance"), 64, 3), 1 + 3 * 12),
        (((True,) * 3, (True,) * 3, "half", ("gradient", "relevance"), 128), 14),  # values in a launch of their own
        (((True,) * 3, (), "half", (), 64), 1 + 3 + 4),  # q k, map, sum; q k, map, two sums
        (((True,) * 3, (False, False, True), "none", ("gradient", "attention"), 64), 1 + 3 + 5),
        (((), (True,) * 3, "alpha_beta", (), 64), 1 + 6 + 6 + 2),  # q k, map, z+ twice, two sums; likewise; the values
        (((), (), "half", ("attention",), 64), 2),
    ],
)
def test_products_of_attention(given: tuple, count: int) -> None:  # type: ignore[type-arg]
    assert tiled_attention_products(*given) == count


def test_time_follows_what_is_executed() -> None:
    slow = Ceilings("slow products", "made up", flops=1e9, bandwidth=1e30)
    rated = [step for step in predict(engine_of(torch.bfloat16).program, slow, 2) if step.flops]
    assert any(step.executed > step.flops for step in rated)
    assert all(step.seconds == step.executed / 1e9 and step.bound(slow) == "rate" for step in rated)
