"""Everything that is wrong with a run's inputs, at once, before anything is built or read."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from proteus.config import Config, RunBase, Student, Teacher
from proteus.data.sources import check_roots
from proteus.engine.checksums import is_as_written
from proteus.errors import InputError
from proteus.losses import check_losses
from proteus.models import zoo
from proteus.models.attention import check_attention
from proteus.training.changes import CONFIG, check_changes
from proteus.training.state import list_checkpoints
from proteus.training.teacher import RANDOM, find_weights


def check_inputs(cfg: Config, resume: str) -> None:
    """Raise InputError with a line for each thing that is unknown or not where it should be."""
    checks: list[Callable[[], object]] = [
        lambda: check_losses(list(cfg.losses)),
        *(partial(check_name, key, section.name) for key, section in _students(cfg).items()),
        *(partial(check_teacher, key, teacher) for key, teacher in cfg.all_teachers.items()),
        lambda: _check_files(cfg, resume),
        lambda: _check_changes(cfg, resume),
        lambda: check_device(cfg.run),
        lambda: check_roots(cfg.data),
    ]
    run_checks(checks)


def run_checks(checks: Iterable[Callable[[], object]]) -> None:
    """Run all checks; InputError with the lines of all that fail."""
    lines: list[str] = []
    for check in checks:
        try:
            check()
        except InputError as error:
            lines += error.lines
    if lines:
        raise InputError(*lines)


def check_name(key: str, name: str) -> None:
    """InputError where `key` names no network. A function of the user's is imported, which is said before."""
    if zoo.is_own(name) and os.environ.get("RANK", "0") == "0":
        print(f"importing the code of {name!r}, as {key}.name says", file=sys.stderr, flush=True)
    with _prefixed(f"{key}.name: "):
        zoo.check_name(name)


def check_teacher(key: str, cfg: Teacher) -> None:
    """InputError where a teacher's name, losses or weights are not there."""
    check_name(key, cfg.name)
    with _prefixed(f"{key}.losses: "):
        check_losses(list(cfg.losses or {}))
    if cfg.download:
        return  # in its time, by one process a machine
    try:
        find_weights(cfg)
    except InputError as error:
        published = not (zoo.is_own(cfg.name) or cfg.name.startswith("proteus_"))
        other = f"{key}.download=true" if published else f"{key}.checkpoint=random to try something out"
        hint = f"give its path as {key}.checkpoint=PATH, or {other}"
        raise InputError(*(f"{key} {line}, {hint}" for line in error.lines)) from None


def _check_files(cfg: Config, resume: str) -> None:
    files: dict[str, str | None] = {}
    for key, student in _students(cfg).items():
        files |= {f"{key}.checkpoint": student.checkpoint, f"{key}.head": student.head}
    for key, teacher in cfg.all_teachers.items():
        files[f"{key}.head"] = teacher.head
        files[f"{key}.checkpoint"] = None if teacher.checkpoint == RANDOM else teacher.checkpoint
    missing = [f"{key}={path}: no such file" for key, path in files.items() if path and not Path(path).is_file()]
    if resume not in ("auto", "never") and not Path(resume, "progress.json").is_file():
        missing.append(
            f"--resume {resume}: neither auto, never, nor a checkpoint folder (one that holds progress.json)"
        )
    if missing:
        raise InputError(*missing)


def _check_changes(cfg: Config, resume: str) -> None:
    if resume == "never":
        return
    found = list_checkpoints(Path(str(cfg.run.dir)) / "checkpoints") if resume == "auto" else [Path(resume)]
    # One that is damaged says nothing of the run; another checkpoint will be used then, and judged as it is loaded.
    if found and is_as_written(found[-1], CONFIG):
        check_changes(cfg, found[-1])


def _students(cfg: Config) -> dict[str, Student]:
    """The students by their keys: `student`, or `students.0`, `students.1`, ..."""
    if cfg.student:
        return {"student": cfg.student}
    return {f"students.{index}": student for index, student in enumerate(cfg.students)}


def check_device(run: RunBase) -> None:
    """InputError where the machine cannot compute as the run wants."""
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if run.precision == "fp16" and on_cpu:
        raise InputError("run.precision=fp16 needs a GPU, and there is none here: use bf16 or no")
    with _prefixed("run."):
        check_attention(run.attention, "cpu" if on_cpu else "cuda")


@contextmanager
def _prefixed(place: str) -> Iterator[None]:
    """Put the key it belongs to before what is raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(*(place + line for line in error.lines)) from None
