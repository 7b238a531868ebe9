"""SIGTERM and SIGINT: finish the step, write a checkpoint, then leave. A second one leaves at once."""

import os
import signal

import torch
from accelerate import Accelerator


class Stop:
    """Whether the run has been asked to stop. `signum` is the signal that asked, 0 while none did."""

    def __init__(self, accelerator: Accelerator):
        self.signum = 0
        self._accelerator = accelerator
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, _frame: object) -> None:
        if self.signum:
            os._exit(128 + number)
        self.signum = number

    def agreed(self, at_interval: bool) -> bool:
        """Whether all processes stop after this step.

        Alone, at any step. Several must stop at the same step: they agree at the logging interval, where they wait for
        the device anyway.
        """
        if self._accelerator.num_processes == 1:
            return self.signum > 0
        if not at_interval:
            return False
        flag = torch.tensor(self.signum, device=self._accelerator.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        self.signum = int(flag)
        return self.signum > 0

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
