"""Datasets of Hugging Face: on this disk, or from the hub where the config allows it."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from proteus.config_files import parse_yaml
from proteus.data.decode import decode
from proteus.errors import InputError, nearest


class HuggingFaceSource:
    """A dataset of Hugging Face `datasets`: its image column, and its class label where there is one.

    image_column, label_column: which columns these are, where the set has several or calls them otherwise.
    config:                     which of its configurations, where it has several.
    where:                      what a message calls the set.
    """

    def __init__(
        self,
        root: str,
        split: str | None,
        use_labels: bool,
        download: bool,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        config: str | None = None,
        where: str | None = None,
    ):
        import datasets  # slow to import and needed by few

        where = where or f"data.root={root}"
        data = _load_dataset(root, split, download, config, where)
        for column in (image_column, label_column):
            if column is not None and column not in data.features:
                raise InputError(f"{where}: has no column {column!r}{nearest(column, data.features)}")
        images = [key for key, feature in data.features.items() if isinstance(feature, datasets.Image)]
        images = images if image_column is None else [image_column]
        if len(images) != 1:
            found = images or "none"
            raise InputError(f"{where}: expected one image column, found {found} among {list(data.features)}")
        labels = [key for key, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        if not labels and "label" in data.features:
            labels = ["label"]
        if label_column is not None:
            labels = [label_column]
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if use_labels and len(labels) == 1:
            self.labels, self.classes = _class_numbers(data, labels[0])
        if label_column is not None and self.labels is None:
            raise InputError(
                f"{where}: column {label_column!r} holds no class numbers or names, or not for every image"
            )
        self._data = data.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
        self._column, self._root = images[0], root
        if not len(self._data):
            raise InputError(f"{where}: split {split or 'train'!r} is empty")

    def __len__(self) -> int:
        return len(self._data)

    def load(self, index: int) -> Image.Image:
        row = self._data[int(index)][self._column]
        return decode(io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"])

    def name(self, index: int) -> str:
        row = self._data[int(index)][self._column] or {}
        return f"{self._root}[{index}]" + (f" ({row['path']})" if row.get("path") else "")


def _class_numbers(data: Any, column: str) -> tuple[np.ndarray | None, list[str]]:
    """A column of class numbers, or of names that are numbered here, as [n] int64, and the names; None for others."""
    import pyarrow

    values = data.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count or not len(values):
        return None, []
    if pyarrow.types.is_integer(values.type):
        numbers = values.to_numpy().astype(np.int64)
        return numbers, getattr(data.features[column], "names", None) or [str(i) for i in range(numbers.max() + 1)]
    if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
        names, numbers = np.unique(np.array(values.to_pylist()), return_inverse=True)
        return numbers.astype(np.int64), names.tolist()
    return None, []


def _load_dataset(root: str, split: str | None, download: bool, config: str | None, where: str) -> Any:
    import datasets

    local = Path(root).expanduser()
    if root == "pandas":  # which some versions take for a reader of all pickles in the current folder
        raise InputError(f"{where}: is no data set")
    try:
        if local.is_dir():
            _refuse_addresses(local)
        with _network(download and not local.exists()):
            if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
                return _split_on_disk(datasets.load_from_disk(str(local)), split)
            if local.is_file():
                kind = {".parquet": "parquet", ".arrow": "arrow"}.get(local.suffix)
                if kind is None:
                    raise InputError(f"{where}: expected a .parquet or .arrow file, or a folder")
                return datasets.load_dataset(kind, data_files={split or "train": str(local)}, split=split or "train")
            return datasets.load_dataset(str(local) if local.is_dir() else root, config, split=split or "train")
    except InputError:
        raise
    except Exception as error:  # the hub, the cache and every builder have errors of their own
        hint = "" if local.exists() or download else "; data.download=true may fetch it from the hub"
        message = " ".join(str(error).split())[:300]
        raise InputError(f"{where}, split {split or 'train'!r}: {message}{hint}") from None


def _refuse_addresses(folder: Path) -> None:
    """ValueError where the card of a folder names files of the network: `datasets` would fetch them even offline."""
    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        front = text.split("---")[1] if text.startswith("---") else text if card.suffix == ".yaml" else ""
        facts = parse_yaml(front, card)
        if isinstance(facts, dict) and "://" in str(facts.get("configs")):
            raise ValueError(f"{card} names files by address; fetch them and name them as files")


def _split_on_disk(loaded: Any, split: str | None) -> Any:
    if isinstance(loaded, dict):
        if (split or "train") not in loaded:
            raise ValueError(f"there are splits {', '.join(loaded)}")
        return loaded[split or "train"]
    if split and loaded.split and str(loaded.split) != split:
        raise ValueError(f"there is split {loaded.split}")
    return loaded


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Whether `datasets` may talk to the hub. It never counts our loads there."""
    from datasets import config as settings

    before = settings.HF_HUB_OFFLINE, settings.HF_UPDATE_DOWNLOAD_COUNTS
    settings.HF_HUB_OFFLINE, settings.HF_UPDATE_DOWNLOAD_COUNTS = before[0] or not allowed, False
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE, settings.HF_UPDATE_DOWNLOAD_COUNTS = before
