"""The trainer in processes of its own: two that share each step, and some that are killed or told to stop."""

import dataclasses
import multiprocessing
import os
import random
import signal
import socket
import time
import traceback
from pathlib import Path

import pytest
import torch
from training_runs import config, folders  # noqa: F401

import customdiff_kernels as ck
from customdiff import trainer
from customdiff.config import Stopped
from customdiff.residual import Residual

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LIMIT = 120  # seconds to wait for a process; it takes one or two
STOPPED, FAILED = 3, 1  # exit codes


@pytest.fixture(scope="module")
def processes():
    """New processes are forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    pipeline = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    context.set_forkserver_preload(["customdiff.trainer", "customdiff.training", pipeline])
    return context


def learn(config, environment):  # noqa: F811
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        trainer.train(config, progress=False)
    except Stopped:
        os._exit(STOPPED)
    except BaseException:
        traceback.print_exc()
        os._exit(FAILED)
    os._exit(0)  # threads of gloo may outlive an interpreter


def start(processes, config, environment=()):  # noqa: F811
    process = processes.Process(target=learn, args=(config, dict(environment)), daemon=True)
    process.start()
    return process


def start_two(processes, config):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [start(processes, config, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]


def wait(*running):
    for process in running:
        process.join(LIMIT)
    return [process.exitcode for process in running]


def renamed(config, name, **changes):  # noqa: F811
    return dataclasses.replace(config, output=str(Path(config.output).with_name(name)), **changes)


def checkpoint_of(config):  # noqa: F811
    return Path(config.output + ".checkpoint")


def wait_for_checkpoints(process, config, count):  # noqa: F811
    """Until `count` more of them were written."""
    file, seen, until = checkpoint_of(config), None, time.monotonic() + LIMIT
    seen = file.stat().st_ino if file.exists() else None
    while count:
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.002)
        if file.exists() and (now := file.stat().st_ino) != seen:
            seen, count = now, count - 1


def learned(config):  # noqa: F811
    """Every tensor that the run wrote."""
    if config.residual:
        return dict(enumerate(Residual.load(config.output).shift))
    found = ck.load_delta(config.output)
    return {**found.delta, **found.others, **found.modifier_tokens}


def assert_same(first, second, check):
    assert first.keys() == second.keys() and len(first) > 1
    for name, tensor in first.items():
        check(tensor, second[name])


def equal(first, second):
    assert torch.equal(first, second)


def to_rounding(first, second):
    assert (first - second).norm() <= 1e-3 * first.norm()


CONES2 = {"method": "cones2", "category": "big cup", "prompts": (), "caption_count": 40, "caption_batch": 3}
CONES2 |= {"regularization": None, "regularization_prompt": None, "accumulation": 2, "learning_rate": 1e-3}
CONES2 |= {"refine_steps": 2}  # of four


@pytest.mark.parametrize(
    "changes", [{}, {"weights": "unet", "accumulation": 2}, CONES2], ids=["kv", "unet", "cones2"]
)
def test_two_processes_learn_what_one_does(config, processes, changes):  # noqa: F811
    one = renamed(config, "one.safetensors", batch_size=5, **changes)
    two = renamed(one, "two.safetensors")
    assert wait(start(processes, one), *start_two(processes, two)) == [0, 0, 0]
    assert_same(learned(one), learned(two), to_rounding)
    assert sorted(os.listdir(Path(two.output).parent)) == ["one.safetensors", "two.safetensors"]


def test_killed_at_ten_moments_and_resumed_the_bits_are_the_same(config, processes):  # noqa: F811
    whole = renamed(config, "whole.safetensors", steps=100)
    began = time.monotonic()
    assert wait(start(processes, whole)) == [0]
    length, draw = time.monotonic() - began, random.Random(0)
    killed = renamed(whole, "killed.safetensors", checkpoint_every=1, resume=True)
    for _ in range(10):
        process = start(processes, killed)
        wait_for_checkpoints(process, killed, draw.randrange(4))
        time.sleep(draw.uniform(0, length / 15))  # as it starts, in a step, as it writes
        process.kill()
        assert wait(process) == [-signal.SIGKILL]
        assert not Path(killed.output).exists()
    assert checkpoint_of(killed).exists()
    assert wait(start(processes, killed)) == [0]
    assert_same(learned(whole), learned(killed), equal)
    assert sorted(os.listdir(Path(killed.output).parent)) == ["killed.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("count", [1, 2])
def test_told_to_stop_it_keeps_a_checkpoint(config, processes, count):  # noqa: F811
    """With two processes one alone is told; what they kept goes on in one."""
    whole = renamed(config, "whole.safetensors", steps=60)
    told = renamed(whole, "told.safetensors", keep_every=2)
    running = [start(processes, told)] if count == 1 else start_two(processes, told)
    first = Path(told.output).with_name("told-000002.safetensors")
    until = time.monotonic() + LIMIT
    while not first.exists():
        assert all(process.is_alive() for process in running) and time.monotonic() < until
        time.sleep(0.002)
    running[-1].terminate()
    assert wait(*running) == [STOPPED] * count
    assert not Path(told.output).exists()
    steps = torch.load(checkpoint_of(told), weights_only=True)["steps_done"]
    assert 2 <= steps < told.steps
    resumed = dataclasses.replace(told, resume=True)
    assert wait(start(processes, resumed), start(processes, whole)) == [0, 0]
    assert_same(learned(whole), learned(resumed), equal if count == 1 else to_rounding)
