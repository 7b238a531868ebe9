"""Every figure against a second, slow computation of it, on random inputs and where there is little to compute."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, precision_recall_curve
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from proteus.errors import InputError
from proteus.evaluation.dense_metrics import EIGEN_CROP, Crop, DepthMetric, SegmentationMetric
from proteus.evaluation.metrics import (
    ALEXNET_ERRORS,
    accuracy,
    average_precision_11,
    mean_average_precision_11,
    mean_corruption_error,
    mean_per_class_accuracy,
    real_accuracy,
)

NAN = float("nan")


# Classification


def test_accuracy():
    assert accuracy([1, 2, 3, 3], [1, 2, 0, 3]) == 0.75
    assert math.isnan(accuracy([], []))


def test_every_class_weighs_the_same():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [50, 10, 3])
    predictions = np.where(rng.random(63) < 0.6, labels, rng.integers(0, 3, 63))
    got = mean_per_class_accuracy(predictions, labels, 3)
    assert got == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert got != pytest.approx(accuracy(predictions, labels))


def test_a_class_without_images_is_left_out_and_may_be_predicted():
    # Class 0: 1 of 2. Class 2: 1 of 1. Classes 1, 3: no images, though one is predicted.
    assert mean_per_class_accuracy([0, 1, 2], [0, 0, 2], 4) == 0.75
    assert mean_per_class_accuracy([1, 1], [1, 1], 3) == 1
    assert math.isnan(mean_per_class_accuracy(np.zeros(0, int), np.zeros(0, int), 3))


def devkit(scores, labels):
    """VOC's rule as a loop: walk down the ranking, ignore what is difficult."""
    ranking = sorted(range(len(scores)), key=lambda i: -scores[i])
    total, tp, fp, points = sum(label == 1 for label in labels), 0, 0, []
    for i in ranking:
        tp, fp = tp + (labels[i] == 1), fp + (labels[i] == -1)
        if tp + fp:
            points.append((tp, tp / (tp + fp)))
    return sum(max(p for hits, p in points if 10 * hits >= t * total) for t in range(11)) / 11


def from_sklearn(scores, labels):
    precision, recall, _ = precision_recall_curve(labels == 1, scores)
    return np.mean([precision[recall >= t / 10 - 1e-9].max() for t in range(11)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_against_a_loop_and_sklearn(seed, ties):
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 0, 1], size=80, p=[0.6, 0.15, 0.25])
    scores = rng.normal(size=80) + 0.8 * (labels == 1)
    if ties:
        scores = scores.round()
        assert len(np.unique(scores)) < 10
    official = average_precision_11(scores, labels, "official")
    ref = average_precision_11(scores, labels, "ref")
    assert official == pytest.approx(devkit(scores, labels))
    assert ref == pytest.approx(from_sklearn(scores, labels))
    assert official != pytest.approx(ref)


def test_difficult_images_are_ignored_or_negative():
    scores, labels = [3.0, 2.0, 1.0], [0, 1, -1]
    assert average_precision_11(scores, labels, "official") == 1
    assert average_precision_11(scores, labels, "ref") == pytest.approx((1 + 10 * 0.5) / 11)


def test_the_reference_gives_the_first_term_away():
    scores, labels = [2.0, 1.0], [-1, 1]
    assert average_precision_11(scores, labels, "official") == 0.5
    assert average_precision_11(scores, labels, "ref") == pytest.approx((1 + 10 * 0.5) / 11)


def test_a_recall_of_three_tenths_reaches_it():
    # 3 of 10 found with precision 1, the rest at the very end of 1000: in floats 3 / 10 < 3 * 0.1.
    labels = np.array([1] * 3 + [-1] * 990 + [1] * 7)
    low = 10 / 1000
    expected = (4 + 7 * low) / 11  # t = 0, 0.1, 0.2, 0.3
    assert average_precision_11(-np.arange(1000.0), labels, "official") == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["ref", "official"])
def test_a_class_that_no_image_has_is_left_out_of_the_mean(variant):
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]])
    labels = np.array([[1, -1, 0], [-1, -1, 0]])
    assert math.isnan(average_precision_11(scores[:, 2], labels[:, 2], variant))  # everything difficult
    assert mean_average_precision_11(scores, labels, variant) == 1
    assert math.isnan(mean_average_precision_11(scores[:, 1:], labels[:, 1:], variant))


def test_mean_average_precision_is_the_mean():
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(40, 4)), rng.choice([-1, 0, 1], size=(40, 4))
    each = [devkit(scores[:, c], labels[:, c]) for c in range(4)]
    assert mean_average_precision_11(scores, labels, "official") == pytest.approx(np.mean(each))


def test_real_labels():
    sets = [[3], [1, 2], [], {7, 8}, np.array([5]), np.array([], dtype=int)]
    assert real_accuracy([3, 2, 0, 9, 5, 5], sets) == 0.75
    assert math.isnan(real_accuracy([1], [[]]))


