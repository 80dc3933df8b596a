"""The model of what ranks exchange, behind docs/scaling.md, holds against bytes counted in real steps."""

import pytest
from training_runs import RECIPE, TINY

from mimscale.training.communication import Network, Traffic, predict, step_time
from mimscale.training.traffic import measure

MEBI = [*TINY, "model.embed_dim=32"]  # some parameters above, some below ZeRO-3's threshold


@pytest.mark.parametrize("ranks", [2, 4])
def test_predicted_bytes_are_those_of_real_steps(ranks):
    nothing_kept = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    ways = [*(({"stage": stage}, 2) for stage in range(4)), (nothing_kept, 1)]
    if ranks == 4:
        ways = [({"stage": 2}, 1), ({"stage": 3, "stage3_param_persistence_threshold": 0}, 1)]
    cells = [
        {
            "recipe": str(RECIPE),
            "overrides": [*MEBI, f"train.global_batch={ranks * passes}"],
            "config": {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
        }
        for zero, passes in ways
    ]
    for (zero, _), (measured, predicted) in zip(ways, measure(cells, ranks), strict=True):
        assert predicted.sent == pytest.approx(measured.sent, rel=0.03)
        assert predicted.all_reduce == pytest.approx(measured.all_reduce, abs=1000)
        assert predicted.reduce_scatter == pytest.approx(measured.reduce_scatter, rel=0.01)
        assert predicted.reductions <= measured.reductions <= predicted.reductions + 3
        if zero is not nothing_kept:  # one by one, then
            assert predicted.gathers == pytest.approx(measured.gathers, rel=0.1, abs=3)


def test_a_step_hides_what_its_order_allows():
    network = Network(8, link=100.0, node=10.0, hop=0.0)
    reduced, gathered = Traffic(2, all_reduce=100.0), Traffic(2, all_gather=100.0)
    assert (
        step_time(reduced, 2, network, compute=3.0).exposed == 0
    )  # 100 bytes at 100 a second, under 2 s of backward pass
    assert (
        step_time(gathered, 2, network, compute=3.0).exposed == 0.5
    )  # after the update there is nothing to hide behind
    assert step_time(gathered, 3, network, compute=3.0).exposed == 0
    apart = Traffic(16, all_reduce=100.0)
    assert step_time(apart, 2, network, compute=3.0).exposed == pytest.approx(2 * 15 / 16 * 100 / 10 - 2)
    assert step_time(apart, 2, network, compute=3.0).efficiency == pytest.approx(3 / (3 + 16.75))


def test_a_second_partition_inside_nodes_takes_the_backward_passes_gathers_off_the_network():
    sizes = [10**6] * 8
    zero = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    config = {"zero_optimization": zero, "bf16": {"enabled": True}}
    traffic = predict(sizes, config | {"gradient_accumulation_steps": 1}, 16)
    assert traffic.gathered_again == 16e6
    network = Network(8, link=1e9, node=1e6, hop=0.0)
    plain = step_time(traffic, 3, network, compute=0.0)
    inside = step_time(traffic, 3, network, compute=0.0, within=traffic.gathered_again)
    assert plain.communication - inside.communication == pytest.approx(15 / 16 * 16e6 * (1 / 1e6 - 1 / 1e9))
