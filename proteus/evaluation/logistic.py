"""The linear probe by logistic regression, as in the fine-grained protocol of SynCLR and Proteus."""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

SWEEP = np.logspace(-6, 5, 45)  # weight decays; C = 1 / weight decay


class LinearProbe(NamedTuple):
    """Top-1 accuracy on the test set, and the C that the validation part chose."""

    accuracy: float
    C: float


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, sweep: np.ndarray = SWEEP
) -> LinearProbe:
    """Multinomial logistic regression on z-scored features [n, D]; C chosen on a fifth of the training set.

    The validation fifth is the head of a permutation by numpy's seed 0; candidates go from large C to small and ties
    stay with the larger; the best C is refitted on everything. A dimension that never varies is left at zero.
    """
    order = np.random.RandomState(0).permutation(len(train))
    val, fit = np.split(order, [len(train) // 5])
    fit_x, val_x = _standardise(train[fit], train[val])
    best, best_accuracy = 0.0, -1.0
    with warnings.catch_warnings():
        # Nearly unregularised candidates need not converge to lose; the fit that counts, below, does warn.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for C in 1 / np.sort(sweep):
            accuracy = float(_fit(fit_x, train_labels[fit], C).score(val_x, train_labels[val]))
            if accuracy > best_accuracy:
                best, best_accuracy = float(C), accuracy
    train_x, test_x = _standardise(train, test)
    return LinearProbe(float(_fit(train_x, train_labels, best).score(test_x, test_labels)), best)


def _fit(x: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    return LogisticRegression(C=C, max_iter=1000, tol=1e-6).fit(x, y)


def _standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.mean(axis=0), train.std(axis=0)
    varies = np.ptp(train, axis=0) > 0  # the std of a constant is not always 0
    scale = np.where(varies, 1 / np.where(varies, std, 1), 0)
    return (train - mean) * scale, (test - mean) * scale
