"""JSON in a uint8 tensor: how bitsandbytes gets numbers and names through safetensors."""

import json
from typing import Any

import torch


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> torch.Tensor:
    """A JSON-able dict -> its UTF-8 bytes, (length,) uint8."""
    return torch.tensor(list(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> dict[str, Any]:
    return json.loads(bytes(tensor_data.cpu().tolist()).decode())
