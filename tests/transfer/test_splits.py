"""The target's images as folders of links, for retrieval."""

import os

import pytest
from PIL import Image

from proteus.data.sources import FolderSource


@pytest.fixture
def target(tmp_path) -> str:
    """A set of two classes with five images each, and an override that takes it for target."""
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (16, 16), (50 * index, 0, 0)).save(tmp_path / "set" / name / f"{index}.png")
    splits = "train: {split: '.', per_class: 1}, val: {split: '.', images: 2}, test: {split: '.', per_class: 2}"
    return f"target={{set: folder, root: {tmp_path / 'set'}, {splits}}}"


def test_links_to_every_split(transfer_here, tmp_path, capsys, target):
    assert transfer_here(target, f"--write-splits={tmp_path / 'splits'}") == 0
    assert "labelled: 2 images" in capsys.readouterr().out
    seen = {}
    for part, count in [("labelled", 2), ("val", 2), ("test", 4)]:
        source = FolderSource(tmp_path / "splits" / part)
        assert len(source) == count
        assert source.classes == ["cat", "dog"]
        files = [os.path.realpath(source.root / source.name(index)) for index in range(count)]
        assert [file.split("/")[-2] for file in files] == [source.classes[label] for label in source.labels]
        seen[part] = set(files)
    assert len(set.union(*seen.values())) == 8
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_linked(transfer_here, tmp_path, capsys, target):
    assert transfer_here(f"--write-splits={tmp_path / 'splits'}") == 2
    assert "is no file that a link could lead to" in capsys.readouterr().err
    assert not (tmp_path / "splits").exists()
    (tmp_path / "splits").mkdir()
    assert transfer_here(target, f"--write-splits={tmp_path / 'splits'}") == 2
    assert "is there already; give a new folder" in capsys.readouterr().err


def test_a_class_that_cannot_be_a_folder(transfer_here, tmp_path, capsys, target):
    (tmp_path / "labels.csv").write_text("cat/0.png,..\ncat/1.png,b\n")
    splits = f"train: {{split: {tmp_path / 'labels.csv'}}}"
    listed = f"target={{set: listed, root: {tmp_path / 'set'}, {splits}}}"
    assert transfer_here(listed, f"--write-splits={tmp_path / 'splits'}") == 2
    assert "class '..' cannot be the name of a folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*splits*"))
