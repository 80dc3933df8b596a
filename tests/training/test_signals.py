"""A signal ends all ranks of a run, whoever started them, and nothing is left behind."""

import pytest
from signals import Bench, Cell, end
from training_runs import write_config


@pytest.mark.parametrize(
    "cell, status, said",
    [
        (Cell("ranks", "TERM", "step", 1), 75, "which is saved"),
        (Cell("ranks", "INT", "start", 2), 130, "before its first step"),
    ],
    ids=str,
)
def test_a_signal_ends_every_rank_with_one_line_and_leaves_nothing(tmp_path, shards, cell, status, said):
    config = write_config(tmp_path, zero_optimization={"stage": 2})
    found = end(Bench(tmp_path, shards, config, None), cell, 0)
    assert found.problems == []
    assert found.left == 0
    assert said in found.message
    assert found.status == status
