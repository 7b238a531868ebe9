"""configs/accelerate: files that Accelerate takes, and a Slurm job that asks for its place again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.training.conftest import ROOT, read_log

CONFIGS = ROOT / "configs/accelerate"

# All nodes are this machine.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$OPTIONS"; shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
trap 'kill "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$ASKED"; fi
"""


@pytest.mark.parametrize("name", ["one_node", "several_nodes", "fsdp"])
def test_accelerate_takes_the_config(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # raises at a key that it does not know
    assert config.distributed_type == ("FSDP" if name == "fsdp" else "MULTI_GPU")
    assert config.mixed_precision == "no"
    assert config.num_machines == (2 if name == "several_nodes" else 1)
    assert name != "fsdp" or config.fsdp_config["fsdp_version"] == 2


@pytest.fixture
def job(tmp_path, tiny, thorough):
    """Start the batch script on one or two nodes of one process: job("key=value", ...)."""
    nodes = 2 if thorough else 1
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ASKED": str(tmp_path / "asked"),
        "OPTIONS": str(tmp_path / "options"),
        "SLURM_CPUS_PER_TASK": "3",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": str(nodes),
        "SLURM_GPUS_ON_NODE": "1",
    }
    started = []

    def start(*overrides, config="several_nodes"):
        command = [CONFIGS / "slurm.sh", tmp_path / "run", "--cfg", tiny, f"run.batch_size={16 // nodes}", *overrides]
        with open(tmp_path / "job.log", "a") as log:
            own = environment | {"CONFIG": str(CONFIGS / f"{config}.yaml")}
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=own, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_requeued_and_goes_on(job, tmp_path):
    steps = ("schedule.steps=60", "run.save_every=1000", "data.workers=0")
    first = job("run.log_every=1", *steps, config="fsdp")
    end = time.monotonic() + 120
    while not (read_log(tmp_path / "run") or [{"step": 0}])[-1]["step"] > 2:
        assert first.poll() is None, (tmp_path / "job.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    first.send_signal(signal.SIGUSR1)  # what Slurm sends to the batch shell, and to it alone
    assert first.wait(60) != 0
    said = (tmp_path / "job.log").read_text()
    assert "stopped by signal 10 after step" in said
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}\n"

    second = job(*steps)  # data-parallel now
    assert second.wait(120) == 0, (tmp_path / "job.log").read_text()
    assert "resumed from" in (tmp_path / "job.log").read_text()
    assert [row["step"] for row in read_log(tmp_path / "run")] == list(range(1, 61))
    assert (tmp_path / "asked").read_text().count("requeue") == 1  # it is done


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued(job, tmp_path):
    failed = job("losses.tokn=1")
    assert failed.wait(120) != 0
    assert "did you mean 'token'?" in (tmp_path / "job.log").read_text()
    assert not (tmp_path / "asked").exists()
    assert "--cpus-per-task=3" in (tmp_path / "options").read_text().splitlines()
