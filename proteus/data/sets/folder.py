"""A user's own data: folders of classes, images with masks, images with depths."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from proteus.data.dense import IGNORE, PairedFiles, read_classes, read_depth
from proteus.data.sets.dense import paired_names
from proteus.data.sets.imagenet import ClassFolders
from proteus.errors import InputError, MissingDataError


def folder(root: Path, split: str, classes: Sequence[str] | None = None) -> ClassFolders:
    """Classification: root/<split>/<class>/<image>.

    classes: the names that must be there, no more and no fewer; a test split takes those of its training split.
    """
    return ClassFolders("folder", _split("folder", root, split, "<class>/<image>"), classes)


def folder_segmentation(
    root: Path,
    split: str,
    *,
    classes: Sequence[str],
    images: str = "images",
    masks: str = "masks",
    ignore: int = IGNORE,
    reduce_zero_label: bool = False,
) -> PairedFiles:
    """Segmentation: root/<split>/<images>/X.jpg with root/<split>/<masks>/X.png, one channel of class numbers.

    classes: names of the classes 0, 1, ... (1, 2, ... with reduce_zero_label).
    ignore, reduce_zero_label: see `read_classes`.
    """
    top = _split("folder-segmentation", root, split, f"{images}/X.jpg and {masks}/X.png")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"folder-segmentation: classes={classes!r}: a list of names, in quotes where they are numbers")
    if not 1 <= len(set(classes)) == len(classes) <= IGNORE:
        raise InputError(f"folder-segmentation: {len(classes)} classes: 1 to {IGNORE}, each once")
    if not isinstance(reduce_zero_label, bool) or not isinstance(ignore, int):
        raise InputError("folder-segmentation: reduce_zero_label is true or false, and ignore a whole number")
    pairs = paired_names("folder-segmentation", top, images, masks)
    read = partial(read_classes, classes=len(classes), reduce_zero_label=reduce_zero_label, ignore=ignore)
    return PairedFiles(top, *pairs, list(classes), read)


def folder_depth(
    root: Path,
    split: str,
    *,
    images: str = "rgb",
    depths: str = "depth",
    per_metre: float = 1000.0,
    invalid: Sequence[int] = (0, 65535),
) -> PairedFiles:
    """Depth: root/<split>/<images>/X.jpg with root/<split>/<depths>/X.png of 16 bits.

    per_metre, invalid: see `read_depth`.
    """
    top = _split("folder-depth", root, split, f"{images}/X.jpg and {depths}/X.png")
    if not isinstance(per_metre, int | float) or not isinstance(invalid, list | tuple):
        raise InputError(f"folder-depth: per_metre={per_metre!r} is a number, and invalid={invalid!r} a list of them")
    if not per_metre > 0:
        raise InputError(f"folder-depth: per_metre={per_metre} must be above 0")
    pairs = paired_names("folder-depth", top, images, depths)
    return PairedFiles(top, *pairs, [], partial(read_depth, per_metre=per_metre, invalid=tuple(invalid)))


def _split(name: str, root: Path, split: str, form: str) -> Path:
    top = Path(root).expanduser() / split
    if not top.is_dir():
        raise MissingDataError(f"{name}: no folder {top}; it should hold {form}")
    return top
