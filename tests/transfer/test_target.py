"""Which images a task labels, chooses with, tests on and leaves unlabelled; and every set that cannot be used so."""

from itertools import pairwise

import numpy as np
import pytest

from proteus.data.sets import open_set
from proteus.errors import InputError
from proteus.transfer import target as module
from proteus.transfer.config import TransferConfig
from proteus.transfer.target import Target, open_target
from tests.data.sets.fixtures import put, text

STAGE = {"schedule": {"steps": 1}}


def task(train, val, test, set="digits", root=None, task="classification", **options) -> TransferConfig:
    parts = {"train": train, "val": val, "test": test}
    return TransferConfig.model_validate(
        {
            "task": task,
            "teacher": {"name": "dinov2_vits14"},
            "student": {"name": "timm/resnet18"},
            "target": {"set": set, "root": None if root is None else str(root), "options": options, **parts},
            "adapt": STAGE,
            "transfer": STAGE,
            "finetune": STAGE,
        }
    )


def told(cfg: TransferConfig, seed: int = 0) -> str:
    with pytest.raises(InputError) as caught:
        open_target(cfg, seed)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


class Known:
    """A source of labels whose images cannot be read."""

    def __init__(self, labels, classes, name="image"):
        self.labels = None if labels is None else np.asarray(labels)
        self.classes, self._name = list(classes), name

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        raise AssertionError("an image was read")

    def name(self, index):
        return f"{self._name} {index}"


class KnownDense(Known):
    def target(self, index):
        raise AssertionError("a target was read")


