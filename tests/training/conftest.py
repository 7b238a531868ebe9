"""A tiny run: digits at 16 pixels, networks of a few thousand parameters, in this process or in one of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.training.together import FSDP, run_tool, together

ROOT = Path(__file__).resolve().parents[2]

LAUNCH = (
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
)
LAUNCH += (
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--num_cpu_threads_per_process",
    "1",
    "--main_process_port",
    "0",
)

TINY = """
teacher:
  name: timm/vit_tiny_patch16_224
  checkpoint: random
  arch: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}
student:
  name: timm/vit_tiny_patch16_224
  arch: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, drop_path: 0.1}
losses: {token: 1.0, patch: 1.0, feature: 1.0}
data:
  kind: digits
  split: train
  image_size: 16
  repeats: 2
  workers: 0
  augment: {erasing: 0.5}
optimizer: {lr: 1e-3, lr_batch: null}
schedule: {steps: 12, warmup_steps: 2}
probe: {every_epochs: 0}
run: {batch_size: 16, precision: no, log_every: 1, save_every: 5}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The path of the tiny run's config; its run directory is `tmp_path / "run"` unless a test says otherwise."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def run_here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call the trainer's main in this process: run_here("run.seed=1") -> exit status."""
    from tools.train import main

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("RANK", raising=False)

    def run(*overrides: str, cfg: str | Path = tiny, directory: str = "run") -> int:
        PartialState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        flags = [word for word in overrides if word.startswith("--")]
        keys = [word for word in overrides if not word.startswith("--")]
        return main([f"--cfg={cfg}", *flags, f"run.dir={tmp_path / directory}", *keys])

    return run


@pytest.fixture
def run_together(tiny: Path, tmp_path: Path):
    """Run a tool in several processes: run_together("name", 2, "key=value", ..., fsdp=True) -> its run directory."""

    def run(name: str, count: int, *overrides: str, fsdp: bool = False, tool: str = "train", work=run_tool) -> Path:
        argv = [f"--cfg={tiny}", f"run.dir={tmp_path / name}", *overrides]
        ended = together(count, work, tool, argv, place=tmp_path, environment=FSDP if fsdp else {})
        assert [one.status for one in ended] == [0] * count, "\n".join(one.output for one in ended)
        return tmp_path / name

    return run


class Trainer:
    """The trainer in a process of its own."""

    def __init__(self, directory: Path, tiny: Path, *overrides: str, launcher: tuple[str, ...] = (), prelude: str = ""):
        self.directory = directory
        command = (
            [*launcher, str(ROOT / "tools" / "train.py")]
            if launcher
            else [sys.executable, str(ROOT / "tools/train.py")]
        )
        if prelude:
            script = directory.parent / f"{directory.name}_entry.py"
            script.write_text(prelude + "\nimport sys\nfrom tools.train import main\nsys.exit(main())\n")
            command[-1] = str(script)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self._output = open(directory.parent / f"{directory.name}.out", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, f"--cfg={tiny}", f"run.dir={directory}", *overrides],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def wait(self, timeout: float = 180) -> int:
        """Its exit status."""
        return self.process.wait(timeout)

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def wait_until(self, reached, timeout: float = 120) -> None:
        """Poll until `reached()`; fails where the process ends before."""
        end = time.monotonic() + timeout
        while not reached():
            assert self.process.poll() is None, f"the trainer ended early:\n{self.output()}"
            assert time.monotonic() < end, f"waited too long:\n{self.output()}"
            time.sleep(0.01)

    def pid(self) -> int:
        """The trainer's pid, as the lock says."""
        return int((self.directory / "lock").read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(), number)

    def steps(self) -> int:
        """The last step in log.jsonl."""
        rows = read_log(self.directory)
        return rows[-1]["step"] if rows else 0


def read_log(directory: Path) -> list[dict]:
    """The whole rows of log.jsonl that are training steps."""
    path = directory / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [row for line in lines if line and "loss" in (row := json.loads(line))]


@pytest.fixture
def trainer(tiny: Path, tmp_path: Path):
    """Start a trainer: trainer("name", "run.seed=1", ...). Whatever still runs at the end is killed."""
    started: list[Trainer] = []

    def start(name: str, *overrides: str, **options) -> Trainer:
        started.append(Trainer(tmp_path / name, tiny, *overrides, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
