"""Attention relevance in tiles against the rules that define it, in float64 torch with whole maps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from relprop import native
from relprop.errors import DTypeError, OptionError, ShapeError
from relprop.methods.attention_maps import EDGES
from relprop.rules import EXACT, REFERENCE, Stabiliser
from tests.csrc.attention_checks import (
    CASES,
    ROUGH,
    RULES,
    Case,
    answers,
    case_tensors,
    expected,
    options_of,
    oracle_call,
    reference_output,
)
from tests.rules.rule_checks import assert_near

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

from relprop import _C  # type: ignore[attr-defined]

ISAS: list[str] = _C.build_info()["isas_supported"]
# Sums of a few hundred terms in another order than torch's.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN before the kernel writes them."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        made = empty(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def run(tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor | None]:
    return answers(native.attention_relevance, tensors, **options)


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, part in want.items():
        ours = got[name]
        assert (ours is None) == (part is None), name
        if ours is not None and part is not None:
            assert_near(ours, part, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("qk", RULES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_rules(isa: str, name: str, qk: str, dtype: torch.dtype) -> None:
    case, rule = CASES[name], RULES[qk](ROUGH)
    tensors = case_tensors(case, dtype)
    want = expected(case, rule, tensors, "gradient_x_relevance")
    got = run(tensors, edge="gradient_x_relevance", **options_of(case, rule, dtype, qk))
    assert all(part is None or part.dtype == dtype for part in got.values())
    assert_same(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("half", native.HALF)
@pytest.mark.parametrize("name", CASES)
def test_half_precisions_are_read_as_they_are(
    isa: str, name: str, half: torch.dtype, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's tensors in a half precision, alone or with the streams: the bits of converted ones, and no copies."""
    qk = "positive" if len(name) % 2 else "half"
    case, rule = CASES[name], RULES[qk](ROUGH)
    tensors = case_tensors(case, compute)
    options = options_of(case, rule, compute, qk) | {"exact_output": False, "edge": "gradient_x_relevance"}
    if options.get("mask") is not None and options["mask"].dtype != torch.bool:
        options["mask"] = options["mask"].to(half)
    layer = {n: t.to(half) if n in ("q", "k", "v", "output") else t for n, t in tensors.items()}
    both = layer | {n: tensors[n].to(half) for n in ("gradient", "relevance")}
    for given in (layer, both)[: 1 if compute is torch.float64 else 2]:
        want = run({n: t.to(compute) for n, t in given.items()}, **options)
        dtypes = {n: t.dtype for n, t in given.items()}
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "contiguous", None)
            got = run(given, **options)
        for part, ours in got.items():
            assert ours.dtype is dtypes.get(part.split("_")[0], compute), part
            assert torch.equal(ours, want[part].to(ours.dtype)), part


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ["plain", "grouped", "causal", "seen"])
def test_edges(isa: str, name: str, edge: str) -> None:
    case, rule = CASES[name], RULES["half"](ROUGH)
    tensors = case_tensors(case)
    want = expected(case, rule, tensors, edge)
    assert_same(run(tensors, edge=edge, **options_of(case, rule, torch.float64, "half")), want, 1e-10)
    options = options_of(case, rule, torch.float64, "half")
    only = {"gradient": "gradient" in EDGES[edge], "relevance": "relevance" in EDGES[edge]}
    needed = {n: t for n, t in tensors.items() if only.get(n, True)}
    wanted = {"gradients_wanted": (False,) * 3, "relevances_wanted": (False,) * 3}
    alone = run(needed, edge=edge, **wanted, **options)
    assert alone["row"] is not None and want["row"] is not None
    assert_near(alone["row"], want["row"], 1e-10)
    assert all(part is None for part_name, part in alone.items() if part_name != "row")


def test_a_row_that_targets_share(isa: str) -> None:
    case, rule = CASES["plain"], RULES["half"](ROUGH)
    tensors, options = case_tensors(case), options_of(case, rule, torch.float64, "half")
    tensors["row"] = tensors["row"][:1]
    for edge in EDGES:
        want = expected(case, rule, tensors, edge)["row"]
        got = run(tensors, edge=edge, **options)["row"]
        assert got is not None and want is not None
        assert_near(got, want, 1e-10)


@pytest.mark.parametrize("stabiliser", [Stabiliser(), EXACT, REFERENCE], ids=["signed", "exact", "reference"])
@pytest.mark.parametrize("qk", RULES)
def test_stabilisers_where_products_cancel(isa: str, qk: str, stabiliser: Stabiliser) -> None:
    """Products of small integers cancel to the bit, and outputs are exactly 0."""
    case = Case(70, 53, 1, 2, 2, 4, 4)
    tensors = {name: t.mul(1.5).round() if name in "qkv" else t for name, t in case.tensors().items()}
    tensors["v"][:, 0, :, 1] = 0.0
    output = tensors["output"] = reference_output(case, *(tensors[name] for name in "qkv"))
    assert bool((output == 0).any()) and bool((tensors["q"] @ tensors["k"].mT == 0).any())
    rule = RULES[qk](stabiliser)
    want = expected(case, rule, tensors, None)
    assert_same(run(tensors, **options_of(case, rule, torch.float64, qk)), want, 1e-9)


