"""What the ranks carry to each other in one step, and what it costs in time: a small model of DeepSpeed 0.19.

Volumes are of the whole tensor that is reduced or gathered; ``mimscale bench communication`` counts them in real steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mimscale.training.ds_config import REDUCE_BUCKET, second_partition, zero_stage

GATHER_BUCKET = 50_000_000  # elements
KINDS = ("all_reduce", "reduce_scatter", "all_gather")


@dataclass(frozen=True)
class Traffic:
    """Bytes reduced, scattered while reduced, and gathered in one step over ``ranks`` ranks.

    ``gathered_within`` is gathered besides, by every ``group`` ranks among themselves; ``gathered_late`` is the part of
    ``all_gather`` that follows the update. ``pieces`` is how many parts of parameters a rank's host puts together: one of
    every rank for each parameter that is gathered with others. The rest are numbers of collectives.
    """

    ranks: int
    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0
    gathered_within: float = 0.0
    gathered_late: float = 0.0
    group: int = 1
    reductions: int = 0
    gathers: int = 0
    gathers_within: int = 0
    gathers_late: int = 0
    pieces: int = 0

    @property
    def reduced(self) -> float:
        """Bytes of gradients that each rank sends, and receives, by ring algorithms: the least that is possible."""
        return (self.ranks - 1) / self.ranks * (2 * self.all_reduce + self.reduce_scatter)

    @property
    def gathered(self) -> float:
        """Bytes of parameters that each rank sends to all the others while it computes."""
        return (self.ranks - 1) / self.ranks * (self.all_gather - self.gathered_late)

    @property
    def late(self) -> float:
        """Bytes of parameters that each rank sends after the update."""
        return (self.ranks - 1) / self.ranks * self.gathered_late

    @property
    def within(self) -> float:
        """Bytes of parameters that each rank sends inside its group."""
        return (self.group - 1) / self.group * self.gathered_within

    @property
    def sent(self) -> float:
        """All bytes that each rank sends."""
        return self.reduced + self.gathered + self.late + self.within


def predict(sizes: list[int], config: dict[str, Any], ranks: int, recomputed: Sequence[range] = ()) -> Traffic:
    """Traffic of one step.

    Stage 0 reduces all gradients once. Stages 1 and 2 reduce them with an all-reduce, since DeepSpeed 0.19 puts the parts of
    all ranks into one bucket (``use_multi_rank_bucket_allreduce``), and gather the updated parameters; stage 2 reduces with
    every micro-batch, as it keeps no whole gradient. Stage 3 gathers the parameters above its threshold for the forward pass
    of every micro-batch, and again, for recomputation and backward pass, those that it does not keep until then. It scatters
    their gradients. With ZeRO++'s second partition only the first gather after an update goes to all ranks: it leaves
    a copy in every group of ``zero_hpz_partition_size``, where the others gather from.

    Args:
        sizes: elements of every parameter, in the order of their use.
        config: the reconciled DeepSpeed configuration.
        ranks: data-parallel ranks.
        recomputed: the parameters, as ranges of ``sizes``, of each block that is run again before its backward pass.
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
            ranks,
            all_reduce=count * unit * reduced,
            all_gather=gathered,
            gathered_late=gathered,
            reductions=buckets * reduced,
            gathers=gathers,
            gathers_late=gathers,
        )
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    small = [size for size in sizes if size <= threshold]
    events = _gathers(sizes, threshold, zero, recomputed)
    group = second_partition(config)
    group = 1 if group >= ranks else group  # of all ranks there is no second one
    known: set[int] = set()
    elements, calls, pieces = {False: 0, True: 0}, {False: 0, True: 0}, 0
    # The second pass finds what the first has left, and so do all after it.
    for times in (1, passes - 1):
        for event in events if times else ():
            near = [index for index in event if group > 1 and index in known]
            far = [index for index in event if group == 1 or index not in known]
            for inside, part in ((True, near), (False, far)):
                elements[inside] += times * sum(sizes[index] for index in part)
                calls[inside] += times * bool(part)
                pieces += times * len(part) * (group if inside else ranks) if len(part) > 1 else 0
            known.update(event)
    return Traffic(
        ranks,
        reduce_scatter=count * unit * passes,
        all_gather=(elements[False] + sum(small)) * unit,
        gathered_within=elements[True] * unit,
        gathered_late=sum(small) * unit,
        group=group,
        reductions=buckets * passes,
        gathers=calls[False] + len(small),
        gathers_within=calls[True],
        # Those that stay whole, one by one.
        gathers_late=len(small),
        pieces=pieces,
    )


