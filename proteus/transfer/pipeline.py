"""From a config to small models and what they are worth: every method, every seed, one table."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from proteus.config_files import dump_config
from proteus.data.dense import DenseSource
from proteus.data.sources import Source, build_source
from proteus.engine.atomic import write_file
from proteus.errors import InputError
from proteus.evaluation.extract import fingerprint
from proteus.training.resize import resize_images
from proteus.transfer.config import TransferConfig
from proteus.transfer.methods import ADAPT, Lab, methods_of
from proteus.transfer.model import load_task_model
from proteus.transfer.report import compare_table
from proteus.transfer.scores import task_score
from proteus.transfer.stages import Outcome
from proteus.transfer.target import check_leaks, open_splits, open_target

TEACHER = "teacher"  # the row of the adapted teacher itself


@dataclass(frozen=True)
class Result:
    """What one method is worth under one seed.

    test:       accuracy or mIoU on the test set, a share in [0, 1]; None without one.
    validation: on the validation set, of the weights that were kept; None without one.
    steps:      updates of the student.
    flops:      of all stages together, forward and backward.
    student:    the folder of its files.
    """

    method: str
    title: str
    seed: int
    test: float | None
    validation: float | None
    steps: int
    flops: int
    student: str


def transfer(cfg: TransferConfig, methods: list[str], seeds: list[int]) -> list[Result]:
    """Run the methods under each seed, in the run's folder; what is there already is not done again.

    Stopped where a signal stopped a stage. The test set is read when all stages of a method are done.
    """
    assert cfg.run.dir is not None
    directory = Path(cfg.run.dir)
    known = methods_of(cfg)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # only an Accelerator asks by itself
    opened = open_splits(cfg)
    further = None if cfg.transfer.data is None else build_source(cfg.transfer.data, cfg.run.seed)
    results: list[Result] = []
    for seed in seeds:
        target = open_target(cfg, seed, opened)
        if further is not None and seed == seeds[0]:
            check_leaks(further, target)
        lab = Lab(cfg, target, further, seed, directory / f"seed_{seed}")
        _say(
            f"seed {seed}: {len(target.train)} labelled, {_count(target.val)} validation, {_count(target.test)} test, "
            f"{len(lab.transfer_set)} unlabelled images, {len(target.classes)} classes"
        )
        for name in methods:
            _say(f"seed {seed}: {known[name].title}")
            outcomes = known[name].run(lab)
            if known[name].adapts and not any(r.method == TEACHER and r.seed == seed for r in results):
                results.append(_result(lab, TEACHER, "the adapted teacher", outcomes[:1]))
            results.append(_result(lab, name, known[name].title, outcomes))
            tested = "" if results[-1].test is None else f", test {results[-1].test:.1%}"
            _say(f"seed {seed}: {known[name].title}: {results[-1].student}{tested}")
    if state.is_main_process:
        several = len(methods) * len(seeds) > 1
        _write(directory, "compare" if several else "results", cfg, results)
    return results


def choose_methods(cfg: TransferConfig, words: str) -> list[str]:
    """The methods that --compare names, each once: all, or some with commas between them.

    InputError for an unknown one, or where there is nothing to compare several on.
    """
    known = methods_of(cfg)
    names = list(dict.fromkeys(word.strip() for word in words.split(",")))
    names = list(known) if names == ["all"] else names
    for name in names:
        if name not in known:
            raise InputError(f"--compare {name}: no such method; there are {', '.join(known)}")
    if len(names) > 1 and cfg.target.test is None:
        raise InputError("--compare: methods are compared on the test set, and target.test is not given")
    return names


def _result(lab: Lab, method: str, title: str, outcomes: list[Outcome]) -> Result:
    """A method's last stage, and its score on the test set, which the same weights get once."""
    last = outcomes[-1]
    test = None if lab.target.test is None else _test_score(lab, method, last)
    flops = sum(outcome.flops for outcome in outcomes)
    steps = sum(outcome.steps for outcome in outcomes if outcome.folder.name != ADAPT)
    return Result(method, title, lab.seed, test, last.score, steps, flops, str(last.folder))


def _test_score(lab: Lab, method: str, last: Outcome) -> float:
    assert lab.target.test is not None
    identity = f"{last.files} on {fingerprint(lab.target.test)} at {lab.cfg.crop}"
    path = last.folder / "test.json"
    test = _scored(path, identity)
    if test is None:
        network = lab.cfg.teacher if method == TEACHER else lab.cfg.student
        model = load_task_model(last.folder, network.name, **network.arch).to(PartialState().device)
        size = network.image_size if isinstance(network.image_size, int) else lab.cfg.image_size
        test = task_score(lambda images: model(resize_images(images, size)), lab.target.test, lab.view)
        if PartialState().is_main_process:
            facts = {"identity": identity, "test": test}
            write_file(path, lambda pending: pending.write_text(json.dumps(facts)))
        PartialState().wait_for_everyone()
    return test


def _scored(path: Path, identity: str) -> float | None:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(facts, dict) and facts.get("identity") == identity
    return facts["test"] if same and isinstance(facts.get("test"), float) else None


def _write(directory: Path, name: str, cfg: TransferConfig, results: list[Result]) -> None:
    """The config, <name>.json and, as a person reads it, <name>.md; that on screen too."""
    write_file(directory / "config.yaml", lambda path: path.write_text(dump_config(cfg)))
    text = json.dumps([asdict(result) for result in results], indent=1)
    write_file(directory / f"{name}.json", lambda path: path.write_text(text))
    table = compare_table(cfg, results)
    write_file(directory / f"{name}.md", lambda path: path.write_text(table))
    print(table, flush=True)


def _count(source: Source | DenseSource | None) -> int:
    return 0 if source is None else len(source)


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)
