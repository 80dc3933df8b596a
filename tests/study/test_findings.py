"""Findings say what the runs show: made-up studies where each claim of the paper is true, or is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import study_results
from hypothesis import given, settings
from hypothesis import strategies as st

from mimscale.study.analysis.summary import analyse
from mimscale.study.report.figures import figures
from mimscale.study.report.findings import findings
from mimscale.study.report.report import tables
from mimscale.study.results.published import published
from mimscale.study.results.result import Result

OVERFIT, MORE_DATA, LAWS, EFFICIENCY, PROXY, MAE, DECODERS, SAMPLING = range(8)


def verdicts(results: list[Result]) -> list[str]:
    return [finding.verdict for finding in findings(analyse(results, False))]


def changed(loss, **changes) -> list[Result]:
    """The made-up grid with another loss: a function of the result."""
    return [dataclasses.replace(r, val_loss=loss(r), **changes) for r in study_results.grid()]


def test_the_published_runs_show_what_the_paper_says_of_them():
    assert verdicts(published()) == ["yes", "yes", "yes", "yes", "yes", "open", "open", "open"]


def test_where_small_data_binds_the_runs_show_it():
    found = verdicts(list(study_results.grid()))
    assert found[OVERFIT] == "yes" and found[MORE_DATA] == "yes" and found[EFFICIENCY] == "yes"


def test_where_data_never_binds_they_do_not_show_overfitting():
    found = findings(analyse(changed(lambda r: study_results.clean_loss(r.parameters, r.iterations)), False))
    assert found[OVERFIT].verdict == "no" and "0 of 48 cells overfit." in found[OVERFIT].figures
    assert found[LAWS].verdict == "yes"


def test_a_single_cell_that_overfits_shows_no_trend():
    def loss(run: Result) -> float:
        one = (run.model, run.dataset, run.iterations) == ("swinv2_h", "photos_10", 4000)
        return study_results.clean_loss(run.parameters, run.iterations) * (1.1 if one else 1)

    runs = [dataclasses.replace(r, val_loss=loss(r), train_loss=None) for r in study_results.grid()]
    found = findings(analyse(runs, False))[OVERFIT]
    assert "1 of 48 cells overfit." in found.figures and found.verdict == "part"


def test_where_more_data_always_helps_they_say_so():
    assert (
        verdicts(changed(lambda r: study_results.clean_loss(r.parameters, r.iterations) * r.images**-0.05))[MORE_DATA]
        == "no"
    )


def test_where_size_does_not_matter_no_law_is_claimed():
    found = verdicts(changed(lambda r: 0.5 * r.iterations**-0.03 * (1 + 0.002 * (r.model in ("swinv2_b", "swinv2_h")))))
    assert found[LAWS] == "part" and found[EFFICIENCY] == "no"


def test_one_length_cannot_tell_what_longer_training_does():
    found = findings(analyse([r for r in study_results.grid() if r.iterations == 4000], False))[OVERFIT]
    assert found.verdict == "part"
    assert "Not comparable here: longer training." in found.figures


def test_seeds_that_spread_more_than_the_losses_differ_show_nothing():
    noisy = [
        dataclasses.replace(
            r, val_loss=0.5 + (0.02 if r.seed else -0.02) + 1e-4 * (len(r.model + r.dataset + str(r.iterations)) % 3)
        )
        for r in study_results.grid(seeds=2)
    ]
    found = findings(analyse(noisy, False))[OVERFIT]
    assert found.verdict == "no"
    assert any("spread by 0.0283" in sentence for sentence in found.figures)


def test_a_decoder_and_a_subset_are_set_beside_their_peers():
    base = list(study_results.grid())
    start = next(r for r in base if (r.model, r.dataset, r.iterations) == ("swinv2_b", "photos_20", 2000))
    heavy = dataclasses.replace(start, cell="heavy", decoder="8-blocks", val_loss=start.val_loss + 0.01, train_loss=0.1)
    few = dataclasses.replace(start, cell="few", dataset="photos8", sampling="classes", val_loss=start.val_loss * 1.001)
    assert verdicts([*base, heavy, few])[DECODERS:] == ["yes", "yes"]
    light = dataclasses.replace(heavy, val_loss=start.val_loss - 0.01)
    other = dataclasses.replace(few, val_loss=start.val_loss * 1.2)
    assert verdicts([*base, light, other])[DECODERS:] == ["part", "no"]


def test_a_task_of_the_studys_own_takes_imagenets_place():
    runs = list(study_results.grid())
    tuned = [
        dataclasses.replace(
            r, cell=f"{r.cell}-t", kind="finetune", task="cells", scores={"top1": 90 - 20 * r.val_loss}, start=r.cell
        )
        for r in runs
    ]
    study = analyse([*runs, *tuned])
    assert study.main_score == ("cells", "top1")
    assert findings(study)[PROXY].verdict == "yes" and "cells top-1: r = -1.00" in findings(study)[PROXY].figures[0]
    assert (
        tables.all_cells(study).rows[0][tables.all_cells(study).columns.index("cells top-1")].text
        == f"{tuned[0].scores['top1']:.2f}"
    )
    assert [p.heading for p in figures(study)[1].drawn] == ["Training loss", "Validation loss", "cells top-1"]
    assert "ImageNet-1K top-1, paper" in tables.decoders(study).columns


UNKNOWN = ("parameters", "images", "global_batch", "flops_per_image", "val_loss", "train_loss", "classes")
some_runs = st.lists(
    st.tuples(
        st.sampled_from(list(study_results.grid(seeds=2))),
        st.sets(st.sampled_from(UNKNOWN), max_size=2),
        st.sampled_from(["done", "done", "done", "missing", "stopped", "failed", "running"]),
        st.sampled_from(["simmim", "simmim", "mae"]),
        st.sampled_from(["linear", "linear", "8-blocks"]),
        st.sampled_from(["uniform", "uniform", "classes"]),
    ),
    max_size=30,
    unique_by=lambda drawn: drawn[0].cell,
)


@settings(max_examples=60, deadline=None)
@given(some_runs)
def test_any_part_of_a_study_has_findings_and_tables(drawn):
    results = [
        dataclasses.replace(
            run, status=status, objective=objective, decoder=decoder, sampling=sampling, **dict.fromkeys(unknown)
        )
        for run, unknown, status, objective, decoder, sampling in drawn
    ]
    study = analyse(results)
    assert len(findings(study)) == 8
    for make in (tables.architectures, tables.datasets, tables.correlation_table, tables.decoders, tables.sampling):
        assert len({len(row) for row in make(study).rows}) == 1
    assert len(tables.all_cells(study).rows) == len(study.cells)
    assert len(tables.all_runs(study, Path("out"), None).rows) == len(results)
    for row in [*tables.laws(study).rows, *tables.needs(study).rows, *tables.efficiency(study).rows]:
        assert "nan" not in "".join(str(value) for value in row)


def test_a_run_that_diverged_counts_in_no_mean_and_spoils_no_fit():
    runs = list(study_results.grid(seeds=2))
    index = next(i for i, r in enumerate(runs) if r.dataset == "photos_100" and r.seed == 1)
    bad = [dataclasses.replace(r, val_loss=float("nan")) if i == index else r for i, r in enumerate(runs)]
    study = analyse(bad, False)
    cell = next(c for c in study.cells if runs[index] in c.runs or bad[index] in c.runs)
    assert cell.val_loss == runs[index - 1].val_loss and cell.spread is None
    assert all(law.slope == law.slope for law in study.simmim.laws)
