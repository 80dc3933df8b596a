"""The rate of every update, against the formulas of the paper and schedules of the released codes written down anew here."""

from __future__ import annotations

import bisect
import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from training_runs import ROOT

from mimscale.training.recipe import Schedule, load_recipe
from mimscale.training.schedule import learning_rate, rate_of
from mimscale.transfer.recipe import load_finetune_recipe

FINETUNE = ROOT / "launchers/recipes/finetune"


def released_fine_tuning(peak, warmup, first, last, iterations, scales):
    """What SimMIM's code gives each group: timm's cosine without the warm-up, of groups whose own peaks are scaled."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": peak * scale} for scale in scales]
    optimizer = torch.optim.SGD(groups, lr=peak)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=iterations - warmup,
        lr_min=last,
        warmup_t=warmup,
        warmup_lr_init=first,
        warmup_prefix=True,
        cycle_limit=1,
        t_in_epochs=False,
    )
    for step in range(iterations):
        scheduler.step_update(step)
        yield [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("size", ["s", "b", "l", "h", "g"])
def test_every_rate_of_every_layer_is_that_of_the_released_fine_tuning(size):
    """The first and the last rate are 1e-6 in every layer."""
    recipe = load_finetune_recipe(
        FINETUNE / f"imagenet1k_swinv2_{size}.yaml", ["train.iterations=500", "schedule.warmup=100"]
    )
    scales = [recipe.finetune.layer_decay**layer for layer in range(26)]
    expected = list(released_fine_tuning(5e-3, 100, 1e-6, 1e-6, 500, scales))
    for step, rates in enumerate(expected):
        assert [rate_of(recipe, step, scale) for scale in scales] == pytest.approx(rates, rel=1e-9), step
    assert {rate_of(recipe, 0, scale) for scale in scales} == {1e-6}
    assert [rate_of(recipe, 500, scale) for scale in scales] == pytest.approx([1e-6] * 26, rel=1e-9)


@pytest.mark.parametrize("name", ["imagenet1k_vit_b", "imagenet1k_vit_h", "inat18_vit_l"])
def test_every_rate_of_every_layer_is_that_of_maes_fine_tuning(name):
    """MAE multiplies the rate of every step, the last one too."""
    recipe = load_finetune_recipe(FINETUNE / f"{name}.yaml", ["train.iterations=300", "schedule.warmup=30"])
    peak, last = recipe.learning_rate, 1e-6
    assert peak == (2e-3 if name.endswith("_b") else 4e-3)
    for step in range(300):
        rate = peak * step / 30
        if step >= 30:
            rate = last + (peak - last) * 0.5 * (1 + math.cos(math.pi * (step - 30) / 270))
        for scale in (1.0, 0.65, 0.65**13):
            assert rate_of(recipe, step, scale) == pytest.approx(rate * scale, rel=1e-12), step


def test_every_rate_of_the_papers_pre_training():
    """Section 3.4: 4e-4 after 6,250 updates of warm-up from 5e-7, a tenth of it for the last eighth."""
    recipe = load_recipe(ROOT / "launchers/recipes/swinv2_b.yaml", ["train.iterations=125000"])
    for step in range(125_000):
        rate = 5e-7 + (4e-4 - 5e-7) * step / 6250 if step < 6250 else 4e-4 if step < 109_375 else 4e-5
        assert rate_of(recipe, step) == pytest.approx(rate, rel=1e-12), step


@pytest.mark.parametrize("batch", [512, 2048])
def test_every_rate_of_the_released_pre_training(batch):
    """The start is scaled like the peak; the scheduler is stepped after each update, with that update's number."""
    overrides = ["fidelity=released", "train.iterations=1600", "schedule.warmup=20", f"train.global_batch={batch}"]
    recipe = load_recipe(ROOT / "launchers/recipes/swinv2_b.yaml", overrides)
    start, peak = 5e-7 * batch / 512, 1e-4 * batch / 512
    rate = start
    for step in range(1600):
        assert rate_of(recipe, step) == pytest.approx(rate, rel=1e-12), step
        rate = start + step * (peak - start) / 20 if step < 20 else peak * 0.1 ** bisect.bisect_right([1400], step)
    assert rate_of(load_recipe(ROOT / "launchers/recipes/swinv2_b.yaml", ["fidelity=released"]), 0) == 2e-6


def test_the_released_steps_are_simmims_and_can_be_had_or_left_by_themselves():
    mae = load_recipe(ROOT / "launchers/recipes/mae_vit_b.yaml", ["fidelity=released"])
    assert [rate_of(mae, step) for step in (0, 1, 25_000)] == pytest.approx([0, 1.2e-3 / 25_000, 1.2e-3], rel=1e-12)
    name = ROOT / "launchers/recipes/swinv2_b.yaml"
    paper, released = load_recipe(name), load_recipe(name, ["fidelity=released"])
    assert [rate_of(load_recipe(name, ["schedule.released=true"]), step) for step in range(9)] == [
        rate_of(released, step) for step in range(9)
    ]
    assert [
        rate_of(load_recipe(name, ["fidelity=released", "schedule.released=false"]), step) for step in range(9)
    ] == [rate_of(paper, step) for step in range(9)]


def test_every_rate_of_a_line_and_of_two_steps():
    line = Schedule(kind="linear", warmup=100, warmup_lr=1e-3, final_lr_ratio=0.25)
    for step in range(1101):
        rate = 1e-3 + 1.999 * step / 100 if step < 100 else 2 - 1.5 * (step - 100) / 1000
        assert learning_rate(line, 2.0, 1100, step) == pytest.approx(rate, rel=1e-12), step
    twice = Schedule(warmup=10, warmup_lr=0.0, decay_at=(0.75, 33 / 36), decay_factor=0.1)
    for step in range(360):
        rate = step / 10 if step < 10 else 0.1 ** ((step >= 270) + (step >= 330))
        assert learning_rate(twice, 1.0, 360, step) == pytest.approx(rate, rel=1e-12), step
