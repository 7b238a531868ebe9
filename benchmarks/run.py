"""What a model kept: the 19 tasks, or some, with one command.

python benchmarks/run.py --model runs/x/student.safetensors --teacher dinov2_vitb14 --data-root /data --out out
python benchmarks/run.py --list

A model is a zoo name, whose published weights are loaded, a checkpoint, or untrained:<either>, the same network with
random weights. Finished tasks are not run again; a task that fails does not stop the others. On several GPUs:
accelerate launch --multi_gpu --num_processes 8 benchmarks/run.py ...
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import sys
import time
import traceback
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if not __package__:  # run as a file: the folder above is what `benchmarks` is found in
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result import Model, NotRun, Result, Results, Role, read_result, write_json, write_text
from benchmarks.task import Task, all_tasks, choose_tasks, with_heads
from proteus import __version__
from proteus.errors import FAILURES, InputError, MissingDataError, RunError, UnreadableError, say

if TYPE_CHECKING:
    from accelerate import Accelerator

    from benchmarks.models import Measured
    from benchmarks.protocols import Setting


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a task failed, 2 bad input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        if args.list:
            print(_listing(args.data_root))
            return 0
        if args.model is None or args.out is None:
            raise InputError("--model and --out are needed: the model to measure, and the folder for what is found")
        tasks, by_name = choose_tasks(args.tasks)
        # Importing torch takes seconds: what is wrong with the command line is said before.
        from proteus.engine.peers import peers_needed

        with peers_needed():
            failed = _run(args, tasks, set(tasks) if args.strict else by_name)
    except FAILURES as error:
        return say(error, about=str(args.out))
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {args.out}, the same command goes on from there", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", help="the model to measure")
    add("--teacher", help="its teacher: the report says what share of its score was kept")
    add("--compare", nargs="+", default=[], metavar="MODEL", help="others to measure beside it; a name of\n"
        "published.yaml that is no model's adds its published figures")  # fmt: skip
    add("--tasks", nargs="+", default=["all"], help="all (the paper's 19), a group, ids, or YAML files of your own")
    add("--data-root", type=Path, help="the folder that holds the data sets")
    add("--out", type=Path, help="folder for results, report and cached features")
    add("--protocol", choices=["proteus", "dinov2"], default="proteus", help="whose protocol (default: proteus)")
    add("--normalize", choices=["own", "protocol"], default="own", help="input statistics: the model's own, or those\n"
        "that the published figures were made with (default: own)")  # fmt: skip
    add(
        "--download",
        action="store_true",
        help="fetch weights and data sets that are not there, where they can be fetched",
    )
    add("--strict", action="store_true", help="every task's data must be there")
    add("--batch-size", type=int, default=64, help="images a forward pass; changes no score (default: 64)")
    add("--workers", type=int, default=0, help="processes that load images, for each GPU (default: 0)")
    add("--list", action="store_true", help="list the tasks, and whether their data is below --data-root")
    return parser


def _run(args: argparse.Namespace, tasks: dict[str, Task], demanded: set[str]) -> bool:
    """Measure every model on every task and write the report; whether a task failed."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    from benchmarks.data import TaskData, without_data
    from benchmarks.models import check_model, open_model
    from benchmarks.protocols import Setting, check
    from benchmarks.published import Published
    from proteus.engine.lock import RunLock

    _check(args)
    specs = _specs(args)
    # Of a model that is not here there are still the figures that papers report.
    measured: dict[str, Role] = {}
    published = []
    for spec, role in specs.items():
        try:
            check_model(spec, args.download)
            measured[spec] = role
        except InputError:
            if role != "compared" or spec not in Published().models:
                raise
            published.append(spec)
    tasks = with_heads(tasks)
    data = TaskData(args.data_root, args.download)
    not_run, failed = without_data(tasks, data, demanded)
    without = {entry.task for entry in (*not_run, *failed)}
    models = [open_model(spec, role, args.out) for spec, role in measured.items()]

    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    _make_folder(args.out)
    lock = RunLock(args.out) if accelerator.is_main_process else None
    fingerprints = {task.id: data.fingerprint(task) for task in tasks.values() if task.id not in without}
    run = Run(tasks, fingerprints, [one.model for one in models], [], not_run, failed, published)
    settings: list[Setting] = []
    for one in models:
        one.folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(
            data,
            accelerator,
            args.protocol,
            args.normalize,
            args.out / "features",
            one.folder,
            one.model.weights,
            {},
            args.batch_size,
            args.workers,
        )
        for task in tasks.values():
            if task.id not in without:
                setting.stems[task.id] = f"{task.id}-{run.key(task, one.model, setting)[:8]}"
                check(task, one.encoder, setting)
        settings.append(setting)
    for one, setting in zip(models, settings, strict=True):
        for task in tasks.values():
            if task.id not in without:
                _measure(task, run, one, setting)
                if accelerator.is_main_process:
                    _write(args, run, accelerator)
        one.encoder.cpu()  # the device is the next one's
    if accelerator.is_main_process:
        for entry in run.not_run:
            print(f"not run: {entry.task}: {entry.why}")
        for entry in run.failed:
            model = f" ({entry.model})" if entry.model else ""
            print(f"failed: {entry.task}{model}: {entry.why}", file=sys.stderr)
        print((args.out / "report.md").read_text(encoding="utf-8"))
        print(f"{args.out / 'report.html'}")
    if lock is not None:
        lock.release()
    return bool(run.failed)


