"""Which images of a gallery make the transfer set: the same number to every query, the nearest to any, or any.

Vemulapalli et al., "Knowledge Transfer from Vision Foundation Models for Efficient Training of Small Task-specific
Models" (ICML 2024), retrieve query-balanced: their published lists hold K images for each of the Q labelled images.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from proteus.errors import InputError
from proteus.transfer.retrieval.duplicates import Guard
from proteus.transfer.retrieval.index import PAIRS, Index, similarities

SELECTIONS = ("balanced", "agnostic", "random")


class Selection(NamedTuple):
    """S images, sorted by their query and, within it, by falling similarity.

    query, rank: [S] int64, the query that an image belongs to, and its place there from 0.
    image:       [S] int64, its number in the gallery.
    similarity:  [S] float64.
    """

    query: np.ndarray
    rank: np.ndarray
    image: np.ndarray
    similarity: np.ndarray


def balanced(index: Index, queries: np.ndarray, per_query: int, guard: Guard) -> Selection:
    """Exactly `per_query` images to each of the queries, float16 [Q, D], no image twice and no near-duplicates.

    All pairs (query, image) are gone through by falling similarity (where equal: the lower query, then the lower
    image), and a query is given the image if it lacks one and the image is free. Near-duplicates aside, that is the
    one stable matching of queries and images: no query would rather have an image that is as near to it as to the
    query that has it. InputError where the gallery has too few images.
    """
    return _nearest_pairs(index, queries, len(queries) * per_query, per_query, guard)


def agnostic(index: Index, queries: np.ndarray, per_query: int, guard: Guard) -> Selection:
    """The Q * `per_query` images that are nearest to any query, each belonging to the query it is nearest to."""
    return _nearest_pairs(index, queries, len(queries) * per_query, None, guard)


def random(index: Index, queries: np.ndarray, per_query: int, guard: Guard, seed: int) -> Selection:
    """`per_query` images at random to each query: what chance retrieves."""
    embeddings, count = index.embeddings, len(queries) * per_query
    _check_size(index, len(queries), per_query)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(embeddings.readable))
    taken: list[int] = []
    for part in (order[i : i + 4096] for i in range(0, len(order), 4096)):
        if len(taken) < count:
            guard.look_at(part)
            for image in part:
                if len(taken) < count and guard.take(int(image)):
                    taken.append(int(image))
    _check_count(len(taken), count, index, guard)
    query, image = np.arange(count) // per_query, np.array(taken)
    parts = [slice(i, i + PAIRS) for i in range(0, count, PAIRS)]
    similarity = [similarities(embeddings.rows(image[part]), queries[query[part]]) for part in parts]
    return _sorted(query, image, np.concatenate(similarity))


def _nearest_pairs(index: Index, queries: np.ndarray, total: int, limit: int | None, guard: Guard) -> Selection:
    """Give away `total` images by falling similarity, at most `limit` to a query."""
    _check_size(index, len(queries), total // len(queries))
    ranking = _Ranking(index, queries, 2 * (total // len(queries)) + 16, guard.look_at)
    counts = np.zeros(len(queries), np.int64)
    heap = []
    for query in range(len(queries)):
        similarity, image = ranking.next(query)
        heap.append((-similarity, query, image))
    heapq.heapify(heap)
    taken: list[tuple[int, int, float]] = []
    while heap and len(taken) < total:
        negative, query, image = heap[0]
        if guard.take(image):
            taken.append((query, image, -negative))
            counts[query] += 1
        if limit is not None and counts[query] == limit:
            ranking.close(query)
            heapq.heappop(heap)
            continue
        similarity, image = ranking.next(query)
        if image < 0:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (-similarity, query, image))
    _check_count(len(taken), total, index, guard)
    query_column, image_column, similarity_column = (np.array(column) for column in zip(*taken, strict=True))
    return _sorted(query_column, image_column, similarity_column)


class _Ranking:
    """Each query's images from the nearest on, searched only as deep as they are asked for.

    A search of many queries costs little more than that of one. So where one runs out, those that have used most of
    theirs are searched as well. A large index may find nearer images when it searches deeper: then the query starts
    again, and is offered images that were given away or refused before.
    """

    def __init__(self, index: Index, queries: np.ndarray, depth: int, found: Callable[[np.ndarray], None]):
        self._index, self._queries, self._found = index, queries, found
        self._depth = np.zeros(len(queries), np.int64)
        self._used = np.zeros(len(queries), np.int64)
        self._size = np.zeros(len(queries), np.int64)
        self._open = np.ones(len(queries), bool)
        self._lists: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._search(np.arange(len(queries)), depth)

    def next(self, query: int) -> tuple[float, int]:
        """Similarity and number of the query's next image; the number is -1 where there are no more."""
        if self._used[query] == self._size[query]:
            depth = self._depth[query]
            if depth >= len(self._index):
                return 0.0, -1
            most = 4 * self._used >= 3 * self._size
            self._search(np.flatnonzero(self._open & most & (self._depth == depth)), 2 * int(depth))
        images, similarity = self._lists[query]
        place = self._used[query]
        self._used[query] += 1
        return float(similarity[place]), int(images[place])

    def close(self, query: int) -> None:
        """The query needs no more."""
        self._open[query] = False
        del self._lists[query]

    def _search(self, which: np.ndarray, depth: int) -> None:
        found = self._index.nearest(self._queries[which], depth)
        self._lists.update(zip(which.tolist(), found, strict=True))
        self._size[which], self._depth[which] = [len(images) for images, _ in found], depth
        if not self._index.exact:
            self._used[which] = 0
        self._found(np.concatenate([images for images, _ in found]))


def _sorted(query: np.ndarray, image: np.ndarray, similarity: np.ndarray) -> Selection:
    order = np.lexsort((image, -similarity, query))
    query, image, similarity = query[order], image[order], similarity[order]
    starts = np.searchsorted(query, query)
    return Selection(query, np.arange(len(query)) - starts, image, similarity)


def _check_size(index: Index, queries: int, per_query: int) -> None:
    if len(index) < queries * per_query:
        raise InputError(
            f"--gallery holds {len(index)} readable images, too few for {per_query} to each of {queries} queries "
            f"({queries * per_query}): lower --per-query, take fewer queries or a larger gallery"
        )


def _check_count(found: int, wanted: int, index: Index, guard: Guard) -> None:
    if found < wanted:
        skipped = ", ".join(f"{count} of {what} images" for what, count in guard.skipped.items())
        raise InputError(
            f"--gallery: of {len(index)} readable images {found} can be selected, {wanted} are needed; skipped as "
            f"near-duplicates: {skipped}: lower --per-query, raise --near-duplicate or take a larger gallery"
        )
