"""Where images come from: folders, Hugging Face datasets, the digits, one image; shares, merging, holding out."""

import io
import itertools
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proteus.config import Data
from proteus.config import Source as SourceConfig
from proteus.data.sources import FolderSource, Merged, SingleImageSource, Subset, build_source, check_roots, hold_out
from proteus.errors import InputError


def put(path: Path, grey: int = 0) -> Path:
    """A 4 x 4 image of one grey value; its format follows the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), grey).save(path)
    return path


def grey_of(source, index: int) -> int:
    image = source.load(index)
    assert image.mode == "RGB"
    red, green, blue = image.getpixel((1, 1))
    assert red == green == blue
    return red


def names(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def open_source(kind: str = "folder", root: Path | str | None = None, seed: int = 0, **settings):
    return build_source(Data(kind=kind, root=None if root is None else str(root), **settings), seed)


def told(kind: str = "folder", root: Path | str | None = None, **settings) -> str:
    """The one line that opening a source ends in."""
    with pytest.raises(InputError) as caught:
        open_source(kind, root, **settings)
    (line,) = caught.value.lines
    assert "\n" not in line
    assert "Traceback" not in line
    return line


# Folders


def test_classes_are_numbered_in_sorted_order(tmp_path):
    for grey, name in enumerate(
        ["zebra/1.png", "ant/2.png", "Bee/1.png", "ant/10.png", "ant/1.png", "10/a.png", "9/a.png"]
    ):
        put(tmp_path / name, grey)
    source = open_source(root=tmp_path)
    assert names(source) == ["10/a.png", "9/a.png", "Bee/1.png", "ant/1.png", "ant/10.png", "ant/2.png", "zebra/1.png"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 1, 2, 3, 3, 3, 4]
    assert [grey_of(source, index) for index in range(7)] == [5, 6, 2, 4, 3, 1, 0]
    assert open_source(root=tmp_path, labels="ignore").labels is None


def test_a_split_is_a_subfolder(tmp_path):
    put(tmp_path / "train/a/1.png", 1)
    put(tmp_path / "train/b/1.png", 2)
    put(tmp_path / "val/b/1.png", 3)
    assert open_source(root=tmp_path, split="train").labels.tolist() == [0, 1]
    held = open_source(root=tmp_path, split="val")
    assert (len(held), grey_of(held, 0), held.labels.tolist()) == (1, 3, [0])
    everything = open_source(root=tmp_path)
    assert len(everything) == 3
    assert everything.labels is None  # images lie two folders deep


@pytest.mark.parametrize(
    "files",
    [
        ["a.png", "b.png"],
        ["x/y/a.png", "x/z/b.png"],
        ["x/a.png", "b.png"],
        ["x/a.png", "y/z/b.png"],
        ["a.png", "x/a.png", "x/y/a.png"],
    ],
    ids=["flat", "deep", "mixed-flat", "mixed-deep", "all"],
)
def test_other_trees_have_images_and_no_labels(tmp_path, files):
    for file in files:
        put(tmp_path / file)
    source = FolderSource(tmp_path)
    assert sorted(names(source)) == sorted(files)
    assert source.labels is None


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    images = ["a/1.png", "a/2.JPG", "b/3.JpEg", "b/4.webp", "b/5.bmp", "b/6.TIF", "b/7.gif", "b/8.ppm"]
    for name in images:
        put(tmp_path / name)
    for name in ("a/.hidden.png", ".thumbnails/1.png", "a/.cache/2.png", "b/._3.jpeg"):
        put(tmp_path / name)
    for name in ("a/notes.txt", "labels.csv", "a/1.png.bak", "b/png", "b/jpg.zip"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    source = FolderSource(tmp_path)
    assert names(source) == images
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]  # a folder without images is no class


@pytest.mark.parametrize("root", [".hidden root", "with space", "größe-日本"])
def test_names_with_spaces_and_unicode(tmp_path, root):
    files = ["big cat/my cat.png", "größe/ñandú.png", "日本/猫 1.png", "big cat/[x]*?.png", "%20/a#b&c=d.png"]
    for grey, file in enumerate(sorted(files)):
        put(tmp_path / root / file, 10 * grey)
    source = FolderSource(tmp_path / root)
    assert set(names(source)) == set(files)
    assert [grey_of(source, index) for index in range(5)] == [10 * sorted(files).index(name) for name in names(source)]
    assert sorted(set(source.labels.tolist())) == [0, 1, 2, 3]


def test_names_that_are_no_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for grey, name in enumerate([b"\xff\xfe.png", b"\x01\x7f.png", b"a'\"\\.png"]):
        buffer = io.BytesIO()
        Image.new("L", (4, 4), 50 * grey).save(buffer, "PNG")
        with open(folder + b"/" + name, "wb") as file:
            file.write(buffer.getvalue())
    source = FolderSource(tmp_path)
    found = {os.fsencode(source.name(index)): grey_of(source, index) for index in range(len(source))}
    assert found == {b"caf\xe9/\xff\xfe.png": 0, b"caf\xe9/\x01\x7f.png": 50, b"caf\xe9/a'\"\\.png": 100}
    assert source.labels.tolist() == [0, 0, 0]


def test_symbolic_links_are_followed(tmp_path):
    put(tmp_path / "store/cats/1.png", 1)
    put(tmp_path / "store/cats/2.png", 2)
    put(tmp_path / "store/single.png", 3)
    root = tmp_path / "set"
    put(root / "dog/1.png", 4)
    (root / "cat").symlink_to(tmp_path / "store/cats")
    (root / "dog/link.png").symlink_to(tmp_path / "store/single.png")
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        source = FolderSource(path)
        assert names(source) == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/link.png"]
        assert source.labels.tolist() == [0, 0, 1, 1]
        assert [grey_of(source, index) for index in range(4)] == [1, 2, 4, 3]


def test_only_files_are_images(tmp_path):
    put(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")  # counted: it will be found unreadable and named
    assert names(FolderSource(tmp_path)) == ["a.png", "gone.png"]


def test_a_link_back_to_a_parent_adds_nothing(tmp_path):
    put(tmp_path / "a/1.png")
    put(tmp_path / "b/1.png")
    (tmp_path / "b/up").symlink_to(tmp_path)
    source = FolderSource(tmp_path)
    assert names(source) == ["a/1.png", "b/1.png"]
    assert source.labels.tolist() == [0, 1]


def test_links_in_a_circle_end(tmp_path):
    """Two folders that link to one another: a path never comes back to a folder it has been in."""
    put(tmp_path / "a/1.png")
    put(tmp_path / "b/2.png")
    (tmp_path / "a/next").symlink_to(tmp_path / "b")
    (tmp_path / "b/next").symlink_to(tmp_path / "a")
    found = names(FolderSource(tmp_path))
    assert {"a/1.png", "b/2.png"} <= set(found)
    assert set(found) <= {"a/1.png", "a/next/2.png", "b/2.png", "b/next/1.png"}


def test_order_does_not_depend_on_the_file_system(tmp_path):
    order = np.random.default_rng(0).permutation(30)
    for turn, root in ((order, "one"), (order[::-1], "two")):
        for number in turn:
            put(tmp_path / root / f"c{number % 3}/{number}.png", int(number))
    one, two = FolderSource(tmp_path / "one"), FolderSource(tmp_path / "two")
    assert names(one) == names(two) == sorted(names(one))
    assert one.labels.tolist() == two.labels.tolist() == [int(name[1]) for name in names(one)]


def test_what_a_broken_image_raises_is_left_to_the_caller(tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    (tmp_path / "y.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(tmp_path)
    assert len(source) == 2
    for index in range(2):
        with pytest.raises(OSError, match=r"x\.png|y\.png"):
            source.load(index)


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    (empty / "readme.txt").write_text("none")
    line = told(root=empty)
    assert str(empty) in line
    assert "no images" in line
    assert ".jpg" in line
    assert ".png" in line

    missing = tmp_path / "missing"
    line = told(root=missing)
    assert f"data.root={missing}" in line
    assert "no such folder" in line
    assert "data.root=PATH" in line

    put(tmp_path / "set/train/1.png")
    line = told(root=tmp_path / "set", split="val")
    assert str(tmp_path / "set") in line
    assert "'val'" in line
    assert "data.split=null" in line

    line = told(root=tmp_path / "set/train/1.png")
    assert "1.png" in line
    assert "folder" in line
    assert "data.root=PATH" in told()
    assert "train/<class>/<image>" in told(split="train")

    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(open_source(root="~/set")) == ["train/1.png"]


def test_roots_are_checked_without_reading(tmp_path):
    put(tmp_path / "set/1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    good = [
        Data(root=str(tmp_path / "set")),
        Data(root=str(tmp_path / "empty")),
        Data(kind="image", root=str(tmp_path / "broken.jpg")),
        Data(kind="digits"),
        Data(kind="hf", root="someone/something"),
    ]
    for cfg in good:
        check_roots(cfg)
    bad = [
        (Data(root=str(tmp_path / "gone")), "gone"),
        (Data(kind="image", root=str(tmp_path / "set")), "image"),
        (Data(), "data.root is not set"),
        (Data(kind="hf"), "data.root is not set"),
        (Data(kind="digits", merge=[SourceConfig(root=str(tmp_path / "gone"))]), "gone"),
        (Data(root=str(tmp_path / "set"), split="val"), "val"),
    ]
    for cfg, text in bad:
        with pytest.raises(InputError, match=text):
            check_roots(cfg)


# Hugging Face datasets


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, and a network that may not be tried: what was tried is listed."""
    import datasets
    import huggingface_hub.constants

    tried = []

    def no_network(*args, **_):
        tried.append(args)
        raise RuntimeError(f"the network was tried: {args}")

    real_connect = socket.socket.connect
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda self, address: real_connect(self, address) if self.family == socket.AF_UNIX else no_network(address),
    )
    cache = tmp_path / "huggingface"
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(cache))
    datasets.disable_progress_bars()
    yield tried
    datasets.enable_progress_bars()


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), grey).save(buffer, "PNG")
    return buffer.getvalue()


