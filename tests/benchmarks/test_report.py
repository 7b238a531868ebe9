"""What a report says of given results."""

import re

import numpy as np
import pytest
from PIL import Image

from benchmarks import report
from benchmarks.published import Published
from benchmarks.result import Model, NotRun, Picture, Result, Results, TaskFacts, write_json

FINE_GRAINED = [
    "aircraft",
    "caltech101",
    "cars",
    "cifar10",
    "cifar100",
    "dtd",
    "flowers",
    "food",
    "pets",
    "sun397",
    "voc2007",
    "cub",
]
STUDENT, TEACHER = "runs/x/student.safetensors", "dinov2_vitb14"


def task(name, group="fine-grained", kind="logistic", direction="higher"):
    return TaskFacts(
        task=name,
        title=name.upper(),
        group=group,
        kind=kind,
        metric="top-1" if kind != "depth" else "RMSE",
        direction=direction,
        smoke=group == "embedded",
        paper=group in ("fine-grained", "dense"),
        published=name,
    )


def results(scores, tasks, **facts):
    """Results from {(model label, task): score}; the first model is the model, the second its teacher."""
    roles = {STUDENT: ("model", "proteus_vits14", 22), TEACHER: ("teacher", "dinov2_vitb14", 88)}
    labels = list(dict.fromkeys(label for label, _ in scores))
    models = [
        Model(label=label, role=role, name=name, weights="ab" * 32, parameters=millions * 10**6, image_size=224)
        for label in labels
        for role, name, millions in [roles.get(label, ("compared", label, 1))]
    ]
    protocols = {"segmentation": "proteus-upernet", "depth": "proteus-dpt", "logistic": "proteus"}
    kinds = {t.task: t.kind for t in tasks}
    found = [
        Result(
            key="k",
            task=name,
            model=label,
            score=score,
            protocol=protocols.get(kinds[name], "dinov2"),
            normalize="own",
            statistics=((0, 0, 0), (1, 1, 1)),
            seconds=12.3,
        )
        for (label, name), score in scores.items()
    ]
    return Results(
        **{
            "proteus": "0.1.0",
            "command": "python benchmarks/run.py",
            "created": "2026-01-01 00:00",
            "device": "CPU",
            "normalize": "own",
            "models": models,
            "tasks": tasks,
            "results": found,
            "not_run": [],
        }
        | facts
    )


def rows(content):
    return {row.title: row for section in report.page(content).sections for row in section.rows}


def test_a_row_has_the_difference_to_teacher_and_papers_and_the_share_kept():
    tasks = [task("cars"), task("nyu-depth-v2", "dense", "depth", "lower")]
    scores = {(STUDENT, "cars"): 66.0, (TEACHER, "cars"): 88.0}
    scores |= {(STUDENT, "nyu-depth-v2"): 0.4, (TEACHER, "nyu-depth-v2"): 0.3}
    found = rows(results(scores, tasks))
    cars, nyu = found["CARS"], found["NYU-DEPTH-V2"]
    assert (cars.score, cars.kept, cars.metric) == ("66.0", "75.0%", "top-1 ↑")
    assert cars.others == [report.Cell("88.0", "-22.0", False)]
    # Proteus-S/14 reaches 77.0 and DINOv2-B/14 88.1 in the paper.
    assert cars.published == [report.Cell("77.0", "-11.0", False), report.Cell("88.1", "-22.1", False)]
    # Of an error less is better: 0.3 / 0.4 is kept.
    assert (nyu.score, nyu.kept, nyu.metric) == ("0.400", "75.0%", "RMSE ↓")
    assert nyu.others == [report.Cell("0.300", "+0.100", False)]
    assert nyu.published == [report.Cell("0.350", "+0.050", False), report.Cell("0.281", "+0.119", False)]


def test_published_figures_of_another_protocol_stand_beside_nothing():
    found = rows(results({(STUDENT, "cars"): 66.0}, [task("cars")]))
    assert found["CARS"].published == [report.Cell("77.0", "-11.0", False)]
    changed = results({(STUDENT, "cars"): 66.0}, [task("cars")])
    changed.results[0].protocol = "proteus, changed"
    assert rows(changed)["CARS"].published == [report.Cell()]


def test_the_average_is_of_all_twelve_or_of_none():
    scores = {(STUDENT, name): 60.0 + number for number, name in enumerate(FINE_GRAINED)}
    tasks = [task(name) for name in FINE_GRAINED]
    average = rows(results(scores, tasks))["Average of the twelve"]
    assert average.score == "65.5"
    assert average.published == [report.Cell("85.8", "-20.3", False)]
    del scores[STUDENT, "cub"]
    assert "Average of the twelve" not in rows(results(scores, tasks))


