"""Time, memory and recall of the search in a large gallery, on synthetic vectors.

python -m benchmarks.speed.retrieval [--vectors 1000000] [--dim 384] [--queries 1000] [--threads 2]

The vectors are clusters of uneven sizes under a spectrum that falls as a network's features do. They are written as
shards of float16 and searched through the code of tools/retrieve.py; recall@10 is against the exact ten nearest,
computed block by block. `peak` is the most memory the process has held so far, pages of the mapped shards included.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from proteus.transfer.retrieval.duplicates import Guard
from proteus.transfer.retrieval.embed import SHARD, Embeddings, save_shard
from proteus.transfer.retrieval.index import FLAT_UP_TO, Index
from proteus.transfer.retrieval.select import balanced

DEPTH, CLUSTERS = 10, 2000


class Clusters:
    """Unit vectors around 2,000 centres, cluster i as large as (1 + i)^-0.5; two of a cluster have a cosine of 0.6."""

    def __init__(self, dim: int):
        rng = np.random.default_rng(0)
        self._spectrum = ((1 + np.arange(dim)) ** -0.5).astype(np.float32)
        self._centres = rng.normal(size=(CLUSTERS, dim)).astype(np.float32) * self._spectrum
        self._share = (1 + np.arange(CLUSTERS)) ** -0.5
        self._share /= self._share.sum()

    def draw(self, count: int, seed: int) -> np.ndarray:
        """[count, D] float16."""
        rng = np.random.default_rng((1, seed))
        noise = rng.standard_normal((count, self._centres.shape[1]), np.float32) * self._spectrum
        vectors = self._centres[rng.choice(CLUSTERS, count, p=self._share)] + 0.8 * noise
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {what} | {time.perf_counter() - began:.1f} | {peak:.2f} |", flush=True)


def exact(embeddings: Embeddings, queries: np.ndarray) -> np.ndarray:
    """[Q, 10] numbers of the nearest, in no order."""
    best = np.full((len(queries), DEPTH), -np.inf, np.float32)
    numbers = np.zeros((len(queries), DEPTH), np.int64)
    start = 0
    for block in embeddings.blocks():
        scores = queries.astype(np.float32) @ block.astype(np.float32).T  # [Q, SHARD]
        scores = np.concatenate([best, scores], axis=1)
        found = np.concatenate([numbers, np.tile(np.arange(start, start + len(block)), (len(queries), 1))], axis=1)
        kept = np.argpartition(-scores, DEPTH, axis=1)[:, :DEPTH]
        best, numbers = np.take_along_axis(scores, kept, 1), np.take_along_axis(found, kept, 1)
        start += len(block)
    return numbers


def measure(count: int, dim: int, queries: int, folder: Path, flat_up_to: int) -> None:
    """Print the table."""
    clusters = Clusters(dim)
    print("| step | seconds | peak, GiB |\n| --- | ---: | ---: |")
    with timed(f"write {count} vectors of width {dim}"):
        for start in range(0, count, SHARD):
            save_shard(folder, start, clusters.draw(min(SHARD, count - start), 1 + start))
    embeddings, asked = Embeddings(folder, count), clusters.draw(queries, 0)
    with timed("index"):
        index = Index(embeddings, flat_up_to)
    with timed(f"{DEPTH} nearest of {queries} queries"):
        found = index.nearest(asked, DEPTH)
    with timed(f"balanced selection, {DEPTH} to each of {queries}"):
        balanced(index, asked, DEPTH, Guard(embeddings, asked, asked[:0], 0.98))
    with timed(f"exact {DEPTH} nearest"):
        truth = exact(embeddings, asked)
    recall = np.mean([len(np.intersect1d(row[0], true)) / DEPTH for row, true in zip(found, truth, strict=True)])
    print(f"\nindex: {index.words}\nrecall@{DEPTH}: {recall:.4f}")


def main(argv: list[str] | None = None) -> None:
    """The vectors are in a temporary folder, which is removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--flat-up-to", type=int, default=FLAT_UP_TO)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    import faiss

    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads), tempfile.TemporaryDirectory() as folder:
        measure(args.vectors, args.dim, args.queries, Path(folder), args.flat_up_to)


if __name__ == "__main__":
    main()
