"""The run: everything is built, then the loop."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from proteus.config import Config
from proteus.data.dense import DenseSource
from proteus.data.loader import Batch, training_batches
from proteus.data.sampler import Sampler
from proteus.data.sources import Source
from proteus.engine.atomic import write_file
from proteus.engine.ema import build_ema
from proteus.engine.schedule import scaled_rate
from proteus.engine.update import build_optimizer, finite_step, set_rate
from proteus.errors import InputError, RunError, UnreadableError
from proteus.models.weights import save_encoder
from proteus.training import start
from proteus.training.board import Board
from proteus.training.flops import training_flops
from proteus.training.plan import Plan
from proteus.training.probe import Probe, split_source
from proteus.training.state import Checkpoints, Progress
from proteus.training.stop import Stop
from proteus.training.task import Distillation, build_task
from proteus.training.teacher import build_teachers
from proteus.training.tune import merged
from proteus.training.validation import Validation, keep_best, write_student


def train(
    cfg: Config,
    resume: str = "auto",
    *,
    source: Source | DenseSource | None = None,
    validation: Validation | None = None,
    measure_flops: bool = False,
) -> int:
    """Run a config to its end, from its newest checkpoint if there is one: the signal that stopped it, or 0.

    source:     the training set, instead of the one that the config's `data` names; there is no probe then.
    validation: chooses the weights that are kept; without it they are the last ones.
    measure_flops: count those of a step, for `Progress.flops_per_step`; it costs a step and a copy of what trains.
    """
    assert cfg.run.dir is not None
    directory = Path(cfg.run.dir)
    accelerator = start.build_accelerator(cfg, directory)
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    lock = start.take_lock(directory, accelerator)

    source, held_out = (source, None) if source is not None else split_source(cfg)
    start.check_labels(cfg, source)
    sampler = Sampler(
        size=len(source),
        batch_size=cfg.run.batch_size,
        processes=processes,
        accumulate=cfg.run.accumulate,
        repeats=cfg.data.repeats,
        mask_probability=cfg.data.mask.probability if "patch" in cfg.computed_losses else 0.0,
        seed=cfg.run.seed,
    )
    plan = Plan.of(cfg, sampler)

    torch.manual_seed(cfg.run.seed)
    teachers = build_teachers(cfg, accelerator)
    student, sizes = start.build_student(cfg, teachers, accelerator)
    patches = sizes.mask[0] * sizes.mask[1]
    start.check_masks(cfg, sampler, patches)
    classifier, classes = start.build_classifier(cfg, source, teachers, student)
    task = build_task(cfg, student, teachers, sizes, classifier, sampler.masked / processes).to(device)
    ema = build_ema(student, cfg.ema.decay, plan.total_steps)
    base_rate = scaled_rate(cfg.optimizer.lr, cfg.optimizer.lr_batch, sampler.images_per_step)
    model, optimizer = accelerator.prepare(task, build_optimizer(task, cfg.optimizer))
    if cfg.student.compile:
        start.compile_student(student)

    networks = start.describe_networks(cfg, teachers, sizes)
    checkpoints = Checkpoints(directory, cfg.run.keep, task, optimizer, ema, accelerator, networks)
    begin = Progress(images=len(source), images_per_step=sampler.images_per_step)
    progress, notes = start.resume_run(checkpoints, begin, resume, accelerator)
    notes += start.write_config(cfg, directory, accelerator, progress)
    dataset = start.build_dataset(cfg, source, sizes.crop, patches)
    batches = training_batches(dataset, sampler, progress.step, plan.total_steps, rank, cfg.data.workers)
    seen_bad = set(progress.bad_images)

    with (
        contextlib.closing(batches),
        Board(accelerator, directory, progress.step, plan.total_steps, sampler.images_per_step) as board,
        Stop(accelerator) as stop,
    ):
        summary = start.summarise(cfg, plan, student, teachers, sizes, source, sampler, base_rate, accelerator)
        for line in (*summary, *notes):
            board.say(line)
        probe = None
        if held_out is not None and accelerator.is_main_process:
            probe = Probe(cfg, source, held_out, task, teachers, device)  # type: ignore[arg-type]
            if progress.step == 0:
                _show_probe(probe, board, directory, 0)
        if validation is not None and progress.step == 0:
            _validate(validation, task, classes, progress, board, directory, accelerator)
        model.train()
        board.restart_clock()

        for step in range(progress.step + 1, plan.total_steps + 1):
            _seed_step(cfg.run.seed, step, rank)
            rate = plan.rate(step, base_rate)
            set_rate(optimizer, rate)
            losses = []
            for micro in range(cfg.run.accumulate):
                with board.waiting():
                    batch = _next(batches, progress, checkpoints, processes)
                seen_bad.update(batch.bad)
                batch = batch.to(device)
                if measure_flops and not progress.flops_per_step:
                    progress.flops_per_step = processes * cfg.run.accumulate * training_flops(task, teachers, batch)
                answers = [teacher.answer(batch.images) for teacher in teachers]
                reduces = micro == cfg.run.accumulate - 1
                with contextlib.nullcontext() if reduces else accelerator.no_sync(model):
                    parts = model(batch.images, batch.mask, answers, batch.labels)  # {"token": [], ...}, weighted
                    accelerator.backward(sum(parts.values()) / cfg.run.accumulate)
                losses.append(parts)
            norm, skipped = finite_step(accelerator, optimizer, cfg.optimizer.clip_grad)
            if ema is not None:
                ema.update(student)
            board.add(losses, norm, skipped)
            progress.step = step

            validates = validation is not None and validation.due(step, plan.total_steps)
            stopping = stop.agreed()
            if plan.logs(step) or validates or stopping:  # the only place that waits for the device
                _gather_bad(seen_bad, progress, source, directory, accelerator)
                progress.skipped_steps += board.show(step, rate, len(progress.bad_images))
                _check_health(cfg, progress, source)
            if validates:
                _validate(validation, task, classes, progress, board, directory, accelerator)
            if (plan.saves(step) or stopping) and accelerator.is_main_process:
                checkpoints.save(progress)
                board.restart_clock()
            if stopping:
                board.say(f"stopped by signal {stop.signum} after step {step}; the same command goes on from there")
                break
            if plan.probes(step):
                if probe is not None:
                    _show_probe(probe, board, directory, step)
                accelerator.wait_for_everyone()
                board.restart_clock()

        done = progress.step >= plan.total_steps
        if done and accelerator.is_main_process:
            if validation is None:
                write_student(task, classes, directory)
            if ema is not None:
                write_file(directory / "student_ema.safetensors", lambda path: save_encoder(merged(ema.module), path))
            board.say(f"done: {directory / 'student.safetensors'} after {progress.step} steps")
    if lock is not None:
        lock.release()
    return 0 if done else stop.signum


def _next(batches: Iterator[Batch], progress: Progress, checkpoints: Checkpoints, processes: int) -> Batch:
    try:
        return next(batches)
    except UnreadableError:
        if processes == 1 and progress.step:  # the storage is gone, what was learnt need not be
            checkpoints.save(progress)
        raise


def _seed_step(seed: int, step: int, rank: int) -> None:
    # What the network itself draws (drop path) is a function of the step too, so no random state has to be saved.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def _gather_bad(
    seen: set[int], progress: Progress, source: Source | DenseSource, directory: Path, accelerator: Accelerator
) -> None:
    """Bring together what all processes could not read, and name it in skipped_images.txt."""
    bad = sorted(set().union(*gather_object([sorted(seen)])))
    if bad != progress.bad_images:
        progress.bad_images = bad
        if accelerator.is_main_process:
            names = os.fsencode("".join(f"{source.name(index)}\n" for index in bad))  # not all names are UTF-8
            write_file(directory / "skipped_images.txt", lambda path: path.write_bytes(names))


def _check_health(cfg: Config, progress: Progress, source: Source | DenseSource) -> None:
    """Stop a run that cannot come to good. Its last checkpoint stands."""
    bad, limit = len(progress.bad_images), cfg.data.max_bad_share * len(source)
    if bad > limit and bad >= cfg.data.max_bad_files:
        raise InputError(
            f"{bad} of {len(source)} images cannot be read, more than max_bad_share={cfg.data.max_bad_share} allows; "
            f"they are named in {cfg.run.dir}/skipped_images.txt"
        )
    # Of late only: fp16 tries a larger loss scale every 2,000 steps, and skips a step to find it too large.
    progress.skipped_steps = [step for step in progress.skipped_steps if step > progress.step - 1000]
    if len(progress.skipped_steps) > cfg.run.max_nonfinite:
        steps = ", ".join(map(str, progress.skipped_steps[-10:]))
        raise RunError(
            f"{len(progress.skipped_steps)} steps of the last 1,000 had a gradient that was not finite, more than "
            f"run.max_nonfinite={cfg.run.max_nonfinite}; the last were steps {steps}; the last checkpoint stands. "
            "Lower optimizer.lr, set optimizer.clip_grad, or use run.precision=bf16"
        )


def _validate(
    validation: Validation | None,
    task: Distillation,
    classes: list[str],
    progress: Progress,
    board: Board,
    directory: Path,
    accelerator: Accelerator,
) -> None:
    """Score the task, and keep its weights if they are the best so far."""
    assert validation is not None
    score, best = keep_best(validation, task, progress)
    board.write({"step": progress.step, "score": score, "best": progress.best_score}, prefix="validation")
    board.say(f"validation at step {progress.step}: {score:.4f}" + (", the best so far" if best else ""))
    if best and accelerator.is_main_process:
        write_student(task, classes, directory)
    board.restart_clock()


def _show_probe(probe: Probe, board: Board, directory: Path, step: int) -> None:
    numbers = probe.measure()
    board.write({"step": step} | numbers, prefix="probe")
    if numbers:
        board.say(f"probe at step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    if probe.pictures:
        board.picture("components", probe.picture(directory / "pictures" / f"step_{step}.png"), step)
