"""Heads of tasks: what they compute, and their files."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from proteus.errors import InputError
from proteus.models import Features
from proteus.models.heads import Classifier, DualClassifier, PixelClassifier, build_head, read_head, save_head

DIM, CLASSES = 6, 4
NAMES = ["aéroport", "beach", "chaparral", "dense forest"]


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return Features(torch.randn(3, DIM, generator=generator), torch.randn(3, 10, DIM, generator=generator), (2, 5))


def drawn(kind, mix=None, seed=0):
    """A head whose every weight is random, those of norms too."""
    torch.manual_seed(seed)
    head = build_head(DIM, CLASSES, kind, mix)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head


ALL = [("class", None), ("pixel", None), ("class", 0.3), ("pixel", 0.0)]


@pytest.fixture(params=ALL, ids=str)
def saved(request, tmp_path):
    """(head, its file, kind, mix)."""
    head = drawn(*request.param)
    path = tmp_path / "head.safetensors"
    save_head(head, NAMES, path)
    return head, path, *request.param


def test_a_classifier_is_a_linear_layer_on_the_class_token(features):
    head = drawn("class")
    assert isinstance(head, Classifier)
    assert isinstance(head, nn.Linear)
    assert head.state_dict().keys() == {"weight", "bias"}
    expected = features.cls @ head.weight.T + head.bias
    torch.testing.assert_close(head(features), expected, atol=1e-6, rtol=0)


def test_a_classifier_draws_what_a_linear_layer_draws():
    torch.manual_seed(3)
    ours = build_head(DIM, CLASSES, "class")
    torch.manual_seed(3)
    theirs = nn.Linear(DIM, CLASSES)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_a_pixel_classifier_by_hand(features):
    head = drawn("pixel")
    assert isinstance(head, PixelClassifier)
    maps = head(features)
    assert maps.shape == (3, CLASSES, 2, 5)
    for b, i, j in ((0, 0, 0), (1, 0, 4), (2, 1, 3)):
        x = features.patch[b, 5 * i + j]
        normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * head.norm.weight + head.norm.bias
        torch.testing.assert_close(maps[b, :, i, j], head.linear.weight @ normed + head.linear.bias, atol=1e-5, rtol=0)


def test_a_pixel_classifier_sees_each_image_by_itself(features):
    head = drawn("pixel").train()
    first = Features(features.cls[:1], features.patch[:1], features.grid)
    torch.testing.assert_close(head(features)[:1], head(first), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["class", "pixel"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_a_dual_classifier_mixes_probabilities(features, kind, mix):
    head = drawn(kind, mix)
    assert isinstance(head, DualClassifier)
    a, b = head.labelled(features).softmax(1), head.distilled(features).softmax(1)
    assert (a - b).abs().max() > 0.1
    mixed = head(features)
    torch.testing.assert_close(mixed.exp(), mix * a + (1 - mix) * b, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones_like(mixed[:, 0]), atol=1e-6, rtol=0)


def test_a_mix_of_one_head_is_that_head_exactly(features):
    only_labelled, only_distilled = drawn("class", 1.0), drawn("class", 0.0)
    assert torch.equal(only_labelled(features), F.log_softmax(only_labelled.labelled(features), 1))
    assert torch.equal(only_distilled(features), F.log_softmax(only_distilled.distilled(features), 1))


def test_a_mix_of_far_apart_heads_is_finite():
    head = build_head(1, 2, "class", 0.5)
    for one, sign in ((head.labelled, 1), (head.distilled, -1)):
        nn.init.zeros_(one.weight)
        one.bias.data = sign * torch.tensor([500.0, -500.0])
    logits = head(Features(torch.zeros(1, 1), torch.zeros(1, 1, 1), (1, 1)))
    torch.testing.assert_close(logits, torch.full((1, 2), 0.5).log())
    logits.sum().backward()
    assert head.labelled.bias.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["class", "pixel"])
def test_half_precision_features_give_logits_in_the_head_s_precision(features, kind):
    head = drawn(kind)
    half = Features(features.cls.bfloat16(), features.patch.bfloat16(), features.grid)
    assert head(half).dtype == torch.float32
    torch.testing.assert_close(head(half), head(features), atol=0.1, rtol=0)


def test_a_saved_head_is_read_as_it_was(saved, features):
    head, path, kind, mix = saved
    state = torch.get_rng_state()
    read, names = read_head(path, DIM)
    assert torch.equal(torch.get_rng_state(), state)
    assert names == NAMES
    assert type(read) is type(head)
    assert read.num_classes == CLASSES
    assert not any(module.training for module in read.modules())
    assert getattr(read, "mix", None) == mix
    assert torch.equal(read(features), head(features))
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["proteus_head"]) == {"kind": kind, "classes": NAMES, "mix": mix}
    assert all(parameter.requires_grad for parameter in read.parameters())


def test_classes_may_have_no_names(tmp_path):
    save_head(drawn("class"), [], tmp_path / "head.safetensors")
    head, names = read_head(tmp_path / "head.safetensors", DIM)
    assert names == []
    assert head.num_classes == CLASSES


def test_a_file_is_a_function_of_its_contents(saved, tmp_path):
    head, path, kind, mix = saved
    save_head(head, NAMES, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    save_head(drawn(kind, mix, seed=1), NAMES, tmp_path / "other.safetensors")
    assert (tmp_path / "other.safetensors").read_bytes() != path.read_bytes()


def test_a_saved_classifier_is_anybody_s_linear_layer(tmp_path):
    head = drawn("class")
    save_head(head, NAMES, tmp_path / "head.safetensors")
    plain = nn.Linear(DIM, CLASSES)
    plain.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(plain.weight, head.weight)


def test_what_cannot_be_read_again_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="3 names for 4 classes"):
        save_head(drawn("class"), NAMES[:3], tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="not a head of build_head"):
        save_head(Classifier(DIM, CLASSES, with_patches=True), NAMES, tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()


def refusal(path, **arguments):
    """The line that says why a file is refused; it names the option and the file."""
    with pytest.raises(InputError) as caught:
        read_head(path, **{"dim": DIM, "key": "adapt.head"} | arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"adapt.head {str(path)!r}")
    return line


def test_a_head_of_another_width_is_refused(saved):
    _, path, _, _ = saved
    line = refusal(path, dim=DIM + 1)
    assert f"does not fit a network of width {DIM + 1}" in line
    assert str(DIM) in line


@pytest.mark.parametrize(("kind", "mix"), ALL)
def test_missing_and_unexpected_tensors_are_named(tmp_path, kind, mix):
    head, path = drawn(kind, mix), tmp_path / "head.safetensors"
    metadata = {"proteus_head": json.dumps({"kind": kind, "classes": NAMES, "mix": mix})}
    for key in head.state_dict():
        save_file({name: value for name, value in head.state_dict().items() if name != key}, path, metadata)
        assert f"{key} is missing" in refusal(path)
    save_file(head.state_dict() | {"extra": torch.zeros(1)}, path, metadata)
    assert "extra is unexpected" in refusal(path)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ('{"kind": "box", "classes": []}', "kind"),
        ('{"classes": []}', "kind"),
        ('{"kind": "class", "classes": "abcd"}', "classes"),
        ('{"kind": "class", "mix": 1.5}', "mix"),
        ('{"kind": "class", "mix": "0.5"}', "mix"),
        ('{"kind": "class", "size": 3}', "size"),
        ("[]", "no sense"),
        ("{", "no sense"),
        ("[" * 100_000, "no sense"),
    ],
    ids=range(9),
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, metadata, told):
    path = tmp_path / "head.safetensors"
    save_file(drawn("class").state_dict(), path, {"proteus_head": metadata})
    assert told in refusal(path)


def test_names_that_do_not_match_the_outputs_are_refused(tmp_path):
    path = tmp_path / "head.safetensors"
    save_file(drawn("class").state_dict(), path, {"proteus_head": json.dumps({"kind": "class", "classes": NAMES[:3]})})
    assert "it names 3 classes and has 4 outputs" in refusal(path)


def test_a_weight_file_of_a_network_is_no_head(tmp_path):
    path = tmp_path / "student.safetensors"
    save_file({"blocks.0.norm1.weight": torch.zeros(DIM)}, path)
    assert "blocks.0.norm1.weight" in refusal(path)
