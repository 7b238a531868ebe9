"""The teacher cache: what it keeps, what it costs in exactness, and when it is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from proteus.config_files import load_config
from proteus.data import view_cache
from proteus.data.loader import TrainingSet
from proteus.data.sampler import Sampler
from proteus.data.transforms import TrainTransform
from proteus.errors import InputError
from proteus.models.features import Features
from proteus.models.weights import save_encoder
from proteus.training import cache, cache_writer
from proteus.training.cache import Code, Components, open_cache
from proteus.training.networks import build_student
from proteus.training.probe import split_source
from proteus.training.start import build_accelerator
from proteus.training.task import build_task
from proteus.training.teacher import build_teachers
from tests.training.conftest import LAUNCH, ROOT, read_log
from tools.cache import main

VIEWS = 3
FEW = ("data.images_per_class=0.05", f"teacher_cache.views={VIEWS}")  # 70 images
ALL = ("teacher_cache.tokens=all", "teacher_cache.components=32")
CLS = ("losses={token: 1.0}",)


def fresh_accelerate() -> None:
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(view_cache, "CHUNK", 16)
    monkeypatch.setattr(cache_writer, "PASS", 12)
    monkeypatch.setattr(cache_writer, "CHECKED", 48)


@pytest.fixture
def make(tiny, tmp_path):
    """Call the tool's main in this process: make("run.seed=1", directory="b") -> exit status."""

    def run(*words: str, directory: str = "cache", yes: bool = True, cfg: str | Path = tiny) -> int:
        fresh_accelerate()
        flags = ["--yes"] if yes else []
        return main([f"--cfg={cfg}", *flags, f"teacher_cache.dir={tmp_path / directory}", *FEW, *words])

    return run


@pytest.fixture
def opened(tiny, tmp_path):
    """Open what `make` wrote: (config, teachers, source, sizes, student, views, cached teachers)."""

    def run(*words: str, cfg: str | Path = tiny):
        fresh_accelerate()
        config = load_config(str(cfg), [f"teacher_cache.dir={tmp_path / 'cache'}", *FEW, *words])
        accelerator = build_accelerator(config, tmp_path)
        source, _ = split_source(config)
        torch.manual_seed(config.run.seed)
        teachers = build_teachers(config, accelerator)
        student, sizes = build_student(config, teachers, accelerator)
        return config, teachers, source, sizes, student, *open_cache(config, teachers, source, sizes)

    return run


def batches(config, source, sizes, views, count=6, batch=12, device="cpu"):
    """Batches of the run's own order."""
    patches = sizes.mask[0] * sizes.mask[1]
    transform = TrainTransform(sizes.crop, config.data.augment)
    dataset = TrainingSet(source, transform, config.run.seed, patches, config.data.mask.ratio, views)
    sampler = Sampler(len(source), batch, repeats=config.data.repeats, mask_probability=0.5, seed=config.run.seed)
    return [dataset.batch(sampler.micro_batch(step, 0, 0)).to(torch.device(device)) for step in range(count)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "lock"}


def relative(found, wanted) -> float:
    return ((found - wanted).square().sum() / wanted.square().sum()).sqrt().item()


def test_class_tokens_are_the_live_ones_rounded_to_float16(make, opened):
    assert make(*CLS) == 0
    config, (teacher,), source, sizes, _, views, (cached,) = opened(*CLS)
    for batch in batches(config, source, sizes, views):
        live, known = teacher.answer(batch).features, cached.answer(batch).features
        assert known.cls.dtype == torch.float32
        assert torch.equal(known.cls, known.cls.half().float())
        # Another batch size may round the live token differently before it is rounded to float16.
        torch.testing.assert_close(known.cls, live.cls, rtol=2**-11, atol=2e-6)
        assert known.patch.shape == (12, 0, 32)
        assert known.grid == live.grid == (4, 4)
        assert not known.cls.requires_grad


