"""What a run would cost, from a few steps on this machine and without starting it."""

import contextlib
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from proteus.config import Config
from proteus.data.loader import PREFETCH, training_batches
from proteus.training import start
from proteus.training.flops import training_flops
from proteus.training.memory import measure_memory, settle_batch_size
from proteus.training.probe import split_source

WARM_UP, STEPS = 2, 10


def estimate(cfg: Config) -> list[str]:
    """Parameters, FLOPs an image, memory, measured images/s and hours of a run, a line each. Nothing is
    written into its directory.

    Under `accelerate launch` all processes take part, and the speed is of them together.
    """
    assert cfg.run.dir is not None
    directory = Path(cfg.run.dir)
    accelerator = start.build_accelerator(cfg, directory)
    source, _ = split_source(cfg)
    cfg = settle_batch_size(cfg, source, accelerator, directory)
    parts = start.build_parts(cfg, source, accelerator, directory)
    sampler, plan, teachers, answering, learners, dataset = parts
    batch = dataset.batch(sampler.micro_batch(0, 0, accelerator.process_index)).to(accelerator.device)
    images = len(batch.images)
    alone = [training_flops([learner.task], answering, batch) for learner in learners]
    teacher_flops, student_flops = alone[0].teachers / images, [flops.students / images for flops in alone]
    memory = measure_memory(parts, accelerator.device)

    lines = []
    for teacher in teachers:
        parameters = sum(p.numel() for p in teacher.encoder.parameters())
        lines.append(f"teacher  {teacher.name}, {parameters / 1e6:.1f} M parameters")
    for learner, flops in zip(learners, student_flops, strict=True):
        parameters = sum(p.numel() for p in learner.task.student.parameters())
        lines.append(f"student  {learner.name}, {parameters / 1e6:.1f} M parameters, {_flops(flops)} an image")
    total = teacher_flops + sum(student_flops)
    whole = total * plan.total_steps * sampler.images_per_step
    taught = f"of which {_flops(teacher_flops)} are the teacher's"
    lines.append(f"compute  {_flops(total)} an image, {taught}; {whole:.2g} FLOP in all")
    lines.append(
        f"memory   {_size(memory.total(sampler.batch_size))} a device with {sampler.batch_size} images: "
        f"teacher {_size(memory.teachers)}, student, optimiser and average {_size(memory.students)}, "
        f"step {_size(memory.step + sampler.batch_size * memory.image)}"
    )
    rate, waited = _measure(cfg, parts, accelerator)
    seconds = plan.total_steps * sampler.images_per_step / rate
    lines.append(
        f"speed    {rate:.4g} images/s on {accelerator.num_processes} x {accelerator.device.type}, "
        f"{total * rate / accelerator.num_processes / 1e12:.3g} TFLOP/s a device, waiting for data {waited:.0%} "
        f"({STEPS} steps of {sampler.images_per_step} images)"
    )
    lines.append(f"time     {_hours(seconds)} for {plan.total_steps:,} steps, probes and checkpoints not counted")
    return lines


def _measure(cfg: Config, parts: start.Parts, accelerator: Accelerator) -> tuple[float, float]:
    """Images a second over all processes, and the share of the time that was spent waiting for data."""
    sampler, plan, _, answering, learners, dataset = parts
    ready = math.ceil(PREFETCH * cfg.data.workers / cfg.run.accumulate)  # steps whose data the workers keep ready
    total = WARM_UP + ready + STEPS
    loading = accelerator.process_index, cfg.data.workers, cfg.data.timeout
    batches = training_batches(dataset, sampler, 0, total, *loading)
    for learner in learners:
        learner.model.train()
    waited = 0.0

    def take_step(step: int) -> None:
        nonlocal waited
        for micro in range(cfg.run.accumulate):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            batch = batch.to(accelerator.device)
            answers = [teacher.answer(batch) for teacher in answering]
            for learner in learners:
                learner.learn(batch, answers, step, micro)
        for learner in learners:
            learner.update(plan.rate(step, learner.base_rate))

    with contextlib.closing(batches):
        for step in range(1, WARM_UP + 1):
            take_step(step)
        for _ in range(ready * cfg.run.accumulate):  # else the clock would see what was loaded before it was started
            next(batches)
        _wait(accelerator.device)
        began, waited = time.perf_counter(), 0.0
        for step in range(WARM_UP + 1, WARM_UP + STEPS + 1):
            take_step(step)
        _wait(accelerator.device)
        elapsed = time.perf_counter() - began
    return STEPS * sampler.images_per_step / elapsed, waited / elapsed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _flops(flops: float) -> str:
    return f"{flops / 1e9:.3g} GFLOP"
