"""TorchScript archives, OpenAI's CLIP files among them: their tensors, without running any code of the file.

`torch.jit.save` writes a zip: `data.pkl` is a pickle of the modules, `data/<key>` the bytes of each storage. The
program, in `code/` and `constants.pkl`, is of no use here. `torch.load(weights_only=True)` refuses such a file.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {"ByteStorage": torch.uint8, "CharStorage": torch.int8} | {
    f"{name}Storage": getattr(torch, name.lower())
    for name in ("Half", "BFloat16", "Float", "Double", "Long", "Int", "Short", "Bool")
}
IDENTITIES = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
ATTRIBUTES, NAME_LENGTH = 100_000, 1_000  # far beyond any network: modules that nest in a circle have no end


class _View(NamedTuple):
    """A tensor as the pickle describes it; made a tensor only later, so that no pickle can call a tensor's methods."""

    storage: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """Stands for every class of the file: attributes, and nothing that could be called."""

    def __setstate__(self, state: dict[str, Any]) -> None:  # without it a pickle could set attributes of the class
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, requires_grad, hooks: _View(storage, offset, size, stride)
        if module == "torch.jit._pickle" and name in IDENTITIES:
            return lambda value, *kind: value
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: {}  # the hooks of a tensor, always none
        raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'[:100]!r}, which no state dict needs")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive. A plain PyTorch file is a zip too, but holds no program."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except Exception:  # the directory of a broken zip may raise anything
        return False
    top = names[0].split("/")[0] if names else ""
    return f"{top}/constants.pkl" in names and any(name.startswith(f"{top}/code/") for name in names)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by dotted name, on the CPU, in the file's types.

    As `torch.jit.load(path).state_dict()` has them, and also the tensors that a scripted (not a traced) module keeps as
    plain attributes, which the pickle does not tell from buffers. A file that is broken, or asks for more than tensors,
    is a ValueError or an UnpicklingError of one line.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return _read(file)
    except (ValueError, pickle.UnpicklingError):
        raise
    except Exception as error:  # zipfile and pickle may raise anything for broken bytes
        raise ValueError(f"broken TorchScript archive: {' '.join(repr(error).split())}") from None


def _read(file: zipfile.ZipFile) -> dict[str, Tensor]:
    names = file.namelist()
    top = names[0].split("/")[0]
    if f"{top}/byteorder" in names and _record(file, f"{top}/byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    data = _record(file, f"{top}/data.pkl")
    for opcode, argument, _ in pickletools.genops(data):
        # torch writes protocol 2; newer opcodes, and entries numbered at will, allocate whatever size the file names.
        if opcode.proto > 2 or ("PUT" in opcode.name and int(argument or 0) > len(data)):
            raise pickle.UnpicklingError(f"data.pkl holds {opcode.name} {argument!r:.50}, which torch does not write")
    state: dict[str, Tensor] = {}
    storages: dict[str, Tensor] = {}  # key -> uint8 [bytes]: tensors that share a storage go on sharing it
    pending, visited = [("", _Unpickler(io.BytesIO(data)).load())], 0
    while pending:
        prefix, module = pending.pop()
        visited += 1 + len(module.attributes)
        if visited > ATTRIBUTES or len(prefix) > NAME_LENGTH:
            raise ValueError("its modules nest without end")
        for name, value in module.attributes.items():
            if isinstance(value, _View):
                _, dtype, key, _, count = value.storage  # fourth is the device that it was on
                if key not in storages:
                    raw = bytearray(_record(file, f"{top}/data/{key}"))
                    storages[key] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte()
                state[f"{prefix}{name}"] = _tensor(f"{prefix}{name}", value, storages[key], dtype, count)
        modules = [(f"{prefix}{name}.", value) for name, value in module.attributes.items() if type(value) is _Module]
        pending += reversed(modules)
    if not state:
        raise ValueError("it holds no tensors")
    return state


def _record(file: zipfile.ZipFile, name: str) -> bytes:
    if file.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch never does; a few bytes may unpack to any number
        raise ValueError(f"{name} is compressed")
    return file.read(name)


def _tensor(name: str, view: _View, raw: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The view of a storage's bytes that a pickle describes, when all of it lies within them."""
    if raw.numel() // dtype.itemsize != count:
        raise ValueError(f"the storage of {name} has {raw.numel()} bytes, not {count} values of {dtype}")
    offset, size, stride = view.offset, tuple(view.size), tuple(view.stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError(f"{name} has no valid shape")
    needed = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if all(size) else 0
    if needed > count or math.prod(size) >= 2**63:
        raise ValueError(f"{name} does not fit in its storage of {count} values")
    return raw[: count * dtype.itemsize].view(dtype).as_strided(size, stride, offset)
