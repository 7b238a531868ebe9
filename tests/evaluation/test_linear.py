"""The linear probe: what its heads see, that each trains as if it were alone, and which one is reported."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from proteus.config import Augment
from proteus.data.loader import TrainingSet, training_batches
from proteus.data.sampler import Sampler
from proteus.data.sources import FolderSource, Subset
from proteus.data.transforms import EvalTransform, TrainTransform
from proteus.errors import InputError
from proteus.evaluation import linear
from proteus.evaluation.extract import View
from proteus.evaluation.linear import PAPER_RATES, RATES, LinearProtocol, linear_probe
from proteus.evaluation.linear_head import HeadInput, LinearHead, class_subset, classify, head_inputs
from proteus.evaluation.linear_head import possible_inputs as inputs_of
from proteus.models import create_model
from proteus.models.opaque import OpaqueEncoder

SMALL = LinearProtocol(
    epochs=1, global_batch=12, rates=(0.01, 3.0, 100.0), size=16, crop=1.0, held_out=0.1, batch_size=7
)


def changed(**changes):
    return LinearProtocol(**{**SMALL.__dict__, **changes})


# What heads see


def test_inputs_are_class_tokens_of_the_last_blocks_and_the_mean_patch(encoder):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, last = encoder.intermediate(images, [0, 1], norm=True)
    mean = sum(last.patch[:, i] for i in range(16)) / 16
    expected = {
        HeadInput(1, False): [last.cls],
        HeadInput(1, True): [last.cls, mean],
        HeadInput(2, False): [first.cls, last.cls],
        HeadInput(2, True): [first.cls, last.cls, mean],
    }
    assert inputs_of(encoder, 16) == list(expected)
    for got, parts in zip(head_inputs(encoder, images, list(expected)), expected.values(), strict=True):
        torch.testing.assert_close(got, torch.cat(parts, dim=1))
        assert not got.requires_grad


@pytest.mark.parametrize(("depth", "blocks"), [(1, [1]), (3, [1, 3]), (4, [1, 4]), (6, [1, 4])])
def test_an_encoder_gives_as_many_blocks_as_it_has(depth, blocks):
    own = create_model("timm/vit_tiny_patch16_224", patch_size=4, embed_dim=16, depth=depth, num_heads=2, image_size=8)
    assert inputs_of(own, 8) == [HeadInput(count, avgpool) for count in blocks for avgpool in (False, True)]


def siglip():
    arch = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return create_model("timm/vit_base_patch16_siglip_224", image_size=32, **arch)


def convolution():
    return OpaqueEncoder(nn.Conv2d(3, 8, 16, 16), name="own", mean=(0, 0, 0), std=(1, 1, 1), image_size=32, own=True)


@pytest.mark.parametrize("build", [siglip, convolution])
def test_without_class_tokens_inside_the_output_is_what_is_seen(build):
    own = build().eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(own, 32)
    assert inputs == [HeadInput(0, False), HeadInput(0, True)]
    with torch.no_grad():
        features = own(images)
    plain, pooled = head_inputs(own, images, inputs)
    torch.testing.assert_close(plain, features.cls)
    torch.testing.assert_close(pooled, torch.cat([features.cls, features.patch.mean(1)], dim=1))


def test_a_size_that_the_patch_does_not_divide(encoder, accelerator, colours):
    with pytest.raises(InputError, match=r"linear probe: .*18 x 18.*give another size"):
        linear_probe(encoder, *colours, accelerator, changed(size=18))


# How they train


def test_the_grids():
    assert len(RATES) == len(PAPER_RATES) == 13
    assert (RATES[0], RATES[-1], PAPER_RATES[0], PAPER_RATES[-1]) == (1e-5, 0.1, 1e-4, 0.5)
    assert list(RATES) == sorted(RATES)
    assert list(PAPER_RATES) == sorted(PAPER_RATES)


def test_heads_trained_at_once_are_heads_trained_alone(encoder, accelerator, colours):
    train, _ = colours
    steps, protocol = 8, changed(seed=3)
    heads = linear._Heads(encoder, 5, accelerator, protocol)
    linear._train(encoder, heads, train, steps, accelerator, protocol)

    augment = TrainTransform(16, Augment(auto_augment=None, erasing=0.0, scale=(0.08, 1.0), hflip=0.5))
    sampler = Sampler(len(train), batch_size=12, seed=3)
    batches = list(training_batches(TrainingSet(train, augment, 3, 0, 0.0), sampler, 0, steps, 0, 0))
    generator = torch.Generator().manual_seed(3)
    for which, seen in enumerate(heads.inputs):
        with torch.no_grad():
            features = [head_inputs(encoder, batch.images, [seen])[0] for batch in batches]
        start = torch.empty(3, 5, features[0].shape[1]).normal_(0, 0.01, generator=generator)
        for i, lr in enumerate(protocol.rates):
            alone = nn.Linear(features[0].shape[1], 5)
            alone.load_state_dict({"weight": start[i], "bias": torch.zeros(5)})
            optimizer = torch.optim.SGD(alone.parameters(), lr=lr * 12 / 256, momentum=0.9, weight_decay=0)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
            for x, batch in zip(features, batches, strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(alone(x), batch.labels).backward()
                optimizer.step()
                cosine.step()
            together = heads.head(which * 3 + i, train.classes)
            assert (together.input, together.lr) == (seen, lr)
            assert not torch.allclose(together.weight, start[i], atol=1e-4)
            torch.testing.assert_close(together.weight, alone.weight.detach(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(together.bias, alone.bias.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(2, 24, 5), (0.5, 40, 1), (1.7, 20, 5), (0.1, 60, 1)])
def test_length_is_counted_in_samples(encoder, accelerator, colours, monkeypatch, epochs, batch, steps):
    seen = []
    monkeypatch.setattr(linear._Heads, "step", lambda self, x, labels, factor: seen.append((len(labels), factor)))
    linear_probe(encoder, *colours, accelerator, changed(epochs=epochs, global_batch=batch))
    assert [count for count, _ in seen] == [batch] * steps
    assert [factor for _, factor in seen] == pytest.approx(
        [(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    )


def test_two_processes_are_one(encoder, accelerator, colours, processes):
    one = linear_probe(encoder, *colours, accelerator, SMALL)
    for other in processes(2).run(lambda of_process: linear_probe(encoder, *colours, of_process, SMALL)):
        assert other.head.input == one.head.input
        assert other.head.lr == one.head.lr
        torch.testing.assert_close(other.head.weight, one.head.weight, rtol=1e-3, atol=1e-4)
        assert [score.accuracy for score in other.scores] == pytest.approx([s.accuracy for s in one.scores], abs=1 / 40)


def test_an_encoder_is_left_as_it_was(encoder, accelerator, colours):
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    linear_probe(encoder, *colours, accelerator, changed(epochs=0.5))
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in encoder.parameters())


# What is reported


@pytest.fixture(scope="module")
def result(encoder, accelerator, colours):
    return linear_probe(encoder, *colours, accelerator, changed(epochs=4))


def test_the_best_head_at_the_end_is_reported(result, encoder, colours):
    _, val = colours
    assert len(result.scores) == 4 * 3
    assert [(s.input, s.lr) for s in result.scores[:4]] == [
        *((HeadInput(1, False), lr) for lr in SMALL.rates),
        (HeadInput(1, True), SMALL.rates[0]),
    ]
    best = max(result.scores, key=lambda score: score.accuracy)
    assert result.accuracy == best.accuracy > 0.5
    assert min(score.accuracy for score in result.scores) < result.accuracy - 0.2
    assert (result.head.input, result.head.lr) == (best.input, best.lr)

    images = torch.stack([EvalTransform(16, 1.0)(val.load(i)) for i in range(len(val))])
    predictions = result.head.logits(encoder, images).argmax(1).numpy()
    assert np.mean(predictions == val.labels) == result.accuracy


def test_the_honest_head_is_chosen_on_images_it_was_not_trained_on(encoder, accelerator, colours, monkeypatch):
    trained = set()
    real = linear._train

    def spy(encoder, heads, train, *others):
        trained.update(train.name(i) for i in range(len(train)))
        real(encoder, heads, train, *others)

    monkeypatch.setattr(linear, "_train", spy)
    asked = []
    accuracies = linear._Heads.accuracies

    def record(self, encoder, source, labels):
        asked.append({source.name(i) for i in range(len(source))})
        if len(asked) == 2:  # the held-out images prefer the head with index 5
            return [0.9 if i == 5 else 0.1 for i in range(len(self.grid))]
        return accuracies(self, encoder, source, labels)

    monkeypatch.setattr(linear._Heads, "accuracies", record)
    got = linear_probe(encoder, *colours, accelerator, SMALL)
    assert got.honest == got.scores[5]
    assert got.honest.held_out == 0.9
    assert got.honest_accuracy == got.scores[5].accuracy
    held_out = asked[1]
    assert len(held_out) == 6
    assert len(trained) == 54
    assert not held_out & trained


def test_without_held_out_images_there_is_no_honest_head(encoder, accelerator, colours):
    got = linear_probe(encoder, *colours, accelerator, changed(held_out=0.0, epochs=0.5))
    assert (got.honest, got.honest_accuracy) == (None, None)
    assert {score.held_out for score in got.scores} == {None}


@pytest.mark.parametrize(("best", "warns"), [(0, True), (1, False), (2, True), (11, True)])
def test_a_best_rate_at_an_end_of_the_grid_is_told(encoder, accelerator, colours, monkeypatch, best, warns):
    monkeypatch.setattr(linear._Heads, "accuracies", lambda self, *_: [float(i == best) for i in range(12)])
    got = linear_probe(encoder, *colours, accelerator, changed(epochs=0.2))
    assert got.head.lr == SMALL.rates[best % 3]
    assert (got.warning is not None) == warns
    if warns:
        assert f"{SMALL.rates[best % 3]:g}, is at an end of the grid" in got.warning


def test_classes_are_matched_by_name(encoder, accelerator, colours):
    train, val = colours
    turned = Subset(val, np.arange(40))
    turned.classes = val.classes[::-1]
    turned.labels = 4 - val.labels
    first = linear_probe(encoder, train, val, accelerator, SMALL)
    assert linear_probe(encoder, train, turned, accelerator, SMALL).accuracy == first.accuracy > 0.3
    turned.classes = ["ten", *turned.classes[1:]]
    with pytest.raises(InputError, match="class 'ten' is none of the 5"):
        linear_probe(encoder, train, turned, accelerator, SMALL)


def test_class_names_and_class_numbers():
    assert class_subset(["a", "b", "c"], ["c", "a"]).tolist() == [2, 0]
    assert class_subset(["a", "b", "c"], ["0", "1", "2"]).tolist() == [0, 1, 2]
    assert class_subset(["2", "0", "1"], ["0", "1", "2"]).tolist() == [1, 2, 0]  # names, though they look like numbers
    for other in (["0", "1"], ["0", "1", "2", "3"], ["1", "2", "3"]):
        with pytest.raises(InputError, match="is none of the 3"):
            class_subset(["a", "b", "c"], other)


# What bad input gets


@pytest.fixture
def folder(tmp_path, colours):
    """Twenty-four images as files of their classes."""
    for i in range(24):
        path = tmp_path / str(colours[0].labels[i]) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        colours[0].load(i).save(path)
    return tmp_path


@pytest.mark.parametrize("which", ["train", "val"])
def test_an_unreadable_image_is_named(folder, encoder, accelerator, which):
    whole = FolderSource(folder)
    broken_name = whole.name(7)
    (folder / broken_name).write_bytes(b"no image")
    broken, whole = whole, Subset(whole, np.arange(8, 24))
    sources = (broken, whole) if which == "train" else (whole, broken)
    with pytest.raises(InputError, match=f"{broken_name} cannot be read"):
        linear_probe(encoder, *sources, accelerator, changed(held_out=0.0))


def test_a_worker_names_it_too(folder, accelerator):
    source = FolderSource(folder)
    view = View(16, 1.0, batch_size=5, workers=1)
    means = classify(source, view, accelerator, lambda images: images.sum((1, 2, 3))[:, None], 1)
    expected = [[int(EvalTransform(16, 1.0)(source.load(i)).sum())] for i in range(24)]
    assert means.tolist() == expected
    (folder / source.name(23)).write_bytes(b"no image")
    with pytest.raises(InputError, match=f"{source.name(23)} cannot be read"):
        classify(source, view, accelerator, lambda images: images[:, 0, 0, :1].long(), 1)


def test_labels_are_needed(encoder, accelerator, colours):
    train, val = colours
    bare = Subset(train, np.arange(20))
    bare.labels = None
    with pytest.raises(InputError, match="the training set has not one label an image"):
        linear_probe(encoder, bare, val, accelerator, SMALL)
    bare.labels = np.ones((20, 5), np.int8)
    with pytest.raises(InputError, match="the validation set has not one label an image"):
        linear_probe(encoder, train, bare, accelerator, SMALL)
    with pytest.raises(InputError, match="60 training and 0 validation images"):
        linear_probe(encoder, train, Subset(val, np.arange(0)), accelerator, SMALL)


def test_a_batch_that_processes_cannot_share(encoder, colours, processes):
    with pytest.raises(InputError, match="5 processes cannot share a global batch of 12"):
        processes(5).run(lambda accelerator: linear_probe(encoder, *colours, accelerator, SMALL))


# The head on disk


def test_a_saved_head_is_the_head(result, encoder, tmp_path):
    result.head.save(tmp_path / "head.safetensors")
    loaded = LinearHead.load(tmp_path / "head.safetensors")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.logits(encoder, images), result.head.logits(encoder, images))
    assert (loaded.input, loaded.lr, loaded.classes) == (result.head.input, result.head.lr, result.head.classes)


def test_a_head_of_another_encoder_is_refused(result):
    other = create_model("timm/vit_tiny_patch16_224", patch_size=4, embed_dim=16, depth=2, num_heads=2, image_size=16)
    with pytest.raises(InputError, match=r"the head takes features of \d+ values, and .* gives \d+"):
        result.head.logits(other, torch.zeros(1, 3, 16, 16))


def test_a_file_that_holds_no_head(tmp_path, encoder):
    from proteus.models.weights import save_encoder

    save_encoder(encoder, tmp_path / "encoder.safetensors")
    with pytest.raises(InputError, match=r"encoder\.safetensors holds no linear head"):
        LinearHead.load(tmp_path / "encoder.safetensors")
    with pytest.raises(InputError, match="do not exist"):
        LinearHead.load(tmp_path / "none.safetensors")