def test_alexnet_has_an_mce_of_100():
    alexnet = {name: [error / 100] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(alexnet) == pytest.approx(100)
    # Twice the error on one corruption of 15, whatever the severity it falls on.
    alexnet["fog"] = [5 * 2 * ALEXNET_ERRORS["fog"] / 100, 0, 0, 0, 0]
    assert mean_corruption_error(alexnet) == pytest.approx(100 + 100 / 15)


def test_alexnet_has_the_errors_that_are_published():
    rounded = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.6]
    assert list(ALEXNET_ERRORS.values()) == pytest.approx(rounded, abs=0.0501)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fog": None}, "no errors of corruption fog"),
        ({"speckle_noise": [0.1] * 5}, "speckle_noise is none of the 15"),
        ({"snow": [0.1] * 4}, "snow has errors of 4 severities"),
    ],
    ids=["missing", "extra", "severity"],
)
def test_mce_of_other_corruptions_is_no_mce(change, message):
    errors = {name: [0.5] * 5 for name in ALEXNET_ERRORS} | change
    with pytest.raises(InputError, match=message):
        mean_corruption_error({name: error for name, error in errors.items() if error is not None})


# Segmentation


def masks(seed, classes, ignored=0.1):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, (3, 12, 11))
    predictions = np.where(rng.random(targets.shape) < 0.5, targets, rng.integers(0, classes, targets.shape))
    targets[rng.random(targets.shape) < ignored] = 255
    return torch.from_numpy(predictions), torch.from_numpy(targets.astype(np.uint8))


def pixel_by_pixel(predictions, targets, classes):
    pairs = [(p, t) for p, t in zip(predictions.flatten().tolist(), targets.flatten().tolist(), strict=True) if t < 255]
    iou, recall = [], []
    for c in range(classes):
        hit, union = sum(p == t == c for p, t in pairs), sum(c in (p, t) for p, t in pairs)
        mine = sum(t == c for _, t in pairs)
        iou.append(hit / union if union else NAN)
        recall.append(hit / mine if mine else NAN)
    return np.nanmean(iou), np.mean([p == t for p, t in pairs]), np.nanmean(recall), iou


def scores(classes, *updates):
    metric = SegmentationMetric(classes)
    for predictions, targets in updates:
        metric.update(predictions, targets)
    return metric.compute()


@pytest.mark.parametrize("seed", [0, 1])
def test_segmentation_pixel_by_pixel(seed):
    predictions, targets = masks(seed, 5)
    got = scores(5, *zip(predictions, targets, strict=True))  # image by image
    miou, pixel, mean_class, iou = pixel_by_pixel(predictions, targets, 5)
    assert (got.miou, got.pixel_accuracy, got.class_accuracy) == pytest.approx((miou, pixel, mean_class))
    assert got.iou == pytest.approx(iou)


def test_segmentation_as_torchmetrics_has_it():
    predictions, targets = masks(2, 4)
    got = scores(4, (predictions, targets))
    assert got.miou == pytest.approx(MulticlassJaccardIndex(4, ignore_index=255)(predictions, targets).item())
    for average, own in (("micro", got.pixel_accuracy), ("macro", got.class_accuracy)):
        theirs = MulticlassAccuracy(4, average=average, ignore_index=255)(predictions, targets)
        assert own == pytest.approx(theirs.item())


def test_a_class_in_neither_is_left_out_and_one_only_predicted_counts_as_0():
    predictions, targets = torch.tensor([[0, 0, 1, 3]]), torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    got = scores(4, (predictions, targets))
    assert got.iou == pytest.approx([1, 0.5, NAN, 0], nan_ok=True)
    assert got.miou == pytest.approx(0.5)
    assert got.class_accuracy == pytest.approx(0.75)
    assert got.pixel_accuracy == 0.75


def test_all_pixels_ignored_and_one_class():
    got = scores(3, (torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255)))
    assert all(map(math.isnan, (*got[:3], *got.iou)))
    got = scores(1, (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)))
    assert got == (1, 1, 1, [1])


def test_intersections_are_summed_before_they_are_divided():
    # The mean of the two images' IoU of class 0 would be (1 + 1 / 4) / 2.
    one = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    two = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 1, 1, 1]])
    assert scores(2, one, two).iou == pytest.approx([2 / 5, 0])


def test_a_class_number_that_does_not_exist():
    with pytest.raises(InputError, match="holds class 7; there are 0 to 4"):
        scores(5, (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[4, 7]], dtype=torch.uint8)))


# Depth


def rooms(seed, shape=(3, 9, 11)):
    rng = np.random.default_rng(seed)
    targets = rng.uniform(0.5, 12, shape)  # some too far
    targets[rng.random(shape) < 0.2] = 0
    return torch.from_numpy(targets * rng.uniform(0.6, 1.6, shape)).float(), torch.from_numpy(targets).float()