def table(count: int = 5, *, image: str = "picture", label: str | None = "kind", **columns):
    """A dataset of grey images 0, 10, 20, ... and class labels 0, 1, 2, 0, 1, ..."""
    import datasets

    data = {image: [{"bytes": png(10 * number), "path": None} for number in range(count)], **columns}
    features = {image: datasets.Image()}
    if label:
        data[label] = [number % 3 for number in range(count)]
        features[label] = datasets.ClassLabel(names=["a", "b", "c"])
    made = datasets.Dataset.from_dict(data)
    for key, feature in features.items():
        made = made.cast_column(key, feature)
    return made


def check_table(source, count: int = 5, labelled: bool = True):
    assert len(source) == count
    assert [grey_of(source, index) for index in range(count)] == [10 * number for number in range(count)]
    assert grey_of(source, np.int64(count - 1)) == 10 * (count - 1)
    if labelled:
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == [number % 3 for number in range(count)]
    else:
        assert source.labels is None


def test_hf_parquet_file(tmp_path, offline):
    file = tmp_path / "some set.parquet"
    table(id=[7, 8, 9, 10, 11]).to_parquet(str(file))
    check_table(open_source("hf", file))
    check_table(open_source("hf", file, split="train"))
    check_table(open_source("hf", file, labels="ignore"), labelled=False)
    assert str(file) in open_source("hf", file).name(3)
    assert "3" in open_source("hf", file).name(3)


