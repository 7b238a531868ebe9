"""What a model kept: results.json as a Markdown table and as one HTML page that needs nothing else.

python benchmarks/report.py OUT        renders OUT/results.json again
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

if not __package__:  # run as a file: the folder above is what `benchmarks` is found in
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jinja2
from pydantic import ValidationError

from benchmarks.charts import Series, bars, number, radar
from benchmarks.published import Published
from benchmarks.result import Direction, Model, Result, Results, TaskFacts, write_text
from proteus.errors import InputError

GROUPS = {
    "imagenet": "ImageNet",
    "fine-grained": "Fine-grained",
    "dense": "Dense",
    "robustness": "Robustness",
    "extra": "Extras",
    "own": "Own tasks",
    "embedded": "Smoke tests",
}
SMOKE = "smoke test: a small drawn or scanned set that shows the code at work, not what a model is worth"

STATISTICS = {
    "own": "each model's own (published figures were made with those of the protocols)",
    "protocol": "those of the protocols",
}


class Cell(NamedTuple):
    """A score as text, its difference to the model's and whether the model is better; empty where there is none."""

    score: str = ""
    difference: str = ""
    better: bool | None = None


class Row(NamedTuple):
    """A task's line: the model's score, its share of the teacher's, and the others' beside it."""

    title: str
    metric: str
    protocol: str
    score: str
    kept: str
    others: list[Cell]
    published: list[Cell]
    seconds: str
    smoke: bool


class Section(NamedTuple):
    """A group of tasks."""

    title: str
    rows: list[Row]


class Page(NamedTuple):
    """All that the templates need."""

    results: Results
    model: Model
    teacher: Model | None
    others: list[Model]
    columns: list[str]
    sections: list[Section]
    summary: list[tuple[str, str]]
    sources: list[str]


def unit_of(task: TaskFacts) -> str:
    """Metres for depth errors, percent for all else."""
    return "m" if task.kind == "depth" else "%"


def kept(score: float, reference: float, direction: Direction) -> float | None:
    """The share of the reference's score that is kept; of an error, the share that the reference's is of it."""
    above, below = (score, reference) if direction == "higher" else (reference, score)
    return above / below if below > 0 else None


def page(results: Results, published: Published | None = None) -> Page:
    """What a report says, from the results alone."""
    columns = _columns(results, published or Published())
    sections = []
    for group, title in GROUPS.items():
        tasks = [task for task in results.tasks if task.group == group]
        rows = [columns.row(task) for task in tasks if columns.any_score(task)]
        if group == "fine-grained" and (average := columns.average(tasks)):
            rows.append(average)
        if rows:
            sections.append(Section(title, rows))
    names = [f"{name}, published" for name in columns.named]
    sources = [columns.published.sources[source] for source in columns.sources()]
    summary = _summary(results, columns.model, columns.teacher)
    return Page(results, columns.model, columns.teacher, columns.others, names, sections, summary, sources)


class _Columns(NamedTuple):
    """What stands beside each other in a row: the model, the other models, and the published figures of `named`."""

    results: Results
    model: Model
    teacher: Model | None
    others: list[Model]
    named: list[str]
    published: Published

    def any_score(self, task: TaskFacts) -> Result | None:
        """A result of the task, whosever."""
        found = (self.results.score_of(m.label, task.task) for m in (self.model, *self.others))
        return next((result for result in found if result), None)

    def row(self, task: TaskFacts) -> Row:
        """A task's line."""
        results = {m.label: self.results.score_of(m.label, task.task) for m in (self.model, *self.others)}
        scores = {label: result.score if result else None for label, result in results.items()}
        own, some = results[self.model.label], self.any_score(task)
        assert some is not None
        line = self._line(task.title, scores, task.published, some.protocol, task.direction, unit_of(task))
        metric = f"{task.metric} {'↑' if task.direction == 'higher' else '↓'}"
        return line._replace(metric=metric, smoke=task.smoke, seconds=f"{own.seconds:.0f} s" if own else "")

    def average(self, tasks: Sequence[TaskFacts]) -> Row | None:
        """The plain mean of the twelve sets, of those models that have all of them."""
        scores = {}
        for m in (self.model, *self.others):
            found = [result.score for task in tasks if (result := self.results.score_of(m.label, task.task))]
            scores[m.label] = fmean(found) if len(found) == 12 else None
        if scores[self.model.label] is None:
            return None
        some = self.any_score(tasks[0])
        assert some is not None
        return self._line("Average of the twelve", scores, "fine-grained", some.protocol, "higher", "%")

    def sources(self) -> list[str]:
        """Where the published figures shown stand."""
        shown = [(task.published, some.protocol) for task in self.results.tasks if (some := self.any_score(task))]
        found = (self.published.of(name, *task) for name in self.named for task in shown)
        return sorted({figure.source for figure in found if figure})

    def _line(
        self, title: str, scores: dict[str, float | None], task: str, protocol: str, direction: Direction, unit: str
    ) -> Row:
        own = scores[self.model.label]
        reference = scores[self.teacher.label] if self.teacher else None
        share = kept(own, reference, direction) if own is not None and reference is not None else None
        figures = [self.published.of(name, task, protocol) for name in self.named]
        return Row(
            title,
            "",
            protocol,
            "-" if own is None else number(own, unit),
            "" if share is None else f"{share:.1%}",
            [_cell(own, scores[m.label], direction, unit) for m in self.others],
            [_cell(own, figure.score if figure else None, direction, unit) for figure in figures],
            "",
            False,
        )


