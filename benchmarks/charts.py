"""The report's charts, as SVG that needs nothing else."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

COLOURS = ("#1f5fa8", "#d9822b", "#3a8f5c", "#8a5ba6", "#b8443c", "#6b7280")


class Series(NamedTuple):
    """A model's value for each task of a chart, None where it has none."""

    label: str
    values: Sequence[float | None]


def radar(tasks: Sequence[str], series: Sequence[Series]) -> str:
    """An axis a task; values are shares of the reference model's score, which is the circle at 100 %."""
    figure = Figure(figsize=(6.0, 5.4))
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)
    angles = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    for i, (label, values) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        shown = [math.nan if value is None else 100 * value for value in values]
        axes.plot(
            [*angles, angles[0]], [*shown, shown[0]], color=colour, label=_plain(label), linewidth=1.8, marker="."
        )
        if not any(map(math.isnan, shown)):
            axes.fill(angles, shown, color=colour, alpha=0.08)
    known = [100 * value for _, values in series for value in values if value is not None]
    axes.set_ylim(min([50.0, *known]) // 10 * 10, max([100.0, *known]) + 2)
    axes.set_xticks(angles, tasks, fontsize=8)
    axes.tick_params(axis="y", labelsize=7, colors="#666")
    axes.tick_params(axis="x", pad=14)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.grid(color="#ddd")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False, fontsize=8)
    return _svg(figure)


def bars(tasks: Sequence[str], series: Sequence[Series], unit: str) -> str:
    """A group of bars a task, a bar a model."""
    figure = Figure(
        figsize=(min(11.5, max(4.5, 0.5 + 0.3 * len(tasks) * (len(series) + 1))), 3.3), layout="constrained"
    )
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(tasks))]
        heights = [0.0 if value is None or math.isnan(value) else value for value in values]
        drawn = axes.bar(places, heights, 0.92 * width, color=COLOURS[i % len(COLOURS)], label=_plain(label))
        texts = ["" if value is None else number(value, unit) for value in values]
        axes.bar_label(drawn, texts, fontsize=6.5, padding=1, rotation=90 if len(tasks) * len(series) > 24 else 0)
    axes.set_xticks(range(len(tasks)), tasks, fontsize=8, rotation=30 if len(tasks) > 5 else 0)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32 if len(tasks) > 5 else -0.12), frameon=False, fontsize=8)
    return _svg(figure)


def number(value: float, unit: str) -> str:
    """A score as it is printed: percent with one decimal, metres with three."""
    return f"{value:.3f}" if unit == "m" else f"{value:.1f}"


def _plain(label: str) -> str:
    """A label that matplotlib neither leaves out of the legend nor reads as a formula."""
    return label.lstrip("_").replace("$", r"\$")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML header, which has no place inside HTML
