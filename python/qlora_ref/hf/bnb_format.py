"""bitsandbytes' 4-bit checkpoints, both directions, byte for byte.

One layer of theirs is `weight` (n/2, 1) uint8, or the same bytes seen as a float type, plus

    weight.absmax, weight.quant_map, [weight.nested_absmax, weight.nested_quant_map,]
    weight.quant_state.bitsandbytes__nf4

where the last is a small JSON as bytes. Bytes of codes and absmax mean the same as ours (high nibble first, flattened
blocks, two roundings for a nested absmax), so reading and writing move no number: only names and shapes change.
"""

# mypy: disable-error-code="override,assignment,union-attr,operator"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..nn import Linear4bit
from ..quantized import QuantConfig, QuantizedTensor
from ..reference.codebook import get_codebook
from ..reference.double_quant import get_map8
from .replace import is_convertible

logger = logging.getLogger(__name__)

OURS_OF = {"nf4": "nf4", "fp4": "fp4_bnb"}  # their name -> ours: their FP4 is not E2M1
THEIRS_OF = {ours: theirs for theirs, ours in OURS_OF.items()}
_STATE = "weight.quant_state.bitsandbytes__"
SERIALIZED = [  # "weight" last: loaders before 5.23 take the first that matches
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    f"{_STATE}nf4",
    f"{_STATE}fp4",
    "weight",
]


