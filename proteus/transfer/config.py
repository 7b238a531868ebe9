"""The typed tree behind `configs/transfer/*.yaml`: a task with few labels, a teacher, a student, three stages.

Nothing here imports torch: a typo is reported at once.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from proteus.config import (
    LABEL_CE,
    Augment,
    Flag,
    NonNegative,
    Optimizer,
    Positive,
    Probability,
    RunBase,
    Schedule,
    Section,
    Share,
    Sources,
    Student,
    Teacher,
)

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Split(Section):
    """Labelled images: a split of the target's set, or a seeded choice from it.

    Where several of train, val and test choose from one split of the set they get different images: test first, then
    val, then train.
    """

    split: str  # the set's name for it: a subfolder, or for `listed` a label file
    per_class: Positive | None = None  # at most so many images of each class
    images: Positive | None = None  # so many images in all

    @model_validator(mode="after")
    def _one_budget(self) -> "Split":
        if self.per_class and self.images:
            raise ValueError("give either per_class or images (null takes one away)")
        return self


class Target(Section):
    """The task: a set of `proteus.data.sets` and which of its images are labelled, chosen with, and tested on."""

    set: str = "folder"
    root: str | None = None
    options: dict[str, Any] = {}  # of the set's reader
    train: Split  # per_class or images is the label budget; what is left over joins the transfer set without its labels
    val: Split | None = None  # without it every stage keeps its last weights
    test: Split | None = None  # without it nothing is tested


class Stage(Section):
    """How one stage trains."""

    batch_size: Positive = 64  # images a process sees at once
    accumulate: Positive = 1  # micro-batches to an update
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    augment: Augment = Augment()  # of images; labelled pixels are seen as in DINOv2's linear segmentation
    validate_every: Positive = 100  # steps; the best of these is kept

    @model_validator(mode="after")
    def _in_steps(self) -> "Stage":
        if self.schedule.steps is None:
            raise ValueError("schedule: give steps, not epochs: methods are compared at equal steps")
        return self


class Adapt(Stage):
    """The teacher learns the task: all of it, a linear head on it, or adapters of low rank beside its linear layers."""

    tune: Literal["all", "head", "lora"] = "head"
    rank: Positive = 8  # of lora
    grad_checkpointing: Flag = False  # compute activations again in backward instead of keeping them


class Transfer(Stage):
    """The student learns from the teacher on unlabelled images."""

    losses: dict[str, NonNegative] = {"logits_kl": 1.0}  # losses on features may be added to that on predictions
    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    data: Sources | None = None  # unlabelled images beside the target's own
    own: Flag = True  # the target's training images belong to the transfer set, without their labels
    max_bad_share: Probability = 0.01  # it stops when more than this share of the files ...
    max_bad_files: Annotated[int, Field(ge=0)] = 10  # ... and at least this many cannot be read


class SingleStage(Section):
    """Labels and teacher at once on separate heads (DHO), for as many steps as transfer and finetune together."""

    ce_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the cross-entropy with labels; the rest is the teacher's
    labelled: Share = 0.5  # of a batch
    mix: Probability = 0.5  # of the labelled head in the prediction; the rest is the other head's


class TransferRun(RunBase):
    """The run; its seed decides the choice of labels, the weights, and the order of the data."""

    seeds: Annotated[int, Field(gt=0, le=1000)] = 3  # that --compare runs, from `seed` on
    keep: Positive = 1
    workers: Annotated[int, Field(ge=0)] = 8


class TransferConfig(Section):
    """A run of `tools/transfer.py`."""

    task: Literal["classification", "segmentation"] = "classification"
    image_size: Positive = 224
    crop: Share = 0.875  # centre crop at validation and test: image_size / crop is the short side it is cut from
    teacher: Teacher
    student: Student
    pretrained: dict[FolderName, str] = {}  # name: file of the student's weights; a baseline each for --compare
    target: Target
    adapt: Adapt
    transfer: Transfer
    finetune: Stage
    single_stage: SingleStage = SingleStage()
    run: TransferRun = TransferRun()

    @model_validator(mode="after")
    def _possible(self) -> "TransferConfig":
        for key in ("losses", "head", "standardize"):
            if getattr(self.teacher, key):
                raise ValueError(
                    f"teacher.{key} has no place here: the stages give the teacher its task and its losses"
                )
        if self.teacher.normalize != "own":
            raise ValueError(
                f"teacher.normalize={self.teacher.normalize} has no place here: an adapted teacher keeps its own"
            )
        if self.student.head or self.student.tune != "all":
            raise ValueError("student.head and student.tune have no place here: the stages give the student its head")
        if not self.transfer.losses.get("logits_kl"):
            raise ValueError(
                "transfer.losses: logits_kl, what makes the transfer task-oriented, needs a weight above 0"
            )
        if self.transfer.losses.get(LABEL_CE):
            raise ValueError(f"transfer.losses: {LABEL_CE} needs labels, and the transfer set has none")
        if self.transfer.data is None and not self.transfer.own:
            raise ValueError("transfer: no images to transfer on: give transfer.data, or own=true")
        return self
