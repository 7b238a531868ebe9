"""The run: everything is built, then the loop."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from proteus.config import Config, dump_config
from proteus.data.loader import Batch, TrainingSet, training_batches
from proteus.data.sampler import Sampler
from proteus.data.sources import Source
from proteus.data.transforms import TrainTransform
from proteus.engine.atomic import write_file
from proteus.engine.ema import build_ema
from proteus.engine.lock import RunLock
from proteus.engine.schedule import learning_rate, scaled_rate
from proteus.engine.update import build_optimizer, finite_step, set_rate
from proteus.errors import InputError, RunError
from proteus.losses import LOSSES, Target
from proteus.models import Encoder, create_model
from proteus.models.weights import save_encoder
from proteus.training.board import Board
from proteus.training.probe import Probe, split_source
from proteus.training.state import Checkpoints, Progress, list_checkpoints
from proteus.training.stop import Stop
from proteus.training.task import Distillation
from proteus.training.teacher import Teacher, build_teacher


@dataclass(frozen=True)
class Plan:
    """When what happens, in update steps counted from 1."""

    total_steps: int
    steps_per_epoch: int
    cfg: Config

    def logs(self, step: int) -> bool:
        """At the interval, and before a checkpoint: what a checkpoint counts must have been read."""
        return step % self.cfg.run.log_every == 0 or self.saves(step)

    def saves(self, step: int) -> bool:
        """At the interval and at the end."""
        return step % self.cfg.run.save_every == 0 or step == self.total_steps

    def probes(self, step: int) -> bool:
        """Every few epochs and at the end."""
        every = self.cfg.probe.every_epochs * self.steps_per_epoch
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def rate(self, step: int, base: float) -> float:
        """Learning rate of the update after `step` updates."""
        return learning_rate(step, self.total_steps, self.steps_per_epoch, base, self.cfg.schedule)


def train(cfg: Config, resume: str = "auto") -> int:
    """Run a config to its end, from its newest checkpoint if there is one: the signal that stopped it, or 0."""
    assert cfg.run.dir is not None
    directory = Path(cfg.run.dir)
    accelerator = _accelerator(cfg, directory)
    device = accelerator.device
    lock = _lock(directory) if accelerator.is_main_process else None

    source, held_out = split_source(cfg)
    _check_labels(cfg, source)
    sampler = Sampler(
        len(source),
        cfg.run.batch_size,
        accelerator.num_processes,
        cfg.run.accumulate,
        cfg.data.repeats,
        cfg.data.mask.probability if "patch" in cfg.active_losses else 0.0,
        cfg.run.seed,
    )
    total = cfg.schedule.steps or round(cfg.schedule.epochs * sampler.steps_per_epoch)  # type: ignore[operator]
    plan = Plan(total, sampler.steps_per_epoch, cfg)

    torch.manual_seed(cfg.run.seed)
    teacher = build_teacher(cfg.teacher, cfg.data.image_size, accelerator) if cfg.teacher else None
    student = create_model(
        cfg.student.name, checkpoint=cfg.student.checkpoint, image_size=cfg.data.image_size, **cfg.student.arch
    )
    grid = _check_grids(cfg, student, teacher)
    task = Distillation(
        student,
        cfg.active_losses,
        teacher.encoder.embed_dim if teacher else None,
        _num_classes(source, teacher),
        sampler.masked / sampler.processes,
    ).to(device)
    ema = build_ema(student, cfg.ema.decay, total)
    optimizer = build_optimizer(task, cfg.optimizer)
    model, optimizer = accelerator.prepare(task, optimizer)
    if cfg.student.compile:
        for block in student.vit.blocks:
            block.compile()

    checkpoints = Checkpoints(directory, cfg.run.keep, task, optimizer, ema, accelerator)
    progress, notes = _resume(checkpoints, directory, resume, accelerator)
    images_per_step = sampler.global_batch * cfg.run.accumulate
    board = Board(accelerator, directory, total, images_per_step)
    base_rate = scaled_rate(cfg.optimizer.lr, cfg.optimizer.lr_batch, images_per_step)
    board.say(_summary(cfg, plan, student, teacher, source, images_per_step, base_rate, accelerator))
    for note in [*notes, *_changes(cfg, directory, accelerator, progress)]:
        board.say(note)
    accelerator.init_trackers("tensorboard")
    probe = None
    if held_out is not None and accelerator.is_main_process:
        probe = Probe(cfg, source, held_out, task, teacher, device)
        if progress.step == 0:
            _show_probe(probe, board, directory, 0)

    transform = TrainTransform(cfg.data.image_size, cfg.data.augment)
    dataset = TrainingSet(source, transform, cfg.run.seed, grid[0] * grid[1], cfg.data.mask.ratio)
    batches = training_batches(dataset, sampler, progress.step, total, accelerator.process_index, cfg.data.workers)
    stop = Stop(accelerator)
    seen_bad = set(progress.bad_images)
    model.train()
    board.restart_clock()

    for step in range(progress.step + 1, total + 1):
        _seed_step(cfg.run.seed, step, accelerator.process_index)
        rate = plan.rate(step - 1, base_rate)
        set_rate(optimizer, rate)
        losses = []
        for a in range(cfg.run.accumulate):
            with board.waiting():
                batch = next(batches)
            seen_bad.update(batch.bad)
            batch = batch.to(device)
            target = _target(batch, teacher, cfg.temperature)
            last = a == cfg.run.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                parts = model(batch.images, target)
                accelerator.backward(sum(parts.values()) / cfg.run.accumulate)
            losses.append(parts)
        norm, skipped = finite_step(accelerator, optimizer, cfg.optimizer.clip_grad)
        if ema is not None:
            ema.update(student)
        board.add(losses, norm, skipped)
        progress.step = step

        stopping = stop.agreed(plan.logs(step))
        if plan.logs(step) or stopping:
            _gather_bad(seen_bad, progress, source, directory, accelerator)
            progress.nonfinite += board.show(step, rate, len(progress.bad_images))
            _check_health(cfg, progress, source)
        if (plan.saves(step) or stopping) and accelerator.is_main_process:
            checkpoints.save(progress)
        if stopping and step < total:
            board.say(f"stopped by signal {stop.signum} after step {step}; the same command goes on from there")
            break
        if plan.probes(step):
            if probe is not None:
                _show_probe(probe, board, directory, step)
            accelerator.wait_for_everyone()
            board.restart_clock()
    else:
        stop.signum = 0
        if accelerator.is_main_process:
            write_file(directory / "student.safetensors", lambda path: save_encoder(student, path))
            if ema is not None:
                write_file(directory / "student_ema.safetensors", lambda path: save_encoder(ema.module, path))
            board.say(f"done: {directory / 'student.safetensors'} after {total} steps")
    board.close()
    stop.restore()
    if lock is not None:
        lock.release()
    return stop.signum


def _accelerator(cfg: Config, directory: Path) -> Accelerator:
    # DDP orders its buckets anew after the first step it makes. With three processes and more the order of a sum
    # changes its last bits, so a resumed run would differ; searching for unused parameters keeps the first order.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=int(os.environ.get("WORLD_SIZE", 1)) > 2)
    return Accelerator(
        mixed_precision=cfg.run.precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(directory), logging_dir=str(directory)),
        kwargs_handlers=[ddp],
    )


def _lock(directory: Path) -> RunLock:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir={directory} cannot be made: {error}") from None
    return RunLock(directory)


def _target(batch: Batch, teacher: Teacher | None, temperature: float) -> Target:
    features = teacher(batch.images) if teacher else None
    logits = teacher.logits(features) if teacher and features else None
    return Target(features, batch.mask, logits, batch.labels, temperature)  # type: ignore[arg-type]


def _seed_step(seed: int, step: int, rank: int) -> None:
    # What the network itself draws (drop path) is a function of the step too, so no random state has to be saved.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def _num_classes(source: Source, teacher: Teacher | None) -> int | None:
    if teacher is not None and teacher.head is not None:
        return teacher.head.num_classes
    return None if source.labels is None else int(source.labels.max()) + 1


def _check_labels(cfg: Config, source: Source) -> None:
    for name in cfg.active_losses:
        if LOSSES[name].needs_labels and source.labels is None:
            raise InputError(
                f"losses.{name} needs labels, and data.root={cfg.data.root} has none (root/<class>/<image> would)"
            )


def _check_grids(cfg: Config, student: Encoder, teacher: Teacher | None) -> tuple[int, int]:
    """The student's patch grid; InputError where a patch does not divide the image or the teacher's grid differs."""
    size = cfg.data.image_size
    try:
        grid = student.grid_of(size, size)
        teacher_grid = teacher.encoder.grid_of(size, size) if teacher else grid
    except ValueError as error:
        raise InputError(f"data.image_size={size}: {error}") from None
    if teacher_grid != grid and {"feature", "patch"} & set(cfg.active_losses):
        raise InputError(
            f"the losses on patches compare patch by patch: at data.image_size={size} the student's grid is "
            f"{grid[0]} x {grid[1]}, the teacher's {teacher_grid[0]} x {teacher_grid[1]}; give them the same patch size"
        )
    return grid


def _resume(
    checkpoints: Checkpoints, directory: Path, resume: str, accelerator: Accelerator
) -> tuple[Progress, list[str]]:
    """Where the run starts, and what is worth telling about it."""
    notes = []
    found = list_checkpoints(checkpoints.folder)
    if accelerator.is_main_process:
        half = checkpoints.clean()
        notes += [f"warning: {name} in {checkpoints.folder} was half-written and is left out" for name in half]
    if resume == "never" and found:
        raise InputError(
            f"{directory} holds a run at {found[-1].name}: give another run.dir, or leave --resume at auto to go on"
        )
    if resume not in ("auto", "never"):
        found = [Path(resume)]
    if not found:
        return Progress(), notes
    progress, changed = checkpoints.load(found[-1])
    notes.append(f"resumed from {found[-1]}")
    notes += [f"warning: {change} since the checkpoint; results may differ in the last bits" for change in changed]
    return progress, notes


def _changes(cfg: Config, directory: Path, accelerator: Accelerator, progress: Progress) -> list[str]:
    """Write config.yaml; a warning where a run goes on under another config than it began with."""
    if not accelerator.is_main_process:
        return []
    path, text = directory / "config.yaml", dump_config(cfg)
    before = yaml.safe_load(path.read_text()) if path.is_file() and progress.step else None
    write_file(path, lambda pending: pending.write_text(text))
    if before is None:
        return []
    then, now = _flat(before), _flat(yaml.safe_load(text))
    changed = [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | then.keys())
        if then.get(key) != now.get(key)
    ]
    return [f"warning: the config has changed since the run began ({'; '.join(changed)})"] if changed else []


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _gather_bad(seen: set[int], progress: Progress, source: Source, directory: Path, accelerator: Accelerator) -> None:
    """Bring together what all processes could not read, and name it in skipped_images.txt."""
    everywhere = [sorted(seen)]
    if accelerator.num_processes > 1:
        everywhere = [[]] * accelerator.num_processes
        torch.distributed.all_gather_object(everywhere, sorted(seen))
    bad = sorted(set().union(*everywhere))
    if bad != progress.bad_images:
        progress.bad_images = bad
        if accelerator.is_main_process:
            names = "".join(f"{source.name(index)}\n" for index in bad)
            write_file(directory / "skipped_images.txt", lambda path: path.write_text(names))


def _check_health(cfg: Config, progress: Progress, source: Source) -> None:
    """Stop a run that cannot come to good. Its last checkpoint stands."""
    bad, limit = len(progress.bad_images), cfg.data.max_bad_share * len(source)
    if bad > limit and bad >= cfg.data.max_bad_files:
        raise InputError(
            f"{bad} of {len(source)} images cannot be read, more than data.max_bad_share={cfg.data.max_bad_share}; "
            f"they are named in {cfg.run.dir}/skipped_images.txt"
        )
    if len(progress.nonfinite) > cfg.run.max_nonfinite:
        steps = ", ".join(map(str, progress.nonfinite[-10:]))
        raise RunError(
            f"{len(progress.nonfinite)} steps had a loss or gradient that was not finite, more than run.max_nonfinite="
            f"{cfg.run.max_nonfinite}; the last were steps {steps}; the last checkpoint stands. "
            "Lower optimizer.lr, set optimizer.clip_grad, or use run.precision=bf16"
        )


def _show_probe(probe: Probe, board: Board, directory: Path, step: int) -> None:
    numbers = probe.measure()
    board.write({"step": step} | numbers, prefix="probe")
    if numbers:
        board.say(f"probe at step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    if probe.pictures:
        board.picture("components", probe.picture(directory / "pictures" / f"step_{step}.png"), step)


def _summary(
    cfg: Config,
    plan: Plan,
    student: Encoder,
    teacher: Teacher | None,
    source: Source,
    batch: int,
    rate: float,
    accelerator: Accelerator,
) -> str:
    def size(encoder: Encoder) -> str:
        return f"{encoder.name} ({sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M)"

    losses = " + ".join(f"{weight:g} {name}" for name, weight in cfg.active_losses.items())
    return "\n".join(
        [
            f"teacher  {size(teacher.encoder) if teacher else 'none'}",
            f"student  {size(student)}, {losses}",
            f"data     {len(source):,} images at {cfg.data.image_size} px, batch {batch} "
            f"({accelerator.num_processes} x {cfg.run.batch_size} x {cfg.run.accumulate}), lr {rate:.2e}",
            f"run      {plan.total_steps:,} steps of {plan.steps_per_epoch:,} an epoch, {accelerator.device.type}, "
            f"{cfg.run.precision if cfg.run.precision != 'no' else 'float32'}, in {cfg.run.dir}",
        ]
    )
