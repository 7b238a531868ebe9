"""Ways to a small model for the task, each a few stages of training; what they have in common is in `Lab`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from accelerate import PartialState

from proteus.config import LABEL_CE, Config, Data, Ema, Probe, Run, RunBase, Sources, Student, Teacher
from proteus.data.dense import IGNORE, DenseSource, is_dense
from proteus.data.sources import Merged, Source, Subset, build_source
from proteus.errors import InputError
from proteus.evaluation.extract import View
from proteus.losses.logits import IGNORE_LABEL
from proteus.training.task import Distillation
from proteus.training.teacher import RANDOM, find_weights
from proteus.transfer.config import Stage, TransferConfig
from proteus.transfer.scores import task_score
from proteus.transfer.stages import Outcome, run_stage
from proteus.transfer.target import Target

EVAL_BATCH = 64


@dataclass(frozen=True)
class Method:
    """What it is called in tables, and the stages it takes, the last of which holds the student."""

    title: str
    run: Callable[["Lab"], list[Outcome]]


class Lab:
    """One seed of a transfer: the task's images, the teacher, and a way to train a stage in `folder`/<name>."""

    def __init__(self, cfg: TransferConfig, target: Target, seed: int, folder: Path):
        self.cfg, self.target, self.seed, self.folder = cfg, target, seed, folder
        self.view = View(cfg.image_size, cfg.crop, EVAL_BATCH, cfg.run.workers)
        size = cfg.image_size if cfg.student.image_size == "auto" else cfg.student.image_size
        self.student = cfg.student.model_copy(update={"image_size": size})
        with PartialState().local_main_process_first():  # which fetches them, should that be asked for
            weights = find_weights(cfg.teacher)
        self.teacher = cfg.teacher.model_copy(update={"checkpoint": weights or RANDOM})

    @cached_property
    def transfer_set(self) -> Source:
        """The unlabelled images: the target's own, further ones, or both."""
        cfg = self.cfg.transfer
        sources = [self.target.unlabelled] if cfg.own else []
        check_leaks(cfg.data, self.target)
        if cfg.data is not None:
            sources.append(build_source(cfg.data, self.seed))
        return sources[0] if len(sources) == 1 else Merged(sources)

    def train(
        self,
        name: str,
        stage: Stage,
        student: Student,
        losses: dict[str, float],
        source: Source | DenseSource,
        *,
        teacher: Teacher | None = None,
        steps: int | None = None,
        head_mix: float | None = None,
        after: tuple[Outcome, ...] = (),
    ) -> Outcome:
        """Train `student` by the losses on the source, as `stage` says, for its steps or so many."""
        cfg = self.cfg
        schedule = stage.schedule.model_copy(update={"steps": steps or stage.schedule.steps})
        settings = {key: getattr(cfg.run, key) for key in RunBase.model_fields}
        settings |= {"dir": str(self.folder / name), "seed": self.seed, "batch_size": stage.batch_size}
        whole = Config(
            teacher=teacher,
            student=student,
            losses=losses,
            temperature=cfg.transfer.temperature if "logits_kl" in losses else 1.0,
            head_mix=head_mix,
            data=Data(image_size=cfg.image_size, repeats=1, augment=stage.augment, workers=cfg.run.workers),
            optimizer=stage.optimizer,
            schedule=schedule,
            ema=Ema(decay=None),
            probe=Probe(every_epochs=0),
            run=Run(**settings),
        )
        judged = self.target.val is not None and {LABEL_CE, "logits_kl"} & losses.keys()
        return run_stage(whole, source, self.validation_score if judged else None, stage.validate_every, after=after)

    def validation_score(self, task: Distillation) -> float:
        """Accuracy or mIoU on the validation set."""
        assert self.target.val is not None
        return task_score(task.predict, self.target.val, self.view)

    @property
    def student_steps(self) -> int:
        """Updates that every method gives the student."""
        return (self.cfg.transfer.schedule.steps or 0) + (self.cfg.finetune.schedule.steps or 0)

    # -------------------------------------------------------------------------------------------------- the stages

    def adapt(self) -> tuple[Outcome, Teacher]:
        """Stage 1: the teacher learns the task from the few labels. What it is afterwards, as a teacher."""
        cfg, teacher = self.cfg, self.teacher
        learner = Student(
            name=teacher.name,
            checkpoint=None if teacher.checkpoint == RANDOM else teacher.checkpoint,
            tune=cfg.adapt.tune,
            rank=cfg.adapt.rank,
            image_size=teacher.image_size or cfg.image_size,
            compile=teacher.compile,
            arch=teacher.arch,
        )
        outcome = self.train("adapt", cfg.adapt, learner, {LABEL_CE: 1.0}, self.target.train)
        return outcome, teacher.model_copy(update={"checkpoint": outcome.student, "head": outcome.head})

    def transfer(
        self, method: str, teacher: Teacher, losses: dict[str, float], after: tuple[Outcome, ...] = ()
    ) -> Outcome:
        """Stage 2: the student learns from a teacher on the unlabelled images."""
        return self.train(
            f"{method}/transfer",
            self.cfg.transfer,
            self.student,
            losses,
            self.transfer_set,
            teacher=teacher,
            after=after,
        )

    def finetune(self, method: str, before: Outcome) -> Outcome:
        """Stage 3: the student learns from the few labels."""
        head = before.head if Path(before.head).is_file() else None
        student = self.student.model_copy(update={"checkpoint": before.student, "head": head})
        return self.train(
            f"{method}/finetune", self.cfg.finetune, student, {LABEL_CE: 1.0}, self.target.train, after=(before,)
        )


