"""The CUDA backend's kernels, run by the host emulation, against the rules on captured operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop import native_cuda
from relprop.backends import choices, choose_kernels, cuda
from relprop.errors import BackendError, OptionError
from relprop.ops import on_gpu
from relprop.program import JointStream, Kernels
from relprop.rules import (
    EXACT,
    REFERENCE,
    AddEpsilon,
    AddGamma,
    AddNormalised,
    AttentionComposed,
    FanoutEpsilon,
    Gradient,
    LinearAlphaBeta,
    LinearEpsilon,
    LinearGamma,
    MatmulHalf,
    Rule,
    SoftmaxDetached,
    SoftmaxTaylor,
    Stabiliser,
)
from tests.backend_checks import check_method, check_whole_explanation
from tests.engine.models import vit
from tests.rules.rule_checks import Op, assert_near, assert_parts, each, module_of, random

pytestmark = pytest.mark.usefixtures("results")

# The same formulas in another order of additions; denominators are those of random inputs, some of which nearly cancel.
TOLERANCE = 1e-3

LINEAR: tuple[Rule, ...] = (
    LinearAlphaBeta(),
    LinearAlphaBeta(2.0, 1.0, REFERENCE),
    LinearEpsilon(),
    LinearEpsilon(REFERENCE, bias=False),
    LinearGamma(),
    LinearGamma(0.5, EXACT, bias=False),
    Gradient(),
)
ADD = (AddEpsilon(), AddGamma(2.0, EXACT), AddNormalised(REFERENCE))
HALVES = AttentionComposed(qk=MatmulHalf(Stabiliser(1e-3)), av=MatmulHalf(Stabiliser(1e-3)))


DETACHED = AttentionComposed(MatmulHalf(Stabiliser(1e-3)), SoftmaxDetached(), MatmulHalf(Stabiliser(1e-3)))


def attend(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, q + 1, q * 2)


# What makes the operation, the shapes of its inputs without their batch, its kind, and the rules to try.
CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], str, tuple[Rule, ...]]] = {
    "linear": (lambda: nn.Linear(63, 7), [(5, 63)], "linear", LINEAR),
    "linear without bias": (lambda: nn.Linear(40, 33, bias=False), [(40,)], "linear", LINEAR),
    "add": (lambda: module_of(lambda a, b: a + b, 2), [(3, 63), (3, 63)], "add", ADD),
    "positional": (lambda: module_of(lambda a, p: a + p, 1, p=random(1, 3, 7)), [(3, 7)], "add", ADD),
    "positional, first": (lambda: module_of(lambda a, p: p + a, 1, p=random(1, 3, 7)), [(3, 7)], "add", ADD),
    "fan-out": (lambda: module_of(lambda a: a + a.softmax(-1)), [(63,)], "fanout", (FanoutEpsilon(REFERENCE),)),
    "softmax": (lambda: module_of(lambda a: a.softmax(-1)), [(3, 7)], "softmax", (SoftmaxTaylor(),)),
    "layer norm": (lambda: nn.LayerNorm(63), [(3, 63)], "norm", (Gradient(),)),
    "plain layer norm of two axes": (
        lambda: nn.LayerNorm((3, 7), elementwise_affine=False),
        [(2, 3, 7)],
        "norm",
        (Gradient(),),
    ),
    "rms norm": (lambda: nn.RMSNorm(63), [(3, 63)], "norm", (Gradient(),)),
    "gelu": (nn.GELU, [(3, 63)], "activation", (Gradient(),)),
    "gelu, tanh": (lambda: nn.GELU("tanh"), [(3, 63)], "activation", (Gradient(),)),
    "silu": (nn.SiLU, [(3, 63)], "activation", (Gradient(),)),
    "attention": (lambda: module_of(attend), [(5, 8)], "attention", (HALVES,)),
}
PAIRS = [(name, rule) for name, case in CASES.items() for rule in case[3]]
NAMES = [f"{name} {type(rule).__name__} {i}" for i, (name, rule) in enumerate(PAIRS)]


@functools.cache
def op_of(name: str) -> Op:
    torch.manual_seed(0)
    make, shapes, kind, _ = CASES[name]
    return Op(make(), *[random(2, *shape, seed=i) for i, shape in enumerate(shapes)], kind=kind)


def inputs_of(name: str, batch: int) -> list[Tensor]:
    return [random(batch, *shape, seed=batch + i) for i, shape in enumerate(CASES[name][1])]


@pytest.mark.parametrize(("name", "rule"), PAIRS, ids=NAMES)
def test_kernel_equals_rule(name: str, rule: Rule) -> None:
    op, inputs = op_of(name), inputs_of(name, 3)
    assert cuda.kernel_reasons(op.node, rule) == []
    relevance = each(Tensor.float, op.relevance(inputs, 2))
    kernel = cuda.KERNELS[type(rule)]
    calls = [op.call(inputs, torch.float32) for _ in range(2)]
    got, want = kernel(rule, calls[0], relevance), rule.propagate(calls[1], relevance)
    assert_parts(got, want, TOLERANCE)
    assert all(part is None or part.dtype is torch.float32 for part in got)
    for key, found in calls[0].maps.items():
        assert_parts((found,), (calls[1].maps[key],), TOLERANCE)


class ManyReaders(nn.Module):
    """A value that several layers read, as decoder layers read an encoder's output."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.readers = nn.ModuleList(nn.Linear(6, 4) for _ in range(readers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.stack([reader(x) for reader in self.readers]).sum(0)


