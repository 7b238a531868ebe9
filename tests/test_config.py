"""The configuration: every shipped file, how files and overrides combine, and what each mistake is told."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from proteus.config_files import CONFIGS, dump_config, load_config
from proteus.errors import InputError

# base/ holds parts of configs; transfer/ and accelerate/ belong to other commands.
SHIPPED = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if path.relative_to(CONFIGS).parts[0] not in ("accelerate", "base", "transfer")
)
MINIMAL = {
    "teacher": {"name": "dinov2_vits14"},
    "student": {"name": "proteus_vitt14"},
    "losses": {"token": 1.0},
    "data": {},
    "schedule": {"epochs": 1},
}


@pytest.fixture
def write(tmp_path):
    """Writes a tree (or text) as a YAML file and returns its path."""

    def _write(name: str, content) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return _write


@pytest.fixture
def minimal(write):
    return write("minimal.yaml", MINIMAL)


def told(path: str, *overrides: str) -> str:
    """The one line that loading `path` ends in."""
    with pytest.raises(InputError) as caught:
        load_config(path, list(overrides))
    assert len(caught.value.lines) == 1, caught.value.lines
    assert "\n" not in caught.value.lines[0]
    return caught.value.lines[0]


def leaves(tree, prefix="") -> dict:
    """{dotted key: value} of a nested dictionary."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in leaves(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def difference(one: str, other: str) -> dict:
    """{key: value in `other`} of all keys whose values are not those of `one`; `run.dir` aside."""
    before, after = (leaves(yaml.safe_load(dump_config(load_config(name)))) for name in (one, other))
    changed = {key for key in {*before, *after} if before.get(key, KeyError) != after.get(key, KeyError)}
    return {key: after.get(key, KeyError) for key in changed - {"run.dir"}}


# What is shipped


def test_there_are_configs_to_test():
    assert {"demo.yaml", "proteus_s14.yaml", "examples/folder.yaml", "ablations/token_only.yaml"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_loads_and_survives_a_round_trip(name, tmp_path):
    config = load_config(name)
    assert config.run.dir == f"runs/{Path(name).stem}"
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    again = load_config(str(copy))
    assert again == config
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize(
    ("name", "teacher", "losses"),
    [
        ("clip", "clip_vitl14", {"token": 1.0}),
        ("synclr", "synclr_vitl14", {"token": 1.0, "patch": 1.0, "feature": 1.0}),
    ],
)
def test_presets_of_other_teachers_differ_from_dinov2s_as_the_paper_says(name, teacher, losses):
    cfg, dinov2 = load_config(f"proteus_b14_{name}.yaml"), load_config("proteus_b14.yaml")
    assert (cfg.teacher.name, cfg.teacher.normalize) == (teacher, "imagenet")
    assert cfg.active_losses == losses
    same = {"teacher": dinov2.teacher, "losses": dinov2.losses, "run": dinov2.run}
    assert cfg.model_copy(update=same) == dinov2


@pytest.mark.parametrize(
    ("size", "teacher"),
    [("t", "dinov2_vits14"), ("s", "dinov2_vitb14"), ("b", "dinov2_vitl14"), ("l", "dinov2_vitg14")],
)
def test_presets_hold_the_values_of_the_paper(size, teacher):
    values = leaves(yaml.safe_load(dump_config(load_config(f"proteus_{size}14.yaml"))))
    expected = {
        "teacher.name": teacher,
        "teacher.normalize": "own",
        "teacher.dtype": "auto",
        "teacher.download": False,
        "student.name": f"proteus_vit{size}14",
        "student.checkpoint": None,
        "losses.token": 1.0,
        "losses.patch": 1.0,
        "losses.feature": 1.0,
        "data.kind": "folder",
        "data.root": None,
        "data.split": "train",
        "data.classes": 1.0,
        "data.images_per_class": 1.0,
        "data.merge": [],
        "data.image_size": 224,
        "data.repeats": 3,
        "data.augment.scale": [0.08, 1.0],
        "data.augment.hflip": 0.5,
        "data.augment.auto_augment": "rand-m9-mstd0.5-inc1",
        "data.augment.erasing": 0.25,
        "data.mask.probability": 0.5,
        "data.mask.ratio": 0.5,
        "optimizer.lr": 5e-4,
        "optimizer.lr_batch": 512,
        "optimizer.weight_decay": 0.05,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "optimizer.clip_grad": None,
        "schedule.epochs": 300.0,
        "schedule.steps": None,
        "schedule.warmup_epochs": 5.0,
        "schedule.warmup_lr": 1e-6,
        "schedule.min_lr": 1e-5,
        "schedule.per": "epoch",
        "ema.decay": 0.99996,
        "probe.split": "val",
        "run.seed": 0,
        "run.batch_size": 128,
        "run.accumulate": 1,
        "run.precision": "fp16",
    }
    assert {key: values[key] for key in expected} == expected
    assert {key for key in values if key.startswith("losses.")} == {"losses.token", "losses.patch", "losses.feature"}


NO_MASK = {"data.mask.probability": 0.0}
HEAD = {"teacher.head": "weights/dinov2_vitb14_linear_head.pth"}
LOGITS = {"losses.token": 0.0, "losses.patch": 0.0, "losses.feature": 0.0, **NO_MASK, **HEAD}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("token_only", {"losses.patch": 0.0, "losses.feature": 0.0, **NO_MASK}),
        ("token_feature", {"losses.patch": 0.0, **NO_MASK}),
        ("feature_mse", {"losses.patch": 0.0, "losses.feature": 0.0, **NO_MASK}),
        ("logits_kl", {"losses.logits_kl": 1.0, **LOGITS}),
        ("logits_ce_kl", {"losses.logits_kl": 0.5, "losses.label_ce": 0.5, **LOGITS}),
        ("classes_20", {"data.classes": 0.2}),
        ("classes_50", {"data.classes": 0.5}),
        ("images_20", {"data.images_per_class": 0.2}),
        ("images_50", {"data.images_per_class": 0.5}),
        ("single_image", {"data.kind": "image", "data.split": None, "probe.split": None}),
    ],
)
def test_an_ablation_changes_nothing_but_what_it_is_named_after(name, changes):
    assert difference("proteus_s14.yaml", f"ablations/{name}.yaml") == changes


