"""A label file of lines `image,class` gives the images it names their labels, and every wrong line is told."""

import os
from pathlib import Path

import numpy as np
import pytest

from proteus.data.sets import open_set
from proteus.errors import MissingDataError
from tests.data.sets.fixtures import put, text
from tests.data.sets.test_fine_grained import greys, told

LINES = ["Forest_2.jpg,Forest", "SeaLake_1.jpg,SeaLake", "deep/er/AnnualCrop_9.png,AnnualCrop", "Forest_1.jpg,Forest"]


@pytest.fixture
def root(tmp_path):
    for file, grey in [("Forest_1", 10), ("Forest_2", 20), ("SeaLake_1", 30)]:
        put(tmp_path / f"images/{file.partition('_')[0]}/{file}.jpg", grey)
    put(tmp_path / "images/deep/er/AnnualCrop_9.png", 40)
    return tmp_path / "images"


def test_names_and_paths_lead_to_images_in_the_order_of_the_file(root, tmp_path):
    source = open_set("listed", root, str(text(tmp_path / "train.csv", LINES)))
    assert len(source) == 4
    assert source.classes == ["AnnualCrop", "Forest", "SeaLake"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [1, 2, 0, 1]
    assert greys(source) == pytest.approx([20, 30, 40, 10], abs=1)
    assert source.name(0) == str(root / "Forest/Forest_2.jpg")
    assert source.name(2) == str(root / "deep/er/AnnualCrop_9.png")


def test_a_file_at_the_top_is_meant_though_others_below_share_its_name(root, tmp_path):
    put(root / "Forest_1.jpg", 50)
    source = open_set("listed", root, str(text(tmp_path / "train.csv", ["Forest_1.jpg,a", "./Forest/Forest_1.jpg,b"])))
    assert greys(source) == pytest.approx([50, 10], abs=1)


@pytest.mark.parametrize("header", ["image,class", "Filename, Label"])
def test_a_header_a_byte_order_mark_and_empty_lines_at_the_end_are_no_images(root, tmp_path, header):
    file = tmp_path / "train.csv"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([header, *LINES, "", ""]).encode())
    assert open_set("listed", root, str(file)).labels.tolist() == [1, 2, 0, 1]
    text(file, [header, *LINES, "Forest_7.jpg,Forest"])
    assert f"{file}:6: no image Forest_7.jpg anywhere below" in told("listed", root, str(file))


def test_commas_in_a_name_and_names_of_any_bytes(root, tmp_path):
    odd = os.fsdecode(b"caf\xe9.jpg")
    put(root / "a,b.jpg", 60)
    put(root / "c" / odd, 70)
    file = tmp_path / "train.csv"
    file.write_bytes(b"a,b.jpg,x y\n" + os.fsencode(odd) + b",z\n")
    source = open_set("listed", root, str(file))
    assert greys(source) == pytest.approx([60, 70], abs=1)
    assert source.classes == ["x y", "z"]


def test_where_a_label_file_may_lie(root, tmp_path, monkeypatch):
    text(root / "train.csv", LINES[:2])
    monkeypatch.chdir(tmp_path)
    assert len(open_set("listed", root, "train.csv")) == 2
    text(tmp_path / "train.csv", LINES[:1])  # the current folder comes first
    assert len(open_set("listed", root, "train.csv")) == 1
    assert len(open_set("listed", root, str(root / "train.csv"))) == 2
    with pytest.raises(MissingDataError, match=f"no file 'val.csv' in the current folder or in {root}"):
        open_set("listed", root, "val.csv")
    with pytest.raises(MissingDataError, match=r"no folder .*elsewhere; it should hold the images"):
        open_set("listed", tmp_path / "elsewhere", "train.csv")


def test_classes_from_a_list_or_a_file_decide_the_numbers(root, tmp_path):
    train = str(text(tmp_path / "train.csv", LINES))
    names = ["SeaLake", "River", "Forest", "AnnualCrop"]
    text(root / "classes.txt", names)
    for classes in (names, "classes.txt", str(root / "classes.txt")):
        source = open_set("listed", root, train, classes=classes)
        assert source.classes == names
        assert source.labels.tolist() == [2, 0, 3, 2]
    text(tmp_path / "train.csv", ["image,class", *LINES])
    assert f"{train}:4: unknown class 'AnnualCrop'; valid: Forest, SeaLake" in told(
        "listed", root, train, classes=["SeaLake", "Forest"]
    )
    assert "listed: classes: holds 'a' twice" in told("listed", root, train, classes=["a", "b", "a"])
    for wrong in ([], [0, 1], ["a", ""], {"a": 0}):
        assert "listed: classes: expected names of classes" in told("listed", root, train, classes=wrong)
    assert "no file 'names.txt' in" in told("listed", root, train, classes="names.txt")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["Forest_1.jpg"], "1: 'Forest_1.jpg' is not of the form 'image,class'"),
        (["Forest_1.jpg,a", "", "Forest_2.jpg,a"], "2: '' is not of the form"),
        (["Forest_1.jpg,a", "Forest_2.jpg, "], "2: 'Forest_2.jpg,' is not of the form"),
        (["Forest_1.jpg,a", ",a"], "2: ',a' is not of the form"),
        (["Forest_1.jpg,a", "Forest_7.jpg,a"], "2: no image Forest_7.jpg anywhere below {root}"),
        (["River/Forest_1.jpg,a"], "1: no image River/Forest_1.jpg in {root}"),
        (["Forest/Forest_7.jpg,a"], "1: no image Forest/Forest_7.jpg in {root}"),
        (["{root}/Forest/Forest_1.jpg,a"], "1: {root}/Forest/Forest_1.jpg is not below {root}: give the path"),
        (["../images/Forest/Forest_1.jpg,a"], "1: ../images/Forest/Forest_1.jpg is not below {root}: give the path"),
        (["Twice.jpg,a"], "1: Twice.jpg may be Forest/Twice.jpg and SeaLake/Twice.jpg in {root}: give the path of one"),
        (["Forest_1.jpg,a", "Forest_2.jpg,a", "Forest/Forest_1.jpg,b"], "3: Forest/Forest_1.jpg stands in line 1 as"),
        ([], " names no image; a line is 'image,class'"),
        (["image,class"], " names no image; a line is 'image,class'"),
    ],
)
def test_every_wrong_line_is_told_by_its_number(root, tmp_path, lines, said):
    put(root / "Forest/Twice.jpg", 80)
    put(root / "SeaLake/Twice.jpg", 90)
    file = text(tmp_path / "train.csv", [line.format(root=root) for line in lines])
    assert told("listed", root, str(file)).startswith(f"{file}:{said.format(root=root)}")


def test_a_folder_without_images_and_a_file_that_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    file = text(tmp_path / "train.csv", ["a.jpg,a"])
    assert f"listed: no images under {tmp_path / 'empty'}" in told("listed", tmp_path / "empty", str(file))
    assert f"no file '{tmp_path}'" in told("listed", tmp_path, str(Path(tmp_path)))
