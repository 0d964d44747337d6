"""Fold an adapter into 16-bit weights: W' + scaling B A, with W' the weights the adapter was trained on.

`dequantized` (default) merges into W' = dequantize(quantize(W)); `original` into W, which the adapter never saw.
Either way the result is compared with the adapter model on a text, and a merge that changed nothing is refused.
"""

import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cli import UserError
from ..nn import Linear4bit, LoRALinear
from .engine import Served, load_quantized
from .loading import quiet, show_dtypes
from .peft_io import AdapterError, attach_adapter

BASES = ("dequantized", "original")
PROBE = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a question: what does this function do?"
)


@dataclass(frozen=True)
class Difference:
    """Of next-token distributions on the probe: mean KL in nats from the adapter model, and from the bare base."""

    from_adapter: float
    from_base: float


def merged_model(served: Served, onto: str, dtype: torch.dtype) -> tuple[Any, Any, Difference]:
    """(merged 16-bit model, tokenizer, how far it is from what was trained). UserError if the adapter does not fit."""
    cpu = torch.device("cpu")
    model, tokenizer = load_quantized(served, cpu, dtype)
    ids = torch.tensor([tokenizer(PROBE).input_ids])
    base = _log_probabilities(model, ids)
    trained = _attach(model, served, ids)
    if onto == "original" and served.quantization is not None:
        model, tokenizer = load_quantized(replace(served, quantization=None), cpu, dtype)
        _attach(model, served, ids)
    fold(model, dtype)
    merged = _log_probabilities(model, ids)
    difference = Difference(_divergence(trained, merged), _divergence(base, merged))
    if torch.equal(base, merged):
        raise UserError(f"merging {served.adapter} changes nothing: the merged model answers exactly as the base.")
    return model, tokenizer, difference


def _attach(model: Any, served: Served, ids: torch.Tensor) -> torch.Tensor:
    try:
        attach_adapter(model, str(served.adapter))
        show_dtypes(model)
    except AdapterError as error:
        raise UserError(str(error)) from None
    return _log_probabilities(model, ids)


def fold(model: Any, dtype: torch.dtype) -> None:
    """Replace every LoRALinear and Linear4bit of `model` by an ordinary nn.Linear in `dtype`, one at a time."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            new = module.merge(dtype)
        elif isinstance(module, Linear4bit) and not name.endswith(".base_layer"):
            new = module.to_linear(dtype)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


@torch.no_grad()
def _log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(ids, **decoder).logits.double().log_softmax(-1)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) over positions, nats."""
    value = (p.exp() * (p - q)).sum(-1).mean().item()
    return max(value, 0.0) if math.isfinite(value) else value


def save_merged(model: Any, tokenizer: Any, output: Path) -> None:
    """Write a Hugging Face folder, whole or not at all, and read it back. UserError if it differs from the model."""
    from safetensors.torch import load_file

    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        state = model.state_dict()
        for path in temporary.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                if not torch.equal(tensor, state[name].cpu()):
                    raise UserError(f"{path}: {name} does not hold what was written; is the disk full or failing?")
        if output.exists():
            output.rmdir()  # empty: checked before
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
