"""How a run starts: devices, the lock, what must fit together, where it goes on from, what it says of itself."""

import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import nn

from proteus import config
from proteus.config import LABEL_CE, Config
from proteus.config_files import dump_config
from proteus.data.dense import DenseSource, is_dense
from proteus.data.loader import TrainingSet, count_masked
from proteus.data.sampler import Sampler
from proteus.data.sources import Source
from proteus.data.transforms import TrainTransform
from proteus.data.view_cache import ViewCache
from proteus.engine.atomic import write_file
from proteus.engine.checksums import damage
from proteus.engine.heap import keep_freed_memory
from proteus.engine.lock import RunLock
from proteus.engine.schedule import warmup_steps
from proteus.engine.shard import shards
from proteus.errors import InputError
from proteus.losses import LOSSES
from proteus.models import Encoder
from proteus.training.cache import CachedTeacher, open_cache
from proteus.training.changes import CONFIG
from proteus.training.dense import DenseTrainingSet
from proteus.training.learner import Learner, build_learners
from proteus.training.plan import Plan
from proteus.training.sizes import describe_sizes
from proteus.training.state import Checkpoints, Progress, list_checkpoints, set_damaged_aside, sweep
from proteus.training.teacher import Teacher, build_teachers

T = TypeVar("T")


def patience(cfg: Config) -> timedelta:
    """How long a process waits for another: for what only the main one does, and for workers that hang."""
    return timedelta(seconds=3600 + cfg.data.timeout)


def build_accelerator(cfg: Config, directory: Path) -> Accelerator:
    """Devices, processes, precision and the TensorBoard tracker of a run."""
    # DDP orders its buckets anew after the first step it makes. With three processes and more the order of a sum
    # changes its last bits, so a resumed run would differ; searching for unused parameters keeps the first order.
    fixed_buckets = int(os.environ.get("WORLD_SIZE", 1)) > 2
    # A head may leave a part of a network out: the pooling, the norm of the class token alone, of its last block.
    with_head = bool({LABEL_CE, "logits_kl"} & cfg.computed_losses)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=fixed_buckets or with_head, broadcast_buffers=False)
    # Its successor is torch 2.15's, and we run on older ones.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    if cfg.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "accelerate is set to FSDP1: give fsdp_version: 2 in its config, as configs/accelerate/fsdp.yaml does"
        )
    accelerator = Accelerator(
        mixed_precision=cfg.run.precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(directory), logging_dir=str(directory)),
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=patience(cfg))],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    plain_or_ddp = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in plain_or_ddp and not shards(accelerator):
        raise InputError(
            f"accelerate is set to {accelerator.distributed_type.value}; a run is plain, data-parallel (DDP) or FSDP2"
        )
    return accelerator


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, to all of them; so with the InputError that it raises."""
    result, complaint = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except InputError as error:
            complaint = str(error)
    result, complaint = broadcast_object_list([result, complaint])
    if complaint is not None:
        raise InputError(complaint)
    return result


def take_lock(directory: Path, accelerator: Accelerator) -> RunLock | None:
    """Make the run directory and lock it, by the main process, which holds the lock."""
    locks: list[RunLock] = []

    def take() -> None:
        try:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            locks.append(RunLock(directory))
        except OSError as error:
            raise InputError(f"run.dir={directory} cannot be used: {error}") from None

    on_main(accelerator, take)
    return locks[0] if locks else None


def check_checkpoints(directory: Path, resume: str, accelerator: Accelerator) -> list[str]:
    """See that the checkpoint to go on from is as it was written; what is worth telling about the others."""

    def check() -> list[str]:
        try:
            if resume not in ("auto", "never") and (wrong := damage(Path(resume))):
                raise InputError(f"--resume {resume} is damaged: {wrong}")
            return sweep(directory / "checkpoints") + set_damaged_aside(directory / "checkpoints")
        except OSError as error:  # of the storage, perhaps for a while: no verdict on a checkpoint
            raise InputError(f"{error.filename or directory} cannot be read or moved: {error.strerror}") from None

    return on_main(accelerator, check)


class Parts(NamedTuple):
    """Everything that a step needs. Which images it sees is the sampler's to say, what happens when the plan's.

    answering: who answers a batch: the teachers, or what a cache holds of them.
    """

    sampler: Sampler
    plan: Plan
    teachers: list[Teacher]
    answering: Sequence[Teacher | CachedTeacher]
    learners: list[Learner]
    dataset: TrainingSet | DenseTrainingSet


def build_parts(cfg: Config, source: Source | DenseSource, accelerator: Accelerator, directory: Path) -> Parts:
    """Build what a config names, on its device, from random numbers of its seed."""
    check_labels(cfg, source)
    assert isinstance(cfg.run.batch_size, int), "auto has been settled before"
    sampler = Sampler(
        size=len(source),
        batch_size=cfg.run.batch_size,
        processes=accelerator.num_processes,
        accumulate=cfg.run.accumulate,
        repeats=cfg.data.repeats,
        mask_probability=cfg.data.mask.probability if "patch" in cfg.computed_losses else 0.0,
        seed=cfg.run.seed,
    )
    plan = Plan.of(cfg, sampler)
    torch.manual_seed(cfg.run.seed)
    teachers = build_teachers(cfg, accelerator)
    learners = build_learners(cfg, source, teachers, sampler, plan.total_steps, accelerator, directory)
    check_masks(cfg, sampler, learners[0].patches)
    answering: Sequence[Teacher | CachedTeacher] = teachers
    views = None
    if cfg.teacher_cache:
        views, answering = open_cache(cfg, teachers, source, learners[0].sizes)
        if not cfg.probe.every_epochs:  # nobody will ask the networks themselves
            for teacher in teachers:
                if not teacher.sharded:
                    teacher.encoder.to("cpu")
    dataset = build_dataset(cfg, source, learners[0].sizes.crop, learners[0].patches, views)
    return Parts(sampler, plan, teachers, answering, learners, dataset)


def describe_networks(cfg: Config, teachers: list[Teacher], learners: list[Learner]) -> dict[str, str]:
    """What the weights of a checkpoint belong to, by the config's keys: heads of one teacher would fit another."""

    def shown(section: config.Student | config.Teacher, size: int) -> str:
        arch = {key: value for key, value in section.arch.items() if not key.startswith("drop")}
        return f"{section.name} {arch} at {size} px" if arch else f"{section.name} at {size} px"

    networks = {}
    for learner, student in zip(learners, cfg.all_students.values(), strict=True):
        key = "student" if cfg.student else f"students/{learner.name}"
        networks[key] = shown(student, learner.sizes.student)
    for (key, section), teacher in zip(cfg.all_teachers.items(), teachers, strict=True):
        losses = " + ".join(sorted(cfg.losses_of(section)))
        standardized = " standardized" if section.standardize else ""
        networks[key] = f"{shown(section, teacher.image_size)} for {losses}{standardized}"
    return networks


