"""Sets with a target for every pixel: ADE20K and NYU-Depth V2."""

from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath

from proteus.data.dense import PairedFiles, read_classes, read_depth
from proteus.data.sets.files import check_there, choose, find_top, read_lines
from proteus.data.sources import EXTENSIONS
from proteus.errors import InputError


def ade20k(root: Path, split: str) -> PairedFiles:
    """SceneParse150 of ADE20K: ADEChallengeData2016/{images,annotations}/{training,validation}. Splits train, val.

    Its masks hold 0 (other) to 150; targets hold the 150 classes as 0 to 149 and other as 255. The names of the classes
    are those of objectInfo150.txt, or numbers where it is not there.
    """
    top = find_top("ade20k", root, ["ADEChallengeData2016"], "annotations")
    folder = choose("ade20k", split, {"train": "training", "val": "validation"})
    images, masks = paired_names("ade20k", top, f"images/{folder}", f"annotations/{folder}")
    classes = _class_names(top / "objectInfo150.txt")
    return PairedFiles(top, images, masks, classes, partial(read_classes, classes=len(classes), reduce_zero_label=True))


def nyu(root: Path, split: str) -> PairedFiles:
    """NYU-Depth V2 with the split of Eigen et al.: nyu_depth_v2/. Splits train, test. 16-bit PNG in millimetres.

    Either as BTS lays it out: nyu_train.txt and nyu_test.txt with lines `image depth focal`, paths relative to the top
    folder, to sync/ or to official_splits/test/ (lines whose depth is None are left out). Or as mmsegmentation does:
    images/{train,test} and annotations/{train,test}, an image and its depth of the same stem.
    """
    top = find_top("nyu", root, ["nyu_depth_v2", "nyu"])
    split = choose("nyu", split, {"train": "train", "test": "test"})
    if (top / "images").is_dir():
        images, depths = paired_names("nyu", top, f"images/{split}", f"annotations/{split}")
        return PairedFiles(top, images, depths, [], read_depth)
    names = [f"nyu_{split}.txt", f"nyudepthv2_{split}_files_with_gt.txt"]
    listing = next((top / name for name in names if (top / name).is_file()), top / names[0])
    images, depths = [], []
    for line, text in enumerate(read_lines(listing), 1):
        fields = text.split()
        if len(fields) not in (2, 3):
            raise InputError(f"{listing}:{line}: {text!r} is not of the form 'image depth focal'")
        if fields[1] != "None":
            images.append(fields[0].lstrip("/"))
            depths.append(fields[1].lstrip("/"))
    if not images:
        raise InputError(f"{listing}: lists no image with a depth")
    bases = [top, top / {"train": "sync", "test": "official_splits/test"}[split], top / split]
    base = next((base for base in bases if (base / images[0]).is_file()), None)
    if base is None:
        raise InputError(f"{top / images[0]}: not there (nor under {bases[1]}), though {listing} lists it")
    check_there(base, [*images, *depths], f"{listing} lists it")
    return PairedFiles(base, images, depths, [], read_depth)


def paired_names(name: str, top: Path, images: str, targets: str) -> tuple[list[str], list[str]]:
    """Paths below `top` of the images of a folder, sorted, and of the .png of the same stem in another folder."""
    for folder in (images, targets):
        if not (top / folder).is_dir():
            raise InputError(f"{name}: {top / folder}: no such folder; the set is incomplete")
    files = sorted(
        file.name
        for file in (top / images).iterdir()
        if file.name.lower().endswith(EXTENSIONS) and not file.name.startswith(".")
    )
    if not files:
        raise InputError(f"{name}: no images in {top / images}")
    paths = [f"{targets}/{PurePosixPath(file).stem}.png" for file in files]
    for one, two in pairwise(zip(files, paths, strict=True)):
        if one[1] == two[1]:
            raise InputError(f"{name}: {top / images} holds {one[0]} and {two[0]}, which share {two[1]}; remove one")
    check_there(top, paths, f"{top / images} has an image of that name")
    return [f"{images}/{file}" for file in files], paths


def _class_names(path: Path) -> list[str]:
    """The last column of objectInfo150.txt below its head line."""
    if not path.is_file():
        return [str(number) for number in range(1, 151)]
    names = []
    for line, text in enumerate(read_lines(path)[1:], 2):
        fields = text.split("\t")
        if len(fields) < 2 or fields[0] != str(line - 1):
            raise InputError(f"{path}:{line}: {text!r} is not class {line - 1}, fields apart by tabs")
        names.append(fields[-1].strip())
    return names
