"""Recipes and studies as files and ``key=value``: what is read, what is taken literally, and how mistakes are named."""

import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from training_runs import RECIPE, ROOT

from mimscale.commands.status import main as status
from mimscale.schema import (
    NAME,
    NUMBER,
    ChosenBy,
    Document,
    SchemaError,
    Section,
    apply_override,
    describe,
    find,
    key,
    known_keys,
    load,
    nearest_key,
    parse_yaml,
    resolve,
)
from mimscale.study.jobs import build_graph
from mimscale.study.spec import Study, StudyError, load_study
from mimscale.training.recipe import Recipe, RecipeError, load_recipe
from mimscale.transfer.recipe import load_finetune_recipe, task_schemas

SCHEMAS = [Recipe, Study, *task_schemas()]
SMOKE = ROOT / "launchers/studies/smoke.yaml"
FINETUNE = ROOT / "launchers/recipes/finetune/mini.yaml"
LITERAL = [
    "set #2",
    "2024",
    "@x",
    "run: a",
    "[a] b",
    "off",
    "1e3",
    "010",
    "{",
    "'",
    "&a",
    "- x",
    " x ",
    "a=b",
    "24:00:00",
]
PRINTED = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def user_path(path: str) -> str:
    """A path with names instead of NAME and N."""
    return ".".join({NAME: "swinv2_8", NUMBER: "0"}.get(part, part) for part in path.split("."))


def told(kind: type[Exception], *arguments: Any) -> str:
    """What reading with these arguments says is wrong."""
    with pytest.raises(kind) as error:
        (load_study if kind is StudyError else load_recipe)(*arguments)
    return str(error.value)


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_key_is_found_and_is_its_own_nearest(schema):
    for path in known_keys(schema):
        for written in (path, user_path(path)):
            assert find(schema, written), written
            assert nearest_key(written, schema) == written


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_a_key_with_one_letter_too_few_is_told_which_was_meant(schema):
    for path in known_keys(schema):
        section, _, leaf = user_path(path).rpartition(".")
        if len(leaf) < 5:
            continue
        for at in range(len(leaf)):
            wrong = f"{section}.{leaf[:at]}{leaf[at + 1 :]}".lstrip(".")
            if not find(schema, wrong):
                assert nearest_key(wrong, schema) == user_path(path), wrong


