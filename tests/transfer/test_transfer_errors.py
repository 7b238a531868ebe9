"""Bad input to tools/transfer.py: one line that says what, where and what to do, status 2, and what is there stays."""

import json
import os
import shutil

import pytest
from PIL import Image


def _error(capsys) -> list[str]:
    said = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in said)
    return [line for line in said if line.startswith("error: ")]


CASES = {
    "an unknown key": (["adapt.rate=1"], "unknown key 'adapt.rate'"),
    "epochs": (
        ["transfer.schedule={epochs: 3}"],
        "transfer.schedule: give steps, not epochs: methods are compared at equal steps",
    ),
    "no transfer set": (["transfer.own=false"], "transfer: no images to transfer on: give transfer.data, or own=true"),
    "a head for the teacher": (["teacher.head=x.pth"], "teacher.head has no place here"),
    "another normalisation": (["teacher.normalize=clip"], "teacher.normalize=clip has no place here"),
    "no prediction": (
        ["transfer.losses={token: 1}"],
        "transfer.losses: logits_kl, what makes the transfer task-orient",
    ),
    "an unknown loss": (["transfer.losses={logits_kl: 1.0, tokn: 1.0}"], "unknown loss 'tokn'; did you mean 'token'?"),
    "two budgets": (["target.train.images=30"], "give either per_class or images"),
    "an unknown method": (["--compare=oriented,fast"], "--compare fast: no such method; there are oriented, single_s"),
    "a missing student": (["pretrained={dino: dino.pth}"], "pretrained.dino=dino.pth: no such file"),
    "an unknown student": (["student.name=proteus_vits"], "student.name: unknown model 'proteus_vits'; did you mean"),
    "no weights": (
        ["teacher.name=dinov2_vits14", "teacher.checkpoint=null", "teacher.arch={}"],
        "teacher dinov2_vits14:",
    ),
    "an unknown set": (["target.set=digit"], "no data set 'digit'; did you mean 'digits'?"),
    "no data root": (["transfer.data={kind: folder}"], "transfer.data.root is not set: transfer.data.root=PATH takes"),
    "an empty transfer set": (["transfer.data={kind: folder, root: EMPTY}"], "no images under"),
    "labels of the unlabelled": (
        ["transfer.losses={logits_kl: 1, label_ce: 1}"],
        "label_ce needs labels, and the trans",
    ),
    "labels alone at once": (["single_stage.ce_weight=1"], "single_stage.ce_weight: input should be less than 1"),
    "a size no patch divides": (["student.image_size=18"], "student: image_size=18:"),
    "a student of another width": (["pretrained={x: benchmarks/demo/teacher.safetensors}"], "pretrained.x: "),
    "a file for a folder": (["run.dir=README.md/x"], "run.dir: README.md/x cannot be made: Not a directory"),
    "a name that is no folder's": (["pretrained={../x: a.pth}"], "tiny.yaml: pretrained"),
    "no method": (["--compare="], "--compare : no such method"),
    "fp16 on a CPU": (["run.precision=fp16"], "run.precision=fp16 needs a GPU"),
}


@pytest.mark.parametrize(("words", "told"), CASES.values(), ids=CASES.keys())
def test_one_line_before_anything_is_trained(transfer_here, tmp_path, capsys, words, told):
    (tmp_path / "empty").mkdir()
    words = [word.replace("EMPTY", str(tmp_path / "empty")) for word in words]
    assert transfer_here(*words) == 2
    (said,) = _error(capsys)
    assert told in said
    assert not list(tmp_path.rglob("checkpoints"))


def test_everything_missing_is_told_at_once(transfer_here, capsys):
    assert transfer_here("student.name=nothing", "pretrained={a: a.pth}", "transfer.data={kind: folder}") == 2
    assert len(_error(capsys)) == 3


def test_a_label_file_with_an_unknown_class(transfer_here, tmp_path, capsys):
    for index in range(8):
        Image.new("RGB", (16, 16), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "train.csv").write_text("0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog\n")
    (tmp_path / "test.csv").write_text("4.png,cat\n5.png,dgo\n")
    target = f"target={{set: listed, root: {tmp_path}, train: {{split: {tmp_path}/train.csv}}, val: null, "
    assert transfer_here(f"{target} test: {{split: {tmp_path}/test.csv}}}}") == 2
    (said,) = _error(capsys)
    assert "test.csv" in said
    assert "dgo" in said
    assert not list(tmp_path.rglob("checkpoints"))


