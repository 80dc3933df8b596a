"""The recipes and DeepSpeed configurations that ship, and the pure parts of training."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from training_runs import RECIPE, ROOT, TINY

from mimscale.training.checkpoint import owners
from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, reconcile, split_batch
from mimscale.training.metrics import duration
from mimscale.training.planning.counting import activation_bytes, parameter_sizes
from mimscale.training.planning.memory import micro_batch_that_fits, plan_rank
from mimscale.training.planning.throughput import flops_per_image
from mimscale.training.recipe import RecipeError, Schedule, load_recipe
from mimscale.training.schedule import decay_step, learning_rate

RECIPES = sorted((ROOT / "launchers/recipes").glob("*.yaml"))
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
ENCODERS = {"s": 48_959_514, "b": 86_893_944, "l": 195_203_124, "h": 655_211_274, "g": 1_060_977_444}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_resolves_to_itself(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("size", ENCODERS)
def test_the_papers_recipes_build_the_papers_models(size):
    recipe = load_recipe(ROOT / f"launchers/recipes/swinv2_{size}.yaml")
    channels = {"s": 96, "b": 128, "l": 192, "h": 352, "g": 448}[size] * 8
    assert sum(parameter_sizes(recipe)) == ENCODERS[size] + channels * 3072 + 3072
    assert recipe.train.global_batch == 2048
    assert recipe.learning_rate == pytest.approx(4e-4)
    assert recipe.mask.masked == 22
    assert recipe.mim.loss == "l2"


def test_released_fidelity_changes_the_loss():
    assert load_recipe(RECIPE, ["fidelity=released"]).mim.loss == "l1"
    assert load_recipe(RECIPE, ["fidelity=released", "mim.loss=l2"]).mim.loss == "l2"


def test_flops_of_swinv2_s_are_the_published_multiply_adds():
    """6.81 G multiply-adds of the encoder at 192 px, and the decoder's 36 x 768 x 3072."""
    recipe = load_recipe(ROOT / "launchers/recipes/swinv2_s.yaml")
    assert flops_per_image(recipe) / 6 == pytest.approx(6.81e9 + 36 * 768 * 3072, rel=0.01)


def test_activation_checkpointing_saves_most_of_the_activations():
    recipe = load_recipe(ROOT / "launchers/recipes/swinv2_s.yaml")
    less = load_recipe(ROOT / "launchers/recipes/swinv2_s.yaml", ["train.activation_checkpointing=true"])
    assert activation_bytes(less, bf16=False) < activation_bytes(recipe, bf16=False) / 4


def test_weight_decay_spares_what_the_paper_spares():
    from mimscale.training.optimizer import decay_groups
    from mimscale.training.pretraining.module import build_objective

    for fidelity, spared in (("paper", True), ("released", False)):
        recipe = load_recipe(RECIPE, [*TINY, f"fidelity={fidelity}"])
        objective = build_objective(recipe)
        kept = {
            id(p) for group in decay_groups(objective, recipe) if not group["weight_decay"] for p in group["params"]
        }
        for name, parameter in objective.named_parameters():
            expected = parameter.ndim <= 1 or name.endswith("bias") or "mask_token" in name
            if "cpb_mlp" in name or "logit_scale" in name:
                expected = expected or spared
            assert (id(parameter) in kept) == expected, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_one_for_deepspeed(path):
    import deepspeed

    config = read_ds_config(path)
    micro = config["train_micro_batch_size_per_gpu"]
    accumulated = config.get("data_types", {}).get("grad_accum_dtype", "fp32") == "fp32"
    batch, micro = (2048 if accumulated else micro), (64 if micro == "auto" else micro)
    recipe = load_recipe(ROOT / "launchers/recipes/swinv2_b.yaml", [f"train.global_batch={batch}"])
    split = split_batch(config, recipe.train.global_batch, 1, 64)
    resolved = reconcile(config, recipe, split, on_gpu=True)
    assert resolved["bf16"]["enabled"] is True
    assert json.loads(json.dumps(resolved)) == resolved
    parsed = deepspeed.DeepSpeedConfig(resolved)
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (batch, batch // micro)
    assert parsed.gradient_clipping == 5.0


def test_a_duplicate_yaml_key_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: {name: swinv2_s}\ntrain:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(RecipeError, match=r"twice\.yaml.*duplicate key 'seed'.*line 4"):
        load_recipe(path)


def test_a_number_in_bare_exponent_form_is_a_number():
    assert load_recipe(RECIPE, ["optimizer.lr=3e-4"]).optimizer.lr == 3e-4
    assert yaml.safe_load("3e-4") == "3e-4"  # what PyYAML makes of it


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**6))
def test_lengths_share_their_trunk(short, longer, step):
    """Up to where the shorter one steps down, two lengths have the same rates (section 3.4)."""
    schedule = Schedule(kind="step", warmup=6250)
    if step < decay_step(schedule, min(short, longer)):
        assert learning_rate(schedule, 4e-4, short, step) == learning_rate(schedule, 4e-4, longer, step)


