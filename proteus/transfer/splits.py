"""The target's images as folders: what `tools/retrieve.py` takes for queries, and what it must not retrieve."""

import os
from pathlib import Path

import numpy as np

from proteus.data.dense import DenseSource
from proteus.data.sources import Source
from proteus.engine.atomic import write_folder
from proteus.errors import InputError
from proteus.transfer.target import Target


def write_splits(target: Target, folder: Path) -> dict[str, int]:
    """Links to the images: `folder`/labelled, /val and /test, with a folder for each class where images have one.

    Returns how many images each holds. InputError where images are no files, or where `folder` is there already.
    """
    if folder.exists():
        raise InputError(f"--write-splits {folder}: is there already; give a new folder")
    parts = {"labelled": target.train, "val": target.val, "test": target.test}
    for name in target.classes:
        if name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > 200:
            raise InputError(f"--write-splits: class {name!r} cannot be the name of a folder")
    present = {name: source for name, source in parts.items() if source is not None}

    def fill(pending: Path) -> None:
        for name, source in present.items():
            _link(source, pending / name)

    write_folder(folder, fill)
    return {name: len(source) for name, source in present.items()}


def _link(source: Source | DenseSource, folder: Path) -> None:
    labels: np.ndarray | None = getattr(source, "labels", None)
    digits = len(str(len(source)))
    for index in range(len(source)):
        path = Path(source.name(index))
        if not path.is_file():
            raise InputError(f"--write-splits: {source.name(index)} is no file that a link could lead to")
        inside = folder if labels is None else folder / source.classes[labels[index]]
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{index:0{digits}d}_{path.name}").symlink_to(path.resolve())
