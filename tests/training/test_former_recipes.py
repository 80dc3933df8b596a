"""Runs and studies from before encoders and objectives had keys of their own are still those runs and studies."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import RECIPE, ROOT, TINY, losses, records

from mimscale.cli import main
from mimscale.study.jobs import build_graph, recipe_digest
from mimscale.study.spec import load_study
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import RecipeError, load_recipe, stored_recipe
from mimscale.transfer.recipe import load_finetune_recipe, schema_of
from mimscale.transfer.task import finetune

# What every recipe then held, at values that its own encoder and objective had no use for.
MODEL = {"window_size": 7, "pretrained_window_size": 3, "depths": [9], "depth": 4}
SIMMIM = {"decoder": "8-blocks", "target_window": 13}
MAE = {"norm_pix": False, "decoder_dim": 33, "decoder_depth": 2, "decoder_heads": 3}


def as_stored_then(recipe) -> dict:
    """The values of a recipe as they were written."""
    values = copy.deepcopy(recipe.model_dump(mode="json"))
    values.pop("plugins")
    for section, keys in (("model", MODEL), ("mim", {**SIMMIM, **MAE, "mask_ratio": None, "loss": None})):
        if section in values:
            values[section] = {**keys, **{k: v for k, v in values[section].items() if not k.startswith("target_opt")}}
    values.get("finetune", {}).pop("layer_decay_of", None)
    values["schedule"].pop("released")
    for key in ("target", "mask_patch"):
        values.get("mim", {}).pop(key, None)
    return values


@pytest.mark.parametrize("name", ["demo", "mini_mae", "mae_vit_h", "swinv2_g"])
def test_a_stored_recipe_leaves_out_what_belongs_to_others(name):
    recipe = load_recipe(ROOT / f"launchers/recipes/{name}.yaml")
    values = as_stored_then(recipe)
    assert stored_recipe(values, "run") == recipe
    with pytest.raises(RecipeError, match=r"is a key of mim\.objective="):
        load_recipe(ROOT / f"launchers/recipes/{name}.yaml", ["mim.norm_pix=true", "mim.decoder=linear"])
    values["mim"]["decoderr"] = 3
    with pytest.raises(RecipeError, match=r"unknown key 'mim\.decoderr'"):
        stored_recipe(values, "run")


def test_a_stored_fine_tuning_leaves_out_what_belongs_to_others():
    recipe = load_finetune_recipe(ROOT / "launchers/recipes/finetune/imagenet1k_vit_b.yaml")
    values = {**recipe.model_dump(mode="json")}
    values["model"] = {**MODEL, "extra_norm_every": 6, **values["model"]}
    assert stored_recipe(values, "run", schema_of("classification")) == recipe


def test_digests_of_a_studys_jobs_are_those_of_then(monkeypatch):
    """Taken with the code of then: a study's folder would otherwise be refused as another study's."""
    monkeypatch.chdir(ROOT)
    found = {}
    for study in ("paper", "mini", "smoke"):
        found |= {job.id: job.digest for job in build_graph(load_study(f"launchers/studies/{study}.yaml")).values()}
    for job, digest in {
        "swinv2_8-cells_20-16": "3da0a8bc988ef711",
        "swinv2_8-cells_20-16-cells": "1ec19e816ce2867f",
        "vit_64-cells_1-600": "7d7631d3bcf7b91a",
        "vit_h-in1k_10-125000": "539c4ce4eb6fd46e",
        "vit_h-in1k_10-125000-in1k": "51834f25111de3ab",
        "swinv2_b-in1k_20-250000-8-blocks": "4e4fbd01a2c6fa38",
        "swinv2_b-in1k_20-250000-8-blocks-in1k": "7f471d708216ac3f",
    }.items():
        assert found[job] == digest, job
    plain = load_recipe(RECIPE)
    for other in ("mim.mask_patch=64", "mim.target=raw-pixels", "mim.target_options={window: 3}"):
        assert recipe_digest(load_recipe(RECIPE, [other])) != recipe_digest(plain)


def back_to_step_2(run: Path, then: dict) -> None:
    """Make a run of four steps one that was stopped after two, with a recipe as it was written then."""
    (run / "recipe.yaml").write_text(yaml.safe_dump(then))
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints/step_00000004")
    manifest = next(run.glob("checkpoints/step_00000002/*.json"))
    values = json.loads(manifest.read_text()) | {"recipe": then}
    del values["sha256"]
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(values))


def test_a_run_of_then_resumes_and_is_exported(alone, shards, tmp_path):
    keys = [*TINY, f"data.shards={shards}", "train.iterations=4", "train.checkpoint_every=2", "train.validate_every=2"]
    pretrain(load_recipe(RECIPE, keys), {}, tmp_path / "run")
    whole = losses(tmp_path / "run"), records(tmp_path / "run", "val_loss")
    back_to_step_2(tmp_path / "run", as_stored_then(load_recipe(RECIPE, keys)))
    assert main(["export", str(tmp_path / "run"), "--to", "safetensors"]) == 0
    pretrain(load_recipe(RECIPE, keys), {}, tmp_path / "run")
    assert (losses(tmp_path / "run"), records(tmp_path / "run", "val_loss")) == whole


@pytest.fixture
def rates(monkeypatch) -> list[set[float]]:
    """The rates of the optimizer's groups at every update that is made while the test runs."""
    found: list[set[float]] = []
    step = torch.optim.AdamW.step

    def noted(self, *arguments, **named):
        found.append({group["lr"] for group in self.param_groups})
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return found


