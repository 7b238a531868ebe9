"""The twelve fine-grained sets: labels, classes and pixels of small copies in their real formats, and broken copies."""

import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torch.utils.data import DataLoader

from proteus.data.sets import SETS, cub, open_set
from proteus.data.sets.cifar import read_pickle
from proteus.errors import InputError, MissingDataError
from tests.data.sets import fixtures
from tests.data.sets.fixtures import every, shade, text, truncate


def greys(source) -> list[int]:
    return [source.load(index).getpixel((3, 3))[0] for index in range(len(source))]


def told(name: str, root: Path | None, split: str = "train", **options) -> str:
    """The one line in which opening a set ends."""
    with pytest.raises(InputError) as caught:
        open_set(name, root, split, **options)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


LISTED = {
    "aircraft": (fixtures.aircraft, ["707-320", "Challenger 600", "F/A-18"], True),
    "cars": (fixtures.cars, ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo 2012"], False),
    "dtd": (fixtures.dtd, ["banded", "lacelike", "zigzagged"], True),
    "flowers": (fixtures.flowers, ["1", "2", "3"], True),
    "food": (fixtures.food, ["apple_pie", "baklava", "waffles"], False),
    "pets": (fixtures.pets, ["Abyssinian", "american_bulldog", "yorkshire_terrier"], False),
    "sun397": (fixtures.sun397, ["a/abbey", "c/church/indoor", "c/church"], False),
    "cub": (fixtures.cub, ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"], False),
}


@pytest.mark.parametrize("name", LISTED)
def test_listed_sets(tmp_path, name):
    write, classes, has_val = LISTED[name]
    write(tmp_path)
    for split in ["train", "test"] + ["val"] * has_val:
        source = open_set(name, tmp_path, split)
        images = list(every(split, 3, 2))
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == [label for label, _ in images]
        assert source.classes == classes
        assert len(source) == 6
        assert greys(source) == pytest.approx([shade(*image) for image in images], abs=1)
        assert source.load(0).mode == "RGB"
        assert all(Path(source.name(index)).is_file() for index in range(6))
    if not has_val:
        assert f"{name}: no split 'val'; there are train, test" in told(name, tmp_path, "val")


def test_aircraft_trainval(tmp_path):
    fixtures.aircraft(tmp_path)
    assert open_set("aircraft", tmp_path, "trainval").labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("place", ["", "food", "elsewhere/food-101"], ids=["root", "id", "itself"])
def test_where_a_set_may_lie(tmp_path, place):
    fixtures.food(tmp_path)
    if place:
        (tmp_path / place).mkdir(parents=True)
        target = tmp_path / place if place.endswith("food-101") else tmp_path / place / "food-101"
        shutil.move(tmp_path / "food-101", target.parent / "food-101.moved")
        shutil.rmtree(target, ignore_errors=True)
        (target.parent / "food-101.moved").rename(target)
    root = tmp_path / place if place.endswith("food-101") else tmp_path
    assert len(open_set("food", str(root), "test")) == 6


FIRST_SPLIT = {"in-real": "val"} | dict.fromkeys(["in-v2", "in-sketch", "in-a", "in-r", "in-c"], "test")
NEEDED = {"in-c": {"corruption": "fog", "severity": 1}, "folder-segmentation": {"classes": ["a"]}}


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("digits", "scenes", "scenes-depth")])
def test_a_set_that_is_not_there(tmp_path, name):
    split, options = FIRST_SPLIT.get(name, "train"), NEEDED.get(name, {})
    with pytest.raises(MissingDataError) as caught:
        open_set(name, tmp_path, split, **options)
    assert str(caught.value).startswith(f"{name}: no ")
    assert str(tmp_path) in str(caught.value)
    assert "needs the folder" in told(name, None, split, **options)


def test_unknown_sets_and_options(tmp_path):
    assert "no data set 'caltech'; did you mean 'caltech101'?" in told("caltech", tmp_path)
    assert "caltech101: no option 'with_replacment'; did you mean 'with_replacement'?" in told(
        "caltech101", tmp_path, with_replacment=True
    )
    assert "food: no option 'classes'; it has none" in told("food", tmp_path, classes=["a"])
    assert "in-c: needs the option 'corruption'" in told("in-c", tmp_path, "test", severity=1)


# Caltech-101


def test_caltech101_draws_thirty_of_each_class(tmp_path):
    fixtures.caltech101(tmp_path)
    train, test = (open_set("caltech101", tmp_path, split) for split in ("train", "test"))
    assert train.classes == ["BACKGROUND_Google", "Faces", "accordion"]
    assert np.bincount(train.labels).tolist() == [30, 30, 30]
    assert np.bincount(test.labels).tolist() == [3, 1, 10]  # `tmp` among the backgrounds is no image
    names = [source.name(index) for source in (train, test) for index in range(len(source))]
    assert len(set(names)) == len(names) == 33 + 31 + 40
    again = open_set("caltech101", tmp_path, "train")
    assert [again.name(index) for index in range(90)] == names[:90]
    grey = np.array(greys(train))
    assert all((np.diff(grey[train.labels == label]) > 0).all() for label in range(3))
    drawn = (grey - train.labels) // 2
    assert drawn[train.labels == 2].max() > 30  # not merely the first ones


