"""Where images come from. A source is a numbered set of images; labels are optional and used by probes only."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from proteus import config
from proteus.data.decode import decode
from proteus.data.huggingface import HuggingFaceSource
from proteus.data.packed import PackedSource
from proteus.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


class Source(Protocol):
    """n images, numbered from 0.

    labels:  [n] int64, or None where the set has none.
    classes: names of the labels, by number; empty where there are no labels.
    """

    labels: np.ndarray | None
    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB; raises whatever the decoder raises where it is broken."""
        ...

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""
        ...


class FolderSource:
    """Any tree of images. It has labels where every image lies exactly one folder deep: root/<class>/<image>."""

    def __init__(self, root: Path, use_labels: bool = True):
        self.root = root
        # Paths as one array of bytes: a list of a million strings would be copied into every worker, page by page.
        try:
            self._paths = np.array([os.fsencode(path) for path in _walk(root)])
        except OSError as error:
            raise InputError(f"data: {error.filename} cannot be read: {error.strerror}") from None
        if not len(self._paths):
            raise InputError(f"data: no images under {root} (looked for {' '.join(EXTENSIONS)})")
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        folders = [path.split(b"/")[:-1] for path in self._paths]
        if use_labels and all(len(folder) == 1 for folder in folders):
            classes = sorted({folder[0] for folder in folders})
            number = {name: label for label, name in enumerate(classes)}
            self.labels = np.array([number[folder[0]] for folder in folders])
            self.classes = [os.fsdecode(name) for name in classes]

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int) -> Image.Image:
        return decode(self.root / self.name(index))

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def file(self, index: int) -> str:
        """The whole path of image `index`."""
        return str(self.root / os.fsdecode(self._paths[index]))


