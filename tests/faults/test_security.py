"""Files that others made: nothing in them is run, none leads out of its folder, and code is what the user names."""

import io
import json
import os
import pickle
import struct
import tarfile
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from benchmarks.models import open_model
from proteus.config import Config
from proteus.config_files import dump_config, flat_keys, load_config, parse_yaml
from proteus.data.huggingface import HuggingFaceSource
from proteus.data.packed import INDEX, PackedSource
from proteus.data.sets import open_set
from proteus.engine.checksums import write_checksums
from proteus.errors import InputError
from proteus.evaluation import extract
from proteus.models import create_model, load_checkpoint
from proteus.models.heads import read_head
from proteus.training.cache import COMPONENTS, IDENTITY, read_identity
from proteus.transfer.model import load_task_model
from proteus.transfer.retrieval import embed
from tests.data.sets import fixtures
from tools import export

ARCH = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Evil:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """The folder that an attack makes; it must not be there at the end."""
    marker = tmp_path / "ran"
    yield marker
    assert not marker.exists(), "the code of a file has run"


@pytest.fixture
def attack(marker):
    """Bytes that run code in a reader that trusts them, by the form of the file; each is seen to work."""
    evil, forms = Evil(marker), {"pickle": pickle.dumps(Evil(marker), 2)}
    for name, zipped in (("torch's zip", True), ("torch's old form", False)):
        buffer = io.BytesIO()
        torch.save({"model": {"weight": torch.zeros(2), "evil": evil}}, buffer, _use_new_zipfile_serialization=zipped)
        forms[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {"data.pkl": forms["pickle"], "constants.pkl": b"\x80\x02).", "code/a.py": b""}.items():
            file.writestr(f"archive/{name}", content)
    forms["TorchScript"] = buffer.getvalue()
    for name, write in (
        ("npy", lambda out, array: np.save(out, array)),
        ("npz", lambda out, array: np.savez(out, array)),
    ):
        buffer = io.BytesIO()
        write(buffer, np.array([evil], dtype=object))
        forms[name] = buffer.getvalue()
    trusting = {"npy": lambda data: np.load(data, allow_pickle=True), "pickle": pickle.load}
    trusting["npz"] = lambda data: np.load(data, allow_pickle=True)["arr_0"]
    for name, data in forms.items():
        if name == "TorchScript":
            continue  # a pickle in the place that `read_torchscript` reads
        load = trusting.get(name, lambda data: torch.load(data, weights_only=False))
        load(io.BytesIO(data))
        marker.rmdir()
    return forms


FORMS = ("pickle", "torch's zip", "torch's old form", "TorchScript", "npy", "npz")


def refused(read, *arguments, **named) -> str:
    """The one line that an input is refused with."""
    with pytest.raises(InputError) as caught:
        read(*arguments, **named)
    (line,) = caught.value.lines
    assert "weights_only" not in line, "torch's advice to read it unsafely"
    return line


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".safetensors"])
def test_weights_run_nothing(tmp_path, attack, form, ending):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(attack[form])
    assert str(path) in refused(load_checkpoint, str(path))
    assert str(path) in refused(create_model, "proteus_vitt14", checkpoint=str(path))
    assert str(path) in refused(read_head, path, 16)