def test_caltech101_as_the_published_code_draws_it(tmp_path):
    fixtures.caltech101(tmp_path)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    draws = [np.sort(np.random.choice(count, 30, replace=True)) for count in (33, 31, 40)]  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    train = open_set("caltech101", tmp_path, "train", with_replacement=True)
    expected = [2 * index + label for label, draw in enumerate(draws) for index in draw]
    assert greys(train) == pytest.approx(expected, abs=1)
    assert train.labels.tolist() == [0] * 30 + [1] * 30 + [2] * 30
    test = open_set("caltech101", tmp_path, "test", with_replacement=True)
    rest = [
        2 * index + label
        for label, draw in enumerate(draws)
        for index in range((33, 31, 40)[label])
        if index not in draw
    ]
    assert greys(test) == pytest.approx(rest, abs=1)
    assert len(test) > 14
    after = np.random.get_state()  # noqa: NPY002
    assert (after[1] == state[1]).all()  # the generator of the process is left alone


def test_caltech101_needs_more_images_than_it_draws(tmp_path):
    fixtures.caltech101(tmp_path, counts=(33, 30, 31))
    assert "Faces: 30 images, of which 30 are for training" in told("caltech101", tmp_path)
    assert len(open_set("caltech101", tmp_path, "train", per_class=5)) == 15


# CIFAR


