"""Folders and datasets as galleries."""

import io

import numpy as np
import pytest
from PIL import Image

from proteus.errors import InputError
from proteus.transfer.retrieval.gallery import Photos, class_names, open_gallery
from tests.transfer.retrieval.conftest import photograph


def encoded(kind, shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, images, **columns):
    import datasets

    data = datasets.Dataset.from_dict({"image": images, **columns})
    data = data.cast_column("image", datasets.Image())
    if columns:
        data = data.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    data.to_parquet(str(path))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_folders_and_datasets_are_one_gallery(tmp_path):
    photograph(tmp_path / "one/a", 2, seed=0)
    photograph(tmp_path / "two", 3, seed=1)
    stored = [{"bytes": encoded("jpeg"), "path": "x/cat.png"}, {"bytes": encoded("webp", 9), "path": None}]
    write_parquet(tmp_path / "set.parquet", stored, label=[1, 0])
    gallery = open_gallery(
        [str(tmp_path / "one"), f"hf:{tmp_path / 'set.parquet'}", str(tmp_path / "two")], None, False
    )
    assert len(gallery) == 7
    assert gallery.class_names().tolist() == ["a", "a", "b", "a", "", "", ""]
    assert gallery.stored(1) == ("001.png", tmp_path / "one/a/001.png")
    assert gallery.name(1) == str(tmp_path / "one/a/001.png")
    assert gallery.stored(2) == ("cat.jpg", stored[0]["bytes"])
    assert gallery.stored(3) == ("00000001.webp", stored[1]["bytes"])
    assert gallery.stored(4) == ("000.png", tmp_path / "two/000.png")
    assert gallery.load(3).getpixel((0, 0))[0] in range(5, 14)


def test_a_rare_format_becomes_a_png(tmp_path):
    write_parquet(tmp_path / "set.parquet", [{"bytes": encoded("jpeg2000", 50), "path": None}])
    name, content = open_gallery([f"hf:{tmp_path / 'set.parquet'}"], None, False).stored(0)
    assert name == "00000000.png"
    assert Image.open(io.BytesIO(content)).getpixel((0, 0)) == (50, 0, 0)


def test_an_exchanged_dataset_has_other_contents(tmp_path):
    def contents(shade):
        write_parquet(tmp_path / "set.parquet", [{"bytes": encoded("png", shade), "path": None}])
        return open_gallery([f"hf:{tmp_path / 'set.parquet'}"], None, False).contents

    first = contents(1)
    assert open_gallery([f"hf:{tmp_path / 'set.parquet'}"], None, False).contents == first
    assert contents(2) != first


def test_classes_of_one_name_are_one_class(tmp_path):
    for part in ("one", "two"):
        photograph(tmp_path / part / "b", 1, seed=0)
        photograph(tmp_path / part / f"only in {part}", 1, seed=1)
    gallery = open_gallery([str(tmp_path / "one"), str(tmp_path / "two")], None, False)
    assert gallery.class_names().tolist() == ["b", "only in one", "b", "only in two"]
    assert class_names(Photos(tmp_path / "one/b", "")).tolist() == [""]
    assert np.unique(gallery.class_names()).size == 3


@pytest.mark.parametrize(
    ("specs", "split", "message"),
    [
        (["{}/none"], None, "--gallery {}/none: no such folder; give a folder of images"),
        (["{}/empty"], None, "--gallery: no images under {}/empty (looked for"),
        (["hf:{}/none.parquet"], None, "--gallery hf:{}/none.parquet, split 'train':"),
        (["{}/empty"], "test", "--gallery-split test is for a gallery hf:ID_OR_PATH"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, specs, split, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        open_gallery([spec.format(tmp_path) for spec in specs], split, False)
    assert str(error.value).startswith(message.format(tmp_path))
    assert "data" not in str(error.value).replace("datasets", "").replace("--download", "").split(": ")[0]