def test_losses_equal_the_live_ones_within_the_error_that_is_told(make, opened, tmp_path, capsys):
    assert make(*ALL) == 0  # as many components as the teacher is wide: what is left is the rounding of codes
    config, teachers, source, sizes, student, views, cached = opened(*ALL)
    told = json.loads((tmp_path / "cache/identity.json").read_text())["error"]
    task = build_task(config, student, teachers, sizes, None, 0.0).eval()
    sums: dict[str, list[float]] = {}
    off = spread = 0.0
    with torch.no_grad():
        for batch in batches(config, source, sizes, views):
            live, known = teachers[0].answer(batch), cached[0].answer(batch)
            off += (known.features.patch - live.features.patch).square().sum().item()
            spread += live.features.patch.square().sum().item()
            one, other = (task(batch.images, batch.mask, [answer]) for answer in (live, known))
            error = [(b - a).flatten() for a, b in zip(live.features[:2], known.features[:2], strict=True)]
            distance = torch.cat(error).square().mean().sqrt().item()
            assert abs(other["feature"].item() ** 0.5 - one["feature"].item() ** 0.5) < distance  # the triangle's
            for name in one:
                sums.setdefault(name, []).append(abs(other[name].item() / one[name].item() - 1))
    assert sums.keys() == {"token", "patch", "feature"} == told["losses"].keys()
    assert max(sums["token"]) < 1e-4
    assert max(sums["patch"] + sums["feature"]) < 1e-2
    (tokens,) = told["tokens"].values()
    assert (off / spread) ** 0.5 == pytest.approx(tokens["patch"], rel=0.2)  # another sample of views
    assert 1e-3 < tokens["patch"] < 3e-2
    assert 1e-5 < tokens["cls"] < 3e-4
    assert tokens["patch_variance"] > 0.999
    for loss in told["losses"].values():
        assert loss["error"] == pytest.approx(loss["cached"] / loss["live"] - 1, abs=1e-12)
        assert abs(loss["error"]) < 3e-3
    said = capsys.readouterr().out
    assert f"class token {tokens['cls']:.2e}, patch tokens {tokens['patch']:.2e}" in said
    assert f"feature: {told['losses']['feature']['live']:.6g} live" in said


def test_fewer_components_keep_what_principal_components_can(make, tmp_path):
    """The variance that is explained is that of an analysis of all tokens, done here by numpy."""
    assert make(*ALL, directory="whole") == 0
    assert make("teacher_cache.tokens=all", "teacher_cache.components=5") == 0
    told = json.loads((tmp_path / "cache/identity.json").read_text())["error"]["tokens"]["timm/vit_tiny_patch16_224"]
    components = load_file(tmp_path / "whole/components.safetensors")
    basis, scale = components["0.basis"].numpy(), components["0.scale"].numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(32), atol=1e-5)
    targets = [
        np.fromfile(path, view_cache.record_dtype(64 + 16 * 32))["target"] for path in chunk_files(tmp_path / "whole")
    ]
    codes = np.concatenate(targets)[:, 64:].view(np.int8).reshape(-1, 32)
    tokens = codes * scale @ basis + components["0.mean"].numpy()
    values = np.linalg.eigvalsh(np.cov(tokens.T))[::-1]
    assert told["patch_variance"] == pytest.approx(values[:5].sum() / values.sum(), abs=0.02)
    assert told["patch_variance"] < 0.95
    few = load_file(tmp_path / "cache/components.safetensors")
    np.testing.assert_array_equal(few["0.basis"], basis[:5])


def test_components_are_of_what_differs_between_tokens():
    moments, draw = cache_writer._Moments(4), torch.Generator().manual_seed(0)
    deviations, offset = torch.tensor([1.0, 3.0, 2.0, 0.1]), torch.tensor([0.0, 0.0, 0.0, 50.0])
    for _ in range(5):
        moments.add(torch.randn(10, 100, 4, generator=draw) * deviations + offset)
    mean, basis, scale = moments.components(3)
    torch.testing.assert_close(mean.float(), offset, atol=0.1, rtol=0)
    torch.testing.assert_close(basis.float(), torch.eye(4)[[1, 2, 0]], atol=0.05, rtol=0)
    wanted = torch.tensor([3.0, 2.0, 1.0]) * cache_writer.SPREAD / 127
    torch.testing.assert_close(scale.float(), wanted, rtol=0.05, atol=0)


def chunk_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("chunk_*.bin"))


