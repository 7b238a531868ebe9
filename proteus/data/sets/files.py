"""What the readers share: where a set lies, its lists, and the images its lists name."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from proteus.data.decode import decode
from proteus.errors import InputError, MissingDataError, nearest


def find_top(name: str, root: Path, tops: Sequence[str], marker: str = "") -> Path:
    """The official top folder of a set: root/<top> or root/<name>/<top>, or `root` where it is that folder itself.

    marker: what the folder must hold to be preferred to another that exists as well.
    """
    root = Path(root).expanduser()
    folders = [base / top for top in tops for base in (root, root / name)]
    folders += [root for top in tops if root.parts[-len(Path(top).parts) :] == Path(top).parts]
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        if (folder / marker).exists():
            return folder
    if folders:
        return folders[0]  # an incomplete set: the reader says which file it lacks
    raise MissingDataError(f"{name}: no {' or '.join(tops)} under {root} or {root / name}")


def choose(name: str, split: str, splits: dict[str, str]) -> str:
    """What a split is called on disk."""
    if split not in splits:
        raise InputError(f"{name}: no split {split!r}; there are {', '.join(splits)}")
    return splits[split]


def read_lines(path: Path) -> list[str]:
    """The lines of a list, without the empty ones at its end."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; the set is incomplete, unpack it again") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{path}: the list is empty; unpack the set again")
    return [line.strip() for line in lines]


def read_fields(path: Path, count: int, form: str) -> list[list[str]]:
    """The fields of each line of a list, split at blanks; the last of `count` may hold blanks.

    form: what a line should look like, for the message.
    """
    rows = [line.split(None, count - 1) for line in read_lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise InputError(f"{path}:{number}: {' '.join(row)!r} is not of the form {form!r}")
    return rows


def read_mat(path: Path, *keys: str) -> list[Any]:
    """Variables of a MATLAB file, squeezed."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises anything on a broken file
        raise InputError(f"{path}: not readable as a MATLAB file ({one_line(error)})") from None
    for key in keys:
        if key not in content:
            raise InputError(f"{path}: holds no {key!r}; expected {', '.join(keys)}")
    return [np.atleast_1d(content[key]) for key in keys]


def one_line(error: Exception) -> str:
    """The message of an error of a library, short and on one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def numbers_of(names: Sequence[str], classes: Sequence[str], where: Path) -> np.ndarray:
    """Class names to class numbers [n] int64; InputError with file and line where one is not among `classes`."""
    number = {name: label for label, name in enumerate(classes)}
    for line, name in enumerate(names, 1):
        if name not in number:
            raise InputError(f"{where}:{line}: unknown class {name!r}{nearest(name, classes)}")
    return np.array([number[name] for name in names], dtype=np.int64)


def whole_numbers(texts: Sequence[str], low: int, high: int, where: Path) -> np.ndarray:
    """Numbers of a list [n] int64; InputError with file and line where one is none or not from low to high."""
    for line, text in enumerate(texts, 1):
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise InputError(f"{where}:{line}: {text!r} is not a number from {low} to {high}")
    return np.array([int(text) for text in texts], dtype=np.int64)


def check_there(root: Path, paths: Iterable[str], reason: str) -> None:
    """InputError for the first path that is not below root. One look into each folder, none at the files.

    Paths come from lists that may be anybody's: one that climbs out of root is refused whatever it leads to.

    reason: why the file should be there, for the message.
    """
    there: dict[str, set[str]] = {}
    for path in paths:
        if path.startswith("/") or ".." in path.split("/"):
            raise InputError(f"{path!r} is not below {root}, though {reason}; do not use the list")
        folder, _, file = path.rpartition("/")
        if folder not in there:
            there[folder] = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        if file not in there[folder]:
            raise InputError(f"{root / path}: not there, though {reason}; the set is incomplete")


def check_classes(name: str, found: Sequence[str], expected: Sequence[str] | None, where: Path) -> None:
    """InputError where class folders are not exactly those expected; None expects nothing."""
    if expected is None or set(found) == set(expected):
        return
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    said = [f"{len(missing)} class folders are missing ({missing[0]}{', ...' * (len(missing) > 1)})"] if missing else []
    said += [f"{len(surplus)} are of no class ({surplus[0]}{', ...' * (len(surplus) > 1)})"] if surplus else []
    raise InputError(f"{name}: {where}: {' and '.join(said)}; {len(expected)} classes are expected")


class ListedImages:
    """Image files below a folder, named by a list, with their labels; every file must be there."""

    def __init__(self, root: Path, paths: Sequence[str], labels: np.ndarray, classes: list[str], listing: Path | str):
        check_there(root, paths, f"{listing} lists it")
        self.root = root
        # One array of bytes: a list of strings would be copied into every worker, page by page.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels: np.ndarray | None = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int) -> Image.Image:
        return decode(self.root / os.fsdecode(self._paths[index]))

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self._paths[index]))
