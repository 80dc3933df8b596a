"""What fine-tuning starts from, and which layers move how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference_photographs import photographs
from reference_swin_v2 import released_checkpoint, swin_features
from safetensors.torch import save_file
from training_runs import ROOT, TINY

import mimscale
from mimscale.cli import main
from mimscale.mim import MAE
from mimscale.models import create_encoder
from mimscale.models.weights.export import export_weights
from mimscale.models.weights.released import CheckpointMismatch
from mimscale.training.errors import CheckpointError
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import RecipeError, load_recipe
from mimscale.transfer.layer_decay import layer_decay_groups
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.task import finetune
from mimscale.transfer.weights import encoder_weights, make_encoder

RECIPES = ROOT / "launchers/recipes/finetune"
DEPTHS, HEADS = (2, 2, 2, 2), (2, 2, 4, 4)
SMALL = ["model.embed_dim=16", f"model.depths={list(DEPTHS)}", f"model.num_heads={list(HEADS)}"]
SMALL_VIT = ["model.embed_dim=32", "model.depth=2", "model.num_heads=2"]
# As tests/training_runs.py's TINY, for a fine-tuning.
TINY_ENCODER = ["model.embed_dim=16", "model.depths=[2,1,1,1]", "model.num_heads=[1,2,4,8]", "model.window_size=6"]


def encoder_of(*overrides: str, recipe: str = "imagenet1k_swinv2_s", size: int = 224, classes: int = 7):
    return make_encoder(load_finetune_recipe(RECIPES / f"{recipe}.yaml", list(overrides)), size, classes)


def start(encoder, source) -> list[str]:
    """Load; returns the names that keep their initial values."""
    weights = encoder_weights(str(source), encoder)
    new = []
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if (value := weights(name)) is None:
                new.append(name)
            else:
                parameter.copy_(value)
    return new


def released_file(folder: Path, depths: tuple[int, ...] = DEPTHS) -> tuple[dict[str, torch.Tensor], Path]:
    """A pre-training of 192 px and window 12 in the released names, with decoder, mask token and tables."""
    state = released_checkpoint(16, depths, HEADS, window=12, image=192, seed=3)
    path = folder / "pretrain.pth"
    torch.save({"model": state}, path)
    return {name.removeprefix("encoder."): value for name, value in state.items()}, path


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[dict[str, torch.Tensor], Path]:
    return released_file(tmp_path_factory.mktemp("released"))


# -- layers ----------------------------------------------------------------------------------------------------------------


STEM = ("cls_token", "pos_embed", "patch_embed")


def expected_layer(name: str, recipe: str) -> int:
    """FACTS of the paper's released code: embedding 0, block j is j + 1, merging with the block before, the rest last."""
    parts = name.split(".")
    if recipe == "imagenet1k_vit_b":
        return int(parts[1]) + 1 if parts[0] == "blocks" else 0 if parts[0] in STEM else 13
    if parts[0] == "patch_embed":
        return 0
    if parts[0] != "layers":
        return 25
    first = (0, 2, 4, 22)[int(parts[1])]
    return first + int(parts[3]) + 1 if parts[2] == "blocks" else (2, 4, 22)[int(parts[1])]


@pytest.mark.parametrize("recipe", ["imagenet1k_swinv2_s", "imagenet1k_vit_b"])
def test_every_parameter_has_its_layers_rate_and_decay(recipe):
    module = torch.nn.Module()
    with torch.device("meta"):
        module.encoder = encoder_of(recipe=recipe)
        module.extra = torch.nn.Linear(4, 4)
    groups = layer_decay_groups(module, 0.8, 0.05)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(module.parameters()))
    last = expected_layer("head.weight", recipe)
    for name, parameter in module.encoder.named_parameters():
        group = found[id(parameter)]
        assert group["lr_scale"] == pytest.approx(0.8 ** (last - expected_layer(name, recipe))), name
        kept = parameter.ndim == 1 or name.endswith("bias") or "cpb_mlp" in name or "logit_scale" in name
        assert group["weight_decay"] == (0.0 if kept or name in STEM else 0.05), name
    assert found[id(module.extra.weight)] | {"params": 0} == {"params": 0, "lr_scale": 1.0, "weight_decay": 0.05}


