"""Rebuild a model's skeleton (on the meta device) with 4-bit layers, and back."""

# mypy: disable-error-code="operator,arg-type,assignment,index,return-value"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..nn import Linear4bit
from ..quantized import QuantConfig

logger = logging.getLogger(__name__)


def is_convertible(module: nn.Module) -> bool:
    """Plain `nn.Linear` (subclasses have a forward of their own) or GPT-2's `Conv1D`."""
    return type(module) is nn.Linear or type(module) is Conv1D


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in). Conv1D keeps its weight as (in, out)."""
    out_in = module.weight.shape
    return (out_in[1], out_in[0]) if type(module) is Conv1D else (out_in[0], out_in[1])


def replace_linears(
    model: nn.Module,
    config: QuantConfig,
    skip: list[str],
    compute_dtype: torch.dtype | None,
    dtype: torch.dtype,
    only: Iterable[str] | None = None,
    config_of: dict[str, QuantConfig] | None = None,
    keep_float: bool = False,
) -> list[str]:
    """Put an empty `Linear4bit` (meta) where a linear layer is; returns the names.

    A layer made from Conv1D gets `.from_conv1d = True`: its checkpoint weight is to be transposed.
    `only`: exactly these names instead of everything outside `skip`; `config_of`: per-layer deviations. `keep_float`:
    leave the float weight in place until it is quantized (older loaders cast what they read to the dtype found there).
    """
    wanted = None if only is None else set(only)
    names = [
        n
        for n, m in model.named_modules()
        if is_convertible(m) and (should_convert_module(n, skip) if wanted is None else n in wanted)
    ]
    for name in names:
        old = model.get_submodule(name)
        out_features, in_features = shape_of(old)
        layer_config = (config_of or {}).get(name, config)
        new = Linear4bit(in_features, out_features, old.bias is not None, layer_config, compute_dtype, "meta", dtype)
        new.from_conv1d = type(old) is Conv1D
        new._is_hf_initialized = True  # transformers must never "initialize" packed bytes
        if keep_float:
            new.weight = nn.Parameter(old.weight.to(dtype), requires_grad=False)
        new.requires_grad_(False)
        model.set_submodule(name, new)
    return names


def restore_linears(model: nn.Module, dtype: torch.dtype | None) -> list[str]:
    """Replace every `Linear4bit` by the layer it came from, holding the dequantized weight. Returns the names."""
    names = [n for n, m in model.named_modules() if isinstance(m, Linear4bit)]
    for name in names:
        old = model.get_submodule(name)
        new = old.to_linear(dtype)
        if getattr(old, "from_conv1d", False):
            new = _as_conv1d(new)
        model.set_submodule(name, new)
    return names


def _as_conv1d(linear: nn.Linear) -> Conv1D:
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
    conv.bias = linear.bias
    return conv


def fused_experts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(name, bytes) of weights of three and more dimensions: experts that transformers keeps in one Parameter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for own_name, p in module.named_parameters(recurse=False):
            if p.dim() >= 3 and p.is_floating_point():
                yield f"{name}.{own_name}", p.nbytes


def warn_fused_experts(model: nn.Module) -> None:
    found = dict(fused_experts(model))
    if found:
        total = sum(found.values())
        logger.warning(
            "%d expert weights are 3-D parameters, not linear layers, and stay in 16 bits: %s bytes (%.2f GiB), the "
            "largest %s. Plan their memory; an adapter on them needs PEFT's target_parameters.",
            *(len(found), f"{total:,}", total / 2**30, max(found, key=found.get)),
        )
