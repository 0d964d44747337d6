"""Several devices: where a rank puts its model, FSDP2 over packed weights, and adapters out of a sharded model.

Every parameter of a 4-bit layer is an ordinary frozen uint8 Parameter whose dimension 0 is the output row, so
`fully_shard` cuts it like any other: a rank keeps 1/world of the packed bytes and gathers one layer at a time.
"""

# mypy: disable-error-code="misc,operator"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .versions import require_fsdp2


def rank_device_map() -> dict[str, Any]:
    """`device_map` for DDP: the whole model on this process's own device ("cpu" without a GPU)."""
    if not torch.cuda.is_available():
        return {"": "cpu"}
    return {"": int(os.environ.get("LOCAL_RANK", "0"))}


def _layers_to_shard(model: nn.Module, names: Sequence[str] | None) -> list[nn.Module]:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted = set(names or getattr(base, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in wanted]
    if not found:
        raise ValueError(
            f"no module of {type(base).__name__} is one of {sorted(wanted)}; name its decoder layer class: "
            'shard(model, layer_classes=["LlamaDecoderLayer"])'
        )
    return found


def shard(
    model: nn.Module,
    layer_classes: Sequence[str] | None = None,
    mesh: Any = None,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """FSDP2 in place: each decoder layer is one unit, the rest (embeddings, head) the root. Returns the model.

    compute_dtype: dtype in which float parameters are gathered (adapters stay float32 masters); bytes are never cast.
    Call it after attaching adapters and before building the optimizer. Raises RuntimeError for torch < 2.12, and
    outside of an initialised process group.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    require_fsdp2()
    if not dist.is_initialized():
        raise RuntimeError("no process group: start the script with torchrun or accelerate launch, and init it first")
    kwargs = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype)}
    for layer in _layers_to_shard(model, layer_classes):
        fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters only, full CPU tensors on rank 0 ({} on the others). Every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = {k.removeprefix("module."): v for k, v in get_model_state_dict(model, options=options).items()}
    trained = {n.removeprefix("module.") for n, p in model.named_parameters() if p.requires_grad}
    return {k: v for k, v in state.items() if k in trained}  # torch keeps the second name of a tied frozen weight


def save_sharded_adapter(model: nn.Module, directory: str) -> None:
    """A PEFT adapter folder from a DDP or FSDP2 model; rank 0 writes, every rank must call it and returns after it."""
    from .checkpoint import read_headers

    inner = getattr(model, "module", model)
    state = adapter_state_dict(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        inner.save_pretrained(directory, state_dict=state)
        written = read_headers([str(Path(directory) / "adapter_model.safetensors")])
        if len(written) != len(state):
            raise ValueError(f"{directory} holds {len(written)} tensors, the model trains {len(state)}")
    if dist.is_initialized():
        dist.barrier()


def local_bytes(model: nn.Module) -> dict[str, int]:
    """{"packed": .., "other": ..} bytes that this rank keeps while nothing is gathered."""
    counts = {"packed": 0, "other": 0}
    for p in model.parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        counts["packed" if p.dtype == torch.uint8 else "other"] += local.nbytes
    return counts
