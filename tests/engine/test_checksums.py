"""Damage of a folder's files is seen, whatever it is."""

import json
import random

import pytest

from proteus.engine.checksums import CHECKSUMS, damage, file_hash, is_as_written, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a.bin", "below/b.bin"):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(1000))
    write_checksums(tmp_path)
    return tmp_path


def test_what_is_as_it_was_written_is_whole(folder):
    assert damage(folder) is None
    (folder / "a note.txt").write_text("of somebody else")
    assert damage(folder) is None


@pytest.mark.parametrize("name", ["a.bin", "below/b.bin"])
def test_every_flipped_bit_is_seen(folder, name):
    content = (folder / name).read_bytes()
    for bit in range(0, 8 * len(content), 97):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        assert damage(folder) == f"{name} is not as it was written"
    (folder / name).write_bytes(content)
    assert damage(folder) is None


def test_a_missing_or_shorter_file_is_named(folder):
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-1])
    assert damage(folder) == "a.bin is not as it was written"
    (folder / "a.bin").unlink()
    assert damage(folder) == "a.bin is missing"


def test_damaged_checksums_are_damage(folder):
    path = folder / CHECKSUMS
    content = path.read_bytes()
    assert json.loads(content).keys() == {"a.bin", "below/b.bin"}
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert damage(folder) is not None or json.loads(flipped) == json.loads(content)
    for other in (b"", b"[]", b"{}", b"3", b'{"a.bin": 3}', b"[" * 5000, content[:-3], b"\xff" * 10):
        path.write_bytes(other)
        assert damage(folder) is not None, other
    path.unlink()
    assert damage(folder) == f"{CHECKSUMS} is missing"


@pytest.mark.parametrize("name", ["{}/other.bin", "../other.bin", "below/../../other.bin", "below/../a.bin"])
def test_checksums_name_files_of_their_folder_alone(folder, name):
    whole = folder / "whole"
    (whole / "below").mkdir(parents=True)
    for file in (folder / "other.bin", whole / "a.bin"):
        file.write_bytes(b"read by nobody")
    name = name.format(folder)
    (whole / CHECKSUMS).write_text(json.dumps({"a.bin": file_hash(whole / "a.bin")}))
    assert damage(whole) is None
    (whole / CHECKSUMS).write_text(json.dumps({name: file_hash(whole / "a.bin")}))
    assert damage(whole) is not None
    assert not is_as_written(whole, name)


def test_one_file_is_judged_without_the_others(folder):
    (folder / "below/b.bin").unlink()
    assert is_as_written(folder, "a.bin")
    assert not is_as_written(folder, "below/b.bin")
    (folder / "new.bin").write_bytes(b"not written with the others")
    assert not is_as_written(folder, "new.bin")
    (folder / "a.bin").write_bytes(b"other")
    assert not is_as_written(folder, "a.bin")
    for content in (b"[]", b"{", None):
        (folder / CHECKSUMS).unlink() if content is None else (folder / CHECKSUMS).write_bytes(content)
        assert not is_as_written(folder, "a.bin")