def test_more_readers_than_the_kernel_takes() -> None:
    """Plain rules take the step."""
    x, most = random(2, 6).float(), native_cuda.most_readers()
    for readers in (most, most + 1):
        model = ManyReaders(readers).eval()
        engines = [relprop.compile(model, (x,), method="full", backend=name) for name in ("cuda", "torch")]
        (step,) = [step for step in engines[0].program.reverse if step.node.kind == "fanout"]
        assert len(step.node.outputs) == readers
        assert {stream.backend for stream in step.streams} == {"cuda" if readers == most else "torch"}
        assert_near(*(engine(x, target=1).relevance for engine in engines), 1e-3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "rule"), PAIRS, ids=NAMES)
def test_half_precision_models(name: str, rule: Rule, half: torch.dtype) -> None:
    """Saved tensors and weights as they are, streams in float32, results as of the rule on casts."""
    op, inputs = op_of(name), inputs_of(name, 3)
    calls = [op.call(inputs, half) for _ in range(2)]
    for call in calls:
        call.dtype = torch.float32
    relevance = each(Tensor.float, op.relevance(inputs, 2))
    got, want = cuda.KERNELS[type(rule)](rule, calls[0], relevance), rule.propagate(calls[1], relevance)
    assert_parts(got, want, 5e-3 if name.startswith("linear") else TOLERANCE)  # z near 0, summed twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_every_precision_has_its_products(precision: str, dtype: torch.dtype) -> None:
    op, inputs, rule = op_of("linear"), inputs_of("linear", 3), LinearAlphaBeta()
    calls = [op.call(inputs, dtype) for _ in range(2)]
    for call in calls:
        call.dtype = torch.float32
    calls[0].precision = precision
    relevance = op.relevance(inputs, 2).float()
    got, want = cuda.linear(rule, calls[0], relevance)[0], rule.propagate(calls[1], relevance)[0]
    assert got is not None and want is not None
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.999


def test_a_gradient_needs_no_layer_input() -> None:
    """A plan keeps what rules need, and the gradient of a linear layer is its weight's alone."""
    op, inputs = op_of("linear"), inputs_of("linear", 3)
    relevance, call = op.relevance(inputs, 2).float(), op.call(inputs, torch.float32)
    want = Gradient().propagate(op.call(inputs, torch.float32), relevance)
    del call.tensors[op.node.operands[0].index]
    assert_parts(cuda.gradient(Gradient(), call, relevance), want, TOLERANCE)
    weight = call.tensors[op.node.operands[1].index]
    with pytest.raises(OptionError, match=r"^x: expected a tensor, which backs\[0\].factor1 needs, got None$"):
        native_cuda.linear_back([native_cuda.Back(relevance, None, 1.0)], None, weight, product="float32")