def _gathers(sizes: list[int], threshold: int, zero: dict[str, Any], recomputed: Sequence[range]) -> list[list[int]]:
    """Which parameters ZeRO-3 gathers in one forward and backward pass: indices of ``sizes``, a list for each collective.

    It lets go of a parameter after its use unless the next use comes before ``stage3_max_reuse_distance`` elements of others,
    or has been seen already by what fetches ahead: after every use that looks for up to ``stage3_prefetch_bucket_size``
    elements which are not there yet, while fewer than ``stage3_max_live_parameters`` are.
    """
    reuse, live = (zero.get(f"stage3_max_{name}", 10**9) for name in ("reuse_distance", "live_parameters"))
    bucket = zero.get("stage3_prefetch_bucket_size", GATHER_BUCKET)
    blocks = {block.stop - 1: block for block in recomputed}
    order = list(range(len(sizes)))
    for index in reversed(range(len(sizes))):
        order += [*blocks.get(index, ()), index]
    before = [0, *itertools.accumulate(sizes[index] for index in order)]
    following: dict[int, int] = {}
    next_use = []
    for step in reversed(range(len(order))):
        next_use.append(following.get(order[step]))
        following[order[step]] = step
    next_use.reverse()

    events: list[list[int]] = []
    here = {index for index, size in enumerate(sizes) if size <= threshold}
    seen, looked, there = [-1] * len(sizes), 0, 0  # the last use looked at; uses looked at; elements gathered
    for step, index in enumerate(order):
        if index not in here:
            here.add(index)
            there += sizes[index]
            events.append([index])
        while looked <= step:
            seen[order[looked]] = looked
            looked += 1
        room, fetched, found = min(live - there, bucket), list[int](), 0
        while looked < len(order) and found < room:
            seen[coming := order[looked]] = looked
            looked += 1
            if coming not in here:
                here.add(coming)
                fetched.append(coming)
                found += sizes[coming]
        there += found
        if fetched:
            events.append(fetched)
        again = next_use[step]
        kept = again is not None and (seen[index] > step or before[again] - before[step + 1] < reuse)
        if sizes[index] > threshold and not kept:
            here.remove(index)
            there -= sizes[index]
    return events


@dataclass(frozen=True)
class Network:
    """How the GPUs of a cluster are joined; bytes a second, one way.

    Args:
        gpus_per_node: ranks that the fast links join.
        link: of one GPU inside its node.
        node: of a node to the others, all its adapters together.
        hop: seconds that one step of a ring takes besides.
        piece: seconds that a host takes to put one part of a gathered parameter into its place.
    """

    gpus_per_node: int
    link: float
    node: float
    hop: float = 1.5e-6
    piece: float = 2e-6

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


def step_time(traffic: Traffic, network: Network, compute: float) -> StepTime:
    """How long a step takes where communication is hidden as far as its order allows.

    Gradients travel during the backward pass, two thirds of the computing; what stage 3 gathers is fetched ahead
    through the whole step, and put together by the host meanwhile. What is gathered after the update has nothing to hide
    behind.

    Args:
        traffic: of the step.
        network: the cluster's.
        compute: seconds.
    """
    reducing = network.seconds(traffic.reduced, traffic.ranks, traffic.reductions)
    gathering = network.seconds(traffic.gathered, traffic.ranks, traffic.gathers - traffic.gathers_late)
    gathering += network.seconds(traffic.within, traffic.group, traffic.gathers_within)
    late = network.seconds(traffic.late, traffic.ranks, traffic.gathers_late)
    bounds = reducing - 2 / 3 * compute, reducing + gathering - compute, traffic.pieces * network.piece - compute
    exposed = max(0.0, *bounds) + late
    return StepTime(compute, reducing + gathering + late, exposed)