def test_hf_reads_local_files_without_the_network(tmp_path, offline):
    """No telemetry: `datasets` counts the loading of local files on its server unless told not to."""
    table().to_parquet(str(tmp_path / "x.parquet"))
    put(tmp_path / "folder/a/1.png")
    open_source("hf", tmp_path / "x.parquet")
    open_source("hf", tmp_path / "folder")
    assert offline == []


def test_hf_folder_of_parquet_files(tmp_path, offline):
    table(5).to_parquet(str(tmp_path / "set/train-00000-of-00001.parquet"))
    table(3).to_parquet(str(tmp_path / "set/test-00000-of-00001.parquet"))
    check_table(open_source("hf", tmp_path / "set"))
    check_table(open_source("hf", tmp_path / "set", split="test"), 3)


def test_hf_saved_to_disk(tmp_path, offline):
    import datasets

    table().save_to_disk(str(tmp_path / "one"))
    check_table(open_source("hf", tmp_path / "one"))
    datasets.DatasetDict({"train": table(5), "test": table(2)}).save_to_disk(str(tmp_path / "both"))
    check_table(open_source("hf", tmp_path / "both"))
    check_table(open_source("hf", tmp_path / "both", split="test"), 2)
    assert offline == []


def test_hf_image_folder(tmp_path, offline):
    for number in range(4):
        put(tmp_path / f"set/train/{'ab'[number % 2]}/{number}.png", 10 * number)
    put(tmp_path / "set/test/a/9.png", 90)
    source = open_source("hf", tmp_path / "set")
    assert sorted((grey_of(source, index), int(source.labels[index])) for index in range(4)) == [
        (0, 0),
        (10, 1),
        (20, 0),
        (30, 1),
    ]
    assert sorted(Path(name.split("(")[1]).name[:5] for name in names(source)) == ["0.png", "1.png", "2.png", "3.png"]
    held = open_source("hf", tmp_path / "set", split="test")
    assert (len(held), grey_of(held, 0)) == (1, 90)


