"""TorchScript archives: the same tensors as `torch.jit.load` gives, and nothing run, for any bytes."""

import io
import os
import pickle
import re
import struct
import zipfile

import pytest
import torch
from torch import nn

from proteus.errors import InputError
from proteus.models.torchscript import is_torchscript, read_torchscript
from proteus.models.weights import read_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),  # it is what others' files were written with
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.randn(3, 4).t())
        whole = torch.randn(5, 6)
        self.left, self.right = nn.Parameter(whole[1:4, :4]), nn.Parameter(whole[1:4, 2:])  # one storage, two offsets
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("spread", torch.tensor([0.5]).expand(4))
        self.register_buffer("empty", torch.empty(0, 4))
        self.sizes: list[int] = [1, 2]
        self.rates: list[float] = [0.5]
        self.marks: list[bool] = [True]
        self.names: dict[str, int] = {"a": 1}

    def forward(self, x):
        x = x @ self.turned @ (self.left + self.right) * self.rates[0]
        x = x + self.steps.sum() + self.spread + self.empty.sum() + self.sizes[0] + self.names["a"]
        return x if bool(self.flag) and self.marks[0] else -x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
        self.inner = Inner()
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.stem[3].weight
        self.again = self.inner
        self.small = nn.Parameter(torch.randn(3, 2).half())
        self.brain = nn.Parameter(torch.randn(2).bfloat16(), requires_grad=False)

    def forward(self, x):
        x = self.tied(self.stem(x)) + self.small.float().sum() + self.brain.float().sum()
        return self.again(self.inner(x))


@pytest.fixture(params=["traced", "scripted", "half"])
def archive(request, tmp_path):
    """The path of an archive and what torch reads from it."""
    torch.manual_seed(0)
    network, path = Outer().eval(), tmp_path / "network.pt"
    if request.param == "half":
        network.half()
    if request.param == "scripted":
        program = torch.jit.script(network)
    else:
        program = torch.jit.trace(network, torch.randn(2, 3, 2, 2, dtype=network.stem[0].weight.dtype))
    torch.jit.save(program, path)
    return path, torch.jit.load(path).state_dict()


def shares(one, other) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_the_tensors_are_those_that_torch_reads(archive):
    path, expected = archive
    assert is_torchscript(path)
    state = read_torchscript(path)
    assert state.keys() == expected.keys()
    assert {"stem.1.running_var", "stem.3.weight", "inner.turned", "again.steps", "small"} <= state.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.stride()) == (expected[name].dtype, expected[name].stride()), name
        assert torch.equal(tensor, expected[name]), name
    assert not state["inner.turned"].is_contiguous()
    for one, other in (("inner.left", "inner.right"), ("tied.weight", "stem.3.weight"), ("small", "brain")):
        assert shares(state[one], state[other]) == shares(expected[one], expected[other])
    assert shares(state["tied.weight"], state["stem.3.weight"])


def test_a_checkpoint_may_be_an_archive(archive):
    path, expected = archive
    state, metadata = read_checkpoint(path)
    assert state.keys() == expected.keys()
    assert metadata == {}


def test_a_plain_file_is_no_archive(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert not any(is_torchscript(tmp_path / name) for name in ("plain.pt", "text.pt", "absent.pt"))
    for names, answer in ((["constants.pkl"], False), (["code/a.py"], False), (["code/a.py", "constants.pkl"], True)):
        with zipfile.ZipFile(tmp_path / "some.pt", "w") as file:
            for name in ["data.pkl", *names]:
                file.writestr(f"some/{name}", b"")
        assert is_torchscript(tmp_path / "some.pt") == answer, names


# ------------------------------------------------------------------------------------------- broken and hostile


class Name:
    """Pickles as a global by this name, whether or not there is one."""

    def __init__(self, name):
        self.name = name


class Storage(tuple):
    """Pickles as a persistent id."""


class Call:
    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state


class Writer(pickle._Pickler):
    """Pickles names, calls and storages as torch's own writer does."""

    def persistent_id(self, thing):
        return tuple(thing) if isinstance(thing, Storage) else None

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, Name):
            self.write(
                b"c" + thing.name.rpartition(".")[0].encode() + b"\n" + thing.name.rpartition(".")[2].encode() + b"\n"
            )
        elif isinstance(thing, Call):
            self.save(thing.function)
            self.save(thing.arguments)
            self.write(b"R")
            if thing.state is not None:
                self.save(thing.state)
                self.write(b"b")
        else:
            super().save(thing, save_persistent_id)


