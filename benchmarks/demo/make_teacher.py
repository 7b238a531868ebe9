"""Train the demo's teacher with labels and write it as float16:  make demo-teacher"""

import sys
from pathlib import Path

import torch

from proteus.models import load_checkpoint
from proteus.models.weights import save_encoder
from tools.train import main as train

RUN = "runs/demo_teacher"
TARGET = Path(__file__).with_name("teacher.safetensors")


def main() -> int:
    """Returns the exit status of the training."""
    status = train(["--cfg", "demo/teacher.yaml", f"run.dir={RUN}"])
    if status == 0:
        save_encoder(load_checkpoint(f"{RUN}/student.safetensors"), TARGET, dtype=torch.float16)
        print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.2f} MB")
    return status


if __name__ == "__main__":
    sys.exit(main())
