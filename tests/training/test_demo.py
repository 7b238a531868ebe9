"""The demo keeps what it promises: a small shipped teacher, and a student that has most of it without a label."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.demo import table
from proteus.config_files import load_config
from proteus.models import create_model
from tests.training.conftest import ROOT

TEACHER = ROOT / "benchmarks/demo/teacher.safetensors"


def test_the_shipped_teacher_is_small_and_knows_digits():
    assert TEACHER.stat().st_size <= 2_000_000
    assert all(tensor.dtype == torch.float16 for tensor in load_file(TEACHER).values())
    cfg = load_config("demo.yaml")
    teacher = create_model(cfg.teacher.name, checkpoint=str(TEACHER), **cfg.teacher.arch)
    student = create_model(cfg.student.name, image_size=cfg.data.image_size, **cfg.student.arch)
    score = table.measure("teacher", teacher, cfg)
    assert score.linear > 0.97
    assert score.knn > 0.97
    assert sum(p.numel() for p in student.network.parameters()) <= score.parameters / 3


def test_the_demo_learns_without_labels():
    assert set(load_config("demo.yaml").active_losses) == {"token", "patch", "feature"}
    assert load_config("demo/supervised.yaml").schedule == load_config("demo.yaml").schedule  # as many steps


@pytest.mark.slow
def test_the_student_keeps_what_the_readme_says(run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_here(cfg="demo.yaml", directory="distilled") == 0
    assert run_here(cfg="demo/supervised.yaml", directory="supervised") == 0
    teacher, distilled, supervised, untrained = table.scores(tmp_path / "distilled", tmp_path / "supervised")
    assert distilled.linear >= 0.95 * teacher.linear
    assert distilled.linear > untrained.linear + 0.1
    assert distilled.knn > untrained.knn + 0.4
    assert supervised.linear > 0.9
    text = table.render([teacher, distilled, supervised, untrained])
    assert f"keeps {distilled.linear / teacher.linear:.1%}" in text


def test_a_table_without_runs_says_what_to_do(tmp_path, capsys):
    assert table.main([str(tmp_path / "nothing"), str(tmp_path / "either")]) == 2
    assert "make demo trains both" in capsys.readouterr().err