@pytest.mark.parametrize("key", ["teacher.checkpoint", "student.checkpoint", "student.head", "teacher.head"])
def test_no_weights_of_a_run_run_anything(run_here, tmp_path, attack, key, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(attack["torch's zip"])
    assert run_here(f"{key}={path}", "losses={token: 1, logits_kl: 1, label_ce: 1}") == 2
    said = capsys.readouterr().err
    assert "weights_only" not in said
    assert "Traceback" not in said


def test_exports_benchmarks_and_retrieval_run_nothing_of_a_file(tmp_path, attack, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(attack["torch's zip"])
    assert export.main(["timm", str(path), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    refused(open_model, str(path), "student", tmp_path)
    (tmp_path / "student.safetensors").write_bytes(attack["pickle"])
    (tmp_path / "head.safetensors").write_bytes(attack["pickle"])
    refused(load_task_model, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_whose_checksums_are_right_runs_nothing(run_here, tmp_path, attack, form, capsys):
    assert run_here("schedule.steps=5") == 0
    folder = tmp_path / "run/checkpoints/step_5"
    (folder / "optimizer.pt").write_bytes(attack[form])
    (folder / "checksums.json").unlink()
    write_checksums(folder)
    capsys.readouterr()
    assert run_here() == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert str(folder) in line
    assert "weights_only" not in said


def test_the_state_of_a_loss_scaler_runs_nothing(run_here, tmp_path, attack, capsys, monkeypatch):
    from proteus.training import start

    build = start.build_accelerator

    def with_scaler(*args):
        accelerator = build(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(start, "build_accelerator", with_scaler)
    assert run_here("schedule.steps=5") == 0
    folder = tmp_path / "run/checkpoints/step_5"
    (folder / "scaler.pt").write_bytes(attack["torch's zip"])
    (folder / "checksums.json").unlink()
    write_checksums(folder)
    assert run_here() == 2
    assert "weights_only" not in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_caches_of_features_and_embeddings_run_nothing(tmp_path, attack, form):
    path = tmp_path / "00000000.npy"
    path.write_bytes(attack[form])
    assert f"{path} is damaged" in refused(extract._load, path)
    assert f"{path} is damaged" in refused(embed._open, path, 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_cache_runs_nothing(run_here, tmp_path, attack, form, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / IDENTITY).write_bytes(attack[form])
    refused(read_identity, cache)
    (cache / COMPONENTS).write_bytes(attack[form])
    assert run_here(f"teacher_cache.dir={cache}") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_data_sets_run_nothing(tmp_path, attack, form):
    cifar = fixtures.cifar10(tmp_path)
    (cifar / "data_batch_2").write_bytes(attack[form])
    assert "data_batch_2" in refused(open_set, "cifar10", tmp_path, "train")
    flowers = fixtures.flowers(tmp_path)
    (flowers / "setid.mat").write_bytes(attack[form])
    assert "setid.mat" in refused(open_set, "flowers", tmp_path, "train")


def evil_label(attack) -> pa.Field:
    """A column of labels whose type a pickle in its metadata makes, as old versions of Arrow had it."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": attack["pickle"]}
    return pa.field("label", pa.int64(), metadata=metadata)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 90, 90)).save(buffer, "png")
    return buffer.getvalue()


def pack(folder: Path, file: str, schema: pa.Schema) -> Path:
    """A packed folder of one image, whose index names `file`."""
    folder.mkdir()
    path = folder / file
    path.parent.mkdir(exist_ok=True, parents=True)
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, schema) as shard:
        shard.write_batch(pa.RecordBatch.from_pydict({"image": [png()], "label": [0], "name": ["a"]}, schema=schema))
    shard_facts = {"file": file, "rows": 1, "bytes": path.stat().st_size, "sha256": ""}
    (folder / INDEX).write_text(json.dumps({"version": 1, "classes": ["a"], "shards": [shard_facts]}))
    return folder


IMAGE, NAME = pa.field("image", pa.large_binary()), pa.field("name", pa.string())
PLAIN = pa.schema([IMAGE, pa.field("label", pa.int64()), NAME])


def test_packed_images_run_nothing(tmp_path, attack):
    folder = pack(tmp_path / "none", "shard_00000.arrow", pa.schema([IMAGE, NAME, evil_label(attack)]))
    assert "shard_00000.arrow is damaged" in refused(PackedSource, folder)
    source = PackedSource(pack(tmp_path / "packed", "shard_00000.arrow", pa.schema([IMAGE, evil_label(attack), NAME])))
    assert source.load(0).getpixel((0, 0)) == (90, 90, 90)  # it is a plain column


@pytest.mark.parametrize("file", ["../shard.arrow", "{outside}/shard.arrow", "sub/shard.arrow", "..", "a\n.arrow"])
def test_an_index_of_packed_images_names_files_in_its_folder_alone(tmp_path, file):
    file = file.format(outside=tmp_path / "outside")
    if file == "..":
        pack(tmp_path / "packed", "shard.arrow", PLAIN)
        index = tmp_path / "packed" / INDEX
        index.write_text(index.read_text().replace("shard.arrow", ".."))
    else:
        pack(tmp_path / "packed", file, PLAIN)
    assert f"{INDEX} is damaged" in refused(PackedSource, tmp_path / "packed")


@pytest.fixture
def hub_home(tmp_path, monkeypatch):
    """What `datasets` keeps of the sets that it has read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_sets_of_hugging_face_run_nothing(tmp_path, attack, marker, hub_home):
    def opened(path: Path) -> HuggingFaceSource:
        return HuggingFaceSource(str(path), None, True, False)

    script = tmp_path / "myset"
    (script / "train").mkdir(parents=True)
    (script / "myset.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (script / "train/1.png").write_bytes(png())
    assert "scripts are no longer supported" in refused(opened, script)
    assert "expected a .parquet or .arrow file" in refused(opened, script / "myset.py")

    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "train.pkl").write_bytes(attack["pickle"])
    refused(opened, pickles)
    assert "is no data set" in refused(opened, Path("pandas"))

    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "train.tar", "w") as tar:
        for name, content in {"a.png": png(), "a.pkl": attack["pickle"], "a.pyd": attack["pickle"]}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert opened(shards).load(0).size == (8, 8)

    image = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "int64"}}}}
    schema = pa.schema([image, evil_label(attack)], metadata={"huggingface": json.dumps(features)})
    table = pa.table({"image": [{"bytes": png(), "path": None}], "label": [0]}, schema=schema)
    pq.write_table(table, tmp_path / "set.parquet")
    assert opened(tmp_path / "set.parquet").load(0).size == (8, 8)


def test_a_folder_of_hugging_face_fetches_nothing(tmp_path, hub_home):
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    (folder / "train/1.png").write_bytes(png())
    lines = ("homepage: https://example.org", "configs:", "- config_name: default", "  data_files:", "  - split: train")
    card = "\n".join(["---", *lines, "    path: {}", "---", ""])
    for files in ("http://127.0.0.1:9/1.png", "[train/*, 'hf://datasets/a/b/1.png']"):
        (folder / "README.md").write_text(card.format(files))
        assert "names files by address" in refused(HuggingFaceSource, str(folder), None, True, False)
    (folder / "README.md").write_text(card.format("train/*"))
    assert len(HuggingFaceSource(str(folder), None, True, False)) == 1


# A split's list, by set: its file, and the line that its first one is replaced by.
LISTS = {
    "aircraft": ("fgvc-aircraft-2013b/data/images_variant_train.txt", "../../../../secret 707-320"),
    "cub": ("CUB_200_2011/images.txt", "1 ../../../secret.jpg"),
    "pets": ("oxford-iiit-pet/annotations/trainval.txt", "../../../secret 9 1 1"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_a_set_leads_nowhere_else(tmp_path, name):
    getattr(fixtures, name)(tmp_path / "sets")
    fixtures.put(tmp_path / "secret.jpg", 90)
    file, line = LISTS[name]
    lines = (tmp_path / "sets" / file).read_text().splitlines()
    (tmp_path / "sets" / file).write_text("\n".join([line, *lines[1:]]) + "\n")
    assert "secret.jpg' is not below" in refused(open_set, name, tmp_path / "sets", "train")


def test_a_list_of_a_set_names_no_whole_path(tmp_path):
    fixtures.cub(tmp_path / "sets")
    secret, listing = fixtures.put(tmp_path / "secret.jpg", 90), tmp_path / "sets/CUB_200_2011/images.txt"
    listing.write_text("\n".join([f"1 {secret}", *listing.read_text().splitlines()[1:]]) + "\n")
    assert f"'{secret}' is not below" in refused(open_set, "cub", tmp_path / "sets", "train")


def test_a_list_of_depths_leads_nowhere_else(tmp_path):
    top = tmp_path / "nyu"
    fixtures.put(top / "a.jpg", 90)
    fixtures.put(tmp_path / "secret.png", 90)
    (top / "nyu_train.txt").write_text("a.jpg ../secret.png 518\n")
    assert "'../secret.png' is not below" in refused(open_set, "nyu", tmp_path, "train")


def test_an_archive_writes_nothing_and_its_links_are_no_files(tmp_path):
    archive, secret = fixtures.cub_archive(tmp_path / "sets"), tmp_path / "secret.jpg"
    fixtures.put(secret, 90)
    good, evil = tmp_path / "sets/unpacked/CUB_200_2011", tmp_path / "evil"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(good, good.name)
        for name in ("../evil", str(evil), "CUB_200_2011/images/../../../evil"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("CUB_200_2011/images/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source = open_set("cub", tmp_path / "sets", "train")
    assert all(source.load(index).size == (8, 8) for index in range(len(source)))
    assert sorted(tmp_path.rglob("*")) == before

    listing = good / "images.txt"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join(["1 link.jpg", *lines[1:]]) + "\n")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(good, good.name)
        tar.addfile(link)
    assert "link.jpg: not there" in refused(open_set, "cub", tmp_path / "sets", "train")


TAGS = ["!!python/object/apply:os.mkdir [{marker}]", "!!python/name:os.mkdir", "!!python/module:os"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", ["file", "override", "base", "config of a run"])
def test_yaml_runs_nothing(run_here, tiny, tmp_path, marker, tag, where, capsys):
    text = f"student: {tag.format(marker=marker)}\n"
    if where == "override":
        assert run_here(f"student={tag.format(marker=marker)}") == 2
    elif where == "config of a run":
        assert run_here("schedule.steps=1") == 0
        (tmp_path / "run/config.yaml").write_text(text)
        run_here("schedule.steps=2")
    else:
        (tmp_path / "evil.yaml").write_text(text)
        (tmp_path / "over.yaml").write_text("base: evil.yaml\n")
        assert run_here(cfg=tmp_path / {"file": "evil.yaml", "base": "over.yaml"}[where]) == 2
        assert "could not determine a constructor for the tag" in capsys.readouterr().err
    assert "Traceback" not in capsys.readouterr().err


def nested(line: str) -> str:
    """Eleven keys, each of which is the one before nine times, and the last of them once more."""
    return "a0: &a0 {x: 1}\n" + "".join(
        f"{'configs' if i == 11 else f'a{i}'}: &a{i} {line.format(', '.join([f'*a{i - 1}'] * 9))}\n"
        for i in range(1, 12)
    )


def of_long_keys() -> str:
    """Mappings of one key, one in the other, around fifty of a thousand keys: each key of those is written 40 times."""
    many = "l: &l {" + ", ".join(f"x{i}: 0" for i in range(1000)) + "}\n"
    return f"k: &k {'k' * 1000}\n{many}configs: {'{*k : ' * 40}[{', '.join(['*l'] * 50)}]{'}' * 40}"


# `configs` is the key that is looked at in the card of a data set.
BOMBS = {
    "aliases": nested("[{}]"),
    "merged keys": nested("{{<<: [{}]}}"),
    "a text": f"a: &a {'x' * 10_000}\nconfigs: [{', '.join(['*a'] * 2000)}]",
    "keys": of_long_keys(),
    "a chain": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}}}\n" for i in range(1, 400)),
    "itself": "configs: &a [*a]",
    "itself at the end": f"configs: &a [{'0, ' * 5000}*a]",
    "a key of itself": "configs: &a {b: *a}",
    "deep": "configs: " + "[" * 2000 + "]" * 2000,
    "a long number": "configs: " + "9" * 5000,
    "no number": "configs: !!int x",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_yaml_without_end_is_one_line(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    assert f"{path}: not readable as YAML: " in refused(load_config, str(path))


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_yaml_without_end_in_a_checkpoint_is_one_line(run_here, tmp_path, text, capsys):
    folder = tmp_path / "step_5"
    folder.mkdir()
    (folder / "progress.json").write_text("{}")
    (folder / "config.yaml").write_text(text)
    write_checksums(folder)
    assert run_here(f"--resume={folder}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}/config.yaml: not readable as YAML: ")


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_yaml_without_end_in_the_card_of_a_data_set_is_one_line(tmp_path, text):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/1.png").write_bytes(png())
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    said = refused(HuggingFaceSource, str(tmp_path), None, True, False)
    assert said.startswith(f"{tmp_path}/README.md: not readable as YAML: ")


def test_aliases_that_stand_for_little_are_read():
    numbers = f"a: &a [{', '.join(['0'] * 1000)}]\nb: [{', '.join(['*a'] * 90)}]"
    assert parse_yaml(numbers, Path("a.yaml"))["b"] == [[0] * 1000] * 90
    texts = f"a: &a {'x' * 10_000}\nb: [{', '.join(['*a'] * 900)}]"
    assert parse_yaml(texts, Path("a.yaml"))["b"] == ["x" * 10_000] * 900


def test_files_that_stand_on_each_other_without_end_are_one_line(tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    (tmp_path / "90.yaml").write_text("run: {seed: 3}\n")
    for first in ("0.yaml", "79.yaml"):
        assert "more than 10 files stand on each other" in refused(load_config, str(tmp_path / first))
    with pytest.raises(InputError, match="losses is missing"):  # ten are read
        load_config(str(tmp_path / "80.yaml"))


@pytest.fixture
def evil_nets(tmp_path, marker, monkeypatch):
    """A function of a module in the current folder that makes a folder when it is imported, and says so."""
    module = f"evil_{uuid.uuid4().hex}"  # another one each time: none is imported twice
    (tmp_path / f"{module}.py").write_text(
        f"import os, sys\nfrom torch import nn\nos.mkdir({str(marker)!r})\nprint('it runs', file=sys.stderr)\n"
        "def build(**_):\n    return nn.Conv2d(3, 16, 4, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    return f"{module}:build"


def test_code_that_a_config_names_is_told_before_it_is_imported(run_here, tmp_path, evil_nets, marker, capsys):
    assert run_here("schedule.steps=1", f"student.name={evil_nets}") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"importing the code of '{evil_nets}', as student.name says", "it runs"]
    assert sum("importing the code" in line for line in lines) == 1
    marker.rmdir()


def test_no_other_key_of_a_config_imports_code(run_here, tiny, evil_nets, capsys):
    """Every key that takes a text: a config can name code in student.name and teacher.name alone."""
    keys = [
        key for key, value in flat_keys(load_config(str(tiny)).model_dump(mode="json")).items() if texts(key, value)
    ]
    assert {"data.root", "student.checkpoint", "data.augment.auto_augment", "teacher.normalize"} <= set(keys)
    for key in keys:
        run_here("schedule.steps=1", f"{key}={evil_nets}", directory=key)
        assert "Traceback" not in capsys.readouterr().err, key
    for kind in ("hf", "folder", "packed", "image"):
        assert run_here(f"data.kind={kind}", f"data.root={evil_nets}") == 2
    assert run_here(f"losses={{'{evil_nets}': 1}}") == 2


def texts(key: str, value: object) -> bool:
    return (value is None or isinstance(value, str)) and key not in ("student.name", "teacher.name", "run.dir")


def claiming(path: Path, name: str) -> Path:
    """A student's file whose metadata name a network."""
    state = {"weight": torch.zeros(16, 3, 4, 4), "bias": torch.zeros(16)}
    facts = {"name": name, "arch": {}, "image_size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    path.write_bytes(save(state, metadata={"format": "pt", "proteus": json.dumps(facts)}))
    return path


def test_a_file_may_not_say_whose_code_runs(run_here, tmp_path, evil_nets, marker, capsys):
    path = str(claiming(tmp_path / "student.safetensors", evil_nets))
    hint = f"is of a network of your own: create_model('{evil_nets}'"
    assert hint in refused(load_checkpoint, path)
    assert hint in refused(open_model, path, "student", tmp_path)
    for name in ("proteus_vitt14", "timm/vit_tiny_patch16_224", "hf-hub:a/b"):
        refused(create_model, name, checkpoint=path)
    save_file({"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, tmp_path / "head.safetensors")
    assert hint in refused(load_task_model, tmp_path)
    for form in ("timm", "hf", "onnx", "torch"):
        suffix = {"timm": ".safetensors", "hf": "", "onnx": ".onnx", "torch": ".pt2"}[form]
        assert export.main([form, path, "--out", str(tmp_path / f"out{suffix}")]) == 2
    assert run_here(f"student.checkpoint={path}") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not marker.exists()

    assert create_model(evil_nets, checkpoint=path).name == evil_nets  # whose code it is, the caller has said
    marker.rmdir()


def test_a_folder_that_is_exported_may_not_say_whose_code_runs(run_here, tiny, tmp_path, evil_nets):
    """The card of an export is made from the config.yaml beside the student."""
    assert run_here("schedule.steps=1") == 0
    config = load_config(str(tmp_path / "run/config.yaml"))
    assert isinstance(config, Config)
    assert config.teacher is not None
    config.teacher.name = evil_nets
    (tmp_path / "run/config.yaml").write_text(dump_config(config))
    student = tmp_path / "run/student.safetensors"
    assert export.main(["hf", str(student), "--out", str(tmp_path / "out")]) == 0
    assert evil_nets in (tmp_path / "out/README.md").read_text()


def test_arguments_in_a_file_are_data_to_an_export(tmp_path, marker, run_here):
    """An export runs the Python that it tells users to run, with names and values from the file in it."""
    assert run_here("schedule.steps=1") == 0
    student = tmp_path / "run/student.safetensors"
    data = student.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["proteus"])
    code = f"__import__('os').mkdir({str(marker)!r})"
    for arch in ({f"x={code}, y": 1}, {"qk_norm": f"') + {code} + ('"}, {"name": code}):
        facts["arch"] = ARCH | arch
        other = tmp_path / "other.safetensors"
        other.write_bytes(save(load_file(student), metadata={"proteus": json.dumps(facts)}))
        assert export.main(["timm", str(other), "--out", str(tmp_path / "out.safetensors")]) in (1, 2)
