"""SIGTERM, SIGINT and SIGUSR1: finish the step, write a checkpoint, then leave. A later one leaves at once."""

import os
import signal
import time
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last: what Slurm sends before the time is up
# Seconds in which signals are one request: Ctrl-C, or a scheduler's SIGTERM, goes to a launcher as well, which passes
# it on.
GRACE = 2.0


class Stop:
    """Whether the run has been asked to stop. `signum` is the signal that asked, 0 while none did.

    patience: how long processes wait for one another.
    """

    def __init__(self, accelerator: Accelerator, patience: timedelta):
        self.signum, self._asked = 0, 0.0
        self._flag = torch.tensor(0)
        self._reduction: torch.distributed.Work | None = None
        several = accelerator.num_processes > 1
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=patience) if several else None
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def _ask(self, number: int, _frame: object) -> None:
        if self.signum and time.monotonic() - self._asked > GRACE:
            os._exit(128 + number)
        if not self.signum:
            self.signum, self._asked = number, time.monotonic()

    def agreed(self) -> bool:
        """Whether all processes stop after this step; each calls it once a step.

        Several processes must stop at the same step, whichever of them got the signal and when. They bring their flags
        together on the host, in a reduction that runs beside the next step and is read after it: no device waits.
        """
        if self._group is None:
            return self.signum > 0
        if self._reduction is not None:
            self._reduction.wait()
            agreed = int(self._flag)
            if agreed:
                self.signum, self._reduction = agreed, None
                return True
        self._flag = torch.tensor(self.signum)
        maximum = torch.distributed.ReduceOp.MAX
        self._reduction = torch.distributed.all_reduce(self._flag, op=maximum, group=self._group, async_op=True)
        return False

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, failure: type | None, *_: object) -> None:
        if failure is None and self._reduction is not None:
            self._reduction.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
