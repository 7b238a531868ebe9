"""Time of one training step: as published, and ours in several settings, in turn on the same batch.

python -m benchmarks.speed.step [--teacher dinov2_vitb14] [--student proteus_vits14] [--batch 4] [--image-size 224]
                                [--variants published ours,bf16 ...] [--compare steps|students|cache] [--out step.json]

A variant's name is its settings joined by commas: `published` or `ours`, then
    half, shared, fused, no-wait    of the published step alone: one of our changes at a time (published.Changes)
    bf16                            bfloat16 autocast
    teacher                         the teacher's weights in bfloat16 too
    compile                         torch.compile of the teacher, and of the student block by block
Every variant starts from the same random weights. The ratio is the median over the rounds of the baseline's time over
the variant's, so 2.00 is twice as fast; the losses are those of its first step. MFU is the FLOPs of our step (the least
work that gives the losses) against the device's peak in bfloat16, whatever a variant computes or in what precision.
A second table has the stages of a step, each waited for.

--compare students: two students that learn from one pass of the teacher, against two runs, each with its own.
--compare cache: an epoch whose class tokens come from a teacher cache, against one whose teacher computes them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import timing
from benchmarks.speed.cached import compare_cache
from benchmarks.speed.ours import OurStep, build_teacher, recipe
from benchmarks.speed.published import Changes, PublishedStep
from proteus.errors import InputError, nearest
from proteus.models import Encoder
from proteus.training.flops import training_flops

BASELINE = "published"
VARIANTS = [
    BASELINE, "published,half", "published,shared", "ours", "published,bf16", "ours,bf16", "ours,bf16,teacher",
    "ours,compile", "ours,bf16,teacher,compile",
]  # fmt: skip
CHANGES = {
    "half": "masked_half", "shared": "shared_embedding", "fused": "fused", "no-wait": "no_wait", "bf16": "bf16",
    "teacher": "teacher_bf16", "compile": "compiled",
}  # fmt: skip
SETTINGS = {
    "bf16": ["run.precision=bf16"],
    "teacher": ["teacher.dtype=bfloat16"],
    "compile": ["teacher.compile=true", "student.compile=true"],
    "xformers": ["run.attention=xformers"],
    "sdpa": ["run.attention=sdpa"],
}
STUDENTS = ["proteus_vitt14", "proteus_vits14"]

Step = OurStep | PublishedStep


class Workbench:
    """Builds variants of one step, all of the same weights and on the same batch.

    args: teacher, batch, image_size, and overrides of the config. teacher: built by them where none is given.
    """

    def __init__(self, args: argparse.Namespace, student: str | Sequence[str], teacher: Encoder | None = None):
        self._args, self._student = args, student
        self.teacher = teacher or build_teacher(self.config([]))
        self.ours = OurStep(self.config([]), self.teacher)
        self.device = self.ours.device

    def config(self, overrides: list[str]):
        args = self._args
        return recipe(args.teacher, self._student, args.batch, args.image_size, [*args.overrides, *overrides])

    def build(self, variant: str) -> Step:
        """The step that a name stands for; InputError where it stands for none."""
        kind, *words = variant.split(",")
        if kind not in ("published", "ours"):
            raise InputError(f"--variants: {variant!r} begins with neither published nor ours")
        known = [*(SETTINGS if kind == "ours" else CHANGES)]
        for word in words:
            if word not in known:
                raise InputError(f"--variants: {word!r} is nothing to do with {kind}{nearest(word, known)}")
        if kind == "ours":
            keys = [key for word in words for key in SETTINGS[word]]
            return OurStep(self.config(keys), self.teacher, batch=self.ours.batch)
        changes = Changes(**{CHANGES[word]: True for word in words})
        task = self.ours.learners[0].task
        return PublishedStep(self.teacher, task.student, task.adaptors[0].heads, self.ours.batch, self.device, changes)

    def flops(self) -> int:
        """Of one step with everything that is computed in it, once."""
        return sum(training_flops([self.ours.learners[0].task], [self.ours.teacher], self.ours.data()))


def stages(step: Step, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of the stages of a step, the device waited for after each."""
    times: dict[str, list[float]] = {}

    def clocked(name: str, call: Callable[[], Any]) -> Any:
        found: list[Any] = []
        times.setdefault(name, []).append(timing.timed(lambda: found.append(call()), device))
        return found[0]

    for _ in range(rounds):
        data: Any = clocked("data", step.data)
        target: Any = clocked("teacher", lambda: step.teach(data))  # noqa: B023 - called at once
        losses = clocked("student forward", lambda: step.forward(data, target))  # noqa: B023
        clocked("backward", lambda: step.backward(losses))  # noqa: B023
        clocked("optimiser", lambda: step.update(losses))  # noqa: B023
    return {name: statistics.median(own) for name, own in times.items()}


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    """Losses as the host reads them."""
    return {name: loss.item() for name, loss in losses.items()}