def pixel_by_pixel_depth(predictions, targets, low, high, clamp):
    rows = []
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        pairs = [
            (min(max(p, low), high) if clamp else p, d)
            for line, truth in zip(prediction, target, strict=True)
            for p, d in zip(line, truth, strict=True)
            if low < d < high
        ]
        if not pairs:
            continue

        def mean(function, pairs=pairs):
            return sum(function(p, d) for p, d in pairs) / len(pairs)

        g, g2 = mean(lambda p, d: math.log(p / d)), mean(lambda p, d: math.log(p / d) ** 2)
        rows.append(
            [
                math.sqrt(mean(lambda p, d: (p - d) ** 2)),
                mean(lambda p, d: abs(p - d) / d),
                mean(lambda p, d: (p - d) ** 2 / d),
                math.sqrt(g2),
                mean(lambda p, d: abs(math.log10(p) - math.log10(d))),
                math.sqrt(g2 - g * g / 2),
                *(mean(lambda p, d, i=i: max(p / d, d / p) < 1.25**i) for i in (1, 2, 3)),
            ]
        )
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_depth_pixel_by_pixel(seed, clamp):
    predictions, targets = rooms(seed)
    metric = DepthMetric(crop=None, clamp=clamp)
    for one, other in zip(predictions.split(2), targets.split(2), strict=True):
        metric.update(one, other)
    got = metric.compute()
    assert got[:9] == pytest.approx(pixel_by_pixel_depth(predictions, targets, 1e-3, 10, clamp), rel=1e-5)
    assert got[9:] == (3, 0)
    assert 0 < got.delta1 < got.delta2 <= got.delta3


def test_clamping_makes_a_difference():
    predictions, targets = rooms(0)
    assert (predictions > 10).any()
    values = []
    for clamp in (True, False):
        metric = DepthMetric(crop=None, clamp=clamp)
        metric.update(predictions, targets)
        values.append(metric.compute().rmse)
    assert values[0] < values[1]


def test_means_are_over_images_not_over_pixels():
    targets = torch.zeros(2, 1, 100)
    targets[0, 0, 0], targets[1] = 1.0, 1.0  # one valid pixel, and a hundred
    predictions = targets.clone()
    predictions[0] = 4.0
    metric = DepthMetric(crop=None)
    metric.update(predictions, targets)
    assert metric.compute().rmse == pytest.approx(1.5)  # pooled: 0.3


def test_the_range_is_a_parameter_and_its_ends_are_not_in_it():
    targets = torch.tensor([[[1.0, 2.0, 3.0, 80.0]]])
    metric = DepthMetric(min_depth=1.0, max_depth=80.0, crop=None)
    metric.update(targets + torch.tensor([50.0, 1.0, 2.0, 50.0]), targets)
    assert metric.compute().abs_rel == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_only_the_crop_counts():
    metric = DepthMetric()
    targets = torch.full((1, 480, 640), 2.0)
    predictions = torch.full((1, 480, 640), 9.0)
    predictions[:, 45:471, 41:601] = 2.0
    metric.update(predictions, targets)
    assert metric.compute().rmse == 0
    for row, column in ((45, 41), (470, 600)):  # its first pixel and its last
        metric.reset()
        wrong = predictions.clone()
        wrong[0, row, column] = 3.0
        metric.update(wrong, targets)
        assert metric.compute().rmse == pytest.approx(math.sqrt(1 / (426 * 560)))
    assert EIGEN_CROP[:4] == (45, 471, 41, 601)


def test_a_crop_of_other_images_is_refused():
    with pytest.raises(InputError, match=r"the crop is of 480 x 640 pixels, not \[9, 11\]"):
        DepthMetric().update(*rooms(0))
    metric = DepthMetric(crop=Crop(1, 3, 2, 4, 9, 11))
    metric.update(*rooms(0))
    assert metric.compute().images == 3


def test_an_image_without_a_reading_is_left_out_and_counted():
    predictions, targets = rooms(0)
    targets[1] = 0
    metric = DepthMetric(crop=None)
    metric.update(predictions, targets)
    got = metric.compute()
    assert got[:9] == pytest.approx(pixel_by_pixel_depth(predictions, targets, 1e-3, 10, True), rel=1e-5)
    assert got[9:] == (2, 1)
    metric.reset()
    metric.update(predictions, torch.zeros_like(targets))
    got = metric.compute()
    assert all(map(math.isnan, got[:9]))
    assert got[9:] == (0, 3)


def test_a_negative_prediction_is_seen():
    # -d has a ratio of -1 both ways, which is below 1.25.
    targets = torch.full((1, 1, 2), 2.0)
    metric = DepthMetric(crop=None, clamp=False)
    metric.update(torch.tensor([[[2.0, -2.0]]]), targets)
    got = metric.compute()
    assert got.delta1 == got.delta3 == 0.5
    assert got.rmse == pytest.approx(math.sqrt(8))
    assert math.isnan(got.rmse_log)
    assert math.isnan(got.log10)


def test_states_of_two_processes_add_up():
    # What torchmetrics does when it gathers: states marked "sum" are added.
    predictions, targets = rooms(1)
    whole, parts = DepthMetric(crop=None), [DepthMetric(crop=None) for _ in range(2)]
    whole.update(predictions, targets)
    for rank, part in enumerate(parts):
        part.update(predictions[rank::2], targets[rank::2])
    assert parts[0]._reductions.keys() == {"sums", "counts"}
    for state, reduce in parts[0]._reductions.items():
        together = reduce(torch.stack([getattr(part, state) for part in parts]))
        torch.testing.assert_close(together, getattr(whole, state))
