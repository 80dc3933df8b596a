"""Mistakes and damage: each is named, with what to do, and nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ENVIRONMENT, RECIPE, ROOT, TINY, launcher, losses, records

from mimscale.data import ShardError, ShardIndex
from mimscale.training.ds_config import DeepSpeedConfigError
from mimscale.training.errors import CheckpointError, RankLocalError, TrainingError
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import RecipeError, load_recipe
from mimscale.training.run_folder import saved_steps

SHORT = [*TINY, "train.iterations=8", "train.checkpoint_every=4", "train.validate_every=100"]

pytestmark = pytest.mark.usefixtures("alone")


def train(run: Path, *overrides: str, **config) -> dict:
    return pretrain(load_recipe(RECIPE, [*SHORT, *overrides]), config, run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(run, f"data.shards={shards}")
    return run


@pytest.fixture
def copied(tmp_path, finished) -> Path:
    """A finished run to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture
def copied_shards(tmp_path, shards) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


# -- the command line --------------------------------------------------------------------------------------------------


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.iteration=5", "did you mean 'train.iterations'"),
        ("iterations=5", "did you mean 'train.iterations'"),
        ("model.mask_ratio=0.5", "did you mean 'mim.mask_ratio'"),
        ("train.iterations=many", "train.iterations"),
        ("mim.loss=l3", "mim.loss"),
        ("data.image_size=100", "would fit"),
        ("train.iterations", "is not key=value"),
    ],
)
def test_a_mistaken_override_is_one_clear_message(tmp_path, override, message):
    done = launch(*launcher(tmp_path / "run", ROOT / "ds_configs/cpu.json", override))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_invalid_json_is_named_with_its_line(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{\n  "zero_optimization": {"stage": 2,}\n}')
    done = launch(*launcher(tmp_path / "run", broken))
    assert done.returncode == 1
    assert f"{broken} is not valid JSON" in done.stderr
    assert "line 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_shards_are_one_clear_message(tmp_path):
    done = launch(*launcher(tmp_path / "run", ROOT / "ds_configs/cpu.json", f"data.shards={tmp_path / 'nowhere'}"))
    assert done.returncode == 1
    assert str(tmp_path / "nowhere") in done.stderr
    assert "Traceback" not in done.stderr


# -- recipe against DeepSpeed configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "both"),
    [
        ({"train_batch_size": 64}, ("train_batch_size=64", "train.global_batch=8")),
        ({"gradient_accumulation_steps": 3}, ("gradient_accumulation_steps=3", "train.global_batch")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping=1.0", "optimizer.clip=5.0")),
        ({"optimizer": {"type": "SGD"}}, ("optimizer.type=SGD", "recipe's optimizer")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ("optimizer.params.lr=1.0", "optimizer.lr=")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "schedule")),
        ({"train_micro_batch_size_per_gpu": 3}, ("train_micro_batch_size_per_gpu=3", "train.global_batch=8")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled", "bf16.enabled")),
        ({"zero_optimization": {"stage": 4}}, ("zero_optimization.stage", "4")),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, ("mics_shard_size", "zero_hpz_partition_size")),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, ("zero_hpz_partition_size=8", "stage 2")),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "8"}}, ("zero_hpz_partition_size", "'8'")),
        ({"zero_optimization": {"stage": 1, "frobnicate": 8}}, ("DeepSpeed does not take", "frobnicate")),
    ],
)
def test_a_contradiction_names_both_keys(tmp_path, shards, config, both):
    with pytest.raises(DeepSpeedConfigError) as error:
        train(tmp_path / "run", f"data.shards={shards}", **config)
    for part in both:
        assert part in str(error.value)


def test_checkpointing_on_in_one_and_off_in_the_other_is_an_error(tmp_path, shards):
    with pytest.raises(DeepSpeedConfigError, match=r"train\.activation_checkpointing=false"):
        train(
            tmp_path / "run",
            f"data.shards={shards}",
            "train.activation_checkpointing=false",
            activation_checkpointing={"cpu_checkpointing": False},
        )


def test_a_deepspeed_configuration_that_agrees_is_taken(tmp_path, shards):
    agreeing = {"train_batch_size": 8, "gradient_clipping": 5.0, "gradient_accumulation_steps": "auto"}
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "tiny"}}
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}}}
    train(tmp_path / "run", f"data.shards={shards}", **agreeing, **monitor, **optimizer)
    written = "".join(path.read_text() for path in (tmp_path / "csv").rglob("*mimscale_loss*.csv"))
    assert len(written.splitlines()) == 9  # DeepSpeed's own monitor: a head and a line a step


# -- shards ------------------------------------------------------------------------------------------------------------


def test_a_fraction_that_is_not_there_lists_those_that_are(tmp_path, shards):
    with pytest.raises(ShardError, match=r"'30'.*10, 20, 50, 100"):
        train(tmp_path / "run", f"data.shards={shards}", "data.fraction=30")


def test_a_half_written_build_is_named(tmp_path, copied_shards):
    (copied_shards / "index.json").unlink()
    with pytest.raises(ShardError, match="build"):
        train(tmp_path / "run", f"data.shards={copied_shards}")


def test_an_index_that_does_not_match_its_tars_is_named(tmp_path, copied_shards):
    tar = sorted(copied_shards.glob("*.tar"))[0]
    os.truncate(tar, tar.stat().st_size - 512)
    with pytest.raises(ShardError, match=f"{tar.name}.*does not match"):
        train(tmp_path / "run", f"data.shards={copied_shards}")


