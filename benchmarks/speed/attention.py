"""Time of one attention, forward and backward: xformers against torch's scaled_dot_product_attention.

python -m benchmarks.speed.attention [--dtype bfloat16] [--batch 32] [--heads 16] [--repeats 50]

Both take q, k and v as timm's attention has them, views of one projection, and go through the same function as in a
network. The two alternate, so that a device that heats up or is shared slows both; the ratio is the median of the
ratios of neighbours. Times are the device's: a kernel that waits for Python to start it counts as slow.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proteus.errors import InputError
from proteus.models.attention import Attention, attend

SHAPES = [(64, 257), (64, 1370), (96, 257), (96, 1370)]  # head size, tokens: 16 x 16 and 37 x 37 patches and a class
WARM_UP = 10


class Summary(NamedTuple):
    """Median milliseconds of both, and the median of xformers' time over sdpa's."""

    sdpa: float
    xformers: float
    ratio: float


def step(choice: Attention, qkv: Tensor, grad: Tensor) -> Tensor:
    """The gradient of qkv [B, N, 3, H, K] given that of the attention's output [B, N, H, K]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [B, H, N, K]
    return torch.autograd.grad(attend(choice, q, k, v).transpose(1, 2), qkv, grad)[0]


def milliseconds(choice: Attention, qkv: Tensor, grad: Tensor) -> float:
    """Time of one step between two events on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(choice, qkv, grad)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def summary(sdpa: Sequence[float], xformers: Sequence[float]) -> Summary:
    """What the times of a shape come to, given pair by pair."""
    ratios = [x / s for s, x in zip(sdpa, xformers, strict=True)]
    return Summary(statistics.median(sdpa), statistics.median(xformers), statistics.median(ratios))


def measure(head_size: int, tokens: int, batch: int, heads: int, dtype: torch.dtype, repeats: int) -> Summary:
    """`summary` for one shape."""
    qkv = torch.randn(batch, tokens, 3, heads, head_size, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, tokens, heads, head_size, device="cuda", dtype=dtype)
    times: dict[Attention, list[float]] = {"sdpa": [], "xformers": []}
    for repeat in range(WARM_UP + repeats):
        for choice in times if repeat % 2 else reversed(times):
            time = milliseconds(choice, qkv, grad)
            if repeat >= WARM_UP:
                times[choice].append(time)
    return summary(times["sdpa"], times["xformers"])


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", default=32, type=int)
    parser.add_argument("--heads", default=16, type=int)
    parser.add_argument("--repeats", default=50, type=int)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: attention is timed on a CUDA device, and there is none here", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}, batch {args.batch}, ", end="")
    print(f"{args.heads} heads, medians of {args.repeats} pairs of forward and backward\n")
    print("| head size | tokens | sdpa, ms | xformers, ms | xformers / sdpa |\n| ---: | ---: | ---: | ---: | ---: |")
    try:
        for head_size, tokens in SHAPES:
            row = measure(head_size, tokens, args.batch, args.heads, getattr(torch, args.dtype), args.repeats)
            print(f"| {head_size} | {tokens} | {row.sdpa:.3f} | {row.xformers:.3f} | {row.ratio:.2f} |", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
