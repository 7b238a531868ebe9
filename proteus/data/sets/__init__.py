"""Data sets of the benchmarks, read from the folders their authors publish. Nothing here downloads anything."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proteus.data.dense import DenseSource
from proteus.data.sets import cifar, cub, dense, embedded, fine_grained, folder, imagenet, listed
from proteus.data.sources import Source
from proteus.errors import InputError, nearest

SETS: dict[str, Callable[..., Any]] = {
    "aircraft": fine_grained.aircraft,
    "caltech101": fine_grained.caltech101,
    "cars": fine_grained.cars,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "dtd": fine_grained.dtd,
    "flowers": fine_grained.flowers,
    "food": fine_grained.food,
    "pets": fine_grained.pets,
    "sun397": fine_grained.sun397,
    "voc2007": fine_grained.voc2007,
    "cub": cub.cub,
    "in1k": imagenet.in1k,
    "in-real": imagenet.in_real,
    "in-v2": imagenet.in_v2,
    "in-sketch": imagenet.in_sketch,
    "in-a": imagenet.in_a,
    "in-r": imagenet.in_r,
    "in-c": imagenet.in_c,
    "ade20k": dense.ade20k,
    "nyu": dense.nyu,
    "folder": folder.folder,
    "folder-segmentation": folder.folder_segmentation,
    "folder-depth": folder.folder_depth,
    "listed": listed.listed,
    "digits": embedded.digits,
    "scenes": embedded.scenes,
    "scenes-depth": embedded.scenes_depth,
}


def open_set(name: str, root: Path | str | None, split: str, **options: Any) -> Source | DenseSource:
    """A split of a set that lies under `root`, or under root/<name>; its reader's docstring says in which layout.

    root: None for the embedded sets alone.

    MissingDataError where the set is not there; InputError where a part of it is missing or broken, or where the set
    has no such split or option. How many images and classes a split should have, a reader does not know.
    """
    if name not in SETS:
        raise InputError(f"no data set {name!r}{nearest(name, SETS)}")
    known = list(inspect.signature(SETS[name]).parameters.values())[2:]
    for key in options:
        if key not in {parameter.name for parameter in known}:
            hint = nearest(key, [parameter.name for parameter in known]) if known else "; it has none"
            raise InputError(f"{name}: no option {key!r}{hint}")
    for parameter in known:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise InputError(f"{name}: needs the option {parameter.name!r}")
    if root is None and SETS[name].__module__ != embedded.__name__:
        raise InputError(f"{name}: needs the folder in which it lies")
    return SETS[name](None if root is None else Path(root).expanduser(), split, **options)
