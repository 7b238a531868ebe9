"""What a run remembers between two steps, and how it gets to disk and back. The teacher is no part of it."""

import json
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import accelerate
import numpy
import PIL
import timm
import torch
import torchvision
from accelerate import Accelerator
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

import proteus
from proteus.config import Config
from proteus.config_files import dump_config
from proteus.engine.atomic import PENDING, remove_folder, write_folder
from proteus.engine.checksums import damage, write_checksums
from proteus.engine.peers import peers_needed
from proteus.engine.shard import full_optimizer_state, full_state, load_full, load_full_optimizer
from proteus.errors import InputError, PeerError, RunError
from proteus.training.changes import CONFIG, check_changes
from proteus.training.learner import Learner


@dataclass
class Progress:
    """How far the run is, what a step of it is, and what it met on the way."""

    images: int  # in the training set
    images_per_step: int  # over all processes and micro-batches
    image_names: str = ""  # a hash of what a thousand of them are called
    step: int = 0  # updates done
    skipped_steps: list[int] = field(default_factory=list)  # of late, not applied: the gradient was not finite
    bad_images: list[int] = field(default_factory=list)  # indices of files that could not be read
    best_score: float | None = None  # of the weights that are kept, where a validation chooses them
    best_step: int = 0
    flops_per_step: int = 0  # on all processes, where they have been counted


def environment(accelerator: Accelerator) -> dict[str, str | int]:
    """What bit-identity holds for: a change of any of these may change the last bits."""
    device = accelerator.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = (torch, torchvision, timm, accelerate, numpy, PIL, proteus)
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": f"{device.type} {machine}",
        **{package.__name__: package.__version__ for package in packages},
    }


