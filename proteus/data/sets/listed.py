"""Images of any folder, with the labels that a file of lines `image,class` gives them."""

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proteus.data.sets.files import ListedImages
from proteus.data.sources import FolderSource
from proteus.errors import InputError, MissingDataError, nearest

HEADERS = {(image, label) for image in ("image", "file", "filename", "path") for label in ("class", "label")}


def listed(root: Path, split: str, classes: Sequence[str] | str | None = None) -> ListedImages:
    """Classification: a label file with a line `image,class` for each image, which lies somewhere below `root`.

    split:   the label file: a path, from the current folder or else from `root`. Its first line may be a header, such
             as `image,class`. What follows a line's last comma is the class.
    classes: their names by number, or a text file with one a line; without it, the names in the label file, sorted.

    An image is named by its path below `root`, or by its file name alone where only one file below `root` has it.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise MissingDataError(f"listed: no folder {root}; it should hold the images")
    listing = _find(root, split)
    rows = _rows(listing)
    names = _class_names(root, classes)
    if names is None:
        names = sorted({label for _, _, label in rows})
    number = {name: index for index, name in enumerate(names)}
    for line, _, label in rows:
        if label not in number:
            raise InputError(f"{listing}:{line}: unknown class {label!r}{nearest(label, names)}")
    labels = np.array([number[label] for _, _, label in rows], dtype=np.int64)
    return ListedImages(root, _paths(root, listing, rows), labels, names, listing)


def _find(root: Path, file: str) -> Path:
    for path in (Path(file).expanduser(), root / file):
        if path.is_file():
            return path
    raise MissingDataError(f"listed: no file {file!r} in the current folder or in {root}")


def _lines(path: Path) -> list[str]:
    """The lines of a text file, without the empty ones at its end."""
    try:
        # Spreadsheets begin a file with a byte order mark; the names of files may be of any bytes.
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.strip() for line in lines]


def _rows(listing: Path) -> list[tuple[int, str, str]]:
    """(number of the line, image, class) of the lines of a label file."""
    rows = []
    for line, text in enumerate(_lines(listing), 1):
        image, _, label = (part.strip() for part in text.rpartition(","))
        if not image or not label:
            raise InputError(f"{listing}:{line}: {text!r} is not of the form 'image,class'")
        rows.append((line, image, label))
    if rows and tuple(word.lower() for word in rows[0][1:]) in HEADERS:
        del rows[0]
    if not rows:
        raise InputError(f"{listing}: names no image; a line is 'image,class'")
    return rows


def _class_names(root: Path, classes: Sequence[str] | str | None) -> list[str] | None:
    if classes is None:
        return None
    names = _lines(_find(root, classes)) if isinstance(classes, str) else classes
    where = classes if isinstance(classes, str) else "classes"
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"listed: {where}: expected names of classes, in quotes where they are numbers")
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise InputError(f"listed: {where}: holds {twice!r} twice")
    return list(names)


def _paths(root: Path, listing: Path, rows: list[tuple[int, str, str]]) -> list[str]:
    """The images' paths below root, in the order of the list; InputError where one is not there, or not one file."""
    folders: dict[str, set[str]] = {}  # what each holds: a look into each folder, none at the files
    alone: dict[str, list[str]] = {}  # paths by the name of the file
    paths: list[str] = []
    line_of: dict[str, int] = {}
    for line, image, _ in rows:
        path = posixpath.normpath(image)
        folder, file = posixpath.split(path)
        if path.startswith(("/", "../")):
            raise InputError(f"{listing}:{line}: {image} is not below {root}: give the path from there")
        if folder not in folders:
            folders[folder] = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        if file not in folders[folder]:
            if not folder and not alone:
                alone = _by_file_name(root, {name for _, name, _ in rows})
            found = alone.get(path, [])
            if not found:
                raise InputError(f"{listing}:{line}: no image {image} {'in' if folder else 'anywhere below'} {root}")
            if len(found) > 1:
                both = f"{found[0]} and {found[1]}"
                raise InputError(f"{listing}:{line}: {image} may be {both} in {root}: give the path of one")
            path = found[0]
        first = line_of.setdefault(path, line)
        if first != line:
            raise InputError(f"{listing}:{line}: {path} stands in line {first} as well")
        paths.append(path)
    return paths


def _by_file_name(root: Path, wanted: set[str]) -> dict[str, list[str]]:
    try:
        images = FolderSource(root, use_labels=False)
    except InputError as error:
        raise InputError(f"listed: {str(error).removeprefix('data: ')}") from None
    found: dict[str, list[str]] = {}
    for index in range(len(images)):
        path = images.name(index)
        file = path.rpartition("/")[2]
        if file in wanted:
            found.setdefault(file, []).append(path)
    return found
