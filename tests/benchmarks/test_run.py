"""The command: what it runs, what it leaves, and what it says where something is wrong."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import protocols, run
from benchmarks.report import read_results
from benchmarks.result import Result
from tests.benchmarks.conftest import write_task


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def scores(out):
    return {(result.model, result.task): result.score for result in read_results(out).results}


def test_a_task_of_ones_own_data_gives_a_score_and_a_report(colours, model, command, capsys):
    out = colours / "out"
    assert command("--model", model, "--tasks", colours / "mine.yaml", "--out", out) == 0
    (result,) = read_results(out).results
    assert result.score == 100.0  # the classes are red and green
    assert result.protocol == "dinov2"
    assert result.figures["top-1, k = 20"] == 100.0
    assert result.data == str(colours / "photos")
    assert "My photos" in (out / "report.html").read_text()
    assert "| My photos | top-1 ↑ | dinov2 | 100.0 |" in (out / "report.md").read_text()
    assert "mine: 100" in capsys.readouterr().out


def test_finished_tasks_are_not_run_again_until_what_they_depend_on_changes(colours, model, command, monkeypatch):
    ran = []
    measure = protocols.evaluate
    monkeypatch.setattr(protocols, "evaluate", lambda task, *rest: ran.append(task.id) or measure(task, *rest))
    words = ["--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out"]
    assert command(*words) == 0
    assert command(*words, "--batch-size", 3) == 0
    assert ran == ["mine"]
    assert command(*words, "--normalize", "protocol") == 0
    assert ran == ["mine"] * 2
    write_task(colours / "mine.yaml", crop=0.5)
    assert command(*words, "--normalize", "protocol") == 0
    assert ran == ["mine"] * 3
    assert command(*words[:1], f"untrained:{model}", *words[2:], "--normalize", "protocol") == 0
    assert ran == ["mine"] * 4
    statistics = read_results(colours / "out").results[0].statistics
    assert statistics[0] == pytest.approx((0.485, 0.456, 0.406))


def test_models_stand_side_by_side_and_features_are_computed_once(colours, model, command, monkeypatch):
    write_task(colours / "logistic.yaml", kind="logistic")
    tasks = ["--tasks", colours / "mine.yaml", colours / "logistic.yaml"]
    untrained = f"untrained:{model}"
    assert command("--model", model, "--teacher", untrained, *tasks, "--out", colours / "out") == 0
    results = read_results(colours / "out")
    assert [(m.label, m.role) for m in results.models] == [(str(model), "model"), (untrained, "teacher")]
    assert results.models[0].weights != results.models[1].weights
    assert set(scores(colours / "out")) == {(m, t) for m in (str(model), untrained) for t in ("mine", "logistic")}
    assert len(list((colours / "out/features").iterdir())) == 4  # two models, two splits; both tasks read them
    logistic = results.score_of(str(model), "logistic")
    assert logistic.protocol == "proteus"
    assert {"C", "validation"} <= set(logistic.figures)


def test_a_task_that_fails_does_not_stop_the_others(colours, model, command, capsys):
    shutil.copytree(colours / "photos", colours / "broken/photos")
    write_task(colours / "broken/theirs.yaml")
    (colours / "broken/photos/test/red/3.png").write_bytes(b"no picture")
    tasks = ["--tasks", colours / "broken/theirs.yaml", colours / "mine.yaml"]
    assert command("--model", model, *tasks, "--out", colours / "out") == 1
    results = read_results(colours / "out")
    assert [result.task for result in results.results] == ["mine"]
    (failed,) = results.not_run
    assert failed.task == "theirs"
    assert "broken/photos/test/red/3.png cannot be read" in failed.why
    assert "failed: theirs" in capsys.readouterr().err
    assert "red/3.png" in (colours / "out/report.html").read_text()
    # Mended, it alone is left to run.
    shutil.copy(colours / "photos/test/red/3.png", colours / "broken/photos/test/red/3.png")
    assert command("--model", model, *tasks, "--out", colours / "out") == 0
    assert not read_results(colours / "out").not_run


def test_an_error_nobody_foresaw_is_kept_with_its_traceback(colours, model, command, monkeypatch):
    write_task(colours / "second.yaml", crop=0.5)

    def evaluate(task, *rest):
        if task.id == "mine":
            raise ZeroDivisionError("in the middle of it")
        return protocols.Outcome(50.0, "dinov2", ((0.0,) * 3, (1.0,) * 3), {}, [])

    monkeypatch.setattr(protocols, "evaluate", evaluate)
    tasks = ["--tasks", colours / "mine.yaml", colours / "second.yaml"]
    assert command("--model", model, *tasks, "--out", colours / "out") == 1
    assert scores(colours / "out") == {(str(model), "second"): 50.0}
    (log,) = (colours / "out/models").glob("*/mine-*.error.txt")
    assert "ZeroDivisionError: in the middle of it" in log.read_text()


def test_an_interruption_loses_the_task_in_hand_alone(colours, model, command, monkeypatch, capsys):
    write_task(colours / "second.yaml", crop=0.5)
    tasks = ["--tasks", colours / "mine.yaml", colours / "second.yaml"]
    measure = protocols.evaluate
    ran = []

    def interrupted(task, *rest):
        ran.append(task.id)
        if task.id == "second" and len(ran) == 2:
            raise KeyboardInterrupt
        return measure(task, *rest)

    monkeypatch.setattr(protocols, "evaluate", interrupted)
    assert command("--model", model, *tasks, "--out", colours / "out") == 130
    assert scores(colours / "out") == {(str(model), "mine"): 100.0}
    assert "the same command goes on from there" in capsys.readouterr().err
    assert command("--model", model, *tasks, "--out", colours / "out") == 0
    assert ran == ["mine", "second", "second"]
    assert len(scores(colours / "out")) == 2


def test_a_half_written_result_is_run_again(colours, model, command):
    words = ["--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out"]
    assert command(*words) == 0
    (path,) = (colours / "out/models").glob("*/mine-*.json")
    Result.model_validate_json(path.read_text())
    path.write_text(path.read_text()[:50])
    assert command(*words) == 0
    assert json.loads(path.read_text())["score"] == 100.0


def test_a_head_is_tested_after_it_is_trained_and_with_all_other_classes_silent(colours, model, command):
    linear = {"settings": {"epochs": 4, "global_batch": 4, "held_out": 0.1}}
    write_task(colours / "probe.yaml", kind="linear", **linear)
    data = {"set": "folder", "root": "photos", "splits": {"test": "only"}}
    write_task(colours / "subset.yaml", kind="transfer", head="probe", data=data)
    shutil.copytree(colours / "photos/test/green", colours / "photos/only/green")
    tasks = ["--tasks", colours / "subset.yaml", colours / "probe.yaml"]
    assert command("--model", model, *tasks, "--out", colours / "out") == 0
    found = scores(colours / "out")
    assert found[str(model), "subset"] == 100.0  # there is one class to choose from
    assert read_results(colours / "out").score_of(str(model), "probe").protocol == "dinov2, changed"


def test_sets_that_are_not_there_are_listed_and_the_rest_runs(colours, model, command, capsys):
    words = ["--model", model, "--out", colours / "out", "--data-root", colours, "--tasks"]
    assert command(*words, "fine-grained", colours / "mine.yaml") == 0
    results = read_results(colours / "out")
    assert [result.task for result in results.results] == ["mine"]
    assert len(results.not_run) == 12
    cub = next(entry.why for entry in results.not_run if entry.task == "cub")
    assert "no CUB_200_2011" in cub
    assert "https://data.caltech.edu" in cub
    assert "about 1.2 GB" in cub
    assert "not run: cub: " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["cub"], ["fine-grained", "--strict"]], ids=["by name", "strict"])
def test_a_set_that_is_asked_for_has_to_be_there(colours, model, command, capsys, words):
    command_line = ["--model", model, "--out", colours / "out", "--data-root", colours, "--tasks", *words]
    assert command(*command_line) == 2
    lines = errors(capsys)
    assert len(lines) == (1 if words == ["cub"] else 12)
    assert any("no CUB_200_2011" in line for line in lines)
    assert not (colours / "out").exists()


def extra_class(root):
    shutil.copytree(root / "photos/test/red", root / "photos/test/blue")


def missing_split(root):
    shutil.rmtree(root / "photos/test")


def too_few(root):
    (root / "photos/train/red/0.png").unlink()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (extra_class, "blue"),
        (missing_split, "no folder"),
        (too_few, "split 'train' has 15 images"),
    ],
    ids=["a class folder too many", "no test split", "an image too few"],
)
def test_data_that_is_not_what_its_task_says_is_one_line(colours, model, command, capsys, damage, line):
    data = {"set": "folder", "root": "photos", "splits": {"train": "train", "test": "test"}, "images": {"train": 16}}
    write_task(colours / "mine.yaml", data=data)
    damage(colours)
    assert command("--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out") == 2
    (said,) = errors(capsys)
    assert said.startswith("error: mine: ")
    assert line in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "dinov2_vits15"], "dinov2_vits14"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--batch-size", "0"], "--batch-size is at least 1"),
        (["--tasks", "cloudy"], "no such task, group or .yaml file"),
        (["--tasks", ","], "--tasks names no task"),
        (["--compare", "untrained:dinov2_vits15"], "dinov2_vits14"),
        (["--teacher", "dinov2_vits14"], "its weights are not on this disk"),
        (["--data-root", "/nowhere"], "--data-root /nowhere: no such folder"),
        (["--out", "/proc/nowhere/out"], "cannot be written"),
    ],
    ids=["model", "no file", "batch size", "task", "no task", "untrained", "no weights", "no data root", "unwritable"],
)
def test_bad_words_are_one_line(colours, model, command, capsys, words, line):
    usual = {"--model": str(model), "--tasks": str(colours / "mine.yaml"), "--out": str(colours / "out")}
    usual |= {words[0]: words[1]}
    assert command(*(word for pair in usual.items() for word in pair)) == 2
    (said,) = errors(capsys)
    assert line in said


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"epoch": 3}, "no setting 'epoch'; did you mean 'epochs'?"),
        ({"epochs": "many"}, "settings.epochs: 'many' cannot stand for 10"),
        ({"epochs": None}, "settings.epochs: None cannot stand for 10"),
        ({"global_batch": 0}, "epochs, global_batch and rates are above 0"),
        ({"held_out": 2.0}, "held_out is 0 to 0.1"),
        ({"workers": 3}, "no setting 'workers'"),
    ],
    ids=["unknown", "text", "none", "batch", "share", "elsewhere"],
)
def test_settings_a_protocol_has_not_are_said_before_any_work(colours, model, command, capsys, settings, line):
    write_task(colours / "probe.yaml", kind="linear", settings=settings)
    tasks = ["--tasks", colours / "mine.yaml", colours / "probe.yaml"]
    assert command("--model", model, *tasks, "--out", colours / "out") == 2
    assert line in errors(capsys)[0]
    assert not list((colours / "out").glob("models/*/*.json"))


DENSE = {
    "kind": "segmentation",
    "metric": "mIoU",
    "presets": {"proteus": "dinov2-lin"},
    "data": {
        "set": "scenes",
        "root": ".",
        "splits": {"train": "train", "test": "test"},
    },
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"settings": {"crop": [32]}}, "settings.crop: (32,) cannot stand for (512, 512)"),
        ({"settings": {"crop": 32}}, "settings.crop: 32 cannot stand for (512, 512)"),
        ({"settings": {"ratios": []}}, "settings.ratios: () cannot stand for"),
        ({"settings": {"shape": "zigzag"}}, "'zigzag' cannot stand for 'line': one of line, cosine"),
        ({"settings": {"clip_grad": -1}}, "settings.clip_grad: -1 cannot stand for None"),
        ({"settings": {"lr": 0}}, "lr, the sizes and ratio_range (smallest, largest) are above 0"),
        ({"settings": {"ratio_range": [2.0, 1.0]}}, "ratio_range (smallest, largest)"),
        ({"presets": {"proteus": "dinov2-lni"}}, "did you mean 'dinov2-lin'?"),
        ({"presets": {"dinov2": "dinov2-lin"}}, "no preset for --protocol proteus"),
        ({"kind": "knn", "metric": "top-1", "presets": {}}, "kind: knn is not measured on the set scenes"),
    ],
    ids=["length", "no list", "empty", "word", "negative", "zero", "order", "preset", "protocol", "kind"],
)
def test_dense_settings_that_make_no_sense_are_one_line(colours, model, command, capsys, change, line):
    write_task(colours / "dense.yaml", **(DENSE | change))
    assert command("--model", model, "--tasks", colours / "dense.yaml", "--out", colours / "out") == 2
    (said,) = errors(capsys)
    assert line in said


def test_results_of_several_protocols_lie_side_by_side(colours, model, command, monkeypatch):
    ran = []
    measure = protocols.evaluate
    monkeypatch.setattr(protocols, "evaluate", lambda task, *rest: ran.append(task.id) or measure(task, *rest))
    linear = {"settings": {"epochs": 4, "global_batch": 4, "held_out": 0.1}}
    write_task(colours / "probe.yaml", kind="linear", **linear)
    data = {"set": "folder", "root": "photos", "splits": {"test": "test"}}
    write_task(colours / "other.yaml", kind="transfer", head="probe", data=data)
    words = ["--model", model, "--tasks", colours / "probe.yaml", colours / "other.yaml", "--out", colours / "out"]
    for normalize in ("own", "protocol", "own"):
        assert command(*words, "--normalize", normalize) == 0
    assert ran == ["probe", "other"] * 2
    assert len(list((colours / "out/models").glob("*/*.head.safetensors"))) == 2


def test_a_score_that_is_no_number_is_a_failure(colours, model, command, monkeypatch):
    nothing = protocols.Outcome(float("nan"), "dinov2", ((0.0,) * 3, (1.0,) * 3), {}, ["no pixel counts"])
    monkeypatch.setattr(protocols, "evaluate", lambda *_: nothing)
    assert command("--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out") == 1
    assert "the score is not a number; no pixel counts" in read_results(colours / "out").not_run[0].why


def test_other_options_of_a_set_are_another_result(colours, model, command, monkeypatch):
    ran = []
    one = protocols.Outcome(50.0, "dinov2", ((0.0,) * 3, (1.0,) * 3), {}, [])
    monkeypatch.setattr(protocols, "evaluate", lambda task, *_: ran.append(task.id) or one)
    for options in ({}, {"classes": ["green", "red"]}, {}):
        data = {"set": "folder", "root": "photos", "splits": {"train": "train", "test": "test"}, "options": options}
        write_task(colours / "mine.yaml", data=data)
        assert command("--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out") == 0
    assert len(ran) == 2


def test_a_folder_in_use_is_left_alone(colours, model, command, capsys, monkeypatch):
    def taken(directory):
        raise run.InputError(f"{directory} is in use by process 1")

    monkeypatch.setattr("proteus.engine.lock.RunLock", taken)
    assert command("--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out") == 2
    assert "in use by process 1" in errors(capsys)[0]


def test_the_list_names_every_task_and_whether_its_data_is_there(colours, command, capsys):
    assert command("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line[:3].strip().isdigit()]) == 19
    assert any("digits-knn" in line for line in lines)
    assert command("--list", "--data-root", colours) == 0
    assert any(
        "cub" in line and "not there: https://data.caltech.edu" in line for line in capsys.readouterr().out.splitlines()
    )


def test_a_result_with_a_figure_that_is_not_a_number_is_a_result(colours, model, command, monkeypatch):
    ran = []

    def evaluate(task, *rest):
        ran.append(task.id)
        return protocols.Outcome(50.0, "dinov2", ((0.0,) * 3, (1.0,) * 3), {"IoU, nowhere": float("nan")}, [])

    monkeypatch.setattr(protocols, "evaluate", evaluate)
    for _ in range(2):
        assert command("--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out") == 0
    assert ran == ["mine"]
    assert read_results(colours / "out").results[0].score == 50.0


def test_other_labels_at_the_same_place_are_other_data(colours, model, command):
    words = ["--model", model, "--tasks", colours / "mine.yaml", "--out", colours / "out"]
    assert command(*words) == 0
    (colours / "photos/test/red").rename(colours / "photos/test/third")
    (colours / "photos/test/green").rename(colours / "photos/test/red")
    (colours / "photos/test/third").rename(colours / "photos/test/green")
    (colours / "photos/test/green/7.png").unlink()
    assert command(*words) == 0
    assert scores(colours / "out")[str(model), "mine"] == 0.0


def test_a_set_that_is_there_and_wrong_is_a_failure(colours, model, command, capsys):
    data = {"set": "folder", "root": "photos", "splits": {"train": "train", "test": "test"}, "images": {"train": 99}}
    shutil.copytree(colours / "photos", colours / "theirs/photos")
    for number in range(12):
        (colours / "theirs/photos/train/red" / f"{number}.txt").write_text("no picture, and none is read")
    write_task(colours / "theirs/wrong.yaml", data=data)
    tasks = ["--tasks", colours / "theirs/wrong.yaml", colours / "mine.yaml"]
    assert command("--model", model, *tasks, "--out", colours / "out") == 2  # asked for by name
    assert "wrong: split 'train' has 16 images" in errors(capsys)[0]
    shutil.copytree(colours / "photos/train", colours / "imagenet-a")
    words = ["--data-root", colours, "--tasks", "robustness", colours / "mine.yaml"]
    assert command("--model", model, *words, "--out", colours / "out") == 0  # in1k is not there, so -A cannot be run
    shutil.copytree(colours / "photos/train", colours / "cub/CUB_200_2011")
    words = ["--data-root", colours, "--tasks", "fine-grained", colours / "mine.yaml"]
    assert command("--model", model, *words, "--out", colours / "out") == 1
    said = {entry.task: entry.why for entry in read_results(colours / "out").not_run}
    assert "CUB_200_2011/images.txt" in said["cub"]
    assert "no fgvc-aircraft-2013b" in said["aircraft"]


def test_a_model_that_is_named_twice_is_refused(colours, model, command, capsys):
    words = ["--model", model, "--teacher", model, "--tasks", colours / "mine.yaml", "--out", colours / "out"]
    assert command(*words) == 2
    assert "is named twice" in errors(capsys)[0]


def test_figures_of_papers_can_stand_beside_a_model(colours, model, command):
    words = ["--compare", "iBOT L/16", "--tasks", colours / "mine.yaml", "--out", colours / "out"]
    assert command("--model", model, *words) == 0
    assert read_results(colours / "out").published == ["iBOT L/16"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_go_on_after_a_failure(colours, model, command):
    shutil.copytree(colours / "photos", colours / "broken/photos")
    (colours / "broken/photos/test/red/3.png").write_bytes(b"no picture")
    write_task(colours / "broken/theirs.yaml")
    write_task(colours / "logistic.yaml", kind="logistic")
    write_task(colours / "probe.yaml", kind="linear", settings={"epochs": 4, "global_batch": 4, "held_out": 0.1})
    names = ["broken/theirs.yaml", "mine.yaml", "logistic.yaml", "probe.yaml"]
    tasks = ["--model", str(model), "--tasks", *(str(colours / name) for name in names), "--out"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", run.__file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *tasks, str(colours / "two")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "failed: theirs" in done.stderr
    assert command(*tasks, colours / "one") == 1
    one, two = scores(colours / "one"), scores(colours / "two")
    assert one.keys() == two.keys() == {(str(model), name) for name in ("mine", "logistic", "probe")}
    assert one == pytest.approx(two)
