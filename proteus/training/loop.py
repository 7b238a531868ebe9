"""The run: everything is built, then the loop."""

import contextlib
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from proteus.config import Config
from proteus.data.dense import DenseSource
from proteus.data.loader import training_batches
from proteus.data.sources import Source, one_line
from proteus.engine.atomic import write_file
from proteus.engine.shard import shards
from proteus.errors import InputError, UnreadableError, WorkerError
from proteus.training import start
from proteus.training.board import Board
from proteus.training.cache import hash_of_names
from proteus.training.flops import training_flops
from proteus.training.learner import Learner
from proteus.training.memory import settle_batch_size
from proteus.training.nonfinite import Skipped, check_learnt, diverged, too_many
from proteus.training.probe import Probe, split_source
from proteus.training.state import Checkpoints, Progress
from proteus.training.stop import Stop
from proteus.training.validation import Validation, keep_best


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
    notes = start.check_checkpoints(directory, resume, accelerator)

    source, held_out = (source, None) if source is not None else split_source(cfg)
    cfg = settle_batch_size(cfg, source, accelerator, directory)
    parts = start.build_parts(cfg, source, accelerator, directory)
    sampler, plan, teachers, answering, learners, dataset = parts
    assert validation is None or len(learners) == 1, "a validation chooses one student's weights"

    networks = start.describe_networks(cfg, teachers, learners)
    checkpoints = Checkpoints(directory, cfg, learners, accelerator, networks)
    begin = Progress(len(source), sampler.images_per_step, hash_of_names(source, count=1000))
    progress, said = start.resume_run(checkpoints, begin, plan.total_steps, resume, accelerator)
    notes += said
    start.write_config(cfg, directory, accelerator)
    loading = rank, cfg.data.workers, cfg.data.timeout
    batches = training_batches(dataset, sampler, progress.step, plan.total_steps, *loading)
    seen_bad = set(progress.bad_images)
    names = [learner.name for learner in learners]

    with (
        contextlib.closing(batches),
        Board(accelerator, directory, progress.step, plan.total_steps, sampler.images_per_step, names) as board,
        Stop(accelerator, start.patience(cfg)) as stop,
    ):
        for line in (*start.summarise(cfg, parts, source, accelerator), *notes):
            board.say(line)
        probe = None
        # A run may have ended between a checkpoint and the probe of its step.
        unprobed = plan.probes(progress.step) and not start.on_main(accelerator, lambda: board.has_probe(progress.step))
        together = shards(accelerator) or any(teacher.sharded for teacher in teachers)  # a forward takes all processes
        if held_out is not None and (accelerator.is_main_process or together):
            main, crop = accelerator.is_main_process, learners[0].sizes.crop
            probe = Probe(cfg, source, held_out, crop, teachers, device, writes=main)  # type: ignore[arg-type]
            if unprobed:
                _show_probe(probe, learners, board, directory, progress.step)
        if validation is not None and progress.step == 0:
            _validate(validation, learners[0], progress, board, accelerator)
        for learner in learners:
            learner.model.train()
        if progress.bad_images:  # of a run that this one branches off from, perhaps
            _name_bad(progress, source, directory, accelerator)
        board.restart_clock()

        def end_interval() -> list[Skipped]:
            """Show it and count what was met in it; the only place that waits for the device."""
            _gather_bad(seen_bad, progress, source, directory, accelerator)
            step = progress.step
            skipped = board.show(step, plan.rate(step, learners[0].base_rate), len(progress.bad_images))
            progress.skipped_steps += [one.step for one in skipped]
            return skipped

        for step in range(progress.step + 1, plan.total_steps + 1):
            rate = plan.rate(step, learners[0].base_rate)
            for micro in range(cfg.run.accumulate):
                try:
                    with board.waiting():
                        batch = next(batches)
                except (UnreadableError, WorkerError):
                    if processes == 1 and progress.step:  # the storage is gone, what was learnt need not be
                        for learner in learners:
                            learner.leave_step()
                        end_interval()
                        checkpoints.save(progress)
                    raise
                seen_bad.update(batch.bad)
                batch = batch.to(device)
                if measure_flops and not progress.flops_per_step:
                    flops = training_flops([learner.task for learner in learners], answering, batch)
                    progress.flops_per_step = processes * cfg.run.accumulate * sum(flops)
                answers = [teacher.answer(batch) for teacher in answering]
                for learner in learners:
                    learner.learn(batch, answers, step, micro)
            board.add([learner.update(rate) for learner in learners])
            progress.step = step

            validates = validation is not None and validation.due(step, plan.total_steps)
            stopping = stop.agreed() and step < plan.total_steps  # a run that is done has nothing to stop
            if plan.logs(step) or validates or stopping:
                skipped = end_interval()
                _check_health(cfg, progress, source)
                if too_many(progress, cfg.run.max_nonfinite) and skipped:
                    raise diverged(cfg, progress, skipped[-1], dataset, sampler, source, accelerator)
            if validates:
                _validate(validation, learners[0], progress, board, accelerator)
            if plan.saves(step) or stopping:
                checkpoints.save(progress)
                board.restart_clock()
            if stopping:
                accelerator.wait_for_everyone()  # a launcher ends those that are left: the main one is still writing
                board.say(f"stopped by signal {stop.signum} after step {step}; the same command goes on from there")
                break
            if plan.probes(step):
                if probe is not None:
                    _show_probe(probe, learners, board, directory, step)
                accelerator.wait_for_everyone()
                board.restart_clock()

        done = progress.step >= plan.total_steps
        if done:
            check_learnt(progress, directory)
            for learner in learners:
                written = learner.write_student() if validation is None else directory / "student.safetensors"
                learner.write_average()
                board.say(f"done: {written} after {progress.step} steps")
    if lock is not None:
        lock.release()
    return 0 if done else stop.signum