class Run(NamedTuple):
    """What a run knows so far.

    fingerprints: of the data of each task.
    not_run:      tasks whose data is not there; failed: tasks that went wrong.
    published:    models of which only published figures are shown.
    """

    tasks: dict[str, Task]
    fingerprints: dict[str, str]
    models: list[Model]
    results: list[Result]
    not_run: list[NotRun]
    failed: list[NotRun]
    published: list[str]

    def key(self, task: Task, model: Model, setting: "Setting") -> str:
        """What a result depends on, hashed; of a head that is tested, what that depends on too."""
        depends = [self.tasks[name] for name in (task.id, task.head) if name]
        described = {"title", "notes", "number", "group", "published"}
        facts = {
            "tasks": [one.model_dump(mode="json", exclude=described | {"data"}) for one in depends],
            "data": [self.fingerprints[one.id] for one in depends],
            "weights": model.weights,
            "protocol": None if task.kind == "knn" else setting.protocol,
            "normalize": setting.normalize,
            "device": setting.accelerator.device.type,
            "proteus": __version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _measure(task: Task, run: Run, measured: "Measured", setting: "Setting") -> None:
    """Add a task's result, of an earlier run where there is one, to the run; or why there is none."""
    from benchmarks.data import one_line
    from benchmarks.pictures import draw
    from benchmarks.protocols import evaluate, head_file

    accelerator, model, folder = setting.accelerator, measured.model, measured.folder
    stem, key = setting.stems[task.id], run.key(task, model, setting)
    path, log = folder / f"{stem}.json", folder / f"{stem}.error.txt"
    found = read_result(path)
    if found is not None and found.key == key and (task.kind != "linear" or head_file(setting, task.id).is_file()):
        _say(accelerator, f"{model.label}: {task.id}: {found.score:.4g} (finished before)")
        run.results.append(found.model_copy(update={"model": model.label}))
        return
    if task.head and not any((r.task, r.model) == (task.head, model.label) for r in run.results):
        run.failed.append(
            NotRun(task=task.id, model=model.label, why=f"{task.head}, whose head it tests, has no result")
        )
        return
    _say(accelerator, f"{model.label}: {task.id} ...")
    start = time.perf_counter()
    try:
        outcome = evaluate(task, measured.encoder, setting)
        if not math.isfinite(outcome.score):
            raise InputError("; ".join(["the score is not a number", *outcome.warnings]))  # and so say all processes
    except Exception as error:
        # What one process alone meets leaves the others waiting for it: only without others do the tasks go on.
        alone = isinstance(error, UnreadableError) or not isinstance(error, InputError)
        if accelerator.num_processes > 1 and alone:
            raise
        told = isinstance(error, InputError | RunError)
        why = (
            one_line(task, error)
            if told
            else f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (see {log})"
        )
        if accelerator.is_main_process:
            write_text(log, traceback.format_exc())
        _say(accelerator, f"{model.label}: {task.id} failed: {why}")
        run.failed.append(NotRun(task=task.id, model=model.label, why=why))
        return
    result = Result(
        key=key,
        task=task.id,
        model=model.label,
        score=outcome.score,
        protocol=outcome.protocol,
        normalize=setting.normalize,
        statistics=outcome.statistics,
        figures=outcome.figures,
        warnings=outcome.warnings,
        data=setting.data.where(task),
        seconds=time.perf_counter() - start,
    )
    if accelerator.is_main_process:
        result.pictures = draw(outcome.examples, task.title, folder / f"{stem}.png")
        write_json(path, result)
        log.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    run.results.append(result)
    _say(accelerator, f"{model.label}: {task.id}: {result.score:.4g} ({result.seconds:.0f} s)")


def _check(args: argparse.Namespace) -> None:
    """InputError for what the command line cannot mean."""
    if args.batch_size < 1 or args.workers < 0:
        raise InputError("--batch-size is at least 1 and --workers at least 0")
    if args.download and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--download is for one process: fetch the data first, with python benchmarks/run.py --download"
        )