@dataclass(frozen=True)
class BnbState:
    """The JSON of one layer: how it was quantized, what shape and dtype it had, the mean of its absmax (or None)."""

    config: QuantConfig
    shape: torch.Size
    dtype: torch.dtype
    offset: float | None

    @classmethod
    def from_json(cls, text: str) -> "BnbState":
        """Raises ValueError for what we cannot represent."""
        fields = json.loads(text)
        theirs = fields["quant_type"]
        if theirs not in OURS_OF:
            raise ValueError(f"bitsandbytes quant_type '{theirs}' is none of {', '.join(OURS_OF)}")
        nested = "nested_blocksize" in fields
        config = QuantConfig(
            *(OURS_OF[theirs], fields["blocksize"], nested, "dynamic", fields.get("nested_blocksize", 256))
        )
        dtype = getattr(torch, fields["dtype"])
        return cls(config, torch.Size(fields["shape"]), dtype, fields.get("nested_offset"))

    def to_json(self) -> str:
        """The same text bitsandbytes writes, key order and separators included."""
        fields: dict[str, Any] = {
            "quant_type": THEIRS_OF[self.config.quant_type],
            "blocksize": self.config.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.config.double_quant:
            fields["nested_blocksize"] = self.config.nested_block_size
            fields["nested_dtype"] = "float32"
            fields["nested_offset"] = self.offset
        return json.dumps(fields)


def to_stats(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """{suffix: tensor} of one quantized weight as bitsandbytes stores it, "weight" included.

    Raises ValueError for a data type, map or block that its format has no word for.
    """
    config = q.config
    if config.quant_type not in THEIRS_OF:
        raise ValueError(f"bitsandbytes has no data type {config.quant_type}; it reads {', '.join(OURS_OF)}")
    if config.double_quant and (config.map8, config.nested_block_size) != ("dynamic", 256):
        raise ValueError(
            f"bitsandbytes decodes a nested absmax with the dynamic map in blocks of 256, not {config.map8} in blocks "
            f"of {config.nested_block_size}"
        )
    device = q.packed.device
    offset = float(q.absmax_mean) if q.absmax_mean is not None else None
    state = BnbState(config, q.shape, q.dtype, offset)
    stats = {
        "weight": q.packed.view(-1, 1),
        "weight.absmax": q.absmax,
        "weight.quant_map": get_codebook(config.quant_type, config.block_size).levels.clone().to(device),
    }
    if q.nested_absmax is not None:
        stats["weight.nested_absmax"] = q.nested_absmax
        stats["weight.nested_quant_map"] = get_map8("dynamic").levels.clone().to(device)
    stats[_STATE + THEIRS_OF[config.quant_type]] = torch.tensor(
        list(state.to_json().encode()), dtype=torch.uint8, device=device
    )
    return stats


def from_stats(stats: dict[str, torch.Tensor]) -> QuantizedTensor:
    """Inverse of `to_stats`. The tables in the file are compared with ours: another table would decode to other values.

    Raises ValueError, saying what disagrees.
    """
    states = [key for key in stats if key.startswith(_STATE)]
    if len(states) != 1:
        raise ValueError(f"expected one {_STATE}* tensor, found {len(states)}")
    state = BnbState.from_json(bytes(stats[states[0]].tolist()).decode())
    n = state.shape.numel()
    packed = stats["weight"].contiguous().reshape(-1).view(torch.uint8)
    absmax = stats["weight.absmax"]
    n_blocks = -(-n // state.config.block_size)
    if packed.numel() < (n + 1) // 2 or absmax.numel() != n_blocks:
        raise ValueError(f"{packed.numel()} bytes and {absmax.numel()} absmax cannot hold shape {list(state.shape)}")
    levels = get_codebook(state.config.quant_type, state.config.block_size).levels
    if not torch.equal(stats["weight.quant_map"].float().cpu(), levels):
        raise ValueError(f"its quant_map is not the table of {state.config.quant_type}")
    nested = mean = None
    if state.config.double_quant:
        if not torch.equal(stats["weight.nested_quant_map"].float().cpu(), get_map8("dynamic").levels):
            raise ValueError("its nested_quant_map is not the dynamic 8-bit map")
        nested = stats["weight.nested_absmax"].float()
        mean = torch.tensor([state.offset], dtype=torch.float32, device=packed.device)
    else:
        absmax = absmax.float()
    return QuantizedTensor(packed[: (n + 1) // 2], absmax, nested, mean, state.config, state.shape, state.dtype)


# --- reading a checkpoint --------------------------------------------------------------------------------------------


def read_states(files: list[str] | None) -> dict[str, BnbState]:
    """{layer name: state} of a checkpoint's files, reading only the small JSON tensors. ValueError if there is none."""
    from safetensors import safe_open

    states: dict[str, BnbState] = {}
    for file in files or []:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is a pickle, which we do not open; ask its owner for safetensors")
        with safe_open(file, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118  (not a dict)
                layer, found, _ = key.partition("." + _STATE)
                if found:
                    states[layer] = BnbState.from_json(bytes(f.get_tensor(key).tolist()).decode())
    if not states:
        where = Path(files[0]).parent if files else "the checkpoint"
        raise ValueError(f"{where} holds no 4-bit weights of bitsandbytes; load it with QLoraConfig() to quantize it")
    return states


def find_module(model: nn.Module, name: str) -> str:
    """The model's name of a layer of the checkpoint (which may carry, or lack, the base model's prefix)."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if is_convertible(module):
            return candidate
    raise ValueError(f"the checkpoint has a 4-bit layer {name}, and {type(model).__name__} has no such linear layer")


class ReadOp(ConversionOps):
    """The up to six tensors of one bitsandbytes layer -> the parameters of its `Linear4bit`."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer  # its presence tells transformers not to cast our input

    @torch.no_grad()
    def convert(self, input_dict, full_layer_name=None, model=None, **_) -> dict[str, torch.Tensor]:
        stats = {key: v[0] if isinstance(v, list) else v for key, v in input_dict.items()}
        if len(stats) == 1:  # an ordinary weight: only its name matched. Cast it, which the loader left to us
            return {key: v.to(model.get_parameter_or_buffer(full_layer_name).dtype) for key, v in stats.items()}
        module, _ = get_module_from_name(model, full_layer_name)
        try:
            q = from_stats(stats)
        except ValueError as error:
            raise ValueError(f"{full_layer_name}: {error}") from None
        if q.shape != (module.out_features, module.in_features):
            raise ValueError(f"{full_layer_name} has shape {list(q.shape)} in the file, not that of {module}")
        base = full_layer_name.rpartition(".")[0]
        return {f"{base}.{n}": p for n, p in Linear4bit.from_quantized(q).named_parameters()}


def from_bnb(path: str, model_class: Any = None, compute_dtype: torch.dtype | str | None = None, **kwargs: Any):
    """Load an unmodified bitsandbytes 4-bit checkpoint (directory or hub name) on our layers, bytes unchanged.

    model_class: an Auto class, default `AutoModelForCausalLM`; kwargs go to its `from_pretrained`. compute_dtype None
    follows the input. Raises ValueError if the checkpoint is not bitsandbytes 4-bit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    if not found or found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        method = found.get("quant_method") if found else "none"
        raise ValueError(f"{path} is no 4-bit bitsandbytes checkpoint (its config.json says quantization: {method})")
    if compute_dtype is not None:
        compute_dtype = str(compute_dtype).removeprefix("torch.")
    config.quantization_config = {
        "quant_method": "qlora_ref",
        "checkpoint_format": "bitsandbytes",
        "quant_type": OURS_OF[found.get("bnb_4bit_quant_type", "fp4")],
        "double_quant": bool(found.get("bnb_4bit_use_double_quant", False)),
        "skip_modules": found.get("llm_int8_skip_modules"),
        "compute_dtype": compute_dtype,
    }
    model = (model_class or AutoModelForCausalLM).from_pretrained(path, config=config, **kwargs)
    flipped = negative_absmax(model)
    if flipped:
        logger.warning(
            "%d blocks decode with a negative absmax (bitsandbytes' double quantization of small blocks): their signs "
            "are flipped, here as there. Quantize the original weights with QLoraConfig to mend it.",
            sum(flipped.values()),
        )
    return model


def negative_absmax(model: nn.Module) -> dict[str, int]:
    """{layer: number of blocks whose decoded absmax is negative}. Ours never are; bitsandbytes' can be."""
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.config.double_quant and module.weight.device.type != "meta":
            count = int((module.quantized.absmax_f32() < 0).sum())
            if count:
                counts[name] = count
    return counts


# --- writing one -----------------------------------------------------------------------------------------------------


def to_bnb_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """`model.state_dict()` with every `Linear4bit` in bitsandbytes' names. ValueError where its format has no word."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        for own_name, p in module.named_parameters(recurse=False):
            if p.dtype == torch.uint8:
                del state[f"{name}.{own_name}"]
        try:
            state.update({f"{name}.{key}": t for key, t in to_stats(module.quantized).items()})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return state


def to_bnb_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` that makes stock transformers build bitsandbytes layers exactly where we have ours."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    skip = [n for n, m in model.named_modules() if is_convertible(m)]
    hidden = [n for n in layers if not should_convert_module(n, skip)]
    if hidden:
        raise ValueError(
            f"the skip list {skip} also matches the 4-bit layer {hidden[0]}; bitsandbytes would not load it"
        )
    first = next(iter(layers.values()))
    compute_dtype = str(first.compute_dtype or first.weight_dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": THEIRS_OF[first.config.quant_type],
        "bnb_4bit_use_double_quant": first.config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
    }


def save_bnb(model: nn.Module, directory: str, **kwargs: Any) -> None:
    """`save_pretrained` in bitsandbytes' format: stock transformers + bitsandbytes, vLLM and others load it.

    Raises ValueError before anything is written if a layer's data type or map is not one of theirs.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(model, "quantization_method", None) != "qlora_ref":
        raise ValueError("save_bnb needs a model loaded with QLoraConfig or from_bnb")
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.config.quant_type not in THEIRS_OF:
            raise ValueError(f"{name} is {module.config.quant_type}; bitsandbytes reads {', '.join(OURS_OF)}")
    ours, theirs = model.config.quantization_config, to_bnb_config(model)
    to_bnb_state_dict(model)  # views and small tables: refuses the rest before the directory exists
    try:
        model.config.quantization_config, quantizer.save_format = theirs, "bitsandbytes"
        model.save_pretrained(directory, **kwargs)
    finally:
        model.config.quantization_config, quantizer.save_format = ours, "qlora_ref"


# --- unmodified code, our kernels ------------------------------------------------------------------------------------


def use_for_bitsandbytes(enable: bool = True) -> None:
    """From now on `from_pretrained` builds our layers where a checkpoint or a `BitsAndBytesConfig` asks for 4-bit
    bitsandbytes. Off until called; `enable=False` gives transformers' own quantizer back."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    from .bnb_quantizer import BnbOnQLora

    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = BnbOnQLora if enable else Bnb4BitHfQuantizer
