"""Checkpoints: `checkpoint-N/` appears whole or not at all, is read back before it counts, and resumes bit for bit.

    adapter_config.json, adapter_model.safetensors, qlora_ref.json     a usable PEFT adapter
    optimizer.safetensors, state.json                                  the moments; step counts; sha256 of each file

There is no random state to save: data order, adapter init and dropout are functions of the seed and the step.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .peft_io import WEIGHTS, AdapterError, load_lora_state_dict, save_adapter, write_json

PREFIX = "checkpoint-"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A state_dict as JSON: its tensors are moved into `tensors` (CPU copies), each replaced by its name there."""
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, flatten(v, tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(v, tensors) for v in value]}
    return value


def unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `flatten` (tuples come back as lists)."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "list":
        return [unflatten(v, tensors) for v in content]
    return {key: unflatten(v, tensors) for key, v in content}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_old(file)


def _sha256_old(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob(PREFIX + "*") if p.name[len(PREFIX) :].isdigit() and (p / STATE).exists()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    adapter: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-{step}`, verify it, remove all but the newest `keep`. `adapter`: keywords of `save_adapter`.

    Raises OSError (disk full) or AdapterError; earlier checkpoints are untouched then, and no partial one is left.
    """
    final = folder / f"{PREFIX}{progress['step']}"
    if (final / STATE).exists():
        return final
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_adapter(model, temporary, **adapter)
        tensors: dict[str, torch.Tensor] = {}
        rest = flatten(optimizer.state_dict(), tensors)
        save_file(tensors, temporary / OPTIMIZER)
        files = {p.name: _sha256(p) for p in sorted(temporary.iterdir())}
        write_json(temporary / STATE, {**progress, "optimizer": rest, "sha256": files})
        back = load_file(temporary / OPTIMIZER)
        if back.keys() != tensors.keys() or not all(torch.equal(back[k], tensors[k]) for k in tensors):
            raise AdapterError(f"{temporary / OPTIMIZER} does not hold what was written; is the disk full or failing?")
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # an incomplete copy, for it has no state file
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill model and optimizer, return the progress. AdapterError if a file is not the one saved."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, digest in state["sha256"].items():
            if _sha256(path / name) != digest:
                raise AdapterError(
                    f"{path / name} has changed since it was saved; remove this checkpoint and resume again."
                )
        load_lora_state_dict(model, load_file(path / WEIGHTS))
        optimizer.load_state_dict(unflatten(state["optimizer"], load_file(path / OPTIMIZER)))
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} cannot be resumed: {error}.") from None
    return {k: v for k, v in state.items() if k not in ("optimizer", "sha256")}
