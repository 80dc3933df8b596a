"""What people write: recipes, overrides, studies, DeepSpeed configurations."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import yaml

from fuzzing.case import Case, Reader, kind, material
from fuzzing.mutations import (
    ODD_NUMBERS,
    ODD_TEXTS,
    bytes_mutated,
    depth_of,
    file_mutated,
    json_mutated,
    lines_mutated,
    tree_mutated,
)
from mimscale.schema import known_keys
from mimscale.study.jobs import build_graph
from mimscale.study.spec import Study, StudyError, load_study
from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, zero_stage
from mimscale.training.launch.start import check
from mimscale.training.pretraining.module import build_objective
from mimscale.training.recipe import Recipe, RecipeError, load_recipe
from mimscale.transfer.recipe import load_finetune_recipe, task_schemas

ROOT = Path(__file__).resolve().parents[2]


@material("recipes")
def make_recipes(folder: Path) -> None:
    """The recipes, studies and configurations that come with mimscale."""
    shutil.copytree(ROOT / "launchers/recipes", folder)
    shutil.copytree(ROOT / "launchers/studies", folder / "studies")
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")


def yaml_mutated(data: bytes, rng: random.Random) -> bytes:
    """A YAML file with other values, lines or bytes."""
    way = rng.random()
    if way < 0.3:
        return lines_mutated(data, rng)
    if way < 0.4:
        return rng.choice(
            (
                lambda: (
                    b"a: &a [x, x]\nb: &b [*a, *a]\n" + b"".join(b"c%d: &c%d [*b, *b]\n" % (i, i) for i in range(40))
                ),
                lambda: b"".join(
                    b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9) if i else b"1") for i in range(12)
                ),
                lambda: b"[" * 3000,
                lambda: b"{a: " * 3000,
                lambda: b"model: &m\n  name: *m\n",
                lambda: b"".join(b"key%d: 1\n" % i for i in range(20_000)),
                lambda: b"model: {" + b", ".join(b"name%d: 1" % i for i in range(5000)) + b"}\n",
                lambda: b"!!python/object/apply:os.system ['touch /tmp/x']\n",
                lambda: b"? [a, b]\n: c\n" + data,
                lambda: b"%TAG ! tag:x,2000:\n---\n!y z\n",
                lambda: data + b"\n---\n" + data,
                lambda: data.replace(b": ", b": !!binary ", 1),
                lambda: data.replace(b": ", b": !!float ", rng.randrange(1, 9)),
                lambda: data + b"<<: {train: {seed: 1}}\n",
                lambda: data.replace(b"\n", b"\r"),
                lambda: data.decode().encode("utf-16"),
                lambda: data + b'x: "\\U00110000"\n',
                lambda: data + b"x: '" + b"y" * 2_000_000 + b"'\n",
                lambda: b"\t" + data,
            )
        )()
    changed = tree_mutated(yaml.safe_load(data), rng)
    if depth_of(changed) > 50:
        return json.dumps(changed).encode()  # which is YAML, too, and PyYAML writes nothing so deep
    if rng.random() < 0.05:
        return bytes_mutated(yaml.safe_dump(changed, sort_keys=False).encode(), rng)
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=rng.random() < 0.5).encode("utf-8", "replace")


def _value(rng: random.Random) -> str:
    return rng.choice(
        (
            lambda: rng.choice(ODD_TEXTS),
            lambda: str(rng.choice(ODD_NUMBERS[:-3])) if rng.random() < 0.9 else "1" * 4000,
            lambda: repr([rng.choice((1, 2, 4, 8, 0, -1, 0.5, 10**11)) for _ in range(rng.choice((0, 1, 2, 4, 5000)))]),
            lambda: "{" + rng.choice(ODD_TEXTS) + ": 1}",
            lambda: "[" * rng.choice((1, 100, 5000)),
            lambda: rng.choice(
                (
                    "true",
                    "false",
                    "null",
                    "~",
                    "swinv2_b",
                    "vit_b",
                    "mae",
                    "simmim",
                    "classification",
                    "linear",
                    "auto",
                    "full",
                )
            ),
            lambda: str(rng.choice((1, 2, 6, 7, 8, 12, 16, 32, 64, 96, 192, 224, 1000))),
        )
    )()


def overrides(rng: random.Random, keys: list[str]) -> list[str]:
    """Settings that somebody may give."""
    found = []
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        name = rng.choice(keys)
        way = rng.random()
        if way < 0.1:
            name = rng.choice(
                (
                    name[:-1],
                    name + "x",
                    name.upper(),
                    name + ".x",
                    "." + name,
                    name.replace(".", ".."),
                    name + ".0",
                    *ODD_TEXTS,
                )
            )
        found.append(
            rng.choice((f"{name}={_value(rng)}",) * 9 + (name, "=", f"={name}", f"{name}==1", f"{name}= {_value(rng)}"))
        )
    return found


def _use(recipe: Recipe, rng: random.Random) -> None:
    """What is asked of every recipe before anything is trained."""
    recipe.to_yaml()
    recipe.deciding()
    check(
        recipe,
        {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}},
        rng.choice((None, 1, 3, 8, 1000)),
    )


SMALL = ["demo.yaml", "mini_swinv2.yaml", "mini_mae.yaml", "swinv2_b.yaml", "mae_vit_b.yaml", "simmim_vit_b.yaml"]


@kind("recipe", RecipeError, DeepSpeedConfigError, needs=("recipes",))
def recipe(case: Case) -> Reader:
    """A pre-training recipe."""
    path = case.copy(f"recipes/{case.rng.choice(SMALL)}", "recipe.yaml")
    file_mutated(path, yaml_mutated, case, strange=0.03)
    return lambda: _use(load_recipe(path, ["data.shards=x"] if case.rng.random() < 0.5 else []), case.rng)


@kind("overrides", RecipeError, DeepSpeedConfigError, needs=("recipes",))
def override(case: Case) -> Reader:
    """``key=value`` on the command line."""
    given = overrides(case.rng, known_keys(Recipe))
    return lambda: _use(
        load_recipe(case.rng.choice(("demo", "mae_vit_b", "simmim_vit_b")), [*given, "data.shards=x"]), case.rng
    )


@kind("finetuning-recipe", RecipeError, needs=("recipes",))
def finetuning(case: Case) -> Reader:
    """A fine-tuning recipe, and settings."""
    names = ("demo", "demo_detection", "demo_segmentation", "mini", "imagenet1k_vit_b", "imagenet1k_swinv2_b")
    path = case.copy(f"recipes/finetune/{case.rng.choice(names)}.yaml", "recipe.yaml")
    given: list[str] = []
    if case.rng.random() < 0.3:
        keys = [name for schema in task_schemas() for name in known_keys(schema)]
        given = overrides(case.rng, keys)
    else:
        file_mutated(path, yaml_mutated, case, strange=0.03)
    return lambda: load_finetune_recipe(path, given).deciding()


@kind("study", StudyError, needs=("recipes",))
def study(case: Case) -> Reader:
    """A study, and its graph of jobs."""
    path = case.copy(f"recipes/studies/{case.rng.choice(('smoke', 'smoke', 'mini'))}.yaml", "study.yaml")
    given: list[str] = []
    if case.rng.random() < 0.25:
        given = overrides(case.rng, known_keys(Study))
    else:
        file_mutated(path, yaml_mutated, case, strange=0.03)
    return lambda: build_graph(load_study(path, given))


@kind("ds-config", DeepSpeedConfigError, RecipeError, needs=("recipes",))
def ds_config(case: Case) -> Reader:
    """A DeepSpeed configuration, held against a recipe."""
    name = case.rng.choice(("cpu", "giant_cpu", "zero1", "zero2", "zero3", "zero3_offload"))
    path = case.copy(f"recipes/ds_configs/{name}.json", "config.json")
    file_mutated(path, json_mutated, case, strange=0.03)
    demo = load_recipe("demo", ["data.shards=x"])

    def read() -> None:
        config = read_ds_config(path)
        zero_stage(config)
        check(demo, config, case.rng.choice((None, 1, 2, 8)))

    return read


@kind("model", RecipeError, share=0.3, needs=())
def model(case: Case) -> Reader:
    """Sizes of a recipe, of which the model is then made, without memory for its weights."""
    import torch

    sizes = [f"model.{name}" for name in ("embed_dim", "depths", "num_heads", "window_size", "drop_path")] + [
        f"mim.{name}"
        for name in ("decoder", "target_window", "mask_patch", "mask_ratio", "loss", "decoder_dim", "decoder_depth")
    ]
    given = overrides(case.rng, [*sizes, "data.image_size"])
    name = case.rng.choice(("demo", "mini_mae", "simmim_vit_b"))

    def read() -> None:
        found = load_recipe(name, given)
        with torch.device("meta"):
            build_objective(found)

    return read
