"""The k-NN probe against a loop over all pairs."""

import math

import pytest
import torch

from proteus.errors import InputError
from proteus.evaluation import knn as module
from proteus.evaluation.knn import KS, knn, knn_accuracy


def slow(bank, bank_labels, queries, labels, k, temperature, top=1) -> float:
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    correct = 0
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        similarities = [(cosine(query, other), c) for other, c in zip(bank.tolist(), bank_labels.tolist(), strict=True)]
        votes: dict[int, float] = {}
        for similarity, c in sorted(similarities, reverse=True)[:k]:
            votes[c] = votes.get(c, 0) + math.exp(similarity / temperature)
        correct += label in sorted(votes, key=lambda c: -votes[c])[:top]
    return correct / len(labels)


def clouds(n, classes, seed, dim=8, noise=1.2):
    """Points [n, dim] around one centre a class, of very different lengths, and their labels."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    points = centres[labels] + noise * torch.randn(n, dim, generator=generator)
    return points * (0.1 + 10 * torch.rand(n, 1, generator=generator)), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_it_is_the_vote_of_the_nearest(k, temperature):
    bank, queries = clouds(60, 4, seed=1), clouds(40, 4, seed=2)
    accuracy = knn_accuracy(*bank, *queries, k=k, temperature=temperature)
    assert accuracy == pytest.approx(slow(*bank, *queries, k, temperature))
    assert 0.1 < accuracy < 1  # neither chance nor trivial


def test_more_queries_than_fit_in_one_part():
    bank, queries = clouds(30, 3, seed=1), clouds(1100, 3, seed=2)
    assert knn_accuracy(*bank, *queries, k=5) == pytest.approx(slow(*bank, *queries, 5, 0.07))


def test_closeness_weighs():
    # Two far neighbours of class 1 against one near of class 0: few votes that weigh more win.
    bank = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), k=3, temperature=0.07) == 1
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), k=3, temperature=100.0) == 1


def test_the_bank_finds_itself():
    points, labels = clouds(50, 5, seed=3)
    assert knn_accuracy(points, labels, points, labels, k=1) == 1


def test_a_class_that_the_bank_does_not_know_is_never_right():
    points, labels = clouds(50, 3, seed=3)
    assert knn_accuracy(points, labels, points, torch.full_like(labels, 7), k=5) == 0


@pytest.mark.parametrize("parts", [(1024, 65536), (7, 13), (40, 1)], ids=str)
def test_several_k_at_once_in_parts_of_any_size(monkeypatch, parts):
    monkeypatch.setattr(module, "QUERIES", parts[0])
    monkeypatch.setattr(module, "BANK", parts[1])
    bank, queries = clouds(60, 9, seed=1), clouds(40, 9, seed=2)
    scores = knn(*bank, *queries, ks=(20, 3, 1000, 6))
    assert list(scores) == [20, 3, 1000, 6]
    for k, score in scores.items():
        assert score.top1 == pytest.approx(slow(*bank, *queries, k, 0.07))
        assert score.top5 == pytest.approx(slow(*bank, *queries, k, 0.07, top=5))
    assert scores[20].top1 < scores[20].top5
    assert scores[3] != scores[20]


def test_the_published_k():
    assert KS == (10, 20, 100, 200)
    assert list(knn(*clouds(30, 3, 1), *clouds(5, 3, 2))) == [10, 20, 100, 200]


def test_half_precision_features_are_compared_in_float32():
    # Cosines of 0.01 and of 0.02 are both 1 in float16.
    angles = torch.tensor([0.32, 0.31])
    bank = torch.stack([angles.cos(), angles.sin()], dim=1).half()
    query = torch.tensor([[math.cos(0.3), math.sin(0.3)]]).half()
    for order in ([0, 1], [1, 0]):
        assert knn(bank[order], torch.tensor(order), query, torch.tensor([1]), ks=(1,))[1].top1 == 1


def test_of_equal_votes_the_first_class_wins():
    bank, query = torch.eye(2).repeat(3, 1), torch.ones(1, 2)
    labels = torch.tensor([4, 2, 2, 4, 4, 2])  # three votes each
    assert knn_accuracy(bank, labels, query, torch.tensor([2]), k=6) == 1
    assert knn_accuracy(bank, labels, query, torch.tensor([4]), k=6) == 0
    assert knn(bank, labels, query, torch.tensor([4]), ks=(6,))[6].top5 == 1


def test_a_class_without_a_vote_is_not_among_the_five():
    # Two classes have votes; of the other eight none is nearer than another.
    bank, labels = torch.eye(2), torch.tensor([3, 9])
    for label in range(10):
        score = knn(bank, labels, torch.ones(1, 2), torch.tensor([label]), ks=(2,))[2]
        assert score.top5 == (label in (3, 9))
        assert score.top1 == (label == 3)


def test_nothing_to_vote():
    points, labels = clouds(5, 2, seed=1)
    with pytest.raises(InputError, match="k = 0 neighbours of 5 images"):
        knn(points, labels, points, labels, ks=(3, 0))
    with pytest.raises(InputError, match="k = 20 neighbours of 0 images"):
        knn_accuracy(points[:0], labels[:0], points, labels)


def test_a_query_that_is_not_a_number_is_never_right():
    points, labels = clouds(5, 2, seed=1)
    for label in (0, 1):
        query = torch.full((1, 8), torch.nan)
        assert knn(points, labels, query, torch.tensor([label]), ks=(3,))[3] == (0, 0)
