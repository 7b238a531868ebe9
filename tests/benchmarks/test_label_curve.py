"""The curve over label budgets: what it tables, what it draws, what it refuses."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.label_curve import budget_table, draw_curve, main
from proteus.transfer.pipeline import TEACHER, Result


def _rows(oriented: list[float], teacher: list[float]) -> list[Result]:
    rows = [Result("oriented", "task-oriented", seed, test, None, 10, 1, "") for seed, test in enumerate(oriented)]
    return rows + [Result(TEACHER, "the teacher", seed, test, None, 0, 1, "") for seed, test in enumerate(teacher)]


RESULTS = {1: _rows([0.5, 0.6, 0.7], [0.8, 0.8, 0.8]), 5: _rows([0.9, 0.9, 0.9], [0.95, 0.97, 0.99])}


def test_a_row_a_method_and_a_column_a_budget():
    lines = budget_table(RESULTS).splitlines()
    assert lines[0] == "| labels of each class | 1 | 5 |"
    assert lines[2] == "| the teacher | 80.0 ± 0.0 | 97.0 ± 2.0 |"
    assert lines[3] == "| task-oriented | 60.0 ± 10.0 | 90.0 ± 0.0 |"


def test_the_picture_has_a_line_a_method(tmp_path: Path):
    draw_curve(RESULTS, "accuracy", tmp_path / "curve.png")
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).reshape(-1, 3)
    for colour in ((31, 95, 168), (107, 114, 128)):  # the first method's, and the teacher's grey
        assert (abs(pixels.astype(int) - colour).max(axis=1) < 12).sum() > 50


def test_bad_budgets_are_one_line(capsys):
    assert main(["--cfg=transfer/digits.yaml", "--per-class=0,5"]) == 2
    assert capsys.readouterr().err == "error: --per-class 0,5: expected numbers above 0, such as 1,2,5\n"


def test_what_cannot_be_compared_is_told_before_anything_is_trained(capsys, tmp_path):
    digits = ["--cfg=transfer/digits.yaml", f"run.dir={tmp_path / 'run'}"]
    assert main([*digits, "--per-class=200,1000"]) == 2
    assert "--per-class 1000: there are no more than" in capsys.readouterr().err
    assert main([*digits, "--per-class=1", "target.test=null"]) == 2
    assert "needs task=classification and a target.test" in capsys.readouterr().err
    assert not (tmp_path / "run" / "per_class_200").exists()