def test_streams_of_a_linear_layer_share_a_launch(cuda_module: Any) -> None:
    op, inputs = op_of("linear"), inputs_of("linear", 3)
    rules = {"gradient": Gradient(), "relevance": LinearAlphaBeta(2.0, 1.0)}
    assert cuda.joint_reasons(op.node, rules, None, torch.device("cpu")) == []
    streams = {
        name: JointStream(rule, op.relevance(inputs, 2, seed=i).float(), (True, False, False))
        for i, (name, rule) in enumerate(rules.items())
    }
    before = cuda_module.launches()
    passed, row = cuda.joint_linear(op.call(inputs, torch.float32), streams, None, None)
    assert row is None and cuda_module.launches() - before == 2  # one share-out, one way back
    for name, stream in streams.items():
        want = stream.rule.propagate(op.call(inputs, torch.float32), stream.arrived)
        assert_parts(passed[name], want, TOLERANCE)


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", [HALVES, DETACHED, None], ids=["half", "detached", "gradient alone"])
def test_attention_in_tiles(rules: Rule | None, half: torch.dtype) -> None:
    """Both streams and the walked row, as the rules and whole maps give them."""
    op, inputs = op_of("attention"), inputs_of("attention", 3)
    by_stream = {"gradient": Gradient(), **({} if rules is None else {"relevance": rules})}
    edge = "gradient_x_attention" if rules is None else "gradient_x_relevance"
    assert cuda.joint_kernel(op.node, by_stream, edge, torch.device("cpu")) is cuda.attention
    calls = [op.call(inputs, half) for _ in range(2)]
    for call in calls:
        call.dtype = torch.float32
    streams = {
        name: JointStream(rule, op.relevance(inputs, 2, seed=i).float(), (True, True, True, False))
        for i, (name, rule) in enumerate(by_stream.items())
    }
    row = random(2, 3, 5).float().abs()
    passed, walked = cuda.attention(calls[0], streams, edge, row)
    tolerance = TOLERANCE if half == torch.float32 else 2e-2  # factors in bfloat16
    for name, stream in streams.items():
        assert_parts(passed[name], stream.rule.propagate(calls[1], stream.arrived), tolerance)
    maps = calls[1].maps
    whole = (maps["gradient"] * maps["attention" if rules is None else "relevance"]).clamp(min=0).mean(2)
    assert_parts((walked,), ((row.unsqueeze(-2) @ whole).squeeze(-2),), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
def test_whole_explanation(composite: str, dtype: torch.dtype) -> None:
    check_whole_explanation("cuda", composite, dtype)


@pytest.mark.parametrize("method", ["attention_rollout", "relevance_rollout", "attention_gradcam"])
def test_other_methods(method: str) -> None:
    check_method("cuda", method)


def test_only_an_explicit_choice_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is chosen unasked that was not measured: not on a GPU, and not where the emulation stands in."""
    assert relprop.backends()["cuda"] == "available"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choices, "table", dict)
    assert choose_kernels("auto", torch.float32, torch.device("cuda")) == Kernels()
    model, images = vit(depth=1).float(), random(2, 3, 32, 32).float()
    program = relprop.compile(model, (images,)).program
    assert "cuda" not in {stream.backend for step in program.reverse for stream in step.streams}


def test_heads_that_a_device_has_no_shared_memory_for(little_memory: None) -> None:
    module, cpu = module_of(lambda x: attend(x).relu()), torch.device("cpu")
    fits, wide = (Op(module, random(2, 5, width), kind="attention").node for width in (288, 320))
    assert cuda.joint_reasons(fits, {"gradient": Gradient()}, None, cpu) == []
    assert cuda.joint_reasons(wide, {"gradient": Gradient()}, None, cpu) == [
        "the joint kernel takes heads of at most 144 channels on cpu, not 160"
    ]
    q = {"q": torch.zeros(1, 1, 2, 160), "k": torch.zeros(1, 1, 2, 160), "v": torch.zeros(1, 1, 2, 160)}
    assert not on_gpu._cuda_takes("attention_relevance", q)
    assert on_gpu._cuda_takes("attention_relevance", {name: t[..., :144] for name, t in q.items()})


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    op, wide = op_of("linear"), Op(module_of(lambda x: attend(x).relu()), random(2, 5, 520), kind="attention")
    assert cuda.joint_reasons(op.node, {"gradient": Gradient()}, None, cpu) == [
        "the joint kernels are for attention and for several streams of a linear layer"
    ]
    assert cuda.joint_reasons(wide.node, {"gradient": Gradient()}, None, cpu) == [
        "the joint kernel takes heads of at most 256 channels on cpu, not 260"
    ]
    assert cuda.joint_kernel(wide.node, {"gradient": Gradient()}, None, cpu) is None
    monkeypatch.setattr(native_cuda.call, "_cuda", native_cuda.call._Missing("an import error: no such file"))
    reasons = [
        "the compiled module relprop._cuda cannot be used: an import error: no such file",
        "its kernels run on a GPU, not on cpu",
        "its kernels take streams in torch.float32, not torch.float64",
    ]
    assert cuda.reasons_against(torch.float64, torch.device("cpu")) == reasons
    assert relprop.backends()["cuda"] == f"unavailable: {reasons[0]}"
    with pytest.raises(BackendError) as raised:
        relprop.compile(vit(depth=1).double(), (random(2, 3, 32, 32),), backend="cuda")
    assert str(raised.value) == ("backend cuda: expected to run on cpu in torch.float64, but " + "; ".join(reasons))


def test_a_missing_module_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda.call, "_cuda", native_cuda.call._Missing("an import error: no such file"))
    assert native_cuda.available() == (
        False,
        "the compiled module relprop._cuda cannot be used: an import error: no such file",
    )
    with pytest.raises(native_cuda.call.BackendError, match="backend cuda: expected the compiled module relprop._cuda"):
        native_cuda.share(torch.ones(1, 2), torch.ones(2), stabiliser=(0, 0.0))
