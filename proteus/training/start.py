"""How a run starts: devices, the lock, what must fit together, where it goes on from, what it says of itself."""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from timm.layers import convert_sync_batchnorm
from torch import nn

from proteus import config
from proteus.config import LABEL_CE, Config
from proteus.config_files import dump_config, flat_keys
from proteus.data.dense import DenseSource, is_dense
from proteus.data.loader import TrainingSet, count_masked
from proteus.data.sampler import Sampler
from proteus.data.sources import Source
from proteus.data.transforms import TrainTransform
from proteus.engine.atomic import write_file
from proteus.engine.lock import RunLock
from proteus.engine.schedule import warmup_steps
from proteus.errors import InputError
from proteus.losses import LOSSES
from proteus.models import Encoder, create_model
from proteus.models.attention import use_attention
from proteus.models.heads import PixelClassifier, build_head, read_head
from proteus.training.dense import DenseTrainingSet
from proteus.training.plan import Plan
from proteus.training.sizes import Sizes, describe_sizes, match_sizes, student_size
from proteus.training.state import Checkpoints, Progress, list_checkpoints
from proteus.training.teacher import Teacher
from proteus.training.tune import tune


def build_accelerator(cfg: Config, directory: Path) -> Accelerator:
    """Devices, processes, precision and the TensorBoard tracker of a run."""
    # DDP orders its buckets anew after the first step it makes. With three processes and more the order of a sum
    # changes its last bits, so a resumed run would differ; searching for unused parameters keeps the first order.
    fixed_buckets = int(os.environ.get("WORLD_SIZE", 1)) > 2
    # A head may leave a part of a network out: the pooling, the norm of the class token alone, of its last block.
    with_head = bool({LABEL_CE, "logits_kl"} & cfg.computed_losses)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=fixed_buckets or with_head, broadcast_buffers=False)
    if cfg.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        mixed_precision=cfg.run.precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(directory), logging_dir=str(directory)),
        kwargs_handlers=[ddp],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError(
            f"accelerate is set to {accelerator.distributed_type.value}; a run is plain or data-parallel (DDP)"
        )
    return accelerator


def take_lock(directory: Path, accelerator: Accelerator) -> RunLock | None:
    """Make the run directory and lock it, by the main process; what that meets, all processes raise."""
    lock, complaint = None, None
    if accelerator.is_main_process:
        try:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = RunLock(directory)
        except OSError as error:
            complaint = f"run.dir={directory} cannot be used: {error}"
        except InputError as error:
            complaint = str(error)
    (complaint,) = broadcast_object_list([complaint])
    if complaint is not None:
        raise InputError(complaint)
    return lock


def build_student(cfg: Config, teachers: list[Teacher], accelerator: Accelerator) -> tuple[Encoder, Sizes]:
    """The student, its grid fixed by the image size that its teachers lead to, and all sizes."""

    def create(image_size: int) -> Encoder:
        section = cfg.student
        return create_model(section.name, checkpoint=section.checkpoint, image_size=image_size, **section.arch)

    asked = cfg.student.image_size
    first = cfg.data.image_size if asked == "auto" else asked
    student = create(first)
    size = student_size(cfg, student, teachers)
    if size != first:  # what leads to the size, the patch, is a fact of the network
        torch.manual_seed(cfg.run.seed)
        student = create(size)
    sizes = match_sizes(cfg, student, size, teachers)
    if not any(parameter.requires_grad for parameter in student.network.parameters()):
        raise InputError(f"student.name={student.name} has no parameter that its features depend on and that can learn")
    tune(student, cfg.student.tune, cfg.student.rank)
    if cfg.student.grad_checkpointing:
        student.set_grad_checkpointing(True)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        student = convert_sync_batchnorm(student)
    use_attention(student.network, cfg.run.attention)
    return student, sizes


def describe_networks(cfg: Config, teachers: list[Teacher], sizes: Sizes) -> dict[str, str]:
    """What the weights of a checkpoint belong to, by the config's keys: heads of one teacher would fit another."""

    def shown(section: config.Student | config.Teacher, size: int) -> str:
        arch = {key: value for key, value in section.arch.items() if not key.startswith("drop")}
        return f"{section.name} {arch} at {size} px" if arch else f"{section.name} at {size} px"

    networks = {"student": shown(cfg.student, sizes.student)}
    for (key, section), teacher in zip(cfg.all_teachers.items(), teachers, strict=True):
        losses = " + ".join(sorted(cfg.losses_of(section)))
        standardized = " standardized" if section.standardize else ""
        networks[key] = f"{shown(section, teacher.image_size)} for {losses}{standardized}"
    return networks


def compile_student(student: Encoder) -> None:
    """Compile its parts one by one, for training and for evaluation mode: blocks may differ in a constant."""
    parts = student.compile_parts()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(parts))
    for part in parts:
        part.compile()


def build_classifier(
    cfg: Config, source: Source | DenseSource, teachers: list[Teacher], student: Encoder
) -> tuple[nn.Module | None, list[str]]:
    """The student's head, should a loss want one, and what its outputs are called (empty where nobody says).

    For the classes of the teachers' heads, else of the labels; for each pixel, where theirs are.
    """
    if not {LABEL_CE, "logits_kl"} & cfg.computed_losses:
        return None, []
    heads = [teacher for teacher in teachers if teacher.head]
    classes = next((teacher.classes for teacher in heads if teacher.classes), []) or list(source.classes)
    count = _count_classes(cfg, source, teachers)
    classes = classes if len(classes) == count else []
    if cfg.student.head:
        head, named = read_head(cfg.student.head, student.embed_dim, "student.head")
        if head.num_classes != count:
            raise InputError(f"student.head={cfg.student.head} has {head.num_classes} classes, the task {count}")
        if getattr(head, "with_patches", False):
            raise InputError(f"student.head={cfg.student.head} reads the mean patch token too: give one of a run's own")
        return head.requires_grad_(True), named or classes
    pixels = isinstance(heads[0].head, PixelClassifier) if heads else is_dense(source)
    head = build_head(student.embed_dim, count, "pixel" if pixels else "class", cfg.head_mix)
    return head, classes