@pytest.mark.parametrize(
    "wrong", ["frobnicate", "optimizer.momentum", "data.frobnicate", "zzz.zzz", "", ".", "a..b", "x" * 10**5]
)
def test_no_key_is_suggested_that_is_not_near(wrong):
    said = told(RecipeError, RECIPE, [f"{wrong}=1"])
    assert "did you mean" not in said
    assert said.endswith("mimscale keys lists the keys")
    assert "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("wrong", "meant", "command"),
    [
        ("train.iteration", "train.iterations", "mimscale keys train lists"),
        ("iterations", "train.iterations", "mimscale keys train lists"),
        ("trian.iterations", "train.iterations", "mimscale keys train lists"),
        ("model.mask_ratio", "mim.mask_ratio", "mimscale keys mim lists"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_where_keys_are_listed(wrong, meant, command):
    said = told(RecipeError, RECIPE, [f"{wrong}=1"])
    assert f"'{meant}'" in said and command in said and "\n" not in said


def test_an_unknown_key_of_a_task_points_to_the_keys_of_that_task(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: detection\nmodel: {name: swinv2_s}\ndata: {test_sise: [1, 2]}\n")
    with pytest.raises(RecipeError, match=r"'data\.test_size'\? mimscale keys data --kind detection lists"):
        load_finetune_recipe(path)


def test_keys_that_may_change_between_two_starts_are_those_that_change_no_loss():
    written = {
        *(
            "checkpoint_every",
            "keep_checkpoints",
            "pinned_steps",
            "validate_every",
            "validate_batch",
            "log_every",
            "save",
        ),
        *("activation_checkpointing", "compile", "branch_from", "stop_margin", "hang_minutes"),
        *("spike_factor", "on_spike", "rollback_steps"),
    }
    shards = {"shards", "workers", "cache", "cache_gib", "max_damaged"}
    folders = {"images", "annotations", "validation", "validation_annotations", "validation_images"}
    expected = {
        "Recipe": (written | {"reconstructions"}, shards),
        "ClassificationRecipe": (written, shards | {"validation_images"}),
        "DetectionRecipe": (written, folders | {"workers", "max_damaged"}),
        "SegmentationRecipe": (written, folders | {"workers", "max_damaged", "classes"}),
    }
    for schema in (Recipe, *task_schemas()):
        train, data = expected[schema.__name__]
        free = {f"train.{name}" for name in train} | {f"data.{name}" for name in data}
        recipe = schema.model_validate({"model": {"name": "swinv2_s"}})
        assert recipe.free_keys == free
        assert recipe.branch_keys == free | {"train.iterations", "data.validation_images"}
        assert {found.path for found in describe(schema) if found.free} == free


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", LITERAL)
def test_the_value_of_a_text_key_is_taken_as_it_is_written(tmp_path, text):
    recipe = load_recipe(RECIPE, [f"data.shards={text}", f"data.fraction={text}"])
    assert (recipe.data.shards, recipe.data.fraction) == (text, text)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe
    study = load_study(SMOKE, [f"shards.photographs={text}", f"models.swinv2_8.overrides.data.cache={text}"])
    assert study.shards["photographs"] == text
    assert study.models["swinv2_8"].overrides["data.cache"] == text
    jobs = build_graph(study).values()
    assert {job.recipe.data.cache for job in jobs if job.launcher == "pretrain"} == {text, None}  # type: ignore[attr-defined]


@given(PRINTED)
@example("null")
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_being_written_and_read(tmp_path, text):
    recipe = load_recipe(RECIPE, [f"data.shards={text}"])
    # Of no such user, as in ~0, a text is as it stands.
    assert recipe.data.shards == (None if text == "null" else os.path.expanduser(text))  # noqa: PTH111
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("text", ["010", "off", "1e3", "1_000", "12:30", "2024-01-01", "2024", "10.10", "@x"[1:]])
def test_plain_text_in_a_file_is_taken_as_it_is_written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{name: swinv2_s}}\ndata:\n  fraction: {text}\n  shards: {text}  # where\n")
    data = load_recipe(path).data
    assert (data.fraction, data.shards) == (text, text)


def test_a_home_is_expanded_and_null_unsets(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(RECIPE, ["data.shards=~/shards"]).data.shards == f"{tmp_path}/shards"
    assert load_study(SMOKE, ["shards.photographs=~/x"]).shards["photographs"] == f"{tmp_path}/x"
    assert load_recipe(RECIPE, ["data.fraction=~/shards"]).data.fraction == "~/shards"
    for unset in ("data.shards=", "data.shards=null"):
        assert load_recipe(RECIPE, ["data.shards=x", unset]).data.shards is None


def test_values_of_other_keys_are_read_as_yaml():
    recipe = load_recipe(
        RECIPE, ["optimizer.lr=3e-4", "train.pinned_steps=[3, 5]", "train.compile=on", "data.workers=auto"]
    )
    assert (recipe.optimizer.lr, recipe.train.pinned_steps) == (3e-4, (3, 5))
    assert (recipe.train.compile, recipe.data.workers) == (True, "auto")


# -- mistakes ----------------------------------------------------------------------------------------------------------

YAML_LIKE = st.text("0123456789abefxo_:.-+!&*{}[]|>%@#?, '\"\n~", max_size=12)
TAGGED = st.sampled_from(
    ["!!int x", "!!bool x", "!!timestamp x", "!!float x", "!!binary é", "!!python/name:os.system", "0b_"]
)


@given(st.sampled_from(known_keys(Recipe)), YAML_LIKE | TAGGED | st.text(max_size=12))
@settings(deadline=None, max_examples=300)
def test_any_value_is_used_or_named(path, text):
    try:
        load_recipe(RECIPE, [f"{path}={text}"])
    except RecipeError as error:
        assert str(error) and len(str(error)) < 2000


@given(
    YAML_LIKE | TAGGED | st.text() | st.recursive(st.text("ab: \n-[]{}"), lambda inner: inner.map(lambda t: f"a: {t}"))
)
@example("[" * 2000)
@example("a: " + "9" * 5000)
@example("&a [*a]: 1")
@settings(deadline=None)
def test_any_file_is_read_or_named(text):
    try:
        parse_yaml(text, "x.yaml")
    except SchemaError as error:
        assert str(error).startswith("x.yaml is not valid YAML") and len(str(error)) < 400


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert f"cannot read the pre-training recipe {path}" in told(RecipeError, path)
    assert "cannot read" in told(RecipeError, tmp_path)
    assert "has recipe.yaml" in told(RecipeError, tmp_path / "nowhere.yaml")


def test_problems_are_listed_up_to_a_bound(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: swinv2_s}\n" + "".join(f"wrong{number}: {'x' * 1000}\n" for number in range(200)))
    lines = told(RecipeError, path).splitlines()
    assert len(lines) == 21 and lines[-1] == "and 180 problems more"
    assert all(len(line) < 500 for line in lines)
    path.write_text(f"model: {{name: swinv2_s}}\ntrain: {{iterations: {'x' * 10**5}}}\n")
    assert len(told(RecipeError, path)) < 500


def test_a_value_that_fits_no_kind_is_one_problem_and_is_said_to_be_where_it_is():
    said = told(RecipeError, RECIPE, ["data.workers=many"])
    assert said.startswith("data.workers in the command line") and "'auto'" in said and "\n" not in said
    assert f"train.seed in {RECIPE}" in told(RecipeError, *(RECIPE.with_name("demo.yaml"), ["train.seed=-1"])).replace(
        "the command line", str(RECIPE)
    )


@pytest.mark.parametrize("override", ["train.pinned_steps.0=5", "data.crop_scale.0=1", "data.shards.x=1", "train=5"])
def test_a_part_of_a_value_cannot_be_set(override):
    assert "\n" not in told(RecipeError, RECIPE, [override])


@pytest.mark.parametrize(
    ("file", "reader", "says"),
    [
        (
            FINETUNE,
            load_recipe,
            "is a fine-tuning recipe (it has 'task'), for mimscale finetune; a pre-training recipe is wanted",
        ),
        (
            SMOKE,
            load_recipe,
            "is a study (it has 'datasets'), for mimscale study; a pre-training recipe is wanted here",
        ),
        (
            RECIPE,
            load_finetune_recipe,
            "is a pre-training recipe (it has 'mim'), for mimscale pretrain; a fine-tuning recipe",
        ),
        (
            SMOKE,
            load_finetune_recipe,
            "is a study (it has 'datasets'), for mimscale study; a fine-tuning recipe is wanted here",
        ),
        (RECIPE, load_study, "is a pre-training recipe (it has 'mim'), for mimscale pretrain; a study is wanted here"),
        (
            FINETUNE,
            load_study,
            "is a fine-tuning recipe (it has 'task'), for mimscale finetune; a study is wanted here",
        ),
    ],
)
def test_a_file_of_another_kind_is_said_to_be_one(file, reader, says):
    with pytest.raises(SchemaError) as error:
        reader(file)
    assert says in str(error.value)
    assert str(error.value).startswith(str(file))


def test_the_status_of_a_run_whose_recipe_cannot_be_read_names_the_file(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("train: [\n")
    assert status([str(tmp_path)]) == 1
    assert f"damaged: {tmp_path}/recipe.yaml is not valid YAML" in capsys.readouterr().out


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(10))}]\n" for i in range(1, 9)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join(f'*a{i - 1}' for _ in range(9))}]}}\n" for i in range(1, 9)
)
MODEL = "model: {name: swinv2_s}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "it holds more than 20,000 values, with what it refers to"),
        (MERGES, "it holds more than 20,000 values, with what it refers to"),
        ("a: [" + "1," * 30_000 + "]", "it holds more than 20,000 values"),
        ("a: " + "[" * 60, "it is nested more than 40 deep"),
        ("".join("  " * depth + "a:\n" for depth in range(60)), "it is nested more than 40 deep"),
        ("- " * 1000, "it is nested more than 40 deep"),
        ("model: &a {name: *a}", "a value holds itself"),
        ("? [1]\n: 2", "a key is not text"),
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("model: !!set {a, b}", "tag:yaml.org,2002:set is for values that no key takes"),
        ("model: {name: !!binary c3dp}", "tag:yaml.org,2002:binary is for values that no key takes"),
        ('a: "\\UFFFFFFFF"', "is not valid YAML"),
        ("a: \0", "special characters are not allowed"),
        ("a: " + "b" * 300_000, "holds more than 262,144 bytes"),
        ("", "must hold sections such as 'model:' and 'train:', not nothing"),
        (MODEL + "train: {iterations: 1:30}", "train.iterations in x.yaml: Input should be a valid integer"),
        (MODEL + "train: {iterations: yes}", "train.iterations in x.yaml: should not be true"),
        (MODEL + "train: {pinned_steps: [on]}", "should not be true"),
        (MODEL + "train: {global_batch: 100000000000}", "less than or equal to 16777216, not 100000000000"),
        (MODEL + "optimizer: {lr: 1e400}", "optimizer.lr in x.yaml: Input should be a finite number"),
        (MODEL + "optimizer: {lr: .nan}", "optimizer.lr in x.yaml"),
        (MODEL + "data: {crop_scale: [0.9, 0.5]}", "should have the smaller number first"),
        (MODEL + "data: {std: [0, 1, 1]}", "data.std.0 in x.yaml: Input should be greater than 0"),
        (MODEL.replace("s}", 's\\e"}').replace("swin", '"swin'), "unknown encoder 'swinv2_s\\x1b'"),
        ('model: {name: "a\\nmimscale: error: b"}', "unknown encoder 'a\\nmimscale: error: b'"),
    ],
)
def test_what_has_no_end_or_is_no_recipe_is_refused_at_once(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    began = time.process_time()
    said = told(RecipeError, "x.yaml")
    assert says in said and len(said) < 3000
    assert time.process_time() - began < 3


def test_ten_is_not_eight_and_a_byte_order_mark_is_no_key(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("\ufeffmodel: {name: swinv2_s}\ntrain: {iterations: 010, seed: 0x10}\n", encoding="utf-8")
    assert (load_recipe(path).train.iterations, load_recipe(path).train.seed) == (10, 16)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "loop.yaml", "zero.yaml", ""):
        assert "cannot read the pre-training recipe" in told(RecipeError, tmp_path / name)
    for name in ("a" * 5000, "\0", "\udcff", "\x1b[31m"):
        assert "\x1b" not in told(RecipeError, name) and "\0" not in told(RecipeError, name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"seeds": list(range(1000)), "lengths": list(range(1, 1000))},
            "makes 3,996,000 pre-trainings, more than 5,000",
        ),
        ({"seeds": list(range(1001))}, "at most 1000 items"),
        ({"models": [f"m{number}" for number in range(1000)]}, "and 980 problems more"),
    ],
)
def test_a_study_without_end_is_refused_before_it_is_made(tmp_path, changes, says):
    values = yaml.safe_load(SMOKE.read_text())
    values["pretrain"][0] |= changes
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    said = told(StudyError, path)
    assert says in said and len(said) < 5000


