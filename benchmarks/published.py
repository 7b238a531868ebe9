"""What papers report, from published.yaml."""

from pathlib import Path
from typing import NamedTuple

import yaml

FILE = Path(__file__).with_name("published.yaml")


class Figure(NamedTuple):
    """A published score, and where it stands."""

    score: float
    source: str


class Published:
    """Scores by model, task and protocol."""

    def __init__(self, file: Path = FILE):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.sources: dict[str, str] = content["sources"]
        self._figures: dict[tuple[str, str, str], Figure] = {}
        for table in content["tables"]:
            for model, scores in table["rows"].items():
                for task, score in zip(table["tasks"], scores, strict=True):
                    if score is not None:
                        key = model, task, table["protocol"]
                        if key in self._figures:
                            raise ValueError(f"{file}: {key} stands twice")
                        self._figures[key] = Figure(float(score), table["source"])

    @property
    def models(self) -> set[str]:
        """Names of all models; zoo names where the zoo has them."""
        return {model for model, _, _ in self._figures}

    def of(self, model: str, task: str, protocol: str) -> Figure | None:
        """The published score of a model of the zoo, None where none is known."""
        return self._figures.get((model, task, protocol))

    def __iter__(self):
        return iter(self._figures.items())
