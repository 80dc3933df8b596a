"""A batch that is left out leaves nothing behind, at any ZeRO stage, precision and place of the optimizer."""

import os

import pytest
import torch
from training_runs import RECIPE, TINY

from mimscale.data import MIMStream, ShardIndex
from mimscale.training.ds_config import reconcile, split_batch
from mimscale.training.engine import Engine
from mimscale.training.optimizer import decay_groups
from mimscale.training.pretraining.module import build_objective
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import load_recipe

WAYS = {f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}
WAYS |= {f"zero{stage}-bf16": {**WAYS[f"zero{stage}"], "bf16": {"enabled": True}} for stage in (2, 3)}
WAYS |= {
    f"zero{stage}-offload": {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    for stage in (1, 2, 3)
}
WAYS["zero2-average"] = WAYS["zero2"]


@pytest.fixture(scope="module")
def recipe(shards):
    return load_recipe(RECIPE, [*TINY, f"data.shards={shards}"])


@pytest.fixture(scope="module")
def batches(recipe, shards):
    stream = MIMStream(ShardIndex.load(shards), fraction="100", seed=0, image_size=96, global_batch=8, stop_step=4)
    return [(batch.images, batch.mask, batch.draw_keys) for batch in stream]


def trained(recipe, config, batches, average, *, left_out):
    """Whole state, losses and gradient norms after the batches, of which that of ``left_out`` is discarded."""
    split = split_batch({**config, "train_micro_batch_size_per_gpu": 4}, 8, 1, None)
    settled = reconcile(config, recipe, split, on_gpu=False)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    groups = lambda module: decay_groups(module, recipe)  # noqa: E731
    engine = Engine(lambda: build_objective(recipe), groups, recipe, settled, ranks, average_decay=average)
    figures = []
    for step, batch in enumerate(batches):
        loss = engine.forward_backward(batch).mean
        if step != left_out:
            figures.append((loss, engine.apply(lambda scale: 1e-3 * scale)))
            continue
        before = dict(engine.full_state(lambda name: True))
        engine.discard()
        after = dict(engine.full_state(lambda name: True))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    state = dict(engine.full_state(lambda name: True))
    engine.close()
    return state, figures


@pytest.mark.parametrize("way", WAYS)
def test_training_continues_as_if_the_batch_had_not_been(recipe, batches, alone, way):
    if way.endswith("offload") and "MIMSCALE_TEST_OFFLOAD" not in os.environ:
        pytest.skip("DeepSpeed compiles its Adam for CPUs for minutes; MIMSCALE_TEST_OFFLOAD=1 runs this")
    average = 0.9 if way.endswith("average") else None
    state, figures = trained(recipe, WAYS[way], batches, average, left_out=1)
    plain, expected = trained(recipe, WAYS[way], [batches[0], *batches[2:]], average, left_out=None)
    assert figures == expected
    assert all(torch.equal(state[name], plain[name]) for name in plain)
