"""Adapters in PEFT's file format: written so that stock PEFT, vLLM and llama.cpp read them, and read back to be sure.

adapter_config.json           rank, alpha, target module names, base model
adapter_model.safetensors     base_model.model.<path>.lora_A.weight (rank, in), ...lora_B.weight (out, rank), f32
qlora_ref.json                ours: how the base was quantized and prompted (PEFT ignores it)
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..nn import Linear4bit, LoRALinear

PREFIX = "base_model.model."
CONFIG, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "qlora_ref.json"


class AdapterError(ValueError):
    """An adapter that cannot be written, read or applied; the message is one sentence."""


def lora_modules(model: torch.nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """PEFT names -> CPU copies of the adapter weights, in model order."""
    state = {}
    for name, m in lora_modules(model).items():
        state[f"{PREFIX}{name}.lora_A.weight"] = m.lora_A.detach().cpu().contiguous().clone()
        state[f"{PREFIX}{name}.lora_B.weight"] = m.lora_B.detach().cpu().contiguous().clone()
    return state


def load_lora_state_dict(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Fill the adapters of `model`. AdapterError if names or shapes differ (the first three differences are named)."""
    modules = lora_modules(model)
    wanted = {f"{PREFIX}{n}.lora_{x}.weight": getattr(m, f"lora_{x}") for n, m in modules.items() for x in "AB"}
    odd = sorted(set(wanted) ^ set(state)) + [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if odd:
        raise AdapterError(
            f"the adapter does not fit this model: {len(odd)} tensors differ, such as {', '.join(odd[:3])}."
        )
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(state[key])


def adapter_config(model: torch.nn.Module, base: str, dropout: float) -> dict[str, Any]:
    """The fields that PEFT and its readers need. Target names are suffixes (q_proj), never paths with layer numbers."""
    modules = lora_modules(model)
    first = next(iter(modules.values()))
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "use_rslora": first.rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def write_atomically(path: Path, content: bytes) -> None:
    """All of it or nothing: a temporary file beside it, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def save_adapter(
    model: torch.nn.Module, folder: Path, base: str, dropout: float = 0.0, side: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the adapter into `folder` and read it back. Returns {"tensors", "bytes", "lora_B_norm"}.

    AdapterError if the read-back differs from the model, or a value is not finite.
    """
    state = lora_state_dict(model)
    bad = [k for k, v in state.items() if not torch.isfinite(v).all()]
    if bad:
        raise AdapterError(f"the adapter is not finite in {bad[0]}; it was not written.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, adapter_config(model, base, dropout))
    if side is not None:
        write_json(folder / SIDE, side)
    temporary = folder / (WEIGHTS + ".tmp")
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)
    back = load_file(folder / WEIGHTS)
    if back.keys() != state.keys() or not all(torch.equal(back[k], state[k]) for k in state):
        raise AdapterError(f"{folder / WEIGHTS} does not hold what was written; is the disk full or failing?")
    norm = torch.stack([v.norm() for k, v in back.items() if k.endswith("lora_B.weight")]).norm().item()
    return {"tensors": len(back), "bytes": (folder / WEIGHTS).stat().st_size, "lora_B_norm": norm}


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """(adapter config, weights, our side file or {}) of a PEFT LoRA folder, ours or not. AdapterError if unusable."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        side = json.loads((folder / SIDE).read_text(encoding="utf-8")) if (folder / SIDE).exists() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{folder} is not a readable PEFT adapter ({CONFIG} and {WEIGHTS}): {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is not a LoRA adapter.")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(key):
            raise AdapterError(f"{folder} uses {key}={config[key]!r}, which is not supported here; load it with PEFT.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{folder} trained biases too, which is not supported here; load it with PEFT.")
    return config, state, side


def targets_of(state: dict[str, torch.Tensor]) -> list[str]:
    """Full module paths that an adapter file covers."""
    return sorted({k.removeprefix(PREFIX).rpartition(".lora_")[0] for k in state})


def attach_adapter(model: torch.nn.Module, folder: str | Path) -> dict[str, Any]:
    """Put a saved adapter on a (quantized or 16-bit) base model. Returns our side file, {} for an adapter of others."""
    from ..nn import attach_lora

    config, state, side = read_adapter(folder)
    try:
        attach_lora(
            model,
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=targets_of(state),
            rslora=bool(config.get("use_rslora")),
            skip=(),
        )
    except ValueError as error:
        raise AdapterError(f"{folder} does not fit this model: {error}") from None
    load_lora_state_dict(model, state)
    return side


def storage(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the model by kind: packed weights, their constants, 16/32-bit weights, adapters. Shared tensors once."""
    sizes = {"packed": 0, "constants": 0, "unquantized": 0, "adapters": 0}
    seen: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            if isinstance(module, Linear4bit) and p.dtype == torch.uint8:
                sizes["packed" if name == "weight" else "constants"] += p.nbytes
            else:
                sizes["adapters" if isinstance(module, LoRALinear) else "unquantized"] += p.nbytes
    return sizes
