"""An encoder or a target from outside does all that mimscale's own do; so does SimMIM on a ViT; mistakes in one have names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from training_runs import ENVIRONMENT, ROOT, losses, records

import mimscale
from mimscale.cli import main
from mimscale.data.build.source import Source, open_source
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.data.errors import ShardError
from mimscale.mim import MIMObjective
from mimscale.models import Encoder, EncoderSettings, create_encoder
from mimscale.registry import Registry, RegistryError, encoders, objectives, sources, targets, tasks
from mimscale.schema import known_keys
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import Recipe, RecipeError, load_recipe
from mimscale.transfer.classification.task import Classification
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.task import finetune
from mimscale.transfer.weights import task_encoder

HERE = Path(__file__).parent
PLUGINS = ["mimscale_example"]
COMMON = {
    "data": {"image_size": 64, "workers": 0, "validation_images": 16},
    "optimizer": {"lr": 1e-3, "lr_batch": 8},
    "schedule": {"warmup": 2},
    "train": {"global_batch": 8, "iterations": 6, "checkpoint_every": 3, "validate_every": 3, "reconstructions": 2},
}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
# What is pre-trained, and what else a fine-tuning of it needs to say of its encoder.
CASES = {
    "hog": ({"plugins": PLUGINS, "model": {"name": "swinv2_s", **SWIN}, "mim": {"target": "hog"}}, {"window_size": 4}),
    "convnext": (
        {"plugins": PLUGINS, "model": {"name": "convnext_t", "depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]}},
        {},
    ),
    "simmim_on_a_vit": (
        {"model": {"name": "vit_b", "embed_dim": 32, "depth": 2, "num_heads": 2}, "mim": {"mask_patch": 16}},
        {},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The package lies on PYTHONPATH; what it registers in this process is gone for the tests that follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        for registry in (encoders, objectives, targets, tasks, sources):
            patch.setattr(registry, "_registered", dict(registry._registered))
        yield
    for module in [name for name in sys.modules if name.partition(".")[0] in PLUGINS]:
        del sys.modules[module]


@pytest.fixture(scope="module", params=CASES)
def case(request, alone, solar_shards, tmp_path_factory) -> tuple[str, dict, Path, Path]:
    """(name, recipe, its file, run folder) of a finished pre-training."""
    recipe = {**COMMON, **CASES[request.param][0]}
    recipe["data"] = {**recipe["data"], "shards": str(solar_shards)}
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pretrain(load_recipe(folder / "recipe.yaml"), {"zero_optimization": {"stage": 2}}, folder / "run")
    return request.param, recipe, folder / "recipe.yaml", folder / "run"


def test_it_trains_validates_and_draws(case):
    name, _, _, run = case
    assert len(losses(run)) == 6
    assert all(0 < record["val_loss"] < 10 for record in records(run, "val_loss"))
    sheet = Image.open(next(iter(sorted((run / "reconstructions").glob("*.png"))))).convert("RGB")
    assert sheet.width > 3 * 64
    drawn = sheet.crop((2 * 64, 30, 3 * 64, 90)).getextrema()
    assert any(high > low for low, high in drawn), name


def test_it_resumes_after_a_cut(case, tmp_path):
    _, _, recipe, run = case
    cut = shutil.copytree(run, tmp_path / "cut")
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints/step_00000006")
    pretrain(load_recipe(recipe), {"zero_optimization": {"stage": 2}}, cut)
    assert losses(cut) == losses(run)
    assert records(cut, "val_loss") == records(run, "val_loss")


def test_its_encoder_is_exported_loaded_probed_and_fine_tuned(case, tmp_path, solar_shards, capsys):
    _, recipe, _, run = case
    file = tmp_path / "encoder.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "--output", str(file)]) == 0
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mimscale.load(run)(images)
        assert torch.equal(mimscale.load(file)(images), expected) and expected.abs().sum() > 0
    assert main(["probe", str(run), "--shards", str(solar_shards)]) == 0
    assert "linear (penalty" in capsys.readouterr().out
    tuning = {
        "task": "classification",
        "plugins": recipe.get("plugins", []),
        "model": dict(recipe["model"]),
        "data": {
            "image_size": 64,
            "workers": 0,
            "shards": str(solar_shards),
            "validation_images": 16,
            "rand_augment": None,
        },
        "train": {"global_batch": 8, "iterations": 2, "checkpoint_every": 2, "validate_every": 2},
        "schedule": {"warmup": 1},
        "finetune": {"layer_decay": 0.8},
    }
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(tuning))
    for source in (run, file):
        settings = load_finetune_recipe(tmp_path / "tuning.yaml", [f"finetune.from={source}"])
        result = finetune(settings, {}, str(tmp_path / f"tuned_{source.name}"))
        assert result["from"] == str(source) and result["value"] is not None
    assert losses(tmp_path / "tuned_run") == losses(tmp_path / "tuned_encoder.safetensors")


def test_it_is_planned_and_reconstructs(case, tmp_path, capsys):
    name, recipe, file, run = case
    for checkpointing in ("on", "off"):
        assert main(["plan-memory", "--recipe", str(file), "--gpu-memory", "2", "--checkpointing", checkpointing]) == 0
        assert f"{recipe['model']['name']} with simmim" in capsys.readouterr().out
    output = tmp_path / "filled.png"
    assert main(["reconstruct", str(run), "--count", "2", "--output", str(output)]) == 0
    assert output.stat().st_size > 1000, name


def test_a_run_branches_and_a_study_trains_it(case, tmp_path, solar_shards):
    from mimscale.study.jobs import build_graph
    from mimscale.study.spec import load_study

    name, recipe, file, run = case
    longer = load_recipe(file, ["train.iterations=8", f"train.branch_from={run}@3"])
    pretrain(longer, {"zero_optimization": {"stage": 2}}, tmp_path / "branch")
    assert losses(tmp_path / "branch")[:2] == losses(run)[3:5]
    study = {
        "name": "One",
        "output": str(tmp_path / "study"),
        "shards": {"cells": str(solar_shards)},
        "datasets": {"cells": {"shards": "cells"}},
        "models": {name: {"recipe": str(file)}},
        "pretrain": [{"models": [name], "datasets": ["cells"], "lengths": [4]}],
    }
    tuned = {"task": "classification", "model": {"name": "swinv2_s"}, "data": {"image_size": 64}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    overrides = {f"model.{key}": value for key, value in CASES[name][1].items()}
    study["finetune"] = {"cells": {"recipe": str(tmp_path / "tuned.yaml"), "shards": "cells", "overrides": overrides}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    pretraining, tuning = build_graph(load_study(tmp_path / "study.yaml")).values()
    assert pretraining.recipe.model.name == tuning.recipe.model.name == recipe["model"]["name"]
    with torch.device("meta"):
        assert task_encoder(tuning.recipe).num_features


def test_the_launcher_loads_a_plugin_that_the_command_line_names(tmp_path, solar_shards):
    """In ranks of their own, and after a kill of the whole machine nothing but the run folder says which plug-in it was."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**COMMON, "model": {"name": "swinv2_s", **SWIN}}))
    (tmp_path / "ds.json").write_text("{}")
    arguments = ["--deepspeed_config", tmp_path / "ds.json", "--recipe", tmp_path / "recipe.yaml", "--output"]
    keys = [
        "plugins=[mimscale_example]",
        "mim.target=hog",
        "mim.target_options={bins: 6}",
        f"data.shards={solar_shards}",
    ]
    command = [sys.executable, "launchers/pretrain.py", *arguments, tmp_path / "run", *keys, "train.iterations=2"]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{HERE}:{ROOT}"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert written["plugins"] == PLUGINS and written["mim"]["target_options"] == {"bins": 6}