def compare_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the variants and print their tables; what was found."""
    bench = Workbench(args, args.student)
    steps = {name: bench.build(name) for name in dict.fromkeys([BASELINE, *args.variants])}
    losses = {name: numbers(step()) for name, step in steps.items()}
    times = timing.in_turn(steps, args.rounds, bench.device, calls=args.calls)
    summary = timing.summarise(times, BASELINE)
    parts = {name: stages(step, min(3, args.rounds), bench.device) for name, step in steps.items()}
    flops, (peak, origin) = bench.flops(), timing.peak_flops(bench.device, args.peak_side)
    use = {name: flops / seconds / peak for name, (seconds, _) in summary.items()}
    print(f"{flops / 1e9:,.1f} GFLOP a step; peak {peak / 1e12:,.2f} TFLOP/s in bfloat16, by {origin}\n")
    rows = []
    for name, (seconds, speedup) in summary.items():
        error = max(abs(loss / losses[BASELINE][key] - 1) for key, loss in losses[name].items())
        shown = [f"{losses[name][key]:.5f}" for key in ("token", "feature", "patch")]
        row = [f"{seconds:.3f}", f"{speedup:.2f}", f"{args.batch / seconds:.1f}", f"{use[name]:.0%}"]
        rows.append([name, *row, *shown, f"{error:.0e}"])
    header = ["variant", "s", "ratio", "images/s", "MFU", "token", "feature", "patch", "difference"]
    print(timing.table(header, rows))
    names = list(parts[BASELINE])
    print(f"\n{timing.table(['stages, s', *names], [[v, *(f'{p[n]:.3f}' for n in names)] for v, p in parts.items()])}")
    return {
        "times": times, "summary": {name: row._asdict() for name, row in summary.items()}, "losses": losses,
        "stages": parts, "mfu": use, "flops": flops, "peak": peak, "peak_from": origin,
    }  # fmt: skip


def compare_students(args: argparse.Namespace) -> dict[str, Any]:
    """Measure students that share a pass of the teacher against runs of their own; what was found."""
    args.overrides = [*args.overrides, *(key for word in args.settings for key in SETTINGS[word])]
    together = Workbench(args, args.students).ours
    alone = [Workbench(args, name).ours for name in args.students]
    losses = {"together": numbers(together())}
    losses["alone"] = {
        f"{learner.name}: {key}": value
        for learner, step in zip(together.learners, alone, strict=True)
        for key, value in numbers(step()).items()
    }
    runs = dict(zip(args.students, alone, strict=True)) | {"together": together}
    times = timing.in_turn(runs, args.rounds, together.device, calls=args.calls)
    times["alone"] = [sum(own) for own in zip(*(times[name] for name in args.students), strict=True)]
    summary = timing.summarise(times, "alone")
    cost = 1 / summary["together"].speedup
    equal = "equal to the bit" if losses["together"] == losses["alone"] else "NOT equal"
    rows = [
        [f"{' + '.join(args.students)}, {kind}", f"{summary[key].seconds:.3f}", f"{share:.2f}"]
        for kind, key, share in (("a run each", "alone", 1.0), ("one pass of the teacher", "together", cost))
    ]
    print(timing.table(["students", "s", "of two runs"], rows))
    print(f"\nlosses of the first step: {equal}")
    return {"times": times, "cost": cost, "losses": losses}


def compare_epochs(args: argparse.Namespace) -> dict[str, Any]:
    """Measure a cached epoch against a live one; what was found."""
    overrides = [*args.overrides, *(key for word in args.settings for key in SETTINGS[word])]
    return compare_cache(args.teacher, args.student, args.batch, args.image_size, args.images, args.rounds, overrides)


COMPARISONS = {"steps": compare_steps, "students": compare_students, "cache": compare_epochs}


def main(argv: list[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", default="steps", choices=[*COMPARISONS])
    parser.add_argument("--teacher", default="dinov2_vitb14")
    parser.add_argument("--student", default="proteus_vits14")
    parser.add_argument("--students", nargs="+", default=STUDENTS, help="for --compare students")
    parser.add_argument("--settings", nargs="*", default=[], choices=[*SETTINGS], help="of the other two comparisons")
    parser.add_argument("--images", default=32, type=int, help="of --compare cache: an epoch's")
    parser.add_argument("--batch", default=4, type=int)
    parser.add_argument("--image-size", default=224, type=int)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--rounds", default=8, type=int)
    parser.add_argument("--calls", default=1, type=int, help="steps in a row before the device is waited for")
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--peak-side", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a JSON file for everything measured")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        facts = timing.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        print(f"{timing.describe(facts)}; {args.teacher}, batch {args.batch} at {args.image_size} px\n", flush=True)
        found = COMPARISONS[args.compare](args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    timing.write_json(args.out, {"machine": facts, "settings": vars(args)} | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
