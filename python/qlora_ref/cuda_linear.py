"""The linear layer on a GPU: which path for which size, and the path for many tokens.

Few tokens      y = x W'^T by one kernel that decodes the weight inside the product (src/cuda/linear_small.cu).
Many tokens     W' is dequantized into scratch memory and cuBLAS multiplies, through torch. Autograd never sees W'.

With many tokens the adapter costs more than decoding: each pass over y (tokens x out) is 184/in_features of the whole
product on an H200, and PEFT makes about six. Here the adapter rides inside the same product, K extended by the rank:

    y  = [x | s x A^T] @ [W' | B]^T         u = s x A^T is written into the tail of a copy of x
    dx = [dy | s dy B] @ [W' ; A]           likewise

The scratch matrix is therefore (out + rank, in + rank): W' top left, B to its right, A below it. The copy of x costs
two passes over x; adding the adapter to y afterwards (`addmm_`) costs two passes over y. So the extension is used where
x is not wider than y, else `addmm_`.

Gradient checkpointing decodes every weight twice in a row, in the recomputed forward and in the backward. `Scratch`
keeps the latest decoded weights within a budget, so that the backward finds what the recomputation left: two decodings
a step instead of three. (Where checkpointing.py keeps products the recomputation decodes nothing: two as well.)
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

# Most tokens for the fused kernel, by dtype and first digit of the compute capability (0: any older). Above,
# dequantize + cuBLAS. Start values by estimate (docs/08_kernels_cuda.md), not yet measured: tools/bench.py prints both.
FUSED_TOKENS = {
    torch.bfloat16: {8: 32, 0: 8},
    torch.float16: {8: 32, 0: 8},
    torch.float32: {0: 16},
}
SCRATCH_BYTES = 512 * 2**20  # decoded weights kept: all seven matrices of a Llama-8B layer take 0.44 GB in bf16


def fused_tokens(dtype: torch.dtype, major: int, in_features: int) -> int:
    """The largest number of tokens that the fused kernel takes; 0 if it cannot take this layer at all."""
    if dtype not in FUSED_TOKENS or in_features % 8 != 0:
        return 0
    table = FUSED_TOKENS[dtype]
    return table[max(first for first in table if first <= major)]


class _Kept(NamedTuple):
    tensors: tuple[torch.Tensor | None, ...]  # held, so that no other tensor can take their addresses meanwhile
    version: tuple
    buffer: torch.Tensor


class Scratch:
    """Decoded weights on their way from a forward to its backward, within `budget` bytes (the last one in any case).

    A forward always decodes and leaves its result here; a backward takes it away. It gets it only for the same tensors
    (same storage, offset and in-place version) on the same stream. While a CUDA graph is captured nothing is kept or
    reused: a replay would not repeat what was skipped.
    """

    def __init__(self, budget: int = SCRATCH_BYTES):
        self.budget = budget
        self._kept: OrderedDict[tuple, _Kept] = OrderedDict()

    @staticmethod
    def _version(tensors) -> tuple | None:
        if any(t is not None and t.is_inference() for t in tensors):
            return None  # such tensors do not count their in-place changes
        return tuple(None if t is None else (t.untyped_storage()._cdata, t.data_ptr(), t._version) for t in tensors)

    @staticmethod
    def _slot(tensors, key: tuple) -> tuple:
        return (tensors[0].data_ptr(), *key)

    def take(self, tensors: tuple[torch.Tensor | None, ...], key: tuple) -> torch.Tensor | None:
        """The decoded weight that `keep` was given for these tensors, now forgotten here; None if there is none."""
        entry = self._kept.pop(self._slot(tensors, key), None)
        return None if entry is None or entry.version != self._version(tensors) else entry.buffer

    def keep(self, tensors: tuple[torch.Tensor | None, ...], key: tuple, buffer: torch.Tensor) -> None:
        version = self._version(tensors)
        if version is not None:
            self._kept[self._slot(tensors, key)] = _Kept(tensors, version, buffer)
            self.make_room(0)

    def make_room(self, nbytes: int) -> None:
        """Drop the oldest until `nbytes` more fit. Their memory goes back to torch's allocator, stream-ordered."""
        while len(self._kept) > (nbytes == 0) and self.nbytes + nbytes > self.budget:
            self._kept.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return sum(entry.buffer.nbytes for entry in self._kept.values())

    def clear(self) -> None:
        self._kept.clear()


