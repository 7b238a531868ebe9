"""A stage: a run of the trainer in a folder of its own, resumed where it was stopped, skipped where it is done."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from proteus.config import Config
from proteus.config_files import flat_keys
from proteus.data.dense import DenseSource
from proteus.data.sources import Source
from proteus.engine.atomic import write_file
from proteus.engine.checksums import file_hash
from proteus.errors import InputError, RunError, Stopped
from proteus.evaluation.extract import fingerprint
from proteus.training.loop import train
from proteus.training.state import Progress, list_checkpoints, read_progress
from proteus.training.task import Distillation
from proteus.training.validation import Validation

BEGUN, DONE = "identity.json", "stage.json"
FILES = ("student.safetensors", "head.safetensors")
# Keys that may change between two runs of a stage without making it another one.
INCIDENTAL = {
    "run.dir",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.max_nonfinite",
    "run.attention",
    "data.workers",
    "data.max_bad_share",
    "data.max_bad_files",
    "student.compile",
    "student.grad_checkpointing",
    "teacher.compile",
    "teacher.download",
}
WEIGHTS = ("student.checkpoint", "student.head", "teacher.checkpoint", "teacher.head")


@dataclass(frozen=True)
class Outcome:
    """What a stage has come to.

    folder: holds student.safetensors and head.safetensors.
    steps:  updates it took.
    flops:  of all of them on all processes, forward and backward, its teacher's among them.
    score:  on the validation set, of the step that was kept; None without such a set.
    files:  the hashes of its outputs, by name.
    """

    folder: Path
    steps: int
    flops: int
    score: float | None
    files: dict[str, str]

    @property
    def student(self) -> str:
        return str(self.folder / "student.safetensors")

    @property
    def head(self) -> str:
        return str(self.folder / "head.safetensors")


CHANGED = {  # what is known by a hash, in words
    "images": "it learns from have changed (which they are, their files' paths, sizes or times, or their labels)",
    "validation": "images, crop or interval have changed",
    "stages before": "have been done in another way",
}


class Judge(NamedTuple):
    """What chooses the weights that a stage keeps: a score every so many updates, higher is better.

    identity: what the score depends on besides the weights.
    """

    score: Callable[[Distillation], float]
    every: int
    identity: str


def run_stage(
    cfg: Config, source: Source | DenseSource, judge: Judge | None, *, after: tuple[Outcome, ...] = ()
) -> Outcome:
    """Train by `cfg` on `source` unless its folder says that this has been done.

    after: stages whose outputs this one starts from: where they were done anew, this one is out of date.

    Stopped where a signal stopped it; InputError where the folder holds the stage begun or done in another way.
    """
    assert cfg.run.dir is not None
    folder, state = Path(cfg.run.dir), PartialState()
    identity = _identity(cfg, source, judge, after)
    begun, done = folder / BEGUN, folder / DONE
    if begun.is_file():
        _check_same(_read(begun, ()), identity, folder, done.is_file())
    elif state.is_main_process:
        make_folder(folder)
        write_file(begun, lambda path: path.write_text(json.dumps(identity, indent=1)))
    state.wait_for_everyone()
    if not done.is_file():
        if state.is_main_process:
            print(f"stage {folder}", file=sys.stderr, flush=True)
        validation = Validation(judge.score, judge.every) if judge else None
        signum = train(cfg, source=source, validation=validation, measure_flops=True)
        if signum:
            raise Stopped(signum)
        if state.is_main_process:  # who wrote the last checkpoint
            facts = _facts(folder, read_progress(list_checkpoints(folder / "checkpoints")[-1]))
            write_file(done, lambda path: path.write_text(json.dumps(facts, indent=1)))
        state.wait_for_everyone()
    facts = _read(done, ("steps", "flops", "score", "files"))
    for name, digest in facts["files"].items():
        path = folder / name
        if not path.is_file() or _hash_of(str(path), os.stat(path).st_mtime_ns) != digest:
            raise InputError(f"{path} is not what the stage left: delete {folder}, and the stage is done again")
    return Outcome(folder, facts["steps"], facts["flops"], facts["score"], facts["files"])


def make_folder(folder: Path) -> None:
    """Make a folder; InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir: {folder} cannot be made: {error.strerror or error}") from None


def _facts(folder: Path, progress: Progress) -> dict[str, Any]:
    names = [name for name in FILES if (folder / name).is_file()]
    if FILES[0] not in names:
        raise RunError(f"{folder / FILES[0]} has been taken away: delete {folder}, and the stage is done again")
    return {
        "files": {name: _hash_of(str(folder / name), os.stat(folder / name).st_mtime_ns) for name in names},
        "steps": progress.step,
        "flops": progress.step * progress.flops_per_step,
        "score": progress.best_score,
        "best_step": progress.step if progress.best_score is None else progress.best_step,
    }


def _read(done: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        facts = json.loads(done.read_text())
        if not isinstance(facts, dict) or any(key not in facts for key in keys):
            raise ValueError("not what a stage writes")
        return facts
    except (OSError, ValueError) as error:
        raise InputError(
            f"{done} cannot be read ({error}): delete {done.parent}, and the stage is done again"
        ) from None


def _identity(
    cfg: Config, source: Source | DenseSource, judge: Judge | None, after: tuple[Outcome, ...]
) -> dict[str, Any]:
    """What makes a stage this one and not another, by the config's keys.

    Files of the stages before it stand for themselves wherever the run lies; other weights are known by their bytes.
    """
    facts = {key: value for key, value in flat_keys(cfg.model_dump(mode="json")).items() if key not in INCIDENTAL}
    theirs = [name for outcome in after for name in (outcome.student, outcome.head)]
    for key in WEIGHTS:
        path = facts.get(key)
        if path in theirs:
            del facts[key]
        elif path and Path(path).is_file():
            facts[key] = f"sha256 {_hash_of(path, os.stat(path).st_mtime_ns)[:16]}"
    micro_batch = facts.pop("run.batch_size") * facts.pop("run.accumulate")
    facts |= {
        "images of a step": micro_batch * PartialState().num_processes,
        "images": fingerprint(source)[:16],
        "validation": f"every {judge.every} steps on {judge.identity}" if judge else None,
        "stages before": [hashlib.sha256((outcome.folder / BEGUN).read_bytes()).hexdigest()[:16] for outcome in after],
    }
    return json.loads(json.dumps(facts))


@lru_cache
def _hash_of(path: str, changed: int) -> str:
    return file_hash(Path(path))


def _check_same(then: dict[str, Any], now: dict[str, Any], folder: Path, done: bool) -> None:
    changed = [key for key in (then | now) if then.get(key) != now.get(key)]
    if changed:
        told = "; ".join(
            f"{key} {CHANGED[key]}" if key in CHANGED else f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
            for key in changed[:3]
        )
        state = "done" if done else "begun"
        raise InputError(f"{folder} is {state}, in another way: {told}; give another run.dir, or delete that folder")
