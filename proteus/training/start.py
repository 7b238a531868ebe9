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

from proteus.config import Config, dump_config
from proteus.data.loader import count_masked
from proteus.data.sampler import Sampler
from proteus.data.sources import Source
from proteus.engine.atomic import write_file
from proteus.engine.lock import RunLock
from proteus.engine.schedule import warmup_steps
from proteus.errors import InputError
from proteus.losses import LOSSES
from proteus.models import Encoder
from proteus.training.plan import Plan
from proteus.training.state import Checkpoints, Progress, list_checkpoints
from proteus.training.teacher import Teacher


def build_accelerator(cfg: Config, directory: Path) -> Accelerator:
    """Devices, processes, precision and the TensorBoard tracker of a run."""
    # DDP orders its buckets anew after the first step it makes. With three processes and more the order of a sum
    # changes its last bits, so a resumed run would differ; searching for unused parameters keeps the first order.
    fixed_buckets = int(os.environ.get("WORLD_SIZE", 1)) > 2
    ddp = DistributedDataParallelKwargs(find_unused_parameters=fixed_buckets, broadcast_buffers=False)
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


def count_classes(source: Source, teacher: Teacher | None) -> int | None:
    """Outputs of the student's classifier, should a loss want one: the teacher's classes, else the labels'."""
    if teacher is not None and teacher.head is not None:
        return teacher.head.num_classes
    return None if source.labels is None else int(source.labels.max()) + 1


def check_labels(cfg: Config, source: Source) -> None:
    """InputError where a loss needs labels and the data has none."""
    for name in cfg.active_losses:
        if LOSSES[name].needs_labels and source.labels is None:
            raise InputError(
                f"losses.{name} needs labels, and data.root={cfg.data.root} has none (root/<class>/<image> would)"
            )


def check_masks(cfg: Config, sampler: Sampler, patches: int) -> None:
    """InputError where the patch loss would never see a masked patch."""
    mask = cfg.data.mask
    if "patch" in cfg.active_losses and not (sampler.masked and count_masked(patches, mask.ratio)):
        raise InputError(
            f"losses.patch: data.mask.probability={mask.probability} and ratio={mask.ratio} mask {sampler.masked} of "
            f"{sampler.global_batch} images and {count_masked(patches, mask.ratio)} of {patches} patches; raise them"
        )


def check_grids(cfg: Config, student: Encoder, teacher: Teacher | None) -> tuple[int, int]:
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
    then, now = _flat(before), _flat(yaml.safe_load(text))
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


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def summarise(
    cfg: Config,
    plan: Plan,
    student: Encoder,
    teacher: Teacher | None,
    source: Source,
    sampler: Sampler,
    rate: float,
    accelerator: Accelerator,
) -> list[str]:
    """What the run is, in four lines."""

    def size(encoder: Encoder) -> str:
        return f"{encoder.name} ({sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M)"

    warmup = warmup_steps(cfg.schedule, plan.steps_per_epoch)
    warning = [f"warning: the warm-up of {warmup} steps takes the whole run"] if warmup >= plan.total_steps else []
    losses = " + ".join(f"{weight:g} {name}" for name, weight in cfg.active_losses.items())
    batch = f"{sampler.processes} x {sampler.batch_size} x {sampler.accumulate}"
    precision = "float32" if cfg.run.precision == "no" else cfg.run.precision
    return [
        f"teacher  {size(teacher.encoder) if teacher else 'none'}",
        f"student  {size(student)}, {losses}",
        f"data     {len(source):,} images at {cfg.data.image_size} px, batch {sampler.images_per_step} ({batch}), "
        f"lr {rate:.2e}",
        f"run      {plan.total_steps:,} steps of {plan.steps_per_epoch:,} an epoch, {accelerator.device.type}, "
        f"{precision}, in {cfg.run.dir}",
        *warning,
    ]
