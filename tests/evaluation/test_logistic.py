"""The linear probe: what it scores, which C it takes, and what it does with features that do not vary."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from proteus.evaluation.logistic import SWEEP, linear_probe

FEW = np.logspace(-3, 4, 8)  # weight decays


@pytest.fixture(autouse=True)
def one_thread_for_sklearn():
    with threadpool_limits(1):
        yield


def clouds(n, classes, seed, dim=10, noise=0.1):
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return (centres[labels] + noise * rng.normal(size=(n, dim))).astype(np.float32), labels


def test_separable_classes_are_told_apart():
    assert linear_probe(*clouds(100, 4, 1), *clouds(60, 4, 2), FEW).accuracy == 1


def test_labels_without_meaning_are_guessed():
    rng = np.random.default_rng(5)
    train, test = rng.normal(size=(300, 5)), rng.normal(size=(2000, 5))
    accuracy = linear_probe(train, rng.integers(4, size=300), test, rng.integers(4, size=2000), FEW).accuracy
    assert accuracy == pytest.approx(0.25, abs=0.05)  # five standard deviations


def test_among_ties_the_largest_c_is_taken():
    # Every candidate but the absurdly small ones tells these classes apart.
    train, test = clouds(100, 4, 1), clouds(60, 4, 2)
    for sweep in (FEW, FEW[::-1], np.array([3.0, 1.0, 2.0])):
        _, chosen = linear_probe(*train, *test, sweep)
        assert chosen == pytest.approx(1 / sweep.min())


def test_c_is_what_the_validation_fifth_chose():
    (train, labels), (test, test_labels) = clouds(100, 3, 1, dim=40, noise=2.5), clouds(400, 3, 2, dim=40, noise=2.5)
    order = np.random.RandomState(0).permutation(100)
    val, fit = order[:20], order[20:]
    scores = {}
    for decay in FEW:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / decay, max_iter=5000, tol=1e-6))
        scores[1 / decay] = model.fit(train[fit], labels[fit]).score(train[val], labels[val])
    best = max(C for C in scores if scores[C] == max(scores.values()))
    assert best < max(scores)  # the noise makes some weight decay worth its while
    model = make_pipeline(StandardScaler(), LogisticRegression(C=best, max_iter=5000, tol=1e-6)).fit(train, labels)
    accuracy, chosen = linear_probe(train, labels, test, test_labels, FEW)
    assert chosen == pytest.approx(best)
    assert accuracy == pytest.approx(model.score(test, test_labels), abs=1 / 400)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -37.3])
def test_a_dimension_that_never_varies_in_training_says_nothing(constant, dtype):
    (train, labels), (test, test_labels) = clouds(130, 3, 1, noise=1.0), clouds(200, 3, 2, noise=1.0)
    train, test = train.astype(dtype), test.astype(dtype)
    expected, expected_c = linear_probe(train, labels, test, test_labels, FEW)
    assert 0.5 < expected < 1
    flat = np.full((130, 2), constant, dtype)
    varying = np.random.default_rng(3).normal(size=(200, 2)).astype(dtype) * 1e-2 + flat[0]
    accuracy, chosen = linear_probe(np.hstack([flat, train]), labels, np.hstack([varying, test]), test_labels, FEW)
    assert chosen == pytest.approx(expected_c)
    assert accuracy == pytest.approx(expected, abs=1 / 200)


def test_scale_and_offset_of_a_feature_do_not_matter():
    (train, labels), (test, test_labels) = clouds(120, 3, 1, noise=1.0), clouds(200, 3, 2, noise=1.0)
    scale, offset = np.logspace(-2, 3, 10), np.linspace(-50, 50, 10)
    train, test = train.astype(np.float64), test.astype(np.float64)
    plain = linear_probe(train, labels, test, test_labels, FEW)
    moved = linear_probe(train * scale + offset, labels, test * scale + offset, test_labels, FEW)
    assert tuple(moved) == pytest.approx(tuple(plain), abs=1 / 200)


def test_the_published_sweep():
    assert len(SWEEP) == 45
    assert SWEEP[[0, -1]] == pytest.approx([1e-6, 1e5])
    assert np.diff(np.log10(SWEEP)) == pytest.approx(np.full(44, 0.25))