def test_the_merged_set_adds_the_twelve_sets_and_nothing_else():
    changes = difference("proteus_s14.yaml", "ablations/merged.yaml")
    assert list(changes) == ["data.merge"]
    assert len({source["root"] for source in changes["data.merge"]}) == len(changes["data.merge"]) == 12


def test_a_loss_of_weight_zero_is_not_active():
    assert load_config("ablations/logits_kl.yaml").active_losses == {"logits_kl": 1.0}


def test_checking_a_config_does_not_wait_for_torch():
    code = "import sys, proteus.config_files as c; c.load_config('demo.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# Files


def test_base_merges_mappings_and_replaces_lists(write):
    merge = [{"root": "a"}, {"root": "b"}]
    data = {"root": "x", "merge": merge, "mask": {"probability": 0.25, "ratio": 0.75}}
    write("parent.yaml", {**MINIMAL, "data": data, "optimizer": {"betas": [0.8, 0.9], "lr": 1.0}})
    child = {"base": "parent.yaml", "data": {"merge": [{"root": "c"}], "mask": {"ratio": 0.1}}, "losses": {"patch": 2}}
    config = load_config(write("child.yaml", child))
    assert [source.root for source in config.data.merge] == ["c"]
    assert (config.data.root, config.data.mask.probability, config.data.mask.ratio) == ("x", 0.25, 0.1)
    assert config.losses == {"token": 1.0, "patch": 2.0}
    assert (config.optimizer.lr, config.optimizer.betas) == (1.0, (0.8, 0.9))
    assert config.run.dir == "runs/child"


def test_null_takes_an_inherited_value_away(write):
    write("parent.yaml", {**MINIMAL, "schedule": {"epochs": 3}})
    config = load_config(write("child.yaml", {"base": "parent.yaml", "schedule": {"epochs": None, "steps": 7}}))
    assert (config.schedule.epochs, config.schedule.steps) == (None, 7)


def test_base_is_looked_up_beside_the_file_then_under_configs(write):
    write("sub/parent.yaml", {**MINIMAL, "student": {"name": "beside"}})
    assert load_config(write("sub/child.yaml", {"base": "parent.yaml"})).student.name == "beside"
    assert load_config(write("far.yaml", {"base": "proteus_l14.yaml"})).student.name == "proteus_vitl14"


def test_bases_chain(write):
    write("a.yaml", {**MINIMAL, "run": {"seed": 1, "keep": 1, "log_every": 1}})
    write("b.yaml", {"base": "a.yaml", "run": {"keep": 2, "log_every": 2}})
    run = load_config(write("c.yaml", {"base": "b.yaml", "run": {"log_every": 3}})).run
    assert (run.seed, run.keep, run.log_every) == (1, 2, 3)


