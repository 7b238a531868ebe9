"""The nearest images: exactly those of a full sort, or nearly all of them where the gallery is large."""

import numpy as np
import pytest

from proteus.transfer.retrieval import index as module
from proteus.transfer.retrieval.duplicates import Guard
from proteus.transfer.retrieval.index import Index, rounding, similarities
from proteus.transfer.retrieval.select import balanced
from tests.transfer.retrieval.conftest import crowded, tied, unit


def full_sort(vectors, query, depth):
    similarity = vectors.astype(float) @ query.astype(float)
    order = [i for i in np.lexsort((np.arange(len(vectors)), -similarity)) if not np.isnan(similarity[i])][:depth]
    return order, similarity[order]


@pytest.mark.parametrize("make", [crowded, tied])
@pytest.mark.parametrize("depth", [1, 10, 150, 1000])
def test_a_flat_index_is_a_full_sort_ties_by_number(stored, make, depth):
    vectors, queries = make(260, 1), make(6, 60)
    vectors[[0, 100, 259]] = np.nan
    index = Index(stored(vectors))
    assert index.exact
    assert len(index) == 257
    for query, (images, similarity) in zip(queries, index.nearest(queries, depth), strict=True):
        order, expected = full_sort(vectors, query, depth)
        assert images.tolist() == order
        assert (similarity == expected).all()


def test_similarities_are_exact_in_any_order():
    vectors = unit(np.random.default_rng(0).normal(size=(2000, 384)))
    a, b = vectors[:1000], vectors[1000:]
    there, back = similarities(a, b), similarities(a[:, ::-1], b[:, ::-1])
    assert (there == back).all()
    assert (there == np.diag(a.astype(float) @ b.astype(float).T)).all()
    in_float32 = np.einsum("kd,kd->k", a.astype(np.float32), b.astype(np.float32))
    assert 0 < abs(in_float32 - there).max() < rounding(384)


@pytest.fixture(scope="module")
def large():
    """3,040 vectors in 60 clusters: a gallery of 3,000, of which 6 are unreadable, and 40 queries."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 40))
    vectors = unit(centres[rng.integers(60, size=3040)] + 0.7 * rng.normal(size=(3040, 40)))
    vectors[:3000:500] = np.nan
    return vectors[:3000], vectors[3000:]


@pytest.fixture
def coarse(stored, large, monkeypatch):
    """An index of inverted lists, with codes of 16 bytes: they are learnt faster."""
    monkeypatch.setattr(module, "CODE", 16)
    return Index(stored(large[0]), flat_up_to=2990)


def test_a_large_gallery_is_searched_in_lists_and_finds_nearly_all(coarse, large):
    vectors, queries = large
    assert not coarse.exact
    assert "IVF-PQ, 219 lists, 16 bytes a vector: 2994 vectors of width 40, more than 2990;" in coarse.words
    found, again = coarse.nearest(queries, 10), Index(coarse.embeddings, flat_up_to=2990).nearest(queries, 10)
    hits = 0
    for query, (images, similarity), (other, _) in zip(queries, found, again, strict=True):
        assert images.tolist() == other.tolist()
        assert (similarity == vectors[images].astype(float) @ query.astype(float)).all()  # ranked by the true ones
        assert (np.diff(similarity) <= 0).all()
        hits += len(set(images) & set(full_sort(vectors, query, 10)[0]))
    assert hits / 400 > 0.95
    coarse.nearest(queries, 1)
    assert coarse._faiss.nprobe == 219 // 8
    ((images, _),) = coarse.nearest(queries[:1], 3000)
    assert images.tolist() == full_sort(vectors, queries[0], 3000)[0]  # searched to its end


def test_a_selection_from_a_large_gallery_keeps_the_rules(coarse, large):
    _, queries = large
    guard = Guard(coarse.embeddings, queries, queries[:0], 0.99)
    found = balanced(coarse, queries, 60, guard)  # 2,400 of 2,994: some queries go far down
    assert np.bincount(found.query).tolist() == [60] * 40
    assert len(set(found.image)) == 2400
    flat = Index(coarse.embeddings)
    best = balanced(flat, queries, 60, Guard(coarse.embeddings, queries, queries[:0], 0.99))
    assert found.similarity.mean() > 0.99 * best.similarity.mean()


def test_the_size_alone_chooses(stored, monkeypatch):
    monkeypatch.setattr(module, "CODE", 4)
    vectors = stored(crowded(300, 0))
    assert Index(vectors, flat_up_to=300).exact
    assert not Index(vectors, flat_up_to=299).exact
    assert "flat, exact: 300 vectors of width 24, no more than 200000" in Index(vectors).words
    assert module.FLAT_UP_TO == 200_000
