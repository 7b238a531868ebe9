"""What an evaluation leaves behind: typed, written whole or not at all."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from proteus.engine.atomic import write_file

Direction = Literal["higher", "lower"]
Role = Literal["model", "teacher", "compared"]


class Record(BaseModel):
    """A part of results.json."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # an absent class has no IoU


class Model(Record):
    """A network that was evaluated.

    label:   what the command line called it.
    weights: SHA-256 of its weights and input convention.
    """

    label: str
    role: Role
    name: str
    weights: str
    parameters: int
    image_size: int | tuple[int, int]


class Picture(Record):
    """A test image with what was predicted for it: a PNG beside the result, `file` its name."""

    title: str
    file: str


class Result(Record):
    """One task of one model.

    key:       what the result depends on, hashed: a result of another key is of something else.
    score:     of the task's metric: percent, or metres for a depth error.
    protocol:  the name of the protocol the figure was made by.
    statistics: the mean and standard deviation that images were normalised with.
    figures:   other figures of the same evaluation.
    data:      where the images came from.
    """

    key: str
    task: str
    model: str
    score: float
    protocol: str
    normalize: Literal["own", "protocol"]
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    figures: dict[str, float] = {}
    warnings: list[str] = []
    pictures: list[Picture] = []
    data: str = ""
    seconds: float = 0.0


class NotRun(Record):
    """A task without a score, and why."""

    task: str
    model: str
    why: str


class TaskFacts(Record):
    """What a report says of a task. paper: whether it is one of the paper's 19."""

    task: str
    title: str
    group: str
    kind: str
    metric: str
    direction: Direction
    smoke: bool
    paper: bool
    published: str


class Results(Record):
    """results.json. published: names of published.yaml whose figures are shown beside those of the models."""

    proteus: str
    command: str
    created: str
    device: str
    normalize: Literal["own", "protocol"]
    models: list[Model]
    tasks: list[TaskFacts]
    results: list[Result]
    not_run: list[NotRun]
    published: list[str] = []

    def score_of(self, model: str, task: str) -> Result | None:
        """The result of a model, by its label, in a task."""
        return next((r for r in self.results if (r.model, r.task) == (model, task)), None)


def write_json(path: Path, record: Record) -> None:
    """Write a record as a file that is there whole or not at all."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for any text."""
    write_file(path, lambda pending: pending.write_text(text, encoding="utf-8"))


def read_result(path: Path) -> Result | None:
    """A result of an earlier run; None where there is none, or none that this version can read."""
    try:
        return Result.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
