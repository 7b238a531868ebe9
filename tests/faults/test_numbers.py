"""Numbers that are not finite: such a step leaves no trace, and a run of which too many are such ends with a report."""

import json
import multiprocessing
import re
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from proteus.data.transforms import Box, fill_boxes
from proteus.training import loop, nonfinite, start
from proteus.training.learner import Learner, Outcome
from proteus.training.task import Distillation
from tests.faults.runs import _run_tool, assert_same_end, warm_up
from tests.training.conftest import read_log

STEPS = "schedule.steps=6"
NORMED = ("student.name=tests.faults.test_numbers:normed", "student.arch={width: 12}", "teacher.standardize=true")
NAN, INF = float("nan"), float("inf")


def normed(width: int) -> nn.Module:
    """A network with batch statistics."""
    return nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, width, 1))


def spoil(replace: Callable, kind: str, steps: tuple[int, ...], rank: int = 0, micro: int = 0) -> None:
    """Let the token loss, or its gradient alone, be not finite in some steps of one process."""
    learn, forward, now = Learner.learn, Distillation.forward, [False]

    def noting(self, batch, answers, step, at):
        now[0] = step in steps and at == micro and self._accelerator.process_index == rank
        learn(self, batch, answers, step, at)

    def spoilt(self, *args):
        losses = forward(self, *args)
        if now[0]:
            token = losses["token"]
            losses["token"] = {"loss": token + INF, "nan": token * NAN, "gradient": token + (token * 0).sqrt()}[kind]
        return losses

    replace(Learner, "learn", noting)
    replace(Distillation, "forward", spoilt)


def leave_out(replace: Callable, steps: tuple[int, ...]) -> None:
    """Do nothing in some steps."""
    learn, update, now = Learner.learn, Learner.update, [0]

    def maybe_learn(self, batch, answers, step, micro):
        now[0] = step
        if step not in steps:
            learn(self, batch, answers, step, micro)

    def maybe_update(self, rate):
        if now[0] not in steps:
            return update(self, rate)
        nothing = torch.tensor(NAN)
        return Outcome([dict.fromkeys(("token", "patch", "feature"), nothing)], nothing, torch.tensor(True))

    replace(Learner, "learn", maybe_learn)
    replace(Learner, "update", maybe_update)


