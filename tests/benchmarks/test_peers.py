"""The race: rows of every contender, a time for right answers alone, budgets, pictures and the README's table."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.peers import __main__ as command
from benchmarks.peers import child, contenders, packages, proofs, race, timed, truths
from benchmarks.peers.cases import ALL, DEFAULT, MODELS, Case, Point, case_of, proof_of
from benchmarks.peers.child import Contestant, reason
from benchmarks.peers.contenders import CONTENDERS, Contender, Options

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
SMALL = Point("small vit", batch=2, tokens=17)
OPTIONS = Options(rounds=2, budget=1000.0)


class Here:
    """An entrant in this process."""

    def __init__(self, name: str, point: Point, options: Options, proved: str) -> None:
        try:
            self.contestant = Contestant(name, case_of(point), options, proved)
            self.proof, self.first = self.contestant.proof, self.contestant.first()
        except Exception as problem:
            raise race.Out(reason(problem, options)) from problem

        self.given = (name, case_of(point), self.contestant.answers, options)

    def again(self, budget: float) -> float:
        return self.contestant.again()

    def leave(self) -> None: ...

    def close(self) -> None: ...

    def compared(self) -> str:
        try:
            return timed.compare(*self.given)
        except timed.Refused as problem:
            raise race.Out(str(problem)) from problem


def rows_of(names: list[str], point: Point = SMALL, options: Options = OPTIONS) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in race.compete(point, names, options, Here)}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Contender:
    """A contender whose answers are not what they should be."""
    honest = CONTENDERS[name]

    def make(case: Any, options: Options) -> Callable[[], Tensor]:
        run = honest.make(case, options)
        return lambda: change(run())

    return replace(honest, make=make)


def races(monkeypatch: pytest.MonkeyPatch, **known: Contender) -> None:
    """More contenders, by name."""
    for module in ("child", "race", "timed"):
        monkeypatch.setattr(f"benchmarks.peers.{module}.CONTENDERS", {**CONTENDERS, **known})


def test_rows() -> None:
    rows = rows_of(["forward", "forward_backward", "relprop", "relprop_stable", "relprop_attnlrp"])
    for name, row in rows.items():
        assert not row["error"], row
        assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"], name
        assert row["ms_per_sample"] == pytest.approx(row["ms_median"] / 2, abs=0.01)
        assert row["rounds"] == 2 and row["check"] and row["peak_bytes"] >= 0 and row["process_bytes"] > 2**20
    assert rows["forward"]["ratio_to_forward"] == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("relprop", lambda answer: answer * 1.01),
        ("relprop_stable", lambda answer: answer.flip(0)),  # another sample's
        ("relprop_attnlrp", lambda answer: answer.abs()),
        ("relprop_attnlrp", lambda answer: answer[:, 1:]),
        ("forward_backward", lambda answer: -answer),
        ("relprop_ig", lambda answer: answer * 1.1),
        ("relprop", lambda answer: answer * torch.nan),
    ],
)
def test_no_time_for_a_wrong_answer(name: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "STEPS", 8)
    races(monkeypatch, wrong=changed(name, change))
    rows = rows_of(["forward", "wrong"])
    assert rows["wrong"]["error"].startswith("wrong answer: "), rows["wrong"]
    assert all(rows["wrong"][column] == "" for column in race.COLUMNS[:10])
    assert rows["forward"]["ms_median"] > 0


def other_layer(case: Case, options: Options) -> Callable[[], Tensor]:
    before = packages.last_norm
    packages.last_norm = lambda case: case.model.blocks[0].norm1  # type: ignore[attr-defined]
    try:
        return packages.grad_cam(case)
    finally:
        packages.last_norm = before


def other_class(name: str) -> Callable[[Case, Options], Callable[[], Tensor]]:
    """A contender that explains another class."""

    def make(case: Case, options: Options) -> Callable[[], Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packages, "TARGET", 1)
            run = CONTENDERS[name].make(case, options)

        def run_patched() -> Tensor:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(packages, "TARGET", 1)
                return run()

        return run_patched

    return make


@pytest.mark.parametrize(
    ("name", "module", "model"),
    [
        ("grad_cam", "pytorch_grad_cam", "small vit"),
        ("zennit", "zennit", "small vit"),
        ("lxt", "lxt", "torchvision vit_b_16"),  # the one whose methods it puts back
        ("authors", "einops", "small vit"),
        ("captum_lime", "captum", "small vit"),
    ],
)
def test_no_time_for_a_wrong_answer_of_a_package(
    name: str, module: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upside down, of another layer or of another class; the package's own answer has a time."""
    pytest.importorskip(module)
    checkout = os.environ.get("RELPROP_REFERENCE")
    if name == "authors" and not checkout:
        pytest.skip("needs a checkout of the authors' code, named in RELPROP_REFERENCE")
    wrong = {
        "flipped": changed(name, lambda answer: answer.flip(-1)),
        "class": replace(CONTENDERS[name], make=other_class(name)),
        **({"layer": replace(CONTENDERS[name], make=other_layer)} if name == "grad_cam" else {}),
    }
    races(monkeypatch, **wrong)
    options = replace(OPTIONS, reference=Path(checkout) if checkout else None)
    rows = rows_of([name, *wrong], replace(SMALL, model=model, tokens=5 if name == "lxt" else 17), options)
    assert not rows[name]["error"], rows[name]
    for one in wrong:
        assert rows[one]["error"].startswith("wrong answer: "), rows[one]