def _stream(device: torch.device) -> tuple[Any, bool]:
    """(the current stream's handle, is a graph being captured on it?)."""
    if device.type != "cuda":
        return None, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).major if device.type == "cuda" else 0


def padded_rank(rank: int) -> int:
    """The rank rounded up to a multiple of 8: rows of the extended matrices then stay 16-byte aligned for cuBLAS."""
    return -(-rank // 8) * 8


def _without_autocast(method):
    """The op's dtype is that of x, decided by the caller; autocast would change that of the products inside."""

    @wraps(method)
    def call(self, x, *args):
        if not torch.is_autocast_enabled(x.device.type):
            return method(self, x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args)

    return call


class CudaLinear:
    """Mixed into native.CudaBackend, in front of Backend: the linear layer for every number of tokens.

    `weight` is always the eight arguments packed, absmax, nested_absmax, absmax_mean, codebook, block_size, map8,
    nested_block_size of `dequantize_4bit`. Shapes as in ops.py.
    """

    scratch: Scratch
    dequantize_4bit: Callable[..., torch.Tensor]

    @_without_autocast
    def linear_4bit_forward(self, x, *args):
        """y (..., out) = x (..., in) W'^T + bias, in the dtype of x."""
        *weight, out_features, bias = args if len(args) == 10 else (*args, None)
        in_features, tokens = x.shape[-1], x.shape[:-1].numel()
        if tokens <= fused_tokens(x.dtype, _major(x.device), in_features) and packed_is_aligned(x, weight[0]):
            return super().linear_4bit_forward(x, *args)
        return linear(x, self.dequantize_4bit(*weight, (out_features, in_features), x.dtype), bias)

    @_without_autocast
    def linear_4bit_backward(self, dy, *args):
        """dx (..., in) = dy (..., out) W'. Always dequantize + cuBLAS: gradients come in batches of many tokens."""
        *weight, in_features = args
        return dy @ self.dequantize_4bit(*weight, (dy.shape[-1], in_features), dy.dtype)

    def _extended_weight(self, weight, rows: int, cols: int, rank: int, dtype: torch.dtype, backward: bool):
        """(rows + rank, cols + rank) with W' in [:rows, :cols]; the rest is the caller's to write."""
        tensors, device = tuple(weight[:4]), weight[0].device
        stream, capturing = _stream(device)
        codebook, block_size, map8, nested_block_size = weight[4:]
        key = (rows, cols, rank, dtype, device, stream, id(codebook), block_size, id(map8), nested_block_size)
        keep = not backward and not capturing
        if backward and not capturing and (buffer := self.scratch.take(tensors, key)) is not None:
            return buffer
        if keep:
            self.scratch.make_room((rows + rank) * (cols + rank) * dtype.itemsize)
        buffer = torch.empty((rows + rank, cols + rank), dtype=dtype, device=device)
        inside = buffer[:rows, :cols]
        if dtype == torch.float64:  # gradcheck; the kernels write up to float32
            inside.copy_(self.dequantize_4bit(*weight, (rows, cols), dtype))
        else:
            self.dequantize_4bit(*weight, (rows, cols), dtype, out=inside)
        if keep:
            self.scratch.keep(tensors, key, buffer)
        return buffer

    @_without_autocast
    def lora_linear_4bit(self, x, *args):
        """y (..., out) = x W'^T + bias + scaling (x A^T) B^T."""
        *weight, out_features, bias, lora_A, lora_B, scaling = args
        x2 = x.reshape(-1, x.shape[-1])
        (tokens, cols), rank = x2.shape, lora_A.shape[0]
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        if tokens <= fused_tokens(x.dtype, _major(x.device), cols):
            y = self.linear_4bit_forward(x2, *weight, out_features, bias)
            u = torch.addmm(x2.new_empty(tokens, rank), x2, A.T, beta=0, alpha=scaling)
            return y.addmm_(u, B.T).view(*x.shape[:-1], out_features)

        pad = padded_rank(rank)
        buffer = self._extended_weight(weight, out_features, cols, pad, x.dtype, backward=False)
        if cols <= out_features:
            extended = _extended(x2, A.T, scaling, pad)
            _fill(buffer[:out_features, cols:], B)
            y = linear(extended, buffer[:out_features], bias)
        else:
            y = linear(x2, buffer[:out_features, :cols], bias)
            u = torch.addmm(x2.new_empty(tokens, rank), x2, A.T, beta=0, alpha=scaling)
            y.addmm_(u, B.T)
        return y.view(*x.shape[:-1], out_features)

    @_without_autocast
    def lora_linear_4bit_backward(self, dy, x, *args):
        """(dx (..., in) or empty, dA (rank, in), dB (out, rank)); the gradients in the dtypes of A and B."""
        *weight, lora_A, lora_B, scaling, need_dx = args
        dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        (tokens, rows), cols, rank = dy2.shape, x2.shape[1], lora_A.shape[0]
        A, B, pad = lora_A.to(x.dtype), lora_B.to(x.dtype), padded_rank(lora_A.shape[0])
        extend = need_dx and rows <= cols
        if extend:
            extended = _extended(dy2, B, scaling, pad)
            v = extended[:, rows : rows + rank]  # s dy B
        else:
            v = torch.addmm(dy2.new_empty(tokens, rank), dy2, B, beta=0, alpha=scaling)
        u = torch.addmm(x2.new_empty(tokens, rank), x2, A.T, beta=0, alpha=scaling)  # s x A^T
        dA, dB = (v.T @ x2).to(lora_A.dtype), (dy2.T @ u).to(lora_B.dtype)
        if not need_dx:
            return dy.new_empty(0), dA, dB

        buffer = self._extended_weight(weight, rows, cols, pad, x.dtype, backward=True)
        if extend:
            _fill(buffer[rows:, :cols], A)
            dx = extended @ buffer[:, :cols]
        else:
            dx = (dy2 @ buffer[:rows, :cols]).addmm_(v, A)
        return dx.view(x.shape), dA, dB


def unusable(archs: str, capabilities: list[int], driver: int, runtime: int) -> str:
    """Why the CUDA kernels of this build cannot run here, as one sentence; "" if they can.

    archs: CMake's list, "75-real 90a-real 120-virtual"; capabilities: 10 * major + minor of each card; versions as CUDA
    gives them (13000 for 13.0). A `real` target runs on cards of its major version from its minor on (with a letter, on
    that card alone), a `virtual` one (PTX) on every later card. A driver runs any runtime of its own major version.
    """
    if driver // 1000 < runtime // 1000:
        need, have = f"{runtime // 1000}.{runtime % 1000 // 10}", f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"the NVIDIA driver knows CUDA {have} and the kernels were built with {need}; update the driver, or "
            f"rebuild with a CUDA {driver // 1000} toolkit"
        )
    for capability in capabilities:
        if not any(_covers(arch, capability) for arch in archs.split()):
            return (
                f"this build has kernels for {archs} and the card is of compute capability "
                f"{capability // 10}.{capability % 10}; rebuild with -DQLORA_CUDA_ARCHS=native"
            )
    return ""