def oriented(lab: Lab) -> list[Outcome]:
    """Task-oriented transfer: the adapted teacher's predictions on the transfer set, then the labels."""
    adapted, teacher = lab.adapt()
    transferred = lab.transfer("oriented", teacher, lab.cfg.transfer.losses, after=(adapted,))
    return [adapted, transferred, lab.finetune("oriented", transferred)]


def agnostic(lab: Lab) -> list[Outcome]:
    """Task-agnostic transfer by Proteus: the frozen teacher's tokens on the transfer set, then the labels."""
    transferred = lab.transfer("agnostic", lab.teacher, {"token": 1.0, "patch": 1.0, "feature": 1.0})
    return [transferred, lab.finetune("agnostic", transferred)]


def contrastive(lab: Lab) -> list[Outcome]:
    """Task-agnostic transfer as the second paper has it: a contrastive loss; for segmentation patch features too."""
    on_patches = {"feature": 1.0} if lab.cfg.task == "segmentation" else {}
    transferred = lab.transfer("contrastive", lab.teacher, {"contrastive": 1.0} | on_patches)
    return [transferred, lab.finetune("contrastive", transferred)]


def scratch(lab: Lab) -> list[Outcome]:
    """The labels alone, from random weights, with the rates of the transfer stage."""
    return [
        lab.train("scratch", lab.cfg.transfer, lab.student, {LABEL_CE: 1.0}, lab.target.train, steps=lab.student_steps)
    ]


def pretrained(lab: Lab, name: str) -> list[Outcome]:
    """The labels alone, from weights that somebody has pretrained."""
    student = lab.student.model_copy(update={"checkpoint": lab.cfg.pretrained[name]})
    folder = f"pretrained-{name}"
    return [lab.train(folder, lab.cfg.finetune, student, {LABEL_CE: 1.0}, lab.target.train, steps=lab.student_steps)]