def test_no_time_for_an_answer_that_cannot_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in its check, and none at all where it is timed."""
    for wrong, message in ((torch.nan, "not finite"), (0.0, "the same everywhere")):
        broken = replace(changed("forward", lambda answer, wrong=wrong: answer * wrong), prove=lambda *given: [])
        races(monkeypatch, wrong=broken)
        assert message in rows_of(["wrong"])["wrong"]["error"]


def last_only(answer: Tensor) -> Tensor:
    return torch.cat([answer[:-1], answer[-1:].flip(1)])


@pytest.mark.parametrize("name", ["forward", "forward_backward", "relprop", "relprop_stable", "relprop_attnlrp"])
@pytest.mark.parametrize("change", [lambda answer: answer.flip(0), lambda answer: answer.flip(1), last_only])
def test_no_time_for_an_answer_that_is_wrong_where_it_is_timed(
    name: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right at the size of its check; wrong at the point's, for all samples or the last alone."""

    def make(case: Case, options: Options) -> Callable[[], Tensor]:
        run = CONTENDERS[name].make(case, options)
        return (lambda: change(run())) if len(case.inputs) > 2 else run

    races(monkeypatch, wrong=replace(CONTENDERS[name], make=make))
    rows = rows_of(["wrong", name], replace(SMALL, batch=3))
    assert rows["wrong"]["error"].startswith("wrong answer where it is timed: "), rows["wrong"]
    assert all(rows["wrong"][column] == "" for column in race.COLUMNS[:11])
    assert "timed answer, first and last sample, against float64" in rows[name]["check"]


def test_no_time_for_an_answer_that_goes_wrong_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that is replayed from a record, when the first run was not."""

    def make(case: Case, options: Options) -> Callable[[], Tensor]:
        run, calls = CONTENDERS["relprop"].make(case, options), iter(range(100))
        return lambda: run().flip(1) if next(calls) > 2 else run()

    races(monkeypatch, wrong=replace(CONTENDERS["relprop"], make=make))
    assert "wrong answer where it is timed" in rows_of(["wrong"])["wrong"]["error"]


def test_what_is_not_compared_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the truth is not affordable, or there is none: the time stands, and its check says what it lacks."""

    def hungry(case: Case) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10000000000 bytes")

    known = timed.TRUTHS["chefer"]
    dear = {"dear": replace(known, passes=1e9), "large": replace(known, ways=(hungry, hungry))}
    second = {"second": replace(known, ways=(hungry, known.ways[0]))}
    monkeypatch.setattr(timed, "TRUTHS", {**timed.TRUTHS, **dear, **second})
    names = {truth or "drawn": replace(CONTENDERS["relprop"], truth=truth) for truth in ("", *dear, *second)}
    races(monkeypatch, **names)
    checks = {name: row["check"].split("; ")[-1] for name, row in rows_of(list(names)).items()}
    assert checks["drawn"] == "the timed answer was not compared: it is drawn at random"
    assert checks["dear"].startswith("the timed answer was not compared: about ")
    assert checks["dear"].endswith(" s in float64, over the budget of 4000 s")
    assert checks["large"] == "the timed answer was not compared: over the memory budget of 5 GiB in float64"
    assert checks["second"].startswith("timed answer, first and last sample, against float64, ")


