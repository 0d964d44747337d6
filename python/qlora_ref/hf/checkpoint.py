"""Look at a checkpoint before loading it: names and shapes from the safetensors headers, no tensor read.

transformers reports a tensor it could not place as a warning and leaves that layer with whatever memory held. For
packed bytes this would be silent nonsense, so a disagreement between config.json and the files is refused here.
"""

import json
import os
from pathlib import Path

from torch import nn

from ..nn import Linear4bit

STATISTICS = ("absmax", "absmax_codes", "nested_absmax", "absmax_mean")
BNB_STATE = ".quant_state.bitsandbytes__"


def read_headers(files: list[str] | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (dtype, shape)} of safetensors files; {} if there are none to read."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files or []:
        if not str(file).endswith(".safetensors"):
            return {}
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > os.path.getsize(file):
                raise ValueError(f"{file} is no complete safetensors file; download or copy it again")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        tensors.update({name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()})
    return tensors


def _find(tensors: dict, name: str, prefix: str):
    """The entry of `name`, whether or not the checkpoint writes the base model's prefix."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in tensors:
            return tensors[candidate]
    return None


def check_against_files(model: nn.Module, files: list[str] | None, double_quant: bool) -> None:
    """Raise ValueError if a 4-bit checkpoint cannot be what config.json says. Called on the meta skeleton."""
    tensors = read_headers(files)
    if not files or not tensors:
        return
    where = Path(files[0]).parent
    kinds = {name.rpartition(".")[2] for name in tensors} & set(STATISTICS)
    if not kinds:
        found = "bitsandbytes tensors: load it with qlora_ref.hf.from_bnb(path)"
        if not any(BNB_STATE in name for name in tensors):
            found = "ordinary weights: delete quantization_config from config.json and quantize on load"
        raise ValueError(f"{where}: config.json promises 4-bit weights of qlora_ref, the files hold {found}")
    if ("absmax_codes" in kinds) != double_quant:
        raise ValueError(
            f"{where}: config.json says double_quant={double_quant}, the files hold {', '.join(sorted(kinds))}; set "
            f'"double_quant": {str(not double_quant).lower()} in its quantization_config, or save the checkpoint again'
        )
    prefix = getattr(model, "base_model_prefix", "")
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        for own_name, p in module.named_parameters(recurse=False):
            entry = _find(tensors, f"{name}.{own_name}", prefix)
            if entry is not None and own_name != "bias" and (entry[0], entry[1]) != ("U8", tuple(p.shape)):
                kind = f"{module.config.quant_type}, block_size={module.config.block_size}"
                raise ValueError(
                    f"{where}: {name}.{own_name} is {entry[0]} {list(entry[1])} in the files, and U8 {list(p.shape)} "
                    f"by config.json ({kind}); the quantization_config is not the one the weights were saved with: "
                    "restore config.json, or save the checkpoint again"
                )
