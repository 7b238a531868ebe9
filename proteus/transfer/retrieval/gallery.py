"""What is searched, and with what: folders and datasets whose images can be found again on disk."""

import hashlib
import io
import os
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from proteus.data.huggingface import HuggingFaceSource
from proteus.data.sources import EXTENSIONS, FolderSource, Merged
from proteus.errors import InputError
from proteus.evaluation.extract import fingerprint

HUB = "hf:"


class Photos(FolderSource):
    """A folder of images, each called by its whole path. `option` is what messages call the folder."""

    def __init__(self, root: Path, option: str):
        if not root.is_dir():
            raise InputError(f"{option} {root}: no such folder; give a folder of images")
        try:
            super().__init__(Path(os.path.abspath(root)))
        except InputError as error:
            raise InputError(str(error).replace("data:", f"{option}:", 1)) from None

    def name(self, index: int) -> str:
        return str(self.root / super().name(index))

    def stored(self, index: int) -> tuple[str, Path]:
        """The image's name without its folders, and its file."""
        path = Path(self.name(index))
        return path.name, path

    @cached_property
    def contents(self) -> str:
        """A hash of every file's path, size and time of change."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(_described(self.name(index)))
        return digest.hexdigest()


class Stored(HuggingFaceSource):
    """A dataset of Hugging Face, with the bytes of its images as they are stored."""

    def __init__(self, root: str, split: str | None, download: bool, option: str):
        try:
            super().__init__(root, split, True, download, where=f"{option} {HUB}{root}")
        except InputError as error:
            raise InputError(str(error).replace("data.download=true", "--download")) from None

    def stored(self, index: int) -> tuple[str, bytes]:
        """A name for the image that ends as its format does, and its bytes; those of a PNG where the format is rare."""
        row = self._data[int(index)][self._column]
        content = row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()
        stem = Path(row["path"]).stem if row.get("path") else f"{index:08d}"
        with Image.open(io.BytesIO(content)) as image:
            ending = f".{(image.format or '').lower()}".replace(".jpeg", ".jpg")
        if ending not in EXTENSIONS:
            buffer, ending = io.BytesIO(), ".png"
            self.load(index).save(buffer, "png")
            content = buffer.getvalue()
        return stem + ending, content

    @cached_property
    def contents(self) -> str:
        """A hash of the files the dataset is read from and of what `fingerprint` looks at."""
        digest = hashlib.sha256(fingerprint(self).encode())
        for file in self._data.cache_files:
            digest.update(_described(file["filename"]))
        return digest.hexdigest()


class Gallery(Merged):
    """The folders and datasets that are searched, one after the other."""

    def __init__(self, sources: list[Photos | Stored]):
        super().__init__(list(sources))
        self.parts = sources

    def stored(self, index: int) -> tuple[str, Path | bytes]:
        """A name for image `index`, and its file, or the bytes of one."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[which].stored(int(index - (self._ends[which - 1] if which else 0)))

    @cached_property
    def contents(self) -> str:
        """A hash of what all parts hold."""
        return hashlib.sha256("".join(part.contents for part in self.parts).encode()).hexdigest()

    def class_names(self) -> np.ndarray:
        """[n] the name of each image's class: equal names of several parts are one class; empty where it has none."""
        return np.concatenate([class_names(part) for part in self.parts])


def class_names(source: Photos | Stored) -> np.ndarray:
    """[n] the name of each image's class, empty where the source has no labels."""
    if source.labels is None or not source.classes:
        return np.full(len(source), "")
    return np.array(source.classes)[source.labels]


def open_gallery(specs: list[str], split: str | None, download: bool) -> Gallery:
    """The gallery that the command line names: folders, and datasets as `hf:ID_OR_PATH`."""
    if split is not None and not any(spec.startswith(HUB) for spec in specs):
        raise InputError(f"--gallery-split {split} is for a gallery {HUB}ID_OR_PATH; name a folder with its split")
    parts: list[Photos | Stored] = []
    for spec in specs:
        if spec.startswith(HUB):
            parts.append(Stored(spec.removeprefix(HUB), split, download, "--gallery"))
        else:
            parts.append(Photos(Path(spec).expanduser(), "--gallery"))
    return Gallery(parts)


def _described(path: str) -> bytes:
    try:
        found = os.stat(path)
    except OSError:  # a link to nothing, which is an unreadable image
        return os.fsencode(f"{path}\0\0")
    return os.fsencode(f"{path}\0{found.st_size} {found.st_mtime_ns}\0")
