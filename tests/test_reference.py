"""``mimscale keys``, docs/recipe.md and the JSON schemas: every key is there, and told from one source."""

import functools
import json
import subprocess
import sys

import jsonschema
import pytest
from training_runs import ENVIRONMENT, ROOT

from mimscale.commands.keys import documents as generate
from mimscale.commands.keys import main, references
from mimscale.schema import read_yaml

documents = functools.cache(generate)
REFERENCES = list(references().values())
SHIPPED = {
    "pretrain": sorted((ROOT / "launchers/recipes").glob("*.yaml")),
    "finetune": sorted((ROOT / "launchers/recipes/finetune").glob("*.yaml")),
    "study": sorted((ROOT / "launchers/studies").glob("*.yaml")),
}
FILES = [(kind, path) for kind, paths in SHIPPED.items() for path in paths]


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.kind)
def test_every_key_says_what_it_does_and_where_its_default_comes_from(reference):
    for key in reference.entries():
        assert key.about.endswith(".") and key.origin, f"{key.path} has no description; give it one with schema.key()"
    for section in reference.sections():
        assert reference.about(section), f"{section} has no docstring"


def test_what_is_committed_is_what_is_generated():
    for name, text in documents().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run: mimscale keys --write docs"
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs/schemas").iterdir()}
    assert written == {name for name in documents() if name.startswith("schemas/")}


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.kind)
def test_every_key_is_in_the_reference(reference):
    text = documents()["recipe.md"]
    for key in reference.entries():
        assert f"| `{key.path}`" in text


# -- JSON schemas ------------------------------------------------------------------------------------------------------


def schema(kind: str) -> jsonschema.Draft7Validator:
    found = json.loads(documents()[f"schemas/{kind}.schema.json"])
    jsonschema.Draft7Validator.check_schema(found)
    return jsonschema.Draft7Validator(found)


@pytest.mark.parametrize(("kind", "path"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_a_schema_accepts_what_ships(kind, path):
    schema(kind).validate(read_yaml(path))


@pytest.mark.parametrize(
    ("kind", "path", "section", "wrong"),
    [
        ("pretrain", SHIPPED["pretrain"][0], "train", {"iteration": 5}),
        ("pretrain", SHIPPED["pretrain"][0], "train", {"iterations": 0}),
        ("pretrain", SHIPPED["pretrain"][0], "data", {"crop_scale": [0.1]}),
        ("pretrain", SHIPPED["pretrain"][0], "data", {"shuffle": "none"}),
        ("finetune", SHIPPED["finetune"][0], "data", {"rand_augment": None}),  # segmentation
        ("finetune", SHIPPED["finetune"][0], "mix", {}),
        ("study", SHIPPED["study"][0], "speed", {"gpus": "H100"}),
        ("study", SHIPPED["study"][0], "models", {"a": {"recipe": "x.yaml", "overrides": {"train.iteration": 1}}}),
        ("study", SHIPPED["study"][0], "models", {"a": {"recipe": "x.yaml", "overrides": {"train.iterations": "x"}}}),
    ],
)
def test_a_schema_refuses_what_the_programs_refuse(kind, path, section, wrong):
    values = read_yaml(path)
    schema(kind).validate(values)
    values[section] = {**values.get(section, {}), **wrong}
    with pytest.raises(jsonschema.ValidationError):
        schema(kind).validate(values)


def test_a_schema_takes_names_that_look_like_numbers_and_needs_what_is_needed():
    schema("pretrain").validate({"model": {"name": "swinv2_s"}, "data": {"fraction": 10, "shards": None}})
    for kind, lacking in (("pretrain", {}), ("finetune", {"model": {"name": "swinv2_s"}}), ("study", {"name": "x"})):
        with pytest.raises(jsonschema.ValidationError):
            schema(kind).validate(lacking)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["train.iterations"],
            ["train.iterations  integer ≥ 1", "default 125000 (section 3.4)", "may change in a branch"],
        ),
        (["iterations"], ["train.iterations"]),
        (["train"], ["train.on_spike  stop | skip | rollback", "may change when a run is resumed"]),
        (["detector"], ["detector.anchors", "with task=detection"]),
        (["data"], ["data.cache_gib  number > 0 | null", "others: --kind finetune | classification"]),
        (
            ["--kind", "detection", "data"],
            ["data.test_size  [integer, integer], each ≥ 1, ≤ 4096", "default [800, 1333]"],
        ),
        (["--kind", "study", "models"], ["models.NAME.overrides  {KEY: value, ...}", "models.NAME.resources.time"]),
        (["--kind", "finetune", "task"], ["task  classification | detection | segmentation", "required"]),
        ([], ["fidelity  paper | released", "optimizer.betas  [number, number], each ≥ 0, < 1"]),
    ],
)
def test_keys_are_printed(capsys, arguments, says):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in says)
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trian", "did you mean 'train'?"),
        ("train.iteration", "did you mean 'train.iterations'?"),
        ("anchor", "did you mean 'detector.anchors'?"),
        ("frobnicate", "the sections are data, model, mim, "),
    ],
)
def test_an_unknown_section_or_key_names_the_nearest(capsys, word, says):
    assert main([word]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"mimscale: error: there is no section or key '{word}'; ") and says in said


def test_a_schema_is_printed(capsys):
    assert main(["--json-schema", "--kind", "segmentation"]) == 0
    assert "stride" in json.loads(capsys.readouterr().out)["properties"]["data"]["properties"]


def test_listing_keys_takes_little_and_no_torch():
    program = (
        "import sys, time\nfrom mimscale.cli import main\nmain(['keys', 'train'])\n"
        "print(sorted({'torch', 'deepspeed', 'numpy', 'timm'} & set(sys.modules)), file=sys.stderr)\n"
        "print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded, seconds = done.stderr.splitlines()
    assert "train.iterations" in done.stdout
    assert loaded == "[]"
    assert float(seconds) < 0.5
