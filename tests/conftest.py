"""Markers that skip by themselves, and what many tests start from."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads that share a core with anyone else wait for each other


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take tens of seconds")
    parser.addoption("--thorough", action="store_true", help="--slow, and the fault tests with all their repetitions")


def pytest_collection_modifyitems(config, items):
    realdata = os.environ.get("PROTEUS_REALDATA")
    for item in items:
        if "slow" in item.keywords and not (config.getoption("--slow") or config.getoption("--thorough")):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "realdata" in item.keywords and not (realdata and Path(realdata).is_dir()):
            item.add_marker(pytest.mark.skip(reason="PROTEUS_REALDATA names no folder of real photos"))


@pytest.fixture
def realdata() -> Path:
    return Path(os.environ["PROTEUS_REALDATA"])


@pytest.fixture
def thorough(request) -> bool:
    """Whether a fault test repeats itself as often as docs/reliability.md says, not as briefly as CI has time for."""
    return request.config.getoption("--thorough")
