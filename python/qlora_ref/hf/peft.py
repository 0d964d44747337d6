"""The PEFT side: configs that dispatch to `Lora4bit`, preparing a model, true counts, adapters that others can read."""

# mypy: disable-error-code="operator,union-attr"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

# ruff: noqa: E402  (a missing package is one sentence, raised before anything is imported from it)

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn import Linear4bit, count_parameters
from .versions import require

require("peft", "qlora_ref.hf.peft")

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from . import checkpointing
from .lora import Lora4bit

SIDE_FILE = "qlora_ref.json"  # beside adapter_config.json: which 4-bit base the adapter was trained on


def linear_suffixes(model: nn.Module) -> list[str]:
    """Last names of all 4-bit layers ("q_proj", ...): what readers of adapters expect instead of layer numbers."""
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Linear4bit)})


def lora_config(model: nn.Module, r: int = 64, lora_alpha: int = 16, **kwargs: Any) -> LoraConfig:
    """A `LoraConfig` for a 4-bit model, dispatching to our fused layer. Defaults are the paper's: r 64, alpha 16, no
    dropout, every linear layer. kwargs are LoraConfig's (use_rslora, use_dora, lora_dropout, target_modules, ...).

    Raises ValueError if the model has no 4-bit layer.
    """
    suffixes = linear_suffixes(model)
    if not suffixes:
        raise ValueError("the model has no 4-bit layer; load it with quantization_config=QLoraConfig()")
    if kwargs.get("target_modules", "all-linear") == "all-linear":
        kwargs["target_modules"] = suffixes
    if not getattr(model.config, "is_encoder_decoder", False):
        kwargs.setdefault("task_type", "CAUSAL_LM")
    else:
        kwargs.setdefault("task_type", "SEQ_2_SEQ_LM")
    return dispatching(LoraConfig(r=r, lora_alpha=lora_alpha, **kwargs))


def dispatching(config: LoraConfig) -> LoraConfig:
    """Make any LoraConfig build `Lora4bit` around 4-bit layers. (PEFT does not write this into adapter_config.json.)"""
    config._register_custom_module({Linear4bit: Lora4bit})
    return config


def prepare_model(
    model: nn.Module, gradient_checkpointing: bool = True, norms_fp32: bool = False, keep_products: bool = False
) -> nn.Module:
    """Freeze the base for training. Unlike PEFT's `prepare_model_for_kbit_training`, 16-bit embeddings and head stay
    16-bit (upcasting them costs 2 GiB on Llama-3.1-8B); `norms_fp32` upcasts one-dimensional weights only.
    `keep_products`: checkpointing keeps the outputs of 4-bit layers and of "sdpa" attention (checkpointing.py)."""
    model.requires_grad_(False)
    if norms_fp32:
        for name, p in model.named_parameters():
            if p.dim() == 1 and p.is_floating_point() and "norm" in name.lower():
                p.data = p.data.float()
    if gradient_checkpointing:
        model.config.use_cache = False
        checkpointing.enable(model, keep_products)
    return model


def attach(model: nn.Module, config: LoraConfig | None = None, **kwargs: Any) -> PeftModel:
    """`get_peft_model` with our layer; adapters in float32, whatever the compute dtype. kwargs as in `lora_config`."""
    config = lora_config(model, **kwargs) if config is None else dispatching(config)
    return get_peft_model(model, config)


def print_trainable_parameters(model: nn.Module) -> str:
    """The line PEFT prints, with packed weights counted as the weights they stand for."""
    total, trainable = count_parameters(model)
    line = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    print(line)
    return line


# --- adapter folders -------------------------------------------------------------------------------------------------


def base_fingerprint(model: nn.Module) -> str:
    """sha256 over names and statistics of all 4-bit layers: two bases with equal ones are the same base.

    Only the statistics are read (about 3 % of the bytes); codes cannot differ without an absmax differing, in practice.
    """
    digest = hashlib.sha256()
    for name, module in sorted(_layers(model), key=lambda item: item[0]):
        digest.update(f"{name} {module.out_features} {module.in_features} {module.config}".encode())
        for own_name, p in module.named_parameters(recurse=False):
            if own_name not in ("weight", "bias"):
                digest.update(p.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _layers(model: nn.Module):
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name.removeprefix("base_model.model.").removesuffix(".base_layer"), module


def save_adapter(model: PeftModel, directory: str, base: str | None = None) -> None:
    """`model.save_pretrained(directory)` plus the side file, then read back: count, non-empty, finite.

    base: the name of the *16-bit* model to write as base_model_name_or_path, which llama.cpp and vLLM look up.
    Raises ValueError if what was written is not what the model holds.
    """
    from safetensors.torch import load_file

    names = list(model.peft_config)
    if base is not None:
        for name in names:
            model.peft_config[name].base_model_name_or_path = base
    model.save_pretrained(directory)
    weights = load_file(Path(directory) / "adapter_model.safetensors")
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    empty = [n for n, t in weights.items() if t.numel() == 0 or not torch.isfinite(t).all()]
    if len(weights) < len(trainable) or empty:
        raise ValueError(
            f"{directory} holds {len(weights)} adapter tensors ({len(empty)} empty or not finite), the model trains "
            f"{len(trainable)}"
        )
    side = {"base_fingerprint": base_fingerprint(model), "format": 1}
    (Path(directory) / SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n")


def load_adapter(model: nn.Module, directory: str, is_trainable: bool = False, **kwargs: Any) -> PeftModel:
    """An adapter folder on a 4-bit model, through our layer. Stock adapters load as well.

    Raises ValueError, before the model is touched, if its shapes or its recorded base are not this model's.
    """
    config = PeftConfig.from_pretrained(directory)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{directory} is a {config.peft_type} adapter; on 4-bit layers only LoRA (with DoRA) is built")
    _check_shapes(model, Path(directory))
    side = Path(directory) / SIDE_FILE
    if side.exists() and json.loads(side.read_text())["base_fingerprint"] != base_fingerprint(model):
        raise ValueError(
            f"{directory} was trained on another base than this one ({SIDE_FILE} records its absmax); load the base it "
            f"names ({config.base_model_name_or_path}) with the same QLoraConfig and dtype, or delete {SIDE_FILE} to "
            "go on regardless"
        )
    return PeftModel.from_pretrained(model, directory, config=dispatching(config), is_trainable=is_trainable, **kwargs)


def _check_shapes(model: nn.Module, folder: Path) -> None:
    from .checkpoint import read_headers

    modules = dict(model.named_modules())
    for key, (_, shape) in read_headers([str(folder / "adapter_model.safetensors")]).items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            continue
        name, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        layer = modules.get(name)
        wanted = None
        if isinstance(layer, nn.Linear):
            wanted = layer.in_features if side == "lora_A" else layer.out_features
        if layer is None or (wanted is not None and shape[1 if side == "lora_A" else 0] != wanted):
            found = "no such layer" if layer is None else f"{tuple(layer.weight.shape)} stored, {wanted} needed"
            raise ValueError(
                f"{folder} is an adapter for another base: its {key} has shape {list(shape)}, the model has {found}; "
                "load the base that adapter_config.json names"
            )