def _columns(results: Results, published: Published) -> _Columns:
    model = next(m for m in results.models if m.role == "model")
    teacher = next((m for m in results.models if m.role == "teacher"), None)
    others = [m for m in results.models if m.role != "model"]
    shown = {task.published for task in results.tasks}
    shown |= {"fine-grained"} if any(task.group == "fine-grained" for task in results.tasks) else set()
    known = {name for (name, task, _), _ in published if task in shown}
    names = [*(m.name for m in results.models), *results.published]
    named = [name for name in dict.fromkeys(names) if name in known]
    return _Columns(results, model, teacher, others, named, published)


def _cell(score: float | None, other: float | None, direction: Direction, unit: str) -> Cell:
    if other is None:
        return Cell()
    if score is None:
        return Cell(number(other, unit))
    difference = score - other
    better = None if difference == 0 else (difference > 0) == (direction == "higher")
    text = f"{difference:+.3f}" if unit == "m" else f"{difference:+.1f}"
    return Cell(number(other, unit), text, better)


def _summary(results: Results, model: Model, teacher: Model | None) -> list[tuple[str, str]]:
    done = [task for task in results.tasks if results.score_of(model.label, task.task)]
    facts = [("Parameters", f"{model.parameters / 1e6:.2f} M"), ("Tasks", f"{len(done)} of {len(results.tasks)}")]
    if teacher is not None:
        facts.insert(1, ("Share of the teacher's parameters", f"{model.parameters / teacher.parameters:.0%}"))
        real = [task for task in done if task.paper] or [task for task in done if not task.smoke] or done
        shares = [_share(results, model, teacher, task) for task in real]
        known = [share for share in shares if share is not None]
        if known:
            tasks = "1 task" if len(known) == 1 else f"{len(known)} tasks"
            facts.append((f"Of the teacher's score kept, mean of {tasks}", f"{fmean(known):.1%}"))
    return facts


def _share(results: Results, model: Model, reference: Model, task: TaskFacts) -> float | None:
    own, other = results.score_of(model.label, task.task), results.score_of(reference.label, task.task)
    return kept(own.score, other.score, task.direction) if own and other else None


def markdown(page: Page) -> str:
    """The table as Markdown."""
    return _template("report.md.j2", autoescape=False).render(page=page, smoke=SMOKE, statistics=STATISTICS)


def html(page: Page, folder: Path) -> str:
    """One self-contained page; pictures are read from below `folder`, where results lie."""
    pictures = [
        (result.model, picture.title, _data_url(folder / picture.file))
        for result in page.results.results
        for picture in result.pictures
        if (folder / picture.file).is_file()
    ]
    return _template("report.html.j2", autoescape=True).render(
        page=page, charts=charts(page), pictures=pictures, smoke=SMOKE, statistics=STATISTICS
    )


def charts(page: Page) -> list[tuple[str, str]]:
    """(title, SVG): a radar chart of the shares kept, and bars by unit."""
    results, drawn = page.results, []
    models = [page.model, *page.others]
    done = [task for task in results.tasks if any(results.score_of(m.label, task.task) for m in models)]
    reference = page.teacher or page.model
    on_radar = [task for task in done if results.score_of(reference.label, task.task)]
    if len(on_radar) >= 3:
        series = [Series(m.label, [_share(results, m, reference, task) for task in on_radar]) for m in models]
        drawn.append((f"Share of {reference.label}'s score, %", radar([task.task for task in on_radar], series)))
    for unit in ("%", "m"):
        for direction, words in (("higher", "higher is better"), ("lower", "lower is better")):
            tasks = [task for task in done if unit_of(task) == unit and task.direction == direction]
            if tasks:
                series = [
                    Series(m.label, [r.score if (r := results.score_of(m.label, t.task)) else None for t in tasks])
                    for m in models
                ]
                drawn.append((f"Scores, {words}", bars([task.task for task in tasks], series, unit)))
    return drawn


def _template(name: str, autoescape: bool) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment.get_template(name)


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def write_report(results: Results, out: Path) -> None:
    """report.md and report.html, beside results.json."""
    content = page(results)
    write_text(out / "report.md", markdown(content))
    write_text(out / "report.html", html(content, out))


def read_results(out: Path) -> Results:
    """OUT/results.json; InputError where it is not there or not ours."""
    path = out / "results.json"
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the folder that run.py --out wrote") from None
    except (ValidationError, ValueError) as error:
        raise InputError(f"{path} is no results file of this version: {str(error).splitlines()[0]}") from None


def main(argv: list[str] | None = None) -> int:
    """Render; returns the exit status."""
    parser = argparse.ArgumentParser(prog="report.py", description="Render OUT/results.json again.")
    parser.add_argument("out", type=Path)
    out = parser.parse_args(argv).out
    try:
        write_report(read_results(out), out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out / 'report.md'}\n{out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
