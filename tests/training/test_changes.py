"""What of a config may change between two starts of one run, by its keys."""

import pytest

from proteus.config_files import dump_config, flat_keys, load_config
from proteus.errors import InputError
from proteus.training.changes import CONFIG, HARMLESS, REFUSED, changes
from tests.training.conftest import ROOT

PLURAL = ("student=null", "students=[timm/vit_tiny_patch16_224, {name: timm/resnet18, tune: lora}]")


@pytest.fixture
def begun(tiny, tmp_path):
    """A checkpoint, as far as its config is concerned, that was made under the tiny one with some overrides."""

    def begin(*overrides):
        (tmp_path / CONFIG).write_text(dump_config(load_config(str(tiny), list(overrides))))

    return begin


def test_every_listed_key_is_one_of_the_config(tiny):
    keys = flat_keys(load_config(str(tiny), []).model_dump())
    for name in (*REFUSED, *HARMLESS):
        assert name in keys or any(key.startswith(name + ".") for key in keys), name


@pytest.mark.parametrize("name", [*REFUSED, *HARMLESS])
def test_the_docs_list_every_key(name):
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert f"`{name}`" in page or f"`{name}.*`" in page


def test_changed_keys_are_sorted_into_refused_told_and_harmless(begun, tiny, tmp_path):
    begun()
    words = ["run.seed=1", "run.keep=9", "probe.bank=7", "optimizer.lr=0.5", "losses.token=2"]
    found = changes(load_config(str(tiny), words), tmp_path)
    assert found.refused == ["run.seed: 0 -> 1"]
    assert found.told == ["losses.token: 1.0 -> 2.0", "optimizer.lr: 0.001 -> 0.5"]


def test_keys_of_one_of_several_are_those_of_the_one(begun, tiny, tmp_path):
    begun(*PLURAL)
    cfg = load_config(str(tiny), [PLURAL[0], PLURAL[1].replace("lora", "all")])
    assert changes(cfg, tmp_path).refused == ["students.1.tune: lora -> all"]
    cfg = load_config(str(tiny), [PLURAL[0], PLURAL[1].replace("tune: lora", "tune: lora, compile: true")])
    assert changes(cfg, tmp_path) == ([], ["students.1.compile: False -> True"])


def test_a_key_that_was_not_there_yet_is_told(begun, tiny, tmp_path):
    begun()
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text("".join(line for line in text.splitlines(True) if "repeats:" not in line))
    assert changes(load_config(str(tiny), []), tmp_path) == ([], ["data.repeats: None -> 2"])


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff\xfe", b"a list", b"- 1", b"a: &a\n  b: *a\n", b"[" * 5000])
def test_a_config_that_cannot_be_read_is_one_line(tiny, tmp_path, content):
    """Whether it is as it was written has been seen before: whoever wrote it, nothing can be compared with it."""
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(InputError) as error:
        changes(load_config(str(tiny), ["run.seed=1"]), tmp_path)
    (line,) = error.value.lines
    assert line.startswith(f"{tmp_path / CONFIG}: ")