def test_a_name_is_a_path_first_and_then_a_file_under_configs(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("proteus_s14.yaml").student.name == "proteus_vits14"
    write("proteus_s14.yaml", {**MINIMAL, "student": {"name": "mine"}})
    assert load_config("proteus_s14.yaml").student.name == "mine"


def test_one_config_does_not_leak_into_the_next(write):
    first = load_config(write("first.yaml", MINIMAL), ["run.seed=5"])
    second = load_config(write("second.yaml", MINIMAL))
    assert (first.run.dir, second.run.dir) == ("runs/first", "runs/second")
    assert second.run.seed == 0


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "0.001", "+1e-3"])
def test_a_rate_in_scientific_notation_is_a_number(write, text):
    # `arch` has no types that would make a number of a string: the file and the override have to.
    student = {"name": "proteus_vitt14", "arch": {"drop_path": "RATE"}}
    tree = yaml.safe_dump({**MINIMAL, "student": student, "optimizer": {"lr": "RATE"}})
    config = load_config(write("rate.yaml", tree.replace("RATE", text)), [f"teacher.arch={{drop_path: {text}}}"])
    assert config.optimizer.lr == 0.001
    assert config.student.arch == config.teacher.arch == {"drop_path": 0.001}


@pytest.mark.parametrize("text", ["1e5", "1e+5", "1E5"])
def test_an_exponent_needs_no_sign(minimal, text):
    assert load_config(minimal, [f"student.arch.theta={text}"]).student.arch == {"theta": 100000.0}


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-3", 0.001),
        ("run.batch_size=64", 64),
        ("run.dir=runs/a=b", "runs/a=b"),
        ("run.precision=fp16", "fp16"),
        ('run.precision="no"', "no"),
        ("data.root=/data/imagenet", "/data/imagenet"),
        ("teacher.checkpoint=null", None),
        ("teacher.download=true", True),
        ("probe.images=64", 64),
        ("data.augment.scale=[0.5, 1]", (0.5, 1.0)),
        ("losses.feature=0.5", 0.5),
    ],
)
def test_an_override_sets_the_key(minimal, override, value):
    found = load_config(minimal, [override])
    for part in override.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_keep_their_neighbours_and_the_last_one_wins(minimal):
    config = load_config(minimal, ["run.seed=1", "run.keep=7", "run.seed=2", "losses.patch=1"])
    assert (config.run.seed, config.run.keep) == (2, 7)
    assert config.losses == {"token": 1.0, "patch": 1.0}


def test_an_override_reaches_a_place_of_a_list(write):
    path = write("two.yaml", {**MINIMAL, "teacher": None, "teachers": [{"name": "a", "head": "x"}, {"name": "b"}]})
    config = load_config(path, ["teachers.0.name=c", "teachers.1.losses.token=2"])
    assert [(teacher.name, teacher.head) for teacher in config.teachers] == [("c", "x"), ("b", None)]
    assert list(config.all_teachers) == ["teachers.0", "teachers.1"]
    assert [config.losses_of(teacher) for teacher in config.teachers] == [{"token": 1.0}, {"token": 2.0}]
    for key in ("teachers.2.name", "teachers.first.name", "teachers.-1.name", "teachers.2"):
        assert told(path, f"{key}=d").startswith(f"{key}: ")


def test_the_losses_of_the_run_and_of_its_teachers(write):
    two = {**MINIMAL, "teacher": None, "teachers": [{"name": "a", "losses": {"feature": 1.0}}, {"name": "b"}]}
    config = load_config(write("two.yaml", two), ["losses.label_ce=0.5", "losses.patch=0"])
    assert [config.losses_of(teacher) for teacher in config.teachers] == [{"feature": 1.0}, {"token": 1.0}]
    assert config.computed_losses == {"feature", "token", "label_ce"}
    assert load_config(write("one.yaml", MINIMAL)).computed_losses == {"token"}


def test_an_override_beats_the_file_and_its_base(write):
    write("parent.yaml", {**MINIMAL, "run": {"seed": 1}})
    child = write("child.yaml", {"base": "parent.yaml", "run": {"seed": 2}})
    assert load_config(child, ["run.seed=3"]).run.seed == 3


