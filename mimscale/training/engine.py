"""The DeepSpeed engine: the only file that imports deepspeed.

It starts the ranks however they were launched, builds the model where its parameters will live, runs optimizer steps, and
hands the whole training state in and out as plain fp32 tensors, whatever the ZeRO stage and precision.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would choose, but with a warning on every rank

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam

from mimscale.models.weights.released import saved_buffers
from mimscale.schema import LISTED
from mimscale.training.deepspeed_private import (
    drop_second_partition,
    inner_optimizer,
    link_state,
    masters,
    own_part,
    without_compiled_reductions,
)
from mimscale.training.ds_config import DeepSpeedConfigError, offloads_optimizer, zero_stage
from mimscale.training.errors import CorruptedUpdateError, TrainingError
from mimscale.training.launch.extensions import built_alone
from mimscale.training.launch.rendezvous import interface, rendezvous
from mimscale.training.optimizer import AVERAGE, AveragingAdamW, without_gradients
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import RunRecipe
from mimscale.wording import printable

# DeepSpeed calls collectives by their former names; torch would warn of it several times a step.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")

MOMENTS = ("exp_avg", "exp_avg_sq")


# What start_ranks added to the environment, and stop_ranks takes back.
_meeting: dict[str, str] = {}


def start_ranks(timeout_minutes: float = 30) -> Ranks:
    """Join the process group of whoever launched us: ``deepspeed``, ``torchrun``, ``srun``, or nobody (one process).

    Raises:
        TrainingError: the ranks cannot meet; their port is in use, or somebody does not come.
    """
    _meeting.update(rendezvous())
    os.environ.update(_meeting)
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    on_gpu = accelerator.device_name() == "cuda"
    device = torch.device("cpu")
    if on_gpu:
        # Slurm may show each task its own GPU alone.
        device = torch.device("cuda", local_rank if accelerator.device_count() > 1 else 0)
        accelerator.set_device(device.index)
    elif "OMP_NUM_THREADS" not in os.environ or world_size > 1:
        # Ranks on one CPU would otherwise each start a thread for every core.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))
    if not on_gpu and "GLOO_SOCKET_IFNAME" not in os.environ and (found := interface(os.environ["MASTER_ADDR"])):
        # Gloo would take the one that the host's own name points to: on many hosts that is the loopback.
        _meeting["GLOO_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = found
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("MIMSCALE_DEEPSPEED_LOG", "ERROR").upper())
    if not on_gpu:
        without_compiled_reductions()
    try:
        deepspeed.init_distributed(  # nothing to do where there is a process group already
            dist_backend=accelerator.communication_backend_name() if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as problem:
        raise TrainingError(_not_met(problem)) from problem
    return Ranks(int(os.environ["RANK"]), world_size, local_rank, local_world_size, device)


def _not_met(problem: RuntimeError) -> str:
    """What to do where the ranks cannot meet."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(problem) or "already in use" in str(problem):
        return (
            f"the port where the ranks would meet, {where}, is in use; is another training running on this host? Choose another: "
            "deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N in the environment"
        )
    text = printable(str(problem).splitlines()[0].rstrip(".") if str(problem) else type(problem).__name__)
    return (
        f"the ranks could not meet at {where} ({text}): have all {os.environ['WORLD_SIZE']} started, and can this host reach "
        "that one (firewall, MASTER_ADDR, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME)?"
    )


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Name the keys of a configuration that DeepSpeed's own check refuses.

    Raises:
        DeepSpeedConfigError: there are such.
    """
    try:
        yield
    except ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:LISTED]]
        raise DeepSpeedConfigError(
            f"DeepSpeed does not take this configuration ({error.title}): {printable('; '.join(found), 1000)}"
        ) from None


@contextlib.contextmanager
def _device_number(ranks: Ranks) -> Iterator[None]:
    """DeepSpeed takes LOCAL_RANK for the number of its device, which it is not where each rank sees its own one alone."""
    before = os.environ["LOCAL_RANK"]
    if ranks.device.index is not None:
        os.environ["LOCAL_RANK"] = str(ranks.device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


def stop_ranks() -> None:
    """Leave the process group, so that this process can join another one."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()  # and forgets the groups that it made of it
    for name in _meeting:  # what this process starts from now on shall not take itself for a rank
        os.environ.pop(name, None)
    _meeting.clear()


