"""The target task's images: which are labelled, which choose between checkpoints, which are tested on, and the rest."""

import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from proteus.data.dense import DenseSource
from proteus.data.sets import open_set
from proteus.data.sources import Source, Subset, file_of
from proteus.errors import InputError, nearest
from proteus.transfer import config
from proteus.transfer.config import Split, TransferConfig

STREAMS = {"train": 30, "val": 31, "test": 32}  # second words of the generators' seeds


class Unlabelled(Subset):
    """Some images of a source, dense or not, without what is known about them."""

    def __init__(self, source: Source | DenseSource, indices: np.ndarray):
        self.source, self.indices = source, indices  # type: ignore[assignment]
        self.labels, self.classes = None, []


class DenseSubset(Subset):
    """Some images of a dense source, in the order given, with their targets."""

    def __init__(self, source: DenseSource, indices: np.ndarray):
        self.dense, self.indices, self.labels, self.classes = source, indices, None, source.classes
        self.source = source  # type: ignore[assignment]

    def target(self, index: int) -> np.ndarray:
        return self.dense.target(int(self.indices[index]))


class Target(NamedTuple):
    """The data of a task.

    train:      the labelled images, at least one of each class where an image has a class.
    val, test:  numbered as `classes`, some of which they may lack; None where the config has none.
    unlabelled: the images of the training split that are not in val or test, the labelled ones among them.
    classes:    those of the training split.
    """

    train: Source | DenseSource
    val: Source | DenseSource | None
    test: Source | DenseSource | None
    unlabelled: Source
    classes: list[str]


def open_splits(cfg: TransferConfig) -> dict[str, Any]:
    """The splits of the target's set that the task names, whole, by their names; the training split's comes first."""
    target = cfg.target
    opened = {target.train.split: _open(cfg, "train", None)}
    classes = opened[target.train.split].classes
    for part, split in _held_out(target).items():
        if split.split not in opened:
            opened[split.split] = _open(cfg, part, classes)
    return opened


def open_target(cfg: TransferConfig, seed: int, opened: dict[str, Any] | None = None) -> Target:
    """Choose the task's images from the target's splits, which are opened if they are not given. No image is read.

    What is in val and test depends on the set alone, and what of train is labelled on `seed` as well; with one seed, a
    smaller label budget is a part of a larger one. Chosen are so many of each class, or of all classes in proportion.

    InputError where the set is not of the task's kind, where a split is missing or too small for its budget, where a
    class has no labelled image or is not among the training split's, and where two splits hold the same image.
    """
    target = cfg.target
    opened, held_out = open_splits(cfg) if opened is None else opened, _held_out(target)
    train = opened[target.train.split]
    classes = train.classes
    left = {name: np.arange(len(source)) for name, source in opened.items()}
    views: dict[str, Any] = {}
    for part, split in held_out.items():
        source, rest = opened[split.split], left[split.split]
        chosen = _choose(source, rest, split, part, np.random.default_rng((0, STREAMS[part])))
        left[split.split] = np.setdiff1d(rest, chosen, assume_unique=True)
        views[part] = _view(source, chosen, classes, part)
    rest = left[target.train.split]
    chosen = _choose(train, rest, target.train, "train", np.random.default_rng((seed, STREAMS["train"])))
    labelled, unlabelled = _view(train, chosen, classes, "train"), Unlabelled(train, rest)
    if cfg.task == "classification":
        _check_every_class(labelled)
    _check_apart(target, {**views, "train": unlabelled})
    return Target(labelled, views.get("val"), views.get("test"), unlabelled, classes)


def check_leaks(source: Source, target: Target) -> None:
    """InputError where an image to be validated or tested on is in a transfer set as well, as itself or as a link."""
    held_out: dict[str, str] = {}
    for split, images in (("val", target.val), ("test", target.test)):
        for index in range(0 if images is None else len(images)):
            held_out[real_path(file_of(images, index))] = split
    for index in range(len(source) if held_out else 0):
        path = real_path(file_of(source, index))
        if path in held_out:
            raise InputError(
                f"transfer.data holds {file_of(source, index)}, an image of target.{held_out[path]}: "
                "give images without those that are validated or tested on"
            )


def real_path(name: str) -> str:
    """Where the file of an image lies, links followed, as fast for many in a folder as for a few."""
    folder, file = os.path.split(name)
    path = os.path.join(_real_folder(folder), file)
    return os.path.realpath(path) if os.path.islink(path) else path


@lru_cache(maxsize=2**14)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _held_out(target: config.Target) -> dict[str, Split]:
    """Test and validation, in the order in which they choose."""
    return {part: split for part, split in (("test", target.test), ("val", target.val)) if split is not None}


