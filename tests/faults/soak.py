"""A run killed at random for half an hour, and restarted each time:  python -m tests.faults.soak --minutes 30

Prints what happened as a Markdown table, then compares the run with an uninterrupted one of the same config. Exit
status 0: the same to the bit, and every ending as expected; 1: not so.
"""

import argparse
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.faults.runs import SLOW_STEP, assert_same_end, assert_same_log, resumed_from
from tests.training.conftest import ROOT, TINY, read_log

SECONDS_A_STEP = 0.25  # at first; later as it takes to end in time
EVENTS = {"SIGKILL": 4, "SIGTERM": 2, "SIGUSR1": 1, "SIGINT": 1, "SIGKILL to a data worker": 4}  # how often of twelve
HEADER = "| time | event | step reached | went on from | steps done again |\n| --- | --- | --- | --- | --- |"


class Soak:
    """One run that is harmed until it has ended.

    rows: of the table; wrong: what was not as expected.
    """

    def __init__(self, minutes: float, rng: random.Random, out: Path):
        self.rng, self.out, self.directory = rng, out, out / "harmed"
        self.steps = max(60, round(minutes * 60 / SECONDS_A_STEP * 0.75))  # what is done again and starts take the rest
        self.begun = time.monotonic()
        self.end = self.begun + minutes * 60
        self.longest = min(90.0, 20 + minutes * 15)  # seconds from one event to the next
        self.rows: list[str] = []
        self.wrong: list[str] = []
        (out / "soak.yaml").write_text(TINY)

    def start(self, directory: Path, pause: float) -> subprocess.Popen:
        """A trainer in a process of its own, which sleeps so many seconds a step."""
        entry = self.out / f"{directory.name}.py"
        entry.write_text(SLOW_STEP.format(pause) + "\nimport sys\nfrom tools.train import main\nsys.exit(main())\n")
        words = (f"schedule.steps={self.steps}", "run.save_every=40", "data.workers=2", f"run.dir={directory}")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with open(self.out / f"{directory.name}.out", "w") as output:
            return subprocess.Popen(
                [sys.executable, str(entry), f"--cfg={self.out / 'soak.yaml'}", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def output(self) -> str:
        return (self.out / "harmed.out").read_text()

    def reached(self) -> int:
        """The last step in log.jsonl."""
        rows = read_log(self.directory)
        return rows[-1]["step"] if rows else 0

    def tell(self, event: str, *facts: object) -> None:
        """Add a row to the table, and print it."""
        minutes, seconds = divmod(int(time.monotonic() - self.begun), 60)
        self.rows.append("| " + " | ".join(map(str, (f"{minutes}:{seconds:02d}", event, *facts))) + " |")
        print(self.rows[-1], flush=True)

    def run(self) -> None:
        """Start, harm and restart until the run has ended."""
        print(HEADER, flush=True)
        event, before = "start", 0
        while True:
            pause = max(0.0, (self.end - time.monotonic()) / max(1, self.steps - before) * 0.8 - 0.05)
            process = self.start(self.directory, min(pause, 1.0))
            ended = self.harm(process, event, before)
            if ended is None:
                return
            event, before = ended, self.reached()

    def harm(self, process: subprocess.Popen, event: str, before: int) -> str | None:
        """Harm a run until it ends; how it ended, None where it was done. `event` is what it was restarted after."""
        told = False
        while True:
            until = time.monotonic() + self.rng.uniform(20, self.longest)
            while process.poll() is None and time.monotonic() < until:
                if not told and " loss " in self.output():
                    told = True
                    resumed = resumed_from(self.output())
                    self.tell(event, before, resumed, before - resumed)
                time.sleep(0.2)
            if not told:
                told = True
                self.tell(event, before, "harmed while it started", "")
            if process.poll() is not None:
                return self.ended(process)
            kind = self.rng.choices(list(EVENTS), list(EVENTS.values()))[0]
            if kind == "SIGKILL to a data worker":
                workers = psutil.Process(process.pid).children()
                if workers:
                    self.rng.choice(workers).kill()
                    self.tell(kind, self.reached(), "did not stop", 0)
                continue
            number = signal.Signals[kind]
            process.send_signal(number)
            status = process.wait(120)
            if status == 0:
                return self.ended(process)
            if status not in (-number, 128 + number):
                self.wrong.append(f"{kind}: exit status {status}\n{self.output()[-3000:]}")
            return kind

    def ended(self, process: subprocess.Popen) -> str | None:
        """A run that ended by itself should be done."""
        if process.returncode == 0:
            self.tell("done", self.reached(), "", "")
            return None
        self.wrong.append(f"ended by itself with status {process.returncode}\n{self.output()[-3000:]}")
        if len(self.wrong) > 20:
            raise SystemExit("\n".join(self.wrong))
        return f"ended by itself, status {process.returncode}"

    def compare(self) -> None:
        """Run the config once more, undisturbed, and hold the two against each other."""
        whole = self.out / "whole"
        status = self.start(whole, 0).wait()
        if status:
            self.wrong.append(f"the undisturbed run: exit status {status}\n{(self.out / 'whole.out').read_text()}")
            return
        for check in (assert_same_end, assert_same_log):
            try:
                check(whole, self.directory, self.steps)
            except AssertionError as error:
                self.wrong.append(f"{check.__name__}: {str(error)[:3000]}")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, help="of the moments and the events; a new one where it is not given")
    parser.add_argument("--out", type=Path, help="an empty folder; a temporary one where it is not given")
    args = parser.parse_args()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    out = (args.out or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"{out} is not empty")
    print(f"{args.minutes:g} minutes of seed {seed} in {out}\n", flush=True)
    soak = Soak(args.minutes, random.Random(seed), out)
    soak.run()
    soak.compare()
    events = [row.split("|")[2].strip() for row in soak.rows]
    told = ", ".join(f"{events.count(kind)} {kind}" for kind in EVENTS)
    verdict = (
        "\n\n".join(["**Failed**", *soak.wrong])
        if soak.wrong
        else f"**Passed**: {soak.steps} steps, {told}; weights, averages, optimiser state, log and TensorBoard are "
        "those of the undisturbed run, bit for bit."
    )
    print(f"\n{verdict}", flush=True)
    (out / "soak.md").write_text("\n".join([f"Seed {seed}.\n", HEADER, *soak.rows, "", verdict, ""]))
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
