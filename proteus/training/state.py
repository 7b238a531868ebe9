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
from safetensors.torch import load_file, save_file
from torch import nn

import proteus
from proteus.engine.atomic import PENDING, remove_folder, write_folder
from proteus.errors import InputError, RunError
from proteus.training.learner import Learner


@dataclass
class Progress:
    """How far the run is, what a step of it is, and what it met on the way."""

    images: int  # in the training set
    images_per_step: int  # over all processes and micro-batches
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

    A checkpoint is model.safetensors (student and heads), ema.safetensors, optimizer.pt, scaler.pt (fp16) and
    progress.json; of several students the first three are in students/<name>/. Random state is not among it: every
    draw is a function of the seed and the step.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        learners: Sequence[Learner],
        accelerator: Accelerator,
        networks: dict[str, str],
    ):
        self.folder, self._networks = directory / "checkpoints", networks
        self._keep, self._learners, self._accelerator = keep, learners, accelerator

    def save(self, progress: Progress) -> None:
        """Write `step_N`, then delete what is older than the newest `keep`."""

        def fill(folder: Path) -> None:
            for learner in self._learners:
                place = self._place(folder, learner)
                place.mkdir(parents=True, exist_ok=True)
                save_file(_on_cpu(learner.task), place / "model.safetensors")
                torch.save(learner.optimizer.state_dict(), place / "optimizer.pt")
                if learner.ema is not None:
                    save_file(_on_cpu(learner.ema.module), place / "ema.safetensors")
            if self._accelerator.scaler is not None:
                torch.save(self._accelerator.scaler.state_dict(), folder / "scaler.pt")
            facts = asdict(progress) | {"environment": environment(self._accelerator), "networks": self._networks}
            (folder / "progress.json").write_text(json.dumps(facts))

        try:
            write_folder(self.folder / f"step_{progress.step}", fill)
        except Exception as error:  # a full disk is told by each writer in its own way
            message = " ".join(str(error).split())[:200]
            raise RunError(
                f"the checkpoint of step {progress.step} cannot be written to {self.folder}: {message}"
            ) from None
        for old in list_checkpoints(self.folder)[: -self._keep]:
            remove_folder(old)

    def load(self, folder: Path) -> tuple[Progress, list[str]]:
        """Restore everything from `folder`: (progress, what of the environment has changed since).

        InputError where the checkpoint is of other networks, whose weights might fit all the same, or damaged.
        """
        groups = [group for learner in self._learners for group in learner.optimizer.param_groups]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            facts = json.loads((folder / "progress.json").read_text())
            then = facts.pop("environment")
            self._check_networks(facts.pop("networks"), folder)
            progress = Progress(**facts)
            for learner in self._learners:
                _load(learner, self._place(folder, learner))
            if self._accelerator.scaler is not None and (folder / "scaler.pt").is_file():
                self._accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        except InputError:
            raise
        except Exception as error:  # readers of damaged files raise anything
            message = " ".join(str(error).split())[:300]
            raise InputError(
                f"checkpoint {folder} is damaged or of another network ({type(error).__name__}: {message}); "
                "delete it to go on from the one before, or give another run.dir"
            ) from None
        groups = [group for learner in self._learners for group in learner.optimizer.param_groups]
        for group, built in zip(groups, settings, strict=True):
            group.update(built)  # the config's weight decay and betas, should they have changed
        now = environment(self._accelerator)
        return progress, [f"{key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]

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

    def half_written(self) -> list[str]:
        """Names of what is not whole. What a crash of ours left under a temporary name is deleted."""
        pending = sorted(self.folder.glob(PENDING + "*"))
        for path in pending:
            shutil.rmtree(path)
        whole = list_checkpoints(self.folder)
        return [path.name for path in (*pending, *sorted(self.folder.glob("step_*"))) if path not in whole]


def read_progress(folder: Path) -> Progress:
    """How far a checkpoint is."""
    facts = json.loads((folder / "progress.json").read_text())
    return Progress(**{name.name: facts[name.name] for name in fields(Progress) if name.name in facts})


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    numbered = [
        (int(match[1]), path) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered) if (path / "progress.json").is_file()]


def _load(learner: Learner, folder: Path) -> None:
    learner.task.load_state_dict(load_file(folder / "model.safetensors"))
    learner.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    if learner.ema is not None:
        average = folder / "ema.safetensors"
        # An average that begins now begins at the student.
        state = load_file(average) if average.is_file() else learner.task.student.state_dict()
        learner.ema.module.load_state_dict(state)


def _on_cpu(module: nn.Module) -> dict[str, torch.Tensor]:
    # Copies, because networks may tie weights, which the format does not know.
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in module.state_dict().items()}
