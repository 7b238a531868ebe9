"""A student that learns: its losses and optimiser, its average, and what it leaves behind."""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from proteus.config import Config
from proteus.data.dense import DenseSource
from proteus.data.loader import Batch
from proteus.data.sampler import Sampler
from proteus.data.sources import Source
from proteus.engine.atomic import write_file
from proteus.engine.ema import build_ema
from proteus.engine.schedule import scaled_rate
from proteus.engine.shard import full_state, is_sharded, no_sync, shard, shards
from proteus.engine.skip import Statistics, average_unless, fail_together
from proteus.engine.update import build_optimizer, finite_step, set_rate
from proteus.errors import InputError
from proteus.models.heads import save_head
from proteus.models.weights import save_encoder
from proteus.training.networks import build_classifier, build_student, compile_student
from proteus.training.task import Distillation, build_task
from proteus.training.teacher import Answer, Teacher
from proteus.training.tune import merged

Module = TypeVar("Module", bound=nn.Module)


class Outcome(NamedTuple):
    """What a step did, on the device: losses of its micro-batches, gradient norm, whether it was skipped."""

    losses: list[dict[str, Tensor]]
    norm: Tensor
    skipped: Tensor


class Learner:
    """One student in training. Several learn from the same answers, each to the bit as it would alone.

    name:      of its network, a number behind it where another has the same.
    cfg:       the run in which it learns alone.
    directory: where its weights are written at the end.
    base_rate: learning rate that the schedule scales.
    """

    def __init__(
        self,
        name: str,
        cfg: Config,
        source: Source | DenseSource,
        teachers: list[Teacher],
        sampler: Sampler,
        total_steps: int,
        accelerator: Accelerator,
        directory: Path,
    ):
        self.name, self.cfg, self.directory, self._accelerator = name, cfg, directory, accelerator
        student, self.sizes = build_student(cfg, teachers, accelerator)
        classifier, self.classes = build_classifier(cfg, source, teachers, student)
        masked = sampler.masked / sampler.processes
        self.task = build_task(cfg, student, teachers, self.sizes, classifier, masked).to(accelerator.device)
        self.ema = build_ema(student, cfg.ema.decay, total_steps)
        self.base_rate = scaled_rate(cfg.optimizer.lr, cfg.optimizer.lr_batch, sampler.images_per_step)
        self._plain: Distillation | None = None  # where weights are sharded, what the main process writes them from
        if shards(accelerator):
            self._shard()
        else:
            self.model, self.optimizer = accelerator.prepare(self.task, build_optimizer(self.task, cfg.optimizer))
        if cfg.student and cfg.student.compile:
            compile_student(student)
        self._losses: list[dict[str, Tensor]] = []
        self._statistics = Statistics(self.task)

    @property
    def patches(self) -> int:
        """Patches of the grid on which masks are drawn."""
        return self.sizes.mask[0] * self.sizes.mask[1]

    def learn(self, batch: Batch, answers: Sequence[Answer], step: int, micro: int) -> None:
        """Forward and backward of micro-batch `micro` of a step; with the step's last one processes share gradients.

        batch: on the device. answers: what each teacher says about its images.
        """
        if micro == 0:
            self._statistics.keep()
        # What the network itself draws (drop path) is a function of the step, so no random state has to be saved.
        key = (self.cfg.run.seed, step, micro, self._accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        last = micro == self.cfg.run.accumulate - 1
        with contextlib.nullcontext() if last else no_sync(self._accelerator, self.model):
            parts = self.model(batch.images, batch.mask, answers, batch.labels)  # {"token": [], ...}, weighted
            self._accelerator.backward(fail_together(sum(parts.values())) / self.cfg.run.accumulate)
        self._losses.append({name: loss.detach() for name, loss in parts.items()})

    def update(self, rate: float) -> Outcome:
        """Step unless the gradient is not finite, and average the weights. Nothing waits for the device."""
        set_rate(self.optimizer, rate)
        norm, skipped = finite_step(self._accelerator, self.optimizer, self.cfg.optimizer.clip_grad)
        self._statistics.restore(skipped)
        if self.ema is not None:
            average_unless(skipped, self.ema, self.task.student)
        losses, self._losses = self._losses, []
        return Outcome(losses, norm, skipped)

    def leave_step(self) -> None:
        """Take back what micro-batches of a step that will not be finished have changed: statistics."""
        self._statistics.restore(torch.ones((), dtype=torch.bool, device=self._accelerator.device))

    def write_student(self) -> Path:
        """Write student.safetensors, the backbone alone, and head.safetensors, its classifier where it has one.

        The main process writes; all call it, as they hold shares of the weights perhaps.
        """
        path, task = self.directory / "student.safetensors", self._written(self.task, self._plain)
        if self._accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_file(path, lambda pending: save_encoder(merged(task.student), pending))
            if (head := task.classifier) is not None:
                write_file(path.with_name("head.safetensors"), lambda pending: save_head(head, self.classes, pending))
        return path

    def write_average(self) -> None:
        """Write student_ema.safetensors, where there is an average; called as `write_student` is."""
        if self.ema is None:
            return
        average = self._written(self.ema.module, self._plain.student if self._plain else None)
        if self._accelerator.is_main_process:
            path = self.directory / "student_ema.safetensors"
            write_file(path, lambda pending: save_encoder(merged(average), pending))

    def _shard(self) -> None:
        """Share out the weights and their average among the processes, before the optimiser gets to know them."""
        accelerator, task = self._accelerator, self.task
        if accelerator.is_main_process:
            self._plain = copy.deepcopy(task).cpu()
        self.model = accelerator.prepare_model(task, evaluation_mode=True)  # autocast, and nothing that shards
        shard(task, task.student.blocks(), accelerator.device, methods=("encode", "predict"))
        if self.ema is not None:
            shard(self.ema.module, self.ema.module.blocks(), accelerator.device)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(task, self.cfg.optimizer))

    def _written(self, module: Module, plain: Module | None) -> Module:
        """A module as it can be written: itself, or where it is sharded `plain` with its weights (the main process)."""
        if not is_sharded(module):
            return module
        state = full_state(module, keep=plain is not None)
        if plain is None:
            return module
        plain.load_state_dict(state)
        return plain


def build_learners(
    cfg: Config,
    source: Source | DenseSource,
    teachers: list[Teacher],
    sampler: Sampler,
    total_steps: int,
    accelerator: Accelerator,
    directory: Path,
) -> list[Learner]:
    """A learner for each student of a config. Each is drawn from the random state that the first one begins with.

    InputError where they would not see the same views and masks, as one batch is loaded for all.
    """
    learners: list[Learner] = []
    state = torch.get_rng_state()
    for name, section in cfg.all_students.items():
        torch.set_rng_state(state)
        place = directory if cfg.student else directory / "students" / name
        learners.append(Learner(name, cfg.alone(section), source, teachers, sampler, total_steps, accelerator, place))
        first, own = learners[0].sizes, learners[-1].sizes
        if first.crop != own.crop or (sampler.masked and first.mask != own.mask):
            raise InputError(
                f"students: {learners[0].name} needs views of {first.crop} px and masks of {first.mask[0]} x "
                f"{first.mask[1]} patches, {name} {own.crop} px and {own.mask[0]} x {own.mask[1]}; they learn from the "
                "same: let students.N.image_size give them one grid, or train them one by one"
            )
    return learners
