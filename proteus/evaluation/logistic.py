"""The linear probe by logistic regression, over a sweep of regularisation strengths.

Two published protocols: `proteus` (SynCLR's for the fine-grained sets, which Proteus took over) and `dinov2`.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proteus.errors import InputError
from proteus.evaluation.lbfgs import minimise
from proteus.evaluation.metrics import accuracy, mean_average_precision_11, mean_per_class_accuracy

Protocol = Literal["proteus", "dinov2"]
Metric = Literal["accuracy", "mean_per_class", "map11", "map11_official"]

# C in the order of the visit; among equal scores the first wins.
GRIDS = {"proteus": 1 / np.logspace(-6, 5, 45), "dinov2": np.logspace(-6, 5, 45)}

TOLERANCE = 1e-7  # of the objective's value
STRIDES = (8, 2, 1)  # along the grid: few fits start from 0, the others between those of the stride before
ELEMENTS = 2**26  # of one array of logits: what is solved together is limited to this


class Fits(NamedTuple):
    """Fits of each C: weight [nC, K, D], bias [nC, K], the objective's value [nC], converged [nC] bool. All float64.

    K is the number of classes, or 1 where there are two (the logit of the second), as in scikit-learn.
    """

    weight: Tensor
    bias: Tensor
    value: Tensor
    converged: Tensor

    def logits(self, x: Tensor, number: int) -> Tensor:
        """[m, K] of features [m, D], by the fit of that number."""
        return x.to(self.weight) @ self.weight[number].T + self.bias[number]


class LogisticResult(NamedTuple):
    """What a sweep found.

    score:       on the test set, with the C that was chosen.
    val_scores:  of each C of the grid.
    predictions: of the test set: labels [m], or scores [m, classes] for the map11 metrics.
    warnings:    what to be wary of.
    """

    score: float
    C: float
    grid: np.ndarray
    val_scores: np.ndarray
    predictions: np.ndarray
    warnings: list[str]

    @property
    def val_score(self) -> float:
        """The best validation score."""
        return float(np.nanmax(self.val_scores))


class _Regression(NamedTuple):
    """Softmax regression, or logistic where K = 1, as an `Objective` of points [B, K, P]."""

    x: Tensor  # [n, P]
    target: Tensor  # [1 or B, K, n], 1 where the class is the label, else 0
    strength: Tensor  # [B]
    decay: Tensor  # [P]
    energy: Tensor  # [P] the sum of x^2

    def linear(self, point: Tensor) -> Tensor:
        return (point.flatten(0, 1) @ self.x.T).unflatten(0, point.shape[:2])

    def residual(self, z: Tensor) -> Tensor:
        return (z.softmax(1) if z.shape[1] > 1 else z.sigmoid()).sub_(self.target)

    def pull_back(self, residual: Tensor) -> Tensor:
        return (residual.flatten(0, 1) @ self.x).unflatten(0, residual.shape[:2])

    def loss(self, z: Tensor) -> Tensor:
        right = (z * self.target).sum(1)  # [B, n]
        if z.shape[1] == 1:
            return (torch.nn.functional.softplus(z[:, 0]) - right).sum(1)
        top = z.amax(1)
        return ((z - top[:, None]).exp_().sum(1).log_() + top - right).sum(1)

    def curvature(self, residual: Tensor) -> Tensor:
        """The mean of p (1 - p) times the energy: exact were the two independent."""
        absolute, square = (torch.linalg.vector_norm(residual, order, dim=2) for order in (1, 2))  # of 1 - p or p
        variance = (absolute - square.square()) / residual.shape[2] + 1e-12  # [B, K]
        return variance[:, :, None] * self.energy

    def select(self, rows: Tensor) -> "_Regression":
        target = self.target if len(self.target) == 1 else self.target[rows]
        return self._replace(target=target, strength=self.strength[rows])


def fit_logistic(x: Tensor, target: Tensor, grid: np.ndarray, max_iter: int = 1000) -> Fits:
    """Minimise C * sum of log losses + |weight|^2 / 2 for each C of the grid; the bias is not penalised.

    x [n, D]; target int64 [n]: one softmax over the classes 0 ... K - 1, each of which occurs; or bool [n, K]: K
    independent binary fits a C. Computed on x's device in float64 until the gradient's norm puts the value within 1e-7
    of the minimum (relative); `converged` says where max_iter did not suffice. Most C start from between those already
    solved: float32 would cost the smoothness of the path that this lives on.
    """
    if not len(grid) or len(set(grid)) < len(grid) or not all(np.isfinite(c) and c > 0 for c in grid):
        raise InputError("logistic regression: the grid of C holds numbers above 0, each once")
    x = x.double()
    mean = x.mean(0)
    # In the principal axes curvatures are near to a diagonal. Neither centre nor rotation changes the objective.
    rank = min(x.shape[1], max(len(x) - 1, 1))
    axes = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors[:, -rank:]  # [D, rank]
    inner = torch.cat([(x - mean) @ axes, torch.ones_like(x[:, :1])], 1)  # [n, rank + 1]
    several = target.dim() == 2
    if several:
        labels = target.T[:, None]  # [T, 1, n]: T tasks of one logit
    else:
        labels = torch.nn.functional.one_hot(target).T[None]  # [1, K, n]
        labels = labels[:, 1:] if labels.shape[1] == 2 else labels
    tasks, logits = labels.shape[:2]
    order = np.argsort(grid)
    strengths = np.asarray(grid, dtype=np.float64)[order]
    points = x.new_zeros(len(grid), tasks, logits, rank + 1)
    value, converged = x.new_zeros(len(grid), tasks), torch.zeros(len(grid), tasks, dtype=torch.bool, device=x.device)
    decay = x.new_tensor([1.0] * rank + [0.0])
    together = max(1, ELEMENTS // labels.numel())
    solved: list[int] = []
    for stride in STRIDES:
        level = sorted(
            {*range(0, len(grid), stride), len(grid) - 1} - set(solved)
        )  # both ends: nothing is extrapolated
        for first in range(0, len(level), together):
            part = level[first : first + together]
            start = _between(np.log(strengths), solved, part, points)
            objective = _Regression(
                inner,
                (labels.repeat(len(part), 1, 1) if several else labels).double(),
                torch.from_numpy(strengths[part]).to(x).repeat_interleave(tasks),
                decay,
                inner.square().sum(0),
            )
            found = minimise(objective, start.flatten(0, 1), TOLERANCE, max_iter)
            points[part] = found.point.unflatten(0, (len(part), tasks))
            value[part] = found.value.unflatten(0, (len(part), tasks))
            converged[part] = found.converged.unflatten(0, (len(part), tasks))
        solved = sorted(solved + level)
    back = torch.from_numpy(np.argsort(order))
    points = points[back].flatten(1, 2)  # [nC, K, rank + 1]
    weight = points[..., :-1] @ axes.T
    bias = points[..., -1] - weight @ mean
    return Fits(weight, bias, value[back].sum(1), converged[back].all(1))


def _between(position: np.ndarray, solved: list[int], part: list[int], points: Tensor) -> Tensor:
    """Points to start from: on the cubic through the four solved neighbours along the path, or 0."""
    start = torch.zeros_like(points[part])
    for row, i in enumerate(part if solved else []):
        near = sorted(solved, key=lambda j: abs(j - i))[:4]
        for j in near:
            others = [k for k in near if k != j]
            share = np.prod([(position[i] - position[k]) / (position[j] - position[k]) for k in others])
            start[row] += float(share) * points[j]
    return start


def logistic_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    val: tuple[Tensor, Tensor] | None = None,
    protocol: Protocol = "proteus",
    metric: Metric = "accuracy",
    grid: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> LogisticResult:
    """Choose C on validation features, refit on train and validation together, score on test. A share in [0, 1].

    Features [n, D]; labels int [n], or for the map11 metrics [n, classes] with 1 present, 0 difficult, -1 absent, where
    difficult trains as absent and one C serves all classes. val: the official split; without one it is cut off train.

    proteus: features z-scored by population statistics, of train for the choice, of train and val for the refit (a
             dimension that never varies is 0); val is the first fifth of numpy's shuffle with seed 0; C from 1e6 to
             1e-5, ties go to the largest.
    dinov2:  features as they are; val is the first tenth of torch's permutation with seed 0; C from 1e-6 to 1e5, ties
             go to the smallest.

    A class that does not occur in what is fitted is never predicted. InputError for features that are not finite and
    for fewer than two classes.
    """
    parts = {"train": (train, train_labels), "test": (test, test_labels)} | ({"val": val} if val else {})
    for name, (x, labels) in parts.items():
        if len(x) != len(labels):
            raise InputError(f"logistic regression: {len(x)} {name} features but {len(labels)} labels")
        if len(x) == 0:
            raise InputError(f"logistic regression: the {name} part is empty")
        if not bool(x.isfinite().all()):
            bad = int((~x.isfinite().all(1)).nonzero()[0])
            raise InputError(f"logistic regression: the {name} features hold NaN or infinity, first in row {bad}")
        if x.shape[1:] != train.shape[1:]:
            raise InputError(f"logistic regression: {name} features have {x.shape[1]} values, train {train.shape[1]}")
    grid = GRIDS[protocol] if grid is None else grid
    train, test = train.to(device).double(), test.to(device).double()
    if val is None:
        held, kept = split(len(train), protocol)
        fit, fit_labels, held_x, held_labels = train[kept], train_labels[kept], train[held], train_labels[held]
    else:
        fit, fit_labels, held_x, held_labels = train, train_labels, val[0].to(device).double(), val[1]
        train, train_labels = torch.cat([train, held_x]), torch.cat([train_labels, val[1]])
    if len(held_x) == 0:
        raise InputError(f"logistic regression: {len(fit)} training images leave none to choose C on; give more")
    sweep = _Sweep.fit(fit, fit_labels, held_x, protocol, grid)
    scores = np.array([_score(sweep.predict(i), held_labels, metric) for i in range(len(grid))])
    if not np.isfinite(scores).any():
        raise InputError("logistic regression: no class to be scored occurs in the validation part, so no C is better")
    best = int(np.nanargmax(scores))
    warnings = sweep.warnings(grid)
    if len(grid) > 1 and grid[best] in (grid.min(), grid.max()):
        warnings.append(f"the best C, {grid[best]:.3g}, lies at an end of the grid")
    final = _Sweep.fit(train, train_labels, test, protocol, grid[best : best + 1])
    if not bool(final.fits.converged.all()):
        warnings.append(f"the fit that is scored, C = {grid[best]:.3g}, did not converge")
    predictions = final.predict(0)
    score = _score(predictions, test_labels, metric)
    return LogisticResult(score, float(grid[best]), grid, scores, predictions, warnings)


class _Sweep(NamedTuple):
    """Fits of a grid and the features they are to judge. classes: the label of each column, or None: many labels."""

    fits: Fits
    x: Tensor  # [m, D]
    classes: Tensor | None
    known: Tensor  # [classes] bool, of many labels: those that could be fitted

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, other: Tensor, protocol: Protocol, grid: np.ndarray) -> "_Sweep":
        if protocol == "proteus":
            x, other = standardise(x, other)
        labels = labels.to(x.device)
        if labels.dim() == 2:
            present = labels == 1
            known = present.any(0) & ~present.all(0)
            if not bool(known.any()):
                raise InputError(
                    "logistic regression: no class is present in some training images and absent in others"
                )
            return cls(fit_logistic(x, present[:, known], grid), other, None, known)
        classes, target = labels.unique(return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"logistic regression: the training part holds {len(classes)} class; it takes two or more")
        return cls(fit_logistic(x, target, grid), other, classes, torch.ones_like(classes, dtype=torch.bool))

    def predict(self, number: int) -> np.ndarray:
        """Labels [m], or scores [m, classes], 0 for a class that could not be fitted."""
        logits = self.fits.logits(self.x, number)
        if self.classes is not None:
            chosen = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
            return self.classes[chosen].cpu().numpy()
        scores = logits.new_zeros(len(logits), len(self.known))
        scores[:, self.known] = logits
        return scores.cpu().numpy()

    def warnings(self, grid: np.ndarray) -> list[str]:
        open_ = grid[~self.fits.converged.cpu().numpy()]
        if not len(open_):
            return []
        return [f"{len(open_)} of {len(grid)} fits did not converge, C from {open_.min():.3g} to {open_.max():.3g}"]


def _score(predicted: np.ndarray, labels: Tensor, metric: Metric) -> float:
    truth = labels.cpu().numpy()
    match metric:
        case "accuracy":
            return accuracy(predicted, truth)
        case "mean_per_class":
            return mean_per_class_accuracy(predicted, truth, int(max(predicted.max(), truth.max())) + 1)
        case "map11":
            return mean_average_precision_11(predicted, truth, "ref")
        case "map11_official":
            return mean_average_precision_11(predicted, truth, "official")


def split(n: int, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Which images are held out to choose C, and the others."""
    if protocol == "proteus":
        order = torch.from_numpy(np.random.RandomState(0).permutation(n))
        return order[: int(0.2 * n)], order[int(0.2 * n) :]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[: n // 10], order[n // 10 :]


def standardise(fit: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both [n, D] and [m, D] z-scored by the first's mean and population deviation; what never varies there is 0."""
    mean, std = fit.mean(0), fit.std(0, correction=0)
    varies = fit.amax(0) > fit.amin(0)  # the std of a constant is not always 0
    scale = torch.where(varies, 1 / torch.where(varies, std, 1), 0)
    return (fit - mean) * scale, (other - mean) * scale
