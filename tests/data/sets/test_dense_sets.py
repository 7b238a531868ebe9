"""ADE20K, NYU-Depth V2 and a user's own folders: exact targets of small copies, and broken copies."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proteus.data.dense import read_classes, read_depth
from proteus.data.sets import open_set
from proteus.errors import InputError
from tests.data.sets import fixtures
from tests.data.sets.fixtures import depth_png, put, shade, text, truncate
from tests.data.sets.test_fine_grained import greys, told


def mask_png(path: Path, values, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, dtype=np.uint8), mode).save(path)
    return path


def broken(source, index: int = 0) -> str:
    """The one line in which reading a target ends."""
    with pytest.raises(InputError) as caught:
        source.target(index)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


# Masks and depths as files


def test_zero_becomes_ignored_before_the_subtraction(tmp_path):
    path = mask_png(tmp_path / "m.png", [[0, 1, 2], [150, 255, 149]])
    target = read_classes(path, 150, reduce_zero_label=True)
    assert target.tolist() == [[255, 0, 1], [149, 255, 148]]
    assert target.dtype == np.uint8


def test_class_numbers(tmp_path):
    path = mask_png(tmp_path / "m.png", [[0, 1, 2], [7, 255, 1]])
    assert read_classes(path, 3, ignore=7).tolist() == [[0, 1, 2], [255, 255, 1]]
    assert read_classes(path, 8, ignore=0).tolist() == [[255, 1, 2], [7, 255, 1]]
    with pytest.raises(InputError, match=r"m\.png: holds class 7; there are 0 to 6"):
        read_classes(path, 7)
    with pytest.raises(InputError, match=r"m\.png: holds class 7; there are 1 to 6"):
        read_classes(path, 6, reduce_zero_label=True)
    assert read_classes(path, 7, reduce_zero_label=True).max() == 255


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_masks_of_other_modes(tmp_path, mode):
    values = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    image = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values)
    if mode == "P":
        image.putpalette([200, 0, 0, 0, 200, 0])
    image = Image.fromarray(values * 255).convert("1") if mode == "1" else image
    image.save(tmp_path / "m.png")
    assert read_classes(tmp_path / "m.png", 2).tolist() == [[0, 1], [1, 0]]


def test_depths(tmp_path):
    path = depth_png(tmp_path / "d.png", np.array([[0, 1, 1500], [9999, 65535, 40000]]))
    metres = read_depth(path)
    assert metres.dtype == np.float32
    assert metres.tolist() == pytest.approx(np.float32([[0, 0.001, 1.5], [9.999, 65.535, 40]]))
    assert (
        read_depth(path, per_metre=256, invalid=(0, 65535)).tolist()
        == np.float32([[0, 1 / 256, 1500 / 256], [9999 / 256, 0, 40000 / 256]]).tolist()
    )
    with pytest.raises(InputError, match=r"m\.png: 8 bits a pixel"):
        read_depth(mask_png(tmp_path / "m.png", [[0, 1]]))


# ADE20K


def test_ade20k(tmp_path):
    fixtures.ade20k(tmp_path)
    for split, name in (("train", "ADE_train"), ("val", "ADE_val")):
        source = open_set("ade20k", tmp_path, split)
        assert len(source) == 3
        assert len(source.classes) == 150
        assert source.classes[149] == "thing 150, stuff"
        assert greys(source) == pytest.approx([50, 51, 52], abs=1)
        for index in range(3):
            expected = np.full((8, 12), index)
            expected[:, 0], expected[-1, 1:] = 255, 149
            assert (source.target(index) == expected).all()
            assert source.load(index).size == (12, 8)
            assert name in source.name(index)


def test_broken_ade20k(tmp_path):
    top = fixtures.ade20k(tmp_path)
    masks = top / "annotations/validation"
    source = open_set("ade20k", tmp_path, "val")
    mask_png(masks / "ADE_val_00000001.png", np.full((8, 12), 151))
    assert broken(source) == f"{masks}/ADE_val_00000001.png: holds class 151; there are 1 to 150"
    mask_png(masks / "ADE_val_00000001.png", np.ones((12, 8)))
    assert broken(source).startswith(
        f"{masks}/ADE_val_00000001.png: 8 x 12 pixels, but its image {top}/images/validation"
    )
    put(masks / "ADE_val_00000002.png", 3)
    assert "ADE_val_00000002.png: a picture in colour" in broken(source, 1)
    truncate(masks / "ADE_val_00000003.png")
    assert "ADE_val_00000003.png: not readable as an image of class numbers" in broken(source, 2)
    (masks / "ADE_val_00000003.png").unlink()
    assert "ADE_val_00000003.png: not there" in broken(source, 2)
    assert told("ade20k", tmp_path, "val").startswith(f"{masks}/ADE_val_00000003.png: not there, though {top}/images/")
    text(top / "objectInfo150.txt", ["Idx\tName", "1\twall", "3\tsky"])
    assert "objectInfo150.txt:3: '3\\tsky' is not class 2" in told("ade20k", tmp_path, "train")
    (top / "objectInfo150.txt").unlink()
    assert open_set("ade20k", tmp_path, "train").classes == [str(number) for number in range(1, 151)]


# NYU-Depth V2


@pytest.mark.parametrize("write", [fixtures.nyu, fixtures.nyu_mmseg], ids=["bts", "mmseg"])
def test_nyu(tmp_path, write):
    write(tmp_path)
    for split, start in (("train", 50), ("test", 80)):
        source = open_set("nyu", tmp_path, split)
        assert source.classes == []
        assert len(source) == 3  # the line without a depth is left out
        assert greys(source) == pytest.approx([start, start + 1, start + 2], abs=1)
        for index in range(3):
            expected = np.full((8, 12), 1.5 + index, dtype=np.float32)
            expected[0, 0] = 0
            assert (source.target(index) == expected).all()
            assert source.target(index).dtype == np.float32


def test_nyu_with_everything_in_its_top_folder(tmp_path):
    top = fixtures.nyu(tmp_path)
    (top / "sync/bathroom_0001").rename(top / "bathroom_0001")
    assert len(open_set("nyu", tmp_path, "train")) == 3


def test_broken_nyu(tmp_path):
    top = fixtures.nyu(tmp_path)
    (top / "sync/bathroom_0001/sync_depth_00002.png").unlink()
    assert "sync_depth_00002.png: not there, though" in told("nyu", tmp_path)
    text(top / "nyu_train.txt", ["/bathroom_0001/rgb_00000.jpg"])
    assert "nyu_train.txt:1: '/bathroom_0001/rgb_00000.jpg' is not of the form" in told("nyu", tmp_path)
    text(top / "nyu_train.txt", ["/gone/rgb_00000.jpg /gone/sync_depth_00000.png 518.8579"])
    assert f"{top}/gone/rgb_00000.jpg: not there" in told("nyu", tmp_path)
    text(top / "nyu_train.txt", ["/bathroom_0001/rgb_00000.jpg None 518.8579"])
    assert "nyu_train.txt: lists no image with a depth" in told("nyu", tmp_path)
    depth_png(top / "official_splits/test/bathroom_0001/sync_depth_00001.png", np.ones((4, 4)))
    assert "sync_depth_00001.png: 4 x 4 pixels, but its image" in broken(open_set("nyu", tmp_path, "test"), 1)


# A user's own folders


def test_own_classes(tmp_path):
    for split, start in (("train", 0), ("test", 20)):
        fixtures.class_folders(tmp_path / split, ["cat", "dog"], split, form="{index}.png")
        source = open_set("folder", tmp_path, split)
        assert source.classes == ["cat", "dog"]
        assert source.labels.tolist() == [0, 0, 1, 1]
        assert greys(source) == [shade(0, start), shade(0, start + 1), shade(1, start), shade(1, start + 1)]
    put(tmp_path / "test/fox/1.png", 0)
    assert "1 are of no class (fox); 2 classes are expected" in told(
        "folder", tmp_path, "test", classes=open_set("folder", tmp_path, "train").classes
    )
    assert "folder: no folder" in told("folder", tmp_path, "val")


def test_own_masks(tmp_path):
    for number in range(2):
        put(tmp_path / f"val/photos/{number}.jpg", 60 + number, 2)
        mask_png(tmp_path / f"val/labels/{number}.png", [[0, 1], [2, 9]])
    options = {"images": "photos", "masks": "labels", "classes": ["a", "b"]}
    source = open_set("folder-segmentation", tmp_path, "val", reduce_zero_label=True, ignore=9, **options)
    assert source.classes == ["a", "b"]
    assert source.target(1).tolist() == [[255, 0], [1, 255]]
    assert "holds class 2; there are 0 to 1" in broken(
        open_set("folder-segmentation", tmp_path, "val", ignore=9, **options)
    )
    (tmp_path / "val/labels/1.png").unlink()
    assert "labels/1.png: not there, though" in told("folder-segmentation", tmp_path, "val", **options)
    options["masks"] = "masks"
    assert "val/masks: no such folder" in told("folder-segmentation", tmp_path, "val", **options)
    assert "0 classes: 1 to 255, each once" in told("folder-segmentation", tmp_path, "val", classes=[])


def test_own_depths(tmp_path):
    put(tmp_path / "val/rgb/a.b.jpg", 60, 2)
    depth_png(tmp_path / "val/depth/a.b.png", np.array([[0, 500], [65535, 2000]]))
    assert open_set("folder-depth", tmp_path, "val").target(0).tolist() == [[0, 0.5], [0, 2]]
    source = open_set("folder-depth", tmp_path, "val", per_metre=500, invalid=[2000])
    assert source.target(0).tolist() == pytest.approx(np.float32([[0, 1], [131.07, 0]]))
    assert "per_metre=0 must be above 0" in told("folder-depth", tmp_path, "val", per_metre=0)
    (tmp_path / "val/rgb/a.b.jpg").unlink()
    assert "no images in" in told("folder-depth", tmp_path, "val")