# Mistakes


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("run.batchsize=3", "run.batchsize", "run.batch_size"),  # misspelt
        ("optimizer.weightdecay=1", "optimizer.weightdecay", "optimizer.weight_decay"),
        ("optimizr.lr=1", "optimizr", "optimizer"),
        ("teacher.nam=x", "teacher.nam", "teacher.name"),
        ("batch_size=3", "batch_size", "run.batch_size"),  # right, in the wrong section
        ("run.lr=1", "run.lr", "optimizer.lr"),
        ("data.probability=1", "data.probability", "data.mask.probability"),
        ("data.merge=[{image_size: 3}]", "data.merge.0.image_size", "data.image_size"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(minimal, override, key, hint):
    assert told(minimal, override) == f"minimal.yaml: unknown key {key!r}; did you mean {hint!r}?"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.batch_size=many", "run.batch_size"),
        ("run.batch_size=0", "run.batch_size"),
        ("run.seed=-1", "run.seed"),
        ("run.precision=fp8", "run.precision"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("losses.token=-1", "losses.token"),
        ("losses.token=.inf", "losses.token"),
        ("losses=token", "losses"),
        ("data=5", "data"),
        ("data.kind=foldr", "data.kind"),
        ("data.classes=0", "data.classes"),
        ("data.mask.ratio=1", "data.mask.ratio"),
        ("data.augment.scale=[2, 1]", "data.augment.scale.0"),
        ("data.merge={root: a}", "data.merge"),
        ("data.merge=[{kind: tar}]", "data.merge.0.kind"),
        ("student.name=3", "student.name"),
        ("schedule.per=week", "schedule.per"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(minimal, override, key):
    line = told(minimal, override)
    assert line.startswith(f"minimal.yaml: {key}: ")
    assert ", not " in line


@pytest.mark.parametrize("section", ["teacher", "student", "losses", "data", "schedule"])
def test_a_missing_section_is_named(write, section):
    path = write("part.yaml", {name: tree for name, tree in MINIMAL.items() if name != section})
    missing = {
        "teacher": "losses.token needs a teacher, and teacher is null (several: teachers)",
        "student": "give either student or students (student=null, or students=[], takes one away)",
    }
    assert told(path) == f"part.yaml: {missing.get(section, section + ' is missing')}"


def test_each_mistake_has_its_line(minimal):
    with pytest.raises(InputError) as caught:
        load_config(minimal, ["run.sed=1", "optimizer.lr=x"])
    assert len(caught.value.lines) == 2
    assert any("'run.sed'" in line for line in caught.value.lines)
    assert any("optimizer.lr" in line for line in caught.value.lines)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["losses.token=0"], ["losses", "weight above 0"]),
        (["losses={}"], ["losses", "weight above 0"]),
        (["teacher=null"], ["losses.token", "teacher is null"]),
        (["losses.patch=1", "data.mask.ratio=0"], ["losses.patch", "data.mask.ratio"]),
        (["losses.patch=1", "data.mask.probability=0"], ["losses.patch", "data.mask.probability"]),
        (["losses.logits_kl=1"], ["losses.logits_kl", "teacher.head"]),
        (["schedule.steps=10"], ["schedule", "epochs", "steps"]),
        (["schedule.epochs=null"], ["schedule", "epochs", "steps"]),
        (["schedule.warmup_epochs=1", "schedule.warmup_steps=1"], ["schedule", "warmup_epochs", "warmup_steps"]),
    ],
)
def test_an_impossible_combination_is_refused(minimal, overrides, words):
    line = told(minimal, *overrides)
    assert line.startswith("minimal.yaml: ")
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["teacher=null", "losses={label_ce: 1}"], {"label_ce": 1.0}),
        (["losses.logits_kl=1", "teacher.head=head.pth"], {"logits_kl": 1.0}),
        (["losses.logits_kl=0"], {}),
        (["losses.patch=0", "data.mask.probability=0"], {}),
        (["schedule.epochs=null", "schedule.steps=10", "schedule.warmup_steps=2"], {}),
    ],
)
def test_what_only_looks_impossible_is_allowed(minimal, overrides, changed):
    active = load_config(minimal, overrides).active_losses
    assert active
    assert changed.items() <= active.items()
    assert "patch" not in active or "losses.patch=0" not in overrides


@pytest.mark.parametrize("override", ["run.seed", "=3", "verbose", ""])
def test_an_override_without_key_and_value_is_refused(minimal, override):
    assert told(minimal, override).startswith(f"{override!r} is not an override: write key=value")


@pytest.mark.parametrize("files", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "a"}])
def test_a_base_that_leads_back_is_refused(write, files):
    paths = {name: write(f"{name}.yaml", {"base": f"{base}.yaml"}) for name, base in files.items()}
    assert told(paths["a"]) == f"{paths['a']}: base leads back to the file itself"


def test_a_missing_file_is_named_with_the_nearest(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = told("proteus_s41.yaml")
    assert "'proteus_s41.yaml'" in line
    assert line.endswith("did you mean 'proteus_s14.yaml'?")
    assert "'proteus_x.yaml'" in told(write("child.yaml", {"base": "proteus_x.yaml"}))


@pytest.mark.parametrize("text", ["run: [1, 2", "run: {seed: 1", "a: b: c", "\tseed: 1"])
def test_a_broken_file_is_named(write, text):
    path = write("broken.yaml", text)
    assert told(path).startswith(f"{path}: not readable as YAML: ")


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert told(str(path)).startswith(f"{path}: not readable as YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("", "NoneType"), ("just words", "str")])
def test_a_file_without_keys_is_named(write, text, kind):
    path = write("flat.yaml", text)
    assert told(path) == f"{path}: expected a mapping of keys, found {kind}"
