"""The nearest images of a gallery: exact up to a size, beyond it by inverted lists and product quantisation."""

from typing import Any

import numpy as np

from proteus.transfer.retrieval.embed import Embeddings

FLAT_UP_TO = 200_000  # vectors of an exact index: at width 1024 they take 0.8 GB
CODE = 64  # bytes of a vector in the large index
TRAIN = 40  # vectors a list that the large index learns its lists from
PROBE = 8  # one list in so many is searched
RERANK = 16  # candidates an image asked for, ranked again by their true similarity
PAIRS = 2**14  # pairs of vectors multiplied at a time

# Vectors are float16 of length 1, so products of their entries are multiples of 2^-48, and every partial sum of an
# inner product is below 2: float64 holds it exactly. A similarity, and with it every order and tie, is therefore the
# same whatever library, block size or machine computes it. Float32 searches are trusted up to its rounding error only.


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[k] float64: the exact inner products of the rows of two float16 arrays [k, D]."""
    return np.einsum("kd,kd->k", a.astype(np.float64), b.astype(np.float64))


def rounding(dim: int) -> float:
    """By how much an inner product of unit vectors of that width may be wrong in float32, in any order of summing."""
    return 1.01 * dim * 2**-24


class Index:
    """Finds the nearest images of a gallery by inner product; `words` says how. Images without a vector are left out.

    exact: whether what it finds are the nearest, or, of a large gallery, nearly all of them.
    """

    def __init__(self, embeddings: Embeddings, flat_up_to: int = FLAT_UP_TO):
        self.embeddings = embeddings
        self._numbers = np.flatnonzero(embeddings.readable)  # of the images, by their number in faiss
        count = len(self._numbers)
        self.exact = count <= flat_up_to
        if self.exact:
            self._faiss = _flat(embeddings.dim)
            self.words = f"flat, exact: {count} vectors of width {embeddings.dim}, no more than {flat_up_to}"
        else:
            self._faiss = _inverted(embeddings, self._numbers)
            self.words = (
                f"IVF-PQ, {self._faiss.nlist} lists, {CODE} bytes a vector: {count} vectors of width "
                f"{embeddings.dim}, more than {flat_up_to}; 1 list in {PROBE} is searched, {RERANK} candidates an "
                "image are ranked by their true similarity"
            )
        for block in embeddings.blocks():
            if len(block):
                self._faiss.add(_padded(block, self._faiss.d))

    def __len__(self) -> int:
        return len(self._numbers)

    def nearest(self, queries: np.ndarray, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query of [Q, D] float16 its `depth` nearest images: their numbers, and exact similarities (float64).

        They fall in similarity; where that is equal the number rises. There are fewer where the gallery has fewer.
        """
        depth = min(depth, len(self))
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0))] * len(queries)
        waiting, wanted = np.arange(len(queries)), depth + 16 if self.exact else RERANK * depth
        while len(waiting):
            wanted = min(wanted, len(self))
            short = []
            step = max(1, 2**20 // wanted)
            for part in (waiting[i : i + step] for i in range(0, len(waiting), step)):
                lowest, numbers = self._search(queries[part], wanted)
                for query, low, row in zip(part, lowest, numbers, strict=True):
                    ranked = self._ranked(queries[query], row[row >= 0])
                    # What was not found is no nearer than the last that was, but for rounding.
                    cut = low + 2 * rounding(self.embeddings.dim) if self.exact else -np.inf
                    if wanted < len(self) and (len(ranked[0]) < depth or ranked[1][depth - 1] <= cut):
                        short.append(query)
                    else:
                        found[query] = ranked[0][:depth], ranked[1][:depth]
            waiting, wanted = np.array(short, np.int64), 2 * wanted
        return found

    def _search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The lowest score found, [q], and numbers in faiss, [q, count], -1 where there are no more."""
        if not self.exact:
            lists = self._faiss.nlist
            enough = 4 * count * lists // len(self)  # that hold four times as many vectors as are asked for
            self._faiss.nprobe = lists if count == len(self) else min(lists, max(1, lists // PROBE, enough))
        scores, numbers = self._faiss.search(_padded(queries, self._faiss.d), count)
        return scores[:, -1], numbers

    def _ranked(self, query: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.sort(self._numbers[found])
        exact = [
            similarities(rows, np.broadcast_to(query, rows.shape))
            for rows in (self.embeddings.rows(numbers[i : i + PAIRS]) for i in range(0, len(numbers), PAIRS))
        ]
        scores = np.concatenate(exact) if exact else np.empty(0)
        order = np.argsort(-scores, kind="stable")
        return numbers[order], scores[order]


def _flat(dim: int) -> Any:
    import faiss

    return faiss.IndexFlatIP(dim)


def _inverted(embeddings: Embeddings, numbers: np.ndarray) -> Any:
    """An empty IVF-PQ index with 4 sqrt(n) lists, trained on a seeded sample of the images `numbers`."""
    import faiss

    lists = round(4 * len(numbers) ** 0.5)
    dim = -(-embeddings.dim // CODE) * CODE  # a multiple of the code's length; zeros change no inner product
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, CODE, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical, index.cp.seed, index.cp.niter, index.pq.cp.niter = True, 0, 10, 10
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # or it warns; the sample is our choice
    chosen = np.random.default_rng(0).choice(numbers, min(len(numbers), TRAIN * lists), replace=False)
    index.train(_padded(embeddings.rows(np.sort(chosen)), dim))
    return index


def _padded(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Float32, with zeros up to width `dim`."""
    padded = np.zeros((len(vectors), dim), np.float32)
    padded[:, : vectors.shape[1]] = vectors
    return padded
