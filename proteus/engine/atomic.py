"""Files and folders that are there whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

PENDING = ".pending-"  # of a folder that is being written, or deleted; never read
BLOCK = 2**16  # bytes: less than this is no room to write in


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a temporary sibling of `folder`, force it to disk, then rename it into place.

    What was written before a failure is deleted. OSError where the disk is full, whatever `fill` makes of that.
    """
    pending = folder.with_name(PENDING + folder.name)
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    try:
        fill(pending)
        for path in (*pending.rglob("*"), pending):
            _sync(path)
    except BaseException as error:
        full = _is_full(pending, error)
        shutil.rmtree(pending, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise
    doomed = _set_aside(folder)
    pending.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder such that a crash on the way leaves nothing that looks whole.

    What cannot be deleted, because somebody reads it on a network drive, stays under the temporary name.
    """
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    doomed = folder.with_name(PENDING + "old-" + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
    return doomed


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary sibling of `path`, force it to disk, then rename it into place.

    What was written before a failure is deleted. OSError where the disk is full, whatever `write` makes of that.
    """
    pending = path.with_name(PENDING + path.name)
    try:
        write(pending)
        _sync(pending)
        pending.replace(path)
        _sync(path.parent)
    except BaseException as error:
        full = _is_full(pending, error)
        with contextlib.suppress(OSError):
            pending.unlink()
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def _is_full(pending: Path, error: BaseException) -> bool:
    # Some writers say of a full disk that a position is not the expected one. Those in blocks leave less than one free.
    try:
        return isinstance(error, Exception) and shutil.disk_usage(pending.parent).free < BLOCK
    except OSError:
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
