"""A score on held-out images chooses which of a run's weights are kept."""

from collections.abc import Callable
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast

from proteus.training.state import Progress
from proteus.training.task import Distillation


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
