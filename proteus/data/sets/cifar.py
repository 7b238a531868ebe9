"""CIFAR-10 and CIFAR-100 from their authors' pickles, read by an unpickler that builds arrays and nothing else."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from proteus.data.sets.files import choose, find_top, one_line
from proteus.errors import InputError


class ArrayImages:
    """Images held in memory, [n, H, W, 3] uint8, with their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str], names: list[str]):
        self._images, self._names = images, np.array(names)
        self.labels: np.ndarray | None = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def name(self, index: int) -> str:
        return str(self._names[index])


def cifar10(root: Path, split: str) -> ArrayImages:
    """CIFAR-10: cifar-10-batches-py. Splits train, test. Images are 32 x 32."""
    top = find_top("cifar10", root, ["cifar-10-batches-py"], "batches.meta")
    files = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
    choose("cifar10", split, dict.fromkeys(files, ""))
    return _read([top / file for file in files[split]], b"labels", top / "batches.meta", b"label_names")


def cifar100(root: Path, split: str) -> ArrayImages:
    """CIFAR-100 with its 100 fine labels: cifar-100-python. Splits train, test. Images are 32 x 32."""
    top = find_top("cifar100", root, ["cifar-100-python"], "meta")
    file = choose("cifar100", split, {"train": "train", "test": "test"})
    return _read([top / file], b"fine_labels", top / "meta", b"fine_label_names")


def read_pickle(path: Path) -> Any:
    """A pickle of numbers, bytes, lists, dicts and arrays (strings of Python 2 as bytes); anything else is refused."""
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; the set is incomplete, unpack it again") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # unpickling a broken file raises anything
        raise InputError(f"{path}: not readable as a pickle ({one_line(error)}); unpack the set again") from None


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle names what is to be called while it is read: only what rebuilds an array is let through."""

    _reconstruct = np.empty(0).__reduce__()[0]
    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise InputError(f"asks to run {module}.{name}, which no file of this set does; do not use the file")
        return self._allowed[module, name]


def _read(files: list[Path], label_key: bytes, meta: Path, names_key: bytes) -> ArrayImages:
    names = _field(read_pickle(meta), names_key, meta)
    if not (isinstance(names, list) and all(isinstance(name, bytes) for name in names)):
        raise InputError(f"{meta}: its {names_key.decode()} are no list of names")
    images, labels, titles = [], [], []
    for file in files:
        content = read_pickle(file)
        pixels, numbers = _field(content, b"data", file), np.asarray(_field(content, label_key, file))
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(numbers), 3072)):
            raise InputError(f"{file}: its data are not one row of 3072 bytes for each of {len(numbers)} labels")
        if numbers.dtype.kind not in "iu" or not all(0 <= number < len(names) for number in numbers):
            raise InputError(f"{file}: its {label_key.decode()} are not numbers from 0 to {len(names) - 1}")
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(numbers.astype(np.int64))
        titles += [f"{file}[{index}]" for index in range(len(numbers))]
    classes = [name.decode("utf-8", "replace") for name in names]
    return ArrayImages(np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels), classes, titles)


def _field(content: Any, key: bytes, path: Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise InputError(f"{path}: holds no {key.decode()!r}; it is no file of this set")
    return content[key]