def test_hf_hub_id_that_is_not_on_disk(offline):
    line = told("hf", "someone/no-such-set")
    assert "data.root=someone/no-such-set" in line
    assert "data.download=true" in line
    assert offline == []


def test_hf_hub_id_is_asked_for_when_downloading_is_allowed(offline):
    line = told("hf", "someone/no-such-set", download=True)
    assert "data.root=someone/no-such-set" in line
    assert "data.download" not in line
    assert offline != []


def test_hf_hub_id_that_is_on_disk_needs_no_download(tmp_path, offline):
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    table().to_parquet(str(tmp_path / "x.parquet"))
    builder = Parquet(
        cache_dir=datasets.config.HF_DATASETS_CACHE,
        dataset_name="things",
        config_name="default",
        hash="0123456789abcdef",
        data_files={"train": [str(tmp_path / "x.parquet")]},
    )
    builder.download_and_prepare()
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    (built,) = (cache / "things").iterdir()
    (cache / "someone___things").mkdir()
    built.rename(cache / "someone___things/default")  # where a set of the hub lies
    check_table(open_source("hf", "someone/things"))
    assert offline == []


def test_hf_missing_local_path(tmp_path, offline):
    line = told("hf", tmp_path / "gone.parquet")
    assert str(tmp_path / "gone.parquet") in line
    assert offline == []


@pytest.mark.parametrize("form", ["disk", "dict", "parquet", "folder"])
def test_hf_split_that_does_not_exist(tmp_path, offline, form):
    import datasets

    root = tmp_path / "set"
    if form == "disk":
        made = table()
        made = datasets.Dataset(made.data, info=made.info, split=datasets.Split.TRAIN)
        made.save_to_disk(str(root))
    elif form == "dict":
        datasets.DatasetDict({"train": table()}).save_to_disk(str(root))
    elif form == "parquet":
        table().to_parquet(str(root / "train.parquet"))
    else:
        put(root / "train/a/1.png")
    line = told("hf", root, split="holdout")
    assert str(root) in line
    assert "'holdout'" in line
    assert "train" in line  # what there is instead


def test_hf_splits_without_train_ask_for_one(tmp_path, offline):
    import datasets

    datasets.DatasetDict({"dev": table(), "test": table(2)}).save_to_disk(str(tmp_path / "set"))
    line = told("hf", tmp_path / "set")
    assert "'train'" in line
    assert "dev" in line
    assert "test" in line
    check_table(open_source("hf", tmp_path / "set", split="dev"))