def test_codes_are_off_by_half_a_step_at_most_and_cut_far_out():
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q[:3]
    code = Code(8, (2, 3), Components(torch.randn(8, generator=draw), basis, torch.tensor([0.5, 0.01, 0.1])))
    scores = torch.tensor([100.0, 1.2, 12.0]) * (torch.rand(4, 6, 3, generator=draw) - 0.5)
    cls = torch.randn(4, 8, generator=draw)
    rows = code.encode(Features(cls, code.components.mean + scores @ basis, (2, 3)))
    assert rows.dtype == torch.uint8
    assert rows.shape == (4, Code.size(8, (2, 3), 3)) == (4, 2 * 8 + 6 * 3)
    back = code.decode(rows)
    assert torch.equal(back.cls, cls.half().float())
    found = (back.patch - code.components.mean) @ basis.T
    error = (found - scores).abs() / code.components.scale
    assert 0.4 < error.max() < 0.501
    outlier = code.encode(Features(cls, code.components.mean + 1e3 * basis[0].expand(4, 6, 8), (2, 3)))
    torch.testing.assert_close(
        code.decode(outlier).patch, code.components.mean + 63.5 * basis[0].expand(4, 6, 8), rtol=1e-5, atol=1e-2
    )


def test_two_teachers_share_a_row_and_heads_read_what_comes_back(make, opened, tiny, tmp_path):
    save_file(
        {"weight": torch.randn(10, 32, generator=torch.Generator().manual_seed(0))}, tmp_path / "head.safetensors"
    )
    second = f"{{name: timm/vit_tiny_patch16_224, checkpoint: random, head: {tmp_path / 'head.safetensors'}, "
    second += "image_size: 8, arch: {patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}}"
    first = "{name: timm/vit_tiny_patch16_224, checkpoint: random, losses: {token: 1.0}, "
    first += "arch: {patch_size: 4, embed_dim: 48, depth: 1, num_heads: 2}}"
    words = ("teacher=null", f"teachers=[{first}, {second}]", "losses={logits_kl: 1.0, token: 1.0}")
    assert make(*words) == 0
    config, teachers, source, sizes, _, views, cached = opened(*words)
    for batch in batches(config, source, sizes, views, 2):
        for teacher, known in zip(teachers, cached, strict=True):
            live, answer = teacher.answer(batch), known.answer(batch)
            assert relative(answer.features.cls, live.features.cls) < 1e-3
            assert (answer.logits is None) == (live.logits is None)
            if live.logits is not None:
                assert relative(answer.logits, live.logits) < 1e-3
                assert torch.equal(answer.logits, teacher.head(answer.features))
    save_file({"weight": torch.randn(10, 64)}, tmp_path / "head.safetensors")  # reads the mean patch token too
    with pytest.raises(InputError, match=r"teachers.1.head reads patch tokens: teacher_cache.tokens=all keeps them"):
        opened(*words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("teacher.normalize=clip",), "teacher.weights was "),
        (("teacher.arch.depth=1",), "teacher.weights was "),
        (("teacher.dtype=bfloat16",), "teacher.precision was float32, is bfloat16"),
        (("run.precision=bf16",), "teacher.precision was float32, is bf16 autocast"),
        (("teacher.image_size=8",), "teacher.image_size was 16, is 8"),
        (("data.augment.auto_augment=null",), "data.augment.auto_augment was rand-m9-mstd0.5-inc1, is None"),
        (("data.augment.scale=[0.2,1.0]",), "data.augment.scale was (0.08, 1.0), is (0.2, 1.0)"),
        (("data.augment.erasing=0.0",), "data.augment.erasing was 0.5, is 0.0"),
        (("run.seed=1",), "run.seed was 0, is 1"),
        (("data.images_per_class=0.06",), "images was "),
        (("data.split=test",), "names of the images was "),
        (("teacher_cache.views=2",), "teacher_cache.views was 3, is 2"),
        (("student.image_size=32",), "image size was 16, is 32"),
        (ALL, "teacher_cache.tokens was cls, is all"),
    ],
)
def test_a_cache_of_another_run_is_refused_by_the_tool_and_by_the_trainer(finished, opened, make, capsys, words, named):
    before = contents(finished)
    with pytest.raises(InputError) as refused:
        opened(*CLS, *words)
    (line,) = refused.value.lines
    assert line.startswith(f"{finished} is the cache of another run: ")
    assert named in line
    assert line.endswith("; give another teacher_cache.dir")
    assert make(*CLS, *words) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert contents(finished) == before


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(make, tmp_path, finished_once):
    """A finished cache of class tokens, made once and copied."""
    kept = finished_once / "cache"
    if not kept.is_dir():
        assert make(*CLS) == 0
        kept.mkdir()
        for name, data in contents(tmp_path / "cache").items():
            (kept / name).write_bytes(data)
    (tmp_path / "cache").mkdir(exist_ok=True)
    for name, data in contents(kept).items():
        (tmp_path / "cache" / name).write_bytes(data)
    return tmp_path / "cache"


