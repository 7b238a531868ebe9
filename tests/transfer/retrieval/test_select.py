"""Every selection is that of the plainest code for it: all pairs, sorted."""

import numpy as np
import pytest

from proteus.errors import InputError
from proteus.transfer.retrieval import duplicates, select
from proteus.transfer.retrieval.duplicates import Guard
from proteus.transfer.retrieval.index import Index
from tests.transfer.retrieval.conftest import crowded, tied, unit


def naive(vectors, queries, excluded, threshold, total, limit):
    """(query, image) in the order given away: every pair by falling similarity, every image compared with every one."""
    x, q, e = (array.astype(np.float64) for array in (vectors, queries, excluded))
    similarity = q @ x.T
    pairs = sorted((-similarity[i, j], i, j) for i in range(len(q)) for j in range(len(x)) if not np.isnan(x[j, 0]))
    taken: list[tuple[int, int]] = []
    for _, query, image in pairs:
        chosen = x[[j for _, j in taken]]
        others = np.concatenate([q, e, chosen])
        if len(taken) == total or (limit and sum(i == query for i, _ in taken) == limit):
            continue
        if image in [j for _, j in taken] or (others @ x[image] >= threshold).any():
            continue
        taken.append((query, image))
    return taken


def guarded(embeddings, queries, excluded, threshold):
    return Guard(embeddings, queries, excluded, threshold)


CASES = [(crowded, 0.97, seed) for seed in range(3)] + [(tied, 0.9, seed) for seed in range(3)]


@pytest.mark.parametrize(("make", "threshold", "seed"), CASES)
@pytest.mark.parametrize("recent", [4, 1024])
def test_balanced_is_the_greedy_walk_over_all_pairs(stored, monkeypatch, make, threshold, seed, recent):
    monkeypatch.setattr(duplicates, "RECENT", recent)
    vectors, queries, excluded = make(300, seed), make(9, seed + 50), make(5, seed + 90)
    vectors[[3, 77, 200]] = np.nan
    vectors[40], vectors[41] = queries[2], excluded[1]
    expected = naive(vectors, queries, excluded, threshold, 63, 7)
    index = Index(stored(vectors))
    guard = guarded(index.embeddings, queries, excluded, threshold)
    found = select.balanced(index, queries, 7, guard)
    assert sorted(zip(found.query, found.image, strict=True)) == sorted(expected)
    assert np.bincount(found.query).tolist() == [7] * 9
    exact = (queries.astype(float) @ vectors.astype(float).T)[found.query, found.image]
    assert (found.similarity == exact).all()
    for query in range(9):
        own = found.query == query
        assert found.rank[own].tolist() == list(range(7))
        assert (np.diff(found.similarity[own]) <= 0).all()
    assert guard.skipped["query"] >= 1
    assert guard.skipped["selected"] >= 1


@pytest.mark.parametrize(("make", "threshold", "seed"), CASES[::2])
def test_agnostic_takes_the_nearest_to_any_query(stored, make, threshold, seed):
    vectors, queries, excluded = make(300, seed), make(9, seed + 50), make(5, seed + 90)
    index = Index(stored(vectors))
    found = select.agnostic(index, queries, 7, guarded(index.embeddings, queries, excluded, threshold))
    assert sorted(zip(found.query, found.image, strict=True)) == sorted(
        naive(vectors, queries, excluded, threshold, 63, None)
    )
    assert len(set(np.bincount(found.query, minlength=9))) > 1  # or balanced would be no other


def test_without_near_duplicates_it_is_a_stable_matching(stored):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.normal(size=(120, 8))), unit(rng.normal(size=(10, 8)))
    index = Index(stored(vectors))
    found = select.balanced(index, queries, 4, guarded(index.embeddings, queries, queries[:0], 0.999))
    similarity = queries.astype(float) @ vectors.astype(float).T
    worst = np.array([found.similarity[found.query == query].min() for query in range(10)])
    holds = np.full(120, -np.inf)
    holds[found.image] = found.similarity
    assert not ((similarity > worst[:, None]) & (similarity > holds)).any()


def test_random_is_seeded_and_keeps_the_rules(stored):
    vectors, queries, excluded = crowded(300, 0), crowded(5, 50), crowded(3, 90)
    vectors[7] = np.nan
    vectors[8:12] = queries[0]
    vectors[12:16] = excluded[2]
    index = Index(stored(vectors))

    def draw(seed):
        return select.random(index, queries, 30, guarded(index.embeddings, queries, excluded, 0.97), seed)

    found = draw(3)
    assert len(set(found.image)) == 150
    assert sorted(draw(3).image) == sorted(found.image)
    assert sorted(draw(4).image) != sorted(found.image)
    assert not set(found.image) & set(range(7, 16))
    x = vectors[found.image].astype(float)
    cosine = x @ x.T - 2 * np.eye(150)
    assert cosine.max() < 0.97
    similarity = queries.astype(float) @ x.T
    assert (found.similarity == similarity[found.query, np.arange(150)]).all()
    assert found.query.tolist() == [query for query in range(5) for _ in range(30)]
    everything = queries.astype(float) @ vectors[16:].astype(float).T
    assert abs(found.similarity.mean() - everything.mean()) < 0.05  # chosen, and paired, without regard to it


@pytest.mark.parametrize("choose", ["balanced", "agnostic", "random"])
def test_a_gallery_of_exactly_enough_is_used_up_and_one_less_is_an_error(stored, choose):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.normal(size=(80, 16))), unit(rng.normal(size=(5, 16)))
    seed = (0,) if choose == "random" else ()

    def use(vectors):
        index = Index(stored(vectors))
        guard = guarded(index.embeddings, queries, queries[:0], 0.98)
        return getattr(select, choose)(index, queries, 16, guard, *seed)

    assert sorted(use(vectors).image) == list(range(80))
    with pytest.raises(
        InputError, match=r"holds 79 readable images, too few for 16 to each of 5 queries \(80\): lower"
    ):
        use(vectors[:-1])
    vectors[5] = vectors[4]
    with pytest.raises(
        InputError, match=r"of 80 readable images 79 can be selected, 80 are needed; .*: 0 of query .* 1 of selected"
    ):
        use(vectors)


def test_equal_queries_share_what_is_near_by_turns_of_their_number(stored):
    vectors = unit(np.array([[1, 0.1 * k] for k in range(1, 9)]))
    queries = unit(np.array([[1.0, 0], [1, 0]]))
    index = Index(stored(vectors))
    found = select.balanced(index, queries, 3, guarded(index.embeddings, queries, queries[:0], 0.999))
    assert found.image.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.query.tolist() == [0, 0, 0, 1, 1, 1]
