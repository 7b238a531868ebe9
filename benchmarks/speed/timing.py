"""What every measurement here needs: variants in turn, medians and ratios, the machine, its peak, a table and JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the device's name; the first that fits counts.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}

Times = dict[str, list[float]]


class Summary(NamedTuple):
    """Median seconds of a call, and the median over the rounds of the baseline's time over this one's."""

    seconds: float
    speedup: float


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one of so many calls in a row, the device's work included."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - start) / calls


def in_turn(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1, calls: int = 1
) -> Times:
    """Seconds a call of each variant in each round, one after the other, every second round in reversed order.

    So a machine that heats up or is shared slows all of them alike. Each turn begins with a call that is not timed: it
    finds caches and heap as another variant has left them. warm_up: calls of each before all turns.
    """
    for call in variants.values():
        for _ in range(warm_up):
            call()
    times: Times = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            variants[name]()
            times[name].append(timed(variants[name], device, calls))
    return times


def summarise(times: Times, baseline: str) -> dict[str, Summary]:
    """What the times come to, each round compared with the baseline's of the same round."""
    return {
        name: Summary(
            statistics.median(own), statistics.median(b / t for b, t in zip(times[baseline], own, strict=True))
        )
        for name, own in times.items()
    }


def peak_flops(device: torch.device, side: int | None = None) -> tuple[float, str]:
    """FLOP/s in bfloat16 that the device can reach, and where that is from: the data sheet, else one large product.

    side: of the square matrices that are multiplied; None: 8,192 on a GPU, 4,096 on a CPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak * 1e12, f"data sheet of {part}"
    side = side or (8192 if device.type == "cuda" else 4096)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    best = min(in_turn({"product": lambda: a @ b}, 5, device)["product"])
    return 2 * side**3 / best, f"a measured product of {side} x {side} matrices"


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in ("torchvision", "timm", "accelerate")},
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The machine in a line."""
    return f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left, all others to the right."""
    rule = [":---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def write_json(path: str | None, found: Mapping[str, Any]) -> None:
    """Write what was measured, where a path was given."""
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


def _cpu() -> str:
    """The processor's name, and what it has for bfloat16."""
    lines: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        lines[key.strip()] = value.strip()
    name = lines.get("model name") or platform.processor() or platform.machine()
    kinds = [kind for kind in ("avx512_bf16", "amx_bf16") if kind in lines.get("flags", "").split()]
    return f"{name} ({', '.join(kinds)})" if kinds else name