def test_hf_columns_that_cannot_be_used(tmp_path, offline):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "text.parquet"))
    line = told("hf", tmp_path / "text.parquet")
    assert "text.parquet" in line
    assert "image column" in line
    assert "'text'" in line
    two = table().add_column("other", [{"bytes": png(1), "path": None}] * 5).cast_column("other", datasets.Image())
    two.to_parquet(str(tmp_path / "two.parquet"))
    line = told("hf", tmp_path / "two.parquet")
    assert "picture" in line
    assert "other" in line
    table().select([]).to_parquet(str(tmp_path / "none.parquet"))
    assert str(tmp_path / "none.parquet") in told("hf", tmp_path / "none.parquet")
    table().select([]).save_to_disk(str(tmp_path / "none"))
    assert str(tmp_path / "none") in told("hf", tmp_path / "none")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    line = told("hf", tmp_path / "x.csv")
    assert "x.csv" in line
    assert ".parquet" in line


def test_hf_labels(tmp_path, offline):
    import datasets

    def labels(name: str, data):
        data.to_parquet(str(tmp_path / f"{name}.parquet"))
        return open_source("hf", tmp_path / f"{name}.parquet").labels

    assert labels("none", table(label=None)) is None
    assert labels("integers", table(label=None, label_=[0] * 5).rename_column("label_", "label")).tolist() == [0] * 5
    assert labels("other-integers", table(label=None, id=[4, 3, 2, 1, 0])) is None
    two = table().add_column("coarse", [0, 0, 0, 1, 1]).cast_column("coarse", datasets.ClassLabel(names=["x", "y"]))
    assert labels("two", two) is None  # which of them is meant is not known


@pytest.mark.parametrize(
    "values", [["cat", "dog", "cat", "eel", "dog"], [0, None, 1, 2, 0], [[0], [1], [2], [0, 1], [2]]]
)
def test_hf_labels_that_are_no_classes(tmp_path, offline, values):
    """Labels are optional: what cannot be one number an image is no reason to fail, nor to invent numbers."""
    table(label=None).add_column("label", values).to_parquet(str(tmp_path / "x.parquet"))
    source = open_source("hf", tmp_path / "x.parquet")
    if values[0] == "cat" and source.labels is not None:  # names may be numbered
        assert source.labels.tolist() == [0, 1, 0, 2, 1]
    else:
        assert source.labels is None
    assert grey_of(source, 4) == 40
    assert open_source("hf", tmp_path / "x.parquet", labels="ignore").labels is None


def test_hf_broken_and_missing_images_can_be_named(tmp_path, offline):
    import datasets

    rows = [{"bytes": png(5), "path": None}, {"bytes": b"nothing", "path": "b.png"}, None]
    made = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    made.to_parquet(str(tmp_path / "x.parquet"))
    source = open_source("hf", tmp_path / "x.parquet")
    assert len(source) == 3
    assert grey_of(source, 0) == 5
    for index in (1, 2):
        with pytest.raises(Exception):  # noqa: B017, PT011 - a decoder raises anything
            source.load(index)
        assert f"[{index}]" in source.name(index)
    assert "b.png" in source.name(1)


# Digits


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test, everything = (open_source("digits", split=split) for split in ("train", "test", None))
    assert (len(train), len(test), len(everything)) == (1347, 450, 1797)
    numbers = {}
    for key, source in (("train", train), ("test", test)):
        numbers[key] = np.array([int(name.split()[1]) for name in names(source)])
        assert source.labels.dtype == np.int64
        assert np.array_equal(source.labels, digits.target[numbers[key]])
        for index in (0, 1, 200, len(source) - 1):
            expected = np.floor(digits.images[numbers[key][index]] * 255 / 16 + 0.5)
            pixels = np.asarray(source.load(index))
            assert pixels.shape == (8, 8, 3)
            assert np.abs(pixels - expected[:, :, None]).max() <= 0.5
            assert pixels.max() <= 255
    assert sorted([*numbers["train"], *numbers["test"]]) == list(range(1797))  # disjoint, and all of them
    shares = np.bincount(test.labels) / np.bincount(everything.labels)
    assert np.abs(shares - 450 / 1797).max() < 0.01  # stratified
    assert max(np.asarray(everything.load(index)).max() for index in range(50)) == 255
    again = open_source("digits", split="train", seed=9)
    assert names(again) == names(train)  # the split is the set's, not the run's


