"""What the demo's student kept of its teacher: linear probe and k-NN on held-out digits, computed from the run's files.

python -m benchmarks.demo.table [distilled run] [supervised run]
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from proteus.config import Config
from proteus.config_files import load_config
from proteus.data.sources import build_source
from proteus.errors import InputError
from proteus.evaluation.features import class_tokens, load_images
from proteus.evaluation.knn import knn_accuracy
from proteus.evaluation.logistic import logistic_probe
from proteus.models import Encoder, create_model, load_checkpoint

SWEEP = np.logspace(1, -4, 6)  # values of C: a coarse grid, for four networks in seconds


class Score(NamedTuple):
    """A row of the table: a network, its parameters, and its accuracies on the held-out digits."""

    name: str
    parameters: int
    linear: float
    knn: float


def measure(name: str, encoder: Encoder, cfg: Config) -> Score:
    """Score frozen class tokens: probes learn from the labelled training digits, the held-out ones are scored."""
    assert cfg.probe.split is not None
    encoder.eval()
    train, test = (
        load_images(build_source(cfg.data.model_copy(update={"split": split}), 0), cfg.data.image_size, cfg.probe.crop)
        for split in (cfg.data.split, cfg.probe.split)
    )
    assert train.labels is not None
    assert test.labels is not None
    bank = class_tokens(encoder, train.images, torch.device("cpu")), torch.from_numpy(train.labels)
    held_out = class_tokens(encoder, test.images, torch.device("cpu")), torch.from_numpy(test.labels)
    linear = logistic_probe(*bank, *held_out, grid=SWEEP)
    knn = knn_accuracy(*bank, *held_out)
    return Score(name, sum(p.numel() for p in encoder.network.parameters()), linear.score, knn)


def scores(distilled: Path, supervised: Path) -> list[Score]:
    """Teacher, distilled student, the same student untrained, and trained with labels for the same number of steps."""
    cfg = load_config(str(distilled / "config.yaml"))
    teacher, student = cfg.teacher, cfg.student
    assert teacher and student  # noqa: PT018
    torch.manual_seed(cfg.run.seed)
    return [
        measure("teacher", create_model(teacher.name, checkpoint=teacher.checkpoint, **teacher.arch), cfg),
        measure("student, distilled without labels", load_checkpoint(str(distilled / "student.safetensors")), cfg),
        measure("student, trained with labels", load_checkpoint(str(supervised / "student.safetensors")), cfg),
        measure(
            "student, untrained",
            create_model(student.name, image_size=cfg.data.image_size, **student.arch),
            cfg,
        ),
    ]


def render(rows: list[Score]) -> str:
    """The table as text, and what the student kept."""
    lines = [f"{'':36}{'parameters':>12}{'linear probe':>14}{'k-NN':>8}"]
    lines += [f"{row.name:36}{row.parameters:>12,}{row.linear:>14.1%}{row.knn:>8.1%}" for row in rows]
    teacher, student = rows[0], rows[1]
    lines.append(
        f"\nThe student has {student.parameters / teacher.parameters:.0%} of the teacher's parameters and keeps "
        f"{student.linear / teacher.linear:.1%} of its linear-probe accuracy."
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("distilled", nargs="?", default="runs/demo", type=Path)
    parser.add_argument("supervised", nargs="?", default="runs/demo_supervised", type=Path)
    args = parser.parse_args(argv)
    try:
        print(render(scores(args.distilled, args.supervised)))
    except InputError as error:
        print("\n".join(f"error: {line}" for line in error.lines) + " (make demo trains both)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
