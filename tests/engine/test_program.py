"""The program: a table that says what runs, lifetimes that hold, no work that is not needed."""

from __future__ import annotations

import pytest
import torch

import relprop
from relprop.execute import run_forward
from relprop.weights import DerivedWeights, DeriveOnce
from tests.engine.models import vit

IMAGES = torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module")
def engine() -> relprop.Engine:
    return relprop.compile(vit(), (IMAGES,), backend="cpp")


def test_the_table_names_everything(engine: relprop.Engine) -> None:
    text = str(engine.program)
    for word in ("forward", "reverse", "step", "op", "module", "stream", "rule", "backend", "kept tensors", "rows"):
        assert word in text
    for word in ("MFLOP", "kB", "blocks.1.attn.qkv", "alpha_beta", "normalised", "gradient", "relevance", "cpp"):
        assert word in text
    assert "residual" in text and "z_box" not in text  # the patch embedding lies below the last step


def test_flops_are_counted_from_shapes(engine: relprop.Engine) -> None:
    tokens, dim, heads, size, depth = 17, 48, 4, 12, 3
    block = 2 * tokens * dim * dim * 12
    attention = 4 * heads * tokens * tokens * size
    last = 2 * tokens * dim * 3 * dim + 2 * dim * dim * 9 + 4 * heads * tokens * size
    patches = 2 * 16 * dim * 3 * 64
    expected = (depth - 1) * (block + attention) + last + patches + 2 * dim * 10
    assert engine.program.flops()["forward"] == expected


def test_nothing_below_the_first_map(engine: relprop.Engine) -> None:
    modules = [step.node.module for step in engine.program.reverse]
    assert modules[-1] == "blocks.0.attn"
    assert "blocks.0.attn.qkv" not in modules and "patch_embed.proj" not in modules
    first = engine.program.reverse[-1]
    assert all(not any(stream.wanted) for stream in first.streams)  # no relevance of q, k, v
    later = relprop.compile(vit(), (IMAGES,), method_options={"start_layer": 2}).program
    assert [s.node.module for s in later.reverse][-1] == "blocks.2.attn"


def test_streams_run_only_where_needed() -> None:
    rollout = relprop.compile(vit(), (IMAGES,), method="attention_rollout").program
    assert rollout.seeds == () and all(not step.streams for step in rollout.reverse)
    cam = relprop.compile(vit(), (IMAGES,), method="attention_gradcam").program
    assert cam.seeds == ("gradient",)
    full = relprop.compile(vit(), (IMAGES,), method="full").program
    assert full.seeds == ("relevance",)


@pytest.mark.parametrize("method", ["transformer_attribution", "full", "attention_rollout", "gradient_x_input"])
def test_lifetimes(method: str) -> None:
    """The forward pass keeps what the plan names and nothing else; the sweep frees all of it."""
    model = vit()
    engine = relprop.compile(model, (IMAGES,), method=method)
    program, graph = engine.program, engine.program.graph
    bound = {**engine._bind((IMAGES,), {}), **engine._weights.read(), **graph.constants}
    with torch.no_grad():
        forward = run_forward(program, bound, DeriveOnce(graph, engine._weights.derived))
    outside = set(bound)
    left = {i for i in forward.tensors if i not in outside and graph.values[i].carrying}
    kept = {v.index for v in program.kept} | {graph.output.index} | {v.index for v, _ in program.requirements.values}
    assert left <= kept
    freed = [i for step in program.reverse for i in step.frees]
    assert len(freed) == len(set(freed))
    assert {v.index for v in program.kept} <= set(freed)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("method", ["transformer_attribution", "full", "attnlrp", "gradient_x_input"])