def test_a_fine_tuning_of_then_keeps_its_layers_rates(alone, shards, tmp_path, rates):
    """Layer decay multiplied every rate then; today the first and the last are the same for all layers."""
    model = [key for key in TINY if key.startswith(("model.", "data.image_size", "data.workers", "data.validation"))]
    keys = [*model, f"data.shards={shards}", "train.global_batch=8", "optimizer.lr_batch=8", "finetune.layer_decay=0.5"]
    keys += ["optimizer.lr=1e-3", "schedule.warmup=2", "schedule.warmup_lr=1e-6", "schedule.final_lr_ratio=1e-3"]
    keys += ["train.iterations=4", "train.checkpoint_every=2", "train.validate_every=4"]
    recipe = load_finetune_recipe(ROOT / "launchers/recipes/finetune/demo.yaml", keys)
    finetune(recipe, {}, tmp_path / "now")
    assert rates[0] == {1e-6}
    assert sorted(rates[2]) == pytest.approx([1e-3 * 0.5**layer for layer in range(6, -1, -1)])
    as_then = load_finetune_recipe(
        ROOT / "launchers/recipes/finetune/demo.yaml", [*keys, "finetune.layer_decay_of=rate"]
    )
    finetune(as_then, {}, tmp_path / "then")
    assert sorted(rates[4]) == pytest.approx([1e-6 * 0.5**layer for layer in range(6, -1, -1)])
    whole, last = losses(tmp_path / "then"), rates[6:8]
    values = copy.deepcopy(as_then.model_dump(mode="json"))
    del values["finetune"]["layer_decay_of"], values["schedule"]["released"]
    back_to_step_2(tmp_path / "then", values)
    with pytest.raises(RecipeError, match=r"finetune\.layer_decay_of: rate against peak"):
        finetune(
            load_finetune_recipe(
                ROOT / "launchers/recipes/finetune/demo.yaml", [*keys, "finetune.layer_decay_of=peak"]
            ),
            {},
            tmp_path / "then",
        )
    finetune(recipe, {}, tmp_path / "then")
    assert losses(tmp_path / "then") == whole
    assert rates[8:] == last
    (tmp_path / "then/result.json").unlink()
    finetune(recipe, {}, tmp_path / "then")  # its recipe.yaml has the key by now


def test_a_released_pre_training_of_then_keeps_its_steps(alone, shards, tmp_path, rates):
    keys = [*TINY, f"data.shards={shards}", "train.iterations=4", "train.checkpoint_every=2", "fidelity=released"]
    pretrain(load_recipe(RECIPE, [*keys, "schedule.released=false"]), {}, tmp_path / "run")
    whole = losses(tmp_path / "run")
    back_to_step_2(tmp_path / "run", as_stored_then(load_recipe(RECIPE, [*keys, "mim.loss=l1"])))
    pretrain(load_recipe(RECIPE, keys), {}, tmp_path / "run")
    assert losses(tmp_path / "run") == whole
    assert rates[4:] == rates[2:4]
