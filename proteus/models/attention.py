"""Which kernel computes the attention of a timm network: xformers' or torch's.

timm's attention modules keep their own `forward`, and with it gates, norms of q and k, rotary positions and biases. A
choice exchanges one call in it, that of `scaled_dot_product_attention`.
"""

import functools
import logging
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import attention as layers
from timm.models import eva
from torch import Tensor, nn

from proteus.errors import InputError, nearest

Attention = Literal["auto", "xformers", "sdpa"]

_DEVICE = "cuda"  # the only kind of device xformers has kernels for


def use_attention(network: nn.Module, choice: Attention) -> None:
    """Let every attention of timm's `Attention`, `AttentionRope` and `EvaAttention` in the network use a kernel.

    auto:     xformers where it is installed and works for the tensors at hand, found by trying it once; else sdpa.
    xformers: `xformers.ops.memory_efficient_attention`; InputError at the call where it cannot serve.
    sdpa:     torch's `scaled_dot_product_attention`. The modules are timm's own again, as export and scripting need.

    Where xformers would change the result (a mask, active attention dropout) or be in the way (under torch.compile, in
    a trace) sdpa computes under every choice, and `auto` keeps it when deterministic algorithms are asked for. The
    choice can be made before or after weights are loaded and made again at any time. Parameters and their names stay;
    other attention modules, subclasses of these three included, are left alone.
    """
    check_attention(choice, _DEVICE)
    for module in network.modules():
        if stock := _STOCK.get(type(module)):
            module.__class__ = stock if choice == "sdpa" else _CHOSEN[stock]
            module.attention = choice  # type: ignore[assignment]
            module.fused_attn = True  # type: ignore[assignment]  # else timm multiplies the matrices itself


def check_attention(choice: Attention, device_type: str) -> None:
    """InputError if the choice does not exist or cannot serve on such a device ("cuda", "cpu"); imports nothing."""
    if choice not in get_args(Attention):
        raise InputError(f"attention={choice} does not exist{nearest(choice, get_args(Attention))}")
    if choice == "xformers" and device_type != _DEVICE:
        raise InputError(f"attention=xformers needs a CUDA device, not {device_type}: use auto or sdpa")


def attend(choice: Attention, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
    """Softmax attention of q, k and v [B, H, N, K] by the chosen kernel: [B, H, N, K].

    Takes what `scaled_dot_product_attention` takes, which computes whatever is not plain attention.
    """
    check_attention(choice, q.device.type)
    plain = attn_mask is None and not any(options.values()) and all(type(x) is Tensor for x in (q, k, v))
    unwanted = choice == "auto" and torch.are_deterministic_algorithms_enabled()  # not all its kernels are
    if plain and not unwanted and choice != "sdpa" and q.device.type == _DEVICE:
        dtype = _common_dtype(v)
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        refusal = _refusal(q.device, dtype, q.shape[-1], needs_grad)
        if refusal is None:
            q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, N, H, K], as xformers has it
            return _kernel()(q, k, v).transpose(1, 2)
        if choice == "xformers":
            kind = f"{str(dtype).removeprefix('torch.')} with head size {q.shape[-1]} on {q.device}"
            raise InputError(f"attention=xformers does not work for {kind}: use auto or sdpa ({refusal})")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def _common_dtype(v: Tensor) -> torch.dtype:
    """What q, k and v are computed in. Norms leave q and k in float32 under autocast, which xformers does not know."""
    if torch.is_autocast_enabled(v.device.type) and v.dtype != torch.float64:
        return torch.get_autocast_dtype(v.device.type)
    return v.dtype


@functools.cache
def _kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """xformers' attention [B, N, H, K]. Importing it may warn of extensions that attention does not need."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from xformers.ops import memory_efficient_attention
    finally:
        logger.setLevel(level)
    return memory_efficient_attention


@functools.cache
def _refusal(device: torch.device, dtype: torch.dtype, head_size: int, needs_grad: bool) -> str | None:
    """Why xformers cannot attend to such tensors, found by trying; None where it can."""
    options: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": needs_grad}
    # Within a checkpointed block the trial's tensors are not that block's: hooks of our own keep them apart.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        try:
            out = _kernel()(*(torch.zeros(1, 8, 1, head_size, **options) for _ in range(3)))
            if needs_grad:
                out.sum().backward()
            out.sum().item()  # waits for the device, where a kernel may fail late
        except Exception as error:
            return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
    return None


class _Functional:
    """torch.nn.functional with another attention."""

    def __init__(self, choice: Attention):
        self.scaled_dot_product_attention = functools.partial(attend, choice)

    def __getattr__(self, name: str):
        return getattr(F, name)


def _through_attend(stock: FunctionType) -> Callable:
    """A `forward` of timm's that finds `attend` where it looks for `F.scaled_dot_product_attention`."""
    chosen = {}
    for choice in get_args(Attention):
        names = {**stock.__globals__, "F": _Functional(choice)}
        chosen[choice] = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        plain_torch = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return (stock if plain_torch else chosen[self.attention])(self, *args, **kwargs)

    return forward


class ChosenAttention(layers.Attention):
    """timm's Attention with the kernel of `use_attention`."""

    forward = _through_attend(layers.Attention.forward)


class ChosenAttentionRope(layers.AttentionRope):
    """timm's AttentionRope with the kernel of `use_attention`."""

    forward = _through_attend(layers.AttentionRope.forward)


class ChosenEvaAttention(eva.EvaAttention):
    """timm's EvaAttention with the kernel of `use_attention`."""

    forward = _through_attend(eva.EvaAttention.forward)


_CHOSEN = {kind.__base__: kind for kind in (ChosenAttention, ChosenAttentionRope, ChosenEvaAttention)}
_STOCK = {kind: stock for stock, chosen in _CHOSEN.items() for kind in (stock, chosen)}