def test_the_summary_keeps_smoke_tests_out_of_the_share_where_there_is_anything_else():
    tasks = [task("cars"), task("digits", "embedded")]
    scores = {(STUDENT, "cars"): 50.0, (TEACHER, "cars"): 100.0}
    scores |= {(STUDENT, "digits"): 90.0, (TEACHER, "digits"): 100.0}
    summary = dict(report.page(results(scores, tasks)).summary)
    assert summary["Of the teacher's score kept, mean of 1 task"] == "50.0%"
    assert summary["Share of the teacher's parameters"] == "25%"
    only_smoke = {key: score for key, score in scores.items() if key[1] == "digits"}
    assert dict(report.page(results(only_smoke, tasks)).summary)["Of the teacher's score kept, mean of 1 task"] == (
        "90.0%"
    )


@pytest.mark.parametrize("score", [0.0, float("nan")])
def test_degenerate_scores_do_not_break_the_report(tmp_path, score):
    tasks = [task("cars"), task("pets"), task("dtd")]
    scores = {(label, t.task): score for label in (STUDENT, TEACHER) for t in tasks}
    content = results(scores, tasks)
    content.results[0].figures = {"IoU of a class that is nowhere": score}
    report.write_report(content, tmp_path)
    assert "CARS" in (tmp_path / "report.html").read_text()
    write_json(tmp_path / "results.json", content)
    assert report.read_results(tmp_path).model_dump_json() == content.model_dump_json()


def test_the_page_needs_nothing_else_and_names_what_was_not_run(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "ade.png")
    tasks = [task("cars"), task("pets"), task("digits", "embedded"), task("ade20k", "dense", "segmentation")]
    content = results(
        {(label, t.task): 50.0 for label in (STUDENT, TEACHER, "other<b>") for t in tasks},
        tasks,
        not_run=[NotRun(task="in-a", model="", why="no imagenet-a under /data; get it from <there>")],
    )
    content.results[3].pictures = [Picture(title="image, target, prediction", file="ade.png")]
    content.results[0].warnings = ["3 of 45 fits did not converge"]
    report.write_report(content, tmp_path)
    html, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert html.count("<svg") >= 2
    assert html.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "other<b>" not in html
    assert "other&lt;b&gt;" in html
    for text in (html.replace("&#39;", "'"), markdown):
        assert "in-a" in text
        assert "no imagenet-a under /data" in text
        assert "3 of 45 fits did not converge" in text
        assert "smoke test" in text
        assert "abababababab" in text
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # every row has every column


def test_results_are_rendered_again_from_their_file(tmp_path, capsys):
    content = results({(STUDENT, "cars"): 66.0}, [task("cars")])
    write_json(tmp_path / "results.json", content)
    assert report.read_results(tmp_path) == content
    assert report.main([str(tmp_path)]) == 0
    assert "66.0" in (tmp_path / "report.md").read_text()
    (tmp_path / "results.json").write_text('{"half":')
    assert report.main([str(tmp_path)]) == 2
    assert report.main([str(tmp_path / "nowhere")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)


def test_published_averages_are_the_means_of_the_twelve():
    published = Published()
    checked = 0
    for (model, name, protocol), figure in published:
        of_twelve = [published.of(model, task, protocol) for task in FINE_GRAINED]
        if name == "fine-grained" and all(of_twelve):
            assert figure.score == pytest.approx(np.mean([one.score for one in of_twelve]), abs=0.051)
            checked += 1
    assert checked == 14
    assert {figure.source for _, figure in published} == set(published.sources)


def test_models_that_are_only_published_get_a_column_of_their_own():
    tasks = [task("ade20k", "dense", "segmentation")]
    found = rows(results({(STUDENT, "ade20k"): 45.0}, tasks, published=["DeiT S/16", "iBOT L/16"]))["ADE20K"]
    assert found.published == [
        report.Cell("50.0", "-5.0", False),
        report.Cell("42.5", "+2.5", True),
        report.Cell(),  # of another protocol
    ]


def test_a_published_average_alone_is_shown_where_the_twelve_are():
    scores = {("proteus_vitt14", name): 80.0 for name in FINE_GRAINED}
    content = results(scores, [task(name) for name in FINE_GRAINED])
    content.models[0].role = "model"
    assert rows(content)["Average of the twelve"].published == [report.Cell("80.2", "-0.2", False)]


def test_odd_names_break_neither_table_nor_charts(tmp_path):
    tasks = [task("cars"), task("pets"), task("dtd")]
    tasks[0].title = "a|b"
    labels = [STUDENT, TEACHER, "_hidden", "$x{", *(f"model {i}" for i in range(5))]
    report.write_report(results({(label, t.task): 50.0 for label in labels for t in tasks}, tasks), tmp_path)
    assert "a\\|b" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count("<svg") == 2
