"""The errors a user can cause or has to act on, and how they are said."""

import difflib
import os
import sys
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave cannot be used: the command line prints the lines and exits with status 2.

    Each line says what was wrong, where, and what to do about it.
    """

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


class MissingDataError(InputError):
    """A data set is not where it was looked for: a benchmark that was not asked for by name goes without it."""


class UnreadableError(InputError):
    """Data that one process of a run met and the others did not: it is that process that says so."""


class RunError(Exception):
    """A run cannot go on (it diverged, say): the command line prints the one line and exits with status 1."""


class WorkerError(RunError):
    """The data workers of one process of a run fail it: it is that process that says so."""


class PeerError(RunError):
    """Another process of a run is no more: each of those that are left says so, as it may be the one to say things."""


class Stopped(Exception):
    """A signal stopped a run of several stages; the same command goes on from there. Exit status 128 + signum."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


FAILURES = (InputError, RunError, OSError)  # what `say` says


def say(error: InputError | RunError | OSError, about: str) -> int:
    """Print an error, a line for each thing that is wrong, and return the exit status that it stands for.

    All processes of a run come to the same error, and one a machine says it; what only one has met, that one says.
    about: what a failure of the operating system that names no file is about.
    """
    met_alone = isinstance(error, UnreadableError | WorkerError | PeerError | OSError)
    if met_alone or os.environ.get("LOCAL_RANK", "0") == "0":
        text = str(error)
        if isinstance(error, OSError):
            text = f"{os.fsdecode(error.filename or about)}: {error.strerror or error}"
        print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown name: `; did you mean X?`, or the valid names where none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(valid)}" if len(valid) <= 12 else ""
