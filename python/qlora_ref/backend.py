"""Tensors to raw pointers: the methods of a native backend, and every check that stands before a kernel.

Both backends have the same methods, equal to the reference function named in each. Tensors may be non-contiguous (they
are copied); wrong dtypes, devices and sizes raise TypeError or ValueError.
"""

import struct
from contextlib import nullcontext
from typing import Any

import torch

from .cpu_linear import CpuLinear
from .cuda_linear import CudaLinear, Scratch
from .reference.blockwise import check_block_size
from .reference.codebook import Codebook
from .reference.double_quant import Map8, absmax_mean, check_double_quant, get_map8

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of types.h
_tables: dict[int, tuple[Any, bytes]] = {}  # id -> (the table, kept alive, and its struct)


def _table(table: Codebook | Map8) -> bytes:
    """The bytes of struct Codebook or struct Map8 (types.h), built once for each table object."""
    known = _tables.get(id(table))
    if known is None:
        if isinstance(table, Codebook):
            tail = struct.pack("16B2B2x", *table.order.tolist(), table.zero_code, table.signed_absmax)
        else:
            tail = struct.pack("i", table.zero_code)
        floats = torch.cat([table.levels, table.thresholds]).float().contiguous()
        known = _tables[id(table)] = (table, floats.numpy().tobytes() + tail)
    return known[1]


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> torch.Tensor:
    """The contiguous tensor, or a sentence."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.numel() != numel:
        have = tensor.numel()
        raise ValueError(f"{name} has {have} elements where {numel} are needed for this shape and block size")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, other tensors on {device}; move them together with .to()")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _check_stored(name: str, tensor: torch.Tensor, numel: int, device: torch.device) -> torch.Tensor:
    """float32 values, or their bytes."""
    if tensor.dtype == torch.uint8:
        return _check(f"{name} (as bytes)", tensor, torch.uint8, 4 * numel, device)
    return _check(name, tensor, torch.float32, numel, device)


def _check_float(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in DTYPE:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}; convert with .float()")
    return tensor.contiguous()


def _adapter(in_features: int, out_features: int, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> tuple:
    """struct Lora (types.h) of contiguous matrices, or a sentence."""
    rank = len(lora_A)
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


class Backend:
    """The functions of src/cpp/kernels.h on tensors of one device type. Subclasses say how a kernel is called."""

    device_type: str

    def __init__(self, module):
        self._c = module
        self._moment_tables: dict[torch.device, torch.Tensor] = {}

    def _call(self, function, device: torch.device, *args) -> Any:
        raise NotImplementedError

    def _empty_packed(self, n: int, device: torch.device) -> torch.Tensor:
        return torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)

    def _map_address(self, map8: Map8, device: torch.device) -> int:
        """Where the 256 levels of `map8` lie on `device`."""
        return map8.levels.data_ptr()

    def _check_device(self, device: torch.device) -> torch.device:
        if device.type != self.device_type:
            raise ValueError(f"this is the {self.device_type} backend, the tensor is on {device}; move it with .to()")
        return device

    # --- quantization ------------------------------------------------------------------------------------------------

    def quantize_4bit(
        self, x: torch.Tensor, codebook: Codebook, block_size: int = 64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """reference.blockwise.quantize_blockwise(check_finite=False): packed ((n + 1) // 2,) u8, absmax f32."""
        check_block_size(block_size)
        x = _check_float("x", x)
        device, n = self._check_device(x.device), x.numel()
        packed = self._empty_packed(n, device)
        absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
        self._call(
            self._c.quantize_4bit,
            device,
            *(x.data_ptr(), DTYPE[x.dtype], n, block_size, _table(codebook), packed.data_ptr(), absmax.data_ptr()),
        )
        return packed, absmax

    def double_quantize(
        self, absmax: torch.Tensor, mean: torch.Tensor, map8: Map8, nested_block_size: int = 256
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """reference.double_quant.double_quantize: codes (n,) u8, nested_absmax (ceil(n / nested_block_size),) f32."""
        check_block_size(nested_block_size)
        device, n = self._check_device(absmax.device), absmax.numel()
        absmax = _check("absmax", absmax, torch.float32, n, device)
        mean = _check("mean", mean, torch.float32, 1, device)
        codes = torch.empty(n, dtype=torch.uint8, device=device)
        nested_absmax = torch.empty(-(-n // nested_block_size), dtype=torch.float32, device=device)
        self._call(
            self._c.double_quantize,
            device,
            *(absmax.data_ptr(), n, mean.data_ptr(), nested_block_size, _table(map8)),
            *(codes.data_ptr(), nested_absmax.data_ptr()),
        )
        return codes, nested_absmax

    def quantize_4bit_nested(
        self,
        x: torch.Tensor,
        mean: torch.Tensor,
        codebook: Codebook,
        block_size: int,
        map8: Map8,
        nested_block_size: int = 256,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """quantize_4bit and double_quantize of its absmax with a known mean: packed u8, codes u8, nested_absmax f32."""
        check_block_size(block_size)
        check_block_size(nested_block_size)
        check_double_quant(codebook)
        x = _check_float("x", x)
        device, n = self._check_device(x.device), x.numel()
        mean = _check("mean", mean, torch.float32, 1, device)
        n_blocks = -(-n // block_size)
        packed = self._empty_packed(n, device)
        codes = torch.empty(n_blocks, dtype=torch.uint8, device=device)
        nested_absmax = torch.empty(-(-n_blocks // nested_block_size), dtype=torch.float32, device=device)
        self._call(
            self._c.quantize_4bit_nested,
            device,
            *(x.data_ptr(), DTYPE[x.dtype], n, block_size, _table(codebook), mean.data_ptr(), nested_block_size),
            *(_table(map8), packed.data_ptr(), codes.data_ptr(), nested_absmax.data_ptr()),
        )
        return packed, codes, nested_absmax

    def quantize_4bit_double(
        self, x: torch.Tensor, codebook: Codebook, block_size: int, map8: Map8, nested_block_size: int = 256
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """quantize_4bit_nested with reference.double_quant.absmax_mean: packed, codes, nested_absmax, mean (1,) f32."""
        check_double_quant(codebook)
        packed, absmax = self.quantize_4bit(x, codebook, block_size)
        mean = absmax_mean(absmax)
        return packed, *self.double_quantize(absmax, mean, map8, nested_block_size), mean

    def double_dequantize(
        self,
        codes: torch.Tensor,
        nested_absmax: torch.Tensor,
        mean: torch.Tensor,
        map8: Map8,
        nested_block_size: int = 256,
    ) -> torch.Tensor:
        """reference.double_quant.double_dequantize: absmax (n,) f32."""
        check_block_size(nested_block_size)
        device, n = self._check_device(codes.device), codes.numel()
        codes = _check("codes", codes, torch.uint8, n, device)
        nested_absmax = _check("nested_absmax", nested_absmax, torch.float32, -(-n // nested_block_size), device)
        mean = _check("mean", mean, torch.float32, 1, device)
        out = torch.empty(n, dtype=torch.float32, device=device)
        self._call(
            self._c.double_dequantize,
            device,
            *(codes.data_ptr(), nested_absmax.data_ptr(), mean.data_ptr(), self._map_address(map8, device)),
            *(nested_block_size, n, out.data_ptr()),
        )
        return out

    # --- the weight ---------------------------------------------------------------------------------------------------

    def _weight(
        self, packed, absmax, nested_absmax, absmax_mean, codebook, block_size, map8, nested_block_size, rows, cols
    ) -> tuple[tuple, tuple]:
        """The arguments of struct Weight4bit for _C, and the tensors that must outlive the call."""
        check_block_size(block_size)
        device, n = self._check_device(packed.device), rows * cols
        n_blocks = -(-n // block_size)
        packed = _check("packed", packed, torch.uint8, (n + 1) // 2, device)
        kept: tuple[Any, ...]
        absmax_args: tuple[int, ...]
        if nested_absmax is None:
            absmax = _check_stored("absmax", absmax, n_blocks, device)
            kept = (packed, absmax)
            absmax_args = (absmax.data_ptr(), 0, 0, 0, 0, 1)
        else:
            if map8 is None or absmax_mean is None:
                raise ValueError("nested_absmax is given, so map8 and absmax_mean must be given too")
            check_block_size(nested_block_size)
            codes = _check("absmax (the codes, as nested_absmax is given)", absmax, torch.uint8, n_blocks, device)
            nested = _check_stored("nested_absmax", nested_absmax, -(-n_blocks // nested_block_size), device)
            mean = _check_stored("absmax_mean", absmax_mean, 1, device)
            kept = (packed, codes, nested, mean)
            absmax_args = (0, codes.data_ptr(), nested.data_ptr(), mean.data_ptr())
            absmax_args += (self._map_address(map8, device), nested_block_size)
        return (packed.data_ptr(), *absmax_args, rows, cols, block_size, _table(codebook)), kept

    def dequantize_4bit(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        absmax_mean: torch.Tensor | None,
        codebook: Codebook,
        block_size: int,
        map8: Map8 | None,
        nested_block_size: int,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype = torch.float32,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """reference.blockwise.dequantize_blockwise; `absmax` is u8 codes if `nested_absmax` is given.

        `out`: the tensor to write, of this shape and dtype, contiguous or (2-D) with a longer row stride.
        """
        shape = torch.Size(shape)
        if dtype == torch.float64:  # gradcheck computes in it; exact from float32
            weight = packed, absmax, nested_absmax, absmax_mean, codebook, block_size, map8, nested_block_size
            exact = self.dequantize_4bit(*weight, shape, torch.float32)
            return exact.double() if out is None else out.copy_(exact)
        check_decoded_dtype(dtype)
        cols = shape[-1] if len(shape) else 1
        rows = shape.numel() // cols if cols else 0
        weight, kept = self._weight(
            *(packed, absmax, nested_absmax, absmax_mean, codebook, block_size, map8, nested_block_size, rows, cols)
        )
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=packed.device)
        stride = row_stride(out, shape, dtype, packed.device)
        self._call(self._c.dequantize_4bit, packed.device, *weight, out.data_ptr(), DTYPE[dtype], stride)
        return out

    # --- the linear layer --------------------------------------------------------------------------------------------

    def linear_4bit_forward(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        absmax_mean: torch.Tensor | None,
        codebook: Codebook,
        block_size: int,
        map8: Map8 | None,
        nested_block_size: int,
        out_features: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y (..., out) = x (..., in) W'^T + bias in the dtype of x: float32 accumulation, one rounding."""
        weight_args = packed, absmax, nested_absmax, absmax_mean, codebook, block_size, map8, nested_block_size
        in_features = x.shape[-1]
        if x.dtype == torch.float64:
            weight = self.dequantize_4bit(*weight_args, (out_features, in_features), x.dtype)
            return torch.nn.functional.linear(x, weight, bias)
        x = _check("x", _check_float("x", x), x.dtype, x.numel(), packed.device)
        args, kept = self._weight(*weight_args, out_features, in_features)
        if bias is not None:
            bias = _check("bias", bias, x.dtype, out_features, x.device)
        y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
        tokens = x.numel() // in_features if in_features else y.numel() // max(out_features, 1)
        bias_address = 0 if bias is None else bias.data_ptr()
        self._call(
            self._c.linear_4bit_forward,
            x.device,
            *(x.data_ptr(), DTYPE[x.dtype], tokens, *args, bias_address, y.data_ptr()),
        )
        return y

    def linear_4bit_backward(
        self,
        dy: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        absmax_mean: torch.Tensor | None,
        codebook: Codebook,
        block_size: int,
        map8: Map8 | None,
        nested_block_size: int,
        in_features: int,
    ) -> torch.Tensor:
        """dx (..., in) = dy (..., out) W' in the dtype of dy, with the bit-same W' as the forward."""
        weight_args = packed, absmax, nested_absmax, absmax_mean, codebook, block_size, map8, nested_block_size
        out_features = dy.shape[-1]
        if dy.dtype == torch.float64:
            return dy @ self.dequantize_4bit(*weight_args, (out_features, in_features), dy.dtype)
        dy = _check("dy", _check_float("dy", dy), dy.dtype, dy.numel(), packed.device)
        weight, kept = self._weight(*weight_args, out_features, in_features)
        dx = torch.empty((*dy.shape[:-1], in_features), dtype=dy.dtype, device=dy.device)
        tokens = dy.numel() // out_features if out_features else dx.numel() // max(in_features, 1)
        self._call(
            self._c.linear_4bit_backward,
            dy.device,
            *(dy.data_ptr(), DTYPE[dy.dtype], tokens, *weight, dx.data_ptr()),
        )
        return dx

    # --- AdamW -------------------------------------------------------------------------------------------------------

    def adamw(
        self,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        exp_avgs: list[torch.Tensor],
        exp_avg_sqs: list[torch.Tensor],
        steps: list[torch.Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        fused: bool = False,
    ) -> None:
        """reference.adamw.adamw_step on every item of the lists, in place; `steps` (f32) are counted up already.

        `fused`: in the order of operations of torch's fused CUDA kernel instead, which gives slightly other bits.
        """
        if params:
            rows = self._adamw_rows(params, grads, (exp_avgs, exp_avg_sqs), steps)
            scalars = lr, beta1, beta2, weight_decay, eps
            dtype = DTYPE[params[0].dtype]
            self._call(self._c.adamw, params[0].device, rows, dtype, *scalars, int(fused))

    def adamw_8bit(
        self,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        m_codes: list[torch.Tensor],
        m_absmax: list[torch.Tensor],
        v_codes: list[torch.Tensor],
        v_absmax: list[torch.Tensor],
        steps: list[torch.Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
    ) -> None:
        """reference.adamw.adamw_step_8bit on every item of the lists, in place."""
        if params:
            rows = self._adamw_rows(params, grads, (m_codes, m_absmax, v_codes, v_absmax), steps)
            scalars = lr, beta1, beta2, weight_decay, eps
            device, dtype = params[0].device, DTYPE[params[0].dtype]
            self._call(self._c.adamw_8bit, device, rows, dtype, *scalars, self._moment_maps(device).data_ptr())

    def _adamw_rows(self, params, grads, fields, steps) -> bytes:
        """An array of struct AdamWPiece or AdamW8bitPiece. Updated in place, so nothing may be copied: contiguous."""
        device, dtype = self._check_device(params[0].device), params[0].dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"AdamW updates float32 or bfloat16 parameters, not {dtype}; cast them")
        words: list[int] = []
        for row in zip(params, grads, *fields, steps, strict=True):
            n = row[0].numel()
            states: tuple[Any, ...] = ((torch.float32, n),) * 2
            if len(fields) == 4:
                states = ((torch.uint8, n), (torch.float32, -(-n // 256))) * 2
            for tensor, (wanted, size) in zip(row, ((dtype, n), (dtype, n), *states, (torch.float32, 1)), strict=True):
                _check("a tensor of AdamW", tensor, wanted, size, device)
                if not tensor.is_contiguous():
                    raise ValueError("AdamW updates in place and needs contiguous tensors; call .contiguous() first")
                words.append(tensor.data_ptr())
            words.append(n)
        return struct.pack(f"{len(words)}Q", *words)

    def _moment_maps(self, device: torch.device) -> torch.Tensor:
        """struct Map8 of m, then that of v, on `device`."""
        if device not in self._moment_tables:
            both = _table(get_map8("dynamic")) + _table(get_map8("dynamic_unsigned"))
            self._moment_tables[device] = torch.frombuffer(bytearray(both), dtype=torch.uint8).clone().to(device)
        return self._moment_tables[device]


_HUGE_PAGE = 2 * 2**20


class CpuBackend(CpuLinear, Backend):
    """On torch's number of threads (torch.set_num_threads); the linear layer as cpu_linear.py divides it."""

    device_type = "cpu"

    def _call(self, function, device, *args):
        return function(*args, torch.get_num_threads())

    def quantize_4bit_double(self, x, codebook, block_size, map8, nested_block_size=256):
        """The mean by the reference where its order of adding could matter."""
        check_double_quant(codebook)
        packed, absmax, codes, nested_absmax, mean, certain = self._quantize_4bit_double(
            x, codebook, block_size, map8, nested_block_size
        )
        if not certain:
            mean = absmax_mean(absmax)
            codes, nested_absmax = self.double_quantize(absmax, mean, map8, nested_block_size)
        return packed, codes, nested_absmax, mean

    def _quantize_4bit_double(self, x, codebook, block_size, map8, nested_block_size):
        check_block_size(block_size)
        check_block_size(nested_block_size)
        x = _check_float("x", x)
        device, n = self._check_device(x.device), x.numel()
        n_blocks = -(-n // block_size)
        packed = self._empty_packed(n, device)
        absmax = torch.empty(n_blocks, dtype=torch.float32, device=device)
        codes = torch.empty(n_blocks, dtype=torch.uint8, device=device)
        nested_absmax = torch.empty(-(-n_blocks // nested_block_size), dtype=torch.float32, device=device)
        mean = torch.empty(1, dtype=torch.float32, device=device)
        certain = self._call(
            self._c.quantize_4bit_double,
            device,
            *(x.data_ptr(), DTYPE[x.dtype], n, block_size, _table(codebook), nested_block_size, _table(map8)),
            *(packed.data_ptr(), absmax.data_ptr(), mean.data_ptr(), codes.data_ptr(), nested_absmax.data_ptr()),
        )
        return packed, absmax, codes, nested_absmax, mean, certain

    def _empty_packed(self, n, device):
        """In pages of 2 MB where the system gives them: a weight stays, and is read from end to end at every token."""
        packed = super()._empty_packed(n, device)
        if packed.numel() >= 2 * _HUGE_PAGE:
            self._c.advise_huge_pages(packed.data_ptr(), packed.numel())
        return packed

    # what cpu_linear.py needs of the module
    def _can_forward(self, dtype, tokens, in_features, block_size) -> bool:
        return dtype in DTYPE and self._c.can_linear_4bit_forward(DTYPE[dtype], tokens, in_features, block_size)

    def _can_backward(self, dtype, out_features) -> bool:
        return dtype in DTYPE and self._c.can_linear_4bit_backward(DTYPE[dtype], out_features)

    def _dequantize_region(self, weight, region, out) -> None:
        self._call(self._c.dequantize_region, out.device, *weight, *region, out.data_ptr(), DTYPE[out.dtype])

    def _can_lora(self, x, lora_A, lora_B) -> bool:
        sizes = x.numel() and len(lora_B)
        return bool(sizes) and x.dtype in DTYPE and self._c.can_lora(DTYPE[x.dtype], len(lora_A))

    def _lora_forward(self, x, weight, out_features, bias, lora_A, lora_B, scaling):
        """y (tokens, out) of x (tokens, in); A and B contiguous, float32 or of the dtype of x."""
        x, (tokens, in_features) = self._check_input("x", x), x.shape
        arguments, kept = self._weight(*weight, out_features, in_features)
        bias = None if bias is None else self._check_bias(bias, x, out_features)
        adapter = _adapter(in_features, out_features, lora_A, lora_B, scaling)
        y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
        self._call(
            self._c.lora_linear_4bit_forward,
            x.device,
            *(x.data_ptr(), DTYPE[x.dtype], tokens, *arguments, 0 if bias is None else bias.data_ptr()),
            *(*adapter, y.data_ptr()),
        )
        return y

    def _lora_backward(self, dy, x, weight, lora_A, lora_B, scaling, need_dx):
        """(dx (tokens, in) or empty, dA, dB), in the dtypes of x, A and B."""
        dy, x = self._check_input("dy", dy), self._check_input("x", x)
        (tokens, in_features), out_features = x.shape, dy.shape[-1]
        arguments, kept = self._weight(*weight, out_features, in_features)
        adapter = _adapter(in_features, out_features, lora_A, lora_B, scaling)
        dx = torch.empty((tokens, in_features) if need_dx else (0,), dtype=x.dtype, device=x.device)
        outputs = torch.empty_like(lora_A), torch.empty_like(lora_B)
        self._call(
            self._c.lora_linear_4bit_backward,
            x.device,
            *(dy.data_ptr(), x.data_ptr(), DTYPE[x.dtype], tokens, *arguments, *adapter),
            *(*(out.data_ptr() for out in outputs), dx.data_ptr() if need_dx else 0),
        )
        return dx, *outputs

    def _check_input(self, name, x):
        self._check_device(x.device)
        return _check_float(name, x)

    def _check_bias(self, bias, x, out_features):
        return _check("bias", bias, x.dtype, out_features, x.device)


class CudaBackend(CudaLinear, Backend):
    """On the device of the tensors and torch's current stream there; the linear layer as cuda_linear.py divides it."""

    device_type = "cuda"

    def __init__(self, module):
        super().__init__(module)
        self.scratch = Scratch()
        self._maps: dict[tuple[int, torch.device], torch.Tensor] = {}

    def _call(self, function, device, *args):
        here = device.index == torch.cuda.current_device()
        with nullcontext() if here else torch.cuda.device(device):
            function(*args, torch.cuda.current_stream(device).cuda_stream)

    def _map_address(self, map8, device):
        key = id(map8), device
        if key not in self._maps:
            _table(map8)  # keeps the object, and so its id, alive
            self._maps[key] = map8.levels.to(device)
        return self._maps[key].data_ptr()