def test_other_weights_of_the_same_network_are_refused(opened, make, tiny, tmp_path, finished):
    _, (teacher,), *_ = opened(*CLS)
    save_encoder(teacher.encoder, tmp_path / "same.safetensors")
    opened(*CLS, f"teacher.checkpoint={tmp_path / 'same.safetensors'}")
    with torch.no_grad():
        teacher.encoder.network.blocks[1].mlp.fc2.bias[3] += 1e-3
    save_encoder(teacher.encoder, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"another run: teacher.weights was \w{12}, is \w{12}; give another"):
        opened(*CLS, f"teacher.checkpoint={tmp_path / 'other.safetensors'}")


def test_noise_of_another_kind_of_device_is_another_recipe(opened, make, finished, tmp_path, monkeypatch):
    opened(*CLS)
    monkeypatch.setattr(cache, "_device", lambda teachers: torch.device("cuda"))
    with pytest.raises(InputError, match=r"another run: device was cpu, is cuda; give"):
        opened(*CLS)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plain = (*CLS, "data.augment.erasing=0.0", f"teacher_cache.dir={tmp_path / 'plain'}")
    assert make(*plain) == 0
    monkeypatch.setattr(view_cache, "CHUNK", 256)  # as the undone fixture has it
    monkeypatch.setattr(cache, "_device", lambda teachers: torch.device("cuda"))
    opened(*plain)


def test_what_does_not_touch_the_targets_may_change(opened, finished):
    opened("losses={contrastive: 1.0}", "run.batch_size=4", "data.repeats=3", "student.arch.depth=1", "data.workers=1")


def test_a_cache_that_is_not_there_not_whole_or_damaged(opened, make, finished, tmp_path, capsys):
    whole = contents(finished)
    identity = json.loads(whole["identity.json"])
    (finished / "identity.json").write_text(json.dumps({key: identity[key] for key in ("made_with", "components")}))
    with pytest.raises(InputError, match=r"is not finished: run tools/cache.py again, it goes on from what is there"):
        opened(*CLS)
    assert make(*CLS, "--check=16") == 2
    assert "is not finished" in capsys.readouterr().err
    (finished / "identity.json").write_text("{")
    with pytest.raises(InputError, match=r"identity.json is damaged"):
        opened(*CLS)
    (finished / "identity.json").unlink()
    with pytest.raises(InputError, match=r"holds no teacher cache: make it by tools/cache.py"):
        opened(*CLS)
    assert make(*CLS) == 2  # records of nobody knows what
    assert "holds other things" in capsys.readouterr().err
    (finished / "identity.json").write_bytes(whole["identity.json"])

    path = chunk_files(finished)[2]
    path.unlink()
    with pytest.raises(InputError, match=rf"is not finished .{path.name} is missing."):
        opened(*CLS)
    flipped = bytearray(whole[path.name])
    flipped[1000] ^= 16
    path.write_bytes(flipped)
    config, _, source, sizes, _, views, _ = opened(*CLS)
    with pytest.raises(
        InputError, match=rf"{path.name} is damaged .checksum of image \d+, view \d.: delete it and run"
    ):
        batches(config, source, sizes, views, 12)
    path.unlink()
    assert make(*CLS) == 0  # which is what the lines say to do
    assert contents(finished) == whole


def test_damaged_components_are_refused(opened, make, tmp_path):
    assert make(*ALL) == 0
    path = tmp_path / "cache/components.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"components.safetensors is damaged: delete"):
        opened(*ALL)


