"""Training on a GPU: every ZeRO stage alike, resumed as if never stopped, within the planned memory, compiled the same."""

import subprocess
import sys

import pytest
import torch
from training_runs import ENVIRONMENT, RECIPE, ROOT, TINY, alone, go_on, kill_after_a_checkpoint, losses, write_config  # noqa: F401

from mimscale.data import MIMStream, ShardIndex
from mimscale.training.ds_config import DeepSpeedConfigError, reconcile, split_batch
from mimscale.training.engine import Engine
from mimscale.training.optimizer import decay_groups
from mimscale.training.planning.counting import rank_memory
from mimscale.training.pretraining.module import build_objective
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def here() -> Ranks:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(0, 1, 0, 1, device)


@pytest.fixture(scope="module")
def batches(photo_shards):
    stream = MIMStream(
        ShardIndex.load(photo_shards), fraction="100", seed=0, image_size=96, global_batch=8, stop_step=6
    )
    return [(batch.images, batch.mask, batch.draw_keys) for batch in stream]


def trained(here, batches, photo_shards, *overrides, stage=0, bf16=False, micro=8):
    """Losses and gradient norms of a few steps, and the weights after them."""
    recipe = load_recipe(RECIPE, [*TINY, f"data.shards={photo_shards}", *overrides])
    config = {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "train_micro_batch_size_per_gpu": micro,
    }
    settled = reconcile(config, recipe, split_batch(config, 8, 1, None), here.device.type == "cuda")
    engine = Engine(lambda: build_objective(recipe), lambda m: decay_groups(m, recipe), recipe, settled, here)
    figures = [(engine.forward_backward(batch).mean, engine.apply(lambda scale: 1e-3 * scale)) for batch in batches]
    weights = {name: value for name, value in engine.full_state(lambda name: True) if "exp_avg" not in name}
    engine.close()
    return torch.tensor(figures, dtype=torch.float64), weights


@pytest.fixture(scope="module")
def plain(here, batches, photo_shards):
    return trained(here, batches, photo_shards)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("micro", [8, 4])
def test_every_stage_trains_alike(here, batches, photo_shards, plain, figure, stage, micro):
    figures, _ = trained(here, batches, photo_shards, stage=stage, micro=micro)
    apart = (figures / plain[0] - 1).abs().max().item()
    figure(f"ZeRO {stage}, {8 // micro} micro-batches: losses and norms off by", apart)
    assert apart < 1e-4


def test_bf16_stays_near_at_every_stage(here, batches, photo_shards, plain, figure):
    found = [trained(here, batches, photo_shards, stage=stage, bf16=True)[0] for stage in (1, 2, 3)]
    for stage, figures in zip((1, 2, 3), found, strict=True):
        apart = (figures[:, 0] / plain[0][:, 0] - 1).abs().max().item()
        figure(f"ZeRO {stage} in bf16: losses off by", apart)
        assert apart < 2e-2
        assert (figures[:, 0] / found[0][:, 0] - 1).abs().max() < 5e-3


def test_the_same_run_twice(here, batches, photo_shards, figure):
    """Every digit, as on a CPU, where torch is asked to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (first, weights), (second, again) = (trained(here, batches, photo_shards, stage=2) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    differ = sum(not torch.equal(weights[name], again[name]) for name in weights)
    figure("asked to be deterministic: weights that differ between two runs", differ)
    assert torch.equal(first, second) and not differ


def test_recomputed_blocks_train_alike(here, batches, photo_shards, plain):
    figures, _ = trained(here, batches, photo_shards, "train.activation_checkpointing=true", stage=3)
    assert (figures / plain[0] - 1).abs().max() < 1e-4


def test_compiled_blocks_train_alike(here, batches, photo_shards, plain, figure):
    figures, _ = trained(here, batches[:3], photo_shards, "train.compile=true", stage=1)
    apart = (figures / plain[0][:3] - 1).abs().max().item()
    figure("compiled blocks: losses and norms off by", apart)
    assert apart < 1e-4


def test_compiled_blocks_at_stage_3_are_refused(here, batches, photo_shards):
    with pytest.raises(DeepSpeedConfigError, match=r"train\.compile"):
        trained(here, batches[:1], photo_shards, "train.compile=true", stage=3)


def test_the_memory_is_as_planned(here, figure):
    small = here.device.type == "cpu"
    sizes = ["data.image_size=64", "model.window_size=2"] if small else []
    batch = 2 if small else 32
    recipe = load_recipe("swinv2_s", [*sizes, f"train.global_batch={batch}"])
    config = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": batch}
    settled = reconcile(config, recipe, split_batch(config, batch, 1, None), not small)
    planned = rank_memory(recipe, settled, 1, batch).total
    from mimscale.commands.bench.memory import peak_allocated

    held = peak_allocated(recipe, settled, here)
    figure("swinv2_s, ZeRO 1, bf16, 32 images: GB held", held / 1e9)
    figure("swinv2_s, ZeRO 1, bf16, 32 images: GB planned", planned / 1e9)
    assert small or 0.7 * planned < held < 1.1 * planned


def test_a_killed_run_resumes_to_the_same_losses(tmp_path, photo_shards):
    config = write_config(tmp_path, zero_optimization={"stage": 2}, bf16={"enabled": torch.cuda.is_available()})
    settings = [*TINY, f"data.shards={photo_shards}", "train.checkpoint_every=4", "train.validate_every=1000"]

    def command(run):
        arguments = ["--deepspeed_config", config, "--recipe", RECIPE, "--output", run, *settings]
        return [sys.executable, "launchers/pretrain.py", *map(str, arguments)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(command(whole), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    kill_after_a_checkpoint(command(killed), killed, 8)
    go_on(command(killed))
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-6 if not torch.cuda.is_available() else 1e-4)
