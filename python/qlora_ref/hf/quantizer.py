"""The transformers plug-in: `from_pretrained(path, quantization_config=QLoraConfig())`.

transformers builds the model on the meta device, asks us to replace layers, and then feeds the checkpoint tensor by
tensor, each already on its device; `QuantizeOp` turns the ones of ours into packed bytes at once. A saved model is just
uint8 tensors with the names of the module's parameters, so loading it again needs nothing special.
"""

# mypy: disable-error-code="override,assignment,return-value"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..nn import Linear4bit
from ..quantized import QuantizedTensor
from . import bnb_format
from .checkpoint import check_against_files
from .config import QUANT_METHOD, QLoraConfig, dtype_from_name
from .replace import replace_linears, restore_linears, warn_fused_experts
from .versions import at_least

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


class QuantizeOp(ConversionOps):
    """One checkpoint weight (out, in) -> the uint8 parameters of its `Linear4bit`."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_) -> dict[str, torch.Tensor]:
        stored = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            if getattr(module, "from_conv1d", False):
                weight = weight.T.contiguous()
            try:
                stored_as = Linear4bit.from_quantized(QuantizedTensor.quantize(weight, module.config))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
            base = name.rpartition(".")[0]
            stored.update({f"{base}.{n}": p for n, p in stored_as.named_parameters()})
        return stored


def _is_bnb_read(conversion) -> bool:
    return any(isinstance(op, bnb_format.ReadOp) for op in getattr(conversion, "operations", ()))


@register_quantizer(QUANT_METHOD)
class QLoraQuantizer(HfQuantizer):
    """4-bit layers for transformers. One line of state: how the next `save_pretrained` names its tensors."""

    requires_calibration = False
    quantization_config: QLoraConfig
    save_format = "qlora_ref"

    # --- before loading ------------------------------------------------------------------------------------------

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and isinstance(device_map, str) and device_map in _AUTOMATIC:
            raise ValueError(
                f'device_map="{device_map}" splits one model over all devices, and {processes} processes would each do '
                'so; pass device_map={"": int(os.environ["LOCAL_RANK"])} (DDP) or none at all (FSDP2)'
            )

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs) -> None:
        config = self.quantization_config
        self._check_sharding(getattr(model.config, "distributed_config", None))
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
        if self._reads_bnb():
            names = self._replace_as_in_bnb_files(model, checkpoint_files, dtype)
        else:
            names = replace_linears(
                *(model, config.quant_config(), self._skipped(model), config.torch_compute_dtype(), dtype),
                keep_float=self._keeps_float(),
            )
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no linear layer to quantize outside skip_modules={config.skip_modules}"
            )
        warn_fused_experts(model)
        if self.pre_quantized and not self._reads_bnb():
            check_against_files(model, checkpoint_files, config.double_quant)

    def _check_sharding(self, distributed: Any) -> None:
        """Refuse what transformers' own sharding at load (`distributed_config=`) would get wrong."""
        if (getattr(distributed, "tp_size", None) or 1) > 1:
            raise ValueError(
                "tensor parallelism cuts weights along columns, through packed bytes and blocks; use "
                "DistributedConfig(fsdp_size=...) or one device per model"
            )
        sharded = (getattr(distributed, "fsdp_size", None) or 1) > 1
        if sharded and self._keeps_float():
            raise ValueError(
                "quantizing while sharding needs transformers >= 5.23: pip install -U 'transformers>=5.23', or "
                "quantize once in one process and load the saved model with distributed_config"
            )
        if sharded and not self.pre_quantized and self.quantization_config.double_quant:
            raise ValueError(
                "double quantization subtracts the mean of a whole tensor, and each rank would see only its rows; "
                "quantize once in one process (model.save_pretrained, then load that with distributed_config), or pass "
                "QLoraConfig(double_quant=False)"
            )

    def _keeps_float(self) -> bool:
        return not self.pre_quantized and not at_least(transformers.__version__, "5.23.0")

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes an element of the *placeholder* will need, for device_map="auto"; a uint8 one already has its size."""
        return 0.5 if self._keeps_float() else None

    def _skipped(self, model) -> list[str]:
        """Names to leave alone: the user's or transformers' default, plus what must stay float in any case."""
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(model, config.skip_modules, model._keep_in_fp32_modules)
        tied = getattr(model, "all_tied_weights_keys", {})
        return skip + [name.removesuffix(".weight") for pair in tied.items() for name in pair]

    def _reads_bnb(self) -> bool:
        return self.pre_quantized and self.quantization_config.checkpoint_format == "bitsandbytes"

    def _replace_as_in_bnb_files(self, model, files, dtype) -> list[str]:
        """The files themselves say which layers are 4-bit, and how: one small JSON each."""
        states = bnb_format.read_states(files)
        config_of = {bnb_format.find_module(model, name): state.config for name, state in states.items()}
        compute_dtype = self.quantization_config.torch_compute_dtype()
        first = next(iter(config_of.values()))
        return replace_linears(model, first, [], compute_dtype, dtype, only=config_of, config_of=config_of)

    # --- while loading -------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        if self.pre_quantized:
            return False
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOp()

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self._reads_bnb():
            return []
        return [WeightConverter(bnb_format.SERIALIZED, "weight", operations=[bnb_format.ReadOp(self)])]

    # --- after loading -------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._check_complete(model)
        read = [c for c in model._weight_conversions or [] if not _is_bnb_read(c)]
        model._weight_conversions = read  # saving reverses the rest; ours needs none, the names are already ours
        self.quantization_config.checkpoint_format = "qlora_ref"  # what the next save_pretrained writes
        model.is_loaded_in_4bit = True  # the flag PEFT, TRL and accelerate look at
        return model

    @staticmethod
    def _check_complete(model) -> None:
        """Raise if a 4-bit layer got no tensor: it would hold arbitrary bytes."""
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return  # dispatched: accelerate has exchanged the parameters, which loses the loader's marks
        missing = [
            f"{name}.{own_name}"
            for name, module in model.named_modules()
            if isinstance(module, Linear4bit)
            for own_name, p in module.named_parameters(recurse=False)
            if not getattr(p, "_is_hf_initialized", False)
        ]
        if missing:
            raise RuntimeError(
                f"the checkpoint holds no tensor for {len(missing)} parameters of 4-bit layers, first {missing[0]}; "
                "the files belong to another model, or name new layers in QLoraConfig(skip_modules=[...])"
            )

    def _dequantize(self, model, dtype=None):
        restore_linears(model, dtype_from_name(dtype, "dtype"))  # config.dtype may be a name
        model.is_loaded_in_4bit = False
        return model

    def get_state_dict_and_metadata(self, model):
        if self.save_format == "bitsandbytes":
            return bnb_format.to_bnb_state_dict(model), {}
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
