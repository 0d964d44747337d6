"""A quantized tensor as a value: the packed codes, the statistics that decode them, and what they mean."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import ops
from .direct import BoundDecoder
from .reference.blockwise import check_block_size, check_weight
from .reference.codebook import get_codebook
from .reference.double_quant import check_double_quant, get_map8


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. The defaults are the paper's: NF4, blocks of 64, double quantization in blocks of 256.

    quant_type: a name of `reference.codebook.NAMES`. map8: "dynamic" (the authors' code) or "fp8_e4m3" (the paper's
    words). Raises ValueError, naming value and remedy, for anything that cannot work.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    map8: str = "dynamic"
    nested_block_size: int = 256

    def __post_init__(self):
        check_block_size(self.block_size)
        codebook = get_codebook(self.quant_type, self.block_size)
        if self.double_quant:
            get_map8(self.map8)
            check_block_size(self.nested_block_size)
            check_double_quant(codebook)

    def bits_per_weight(self) -> float:
        """4 + 32/B flat, or 4 + 8/B + 32/(B * B2) with double quantization (paper section 3); the mean not counted."""
        if not self.double_quant:
            return 4 + 32 / self.block_size
        return 4 + 8 / self.block_size + 32 / (self.block_size * self.nested_block_size)


@dataclass(frozen=True)
class QuantizedTensor:
    """4-bit codes plus statistics. `dequantize()` gives back `shape` in `dtype`.

    packed ((n + 1) // 2,) u8. Flat: `absmax` (n_blocks,) f32. Double-quantized: `absmax` holds the u8 codes,
    `nested_absmax` (ceil(n_blocks / 256),) f32 and `absmax_mean` (1,) f32.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    absmax_mean: torch.Tensor | None
    config: QuantConfig
    shape: torch.Size
    dtype: torch.dtype
    _decoder: BoundDecoder = field(default_factory=BoundDecoder, init=False, repr=False, compare=False)

    @classmethod
    def quantize(
        cls,
        x: torch.Tensor,
        config: QuantConfig = QuantConfig(),
        check_finite: bool = True,
        absmax_mean: torch.Tensor | None = None,
    ) -> "QuantizedTensor":
        """Quantize a tensor of any shape. TypeError: not fp32, bf16, fp16. ValueError: NaN or Inf, unless unchecked.

        `absmax_mean` (1,) f32: use this mean instead of the tensor's own, as when a checkpoint is quantized again with
        the mean it has, or when several ranks that each hold some rows share one. Both levels are then one pass.
        """
        check_weight(x, check_finite and x.device.type != "meta")
        if absmax_mean is not None:
            return cls._quantize_with_mean(x, config, absmax_mean)
        if not config.double_quant:
            packed, absmax = ops.quantize_4bit(x, config.quant_type, config.block_size)
            return cls(packed, absmax, None, None, config, x.shape, x.dtype)
        packed, codes, nested, mean = ops.quantize_4bit_double(
            x, config.quant_type, config.block_size, config.map8, config.nested_block_size
        )
        return cls(packed, codes, nested, mean, config, x.shape, x.dtype)

    @classmethod
    def _quantize_with_mean(cls, x, config, mean) -> "QuantizedTensor":
        if not config.double_quant:
            raise ValueError("absmax_mean is given, which only double quantization uses; pass double_quant=True")
        if mean.shape != (1,) or mean.dtype != torch.float32 or mean.device != x.device:
            raise ValueError(
                f"absmax_mean must be one float32 in a tensor of shape (1,) on {x.device}, not {tuple(mean.shape)} "
                f"{mean.dtype} on {mean.device}; pass absmax_mean.float().reshape(1).to(x.device)"
            )
        c = config
        packed, codes, nested = torch.ops.qlora_ref.quantize_4bit_nested(
            x, mean, c.quant_type, c.block_size, c.map8, c.nested_block_size
        )
        return cls(packed, codes, nested, mean, config, x.shape, x.dtype)

    def op_args(self) -> tuple:
        """The eight arguments that stand for this weight in every op of `ops.py`."""
        c = self.config
        return (
            *(self.packed, self.absmax, self.nested_absmax, self.absmax_mean),
            *(c.quant_type, c.block_size, c.map8, c.nested_block_size),
        )

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """round_dtype(level * absmax) in the original shape; `dtype` defaults to the one that was quantized.

        `out`: the tensor to write and return, which decides the dtype; contiguous, or 2-D with contiguous rows. Nothing
        else is allocated. ValueError or TypeError, in a sentence, for any that cannot be written.
        """
        if out is None:
            return ops.dequantize_4bit(*self.op_args(), self.shape, dtype or self.dtype)
        if out.shape != self.shape or out.dtype != (dtype or out.dtype) or out.device != self.packed.device:
            wanted = f"{tuple(self.shape)} {dtype or out.dtype} on {self.packed.device}"
            raise ValueError(f"out is {tuple(out.shape)} {out.dtype} on {out.device}; it must be {wanted}")
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError("out requires grad, which writing would break; call under torch.no_grad()")
        if not self._decoder(self, out):
            ops.dequantize_4bit_out(*self.op_args(), out)
        return out

    def absmax_f32(self) -> torch.Tensor:
        """The absmax used for decoding, (n_blocks,) f32."""
        if self.nested_absmax is None:
            return self.absmax
        c = self.config
        return torch.ops.qlora_ref.double_dequantize(
            self.absmax, self.nested_absmax, self.absmax_mean, c.map8, c.nested_block_size
        )

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        return self.map(lambda t: t.to(device))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedTensor":
        """The same tensor with `function` applied to codes and statistics."""
        nested = None if self.nested_absmax is None else function(self.nested_absmax)
        mean = None if self.absmax_mean is None else function(self.absmax_mean)
        return QuantizedTensor(
            function(self.packed), function(self.absmax), nested, mean, self.config, self.shape, self.dtype
        )

    def _tensors(self) -> tuple[Any, Any, Any, Any]:
        return self.packed, self.absmax, self.nested_absmax, self.absmax_mean

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and all statistics."""
        return sum(t.nbytes for t in self._tensors() if t is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.shape.numel(), 1)