# -- weights ---------------------------------------------------------------------------------------------------------------


# The reference takes every pair of tokens by itself: at 640 px only a stage of few windows has a shifted block.
@pytest.mark.parametrize(
    ("size", "window", "pad", "depths"),
    [(224, 14, False, (2, 2, 2, 1)), (448, 14, True, (1, 1, 2, 1)), (640, 20, True, (1, 1, 2, 1))],
)
def test_weights_of_192_px_give_the_reference_features_at_larger_sizes(tmp_path, size, window, pad, depths):
    state, path = released_file(tmp_path, depths)
    overrides = [SMALL[0], f"model.depths={list(depths)}", SMALL[2], f"model.window_size={window}"]
    recipe = load_finetune_recipe(RECIPES / "imagenet1k_swinv2_s.yaml", overrides)
    encoder = make_encoder(recipe, size, 7, pad_windows=pad).double().eval()
    assert start(encoder, path) == ["head.weight", "head.bias"]
    images = photographs(1, size).double()
    expected = swin_features(images, None, state, depths, HEADS, window, (12, 12, 12, 6))
    with torch.no_grad():
        features = encoder(images, output="map")
    assert (features - expected).norm() <= 1e-9 * expected.norm()


def test_what_is_missing_or_left_over_is_listed(released, tmp_path):
    state, _ = released
    state = {name: value.contiguous() for name, value in state.items()}
    for change, said in (
        (
            lambda s: s.pop("layers.2.blocks.1.attn.qkv.weight"),
            "missing in the file: layers.2.blocks.1.attn.qkv.weight",
        ),
        (lambda s: s.update({"layers.0.surprise": torch.zeros(3)}), "not in the model: layers.0.surprise"),
        (lambda s: s.update({"norm.weight": torch.zeros(3)}), "another shape: norm.weight"),
    ):
        changed = {f"encoder.{name}": value for name, value in state.items()}
        inner = {name.removeprefix("encoder."): value for name, value in changed.items()}
        change(inner)
        save_file(inner, tmp_path / "changed.safetensors")
        with pytest.raises(CheckpointMismatch, match=said.replace(".", r"\.")):
            start(encoder_of(*SMALL), tmp_path / "changed.safetensors")


def test_a_fine_tuned_file_starts_a_task_with_other_classes(released, tmp_path):
    _, path = released
    encoder = encoder_of(*SMALL, classes=3)
    start(encoder, path)
    save_file({name: value.detach() for name, value in encoder.named_parameters()}, tmp_path / "tuned.safetensors")
    other = encoder_of(*SMALL, classes=11)
    assert start(other, tmp_path / "tuned.safetensors") == ["head.weight", "head.bias"]
    assert torch.equal(other.norm.weight, encoder.norm.weight)