def test_digits_have_two_splits():
    line = told("digits", split="val")
    assert "data.split=val" in line
    assert "train" in line
    assert "test" in line


# One image


@pytest.fixture
def map_image(tmp_path):
    """240 x 160 pixels that say where they are: red is x, green is y."""
    x, y = np.meshgrid(np.arange(240), np.arange(160))
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "map.png")
    return tmp_path / "map.png"


def test_crops_of_one_image(map_image):
    source = open_source("image", map_image, crops=800)
    assert len(source) == 800
    assert source.labels is None
    depths, across, down = [], [], []
    for index in range(800):
        crop = np.asarray(source.load(index)).astype(int)
        side = len(crop)
        left, top = crop[0, 0, :2]
        assert crop.shape == (side, side, 3)
        assert 10 <= side <= 160  # between a sixteenth of the short side and all of it
        assert np.array_equal(crop[..., 0], np.tile(left + np.arange(side), (side, 1)))
        assert np.array_equal(crop[..., 1], np.tile(top + np.arange(side), (side, 1)).T)
        depths.append(math.log(160 / side, 16))
        across.append((left + 0.5) / (240 - side + 1))
        down.append((top + 0.5) / (160 - side + 1))
    for values in (depths, across, down):  # uniform: mean 1/2, standard deviation 0.289, of the mean 0.0102
        assert abs(np.mean(values) - 0.5) < 0.045
        assert abs(np.std(values) - 12**-0.5) < 0.03
    assert max(depths) > 0.97
    assert min(depths) < 0.03
    assert "map.png" in source.name(17)
    assert "17" in source.name(17)


def test_crops_are_fixed_by_seed_and_number(map_image):
    def crops(seed, count=12):
        source = open_source("image", map_image, seed=seed, crops=count)
        return [source.load(index).tobytes() for index in range(count)]

    first = crops(4)
    assert first == crops(4)
    assert first == crops(4, 40)[:12]  # more crops add to those there were
    assert len(set(first)) == 12
    assert not set(first) & set(crops(5))
    source = open_source("image", map_image, seed=4, crops=12)
    assert [source.load(index).tobytes() for index in reversed(range(12))] == first[::-1]


def test_crops_of_a_tiny_image(tmp_path):
    Image.new("RGB", (1, 3), (9, 8, 7)).save(tmp_path / "x.png")
    source = SingleImageSource(tmp_path / "x.png", 20, 0)
    assert {(crop.size, crop.getpixel((0, 0))) for crop in map(source.load, range(20))} == {((1, 1), (9, 8, 7))}


def test_an_image_that_cannot_be_used(tmp_path):
    line = told("image", tmp_path / "gone.jpg")
    assert str(tmp_path / "gone.jpg") in line
    assert "no such image" in line
    assert "no such image" in told("image", tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    line = told("image", tmp_path / "broken.jpg")
    assert str(tmp_path / "broken.jpg") in line
    assert "not readable" in line
    assert "data.root" in told("image")


# Shares


@pytest.fixture
def classes(tmp_path):
    """Ten classes of 1, 2, ... 10 images."""
    for number in range(10):
        for image in range(number + 1):
            put(tmp_path / f"{number}/{image}.png", 10 * number + image)
    return tmp_path


@pytest.mark.parametrize(("share", "kept"), [(0.1, 1), (0.3, 3), (0.5, 5), (0.96, 10), (0.01, 1), (1.0, 10)])
def test_a_share_of_the_classes(classes, share, kept):
    source = open_source(root=classes, classes=share)
    folders = {name.split("/")[0] for name in names(source)}
    assert len(folders) == kept
    assert len(source) == sum(int(folder) + 1 for folder in folders)  # whole classes
    assert source.labels.tolist() == [int(name.split("/")[0]) for name in names(source)]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.34, 0.75])
