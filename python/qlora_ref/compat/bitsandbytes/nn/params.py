"""Params4bit: a Parameter that quantizes itself when it is moved to a device."""

# mypy: disable-error-code="assignment"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

from __future__ import annotations

import copy
from typing import Any

import torch

from ..functional import QuantState, quantize_4bit

_ATTRIBUTES = (
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
)
_FORWARDED = {  # attribute of the parameter -> where it lives; FSDP resolves state_dict keys through them
    "absmax": lambda s: s.absmax,
    "code": lambda s: s.code,
    "quant_map": lambda s: s.code,
    "offset": lambda s: s.offset,
    "state2": lambda s: s.state2,
    "nested_offset": lambda s: s.offset,
    "nested_absmax": lambda s: s.state2.absmax,
    "nested_blocksize": lambda s: s.state2.blocksize,
    "nested_quant_map": lambda s: s.state2.code,
    "nested_dtype": lambda s: s.state2.dtype,
}


class Params4bit(torch.nn.Parameter):
    """Float data until it meets a device; from then on packed codes, with `quant_state`."""

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    quant_state: QuantState | None
    module: Any
    bnb_quantized: bool

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics, self.quant_type, self.quant_storage = compress_statistics, quant_type, quant_storage
        self.quant_state, self.module, self.bnb_quantized = quant_state, module, bnb_quantized
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: Any = "cuda",
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """From packed data and the entries of a checkpoint (`QuantState.from_dict`)."""
        state = QuantState.from_dict(quantized_stats, device)
        self = cls(
            data.to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type,
            data.dtype,
            module,
            True,
        )
        if module is not None:
            module.quant_state = state
        return self

    def _attributes(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _ATTRIBUTES}

    def _quantize(self, device) -> Params4bit:
        packed, self.quant_state = quantize_4bit(
            self.data.contiguous().to(device),
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.data = packed
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = self.quant_state
        return self

    def cpu(self) -> Params4bit:  # type: ignore[override]
        return self.to(device="cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Quantizes at the first device. Packed data ignore a dtype: casting them would destroy the codes."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "meta" and not self.bnb_quantized:
            return self._quantize(device)
        if self.bnb_quantized:
            dtype = None
            if device is not None and self.quant_state is not None:
                self.quant_state.to(device)  # in place: nn.Module.to keeps the Parameter object and swaps its data
        moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
        return type(self)(moved, self.requires_grad, **self._attributes())

    def __getstate__(self):
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state) -> None:
        self.requires_grad = state["requires_grad"]
        self.data = state["data"]
        for name in _ATTRIBUTES:
            setattr(self, name, state[name])

    def __reduce_ex__(self, protocol):
        return _empty, (type(self),), self.__getstate__()  # state apart: `module` refers back to this parameter

    def __copy__(self):
        return _rebuild(type(self), self.__getstate__())

    def __deepcopy__(self, memo):
        state = self.__getstate__()
        new = _rebuild(type(self), {**state, "data": state["data"].clone()})
        new.quant_state = copy.deepcopy(state["quant_state"], memo)
        new.module = memo.get(id(self.module), self.module)  # the copy, where the module itself is being copied
        return new

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split):
            source = args[0]
            pieces = [cls(p.data, source.requires_grad, **source._attributes()) for p in result]
            return tuple(pieces)
        return result


def _forward(name: str):
    def get(self):
        state = self.__dict__.get("quant_state")
        if state is None or ((name.startswith("nested")) and state.state2 is None):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return _FORWARDED[name](state)

    return property(get)


for _attribute in _FORWARDED:
    setattr(Params4bit, _attribute, _forward(_attribute))


def _empty(cls) -> Params4bit:
    return cls.__new__(cls)


def _rebuild(cls, state) -> Params4bit:
    new = _empty(cls)
    new.__setstate__(state)
    return new
