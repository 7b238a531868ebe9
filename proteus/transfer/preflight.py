"""Everything that is wrong with a transfer's inputs, at once, before anything is built or read."""

from pathlib import Path

import torch

from proteus.config import Student, Teacher
from proteus.data.sources import check_roots
from proteus.errors import InputError
from proteus.losses import check_losses
from proteus.models import create_model
from proteus.training.preflight import check_device, check_name, check_teacher, run_checks
from proteus.transfer.config import TransferConfig
from proteus.transfer.stages import make_folder


def check_inputs(cfg: TransferConfig) -> None:
    """Raise InputError with a line for each thing that is unknown or not where it should be."""
    data = cfg.transfer.data
    run_checks(
        [
            lambda: make_folder(Path(cfg.run.dir or "runs")),
            lambda: check_losses(list(cfg.transfer.losses)),
            lambda: check_name("student", cfg.student.name),
            lambda: check_teacher("teacher", cfg.teacher),
            lambda: _check_files(cfg),
            lambda: check_device(cfg.run),
            lambda: check_roots(data, "transfer.data") if data else None,
        ]
    )
    check_networks(cfg)


def _check_files(cfg: TransferConfig) -> None:
    files = {"student.checkpoint": cfg.student.checkpoint}
    files |= _pretrained(cfg)
    missing = [f"{key}={path}: no such file" for key, path in files.items() if path and not Path(path).is_file()]
    if missing:
        raise InputError(*missing)


def check_networks(cfg: TransferConfig) -> None:
    """InputError where a network cannot be built, takes no images of its size, or does not fit a student's weights.

    What would otherwise be found when the stages before it are done, hours later perhaps.
    """
    with torch.device("meta"):
        section: Teacher | Student
        for key, section in (("teacher", cfg.teacher), ("student", cfg.student)):
            size = section.image_size if isinstance(section.image_size, int) else cfg.image_size
            encoder = create_model(section.name, image_size=size, **section.arch)
            try:
                encoder.grid_of(size, size)
            except ValueError as error:
                raise InputError(f"{key}: image_size={size}: {error}") from None
    for key, path in {"student.checkpoint": cfg.student.checkpoint, **_pretrained(cfg)}.items():
        if path:
            try:
                create_model(cfg.student.name, checkpoint=path, **cfg.student.arch)
            except InputError as error:
                raise InputError(f"{key}: {error}") from None


def _pretrained(cfg: TransferConfig) -> dict[str, str]:
    return {f"pretrained.{name}": path for name, path in cfg.pretrained.items()}