def test_the_papers_lengths_branch_where_the_paper_says():
    assert [decay_step(Schedule(), n) for n in (125_000, 250_000, 500_000)] == [109_375, 218_750, 437_500]


def test_a_rate_can_step_down_twice_and_fall_in_a_line():
    twice = Schedule(warmup=10, decay_at=(0.75, 33 / 36))
    rates = [learning_rate(twice, 1.0, 36_000, step) for step in (10, 26_999, 27_000, 32_999, 33_000)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    line = Schedule(kind="linear", warmup=100)
    assert [learning_rate(line, 2.0, 1100, step) for step in (100, 600, 1100)] == pytest.approx([2, 1, 0])


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 512) | st.just("auto"), st.integers(1, 512))
def test_a_batch_is_split_without_remainder_or_refused(batch, ranks, micro, largest):
    try:
        split = split_batch({"train_micro_batch_size_per_gpu": micro}, batch, ranks, largest)
    except DeepSpeedConfigError:
        assert batch % ranks or (micro != "auto" and batch // ranks % micro)
    else:
        assert split.micro * split.accumulation * ranks == batch
        assert split.micro <= largest if micro == "auto" else split.micro == micro


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.integers(1, 50), st.integers(1, 50))), st.integers(1, 9))
def test_every_parameter_is_saved_by_one_rank(shapes, ranks):
    owner = owners(shapes, ranks)
    assert owner.keys() == shapes.keys()
    assert all(0 <= rank < ranks for rank in owner.values())
    if len(shapes) >= ranks:
        assert set(owner.values()) == set(range(ranks))


def test_durations_read_well():
    assert [duration(s) for s in (4, 200, 18_420, 183_600)] == ["4 s", "3 min 20 s", "5 h 07 min", "2 d 03 h"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": ' * 100_000, "it is nested too deeply"),
        ('{"x": ' + "[" * 60 + "]" * 60 + "}", "it is nested more than 40 deep"),
        ('{"train_batch_size": NaN}', "NaN is no finite number"),
        ('{"gradient_clipping": 1e999}', "1e999 is no finite number"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "is too large a number"),
        ('{"train_batch_size": 8, "train_batch_size": 8}', "duplicate key 'train_batch_size'; keep one"),
        ('{"train_batch_size": "8"}', "'train_batch_size' must be a positive number or \"auto\", not '8'"),
        ('{"train_micro_batch_size_per_gpu": true}', "'train_micro_batch_size_per_gpu' must be a positive number"),
        ('{"bf16": {"enabled": "yes"}}', "'bf16.enabled' must be true, false or \"auto\", not 'yes'"),
        ('{"zero_optimization": {"offload_param": 5}}', "'zero_optimization.offload_param' must be an object"),
        (
            '{"zero_optimization": {"reduce_bucket_size": "auto"}}',
            "must be a number of elements, at least 1, not 'auto'",
        ),
        ('{"zero_optimization": {"reduce_bucket_size": 0}}', "must be a number of elements, at least 1, not 0"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "disk"}}}',
            'must be "cpu", "nvme" or "none", not \'disk\'',
        ),
        ('{"zero_optimisation": {"stage": 2}}', "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ('{"zero_optimization": {"reduce_buckets_size": 1}}', "did you mean 'zero_optimization.reduce_bucket_size'?"),
        ('{"optimizer": {"type": ["AdamW"]}}', "'optimizer.type' must be a name, not ['AdamW']"),
        ('{"x": "' + "y" * 2_000_000 + '"}', "holds more than 1,048,576 bytes"),
        ("[]", "must hold a JSON object, not list"),
        ("", "is not valid JSON"),
    ],
)
def test_a_configuration_of_another_form_is_named_by_its_key(tmp_path, text, says):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(DeepSpeedConfigError) as error:
        read_ds_config(path)
    assert says in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 1000


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_micro_batch_is_the_largest_divisor_that_may_be(local, bound):
    slow = max(size for size in range(1, min(local, bound) + 1) if local % size == 0)
    assert split_batch({}, local, 1, bound).micro == slow


def test_what_is_too_large_to_count_is_worked_out():
    split = split_batch({}, 2**24 * 3**8, 3, 10**6)
    assert split.micro * split.accumulation * 3 == 2**24 * 3**8 and split.micro == 995_328
    with pytest.raises(DeepSpeedConfigError, match="and 180 more"):
        split_batch({"train_micro_batch_size_per_gpu": 7}, 2**24 * 3**7, 1, None)


@given(st.integers(1, 10**6), st.integers(0, 10**9))
def test_the_largest_micro_batch_is_found_without_trying_each(activations, spare):
    sizes, config = [10**6] * 3, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    budget = plan_rank(sizes, activations, config, 2).total + spare
    found = micro_batch_that_fits(sizes, activations, config, 2, budget)
    assert plan_rank(sizes, found * activations, config, 2).total <= budget
    assert plan_rank(sizes, (found + 1) * activations, config, 2).total > budget
