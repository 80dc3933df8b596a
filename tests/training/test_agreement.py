"""One recipe gives one loss curve, however it is spread over ranks, ZeRO stages and micro-batches."""

import json
from pathlib import Path

import pytest
from training_runs import ROOT, TINY, losses, records, run_ranks

STAGES = {f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}
MAE = [
    *(key for key in TINY if not key.startswith("model.")),
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.drop_path=0.2",
    "mim.decoder_dim=32",
    "mim.decoder_depth=1",
    "mim.decoder_heads=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards) -> Path:
    """All variants of one run: folders named ranks-variant."""
    folder = tmp_path_factory.mktemp("agreement")

    def cell(name: str, config: dict, *overrides: str) -> dict:
        return {"output": folder / name, "config": config, "overrides": [*TINY, f"data.shards={shards}", *overrides]}

    def mae(name: str, config: dict, *overrides: str) -> dict:
        recipe = ROOT / "launchers/recipes/mini_mae.yaml"
        return {**cell(name, config), "recipe": recipe, "overrides": [*MAE, f"data.shards={shards}", *overrides]}

    one = [cell("1-zero0", STAGES["zero0"]), cell("1-zero3", STAGES["zero3"])]
    one.append(cell("1-micro2", {**STAGES["zero2"], "train_micro_batch_size_per_gpu": 2}))
    two = [cell(f"2-{name}", config) for name, config in STAGES.items()]
    two.append(cell("2-micro2", {**STAGES["zero2"], "train_micro_batch_size_per_gpu": 2}))
    two.append(cell("2-zero3-micro1", {**STAGES["zero3"], "train_micro_batch_size_per_gpu": 1}))
    two.append(cell("2-checkpointing", STAGES["zero3"], "train.activation_checkpointing=true"))
    block = {"activation_checkpointing": {"cpu_checkpointing": True}}
    two.append(cell("2-deepspeed-checkpointing", {**STAGES["zero2"], **block}))
    two.append(cell("2-workers", STAGES["zero2"], "data.workers=2"))
    for stage in (1, 2, 3):
        config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2}
        two.append(cell(f"2-bf16-zero{stage}", config, "train.iterations=6", "train.validate_every=100"))
    two += [mae(f"2-mae-{name}", STAGES[name]) for name in ("zero2", "zero3")]
    two.append(mae("2-mae-checkpointing", STAGES["zero3"], "train.activation_checkpointing=true"))
    one.append(mae("1-mae", {"train_micro_batch_size_per_gpu": 2}))
    run_ranks(1, one)
    run_ranks(2, two)
    return folder


FP32 = [
    "1-zero3",
    "1-micro2",
    "2-zero0",
    "2-zero1",
    "2-zero2",
    "2-zero3",
    "2-micro2",
    "2-zero3-micro1",
    "2-checkpointing",
    "2-deepspeed-checkpointing",
    "2-workers",
]


@pytest.mark.parametrize("name", FP32)
def test_losses_agree_in_fp32(runs: Path, name: str):
    plain = losses(runs / "1-zero0")
    assert len(plain) == 20
    assert losses(runs / name) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_agree_within_two_percent_in_bf16(runs: Path, stage: int):
    assert losses(runs / f"2-bf16-zero{stage}") == pytest.approx(losses(runs / "1-zero0")[:6], rel=0.02)


@pytest.mark.parametrize("name", FP32)
def test_validation_loss_agrees(runs: Path, name: str):
    for there, here in zip(records(runs / "1-zero0", "val_loss"), records(runs / name, "val_loss"), strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_training_learns(runs: Path):
    plain = losses(runs / "1-zero0")
    assert sum(plain[-4:]) < 0.9 * sum(plain[:4])


def test_gradient_norms_agree(runs: Path):
    plain = [line["grad_norm"] for line in records(runs / "1-zero0")]
    for name in ("2-zero0", "2-zero1", "2-zero2", "2-zero3"):
        assert [line["grad_norm"] for line in records(runs / name)] == pytest.approx(plain, rel=1e-3)


def test_a_run_folder_holds_what_is_promised(runs: Path):
    run = runs / "2-zero2"
    assert {"step", "loss", "lr", "grad_norm", "images_per_s"} <= records(run)[0].keys()
    assert {"val_loss", "val_loss_l1", "val_loss_l2"} <= records(run, "val_loss")[0].keys()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert (run / "reconstructions/step_00000020.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 20
    assert result["validation"]["val_loss"] == records(run, "val_loss")[-1]["val_loss"]


@pytest.mark.parametrize("name", ["zero2", "zero3", "checkpointing"])
def test_mae_agrees_likewise(runs: Path, name: str):
    assert losses(runs / f"2-mae-{name}") == pytest.approx(losses(runs / "1-mae"), rel=1e-5)
    for there, here in zip(
        records(runs / "1-mae", "val_loss"), records(runs / f"2-mae-{name}", "val_loss"), strict=True
    ):
        assert here == pytest.approx(there, rel=1e-5)
    assert (runs / f"2-mae-{name}/reconstructions/step_00000020.png").exists()
