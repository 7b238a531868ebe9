"""A task of the suite: one small YAML file under `tasks/`, or a user's own anywhere."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.result import Direction, TaskFacts
from proteus.config_files import explain, read_tree
from proteus.errors import InputError, nearest

FOLDER = Path(__file__).with_name("tasks")

Kind = Literal["knn", "linear", "logistic", "transfer", "real", "corruptions", "segmentation", "depth"]
Group = Literal["imagenet", "fine-grained", "dense", "robustness", "extra", "own", "embedded"]
Split = Literal["train", "val", "test"]
Protocol = Literal["proteus", "dinov2"]
METRICS: dict[Kind, tuple[str, ...]] = {
    "knn": ("top-1",),
    "linear": ("top-1",),
    "logistic": ("top-1", "mean per class", "AP11"),
    "transfer": ("top-1",),
    "real": ("top-1",),
    "corruptions": ("mCE", "mean error"),
    "segmentation": ("mIoU",),
    "depth": ("RMSE",),
}
NEEDED: dict[Kind, set[Split]] = {
    "knn": {"train", "test"},
    "linear": {"train", "test"},
    "logistic": {"train", "test"},
    "transfer": {"test"},
    "real": {"test"},
    "corruptions": {"test"},
    "segmentation": {"train", "test"},
    "depth": {"train", "test"},
}


class Section(BaseModel):
    """A part of a task's file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Hub(Section):
    """A copy on the Hugging Face hub, at one commit; `splits` are its names of ours."""

    repo: str
    revision: str
    image: str = "image"
    label: str = "label"
    splits: dict[Split, str]


class Torchvision(Section):
    """The class of torchvision that downloads the official archives, and its arguments, once for each call."""

    name: str
    calls: list[dict[str, Any]] = [{}]


class Data(Section):
    """What a task is measured on.

    set:      a reader of `proteus.data.sets`.
    options:  its options.
    root:     the folder the set lies in, relative to the task's file; --data-root where it is not given.
    splits:   the reader's split for each of train, val and test.
    images:   how many images each split has; classes: how many classes. Both are checked on load.
    source:   where to get the set; weighs: about how much it is.
    """

    set: str
    options: dict[str, Any] = {}
    root: str | None = None
    splits: dict[Split, str]
    images: dict[Split, int | None] = {}
    classes: int | None = None
    source: str = ""
    weighs: str = ""
    torchvision: Torchvision | None = None
    hub: Hub | None = None


class Task(Section):
    """A task.

    number:      its place among the paper's 19.
    size, crop:  images are resized to size / crop (short side) and cropped to size; `own` is the encoder's image size.
    head:        transfer, real, corruptions: the linear task whose head is tested.
    protocol:    the only one it is measured by, whatever --protocol says.
    corruptions: the corruptions, each at severities 1 to 5.
    presets:     segmentation, depth: the preset by protocol.
    settings:    what differs from the protocol or preset; a result of it says so.
    published:   the task's name in published.yaml, where it is not its own.
    """

    id: str = ""
    title: str
    group: Group = "own"
    number: int | None = None
    kind: Kind
    metric: str
    direction: Direction
    data: Data
    size: Annotated[int, Field(gt=0)] | Literal["own"] = "own"
    crop: float = Field(1.0, gt=0, le=1)
    head: str | None = None
    protocol: Protocol | None = None
    corruptions: list[str] = []
    presets: dict[Protocol, str] = {}
    settings: dict[str, Any] = {}
    published: str = ""
    notes: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        if self.metric not in METRICS[self.kind]:
            raise ValueError(f"metric: {self.kind} is measured in {' or '.join(METRICS[self.kind])}")
        if self.direction != ("lower" if self.metric in ("mCE", "mean error", "RMSE") else "higher"):
            raise ValueError(f"direction: {self.metric} is not better when {self.direction}")
        missing = NEEDED[self.kind] - set(self.data.splits)
        if missing:
            raise ValueError(f"data.splits: {self.kind} needs {' and '.join(sorted(missing))}")
        if (self.head is None) == (self.kind in ("transfer", "real", "corruptions")):
            raise ValueError("head: the linear task whose head is tested, for transfer, real and corruptions alone")
        if bool(self.corruptions) != (self.kind == "corruptions"):
            raise ValueError("corruptions: their names, for the kind of that name alone")
        if bool(self.presets) != (self.kind in ("segmentation", "depth")):
            raise ValueError("presets: a preset for each protocol, for segmentation and depth alone")
        return self

    @property
    def smoke(self) -> bool:
        """Whether the task shows the code at work and no more."""
        return self.group == "embedded"

    def facts(self) -> TaskFacts:
        """What a report says of it."""
        return TaskFacts(
            task=self.id,
            title=self.title,
            group=self.group,
            kind=self.kind,
            metric=self.metric,
            direction=self.direction,
            smoke=self.smoke,
            paper=self.number is not None,
            published=self.published or self.id,
        )


def read_task(path: Path) -> Task:
    """A task's file; InputError with a line for each thing that is wrong with it."""
    try:
        tree = read_tree(path, FOLDER)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        task = Task.model_validate({**tree, "id": path.stem})
    except ValidationError as error:
        raise InputError(*explain(error, path.name, Task)) from None
    if task.data.root is not None:
        task.data.root = os.path.realpath(path.parent / os.path.expanduser(task.data.root))
    return task


def all_tasks() -> dict[str, Task]:
    """Every task of the suite by id: the paper's 19 in its order, then the others."""
    tasks = [read_task(path) for path in sorted(FOLDER.glob("*.yaml"))]
    return {task.id: task for task in sorted(tasks, key=lambda task: (task.number is None, task.number, task.id))}


def choose_tasks(words: list[str]) -> tuple[dict[str, Task], set[str]]:
    """The tasks that --tasks asks for, and the ids of those it asks for by name: their data must be there.

    A word is `all` (the paper's 19), a group, an id, or a path to a user's own YAML file.
    """
    known = all_tasks()
    groups = {task.group for task in known.values()}
    chosen: dict[str, Task] = {}
    by_name: set[str] = set()
    for word in (part for words_ in words for part in words_.split(",") if part):
        if word == "all":
            chosen |= {key: task for key, task in known.items() if task.number}
        elif word in groups:
            chosen |= {key: task for key, task in known.items() if task.group == word}
        elif word in known:
            chosen[word] = known[word]
            by_name.add(word)
        elif word.endswith((".yaml", ".yml")):
            task = read_task(Path(word))
            if task.id in known or task.id in chosen:
                where = "a task of the suite" if task.id in known else "the name of another file"
                raise InputError(f"--tasks {word}: {task.id!r} is {where} already; give the file another name")
            chosen[task.id] = task
            by_name.add(task.id)
        else:
            valid = ["all", *sorted(groups), *known]
            raise InputError(f"--tasks {word}: no such task, group or .yaml file{nearest(word, valid)}")
    if not chosen:
        raise InputError("--tasks names no task")
    return chosen, by_name


def with_heads(tasks: dict[str, Task]) -> dict[str, Task]:
    """The tasks and the linear ones whose heads they test, linear ones first."""
    known = all_tasks()
    needed = {}
    for task in tasks.values():
        if task.head is not None:
            head = tasks.get(task.head) or known.get(task.head)
            if head is None or head.kind != "linear":
                raise InputError(f"{task.id}: head: {task.head!r} is no linear task of the suite or among --tasks")
            needed[head.id] = head
    return {**{key: task for key, task in (needed | tasks).items() if task.kind == "linear"}, **tasks}