SIX = struct.pack("<6f", *range(6))
FLOAT, MODULE = Name("torch.FloatStorage"), Name("__torch__.Net")


def tensor(size=(2, 3), stride=(3, 1), offset=0, kind=FLOAT, key="0", count=6, more=()):
    storage = Storage(("storage", kind, key, "cpu", count))
    hooks = Call(Name("collections.OrderedDict"))
    return Call(Name("torch._utils._rebuild_tensor_v2"), storage, offset, size, stride, True, hooks, *more)


def module(**attributes):
    return Call(MODULE, state=attributes)


def dumped(thing) -> bytes:
    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump(thing)
    return buffer.getvalue()


def write(path, pickled, storage=SIX, extra=(), compression=zipfile.ZIP_STORED):
    """An archive by hand: a pickle and, unless it is None, storage 0."""
    files = {"data.pkl": pickled, "constants.pkl": b"\x80\x02).", "code/__torch__.py": b"", **dict(extra)}
    if storage is not None:
        files["data/0"] = storage
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in files.items():
            file.writestr(f"any name/{name}", data)
    return path


def refused(path) -> str:
    """The one line in which an archive is refused; the same in what a user sees."""
    with pytest.raises((ValueError, pickle.UnpicklingError)) as caught:
        read_torchscript(path)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    with pytest.raises(InputError, match=re.escape(line[:100])):
        read_checkpoint(path)
    return line