def test_it_says_what_it_will_write_and_asks(make, tmp_path, capsys, monkeypatch):
    assert make(*CLS, yes=False) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: 1.87e-05 GB are to be written, and there is no terminal to ask: give --yes\n")
    assert "70 images x 3 views, 89 bytes a record" in said.out  # 32 half floats, crop, flip and two checksums
    assert "GB free" in said.out
    assert not (tmp_path / "cache").exists()

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert make(*CLS, yes=False) == 2
    assert capsys.readouterr().err == "error: nothing was written\n"
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    assert make(*CLS, yes=False) == 0
    assert sum(path.stat().st_size for path in chunk_files(tmp_path / "cache")) == 70 * 3 * 89 == 18690

    capsys.readouterr()
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked again"))
    assert make(*CLS, yes=False) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["--cfg=demo.yaml"]) == 2
    assert "teacher_cache.dir is not set" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_said_before(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=17_000))
    assert make(*CLS) == 2
    assert "1.7e-05 GB are free for the 1.87e-05 GB to be written" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("words", [CLS, ALL], ids=["cls", "all"])
@pytest.mark.parametrize("stops", [0, 1, 3, 5])
def test_stopped_and_gone_on_with_is_the_same_to_the_byte(make, tmp_path, monkeypatch, words, stops):
    """Stopped before its n-th file is in place, the identity and the components counted."""
    assert make(*words, directory="whole") == 0
    write, calls = cache_writer.write_file, []

    def stop(path, fill):
        calls.append(path)
        if len(calls) > stops:
            fill(path.with_name(".pending-" + path.name))  # half-way
            raise KeyboardInterrupt
        write(path, fill)

    monkeypatch.setattr(cache_writer, "write_file", stop)
    assert make(*words) == 130
    monkeypatch.setattr(cache_writer, "write_file", write)
    assert make(*words, "data.workers=2") == 0
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert len(chunk_files(tmp_path / "cache")) == 5


def test_the_error_can_be_measured_again(make, finished, capsys):
    before = contents(finished)
    capsys.readouterr()
    assert make(*CLS, "--check=100") == 0
    assert "on 112 views" in capsys.readouterr().out
    after = contents(finished)
    assert json.loads(after["identity.json"])["error"]["views"] == 112
    assert {name for name in after if after[name] != before[name]} == {"identity.json"}
    assert make(*CLS, "--check=0") == 2


def photos(root: Path, count: int, broken: tuple[int, ...] = ()) -> None:
    root.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        if number in broken:
            (root / f"{number:02d}.png").write_bytes(b"no picture")


def test_unreadable_images_are_replaced_as_in_training(make, opened, tmp_path, capsys):
    photos(tmp_path / "photos", 30, broken=(4, 29))
    words = (
        *CLS,
        "data.kind=folder",
        f"data.root={tmp_path / 'photos'}",
        "data.split=null",
        "data.images_per_class=1.0",
    )
    assert make(*words) == 0
    assert "2 images cannot be read and have another's views: 04.png, 29.png\n" in capsys.readouterr().out
    config, (teacher,), source, sizes, _, views, (cached,) = opened(*words)
    bad = set()
    for batch in batches(config, source, sizes, views, 12):
        bad.update(batch.bad)
        assert relative(cached.answer(batch).features.cls, teacher.answer(batch).features.cls) < 1e-3
    assert bad == {4, 29}
    kept = [np.fromfile(path, views.dtype) for path in chunk_files(tmp_path / "cache")]
    pixels = np.concatenate(kept)["pixels"].reshape(30, VIEWS)
    np.testing.assert_array_equal(pixels[[4, 29]], pixels[[5, 0]])  # the images in their places
    assert make(*words, "data.max_bad_files=2", directory="other") == 2
    assert "2 of 30 images cannot be read, more than data.max_bad_share=0.01" in capsys.readouterr().err


def test_an_image_that_has_changed_is_named(make, opened, tmp_path):
    photos(tmp_path / "photos", 20)
    words = (
        *CLS,
        "data.kind=folder",
        f"data.root={tmp_path / 'photos'}",
        "data.split=null",
        "data.images_per_class=1.0",
    )
    assert make(*words) == 0
    Image.open(tmp_path / "photos/07.png").rotate(180).save(tmp_path / "photos/07.png")
    config, _, source, sizes, _, views, _ = opened(*words)
    with pytest.raises(InputError, match=r"07.png does not look as it did when .*cache was made"):
        batches(config, source, sizes, views, 20)


