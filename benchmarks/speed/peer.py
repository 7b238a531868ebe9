"""Time of one training step: LightlyTrain's distillation and ours, in turn, on the images of one folder, on a CPU.

python -m benchmarks.speed.peer --python /path/to/environment/bin/python --root IMAGES [--rounds 10] [--out peer.json]

LightlyTrain lives in an environment of its own (pip install lightly-train==0.18.0), whose Python is given; it trains by
its `pretrain` with random weights, as ours does. Both train with the same networks, batch, threads and precision. Its
processes stand still until they are told to make a step, so one step runs at a time. A round has two of each variant,
the second of which is timed.

A step is what comes after its batch has been loaded, on both sides: teacher, student, losses, backward, clipping,
optimiser, and what either does besides (mixup and the queue there; the conversion from uint8 and the average of the
weights here). Loading and augmenting are not in it, and happen between the steps, without workers.

Ours is measured with token and feature losses, which take one plain pass of the student as LightlyTrain's do, and with
all three, which take the masked pass as well. The ratio is the median over the rounds of our time over LightlyTrain's
in the same precision: below 1.00 ours is faster.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import timing
from benchmarks.speed.ours import OurStep, build_teacher, recipe
from proteus.data.sources import FolderSource
from proteus.errors import InputError

CHILD = Path(__file__).with_name("peer_child.py")
PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
OURS = {"float32": [], "bf16": ["run.precision=bf16", "teacher.dtype=bfloat16"]}
LOSSES = {"token + feature": ["losses.patch=0"], "token + feature + patch": []}
ENDED = "LightlyTrain's process ended; what it said last:\n"


class Peer:
    """A process of another environment that makes a step whenever it is asked to."""

    def __init__(self, python: str, child: Path, asked: dict[str, Any]):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, str(child), json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                bufsize=1,
                env={**os.environ, "OMP_NUM_THREADS": str(asked["threads"])},
            )
        except OSError as error:
            raise InputError(f"--python {python}: {error.strerror}") from None
        self.versions: dict[str, str] = self._answer()

    def step(self) -> float:
        """Seconds of one more step."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the answer is missing too
            print(file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise InputError(ENDED + "\n".join(self._said.read().splitlines()[-5:]))
        return json.loads(line)


def measure(args: argparse.Namespace) -> tuple[timing.Times, dict[str, str]]:
    """Seconds of a step of each variant in each round, and the versions of the other side."""
    calls: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        peers: list[Peer] = []
        try:
            for precision in args.precision:
                asked = {
                    "root": str(Path(args.root).resolve()), "out": f"{folder}/{precision}", "batch": args.batch,
                    "model": args.model, "teacher": args.teacher, "method": args.method, "threads": args.threads,
                    "precision": PRECISIONS[precision],
                }  # fmt: skip
                peers.append(Peer(args.python, Path(args.child), asked))
                calls[f"LightlyTrain, {precision}"] = peers[-1].step
            source = FolderSource(Path(args.root), use_labels=False)
            for precision in args.precision:
                for name, losses in LOSSES.items():
                    compiled = ["teacher.compile=true", "student.compile=true"] if args.compile else []
                    keys = [*OURS[precision], *losses, *compiled, *args.overrides]
                    cfg = recipe(args.our_teacher, args.our_student, args.batch, args.image_size, keys)
                    step = OurStep(cfg, build_teacher(cfg), source)
                    calls[f"ours, {name}, {precision}"] = lambda step=step: timing.timed(step, step.device)
            times: timing.Times = {name: [] for name in calls}
            for number in range(args.warm_up + args.rounds):
                for name in list(calls)[:: -1 if number % 2 else 1]:
                    calls[name]()  # a run's steps follow their own kind: the first after another one is slower
                    seconds = calls[name]()
                    if number >= args.warm_up:
                        times[name].append(seconds)
            return times, peers[0].versions
        finally:
            for peer in peers:
                peer.close()


def report(times: timing.Times) -> dict[str, dict[str, float]]:
    """Print the table; medians and ratios by variant."""
    found = {}
    for name, own in times.items():
        base = times[f"LightlyTrain, {name.rsplit(', ', 1)[1]}"]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(own, base, strict=True))
        found[name] = {"seconds": statistics.median(own), "ratio": ratio}
    rows = [[name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}"] for name, row in found.items()]
    print(timing.table(["variant", "s a step", "of LightlyTrain's"], rows))
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that lightly-train is installed in")
    parser.add_argument("--root", required=True, help="a folder of images")
    parser.add_argument("--rounds", default=10, type=int)
    parser.add_argument("--warm-up", default=3, type=int)
    parser.add_argument("--batch", default=4, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--precision", nargs="+", default=[*PRECISIONS], choices=[*PRECISIONS])
    parser.add_argument("--method", default="distillation", help="0.18 means distillationv3 by it")
    parser.add_argument("--model", default="dinov2/vits14-notpretrained")
    parser.add_argument("--teacher", default="dinov2/vitb14-notpretrained")
    parser.add_argument("--our-student", default="proteus_vits14")
    parser.add_argument("--our-teacher", default="dinov2_vitb14")
    parser.add_argument("--image-size", default=224, type=int)
    parser.add_argument("--compile", action="store_true", help="torch.compile on our side")
    parser.add_argument("--child", default=str(CHILD), help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a JSON file for everything measured")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of our config")
    args = parser.parse_args(argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the other side trains there too
    torch.set_num_threads(args.threads)
    facts = timing.machine(torch.device("cpu"))
    try:
        times, versions = measure(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{timing.describe(facts)}; batch {args.batch} at {args.image_size} px, {args.rounds} rounds")
    print(f"the other side: {', '.join(f'{name} {value}' for name, value in versions.items())}\n")
    summary = report(times)
    settings = {"machine": facts, "peer": versions, "settings": vars(args)}
    timing.write_json(args.out, settings | {"times": times, "summary": summary})
    return 0


if __name__ == "__main__":
    sys.exit(main())
