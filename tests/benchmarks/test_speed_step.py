"""The published step against ours: the same losses and gradients; and what the step's benchmark prints and writes."""

import json
from argparse import Namespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from benchmarks.speed import cached, gpu, step, sweep, timing
from benchmarks.speed.ours import OurStep, build_teacher, recipe
from benchmarks.speed.published import PAPER_DECAY, Changes, PublishedStep
from benchmarks.speed.step import BASELINE, Workbench, numbers
from proteus.training import cache_writer
from proteus.training.teacher import Teacher

NAME = "timm/vit_tiny_patch16_224"
KEYS = [
    "teacher.arch={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "student.arch={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
]
SIZE = ["--image-size", "16", "--threads", "1"]
NETWORKS = ["--teacher", NAME, "--student", NAME]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("RANK", raising=False)
    random = torch.get_rng_state()
    _forget_accelerate()
    yield
    _forget_accelerate()
    torch.set_rng_state(random)


def _forget_accelerate():
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def bench(**changes):
    """A workbench of tiny networks; three of its six images are masked."""
    return Workbench(Namespace(**{"teacher": NAME, "batch": 6, "image_size": 16, "overrides": KEYS} | changes), NAME)


def gradients(one):
    """Of the student and its heads after the losses of the first step, by name."""
    data = one.data()
    losses = one.forward(data, one.teach(data))
    one.backward(losses)
    if isinstance(one, OurStep):
        task = one.learners[0].task
        student, heads = task.student, task.adaptors[0].heads
    else:
        student, heads = one.student, one.heads
    found = {f"student.{name}": p.grad.clone() for name, p in student.named_parameters()}
    return numbers(losses), found | {f"heads.{name}": p.grad.clone() for name, p in heads.named_parameters()}


@pytest.mark.parametrize(
    "variant", ["ours", "published,half", "published,shared", "published,half,shared", "published,fused,no-wait"]
)
def test_losses_and_gradients_are_those_of_the_published_step(variant):
    work = bench()
    losses, wanted = gradients(work.build(BASELINE))
    own, found = gradients(work.build(variant))
    assert own == pytest.approx(losses, rel=1e-5)
    assert set(own) == {"token", "feature", "patch"}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_the_published_losses_are_those_of_their_description():
    one = bench().build(BASELINE)
    losses = numbers(one.forward(one.data(), one.teach(one.data())))
    images, mask, hidden = one.data()
    assert mask.sum(dim=1).tolist() == [8, 8, 8, 0, 0, 0]  # half of 16 patches, of the first half of the images
    assert mask.flatten()[hidden].all()
    with torch.no_grad():
        target, plain, masked = one.teacher(images), one.student(images), one.student(images, mask)
        cls = one.heads["token"](plain.cls)
        every = torch.cat([cls[:, None], one.heads["feature"](plain.patch)], 1)
        wanted = torch.cat([target.cls[:, None], target.patch], 1)
        patch = one.heads["patch"](masked.patch)
    assert losses["token"] == pytest.approx(float((cls - target.cls).square().mean()), rel=1e-5)
    assert losses["feature"] == pytest.approx(float((every - wanted).square().mean()), rel=1e-5)
    assert losses["patch"] == pytest.approx(float((patch - target.patch)[mask].square().mean()), rel=1e-5)


def test_the_published_step_passes_the_whole_batch_twice_and_reads_four_numbers():
    one = bench().build(BASELINE)
    seen = []
    one.student.network.blocks[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    before = {name: value.clone() for name, value in one.student.state_dict().items()}
    losses = one()
    assert seen == [6, 6]
    assert one.read == pytest.approx([sum(numbers(losses).values()), *numbers(losses).values()])
    assert not one.optimizer.defaults["fused"]
    after = one.student.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    for name, value in one.average.state_dict().items():  # one step of the average
        torch.testing.assert_close(value, before[name] * PAPER_DECAY + after[name] * (1 - PAPER_DECAY))


def test_changes_change_the_work_alone():
    work = bench()

    def passes(variant):
        one, seen = work.build(variant), []
        one.student.network.blocks[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
        one()
        return seen, one

    assert passes("published,half")[0] == [3, 6]
    assert passes("published,shared")[0] == [12]
    assert passes("published,half,shared")[0] == [9]
    quiet = passes("published,fused,no-wait,teacher")[1]
    assert quiet.read == []
    assert quiet.optimizer.defaults["fused"]
    assert next(quiet.teacher.parameters()).dtype == torch.bfloat16
    assert quiet.fast_average is not None
    _, slow = passes(BASELINE)
    for name, value in slow.average.network.state_dict().items():  # both averages are the same one
        torch.testing.assert_close(quiet.fast_average.module.network.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_bf16_reaches_both_sides_and_stays_close():
    work = bench()
    plain = numbers(work.build(BASELINE)())
    for variant in ("published,bf16", "ours,bf16", "ours,bf16,teacher"):
        own = numbers(work.build(variant)())
        assert own == pytest.approx(plain, rel=0.02), variant
        assert own != pytest.approx(plain, rel=1e-6), variant
    one, two, three = (work.build(f"published{words}") for words in ("", ",bf16", ",bf16,teacher"))
    exact, mixed, low = (each.teach(each.data()).patch for each in (one, two, three))
    assert low.dtype == torch.bfloat16
    assert 1e-4 < (mixed - exact).abs().max() < 0.1  # the teacher computes as the student does
    assert numbers(work.build("ours")()) == pytest.approx(plain, rel=1e-5)  # precisions do not leak into each other


def test_precisions_live_side_by_side():
    cfg = [recipe(NAME, NAME, 2, 16, [*KEYS, f"run.precision={precision}"]) for precision in ("no", "bf16")]
    full, half = (OurStep(one, build_teacher(one)) for one in cfg)

    def dtype(one):
        data = one.data()
        return one.teach(data)[0].features.patch.dtype

    first = numbers(full())
    half()
    assert dtype(full) == torch.float32
    full.step = 0
    again = OurStep(cfg[0], build_teacher(cfg[0]))
    half()
    assert numbers(again()) == first


def test_step_main_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "step.json"
    words = [*NETWORKS, *SIZE, "--rounds", "3", "--batch", "4", "--peak-side", "64", "--out", str(out)]
    assert step.main([*words, "--variants", "ours", "ours,bf16", "--set", *KEYS]) == 0
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found["summary"]) == [BASELINE, "ours", "ours,bf16"]
    assert {name: len(own) for name, own in found["times"].items()} == dict.fromkeys(found["summary"], 3)
    assert found["summary"][BASELINE]["speedup"] == 1
    for name, parts in found["stages"].items():
        assert list(parts) == ["data", "teacher", "student forward", "backward", "optimiser"], name
        assert all(seconds > 0 for seconds in parts.values())
    speed = found["flops"] / found["summary"]["ours"]["seconds"] / found["peak"]
    assert found["mfu"]["ours"] == pytest.approx(speed)
    assert f"| ours | {found['summary']['ours']['seconds']:.3f} |" in shown
    assert found["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("settings", [[], ["--settings", "bf16", "teacher"]])
def test_students_share_a_pass_of_the_teacher_and_lose_nothing(tmp_path, capsys, settings):
    out, students = tmp_path / "students.json", ["timm/test_vit", "timm/test_vit2"]
    words = ["--compare", "students", "--teacher", "timm/test_vit3", "--students", *students, *settings]
    words += ["--image-size", "32", "--threads", "1", "--batch", "2", "--rounds", "2", "--out", str(out)]
    assert step.main(words) == 0
    found = json.loads(out.read_text())
    losses = found["losses"]["together"]
    assert losses == found["losses"]["alone"]
    assert len({losses[f"timm_{name}: token"] for name in ("test_vit", "test_vit2")}) == 2  # they are two networks
    assert len(losses) == 6
    assert found["cost"] == pytest.approx(1 / timing.summarise(found["times"], "alone")["together"].speedup)
    assert "equal to the bit" in capsys.readouterr().out


def test_a_cached_epoch_asks_no_teacher_and_has_the_live_losses(tmp_path, capsys, monkeypatch):
    out, asked = tmp_path / "cache.json", []
    plain = Teacher.answer

    def answer(self, batch):
        asked.append(len(batch.images))
        return plain(self, batch)

    def make_cache(*args, **kwargs):
        cache_writer.make_cache(*args, **kwargs)
        asked.clear()

    monkeypatch.setattr(Teacher, "answer", answer)
    monkeypatch.setattr(cached, "make_cache", make_cache)
    words = [*NETWORKS, *SIZE, "--compare", "cache", "--images", "8", "--batch", "4", "--rounds", "2"]
    assert step.main([*words, "--out", str(out), "--set", *KEYS]) == 0
    found = json.loads(out.read_text())
    assert found["losses"]["cached"] == pytest.approx(found["losses"]["live"], rel=1e-3)
    assert found["losses"]["cached"] != found["losses"]["live"]  # float16 stands between them
    # One batch for the losses, two of each live epoch: one to warm up, in two rounds one that counts and one before.
    assert asked == [4] * (1 + 2 * 5)
    assert "| cached, token loss |" in capsys.readouterr().out


def test_what_is_asked_of_the_student_holds_for_each_of_several():
    cfg = recipe(NAME, ["a", "b"], 2, 16, ["student.compile=true", "student.arch={depth: 2}", "teacher.compile=true"])
    assert [(one.name, one.compile, one.arch) for one in cfg.students] == [(name, True, {"depth": 2}) for name in "ab"]
    assert cfg.student is None


def test_sweep_has_a_row_for_each_setting_and_batch(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    words = [*NETWORKS, *SIZE, "--batches", "2", "4", "--rounds", "2", "--out", str(out)]
    assert sweep.main([*words, "--set", *KEYS]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["setting"], row["batch"]) for row in rows] == [
        ("float32", 2), ("float32", 4), ("bf16,teacher", 2), ("bf16,teacher", 4)
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1
    assert all(row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"]) for row in rows)
    assert all(row["bytes"] > 1e8 for row in rows)  # a process with torch in it
    assert capsys.readouterr().out.count("| float32 |") == 2


def test_gpu_script_at_toy_size(tmp_path, capsys):
    out = tmp_path / "toy"
    variants = ["ours,bf16,teacher,sdpa", "ours,bf16,teacher,xformers", "published,no-wait"]
    assert gpu.main(["--toy", "--out", str(out), "--pairs", "B-S", "--rounds", "1", "--variants", *variants]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [BASELINE, *variants]
    assert rows[0]["ratio"] == 1
    assert rows[0]["difference"] == 0
    assert rows[1]["difference"] == pytest.approx(0, abs=0.02)
    assert "xformers" in rows[2]["error"]  # told, and the rest goes on
    assert rows[3]["difference"] == 0
    page = out.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    assert all(f"| B-S | {row['variant']} | 4 |" in page for row in rows)


def test_gpu_script_leaves_out_what_no_time_is_left_for(tmp_path):
    assert gpu.main(["--toy", "--out", str(tmp_path / "toy"), "--pairs", "g-L", "--minutes", "0"]) == 0
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    assert len(rows) == 1 + len(gpu.VARIANTS)
    assert all(row["error"] == "no time was left for it" for row in rows)


def test_gpu_script_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (step.main, ["--variants", "theirs"], "neither published nor ours"),
        (step.main, ["--variants", "ours,bf61"], "'bf16'"),
        (sweep.main, ["--settings", "compiled"], "'compile'"),
    ],
)
def test_a_typo_is_one_line(main, words, said, capsys):
    assert main([*NETWORKS, *SIZE, *words, "--set", *KEYS]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_ratios_compare_rounds():
    summary = timing.summarise({"a": [4.0, 8.0, 2.0], "b": [1.0, 4.0, 4.0]}, "a")
    assert summary == {"a": (4.0, 1.0), "b": (4.0, 2.0)}


def test_variants_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.in_turn(calls, 2, torch.device("cpu"), calls=2)
    assert "".join(order) == "abc" + "aaabbbccc" + "cccbbbaaa"
    assert [len(own) for own in times.values()] == [2, 2, 2]


def test_published_step_without_changes_is_the_default():
    work = bench()
    task = work.ours.learners[0].task
    one = PublishedStep(work.teacher, task.student, task.adaptors[0].heads, work.ours.batch, work.device)
    assert one.changes == Changes()
    assert not any(vars(one.changes).values())