def test_a_damaged_image_is_skipped_counted_and_named(tmp_path, copied_shards, capfd):
    index = ShardIndex.load(copied_shards)
    victims = index.samples("10")[:3]
    for victim in victims:
        with index.shard_of(victim).open("r+b") as tar:
            tar.seek(index.offset(victim) + 2000)
            tar.write(bytes(200))
    keys = {index.key(int(victim)) for victim in victims}
    result = train(
        tmp_path / "run",
        f"data.shards={copied_shards}",
        "data.fraction=10",
        "train.iterations=32",
        "schedule.decay_at=1",
    )
    assert result["steps"] == 32
    assert set(result["skipped"]) == keys
    said = capfd.readouterr().out
    assert all(key in said for key in keys)
    with pytest.raises(RankLocalError, match="damaged"):
        train(
            tmp_path / "strict",
            f"data.shards={copied_shards}",
            "data.fraction=10",
            "data.max_damaged=0",
            "train.iterations=32",
        )


# -- batches, models, checkpoints --------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_says_what_would():
    from mimscale.training.ds_config import split_batch

    with pytest.raises(DeepSpeedConfigError, match=r"train\.global_batch=10.*4 ranks.*8 or 12"):
        split_batch({}, 10, 4, None)


def test_sizes_that_do_not_fit_are_a_recipe_error(tmp_path, shards):
    with pytest.raises(RecipeError, match="head"):
        train(tmp_path / "run", f"data.shards={shards}", "model.num_heads=[3,5,7,9]")


def test_another_recipe_in_the_same_folder_is_refused(finished, shards):
    before = sorted(str(path) for path in finished.rglob("*"))
    with pytest.raises(RecipeError, match=r"model\.embed_dim: 16 against 32.*another --output"):
        train(finished, f"data.shards={shards}", "model.embed_dim=32")
    assert sorted(str(path) for path in finished.rglob("*")) == before


def test_a_checkpoint_of_another_model_is_named(copied, shards):
    (copied / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint of another model.*embed"):
        train(copied, f"data.shards={shards}", "model.embed_dim=32", "train.iterations=12", "schedule.decay_at=1")


def test_shards_of_another_build_are_refused(copied, tmp_path, shards):
    source, out = shards.parent / "train", tmp_path / "shards"
    build = ["shards/build.py", "build", "--source", str(source), "--out", str(out), "--seed", "1"]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    with pytest.raises(CheckpointError, match="build"):
        train(copied, f"data.shards={out}")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest", "garbled manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(copied, shards, finished, damage, capfd):
    newest = copied / "checkpoints/step_00000008"
    data = next(newest.glob("*.safetensors"))
    if damage == "truncated":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "no manifest":
        (newest / "checkpoint.json").unlink()
    else:
        (newest / "checkpoint.json").write_text("{")
    (copied / "result.json").unlink()
    train(copied, f"data.shards={shards}")
    assert "damaged checkpoint" in (said := capfd.readouterr().out)
    assert "step_00000008" in said
    assert losses(copied) == losses(finished)
    assert saved_steps(copied) == [4, 8]


def test_no_whole_checkpoint_is_not_a_silent_fresh_start(copied, shards):
    for data in (copied / "checkpoints").rglob("*.safetensors"):
        data.write_bytes(b"nothing")
    (copied / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        train(copied, f"data.shards={shards}")
    assert len(records(copied)) == 8


def test_a_branch_from_nowhere_lists_the_steps_there_are(tmp_path, finished, shards):
    with pytest.raises(CheckpointError, match=r"step 5 .*4, 8"):
        train(tmp_path / "run", f"data.shards={shards}", f"train.branch_from={finished}@5")


def test_a_longer_run_may_go_on_only_where_its_rates_agree(copied, shards):
    with pytest.raises(RecipeError, match="branch_from"):
        train(copied, f"data.shards={shards}", "train.iterations=64")
    shutil.rmtree(copied / "checkpoints/step_00000008")
    assert train(copied, f"data.shards={shards}", "train.iterations=12")["steps"] == 12


def test_a_loss_that_turns_nan_stops_with_the_step_and_the_samples(tmp_path, shards):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"step \d+: .*(nan|inf).*Samples.*(mono|poly)") as error:
        train(
            run,
            f"data.shards={shards}",
            "optimizer.lr=1e30",
            "optimizer.clip=0",
            "schedule.warmup=0",
            "train.iterations=30",
        )
    assert "optimizer.lr" in str(error.value)
    assert "NaN" not in (run / "metrics.jsonl").read_text()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_while_saving_loses_nothing(tmp_path, shards, finished):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        run = disk / "run"
        ballast = disk / "ballast"
        size = sum(path.stat().st_size for path in (finished / "checkpoints/step_00000004").iterdir())
        with ballast.open("wb") as file:
            file.write(bytes(100 * 2**20 - int(1.6 * size)))
        with pytest.raises(CheckpointError, match=r"step_00000008.*No space left.*step_00000004 is untouched"):
            train(run, f"data.shards={shards}")
        assert saved_steps(run) == [4]
        assert not list((run / "checkpoints").glob(".saving*"))
        ballast.unlink()
        train(run, f"data.shards={shards}")
        assert losses(run) == losses(finished)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
