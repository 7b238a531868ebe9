"""Classifiers of other publishers, on a teacher; and projections."""

import pytest
import torch
from safetensors.torch import save_file

from proteus.errors import InputError
from proteus.models import Features
from proteus.models.heads import ProjectionHead, read_head

DIM, CLASSES = 6, 4


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return Features(torch.randn(3, DIM, generator=generator), torch.randn(3, 10, DIM, generator=generator), (2, 5))


def head_of(path):
    head, classes = read_head(path, DIM)
    assert classes == []
    assert not head.training
    return head


def write(path, **tensors):
    (torch.save if path.suffix == ".pth" else save_file)(tensors, path)
    return str(path)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("prefix", ["", "head."])
@pytest.mark.parametrize("width", [DIM, 2 * DIM])
def test_logits_by_hand(tmp_path, features, kind, prefix, width):
    weight, bias = torch.randn(CLASSES, width), torch.randn(CLASSES)
    path = write(tmp_path / f"head.{kind}", **{prefix + "weight": weight, prefix + "bias": bias})
    head = head_of(path)
    assert head.num_classes == CLASSES
    logits = head(features)
    for row in range(3):
        tokens = features.cls[row].tolist()
        if width == 2 * DIM:
            tokens += [sum(patch[d].item() for patch in features.patch[row]) / 10 for d in range(DIM)]
        for k in range(CLASSES):
            expected = sum(w * t for w, t in zip(weight[k].tolist(), tokens, strict=True)) + bias[k].item()
            assert logits[row, k].item() == pytest.approx(expected, abs=1e-5)


def test_no_bias_is_a_bias_of_zero(tmp_path, features):
    weight = torch.randn(CLASSES, DIM)
    with_zero = head_of(write(tmp_path / "zero.pth", weight=weight, bias=torch.zeros(CLASSES)))
    without = head_of(write(tmp_path / "without.pth", weight=weight))
    torch.testing.assert_close(without(features), with_zero(features), atol=0, rtol=0)


def test_half_precision_features_and_weights_give_float32_logits(tmp_path, features):
    weight = torch.randn(CLASSES, 2 * DIM)
    head = head_of(write(tmp_path / "head.pth", weight=weight.half()))
    logits = head(Features(features.cls.bfloat16(), features.patch.bfloat16(), features.grid))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head_of(write(tmp_path / "h.pth", weight=weight))(features), atol=0.1, rtol=0)


def test_reading_draws_no_random_numbers(tmp_path):
    path = write(tmp_path / "head.pth", weight=torch.randn(CLASSES, DIM))
    state = torch.get_rng_state()
    assert next(head_of(path).parameters()).requires_grad  # and it may be trained on
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"weight": torch.zeros(CLASSES, DIM + 1)}, "[4, 7]"),
        ({"weight": torch.zeros(CLASSES, 3 * DIM)}, "[4, 18]"),
        ({"weight": torch.zeros(DIM)}, "[6]"),
        ({"kernel": torch.zeros(CLASSES, DIM)}, "kernel"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_what_is_wanted(tmp_path, tensors, found):
    path = write(tmp_path / "head.safetensors", **tensors)
    with pytest.raises(InputError) as caught:
        head_of(path)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in (path, f"[classes, {DIM}]", f"[classes, {2 * DIM}]", found))


def test_a_bias_of_another_length_is_refused(tmp_path):
    path = write(tmp_path / "head.pth", weight=torch.zeros(CLASSES, DIM), bias=torch.zeros(CLASSES + 1))
    with pytest.raises(InputError, match="bias"):
        head_of(path)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pth"):
        head_of(str(tmp_path / "nowhere.pth"))


def test_a_projection_is_a_norm_then_a_linear_layer(features):
    head = ProjectionHead(DIM, 9)
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2)
        head.norm.bias.normal_()
    x = features.cls
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = (normed * head.norm.weight + head.norm.bias) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=0)
    assert head(features.patch).shape == (3, 10, 9)
