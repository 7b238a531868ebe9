"""What labels are worth: every method of a transfer at several label budgets, as a table and a picture.

python -m benchmarks.label_curve --cfg transfer/digits.yaml --per-class 1,2,5,10,20 --compare oriented,agnostic,scratch

Runs lie in <run.dir>/per_class_N; what is done there is not done again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.charts import COLOURS
from proteus.config_files import load_config
from proteus.engine.atomic import write_file
from proteus.errors import InputError, RunError, Stopped
from proteus.transfer.config import TransferConfig
from proteus.transfer.pipeline import TEACHER, Result, choose_methods, transfer
from proteus.transfer.preflight import check_inputs
from proteus.transfer.report import METRICS
from proteus.transfer.target import open_target


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, as tools/transfer.py does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_curve", description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", required=True, help="a config of tools/transfer.py")
    parser.add_argument("--per-class", required=True, help="labels of each class, such as 1,2,5,10,20")
    parser.add_argument("--compare", default="oriented,agnostic,contrastive,scratch", help="methods")
    parser.add_argument("override", nargs="*", help="key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        if not all(word.isdecimal() and int(word) for word in args.per_class.split(",")):
            raise InputError(f"--per-class {args.per_class}: expected numbers above 0, such as 1,2,5")
        configs = {
            budget: load_config(args.cfg, [*args.override, f"target.train.per_class={budget}"], TransferConfig)
            for budget in sorted({int(word) for word in args.per_class.split(",")})
        }
        cfg = next(iter(configs.values()))
        _check(configs)
        methods = choose_methods(cfg, args.compare)
        folder = Path(cfg.run.dir or "runs")
        results: dict[int, list[Result]] = {}
        for budget, cfg in configs.items():
            cfg.run.dir = str(folder / f"per_class_{budget}")
            results[budget] = transfer(cfg, methods, list(range(cfg.run.seed, cfg.run.seed + cfg.run.seeds)))
    except (InputError, RunError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is done", file=sys.stderr)
        return 130
    print(budget_table(results))
    write_file(folder / "label_curve.png", lambda path: draw_curve(results, METRICS[cfg.task], path))
    print(f"picture: {folder / 'label_curve.png'}")
    return 0


def _check(configs: dict[int, TransferConfig]) -> None:
    """InputError where a budget cannot be compared with the others, before anything is trained."""
    labelled = 0
    for budget, cfg in configs.items():
        if cfg.task != "classification" or cfg.target.test is None:
            raise InputError("a curve over labels of each class needs task=classification and a target.test")
        check_inputs(cfg)
        found = len(open_target(cfg, cfg.run.seed).train)
        if found == labelled:
            raise InputError(f"--per-class {budget}: there are no more than {found} labelled images, as with fewer")
        labelled = found


def curves(results: dict[int, list[Result]]) -> dict[str, dict[int, list[float]]]:
    """Scores in per cent by title and budget, one a seed; the titles in the order of the methods, the teacher first."""
    by_title: dict[str, dict[int, list[float]]] = {}
    for budget, rows in results.items():
        for row in sorted(rows, key=lambda row: row.method != TEACHER):
            assert row.test is not None  # or there would be nothing to compare
            by_title.setdefault(row.title, {}).setdefault(budget, []).append(100 * row.test)
    return by_title


def budget_table(results: dict[int, list[Result]]) -> str:
    """Markdown: a row a method, a column a budget, mean and standard deviation over the seeds."""
    lines = [f"| labels of each class | {' | '.join(map(str, results))} |", f"| --- |{' --- |' * len(results)}"]
    for title, scores in curves(results).items():
        cells = [_shown(scores[budget]) if budget in scores else "" for budget in results]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curve(results: dict[int, list[Result]], metric: str, path: Path) -> None:
    """Score over budget, on a logarithmic axis, with a band of one standard deviation."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    teacher = {row.title for rows in results.values() for row in rows if row.method == TEACHER}
    for index, (title, scores) in enumerate(curves(results).items()):
        budgets = list(scores)
        means = [mean(scores[budget]) for budget in budgets]
        spread = [stdev(scores[budget]) if len(scores[budget]) > 1 else 0.0 for budget in budgets]
        colour, line = ("#6b7280", "--") if title in teacher else (COLOURS[(index - len(teacher)) % len(COLOURS)], "-")
        axes.plot(budgets, means, color=colour, marker="o", markersize=4, linestyle=line, label=title)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(budgets, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(list(results), [str(budget) for budget in results])
    axes.minorticks_off()
    axes.set_xlabel("labels of each class")
    axes.set_ylabel(f"test {metric} (%)")
    axes.grid(color="#eee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, format="png", dpi=110)


def _shown(scores: Sequence[float]) -> str:
    return f"{mean(scores):.1f}" + (f" ± {stdev(scores):.1f}" if len(scores) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
