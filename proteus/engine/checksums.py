"""Whether the files of a folder are as they were written."""

import hashlib
import json
from pathlib import Path

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
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name, written in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_hash(folder / name) != written:
                return f"{name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError):
        return f"{CHECKSUMS} is missing"
    except (ValueError, AttributeError, TypeError, RecursionError):  # not JSON, or no mapping
        return f"{CHECKSUMS} is not as it was written"
    return None
