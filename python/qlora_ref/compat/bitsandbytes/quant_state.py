"""QuantState: everything about a quantized tensor that is not its codes, under bitsandbytes' names."""

from __future__ import annotations

from typing import Any

import torch

from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

QUANT_TYPES = ("fp4", "nf4")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class QuantState:
    """absmax, shape, code (the table), blocksize, quant_type, dtype; nested: offset and state2."""

    valid_quant_types = QUANT_TYPES
    valid_qs_type_keys = [f"bitsandbytes__{t}" for t in QUANT_TYPES]
    valid_qs_keys = [
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "quant_type", "blocksize"),
        *("dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"),
    ]

    def __init__(
        self, absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None, offset=None, state2=None
    ):
        self.absmax, self.shape, self.code, self.dtype = absmax, shape, code, dtype
        self.blocksize, self.quant_type = blocksize, quant_type
        self.offset, self.state2 = offset, state2
        self.nested = state2 is not None

    def __getattr__(self, name: str):
        if name.startswith("bitsandbytes__"):  # FSDP resolves state_dict keys as attributes
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __getitem__(self, index):
        """The list that older code unpacks: absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """Inverse of `as_dict`, packed or not, with or without key prefixes. The caller's dict is left as it is."""
        packed = [k for k, v in qs_dict.items() if "quant_state" in k and isinstance(v, torch.Tensor)]
        if "quant_type" not in qs_dict:
            if not packed:
                raise ValueError("Expected packed or unpacked quant_state items, found neither")
            if len(packed) != 1 or packed[0].split(".")[-1] not in cls.valid_qs_type_keys:
                raise ValueError(
                    f"There should be exactly one `quant_state` item with ending from {cls.valid_qs_type_keys}.\n"
                    f"Detected {packed}."
                )
        fields = {k: v for k, v in qs_dict.items() if k not in packed}
        for key in packed:
            fields.update(unpack_tensor_to_dict(qs_dict[key]))
        fields = {k.split(".")[-1]: v for k, v in fields.items()}
        unknown = set(fields) - set(cls.valid_qs_keys)
        if unknown:
            raise ValueError(f"unknown items in a quantization state: {', '.join(sorted(unknown))}")
        offset = state2 = None
        if "nested_absmax" in fields:
            offset = torch.tensor(float(fields["nested_offset"])).to(device)
            state2 = cls(
                absmax=fields["nested_absmax"].to(device),
                blocksize=fields["nested_blocksize"],
                code=fields["nested_quant_map"].to(device),
                dtype=getattr(torch, fields["nested_dtype"]),
            )
        return cls(
            quant_type=fields["quant_type"],
            absmax=fields["absmax"].to(device),
            blocksize=fields["blocksize"],
            code=fields["quant_map"].to(device),
            dtype=getattr(torch, fields["dtype"]),
            shape=None if fields["shape"] is None else torch.Size(fields["shape"]),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Tensors and plain values by key; `packed` puts the plain ones as JSON into one uint8 tensor."""
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            fields["nested_absmax"] = self.state2.absmax
            fields["nested_blocksize"] = self.state2.blocksize
            fields["nested_quant_map"] = self.state2.code.clone()  # safetensors drops tensors that share memory
            fields["nested_dtype"] = _name(self.state2.dtype)
            fields["nested_offset"] = self.offset.item()
        if not packed or self.quant_type is None:
            return fields
        tensors = {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
        plain = {k: v for k, v in fields.items() if not isinstance(v, torch.Tensor)}
        return tensors | {f"quant_state.bitsandbytes__{self.quant_type}": pack_dict_to_tensor(plain)}

    def to(self, device) -> None:
        """Move in place (as theirs does)."""
        self.code, self.absmax = self.code.to(device), self.absmax.to(device)
        if self.nested:
            self.offset = self.offset.to(device)
            self.state2.absmax, self.state2.code = self.state2.absmax.to(device), self.state2.code.to(device)

    def __eq__(self, other) -> bool:
        if not isinstance(other, QuantState):
            return False
        plain = ("shape", "dtype", "blocksize", "quant_type", "nested")
        if any(getattr(self, n) != getattr(other, n) for n in plain):
            return False
        tensors = torch.equal(self.absmax, other.absmax) and torch.equal(self.code, other.code)
        return tensors and (not self.nested or (bool(self.offset == other.offset) and self.state2 == other.state2))

    __hash__ = None  # type: ignore[assignment]