def of_counts(counts, name="image", classes=None) -> Known:
    """So many images of each class, in a mixed order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    names = classes or [f"class {label:04d}" for label in range(len(counts))]
    return Known(np.random.default_rng(1).permutation(labels), names, name)


@pytest.fixture
def known(monkeypatch):
    """Sources by the names of their splits, in place of sets on the disk."""
    splits: dict[str, Known] = {}
    monkeypatch.setattr(module, "open_set", lambda name, root, split, **options: splits[split])
    return splits


def names(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def counts(source) -> list[int]:
    return np.bincount(source.labels, minlength=len(source.classes)).tolist()


# What is chosen


def test_the_parts_of_one_split_share_no_image_and_leave_none_out(known):
    known["all"] = of_counts([40, 60, 100])
    cfg = task({"split": "all", "per_class": 5}, {"split": "all", "images": 40}, {"split": "all", "images": 100})
    target = open_target(cfg, 0)
    assert counts(target.test) == [20, 30, 50]
    assert counts(target.val) == [8, 12, 20]
    assert counts(target.train) == [5, 5, 5]
    assert len(target.unlabelled) == 60
    assert target.unlabelled.labels is None
    parts = [set(names(part)) for part in (target.test, target.val, target.unlabelled)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 200
    assert set(names(target.train)) < parts[2]


def test_the_seed_chooses_labels_and_nothing_else(known):
    known["all"] = of_counts([40, 60, 100])
    cfg = task({"split": "all", "images": 20}, {"split": "all", "images": 20}, {"split": "all", "per_class": 20})
    first, again, other = (open_target(cfg, seed) for seed in (0, 0, 1))
    assert names(first.train) == names(again.train)
    assert 0 < len(set(names(first.train)) & set(names(other.train))) < 10
    for part in ("val", "test", "unlabelled"):
        assert names(getattr(first, part)) == names(getattr(other, part))
    wider = task({"split": "all", "per_class": 1}, {"split": "all", "images": 20}, {"split": "all", "per_class": 20})
    assert names(open_target(wider, 1).val) == names(first.val)
    # Not merely the first ones, and not the same places in val and test.
    places = {part: {int(name[6:]) for name in names(getattr(first, part))} for part in ("train", "val", "test")}
    assert all(max(chosen) > 150 for chosen in places.values())
    known["val"], known["test"] = of_counts([40, 60, 100], "val"), of_counts([40, 60, 100], "test")
    apart = task({"split": "all", "images": 20}, {"split": "val", "images": 20}, {"split": "test", "images": 20})
    drawn = [{name.split()[1] for name in names(part)} for part in open_target(apart, 0)[:3]]
    assert all(len(one & two) < 10 for one, two in pairwise([*drawn, drawn[0]]))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "budgets",
    [
        [{"per_class": 1}, {"per_class": 7}, {"per_class": 40}, {}],
        # In steps of one: remainders, dealt to the largest, would take an image away from a class now and then.
        [{"images": count} for count in range(12, 161)],
    ],
    ids=["per_class", "images"],
)
def test_a_smaller_budget_is_a_part_of_a_larger_one(known, budgets, seed):
    known["train"], known["test"] = of_counts([10, 13, 17, 28, 41, 51]), of_counts([1] * 6, "test")
    smaller: set[str] = set()
    for budget in budgets:
        chosen = names(open_target(task({"split": "train", **budget}, None, {"split": "test"}), seed).train)
        assert smaller < set(chosen)
        assert len(chosen) == budget.get("images", len(chosen))
        smaller = set(chosen)
    assert len(smaller) == 160


def test_per_class_takes_at_most_so_many(known):
    known["train"], known["test"] = of_counts([3, 13, 17, 28]), of_counts([1] * 4, "test")
    for budget, expected in [(2, [2, 2, 2, 2]), (13, [3, 13, 13, 13]), (17, [3, 13, 17, 17]), (99, [3, 13, 17, 28])]:
        train = open_target(task({"split": "train", "per_class": budget}, None, {"split": "test"}), 5).train
        assert counts(train) == expected


def test_images_are_in_proportion_to_the_classes_and_exactly_so_many(known):
    sizes = np.array([30, 130, 170, 280, 410, 580])
    known["train"], known["test"] = of_counts(sizes), of_counts([1] * 6, "test")
    for budget in (60, 61, 160, 161, 162, 163, 800, 1599, 1600):
        train = open_target(task({"split": "train", "images": budget}, None, {"split": "test"}), 3).train
        assert len(train) == budget
        assert np.abs(np.array(counts(train)) - budget * sizes / 1600).max() < 1
    assert counts(open_target(task({"split": "train", "images": 160}, None, {"split": "test"}), 3).train) == [
        3, 13, 17, 28, 41, 58,
    ]  # fmt: skip


def test_which_of_equal_classes_get_one_more_is_drawn(known):
    known["train"], known["test"] = of_counts([20] * 10), of_counts([1] * 10, "test")
    cfg = task({"split": "train", "images": 45}, None, {"split": "test"})
    more = [tuple(np.flatnonzero(np.array(counts(open_target(cfg, seed).train)) == 5)) for seed in range(5)]
    assert all(len(classes) == 5 for classes in more)
    assert len(set(more)) > 1


def test_labels_and_images_stay_together():
    cfg = task({"split": "train", "per_class": 3}, {"split": "train", "images": 200}, {"split": "test"})
    target, digits = open_target(cfg, 0), open_set("digits", None, "train")
    label_of = dict(zip(names(digits), digits.labels.tolist(), strict=True))
    image_of = {digits.name(index): digits.load(index) for index in range(len(digits))}
    for part in (target.train, target.val):
        assert [label_of[name] for name in names(part)] == part.labels.tolist()
    for part in (target.train, target.val, target.unlabelled):
        assert image_of[part.name(7)] == part.load(7)
    assert (len(target.train), len(target.val), len(target.test), len(target.unlabelled)) == (30, 200, 450, 1147)
    assert target.classes == target.test.classes == [str(digit) for digit in range(10)]


def test_segmentation_takes_the_first_of_an_order():
    options = {"set": "scenes", "task": "segmentation"}
    held = {"split": "train", "images": 20}
    small, large, everything = (
        open_target(task({"split": "train", **budget}, held, {"split": "test"}, **options), 4)
        for budget in ({"images": 12}, {"images": 50}, {})
    )
    assert [len(part.train) for part in (small, large, everything)] == [12, 50, 140]
    assert set(names(small.train)) < set(names(large.train)) < set(names(everything.train))
    assert sorted(names(everything.train)) == sorted(names(small.unlabelled))
    assert not set(names(small.val)) & set(names(small.unlabelled))
    assert len(small.val) == 20
    assert len(small.test) == 80
    assert not hasattr(small.unlabelled, "target")
    assert (small.unlabelled.labels, small.unlabelled.classes) == (None, [])
    numbers = [int(name.rpartition(":")[2]) for name in names(small.train)]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 80  # not merely the first ones
    other = open_target(task({"split": "train", "images": 12}, held, {"split": "test"}, **options), 5)
    assert len(set(names(other.train)) & set(names(small.train))) < 6
    assert names(other.val) == names(small.val)
    scenes = open_set("scenes", None, "train")
    index = int(small.train.name(5).rpartition(":")[2])
    assert small.train.load(5) == scenes.load(index)
    assert (small.train.target(5) == scenes.target(index)).all()
    index = int(small.unlabelled.name(5).rpartition(":")[2])
    assert small.unlabelled.load(5) == scenes.load(index)


# Classes


def test_classes_are_numbered_as_those_of_the_training_split(known):
    known["train"] = Known([0, 1, 2, 0], ["cat", "dog", "eel"], "train")
    known["val"] = Known([0, 1, 1], ["eel", "cat"], "val")
    known["test"] = Known([3, 2, 0, 3], ["dog", "none of them", "eel", "cat"], "test")
    target = open_target(task({"split": "train"}, {"split": "val"}, {"split": "test"}), 0)
    assert target.classes == target.val.classes == target.test.classes == ["cat", "dog", "eel"]
    assert target.val.labels.tolist() == [2, 0, 0]
    assert target.test.labels.tolist() == [0, 2, 1, 0]
    known["test"] = Known([3, 1], ["dog", "ele", "eel", "cat"], "test")
    assert "target.test: class 'ele' is not among target.train's; did you mean 'eel'?" in told(
        task({"split": "train"}, None, {"split": "test"})
    )


def test_a_listed_set_numbers_all_files_as_the_training_one(tmp_path):
    for image in "abcdef":
        put(tmp_path / f"{image}.jpg", 50)
    text(tmp_path / "train.csv", ["a.jpg,cat", "b.jpg,dog", "c.jpg,eel"])
    text(tmp_path / "test.csv", ["d.jpg,eel", "e.jpg,dog"])
    cfg = task({"split": "train.csv"}, None, {"split": "test.csv"}, "listed", tmp_path)
    assert open_target(cfg, 0).test.labels.tolist() == [2, 1]
    own = task({"split": "train.csv"}, None, {"split": "test.csv"}, "listed", tmp_path, classes=["eel", "dog", "cat"])
    target = open_target(own, 0)
    assert target.classes == ["eel", "dog", "cat"]
    assert target.train.labels.tolist() == [2, 1, 0]
    assert target.test.labels.tolist() == [0, 1]
    text(tmp_path / "test.csv", ["d.jpg,eel", "e.jpg,fox"])
    assert told(cfg) == f"target.test: {tmp_path}/test.csv:2: unknown class 'fox'; valid: cat, dog, eel"
    names_of = {"classes": ["cat", "dog", "eel", "fox"]}
    more = task({"split": "train.csv"}, None, {"split": "test.csv"}, "listed", tmp_path, **names_of)
    assert "target.train: none of its 3 labelled images is of class 'fox': raise" in told(more)


def test_a_class_without_a_labelled_image_is_named(known):
    known["train"], known["test"] = of_counts([1, 1, 50, 50]), of_counts([1] * 4, "test")
    assert "none of its 4 labelled images is of class 'class 0000' nor of 1 others" in told(
        task({"split": "train", "images": 4}, None, {"split": "test"})
    )
    known["all"] = Known([0, 1, 1, 1], ["once", "often"])
    assert "target.train: none of its 2 labelled images is of class 'once': raise the budget" in told(
        task({"split": "all"}, None, {"split": "all", "per_class": 1})
    )


# What cannot be


def test_budgets_beyond_what_is_there(known):
    known["all"] = of_counts([20, 30])
    some = {"split": "all", "images": 20}
    assert "target.test.images=51: split 'all' has 50 images, of which 50 are left" in told(
        task({"split": "all"}, None, {"split": "all", "images": 51})
    )
    assert "target.val.images=31: split 'all' has 50 images, of which 30 are left" in told(
        task({"split": "all"}, {"split": "all", "images": 31}, some)
    )
    assert "target.train.images=11: split 'all' has 50 images, of which 10 are left" in told(
        task({"split": "all", "images": 11}, some, some)
    )
    assert len(open_target(task({"split": "all", "images": 10}, some, some), 0).train) == 10
    nothing = "split 'all' has 50 images, and none is left of them; give what else takes from it a budget"
    assert told(task({"split": "all"}, None, {"split": "all"})) == f"target.train: {nothing}"
    assert told(task({"split": "all"}, {"split": "all"}, some)) == f"target.train: {nothing}"
    assert told(task({"split": "all"}, some, {"split": "all"})) == f"target.val: {nothing}"


def test_one_image_in_two_splits(known, tmp_path):
    for image in "abcd":
        put(tmp_path / f"{image}.jpg", 50)
    text(tmp_path / "train.csv", ["a.jpg,x", "b.jpg,x"])
    text(tmp_path / "val.csv", ["c.jpg,x"])
    text(tmp_path / "test.csv", ["d.jpg,x"])
    splits = {"train": "a.jpg,x", "val": "c.jpg,x", "test": "d.jpg,x"}
    cfg = task(*({"split": f"{part}.csv"} for part in splits), "listed", tmp_path)
    known.update({f"{part}.csv": open_set("listed", tmp_path, f"{part}.csv") for part in splits})
    assert len(open_target(cfg, 0).train) == 2
    for one, two, image in [("val", "test", "d"), ("train", "test", "d"), ("train", "val", "c")]:
        text(tmp_path / "more.csv", [splits[one], f"{image}.jpg,x"])
        whole = known[f"{one}.csv"]
        known[f"{one}.csv"] = open_set("listed", tmp_path, "more.csv")
        assert told(cfg) == (
            f"target.{one}: {tmp_path}/{image}.jpg is in target.{two} as well: take it out of '{one}.csv' or of "
            f"'{two}.csv'"
        )
        known[f"{one}.csv"] = whole
    # Not only labelled images: what is tested on may not be in the transfer set either.
    text(tmp_path / "more.csv", ["a.jpg,x", "b.jpg,x", "d.jpg,x"])
    known["train.csv"] = open_set("listed", tmp_path, "more.csv")
    few = task({"split": "train.csv", "images": 1}, None, {"split": "test.csv"}, "listed", tmp_path)
    assert all("d.jpg is in target.test as well" in told(few, seed) for seed in range(3))


@pytest.mark.parametrize("set_options", [{"set": "scenes-depth"}, {"set": "digits"}])
def test_segmentation_needs_classes_of_pixels(set_options):
    cfg = task({"split": "train"}, None, {"split": "test"}, task="segmentation", **set_options)
    assert told(cfg) == (
        f"target.set={set_options['set']}: task=segmentation needs a set with a class for every pixel, such as ade20k "
        "or folder-segmentation"
    )


def test_classification_needs_one_class_an_image(known):
    cfg = task({"split": "train"}, None, {"split": "test"}, set="voc2007")
    for labels, has in [(np.ones((3, 2)), "several labels an image"), (None, "no labels")]:
        known["train"] = known["test"] = Known(labels, "ab")
        assert told(cfg) == (f"target.set=voc2007: task=classification needs one class an image; this set has {has}")
    known["train"] = KnownDense([0], "a")
    assert told(cfg).endswith("this set has a value for every pixel")


def test_segmentation_sets_have_no_budget_per_class_and_the_same_classes(known):
    known["train"], known["test"] = KnownDense([0] * 9, "ab"), KnownDense([0] * 9, "ab", "test")
    cfg = task({"split": "train", "per_class": 2}, None, {"split": "test"}, task="segmentation")
    assert told(cfg) == "target.train.per_class: an image of a segmentation set has no one class; give images"
    known["test"] = KnownDense([0] * 9, "ba", "test")
    assert told(task({"split": "train"}, None, {"split": "test"}, task="segmentation")) == (
        "target.test: its classes (2: b, ...) are not those of target.train (2: a, ...)"
    )


def test_what_the_reader_says_is_told_with_its_place(tmp_path):
    put(tmp_path / "train/cat/1.jpg", 50)
    train, test = {"split": "train"}, {"split": "test"}
    assert told(task(train, None, test, "folder", tmp_path)).startswith("target.test: folder: no folder")
    assert told(task(train, None, test, "folder")) == (
        "target.train: folder: needs the folder in which it lies; target.root=PATH names it"
    )
    assert told(task(train, test, train, "fodler")).startswith("target.train: no data set 'fodler'; did you mean")
    assert told(task(train, None, test, colour=1)).startswith("target.train: digits: no option 'colour'")


def test_opening_reads_none_of_a_million_images(known):
    known["train"], known["test"] = of_counts([1000] * 1000), of_counts([5] * 1000, "test")
    target = open_target(task({"split": "train", "images": 10_000}, None, {"split": "test"}), 0)
    assert isinstance(target, Target)
    assert counts(target.train) == [10] * 1000
