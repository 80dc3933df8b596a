"""Memory is planned before anything is queued, and the plan is what a run allocates."""

import json
import re

import psutil
import pytest
import torch
from training_runs import ENVIRONMENT, RECIPE, ROOT, TINY

from mimscale.cli import main
from mimscale.commands.bench import main as bench
from mimscale.training.ds_config import read_ds_config, zero_stage
from mimscale.training.planning.counting import activation_bytes, peak_bytes, recomputed_blocks
from mimscale.training.recipe import load_recipe

SMALL = ["model.embed_dim=64", "model.num_heads=[2,4,8,16]", "data.image_size=96", "model.window_size=6"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_is_within_a_tenth_of_what_is_allocated(ranks, capsys, monkeypatch):
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    bench(["memory", "--allocated", "--model", "swinv2_s", "--batch", "4", "--ranks", str(ranks), *SMALL])
    found = re.findall(r"^(\d) +[\d.]+ +[\d.]+ +(-?[\d.]+)%$", capsys.readouterr().out, re.M)
    assert [stage for stage, _ in found] == ["0", "1", "2", "3"]
    assert all(abs(float(off)) < 10 for _, off in found), found


def test_the_giant_is_planned_on_64_gpus_with_a_configuration_to_use(tmp_path, capsys):
    config = tmp_path / "ds.json"
    arguments = ["--model", "swinv2_g", "--zero", "3", "--gpus", "64", "--gpu-memory", "80", "--price", "2"]
    assert main(["plan-memory", *arguments, "--write", str(config)]) == 0
    said = capsys.readouterr().out
    assert "1,072.0 M parameters" in said
    for stage in ("0 (as 1 in bf16)", "1", "2", "3", "2 + optimizer offloaded", "3 + optimizer and param offloaded"):
        assert re.search(rf"^{re.escape(stage)} +[\d.]+", said, re.M), stage
    assert re.search(r"125,000 iterations: +[\d.]+ days, +[\d,]+ GPU-hours, [\d,]+ at 2 a GPU-hour", said)
    assert zero_stage(read_ds_config(config)) == 3
    micro = json.loads(config.read_text())["train_micro_batch_size_per_gpu"]
    assert 2048 // 64 % micro == 0


def test_twice_the_mfu_is_half_the_time(capsys):
    hours = []
    for mfu in ("0.2", "0.4"):
        assert main(["plan-memory", "--model", "swinv2_s", "--mfu", mfu, "--iterations", "100000"]) == 0
        hours.append(float(re.search(r"([\d,]+) GPU-hours", capsys.readouterr().out)[1].replace(",", "")))
    assert hours[0] == pytest.approx(2 * hours[1], rel=0.02)


def test_what_does_not_fit_names_what_would(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan-memory", "--model", "swinv2_g", "--zero", "1", "--gpus", "64", "--gpu-memory", "3"])
    assert stop.value.code == 1
    assert re.search(r"ZeRO stage 1 does not fit into 3 GB; ZeRO stage 3.* fits", capsys.readouterr().err)


def test_a_shipped_recipe_is_planned_with_its_own_batch(capsys):
    recipe = str(ROOT / "launchers/recipes/swinv2_b.yaml")
    assert (
        main(["plan-memory", "--recipe", recipe, "--gpus", "8", "--checkpointing", "on", "train.global_batch=512"]) == 0
    )
    said = capsys.readouterr().out
    assert "every block recomputed, batch 512" in said
    assert '"activation_checkpointing"' in said


def test_the_peak_of_memory_is_what_was_held_at_most():
    device, more = torch.device("cpu"), 200_000_000
    before = peak_bytes(device)
    block = torch.ones(before - psutil.Process().memory_info().rss + more, dtype=torch.uint8)
    held = peak_bytes(device)
    assert before + more / 2 < held < before + 2 * more
    del block
    assert peak_bytes(device) == held


def test_a_decoder_of_blocks_is_recomputed_like_the_encoder():
    def kept(*overrides):
        return activation_bytes(load_recipe(RECIPE, [*TINY, *overrides]), bf16=False)

    recomputed = "train.activation_checkpointing=true"
    assert kept("mim.decoder=8-blocks") > kept("mim.decoder=linear")
    assert kept("mim.decoder=8-blocks", recomputed) < 1.1 * kept("mim.decoder=linear", recomputed)
    recipe = load_recipe(RECIPE, [*TINY, "mim.decoder=8-blocks"])
    assert len(recomputed_blocks(recipe)) == len(recomputed_blocks(load_recipe(RECIPE, TINY))) + 8


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("plan-memory", "--gpus", ("0", "-1", "9" * 5000, "nan", "")),
        ("plan-memory", "--gpu-memory", ("0", "nan", "inf", "1e400", "-1")),
        ("plan-memory", "--mfu", ("0", "nan", "2")),
        ("plan-memory", "--price", ("-1", "nan")),
        ("plan-memory", "--iterations", ("0", "1e5", "10" * 20)),
        ("plan-memory", "--micro-batch", ("0", "\x1b", "\udcff")),
        ("plan-communication", "--gpus", ("0", "-8", "10" * 20)),
        ("plan-communication", "--batch", ("0", "10" * 20)),
        ("plan-communication", "--micro-batches", ("0", "nan")),
        ("study", "--length", ("0", "x")),
        ("study", "--budget", ("nan", "-1", "0")),
    ],
)
def test_numbers_that_no_machine_has_are_named_with_their_option(capsys, command, option, values):
    asked = {"study": ["predict", "published"]}.get(command, ["--model", "swinv2_s"])
    for value in values:
        with pytest.raises(SystemExit):
            main([command, *asked, f"{option}={value}"])
        said = capsys.readouterr().err
        assert f"argument {option}: '" in said and "is not a number" in said and "\x1b" not in said and len(said) < 3000


def test_what_takes_more_memory_than_there_is_is_refused_before_it_is_counted(capsys):
    for keys in (["model.window_size=128", "data.image_size=4096"], ["model.depths=[256,256,256,256]"]):
        with pytest.raises(SystemExit):
            main(["plan-memory", "--recipe", "swinv2_b", *keys])
        assert capsys.readouterr().err.startswith(f"mimscale: error: model in the recipe: {keys[0].partition('=')[0]}=")
