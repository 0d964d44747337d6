"""PEFT's LoRA on our 4-bit layers: one fused call instead of four, DoRA that dequantizes, merging that is refused."""

# mypy: disable-error-code="operator,arg-type,assignment,override"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..nn import Linear4bit
from ..quantized import QuantizedTensor

REFUSAL = (
    "merging an adapter into 4-bit weights loses it: every weight sits on one of 16 levels and a small delta rounds "
    "away (with |delta|/|W| = 1 % only 1.6 % of it survives NF4). Use qlora_ref.hf.merge(model), which gives a 16-bit "
    "model, or allow_merge_into_4bit(model) to have it all the same"
)


class Dequantized(SimpleNamespace):
    """How PEFT's DoRA sees a base layer: `W_q` makes it call `dequantize()` (its hook for packed weights)."""

    def __init__(self, layer: Linear4bit):
        super().__init__(W_q=True, bias=layer.bias, parameters=layer.parameters, dequantize=layer.dequantize)


class DoraLayer4bit(DoraLinearLayer):
    """`DoraLinearLayer` over W' (Liu et al. 2024, arXiv 2402.09353, section 4.3: the norm is a constant)."""

    def update_layer(self, *, base_layer, **kwargs) -> None:
        super().update_layer(base_layer=Dequantized(base_layer), **kwargs)

    def forward(self, x, *, base_layer, **kwargs):
        return super().forward(x, base_layer=Dequantized(base_layer), **kwargs)


class DoraVariant4bit(DoraLinearVariant):
    @staticmethod
    def init(module: "Lora4bit", adapter_name: str, **kwargs: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLayer4bit(fan_in_fan_out=False)
        layer.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = layer


class Lora4bit(PeftLinear):
    """What `lora_config` makes PEFT build around a `Linear4bit`. Names of parameters and files are PEFT's own."""

    allow_merge = False

    def __init__(self, base_layer, adapter_name: str, *, config, **kwargs):
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
            raise ValueError(
                f'init_lora_weights="{config.init_lora_weights}" needs the original weights, which a 4-bit model '
                "does not have; build the adapter with the default and call "
                "qlora_ref.hf.init_adapter(model, method, original)"
            )
        config.fan_in_fan_out = False  # GPT-2's Conv1D became an (out, in) layer when it was quantized
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._unmerged: tuple[QuantizedTensor, torch.Tensor | None] | None = None

    @property
    def lora_variants(self):
        return {**super().lora_variants, ("use_dora",): DoraVariant4bit}

    def _fusable(self, kwargs: dict[str, Any]) -> str | None:
        """The one plain active adapter whose branch the fused op can compute, or None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or any(v is not None for v in kwargs.values()):
            return None
        name = active[0]
        dropout = self.lora_dropout[name]
        dropping = self.training and not isinstance(dropout, nn.Identity)
        plain = name not in self.lora_variant and not self.lora_bias[name] and not dropping
        return name if plain and isinstance(self.base_layer, Linear4bit) else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = None if args else self._fusable(kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)
        lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
        return self.base_layer.with_adapter(x, lora_A, lora_B, float(self.scaling[name])).to(x.dtype)

    def merged_weight(self, weight: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
        """`weight` (out, in) plus the adapters, summed in float32. DoRA norms are those of the dequantized base."""
        total = weight.float()
        for name in names if names is not None else self.active_adapters:
            if name not in self.lora_A:
                continue
            delta = self.scaling[name] * (self.lora_B[name].weight.float() @ self.lora_A[name].weight.float())
            if name in self.lora_magnitude_vector:
                norm = torch.linalg.norm(self.base_layer.dequantize(torch.float32) + delta, dim=1)
                factor = (self.lora_magnitude_vector[name].weight.float() / norm)[:, None]
                total = factor * (total + delta)
            elif name in self.lora_variant:
                raise ValueError(
                    f"cannot merge the {type(self.lora_variant[name]).__name__} of PEFT; use plain LoRA or DoRA"
                )
            else:
                total = total + delta
        return total

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused unless `allow_merge_into_4bit`. Then: dequantize, add, quantize; `unmerge` restores the bytes."""
        if not self.allow_merge:
            raise ValueError(REFUSAL)
        names = check_adapters_to_merge(self, adapter_names)
        names = [n for n in names if n in self.lora_A]
        if not names:
            return
        base = self.base_layer
        with torch.no_grad():
            weight = self.merged_weight(base.dequantize(torch.float32), names).to(base.weight_dtype)
            if not torch.isfinite(weight).all():
                raise ValueError(f"adapter {names} holds NaN or Inf; nothing was merged")
            if self._unmerged is None:
                self._unmerged = base.quantized
            base._store(QuantizedTensor.quantize(weight, base.config))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """The bytes from before the first merge."""
        if self._unmerged is not None:
            self.base_layer._store(self._unmerged)
            self._unmerged = None
        self.merged_adapters.clear()


def allow_merge_into_4bit(model: nn.Module, allow: bool = True) -> None:
    """Let PEFT's `merge_adapter` and `merge_and_unload` quantize the merged weight again, most of the adapter lost."""
    for module in model.modules():
        if isinstance(module, Lora4bit):
            module.allow_merge = allow