@pytest.mark.parametrize(
    ("kind", "steps"), [("loss", (3,)), ("nan", (1, 4)), ("gradient", (3, 4))], ids=["loss", "nan", "gradient"]
)
@pytest.mark.parametrize("network", [(), (*NORMED, "run.accumulate=2")], ids=["plain", "with batch statistics"])
def test_a_spoilt_step_is_as_if_it_had_been_left_out(run_here, tmp_path, kind, steps, network):
    for name, meddle in (
        ("spoilt", lambda set_: spoil(set_, kind, steps)),
        ("without", lambda set_: leave_out(set_, steps)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            meddle(patch.setattr)
            assert run_here(STEPS, *network, directory=name) == 0
    spoilt, without = tmp_path / "spoilt", tmp_path / "without"
    rows = read_log(spoilt)
    assert [row["step"] for row in rows if row["skipped_steps"]] == list(steps)
    assert json.loads((spoilt / "checkpoints/step_6/progress.json").read_text())["skipped_steps"] == list(steps)
    for row, other in zip(rows, read_log(without), strict=True):
        assert row["loss"] == other["loss"]
    assert_same_end(spoilt, without, 6)
    if network:
        state = load_file(spoilt / "checkpoints/step_6/model.safetensors")
        assert state["student.network.1.num_batches_tracked"] == 2 * (6 - len(steps))
        assert state["adaptors.0.standardizers.cls.count"] == 2 * 16 * (6 - len(steps))


@pytest.mark.parametrize("steps", [6, 7])
def test_a_run_that_learnt_hardly_anything_writes_no_student(run_here, monkeypatch, tmp_path, capsys, steps):
    spoil(monkeypatch.setattr, "loss", tuple(range(3, 3 + steps)))  # of 12
    assert run_here() == (1 if steps > 6 else 0)
    line = (
        f"error: {tmp_path}/run: 7 of the last 12 steps had a loss or gradient that was not finite and were left out: "
    )
    assert (line in capsys.readouterr().err) == (steps > 6)
    assert (tmp_path / "run/student.safetensors").exists() == (steps <= 6)
    assert (tmp_path / "run/checkpoints/step_12").is_dir()


def together(tmp_path: Path, tiny: Path, name: str, prelude: str, *overrides: str) -> list[tuple[int, str]]:
    """Run two processes that a warm one forks; the status and output of each."""
    warm_up()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, processes, outputs = multiprocessing.get_context("forkserver"), [], []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = (f"--cfg={tiny}", f"run.dir={tmp_path / name}", "run.batch_size=8", *overrides)
        own = f"import os\nos.environ.update({ {key: str(value) for key, value in place.items()} })\n{prelude}"
        outputs.append(tmp_path / f"{name}_{rank}.out")
        processes.append(context.Process(target=_run_tool, args=(outputs[-1], "train", words, own)))
        processes[-1].start()
    try:
        for process in processes:
            process.join(100)
        return [(process.exitcode, output.read_text()) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_what_one_of_two_processes_meets_both_skip_and_both_leave_their_batch(tiny, tmp_path):
    meddle = "from tests.faults.test_numbers import spoil, leave_out\n"
    spoilt = together(tmp_path, tiny, "spoilt", meddle + "spoil(setattr, 'loss', (3,), rank=1)", STEPS)
    without = together(tmp_path, tiny, "without", meddle + "leave_out(setattr, (3,))", STEPS)
    assert [status for status, _ in (*spoilt, *without)] == [0] * 4, (spoilt, without)
    assert [row["skipped_steps"] for row in read_log(tmp_path / "spoilt")] == [0, 0, 1, 0, 0, 0]
    assert_same_end(tmp_path / "spoilt", tmp_path / "without", 6)

    stop = (STEPS, "run.max_nonfinite=0", "data.repeats=1")
    ended = together(tmp_path, tiny, "ended", meddle + "spoil(setattr, 'loss', (3,), rank=1)", *stop)
    assert [status for status, _ in ended] == [1, 1], ended
    (line,) = [line for _, said in ended for line in said.splitlines() if line.startswith("error: ")]
    assert "the losses of process 1 were token inf, patch" in line
    assert "Traceback" not in ended[0][1] + ended[1][1]
    folder = tmp_path / "ended/nonfinite/step_3"
    report = json.loads((folder / "report.json").read_text())
    here, there = report["processes"]
    assert [here["process"], there["process"]] == [0, 1]
    assert there["losses"]["token"] == "inf"
    assert isinstance(here["losses"]["token"], float)  # its own, not the mean of both
    assert not set(here["files"]) & set(there["files"])
    batches = [load_file(folder / one["batch"]) for one in (here, there)]
    assert [batch["images"].shape for batch in batches] == [(1, 8, 3, 16, 16)] * 2
    assert not torch.equal(batches[0]["images"], batches[1]["images"])


@pytest.fixture
def photos(tmp_path):
    """Overrides for a set of 40 images in folders, of which one is broken."""
    rng = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / f"photos/{'ab'[index % 2]}/{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    path.write_bytes(b"no image")
    return ("data.kind=folder", f"data.root={tmp_path / 'photos'}", "data.split=null")


def test_a_run_that_ends_says_what_it_met_and_leaves_the_batch(run_here, photos, tmp_path, monkeypatch, capsys):
    seen: dict[int, list] = {}
    learn = Learner.learn

    def noting(self, batch, answers, step, micro):
        seen.setdefault(step, []).append(batch)
        learn(self, batch, answers, step, micro)

    monkeypatch.setattr(Learner, "learn", noting)
    spoil(monkeypatch.setattr, "nan", (2, 4, 5), micro=1)
    own = ("run.max_nonfinite=2", "run.accumulate=2", "run.batch_size=8", "run.log_every=1", "run.save_every=3")
    assert run_here("schedule.steps=12", *photos, *own) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    folder = tmp_path / "run/nonfinite/step_5"
    assert "3 steps of the last 1,000" in line
    assert "the last were steps 2, 4, 5" in line
    assert re.search(r"the losses were token nan, patch \d\.\d+, feature \d\.\d+ \(grad_norm nan\)", line)
    assert str(folder) in line
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_3"]

    report = json.loads((folder / "report.json").read_text())
    assert (report["step"], report["epoch"], report["skipped_steps"]) == (5, 2, [2, 4, 5])  # an epoch is two steps
    assert report["loss_scale"] is None
    assert report["gradient_norms"] == {"grad_norm": "nan"}
    (process,) = report["processes"]
    assert process["losses"]["token"] == "nan"
    assert 0 < process["losses"]["patch"] < 100
    assert len(process["files"]) == 16
    assert f"its images {', '.join(process['files'][:3])} and 13 more" in line

    batch = load_file(folder / process["batch"])
    assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (2, 8, 3, 16, 16))
    for micro, got in enumerate(seen[5]):
        boxes = [(row, Box(*box)) for at, row, *box in batch["boxes"].tolist() if at == micro]
        assert torch.equal(fill_boxes(batch["images"][micro].float().div_(255), boxes), got.images)
        assert torch.equal(batch["mask"][micro], got.mask)
        assert torch.equal(batch["labels"][micro], got.labels)
        assert [name[0] for name in process["files"][8 * micro :][:8]] == ["ab"[label] for label in got.labels]
    assert len(batch["boxes"])
    assert "b/39.png" not in process["files"]  # which cannot be read: the next one was shown


def test_the_report_names_what_was_shown_for_an_image_that_cannot_be_read(
    run_here, photos, tmp_path, monkeypatch, capsys
):
    for path in sorted((tmp_path / "photos").rglob("*.png")):
        path.rename(path.with_name(f"x\n{path.name}"))
    spoil(monkeypatch.setattr, "nan", (1,))
    # A step shows every image once; the first stands in for the last, which is broken.
    assert run_here("schedule.steps=12", *photos, "run.max_nonfinite=0", "data.repeats=1", "run.batch_size=40") == 1
    (folder,) = (tmp_path / "run/nonfinite").iterdir()
    (process,) = json.loads((folder / "report.json").read_text())["processes"]
    assert "b/x\n39.png" not in process["files"]
    assert process["files"].count("a/x\n00.png") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "its images a/x\\n" in line or "its images b/x\\n" in line


def test_a_disk_that_is_full_does_not_hide_why_a_run_ends(run_here, tmp_path, monkeypatch, capsys):
    def full(path, write):
        raise OSError(28, "No space left on device")

    spoil(monkeypatch.setattr, "loss", (2,))
    monkeypatch.setattr(nonfinite, "write_file", full)
    assert run_here(STEPS, "run.max_nonfinite=0") == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "In step 2 the losses were token inf" in said
    assert "no report of it could be written (No space left on device)" in said


def test_nothing_is_drawn_again_while_all_is_well(run_here, monkeypatch):
    def never(*_):
        raise AssertionError("a report of a healthy run")

    monkeypatch.setattr(loop, "diverged", never)
    spoil(monkeypatch.setattr, "loss", (2,))
    assert run_here(STEPS, "run.max_nonfinite=1") == 0


@pytest.fixture
def scaled(monkeypatch):
    """Let a run on a CPU use the loss scaler that fp16 needs, from a scale of 4 on."""
    build = start.build_accelerator

    def with_scaler(*args):
        accelerator = build(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=4)
        monkeypatch.setattr(accelerator, "unscale_gradients", lambda one: accelerator.scaler.unscale_(one.optimizer))
        return accelerator

    monkeypatch.setattr(start, "build_accelerator", with_scaler)


def test_a_loss_scale_that_collapses_is_told_once(run_here, scaled, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch.setattr, "gradient", (2, 3, 4, 5))
    assert run_here("schedule.steps=10", "run.max_nonfinite=9") == 0
    rows = read_log(tmp_path / "run")
    assert [row["loss_scale"] for row in rows] == [4, 2, 1, 0.5, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "loss scale" in line]
    assert told.startswith("warning: fp16's loss scale has fallen to 0.5 at step 4")

    assert run_here("run.max_nonfinite=2", directory="ended") == 1
    assert "grad_norm nan, loss scale 0.5)" in capsys.readouterr().err
    report = json.loads((tmp_path / "ended/nonfinite/step_4/report.json").read_text())
    assert report["loss_scale"] == 0.5


def test_a_run_without_a_scaler_logs_no_loss_scale(run_here, tmp_path):
    assert run_here("schedule.steps=1") == 0
    assert "loss_scale" not in read_log(tmp_path / "run")[0]
