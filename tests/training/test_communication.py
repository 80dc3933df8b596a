"""The model of what ranks exchange, behind docs/results/communication.md, holds against bytes counted in real steps."""

import pytest
from training_runs import RECIPE, TINY

from mimscale.commands.bench.communication import measure
from mimscale.training.planning.communication import Network, Traffic, predict, step_time

MEBI = [*TINY, "model.embed_dim=32"]  # some parameters above, some below ZeRO-3's threshold


NOTHING_KEPT = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
# In proportion to MEBI, what 300 million elements live and 50 million ahead are to the giant.
SOME_KEPT = {"stage": 3, "stage3_max_live_parameters": 570_000, "stage3_prefetch_bucket_size": 95_000}
ALL_SHARED = {"stage3_param_persistence_threshold": 0}
RECOMPUTED = "train.activation_checkpointing=true"
WAYS = {
    2: [
        *(({"stage": stage}, 2, []) for stage in range(4)),
        (NOTHING_KEPT, 1, []),
        (NOTHING_KEPT, 1, [RECOMPUTED]),
        (SOME_KEPT | {"stage3_max_reuse_distance": 570_000}, 2, [RECOMPUTED]),
        (SOME_KEPT | {"stage3_max_reuse_distance": 0} | ALL_SHARED, 1, []),
    ],
    4: [
        ({"stage": 2}, 1, []),
        (SOME_KEPT | {"zero_hpz_partition_size": 2}, 2, []),
        (NOTHING_KEPT | {"zero_hpz_partition_size": 2}, 1, [RECOMPUTED]),
        ({"stage": 3} | ALL_SHARED, 1, []),
    ],
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_predicted_bytes_are_those_of_real_steps(ranks):
    cells = [
        {
            "recipe": str(RECIPE),
            "overrides": [*MEBI, f"train.global_batch={ranks * passes}", *overrides],
            "config": {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
        }
        for zero, passes, overrides in WAYS[ranks]
    ]
    for cell, (measured, predicted) in zip(cells, measure(cells, ranks), strict=True):
        assert predicted.sent == pytest.approx(measured.sent, rel=0.01), cell
        assert predicted.within == pytest.approx(measured.within, rel=0.01)
        assert predicted.all_reduce == pytest.approx(measured.all_reduce, abs=1000)
        assert predicted.reduce_scatter == pytest.approx(measured.reduce_scatter, rel=0.01)
        assert predicted.reductions <= measured.reductions <= predicted.reductions + 3
        assert predicted.gathers == pytest.approx(measured.gathers, rel=0.1, abs=3)
        assert predicted.gathers_within == pytest.approx(measured.gathers_within, rel=0.1, abs=3)


def test_a_step_hides_what_its_order_allows():
    network = Network(8, link=100.0, node=10.0, hop=0.0)
    reduced, gathered = Traffic(2, all_reduce=100.0), Traffic(2, all_gather=100.0)
    late = Traffic(2, all_gather=100.0, gathered_late=100.0)
    # 100 bytes at 100 a second: under 2 s of backward pass, or not all under 0.6 s.
    assert step_time(reduced, network, compute=3.0).exposed == 0
    assert step_time(reduced, network, compute=0.9).exposed == pytest.approx(0.4)
    assert step_time(gathered, network, compute=3.0).exposed == 0
    assert step_time(late, network, compute=3.0).exposed == 0.5
    apart = Traffic(16, all_reduce=100.0)
    assert step_time(apart, network, compute=3.0).exposed == pytest.approx(2 * 15 / 16 * 100 / 10 - 2)
    assert step_time(apart, network, compute=3.0).efficiency == pytest.approx(3 / (3 + 16.75))


def test_a_second_partition_inside_nodes_leaves_one_gather_to_the_network():
    sizes, network = [10**6] * 8, Network(8, link=1e9, node=1e6, hop=0.0)
    config = {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}
    plain = predict(sizes, config | {"zero_optimization": NOTHING_KEPT}, 16)
    inside = predict(sizes, config | {"zero_optimization": NOTHING_KEPT | {"zero_hpz_partition_size": 8}}, 16)
    assert (plain.all_gather, plain.gathered_within) == (64e6, 0)
    assert (inside.all_gather, inside.gathered_within) == (16e6, 48e6)
    assert step_time(plain, network, 0.0).communication == pytest.approx(15 / 16 * (64e6 + 32e6) / 1e6)
    assert step_time(inside, network, 0.0).communication == pytest.approx(
        15 / 16 * (16e6 + 32e6) / 1e6 + 7 / 8 * 48e6 / 1e9
    )
