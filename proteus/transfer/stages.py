"""A stage: a run of the trainer in a folder of its own, resumed where it was stopped, skipped where it is done."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from proteus.config import Config
from proteus.config_files import flat_keys
from proteus.data.dense import DenseSource
from proteus.data.sources import Source
from proteus.engine.atomic import write_file
from proteus.errors import InputError, Stopped
from proteus.evaluation.extract import fingerprint
from proteus.training.loop import train
from proteus.training.state import Progress, list_checkpoints, read_progress
from proteus.training.task import Distillation
from proteus.training.validation import Validation

DONE = "stage.json"
# Keys that may change between two runs of a stage without making it another one.
INCIDENTAL = ("run.dir", "run.log_every", "run.save_every", "run.keep", "data.workers", "run.max_nonfinite")


@dataclass(frozen=True)
class Outcome:
    """What a stage has come to.

    folder: holds student.safetensors and head.safetensors.
    steps:  updates it took; flops: of all of them on all processes, forward and backward, its teacher's among them.
    score:  on the validation set, of the step that was kept; None without such a set.
    """

    folder: Path
    steps: int
    flops: int
    score: float | None
    best_step: int

    @property
    def student(self) -> str:
        return str(self.folder / "student.safetensors")

    @property
    def head(self) -> str:
        return str(self.folder / "head.safetensors")


def run_stage(
    cfg: Config,
    source: Source | DenseSource,
    score: Callable[[Distillation], float] | None,
    validate_every: int,
    *,
    after: tuple[Outcome, ...] = (),
) -> Outcome:
    """Train by `cfg` on `source` unless its folder says that this has been done.

    after: stages whose outputs this one starts from: where they were done anew, this one is out of date.

    Stopped where a signal stopped it; InputError where the folder holds the same stage done in another way.
    """
    assert cfg.run.dir is not None
    folder = Path(cfg.run.dir)
    identity = _identity(cfg, source, after)
    done = folder / DONE
    if not done.is_file():
        validation = Validation(score, validate_every) if score else None
        signum = train(cfg, source=source, validation=validation, measure_flops=True)
        if signum:
            raise Stopped(signum)
        progress = read_progress(list_checkpoints(folder / "checkpoints")[-1])
        if PartialState().is_main_process:
            facts = {"identity": identity, **_facts(progress)}
            write_file(done, lambda path: path.write_text(json.dumps(facts, indent=1)))
        PartialState().wait_for_everyone()
    facts = _read(done)
    _check_same(facts["identity"], identity, folder)
    return Outcome(folder, facts["steps"], facts["flops"], facts["score"], facts["best_step"])


def is_done(folder: Path) -> bool:
    """Whether a stage has come to its end in that folder."""
    return (folder / DONE).is_file()


def _facts(progress: Progress) -> dict[str, Any]:
    return {
        "steps": progress.step,
        "flops": progress.step * progress.flops_per_step,
        "score": progress.best_score,
        "best_step": progress.step if progress.best_score is None else progress.best_step,
    }


def _read(done: Path) -> dict[str, Any]:
    try:
        return json.loads(done.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{done} cannot be read ({error}): delete {done.parent}, and the stage is done again"
        ) from None


def _identity(cfg: Config, source: Source | DenseSource, after: tuple[Outcome, ...]) -> dict[str, Any]:
    """What makes a stage this one and not another, by the config's keys.

    Files of the stages before it stand for themselves wherever the run lies.
    """
    facts = flat_keys(cfg.model_dump(mode="json"))
    theirs = [name for outcome in after for name in (outcome.student, outcome.head)]
    kept = {key: value for key, value in facts.items() if key not in INCIDENTAL and value not in theirs}
    before = [hashlib.sha256((outcome.folder / DONE).read_bytes()).hexdigest()[:16] for outcome in after]
    return json.loads(json.dumps(kept | {"images": fingerprint(source)[:16], "stages before": before}))


def _check_same(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    changed = [key for key in (then | now) if then.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in changed[:3])
        raise InputError(f"{folder} is done, in another way: {told}; give another run.dir, or delete that folder")