class DigitsSource:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels: 1,347 to train on, 450 held out, stratified."""

    def __init__(self, split: str | None):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        everything = np.arange(len(digits.target))
        train, test = train_test_split(everything, test_size=450, random_state=0, stratify=digits.target)
        splits = {"train": train, "test": test, None: everything}
        if split not in splits:
            raise InputError(f"data.split={split}: the digits have splits train and test")
        self._chosen = np.sort(splits[split])
        self._scans = (digits.images[self._chosen] * (255 / 16)).round().astype(np.uint8)  # [n, 8, 8], ink is 16
        self.labels = digits.target[self._chosen].astype(np.int64)
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._scans)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._scans[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"digit {self._chosen[index]}"


class SingleImageSource:
    """`crops` fixed crops of one image: a proxy set without a data set (the paper's ImageNet-Single).

    Crop i is a square placed and sized by (seed, i), its side log-uniform between 1/16 and all of the short side.
    """

    labels: np.ndarray | None = None
    classes: list[str] = []  # noqa: RUF012

    def __init__(self, path: Path, crops: int, seed: int):
        self._image = decode(path)
        self._path, self._crops, self._seed = path, crops, seed

    def __len__(self) -> int:
        return self._crops

    def load(self, index: int) -> Image.Image:
        rng = np.random.default_rng((self._seed, index))
        width, height = self._image.size
        side = max(1, round(min(width, height) * 16 ** rng.uniform(-1, 0)))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return self._image.crop((left, top, left + side, top + side))

    def name(self, index: int) -> str:
        return f"{self._path} crop {index}"


class Subset:
    """Some images of a source, in the order given."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.source.load(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def file(self, index: int) -> str:
        """As `file_of` the source."""
        return file_of(self.source, int(self.indices[index]))


class Merged:
    """Several sources one after the other. Labels, where all have them, are kept apart."""

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self._ends = np.cumsum([len(source) for source in sources])
        self.labels = None
        self.classes: list[str] = []
        labels = [source.labels for source in sources if source.labels is not None]
        if len(labels) == len(sources):
            offsets = np.cumsum([0, *(len(source.classes) for source in sources)])
            self.classes = [name for source in sources for name in source.classes]
            self.labels = np.concatenate([part + offset for part, offset in zip(labels, offsets[:-1], strict=True)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], int(index - (self._ends[which - 1] if which else 0))

    def load(self, index: int) -> Image.Image:
        source, local = self._place(index)
        return source.load(local)

    def name(self, index: int) -> str:
        source, local = self._place(index)
        return source.name(local)

    def file(self, index: int) -> str:
        """As `file_of` the source that it is from."""
        return file_of(*self._place(index))


def file_of(source: Any, index: int) -> str:
    """The file that image `index` of a source is in, where it is in one; else its name, which may be a path itself."""
    return source.file(index) if hasattr(source, "file") else source.name(index)


def one_line(name: str) -> str:
    """A name as a line of its own: what cannot be shown, line breaks among it, and backslashes as Python escapes them.

    What is not UTF-8 stays as `os.fsdecode` has it, for `os.fsencode` to bring back.
    """
    return "".join(
        c if (c.isprintable() and c != "\\") or "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()
        for c in name
    )


def build_source(cfg: config.Sources, seed: int) -> Source:
    """The image set of a config: its source cut to the shares asked for, then merged with the others."""
    sources = [_one_source(part, seed) for part in (cfg, *cfg.merge)]
    return sources[0] if len(sources) == 1 else Merged(sources)


def hold_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """Cut a seeded choice of `count` images, at most a tenth of the set, out of a source: (rest, held out)."""
    if len(source) < 2:
        raise InputError(
            f"data: {len(source)} image is too few to hold one out for the probe; set probe.every_epochs=0"
        )
    order = np.random.default_rng((seed, len(source))).permutation(len(source))
    count = max(1, min(count, len(source) // 10))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def _one_source(cfg: config.Source, seed: int) -> Source:
    source = _open(cfg, seed)
    rng = np.random.default_rng((seed, 20))
    if cfg.classes < 1 or cfg.images_per_class < 1:
        if source.labels is None:
            raise InputError(f"data.classes and data.images_per_class need labels, and {cfg.root} has none")
        labels = np.unique(source.labels)
        kept = np.sort(rng.permutation(labels)[: max(1, round(len(labels) * cfg.classes))])
        members = [rng.permutation(np.flatnonzero(source.labels == label)) for label in kept]
        chosen = [of_class[: max(1, round(len(of_class) * cfg.images_per_class))] for of_class in members]
        source = Subset(source, np.sort(np.concatenate(chosen)))
    return source


def check_roots(cfg: config.Sources, key: str = "data") -> None:
    """Raise InputError where a root is not given or not there, without reading what is in it."""
    for key, part in [(key, cfg), *((f"{key}.merge.{i}", part) for i, part in enumerate(cfg.merge))]:  # noqa: B020
        if part.kind != "digits":
            _root(part, key)


def _open(cfg: config.Source, seed: int) -> Source:
    use_labels = cfg.labels == "auto"
    if cfg.kind == "digits":
        return DigitsSource(cfg.split)
    root = _root(cfg)
    if cfg.kind == "hf":
        return HuggingFaceSource(root, cfg.split, use_labels, cfg.download)
    if cfg.kind == "folder":
        return FolderSource(Path(root), use_labels)
    if cfg.kind == "packed":
        return PackedSource(Path(root), use_labels)
    try:
        return SingleImageSource(Path(root), cfg.crops, seed)
    except Exception as error:  # decoders raise anything
        raise InputError(f"data.root={root}: not readable as an image ({error})") from None


def _root(cfg: config.Source, key: str = "data") -> str:
    """The existing folder or file (or the hub id) a source is read from."""
    if cfg.root is None:
        wanted = {
            "folder": f"a folder that holds {cfg.split + '/<class>/<image>' if cfg.split else 'images'}",
            "packed": "a folder that tools/pack.py wrote",
            "image": "one image file",
            "hf": "a hub id or a local dataset",
        }
        raise InputError(f"{key}.root is not set: {key}.root=PATH takes {wanted[cfg.kind]}")
    if cfg.kind == "hf":
        return cfg.root
    root = Path(cfg.root).expanduser()
    if cfg.kind == "image":
        if not root.is_file():
            raise InputError(f"{key}.root={root}: no such image file")
        return str(root)
    if not root.is_dir():
        raise InputError(f"{key}.root={root}: no such folder; {key}.root=PATH takes the folder that holds the images")
    if cfg.split and not (root / cfg.split).is_dir():
        raise InputError(
            f"{key}.root={root} holds no folder {cfg.split!r}; "
            f"give the folder above it, or {key}.split=null to use all of root"
        )
    return str(root / cfg.split if cfg.split else root)


def _walk(root: Path) -> list[str]:
    """Paths of all images under a folder, links followed, sorted."""
    found: list[str] = []
    # (path below root, real paths of the folders above): a link back to one of those would lead round in a circle.
    folders: list[tuple[str, tuple[str, ...]]] = [("", ())]
    while folders:
        prefix, above = folders.pop()
        real = os.path.realpath(root / prefix)
        if real in above:
            continue
        for entry in os.scandir(root / prefix):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append((f"{prefix}{entry.name}/", (*above, real)))
            elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_symlink() or entry.is_file()):
                found.append(prefix + entry.name)
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say: an image that cannot be read
        return False
