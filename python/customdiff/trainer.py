"""``train``: a run from its configuration to the concept's file, that can be left alone."""

from __future__ import annotations

import math
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import checkpoint
from .attention import patched
from .base import load_base, usable_device
from .concept import Concept
from .config import Stopped, TrainConfig
from .generated import generate_missing
from .output import check_writable, nearest_folder
from .residual import Residual
from .residual_training import ResidualTraining
from .training import Training, check_base, frozen, new_accelerator
from .validation import Validation
from .views import Pictures

CPU_FULL = "DefaultCPUAllocator: "  # of a plain RuntimeError, where the CPU's memory is out


@dataclass(frozen=True)
class TrainResult:
    """What a run returns: the concept and its file, the loss of each step, seconds, pictures a second.

    concept: of method "cones2" a ``Residual``.
    peak_memory: bytes: of the GPU's memory where there is one, else the most that the process ever held.
    """

    concept: Concept | Residual
    output: Path
    losses: tuple[float, ...]
    seconds: float
    images_per_second: float
    peak_memory: int


def train(config: TrainConfig, pipeline: Any = None, *, progress: bool = True) -> TrainResult:
    """Learns the concepts of `config` and writes them to ``config.output``, whole or not at all.

    Under ``accelerate launch`` the processes share each step's pictures, and the first one writes. On SIGTERM
    or Ctrl-C a checkpoint is written after the step, whatever ``checkpoint_every`` says.

    Args:
        config: everything that the result depends on, but the base's weights.
        pipeline: a loaded base, in place of the one that ``config.base`` names; it is left as it was. In
            float16 or bfloat16, what is learned is float32 still. One loaded from the embedded base's folder,
            as by ``load_base()``, has that base's learning rates by default; any other has the paper's.
        progress: show a bar with the loss, pictures a second, memory and the time left.

    Raises:
        ValueError: for pictures, captions, an output or a base that cannot be used, an initializer word that
            is not one token, or a checkpoint that is damaged or of another run. Nothing is written then.
        FileExistsError: if the output is there already and ``config.overwrite`` is not set.
        OSError: if the disk has no room for the concept and its checkpoints.
        Stopped: if it was told to stop; a checkpoint is written.
        MemoryError: if memory ran out, with the settings that need less.
    """
    started = time.perf_counter()
    output = _usable_output(config)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pictures = Pictures.read(config)  # before the base: a wrong folder should not cost a model's loading
    start = None if config.start_from is None else Concept.load(config.start_from)
    ours = pipeline is None
    accelerator = new_accelerator(config, usable_device(config.device) if ours else pipeline.unet.device)
    if ours:
        several = accelerator.num_processes > 1
        pipeline = load_base(config.base, str(accelerator.device) if several else config.device)
    with _out_of_memory(config), patched(pipeline.unet), frozen(pipeline), _checkpointed(config, pipeline):
        check_base(config, pipeline)  # to generate pictures may take an hour
        pictures = generate_missing(config, pipeline, pictures, accelerator, progress)
        training = (ResidualTraining if config.residual else Training)(
            config, pipeline, pictures, accelerator, start
        )
        if ours and not training.learned.others and config.mixed_precision != "no":
            # frozen: autocast would cast its weights again at every call
            pipeline.unet.to({"bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision])
        try:
            _check_space(output, training)
            losses, rate = _run(training, output, progress and accelerator.is_main_process)
            concept = training.concept()
        finally:
            training.release()
    if accelerator.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        concept.save(output)
        _checkpoint_of(output).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return TrainResult(
        concept, output, losses, time.perf_counter() - started, rate, peak_memory(training.device)
    )


def _run(training: Training, output: Path, progress: bool) -> tuple[tuple[float, ...], float]:
    """All steps that are left; returns their losses and pictures a second."""
    config, accelerator, file = training.config, training.accelerator, _checkpoint_of(output)
    writes = accelerator.is_main_process
    if config.resume and file.is_file():
        checkpoint.restore(training, file)
    elif config.resume and writes:
        warnings.warn(f"resume: there is no checkpoint {str(file)!r}; starting anew", stacklevel=3)
    _check_same_step(training)
    losses: list[float] = []
    rate = 0.0
    bar = tqdm(
        total=config.steps, initial=training.steps_done, desc="training", unit="step", disable=not progress
    )
    with bar, _deterministic(), _stop_signals() as stop, Validation(training, output) as validation:
        looped = time.perf_counter()
        while training.steps_done < config.steps:
            losses.append(training.step())
            done = training.steps_done
            _check_finite(losses[-1], training)
            rate = len(losses) * training.images_per_step / (time.perf_counter() - looped)
            recent = losses[-20:]
            memory = peak_memory(training.device) / 2**30
            bar.set_postfix_str(
                f"loss {sum(recent) / len(recent):.4f}, {rate:.1f} images/s, {memory:.1f} GiB", refresh=False
            )
            bar.update()
            validation.after_step(losses[-1])
            told = _agreed(accelerator, stop.is_set())
            if writes and config.keep_every and done % config.keep_every == 0:
                training.concept().save(_kept(output, done))
            if writes and (told or config.checkpoint_every and done % config.checkpoint_every == 0):
                checkpoint.save(training, file)
            if told and done < config.steps:
                accelerator.wait_for_everyone()
                raise Stopped(
                    f"stopped after {done} of {config.steps} steps; go on with resume (--resume) from "
                    f"{str(file)!r}"
                )
    return tuple(losses), rate


def _check_same_step(training: Training) -> None:
    """Raises ValueError where the processes would go on from different steps, and then wait for one another
    without end.
    """
    accelerator, done = training.accelerator, training.steps_done
    if accelerator.num_processes > 1:
        steps = torch.tensor(float(done), device=accelerator.device)
        total = accelerator.reduce(steps, "sum")
        if float(total) != done * accelerator.num_processes:
            raise ValueError(
                f"resume: process {accelerator.process_index} goes on from step {done}, others not; put the "
                "output where every machine reads it"
            )


def _check_finite(loss: float, training: Training) -> None:
    """Ends a run that has diverged, which no later step would mend; its last checkpoint is kept."""
    if not math.isfinite(loss):
        half = training.config.mixed_precision == "fp16" or training.pipeline.unet.dtype == torch.float16
        raise ValueError(
            f"the loss of step {training.steps_done} is {loss}: give a lower learning_rate"
            + " or mixed_precision='bf16' in the place of float16" * half
        )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _checkpoint_of(output: Path) -> Path:
    return output.with_name(output.name + ".checkpoint")


def _kept(output: Path, step: int) -> Path:
    return output.with_name(f"{output.stem}-{step:06}{output.suffix}")


def _usable_output(config: TrainConfig) -> Path:
    """``config.output``, where a file can be written; nothing is made yet."""
    output = Path(config.output)
    check_writable(output)
    if output.exists() and not config.overwrite:
        raise FileExistsError(
            f"output {str(output)!r} exists; name another, or replace it with overwrite (--overwrite)"
        )
    return output


def _check_space(output: Path, training: Training) -> None:
    """Room for what the run writes: the concept, those that it keeps, two checkpoints with their moments."""
    config = training.config
    held = sum(tensor.nbytes for tensor in training.learned.state().values())
    concept = training.learned.shift.nbytes if config.residual else held
    concepts = 1 + (config.steps // config.keep_every if config.keep_every else 0)
    needed = concept * concepts + (6 * held if config.checkpoint_every else 0)
    free = shutil.disk_usage(nearest_folder(output)).free
    if free < needed:
        raise OSError(
            f"output {str(output)!r}: the run writes up to {needed / 2**20:,.0f} MiB and the disk has "
            f"{free / 2**20:,.0f} MiB left; make room, or name another place"
        )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; the second one ends the process as it always did."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told  # Python hands signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def tell(*_: Any) -> None:
        told.set()
        put_back()

    for number in before:
        signal.signal(number, tell)
    try:
        yield told
    finally:
        put_back()


def _agreed(accelerator: Any, told: bool) -> bool:
    """Whether any process was told to stop: all must leave after the same step."""
    if accelerator.num_processes == 1:
        return told
    return bool(accelerator.reduce(torch.tensor(float(told), device=accelerator.device), "sum") > 0)


@contextmanager
def _out_of_memory(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or CPU_FULL in str(error)
        if not known:
            raise
        lower = [f"accumulation={2 * config.accumulation}"] if config.accumulation < config.batch_size else []
        lower += [] if config.gradient_checkpointing else ["gradient_checkpointing=True"]
        lower += ["mixed_precision='bf16'"] if config.mixed_precision == "no" else []
        lower += ["optimizer='adamw8bit'"] if config.weights == "unet" and config.optimizer == "adamw" else []
        lower += ["weights='kv'"] if config.weights == "unet" else []
        lower += ["a lower resolution"]
        raise MemoryError(
            f"out of memory at batch_size={config.batch_size}: try {', '.join(lower)}"
        ) from error


@contextmanager
def _checkpointed(config: TrainConfig, pipeline: Any) -> Iterator[None]:
    """Gradient checkpointing of the UNet where asked for; off again after."""
    if not config.gradient_checkpointing or pipeline.unet.is_gradient_checkpointing:
        yield
        return
    pipeline.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        pipeline.unet.disable_gradient_checkpointing()


def _deterministic() -> Any:
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32
    )
