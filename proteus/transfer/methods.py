"""Ways to a small model for the task, each a few stages of training; what they have in common is in `Lab`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState

from proteus.config import LABEL_CE, Config, Data, Ema, Probe, Run, RunBase, Student, Teacher
from proteus.data.dense import IGNORE, DenseSource, is_dense
from proteus.data.sources import Merged, Source, Subset
from proteus.evaluation.extract import View, fingerprint
from proteus.losses.logits import IGNORE_LABEL
from proteus.training.teacher import RANDOM, find_weights
from proteus.transfer.config import Stage, TransferConfig
from proteus.transfer.scores import task_score
from proteus.transfer.stages import Judge, Outcome, run_stage
from proteus.transfer.target import DenseSubset, Target

EVAL_BATCH = 64
ADAPT = "adapt"  # the folder of the stage that trains the teacher


@dataclass(frozen=True)
class Method:
    """What it is called in tables, and its stages: the last holds the student, the first may adapt the teacher."""

    title: str
    run: Callable[["Lab"], list[Outcome]]
    adapts: bool = False


class Lab:
    """One seed of a transfer: the task's images, the teacher, and a way to train a stage in `folder`/<name>.

    further:      unlabelled images besides the target's own.
    transfer_set: all unlabelled images that the student learns on.
    """

    def __init__(self, cfg: TransferConfig, target: Target, further: Source | None, seed: int, folder: Path):
        self.cfg, self.target, self.seed, self.folder = cfg, target, seed, folder
        sources = [target.unlabelled] if cfg.transfer.own else []
        sources += [further] if further is not None else []
        self.transfer_set: Source = sources[0] if len(sources) == 1 else Merged(sources)
        self.view = View(cfg.image_size, cfg.crop, EVAL_BATCH, cfg.run.workers)
        size = cfg.image_size if cfg.student.image_size == "auto" else cfg.student.image_size
        self.student = cfg.student.model_copy(update={"image_size": size})
        with PartialState().local_main_process_first():  # which fetches them, should that be asked for
            weights = find_weights(cfg.teacher)
        self.teacher = cfg.teacher.model_copy(update={"checkpoint": weights or RANDOM})

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
        settings |= {"dir": str(self.folder / name), "seed": self.seed}
        settings |= {"batch_size": stage.batch_size, "accumulate": stage.accumulate}
        whole = Config(
            teacher=teacher,
            student=student,
            losses=losses,
            temperature=cfg.transfer.temperature if "logits_kl" in losses else 1.0,
            head_mix=head_mix,
            data=Data(
                image_size=cfg.image_size,
                repeats=1,
                augment=stage.augment,
                workers=cfg.run.workers,
                max_bad_share=cfg.transfer.max_bad_share,
                max_bad_files=1 if LABEL_CE in losses and teacher is None else cfg.transfer.max_bad_files,
            ),
            optimizer=stage.optimizer,
            schedule=schedule,
            ema=Ema(decay=None),
            probe=Probe(every_epochs=0),
            run=Run(**settings),
        )
        return run_stage(
            whole, source, self._judge(stage) if {LABEL_CE, "logits_kl"} & losses.keys() else None, after=after
        )

    def _judge(self, stage: Stage) -> Judge | None:
        """Accuracy or mIoU on the validation set; None without one."""
        val = self.target.val
        if val is None:
            return None
        identity = f"{fingerprint(val)[:16]} at {self.cfg.crop}"
        return Judge(lambda task: task_score(task.predict, val, self.view), stage.validate_every, identity)

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
            grad_checkpointing=cfg.adapt.grad_checkpointing,
            arch=teacher.arch,
        )
        outcome = self.train(ADAPT, cfg.adapt, learner, {LABEL_CE: 1.0}, self.target.train)
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
        head = before.head if Path(before.head).is_file() else None  # an agnostic transfer has none
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
    on_patches = {"patch_feature": 1.0} if lab.cfg.task == "segmentation" else {}
    transferred = lab.transfer("contrastive", lab.teacher, {"contrastive": 1.0} | on_patches)
    return [transferred, lab.finetune("contrastive", transferred)]


def scratch(lab: Lab) -> list[Outcome]:
    """The labels alone, from the student's first weights: the transfer's rates and batch, the fine-tuning's views."""
    stage = lab.cfg.transfer.model_copy(update={"augment": lab.cfg.finetune.augment})
    return [lab.train("scratch", stage, lab.student, {LABEL_CE: 1.0}, lab.target.train, steps=lab.student_steps)]


def pretrained(lab: Lab, name: str) -> list[Outcome]:
    """The labels alone, from weights that somebody has pretrained: the fine-tuning's rates, the transfer's batch."""
    student = lab.student.model_copy(update={"checkpoint": lab.cfg.pretrained[name]})
    batch = {key: getattr(lab.cfg.transfer, key) for key in ("batch_size", "accumulate", "validate_every")}
    stage = lab.cfg.finetune.model_copy(update=batch)
    return [lab.train(f"pretrained-{name}", stage, student, {LABEL_CE: 1.0}, lab.target.train, steps=lab.student_steps)]


def single_stage(lab: Lab) -> list[Outcome]:
    """Labels and the adapted teacher at once, on separate heads (DHO, arXiv 2505.07675)."""
    adapted, teacher = lab.adapt()
    cfg = lab.cfg.single_stage
    mixed, share = mix_labels(lab.target.train, lab.transfer_set, cfg.labelled)
    # The cross-entropy is a mean over all images of a batch, of which that share counts.
    losses = {LABEL_CE: cfg.ce_weight / share, "logits_kl": 1 - cfg.ce_weight}
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
    "oriented": Method("task-oriented transfer", oriented, adapts=True),
    "single_stage": Method("labels and teacher at once (DHO)", single_stage, adapts=True),
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


def mix_labels(labelled: Source | DenseSource, unlabelled: Source, share: float) -> tuple[Source | DenseSource, float]:
    """A set of which `share` are labelled images, repeated as often as that takes, and the rest unlabelled ones.

    Those have the label -1, or every pixel ignored. Returns the share as well: more, where there are more labelled
    images than asked for.
    """
    few, many = len(labelled), len(unlabelled)
    again = np.arange(few if share == 1 else max(few, round(many * share / (1 - share)))) % few
    if share == 1:
        many = 0
    if is_dense(labelled):
        return MixedPixels(DenseSubset(labelled, again), unlabelled if many else None), len(again) / (len(again) + many)
    repeated = Subset(labelled, again)  # type: ignore[arg-type]
    assert repeated.labels is not None
    mixed = Merged([repeated, unlabelled] if many else [repeated])
    mixed.classes = labelled.classes
    mixed.labels = np.concatenate([repeated.labels, np.full(many, IGNORE_LABEL)])
    return mixed, len(again) / (len(again) + many)


class MixedPixels(Merged):
    """Images with a class for every pixel, then unlabelled ones, whose pixels count nowhere.

    unlabelled_from: the number of the first of those.
    """

    def __init__(self, labelled: DenseSubset, unlabelled: Source | None):
        super().__init__([labelled] if unlabelled is None else [labelled, unlabelled])
        self.classes, self.unlabelled_from = labelled.classes, len(labelled)

    def target(self, index: int) -> np.ndarray:
        source, local = self._place(index)
        if is_dense(source):
            return source.target(local)
        width, height = source.load(local).size
        return np.full((height, width), IGNORE, dtype=np.uint8)