def test_a_long_chain_of_tasks_is_ordered_and_a_circle_in_it_is_found(tmp_path):
    values = yaml.safe_load(SMOKE.read_text())
    values["finetune"] = {f"t{n}": {"recipe": "x.yaml", "after": f"t{(n + 1) % 900}"} for n in range(900)}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    assert "which is a circle" in told(StudyError, path)
    values["finetune"]["t899"].pop("after")
    path.write_text(yaml.safe_dump(values))
    assert len(load_study(path).finetune) == 900


# -- studies -----------------------------------------------------------------------------------------------------------


def test_a_renamed_key_is_told_its_new_name(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(SMOKE.read_text() + "stop_doomed: true\n")
    assert f"'stop_doomed' in {path} has been renamed: write 'stop_overfitting'" in told(StudyError, path)
    assert "has been renamed: write 'stop_overfitting'" in told(StudyError, SMOKE, ["stop_doomed=true"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "models.swinv2_8.overrides.train.iteration=5",
            "unknown key 'train.iteration' in models.swinv2_8.overrides of the command line; did you mean 'train.iterations'?",
        ),
        (
            "finetune.cells.overrides.data.test_sise=[1, 2]",
            "did you mean 'data.test_size'? mimscale keys data --kind detection lists the keys",
        ),
        ("models.swinv2_8.recip=x", "did you mean 'models.swinv2_8.recipe'? mimscale keys models --kind study lists"),
        ("modls.swinv2_8.recipe=x", "did you mean 'models.swinv2_8.recipe'?"),
        ("pretrain.7.lengths=[1]", "'pretrain.7' is no section that pretrain.7.lengths could be set in"),
        ("output", "'output' is not key=value, for example output=runs/study"),
    ],
)
def test_mistaken_overrides_of_a_study_are_named(override, says):
    said = told(StudyError, SMOKE, [override])
    assert says in said and "\n" not in said