def test_a_truth_is_computed_once_for_all_that_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [timed.ends(CONTENDERS["relprop"].make(case_of(SMALL), OPTIONS)())]
    first = timed.compare("relprop", case_of(SMALL), answers, OPTIONS, tmp_path)
    monkeypatch.setattr(timed, "_computed", None)
    assert timed.compare("authors", case_of(SMALL), answers, OPTIONS, tmp_path) == first
    wrong = [answers[0], answers[0].flip(0)]
    with pytest.raises(timed.Refused, match="wrong answer where it is timed: timed answer, first and last sample"):
        timed.compare("authors", case_of(SMALL), wrong, OPTIONS, tmp_path)


def test_truths() -> None:
    """Every contender's is known, in every product that it runs in, and its ways agree."""
    case = case_of(SMALL).to(torch.float64)
    for name, contender in CONTENDERS.items():
        if contender.truth:
            for dtype in ("float32", "bfloat16"):
                assert timed.products(contender.make, dtype) in truths.TRUTHS[contender.truth].tolerances, name
    assert timed.products(CONTENDERS["relprop_medium"].make, "float32") == "medium"
    for name, truth in truths.TRUTHS.items():
        if name != "cp_lrp":
            found = [way(case).detach() for way in truth.ways]
            assert all(proofs.same(name, one, found[0]).passed for one in found), name


def test_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*given: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10000000000 bytes")

    broken = replace(CONTENDERS["forward"], make=hungry, prove=lambda *given: [])
    races(monkeypatch, slow=replace(CONTENDERS["forward"], passes=1e9), hungry=broken)
    rows = rows_of(["slow", "hungry"])
    assert "over the budget of 1000 s: about 1e+09 forward passes" in rows["slow"]["error"]
    assert rows["hungry"]["error"] == "over the memory budget of 5 GiB"


def test_a_run_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who would start too late has no row, so that the one it has stays; whoever runs is finished."""
    clock = iter([0.0, 0.0, 10.0, 10.0])
    monkeypatch.setattr(race.time, "monotonic", lambda: next(clock))
    names = ["forward_backward", "relprop_attnlrp", "relprop_stable"]
    rows = race.compete(SMALL, names, OPTIONS, Here, until=5.0)
    assert [row["contender"] for row in rows] == ["forward", "forward_backward", "relprop_attnlrp"]
    assert all(row["rounds"] == 2 for row in rows)


def test_zennit() -> None:
    """The same formula from both, and no row for a model that zennit's hooks fail on."""
    pytest.importorskip("zennit")
    for model in ("small vit", "small bert"):
        rows = rows_of(["relprop_zennit", "zennit"], replace(SMALL, model=model))
        assert not any(row["error"] for row in rows.values()), rows
    with pytest.raises(packages.CannotExplain, match="takes torch.nn.MultiheadAttention for an activation"):
        packages.zennit(proof_of(Point("torchvision vit_b_16", 1, 5)))


def early(heads: nn.Module, side: int = 32) -> Case:
    """A torchvision model: where a LayerNorm comes first, the score changes mostly near the zero image."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(side, 16, 2, 2, 32, 48, num_classes=8).eval()
    model.heads = heads
    return Case(SMALL, "torchvision", model.double(), torch.randn(2, 3, side, side).double())


def test_gradient_shap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer and its draws are right; either of them changed is noticed."""
    pytest.importorskip("captum")
    case = early(nn.Linear(32, 8))
    assert [proof.passed for proof in packages.prove_gradient_shap(packages.gradient_shap, case)] == [True] * 3
    assert not rows_of(["captum_gradient_shap"])["captum_gradient_shap"]["error"]

    def changed_answer(case: Case) -> Callable[[], Tensor]:
        run = packages.gradient_shap(case)
        return lambda: run() * 1.01

    passed = [proof.passed for proof in packages.prove_gradient_shap(changed_answer, case)]
    assert passed == [False, True, True]
    uniform = np.random.uniform
    monkeypatch.setattr(np.random, "uniform", lambda low, high, size: uniform(low, 0.4, size))
    passed = [proof.passed for proof in packages.prove_gradient_shap(packages.gradient_shap, case)]
    assert passed == [True, True, False]


