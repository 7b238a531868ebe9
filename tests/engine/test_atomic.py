"""Files and folders are there whole or not at all, whatever happens while they are written."""

import signal
import subprocess
import sys

import pytest

from proteus.engine.atomic import PENDING, remove_folder, write_file, write_folder

# Writes half of something with `write_file` or `write_folder`, then is killed in the middle.
KILLED = """
import os, signal, sys
from pathlib import Path
from proteus.engine import atomic
def half(path):
    if sys.argv[1] == "write_folder":
        (path / "sub").mkdir()
        (path / "sub" / "a.txt").write_text("half")
    else:
        path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
getattr(atomic, sys.argv[1])(Path(sys.argv[2]), half)
"""


def kill_while(function: str, path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, function, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL


def whole(folder) -> dict[str, str]:
    """Relative name -> content of every file that does not lie under a pending name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder): path.read_text() for path in files}
    return {str(name): text for name, text in names.items() if not name.parts[0].startswith(PENDING)}


def fill_with(**texts):
    def fill(folder):
        for name, text in texts.items():
            (folder / "sub").mkdir(exist_ok=True)
            (folder / f"{name}.txt").write_text(text)
            (folder / "sub" / f"{name}.txt").write_text(text)

    return fill


def raise_halfway(path):
    if path.is_dir():
        (path / "a.txt").write_text("half")
    else:
        path.write_text("half")
    raise OSError("disk full")


OLD = {"step_1/a.txt": "old", "step_1/sub/a.txt": "old"}


def test_a_folder_is_written_with_what_is_under_it(tmp_path):
    write_folder(tmp_path / "deep" / "step_1", fill_with(a="old"))
    assert whole(tmp_path / "deep") == OLD
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["step_1"]


def test_a_second_writing_replaces_all_of_it(tmp_path):
    write_folder(tmp_path / "step_1", fill_with(a="old"))
    write_folder(tmp_path / "step_1", fill_with(b="new"))
    assert whole(tmp_path) == {"step_1/b.txt": "new", "step_1/sub/b.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("how", ["exception", "kill"])
def test_a_folder_whose_writing_breaks_off_stays_as_it_was(tmp_path, how, existed):
    if existed:
        write_folder(tmp_path / "step_1", fill_with(a="old"))
    if how == "kill":
        kill_while("write_folder", tmp_path / "step_1")
    else:
        with pytest.raises(OSError, match="disk full"):
            write_folder(tmp_path / "step_1", raise_halfway)
        assert not list(tmp_path.glob(PENDING + "*"))  # what half a checkpoint takes, the others may need
    assert whole(tmp_path) == (OLD if existed else {})
    assert (tmp_path / "step_1").exists() == existed
    write_folder(tmp_path / "step_1", fill_with(b="new"))  # what lies about is in nobody's way
    assert whole(tmp_path) == {"step_1/b.txt": "new", "step_1/sub/b.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_nothing_is_to_be_seen_before_all_is_written(tmp_path):
    write_folder(tmp_path / "step_1", fill_with(a="old"))
    seen = []

    def fill(folder):
        (folder / "b.txt").write_text("new")
        seen.append(whole(tmp_path))

    write_folder(tmp_path / "step_1", fill)
    assert seen == [OLD]


def test_a_removed_folder_is_gone_without_a_trace(tmp_path):
    write_folder(tmp_path / "step_1", fill_with(a="old"))
    write_folder(tmp_path / "step_2", fill_with(a="old"))
    remove_folder(tmp_path / "step_1")
    remove_folder(tmp_path / "step_3")  # was never there
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_a_file_is_written_and_replaced(tmp_path):
    for text in ("old", "new"):
        write_file(tmp_path / "a.txt", lambda path, text=text: path.write_text(text))
        assert whole(tmp_path) == {"a.txt": text}
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("how", ["exception", "kill"])
def test_a_file_whose_writing_breaks_off_stays_as_it_was(tmp_path, how, existed):
    if existed:
        (tmp_path / "a.txt").write_text("old")
    if how == "kill":
        kill_while("write_file", tmp_path / "a.txt")
    else:
        with pytest.raises(OSError, match="disk full"):
            write_file(tmp_path / "a.txt", raise_halfway)
        assert not list(tmp_path.glob(PENDING + "*"))
    assert whole(tmp_path) == ({"a.txt": "old"} if existed else {})
    write_file(tmp_path / "a.txt", lambda path: path.write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert whole(tmp_path) == {"a.txt": "new"}