def test_stages_survive_a_later_error(transfer_here, done, capsys):
    folder = done
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert transfer_here("transfer.data={kind: folder, root: nowhere}") == 2
    assert "transfer.data.root=nowhere: no such folder" in _error(capsys)[0]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_stage_file(transfer_here, done, capsys):
    (done / "adapt" / "stage.json").write_text('{"steps": ')
    assert transfer_here() == 2
    assert "stage.json cannot be read" in _error(capsys)[0]


@pytest.mark.parametrize("text", ["[]", "{}", '{"steps": 3}'])
def test_a_stage_file_of_another_form(transfer_here, done, capsys, text):
    (done / "adapt" / "stage.json").write_text(text)
    assert transfer_here() == 2
    assert "delete" in _error(capsys)[0]


@pytest.mark.parametrize("change", ["gone", "other"])
@pytest.mark.parametrize("file", ["student.safetensors", "head.safetensors"])
def test_outputs_that_are_not_what_the_stage_left(transfer_here, done, capsys, file, change):
    path = done / "oriented" / "transfer" / file
    content = path.read_bytes()
    path.unlink()
    if change == "other":
        path.write_bytes(content[:-4] + bytes(4))
    shutil.rmtree(done / "oriented" / "finetune")
    assert transfer_here() == 2
    assert f"{path} is not what the stage left: delete {path.parent}" in _error(capsys)[0]


def test_a_damaged_test_score_is_measured_again(transfer_here, done, tmp_path):
    path = done / "adapt" / "test.json"
    for text in ("[]", '{"identity": 3}', '{"identity": "x", "test": "good"}', "{"):
        path.write_text(text)
        assert transfer_here() == 0
    assert json.loads(path.read_text())["test"] == json.loads((tmp_path / "run/results.json").read_text())[0]["test"]


def test_a_stage_that_learns_nothing_is_an_error(transfer_here, tmp_path, capsys):
    assert transfer_here("transfer.losses.logits_kl=1e300") == 1
    (said,) = _error(capsys)
    assert f"{tmp_path}/run/seed_1/oriented/transfer: 6 of the last 6 steps had a loss or gradient that was not" in said
    assert not (tmp_path / "run/seed_1/oriented/transfer/stage.json").exists()


def test_a_labelled_image_that_cannot_be_read_stops_the_stage(transfer_here, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (16, 16), (60 * index, 99, 0)).save(tmp_path / "set" / name / f"{index}.png")
    (tmp_path / "set" / "dog" / "2.png").write_bytes(b"no image")
    assert transfer_here(f"target={{root: {tmp_path / 'set'}, train: {{split: '.'}}}}") == 2
    assert "1 of 8 images cannot be read" in _error(capsys)[0]


def test_pixels_that_are_all_ignored_have_no_score(transfer_here, tmp_path, capsys):
    for part, value in (("train", 1), ("val", 255)):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (32, 32), (80 * index, 9, 9)).save(tmp_path / part / "images" / f"{index}.png")
            Image.new("L", (32, 32), value).save(tmp_path / part / "masks" / f"{index}.png")
    options = "set: folder-segmentation, options: {classes: [a, b]}"
    splits = f"root: {tmp_path}, train: {{split: train}}, val: {{split: val}}"
    assert transfer_here("task=segmentation", "image_size=32", f"target={{{options}, {splits}}}") == 2
    assert "no pixel of the 3 images from" in _error(capsys)[0]


def test_a_full_or_broken_disk_is_one_line(transfer_here, capsys, monkeypatch):
    from proteus.transfer import pipeline

    def full(*_):
        raise OSError(28, "No space left on device", "results.json")

    monkeypatch.setattr(pipeline, "open_splits", full)
    assert transfer_here() == 1
    assert _error(capsys) == ["error: results.json: No space left on device"]


def test_an_interrupt_between_stages_is_one_line(transfer_here, capsys, monkeypatch):
    from proteus.transfer import pipeline

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "open_splits", interrupted)
    assert transfer_here() == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_an_unreadable_test_image_leaves_what_is_trained(transfer_here, tmp_path, capsys):
    for part, count in [("train", 6), ("test", 2)]:
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for index in range(count):
                colour = (40 * index, 200 * (name == "cat"), 0)
                Image.new("RGB", (16, 16), colour).save(tmp_path / "set" / part / name / f"{index}.png")
    broken = tmp_path / "set" / "test" / "dog" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    target = (
        f"target={{set: folder, root: {tmp_path / 'set'}, train: {{split: train}}, val: null, test: {{split: test}}}}"
    )
    assert transfer_here(target) == 2
    (said,) = _error(capsys)
    assert str(broken) in said
    assert len(list(tmp_path.rglob("stage.json"))) == 3
    broken.write_bytes(whole)
    os.utime(broken)
    assert transfer_here(target) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())[1]["test"] <= 1
