"""The tiny run of tests/training serves here too, and one that a warm process forks."""

import os
import signal
from pathlib import Path

import pytest

from tests.faults.runs import Forked, warm_up
from tests.training.conftest import run_here, run_together, tiny, trainer

__all__ = ["forked", "run_here", "run_together", "tiny", "trainer"]


@pytest.fixture
def forked(tiny: Path, tmp_path: Path):
    """Start a tool: forked("name", "run.seed=1", ...), the cache's by tool="cache". Killed at the end, if need be."""
    warm_up()
    started: list[Forked] = []

    def start(name: str, *overrides: str, tool: str = "train", prelude: str = "") -> Forked:
        key = {"train": "run.dir", "cache": "teacher_cache.dir"}[tool]
        words = (f"--cfg={tiny}", f"{key}={tmp_path / name}", *overrides)
        started.append(Forked(tmp_path / name, tool, *words, prelude=prelude))
        return started[-1]

    yield start
    for one in started:
        if one.process.is_alive():
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.join()
