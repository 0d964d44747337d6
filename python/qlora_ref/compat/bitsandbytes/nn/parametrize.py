"""A 4-bit parameter of any shape behind torch's parametrization: reading it dequantizes. Meant for fused experts."""

# mypy: disable-error-code="index"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

from functools import partial
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import nn

from .. import functional as F


class Bnb4bitParametrization(nn.Module):
    """Packed codes -> the tensor of `quant_state`."""

    def __init__(self, quant_state: F.QuantState):
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        return F.dequantize_4bit(quantized_param, self.quant_state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    found = getattr(module, name)
    if not isinstance(found, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return found


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """The parameter already holds packed codes; `qs_dict` are the entries of its state."""
    _parameter(module, param_name)
    _attach(module, param_name, F.QuantState.from_dict(qs_dict, device=device))


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter in place. AttributeError, TypeError if there is no such Parameter."""
    packed, state = F.quantize_4bit(
        _parameter(module, param_name).data,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _attach(module, param_name, state)


def _attach(module: nn.Module, name: str, state: F.QuantState) -> None:
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    module.register_state_dict_post_hook(partial(_clean_names, param_name=name))
    # one decoding per forward; always_call, because checkpointing ends its recomputation with an exception
    module.register_forward_pre_hook(_enable_cache)
    module.register_forward_hook(_disable_cache, always_call=True)


def _enable_cache(module: nn.Module, inputs: Any) -> None:
    P._cache_enabled += 1


def _disable_cache(module: nn.Module, inputs: Any, output: Any) -> None:
    P._cache_enabled = max(0, P._cache_enabled - 1)
    if not P._cache_enabled:
        P._cache = {}


def _clean_names(module: nn.Module, state_dict, prefix: str, local_metadata, *, param_name: str) -> None:
    """`name` and `name.absmax` ... instead of torch's `parametrizations.name.original`."""
    original = f"{prefix}parametrizations.{param_name}.original"
    if original not in state_dict:
        return
    state_dict[f"{prefix}{param_name}"] = state_dict.pop(original)
    for parametrization in module.parametrizations[param_name]:
        for key, value in parametrization.quant_state.as_dict(packed=True).items():
            state_dict[f"{prefix}{param_name}.{key}"] = value
