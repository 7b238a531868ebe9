"""Fine-grained sets that are folders of images and lists, as their authors publish them. Labels are from 0."""

from pathlib import Path

import numpy as np

from proteus.data.sets.files import (
    ListedImages,
    choose,
    find_top,
    numbers_of,
    read_fields,
    read_lines,
    read_mat,
    whole_numbers,
)
from proteus.errors import InputError


def aircraft(root: Path, split: str) -> ListedImages:
    """FGVC-Aircraft, 100 variants: fgvc-aircraft-2013b/data. Splits train, val, trainval, test."""
    top = find_top("aircraft", root, ["fgvc-aircraft-2013b"], "data/variants.txt") / "data"
    split = choose("aircraft", split, {name: name for name in ("train", "val", "trainval", "test")})
    classes, listing = read_lines(top / "variants.txt"), top / f"images_variant_{split}.txt"
    rows = read_fields(listing, 2, "1025794 707-320")
    labels = numbers_of([variant for _, variant in rows], classes, listing)
    return ListedImages(top, [f"images/{number}.jpg" for number, _ in rows], labels, classes, listing)


def caltech101(root: Path, split: str, per_class: int = 30, with_replacement: bool = False) -> ListedImages:
    """Caltech-101, 102 classes with BACKGROUND_Google: 101_ObjectCategories. Splits train, test.

    The set has no official split: `per_class` images of each class, drawn with seed 0, are for training, the rest is
    for testing. A train.txt or test.txt beside the images is one user's draw, and is not read.

    with_replacement: the draws of the published code, which takes an image of a small class several times
    (`numpy.random.choice`, seeded once, classes in the order of their folders, each draw sorted). Its training set has
    duplicates, which fall on both sides of a validation cut, and its test set is larger.
    """
    top = find_top("caltech101", root, ["101_ObjectCategories", "caltech-101/101_ObjectCategories"])
    training = choose("caltech101", split, {"train": "train", "test": "test"}) == "train"
    classes = sorted(folder.name for folder in top.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    reference = np.random.RandomState(0)  # as numpy.random.seed(0) leaves the global generator
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(file.name for file in (top / name).glob("*.jpg") if not file.name.startswith("."))
        if len(images) <= per_class and not with_replacement:
            raise InputError(f"{top / name}: {len(images)} images, of which {per_class} are for training: none is left")
        if with_replacement:
            drawn = reference.choice(len(images), per_class)
        else:
            drawn = np.random.default_rng((0, label)).choice(len(images), per_class, replace=False)
        chosen = np.sort(drawn) if training else np.setdiff1d(np.arange(len(images)), drawn)
        paths += [f"{name}/{images[index]}" for index in chosen]
        labels += [label] * len(chosen)
    if not classes:
        raise InputError(f"{top}: holds no class folders; unpack the set again")
    return ListedImages(top, paths, np.array(labels, dtype=np.int64), classes, top)


def cars(root: Path, split: str) -> ListedImages:
    """Stanford Cars, 196 models: stanford_cars/{cars_train,cars_test,devkit}. Splits train, test.

    The labels of the test images are in cars_test_annos_withlabels.mat, in the top folder or in devkit.
    """
    top = find_top("cars", root, ["stanford_cars"], "devkit")
    folder = choose("cars", split, {"train": "cars_train", "test": "cars_test"})
    annotations = top / "devkit/cars_train_annos.mat"
    if split == "test":
        annotations = top / "cars_test_annos_withlabels.mat"
        if not annotations.is_file():
            annotations = top / "devkit/cars_test_annos_withlabels.mat"
    (names,) = read_mat(top / "devkit/cars_meta.mat", "class_names")
    (table,) = read_mat(annotations, "annotations")
    if not table.dtype.names or not {"class", "fname"} <= set(table.dtype.names):
        raise InputError(f"{annotations}: its annotations have no fields 'class' and 'fname'")
    labels = _one_based(table["class"], len(names), annotations)
    return ListedImages(
        top, [f"{folder}/{name}" for name in table["fname"]], labels, list(map(str, names)), annotations
    )


def dtd(root: Path, split: str) -> ListedImages:
    """Describable Textures, 47 classes, partition 1: dtd/{images,labels}. Splits train, val, test."""
    top = find_top("dtd", root, ["dtd", "dtd/dtd"], "labels")
    split = choose("dtd", split, {name: name for name in ("train", "val", "test")})
    listing = top / f"labels/{split}1.txt"
    paths = read_lines(listing)
    if not (top / "images").is_dir():
        raise InputError(f"{top / 'images'}: no such folder; the set is incomplete, unpack it again")
    classes = sorted(folder.name for folder in (top / "images").iterdir() if folder.is_dir())
    labels = numbers_of([path.rpartition("/")[0] for path in paths], classes, listing)
    return ListedImages(top / "images", paths, labels, classes, listing)


def flowers(root: Path, split: str) -> ListedImages:
    """Oxford 102 Flowers: flowers-102/{jpg,imagelabels.mat,setid.mat}. Splits train, val, test, as setid.mat has them.

    The set names no classes: they are called 1 to 102.
    """
    top = find_top("flowers", root, ["flowers-102"], "setid.mat")
    key = choose("flowers", split, {"train": "trnid", "val": "valid", "test": "tstid"})
    (everything,) = read_mat(top / "imagelabels.mat", "labels")
    (numbers,) = read_mat(top / "setid.mat", key)
    chosen = _one_based(numbers, len(everything), top / "setid.mat")
    count = int(everything.max())
    labels = _one_based(everything, count, top / "imagelabels.mat")[chosen]
    paths = [f"jpg/image_{index + 1:05d}.jpg" for index in chosen]
    return ListedImages(top, paths, labels, [str(number + 1) for number in range(count)], top / "setid.mat")


def food(root: Path, split: str) -> ListedImages:
    """Food-101: food-101/{images,meta}. Splits train, test."""
    top = find_top("food", root, ["food-101"], "meta")
    listing = top / "meta" / choose("food", split, {"train": "train.txt", "test": "test.txt"})
    classes, paths = read_lines(top / "meta/classes.txt"), read_lines(listing)
    labels = numbers_of([path.rpartition("/")[0] for path in paths], classes, listing)
    return ListedImages(top / "images", [f"{path}.jpg" for path in paths], labels, classes, listing)


def pets(root: Path, split: str) -> ListedImages:
    """Oxford-IIIT Pet, 37 breeds: oxford-iiit-pet/{images,annotations}. Splits train (trainval.txt), test."""
    top = find_top("pets", root, ["oxford-iiit-pet"], "annotations")
    listing = top / "annotations" / choose("pets", split, {"train": "trainval.txt", "test": "test.txt"})
    rows = read_fields(listing, 4, "Abyssinian_100 1 1 1")
    breeds = whole_numbers([row[1] for row in rows], 1, 999, listing) - 1
    names = {int(breed): row[0].rpartition("_")[0] for breed, row in zip(breeds, rows, strict=True)}
    for line, (breed, row) in enumerate(zip(breeds, rows, strict=True), 1):
        if row[0].rpartition("_")[0] != names[int(breed)]:
            raise InputError(f"{listing}:{line}: {row[0]} has class {row[1]}, which is {names[int(breed)]} elsewhere")
    classes = [names.get(number, str(number + 1)) for number in range(max(names) + 1)]
    return ListedImages(top / "images", [f"{row[0]}.jpg" for row in rows], breeds, classes, listing)


def sun397(root: Path, split: str) -> ListedImages:
    """SUN397, partition 1: SUN397/<letter>/<class>/*.jpg, and the lists of Partitions.zip. Splits train, test.

    ClassName.txt, Training_01.txt and Testing_01.txt may lie in SUN397, in Partitions beside or in it, or beside it.
    A class is the folder of an image below SUN397, part by part: a name that occurs elsewhere in a path means nothing.
    """
    top = find_top("sun397", root, ["SUN397"], "a")
    file = choose("sun397", split, {"train": "Training_01.txt", "test": "Testing_01.txt"})
    places = [top / "Partitions", top.parent / "Partitions", top, top.parent]
    place = next((place for place in places if (place / file).is_file()), None)
    if place is None:
        raise InputError(f"{top}: no {file} in or beside it; unpack Partitions.zip of the set into {places[0]}")
    listing, names = place / file, place / "ClassName.txt"
    if not names.is_file():
        names = top / "ClassName.txt"  # the archive of the images has a copy
    classes, paths = ([line.strip("/") for line in read_lines(path)] for path in (names, listing))
    labels = numbers_of([path.rpartition("/")[0] for path in paths], classes, listing)
    return ListedImages(top, paths, labels, classes, listing)


def voc2007(root: Path, split: str) -> ListedImages:
    """PASCAL VOC 2007 classification: VOCdevkit/VOC2007. Splits train, val, trainval, test.

    labels: [n, 20] int8, in the alphabetical order of the classes: 1 present, 0 difficult, -1 absent, as in
    ImageSets/Main/<class>_<split>.txt.
    """
    top = find_top("voc2007", root, ["VOCdevkit/VOC2007", "VOC2007"], "ImageSets/Main")
    split = choose("voc2007", split, {name: name for name in ("train", "val", "trainval", "test")})
    main, ending = top / "ImageSets/Main", f"_{split}.txt"
    images = [row[0] for row in read_fields(main / f"{split}.txt", 1, "000005")]
    files = sorted(main.glob(f"*{ending}"))
    if not files:
        raise InputError(f"{main}: no <class>{ending} with the labels; unpack the {split} part of the set")
    labels = np.zeros((len(images), len(files)), dtype=np.int8)
    for column, file in enumerate(files):
        rows = read_fields(file, 2, "000005 -1")
        if [row[0] for row in rows] != images:
            raise InputError(f"{file}: lists other images than {split}.txt beside it")
        for line, row in enumerate(rows, 1):
            if row[1] not in ("1", "0", "-1"):
                raise InputError(f"{file}:{line}: {row[1]!r} is not 1, 0 or -1")
            labels[line - 1, column] = int(row[1])
    classes = [file.name.removesuffix(ending) for file in files]
    return ListedImages(
        top / "JPEGImages", [f"{image}.jpg" for image in images], labels, classes, main / f"{split}.txt"
    )


def _one_based(values: np.ndarray, count: int, where: Path) -> np.ndarray:
    """Numbers 1 to count of a MATLAB file as 0 to count - 1, [n] int64."""
    numbers = np.array([int(value) for value in values], dtype=np.int64)
    if len(numbers) and not (numbers.min() >= 1 and numbers.max() <= count):
        raise InputError(f"{where}: holds numbers from {numbers.min()} to {numbers.max()}, not from 1 to {count}")
    return numbers - 1