def test_a_file_never_has_a_package_imported(tmp_path, case):
    name, _, _, run = case
    if name != "convnext":
        pytest.skip("its encoder is mimscale's own")
    file = tmp_path / "encoder.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "--output", str(file)]) == 0
    script = (
        f"import mimscale, sys\ntry: mimscale.load({str(file)!r})\n"
        "except ValueError as error: print(error, 'mimscale_example' in sys.modules)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{HERE}:{ROOT}"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "first import the package 'mimscale_example'" in said.stdout and said.stdout.endswith("False\n")


# -- names -----------------------------------------------------------------------------------------------------------------


def test_settings_of_a_plugin_are_keys_and_other_objectives_keys_are_refused(tmp_path):
    load_recipe_with = lambda *keys: load_recipe(ROOT / "launchers/recipes/demo.yaml", keys)  # noqa: E731
    load_recipe_with("plugins=[mimscale_example]")
    assert {"model.dims", "mim.mask_patch", "mim.decoder_dim"} <= set(known_keys(Recipe))
    with pytest.raises(RecipeError, match=r"'mim\.norm_pix' .* is a key of mim\.objective=mae alone"):
        load_recipe_with("mim.norm_pix=false")
    with pytest.raises(RecipeError, match=r"'mim\.decoder' .* is a key of mim\.objective=simmim alone"):
        load_recipe(ROOT / "launchers/recipes/mae_vit_b.yaml", ["mim.decoder=8-blocks"])
    with pytest.raises(RecipeError, match="target hog has no option bin; it has bins, cell"):
        pretrain_of(load_recipe_with("plugins=[mimscale_example]", "mim.target=hog", "mim.target_options={bin: 3}"))
    with pytest.raises(RecipeError, match="did you mean 'hog'"):
        load_recipe_with("plugins=[mimscale_example]", "mim.target=hogg")


def pretrain_of(recipe):
    from mimscale.training.pretraining.module import build_objective

    return build_objective(recipe)


@pytest.mark.parametrize(
    ("plugins", "says"),
    [
        ("[no_such_package]", "there is no package 'no_such_package'; install it, or put the folder that holds it on"),
        ("[../mimscale_example]", "no name of a package"),
        ("[/etc/passwd]", "no name of a package"),
        ("mimscale_example", "must be a list of packages"),
        ("[lacking_package]", "lacking_package needs not_installed, which is not installed"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch, plugins, says):
    (tmp_path / "lacking_package.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match=says):
        load_recipe(ROOT / "launchers/recipes/demo.yaml", [f"plugins={plugins}"])


class Lame(Encoder):
    """One that forgets how weight decay and layers go."""

    Settings = EncoderSettings

    def __init__(self, img_size=64, drop_path=0.0, num_classes=0, mask_token=False):
        super().__init__()
        self.img_size = (img_size, img_size)

    def forward(self, images, mask=None, draw_keys=None, output="logits"):
        """Nothing."""

    def set_grad_checkpointing(self, enable=True, **options):
        """Nothing."""


class Nearly(Lame):
    """One with all methods, that does not say how large its features are."""

    def no_weight_decay(self):
        """Nothing."""

    def group_matcher(self, coarse=False):
        """Nothing."""


class Half(MIMObjective):
    """An objective without a loss."""

    def target(self, images):
        """Nothing."""


def test_what_a_class_lacks_is_named(monkeypatch):
    for name, kind in (("lame", Lame), ("nearly", Nearly)):
        monkeypatch.setitem(encoders._registered, name, kind)
    monkeypatch.setitem(objectives._registered, "half", Half)
    monkeypatch.setitem(targets._registered, "plain", dict)
    with pytest.raises(ValueError, match=r"encoder 'lame' \(.*Lame\) lacks group_matcher, no_weight_decay"):
        create_encoder("lame")
    with pytest.raises(ValueError, match=r"Nearly does not set in_chans, .*num_features"):
        create_encoder("nearly")
    with pytest.raises(RecipeError, match=r"objective 'half' .* lacks encode, forward, from_settings"):
        load_recipe(ROOT / "launchers/recipes/demo.yaml", ["mim.objective=half"])
    with pytest.raises(
        RegistryError, match=r"target 'plain' \(builtins.dict\) is not derived from mimscale.mim.targets"
    ):
        targets.get("plain")


def test_a_name_belongs_to_one(monkeypatch):
    own = Registry("encoder", "mimscale.none", "mimscale.models.encoder:Encoder", {"swinv2_s": "x:Y"})
    own.register("mine")(Nearly)
    own.register("mine")(Nearly)  # as a second import would
    with pytest.raises(RegistryError, match=r"encoder 'mine' is registered twice: by .*Nearly and .*Lame"):
        own.register("mine")(Lame)
    with pytest.raises(RegistryError, match="mimscale's own name"):
        own.register("swinv2_s")(Lame)
    with pytest.raises(RegistryError, match="did you mean 'mine'"):
        own.get("nine")


def test_an_installed_package_registers_by_entry_points(tmp_path, monkeypatch):
    package = tmp_path / "thing-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[mimscale.targets]\nthing = thing_targets:Thing\n")
    (tmp_path / "thing_targets.py").write_text(
        "from mimscale.mim import Target\nclass Thing(Target):\n    def __call__(self, images): return images * 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "thing" in targets and "thing_targets" not in sys.modules
    objective = pretrain_of(load_recipe(ROOT / "launchers/recipes/demo.yaml", ["mim.target=thing"]))
    assert torch.equal(objective.model.target(torch.ones(1, 3, 64, 64)), torch.full((1, 3, 64, 64), 2.0))


def test_a_source_and_a_task_of_ones_own(tmp_path, monkeypatch, photographs):
    class Album(ImageFolder):
        """A file that says in which folder the images are."""

        @classmethod
        def recognises(cls, path):
            """By its ending."""
            return path.suffix == ".album"

        @classmethod
        def open(cls, path, held_out=False, **options):
            """The folder."""
            return cls(Path(path.read_text()))

    class Grading(Classification):
        """Classification by another name."""

        schema = type("GradingRecipe", (Classification.schema,), {"__annotations__": {"task": str}, "task": "grading"})

    monkeypatch.setitem(sources._registered, "album", Album)
    monkeypatch.setitem(tasks._registered, "grading", Grading)
    (tmp_path / "mine.album").write_text(str(photographs))
    source = open_source(tmp_path / "mine.album")
    assert isinstance(source, Source) and source.classes == [f"class_{i}" for i in range(4)]
    with pytest.raises(ShardError, match=r"--fraction 10 does not go with .*: it is no shard folder"):
        open_source(tmp_path / "mine.album", fraction="10")
    (tmp_path / "r.yaml").write_text(json.dumps({"task": "grading", "model": {"name": "swinv2_s"}}))
    assert load_finetune_recipe(tmp_path / "r.yaml").task == "grading"
    with pytest.raises(RecipeError, match="did you mean 'grading'"):
        load_finetune_recipe(tmp_path / "r.yaml", ["task=gradin"])
