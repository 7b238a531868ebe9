"""When what happens in a run."""

from dataclasses import dataclass

from proteus.config import Config
from proteus.data.sampler import Sampler
from proteus.engine.schedule import learning_rate


@dataclass(frozen=True)
class Plan:
    """When what happens, in update steps counted from 1."""

    total_steps: int
    steps_per_epoch: int
    cfg: Config

    @classmethod
    def of(cls, cfg: Config, sampler: Sampler) -> "Plan":
        """The plan of a config on its data."""
        steps = cfg.schedule.steps or round((cfg.schedule.epochs or 0) * sampler.steps_per_epoch)
        return cls(max(1, steps), sampler.steps_per_epoch, cfg)

    def logs(self, step: int) -> bool:
        """At the interval, and before a checkpoint: what a checkpoint counts must have been read."""
        return step % self.cfg.run.log_every == 0 or self.saves(step)

    def saves(self, step: int) -> bool:
        """At the interval and at the end."""
        return step % self.cfg.run.save_every == 0 or step == self.total_steps

    def probes(self, step: int) -> bool:
        """Every few epochs and at the end."""
        every = self.cfg.probe.every_epochs * self.steps_per_epoch
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def rate(self, step: int, base: float) -> float:
        """Learning rate of update `step`."""
        return learning_rate(step - 1, self.total_steps, self.steps_per_epoch, base, self.cfg.schedule)
