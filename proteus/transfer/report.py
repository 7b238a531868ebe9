"""What the methods were worth, as a table: mean and spread over the seeds, and what each one cost."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from proteus.transfer.config import TransferConfig

if TYPE_CHECKING:
    from proteus.transfer.pipeline import Result

METRICS = {"classification": "accuracy", "segmentation": "mIoU"}


def compare_table(cfg: TransferConfig, results: Sequence["Result"]) -> str:
    """Markdown: a row a method, in the order they were run; the spread is the standard deviation over seeds."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result.method, []).append(result)
    seeds = len({result.seed for result in results})
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    split = "validation" if cfg.target.test is None else "test"
    lines = [
        f"| {cfg.teacher.name} → {cfg.student.name} | {split} {METRICS[cfg.task]} (%) | each seed | student steps | "
        "training TFLOP |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows.values():
        found = [result.validation if cfg.target.test is None else result.test for result in row]
        scores = [100 * score for score in found if score is not None]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        each = " ".join(f"{score:.1f}" for score in scores)
        flops = mean(result.flops for result in row) / 1e12
        average = f"{mean(scores):.1f}" if scores else "not measured"
        lines.append(f"| {row[0].title} | {average}{spread} | {each} | {row[0].steps or ''} | {_three_digits(flops)} |")
    return "\n".join([*lines, "", f"*{over}; TFLOP of all stages, forward and backward, the teacher's included.*", ""])


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