def test_cifar10(tmp_path):
    fixtures.cifar10(tmp_path)
    train, test = (open_set("cifar10", tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 4)
    assert train.classes == ["airplane", "automobile", "bird"]
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert test.labels.tolist() == [2, 0, 1, 2]
    assert train.labels.dtype == np.int64
    image = train.load(7)
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert image.getpixel((5, 20)) == (shade(1, 7), 20, 5)  # red, then the row in green and the column in blue
    assert "data_batch_2[3]" in train.name(7)


def test_cifar100_has_fine_labels(tmp_path):
    fixtures.cifar100(tmp_path)
    test = open_set("cifar100", tmp_path, "test")
    assert test.classes == ["apple", "bear", "cup"]
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert test.load(2).getpixel((0, 0))[0] == shade(2, 22)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_does_not_run(tmp_path, protocol):
    top = fixtures.cifar10(tmp_path)
    content = pickle.dumps({"data": Malicious(tmp_path / "ran")}, protocol)
    (top / "data_batch_3").write_bytes(content)
    line = told("cifar10", tmp_path)
    assert "data_batch_3" in line
    assert "mkdir" in line
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # it is malicious
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins\neval", "numpy\nload", "numpy.core.multiarray\nfromstring", "os\nsystem"])
def test_a_pickle_may_name_nothing_but_arrays(tmp_path, name):
    path = tmp_path / "x"
    path.write_bytes(b"\x80\x02c" + name.encode() + b"\n.")
    with pytest.raises(InputError, match="asks to run " + name.replace("\n", ".")):
        read_pickle(path)


def test_broken_cifar(tmp_path):
    top = fixtures.cifar10(tmp_path)
    batch = {b"data": fixtures.cifar_images([0, 1], 0), b"labels": [0, 3]}
    fixtures.python2_pickle(top / "test_batch", batch)
    assert "test_batch: its labels are not numbers from 0 to 2" in told("cifar10", tmp_path, "test")
    fixtures.python2_pickle(top / "test_batch", batch | {b"labels": [0, 1, 2]})
    assert "test_batch: its data are not one row of 3072 bytes for each of 3 labels" in told(
        "cifar10", tmp_path, "test"
    )
    fixtures.python2_pickle(top / "test_batch", {b"data": 1})
    assert "test_batch: holds no 'labels'" in told("cifar10", tmp_path, "test")
    truncate(top / "data_batch_2")
    assert "data_batch_2: not readable as a pickle" in told("cifar10", tmp_path)
    (top / "data_batch_1").unlink()
    assert "data_batch_1: No such file" in told("cifar10", tmp_path)


# PASCAL VOC


def test_voc2007(tmp_path):
    fixtures.voc2007(tmp_path)
    expected = np.array(fixtures.VOC_ROWS)
    for start, split in ((0, "train"), (4, "val"), (8, "test")):
        source = open_set("voc2007", tmp_path, split)
        assert source.labels.dtype == np.int8
        assert (source.labels == expected).all()
        assert source.classes == ["aeroplane", "bicycle", "tvmonitor"]
        assert greys(source) == pytest.approx([10 + start + number for number in range(4)], abs=1)
    assert open_set("voc2007", tmp_path, "trainval").labels.shape == (8, 3)


def test_broken_voc2007(tmp_path):
    main = fixtures.voc2007(tmp_path) / "ImageSets/Main"
    text(main / "bicycle_val.txt", ["000005 -1", "000006  2", "000007  1", "000008  0"])
    assert "bicycle_val.txt:2: '2' is not 1, 0 or -1" in told("voc2007", tmp_path, "val")
    text(main / "bicycle_val.txt", ["000005 -1", "000006"])
    assert "bicycle_val.txt:2: '000006' is not of the form" in told("voc2007", tmp_path, "val")
    text(main / "tvmonitor_train.txt", ["000001 -1", "000002 1", "000003 1", "000005 1"])
    assert "tvmonitor_train.txt: lists other images than train.txt" in told("voc2007", tmp_path)
    for file in main.glob("*_test.txt"):
        file.unlink()
    assert "no <class>_test.txt" in told("voc2007", tmp_path, "test")


# SUN397


def test_sun397_matches_folders_and_not_words(tmp_path):
    """A root that is called like a class, and a class within another, label nothing wrongly."""
    root = tmp_path / "a/abbey"
    fixtures.sun397(root)
    assert open_set("sun397", root, "train").labels.tolist() == [0, 1, 2, 0, 1, 2]
    text(root / "Partitions/Training_01.txt", ["/a/abbey/x/sun_a.jpg"])
    assert "Training_01.txt:1: unknown class 'a/abbey/x'" in told("sun397", root)


def test_sun397_where_the_lists_lie(tmp_path):
    top = fixtures.sun397(tmp_path)
    (tmp_path / "Partitions").rename(top / "Partitions")
    assert len(open_set("sun397", tmp_path, "test")) == 6
    (top / "Partitions/ClassName.txt").rename(top / "ClassName.txt")
    assert len(open_set("sun397", tmp_path, "test")) == 6
    shutil.rmtree(top / "Partitions")
    assert "no Testing_01.txt in or beside it" in told("sun397", tmp_path, "test")


# CUB from its archive


def test_cub_from_its_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(cub, "CHUNK", 64)  # smaller than the smallest file, once inflated; STEP is larger
    monkeypatch.setattr(cub, "STEP", 16384)
    archive = fixtures.cub_archive(tmp_path / "a", per_class=4, size=24)
    for split in ("train", "test"):
        source, folder = open_set("cub", archive.parent, split), open_set("cub", archive.parent / "unpacked", split)
        assert len(source) == len(folder) == 12
        assert source.labels.tolist() == folder.labels.tolist()
        assert source.classes == folder.classes
        for index in np.random.default_rng(0).permutation(12):
            assert source.load(index).tobytes() == folder.load(index).tobytes()
        assert str(archive) in source.name(0)
        assert source.name(0).endswith(folder.name(0).split("unpacked/")[1])
    for name in source._files._members:
        assert source._files.read(name) == (archive.parent / "unpacked" / name).read_bytes()
    # Reading does not begin at the front of the archive.
    offsets, pread = [], os.pread
    monkeypatch.setattr(cub.os, "pread", lambda *place: offsets.append(place[2]) or pread(*place))
    source._files.read(list(source._files._members)[-1])
    assert min(offsets) > archive.stat().st_size / 2


class Loaded:
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source.load(index).getpixel((3, 3))[0], os.getpid()


def test_cub_archive_in_forked_workers(tmp_path):
    archive = fixtures.cub_archive(tmp_path, per_class=8)
    source = open_set("cub", archive.parent, "train")
    loader = DataLoader(Loaded(source), batch_size=3, num_workers=2, multiprocessing_context="fork", collate_fn=list)
    rows = [row for batch in loader for row in batch]
    assert [grey for grey, _ in rows] == greys(source)
    assert len({pid for _, pid in rows} - {multiprocessing.current_process().pid}) == 2
    copy = pickle.loads(pickle.dumps(source))  # as a spawned worker gets it
    assert greys(copy) == greys(source)


def test_broken_cub(tmp_path):
    top = fixtures.cub(tmp_path)
    text(top / "image_class_labels.txt", [f"{number} {9 if number == 3 else 1}" for number in range(1, 13)])
    assert "image_class_labels.txt: image 3 has class 9, which classes.txt does not list" in told("cub", tmp_path)
    text(top / "train_test_split.txt", ["1 1", "2"])
    assert "train_test_split.txt:2: '2' is not of the form" in told("cub", tmp_path)
    text(top / "train_test_split.txt", ["1 1"])
    assert "train_test_split.txt: is not about the 12 images" in told("cub", tmp_path)


def test_broken_cub_archive(tmp_path):
    archive = fixtures.cub_archive(tmp_path, per_class=3, size=64)
    whole = archive.read_bytes()
    truncate(archive)
    assert f"{archive}: not readable as a .tgz archive" in told("cub", tmp_path)
    archive.write_bytes(b"no archive")
    assert f"{archive}: not readable as a .tgz archive" in told("cub", tmp_path)
    fixtures.gzip_of(archive, bytes(10240))
    assert "images.txt: not in the archive" in told("cub", tmp_path)
    archive.write_bytes(whole)
    text(tmp_path / "unpacked/CUB_200_2011/images.txt", [f"{number} 001/gone.jpg" for number in range(1, 19)])
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "unpacked/CUB_200_2011", "CUB_200_2011")
    assert "CUB_200_2011/images/001/gone.jpg: not there, though images.txt lists it" in told("cub", tmp_path)


