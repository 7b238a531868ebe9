"""What a prediction is worth: the figures of the classification tasks. Those of dense tasks are in `dense_metrics`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from proteus.errors import InputError, nearest

SEVERITIES = 5

# Errors of AlexNet in per cent, the mean of the five severities (Hendrycks and Dietterich, 2019).
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions [n] that are the label [n]; NaN where there are none."""
    right = np.asarray(predictions) == np.asarray(labels)
    return float(right.mean()) if right.size else float("nan")


def mean_per_class_accuracy(predictions: ArrayLike, labels: ArrayLike, classes: int) -> float:
    """Mean over the classes of the share of their images that are predicted right; predictions and labels [n].

    A class without an image in `labels` has no such share (0 / 0) and is left out.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    images = np.bincount(labels, minlength=classes)  # [classes]
    right = np.bincount(labels[predictions == labels], minlength=classes)
    present = images > 0
    return float(np.mean(right[present] / images[present])) if present.any() else float("nan")


def average_precision_11(scores: ArrayLike, labels: ArrayLike, variant: Literal["ref", "official"]) -> float:
    """VOC 2007's average precision: the mean over t = 0, 0.1 ... 1 of the best precision at a recall of t or more.

    scores [n], higher is more; labels [n]: 1 the image has the class, -1 it has not, 0 it has it as a difficult one.

    official: the devkit's. Difficult images are ignored; equal scores rank in the order given.
    ref:      as in the code of SynCLR and Proteus. Difficult images count as negative, equal scores share a threshold,
              and scikit-learn's curve ends at recall 0, precision 1, so the term of t = 0 is always 1.

    Recall is compared with t in whole numbers: a recall of 3 / 10 reaches 0.3. NaN where no image has the class.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], labels[order] == 1
    negative = labels[order] == -1 if variant == "official" else ~positive
    if not positive.any():
        return float("nan")
    tp, fp = np.cumsum(positive), np.cumsum(negative)
    if variant == "ref":
        last = np.append(scores[1:] != scores[:-1], True)  # of its threshold
        tp, fp = tp[last], fp[last]
    precision = tp / np.maximum(tp + fp, 1)  # [thresholds]
    best = [float(precision[10 * tp >= t * tp[-1]].max()) for t in range(11)]
    if variant == "ref":
        best[0] = 1.0
    return float(np.mean(best))


def mean_average_precision_11(scores: ArrayLike, labels: ArrayLike, variant: Literal["ref", "official"]) -> float:
    """Mean of `average_precision_11` over the classes; scores and labels [n, classes].

    A class that no image has is left out.
    """
    columns = zip(np.asarray(scores).T, np.asarray(labels).T, strict=True)
    each = np.array([average_precision_11(score, label, variant) for score, label in columns])
    known = each[~np.isnan(each)]
    return float(known.mean()) if known.size else float("nan")


def real_accuracy(predictions: ArrayLike, label_sets: Sequence[Collection[int]]) -> float:
    """Share of predictions [n] that are among the labels of their image; an image without any is left out.

    ImageNet-ReaL (Beyer et al., 2020). NaN where no image has labels.
    """
    pairs = zip(np.asarray(predictions).tolist(), label_sets, strict=True)
    right = [prediction in labels for prediction, labels in pairs if len(labels)]
    return float(np.mean(right)) if right else float("nan")


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """mCE in per cent: the mean over the 15 corruptions of the errors divided by AlexNet's (Hendrycks et al., 2019).

    errors: of every corruption of `ALEXNET_ERRORS` the share of wrong predictions at severities 1 to 5. InputError
    where a corruption or a severity is missing, or is none of them: a mean over others is another figure.
    """
    for name in ALEXNET_ERRORS:
        if name not in errors:
            raise InputError(f"mCE: no errors of corruption {name}; it is the mean over all {len(ALEXNET_ERRORS)}")
    for name, of_severity in errors.items():
        if name not in ALEXNET_ERRORS:
            raise InputError(f"mCE: {name} is none of the {len(ALEXNET_ERRORS)}{nearest(name, ALEXNET_ERRORS)}")
        if len(of_severity) != SEVERITIES:
            raise InputError(f"mCE: {name} has errors of {len(of_severity)} severities; it takes {SEVERITIES}")
    relative = [100 * np.mean(errors[name]) / alexnet for name, alexnet in ALEXNET_ERRORS.items()]
    return float(100 * np.mean(relative))
