"""The probe's head on other test sets: whose classes compete, whose labels count, and who answers for which image."""

import numpy as np
import pytest
import torch

from proteus.data.sources import FolderSource, Subset
from proteus.data.transforms import EvalTransform
from proteus.errors import InputError
from proteus.evaluation.extract import View
from proteus.evaluation.linear_head import HeadInput, LinearHead, class_subset, classify
from proteus.evaluation.robustness import corruption_errors, predict, real_top1, top1

VIEW = View(16, 1.0, batch_size=7)


@pytest.fixture(scope="module")
def head(encoder, colours):
    """Random weights over five classes, centred such that each of them is predicted somewhere."""
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    head = LinearHead(HeadInput(2, False), 0.1, weight, torch.zeros(5), colours[0].classes)
    logits = by_hand(encoder, head, colours[1])
    head = LinearHead(head.input, 0.1, weight, -logits.mean(0), head.classes)
    assert len(set(by_hand(encoder, head, colours[1]).argmax(1).tolist())) > 2
    return head


def by_hand(encoder, head, source):
    images = torch.stack([EvalTransform(16, 1.0)(source.load(i)) for i in range(len(source))])
    with torch.no_grad():
        tokens = [features.cls for features in encoder.intermediate(images, 2)]
    return torch.cat(tokens, dim=1) @ head.weight.T + head.bias  # [n, 5]


def named(source, classes, labels):
    other = Subset(source, np.arange(len(source)))
    other.classes, other.labels = classes, np.asarray(labels)
    return other


def test_all_classes_compete_where_the_set_has_all(encoder, head, colours, accelerator):
    _, val = colours
    logits = by_hand(encoder, head, val)
    assert predict(encoder, head, val, accelerator, VIEW).tolist() == logits.argmax(1).tolist()
    expected = np.mean(logits.argmax(1).numpy() == val.labels)
    assert top1(encoder, head, val, accelerator, VIEW) == expected
    # The same set with its classes in another order.
    turned = named(val, val.classes[::-1], 4 - val.labels)
    assert top1(encoder, head, turned, accelerator, VIEW) == expected


def test_only_the_classes_of_the_set_compete(encoder, head, colours, accelerator):
    _, val = colours
    subset = [3, 1]
    logits = by_hand(encoder, head, val)
    few = named(val, [head.classes[i] for i in subset], np.arange(40) % 2)
    got = predict(encoder, head, few, accelerator, VIEW)
    assert got.tolist() == logits[:, subset].argmax(1).tolist()
    # Not what is left of a choice among all: there, images of other classes would be wrong whatever the two say.
    assert not set(logits.argmax(1).tolist()) <= {1, 3}
    assert top1(encoder, head, few, accelerator, VIEW) == np.mean(got == np.arange(40) % 2)


def test_a_class_that_the_head_does_not_know(encoder, head, colours, accelerator):
    assert class_subset(head.classes, ["colour 4", "colour 0"]).tolist() == [4, 0]
    other = named(colours[1], [*head.classes[:4], "colour 44"], colours[1].labels)
    with pytest.raises(InputError, match="class 'colour 44' is none of the 5 the head knows; did you mean 'colour 4'"):
        predict(encoder, head, other, accelerator, VIEW)


@pytest.mark.parametrize(("world", "images"), [(2, 40), (3, 40), (4, 29), (5, 3)])
def test_processes_share_the_images_out(encoder, head, colours, accelerator, processes, world, images):
    source = Subset(colours[1], np.arange(images))
    whole = predict(encoder, head, source, accelerator, VIEW)
    assert len(whole) == images
    for share in processes(world).run(lambda of_process: predict(encoder, head, source, of_process, VIEW)):
        assert share.tolist() == whole.tolist()


def test_real_labels(encoder, head, colours, accelerator):
    _, val = colours
    predictions = predict(encoder, head, val, accelerator, VIEW)
    # Right by the first label, by the second, wrong, and no label at all, in turn.
    sets = [([p], [(p + 1) % 5, p], [(p + 1) % 5], [])[i % 4] for i, p in enumerate(predictions.tolist())]
    assert real_top1(encoder, head, val, sets, accelerator, VIEW) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="39 sets of labels for 40 images"):
        real_top1(encoder, head, val, sets[:-1], accelerator, VIEW)


def test_corruptions(encoder, head, colours, accelerator):
    _, val = colours
    predictions = predict(encoder, head, val, accelerator, VIEW)
    asked = []

    def open_set(corruption, severity):
        # `severity` of six images have another label than the one predicted; in fog, all.
        asked.append((corruption, severity))
        wrong = np.arange(6) < (6 if corruption == "fog" else severity)
        return named(Subset(val, np.arange(6)), val.classes, (predictions[:6] + wrong) % 5)

    got = corruption_errors(encoder, head, open_set, ["fog", "snow"], accelerator, VIEW)
    assert asked == [(name, severity) for name in ("fog", "snow") for severity in range(1, 6)]
    assert list(got) == ["fog", "snow"]
    assert got["fog"] == [1] * 5
    assert got["snow"] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_a_crop_of_1_shows_images_of_the_size_as_they_are(colours, accelerator):
    source = colours[1]
    size = source.load(0).size[0]
    seen = []

    def answer(images):
        seen.append(images)
        return torch.zeros(len(images), 1, dtype=torch.int64)

    classify(source, View(size, 1.0), accelerator, answer, 1)
    expected = np.stack([np.asarray(source.load(i)) for i in range(40)])
    assert np.array_equal(torch.cat(seen).permute(0, 2, 3, 1).numpy(), expected)


def test_what_cannot_be_scored(encoder, head, colours, accelerator, tmp_path):
    bare = named(colours[1], head.classes, colours[1].labels)
    bare.labels = None
    with pytest.raises(InputError, match="the set has no labels"):
        top1(encoder, head, bare, accelerator, VIEW)
    for i in range(3):
        path = tmp_path / head.classes[i] / "x.png"
        path.parent.mkdir()
        colours[1].load(i).save(path)
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"colour 2/x\.png cannot be read"):
        top1(encoder, head, FolderSource(tmp_path), accelerator, VIEW)
