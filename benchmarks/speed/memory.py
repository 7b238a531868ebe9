"""Peak memory of what happens inside a block, and giving back what is no longer used."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Fills the list with one number at the end: the most bytes at a time.

    On a GPU what torch had allocated; on a CPU the whole process's resident memory, which needs Linux: elsewhere 0.
    """
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # the highest mark begins anew
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device))
    else:
        found.append(_highest_mark() if _CLEAR.exists() else 0)


def release() -> None:
    """Give the device back what belonged to steps that are gone: a prepared model is a cycle, and waits for this."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def _highest_mark() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