def _covers(arch: str, capability: int) -> bool:
    name, _, kind = arch.partition("-")
    if not name[0].isdigit():  # CMake's words `all`, `all-major`: a card they leave out is found at the first launch
        return True
    target = int(name.rstrip("af"))
    if name[-1].isalpha():
        return target == capability
    as_real = kind != "virtual" and target // 10 == capability // 10 and target <= capability
    return as_real or (kind != "real" and target <= capability)


def packed_is_aligned(x: torch.Tensor, packed: torch.Tensor) -> bool:
    """Can the fused kernel load 16 bytes at a time? False for odd slices of a larger storage."""
    return x.data_ptr() % 16 == 0 and packed.data_ptr() % 16 == 0


def _extended(x: torch.Tensor, thin: torch.Tensor, scaling: float, pad: int) -> torch.Tensor:
    """[x | scaling x thin | 0]: (tokens, width + pad) for x (tokens, width), thin (width, rank)."""
    width, rank = thin.shape
    out = x.new_empty((x.shape[0], width + pad))
    out[:, :width] = x
    out[:, width : width + rank].addmm_(x, thin, beta=0, alpha=scaling)
    out[:, width + rank :] = 0
    return out


def _fill(border: torch.Tensor, matrix: torch.Tensor) -> None:
    """Write `matrix` into the top left of `border` and zeros into the rest."""
    rows, cols = matrix.shape
    border[:rows, :cols] = matrix
    border[rows:] = 0
    border[:, cols:] = 0
