"""Bad batches are left out or gone back before, and saving beside training writes what saving in line writes."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from training_runs import ROOT, TINY, losses, records

from mimscale.data.draws import draw_keys
from mimscale.training.checkpoint import Checkpoint, remove_after
from mimscale.training.errors import CheckpointError, TrainingError
from mimscale.training.faults import spikes
from mimscale.training.pretraining.module import MIMModule
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import Train, load_recipe
from mimscale.training.run_folder import saved_steps

SHORT = [
    *TINY,
    "train.iterations=9",
    "train.checkpoint_every=3",
    "train.keep_checkpoints=9",
    "train.validate_every=100",
]
ZERO2 = {"zero_optimization": {"stage": 2}}
BATCH = 8


@pytest.fixture
def train(shards, alone, tmp_path, monkeypatch):
    """Train in a folder of this test; the batch of step ``bad`` (from 1) has a loss that is not a number, every time."""

    def start(name, config, *overrides, bad=None):
        recipe = load_recipe(ROOT / "launchers/recipes/demo.yaml", [*SHORT, f"data.shards={shards}", *overrides])
        spoilt = None if bad is None else draw_keys(recipe.train.seed, np.array([(bad - 1) * BATCH])).item()
        plain = MIMModule.forward

        def forward(self, images, mask, draw_keys=None):
            loss = plain(self, images, mask, draw_keys)
            here = self.training and images.device.type == "cpu" and spoilt in draw_keys.tolist()
            return loss * float("nan") if here else loss

        with monkeypatch.context() as patch:
            patch.setattr(MIMModule, "forward", forward)
            result = pretrain(recipe, config, tmp_path / name)
        return tmp_path / name, result

    return start


def test_a_bad_batch_is_left_out_alike_at_every_stage(train):
    found = {}
    for stage in range(4):
        config = {"zero_optimization": {"stage": stage}}
        run, result = train(f"zero{stage}", config, "train.on_spike=skip", bad=5)
        assert list(result["left_out"]) == ["5"]
        assert [line["step"] for line in records(run)] == [1, 2, 3, 4, 6, 7, 8, 9]
        assert records(run, "left_out") == [{"step": 5, "left_out": "the loss became nan on rank 0"}]
        found[stage] = [line["loss"] for line in records(run)]
    for stage in range(1, 4):
        assert found[stage] == pytest.approx(found[0], rel=1e-5)


def test_a_run_that_left_a_batch_out_resumes_to_the_digit(train):
    run, _ = train("run", ZERO2, "train.on_spike=skip", bad=5)
    uncut = records(run)
    remove_after(run, 6)
    (run / "result.json").unlink()
    train("run", ZERO2, "train.on_spike=skip", bad=5)
    lines = records(run)
    assert [line["loss"] for line in lines] == [line["loss"] for line in uncut]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_roll_back_goes_to_a_checkpoint_before_and_leaves_the_batches_since_out(train, stage):
    config = {"zero_optimization": {"stage": stage}}
    clean, _ = train("clean", config)
    run, result = train("run", config, "train.on_spike=rollback", "train.rollback_steps=2", bad=8)
    assert list(result["left_out"]) == ["7", "8"]
    assert result["steps"] == 9
    assert [line["step"] for line in records(run)] == [1, 2, 3, 4, 5, 6, 9]
    assert [line["loss"] for line in records(run)][:6] == losses(clean)[:6]
    assert saved_steps(run) == [3, 6, 9]


def policy(folder, on_spike, losses):
    return spikes.SpikePolicy(Train(on_spike=on_spike), spikes.LeftOut(folder / "left_out.json", writes=True), losses)


def test_a_spike_is_told_from_the_losses_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "LEAST", 3)
    found = policy(tmp_path, "skip", [0.5, 0.6])
    assert found.judge(0, 0.4) == found.judge(1, 1.9) == spikes.Apply()  # 1.9 was the first that it could tell
    spike = found.judge(2, 2.3)
    assert "over 4 times the median 0.55" in spike.reason
    assert found.judge(3, 1.9) == spikes.Apply()  # what was left out is no part of what is usual
    assert found.judge(2, 0.5) == spikes.Skip(spike.reason, known=True)
    again = policy(tmp_path, "stop", [])
    assert again.judge(2, 0.5) == spikes.Skip(spike.reason, known=True)  # so does every later start


def test_what_is_done_about_a_bad_batch_is_what_on_spike_says(tmp_path):
    bad = "the loss became nan on ranks 1, 3"
    assert policy(tmp_path, "stop", []).judge(7, float("nan"), (1, 3)) == spikes.Stop(bad, (1, 3))
    assert policy(tmp_path, "rollback", []).judge(7, float("nan"), (1, 3)) == spikes.RollBack(bad, to=0)
    assert policy(tmp_path, "skip", []).judge_corruption(7, "inf") == spikes.RollBack("inf", to=7)
    found = policy(tmp_path, "skip", [])
    for step in range(spikes.MOST_IN_A_ROW):
        assert found.judge(step, float("nan"), (1, 3)) == spikes.Skip(bad)
    assert "in a row" in found.judge(spikes.MOST_IN_A_ROW, float("nan"), (1, 3)).reason


def test_a_bad_batch_stops_the_run_and_names_rank_host_step_and_samples(train):
    said = rf"step 5: the loss became nan on rank 0 \({socket.gethostname()}\); .*step_00000003.*Samples.*on_spike"
    with pytest.raises(TrainingError, match=said):
        train("run", ZERO2, bad=5)


def test_saving_beside_training_writes_what_saving_in_line_writes(train):
    kept = {}
    for mode in ("async", "blocking"):
        run, _ = train(mode, ZERO2, f"train.save={mode}")
        saved = [Checkpoint.open(run / "checkpoints" / f"step_{step:08d}") for step in saved_steps(run)]
        assert [checkpoint.step for checkpoint in saved] == [3, 6, 9]
        assert all(checkpoint.damage(file) is None for checkpoint in saved for file in checkpoint.manifest["files"])
        kept[mode] = [json.dumps({**checkpoint.manifest, "recipe": None}) for checkpoint in saved]
    assert kept["async"] == kept["blocking"]


def test_a_checkpoint_of_the_first_format_is_refused_with_what_to_do(train):
    run, _ = train("run", ZERO2, "train.iterations=3")
    path = run / "checkpoints/step_00000003/checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(
        CheckpointError, match=r"step_00000003 has format 1; .* reads format 2: resume it with the version"
    ):
        train("run", ZERO2)


def test_no_bit_of_what_a_checkpoint_says_of_itself_can_change_unseen(train):
    run, _ = train("run", ZERO2, "train.iterations=3")
    path = run / "checkpoints/step_00000003/checkpoint.json"
    told, plain = Checkpoint.open(path.parent).manifest, path.read_bytes()
    unseen = 0
    for bit in range(0, 8 * len(plain), 97):
        flipped = bytearray(plain)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert Checkpoint.open(path.parent).manifest == told  # a blank, then
            unseen += 1
        except CheckpointError as error:
            assert "checkpoint" in str(error)
    assert unseen < 8 * len(plain) / 97 / 3


def test_a_checkpoint_still_being_written_is_none_yet(train, monkeypatch):
    """The run continues while the disk is slow; what is not whole does not count, and the end waits for it."""
    from mimscale.training import checkpoint as checkpoints

    seen = []
    plain = checkpoints.write_chunks

    def slow(folder, rank, tensors):
        import time

        files = plain(folder, rank, tensors)
        time.sleep(1.0)
        seen.append(saved_steps(folder.parents[1]))
        return files

    monkeypatch.setattr(checkpoints, "write_chunks", slow)
    run, _ = train("run", ZERO2)
    assert seen == [[], [3], [3, 6]]
    assert saved_steps(run) == [3, 6, 9]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(alone, shards, tmp_path, monkeypatch):
    """Every file of it is synced before the folder gets its name, and the name after that."""
    run, synced, named = tmp_path / "run", set(), []
    fsync, rename = os.fsync, Path.rename

    def noted_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def noted_rename(self: Path, target: Path) -> Path:
        if Path(target).name == "step_00000002":
            files = {path.name: path.stat().st_ino in synced for path in self.iterdir()}
            synced.discard((run / "checkpoints").stat().st_ino)
            named.append(files)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    keys = [*SHORT, f"data.shards={shards}", "train.iterations=2"]
    pretrain(load_recipe(ROOT / "launchers/recipes/demo.yaml", keys), {}, run)
    assert len(named) == 1 and len(named[0]) >= 2
    assert all(named[0].values()), named[0]
    assert (run / "checkpoints").stat().st_ino in synced
