"""What of a config may change between two starts of one run."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from proteus.config import Config
from proteus.config_files import dump_config, flat_keys
from proteus.errors import InputError
from proteus.training.state import list_checkpoints

CONFIG = "config.yaml"  # of a run directory: what it was last started with

# Keys, or sections of them. A step number would mean other images, or weights other parts: refused. So are, by what
# the checkpoint says of itself, other networks, another number of images, and of images to a step.
REFUSED = ("run.seed", "data.repeats", "student.tune", "student.rank")

# These change nothing that is computed: not even told.
HARMLESS = (
    *("run.dir", "run.log_every", "run.save_every", "run.keep", "run.max_nonfinite"),
    *("data.workers", "data.timeout", "data.max_bad_share", "data.max_bad_files", "data.download", "probe"),
    *("teacher.download", "teacher.shard"),
)


class Changes(NamedTuple):
    """Changed keys as `key: then -> now`. What is told takes effect from the next step on."""

    refused: list[str]
    told: list[str]


def changes(cfg: Config, directory: Path) -> Changes:
    """What of a config differs from the one that the run in `directory` was last started with."""
    result = Changes([], [])
    before = _read(directory / CONFIG)
    if before is None:
        return result
    then, now = flat_keys(_numbered(before)), flat_keys(_numbered(yaml.safe_load(dump_config(cfg))))
    for key in sorted(now.keys() | then.keys()):
        if then.get(key) == now.get(key) or _is_in(key, HARMLESS):
            continue
        line = f"{key}: {then.get(key)} -> {now.get(key)}"
        (result.refused if _is_in(key, REFUSED) else result.told).append(line)
    return result


def _numbered(tree: Any) -> Any:
    """A tree with mappings in place of lists of mappings: students.0.tune is a key as student.tune is."""
    if isinstance(tree, list) and tree and all(isinstance(one, dict) for one in tree):
        tree = dict(enumerate(tree))
    return {key: _numbered(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def check_changes(cfg: Config, directory: Path) -> None:
    """InputError where a run that has checkpoints in `directory` cannot go on under this config."""
    refused = changes(cfg, directory).refused if list_checkpoints(directory / "checkpoints") else []
    if refused:
        raise InputError(
            f"run.dir={directory} holds a run that cannot go on with {'; '.join(refused)}: give another run.dir, "
            "or take the change back"
        )


def _is_in(key: str, group: tuple[str, ...]) -> bool:
    key = re.sub(r"^(teacher|student)s\.\d+\.", r"\1.", key)
    return any(key == name or key.startswith(name + ".") for name in group)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return None
    return tree if isinstance(tree, dict) else None