@pytest.mark.parametrize("qk", RULES)
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
)
def test_only_what_is_wanted(isa: str, wanted: tuple[bool, bool, bool], qk: str) -> None:
    case, rule = CASES["grouped"], RULES[qk](ROUGH)
    tensors, options = case_tensors(case), options_of(case, rule, torch.float64, qk)
    whole = run(tensors, **options)
    part = run(tensors, gradients_wanted=wanted, relevances_wanted=wanted, **options)
    for stream in ("gradient", "relevance"):
        for name, want in zip("qkv", wanted, strict=True):
            ours, all_of_it = part[f"{stream}_{name}"], whole[f"{stream}_{name}"]
            if want and all_of_it is not None:
                assert ours is not None and torch.equal(ours, all_of_it)
            else:
                assert ours is None


@pytest.mark.parametrize("name", ["plain", "causal", "seen", "grouped"])
def test_rounded_output(isa: str, name: str) -> None:
    """Where O was rounded the gradient does not see it; relevance is shared by the rounded O."""
    case, rule = CASES[name], RULES["half"](ROUGH)
    tensors, options = case_tensors(case), options_of(case, rule, torch.float64, "half")
    want = run(tensors, **options)
    rounded = {**tensors, "output": tensors["output"].bfloat16().double()}
    got = run(rounded, exact_output=False, **options)
    for part in "qkv":
        one, other = got[f"gradient_{part}"], want[f"gradient_{part}"]
        assert one is not None and other is not None
        assert_near(one, other, 1e-10)
    call = oracle_call(case, *(tensors[part] for part in "qkv"))
    call.tensors[4] = rounded["output"]
    for part, relevance in zip("qkv", rule.propagate(call, tensors["relevance"]), strict=False):
        ours = got[f"relevance_{part}"]
        assert ours is not None and relevance is not None
        assert_near(ours, relevance, 1e-10)
    alone = {n: t for n, t in tensors.items() if n not in ("relevance", "output")}
    without = run(alone, **options)
    assert_same(
        {n: p for n, p in without.items() if "grad" in n}, {n: p for n, p in want.items() if "grad" in n}, 1e-10
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strided_inputs_are_read_in_place(isa: str, dtype: torch.dtype) -> None:
    case, rule = Case(65, 65, 2, 4, 4, 16, 16), RULES["half"](ROUGH)
    tensors, options = case_tensors(case, dtype), options_of(case, rule, dtype, "half")
    want = run(tensors, **options)
    packed = torch.stack([tensors[n].transpose(1, 2) for n in "qkv"], 2)  # [B, N, 3, H, d], as one projection gives it
    views = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4).unbind(0), strict=True))
    for name in ("gradient", "relevance"):
        views[name] = tensors[name].transpose(2, 3).contiguous().transpose(2, 3)
    views["output"] = tensors["output"].transpose(1, 2).contiguous().transpose(1, 2)
    got = run({**tensors, **views}, **options)
    for name, part in want.items():
        ours = got[name]
        assert ours is not None and part is not None and torch.equal(ours, part)
    spread = {n: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for n, t in tensors.items()}
    for name, part in run(spread, **options).items():
        assert part is not None and torch.equal(part, want[name])


@pytest.mark.parametrize("case", [CASES["grouped"], Case(700, 900, 1, 1, 1, 8, 8), Case(300, 333, 1, 4, 2, 8, 8)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    rule = RULES["positive"](ROUGH)
    tensors, options = case_tensors(case, dtype), options_of(case, rule, dtype, "positive")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5, 40):
            torch.set_num_threads(threads)
            found.append(run(tensors, edge="gradient_x_relevance", **options))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, part in found[0].items():
            ours = other[name]
            assert ours is not None and part is not None and torch.equal(ours, part), name


@pytest.mark.skipif("avx512" not in ISAS, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_same_bits_on_instruction_sets_that_fuse(dtype: torch.dtype) -> None:
    case, rule = CASES["padding"], RULES["positive"](ROUGH)
    tensors, options = case_tensors(case, dtype), options_of(case, rule, dtype, "positive")
    found = []
    for name in ("avx2", "avx512"):
        _C.set_isa(name)
        found.append(run(tensors, edge="gradient_x_relevance", **options))
    _C.set_isa("")
    for name, part in found[0].items():
        other = found[1][name]
        assert part is not None and other is not None and torch.equal(part, other), name


def test_each_sample_and_target_as_if_alone() -> None:
    case, rule = CASES["padding"], RULES["half"](ROUGH)
    tensors = case_tensors(case, torch.float32)
    options = options_of(case, rule, torch.float32, "half")
    whole = run(tensors, edge="relevance", **options)
    per_target = ("gradient", "relevance", "row")
    for sample in range(case.batch):
        for target in range(case.targets):
            at = slice(sample, sample + 1)
            alone = {n: t[target : target + 1, at] if n in per_target else t[at] for n, t in tensors.items()}
            got = run(alone, edge="relevance", **{**options, "mask": options["mask"][at]})
            for name, part in got.items():
                everything = whole[name]
                assert part is not None and everything is not None
                assert torch.equal(part, everything[target : target + 1, at]), name


@pytest.mark.parametrize("at", ["q", "k", "v", "relevance", "gradient"])
def test_nan_stays(isa: str, at: str) -> None:
    case, rule = CASES["plain"], RULES["half"](ROUGH)
    tensors, options = case_tensors(case), options_of(case, rule, torch.float64, "half")
    tensors[at].view(-1)[0] = torch.nan
    tensors["output"] = reference_output(case, *(tensors[n] for n in "qkv"))
    got = run(tensors, edge="gradient_x_relevance", **options)["row"]
    assert got is not None and bool(got.isnan().any())


@pytest.mark.parametrize("change", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"targets": 0}])
def test_nothing_to_do(change: dict[str, int]) -> None:
    case, rule = replace(CASES["plain"], **change), RULES["half"](ROUGH)  # type: ignore[arg-type]
    tensors, options = case_tensors(case), options_of(case, rule, torch.float64, "half")
    got = run(tensors, edge="relevance", **options)
    for name, part in got.items():
        assert part is not None and torch.equal(part, torch.zeros_like(part)), name
    assert got["gradient_q"] is not None
    assert got["gradient_q"].shape == (case.targets, case.batch, case.heads, case.queries, case.d)


