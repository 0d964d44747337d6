"""Adapter + base -> an ordinary 16-bit model that needs neither PEFT nor us."""

# mypy: disable-error-code="operator,arg-type"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn import Linear4bit
from .adapter_init import _base_name, _Folder
from .lora import Lora4bit
from .replace import _as_conv1d

logger = logging.getLogger(__name__)
BASES = ("dequantized", "original")


@torch.no_grad()
def merge(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    base: str = "dequantized",
    original: str | Path | Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Merge the active adapters of a PEFT model into a `dtype` model and return it; the PEFT model is used up.

    base="dequantized"   W' + delta: the weights the adapter was trained on. The default, and the faithful choice
    base="original"      W + delta from the folder or mapping `original`: undoes the quantization error, but the adapter
                         never saw those weights (unsloth-zoo#810 has a model that breaks)

    Raises ValueError before anything is changed if a weight of `original` is missing, or an adapter holds NaN.
    """
    if base not in BASES:
        raise ValueError(f"base={base!r} is none of {', '.join(BASES)}")
    if (base == "original") != (original is not None):
        raise ValueError('pass original=FOLDER together with base="original", and only then')
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Lora4bit)}
    if not layers:
        raise ValueError("the model has no adapter on a 4-bit layer; model.dequantize() gives the plain 16-bit model")
    source = _Folder(original) if isinstance(original, (str, Path)) else original
    for name, layer in layers.items():
        _check(name, layer, source)
    changed = 0
    for name, layer in layers.items():
        weight = layer.base_layer.dequantize(torch.float32)
        if source is not None:
            weight = source[f"{_base_name(name)}.weight"].float()
            weight = weight.T if getattr(layer.base_layer, "from_conv1d", False) else weight
        merged = layer.merged_weight(weight.to(layer.base_layer.weight.device)).to(dtype)
        changed += int(not torch.equal(merged, weight.to(merged)))
        model.set_submodule(name, _linear(layer.base_layer, merged))
    if not changed:
        logger.warning("the adapter changes no weight in %s: merged and base model are the same", dtype)
    return _unwrapped(model, dtype)


def _check(name: str, layer: Lora4bit, source: Mapping | None) -> None:
    if source is not None and f"{_base_name(name)}.weight" not in source:
        raise ValueError(f"the original model has no {_base_name(name)}.weight; pass the folder that was quantized")
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            for p in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
                if not torch.isfinite(p).all():
                    raise ValueError(f"adapter {adapter} of {name} holds NaN or Inf; nothing was merged")


def _linear(base: Linear4bit, weight: torch.Tensor) -> nn.Module:
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().to(weight.dtype), requires_grad=False)
    return _as_conv1d(linear) if getattr(base, "from_conv1d", False) else linear


def _unwrapped(peft_model: Any, dtype: torch.dtype) -> nn.Module:
    """PEFT's wrapper off; layers that carried no adapter dequantized; no trace of a quantizer left."""
    model = peft_model.base_model.unload() if hasattr(peft_model, "base_model") else peft_model
    model = model.dequantize(dtype)
    model.config.dtype = dtype
    model.requires_grad_(False)
    return model.to(dtype)
