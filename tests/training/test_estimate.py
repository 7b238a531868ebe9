"""`--plan`: what a run would cost, said before it is started."""

import re
import time

from tools.train import main


def test_the_plan_of_a_run_counts_and_leaves_nothing(run_here, tmp_path, capsys):
    assert run_here("--plan", "schedule.steps=120", "run.accumulate=2", "data.repeats=1") == 0
    told = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in told.splitlines())
    assert list(lines) == ["teacher", "student", "compute", "memory", "speed", "time"]
    # Per image, by hand: 16 patches of 4 x 4 x 3 and a class token; teacher 2 blocks of 32, student 2 of 16.
    tokens, teach = 17, 2 * 16 * 48 * 32
    teach += 2 * (2 * tokens * 32 * 12 * 32 + 4 * tokens * tokens * 32)
    assert f"of which {teach / 1e9:.3g} GFLOP are the teacher's" in lines["compute"]
    whole = float(re.search(r"; (\S+) FLOP in all", lines["compute"])[1])
    each = float(lines["compute"].split()[0]) * 1e9
    assert abs(whole / (each * 120 * 32) - 1) < 0.06  # both are rounded
    rate = float(lines["speed"].split()[0])
    minutes = float(lines["time"].split()[0])
    assert "10 steps of 32 images" in lines["speed"]
    assert lines["time"].split()[1] == "minutes"
    assert abs(minutes - 120 * 32 / rate / 60) < 0.06
    assert not (tmp_path / "run").exists()


def test_the_plan_of_several_students_names_each(run_here, capsys):
    vit = "{name: timm/vit_tiny_patch16_224, arch: {patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}}"
    assert run_here("--plan", "student=null", f"students=[{vit}, {vit}]") == 0
    lines = capsys.readouterr().out.splitlines()
    students = [line for line in lines if line.startswith("student")]
    assert len(students) == 2
    assert students[0].split(",")[1:] == students[1].split(",")[1:]


def test_students_of_other_patches_are_planned_where_no_patches_are_compared(run_here, capsys):
    vit = "{name: timm/vit_tiny_patch16_224, arch: {patch_size: %d, embed_dim: 16, depth: 1, num_heads: 2}}"
    assert run_here("--plan", "student=null", f"students=[{vit % 4}, {vit % 8}]", "losses={token: 1.0}") == 0
    assert sum(line.startswith("student") for line in capsys.readouterr().out.splitlines()) == 2


def test_bad_input_is_said_before_anything_is_measured(tiny, capsys):
    assert main([f"--cfg={tiny}", "--plan", "student.name=proteus_vitx14"]) == 2
    assert "student.name" in capsys.readouterr().err


def test_what_was_loaded_before_the_clock_started_does_not_count(run_here, monkeypatch, capsys):
    from proteus.data.loader import TrainingSet

    batch = TrainingSet.batch
    monkeypatch.setattr(TrainingSet, "batch", lambda *args: time.sleep(0.2) or batch(*args))
    assert run_here("--plan", "data.workers=2", "data.augment.auto_augment=null", "run.batch_size=8") == 0
    speed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("speed"))
    assert float(speed.split()[1]) < 1.2 * 2 * 8 / 0.2  # what two workers can load
