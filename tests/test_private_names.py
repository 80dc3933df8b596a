"""What is private in torch and DeepSpeed, and used all the same, is there and does what it is used for."""

import contextlib
import inspect
import multiprocessing
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch.utils.data import DataLoader

from mimscale import torch_private


@contextlib.contextmanager
def using(package, seam):
    """Tell which private name is gone, instead of a bare AttributeError from inside."""
    try:
        yield
    except (AttributeError, ImportError, TypeError, AssertionError) as error:
        text = " ".join(inspect.getdoc(seam).split())
        pytest.fail(f"{seam.__module__}.{seam.__name__} fails with {package} {version(package)} ({error}): {text}")


def test_a_storage_is_told_from_another_on_the_meta_device():
    with using("torch", torch_private.storage_key):
        tensor = torch.empty(4, device="meta")
        assert torch_private.storage_key(tensor) == torch_private.storage_key(tensor[1:])
        assert torch_private.storage_key(tensor) != torch_private.storage_key(torch.empty(4, device="meta"))


def test_a_cpu_says_whether_it_multiplies_bf16():
    with using("torch", torch_private.cpu_multiplies_bf16):
        assert torch_private.cpu_multiplies_bf16() in (True, False)


def test_a_tensor_of_a_trace_is_known():
    with using("torch", torch_private.is_fake):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            assert torch_private.is_fake(torch.empty(0))
        assert not torch_private.is_fake(torch.empty(0))


def test_a_condition_is_asserted():
    with using("torch", torch_private.assert_async):
        torch_private.assert_async(torch.tensor(True), "holds")
    with pytest.raises(RuntimeError, match="does not hold"):
        torch_private.assert_async(torch.tensor(False), "does not hold")


def test_more_graphs_than_allowed_are_an_error():
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    with using("torch", torch_private.allow_graphs), config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False):
        torch_private.allow_graphs(2)
        twice = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
        assert [twice(torch.ones(n)).sum().item() for n in (2, 3)] == [4, 6]
        with pytest.raises(FailOnRecompileLimitHit):
            twice(torch.ones(5))


def test_the_gradient_of_a_softmax_is_autograds():
    scores = torch.randn(3, 5, requires_grad=True)
    incoming = torch.randn(3, 5)
    shares = scores.softmax(-1)
    shares.backward(incoming)
    with using("torch", torch_private.softmax_backward):
        torch_private.softmax_backward(incoming, shares.detach(), out=incoming)
    assert torch.allclose(incoming, scores.grad, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_resize_is_the_public_one(interpolation):
    images = torch.rand(1, 3, 20, 30)
    smaller = torch.empty(1, 3, 8, 9)
    with using("torch", torch_private.antialiased_resize):
        torch_private.antialiased_resize(interpolation)(images, [8, 9], False, None, None, out=smaller)
    public = torch.nn.functional.interpolate(images, (8, 9), mode=interpolation, antialias=True)
    assert torch.equal(smaller, public)


def test_workers_are_known_and_end():
    iterator = iter(DataLoader(range(8), num_workers=2))
    with using("torch", torch_private.keep_signals_from):
        torch_private.keep_signals_from(iterator)
    with using("torch", torch_private.worker_processes):
        workers = torch_private.worker_processes(iterator)
        assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    with using("torch", torch_private.end_workers):
        torch_private.end_workers(iterator)
    assert not set(workers) & set(multiprocessing.active_children())


def test_a_profile_shows_allocations():
    with torch.profiler.profile(profile_memory=True) as profiler:
        kept = torch.empty(1 << 20)
    with using("torch", torch_private.allocation):
        events = profiler.profiler.kineto_results.experimental_event_tree()
        every = [event for root in events for event in [root, *root.children]]
        sizes = [found for event in every if (found := torch_private.allocation(event)) is not None]
        assert any(size == kept.nbytes <= total for size, total in sizes)


def test_an_operator_tells_its_name_and_arguments():
    with using("torch", torch_private.operator_arguments):
        name, arguments = torch_private.operator_arguments(torch.ops.c10d.allreduce_.default)
        assert name.startswith("allreduce") and "process_group" in arguments


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_shows_what_it_keeps(alone, stage):
    import deepspeed

    from mimscale.training import deepspeed_private

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    with using("deepspeed", deepspeed_private.inner_optimizer):
        assert deepspeed_private.inner_optimizer(engine) is optimizer
    with using("deepspeed", deepspeed_private.masters):
        masters = list(deepspeed_private.masters(engine, stage))
        assert sum(master.numel() for master in masters) >= 3 * 5 + 5
    for master in masters:
        optimizer.state[master] = {kind: torch.zeros_like(master) for kind in ("exp_avg", "exp_avg_sq")}
    if stage in (1, 2):
        with using("deepspeed", deepspeed_private.link_state):
            deepspeed_private.link_state(engine, stage)
            moment = deepspeed.utils.safe_get_full_optimizer_state(engine.module.weight, "exp_avg")
            assert moment is not None and moment.shape == (5, 3)
    if stage == 3:
        with using("deepspeed", deepspeed_private.own_part):
            assert deepspeed_private.own_part(engine.module.weight) == 15
    engine.destroy()
    with using("deepspeed", deepspeed_private.drop_second_partition):
        deepspeed_private.drop_second_partition()


def test_ranks_on_a_cpu_start_without_a_compiler(tmp_path):
    command = "from mimscale.training.engine import start_ranks; print(start_ranks().world_size)"
    place = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "false", "PATH": os.defpath}
    meeting = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")  # of tests before, in this process
    kept = {name: value for name, value in os.environ.items() if not name.startswith(meeting)}
    done = subprocess.run([sys.executable, "-c", command], env={**kept, **place}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert not (tmp_path / "extensions").exists()