MEMORY = """
import resource, sys, torch
from relprop import native
torch.set_num_threads(2)
n, heads, width = int(sys.argv[1]), 2, 32
qkv = torch.randn(1, n, 3, heads, width)
q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
streams = [torch.randn(1, 1, heads, n, width) for _ in range(2)]
output, row = torch.randn(1, heads, n, width), torch.rand(1, 1, n)
native.attention_relevance(q[:, :, :8], k[:, :, :8], v[:, :, :8], scale=1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
native.attention_relevance(
    q, k, v, scale=0.2, output=output, gradient=streams[0], relevance=streams[1], edge="gradient_x_relevance", row=row
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """One map of 8192 x 8192 for two heads would be 512 MB."""
    used = []
    for n in (2048, 8192):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(n)], capture_output=True, text=True, check=True)
        used.append(int(done.stdout) / 1024)
    assert used[1] < 64, used
    assert used[1] < 6 * max(used[0], 8), used


def message(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def test_errors() -> None:
    case, rule = CASES["plain"], RULES["half"](ROUGH)
    tensors, options = case_tensors(case), options_of(case, rule, torch.float64, "half")

    def changed(**new: Any) -> Callable[[], object]:
        given = {**tensors, **{n: t for n, t in new.items() if n in tensors}}
        rest = {n: t for n, t in new.items() if n not in tensors}
        return lambda: run({n: t for n, t in given.items() if t is not None}, **{**options, **rest})

    q, k, v = (tensors[n] for n in "qkv")
    assert message(ShapeError, changed(q=q[0])) == "q: expected shape [B, H, N, d], got [3, 5, 4]"
    assert message(ShapeError, changed(k=k[..., :2])) == "k: expected shape [2, 3, 7, 4], got [2, 3, 7, 2]"
    assert message(ShapeError, changed(v=v[:, :, 1:])) == "v: expected shape [2, 3, 7, 6], got [2, 3, 6, 6]"
    assert message(DTypeError, changed(v=v.float())) == (
        "v: expected torch.float64, torch.bfloat16 or torch.float16, got torch.float32"
    )
    assert message(ShapeError, changed(k=k[:, :2], v=v[:, :2])) == (
        "k: expected a number of heads that divides 3, got 2"
    )
    assert message(ShapeError, changed(relevance=tensors["relevance"][:1])) == (
        "relevance: expected shape [2, 2, 3, 5, 6], got [1, 2, 3, 5, 6]"
    )
    assert message(ShapeError, changed(mask=torch.ones(4, 7, dtype=torch.bool))) == (
        "mask: expected a shape that broadcasts to [2, 3, 5, 7], got [4, 7]"
    )
    assert message(DTypeError, changed(mask=torch.ones(5, 7))) == (
        "mask: expected torch.bool, torch.float64, torch.bfloat16 or torch.float16, got torch.float32"
    )
    assert message(OptionError, changed(output=None)) == (
        "output: expected a tensor, which the relevance stream needs, got None"
    )
    assert message(OptionError, changed(qk="whole")) == "qk: expected one of half, positive, detached, got 'whole'"
    assert "edge: expected one of gradient_x_relevance, " in message(OptionError, changed(edge="gradient"))
    assert message(ShapeError, changed(edge="relevance", row=tensors["row"][..., 1:])) == (
        "row: expected shape [2, 2, 5], got [2, 2, 4]"
    )
    bare = {n: t for n, t in tensors.items() if n != "gradient"}
    assert message(OptionError, lambda: run(bare, edge="gradient_x_relevance", **options)) == (
        "gradient: expected a tensor, which the edge 'gradient_x_relevance' needs, got None"
    )
