"""What a process of a run says when another one has gone."""

import contextlib
from collections.abc import Iterator

import torch

from proteus.errors import PeerError


@contextlib.contextmanager
def peers_needed() -> Iterator[None]:
    """PeerError, in place of what gloo or NCCL raise, where another process is no more or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)):
            raise
        raise PeerError(
            "another process of the run has ended or cannot be reached; if it said why, it stands above. The last "
            "checkpoint stands, and the same command goes on from there"
        ) from None
