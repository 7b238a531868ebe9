"""How much of an encoder learns: all of it, none of it, or adapters of low rank beside its linear layers."""

import copy
from typing import Any, Literal

import torch
from torch import nn

from proteus.errors import InputError
from proteus.models import Encoder

Tune = Literal["all", "head", "lora"]


def tune(encoder: Encoder, how: Tune, rank: int) -> None:
    """Choose what of an encoder learns, before an optimiser is built.

    all:  every weight.
    head: none: the encoder is frozen, its batch statistics included, and no graph is built through it.
    lora: matrices A [rank, in] and B [out, rank] beside each linear layer W that the network calls: W x + 2 B A x
          (LoRA, arXiv 2106.09685, with alpha = 2 rank). B starts at 0, so the encoder starts as it was. All else,
          `mask_token` too, is frozen, and the network stays in evaluation mode, which batch statistics and dropout
          go by: what the adapters stand beside stays what it was. InputError where there is no linear layer, or where
          peft is not installed.
    """
    if how == "head":
        encoder.freeze()
    elif how == "lora":
        _add_adapters(encoder, rank)


def merged(encoder: Encoder) -> Encoder:
    """A copy with adapters added into their layers, whose state dict has the keys of an untouched encoder's.

    The encoder itself where it has no adapters.
    """
    if not _adapters(encoder):
        return encoder
    plain = copy.deepcopy(encoder)
    for name, layer in _adapters(plain).items():
        layer.merge()  # W + 2 B A, in float32 where the layer is
        plain.network.set_submodule(name, layer.get_base_layer())
    return plain


def _adapters(encoder: Encoder) -> dict[str, Any]:
    """peft's layers of the network, by their names."""
    return {name: module for name, module in encoder.network.named_modules() if hasattr(module, "lora_A")}


def _add_adapters(encoder: Encoder, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("tune=lora needs peft, which is not installed: pip install 'proteus-distill[lora]'") from None
    for module in encoder.network.modules():
        if hasattr(module, "qkv_bias_separate"):  # else timm takes the layer's weight and does not call the layer
            module.qkv_bias_separate = True
    names = _called_linear_layers(encoder)
    if not names:
        raise InputError(f"tune=lora: {encoder.name} has no linear layers to put adapters beside: use all or head")
    encoder.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    inject_adapter_in_model(config, encoder.network)
    adapters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    encoder.freeze()
    for parameter in adapters:
        parameter.requires_grad_(True)


@torch.no_grad()
def _called_linear_layers(encoder: Encoder) -> list[str]:
    """Names of the linear layers that an image passes through: an adapter beside another one would learn nothing."""
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in encoder.network.named_modules()
        if type(module) is nn.Linear
    ]
    height, width = (encoder.image_size,) * 2 if isinstance(encoder.image_size, int) else encoder.image_size
    training = encoder.training
    encoder.eval()(torch.zeros(1, 3, height, width, device=encoder.mask_token.device))
    encoder.train(training)
    for hook in hooks:
        hook.remove()
    return sorted(set(called))