def build_dataset(cfg: Config, source: Source | DenseSource, crop: int, patches: int) -> TrainingSet | DenseTrainingSet:
    """The training set's views: of images, or of images and targets where labels are learnt pixel by pixel."""
    if is_dense(source) and LABEL_CE in cfg.computed_losses:
        return DenseTrainingSet(source, crop, cfg.run.seed, patches)
    transform = TrainTransform(crop, cfg.data.augment)
    return TrainingSet(source, transform, cfg.run.seed, patches, cfg.data.mask.ratio)  # type: ignore[arg-type]


def _count_classes(cfg: Config, source: Source | DenseSource, teachers: list[Teacher]) -> int:
    """Outputs of the student's head."""
    counts = {
        f"{key}.head": int(teacher.head.num_classes)  # type: ignore[arg-type]
        for key, teacher in zip(cfg.all_teachers, teachers, strict=True)
        if teacher.head
    }
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise InputError(f"the student has one classifier, and its teachers' differ in their classes: {told}")
    if counts:
        return next(iter(counts.values()))
    return len(source.classes) or int(source.labels.max()) + 1  # type: ignore[union-attr]


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
    checkpoints: Checkpoints, begin: Progress, resume: str, accelerator: Accelerator
) -> tuple[Progress, list[str]]:
    """Where the run starts, and what is worth telling about it. The main process decides which checkpoint it is."""
    folder, notes = None, []
    found = list_checkpoints(checkpoints.folder)
    if accelerator.is_main_process:
        notes = [f"warning: {name} was half-written and is left out" for name in checkpoints.half_written()]
        folder = (found[-1] if found else None) if resume in ("auto", "never") else Path(resume)
    (folder,) = broadcast_object_list([folder])
    if folder is None:
        return begin, notes
    if resume == "never":
        raise InputError(f"{folder} is of an earlier run: give another run.dir, or leave --resume at auto to go on")
    complaint, progress = None, begin
    try:
        progress, changed = checkpoints.load(folder)
        _check_same_data(begin, progress, folder)
        newest = int(found[-1].name.removeprefix("step_")) if found else 0
        if newest > progress.step:
            raise InputError(
                f"{checkpoints.folder} goes on to step {newest}: to branch off at {folder}, give another run.dir"
            )
        notes += [f"resumed from {folder}"]
        notes += [f"warning: {change} since the checkpoint; results may differ in the last bits" for change in changed]
    except InputError as error:
        complaint = str(error)
    for said in gather_object([complaint]):  # a machine that does not see the folder, say
        if said is not None:
            raise InputError(said)
    return progress, notes


def _check_same_data(begin: Progress, progress: Progress, folder: Path) -> None:
    """A step number means a place in the data: it must still mean the same."""
    if progress.images_per_step != begin.images_per_step:
        raise InputError(
            f"{folder} counts steps of {progress.images_per_step} images, this run of {begin.images_per_step} "
            "(processes x run.batch_size x run.accumulate): make them equal, or start another run.dir"
        )
    if progress.images != begin.images:
        raise InputError(
            f"{folder} is of a set of {progress.images} images, and there are {begin.images} now: "
            "start another run.dir; student.checkpoint takes the weights along"
        )


def write_config(cfg: Config, directory: Path, accelerator: Accelerator, progress: Progress) -> list[str]:
    """Write config.yaml; returns a warning where a run goes on under another config than it began with."""
    if not accelerator.is_main_process:
        return []
    path, text = directory / "config.yaml", dump_config(cfg)
    before = _read_config(path) if path.is_file() and progress.step else None
    write_file(path, lambda pending: pending.write_text(text))
    if before is None:
        return []
    then, now = flat_keys(before), flat_keys(yaml.safe_load(text))
    changed = [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | then.keys())
        if then.get(key) != now.get(key)
    ]
    return [f"warning: the config has changed since the run began ({'; '.join(changed)})"] if changed else []


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return None
    return tree if isinstance(tree, dict) else None


def summarise(
    cfg: Config,
    plan: Plan,
    student: Encoder,
    teachers: list[Teacher],
    sizes: Sizes,
    source: Source | DenseSource,
    sampler: Sampler,
    rate: float,
    accelerator: Accelerator,
) -> list[str]:
    """What the run is, in a few lines."""

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
    lines.append(f"student  {', '.join([size(student), *weighted(learnt)])}")
    warmup = warmup_steps(cfg.schedule, plan.steps_per_epoch)
    warning = [f"warning: the warm-up of {warmup} steps takes the whole run"] if warmup >= plan.total_steps else []
    batch = f"{sampler.processes} x {sampler.batch_size} x {sampler.accumulate}"
    precision = "float32" if cfg.run.precision == "no" else cfg.run.precision
    return [
        *lines,
        *describe_sizes(cfg, sizes, teachers),
        *describe_norms(student, accelerator),
        f"data     {len(source):,} images at {sizes.crop} px, batch {sampler.images_per_step} ({batch}), lr {rate:.2e}",
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
