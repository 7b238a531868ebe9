"""The sliding window against a computation pixel by pixel."""

from dataclasses import replace

import pytest
import torch

from proteus.evaluation.dense.depth import predict_depth
from proteus.evaluation.dense.inference import slide, starts
from proteus.evaluation.dense.presets import DEPTH, SEGMENTATION
from proteus.evaluation.dense.segmentation import predict_classes


def picture(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def depends_on_the_window(images):
    """Two maps: the red of the pixel, and the mean green of its window times the distance from the window's left."""
    columns = torch.arange(images.shape[-1]).float().expand(images.shape[-2:])
    return torch.stack([images[:, 0], images[:, 1].mean((1, 2))[:, None, None] * columns], dim=1)


def naive(image, window, stride):
    """Each pixel's mean over all windows of the grid that cover it."""
    _, height, width = image.shape
    h, w = min(window[0], height), min(window[1], width)
    corners = []
    for row in range(max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1):
        for column in range(max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(row * stride[0] + h, height), min(column * stride[1] + w, width)
            corners.append((bottom - h, right - w))
    result = torch.zeros(2, height, width)
    for y in range(height):
        for x in range(width):
            values = []
            for top, left in corners:
                if top <= y < top + h and left <= x < left + w:
                    part = image[:, top : top + h, left : left + w]
                    values.append(torch.stack([image[0, y, x], part[1].mean() * (x - left)]))
            result[:, y, x] = torch.stack(values).mean(0)
    return result


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((13, 17), (6, 6), (4, 4)),
        ((12, 12), (6, 6), (6, 6)),  # side by side
        ((7, 20), (6, 8), (1, 5)),
        ((5, 9), (6, 6), (4, 4)),  # lower than the window
        ((4, 3), (6, 6), (4, 4)),  # smaller
        ((6, 6), (6, 6), (4, 4)),
        ((31, 23), (5, 7), (2, 3)),  # more windows than fit into one batch
    ],
)
def test_overlapping_windows_are_averaged(size, window, stride):
    image = picture(*size)
    torch.testing.assert_close(slide(depends_on_the_window, image, window, stride), naive(image, window, stride))


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (683, 512, 341, [0, 171]),
        (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]),
        (512, 512, 341, [0]),
        (691, 518, 129, [0, 129, 173]),  # the three windows of Proteus's depth
        (853, 512, 341, [0, 341]),  # fits exactly
        (854, 512, 341, [0, 341, 342]),
    ],
)
def test_where_windows_begin(length, window, stride, expected):
    assert starts(length, window, stride) == expected


@pytest.mark.parametrize("window", [None, (20, 30), (40, 40)])
def test_one_window_is_the_whole_image(window):
    image = picture(20, 30)
    expected = depends_on_the_window(image[None])[0]
    assert torch.equal(slide(depends_on_the_window, image, window, (3, 3)), expected)


def test_a_window_is_predicted_at_its_own_size():
    """Maps at half the size are brought back, bilinear: of a constant image they are constant again."""

    def coarse(images):
        return torch.nn.functional.avg_pool2d(images, 2)

    image = torch.full((3, 14, 14), 0.3)
    torch.testing.assert_close(slide(coarse, image, (8, 8), (6, 6)), image)


# -------------------------------------------------------------------------------------------- segmentation and depth

SMALL = replace(SEGMENTATION["dinov2-lin"], test_short=16, test_long=64, window=(16, 16), stride=(8, 8))


def brightest(images):
    return images * 10  # the class of a pixel is its strongest channel


def test_classes_are_those_of_the_pixels_at_the_size_of_the_image():
    image = torch.zeros(3, 32, 48)
    image[0, :, :16], image[1, :, 16:32], image[2, :, 32:] = 1, 1, 1
    expected = torch.arange(3).repeat_interleave(16).expand(32, 48)
    assert torch.equal(predict_classes(brightest, image, SMALL), expected)
    several = replace(SMALL, ratios=(1.0, 2.0), flip=True)
    assert torch.equal(predict_classes(brightest, image, several), expected)


def test_several_views_average_probabilities_and_one_does_not_need_them():
    calls = []

    def predict(images):
        calls.append(tuple(images.shape[-2:]))
        # The mean logits say 0, (10, 6, 0) / 3, and the mean probabilities 1, (1.09, 1.82, 0.09) / 3.
        logits = {16: [10.0, 0.0, 0.0], 24: [0.0, 3.0, 0.0], 32: [0.0, 3.0, 0.0]}[images.shape[-2]]
        return torch.tensor(logits)[None, :, None, None].expand(len(images), 3, *images.shape[-2:])

    preset = replace(SMALL, window=None, ratios=(1.0, 1.5, 2.0))
    classes = predict_classes(predict, picture(16, 16), preset)
    assert calls == [(16, 16), (24, 24), (32, 32)]
    assert classes.unique().tolist() == [1]


def test_a_mirrored_view_is_mirrored_back():
    def leftness(images):  # metres that grow to the right, whatever is in the image, and its red
        columns = torch.arange(images.shape[-1]).float().expand(len(images), 1, *images.shape[-2:])
        return columns + 100 * images[:, :1]

    preset = replace(DEPTH["dinov2-lin1"], max_depth=1e9)
    image = picture(6, 9)
    expected = 100 * image[0] + 4.0  # the mean of x and 8 - x
    torch.testing.assert_close(predict_depth(leftness, image, preset), expected)


def test_depths_are_clamped_before_they_are_averaged_where_the_protocol_says_so():
    def signed(images):
        return 30 * images[:, :1] - 10

    image = torch.tensor([0.0, 1.0, 0.5]).view(1, 1, 3).expand(3, 2, 3)
    clamped = predict_depth(signed, image, replace(DEPTH["dinov2-lin1"], flip=False))
    torch.testing.assert_close(clamped, torch.tensor([1e-3, 10.0, 5.0]).expand(2, 3))
    raw = predict_depth(signed, image, replace(DEPTH["proteus-dpt"], flip=False, test_short=None, window=None))
    torch.testing.assert_close(raw, torch.tensor([-10.0, 20.0, 5.0]).expand(2, 3))
