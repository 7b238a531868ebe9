"""Whether the files of a folder are as they were written."""

import hashlib
import json
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write checksums.json: the SHA-256 of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with the files that checksums.json names, in a few words; None where they are as written.

    OSError where they cannot be read: that may pass.
    """
    try:
        for name, written in _read(folder).items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_hash(folder / name) != written:
                return f"{name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError):
        return f"{CHECKSUMS} is missing"
    except (ValueError, RecursionError):
        return f"{CHECKSUMS} is not as it was written"
    return None


def is_as_written(folder: Path, name: str) -> bool:
    """Whether one file has the hash that checksums.json gives it; False where that cannot be told."""
    try:
        return _read(folder).get(name) == file_hash(folder / name)
    except (OSError, ValueError, RecursionError):
        return False


def _read(folder: Path) -> dict[str, Any]:
    """Hashes by the names of files below `folder`; ValueError where checksums.json is anything else."""
    sums = json.loads((folder / CHECKSUMS).read_bytes())
    if not isinstance(sums, dict) or not sums:
        raise ValueError("names nothing")
    if any(Path(name).anchor or ".." in Path(name).parts for name in sums):
        raise ValueError("names a file of another folder")
    return sums
