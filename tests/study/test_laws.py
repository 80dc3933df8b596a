"""Laws, verdicts, data needs and correlations: on the published runs, and where the truth is known."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import study_results
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.study.analysis.laws import (
    compute_unit,
    correlation,
    fit_power_law,
    frontier,
    full_dataset,
    pareto,
    power_laws,
    relative,
    sample_efficiency,
)
from mimscale.study.analysis.overfitting import data_needs, overfitting
from mimscale.study.analysis.summary import Grid
from mimscale.study.results.cells import Cell, cells, length, plain, title
from mimscale.study.results.published import paper_tables, published
from mimscale.study.results.result import Result, ResultsError, read_json, write_json

TOP1 = ("in1k", "top1")


@pytest.fixture(scope="module")
def released() -> list[Cell]:
    return cells(published())


def made_up(**changes) -> list[Cell]:
    return cells(study_results.grid(**changes))


def test_63_published_cells_each_with_its_accuracy(released):
    assert len(released) == 63 == len(plain(released))
    assert all(cell.scores[TOP1].mean > 80 and cell.val_loss < 0.6 and cell.spread is None for cell in released)


def test_published_correlations_are_near_table_3(released):
    printed = paper_tables()["table3"][0]
    overfit, healthy = Grid(tuple(released)).correlations(TOP1, "val_loss")
    assert overfit.r == pytest.approx(printed["overfit_val"], abs=0.08)
    assert healthy.r == pytest.approx(printed["other_val"], abs=0.08)
    assert overfit.low < overfit.r < overfit.high < 0
    by_length = Grid(tuple(released)).correlations(TOP1, "val_loss", shorter_alone=True)
    assert [found.r for found in by_length] == pytest.approx([-0.799, -0.901], abs=5e-4)
    assert [len(found.cells) for found in by_length] == [14, 49]
    assert correlation(released, TOP1, "train_loss") is None


def test_published_slopes_with_model_size(released):
    laws = {law.name: law for law in power_laws(released) if law.x == "parameters"}
    slopes = {name: law.slope for name, law in laws.items()}
    expected = {"model size at 125K": -0.0154, "model size at 250K": -0.0168, "model size at 500K": -0.0180}
    assert slopes == pytest.approx(expected, abs=5e-5)
    assert all(law.low < law.slope < law.high < 0 and law.r2 > 0.99 and len(law.cells) == 5 for law in laws.values())


def test_published_need_of_data_grows_with_model_and_length(released):
    needs = {(n.model, n.iterations): n for n in data_needs(released)}
    smallest = {key: need.smallest.first.images for key, need in needs.items()}
    for model in ("swinv2_s", "swinv2_b", "swinv2_h", "swinv2_g"):
        assert smallest[model, 125_000] < smallest[model, 500_000]
    # Section 4.1 and Figure 5: half of ImageNet-1K suffices SwinV2-H for 125K and not for 500K.
    assert needs["swinv2_h", 125_000].smallest.first.dataset == "in1k_50"
    assert needs["swinv2_h", 500_000].smallest.first.dataset == "in1k_100"
    assert not needs["swinv2_h", 500_000].certain and needs["swinv2_s", 500_000].certain
    for n in (125_000, 500_000):
        sizes = [smallest[m, n] for m in ("swinv2_s", "swinv2_b", "swinv2_l", "swinv2_h", "swinv2_g")]
        assert sizes == sorted(sizes)


def test_published_sample_efficiency_rises_with_model_size(released):
    rows = sample_efficiency(released)
    assert full_dataset(released) == "in1k_100"
    assert [row.model for row in rows] == ["swinv2_s", "swinv2_b", "swinv2_l", "swinv2_h", "swinv2_g"]
    assert rows[0].samples == 500_000 * 2048 and rows[0].saving == 1 and not rows[0].bound
    # SwinV2-B passes 0.4641 between 125K (0.4680) and 250K (0.4626).
    assert 125_000 * 2048 < rows[1].samples < 250_000 * 2048
    assert [row.bound for row in rows] == [False, False, True, True, True]
    assert all(row.saving == 4 and row.samples == 125_000 * 2048 for row in rows[2:])


def test_published_overfitting_is_on_small_data_only(released):
    overfit = {cell.first.dataset for cell, why in overfitting(released).items() if why}
    assert overfit == {"in1k_10", "in1k_20", "in1k_50"}
    for cell, why in overfitting(released).items():
        if why:
            assert why.better.first.dataset == cell.first.dataset
            assert why.better.first.compute < cell.first.compute and why.better.val_loss < cell.val_loss
            assert why.rise == pytest.approx(cell.val_loss - why.better.val_loss)


def test_relative_compute_counts_the_smallest_models_shortest_length_as_one(released):
    unit = compute_unit(released)
    values = {(c.first.model, c.first.iterations): relative(c, unit) for c in released}
    assert values["swinv2_s", 125_000] == 1 and values["swinv2_s", 500_000] == 4
    assert values["swinv2_g", 500_000] == pytest.approx(4 * 138.6 / 6.81)


@settings(max_examples=50, deadline=None)
@given(
    slope=st.floats(-0.5, 0.5),
    scale=st.floats(0.1, 10),
    sizes=st.lists(st.floats(1e6, 1e10), min_size=3, max_size=8, unique=True),
)
def test_a_power_law_is_recovered(slope, scale, sizes):
    if max(sizes) / min(sizes) < 1.5:
        return
    group = cells(
        Result(
            f"{number}", "pretrain", f"m{number}", "d", 10, parameters=int(size), val_loss=scale * int(size) ** slope
        )
        for number, size in enumerate(sizes)
    )
    law = fit_power_law("law", "parameters", group, lambda c: c.first.parameters)
    assert law is None or (
        law.slope == pytest.approx(slope, abs=1e-6)
        and law.low - 1e-9 <= law.slope <= law.high + 1e-9
        and law(np.array(3e7)) == pytest.approx(scale * 3e7**slope, rel=1e-6)
    )


def test_intervals_hold_the_true_slope_and_law_as_often_as_they_say():
    draw = np.random.default_rng(0)
    sizes = np.array([5e7, 9e7, 2e8, 6e8, 1e9])
    slopes = lines = 0
    for _ in range(400):
        losses = 2 * sizes**-0.02 * np.exp(draw.normal(0, 0.002, len(sizes)))
        group = cells(
            Result(f"{n}", "pretrain", f"m{n}", "d", 10, parameters=int(size), val_loss=float(loss))
            for n, (size, loss) in enumerate(zip(sizes, losses, strict=True))
        )
        law = fit_power_law("law", "parameters", group, lambda c: c.first.parameters)
        slopes += law.low <= -0.02 <= law.high
        low, high = law.interval(np.array(3e8))
        lines += low <= 2 * 3e8**-0.02 <= high
    assert 0.92 < slopes / 400 < 0.98 and 0.92 < lines / 400 < 0.98


def test_no_law_from_two_sizes():
    group = [c for c in made_up() if c.first.model in ("swinv2_s", "swinv2_b")]
    assert fit_power_law("law", "parameters", group, lambda c: c.first.parameters) is None
    assert [law for law in power_laws(group) if law.x == "parameters"] == []


def test_the_frontier_is_where_data_suffices():
    group = made_up()
    best = frontier(group)
    everywhere = itertools.product(study_results.SIZES, study_results.LENGTHS)
    assert [(c.first.model, c.first.iterations) for c in best] == list(everywhere)
    for cell in best:
        assert cell.val_loss == pytest.approx(study_results.clean_loss(cell.first.parameters, cell.first.iterations))
    for law in power_laws(group):
        if law.x == "parameters":
            assert law.slope == pytest.approx(study_results.SIZE_SLOPE, abs=1e-6)


def test_a_model_that_overfits_all_its_data_is_not_on_the_frontier():
    small = [c for c in made_up() if c.first.dataset == "photos_10"]
    overfit = {(c.first.model, c.first.iterations) for c, why in overfitting(small).items() if why}
    kept = {(c.first.model, c.first.iterations) for c in frontier(small)}
    assert overfit and kept and not overfit & kept and len(overfit | kept) == len(small)


def test_pareto_cells_cost_more_only_where_they_gain(released):
    kept = pareto(released)
    assert all(a.first.compute < b.first.compute and a.val_loss > b.val_loss for a, b in itertools.pairwise(kept))
    for cell in released:
        assert any(k.first.compute <= cell.first.compute and k.val_loss <= cell.val_loss for k in kept)


def test_seeds_set_what_counts_as_a_rise():
    def pair(rise: float, spread: float) -> list[Cell]:
        values = [(1000, -spread), (1000, spread), (2000, rise - spread), (2000, rise + spread)]
        return cells(
            Result(f"{n}", "pretrain", "m", "d", length, seed=n, val_loss=1 + value)
            for n, (length, value) in enumerate(values)
        )

    def bad(group: list[Cell]) -> int:
        return sum(why is not None for why in overfitting(group).values())

    # A spread of 0.01 * sqrt(2) over two seeds each: the standard error of a difference is sqrt(2) times 0.01.
    assert bad(pair(0.027, 0.01)) == 0
    assert bad(pair(0.030, 0.01)) == 1
    assert pair(0.03, 0.01)[0].spread == pytest.approx(0.01 * 2**0.5)
    # The spread of these seeds counts for cells of one seed too, which must differ by more: 2 sqrt(2) times 0.0141, or 0.04.
    single = Result("x", "pretrain", "n", "d", 1000, val_loss=1.0)
    for rise, verdict in ((0.038, 0), (0.042, 1)):
        longer = dataclasses.replace(single, cell="y", iterations=2000, val_loss=1.0 + rise)
        runs = [run for cell in pair(0, 0.01) for run in cell.runs]
        assert bad(cells([*runs, single, longer])) == verdict
    short = Result("a", "pretrain", "m", "d", 1000, val_loss=1.0)
    assert bad(cells([short, dataclasses.replace(short, cell="b", iterations=2000, val_loss=1.0001)])) == 1


def test_a_cell_that_is_worse_on_its_training_images_too_has_not_overfitted():
    short = Result("a", "pretrain", "m", "d", 1000, val_loss=1.0, train_loss=0.9)
    for train_loss, verdict in ((0.8, True), (0.95, False), (None, True)):
        longer = dataclasses.replace(short, cell="b", iterations=2000, val_loss=1.1, train_loss=train_loss)
        assert any(overfitting(cells([short, longer])).values()) == verdict


def test_only_like_is_compared_with_like():
    a = Result("a", "pretrain", "m", "d", 1000, global_batch=64, val_loss=1.0)
    others = {"dataset": "e", "decoder": "8-blocks", "objective": "mae", "sampling": "classes", "global_batch": 32}
    for key, other in others.items():
        b = dataclasses.replace(a, cell="b", iterations=2000, val_loss=2.0, **{key: other})
        assert not any(overfitting(cells([a, b])).values()), key


def test_a_stopped_or_missing_run_has_no_part_in_a_cells_loss():
    runs = list(study_results.grid(seeds=2))[:2]
    for status in ("stopped", "failed", "missing", "running"):
        cell = cells([runs[0], dataclasses.replace(runs[1], status=status)])[0]
        assert cell.val_loss == runs[0].val_loss and cell.spread is None and cell.status == "done"
    nothing = cells(dataclasses.replace(run, status="missing", val_loss=None) for run in runs)
    assert nothing[0].val_loss is None and nothing[0].status == "missing"
    assert (
        overfitting(nothing) == {}
        and power_laws(nothing) == []
        and sample_efficiency(nothing) == []
        and data_needs(nothing) == []
    )
    assert full_dataset(nothing) is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.3, 0.6), st.floats(50, 90)), min_size=4, max_size=20, unique=True),
    st.floats(0.5, 20),
)
def test_correlation_ignores_scale_and_turns_with_the_sign(points, factor):
    def of(pairs):
        runs = []
        for n, (loss, score) in enumerate(pairs):
            runs.append(Result(f"{n}", "pretrain", f"m{n}", "d", 10, val_loss=loss))
            runs.append(
                Result(f"{n}t", "finetune", f"m{n}", "d", 10, task="in1k", scores={"top1": score}, start=f"{n}")
            )
        return correlation(cells(runs), TOP1, "val_loss")

    found = of(points)
    if found is None or np.std([p[0] for p in points]) < 1e-3 or np.std([p[1] for p in points]) < 1e-3:
        return
    assert -1 <= found.low <= found.r + 1e-9 and found.r - 1e-9 <= found.high <= 1
    assert of([(loss, factor * score + 3) for loss, score in points]).r == pytest.approx(found.r, abs=1e-6)
    assert of([(loss, -score) for loss, score in points]).r == pytest.approx(-found.r, abs=1e-6)


def test_contradictory_results_are_named():
    first, *_ = study_results.grid(run="one")
    with pytest.raises(ResultsError, match=r'cell "swinv2_s-photos_10-1000-0" has two results, one/.* and two/'):
        cells([first, next(study_results.grid(run="two"))])
    lost = dataclasses.replace(first, cell="tuned", kind="finetune", start="elsewhere")
    with pytest.raises(ResultsError, match='fine-tuning "tuned" starts from "elsewhere", which is not in the study'):
        cells([first, lost])


def test_results_come_back_from_json_as_they_were(tmp_path):
    results = [dataclasses.replace(r, curve=((1, 0.5, None), (2, 0.4, 0.45))) for r in study_results.grid(run="runs")]
    write_json(results, tmp_path / "results.json")
    assert read_json(tmp_path / "results.json") == results
    (tmp_path / "results.json").write_text('[{"cell": 1')
    with pytest.raises(ResultsError, match=r"results\.json holds no results of a study"):
        read_json(tmp_path / "results.json")


def test_names_read_as_the_paper_prints_them():
    names = ("swinv2_g", "vit_b", "in1k_10", "in22k", "in100")
    assert [title(name) for name in names] == ["SwinV2-g", "ViT-B", "IN1K (10%)", "IN22K", "IN100"]
    assert [length(n) for n in (125_000, 437_500, 900)] == ["125K", "437.5K", "900"]
