"""Files and folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

PENDING = ".pending-"  # of a folder that is being written, or deleted; never read


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a temporary sibling of `folder`, force it to disk, then rename it into place."""
    pending = folder.with_name(PENDING + folder.name)
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    fill(pending)
    for path in (*pending.rglob("*"), pending):
        _sync(path)
    remove_folder(folder)
    pending.rename(folder)
    _sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder such that a crash on the way leaves nothing that looks whole."""
    if folder.exists():
        doomed = folder.with_name(PENDING + "old-" + folder.name)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary sibling of `path`, force it to disk, then rename it into place."""
    pending = path.with_name(PENDING + path.name)
    write(pending)
    _sync(pending)
    pending.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