def test_an_archive_by_hand_is_read(tmp_path):
    path = write(tmp_path / "a.pt", dumped(module(w=tensor(), inner=module(v=tensor((2,), (2,), 1)), depth=3)))
    state = read_torchscript(path)
    assert state.keys() == {"w", "inner.v"}
    assert torch.equal(state["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(state["inner.v"], torch.tensor([1.0, 3.0]))


def evil(where, function, *arguments):
    call = Call(Name(function), *arguments)
    return dumped({"root": call, "attribute": module(w=tensor(), x=call), "size": module(w=tensor(size=call))}[where])


@pytest.mark.parametrize("where", ["root", "attribute", "size"])
@pytest.mark.parametrize("function", [f"{os.name}.system", "os.system", "builtins.open", "builtins.eval", "torch.load"])
def test_nothing_of_a_pickle_is_run(tmp_path, function, where):
    victim = tmp_path / "victim"
    arguments = {
        "system": (f"touch {victim}",),
        "open": (str(victim), "w"),
        "eval": (f"open({str(victim)!r}, 'w')",),
        "load": (str(victim),),
    }[function.split(".")[1]]
    pickled = evil(where, function, *arguments)
    if where == "root" and function != "torch.load":
        pickle.loads(pickled)  # it is a working attack
        assert victim.exists()
        victim.unlink()
    assert function in refused(write(tmp_path / "a.pt", pickled))
    assert not victim.exists()


LIMIT = 2**63
HOSTILE = {
    "lies: more": (tensor(count=7), "has 24 bytes, not 7 values"),
    "lies: fewer": (tensor(count=5), "has 24 bytes, not 5 values"),
    "lies: type": (tensor(kind=Name("torch.DoubleStorage")), "has 24 bytes, not 6 values"),
    "lies: endless": (tensor(size=(2**40,), stride=(1,), count=2**40), "not 1099511627776 values"),
    "lies: negative": (tensor(count=-6), "not -6 values"),
    "beyond": (tensor(size=(3, 3)), "w does not fit in its storage of 6 values"),
    "beyond by an offset": (tensor(offset=1), "w does not fit"),
    "beyond by a stride": (tensor(stride=(4, 1)), "w does not fit"),
    "a number beyond": (tensor((), (), 6), "w does not fit"),
    "overflow": (tensor((2**62, 2**62), (2**62, 2**62)), "w does not fit"),
    "endless by stride 0": (tensor((2**40, 2**40), (0, 0)), "w does not fit"),
    "negative offset": (tensor(offset=-1), "no valid shape"),
    "negative stride": (tensor(stride=(-3, 1), offset=3), "no valid shape"),
    "negative size": (tensor(size=(-2, 3)), "no valid shape"),
    "beyond 64 bits": (tensor((1, 0), (2**70, 1)), "no valid shape"),
    "no number": (tensor(size=("2", 3)), "no valid shape"),
    "fewer strides": (tensor(stride=(3,)), "no valid shape"),
    "missing": (tensor(key="1"), "data/1"),
    "elsewhere": (tensor(key="../../a.pt"), "data/../../a.pt"),
    "no type": (tensor(kind="float"), "itemsize"),
    "unknown type": (tensor(kind=Name("torch.QInt8Storage")), "torch.QInt8Storage"),
    "no storage": (Call(Name("torch._utils._rebuild_tensor_v2"), 3, 0, (1,), (1,), True, None), "TypeError"),
    "flags": (tensor(more=({"neg": True},)), "TypeError"),  # a tensor that is negated when read
    "no tensors": (3, "holds no tensors"),
}


@pytest.mark.parametrize(("value", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_tensor_that_cannot_be_is_refused(tmp_path, value, words):
    assert words in refused(write(tmp_path / "a.pt", dumped(module(w=value))))


def circle() -> bytes:
    # A module, entry 0, whose attribute `m` is entry 0.
    return b"\x80\x02c__torch__\nNet\n)\x81q\x00}X\x01\x00\x00\x00mh\x00sb."


def doubling() -> bytes:
    # Forty modules each holding the one before it twice: 2 ** 40 names.
    inner = b"\x80\x02c__torch__\nNet\n)\x81}bq\x00"
    outer = b"0c__torch__\nNet\n)\x81}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00"
    return inner + outer * 40 + b"."


PICKLES = {
    "circle": (circle(), "nest without end"),
    "doubling": (doubling(), "nest without end"),
    "endless name": (dumped(module(**{"n" * 1001: module(w=tensor())})), "nest without end"),
    "no module": (dumped({"w": tensor()}), "attributes"),
    "state is no dictionary": (dumped(Call(MODULE, state=(1, 2))), "items"),
    "bare module": (dumped(Call(MODULE)), "attributes"),
    "far entry": (b"\x80\x02Nr\xff\xff\xff\xff.", "LONG_BINPUT"),
    "far entry in text": (b"Np999999999999\n.", "PUT"),
    "vast bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "bytearray8"),
    "newer": (pickle.dumps(bytearray(10), protocol=5), "FRAME"),
    "class is changed": (b"\x80\x02c__torch__\nNet\n}X\x01\x00\x00\x00xNsb.", "TypeError"),
    "empty": (b"", "pickle exhausted"),
    "noise": (bytes((37 * i * i + 11 * i) % 256 for i in range(500)), ""),
}


@pytest.mark.parametrize(("pickled", "words"), PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_that_cannot_be_is_refused(tmp_path, pickled, words):
    assert words in refused(write(tmp_path / "a.pt", pickled))


def test_records_that_cannot_be_are_refused(tmp_path):
    good, path = dumped(module(w=tensor())), tmp_path / "a.pt"
    assert "data/0" in refused(write(path, good, storage=None))
    assert "has 23 bytes" in refused(write(path, good, storage=bytes(23)))
    assert "has 28 bytes" in refused(write(path, good, storage=bytes(28)))
    assert "little-endian" in refused(write(path, good, extra={"byteorder": b"big"}))
    assert "compressed" in refused(write(path, good, compression=zipfile.ZIP_DEFLATED))
    read_torchscript(write(path, good, extra={"byteorder": b"little"}))


def test_a_directory_that_lies_about_a_size_is_refused(tmp_path):
    path = write(tmp_path / "a.pt", dumped(module(w=tensor(size=(2**28,), stride=(1,), count=2**28))))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02"))
    while b"data/0" not in data[entry : entry + 70]:
        entry = data.index(b"PK\x01\x02", entry + 4)
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**30, 2**30)
    path.write_bytes(data)
    refused(path)


def test_an_archive_cut_or_damaged_anywhere_is_one_line(tmp_path):
    path = write(tmp_path / "a.pt", dumped(module(w=tensor(), inner=module(v=tensor()))))
    whole, escaped, expected = path.read_bytes(), [], read_torchscript(path)
    for place in range(0, len(whole) - 1, 7):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]):
            path.write_bytes(data)
            for read in (read_torchscript, lambda path: read_checkpoint(path)[0]):
                try:
                    state = read(path)
                except (ValueError, pickle.UnpicklingError, InputError) as error:
                    escaped += [(place, str(error))] if "\n" in str(error) else []
                except Exception as error:  # which ones is what the message is to say
                    escaped.append((place, repr(error)))
                else:  # bytes that nobody reads
                    assert len(data) == len(whole)
                    assert [x.tolist() for x in state.values()] == [x.tolist() for x in expected.values()]
    assert escaped == []