def test_recipe_keys_in_a_study_are_checked_as_in_a_recipe(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(SMOKE.read_text().replace("{model.embed_dim: 8}", "{model.embeddim: 8, trian.seed: 1}"))
    lines = told(StudyError, path).splitlines()
    assert lines[0] == (
        f"unknown key 'model.embeddim' in models.swinv2_8.overrides of {path}; did you mean 'model.embed_dim'? "
        "mimscale keys model lists the keys"
    )
    assert "'train.seed'" in lines[1]
    study = load_study(SMOKE, ["models.swinv2_8.overrides.train.keep_checkpoints=many"])
    with pytest.raises(StudyError, match=r"models\.swinv2_8 in .*train\.keep_checkpoints in the study's overrides: "):
        build_graph(study)


def test_places_in_lists_names_with_dots_and_names_like_numbers_can_be_set(tmp_path):
    study = load_study(SMOKE, ["pretrain.0.lengths=[4]", "shards.in1k.v2=/x", "datasets.10.shards=photographs"])
    assert study.pretrain[0].lengths == (4,)
    assert study.shards["in1k.v2"] == "/x"
    assert study.datasets["10"].fraction == "100"
    path = tmp_path / "study.yaml"
    path.write_text(
        SMOKE.read_text()
        .replace("cells_20", "20")
        .replace("parallel: 2}", "parallel: 2}\n")
        .replace("gpus: 0}", "gpus: 0, time: 24:00:00}")
    )
    study = load_study(path, ["datasets.20.fraction=50"])
    assert study.datasets["20"].fraction == "50"
    assert study.pretrain[0].datasets == ("20", "cells_100")
    assert study.resources.time == "24:00:00"


# -- a section that is one of several ----------------------------------------------------------------------------------


class Circle(Section):
    """A circle."""

    shape: Literal["circle"] = key("circle", "Round.")
    radius: int = key(1, "Radius.", gt=0)
    colour: str = key("red", "Colour.")


class Square(Section):
    """A square."""

    shape: Literal["square"] = key("square", "Not round.")
    side: int = key(2, "Side.")
    colour: str = key("blue", "Colour.")


SHAPES = {"circle": Circle, "square": Square}


def shape_of(name: str) -> type[Section]:
    if name not in SHAPES:
        raise ValueError(f"no shape '{name}'")
    return SHAPES[name]


class Picture(Document):
    """A picture."""

    noun = "pre-training recipe"
    kind = "picture"

    shape: Annotated[Section, ChosenBy("shape", "circle", shape_of, lambda: list(SHAPES))] = key(Circle(), "The shape.")


def drawn(text: str, *overrides: str) -> Any:
    values = parse_yaml(text, "p.yaml", Picture) or {}
    for override in overrides:
        apply_override(values, override, Picture)
    return resolve(values, "p.yaml", Picture).shape


def test_a_chosen_section_has_its_own_keys_and_defaults():
    assert drawn("{}") == Circle()
    assert drawn("shape: {shape: square, side: 3}") == Square(side=3)
    assert drawn("shape: {radius: 3}", "shape.colour=0x10") == Circle(radius=3, colour="0x10")
    keys = {(found.path, found.only): found.default for found in describe(Picture)}
    assert keys == {
        ("shape.shape", ()): "circle",
        ("shape.radius", ("circle",)): 1,
        ("shape.colour", ("circle",)): "red",
        ("shape.side", ("square",)): 2,
        ("shape.colour", ("square",)): "blue",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shape: {side: 3}", "'shape.side' in p.yaml is a key of shape.shape=square alone"),
        ("shape: {shape: hexagon}", "no shape 'hexagon'"),
        ("shape: {shape: [3]}", "must be one of circle, square"),
        ("shape: round", "must be a section with keys such as shape"),
        ("shape: {radius: -1}", "shape.radius in p.yaml: "),
        ("shape: {radus: 1}", "did you mean 'shape.radius'?"),
    ],
)
def test_mistakes_in_a_chosen_section_keep_their_place(text, says):
    with pytest.raises(SchemaError) as error:
        drawn(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_load_reads_any_document(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_text("shape: {shape: square}\n")
    assert load(path, ["shape.side=5"], Picture).shape == Square(side=5)