def test_a_share_of_the_images_of_each_class(classes, share):
    source = open_source(root=classes, images_per_class=share)
    counts = np.bincount(source.labels, minlength=10)
    expected = np.arange(1, 11) * share
    assert counts.min() >= 1  # no class is lost
    assert (np.abs(counts - np.maximum(expected, 1)) <= 0.5).all()
    assert len(set(names(source))) == len(source)
    assert [grey_of(source, index) for index in range(len(source))] == [
        10 * int(name[0]) + int(name[2]) for name in names(source)
    ]


def test_both_shares_together(classes):
    source = open_source(root=classes, classes=0.5, images_per_class=0.5)
    folders = {name.split("/")[0] for name in names(source)}
    assert folders == {name.split("/")[0] for name in names(open_source(root=classes, classes=0.5))}
    for folder in folders:
        count = sum(name.startswith(folder + "/") for name in names(source))
        assert abs(count - max(1, (int(folder) + 1) / 2)) <= 0.5


@pytest.mark.parametrize("key", ["classes", "images_per_class"])
def test_shares_are_seeded_and_nested(classes, key):
    def chosen(seed, share):
        return set(names(open_source(root=classes, seed=seed, **{key: share})))

    assert chosen(3, 0.5) == chosen(3, 0.5)
    assert len({frozenset(chosen(seed, 0.5)) for seed in range(8)}) >= 6
    sizes = []
    for small, large in ((0.1, 0.3), (0.3, 0.5), (0.5, 0.8), (0.8, 1.0)):
        assert chosen(3, small) < chosen(3, large)
        sizes.append(len(chosen(3, small)))
    assert chosen(3, 1.0) == set(names(FolderSource(classes)))


def test_shares_of_images_are_drawn_without_preference(classes):
    """Of the class with ten images half are kept: each of them by about half of 200 seeds."""
    kept = np.zeros(10)
    for seed in range(200):
        for name in names(open_source(root=classes, seed=seed, images_per_class=0.5)):
            if name.startswith("9/"):
                kept[int(name[2])] += 1
    assert kept.sum() == 1000
    assert np.abs(kept - 100).max() < 29  # 4 standard deviations


@pytest.mark.parametrize("key", ["classes", "images_per_class"])
def test_shares_need_labels(tmp_path, key):
    put(tmp_path / "1.png")
    line = told(root=tmp_path, **{key: 0.5})
    assert f"data.{key}" in line
    assert str(tmp_path) in line
    assert "label" in line
    put(tmp_path / "set/a/1.png")
    assert "label" in told(root=tmp_path / "set", labels="ignore", **{key: 0.5})


# Several sources


class Numbers:
    """Grey images, `first`, `first` + 1, ..."""

    def __init__(self, first: int, labels: list[int] | int, labelled: bool = True):
        self.first = first
        self.count = labels if isinstance(labels, int) else len(labels)
        self.labels = np.array(labels) if labelled and not isinstance(labels, int) else None
        self.classes = [] if self.labels is None else [str(number) for number in range(self.labels.max() + 1)]

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Image.Image:
        assert 0 <= index < self.count
        return Image.new("RGB", (2, 2), (self.first + index,) * 3)

    def name(self, index: int) -> str:
        assert 0 <= index < self.count
        return f"from {self.first}: {index}"


def test_merged_sources_stand_one_after_the_other():
    merged = Merged([Numbers(10, [0, 1, 1]), Numbers(50, [0]), Numbers(100, [2, 0, 1, 1])])
    assert len(merged) == 8
    assert [grey_of(merged, index) for index in range(8)] == [10, 11, 12, 50, 100, 101, 102, 103]
    assert [grey_of(merged, np.int64(index)) for index in (2, 3, 4)] == [12, 50, 100]
    assert names(merged)[2:5] == ["from 10: 2", "from 50: 0", "from 100: 0"]
    # Classes 0-1, 0 and 0-2 become 0-1, 2 and 3-5.
    assert merged.labels.tolist() == [0, 1, 1, 2, 5, 3, 4, 4]


