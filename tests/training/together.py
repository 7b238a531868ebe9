"""Several gloo processes for a test, without waiting for their imports: they are forked from a server that has them."""

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("proteus.training.loop", "proteus.training.preflight", "proteus.training.cache_writer"),
        *(
            "sklearn.datasets",
            "torch.utils.tensorboard",
            "torch.distributed.fsdp",
            "torch.distributed.tensor.experimental",
        ),
    ]
)


class Ended(NamedTuple):
    """A process that has ended: what it returned or exited with, and what it printed."""

    status: int
    output: str


def together(
    count: int, work: Callable[..., int | None], *arguments, place: Path, environment: dict[str, str] | None = None
) -> list[Ended]:
    """Call `work` (of a module, not of a function) in each of `count` processes, which Accelerate finds each other in.

    place: a folder for what they print. A process that does not end within two minutes is killed, and -9 is its status.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", **(environment or {})}
    files = [place / f"printed_{rank}" for rank in range(count)]
    started = []
    for rank, file in enumerate(files):
        own = {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        started.append(_server.Process(target=_run, args=(own, file, work, arguments)))
        started[-1].start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [Ended(process.exitcode, file.read_text()) for process, file in zip(started, files, strict=True)]


def run_tool(name: str, argv: list[str]) -> int:
    """`tools/<name>.py` with these arguments."""
    return importlib.import_module(f"tools.{name}").main(argv)


def _run(environment: dict[str, str], file: Path, work: Callable[..., int | None], arguments: tuple) -> None:
    os.environ.update(environment)
    printed = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    import torch

    torch.set_num_threads(1)
    try:
        status = work(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
