"""Loading what is to be evaluated: a transformers folder, perhaps with a PEFT adapter, perhaps quantized.

Only local folders and only safetensors: no network, no pickle, no code from the folder.
"""

import json
from pathlib import Path
from typing import Any

from .records import BadInput


def _folder(path: str | Path, file: str, what: str) -> Path:
    path = Path(path)
    if not (path / file).is_file():
        raise BadInput(f"{path}: not a {what} folder (no {file} in it).")
    return path


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a local folder; a missing pad token becomes the end token (it is masked anyway)."""
    from transformers import AutoTokenizer

    path = _folder(path, "tokenizer_config.json", "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Any:
    """The causal language model of a local folder, in eval mode.

    adapter: a PEFT folder put on top. quantize: a 4-bit type (nf4, fp4) or None, by `qlora_ref.hf`.
    device: auto takes CUDA when there is one. dtype: auto keeps the folder's; else float32, bfloat16, float16.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = _folder(path, "config.json", "model")
    if adapter is not None:
        _folder(adapter, "adapter_config.json", "PEFT adapter")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    saved = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if quantize and saved:
        raise BadInput(f"{path} is quantized already; leave out --quantize.")
    if saved and saved.get("quant_method") == "qlora_ref":
        from .. import hf  # noqa: F401 (registers the quantizer that reads this folder)
    if quantize:
        kwargs |= _quantization(quantize)
    model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True, **kwargs)
    model = model.to(device)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    return model.eval()


def max_positions(model: Any) -> int | None:
    """How many tokens the model was made for, or None when its config does not say."""
    config = model.config
    limit = next(
        (getattr(config, k, None) for k in ("max_position_embeddings", "n_positions") if hasattr(config, k)), None
    )
    return int(limit) if limit else None


def _quantization(kind: str) -> dict[str, Any]:
    """Arguments for `from_pretrained` that load the linear layers in 4 bits with double quantization."""
    from ..hf import QLoraConfig

    return {"quantization_config": QLoraConfig(quant_type=kind)}
