"""The k-NN probe against a loop over all pairs."""

import math

import pytest
import torch

from proteus.evaluation.knn import knn_accuracy


def slow(bank, bank_labels, queries, labels, k, temperature) -> float:
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    correct = 0
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        similarities = [(cosine(query, other), c) for other, c in zip(bank.tolist(), bank_labels.tolist(), strict=True)]
        votes: dict[int, float] = {}
        for similarity, c in sorted(similarities, reverse=True)[:k]:
            votes[c] = votes.get(c, 0) + math.exp(similarity / temperature)
        correct += max(votes, key=lambda c: votes[c]) == label
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
