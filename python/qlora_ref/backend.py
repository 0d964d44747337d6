"""The methods of a native backend: every check that stands before a kernel, then the call.

Both backends (cpu_backend.py, cuda_backend.py) have the same methods, equal to the reference function named in each.
Tensors may be non-contiguous (they are copied); wrong dtypes, devices and sizes raise TypeError or ValueError.
"""

import struct
from typing import Any

import torch

from .arguments import (
    DTYPE,
    check_decoded_dtype,
    check_float,
    check_stored,
    check_tensor,
    row_stride,
    table_bytes,
)
from .reference.blockwise import check_block_size
from .reference.codebook import Codebook
from .reference.double_quant import Map8, absmax_mean, check_double_quant, get_map8


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
        x = check_float("x", x)
        device, n = self._check_device(x.device), x.numel()
        packed = self._empty_packed(n, device)
        absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
        self._call(
            self._c.quantize_4bit,
            device,
            *(x.data_ptr(), DTYPE[x.dtype], n, block_size, table_bytes(codebook), packed.data_ptr(), absmax.data_ptr()),
        )
        return packed, absmax

    def double_quantize(
        self, absmax: torch.Tensor, mean: torch.Tensor, map8: Map8, nested_block_size: int = 256
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """reference.double_quant.double_quantize: codes (n,) u8, nested_absmax (ceil(n / nested_block_size),) f32."""
        check_block_size(nested_block_size)
        device, n = self._check_device(absmax.device), absmax.numel()
        absmax = check_tensor("absmax", absmax, torch.float32, n, device)
        mean = check_tensor("mean", mean, torch.float32, 1, device)
        codes = torch.empty(n, dtype=torch.uint8, device=device)
        nested_absmax = torch.empty(-(-n // nested_block_size), dtype=torch.float32, device=device)
        self._call(
            self._c.double_quantize,
            device,
            *(absmax.data_ptr(), n, mean.data_ptr(), nested_block_size, table_bytes(map8)),
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
        x = check_float("x", x)
        device, n = self._check_device(x.device), x.numel()
        mean = check_tensor("mean", mean, torch.float32, 1, device)
        n_blocks = -(-n // block_size)
        packed = self._empty_packed(n, device)
        codes = torch.empty(n_blocks, dtype=torch.uint8, device=device)
        nested_absmax = torch.empty(-(-n_blocks // nested_block_size), dtype=torch.float32, device=device)
        self._call(
            self._c.quantize_4bit_nested,
            device,
            *(x.data_ptr(), DTYPE[x.dtype], n, block_size, table_bytes(codebook), mean.data_ptr(), nested_block_size),
            *(table_bytes(map8), packed.data_ptr(), codes.data_ptr(), nested_absmax.data_ptr()),
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
        codes = check_tensor("codes", codes, torch.uint8, n, device)
        nested_absmax = check_tensor("nested_absmax", nested_absmax, torch.float32, -(-n // nested_block_size), device)
        mean = check_tensor("mean", mean, torch.float32, 1, device)
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
        packed = check_tensor("packed", packed, torch.uint8, (n + 1) // 2, device)
        kept: tuple[Any, ...]
        absmax_args: tuple[int, ...]
        if nested_absmax is None:
            absmax = check_stored("absmax", absmax, n_blocks, device)
            kept = (packed, absmax)
            absmax_args = (absmax.data_ptr(), 0, 0, 0, 0, 1)
        else:
            if map8 is None or absmax_mean is None:
                raise ValueError("nested_absmax is given, so map8 and absmax_mean must be given too")
            check_block_size(nested_block_size)
            codes = check_tensor("absmax (the codes, as nested_absmax is given)", absmax, torch.uint8, n_blocks, device)
            nested = check_stored("nested_absmax", nested_absmax, -(-n_blocks // nested_block_size), device)
            mean = check_stored("absmax_mean", absmax_mean, 1, device)
            kept = (packed, codes, nested, mean)
            absmax_args = (0, codes.data_ptr(), nested.data_ptr(), mean.data_ptr())
            absmax_args += (self._map_address(map8, device), nested_block_size)
        return (packed.data_ptr(), *absmax_args, rows, cols, block_size, table_bytes(codebook)), kept

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
        x = check_tensor("x", check_float("x", x), x.dtype, x.numel(), packed.device)
        args, kept = self._weight(*weight_args, out_features, in_features)
        if bias is not None:
            bias = check_tensor("bias", bias, x.dtype, out_features, x.device)
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
        dy = check_tensor("dy", check_float("dy", dy), dy.dtype, dy.numel(), packed.device)
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
                check_tensor("a tensor of AdamW", tensor, wanted, size, device)
                if not tensor.is_contiguous():
                    raise ValueError("AdamW updates in place and needs contiguous tensors; call .contiguous() first")
                words.append(tensor.data_ptr())
            words.append(n)
        return struct.pack(f"{len(words)}Q", *words)

    def _moment_maps(self, device: torch.device) -> torch.Tensor:
        """struct Map8 of m, then that of v, on `device`."""
        if device not in self._moment_tables:
            both = table_bytes(get_map8("dynamic")) + table_bytes(get_map8("dynamic_unsigned"))
            self._moment_tables[device] = torch.frombuffer(bytearray(both), dtype=torch.uint8).clone().to(device)
        return self._moment_tables[device]