def _specs(args: argparse.Namespace) -> dict[str, Role]:
    """The models by what the command line calls them, each once."""
    named: list[tuple[str, Role]] = [(args.model, "model"), *((spec, "compared") for spec in args.compare)]
    if args.teacher:
        named.insert(1, (args.teacher, "teacher"))
    specs = [spec for spec, _ in named]
    for spec in specs:
        if specs.count(spec) > 1:
            raise InputError(f"{spec} is named twice among --model, --teacher and --compare")
    return dict(named)


def _make_folder(out: Path) -> None:
    probe = out / f".writable-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None


def _write(args: argparse.Namespace, run: Run, accelerator: "Accelerator") -> None:
    """results.json and the report, as far as the run has come."""
    import torch

    from benchmarks.report import write_report

    cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    record = Results(
        proteus=__version__,
        command="python benchmarks/run.py " + shlex.join(sys.argv[1:]),
        created=datetime.now().strftime("%Y-%m-%d %H:%M"),
        device=f"{accelerator.num_processes} x {device}" if accelerator.num_processes > 1 else device,
        normalize=args.normalize,
        models=run.models,
        tasks=[task.facts() for task in run.tasks.values()],
        results=run.results,
        not_run=run.not_run + run.failed,
        published=run.published,
    )
    write_json(args.out / "results.json", record)
    write_report(record, args.out)


def _say(accelerator: "Accelerator", text: str) -> None:
    if accelerator.is_main_process:
        print(text, flush=True)


def _listing(root: Path | None) -> str:
    """The tasks as a table; with a folder, whether their data is below it."""
    from benchmarks.data import TaskData

    lines = [f"{'':>3} {'id':32}{'kind':14}{'metric':16}{'images':>20}  data"]
    data = TaskData(root)
    for task in all_tasks().values():
        counts = " / ".join("?" if n is None else f"{n:,}" for n in task.data.images.values())
        where = f"{task.data.source}" + (f", about {task.data.weighs}" if task.data.weighs else "")
        if root is not None and not task.smoke:
            try:
                list(data.parts(task))
                where = "there"
            except MissingDataError:
                where = f"not there: {where}"
            except InputError as error:
                where = f"wrong: {error}"
        lines.append(f"{task.number or '':>3} {task.id:32}{task.kind:14}{task.metric:16}{counts:>20}  {where}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