def test_peers_that_are_missing_or_cannot_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    rows = rows_of(["authors", "lxt", "zennit", "captum_ig", "grad_cam"])
    assert "no checkout of the authors' code; name one with --reference" in rows["authors"]["error"]
    assert rows["zennit"]["error"] == "cannot explain: zennit is not installed"
    assert rows["captum_ig"]["error"] == "cannot explain: captum is not installed"
    assert all(row["error"] for name, row in rows.items() if name != "forward")


def test_a_module_that_a_package_wants_and_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an error of the race's: the package has no answer here."""

    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'ttach'", name="ttach")

    monkeypatch.setattr(packages, "version", lambda package: f"{package} 1.0")
    monkeypatch.setattr(packages.importlib, "import_module", missing)
    row = rows_of(["grad_cam"])["grad_cam"]
    assert row["error"] == "cannot explain: grad-cam 1.0 needs ttach, which is not installed"


@pytest.mark.parametrize("model", ["small bert", "small llama"])
def test_texts(model: str) -> None:
    pytest.importorskip("transformers")
    rows = rows_of(["forward_backward", "relprop_stable", "relprop_attnlrp", "grad_cam"], Point(model, 2, 9))
    assert not rows["relprop_attnlrp"]["error"] and not rows["forward_backward"]["error"], rows
    assert bool(rows["relprop_stable"]["error"]) == (model == "small llama"), rows
    assert rows["grad_cam"]["error"] == "cannot explain: pytorch-grad-cam makes maps of images"