# What is broken in one way or another


@pytest.mark.parametrize("name", LISTED)
def test_an_image_that_is_listed_and_not_there(tmp_path, name):
    LISTED[name][0](tmp_path)
    gone = Path(open_set(name, tmp_path, "train").name(4))
    gone.unlink()
    line = told(name, tmp_path)
    assert line.startswith(f"{gone}: not there, though ")
    assert len(open_set(name, tmp_path, "test")) == 6


@pytest.mark.parametrize(
    ("name", "file", "lines", "said"),
    [
        (
            "aircraft",
            "fgvc-aircraft-2013b/data/images_variant_train.txt",
            ["0000000 707-320", "1"],
            "train.txt:2: '1' is",
        ),
        (
            "aircraft",
            "fgvc-aircraft-2013b/data/images_variant_train.txt",
            ["0000000 707-32"],
            "did you mean '707-320'?",
        ),
        ("aircraft", "fgvc-aircraft-2013b/data/variants.txt", [], "variants.txt: the list is empty"),
        ("food", "food-101/meta/train.txt", ["apple_pie/1000", "apple/1000"], "train.txt:2: unknown class 'apple'"),
        ("dtd", "dtd/dtd/labels/train1.txt", ["banded_0000.jpg"], "train1.txt:1: unknown class ''"),
        (
            "pets",
            "oxford-iiit-pet/annotations/trainval.txt",
            ["Abyssinian_1 1 1"],
            "trainval.txt:1: 'Abyssinian_1 1 1'",
        ),
        (
            "pets",
            "oxford-iiit-pet/annotations/trainval.txt",
            ["Abyssinian_1 0 1 1"],
            "trainval.txt:1: '0' is not a number",
        ),
        (
            "pets",
            "oxford-iiit-pet/annotations/trainval.txt",
            ["Abyssinian_1 1 1 1", "american_bulldog_1 1 2 1"],
            "has class 1, which is american_bulldog",
        ),
    ],
)
def test_malformed_lists(tmp_path, name, file, lines, said):
    LISTED[name][0](tmp_path)
    text(tmp_path / file, lines)
    assert said in told(name, tmp_path)


def test_a_list_that_is_not_there(tmp_path):
    top = fixtures.food(tmp_path)
    (top / "meta/train.txt").unlink()
    assert f"{top}/meta/train.txt: No such file" in told("food", tmp_path)


def test_broken_matlab_files(tmp_path):
    top = fixtures.flowers(tmp_path)
    savemat(top / "setid.mat", {"trnid": np.array([[1, 19]])})
    assert "setid.mat: holds numbers from 1 to 19, not from 1 to 18" in told("flowers", tmp_path)
    assert "setid.mat: holds no 'tstid'" in told("flowers", tmp_path, "test")
    truncate(top / "imagelabels.mat")
    assert "imagelabels.mat: not readable as a MATLAB file" in told("flowers", tmp_path)
    top = fixtures.cars(tmp_path)
    savemat(top / "devkit/cars_meta.mat", {"class_names": np.array([["a", "b"]], dtype=object)})
    assert "cars_train_annos.mat: holds numbers from 1 to 3, not from 1 to 2" in told("cars", tmp_path)
    savemat(top / "devkit/cars_train_annos.mat", {"annotations": np.array([[1, 2]])})
    assert "cars_train_annos.mat: its annotations have no fields" in told("cars", tmp_path)
    (top / "cars_test_annos_withlabels.mat").rename(top / "devkit/cars_test_annos_withlabels.mat")
    savemat(top / "devkit/cars_meta.mat", {"class_names": np.array([["a", "b", "c"]], dtype=object)})
    assert len(open_set("cars", tmp_path, "test")) == 6


def test_a_broken_image_is_found_when_it_is_loaded(tmp_path):
    fixtures.food(tmp_path)
    source = open_set("food", tmp_path, "train")
    truncate(Path(source.name(1)))
    with pytest.raises(OSError, match=r"(?i)truncated"):
        source.load(1)
