"""What training costs, in floating-point operations."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from proteus.data.loader import Batch
from proteus.engine.shard import is_sharded
from proteus.errors import InputError
from proteus.models.attention import ChosenAttention, ChosenAttentionRope, ChosenEvaAttention
from proteus.training.cache import CachedTeacher
from proteus.training.task import Distillation
from proteus.training.teacher import Answer, Teacher


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention of `run()`, forward and backward; 2 to a multiply-add.

    A backward costs as much as the forward for each factor that takes a gradient: what kernels of attention compute
    again is not counted, so the figure is the same on every device. What is computed element by element is left out,
    as are kernels that are not torch's own (xformers').
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


class Flops(NamedTuple):
    """FLOPs of a step: the teachers' forward; forward and backward of all that learns."""

    teachers: int
    students: int


def training_flops(tasks: Sequence[Distillation], teachers: Sequence[Teacher | CachedTeacher], batch: Batch) -> Flops:
    """FLOPs of a step on one process's batch.

    The step is made on copies of the tasks, with torch's attention and uncompiled: weights, gradients, statistics and
    the random state stay as they were. Of several processes all have to call it, as losses and statistics may gather.

    batch: on the device of the tasks.

    InputError where a task is sharded.
    """
    if any(map(is_sharded, tasks)):
        raise InputError(
            "--plan and tools/transfer.py count FLOPs on copies of the students, which are sharded by FSDP here: "
            "run them plain or data-parallel (DDP)"
        )
    trials = [copy.deepcopy(task).train() for task in tasks]
    answers: list[Answer] = []

    def teach() -> None:
        answers.extend(teacher.answer(batch) for teacher in teachers)

    def learn() -> None:
        for trial in trials:
            sum(trial(batch.images, batch.mask, answers, batch.labels).values()).backward()

    devices = [batch.images.device] if batch.images.is_cuda else []
    modules = [*trials, *(teacher.encoder for teacher in teachers if isinstance(teacher, Teacher))]
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), _torch_attention(modules):
        return Flops(count_flops(teach), count_flops(learn))


@contextmanager
def _torch_attention(modules: list[nn.Module]) -> Iterator[None]:
    """Attention by torch's kernels, which are counted, whatever `use_attention` chose."""
    kinds = ChosenAttention, ChosenAttentionRope, ChosenEvaAttention
    chosen = [(module, module.attention) for root in modules for module in root.modules() if isinstance(module, kinds)]
    try:
        for module, _ in chosen:
            module.attention = "sdpa"
        yield
    finally:
        for module, choice in chosen:
            module.attention = choice


# Instead of torch's own formulas, which add the scores that a fused backward computes again, and which take a grouped
# convolution's weight gradient for that of a full one (for a depthwise one of C channels C times too much).


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Query [B, H, N, K], key [B, G, M, K], value [B, G, M, V]: its scores, and their product with the values."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


def _attention_backward(_grad: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__) -> int:
    return 2 * _attention(query, key, value)


def _convolution_backward(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias,
    _stride,
    _padding,
    _dilation,
    transposed,
    *rest,
    **__,
) -> int:
    """One forward for the gradient of the input, if it is wanted, and one for that of the weight."""
    _output_padding, _groups, wanted = rest
    places = prod((x if transposed else grad)[2:])
    return 2 * x[0] * places * prod(weight) * sum(wanted[:2])


_aten = torch.ops.aten
_FORMULAS = {
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_cudnn_attention: _attention,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}
