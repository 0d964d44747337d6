"""A folder becomes a model ready to train: 16-bit weights, quantized to 4 bits, with an adapter on every linear layer.

Only local folders with safetensors are read, and no code from a model folder is ever run.
"""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpointing import keep_products
from ..cli import UserError
from ..nn import Linear4bit, LoRALinear, attach_lora, quantize_model
from ..quantized import QuantConfig
from .config import TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """auto: the first GPU, else the CPU. UserError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here (qlora-ref doctor says why); use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s).")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on GPUs that compute in it (compute capability 8.0 up), fp16 on older ones, fp32 on the CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def require_transformers() -> None:
    """UserError where the extra `hf` is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("fine-tuning needs transformers; install it with: pip install 'qlora_ref[hf]'.")


def read_model_config(path: str) -> dict[str, Any]:
    """The parsed config.json of a model folder. UserError if there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"there is no model folder {path}; models are local folders: download one with "
            "`hf download ORG/NAME --local-dir DIR` and pass DIR."
        )
    config_file = folder / "config.json"
    if (folder / "adapter_config.json").exists() and not config_file.exists():
        raise UserError(f"{path} holds an adapter, not a model; pass the folder of its base model.")
    if not config_file.exists():
        raise UserError(f"{path} has no config.json, so it is not a Hugging Face model folder.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config_file} cannot be read: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{config_file} must hold a JSON object.")
    return config


def check_model_folder(path: str) -> dict[str, Any]:
    """The parsed config.json. UserError for a folder that is missing or incomplete, before anything heavy is loaded."""
    config, folder = read_model_config(path), Path(path)
    if not any(folder.glob("*.safetensors")):
        found = (
            " (pickle files such as pytorch_model.bin are not read: they can run code)"
            if any(folder.glob("*.bin"))
            else ""
        )
        raise UserError(f"{path} has no *.safetensors weights{found}; save the model with save_pretrained first.")
    if config.get("quantization_config"):
        raise UserError(f"{path} is quantized already; pass the folder of the 16-bit model.")
    return config


def is_seq2seq(model_config: dict[str, Any]) -> bool:
    """Encoder-decoder (T5), by its config.json."""
    return bool(model_config.get("is_encoder_decoder"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and advice: what matters is printed by us."""
    from transformers.utils import logging as hf_logging

    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a local folder. UserError if there is none or it has no end token."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen types here
        raise UserError(f"no usable tokenizer in {path}: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {path} has no end-of-text token, without which a model cannot learn to stop."
        )
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """An id to fill short rows with; masked everywhere, so any valid id serves."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next(i for i in candidates if i is not None)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


def load_base(path: str, dtype: torch.dtype | str) -> Any:
    """A language model (causal, or T5-like) from a local folder, on the CPU, in `dtype` ("auto": as saved)."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if is_seq2seq(check_model_folder(path)) else AutoModelForCausalLM
    try:
        with quiet():
            model = kind.from_pretrained(
                path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except Exception as error:
        raise UserError(f"cannot load the model in {path}: {_first_line(error)}") from None
    return model


def build(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Load, quantize, attach adapters, move. What is trained is float32; everything else is frozen.

    Raises UserError where the core refuses (non-finite weights, targets that match nothing, a base without layers).
    """
    model = load_base(config.model, dtype)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if config.quant_type != "none":
                quantize_model(model, quant_config(config))
            targets = config.lora_targets.split(",") if config.lora_targets != "all-linear" else "all-linear"
            attach_lora(
                model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                target_modules=targets,
                dropout=config.lora_dropout,
                rslora=config.rslora,
                seed=config.seed,
            )
    except (ValueError, TypeError) as error:
        raise UserError(f"{config.model}: {error}") from None
    show_dtypes(model)
    for w in caught:
        print(f"note: {w.message}")
    return model.to(device)


def show_dtypes(model: Any) -> None:
    """Give adapters around T5's `wo` a `weight` whose dtype T5's feed-forward asks for: that of the products.

    It casts its input to `wo.weight.dtype`, which for packed bytes would be uint8. The tensor is empty and not saved.
    """
    other = next(p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    for name, module in model.named_modules():
        if name.endswith(".wo") and isinstance(module, LoRALinear):
            base = module.base_layer
            module.weight = torch.empty(0, dtype=other if isinstance(base, Linear4bit) else base.weight.dtype)


def quant_config(config: TrainConfig) -> QuantConfig:
    return QuantConfig(config.quant_type, config.block_size, config.double_quant)


def set_checkpointing(model: Any, on: bool, products: bool = False) -> None:
    """Recompute activations in the backward pass, the non-reentrant way (the other loses frozen-input gradients).

    `products`: keep the outputs of 4-bit layers and of attention (checkpointing.py).
    """
    from ..hf.checkpointing import disable, enable

    if on:
        enable(model, products)
    else:
        disable(model)


def keeps_products(model: Any) -> bool:
    functions = (getattr(m, "_gradient_checkpointing_func", None) for m in model.modules())
    return any(getattr(f, "keywords", {}).get("context_fn") is keep_products for f in functions)


def is_checkpointing(model: Any) -> bool:
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False)
