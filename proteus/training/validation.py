"""A score on held-out images chooses which of a run's weights are kept."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast

from proteus.engine.atomic import write_file
from proteus.models.heads import save_head
from proteus.models.weights import save_encoder
from proteus.training.state import Progress
from proteus.training.task import Distillation
from proteus.training.tune import merged


class Validation(NamedTuple):
    """score: of the task in evaluation mode, higher is better; every process calls it and gets the same.

    every: update steps between two scores; before the first step and after the last one there is one as well.
    """

    score: Callable[[Distillation], float]
    every: int

    def due(self, step: int, total_steps: int) -> bool:
        """Whether there is a score after that step."""
        return step % self.every == 0 or step == total_steps


def keep_best(validation: Validation, task: Distillation, progress: Progress) -> tuple[float, bool]:
    """Score the task: (score, whether it is the best so far). Of equal ones the later is, which has learnt longer."""
    mode = task.training
    task.eval()
    if PartialState().num_processes > 1:
        for buffer in task.buffers():  # running statistics are each process's own; the main process's are saved
            broadcast(buffer)
    score = validation.score(task)
    task.train(mode)
    best = progress.best_score is None or score >= progress.best_score
    if best:
        progress.best_score, progress.best_step = score, progress.step
    return score, best


def write_student(task: Distillation, classes: list[str], directory: Path) -> None:
    """student.safetensors, the backbone alone, and head.safetensors, its classifier where it has one."""
    write_file(directory / "student.safetensors", lambda path: save_encoder(merged(task.student), path))
    classifier = task.classifier
    if classifier is not None:
        write_file(directory / "head.safetensors", lambda path: save_head(classifier, classes, path))