def test_a_vit_takes_maes_encoder_and_positions(tmp_path):
    """MAE's released names, with their stored tables; the pooling norm is as new as the head."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = {"embed_dim": 32, "depth": 2, "num_heads": 2}
        mae = MAE(create_encoder("vit_b", img_size=64, **settings), decoder_dim=32, decoder_depth=1, decoder_heads=2)
    export_weights(mae, "released", tmp_path / "mae.pth")
    encoder = encoder_of(*SMALL_VIT, recipe="imagenet1k_vit_b", size=64).eval()
    assert start(encoder, tmp_path / "mae.pth") == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    images = photographs(2, 64)
    with torch.no_grad():
        tokens = encoder(images, output="tokens")  # the final norm has gone
        assert torch.allclose(mae.encoder.norm(tokens), mae.encoder(images, output="tokens"), atol=1e-5)


def test_a_vits_positions_are_learned_from_what_the_source_has(tmp_path):
    """A released pre-training stores the fixed ones, an export none; a fine-tuned file has its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = {"embed_dim": 32, "depth": 2, "num_heads": 2}
        mae = MAE(create_encoder("vit_b", img_size=64, **settings), decoder_dim=32, decoder_depth=1, decoder_heads=2)
    fixed = mae.encoder.fixed_positions()
    for form, name in (("released", "mae.pth"), ("safetensors", "mae.safetensors")):
        export_weights(mae, form, tmp_path / name)
        encoder = encoder_of(*SMALL_VIT, recipe="imagenet1k_vit_b", size=64)
        assert isinstance(encoder.pos_embed, torch.nn.Parameter)
        start(encoder, tmp_path / name)
        assert torch.allclose(encoder.pos_embed, fixed, atol=1e-6)
    # As MAE's fine-tuning and timm write it, the class token's own position included.
    with torch.no_grad():
        encoder.pos_embed.add_(torch.linspace(-1, 1, encoder.pos_embed.numel()).view_as(encoder.pos_embed))
    torch.save({"model": dict(encoder.named_parameters())}, tmp_path / "tuned.pth")
    other = encoder_of(*SMALL_VIT, recipe="imagenet1k_vit_b", size=64, classes=11)
    start(other, tmp_path / "tuned.pth")
    assert torch.equal(other.pos_embed, encoder.pos_embed)
    at_96 = encoder_of(*SMALL_VIT, "model.pretrained_image_size=64", recipe="imagenet1k_vit_b", size=96)
    start(at_96, tmp_path / "tuned.pth")
    assert at_96(photographs(1, 96)).shape == (1, 7)
    with pytest.raises(CheckpointMismatch, match=r"model\.learned_positions=true"):
        start(
            encoder_of(*SMALL_VIT, "model.learned_positions=false", recipe="imagenet1k_vit_b", size=64),
            tmp_path / "tuned.pth",
        )


def test_a_run_of_mae_is_fine_tuned_with_its_positions(alone, shards, tmp_path):
    small = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2", "data.image_size=64", "data.workers=0"]
    small += [f"data.shards={shards}", "data.validation_images=8", "train.global_batch=8", "train.iterations=2"]
    decoder = ["mim.decoder_dim=16", "mim.decoder_depth=1", "mim.decoder_heads=2", "train.reconstructions=0"]
    pretrain(load_recipe(ROOT / "launchers/recipes/mini_mae.yaml", [*small, *decoder]), {}, tmp_path / "mae")
    keys = [*small, "model.drop_path=0", "schedule.warmup=0", f"finetune.from={tmp_path / 'mae'}"]
    finetune(load_finetune_recipe(RECIPES / "imagenet1k_vit_b.yaml", keys), {}, tmp_path / "tuned")
    encoder = mimscale.load(tmp_path / "tuned")
    moved = (encoder.pos_embed - encoder.fixed_positions()).abs().max()
    assert 0 < moved < 0.1  # two updates away from where they were fixed