def _gather_bad(
    seen: set[int], progress: Progress, source: Source | DenseSource, directory: Path, accelerator: Accelerator
) -> None:
    """Bring together what all processes could not read, and name it in skipped_images.txt."""
    bad = sorted(set().union(*gather_object([sorted(seen)])))
    if bad != progress.bad_images:
        progress.bad_images = bad
        _name_bad(progress, source, directory, accelerator)


def _name_bad(progress: Progress, source: Source | DenseSource, directory: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        names = "".join(f"{one_line(source.name(index))}\n" for index in progress.bad_images)
        write_file(directory / "skipped_images.txt", lambda path: path.write_bytes(os.fsencode(names)))


def _check_health(cfg: Config, progress: Progress, source: Source | DenseSource) -> None:
    """Stop a run of which too much cannot be read. Its last checkpoint stands."""
    bad, limit = len(progress.bad_images), cfg.data.max_bad_share * len(source)
    if bad > limit and bad >= cfg.data.max_bad_files:
        raise InputError(
            f"{bad} of {len(source)} images cannot be read, more than max_bad_share={cfg.data.max_bad_share} allows; "
            f"they are named in {cfg.run.dir}/skipped_images.txt"
        )


def _validate(
    validation: Validation | None, learner: Learner, progress: Progress, board: Board, accelerator: Accelerator
) -> None:
    """Score the task, and keep its weights if they are the best so far."""
    assert validation is not None
    score, best = keep_best(validation, learner.task, progress)
    board.write({"step": progress.step, "score": score, "best": progress.best_score}, prefix="validation")
    board.say(f"validation at step {progress.step}: {score:.4f}" + (", the best so far" if best else ""))
    if best:
        learner.write_student()
    board.restart_clock()


def _show_probe(probe: Probe, learners: list[Learner], board: Board, directory: Path, step: int) -> None:
    row: dict[str, float] = {"step": step}
    for learner in learners:
        numbers = probe.measure(learner.task)
        of, below = (f" of {learner.name}", learner.name + "/") if len(learners) > 1 else ("", "")
        row |= {below + name: value for name, value in numbers.items()}
        if numbers:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            board.say(f"probe at step {step}{of}: {shown}")
        if probe.pictures:
            path = learner.directory / "pictures" / f"step_{step}.png"
            board.picture(below + "components", probe.picture(learner.task, path), step)
    board.write(row, prefix="probe")
