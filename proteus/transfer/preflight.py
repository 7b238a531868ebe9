"""Everything that is wrong with a transfer's inputs, at once, before anything is built or read."""

from pathlib import Path

from proteus.data.sources import check_roots
from proteus.errors import InputError
from proteus.losses import check_losses
from proteus.training.preflight import check_device, check_name, check_teacher, run_checks
from proteus.transfer.config import TransferConfig


def check_inputs(cfg: TransferConfig) -> None:
    """Raise InputError with a line for each thing that is unknown or not where it should be."""
    data = cfg.transfer.data
    run_checks(
        [
            lambda: check_losses(list(cfg.transfer.losses)),
            lambda: check_name("student", cfg.student.name),
            lambda: check_teacher("teacher", cfg.teacher),
            lambda: _check_files(cfg),
            lambda: check_device(cfg.run),
            lambda: check_roots(data, "transfer.data") if data else None,
        ]
    )


def _check_files(cfg: TransferConfig) -> None:
    files = {"student.checkpoint": cfg.student.checkpoint}
    files |= {f"pretrained.{name}": path for name, path in cfg.pretrained.items()}
    missing = [f"{key}={path}: no such file" for key, path in files.items() if path and not Path(path).is_file()]
    if missing:
        raise InputError(*missing)