def test_proofs_in_float64_are_of_the_cpu_wherever_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on CUDA is proved in float64 by kernels that have it; no CUDA is touched here."""
    cut, options = proof_of(SMALL), replace(OPTIONS, device="cuda")
    ours = [name for name, contender in CONTENDERS.items() if contender.package == "relprop"]
    monkeypatch.setattr(contenders, "native_bfloat16", lambda: False)
    for name in ours:
        if name not in ("relprop_cp_lrp", "relprop_ig"):
            found = CONTENDERS[name].prove(CONTENDERS[name].make, cut, replace(cut, point=SMALL), options)
            assert found and all(proof.passed for proof in found), (name, found)


def test_points() -> None:
    assert {point.model for point in ALL} <= set(MODELS) and set(DEFAULT) < set(ALL)
    assert command.points(command.parsed([])) == list(DEFAULT)
    assert command.points(command.parsed(["--all", "--batches", "32"])) == [p for p in ALL if p.batch == 32]
    with pytest.raises(SystemExit, match="--batches, --dtypes: expected sizes of the plan's points, got others"):
        command.main(["--batches", "32", "--dtypes", "bfloat16"])
    case = case_of(SMALL)
    assert case.model(case.inputs).shape[0] == 2 and case.patches().unique().numel() == 16
    assert torch.equal(case.inputs, case_of(SMALL).inputs)
    cut = proof_of(replace(SMALL, dtype="bfloat16"))
    assert cut.inputs.dtype == torch.float64 and torch.equal(cut.inputs, cut.inputs.bfloat16().double())
    with pytest.raises(ValueError, match="tokens: expected a square and one"):
        case_of(replace(SMALL, tokens=200))
    with pytest.raises(ValueError, match="model: expected one of .*got 'vgg'"):
        case_of(replace(SMALL, model="vgg"))


def test_proofs_can_fail() -> None:
    x = torch.randn(2, 5)
    assert proofs.same("", x, x * (1 + 1e-6)).passed and not proofs.same("", x, x * 1.1).passed
    assert proofs.aligned("", x * 3, x, 1e-3).passed and not proofs.aligned("", x.flip(1), x, 0.1).passed
    assert not proofs.same("", x * torch.nan, x).passed and not proofs.same("", x[:, 1:], x).passed
    assert proofs.complete("", x, x.sum(1), 1e-3).passed and not proofs.complete("", x, x.sum(1) * 1.1, 1e-3).passed
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    assert proofs.centred("", noise).passed and not proofs.centred("", noise + 0.5).passed


def test_command(tmp_path: Path) -> None:
    """Through processes of their own, appended to rows of another point."""
    out = tmp_path / "rows.csv"
    asked = ["--quick", "--tokens", "17", "--rounds", "2", "--contenders", "forward", "relprop", "lxt"]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", *asked, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    with out.open() as stream:
        rows = {row["contender"]: row for row in csv.DictReader(stream)}
    assert set(rows) == {"lxt", "forward", "relprop"}
    assert float(rows["relprop"]["ms_median"]) > 0 and int(rows["relprop"]["process_bytes"]) > 2**20
    assert rows["lxt"]["error"] and not rows["lxt"]["ms_median"]
    assert not command.merged(out, [rows["relprop"]])  # a point measured anew keeps no row of an earlier run
    kept = command.merged(out, [{**rows["relprop"], "tokens": 5}])
    assert [row["contender"] for row in kept] == list(rows)


def test_a_run_with_fewer_contenders_leaves_the_rows_of_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that ran out of time, and one that was asked for fewer, which does not begin."""
    names, ran = ["forward", "relprop", "lxt"], []

    def compete(point: Point, given: Any, options: Any, until: float) -> Any:
        ran.append(given)
        return [{**asdict(point), "contender": name, "error": "none", "note": str(len(ran))} for name in names]

    monkeypatch.setattr(command, "compete", compete)
    out = tmp_path / "rows.csv"
    arguments = ["--quick", "--tokens", "17", "--out", str(out), "--contenders", "relprop", "lxt"]
    assert command.main(arguments) == 0
    del names[1]
    assert command.main(arguments) == 0
    assert f"not written: {out} has relprop at this point" in capsys.readouterr().out
    assert command.main(arguments[:-1]) == 1
    assert f"not started: {out} has lxt at this point too" in capsys.readouterr().out and len(ran) == 2
    names[1:1] = ["relprop", "zennit"]
    assert command.main([*arguments, "zennit"]) == 0
    with out.open() as stream:
        found = [(row["contender"], row["note"]) for row in csv.DictReader(stream)]
    assert found == [(name, "3") for name in names]


def test_a_point_without_a_time_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass's, which says why."""

    def late(*given: Any, **options: Any) -> Any:
        raise race.Out("over the budget: did not prepare within 240 s")

    monkeypatch.setattr(command, "compete", late)
    out = tmp_path / "rows.csv"
    assert command.main(["--quick", "--tokens", "17", "--out", str(out)]) == 1
    with out.open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["contender"], row["error"]) == ("forward", "over the budget: did not prepare within 240 s")
    assert not row["ms_median"]


def test_memory_of_a_gpu_is_limited_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for a GPU of 80 GiB of which this process has 2 reserved."""
    asked: list[float] = []
    gib, options = 2**30, replace(OPTIONS, device="cuda", memory=40.0)
    for name, found in {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * gib),
        "set_per_process_memory_fraction": asked.append,
        "memory_reserved": lambda: 2 * gib,
        "mem_get_info": lambda: (60 * gib, 80 * gib),
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    child._limit(options.memory, "cuda")
    child._limit(1000.0, "cuda")
    assert asked == [0.5, 1.0]
    assert child._own("cuda") == 2 * gib
    full = torch.OutOfMemoryError("CUDA out of memory.")
    assert reason(full, options) == "over the memory budget of 40 GiB"
    assert reason(RuntimeError("Triton Error [CUDA]: out of memory"), options) == "over the memory budget of 40 GiB"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib, 80 * gib))
    assert reason(full, options).startswith("the device's memory was full before the budget of 40 GiB was: CUDA out")


def test_memory_of_a_process_is_limited() -> None:
    lines = "import torch; from benchmarks.peers.child import _limit; _limit(0.1); torch.empty(2**29)"
    ran = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "allocate memory" in ran.stderr