def _open(cfg: TransferConfig, part: str, classes: list[str] | None) -> Any:
    """A split of the set, checked to be of the task's kind.

    classes: those of the training split, for a set that would otherwise number each split's for itself.
    """
    target, split = cfg.target, getattr(cfg.target, part).split
    given = {"classes": classes} if target.set == "listed" and classes else {}
    try:
        source: Any = open_set(target.set, target.root, split, **{**target.options, **given})
    except InputError as error:
        hint = "; target.root=PATH names it" if target.root is None and "needs the folder" in str(error) else ""
        raise InputError(f"target.{part}: {error}{hint}") from None
    for name in source.classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"target.{part}: class {name!r} is not named in UTF-8: rename it, or save the file so"
            ) from None
    dense = hasattr(source, "target")
    if cfg.task == "segmentation" and not (dense and source.classes):
        raise InputError(
            f"target.set={target.set}: task=segmentation needs a set with a class for every pixel, such as ade20k or "
            "folder-segmentation"
        )
    labels = None if dense else source.labels
    if cfg.task == "classification" and (labels is None or labels.ndim != 1):
        has = "a value for every pixel" if dense else "no labels" if labels is None else "several labels an image"
        raise InputError(f"target.set={target.set}: task=classification needs one class an image; this set has {has}")
    return source


def _choose(source: Any, rest: np.ndarray, split: Split, part: str, rng: np.random.Generator) -> np.ndarray:
    """The numbers, sorted, of the images of `rest` that a part of the task takes."""
    where = f"split {split.split!r} has {len(source)} images"
    if not len(rest):
        raise InputError(f"target.{part}: {where}, and none is left of them; give what else takes from it a budget")
    if split.images and split.images > len(rest):
        raise InputError(f"target.{part}.images={split.images}: {where}, of which {len(rest)} are left")
    if hasattr(source, "target"):
        if split.per_class:
            raise InputError(f"target.{part}.per_class: an image of a segmentation set has no one class; give images")
        return np.sort(rng.permutation(rest)[: split.images])
    labels = source.labels[rest]
    places, counts = _places_in_class(labels, rng)
    if split.per_class:
        return rest[places < split.per_class]
    # Webster's method: class c gets about n * share of c, in all exactly n, and never fewer when n grows.
    order = np.lexsort((rng.permutation(len(counts))[labels], (places + 0.5) / counts[labels]))
    return np.sort(rest[order[: split.images]])


def _places_in_class(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each image's place [n] in a random order of its class, from 0; and how many images a class has [classes]."""
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    places = np.empty(len(labels), dtype=np.int64)
    places[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, counts


def _view(source: Any, chosen: np.ndarray, classes: list[str], part: str) -> Subset | DenseSubset:
    """The chosen images of a source, their classes numbered as the training split's."""
    if hasattr(source, "target"):
        if source.classes != classes:
            raise InputError(
                f"target.{part}: its classes ({len(source.classes)}: {source.classes[0]}, ...) are not those of "
                f"target.train ({len(classes)}: {classes[0]}, ...)"
            )
        return DenseSubset(source, chosen)
    view = Subset(source, chosen)
    if view.classes != classes:
        number = {name: label for label, name in enumerate(classes)}
        labels = source.labels[chosen]
        for label in np.unique(labels):
            name = source.classes[label]
            if name not in number:
                raise InputError(f"target.{part}: class {name!r} is not among target.train's{nearest(name, classes)}")
        view.labels = np.array([number.get(name, -1) for name in source.classes], dtype=np.int64)[labels]
        view.classes = classes
    return view


def _check_every_class(train: Any) -> None:
    lacking = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(lacking):
        more = f" nor of {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise InputError(
            f"target.train: none of its {len(train)} labelled images is of class {train.classes[lacking[0]]!r}{more}: "
            "raise the budget, or leave the class out"
        )


def _check_apart(target: config.Target, views: dict[str, Any]) -> None:
    """InputError for an image in two of test, val and train: possible only where they are of differing splits."""
    splits = {part: getattr(target, part).split for part in views}
    if len(set(splits.values())) == 1:
        return
    owner: dict[str, str] = {}
    for part, view in views.items():
        for index in range(len(view)):
            name = real_path(file_of(view, index))
            other = owner.get(name)
            if other and splits[other] != splits[part]:
                raise InputError(
                    f"target.{part}: {name} is in target.{other} as well: take it out of {splits[part]!r} or of "
                    f"{splits[other]!r}"
                )
            if part != "train":  # the last, and by far the largest
                owner[name] = part
