"""Near-duplicates are found at the threshold exactly."""

import numpy as np
import pytest

from proteus.transfer.retrieval import duplicates
from proteus.transfer.retrieval.duplicates import Guard, near
from tests.transfer.retrieval.conftest import crowded, tied


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97])
def test_near_names_the_first_of_all_that_are(threshold):
    rows, others = crowded(1500, 0), crowded(1500, 0)[::-3]
    cosine = rows.astype(float) @ others.astype(float).T
    expected = np.where((cosine >= threshold).any(1), (cosine >= threshold).argmax(1), -1)
    assert (near(rows, others, threshold) == expected).all()
    assert (expected >= 0).any()


def test_the_threshold_itself_is_near_and_what_is_next_to_it_is_not():
    rows, others = tied(200, 0), tied(100, 1)
    cosine = rows.astype(float) @ others.astype(float).T
    assert ((near(rows, others, 0.75) >= 0) == (cosine >= 0.75).any(1)).all()
    assert ((near(rows, others, np.nextafter(0.75, 1)) >= 0) == (cosine > 0.75).any(1)).all()
    assert (cosine.max(1) == 0.75).any()


def test_the_first_of_very_many_is_named():
    others = np.zeros((20_000, 8), np.float16)
    others[[9_000, 9_500, 17_000], [1, 1, 2]] = 1
    assert near(np.eye(8, dtype=np.float16)[:4], others, 0.9).tolist() == [-1, 9_000, 17_000, -1]


def test_nothing_is_near_to_nothing():
    assert near(crowded(5, 0), crowded(5, 0)[:0], 0.1).tolist() == [-1] * 5


def test_an_image_that_is_refused_counts_once_with_its_reason(stored):
    vectors = np.eye(8, dtype=np.float16)
    vectors[3] = vectors[2]
    embeddings = stored(vectors)
    guard = Guard(embeddings, vectors[:1], vectors[1:2], 0.9)
    guard.look_at(np.arange(8))
    assert [guard.take(image) for image in (0, 0, 1, 2, 2, 3, 3, 4)] == [False] * 3 + [True] + [False] * 3 + [True]
    assert guard.skipped == {"query": 1, "excluded": 1, "selected": 1}


def test_an_image_that_is_looked_at_late_is_compared_with_all_that_were_selected(stored, monkeypatch):
    monkeypatch.setattr(duplicates, "RECENT", 2)
    vectors = np.eye(16, dtype=np.float16)
    vectors[8:] = vectors[:8]
    guard = Guard(stored(vectors), vectors[:0], vectors[:0], 0.9)
    guard.look_at(np.arange(8))
    assert all(guard.take(image) for image in range(5))
    guard.look_at(np.arange(16))
    assert [guard.take(image) for image in range(8, 16)] == [False] * 5 + [True] * 3
    assert guard.skipped == {"query": 0, "excluded": 0, "selected": 5}
