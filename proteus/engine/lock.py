"""One trainer to a run directory."""

import fcntl
import os
from pathlib import Path

from proteus.errors import InputError


class RunLock:
    """Holds `<directory>/lock`, with the pid of its holder in it, until the process ends, however it ends.

    A record lock of the operating system: it dies with its process (SIGKILL too) and is not inherited by data workers.
    InputError, naming the other process, where another one holds it.
    """

    def __init__(self, directory: Path):
        path = directory / "lock"
        self._file = open(path, "a+")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            pid = self._file.read().strip() or "unknown"
            raise InputError(
                f"{directory} is in use by process {pid}: wait for it, stop it, or give another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let the directory go before the process ends."""
        self._file.close()
