"""Reading a run's YAML file into the typed tree of `config`.

A file may start from another (`base: other.yaml`), the command line may override any key (`a.b=c`), and whatever
does not fit the tree is one clear line that names the key. Nothing here imports torch: a typo is reported at once.
"""

import difflib
import re
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from proteus.config import Config, RunBase, Section
from proteus.errors import InputError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

MAX_BASES = 10  # files that a config stands on
# Of a file with its aliases written out: a few lines of them may stand for billions.
MAX_VALUES = 100_000
MAX_CHARACTERS = 10_000_000  # of all values, with the key of each, a.b.c
MAX_DEPTH = 100


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, 2024-01-02 and no are texts, and a key stands once.

    A safe loader's tags make numbers, texts, lists and mappings, and nothing else.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":bool"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "too many keys are merged", node.start_mark)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


Tree = TypeVar("Tree", bound=Section)


@overload
def load_config(name: str, overrides: list[str] | None = None) -> Config: ...
@overload
def load_config(name: str, overrides: list[str] | None, root: type[Tree]) -> Tree: ...
def load_config(name: str, overrides: list[str] | None = None, root: type[Section] = Config) -> Section:
    """Read `name` (a path, or a file under `configs/`), apply `key=value` overrides and check the whole tree.

    Raises `InputError` with a line for each thing that is wrong.
    """
    path = _find(name, Path.cwd())
    tree = read_tree(path)
    for override in overrides or []:
        _override(tree, override)
    try:
        config = root.model_validate(tree)
    except ValidationError as error:
        raise InputError(*explain(error, path.name, root)) from None
    run: RunBase = config.run  # type: ignore[attr-defined]
    if run.dir is None:
        run.dir = f"runs/{path.stem}"
    return config


def dump_config(config: Section) -> str:
    """The resolved tree as YAML; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's values by their keys as the command line has them, a.b.c."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _find(name: str, beside: Path, library: Path = CONFIGS) -> Path:
    for path in (beside / name, library / name):
        if path.is_file():
            return path
    known = [str(path.relative_to(library)) for path in library.rglob("*.yaml")]
    raise InputError(f"config {name!r} is neither a file nor a name under {library}{nearest(name, known)}")


def read_tree(path: Path, library: Path = CONFIGS, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as nested dictionaries, on top of the file that its `base` names, beside it or in the library.

    InputError where it is none, or where files stand on each other without end.
    """
    path = path.resolve()
    if path in children:
        raise InputError(f"{path}: base leads back to the file itself")
    if len(children) > MAX_BASES:
        raise InputError(f"{path}: more than {MAX_BASES} files stand on each other by base, from {children[0]} on")
    tree = read_mapping(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(read_tree(_find(str(base), path.parent, library), library, (*children, path)), tree)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of bounded size as nested dictionaries, alone; InputError where it is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")  # what is no UTF-8 is no YAML either
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str, path: Path) -> Any:
    """The YAML of a file, or of a part of it, of bounded size; InputError, which names the file, where it is none."""
    try:
        return _parse(text)
    except Exception as error:  # a tag's own reader may raise anything
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:300]}") from None


def _parse(text: str) -> Any:
    tree = yaml.load(text, Loader=_Loader)
    level, values, characters = [(tree, 0)], 0, 0  # with the length of the key that leads to it, a.b.c
    for _ in range(MAX_DEPTH):  # which ends where an alias stands inside of what it names, too
        below: list[tuple[Any, int]] = []
        for value, key in level:
            holds = isinstance(value, dict | list | set | tuple)
            values += len(value) if holds else 0
            characters += key if holds else key + len(str(value))
            if values > MAX_VALUES or characters > MAX_CHARACTERS:
                raise ValueError(f"it stands for over {MAX_VALUES:,} values or {MAX_CHARACTERS:,} characters")
            if isinstance(value, dict):
                below += [(part, key + len(str(name)) + 1) for name, part in value.items()]
            elif holds:
                below += [(part, key) for part in value]
        if not below:
            return tree
        level = below
    raise ValueError(f"it is more than {MAX_DEPTH} levels deep")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override!r} is not an override: write key=value, such as run.batch_size=64")
    *parents, leaf = key.split(".")
    branch: Any = tree  # a mapping, or a list, whose places are numbers: teachers.1.checkpoint
    for parent in parents:
        place = _place(branch, parent, key)
        below = branch[place] if isinstance(branch, list) else branch.get(place)
        if not isinstance(below, dict | list):
            below = branch[place] = {}
        branch = below
    try:
        parsed = _parse(value)
    except Exception:  # as above; a text then
        parsed = value
    branch[_place(branch, leaf, key)] = parsed


def _place(branch: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    if isinstance(branch, dict):
        return part
    if not part.isdecimal() or int(part) >= len(branch):
        raise InputError(f"{key}: {part} is no place in a list of {len(branch)}, which are counted from 0")
    return int(part)


def explain(error: ValidationError, file: str, root: type[BaseModel] = Config) -> list[str]:
    """A line for each thing of a file that does not fit the tree below `root`."""
    lines = []
    keys = list(_keys(root))
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            # The key may be misspelt, or right but in the wrong section.
            leaf = key.rsplit(".", 1)[-1]
            elsewhere = [known for known in keys if known.rsplit(".", 1)[-1] == leaf]
            close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0)
            place = re.match(r"(teachers|students)\.\d+\.", key)  # of a list, whose keys are known without a number
            valid = [re.sub(rf"^{place[1]}\.", place[0], known) for known in keys] if place else keys
            hint = f"; did you mean {close[0]!r}?" if close and not place else nearest(key, valid)
            lines.append(f"{file}: unknown key {key!r}{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{file}: {key} is missing")
        elif problem["type"] == "value_error":
            lines.append(f"{file}: {_placed(key, message)}")
        else:
            lines.append(f"{file}: {key}: {message[:1].lower()}{message[1:]}, not {problem['input']!r}")
    return lines


def _placed(key: str, message: str) -> str:
    """A validator's words behind the key it belongs to; one of a section may begin with the field it means."""
    if not key:
        return message
    return f"{key}.{message}" if re.match("[a-z_]+: ", message) else f"{key}: {message}"


def _keys(section: type[BaseModel], prefix: str = ""):
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")
