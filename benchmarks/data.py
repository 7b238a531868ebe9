"""The images of a task: its official folders, else a copy of the hub; checked against the counts of its file."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.result import NotRun
from benchmarks.task import Hub, Split, Task
from proteus.data.dense import DenseSource
from proteus.data.sets import open_set
from proteus.data.sets.hub import hub_source
from proteus.data.sources import Source
from proteus.errors import InputError, MissingDataError
from proteus.evaluation.extract import fingerprint
from proteus.evaluation.linear_head import class_subset

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SEVERITIES = range(1, 6)


class TaskData:
    """Opens the splits of tasks, each once, however many models look at it."""

    def __init__(self, root: Path | None, download: bool = False):
        self._root, self._download = Path(os.path.realpath(os.path.expanduser(root))) if root else None, download
        if self._root is not None and not self._root.is_dir():
            raise InputError(f"--data-root {root}: no such folder")
        self._opened: dict[str, Any] = {}
        self._from_hub: set[str] = set()

    def open(self, task: Task, split: Split, **options: Any) -> Any:
        """The Source or DenseSource of a split.

        MissingDataError where it is not there: it says what was looked for and where to get it. InputError where it is
        not what the task's file says.
        """
        key = f"{task.data.model_dump_json()} {split} {sorted(options.items())}"
        if key not in self._opened:
            source = self._find(task, split, options)
            _check(task, split, source)
            self._opened[key] = source
        return self._opened[key]

    def parts(self, task: Task) -> Iterator[Any]:
        """Everything a task looks at, opened and checked: its splits, or a corrupted set after the other."""
        if task.corruptions:
            for corruption in task.corruptions:
                for severity in SEVERITIES:
                    yield self.open(task, "test", corruption=corruption, severity=severity)
        else:
            opened = {split: self.open(task, split) for split in SPLITS if split in task.data.splits}
            _same_classes(task, opened)
            yield from opened.values()

    def fingerprint(self, task: Task) -> str:
        """A hash of where a task's images lie, how they are read, and what `extract` sees of them."""
        how = task.data.model_dump(mode="json", include={"set", "options", "splits"})
        facts = [self.where(task), how, *(fingerprint(source) for source in self.parts(task))]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def where(self, task: Task) -> str:
        """Where a task's images come from, for its result."""
        if task.id in self._from_hub and task.data.hub is not None:
            return f"{task.data.hub.repo} at {task.data.hub.revision[:12]}"
        return task.data.root or (str(self._root) if self._root and not task.smoke else task.data.source)

    def _find(self, task: Task, split: Split, options: dict[str, Any]) -> Source | DenseSource:
        data = task.data
        root = Path(data.root) if data.root else self._root
        where = (
            f"; get it from {data.source}" + (f", about {data.weighs}" if data.weighs else "") if data.source else ""
        )
        if root is None and not task.smoke:
            raise MissingDataError(f"{task.id}: --data-root DIR should hold the set {data.set}{where}")
        try:
            return open_set(data.set, root, data.splits[split], **data.options, **options)
        except MissingDataError as missing:
            if self._download and data.torchvision is not None:
                _download(task, root)
                return open_set(data.set, root, data.splits[split], **data.options, **options)
            if data.hub is not None and split in data.hub.splits:
                try:
                    source = _from_hub(data.hub, split, self._download)
                    self._from_hub.add(task.id)
                    return source
                except MissingDataError as error:
                    if self._download:
                        raise InputError(f"{task.id}: {missing}; and on the hub: {error}") from None
            hint = " (or run with --download)" if data.torchvision or data.hub else ""
            raise MissingDataError(f"{missing}{where}{hint}") from None


def without_data(tasks: dict[str, Task], data: TaskData, demanded: set[str]) -> tuple[list[NotRun], list[NotRun]]:
    """The tasks whose data is not there, and those whose data is wrong; InputError where one of them has to be run."""
    not_run: dict[str, NotRun] = {}
    failed: dict[str, NotRun] = {}
    for task in tasks.values():
        head = tasks[task.head] if task.head else None
        try:
            if head is not None and head.id in (not_run | failed):
                why = (not_run | failed)[head.id].why
                entry = NotRun(task=task.id, model="", why=f"{head.id}, whose head it tests: {why}")
                (not_run if head.id in not_run else failed)[task.id] = entry
                continue
            for source in data.parts(task):
                if head is not None:
                    class_subset(data.open(head, "train").classes, source.classes)
        except MissingDataError as error:
            not_run[task.id] = NotRun(task=task.id, model="", why=one_line(task, error))
        except Exception as error:  # a file of a set may hold anything
            failed[task.id] = NotRun(task=task.id, model="", why=one_line(task, error))
    wrong = [entry for entry in (not_run | failed).values() if entry.task in demanded]
    if not wrong and len(not_run | failed) == len(tasks):
        wrong = list((not_run | failed).values())
    if wrong:
        raise InputError(*(f"{entry.task}: {entry.why}" for entry in wrong))
    return list(not_run.values()), list(failed.values())


def one_line(task: Task, error: Exception) -> str:
    """An error as one line that does not begin with the task's name."""
    text = " ".join(str(error).split())[:600] or type(error).__name__
    return text.removeprefix(f"{task.id}: ")


def _download(task: Task, root: Path | None) -> None:
    """Let torchvision fetch and unpack the official archives below `root`."""
    from torchvision import datasets

    assert task.data.torchvision is not None
    for call in task.data.torchvision.calls:
        try:
            getattr(datasets, task.data.torchvision.name)(root=str(root), download=True, **call)
        except Exception as error:  # the network and the archives have errors of their own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(
                f"{task.id}: the download failed ({reason}); get the set from {task.data.source}"
            ) from None


def _from_hub(hub: Hub, split: Split, download: bool) -> Source:
    return hub_source(
        hub.repo,
        hub.splits[split],
        revision=hub.revision,
        image_column=hub.image,
        label_column=hub.label,
        download=download,
    )


def _same_classes(task: Task, opened: dict[Split, Any]) -> None:
    names = {split: source.classes for split, source in opened.items()}
    first = next(iter(names.values()))
    if all(classes == first for classes in names.values()):
        return
    odd = sorted(set.union(*map(set, names.values())) - set.intersection(*map(set, names.values())))
    told = f"not in all of them: {', '.join(odd[:5])}" if odd else "they are in another order"
    raise InputError(
        f"{task.id}: the splits have not the same classes; {told}" + (f" and {len(odd) - 5} more" if odd[5:] else "")
    )


def _check(task: Task, split: Split, source: Source | DenseSource) -> None:
    """InputError where a split has not as many classes or images as the task's file says."""
    name, classes, images = task.data.splits[split], task.data.classes, task.data.images.get(split)
    if classes is not None and len(source.classes) != classes:
        raise InputError(
            f"{task.id}: split {name!r} has {len(source.classes)} classes, not {classes}, from {source.classes[0]} to "
            f"{source.classes[-1]}: see that each class has its folder and that nothing else lies beside them"
        )
    if not len(source):
        raise InputError(f"{task.id}: split {name!r} holds no image")
    if images is not None and len(source) != images:
        raise InputError(
            f"{task.id}: split {name!r} has {len(source)} images, from {source.name(0)} on; it should have {images}: "
            "the set is incomplete or another version"
        )