def build_dataset(
    cfg: Config, source: Source | DenseSource, crop: int, patches: int, views: ViewCache | None = None
) -> TrainingSet | DenseTrainingSet:
    """The training set's views: of images, or of images and targets where labels are learnt pixel by pixel."""
    if is_dense(source) and LABEL_CE in cfg.computed_losses:
        return DenseTrainingSet(source, crop, cfg.run.seed, patches)
    transform = TrainTransform(crop, cfg.data.augment)
    return TrainingSet(source, transform, cfg.run.seed, patches, cfg.data.mask.ratio, views)  # type: ignore[arg-type]


def check_labels(cfg: Config, source: Source | DenseSource) -> None:
    """InputError where a loss needs labels and the data has none."""
    for name in cfg.computed_losses:
        if LOSSES[name].needs_labels and not is_dense(source) and getattr(source, "labels", None) is None:
            raise InputError(
                f"losses.{name} needs labels, and data.root={cfg.data.root} has none (root/<class>/<image> would)"
            )


def check_masks(cfg: Config, sampler: Sampler, patches: int) -> None:
    """InputError where the patch loss would never see a masked patch."""
    mask = cfg.data.mask
    if "patch" in cfg.computed_losses and not (sampler.masked and count_masked(patches, mask.ratio)):
        raise InputError(
            f"losses.patch: data.mask.probability={mask.probability} and ratio={mask.ratio} mask {sampler.masked} of "
            f"{sampler.global_batch} images and {count_masked(patches, mask.ratio)} of {patches} patches; raise them"
        )