def test_rematerialised(method: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made again is what was there before, to the bit, and is not kept in between."""
    images, latents = torch.randn(3, 3, 32, 32), ["blocks.1.mlp.act"] if method == "attnlrp" else []
    engine = relprop.compile(vit(), (images,), method=method, backend=backend, latents=latents)
    monkeypatch.setattr("relprop.program.rematerialised", lambda *given: [])
    keeping = relprop.compile(vit(), (images,), method=method, backend=backend, latents=latents)
    found, expected = engine(images, target=[[1, 4]] * 3), keeping(images, target=[[1, 4]] * 3)
    assert torch.equal(found.relevance, expected.relevance)
    made = [again.node for step in engine.program.reverse for again in step.remakes]
    assert not any(step.remakes for step in keeping.program.reverse)
    assert len(made) == len(set(made)) and {node.kind for node in made} <= {"activation", "norm"}
    assert not {node.outputs[0] for node in made} & set(engine.program.kept)
    if method in ("transformer_attribution", "full"):
        assert {node.module for node in made if node.kind == "activation"} >= {"blocks.1.mlp.act", "blocks.2.mlp.act"}
        assert len(engine.program.kept) == len(keeping.program.kept) - len(made)
        assert engine.memory(8) < 0.95 * keeping.memory(8)
        assert " (again)" in str(engine.program)
    if latents:
        name = "blocks.1.mlp.act"
        assert torch.equal(found.at(name).relevance, expected.at(name).relevance)


def test_memory_does_not_grow_over_calls(engine: relprop.Engine) -> None:
    import gc

    def tensors() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)

    for _ in range(3):  # the second call of a shape records it, the third gets the memory of its replays
        engine(IMAGES)
    before = tensors()
    for _ in range(5):
        engine(IMAGES)
    assert tensors() <= before


def test_backends_are_said_and_agree() -> None:
    model, x = vit().double(), IMAGES.double()
    plain = relprop.compile(model, (x,), backend="torch")
    fused = relprop.compile(model, (x,), backend="cpp")
    assert {s.backend for step in plain.program.reverse for s in step.streams} == {"torch"}
    assert {s.backend for step in fused.program.reverse for s in step.streams} == {"torch", "cpp"}
    assert torch.allclose(plain(x).relevance, fused(x).relevance, rtol=1e-9, atol=1e-12)
    assert relprop.backends()["torch"] == "available"


def test_differentiable() -> None:
    """The torch backend's sweep is made of differentiable operations: a gradient reaches the weights."""
    from relprop.execute import Sweep
    from relprop.methods import Reading

    model = vit(depth=2).double()
    x = IMAGES.double()
    engine = relprop.compile(model, (x,), backend="torch", composite="chefer_stable", method="full")
    program, graph = engine.program, engine.program.graph
    weight = model.blocks[0].mlp.fc1.weight

    def answer() -> torch.Tensor:
        bound = {**engine._bind((x,), {}), **engine._weights.read(), **graph.constants}
        forward = run_forward(program, bound, DeriveOnce(graph, engine._weights.derived))
        reading = Reading(2, 1)
        for value, _ in program.requirements.values:
            reading.inputs[value] = forward.tensors[value.index]
        reader = program.readout.reader()
        sweep = Sweep(
            program, forward, DeriveOnce(graph, DerivedWeights()), reading, reader, torch.float64, "highest", False
        )
        sweep.run(torch.eye(10, dtype=torch.float64)[3].expand(1, 2, 10))
        return reader.finish(reading)[0, 0, 3:9, 5].sum()

    (found,) = torch.autograd.grad(answer(), weight)
    step = torch.randn_like(weight)
    step /= step.norm()
    with torch.no_grad():
        size = 1e-6
        weight.add_(size * step)
        above = answer()
        weight.sub_(2 * size * step)
        below = answer()
        weight.add_(size * step)
    expected = (above - below) / (2 * size)
    assert torch.allclose((found * step).sum(), expected, rtol=1e-4)


def test_nodes_and_values_print_in_a_line(engine: relprop.Engine) -> None:
    """A traceback prints arguments: a node's fields lead to every node before it, many times over."""
    last = engine.program.reverse[0].node
    for printed in (repr(last), repr(last.outputs[0])):
        assert len(printed) < 200 and "\n" not in printed
    assert repr(last) == f"<Node {last.kind}: {last.describe()}>"
