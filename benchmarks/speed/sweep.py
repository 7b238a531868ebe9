"""Images a second of our step over batch sizes, and the memory it takes.

python -m benchmarks.speed.sweep [--batches 1 2 4 8 16] [--settings float32 bf16,teacher] [--out sweep.json]

A setting is words joined by commas, those of benchmarks.speed.step: bf16, teacher, compile, sdpa, xformers (on a GPU);
`float32` alone is none of them. All are measured in turn, in rounds; the ratio is against the first setting at the
first batch, image for image. Memory is the peak of two steps on a GPU, of the whole process on a CPU (with Linux). A
batch that does not fit into a GPU's memory is left out of the table, with those above it.
"""

import argparse
import statistics
import sys
from typing import Any

import torch

from benchmarks.speed import timing
from benchmarks.speed.memory import peak_memory, release
from benchmarks.speed.ours import OurStep, build_teacher, recipe
from benchmarks.speed.step import SETTINGS
from proteus.errors import InputError, nearest
from proteus.models import Encoder

PLAIN = "float32"


def overrides_of(setting: str) -> list[str]:
    """The keys of a config that a setting stands for; InputError where it stands for none."""
    words = [] if setting == PLAIN else setting.split(",")
    for word in words:
        if word not in SETTINGS:
            raise InputError(f"--settings: unknown word {word!r}{nearest(word, SETTINGS)}")
    return [key for word in words for key in SETTINGS[word]]


def first_steps(args: argparse.Namespace, setting: str, batch: int, teacher: Encoder) -> tuple[OurStep, int] | None:
    """The step, warmed up, and the most memory it took; None where it does not fit."""
    cfg = recipe(args.teacher, args.student, batch, args.image_size, [*args.overrides, *overrides_of(setting)])
    release()
    try:
        step = OurStep(cfg, teacher)
        step()
        with peak_memory(step.device) as memory:
            timing.timed(step, step.device, calls=2)
    except torch.OutOfMemoryError:
        return None
    return step, memory[0]


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each setting and batch that fits: images a second, seconds, the ratio, bytes."""
    teacher = build_teacher(recipe(args.teacher, args.student, 1, args.image_size, args.overrides))
    for setting in args.settings:
        overrides_of(setting)  # a typo is reported before anything is measured
    seconds: dict[tuple[str, int], list[float]] = {}
    memory: dict[tuple[str, int], int] = {}
    for number in range(args.rounds):
        for setting in args.settings:
            for batch in args.batches:
                # Built anew in each round: all of them at a time would leave no memory for the larger ones.
                fitting = first_steps(args, setting, batch, teacher)
                if fitting is None:
                    break
                step, taken = fitting
                seconds.setdefault((setting, batch), []).append(timing.timed(step, step.device, args.calls))
                memory[setting, batch] = max(taken, memory.get((setting, batch), 0))
                del step, fitting
            if number == 0 and (setting, args.batches[0]) not in seconds:
                raise InputError(f"{setting}: a batch of {args.batches[0]} does not fit into the device's memory")
    first = seconds[args.settings[0], args.batches[0]]
    rows = []
    for (setting, batch), own in seconds.items():
        ratios = [(a / args.batches[0]) / (b / batch) for a, b in zip(first, own, strict=False)]
        median = statistics.median(own)
        row = {"setting": setting, "batch": batch, "seconds": median, "images_per_second": batch / median}
        rows.append(row | {"ratio": statistics.median(ratios), "bytes": memory[setting, batch]})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="dinov2_vitb14")
    parser.add_argument("--student", default="proteus_vits14")
    parser.add_argument("--batches", nargs="+", default=[1, 2, 4, 8, 16], type=int)
    parser.add_argument("--settings", nargs="+", default=[PLAIN, "bf16,teacher"])
    parser.add_argument("--image-size", default=224, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--calls", default=2, type=int, help="steps in a row before the device is waited for")
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--out", help="a JSON file for everything measured")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    facts = timing.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{timing.describe(facts)}; {args.teacher} to {args.student} at {args.image_size} px\n", flush=True)
    try:
        rows = sweep(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    header = ["setting", "batch", "images/s", "s a step", "ratio", "memory, GB"]
    shown = [
        [
            *(row["setting"], str(row["batch"]), f"{row['images_per_second']:.1f}", f"{row['seconds']:.3f}"),
            *(f"{row['ratio']:.2f}", f"{row['bytes'] / 1e9:.2f}"),
        ]
        for row in rows
    ]
    print(timing.table(header, shown))
    timing.write_json(args.out, {"machine": facts, "settings": vars(args), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
