"""Two processes train and measure as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# No BatchNorm, whose statistics are each process's own on a CPU. Five test images: one process gets three.
SCRIPT = """
import json
from dataclasses import replace
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from proteus.evaluation.dense.depth import depth
from proteus.evaluation.dense.presets import DEPTH, SEGMENTATION
from proteus.evaluation.dense.segmentation import segmentation
from tests.evaluation.dense.scenes import Scenes, tiny

accelerator = Accelerator(cpu=True)
small = dict(crop=(16, 16), short=16, long=48, iterations=4, warmup=1, batch=4, lr=1e-2)
small |= dict(test_short=16, test_long=48, window=(16, 16), stride=(8, 8))
lin = replace(SEGMENTATION["proteus-lin"], **small)
tuned = replace(DEPTH["dinov2-dpt"], **small | dict(lr=1e-3), frozen=False, channels=8, crop_metric=None, sig_warmup=2)
options = dict(accelerator=accelerator, progress=False)
seg = segmentation(tiny(), Scenes(9, 0), Scenes(5, 1), lin, **options)
metres = depth(tiny(), Scenes(9, 0, depth=True), Scenes(5, 1, depth=True), tuned, **options)
shown = [float(p.prediction.mean()) for p in (*seg.predictions, *metres.predictions)]
print("RESULT " + json.dumps([*seg.iou, seg.pixel_accuracy, *metres[:11], *shown]), flush=True)
"""


def launch(processes, port):
    """What each process printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(processes):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if processes == 1:
            own = {key: value for key, value in own.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        started.append(
            subprocess.Popen([sys.executable, "-c", SCRIPT], env=own, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        )
    printed = [process.communicate(timeout=300)[0] for process in started]
    lines = [line for text in printed for line in text.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


@pytest.mark.slow
def test_two_processes_are_one(unused_port):
    (alone,) = launch(1, unused_port)
    both = launch(2, unused_port)
    assert len(both) == 2
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, rel=1e-3, abs=1e-3, nan_ok=True)
    assert len(alone) == 4 + 1 + 11 + 8


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
