"""What of a config may change between two starts of one run."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from proteus.config import Config
from proteus.config_files import dump_config, flat_keys, parse_yaml, read_mapping
from proteus.errors import InputError

CONFIG = "config.yaml"  # of a checkpoint: what it was made under; of a run directory: what it was last started with

# Keys, or sections of them. A step number would mean other images, or weights other parts: refused. So are, by what
# the checkpoint says of itself, other networks, another number of images, and of images to a step.
REFUSED = ("run.seed", "data.repeats", "student.tune", "student.rank")

# These change nothing that is computed: not even told.
HARMLESS = (
    *("run.dir", "run.log_every", "run.save_every", "run.keep", "run.max_nonfinite"),
    *("data.workers", "data.timeout", "data.max_bad_share", "data.max_bad_files", "data.download", "teacher.download"),
    *("probe.every_epochs", "probe.bank", "probe.neighbours", "probe.pictures", "probe.crop"),
)


class Changes(NamedTuple):
    """Changed keys as `key: then -> now`. What is told takes effect from the next step on."""

    refused: list[str]
    told: list[str]


def changes(cfg: Config, checkpoint: Path) -> Changes:
    """What of a config differs from the one that a checkpoint was made under; InputError where it has none."""
    result = Changes([], [])
    path = checkpoint / CONFIG
    then = _flat(read_mapping(path))
    now = _flat(parse_yaml(dump_config(cfg), path))  # as it would be read there
    for key in sorted(now.keys() | then.keys()) if then else []:
        if then.get(key) == now.get(key) or _is_in(key, HARMLESS):
            continue
        line = f"{key}: {then.get(key)} -> {now.get(key)}"
        refused = _is_in(key, REFUSED) and key in then  # not one that was not there yet
        (result.refused if refused else result.told).append(line)
    return result


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flat_keys(_numbered(tree))


def _numbered(tree: Any) -> Any:
    """A tree with mappings in place of lists of mappings: students.0.tune is a key as student.tune is."""
    if isinstance(tree, list) and tree and all(isinstance(one, dict) for one in tree):
        tree = dict(enumerate(tree))
    return {str(key): _numbered(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def check_changes(cfg: Config, checkpoint: Path) -> list[str]:
    """What has changed since a checkpoint and is to be told; InputError where a run cannot go on from it so."""
    found = changes(cfg, checkpoint)
    if found.refused:
        raise InputError(
            f"a run cannot go on from {checkpoint} with {'; '.join(found.refused)}: take the change back, or give "
            "another run.dir to begin again"
        )
    return found.told


def _is_in(key: str, group: tuple[str, ...]) -> bool:
    key = re.sub(r"^(teacher|student)s\.\d+\.", r"\1.", key)
    return any(key == name or key.startswith(name + ".") for name in group)