def test_a_vits_head_and_patches_start_as_maes():
    """main_finetune.py: trunc_normal(2e-5); models_mae.py leaves the projection's bias as torch's convolution draws it."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        encoder = create_encoder("vit_b", img_size=32, depth=1, num_classes=1000)
    weight = encoder.head.weight.detach()
    assert weight.std().item() == pytest.approx(2e-5, rel=0.01)
    assert weight.abs().max() < 2e-4
    assert not encoder.head.bias.any()
    bias, bound = encoder.patch_embed.proj.bias.detach(), 1 / (3 * 16 * 16) ** 0.5
    assert bias.abs().max() <= bound
    assert bias.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.fixture(scope="module")
def run(alone, tmp_path_factory, shards) -> Path:
    """Two steps of pre-training, both kept."""
    path = tmp_path_factory.mktemp("start") / "run"
    short = ["train.iterations=2", "train.checkpoint_every=1", "train.validate_every=9", f"data.shards={shards}"]
    pretrain(load_recipe(ROOT / "launchers/recipes/demo.yaml", [*TINY, *short]), {}, path)
    return path


def test_a_run_gives_the_weights_of_the_step_that_is_asked_for(run):
    def one(source: str) -> torch.Tensor:
        encoder = encoder_of(*TINY_ENCODER, "model.pretrained_window_size=0", size=96)
        assert start(encoder, source) == ["head.weight", "head.bias"]
        return encoder.layers[0].blocks[0].attn.qkv.weight

    assert torch.equal(one(str(run)), one(f"{run}@2"))
    assert not torch.equal(one(f"{run}@1"), one(f"{run}@2"))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has steps 1, 2"):
        one(f"{run}@7")
    with pytest.raises(RecipeError, match="no such run or file"):
        one("nowhere")


def test_a_wrong_pretrained_window_is_an_error_that_says_the_right_one(run, released, tmp_path):
    exported = tmp_path / "encoder.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "--output", str(exported)]) == 0
    for source in (run, exported):
        with pytest.raises(CheckpointError, match=r"set model.pretrained_window_size=\[6, 6, 6, 3\]"):
            start(encoder_of(*TINY_ENCODER, size=96), source)
        at_128 = ["model.window_size=8", "model.pretrained_window_size=6", "model.pretrained_image_size=96"]
        assert start(encoder_of(*TINY_ENCODER[:3], *at_128, size=128), source) == ["head.weight", "head.bias"]
    with pytest.raises(CheckpointError, match=r"set model.pretrained_window_size=\[12, 12, 12, 6\]"):
        start(encoder_of(*SMALL, "model.pretrained_image_size=224"), released[1])
    with pytest.raises(RecipeError, match=r"takes model\.pretrained_image_size"):
        encoder_of(*SMALL, "model.pretrained_image_size=null")


# -- recipes ---------------------------------------------------------------------------------------------------------------

NAMES = sorted(
    p.stem for p in RECIPES.glob("*.yaml") if p.stem == "demo" or p.stem.startswith(("imagenet1k", "inat18"))
)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_resolves_and_fits_its_encoder(name, tmp_path):
    recipe = load_finetune_recipe(RECIPES / f"{name}.yaml", ["finetune.from=runs/some@100"])
    assert recipe.finetune.source == "runs/some@100"
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_finetune_recipe(tmp_path / "resolved.yaml") == recipe
    with torch.device("meta"):
        assert encoder_of(recipe=name, size=recipe.data.image_size).num_classes == 7


def test_the_papers_settings():
    recipe = load_finetune_recipe(RECIPES / "imagenet1k_swinv2_b.yaml")
    assert (recipe.learning_rate, recipe.optimizer.weight_decay, recipe.finetune.layer_decay) == (5e-3, 0.05, 0.75)
    assert recipe.model_dump()["mix"] == {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    assert (recipe.train.iterations, recipe.schedule.warmup, recipe.train.global_batch) == (62500, 12500, 2048)
    for size, decay in (("s", 0.8), ("b", 0.75), ("l", 0.7)):
        recipe = load_finetune_recipe(RECIPES / f"inat18_swinv2_{size}.yaml")
        assert (recipe.learning_rate, recipe.optimizer.weight_decay, recipe.finetune.layer_decay) == (
            1.6e-2,
            0.1,
            decay,
        )
    with torch.device("meta"):
        encoder = encoder_of(recipe="imagenet1k_swinv2_l")
    assert [size[0] for size in encoder.references] == [12, 12, 12, 6]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.form=x", "did you mean 'finetune.from'"),
        ("finetune.layerdecay=0.5", "did you mean 'finetune.layer_decay'"),
        ("mix.mix_up=1", "did you mean 'mix.mixup'"),
        ("task=clasification", "did you mean 'classification'"),
        ("train.reconstructions=3", "unknown key"),
    ],
)
def test_a_misspelt_key_names_the_nearest(override, said):
    with pytest.raises(RecipeError, match=said):
        load_finetune_recipe(RECIPES / "demo.yaml", [override])


def test_a_recipe_without_a_task_says_which_there_are(tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps({"model": {"name": "swinv2_s"}}))
    with pytest.raises(RecipeError, match="says which 'task' it is for: classification"):
        load_finetune_recipe(tmp_path / "r.yaml")
