"""Everything to be measured of the training step on one GPU, in under nine minutes.

python -m benchmarks.speed.gpu [--out gpu] [--minutes 8.5] [--pairs B-S L-B g-L] [--batch N] [--toy]

For each pair of networks (random weights, 224 px) and the largest batch whose published step takes 80 % of the card:
the step as published, ours with all improvements, on torch's attention, compiled, and on xformers', then each of the
improvements alone, in turn with the published step. Writes out.md and out.json anew after each variant, so that what
has been measured stays. The pairs share the time equally; what no time is left for is named. A variant that fails (out
of memory, no xformers) is a row that says so. --toy: tiny networks, for trying the script out on a CPU.

Ratio, MFU and the losses' difference are those of benchmarks.speed.step. Memory is what torch had allocated at most,
that of the steps that are not running included.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import timing
from benchmarks.speed.memory import peak_memory, release
from benchmarks.speed.ours import build_teacher, recipe
from benchmarks.speed.step import BASELINE, Step, Workbench, numbers
from proteus.errors import InputError

PAIRS = {
    "B-S": ("dinov2_vitb14", "proteus_vits14"),
    "L-B": ("dinov2_vitl14", "proteus_vitb14"),
    "g-L": ("dinov2_vitg14", "proteus_vitl14"),
}
# What matters most comes first; the last ones are the first to go without.
VARIANTS = [
    "ours,bf16,teacher,sdpa,compile", "ours,bf16,teacher,xformers", "ours,bf16,teacher,sdpa", "published,half",
    "published,shared", "published,half,shared", "published,teacher", "published,bf16", "published,fused",
    "published,no-wait", "published,compile",
]  # fmt: skip
TOY = [
    "teacher.arch={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "student.arch={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
]
TOY_NAME = "timm/vit_tiny_patch16_224"
SHARE = 0.8  # of the card's memory
MOST = 1024  # images of a batch
TURN = 1.0  # seconds that a variant runs before it is the other's turn


def fill(settings: argparse.Namespace, student: str, teacher, device: torch.device) -> int:
    """The largest batch, of whole thirty-twos, whose published step fits; memory grows evenly with the batch."""
    taken = {}
    for settings.batch in (16, 48):
        step = Workbench(settings, student, teacher).build(BASELINE)
        step()
        with peak_memory(device) as memory:
            timing.timed(step, device)
        taken[settings.batch] = memory[0]
        del step
        release()
    slope = (taken[48] - taken[16]) / 32
    room = SHARE * torch.cuda.get_device_properties(device).total_memory - taken[48]
    return max(32, min(MOST, 48 + int(room / slope)) // 32 * 32)


def measure_pair(
    name: str, args: argparse.Namespace, device: torch.device, peak: float, end: float
) -> Iterator[dict[str, Any]]:
    """A row for each variant of a pair, until the clock says `end`."""
    teacher_name, student = (TOY_NAME, TOY_NAME) if args.toy else PAIRS[name]
    settings = argparse.Namespace(
        teacher=teacher_name, batch=2, image_size=16 if args.toy else 224, overrides=TOY if args.toy else []
    )
    teacher = build_teacher(recipe(teacher_name, student, 2, settings.image_size, settings.overrides)).to(device)
    flops = Workbench(settings, student, teacher).flops() / 2  # an image's
    settings.batch = args.batch or (fill(settings, student, teacher, device) if device.type == "cuda" else 4)
    bench = Workbench(settings, student, teacher)
    base = bench.build(BASELINE)
    losses = numbers(base())
    calls = max(1, round(TURN / timing.timed(base, device))) if device.type == "cuda" else 1
    for variant in (BASELINE, *args.variants):
        row: dict[str, Any] = {"pair": name, "variant": variant, "batch": settings.batch}
        if time.monotonic() > end:
            yield row | {"error": "no time was left for it"}
            continue
        torch._dynamo.reset()  # compiled code of the variant before, which would count as recompilation of this one
        try:
            summary, taken, own = measure(bench, base, variant, args.rounds, calls)
        except (RuntimeError, InputError) as error:  # of memory, of a compiler, of kernels
            yield row | {"error": reason_of(error)}
            continue
        rate = settings.batch / summary.seconds
        difference = max(abs(value / losses[key] - 1) for key, value in own.items())
        yield row | {
            "images_per_second": rate, "ratio": summary.speedup, "mfu": rate * flops / peak,
            "bytes": taken, "difference": difference,
        }  # fmt: skip


def measure(
    bench: Workbench, base: Step, variant: str, rounds: int, calls: int
) -> tuple[timing.Summary, int, dict[str, float]]:
    """A variant's time against the published step's, the bytes it takes, and the losses of its first step."""
    release()
    step = bench.build(variant)
    losses = numbers(step())
    step()
    with peak_memory(bench.device) as memory:
        step()
    times = timing.in_turn({BASELINE: base, variant: step}, rounds, bench.device, calls=calls)
    return timing.summarise(times, BASELINE)[variant], memory[0], losses


def reason_of(error: Exception) -> str:
    """An error in a cell of a table."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The Markdown page: the machine, then a table of all rows."""
    shown = []
    for row in rows:
        cells = [row["pair"], row["variant"], str(row["batch"])]
        if "error" in row:
            cells += [row["error"], "", "", "", ""]
        else:
            cells += [f"{row['images_per_second']:,.0f}", f"{row['ratio']:.2f}", f"{row['mfu']:.1%}"]
            cells += [f"{row['bytes'] / 1e9:.1f}", f"{row['difference']:.0e}"]
        shown.append(cells)
    header = ["pair", "variant", "batch", "images/s", "ratio", "MFU", "memory, GB", "losses' difference"]
    peak = f"peak {facts['peak'] / 1e12:,.2f} TFLOP/s in bfloat16, by {facts['peak_from']}"
    return f"{timing.describe(facts)}; {peak}\n\n{timing.table(header, shown)}\n"


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu", help="files to be written, without their endings .md and .json")
    parser.add_argument("--minutes", default=8.5, type=float)
    parser.add_argument("--pairs", nargs="+", default=[*PAIRS], choices=[*PAIRS])
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--batch", type=int, help="default: what fills the card")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.toy:
        print("error: there is no CUDA device here; --toy tries the script out on a CPU", file=sys.stderr)
        return 2
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, origin = timing.peak_flops(device, 256 if args.toy else None)
    facts = timing.machine(device) | {"peak": peak, "peak_from": origin}
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(args.pairs):
        left = begin + 60 * args.minutes - time.monotonic()
        end = time.monotonic() + left / (len(args.pairs) - number)
        try:
            for row in measure_pair(name, args, device, peak, end):
                rows.append(row)
                print(row, flush=True)
                Path(f"{args.out}.md").write_text(page(facts, rows))
                timing.write_json(f"{args.out}.json", {"machine": facts, "settings": vars(args), "rows": rows})
        except (RuntimeError, InputError) as error:
            rows.append({"pair": name, "variant": BASELINE, "batch": args.batch or 0, "error": reason_of(error)})
    print(f"\n{page(facts, rows)}\nin {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
