"""The sizes of models that a plan is made of are those of the models."""

from __future__ import annotations

import pytest

from mimscale.study import counts
from mimscale.study.jobs import build_graph
from mimscale.study.spec import load_study
from mimscale.training.recipe import load_recipe


@pytest.mark.parametrize(
    ("study", "model"), [("smoke", None), ("mini", None), ("paper", "swinv2_s"), ("paper", "vit_b")]
)
def test_the_counts_that_are_kept_are_those_of_the_models(study, model):
    recipes = {counts.key(job.recipe): job.recipe for job in build_graph(load_study(study)).values()
               if model in (None, job.model)}  # fmt: skip
    kept = counts.kept()
    for key, recipe in recipes.items():
        assert kept.get(key) == counts.count(recipe), "write them anew: python -m mimscale.study.counts"


def test_a_model_of_ones_own_is_counted():
    recipe = load_recipe("mini_swinv2", ["model.embed_dim=24"])
    assert counts.key(recipe) not in counts.kept()
    encoder, parameters, flops = counts.sizes(recipe)
    assert 0 < encoder < parameters and flops > 2 * encoder
    assert sum(counts.load(recipe, 8, 80e9).sizes) == parameters
