"""A disk that is full, a folder that cannot be written to, a checkpoint that is not what was written."""

import contextlib
import errno
import random
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proteus.engine import atomic
from proteus.engine.checksums import damage
from proteus.training.learner import Learner
from proteus.training.state import Checkpoints, list_checkpoints
from tests.faults.runs import SLOW_STEP, assert_same_end, assert_same_rows, resumed_from
from tests.training.conftest import read_log

STEPS = 12  # checkpoints at 5, 10 and 12
PAGE = 4096

# Root may write to any folder; a process that gives this up may not.
NO_OVERRIDE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE, of those in effect
assert libc.capset(header, sets) == 0
"""


# A log that lies elsewhere: the first to find the disk full is TensorBoard's event file.
LOG_ELSEWHERE = """
from proteus.training import board
board.open = lambda path, mode: open("/dev/null", mode)
"""


class SmallDisk:
    """A file system of 4 MB at `path`."""

    def __init__(self, path: Path):
        path.mkdir()
        self.path, self._ballast = path, path / "ballast"

    def mount(self) -> bool:
        """Whether this process may mount one."""
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(self.path)]
        return bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes free."""
        with open(self._ballast, "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(b"\0" * PAGE):
                    pass
            file.truncate(max(0, file.tell() - leave))
        assert shutil.disk_usage(self.path).free == leave // PAGE * PAGE

    def clear(self) -> None:
        self._ballast.unlink()


class PretendedDisk:
    """A full disk for whatever is written by `proteus.engine.atomic`, where no file system can be mounted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._sync, self._full = atomic._sync, False
        monkeypatch.setattr(atomic, "_sync", self._fail)

    def _fail(self, path: Path) -> None:
        if self._full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path).replace(atomic.PENDING, ""))
        self._sync(path)

    def fill(self, leave: int = 0) -> None:
        self._full = True

    def clear(self) -> None:
        self._full = False


@pytest.fixture(params=["tmpfs", "pretended"])
def disk(request, tmp_path, monkeypatch) -> Iterator[SmallDisk | PretendedDisk]:
    """What the run directory is on: a file system of its own, or one that is only said to be full."""
    if request.param == "pretended":
        yield PretendedDisk(monkeypatch)
        return
    small = SmallDisk(tmp_path / "run")
    if not small.mount():
        pytest.skip("this process may not mount a tmpfs")
    yield small
    subprocess.run(["umount", str(small.path)], check=True)


def when(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, count: int, happens) -> None:
    """Let something happen before call number `count` of a method."""
    method, calls = getattr(owner, name), []

    def wrapped(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            happens()
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def one_line(said: str) -> str:
    """The one line that a run which failed ends with."""
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.splitlines()[-1] == line, said
    return line


def test_a_disk_that_fills_while_a_checkpoint_is_written(run_here, tmp_path, disk, monkeypatch, capsys, thorough):
    assert run_here(directory="whole") == 0
    for leave in range(0, 200_000, 20_000 if thorough else 90_000):
        with monkeypatch.context() as patch:
            when(patch, Checkpoints, "save", 2, lambda leave=leave: disk.fill(leave))
            capsys.readouterr()
            assert run_here() == 1
        said = one_line(capsys.readouterr().err)
        assert said.startswith(f"error: the checkpoint of step 10 cannot be written to {tmp_path}/run/checkpoints: ")
        assert f"No space left on device: '{tmp_path}/run/checkpoints/step_10" in said, said
        (kept,) = (tmp_path / "run/checkpoints").iterdir()  # nothing half-written is left to fill the disk
        assert kept.name == "step_5"
        assert damage(kept) is None
        disk.clear()
        assert run_here() == 0
        assert resumed_from(capsys.readouterr().err) == 5
        assert_same_end(tmp_path / "whole", tmp_path / "run", STEPS)
        assert_same_rows(tmp_path / "whole", tmp_path / "run", STEPS)
        for path in (tmp_path / "run").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("first", ["log", "events"])
def test_a_disk_that_fills_while_a_row_is_written(forked, disk, first):
    if isinstance(disk, PretendedDisk):
        pytest.skip("needs a file system that can be mounted")
    settings = ("schedule.steps=45", "run.save_every=20", "run.keep=1", "data.images_per_class=0.1")
    whole = forked("whole", *settings)
    run = forked("run", *settings, prelude=SLOW_STEP.format(0.05) + LOG_ELSEWHERE * (first == "events"))
    assert run.wait_until(lambda: "\nstep 21/" in run.output()), run.output()
    disk.fill()
    assert run.wait() == 1, run.output()
    assert "No space left on device" in one_line(run.output())
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == ["step_20"]
    run = forked("run", *settings)  # still full
    assert run.wait() == 1, run.output()
    assert run.output() == f"error: {run.directory}/config.yaml: No space left on device\n"
    disk.clear()
    run = forked("run", *settings)
    assert run.wait() == 0, run.output()
    assert resumed_from(run.output()) == 20
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, run.directory, 45)
    if first == "events":
        assert [row["step"] for row in read_log(run.directory)] == list(range(21, 46))
    else:
        assert_same_rows(whole.directory, run.directory, 45)


@pytest.mark.parametrize("writes", ["write_student", "write_average"])
def test_a_disk_that_fills_before_the_student_is_written(run_here, tmp_path, disk, monkeypatch, capsys, writes):
    assert run_here(directory="whole") == 0
    with monkeypatch.context() as patch:
        when(patch, Learner, writes, 1, lambda: disk.fill(2 * PAGE))
        capsys.readouterr()
        assert run_here() == 1
    said = one_line(capsys.readouterr().err)
    name = "student" if writes == "write_student" else "student_ema"
    assert said == f"error: {tmp_path}/run/{name}.safetensors: No space left on device"
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("student.safetensors" in there) == (writes == "write_average")
    assert "student_ema.safetensors" not in there
    assert not [name for name in there if name.startswith(".pending")]
    disk.clear()
    assert run_here() == 0
    assert resumed_from(capsys.readouterr().err) == STEPS
    assert_same_end(tmp_path / "whole", tmp_path / "run", STEPS)


def test_a_folder_that_cannot_be_written_to_any_more(forked, tmp_path):
    whole = forked("whole")
    run = forked("run", prelude=NO_OVERRIDE)
    assert run.wait_until(lambda: run.steps() >= 5), run.output()
    checkpoints = run.directory / "checkpoints"
    assert run.wait_until((checkpoints / "step_5").exists), run.output()
    checkpoints.chmod(0o555)
    assert run.wait() == 1, run.output()
    assert one_line(run.output()) == (
        f"error: the checkpoint of step 10 cannot be written to {checkpoints}: "
        f"[Errno 13] Permission denied: '{checkpoints}/.pending-step_10'"
    )
    assert damage(checkpoints / "step_5") is None
    checkpoints.chmod(0o755)
    again = forked("run", prelude=NO_OVERRIDE)
    assert again.wait() == 0, again.output()
    assert resumed_from(again.output()) == 5
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, run.directory, STEPS)


def test_a_folder_that_cannot_be_written_to_at_the_start(forked, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    run = forked("run", prelude=NO_OVERRIDE)
    assert run.wait() == 2, run.output()
    (line,) = run.output().splitlines()
    assert line.startswith(f"error: run.dir={tmp_path}/run cannot be used: [Errno 13] Permission denied")


def spoil(path: Path, rng: random.Random) -> str:
    """Cut a file off, or turn bits of it over, or delete it; what was done."""
    content = path.read_bytes()
    kind = rng.choice(("cut off", "a bit", "a block", "deleted"))
    if kind == "deleted":
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        at = rng.randrange(len(content))
        length = 1 if kind == "a bit" else rng.randint(1, 4096)
        other = bytes(byte ^ (1 << rng.randrange(8)) for byte in content[at : at + length])
        path.write_bytes(content[:at] + other + content[at + length :])
    return f"{path.name}: {kind}"


def test_a_checkpoint_damaged_anyhow_is_told_and_the_one_before_is_used(run_here, tmp_path, capsys, thorough):
    seed = secrets.randbits(32)
    print(f"damage of seed {seed}")
    rng = random.Random(seed)
    assert run_here(directory="whole") == 0
    for _ in range(20 if thorough else 2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        newest = list_checkpoints(tmp_path / "run/checkpoints")[-1]
        done = spoil(rng.choice(sorted(newest.iterdir())), rng)
        capsys.readouterr()
        assert run_here() == 0, done
        said = capsys.readouterr().err
        assert f"{newest} is damaged" in said, (done, said)
        assert resumed_from(said) == 10, (done, said)
        assert_same_end(tmp_path / "whole", tmp_path / "run", STEPS)
        assert_same_rows(tmp_path / "whole", tmp_path / "run", STEPS)


def test_a_damaged_config_of_a_checkpoint_is_no_other_seed(run_here, tmp_path, capsys):
    assert run_here("run.seed=12", directory="whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_12"
    config = (newest / "config.yaml").read_bytes()
    assert config.count(b"seed: 12") == 1
    (newest / "config.yaml").write_bytes(config.replace(b"seed: 12", b"seed: 10"))  # one bit
    capsys.readouterr()
    assert run_here("run.seed=12") == 0
    said = capsys.readouterr().err
    assert f"{newest} is damaged (config.yaml is not as it was written); it is kept as damaged-step_12" in said
    assert resumed_from(said) == 10
    assert_same_end(tmp_path / "whole", tmp_path / "run", STEPS)
    assert_same_rows(tmp_path / "whole", tmp_path / "run", STEPS)


def test_a_seed_that_has_changed_is_told_before_anything_is_built(run_here, tmp_path, capsys):
    """Though the rest of the checkpoint is damaged: its config is not, and nothing else of it is read yet."""
    assert run_here("schedule.steps=5") == 0
    model = tmp_path / "run/checkpoints/step_5/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    capsys.readouterr()
    assert run_here("run.seed=1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a run cannot go on from" in line
    assert "with run.seed: 0 -> 1" in line
