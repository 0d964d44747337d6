"""Tensors and tables to what the kernels take, raw pointers and structs of types.h, and the checks on the way.

Wrong dtypes, devices and sizes raise TypeError or ValueError; non-contiguous tensors are copied.
"""

import struct
from typing import Any

import torch

from .reference.codebook import Codebook
from .reference.double_quant import Map8

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of types.h
_known_tables: dict[int, tuple[Any, bytes]] = {}  # id -> (the table, kept alive, and its struct)


def table_bytes(table: Codebook | Map8) -> bytes:
    """The bytes of struct Codebook or struct Map8 (types.h), built once for each table object."""
    known = _known_tables.get(id(table))
    if known is None:
        if isinstance(table, Codebook):
            tail = struct.pack("16B2B2x", *table.order.tolist(), table.zero_code, table.signed_absmax)
        else:
            tail = struct.pack("i", table.zero_code)
        floats = torch.cat([table.levels, table.thresholds]).float().contiguous()
        known = _known_tables[id(table)] = (table, floats.numpy().tobytes() + tail)
    return known[1]


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> torch.Tensor:
    """The contiguous tensor, or a sentence."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.numel() != numel:
        have = tensor.numel()
        raise ValueError(f"{name} has {have} elements where {numel} are needed for this shape and block size")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, other tensors on {device}; move them together with .to()")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def check_stored(name: str, tensor: torch.Tensor, numel: int, device: torch.device) -> torch.Tensor:
    """float32 values, or their bytes."""
    if tensor.dtype == torch.uint8:
        return check_tensor(f"{name} (as bytes)", tensor, torch.uint8, 4 * numel, device)
    return check_tensor(name, tensor, torch.float32, numel, device)


def check_float(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in DTYPE:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}; convert with .float()")
    return tensor.contiguous()


def adapter_struct(
    in_features: int, out_features: int, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> tuple:
    """struct Lora (types.h) of contiguous matrices, or a sentence."""
    rank = lora_A.shape[0]
    if lora_A.shape != (rank, in_features) or lora_B.shape != (out_features, rank):
        raise ValueError(
            f"lora_A is {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}; for this layer they must be "
            f"({rank}, {in_features}) and ({out_features}, {rank})"
        )
    dtypes = DTYPE[lora_A.dtype], DTYPE[lora_B.dtype]
    return lora_A.data_ptr(), dtypes[0], lora_B.data_ptr(), dtypes[1], rank, in_features, out_features, scaling


def check_decoded_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPE and dtype != torch.float64:
        raise TypeError(f"can dequantize to float32, bfloat16, float16 or float64, not {dtype}")


def row_stride(out: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from a row of `out`, which is to be written, to the next; a sentence if it cannot be."""
    if out.shape != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; it must be {tuple(shape)} {dtype} on {device}"
        )
    if out.is_contiguous():
        return shape[-1] if shape else 1
    if out.dim() == 2 and out.stride(1) == 1 and out.stride(0) >= shape[1]:
        return out.stride(0)
    raise ValueError("out must be contiguous, or 2-D with contiguous rows: pass out.contiguous() and copy back")
