"""Which checkpoints stay: whole ones count, names do not."""

import os

import pytest
import torch

from mimscale.training import checkpoint as checkpoints
from mimscale.training.checkpoint import Checkpoint, Retention
from mimscale.training.errors import CheckpointError
from mimscale.training.run_folder import saved_steps, step_name


@pytest.fixture
def run(tmp_path):
    """An empty run."""
    return tmp_path / "run"


def save(run, step, retention=None):
    tensors = {"weight": torch.full((8, 8), float(step)), "bias": torch.zeros(8)}
    beside = checkpoints.begin(run, step)
    files = checkpoints.write_chunks(beside, 0, tensors.items())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    checkpoints.commit(run, step, checkpoints.manifest(step, shapes, files, {"recipe": {}, "data": {"build": "b"}}))
    if retention is not None:
        retention.just_written(step, files)
        return retention.apply()
    return []


def damage(run, *steps):
    for step in steps:
        data = next((run / "checkpoints" / step_name(step)).glob("*.safetensors"))
        os.truncate(data, data.stat().st_size - 100)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(run):
    return checkpoints.newest_whole(run)[0].step


def test_damaged_checkpoints_do_not_push_whole_ones_out(run):
    for step in (12, 48, 60):
        save(run, step)
    damage(run, 48, 60)
    retention = Retention(run, keep=2, pinned=[12])
    lines = save(run, 24, retention)
    assert [step_name(60) in lines[0], step_name(48) in lines[1]] == [True, True]
    assert names(run) == ["damaged_step_00000048", "damaged_step_00000060", "step_00000012", "step_00000024"]
    assert save(run, 36, retention) == []
    assert saved_steps(run) == [12, 24, 36]
    save(run, 48, retention)
    assert saved_steps(run) == [12, 36, 48]


def test_the_one_just_written_stays_where_later_ones_were_put_back(run):
    for step in (20, 24, 28):
        save(run, step)
    save(run, 4, Retention(run, keep=2))
    assert saved_steps(run) == [4, 24, 28]


def test_a_checkpoint_damaged_after_it_was_seen_whole_is_seen(run):
    retention = Retention(run, keep=2)
    for step in (1, 2):
        save(run, step, retention)
    data = next((run / "checkpoints" / step_name(2)).glob("*.safetensors"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert "SHA-256" in save(run, 3, retention)[0]
    assert saved_steps(run) == [1, 3]


def test_what_is_not_a_checkpoint_is_neither_counted_nor_touched(run):
    folder = run / "checkpoints"
    for name in (
        "step_00000099",
        "step_" + "9" * 20,
        "step_000000000007",
        "step_\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661",
        ".saving_of_mine_step_1",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "step_00000098").write_text("a note")
    foreign = names(run)
    retention = Retention(run, keep=1)
    for step in (4, 8, 12):
        save(run, step, retention)
    checkpoints.remove_leftovers(run)
    assert newest(run) == 12
    assert [name for name in names(run) if name in foreign] == foreign
    assert saved_steps(run) == [8, 12]


def test_one_checkpoint_to_keep_survives_a_damaged_newest(run):
    retention = Retention(run, keep=1)
    for step in (4, 8, 12):
        save(run, step, retention)
    damage(run, 12)
    assert newest(run) == 8
    save(run, 10, Retention(run, keep=1))
    assert saved_steps(run) == [8, 10]


def test_somebody_elses_folder_of_the_name_is_moved_and_not_lost(run):
    (run / "checkpoints" / step_name(4)).mkdir(parents=True)
    (run / "checkpoints" / step_name(4) / "notes.txt").write_text("mine")
    save(run, 4)
    assert newest(run) == 4
    assert (run / "checkpoints/replaced_step_00000004/notes.txt").read_text() == "mine"


def test_going_back_needs_something_whole_to_go_back_to(run):
    for step in (4, 8, 12):
        save(run, step)
    damage(run, 4, 8)
    with pytest.raises(CheckpointError, match=r"go back to step 9.*later checkpoints are untouched"):
        checkpoints.remove_after(run, 9)
    assert saved_steps(run) == [4, 8, 12]
    checkpoints.remove_after(run, 12)
    assert newest(run) == 12


def test_a_linked_checkpoint_is_unlinked_and_not_emptied(run, tmp_path):
    for step in (4, 8, 12):
        save(run, step)
    (run / "checkpoints" / step_name(4)).rename(tmp_path / "elsewhere")
    (run / "checkpoints" / step_name(4)).symlink_to(tmp_path / "elsewhere")
    assert Retention(run, keep=2).apply() == []
    assert saved_steps(run) == [8, 12]
    assert Checkpoint.open(tmp_path / "elsewhere").problems() == []


def test_a_renamed_checkpoint_does_not_pass_for_another_step(run):
    save(run, 4)
    save(run, 8)
    (run / "checkpoints" / step_name(8)).rename(run / "checkpoints" / step_name(16))
    found, damaged = checkpoints.newest_whole(run)
    assert found.step == 4
    assert "name contradicts" in damaged[16][0]


def test_a_pipe_in_place_of_a_file_is_damage_and_ends(run):
    save(run, 4)
    save(run, 8)
    data = next((run / "checkpoints" / step_name(8)).glob("*.safetensors"))
    data.unlink()
    os.mkfifo(data)
    assert newest(run) == 4
