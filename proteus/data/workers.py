"""Batches from worker processes: one that is killed is replaced, one that hangs is told, and neither holds us up."""

import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from proteus.data.sources import one_line
from proteus.errors import WorkerError

TIMEOUT = 600.0  # seconds without a batch after which workers count as hanging, where no config says
POLL = 1.0  # seconds between two looks at whether the workers live
PATIENCE = 5.0  # seconds that workers have to end
RESTARTS = 3  # without a batch between them
NOTHING = -1  # in a worker's note: it has no image in hand
PR_SET_PDEATHSIG = 1  # of prctl(2)

_notes: Tensor | None = None  # in a worker: [workers] int64, shared, the image that each has in hand


def note(index: int) -> None:
    """Say which image this worker takes in hand, before it can hang or die of it. Outside workers nothing happens."""
    if _notes is not None and (worker := get_worker_info()):
        _notes[worker.id] = index


def load_batches(
    dataset: Dataset,
    batches: Callable[[int], Iterable[Any]],
    workers: int,
    *,
    timeout: float = TIMEOUT,
    prefetch: int = 2,
    pin: bool = False,
) -> Generator[Any, None, None]:
    """What `dataset.__getitems__` makes of each of the batches (of numbers, or draws), in their order.

    batches:  `batches(n)` are those from the n-th on: where workers are started again, they go on at the n-th.
    workers:  processes that share the work; with 0 it is done here, and whatever hangs there hangs this process.
    timeout:  seconds to wait for a batch. A wait that is longer is a WorkerError, which names the images in hand by
              `dataset.source.name`.
    prefetch: batches that each worker keeps ready.
    pin:      bring batches into pinned memory, from where a GPU copies faster.

    A worker that is killed, for want of memory perhaps, is replaced: all of them start again behind the last batch
    that was handed out, and no batch differs for it. WorkerError where that happens time and again with no batch
    between.
    """
    if not workers:
        for batch in DataLoader(dataset, batch_sampler=batches(0), collate_fn=as_is, generator=torch.Generator()):
            yield _pinned(batch) if pin else batch
        return
    done = deaths = 0
    while True:
        crew = _Crew(dataset, batches(done), workers, prefetch, pin)
        try:
            while (batch := crew.fetch(timeout)) is not _END:
                done, deaths = done + 1, 0
                yield batch
            return
        except _Died as error:
            deaths += 1
            if deaths > RESTARTS:
                raise WorkerError(
                    f"data: {error} {deaths} times with no batch between: too little memory, or too little in /dev/shm "
                    "(fewer workers need less), or an image that its decoder cannot bear"
                ) from None
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # of what shows the progress there
            print(f"{clear}data: {error}; the workers are started again", file=sys.stderr, flush=True)
        finally:
            crew.close()


def as_is(batch: Any) -> Any:
    """A collate function for what needs no collating; by name, so that it reaches workers however they start."""
    note(NOTHING)
    return batch


class _Died(Exception):
    """Workers were killed, or ended for a reason of their own."""


_END = object()  # behind the last batch


