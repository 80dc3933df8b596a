"""What the ranks carry to each other in one step, and what it costs in time: a small model of DeepSpeed 0.19.

Volumes are of the whole tensor that is reduced or gathered; ``mimscale bench communication`` counts them in real steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mimscale.training.ds_config import REDUCE_BUCKET, zero_stage

GATHER_BUCKET = 50_000_000  # elements
KINDS = ("all_reduce", "reduce_scatter", "all_gather")


@dataclass(frozen=True)
class Traffic:
    """Bytes reduced, scattered while reduced, and gathered in one step over ``ranks`` ranks.

    ``gathered_again`` is the part of ``all_gather`` that the backward pass asks for; ``reductions`` and ``gathers`` are numbers
    of collectives.
    """

    ranks: int
    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0
    gathered_again: float = 0.0
    reductions: int = 0
    gathers: int = 0

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives, by ring algorithms: the least that is possible."""
        share = (self.ranks - 1) / self.ranks
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)

    @property
    def reduced(self) -> float:
        """The part of ``sent`` that gradients make up."""
        share = (self.ranks - 1) / self.ranks
        return share * (2 * self.all_reduce + self.reduce_scatter)


def predict(sizes: list[int], config: dict[str, Any], ranks: int, recomputed: float = 0.0) -> Traffic:
    """Traffic of one step.

    Stage 0 reduces all gradients once. Stages 1 and 2 reduce them with an all-reduce, since DeepSpeed 0.19 puts the parts of
    all ranks into one bucket (``use_multi_rank_bucket_allreduce``), and gather the updated parameters; stage 2 reduces with
    every micro-batch, as it keeps no whole gradient. Stage 3 gathers the parameters above its threshold for the forward pass
    of every micro-batch, and again for the backward pass those that it does not keep until then: a parameter is kept where
    no more elements are used in between than ``stage3_max_reuse_distance`` or what is fetched ahead. It scatters their gradients.

    Args:
        sizes: elements of every parameter.
        config: the reconciled DeepSpeed configuration.
        ranks: data-parallel ranks.
        recomputed: share of the parameters whose layers are run again in the backward pass.
    """
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    unit = 2 if config["bf16"]["enabled"] is True else 4
    passes = config["gradient_accumulation_steps"]
    count = sum(sizes)
    buckets = math.ceil(count / zero.get("reduce_bucket_size", REDUCE_BUCKET))
    if stage < 3:
        reduced = passes if stage == 2 else 1
        gathered = count * unit if stage else 0
        gathers = math.ceil(count / zero.get("allgather_bucket_size", GATHER_BUCKET)) if stage else 0
        return Traffic(
            ranks, all_reduce=count * unit * reduced, all_gather=gathered, reductions=buckets * reduced, gathers=gathers
        )
    whole = [size for size in sizes if size <= zero.get("stage3_param_persistence_threshold", 100_000)]
    small = sum(whole)
    # From a parameter's place to the end of the model and back.
    ahead = zero.get("stage3_prefetch_bucket_size", GATHER_BUCKET)
    kept = min(1.0, max(zero.get("stage3_max_reuse_distance", 10**9), ahead) / 2 / count)
    kept = min(kept, zero.get("stage3_max_live_parameters", 10**9) / count)
    large = (count - small) * unit * passes
    again = large * (1 - kept + recomputed)
    return Traffic(
        ranks,
        reduce_scatter=count * unit * passes,
        all_gather=large + again + small * unit,
        gathered_again=again,
        reductions=buckets * passes,
        # Those that stay whole are gathered one by one after the update.
        gathers=math.ceil((large + again) / unit / max(1, ahead)) + len(whole),
    )


@dataclass(frozen=True)
class Network:
    """How the GPUs of a cluster are joined; bytes a second, one way.

    Args:
        gpus_per_node: ranks that the fast links join.
        link: of one GPU inside its node.
        node: of a node to the others, all its adapters together.
        hop: seconds that one step of a ring takes besides.
    """

    gpus_per_node: int
    link: float
    node: float
    hop: float = 1.5e-6

    def seconds(self, sent: float, ranks: int, calls: int) -> float:
        """Time of ``calls`` collectives in which each rank sends ``sent`` bytes in all.

        A node's adapters carry one ring each, so that together they are worth ``node`` to every rank of it.
        """
        speed = self.link if ranks <= self.gpus_per_node else min(self.link, self.node)
        return sent / speed + calls * (ranks - 1) * self.hop


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: of computing, of all communication, and of what of it computing does not hide."""

    compute: float
    communication: float
    exposed: float

    @property
    def efficiency(self) -> float:
        """Share of the step that is computing: the rate on n GPUs over n times the rate of one."""
        return self.compute / (self.compute + self.exposed)


def step_time(traffic: Traffic, stage: int, network: Network, compute: float, within: float = 0.0) -> StepTime:
    """How long a step takes where communication is hidden as far as its order allows.

    Gradients travel while the backward pass, two thirds of the computing, goes on. Stages 1 and 2 gather the parameters after
    the update, with nothing to hide behind; stage 3 fetches ahead through the whole step.

    Args:
        traffic: of the step.
        stage: ZeRO stage.
        network: the cluster's.
        compute: seconds.
        within: bytes gathered inside nodes only (ZeRO++'s secondary partition), part of ``traffic.all_gather``.
    """
    ranks = traffic.ranks
    share = (ranks - 1) / ranks
    reducing = network.seconds(traffic.reduced, ranks, traffic.reductions)
    gathering = network.seconds(share * (traffic.all_gather - within), ranks, traffic.gathers)
    gathering += network.seconds(share * within, min(ranks, network.gpus_per_node), 0)
    if stage < 3:
        exposed = max(0.0, reducing - 2 / 3 * compute) + gathering
    else:
        exposed = max(0.0, reducing + gathering - compute)
    return StepTime(compute, reducing + gathering, exposed)