def resume_run(
    checkpoints: Checkpoints, begin: Progress, total_steps: int, resume: str, accelerator: Accelerator
) -> tuple[Progress, list[str]]:
    """Where the run starts, and what is worth telling about it. The main process decides which checkpoint it is."""
    found = on_main(accelerator, lambda: list_checkpoints(checkpoints.folder))
    folder = (found[-1] if found else None) if resume in ("auto", "never") else Path(resume)
    if folder is None:
        return begin, []
    if resume == "never":
        raise InputError(f"{folder} is of an earlier run: give another run.dir, or leave --resume at auto to go on")
    complaint, progress, notes = None, begin, []
    try:
        progress, told = checkpoints.load(folder)
        _check_same_data(begin, progress, folder, accelerator.num_processes)
        newest = int(found[-1].name.removeprefix("step_")) if found else 0
        if newest > progress.step:
            raise InputError(
                f"{checkpoints.folder} goes on to step {newest}: to branch off at {folder}, give another run.dir"
            )
        notes = [f"resumed from {folder}", *told]
        if progress.step > total_steps:
            notes.append(f"warning: {progress.step} steps are done already, and the schedule has {total_steps}")
        if progress.image_names != begin.image_names:
            notes.append(
                "warning: the images have other names than at the checkpoint; if they are others, so is the run"
            )
            progress.image_names = begin.image_names
    except InputError as error:
        complaint = str(error)
    for said in gather_object([complaint]):  # a machine that does not see the folder, say
        if said is not None:
            raise InputError(said)
    return progress, notes


def _check_same_data(begin: Progress, progress: Progress, folder: Path, processes: int) -> None:
    """A step number means a place in the data: it must still mean the same."""
    if progress.images_per_step != begin.images_per_step:
        each, rest = divmod(progress.images_per_step, processes)
        fitting = "take a number of processes that divides them, " if rest else f"make the last two {each}, "
        raise InputError(
            f"{folder} counts steps of {progress.images_per_step} images, this run of {begin.images_per_step} "
            f"({processes} processes x run.batch_size x run.accumulate): {fitting}or start another run.dir"
        )
    if progress.images != begin.images:
        raise InputError(
            f"{folder} is of a set of {progress.images} images, and there are {begin.images} now (without those that a "
            "probe holds out): "
            "start another run.dir; student.checkpoint takes the weights along"
        )


def write_config(cfg: Config, directory: Path, accelerator: Accelerator) -> None:
    """Write config.yaml into the run directory."""
    if accelerator.is_main_process:
        write_file(directory / CONFIG, lambda pending: pending.write_text(dump_config(cfg)))


def summarise(cfg: Config, parts: Parts, source: Source | DenseSource, accelerator: Accelerator) -> list[str]:
    """What the run is, in a few lines."""
    sampler, plan, teachers, learners = parts.sampler, parts.plan, parts.teachers, parts.learners

    def size(encoder: Encoder) -> str:
        return f"{encoder.name} ({sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M)"

    def weighted(losses: dict[str, float]) -> list[str]:
        return [" + ".join(f"{weight:g} {name}" for name, weight in losses.items())] if losses else []

    learnt = {name: weight for name, weight in cfg.active_losses.items() if name == LABEL_CE}
    lines = [] if teachers else ["teacher  none"]
    for teacher, section in zip(teachers, cfg.all_teachers.values(), strict=True):
        losses = cfg.losses_of(section)
        if len(teachers) == 1:
            learnt, losses = losses | learnt, {}
        facts = [size(teacher.encoder), *weighted(losses), *(["standardised"] if section.standardize else [])]
        lines.append(f"teacher  {', '.join(facts)}")
    for learner in learners:
        lines.append(f"student  {', '.join([size(learner.task.student), *weighted(learnt)])}")
    warmup = warmup_steps(cfg.schedule, plan.steps_per_epoch)
    warning = [f"warning: the warm-up of {warmup} steps takes the whole run"] if warmup >= plan.total_steps else []
    batch = f"{sampler.processes} x {sampler.batch_size} x {sampler.accumulate}"
    rate, crop = learners[0].base_rate, learners[0].sizes.crop
    precision = "float32" if cfg.run.precision == "no" else cfg.run.precision
    sizes = [line for learner in learners for line in describe_sizes(learner.cfg, learner.sizes, teachers)]
    norms = [line for learner in learners for line in describe_norms(learner.task.student, accelerator)]
    cached = (
        f"targets  of {cfg.teacher_cache.views} views an image, from {cfg.teacher_cache.dir}"
        if cfg.teacher_cache
        else ""
    )
    return [
        *lines,
        *([cached] if cached else []),
        *dict.fromkeys(sizes + norms),
        f"data     {len(source):,} images at {crop} px, batch {sampler.images_per_step} ({batch}), lr {rate:.2e}",
        f"run      {plan.total_steps:,} steps of {plan.steps_per_epoch:,} an epoch, {accelerator.device.type}, "
        f"{precision}, in {cfg.run.dir}",
        *warning,
    ]


def describe_norms(student: Encoder, accelerator: Accelerator) -> list[str]:
    """A line where the student has batch statistics: of which batch."""
    modules = list(student.modules())
    if any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        return [f"norm     SyncBatchNorm over {accelerator.num_processes} processes"]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        return ["norm     BatchNorm per process"]
    return []
