"""The tasks of the suite, and what is said of a file that is none."""

import pytest

from benchmarks.data import TaskData, without_data
from benchmarks.task import FOLDER, all_tasks, choose_tasks, read_task, with_heads
from proteus.data.sets import SETS
from proteus.errors import InputError
from proteus.evaluation.dense.presets import DEPTH, SEGMENTATION
from proteus.evaluation.metrics import ALEXNET_ERRORS
from tests.data.sets import fixtures

PAPER = """
    in1k-linear aircraft caltech101 cars cifar10 cifar100 dtd flowers food pets sun397 voc2007 cub ade20k nyu-depth-v2
    in-sketch in-a in-r in-c
"""

OWN = """
title: My photos
kind: knn
metric: top-1
direction: higher
data:
  set: folder
  root: photos
  splits: {train: train, test: test}
"""


def test_the_nineteen_of_the_paper_and_the_extras_are_there():
    tasks = all_tasks()
    assert [task.id for task in tasks.values() if task.number] == PAPER.split()
    assert [task.number for task in tasks.values() if task.number] == list(range(1, 20))
    assert {"in-v2", "in-real", "in1k-knn", "in1k-logreg", "caltech101-ref"} <= set(tasks)
    assert {task.kind for task in tasks.values() if task.smoke} == {task.kind for task in tasks.values()} - {"real"}


def test_every_task_is_of_a_set_a_head_and_presets_that_exist():
    tasks = all_tasks()
    presets = set()
    for task in tasks.values():
        assert task.data.set in SETS
        assert task.head is None or tasks[task.head].kind == "linear"
        presets |= set(task.presets.values())
        assert task.smoke or (task.data.source and task.data.weighs), task.id
    assert presets == set(SEGMENTATION) | set(DEPTH)
    assert tasks["in-c"].corruptions == list(ALEXNET_ERRORS)
    assert {name for name, task in tasks.items() if task.metric == "mean per class" and task.number} == {
        "aircraft",
        "caltech101",
        "flowers",
        "pets",
    }


def test_words_stand_for_groups_ids_and_files(tmp_path):
    (tmp_path / "mine.yaml").write_text(OWN)
    tasks, by_name = choose_tasks(["robustness,cars", str(tmp_path / "mine.yaml")])
    assert list(tasks) == ["in-sketch", "in-a", "in-r", "in-c", "cars", "mine"]
    assert by_name == {"cars", "mine"}
    assert tasks["mine"].group == "own"
    assert tasks["mine"].data.root == str(tmp_path / "photos")
    everything, by_name = choose_tasks(["all"])
    assert not by_name
    assert set(everything) == set(PAPER.split())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("titel: x", "unknown key 'titel'; did you mean 'title'?"),
        ("kind: clustering", "kind: input should be 'knn'"),
        ("metric: mIoU", "metric: knn is measured in top-1"),
        ("direction: lower", "direction: top-1 is not better when lower"),
        ("head: in1k-linear", "head: the linear task whose head is tested, for transfer, real and corruptions alone"),
        ("corruptions: [fog]", "corruptions: their names, for the kind of that name alone"),
        ("presets: {proteus: dinov2-lin}", "presets: a preset for each protocol, for segmentation and depth alone"),
        ("crop: 1.5", "crop: input should be less than or equal to 1, not 1.5"),
        ("size: large", "size"),
    ],
)
def test_a_file_that_is_no_task_is_said_in_one_line(tmp_path, change, line):
    key = change.partition(":")[0]
    kept = [text for text in OWN.strip().splitlines() if not text.startswith(f"{key}:")]
    (tmp_path / "mine.yaml").write_text("\n".join([*kept, change]))
    with pytest.raises(InputError) as error:
        read_task(tmp_path / "mine.yaml")
    assert line in error.value.lines[0]
    assert error.value.lines[0].startswith("mine.yaml: ")


def test_a_split_that_is_missing_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text(OWN.replace("train: train, ", ""))
    with pytest.raises(InputError, match=r"mine\.yaml: data\.splits: knn needs train"):
        read_task(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("fine-graned", "no such task, group or .yaml file; did you mean 'fine-grained'?"),
        ("nowhere.yaml", "nowhere.yaml cannot be read: No such file or directory"),
        (str(FOLDER / "cars.yaml"), "'cars' is a task of the suite already"),
    ],
    ids=["unknown", "no file", "taken"],
)
def test_words_that_stand_for_nothing(word, line):
    with pytest.raises(InputError, match=line):
        choose_tasks([word])


def every_set(root):
    """A small copy of each set of the suite, in its real layout, below one folder."""
    for write in (
        fixtures.aircraft,
        fixtures.caltech101,
        fixtures.cars,
        fixtures.cifar10,
        fixtures.cifar100,
        fixtures.dtd,
        fixtures.flowers,
        fixtures.food,
        fixtures.pets,
        fixtures.sun397,
        fixtures.voc2007,
        fixtures.cub,
        fixtures.in1k,
        fixtures.in_sketch,
        fixtures.in_a,
        fixtures.in_r,
        fixtures.in_v2,
        fixtures.ade20k,
        fixtures.nyu,
    ):
        write(root)
    groups = ("noise", "blur", "weather", "digital")
    fixtures.in_c(root, {name: groups[i % 4] for i, name in enumerate(ALEXNET_ERRORS)})
    fixtures.in_real(root, [[0]] * 20)
    return root


def test_every_task_opens_on_its_set_as_it_lies_on_disk(tmp_path):
    data = TaskData(every_set(tmp_path))
    for task in all_tasks().values():
        for split in task.data.splits:
            options = {"corruption": task.corruptions[-1], "severity": 5} if task.corruptions else {}
            task.data.images, task.data.classes = {}, None  # the copies are small
            source = data.open(task, split, **options)
            source.load(0)
            assert len(source)
            assert task.kind in ("segmentation", "depth") or source.labels is not None


def test_counts_that_differ_are_said_with_what_there_is(tmp_path):
    every_set(tmp_path)
    tasks, _ = choose_tasks(["fine-grained", "digits-knn"])
    not_run, failed = without_data(tasks, TaskData(tmp_path), set())
    assert not not_run
    del tasks["digits-knn"]
    assert {entry.task for entry in failed} == set(tasks)
    said = {entry.task: entry.why for entry in failed}
    assert "split 'train' has 3 classes, not 200" in said["cub"]
    assert all(f"{name}: " not in why[: len(name) + 2] for name, why in said.items())


def test_a_folder_that_is_no_class_of_the_head_is_named(tmp_path):
    every_set(tmp_path)
    tasks = with_heads(choose_tasks(["in-a"])[0])
    for task in tasks.values():
        task.data.images, task.data.classes = {}, None
    assert without_data(tasks, TaskData(tmp_path), set()) == ([], [])
    fixtures.put(tmp_path / "imagenet-a/lost+found/x.png", 3)
    with pytest.raises(InputError, match=r"in-a: class 'lost\+found' is none of the"):
        without_data(tasks, TaskData(tmp_path), {"in-a"})
