"""The backend of the CPU kernels: what only they have, and how they are called."""

import torch

from .arguments import DTYPE, adapter_struct, check_float, check_tensor, table_bytes
from .backend import Backend
from .cpu_linear import CpuLinear
from .reference.blockwise import check_block_size
from .reference.double_quant import absmax_mean, check_double_quant

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
        x = check_float("x", x)
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
            *(x.data_ptr(), DTYPE[x.dtype], n, block_size, table_bytes(codebook), nested_block_size, table_bytes(map8)),
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
        sizes = x.numel() and lora_B.shape[0]
        return bool(sizes) and x.dtype in DTYPE and self._c.can_lora(DTYPE[x.dtype], lora_A.shape[0])

    def _lora_forward(self, x, weight, out_features, bias, lora_A, lora_B, scaling):
        """y (tokens, out) of x (tokens, in); A and B contiguous, float32 or of the dtype of x."""
        x, (tokens, in_features) = self._check_input("x", x), x.shape
        arguments, kept = self._weight(*weight, out_features, in_features)
        bias = None if bias is None else self._check_bias(bias, x, out_features)
        adapter = adapter_struct(in_features, out_features, lora_A, lora_B, scaling)
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
        adapter = adapter_struct(in_features, out_features, lora_A, lora_B, scaling)
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
        return check_float(name, x)

    def _check_bias(self, bias, x, out_features):
        return check_tensor("bias", bias, x.dtype, out_features, x.device)
