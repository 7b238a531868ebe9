"""Near-duplicates: images whose embeddings have a cosine above a threshold."""

import numpy as np

from proteus.transfer.retrieval.embed import Embeddings
from proteus.transfer.retrieval.index import rounding, similarities

RECENT = 1024  # selected images that candidates are compared with one by one; older ones all at once
REASONS = ("query", "excluded", "selected")  # what an image that was skipped is a near-duplicate of
UNSEEN, FREE, QUERY, EXCLUDED, SELECTED, TAKEN = range(6)


def near(rows: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """[a] int: for each of the float16 vectors [a, D] the first of [b, D] with a cosine of at least that, -1 for none.

    Computed in float32; what is too close to the threshold for that is computed exactly.
    """
    first = np.full(len(rows), -1)
    margin = rounding(rows.shape[1])
    for i in range(0, len(rows), 1024):
        part = rows[i : i + 1024].astype(np.float32)
        for j in range(0, len(others), 8192):
            open_ = np.flatnonzero(first[i : i + 1024] < 0)
            if not len(open_):
                break
            cosine = part[open_] @ others[j : j + 8192].astype(np.float32).T
            maybe = np.flatnonzero(cosine.max(1) >= threshold - margin)  # most have none, and are done with
            open_, cosine = open_[maybe], cosine[maybe]
            close = cosine >= threshold + margin
            unsure = np.stack(np.nonzero((cosine >= threshold - margin) & ~close))  # [2, few]
            for a, b in (unsure[:, k : k + 4096] for k in range(0, unsure.shape[1], 4096)):
                close[a, b] = similarities(rows[i + open_[a]], others[j + b]) >= threshold
            hit = close.any(1)
            first[i + open_[hit]] = j + close[hit].argmax(1)
    return first


class Guard:
    """Which images of a gallery may still be selected.

    An image may not once it, or a near-duplicate, was selected, nor where it is one of a query or an excluded image.

    queries, excluded: float16 [Q, D], [E, D].
    skipped:           how many images were refused, by what they are near-duplicates of: each counts once.
    """

    def __init__(self, embeddings: Embeddings, queries: np.ndarray, excluded: np.ndarray, threshold: float):
        self._embeddings, self._threshold = embeddings, threshold
        self._references = ((queries, QUERY), (excluded, EXCLUDED))
        self._state = np.full(len(embeddings), UNSEEN, np.uint8)
        self._counted = np.zeros(len(embeddings), bool)
        self._chosen: list[int] = []
        self._recent = np.empty((RECENT, embeddings.dim), np.float32)
        self.skipped = dict.fromkeys(REASONS, 0)

    def look_at(self, images: np.ndarray) -> None:
        """Compare candidates that `take` may be asked for, many at a time."""
        new = np.unique(images)
        new = new[self._state[new] == UNSEEN]
        for part in (new[i : i + 2**16] for i in range(0, len(new), 2**16)):
            rows = self._embeddings.rows(part)
            self._state[part] = FREE
            for others, reason in self._references:
                self._refuse(part, rows, others, reason)
            older = np.array(self._chosen[: len(self._chosen) // RECENT * RECENT], np.int64)
            for i in range(0, len(older), RECENT):
                self._refuse(part, rows, self._embeddings.rows(older[i : i + RECENT]), SELECTED)

    def take(self, image: int) -> bool:
        """Select an image that was looked at; False where that may not be."""
        state = self._state[image]
        if state == TAKEN:
            return False
        recent = len(self._chosen) % RECENT
        if state == FREE:
            row = self._embeddings.rows(np.array([image]))  # [1, D]
            if self._close_to_recent(row, recent):
                state = self._state[image] = SELECTED
        if state != FREE:
            self.skipped[REASONS[state - QUERY]] += not self._counted[image]
            self._counted[image] = True
            return False
        self._state[image] = TAKEN
        self._chosen.append(image)
        self._recent[recent] = row[0]
        if recent == RECENT - 1:
            free = np.flatnonzero(self._state == FREE)
            latest = self._embeddings.rows(np.array(self._chosen[-RECENT:]))
            for part in (free[i : i + 2**16] for i in range(0, len(free), 2**16)):
                self._refuse(part, self._embeddings.rows(part), latest, SELECTED)
        return True

    def _close_to_recent(self, row: np.ndarray, count: int) -> bool:
        cosine = self._recent[:count] @ row[0].astype(np.float32)
        candidates = self._recent[:count][cosine >= self._threshold - rounding(row.shape[1])].astype(np.float16)
        return bool((similarities(candidates, np.broadcast_to(row, candidates.shape)) >= self._threshold).any())

    def _refuse(self, images: np.ndarray, rows: np.ndarray, others: np.ndarray, reason: int) -> None:
        open_ = np.flatnonzero(self._state[images] == FREE)
        if len(open_) and len(others):
            close = near(rows[open_], others, self._threshold) >= 0
            self._state[images[open_[close]]] = reason
