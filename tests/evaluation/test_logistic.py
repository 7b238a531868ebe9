"""The linear probe: what it scores, which C it takes, and that its fits are scikit-learn's."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from proteus.errors import InputError
from proteus.evaluation import logistic
from proteus.evaluation.logistic import GRIDS, fit_logistic, logistic_probe, split, standardise
from proteus.evaluation.metrics import mean_average_precision_11

FEW = np.logspace(3, -4, 8)


@pytest.fixture(autouse=True)
def one_thread_for_sklearn():
    with threadpool_limits(1):
        yield


def clouds(n, classes, seed, dim=10, noise=0.1):
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    x = (centres[labels] + noise * rng.normal(size=(n, dim))).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(labels)


def sklearn_fit(x, y, C):
    warnings.simplefilter("ignore", ConvergenceWarning)
    return LogisticRegression(C=C, max_iter=1000, tol=1e-12).fit(x.numpy(), y.numpy())


def sklearn_value(model, x, y, C):
    z = x.numpy() @ model.coef_.T + model.intercept_
    z = np.hstack([-z / 2, z / 2]) if z.shape[1] == 1 else z
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(z), y, reduction="sum")
    return C * float(loss) + 0.5 * (model.coef_**2).sum()


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_digits_against_scikit_learn(every):
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    test, test_y, train, train_y = x[:400], y[:400], x[400:], y[400:]
    held, kept = split(len(train), "proteus")
    fit, val = standardise(train[kept], train[held])
    grid = GRIDS["proteus"][::every]
    fits = fit_logistic(fit, train_y[kept], grid)
    assert fits.converged.all()
    scores = []
    for i, C in enumerate(grid):
        model = sklearn_fit(fit, train_y[kept], C)
        best = sklearn_value(model, fit, train_y[kept], C)
        assert float(fits.value[i]) <= best * (1 + 1e-6) + 1e-8, C
        scores.append(model.score(val.numpy(), train_y[held].numpy()))
    result = logistic_probe(train, train_y, test, test_y, grid=grid)
    assert result.val_score == max(scores)
    assert max(scores) == scores[int(np.argmin(abs(grid - result.C)))]
    full, test = standardise(train, test)
    expected = sklearn_fit(full, train_y, result.C).score(test.numpy(), test_y.numpy())
    assert result.score == pytest.approx(expected, abs=1e-3)
    assert 0.9 < result.score < 1


@pytest.mark.parametrize(("n", "dim", "classes"), [(120, 10, 2), (120, 10, 3), (30, 60, 4)])
def test_values_and_weights_are_scikit_learns(n, dim, classes):
    x, y = clouds(n, classes, 1, dim, noise=1.5)
    x = x.double() * torch.logspace(-0.5, 0.5, dim) + 2  # neither centred nor scaled
    grid = np.array([1e-4, 1e-2, 1.0])
    fits = fit_logistic(x, y, grid)
    for i, C in enumerate(grid):
        model = sklearn_fit(x, y, C)
        assert float(fits.value[i]) == pytest.approx(sklearn_value(model, x, y, C), rel=1e-6)
        logits = fits.logits(x, i)
        expected = torch.from_numpy(x.numpy() @ model.coef_.T + model.intercept_)
        if classes > 2:  # a constant added to all changes nothing
            logits, expected = logits - logits.mean(1, True), expected - expected.mean(1, True)
        assert (logits - expected).abs().max() < 0.02 * max(1, expected.abs().max())


def test_many_labels_are_as_many_binary_fits():
    x, y = clouds(150, 4, 1, noise=1.5)
    present = torch.nn.functional.one_hot(y).bool()
    present[:, 1] |= present[:, 2]
    grid = np.array([10.0, 0.1])
    fits = fit_logistic(x, present, grid)
    assert fits.weight.shape == (2, 4, 10)
    for i, C in enumerate(grid):
        models = [sklearn_fit(x.double(), present[:, k].long(), C) for k in range(4)]
        values = [sklearn_value(m, x.double(), present[:, k].long(), C) for k, m in enumerate(models)]
        assert float(fits.value[i]) == pytest.approx(sum(values), rel=1e-6)
        expected = np.hstack([m.coef_.T for m in models]).T
        torch.testing.assert_close(fits.weight[i], torch.from_numpy(expected), atol=5e-3, rtol=0)


def test_groups_give_the_same_fits(monkeypatch):
    x, y = clouds(80, 3, 1, noise=1.0)
    together = fit_logistic(x, y, FEW)
    monkeypatch.setattr(logistic, "ELEMENTS", 80 * 3)
    alone = fit_logistic(x, y, FEW)
    torch.testing.assert_close(alone.value, together.value, rtol=1e-6, atol=0)


def test_fits_that_end_too_early_say_so():
    x, y = clouds(80, 3, 1, noise=1.0)
    converged = fit_logistic(x, y, np.array([1e-6, 1e5]), max_iter=4).converged
    assert converged.tolist() == [True, False]


def test_labels_without_meaning_are_guessed():
    rng = np.random.default_rng(5)
    (train, y), (test, test_y) = (
        (torch.from_numpy(rng.normal(size=(n, 5))), torch.from_numpy(rng.integers(4, size=n))) for n in (300, 2000)
    )
    assert logistic_probe(train, y, test, test_y, grid=FEW).score == pytest.approx(0.25, abs=0.05)  # five deviations


@pytest.mark.parametrize(("protocol", "first"), [("proteus", 1e6), ("dinov2", 1e-6)])
def test_grids(protocol, first):
    assert len(GRIDS[protocol]) == 45
    assert GRIDS[protocol][0] == pytest.approx(first)
    assert abs(np.diff(np.log10(GRIDS[protocol]))) == pytest.approx(np.full(44, 0.25))


def test_among_ties_the_first_is_taken():
    train, test = clouds(100, 4, 1), clouds(60, 4, 2)
    result = logistic_probe(*train, *test, grid=FEW)
    assert result.score == 1
    assert FEW[0] == result.C
    assert result.warnings == ["the best C, 1e+03, lies at an end of the grid"]
    assert FEW[0] != logistic_probe(*train, *test, grid=FEW[2:][::-1]).C


def test_the_held_out_parts():
    order = list(range(103))
    np.random.RandomState(0).shuffle(order)
    held, kept = split(103, "proteus")
    assert held.tolist() == order[:20]
    assert kept.tolist() == order[20:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(103).tolist()
    held, kept = split(103, "dinov2")
    assert held.tolist() == order[:10]
    assert kept.tolist() == order[10:]


@pytest.mark.parametrize("protocol", ["proteus", "dinov2"])
@pytest.mark.parametrize("given", [True, False], ids=["official val", "cut off train"])
def test_c_is_what_validation_chose_and_the_refit_has_everything(protocol, given):
    (train, y), (test, test_y) = clouds(140, 3, 1, dim=40, noise=2.5), clouds(400, 3, 2, dim=40, noise=2.5)
    train, test = 3 * train + 1, 3 * test + 1
    held, kept = (torch.arange(100, 140), torch.arange(100)) if given else split(140, protocol)
    scale = standardise if protocol == "proteus" else lambda a, b: (a, b)
    fit, val = scale(train[kept].double(), train[held].double())
    scores = [sklearn_fit(fit, y[kept], C).score(val.numpy(), y[held].numpy()) for C in FEW]
    best = FEW[int(np.argmax(scores))]
    full, scaled = scale(train.double(), test.double())
    expected = sklearn_fit(full, y, best).score(scaled.numpy(), test_y.numpy())
    own = (train[:100], y[:100]) if given else (train, y)
    official = (train[100:], y[100:]) if given else None
    result = logistic_probe(*own, test, test_y, val=official, protocol=protocol, grid=FEW)
    assert best == result.C
    assert abs(result.val_scores - scores).max() < 1.5 / len(held)  # an image on the border
    assert result.score == pytest.approx(expected, abs=1 / 400)


@pytest.mark.parametrize("constant", [0.0, 0.1, -37.3])
def test_a_dimension_that_never_varies_in_training_says_nothing(constant):
    (train, y), (test, test_y) = clouds(130, 3, 1, noise=1.0), clouds(200, 3, 2, noise=1.0)
    expected = logistic_probe(train, y, test, test_y, grid=FEW)
    flat = torch.full((130, 2), constant)
    varying = constant + 1e-2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    result = logistic_probe(torch.cat([flat, train], 1), y, torch.cat([varying, test], 1), test_y, grid=FEW)
    assert result.C == expected.C
    assert result.score == pytest.approx(expected.score, abs=1 / 200)


def test_a_class_that_is_not_trained_is_never_predicted():
    (train, y), (test, test_y) = clouds(100, 4, 1), clouds(80, 4, 2)
    seen = y != 2
    val = train[~seen][:5], y[~seen][:5]
    result = logistic_probe(train[seen], y[seen], test, test_y, val=val, grid=FEW[:1])
    assert result.val_score == 0
    few = logistic_probe(train[seen], y[seen], test, test_y, metric="mean_per_class", grid=FEW[:1])
    assert few.score == pytest.approx(0.75)  # the other three are right


def test_features_are_scaled_by_population_statistics():
    fit, other = standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[4.0, 9.0]]))
    assert fit.tolist() == [[-1, 0], [1, 0]]
    assert other.tolist() == [[2, 0]]


@pytest.mark.parametrize(("metric", "variant"), [("map11", "ref"), ("map11_official", "official")])
def test_mean_average_precision_of_many_labels(metric, variant):
    (train, y), (test, test_y) = clouds(100, 4, 1, noise=2.0), clouds(80, 4, 2, noise=2.0)
    train_labels, test_labels = (2 * torch.nn.functional.one_hot(labels, 5) - 1 for labels in (y, test_y))
    train_labels[:9] = torch.where(train_labels[:9] == -1, 0, train_labels[:9])  # difficult trains as absent
    test_labels[::3, 0] = 0
    result = logistic_probe(train, train_labels, test, test_labels, metric=metric, grid=FEW)
    fit, scaled = standardise(train.double(), test.double())
    models = [sklearn_fit(fit, train_labels[:, k] == 1, result.C) for k in range(4)]  # the fifth no image has
    scores = np.stack([m.decision_function(scaled.numpy()) for m in models], 1)
    values = {v: mean_average_precision_11(scores, test_labels[:, :4].numpy(), v) for v in ("ref", "official")}
    assert result.score == pytest.approx(values[variant], abs=1e-3)
    assert abs(values["ref"] - values["official"]) > 5e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.index_fill(0, torch.tensor([3]), float("nan")), y), "train features hold NaN.* row 3"),
        (lambda x, y: (x, torch.zeros_like(y)), "holds 1 class"),
        (lambda x, y: (x[:0], y[:0]), "train part is empty"),
        (lambda x, y: (x[:3], y[:3]), "leave none to choose C on"),
        (lambda x, y: (x, y[:-1]), "40 train features but 39 labels"),
    ],
)
def test_what_cannot_be_fitted(change, message):
    x, y = clouds(40, 3, 1)
    with pytest.raises(InputError, match=message):
        logistic_probe(*change(x, y), x, y, grid=FEW)


def test_more_classes_than_images():
    x, _ = clouds(10, 3, 1)
    assert logistic_probe(x, torch.arange(10), x, torch.arange(10), grid=FEW).score > 0.5


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    train, test = clouds(200, 4, 1, noise=1.0), clouds(100, 4, 2, noise=1.0)
    cpu, gpu = (logistic_probe(*train, *test, device=device) for device in ("cpu", "cuda"))
    assert gpu.C == cpu.C
    assert gpu.score == cpu.score