SLOW = ("data.images_per_class=1.0",)  # 1,347 images, six files


def start_tool(tiny: Path, directory: Path, *words: str, launcher: tuple[str, ...] = (sys.executable,)):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tools/cache.py"), f"--cfg={tiny}", "--yes", f"teacher_cache.dir={directory}"]
    return subprocess.Popen([*command, *FEW, *SLOW, *ALL, *words], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_and_run_by_two_processes_it_is_the_same_to_the_byte(tiny, tmp_path):
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    assert start_tool(tiny, whole).wait(200) == 0
    first = start_tool(tiny, killed)
    end = time.monotonic() + 120
    while len(chunk_files(killed)) < 2:
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert 2 <= len(chunk_files(killed)) < 6
    assert start_tool(tiny, killed).wait(200) == 0
    assert contents(killed) == contents(whole)
    assert len(chunk_files(whole)) == 6
    assert start_tool(tiny, two, launcher=LAUNCH).wait(200) == 0
    one, other = contents(whole), contents(two)
    told = [json.loads(files.pop("identity.json")) for files in (one, other)]
    assert one == other  # the records and the components
    assert told[0]["made_with"] == told[1]["made_with"]
    for name, loss in told[0]["error"]["losses"].items():
        assert told[1]["error"]["losses"][name]["live"] == pytest.approx(loss["live"], rel=1e-5)


def test_a_run_learns_from_the_cache_what_it_would_from_its_teachers(make, run_here, tmp_path, monkeypatch):
    words = (*FEW, *ALL, f"teacher_cache.dir={tmp_path / 'cache'}")
    assert make(*ALL) == 0
    asked = []
    live = cache_writer.Teacher.__call__
    monkeypatch.setattr(cache_writer.Teacher, "__call__", lambda self, images: asked.append(1) or live(self, images))
    assert run_here(*words, directory="cached") == 0
    assert not asked  # no teacher computes
    decode = cache.CachedTeacher.answer
    beside = []

    def answer(self, batch):
        beside.append(self)
        teacher = teachers[self.name]
        assert relative(decode(self, batch).features.cls, teacher(batch.images).cls) < 1e-3
        return teacher.answer(batch)

    config = load_config(str(tmp_path / "tiny.yaml"), list(words))
    torch.manual_seed(config.run.seed)
    teachers = {teacher.name: teacher for teacher in build_teachers(config, Accelerator())}
    monkeypatch.setattr(cache.CachedTeacher, "answer", answer)
    assert run_here(*words, directory="live") == 0
    assert len(beside) == 12
    one, other = read_log(tmp_path / "cached"), read_log(tmp_path / "live")
    assert len(one) == len(other) == 12
    for row, wanted in zip(one, other, strict=True):
        for name in ("loss_token", "loss_patch", "loss_feature"):
            assert row[name] == pytest.approx(wanted[name], rel=5e-3), name
            assert row[name] != wanted[name]

    assert run_here(*words, "data.workers=2", directory="workers") == 0
    assert [row["loss"] for row in read_log(tmp_path / "workers")] == [row["loss"] for row in other]


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu(make, opened, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert make(*ALL) == 0
    config, (teacher,), source, sizes, _, views, (cached,) = opened(*ALL)
    for batch in batches(config, source, sizes, views, device="cuda"):
        torch.cuda.set_sync_debug_mode("error")
        known = cached.answer(batch).features
        torch.cuda.set_sync_debug_mode("default")
        live = teacher.answer(batch).features
        assert relative(known.cls, live.cls) < 1e-3
        assert relative(known.patch, live.patch) < 3e-2


def test_a_run_refuses_the_cache_of_another(make, run_here, tmp_path, capsys):
    assert make(*CLS) == 0
    capsys.readouterr()
    words = (*FEW, *CLS, f"teacher_cache.dir={tmp_path / 'cache'}")
    assert run_here(*words, "data.augment.hflip=0.0") == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "is the cache of another run: data.augment.hflip was 0.5, is 0.0" in said
