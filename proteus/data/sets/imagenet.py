"""ImageNet-1K and the sets its classifiers are tested on, as folders of classes.

Classes are named by their WordNet ids in sorted order; which of ImageNet's thousand each one of a smaller set is, its
name says. `classes`, where given, are the names that must be there, no more and no fewer.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from proteus.data.decode import decode
from proteus.data.sets.files import check_classes, choose, find_top, one_line
from proteus.data.sources import FolderSource
from proteus.errors import InputError, MissingDataError

IMAGENET = ["imagenet", "ILSVRC/Data/CLS-LOC", "imagenet/ILSVRC/Data/CLS-LOC", "ILSVRC2012", "."]
CORRUPTION_GROUPS = ("", "noise", "blur", "weather", "digital", "extra")


class ClassFolders(FolderSource):
    """root/<class>/<image>, nothing but; names are whole paths."""

    def __init__(self, name: str, root: Path, classes: Sequence[str] | None = None):
        try:
            super().__init__(root)
        except InputError as error:
            raise InputError(f"{name}: {str(error).removeprefix('data: ')}") from None
        if self.labels is None:
            odd = next(path for path in map(self.path, range(len(self))) if path.count("/") != 1)
            raise InputError(f"{name}: {root / odd} is not of the form <class>/<image> below {root}; sort the images")
        check_classes(name, self.classes, classes, root)

    def load(self, index: int) -> Image.Image:
        return decode(self.name(index))

    def name(self, index: int) -> str:
        return str(self.root / self.path(index))

    def path(self, index: int) -> str:
        """The image's path below the set's folder."""
        return super().name(index)


def in1k(root: Path, split: str, classes: Sequence[str] | None = None) -> ClassFolders:
    """ImageNet-1K: {train,val}/<wnid>/*.JPEG in imagenet/, ILSVRC/Data/CLS-LOC/ or `root` itself. Splits train, val."""
    split = choose("in1k", split, {"train": "train", "val": "val"})
    return _sorted_folders("in1k", _imagenet("in1k", root, split), classes)


def in_real(root: Path, split: str = "val", classes: Sequence[str] | None = None) -> ClassFolders:
    """ImageNet-ReaL: ImageNet's val, with the labels of real.json, which lies beside val or in real/ or in in-real/.

    labels: [n, classes] int8, 1 for each label an image has, else -1; images, in the order of `in1k`'s val, that have
    no label at all are kept: they count nowhere.
    """
    choose("in-real", split, {"val": "val"})
    val = _imagenet("in-real", root, "val")
    root = Path(root).expanduser()
    places = [folder / "real.json" for folder in (val.parent, root, root / "in-real", root / "real")]
    listing = next((place for place in places if place.is_file()), None)
    if listing is None:
        raise MissingDataError(f"in-real: no real.json in any of {', '.join(str(place.parent) for place in places)}")
    source = _sorted_folders("in-real", val, classes)
    try:
        lists = json.loads(listing.read_text())
        if not all(isinstance(label, int) for labels in lists for label in labels):
            raise ValueError("expected a list of lists of class numbers")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{listing}: not readable as ReaL's labels ({one_line(error)}); fetch it again") from None
    table = np.full((len(source), len(source.classes)), -1, dtype=np.int8)
    for index in range(len(source)):
        match = re.fullmatch(r"ILSVRC2012_val_0*([1-9]\d*)\.\w+", Path(source.path(index)).name)
        if match is None or int(match[1]) > len(lists):
            reason = "is not named ILSVRC2012_val_<number>" if match is None else f"is beyond its {len(lists)} lists"
            raise InputError(f"{listing}: {val / source.path(index)} {reason}: which labels it has cannot be said")
        for label in lists[int(match[1]) - 1]:
            if not 0 <= label < table.shape[1]:
                raise InputError(f"{listing}: image {match[1]} has class {label}; {val} has {table.shape[1]} classes")
            table[index, label] = 1
    source.labels = table
    return source


def in_sketch(root: Path, split: str = "test", classes: Sequence[str] | None = None) -> ClassFolders:
    """ImageNet-Sketch: sketch/<wnid>/*.JPEG. Split test."""
    choose("in-sketch", split, {"test": "test"})
    return _sorted_folders("in-sketch", find_top("in-sketch", root, ["sketch", "imagenet-sketch"]), classes)


def in_a(root: Path, split: str = "test", classes: Sequence[str] | None = None) -> ClassFolders:
    """ImageNet-A, 200 of ImageNet's classes: imagenet-a/<wnid>/*.jpg. Split test."""
    choose("in-a", split, {"test": "test"})
    return _sorted_folders("in-a", find_top("in-a", root, ["imagenet-a"]), classes)


def in_r(root: Path, split: str = "test", classes: Sequence[str] | None = None) -> ClassFolders:
    """ImageNet-R, another 200 of ImageNet's classes: imagenet-r/<wnid>/*.jpg. Split test."""
    choose("in-r", split, {"test": "test"})
    return _sorted_folders("in-r", find_top("in-r", root, ["imagenet-r"]), classes)


def in_v2(root: Path, split: str = "test") -> ClassFolders:
    """ImageNet-V2, matched frequency: imagenetv2-matched-frequency-format-val/<class number>/*.jpeg. Split test.

    Folders are class NUMBERS, of which a sorted list would be 0, 1, 10, 100: labels are the numbers themselves.
    """
    choose("in-v2", split, {"test": "test"})
    top = find_top("in-v2", root, ["imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"])
    source = _sorted_folders("in-v2", top, None)
    for name in source.classes:
        if not (name.isascii() and name.isdigit() and name == str(int(name))):
            raise InputError(f"in-v2: {top / name}: the folders of this set are class numbers")
    numbers = np.array([int(name) for name in source.classes])
    source.labels = numbers[source.labels]
    source.classes = [str(number) for number in range(numbers.max() + 1)]
    return source


def in_c(
    root: Path, split: str = "test", *, corruption: str, severity: int, classes: Sequence[str] | None = None
) -> ClassFolders:
    """ImageNet-C, one corruption at one severity (1 to 5): <corruption>/<severity>/<wnid>/*.JPEG. Split test.

    Corruptions lie in imagenet-c/, in in-c/ or in `root` itself, directly or in the folder of their group, as the
    archives unpack (noise, blur, weather, digital, extra).
    """
    choose("in-c", split, {"test": "test"})
    root = Path(root).expanduser()
    places = [root / top / group / corruption for top in ("imagenet-c", "in-c", "") for group in CORRUPTION_GROUPS]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise MissingDataError(
            f"in-c: no folder {corruption!r} in {root}, {root / 'imagenet-c'} or {root / 'in-c'}, "
            f"nor in a group there ({', '.join(CORRUPTION_GROUPS[1:])})"
        )
    if not (found / str(severity)).is_dir():
        raise InputError(f"in-c: {found} holds no folder {severity} for that severity; unpack the set again")
    return _sorted_folders("in-c", found / str(severity), classes)


def _imagenet(name: str, root: Path, split: str) -> Path:
    """The folder of a split of ImageNet-1K."""
    root = Path(root).expanduser()
    places = [base / top / split for top in IMAGENET for base in (root, root / "in1k")]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise MissingDataError(f"{name}: no {split}/<wnid>/ in {root}, {root / IMAGENET[0]} or {root / IMAGENET[1]}")
    return place


def _sorted_folders(name: str, top: Path, classes: Sequence[str] | None) -> ClassFolders:
    if any(top.glob("ILSVRC2012_val_*.JPEG")):
        raise InputError(
            f"{name}: the images in {top} are not sorted into classes: move each into {top}/<wnid>/, as the usual "
            "valprep.sh does (or torchvision.datasets.ImageNet, from the archives of the set)"
        )
    return ClassFolders(name, top, classes)
