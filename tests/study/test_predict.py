"""Prediction of cells not run: on published runs that were left out, and where the truth is known."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import study_results

from mimscale.commands import study
from mimscale.study.analysis.holdout import checks, regrets
from mimscale.study.analysis.loss_model import Condition, LossModel
from mimscale.study.analysis.prediction import Predictor
from mimscale.study.report.answers import answer
from mimscale.study.results.cells import Cell, cells
from mimscale.study.results.published import published
from mimscale.study.results.result import ResultsError


@pytest.fixture(scope="module")
def released() -> list[Cell]:
    return cells(published())


@pytest.fixture(scope="module")
def predictor(released) -> Predictor:
    return Predictor(released)


def conditions(group: list[Cell]) -> list[Condition]:
    return [condition for cell in group if (condition := Condition.of(cell))]


def test_published_cells_left_out_are_predicted_within_their_intervals(released):
    found = {check.left_out: check for check in checks(released)}
    count = sum(check.cells for check in found.values())
    assert 0.88 < sum(check.covered * check.cells for check in found.values()) / count <= 1
    for name in ("SwinV2-g", "SwinV2-H and SwinV2-g", "500K iterations"):
        assert found[name].error < 0.005 and found[name].covered >= 0.85
    # Cheap cells alone: S, B and L, up to 250K.
    cheap = found["SwinV2-H and SwinV2-g, and 500K iterations"]
    assert cheap.fitted == 28 and cheap.error < 0.01 and cheap.covered >= 0.9


def test_overfitting_is_predicted_not_only_the_frontier(released):
    unseen = [c for c in released if (c.first.model, c.first.dataset) == ("swinv2_h", "in1k_20")]
    found = LossModel([c for c in released if c not in unseen]).predict(conditions(unseen))
    for cell, prediction in zip(unseen, found, strict=True):
        assert prediction.loss == pytest.approx(cell.val_loss, rel=0.025)
        assert prediction.data_cost > 0.04
    plenty = LossModel(released).predict(conditions([c for c in released if c.first.dataset == "in22k"]))
    assert all(prediction.data_cost < 0.002 for prediction in plenty)


def test_a_budget_goes_to_a_small_model_where_data_is_scarce_and_to_the_largest_where_it_is_not(predictor):
    scarce, plenty = predictor.spend(100, "in1k_10"), predictor.spend(100, "in1k_100")
    assert scarce[0].model == "swinv2_s" and scarce[0].compute < 5
    assert plenty[0].model == "swinv2_g" and plenty[0].compute > 50
    for choices in (scarce, plenty):
        losses = [choice.prediction.loss for choice in choices]
        assert losses == sorted(losses)
        assert all(choice.compute <= 100 for choice in choices)
        assert sum(choice.probability for choice in choices) == pytest.approx(1)


def test_budgets_spent_on_what_cheap_cells_say_are_well_spent(released):
    spent = regrets(released)
    losses = [chosen.val_loss / best.val_loss - 1 for *_, chosen, best in spent]
    assert len(spent) > 20 and sum(loss == 0 for loss in losses) > 0.8 * len(spent)
    assert np.mean(losses) < 0.005


def test_more_budget_is_never_worse(predictor):
    for dataset in ("in1k_10", "in1k_50", "in1k_100"):
        best = [predictor.spend(budget, dataset)[0].prediction.loss for budget in (1, 2, 4, 8, 16, 32, 64)]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(best))


def test_intervals_widen_away_from_what_was_run(predictor):
    def width(model: str, iterations: int) -> float:
        found = predictor.predict(model, "in22k", iterations)
        return (found.high - found.low) / found.loss

    assert width("swinv2_g", 4_000_000) > 1.5 * width("swinv2_g", 500_000) > 0


def test_a_law_that_is_known_is_recovered_from_cells_with_noise():
    draw = np.random.default_rng(3)
    inside = far = count = 0
    for _ in range(6):
        runs = list(study_results.grid())
        loss = {}
        for run in runs:
            onset = 2 + 0.8 * math.log(run.parameters / 1e8) + 1.5 * math.log(run.iterations / 2000)
            cost = 0.15 / (1 + math.exp(-(onset - 3 * math.log(run.images / 3000))))
            loss[run.cell] = study_results.clean_loss(run.parameters, run.iterations) * math.exp(cost)
        noisy = [dataclasses.replace(r, val_loss=loss[r.cell] * math.exp(draw.normal(0, 0.001))) for r in runs]
        grid = cells(noisy)
        held = [c for c in grid if c.first.model == "swinv2_h" or c.first.iterations == 4000]
        found = LossModel([c for c in grid if c not in held]).predict(conditions(held))
        for cell, prediction in zip(held, found, strict=True):
            count += 1
            inside += prediction.low <= cell.val_loss <= prediction.high
            far += abs(prediction.loss / loss[cell.first.cell] - 1) > 0.03
    assert inside / count > 0.85 and far / count < 0.1


def test_the_same_cells_give_the_same_answer(released, predictor):
    again = Predictor(list(reversed(released))).predict("swinv2_l", "in1k_50", 300_000)
    assert predictor.predict("swinv2_l", "in1k_50", 300_000).loss == pytest.approx(again.loss, rel=1e-5)


def test_a_cell_that_was_run_is_predicted_without_it(predictor):
    text = answer(published(), "swinv2_g", "in1k_50", 500_000)
    assert "It was run and came to 0.4719; the prediction does not know of it." in text and "Fitted on 62 cells" in text


def test_what_was_not_run_is_predicted_from_what_the_study_knows_of_it():
    results = [
        dataclasses.replace(r, status="missing", val_loss=None) if r.model == "swinv2_h" else r
        for r in study_results.grid()
    ]
    text = answer(results, "swinv2_h", "photos_100", 2000)
    truth = study_results.clean_loss(study_results.SIZES["swinv2_h"], 2000)
    assert text.startswith("SwinV2-H on photos (100%), 2,000: validation loss ") and "Fitted on 36 cells" in text
    assert float(text.split("loss ")[1].split(" ")[0]) == pytest.approx(truth, rel=0.02)
    assert "SwinV2-H" in answer(results, budget=40, dataset="photos_100")


@pytest.mark.parametrize(
    ("question", "error"),
    [
        (
            {"model": "swinv2_x", "dataset": "in1k_50", "iterations": 250_000},
            r"no model 'swinv2_x'; did you mean 'swinv2_\w'",
        ),
        ({"budget": 4, "dataset": "in1k_5"}, "no dataset 'in1k_5'; did you mean 'in1k_50'"),
        ({"budget": 0.5, "dataset": "in1k_50"}, r"a budget of 0\.5 pays for no model's shortest length, 125K"),
        ({"budget": 4}, "predict needs --model, --dataset and --length, or"),
        ({"check": True, "objective": "mae"}, "too few cells"),
        ({"budget": 4, "dataset": "in1k_50", "objective": "mae"}, "a prediction needs 6 cells that are done"),
    ],
)
def test_questions_without_an_answer_are_named_errors(question, error):
    with pytest.raises(ResultsError, match=error):
        answer(published(), **question)


def test_the_launcher_answers_of_published_runs(capsys):
    assert study.main(["predict", "published", "--budget", "100", "--dataset", "in1k_20"]) == 0
    assert "on IN1K (20%): SwinV2-L for 125,000 iterations" in capsys.readouterr().out
    assert study.main(["predict", "published", "--budget", "100"]) == 1
    assert study.main(["plan", "published"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("mimscale: error: ") for line in errors] == [True, True]
    assert "plan does not" in errors[1]
