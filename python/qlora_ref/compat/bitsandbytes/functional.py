"""bitsandbytes.functional, its 4-bit and 8-bit blockwise part."""

import torch

from ... import quantized  # noqa: F401  (registers torch.ops.qlora_ref)
from ...reference.blockwise import BLOCK_SIZES
from ...reference.codebook import get_codebook
from ...reference.double_quant import Map8, absmax_mean, dequantize_8bit, get_map8, quantize_8bit
from .maps import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map
from .quant_state import QUANT_TYPES, QuantState
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "has_avx512bf16",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]
_OURS = {"nf4": "nf4", "fp4": "fp4_bnb"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check(quant_type: str, blocksize: int, dtype: torch.dtype, direction: str) -> None:
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"invalid blocksize {blocksize}; one of {', '.join(map(str, BLOCK_SIZES))}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if dtype not in _FLOATS:
        raise ValueError(f"Blockwise 4bit {direction} only supports 16/32-bit floats, but got {dtype}")


def get_4bit_type(typename: str, device=None, blocksize: int = 64) -> torch.Tensor:
    """The 16 levels by code, float32. device None: the GPU if there is one."""
    if typename not in QUANT_TYPES:
        raise NotImplementedError(f"Typename {typename} not supported; {', '.join(QUANT_TYPES)} are")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return get_codebook(_OURS[typename], blocksize).levels.to(device, copy=True)


# --- 4 bits ----------------------------------------------------------------------------------------------------------


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Packed codes (ceil(n / 2 / itemsize), 1) in `quant_storage`, and the state that undoes it. ValueError for other
    dtypes, block sizes and types. A block with NaN or Inf decodes to NaN."""
    blocksize = 64 if blocksize is None else blocksize
    _check(quant_type, blocksize, A.dtype, "quantization")
    packed, scale = torch.ops.qlora_ref.quantize_4bit(A.detach(), _OURS[quant_type], blocksize)
    offset = state2 = None
    if compress_statistics:
        mean = absmax_mean(scale)
        codes, nested = torch.ops.qlora_ref.double_quantize(scale, mean, "dynamic", 256)
        state2 = QuantState(nested, code=get_map8("dynamic").levels.to(A.device), blocksize=256, dtype=torch.float32)
        offset, scale = mean.reshape(()), codes
    if absmax is not None:
        scale = absmax.copy_(scale)
    code = get_4bit_type(quant_type, A.device)
    state = QuantState(scale, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)
    stored = _as_storage(packed, quant_storage)
    return (stored if out is None else out.copy_(stored)), state


def _as_storage(packed: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """The same bytes seen as another dtype, padded to whole elements, as a column."""
    rest = -packed.numel() % storage.itemsize
    if rest:
        packed = torch.cat([packed, packed.new_zeros(rest)])
    return packed.view(storage).view(-1, 1)


def _bytes(B: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Packed codes in any storage dtype and orientation -> ((n + 1) // 2,) uint8."""
    flat = B.detach().reshape(-1)
    return flat.view(torch.uint8)[: (shape.numel() + 1) // 2]


def _standard_nested(state: QuantState) -> bool:
    return state.nested and state.state2.blocksize == 256 and state.absmax.dtype == torch.uint8


def weight_args(B: torch.Tensor, state: QuantState) -> tuple:
    """The eight arguments of our ops for a weight of theirs."""
    kind = (_OURS[state.quant_type], state.blocksize, "dynamic", 256)
    packed = _bytes(B, state.shape)
    if not state.nested:
        return packed, state.absmax.float(), None, None, *kind
    if not _standard_nested(state):
        return packed, _absmax(state), None, None, *kind
    return packed, state.absmax, state.state2.absmax, state.offset.reshape(1).float(), *kind


def _absmax(state: QuantState) -> torch.Tensor:
    if not state.nested:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """The tensor of `quant_state` (or of `absmax`, `blocksize`, `quant_type` and the shape and dtype of `out`).

    As theirs, codes given as a row (1, n) come back transposed; unlike theirs, a single byte does not count as a row.
    """
    state = quant_state
    if state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit requires both absmax and out when quant_state is not provided")
        state = QuantState(absmax, out.shape, None, blocksize or 64, quant_type, out.dtype)
    _check(state.quant_type, state.blocksize, state.dtype, "dequantization")
    if not A.is_contiguous() and A.dim() == 2:
        A = A.t() if A.t().is_contiguous() else A.contiguous()
    result = torch.ops.qlora_ref.dequantize_4bit(*weight_args(A, state), state.shape, state.dtype)
    if out is not None:
        result = out.copy_(result)
    return result.t() if A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 else result


def quantize_nf4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """A (..., K) times the weight (N, K) of `state`: the same operation, whatever the number of rows of A."""
    if state is None:
        raise ValueError("state cannot be None. gemv_4bit() requires the state from quantize_4bit()")
    y = torch.ops.qlora_ref.linear_4bit(A, *weight_args(B, state), state.shape[0], None)
    return y if out is None else out.copy_(y)


def has_avx512bf16() -> bool:
    """False: no layout of ours depends on it."""
    return False


# --- 8 bits ----------------------------------------------------------------------------------------------------------


def _map_of(code: torch.Tensor | None) -> Map8:
    """A table of theirs as a `Map8`: nearest by float32 midpoints, ties to the lower entry."""
    if code is None:
        return get_map8("dynamic")
    levels = code.detach().float()
    return Map8("custom", levels, (levels[:-1] + levels[1:]) * 0.5, int(levels.abs().argmin()))


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """8-bit codes in the shape of A. `code`: 256 ascending values, default the signed dynamic map."""
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    if A.dtype not in _FLOATS:
        raise ValueError(f"Blockwise quantization only supports 16/32-bit floats, but got {A.dtype}")
    map8 = _map_of(code)
    codes, scale = quantize_8bit(A.detach().reshape(-1).float(), map8, blocksize)
    offset = state2 = None
    if nested:
        offset = absmax_mean(scale).reshape(())
        scale, state2 = quantize_blockwise(scale - offset, blocksize=blocksize)
    if absmax is not None:
        scale = absmax.copy_(scale)
    levels = map8.levels.to(A.device, copy=True)
    state = QuantState(scale, None, levels, blocksize, None, A.dtype, offset, state2)
    codes = codes.view(A.shape)
    return (codes if out is None else out.copy_(codes)), state


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """map[code] * absmax in the shape of A, in the state's dtype (float32 without a state)."""
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise requires quant_state or absmax")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if quant_state.blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {quant_state.blocksize}")
    values = dequantize_8bit(A.reshape(-1), _absmax(quant_state), _map_of(quant_state.code), quant_state.blocksize)
    values = values.view(A.shape).to(quant_state.dtype)
    return values if out is None else out.copy_(values)