class _Crew:
    """The processes of one DataLoader, and a thread that takes their batches.

    The thread, not we, meets what a dead or frozen worker leaves behind: half a message, a lock that is never given
    back, a socket that nobody answers. It can be abandoned.
    """

    def __init__(self, dataset: Dataset, batches: Iterable[Any], workers: int, prefetch: int, pin: bool):
        self._name = dataset.source.name  # type: ignore[attr-defined]
        self._notes = torch.full((workers,), NOTHING).share_memory_()
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=as_is,
            prefetch_factor=prefetch,
            worker_init_fn=partial(_start_worker, self._notes),
            timeout=POLL,
            # Children of ours: what they do at their start is for those. Python 3.14 would ask a server for them.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(),  # its own: its start must not draw from the one that the step has seeded
        )
        iterator = iter(loader)
        self._workers = list(iterator._workers)  # type: ignore[attr-defined]  # torch has no public name for them
        _take_back_sigchld()
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._closed = threading.Event()
        device = torch.cuda.current_device() if pin else None
        self._reader = threading.Thread(
            target=_read, args=(iterator, self._ready, self._closed, device), name="batches", daemon=True
        )
        self._reader.start()

    def fetch(self, timeout: float) -> Any:
        """The next batch, or _END; _Died where a worker is no more, WorkerError after `timeout` seconds."""
        waited = 0.0  # in turns, not by the clock: we may have been stopped ourselves
        while True:
            turn = min(POLL, timeout)
            try:
                kind, content = self._ready.get(timeout=turn)
            except queue.Empty:
                waited += turn
                self._check_alive()
                if waited >= timeout:
                    raise WorkerError(self._hanging(timeout)) from None
                continue
            if kind is not _FAILED:
                return content
            for worker in self._workers:  # what fails for want of a worker fails a moment before that is dead
                worker.join(POLL / len(self._workers))
            self._check_alive()
            raise content

    def close(self) -> None:
        """End the processes, orderly if they are able to."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:  # the thread may wait for room
                self._ready.get_nowait()
        self._reader.join(2 * POLL)
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
        self._reader.join(PATIENCE)
        for worker in self._workers:
            worker.join(POLL)
            # Python joins its children when it ends. One that waits for a dead disk does not even hear SIGKILL.
            multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]

    def _check_alive(self) -> None:
        dead = [(number, worker) for number, worker in enumerate(self._workers) if worker.exitcode]
        if dead:
            number, worker = dead[0]
            code = worker.exitcode
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise _Died(f"a data worker {how}{self._in_hand([number])}")

    def _hanging(self, timeout: float) -> str:
        where = self._in_hand(range(len(self._workers))) or ", which have no image in hand"
        do = "see to the storage, or raise a run's data.timeout"  # evaluations have none
        return f"data: no batch for {timeout:g} s from the workers{where}: {do}"

    def _in_hand(self, workers: Iterable[int]) -> str:
        """` at A, B`: the images that some workers have in hand; nothing where they have none."""
        indices = [index for index in self._notes[list(workers)].tolist() if index != NOTHING]
        names: list[str] = []
        # A name may have to be read from the storage that hangs.
        asking = threading.Thread(target=lambda: names.extend(map(self._name, indices)), daemon=True)
        asking.start()
        asking.join(POLL)
        names += [f"image {index}" for index in indices[len(names) :]]
        return " at " + ", ".join(map(one_line, names)) if names else ""


_BATCH, _FAILED = "batch", "failed"


def _read(iterator: Iterator[Any], ready: "queue.Queue[Any]", closed: threading.Event, device: int | None) -> None:
    """Hand over what the iterator gives until it ends, fails or nobody wants more."""
    if device is not None:
        torch.cuda.set_device(device)  # of this thread; another would be woken for pinned memory
    item: tuple[str, Any] = (_BATCH, None)
    while not closed.is_set() and item[0] is _BATCH and item[1] is not _END:
        try:
            batch = next(iterator, _END)
            item = (_BATCH, batch if device is None or batch is _END else _pinned(batch))
        except Exception as error:
            if str(error).startswith("DataLoader timed out"):  # no batch yet; to ask again does no harm
                continue
            # Their frames hold the iterator, which must end in this thread and before other workers are forked.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            item = (_FAILED, error)
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=POLL)
                break


def _pinned(batch: Any) -> Any:
    from torch.utils.data._utils.pin_memory import pin_memory

    return pin_memory(batch)


def _take_back_sigchld() -> None:
    """Remove torch's answer to a worker's death: it raises wherever this process is, in the middle of a step too."""
    handler = signal.getsignal(signal.SIGCHLD)
    if (
        getattr(handler, "__module__", "").startswith("torch.")
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _start_worker(notes: Tensor, _: int) -> None:
    global _notes
    _notes = notes
    # A signal to the trainer's process group, Ctrl-C among them, is the trainer's to answer: it wants its batches up to
    # the checkpoint. So workers are a group of their own.
    os.setpgid(0, 0)
    # They end with the trainer; one that is handing over a batch when it is killed would wait for a reader for ever.
    with suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries in C write what they think of an image's file straight to the screen. What Python has to say stays.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)  # an image at a time is too little to share out