def test_labels_of_merged_subsets_stay_apart():
    """A subset may lack its first or last class: labels of two sources never meet, and keep their classes."""
    one, two = Subset(Numbers(0, [0, 1, 2, 3]), np.array([1, 3])), Subset(Numbers(9, [0, 1, 2, 3]), np.array([3, 0, 3]))
    labels = Merged([one, two]).labels.tolist()
    assert not set(labels[:2]) & set(labels[2:])
    assert labels[0] != labels[1]
    assert labels[2] == labels[4] != labels[3]


def test_labels_are_lost_where_one_source_has_none():
    assert Merged([Numbers(0, [0, 1]), Numbers(5, 3), Numbers(9, [0])]).labels is None


def test_a_config_merges_sources_with_their_own_shares(classes, tmp_path_factory):
    flat = tmp_path_factory.mktemp("flat")
    for number in range(3):
        put(flat / f"{number}.png", 200 + number)
    cfg = Data(
        root=str(classes),
        images_per_class=0.5,
        merge=[
            SourceConfig(root=str(flat)),
            SourceConfig(kind="digits", split="test", classes=0.2),
            SourceConfig(root=str(classes), classes=0.3),
        ],
    )
    source = build_source(cfg, 2)
    parts = [
        open_source(root=classes, seed=2, images_per_class=0.5),
        open_source(root=flat, seed=2),
        open_source("digits", seed=2, split="test", classes=0.2),
        open_source(root=classes, seed=2, classes=0.3),
    ]
    assert len(source) == sum(map(len, parts))
    assert names(source) == [name for part in parts for name in names(part)]
    assert source.labels is None
    assert len(set(parts[2].labels.tolist())) == 2
    cfg.merge.pop(0)
    labels = build_source(cfg, 2).labels
    ends = np.cumsum([0, len(parts[0]), len(parts[2]), len(parts[3])])
    groups = [set(labels[start:end].tolist()) for start, end in itertools.pairwise(ends)]
    assert [len(group) for group in groups] == [10, 2, 3]
    assert len(set.union(*groups)) == 15


# Holding out


@pytest.mark.parametrize(
    ("size", "count", "held"), [(1000, 50, 50), (1000, 512, 100), (1000, 1, 1), (100, 10, 10), (19, 5, 1), (2, 9, 1)]
)
def test_holding_out(size, count, held):
    source = Numbers(0, [number % 5 for number in range(size)])
    rest, out = hold_out(source, count, seed=1)
    assert (len(rest), len(out)) == (size - held, held)
    kept, taken = ([int(name.split()[2]) for name in names(part)] for part in (rest, out))
    assert sorted(kept + taken) == list(range(size))
    assert rest.labels.tolist() == [number % 5 for number in kept]
    assert out.labels.tolist() == [number % 5 for number in taken]
    again = hold_out(source, count, seed=1)
    assert [names(part) for part in again] == [names(rest), names(out)]


def test_what_is_held_out_is_a_matter_of_the_seed():
    source = Numbers(0, 200)
    sets = [set(names(hold_out(source, 20, seed)[1])) for seed in range(40)]
    assert len({frozenset(chosen) for chosen in sets}) == 40
    overlaps = [len(a & b) for i, a in enumerate(sets) for b in sets[:i]]
    assert abs(np.mean(overlaps) - 2) < 0.3  # 20 of 200, twice: two in common
    assert hold_out(source, 20, 0)[0].labels is None
    taken = [int(name.split()[2]) for chosen in sets for name in chosen]
    assert abs(np.mean(taken) - 99.5) < 8  # from all of the set: 800 draws, standard deviation of the mean 2


def test_one_image_is_too_few_to_hold_out():
    with pytest.raises(InputError, match=r"probe\.every_epochs=0"):
        hold_out(Numbers(0, 1), 5, 0)


def test_a_source_may_have_more_than_one_view(classes):
    """A part of a part is that part of the whole."""
    source = FolderSource(classes)
    rest, _ = hold_out(source, 4, 0)
    part = Subset(rest, np.array([50, 0, 7]))
    assert names(part) == [names(rest)[50], names(rest)[0], names(rest)[7]]
    assert part.labels.tolist() == [int(name[0]) for name in names(part)]
    assert grey_of(part, 0) == 10 * int(part.name(0)[0]) + int(part.name(0)[2])
