"""The accuracy tables: their functions run, and the committed rows meet the bars they are held to."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.numerics import (
    conditioning,
    family_parity,
    float32_parity,
    localisation,
    reference,
    stable_composite,
    trust_check,
)
from benchmarks.numerics.intervals import clustered_geometric_mean, geometric_mean, mean, wilson
from benchmarks.numerics.models import SHAPES, random_case, relative_error, spread, trained_available
from benchmarks.numerics.rows import RESULTS, kept_rows, markdown, read_rows, write_rows
from relprop.trust import THRESHOLD

NEEDS_WEIGHTS = pytest.mark.skipif(not trained_available(), reason="the demo weights are not there")


def rows_of(name: str) -> list[dict[str, str]]:
    path = RESULTS / f"{name}.csv"
    assert path.is_file(), f"expected committed rows at {path}; run python -m benchmarks.numerics.{name}"
    rows = read_rows(path)
    for row in rows:
        assert row["device"] and row["torch"] and row["commit"] and row["date"]
    return rows


def wilson_lower(hits: int, total: int) -> float:
    """The bound by its definition: the least p whose score test does not reject; found by bisection."""
    z, low, high = NormalDist().inv_cdf(0.975), 0.0, hits / total
    for _ in range(100):
        p = (low + high) / 2
        rejected = (hits / total - p) > z * math.sqrt(p * (1 - p) / total)
        low, high = (p, high) if rejected else (low, p)
    return high


# Intervals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "total"), [(0, 7), (7, 7), (450, 470), (1, 400), (93, 100)])
def test_wilson_is_the_inverted_score_test(hits: int, total: int) -> None:
    found = wilson(hits, total)
    assert found.low == pytest.approx(wilson_lower(hits, total), abs=1e-9)
    assert found.high == pytest.approx(1 - wilson_lower(total - hits, total), abs=1e-9)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match=rf"expected 0 <= hits <= total and total >= 1, got {hits} of {total}"):
        wilson(hits, total)


def test_mean_and_geometric_mean() -> None:
    # Student's sleep data: mean 0.75, 95 % interval (-0.5297804, 2.0297804).
    sleep = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    found = mean(sleep)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.75, -0.5297804, 2.0297804), abs=1e-6)
    ratios = geometric_mean(np.exp(sleep))
    assert ratios.high == pytest.approx(math.exp(2.0297804), rel=1e-5)
    with pytest.raises(ValueError, match="expected at least two values, got 1"):
        mean(sleep[:1])


def test_cluster_bootstrap_sees_clusters() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, 12)
    clusters = [np.exp(c + 0.01 * rng.normal(size=50)) for c in centres]
    clustered, pooled = clustered_geometric_mean(clusters), geometric_mean(np.concatenate(clusters))
    assert clustered.estimate == pytest.approx(pooled.estimate)
    assert math.log(clustered.high / clustered.low) > 3 * math.log(pooled.high / pooled.low)
    with pytest.raises(ValueError, match="expected at least two clusters, got 1"):
        clustered_geometric_mean(clusters[:1])


# Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_come_back_with_their_provenance(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [{"trained": 0, "value": 0.1234567}, {"trained": 1, "value": 2.0}])
    rows = read_rows(path)
    assert [r["value"] for r in rows] == ["0.123457", "2"]
    assert all(r["torch"] == torch.__version__ and r["commit"] for r in rows)
    kept = kept_rows(path, "trained")
    assert [r["trained"] for r in kept] == ["0"]
    write_rows(path, [{"trained": 1, "value": 3.0}], kept)
    assert [r["value"] for r in read_rows(path)] == ["0.123457", "3"]
    assert kept_rows(path, None) == []
    with pytest.raises(ValueError, match="expected rows with the same columns"):
        write_rows(path, [{"a": 1}, {"b": 1}])
    assert markdown([{"a": 0.12345, "b": "x"}]).splitlines() == ["| a | b |", "|---|---|", "| 0.123 | x |"]


# The tables' functions ------------------------------------------------------------------------------------------------


def test_random_models_differ_and_attend() -> None:
    cases = [random_case(seed, 4) for seed in range(len(SHAPES))]
    assert len({case.name for case in cases}) == len(SHAPES)
    again = random_case(0, 4)
    assert torch.equal(again.images, cases[0].images) and torch.equal(again.targets, cases[0].targets)
    assert torch.equal(again.model.head.weight, cases[0].model.head.weight)
    assert all(0.005 < spread(case.model, case.images) < 0.9 for case in cases[:3])


def test_relative_error_of_no_answer_is_infinite() -> None:
    truth = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]).double()
    answer = torch.tensor([[3.0, 4.5], [torch.nan, 0.0], [torch.inf, 0.0]]).double()
    assert relative_error(answer, truth).tolist() == [0.1, math.inf, math.inf]


def test_trust_check_counts() -> None:
    case = random_case(1, 8)
    error = np.array([0.5, 0.02, 0.02, 5e-3, 1e-3, 1e-4, 1e-6, np.inf])
    disagreement = np.array([0.4, 0.01, 1e-4, 1e-2, 2e-3, 1e-4, 1e-6, np.nan])
    checked = trust_check.Checked("evaluation", case, error, disagreement)
    assert checked.counts(1.5e-3) == {"bad": 4, "found": 3, "good": 3, "false_alarms": 1}
    summary = trust_check.summarise([trust_check.row(checked, 1.5e-3)] * 2)
    assert summary["bad"] == 8 and summary["recall"] == 0.75 and not summary["holds"]


def test_trust_check_runs() -> None:
    checked = trust_check.measure(random_case(2000, 12), "evaluation", batch=8)
    assert checked.error.shape == checked.disagreement.shape == (12,)
    assert np.isfinite(checked.error).all() and (checked.disagreement > 0).all()
    assert trust_check.row(checked, THRESHOLD)["inputs"] == 12


def test_stable_composite_runs() -> None:
    case = random_case(4005, 6)
    single = stable_composite.measure(case, "chefer_stable", "float32", batch=4)
    assert (single.ours < 1e-4).all() and not single.same_forward
    half = stable_composite.measure(case, "chefer_stable", "bfloat16", batch=4)
    assert set(half.same_forward) == {"float32", "float64"} and (half.ours < 1).all()
    assert not np.array_equal(half.same_forward["float32"], half.same_forward["float64"])
    summary = stable_composite.summarise([single, half])
    assert [r["dtype"] for r in summary] == ["float32", "bfloat16"]
    assert list(stable_composite.row(single)) == list(stable_composite.row(half))


def test_float32_parity_needs_a_checkout(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkout of Transformer-Explainability"):
        reference.Reference(tmp_path, random_case(0, 2).model, torch.float32)


def test_float32_parity_summary() -> None:
    rng = np.random.default_rng(1)
    found = []
    for seed in (0, 1):
        theirs = np.exp(rng.normal(-10, 2, 40))
        ours = theirs * np.exp(rng.normal(0.1, 0.2, 40))
        found.append(float32_parity.Errors(random_case(seed, 2), "full", "torch", ours, theirs, ours * 1e-9))
    (summary,) = float32_parity.summarise(found)
    assert summary["holds"] and 1.0 < summary["ours / theirs"] < summary["upper (t)"] < 1.25
    rows = [float32_parity.row(errors, 0.1) for errors in found]
    pooled = math.exp(sum(r["sum_log_ratio"] for r in rows) / 80)
    assert pooled == pytest.approx(summary["ours / theirs"])


def test_mass_and_pointing_by_hand() -> None:
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[:, 10:20, 10:20] = True
    maps = torch.zeros(3, 64, 64)
    maps[0, 12, 12], maps[0, 40, 40], maps[0, 50, 50] = 3.0, 1.0, -9.0
    maps[1, 23, 19] = 1.0  # 4 pixels below the mask's last row, 19
    assert localisation.mass(maps, masks) == pytest.approx([0.75, 0.0, 100 / 4096])
    assert localisation.pointing(maps, masks).tolist() == [1.0, 1.0, 0.0]
    assert localisation.pointing(maps, masks, tolerance=3).tolist() == [1.0, 0.0, 0.0]


def test_localisation_rows_pair_by_scene() -> None:
    first, second = localisation.PAIRS[0]
    values = np.array([0.2, 0.4, 0.6, 0.6])
    table = localisation.rows({second: (values, values), first: (values + 0.1, values)})
    assert [row["minus"] for row in table] == ["", "", "chefer float32"]
    assert table[0]["mass"] == pytest.approx(0.45) and table[0]["mass_se"] == pytest.approx(0.15)
    assert table[2]["mass"] == pytest.approx(0.1) and table[2]["mass_se"] == pytest.approx(0.0, abs=1e-12)


@NEEDS_WEIGHTS
def test_localisation_runs() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    data = localisation.truth(2)
    assert data.masks.flatten(1).any(1).all() and (data.targets[0::2] != data.targets[1::2]).all()
    model = localisation.load_model()
    for entry in (localisation.ENTRIES[1], localisation.ENTRIES[-1]):
        found = localisation.maps(model, entry, data)
        assert found.shape == data.masks.shape and torch.isfinite(found).all()


# The committed rows ---------------------------------------------------------------------------------------------------


def test_parity_rows_meet_their_bar() -> None:
    groups: dict[tuple[str, bool, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows_of("float32_parity"):
        groups[row["method"], row["model"].startswith("bert-"), row["backend"]].append(row)
        assert float(row["ours_float64_worst"]) < 1e-7
    measured = {("transformer_attribution", False), ("full", False), ("transformer_attribution", True)}
    assert set(groups) == {(*kind, backend) for kind in measured for backend in ("torch", "cpp")}
    for rows in groups.values():
        assert largest_ratio(rows) <= 1.5


def largest_ratio(rows: list[dict[str, str]]) -> float:
    """Upper 95 % bound of ours / theirs, a geometric mean: of inputs, or of models as units where that is larger."""
    sizes = np.array([int(r["inputs"]) for r in rows])
    sums = np.array([float(r["sum_log_ratio"]) for r in rows])
    squares = sum(float(r["sum_squared_log_ratio"]) for r in rows)
    total = sizes.sum()
    assert total >= 500 and len(rows) >= 8
    centre = sums.sum() / total
    variance = (squares - total * centre**2) / (total - 1)
    # Between-model variance of their sums, for a ratio of sums; t(0.975, 7) = 2.37.
    scatter = ((sums - centre * sizes) ** 2).sum() * len(rows) / (len(rows) - 1)
    return math.exp(centre + max(1.97 * math.sqrt(variance / total), 2.37 * math.sqrt(scatter) / total))


FAMILIES_MEASURED = {
    ("detr", "generate_ours"),
    ("detr", "generate_ours, relevance"),
    ("lxmert", "generate_ours"),
    ("lxmert", "generate_ours, relevance"),
    ("clip", "interpret"),
    ("cnn (zennit)", "epsilon_plus"),
    ("vit (LXT)", "cp_lrp"),
    ("vit (LXT)", "cp_lrp, exact slopes"),
    ("bert (LXT)", "attnlrp"),
    ("bert (LXT)", "attnlrp, exact slopes"),
    ("gpt2 (LXT)", "attnlrp"),
    ("gpt2 (LXT)", "attnlrp, exact slopes"),
    ("llama (LXT)", "attnlrp"),
    ("llama (LXT)", "attnlrp, exact slopes"),
}


def test_parity_rows_of_families_meet_their_bar() -> None:
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows_of("family_parity"):
        groups[row["model"], row["method"]].append(row)
    assert set(groups) == FAMILIES_MEASURED
    for (_, method), rows in groups.items():
        assert largest_ratio(rows) <= 1.5
        for row in rows:
            # Epsilons of theirs count where a value is near zero: LXT's 1e-10, and Chefer's at fan-outs.
            epsilons = method in ("attnlrp", "cp_lrp", "generate_ours, relevance")
            assert float(row["ours_float64_worst"]) < (1e-4 if epsilons else 1e-12)


def test_family_parity_needs_a_checkout(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkout of Transformer-MM-Explainability with DETR"):
        family_parity.main(["--multimodal", str(tmp_path), "--families", "clip", "--models", "1", "--inputs", "1"])


def test_family_parity_leaves_out_empty_maps() -> None:
    """An answer of theirs that is all zero has no relative error."""
    model = torch.nn.Linear(1, 1)
    theirs = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)

    def answer(off: float) -> family_parity.Answer:
        return lambda at: theirs * (1 + (off if at.weight.dtype == torch.float32 else 0.0))

    comparison = family_parity.Comparison("own", "m", model, answer(2e-3), answer(1e-3), "none")
    (errors,) = family_parity.measure([(1, comparison)])
    assert errors.ratios == pytest.approx([2.0, 2.0])
    assert errors.ours_float64 == pytest.approx([0.0, 0.0])


def test_trust_rows_meet_their_bar() -> None:
    rows = rows_of("trust_check")
    assert {float(r["threshold"]) for r in rows} == {THRESHOLD}
    seeds = {part: {r["seed"] for r in rows if r["part"] == part} for part in ("calibration", "evaluation")}
    assert seeds["calibration"] and not seeds["calibration"] & seeds["evaluation"]
    evaluation = [r for r in rows if r["part"] == "evaluation"]
    assert any(r["trained"] == "1" for r in evaluation)
    bad, found, good, alarms = (sum(int(r[n]) for r in evaluation) for n in ("bad", "found", "good", "false_alarms"))
    assert bad >= 400
    assert wilson_lower(found, bad) >= 0.90
    assert alarms <= 0.05 * good


def test_stable_rows_meet_their_bars() -> None:
    rows = [r for r in rows_of("stable_composite") if r["composite"] == "chefer_stable"]
    single = [r for r in rows if r["dtype"] == "float32"]
    half = [r for r in rows if r["dtype"] == "bfloat16"]
    assert sum(int(r["inputs"]) for r in single) >= 4000 and sum(r["trained"] == "0" for r in single) >= 8
    assert all(float(r["bound"]) == 1e-4 for r in single)
    assert sum(int(r["within"]) for r in single) >= 0.995 * sum(int(r["inputs"]) for r in single)
    (trained,) = (r for r in half if r["trained"] == "1")
    assert float(trained["bound"]) == 1e-1 and int(trained["within"]) >= 0.99 * int(trained["inputs"])
    for row in half:
        assert all(float(row[f"ratio_{name}"]) <= 1.2 for name in ("float32", "float64"))
        assert all(float(row[f"ratio_p99_{name}"]) <= 1.2 for name in ("float32", "float64"))


def test_localisation_rows() -> None:
    rows = rows_of("localisation")
    scores = {(r["method"], r["composite"], r["dtype"], r["minus"]): r for r in rows}
    assert all(int(r["scenes"]) >= 500 and int(r["inputs"]) == 2 * int(r["scenes"]) for r in rows)
    assert len(rows) == len(localisation.ENTRIES) + len(localisation.PAIRS)
    random = scores["random map", "", "float32", ""]
    for composite in ("chefer", "chefer_stable"):
        row = scores["transformer_attribution", composite, "float32", ""]
        assert float(row["mass_low"]) > 2 * float(random["mass_high"])
        assert float(row["pointing_low"]) > 2 * float(random["pointing_high"])
    difference = scores["transformer_attribution", "chefer_stable", "float32", "chefer float32"]
    assert float(difference["mass_low"]) > -0.02
    assert float(difference["pointing_low"]) > -0.02


# Conditioning ---------------------------------------------------------------------------------------------------------


def test_conditioning_rows_are_the_sites_of_a_ledger() -> None:
    case = random_case(4001, 60)
    ledgers = list(conditioning.images(case, "reslrp"))
    rows = conditioning.rows_of(case.name, "reslrp", ledgers)
    assert len(ledgers) == 2 and [row["module"] for row in rows] == [f"blocks.{i // 2}" for i in range(8)]
    for number, row in enumerate(rows):
        values = torch.cat([ledger.residual_sites()[number].amplification.flatten() for ledger in ledgers])
        assert row["inputs"] == len(values) == 60
        assert row["amplification_worst"] == float(values.max()) <= 3
        assert 1 <= row["cancellation_median"] <= row["cancellation_worst"]


def test_conditioning_rows_and_their_picture(tmp_path: Path) -> None:
    """gamma = 1 bounds what an add amplifies; cancellation is the model's, whatever the rules."""
    rows = rows_of("conditioning")
    models = {row["model"] for row in rows}
    assert len(models) == 3 and conditioning.ENCODER in models
    for row in rows:
        if row["composite"] in ("chefer_stable", "reslrp"):
            assert float(row["amplification_worst"]) < 3
        same = [r for r in rows if (r["model"], r["site"]) == (row["model"], row["site"])]
        assert [r["composite"] for r in same] == list(conditioning.COMPOSITES)
        for r in same:
            assert float(r["cancellation_worst"]) == pytest.approx(float(row["cancellation_worst"]), rel=1e-3)
    conditioning.draw(rows, tmp_path / "conditioning.png")
    with Image.open(tmp_path / "conditioning.png") as drawn, Image.open(conditioning.PICTURE) as committed:
        assert drawn.size == committed.size == (1000, 700)