class Checkpoints:
    """`checkpoints/step_N/` of a run directory: whole or not there, the newest `keep` of them.

    A checkpoint is model.safetensors (student and heads), ema.safetensors, optimizer.pt, scaler.pt (fp16),
    progress.json, config.yaml and checksums.json; of several students the first three are in students/<name>/. Random
    state is not among it: every draw is a function of the seed and the step.
    """

    def __init__(
        self,
        directory: Path,
        cfg: Config,
        learners: Sequence[Learner],
        accelerator: Accelerator,
        networks: dict[str, str],
    ):
        self.folder, self._networks, self._cfg = directory / "checkpoints", networks, cfg
        self._learners, self._accelerator = learners, accelerator

    def save(self, progress: Progress) -> None:
        """Write `step_N`, unless it is there, then delete what is older than the newest `run.keep`.

        The main process writes; all call it, as they hold shares of the weights perhaps.
        """
        target = self.folder / f"step_{progress.step}"
        # To write anew what a failing disk holds whole would risk it.
        if not self._accelerator.is_main_process or damage(target) is None:
            for learner in self._learners:
                _save(learner, None)
            return

        def fill(folder: Path) -> None:
            for learner in self._learners:
                _save(learner, self._place(folder, learner))
            if self._accelerator.scaler is not None:
                torch.save(self._accelerator.scaler.state_dict(), folder / "scaler.pt")
            facts = asdict(progress) | {"environment": environment(self._accelerator), "networks": self._networks}
            (folder / "progress.json").write_text(json.dumps(facts))
            (folder / CONFIG).write_text(dump_config(self._cfg))
            write_checksums(folder)

        try:
            with peers_needed():  # what they hold is gathered
                write_folder(target, fill)
        except PeerError:
            raise
        except Exception as error:  # a full disk is told by each writer in its own way
            message = " ".join(str(error).split())[:200]
            raise RunError(
                f"the checkpoint of step {progress.step} cannot be written to {self.folder}: {message}"
            ) from None
        for old in list_checkpoints(self.folder)[: -self._cfg.run.keep]:
            remove_folder(old)

    def load(self, folder: Path) -> tuple[Progress, list[str]]:
        """Restore everything from `folder`: (progress, warnings of what has changed since).

        InputError where the checkpoint is of other networks, whose weights might fit all the same, or of a config that
        has changed in what must not.
        """
        told = check_changes(self._cfg, folder)
        groups = [group for learner in self._learners for group in learner.optimizer.param_groups]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            facts = json.loads((folder / "progress.json").read_text())
            then = dict(facts.pop("environment"))
            self._check_networks(facts.pop("networks"), folder)
            progress = TypeAdapter(Progress).validate_python(facts)
            for learner in self._learners:
                _load(learner, self._place(folder, learner))
            if self._accelerator.scaler is not None and (folder / "scaler.pt").is_file():
                self._accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        except InputError:
            raise
        except Exception as error:  # as it was written, but by other code, or for another network
            # Not torch's advice to read it unsafely, which is not ours to give.
            message = "more than tensors" if "weights_only" in str(error) else " ".join(str(error).split())[:300]
            raise InputError(
                f"checkpoint {folder} is of another version or network ({type(error).__name__}: {message}); "
                "give another run.dir"
            ) from None
        groups = [group for learner in self._learners for group in learner.optimizer.param_groups]
        for group, built in zip(groups, settings, strict=True):
            group.update(built)  # the config's weight decay and betas, should they have changed
        now = environment(self._accelerator)
        changed = [f"{key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
        notes = [f"warning: {change} since the checkpoint; results may differ in the last bits" for change in changed]
        if then.get("processes") != now["processes"]:
            notes.append("warning: drop path, dropout and BatchNorm go by process: with them results differ by more")
        if told:
            notes.append(f"warning: the config has changed since the checkpoint ({'; '.join(told)})")
        return progress, notes

    def _check_networks(self, then: dict[str, str], folder: Path) -> None:
        now = self._networks
        changed = [
            f"{key} was {then.get(key, 'not there')} and is {now.get(key, 'not there')}"
            for key in (then | now)
            if then.get(key) != now.get(key)
        ]
        if changed:
            raise InputError(f"{folder} is of other networks: {'; '.join(changed)}; start another run.dir")

    def _place(self, folder: Path, learner: Learner) -> Path:
        return folder if len(self._learners) == 1 else folder / "students" / learner.name


def sweep(folder: Path) -> list[str]:
    """Delete what was being written, or deleted, when a run ended: a line for each."""
    pending = sorted(folder.glob(PENDING + "*"))
    for path in pending:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
    return [f"warning: {path.name} was left by a run that was cut off, and is deleted" for path in pending]


def set_damaged_aside(folder: Path) -> list[str]:
    """Rename what is newer than the newest whole checkpoint to damaged-step_N: a line for each.

    InputError where there are checkpoints and none is whole: to begin again is not for us to decide.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        wrong = damage(checkpoint)
        if wrong is None:
            break
        damaged.append((checkpoint, wrong))
    else:
        if damaged:
            told = "; ".join(f"{checkpoint.name}: {wrong}" for checkpoint, wrong in damaged)
            raise InputError(
                f"no checkpoint in {folder} is whole ({told}): restore one, or give another run.dir to begin again"
            )
    lines = []
    for checkpoint, wrong in damaged:
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        remove_folder(aside)
        checkpoint.rename(aside)
        lines.append(
            f"warning: {checkpoint} is damaged ({wrong}); it is kept as {aside.name}, and the one before is used"
        )
    return lines


def read_progress(folder: Path) -> Progress:
    """How far a checkpoint is."""
    facts = json.loads((folder / "progress.json").read_text())
    return Progress(**{name.name: facts[name.name] for name in fields(Progress) if name.name in facts})


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first. Each has been whole; whether it still is, its checksums tell."""
    numbered = [
        (int(match[1]), path) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_([0-9]+)", path.name))
    ]
    return [path for _, path in sorted(numbered)]


def _save(learner: Learner, folder: Path | None) -> None:
    """Write a learner's weights, optimiser state and average; None: only take part in bringing them together.

    One after the other, so that no more than one of them is in memory twice.
    """
    keep = folder is not None
    weights = full_state(learner.task, keep)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "model.safetensors")
    del weights
    moments = full_optimizer_state(learner.optimizer, keep)
    if folder is not None:
        torch.save(moments, folder / "optimizer.pt")
    del moments
    if learner.ema is not None:
        average = full_state(learner.ema.module, keep)
        if folder is not None:
            save_file(average, folder / "ema.safetensors")


def _load(learner: Learner, folder: Path) -> None:
    load_full(learner.task, load_file(folder / "model.safetensors"))
    moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    load_full_optimizer(learner.optimizer, moments)
    if learner.ema is not None:
        average = folder / "ema.safetensors"
        # An average that begins now begins at the student.
        load_full(learner.ema.module, load_file(average) if average.is_file() else full_state(learner.task.student))
