"""The comparison with a peer: a process that makes a step when asked, and the table of both sides."""

import json
import sys

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from benchmarks.speed import extract, peer
from tests.benchmarks.test_speed_step import KEYS, NAME

# The other side's manners without what it trains: versions, then a line for each line.
CHILD = """
import json, sys, time
asked = json.loads(sys.argv[1])
assert asked["precision"] in ("32-true", "bf16-mixed") and asked["method"] == "distillation", asked
print(json.dumps({"lightly_train": "0.18.0", "method": "DistillationV3"}), flush=True)
for number, line in enumerate(sys.stdin):
    seconds = 100.0 if asked["precision"] == "32-true" else 50.0
    print(json.dumps(1000.0 if number < 1 else seconds), flush=True)
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()


@pytest.fixture
def photos(tmp_path):
    """Six images of random pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return folder


def call(photos, child, *words):
    ours = ["--our-teacher", NAME, "--our-student", NAME, "--image-size", "16", "--threads", "1"]
    return peer.main(
        ["--python", sys.executable, "--root", str(photos), "--child", str(child), *ours, *words, "--set", *KEYS]
    )


def test_both_sides_take_turns_and_are_compared_in_their_precision(photos, tmp_path, capsys):
    child, out = tmp_path / "child.py", tmp_path / "peer.json"
    child.write_text(CHILD)
    assert call(photos, child, "--rounds", "3", "--warm-up", "1", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["peer"] == {"lightly_train": "0.18.0", "method": "DistillationV3"}
    assert found["times"]["LightlyTrain, bf16"] == [50.0] * 3  # the first one was to warm up
    assert len(found["times"]) == 6
    for precision, theirs in (("float32", 100), ("bf16", 50)):
        for losses in ("token + feature", "token + feature + patch"):
            row = found["summary"][f"ours, {losses}, {precision}"]
            assert 0 < row["ratio"] == pytest.approx(row["seconds"] / theirs)
    shown = capsys.readouterr().out
    assert "method DistillationV3" in shown
    assert "| LightlyTrain, float32 | 100.000 | 1.00 |" in shown


def test_token_and_feature_alone_leave_the_masked_pass_out(photos):
    from benchmarks.speed.ours import OurStep, build_teacher, recipe
    from proteus.data.sources import FolderSource

    rows = []
    for losses in peer.LOSSES.values():
        cfg = recipe(NAME, NAME, 4, 16, [*KEYS, *losses])
        step = OurStep(cfg, build_teacher(cfg), FolderSource(photos, use_labels=False))
        block = step.learners[0].task.student.network.blocks[0]
        block.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
        rows.append(sorted(step()))
    assert rows == [4, ["feature", "token"], 6, ["feature", "patch", "token"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [("raise SystemExit('no module named lightly_train')", "no module named lightly_train"), ("", "ended")],
)
def test_a_peer_that_ends_is_told(photos, tmp_path, capsys, text, said):
    child = tmp_path / "child.py"
    child.write_text(text)
    assert call(photos, child, "--rounds", "1") == 2
    assert said in capsys.readouterr().err


def test_a_python_that_is_not_there_is_told(photos, capsys):
    assert peer.main(["--python", "/nowhere/python", "--root", str(photos), "--threads", "1"]) == 2
    assert capsys.readouterr().err == "error: --python /nowhere/python: No such file or directory\n"


def test_extract_finds_the_tokens_of_the_plain_loop(photos, tmp_path, capsys):
    out = tmp_path / "extract.json"
    words = ["--root", str(photos), "--model", "proteus_vitt14", "--image-size", "28", "--batch", "4", "--workers", "0"]
    assert extract.main([*words, "--rounds", "2", "--threads", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["images"] == 6
    assert found["difference"] < 1e-5
    ours, plain = (found["summary"][name] for name in (extract.OURS, extract.PLAIN))
    assert plain["speedup"] == 1
    assert ours["seconds"] > 0
    assert f"| {ours['speedup']:.2f} |" in capsys.readouterr().out
