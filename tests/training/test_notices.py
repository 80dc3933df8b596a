"""What is odd about the data is reported when a training starts, and nothing is drawn of what is not there."""

import shutil

import pytest
from training_runs import ROOT, TINY

from mimscale.commands import reconstruct
from mimscale.data import ShardError
from mimscale.data.build import writer
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import load_recipe
from mimscale.transfer.classification.recipe import ClassificationRecipe
from mimscale.transfer.classification.task import Classification

FINETUNE = ROOT / "launchers/recipes/finetune/demo.yaml"


@pytest.fixture(scope="module")
def few(photographs, tmp_path_factory):
    """Five photographs of one class, none held out."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "photographs").mkdir()
    for photograph in sorted((photographs / "class_0").iterdir())[:5]:
        shutil.copy(photograph, folder / "photographs")
    writer.build(ImageFolder(folder / "photographs"), folder / "shards")
    return folder / "shards"


def test_few_images_none_held_out(few, alone, tmp_path, capsys):
    short = [*TINY, f"data.shards={few}", "train.iterations=2", "schedule.warmup=1"]
    pretrain(load_recipe(ROOT / "launchers/recipes/demo.yaml", short), {}, tmp_path / "run")
    said = capsys.readouterr().out
    assert "a batch of 8 takes each of the 5 images 1.6 times" in said
    assert said.count("holds no images out") == 1 and "--val-share" in said
    assert "curves.png  (training)" in said and not (tmp_path / "run/reconstructions").exists()
    assert reconstruct.main([str(tmp_path / "run")]) == 1
    assert "give images, mimscale reconstruct" in capsys.readouterr().err


def test_one_class_is_nothing_to_learn(few):
    recipe = load_recipe(FINETUNE, [f"data.shards={few}"], ClassificationRecipe)
    with pytest.raises(ShardError, match="one class, 'images'"):
        Classification(recipe)


def test_classes_without_images_are_named(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "photographs")
    held_out = tmp_path / "held_out"
    shutil.copytree(photographs, held_out)
    shutil.rmtree(tmp_path / "photographs/class_2")
    (tmp_path / "photographs/class_2").mkdir()
    for photograph in list((photographs / "class_2").iterdir()):
        (tmp_path / "photographs/class_2" / photograph.name).write_bytes(b"no image")
    writer.build(ImageFolder(tmp_path / "photographs"), tmp_path / "shards", val=ImageFolder(held_out))
    task = Classification(load_recipe(FINETUNE, [f"data.shards={tmp_path / 'shards'}"], ClassificationRecipe))
    assert any("1 class without a training image" in line and "class_2" in line for line in task.notices())
