"""ImageNet-1K and its test sets: labels, orders and multi-labels of small copies, and broken copies."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from proteus.data.sets import open_set
from tests.data.sets import fixtures
from tests.data.sets.fixtures import WNIDS, put, shade
from tests.data.sets.test_fine_grained import greys, told


@pytest.mark.parametrize("place", ["imagenet", "ILSVRC/Data/CLS-LOC", "in1k/ILSVRC/Data/CLS-LOC", "."])
def test_in1k_is_sorted_by_wordnet_id(tmp_path, place):
    top = fixtures.in1k(tmp_path / "made")
    if place == ".":
        shutil.move(top / "train", tmp_path / "train")
        shutil.move(top / "val", tmp_path / "val")
    else:
        shutil.move(top, tmp_path / place)
    for split, start in (("train", 0), ("val", 10)):
        source = open_set("in1k", tmp_path, split)
        assert source.classes == WNIDS
        assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert source.labels.dtype == np.int64
        assert greys(source) == pytest.approx([shade(label, start + i) for label in range(4) for i in (0, 1)], abs=1)
        assert Path(source.name(3)).is_file()
        assert WNIDS[1] in source.name(3)


def test_class_folders_too_many_or_too_few(tmp_path):
    val = fixtures.in1k(tmp_path) / "val"
    assert len(open_set("in1k", tmp_path, "val", classes=WNIDS[::-1])) == 8
    line = told("in1k", tmp_path, "val", classes=[*WNIDS, "n09", "n10"])
    assert line == f"in1k: {val}: 2 class folders are missing (n09, ...); 6 classes are expected"
    line = told("in1k", tmp_path, "val", classes=[*WNIDS[1:], "n09"])
    assert "1 class folders are missing (n09) and 1 are of no class (n01440764); 4 classes" in line


def test_a_flat_val(tmp_path):
    top = fixtures.in1k(tmp_path)
    put(top / "val/ILSVRC2012_val_00000050.JPEG", 0)
    assert "are not sorted into classes: move each into" in told("in1k", tmp_path, "val")
    (top / "val/ILSVRC2012_val_00000050.JPEG").rename(top / f"val/{WNIDS[0]}/ILSVRC2012_val_00000050.JPEG")
    put(top / "val/x/y/z.png", 0)
    assert f"{top}/val/x/y/z.png is not of the form <class>/<image>" in told("in1k", tmp_path, "val")


# ReaL


def test_real_goes_by_the_number_of_an_image(tmp_path):
    fixtures.in1k(tmp_path)
    lists = [[3], [2, 0], [], [0], [3, 1], [2], [1], [0, 1, 2]]  # of images 1 to 8
    fixtures.in_real(tmp_path, lists)
    source, val = open_set("in-real", tmp_path, "val"), open_set("in1k", tmp_path, "val")
    assert source.labels.dtype == np.int8
    assert source.labels.shape == (8, 4)
    assert [source.name(index) for index in range(8)] == [val.name(index) for index in range(8)]
    found = {}
    for index in range(8):
        number = int(Path(source.name(index)).stem.split("_")[-1])
        found[number] = np.flatnonzero(source.labels[index] == 1).tolist()
    assert found == {number + 1: sorted(labels) for number, labels in enumerate(lists)}
    assert set(np.unique(source.labels)) == {-1, 1}
    # Image 4 is the first of class 0 and image 3 of class 1, so an order by path would have mixed them up.
    assert source.labels[0].tolist() == [1, -1, -1, -1]


def test_broken_real(tmp_path):
    top = fixtures.in1k(tmp_path)
    assert "in-real: no real.json" in told("in-real", tmp_path, "val")
    path = fixtures.in_real(tmp_path, [[0]] * 7)
    assert f"{path}: {top}/val/{WNIDS[0]}/ILSVRC2012_val_00000008.JPEG is beyond its 7 lists" in told(
        "in-real", tmp_path, "val"
    )
    fixtures.in_real(tmp_path, [[0]] * 7 + [[4]])
    assert "image 8 has class 4" in told("in-real", tmp_path, "val")
    for content in ("[[0], 1]", "{}x", "[[0.5]]", ""):
        path.write_text(content)
        assert f"{path}: not readable as ReaL's labels" in told("in-real", tmp_path, "val")
    fixtures.in_real(tmp_path, [[0]] * 8)
    put(top / f"val/{WNIDS[0]}/cat.JPEG", 0)
    assert "cat.JPEG is not named ILSVRC2012_val_<number>" in told("in-real", tmp_path, "val")


# The test sets


@pytest.mark.parametrize(
    ("name", "write", "wnids"),
    [
        ("in-sketch", fixtures.in_sketch, WNIDS),
        ("in-a", fixtures.in_a, WNIDS[1:3]),
        ("in-r", fixtures.in_r, [WNIDS[0], WNIDS[3]]),
    ],
    ids=["sketch", "a", "r"],
)
def test_sets_of_class_folders(tmp_path, name, write, wnids):
    write(tmp_path)
    source = open_set(name, tmp_path, "test")
    assert source.classes == wnids
    assert source.labels.tolist() == [label for label in range(len(wnids)) for _ in range(2)]
    assert greys(source) == pytest.approx([shade(label, 20 + i) for label in range(len(wnids)) for i in (0, 1)], abs=1)
    assert "class folders are missing" in told(name, tmp_path, "test", classes=[*wnids, "n99999999"])
    assert "no split 'train'" in told(name, tmp_path, "train")


def test_v2_folders_are_numbers(tmp_path):
    """Sorted as text, 10 would be class 2."""
    top = fixtures.in_v2(tmp_path)
    source = open_set("in-v2", tmp_path, "test")
    assert sorted(source.labels.tolist()) == [0, 1, 2, 3, 10]
    assert greys(source) == pytest.approx([10 + 10 * label for label in source.labels], abs=1)
    assert source.classes == [str(number) for number in range(11)]
    for bad in ("n01440764", "07"):
        put(top / bad / "x.jpeg", 0)
        assert f"{bad}: the folders of this set are class numbers" in told("in-v2", tmp_path, "test")
        shutil.rmtree(top / bad)


def test_corruptions_and_severities(tmp_path):
    top = fixtures.in_c(tmp_path, {"fog": "", "gaussian_noise": "noise", "pixelate": "digital"})
    for corruption in ("fog", "gaussian_noise", "pixelate"):
        for severity in range(1, 6):
            source = open_set("in-c", tmp_path, "test", corruption=corruption, severity=severity)
            assert source.labels.tolist() == [0, 1, 2, 3]
            assert greys(source) == pytest.approx([shade(label, severity) for label in range(4)], abs=1)
            assert f"{corruption}/{severity}/" in source.name(0)
    assert len(open_set("in-c", top, "test", corruption="pixelate", severity=1)) == 4
    assert "in-c: no folder 'snow'" in told("in-c", tmp_path, "test", corruption="snow", severity=1)
    shutil.rmtree(top / "fog/3")
    assert "holds no folder 3 for" in told("in-c", tmp_path, "test", corruption="fog", severity=3)
    shutil.rmtree(top / "fog/4")
    (top / "fog/4").mkdir()
    assert f"in-c: no images under {top}/fog/4" in told("in-c", tmp_path, "test", corruption="fog", severity=4)
