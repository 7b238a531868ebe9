"""Several students from one pass of the teacher: each learns to the bit what it would learn alone."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from proteus.training.teacher import Teacher
from tests.training.conftest import TINY, read_log

SMALL = {
    "name": "timm/vit_tiny_patch16_224",
    "arch": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2},
}
WIDE = {"name": "timm/vit_tiny_patch16_224", "arch": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}}
NAMES = ["timm_vit_tiny_patch16_224", "timm_vit_tiny_patch16_224_2"]


def tiny_tree():
    tree = yaml.safe_load(TINY)
    tree["run"]["precision"] = "no"  # which YAML 1.1 reads as false
    return tree


@pytest.fixture
def several(tmp_path):
    """Write the tiny run with some students in place of its one: several([SMALL, WIDE]) -> path."""

    def write(students, **sections):
        tree = tiny_tree() | {"students": students} | sections
        del tree["student"]
        path = tmp_path / "several.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def alone(tmp_path, student):
    path = tmp_path / "alone.yaml"
    path.write_text(yaml.safe_dump(tiny_tree() | {"student": student}))
    return path


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_each_ends_as_it_would_alone(run_here, several, tmp_path, monkeypatch, precision):
    answers, answer = [], Teacher.answer
    monkeypatch.setattr(Teacher, "answer", lambda *args: answers.append(1) or answer(*args))
    common = [f"run.precision={precision}", "optimizer.clip_grad=0.5", "run.accumulate=2", "run.batch_size=8"]
    assert run_here(*common, cfg=several([SMALL, WIDE]), directory="both") == 0
    assert len(answers) == 12 * 2  # one pass a micro-batch, whatever the number of students
    for name, student in zip(NAMES, (SMALL, WIDE), strict=True):
        assert run_here(*common, cfg=alone(tmp_path, student), directory=name) == 0
        for file in ("student.safetensors", "student_ema.safetensors"):
            both = load_file(tmp_path / "both" / "students" / name / file)
            single = load_file(tmp_path / name / file)
            assert both.keys() == single.keys()
            for key, value in single.items():
                assert torch.equal(both[key], value), key
        for one, two in zip(read_log(tmp_path / name), read_log(tmp_path / "both"), strict=True):
            for part in ("token", "patch", "feature"):
                assert two[f"loss_{name}/{part}"] == one[f"loss_{part}"]
            assert two[f"grad_norm_{name}"] == one["grad_norm"]
    assert not (tmp_path / "both" / "student.safetensors").exists()


def test_a_resumed_run_ends_bit_identical(run_here, several, tmp_path):
    path = several([SMALL, WIDE])
    assert run_here(cfg=path, directory="whole") == 0
    assert run_here("schedule.steps=12", "run.keep=9", cfg=path, directory="broken") == 0
    broken = tmp_path / "broken"
    for folder in ("step_10", "step_12"):
        for file in sorted((broken / "checkpoints" / folder).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (broken / "checkpoints" / folder).rmdir()
    assert run_here("run.keep=9", cfg=path, directory="broken") == 0
    for name in NAMES:
        for file in ("student.safetensors", "student_ema.safetensors"):
            there = (tmp_path / d / "students" / name / file for d in ("whole", "broken"))
            whole, resumed = (load_file(path) for path in there)
            assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_step_that_one_skips_the_other_takes(run_here, several, tmp_path, monkeypatch):
    from proteus.training import learner

    finite_step, calls = learner.finite_step, []

    def spoilt(accelerator, optimizer, clip):
        calls.append(1)
        if len(calls) == 5:  # the third step of the first student
            optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
        return finite_step(accelerator, optimizer, clip)

    monkeypatch.setattr(learner, "finite_step", spoilt)
    assert run_here("run.save_every=3", "schedule.steps=3", cfg=several([WIDE, WIDE]), directory="both") == 0
    rows = read_log(tmp_path / "both")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1]
    assert rows[2][f"loss_{NAMES[0]}/token"] is None
    assert rows[2][f"loss_{NAMES[1]}/token"] > 0
    folder = tmp_path / "both" / "checkpoints" / "step_3"
    assert json.loads((folder / "progress.json").read_text())["skipped_steps"] == [3]
    first, second = (load_file(folder / "students" / name / "model.safetensors") for name in NAMES)
    assert not torch.equal(
        first["student.network.blocks.0.attn.qkv.weight"], second["student.network.blocks.0.attn.qkv.weight"]
    )


def test_the_probe_looks_at_each(run_here, several, tmp_path):
    path = several([SMALL, WIDE], probe={"split": "test", "every_epochs": 1, "images": 20, "bank": 60, "pictures": 2})
    assert run_here("schedule.steps=4", cfg=path, directory="both") == 0
    rows = [json.loads(line) for line in (tmp_path / "both" / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if f"{NAMES[0]}/cosine_cls" in row][-1]
    assert last["step"] == 4
    for name in NAMES:
        assert {f"{name}/{key}" for key in ("cosine_cls", "cosine_patch", "knn_student", "knn_teacher")} <= last.keys()
        assert (tmp_path / "both" / "students" / name / "pictures" / "step_4.png").is_file()
    assert last[f"{NAMES[0]}/cosine_cls"] != last[f"{NAMES[1]}/cosine_cls"]


def test_students_that_see_other_views_are_refused(run_here, several, capsys):
    coarse = {**WIDE, "arch": {**WIDE["arch"], "patch_size": 8}}
    assert run_here(cfg=several([SMALL, coarse])) == 2
    assert "needs views of 16 px and masks of 4 x 4 patches" in capsys.readouterr().err
    coarse["image_size"] = 16
    assert run_here(cfg=several([SMALL, coarse])) == 2  # masks of 2 x 2 patches


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["run.precision=fp16"], "students: with run.precision=fp16 they would share one loss scale"),
        (["student.name=timm/vit_tiny_patch16_224"], "give either student or students"),
        (["students.1.nam=x"], "unknown key 'students.1.nam'; did you mean 'students.1.name'?"),
        (["students.1.name=proteus_vitx14"], "students.1.name: "),
        (["students.0.checkpoint=nowhere.safetensors"], "students.0.checkpoint=nowhere.safetensors: no such file"),
    ],
    ids=["fp16", "both keys", "unknown key", "unknown name", "missing file"],
)
def test_what_is_wrong_with_students_is_one_line(run_here, several, capsys, overrides, told):
    assert run_here(*overrides, cfg=several([SMALL, WIDE])) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
