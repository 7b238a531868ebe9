"""What a process imports before it forks runs (`runs.warm_up`)."""

import accelerate
import torch.utils.tensorboard  # noqa: F401

import proteus.training.cache_writer
import proteus.training.loop
import proteus.training.preflight
import tests.faults.runs
import tools.cache
import tools.train  # noqa: F401

__all__ = ["accelerate", "proteus", "tests"]