def single_stage(lab: Lab) -> list[Outcome]:
    """Labels and the adapted teacher at once, on separate heads (DHO, arXiv 2505.07675)."""
    adapted, teacher = lab.adapt()
    cfg = lab.cfg.single_stage
    # The cross-entropy is a mean over all images of a batch, of which `labelled` count.
    losses = {LABEL_CE: cfg.ce_weight / cfg.labelled, "logits_kl": 1 - cfg.ce_weight}
    mixed = mix_labels(lab.target.train, lab.transfer_set, cfg.labelled)
    student = lab.train(
        "single_stage",
        lab.cfg.transfer,
        lab.student,
        losses,
        mixed,
        teacher=teacher,
        steps=lab.student_steps,
        head_mix=cfg.mix,
        after=(adapted,),
    )
    return [adapted, student]


METHODS: dict[str, Method] = {
    "oriented": Method("task-oriented transfer", oriented),
    "single_stage": Method("labels and teacher at once (DHO)", single_stage),
    "agnostic": Method("task-agnostic transfer (Proteus losses)", agnostic),
    "contrastive": Method("task-agnostic transfer (contrastive)", contrastive),
    "scratch": Method("labels alone, from scratch", scratch),
}


def methods_of(cfg: TransferConfig) -> dict[str, Method]:
    """The methods by name, with those that start from the config's pretrained students."""
    given = {
        f"pretrained-{name}": Method(f"fine-tuned from {name}", partial(pretrained, name=name))
        for name in cfg.pretrained
    }
    return METHODS | given


def check_leaks(data: Sources | None, target: Target) -> None:
    """InputError where images to be validated or tested on lie in a folder of the transfer set."""
    parts = [] if data is None else [data, *data.merge]
    roots = [os.path.realpath(Path(p.root or "", p.split or "")) for p in parts if p.kind == "folder" and p.root]
    for split, source in (("val", target.val), ("test", target.test)):
        for index in range(len(source) if source is not None and roots else 0):
            name = os.path.realpath(source.name(index))  # type: ignore[union-attr]
            if any(name.startswith(root + os.sep) for root in roots):
                raise InputError(
                    f"transfer.data holds {source.name(index)} of target.{split}: "  # type: ignore[union-attr]
                    "give a folder without the images that are validated or tested on"
                )


def mix_labels(labelled: Source | DenseSource, unlabelled: Source, share: float) -> Source | DenseSource:
    """A set of which `share` are labelled images, repeated as often as that takes, and the rest unlabelled ones.

    Those have the label -1, or every pixel ignored.
    """
    few, many = len(labelled), len(unlabelled)
    again = np.arange(few if share == 1 else max(few, round(many * share / (1 - share)))) % few
    if is_dense(labelled):
        return _MixedPixels(labelled, again, unlabelled if share < 1 else None)
    repeated = Subset(labelled, again)  # type: ignore[arg-type]
    assert repeated.labels is not None
    mixed = Merged([repeated, unlabelled] if share < 1 else [repeated])
    mixed.classes = labelled.classes
    mixed.labels = np.concatenate([repeated.labels, np.full(len(mixed) - len(again), IGNORE_LABEL)])
    return mixed


class _MixedPixels:
    """Images with a class for every pixel, then unlabelled ones, whose pixels count nowhere."""

    def __init__(self, labelled: DenseSource, again: np.ndarray, unlabelled: Source | None):
        self.labelled, self.again, self.unlabelled = labelled, again, unlabelled
        self.classes = labelled.classes

    def __len__(self) -> int:
        return len(self.again) + (0 if self.unlabelled is None else len(self.unlabelled))

    def _place(self, index: int) -> tuple[Source | DenseSource, int]:
        if index < len(self.again):
            return self.labelled, int(self.again[index])
        assert self.unlabelled is not None
        return self.unlabelled, index - len(self.again)

    def load(self, index: int):
        source, place = self._place(index)
        return source.load(place)

    def target(self, index: int) -> np.ndarray:
        if index < len(self.again):
            return self.labelled.target(int(self.again[index]))
        width, height = self.load(index).size
        return np.full((height, width), IGNORE, dtype=np.uint8)

    def name(self, index: int) -> str:
        source, place = self._place(index)
        return source.name(place)