def on_gpu() -> bool:
    """Whether training would run on a GPU here."""
    return get_accelerator().device_name() == "cuda"


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a global batch: its mean, the ranks whose own is not finite, and whether any rank asks to stop."""

    mean: float
    bad_ranks: tuple[int, ...]
    stop_requested: bool


class Engine:
    """One model under DeepSpeed.

    Args:
        build: makes the module; called where its parameters shall live (partitioned from the start under ZeRO-3). Its
            ``encoder`` is what gets compiled; ``set_grad_checkpointing(enable, **options)`` has its blocks recomputed.
        groups: parameter groups of the built module; a group's ``lr_scale`` is what :meth:`apply` makes its rate of.
        recipe: seed, optimizer settings, activation checkpointing.
        config: the reconciled DeepSpeed configuration.
        ranks: from :func:`start_ranks`.
        restore: ``name -> fp32 tensor`` of a saved state (see :meth:`full_state`), or ``None`` to start afresh.
        restored_steps: updates that state has behind it.
        check: called with the whole shape of every parameter before anything is restored; raises if they do not fit.
        start: weights to begin with by name, ``None`` where the initial ones stay; not used with ``restore``.
        average_decay: keep a moving average of the weights with this decay.

    Raises:
        TrainingError: a moving average is asked for where the optimizer is offloaded, or DeepSpeed's optimizer for the CPU
            cannot be compiled.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        groups: Callable[[nn.Module], list[dict[str, Any]]],
        recipe: RunRecipe,
        config: dict[str, Any],
        ranks: Ranks,
        restore: Callable[[str], Tensor] | None = None,
        restored_steps: int = 0,
        check: Callable[[dict[str, tuple[int, ...]]], None] | None = None,
        start: Callable[[str], Tensor | None] | None = None,
        average_decay: float | None = None,
    ):
        self.ranks = ranks
        self.average_decay = average_decay
        # What the optimizer keeps of every parameter.
        self.kept = MOMENTS if average_decay is None else (*MOMENTS, AVERAGE)
        # Called wherever work makes progress: a watchdog may listen.
        self.touch: Callable[[], None] = lambda: None
        self.stage = zero_stage(config)
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.micro: int = config["train_micro_batch_size_per_gpu"]
        torch.manual_seed(recipe.train.seed)
        # Built on the device at every stage, so that the same seed draws the same weights at every stage.
        with _device_number(ranks):
            with _understood():
                place = self._place(config)
            with place:
                module = build()
        if check is not None:
            check(_whole_shapes(module))
        self._checkpoint_activations(module, recipe, config)
        if recipe.train.compile:
            module.encoder.compile_blocks()  # type: ignore[union-attr, operator]
        if restore is not None or start is not None:
            self._load_weights(module, restore or start)  # type: ignore[arg-type]
        optimizer = self._optimizer(groups(module), recipe, config)
        with _device_number(ranks), _understood():
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self.module: nn.Module = self.engine.module
        self.names = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        self._prime_moments(restored_steps)
        if restore is not None:
            self._load_optimizer(restore)

    def _place(self, config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        return deepspeed.zero.Init(config_dict_or_path=config) if self.stage == 3 else self.ranks.device

    def _checkpoint_activations(self, module: nn.Module, recipe: RunRecipe, config: dict[str, Any]) -> None:
        if "activation_checkpointing" in config:
            block = dict(config["activation_checkpointing"])
            if self.ranks.device.type == "cpu":
                # They are in host memory already; DeepSpeed would empty the only copy.
                block["cpu_checkpointing"] = False
            deepspeed.checkpointing.configure(None, deepspeed_config={**config, "activation_checkpointing": block})
            module.set_grad_checkpointing(True, checkpoint_fn=deepspeed.checkpointing.checkpoint)  # type: ignore[operator]
        elif recipe.train.activation_checkpointing:
            module.set_grad_checkpointing(True)  # type: ignore[operator]

    def _optimizer(
        self, groups: list[dict[str, Any]], recipe: RunRecipe, config: dict[str, Any]
    ) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {
            "lr": recipe.learning_rate,
            "betas": recipe.optimizer.betas,
            "eps": recipe.optimizer.eps,
        }
        if offloads_optimizer(config):
            if self.average_decay is not None:
                raise TrainingError(
                    "a moving average of the weights does not go with an offloaded optimizer: leave finetune.ema out, or "
                    "offload_optimizer"
                )
            with built_alone("cpu_adam", first=self.ranks.local_rank == 0):
                return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        if self.average_decay is not None:
            return AveragingAdamW(groups, self.average_decay, fused=True, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: tuple[Tensor, ...], stop_requested: bool = False) -> BatchLoss:
        """Loss and gradients of this rank's share of a global batch, in micro-batches; :meth:`apply` or :meth:`discard` follows.

        Args:
            batch: tensors whose first dimension is this rank's images; each micro-batch gets its slice of every one.
            stop_requested: a wish of this rank that all shall know, at no further communication.
        """
        self.engine.train()
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for index in range(self.accumulation):
            part = slice(index * self.micro, (index + 1) * self.micro)
            loss = self.engine(*(self._to_device(tensor[part]) for tensor in batch))
            self.engine.backward(loss)
            total += loss.detach().double() / self.accumulation
            self.touch()
            if index + 1 < self.accumulation:
                self.engine.step()
        return self._over_ranks(total, stop_requested)

    def apply(self, rate: Callable[[float], float]) -> float:
        """Update the weights with the gradients that are there.

        Args:
            rate: the learning rate of a parameter group, from its ``lr_scale``.

        Returns:
            The gradient's norm before clipping.

        Raises:
            CorruptedUpdateError: the norm is not finite, and the weights are corrupted.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate(group.get("lr_scale", 1.0))
        grad_norm = self._plain_grad_norm()
        self.engine.step()
        if grad_norm is None:
            grad_norm = self.engine.get_global_grad_norm()
        norm = float(grad_norm if grad_norm is not None else math.nan)
        if not math.isfinite(norm):
            raise CorruptedUpdateError(f"the gradient's norm became {norm}")
        return norm

    def discard(self) -> None:
        """Clear the gradients; weights, moments and their count of updates stay as they are.

        DeepSpeed has no call for this: gradients that ZeRO has partitioned go only with its step. So it makes one, in which
        the optimizer finds no gradients and passes every parameter over.
        """
        with without_gradients(inner_optimizer(self.engine)):
            self.engine.step()

    def evaluate(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """The module's eval-mode outputs for one batch; under ZeRO-3 every rank must call it equally often."""
        self.engine.eval()
        self.touch()
        with torch.no_grad():
            return self.engine(*(self._to_device(tensor) for tensor in batch))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let :meth:`evaluate` use the moving average of the weights, where one is kept. Collective."""
        if self.average_decay is None:
            yield
            return
        # At stage 0 the weights are their own fp32 master, so a copy has to stand in for it.
        own = {name: p.detach().clone() for name, p in self.names.items()} if self.stage == 0 else {}
        for parameter in self.names.values():
            self._overwrite(parameter, self._full(parameter, AVERAGE))
        try:
            yield
        finally:
            for name, parameter in self.names.items():
                self._overwrite(parameter, own[name] if own else self._full(parameter, None))

    def _overwrite(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a weight as the module computes with it from the whole; its fp32 master stays."""
        with self._whole(parameter), torch.no_grad():
            if self.stage != 3 or self.ranks.is_first:
                parameter.copy_(value)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.ranks.device, non_blocking=True)

    def _over_ranks(self, value: Tensor, flag: bool) -> BatchLoss:
        mine = torch.stack([value, torch.full_like(value, float(flag))])
        values = [torch.zeros_like(mine) for _ in range(self.ranks.world_size)]
        dist.all_gather(values, mine)
        numbers, flags = torch.stack(values, dim=1).tolist()
        bad = tuple(rank for rank, number in enumerate(numbers) if not math.isfinite(number))
        return BatchLoss(sum(numbers) / len(numbers), bad, any(flags))

    def _plain_grad_norm(self) -> Tensor | None:
        # At stage 0 DeepSpeed clips without keeping the norm; ZeRO's optimizers report theirs after the step.
        if self.stage:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.names.values() if p.grad is not None])

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Scalars for the monitors (tensorboard, wandb, csv) that the DeepSpeed configuration asks for."""
        if self.engine.monitor.enabled and self.ranks.is_first:
            self.engine.monitor.write_events(events)

    # -- the whole state, in and out -------------------------------------------------------------------------------------

    def full_state(self, keep: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and both of Adam's moments, whole and in fp32, one at a time; and the statistics in buffers.

        Collective: all ranks iterate together, and each receives on the CPU what ``keep`` says of the parameter's name. Moments
        are named ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, a moving average ``average/NAME``.
        """
        for name, statistic in saved_buffers(self.module).items():
            if keep(name):
                yield name, statistic.detach().float().cpu().clone()
        for name, parameter in self.names.items():
            for kind in (None, *self.kept):
                value = self._full(parameter, kind)
                self.touch()
                if keep(name):
                    yield (name if kind is None else f"{kind}/{name}"), value.detach().float().cpu().clone()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of everything that :meth:`full_state` gives by its own name."""
        return _whole_shapes(self.module)

    @property
    def parameter_count(self) -> int:
        """Numbers that are trained."""
        return sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in self.names.values())

    def _full(self, parameter: nn.Parameter, kind: str | None) -> Tensor:
        if self.stage == 0:
            return parameter if kind is None else self.engine.optimizer.state[parameter][kind]
        if kind is None:
            return deepspeed.utils.safe_get_full_fp32_param(parameter)
        return deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)

    def _load_weights(self, module: nn.Module, weights: Callable[[str], Tensor | None]) -> None:
        """Set the weights before DeepSpeed makes its copies of them, so that all copies follow."""
        for name, parameter in module.named_parameters():
            with self._whole(parameter):
                if (self.stage != 3 or self.ranks.is_first) and (value := weights(name)) is not None:
                    parameter.data.copy_(value)
        for name, statistic in saved_buffers(module).items():
            if (value := weights(name)) is not None:
                statistic.copy_(value)

    def _whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """Under ZeRO-3, gather a parameter for the first rank to change."""
        if self.stage == 3:
            return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        return contextlib.nullcontext()

    def _load_optimizer(self, restore: Callable[[str], Tensor]) -> None:
        for name, parameter in self.names.items():
            if self.stage == 0:
                for kind in self.kept:
                    self.engine.optimizer.state[parameter][kind].copy_(restore(f"{kind}/{name}"))
                continue
            # In bf16 the weights set before were rounded; the fp32 master is set to the digit.
            self._set(parameter, restore(name), None)
            for kind in self.kept:
                self._set(parameter, restore(f"{kind}/{name}"), kind)

    def _set(self, parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
        """Set this rank's part of an fp32 master (``kind`` None) or moment from the whole."""
        value = self._to_device(value)
        if self.stage == 3:
            # DeepSpeed's own way from the whole to the part fails where the last part is padded.
            size = own_part(parameter)
            padded = torch.nn.functional.pad(value.flatten(), (0, size * self.ranks.world_size - value.numel()))
            part = padded[size * self.ranks.rank :][:size]
            if kind is None:
                deepspeed.utils.safe_set_local_fp32_param(parameter, part)
            else:
                deepspeed.utils.safe_set_local_optimizer_state(parameter, part, kind)
        elif kind is None:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)

    def _prime_moments(self, steps: int) -> None:
        """Create AdamW's state, which torch makes only at the first step, so that it can be read and set at any time."""
        inner = inner_optimizer(self.engine)
        for master in masters(self.engine, self.stage):
            state = inner.state[master]
            if isinstance(inner, torch.optim.AdamW):
                fused = inner.defaults.get("fused")
                state["step"] = torch.tensor(float(steps), device=master.device if fused else "cpu")
            else:
                state["step"] = steps
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format)
            if self.average_decay is not None:
                state[AVERAGE] = master.detach().clone(memory_format=torch.preserve_format)
        link_state(self.engine, self.stage)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        with contextlib.suppress(Exception):
            self.engine.destroy()
        drop_second_partition()


def _whole_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    # Under ZeRO-3 a parameter is an empty placeholder with its real shape beside it.
    trained = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters() if p.requires_grad}
    return trained | {name: tuple(buffer.shape) for name, buffer in saved_buffers(module).items()}
