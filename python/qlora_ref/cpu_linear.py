"""The linear layer on a CPU: which path for which number of tokens, and the path for many.

Few tokens      y = x W'^T by a kernel that decodes the weight in registers, inside the product (src/cpp/linear_tile.h):
                reading 4 bits a weight instead of 16 is what counts there.
Many tokens     and dx = dy W': a panel of W' is dequantized into a buffer that stays in the cache, and torch
                (oneDNN) multiplies it; then the next panel. The decoded weight never exists as a whole, so nothing is
                allocated (bitsandbytes allocates and page-faults 33 MB for one 4096 x 4096 product).

Both use the bit-same W'. A panel is a slice of whole output features of y, or of whole input features of dx: each
output is one inner product, rounded once, exactly as in one big product.
"""

import threading
from collections.abc import Callable

import torch

# Up to here the kernel wins over panels, measured. oneDNN has no fast float16 product on this CPU: there ours goes far.
FUSED_TOKENS = {torch.bfloat16: 128, torch.float16: 512, torch.float32: 48}
# Wide panels keep oneDNN efficient, small ones stay in the cache: 2048 x 4096 bf16.
PANEL_BYTES = 16 * 2**20
PANEL_STEP = 64  # panels are multiples of this many features


class CpuLinear:
    """Mixed into native.CpuBackend, in front of Backend. Arguments as in native.Backend."""

    _local = threading.local()
    _can_fuse: Callable[..., bool]

    def linear_4bit_forward(self, x, *args):
        """y (..., out) = x (..., in) W'^T + bias, in the dtype of x."""
        *weight, out_features, bias = args if len(args) == 10 else (*args, None)
        in_features, tokens = x.shape[-1], x.shape[:-1].numel()
        if x.dtype == torch.float64 or self._fused(x.dtype, tokens, in_features, weight[5]):
            return super().linear_4bit_forward(x, *args)
        x2 = self._check_input("x", x).reshape(-1, in_features)
        y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
        y2 = y.view(-1, out_features)
        if bias is not None:
            bias = self._check_bias(bias, x, out_features)
        for first, count, panel in self._panels(weight, x.dtype, out_features, in_features, by_rows=True):
            out = y2[:, first : first + count]
            if bias is None:
                torch.mm(x2, panel.T, out=out)
            else:
                torch.addmm(bias[first : first + count], x2, panel.T, out=out)
        return y

    def linear_4bit_backward(self, dy, *args):
        """dx (..., in) = dy (..., out) W' in the dtype of dy, with the bit-same W' as the forward."""
        *weight, in_features = args
        out_features = dy.shape[-1]
        if dy.dtype == torch.float64:
            return dy @ self.dequantize_4bit(*weight, (out_features, in_features), dy.dtype)
        dy2 = self._check_input("dy", dy).reshape(-1, out_features)
        dx = torch.empty((*dy.shape[:-1], in_features), dtype=dy.dtype, device=dy.device)
        dx2 = dx.view(-1, in_features)
        for first, count, panel in self._panels(weight, dy.dtype, out_features, in_features, by_rows=False):
            torch.mm(dy2, panel, out=dx2[:, first : first + count])
        return dx

    def _fused(self, dtype: torch.dtype, tokens: int, in_features: int, block_size: int) -> bool:
        return tokens <= FUSED_TOKENS.get(dtype, 0) and self._can_fuse(dtype, in_features, block_size)

    def _panels(self, weight, dtype, rows, cols, by_rows):
        """(first, count, panel): rows first .. first + count of W' as (count, cols), or columns as (rows, count)."""
        length, width = (rows, cols) if by_rows else (cols, rows)
        at_most = PANEL_BYTES // max(1, width * dtype.itemsize) // PANEL_STEP * PANEL_STEP
        step = min(max(at_most, PANEL_STEP), length)
        arguments, kept = self._weight(*weight, rows, cols)
        buffer = self._buffer(step * width * dtype.itemsize).view(dtype)
        for first in range(0, length, max(step, 1)):
            count = min(step, length - first)
            region = (first, count, 0, cols) if by_rows else (0, rows, first, count)
            panel = buffer[: count * width].view(region[1], region[3])
            self._dequantize_region(arguments, region, panel)
            yield first, count, panel
        del kept

    def _buffer(self, nbytes: int) -> torch.Tensor:
        """Memory of this thread, kept: fresh memory would cost more page faults than decoding costs time."""
        held = getattr(self._local, "buffer", None)
        if held is None or held.numel() < nbytes:
            held = self._local.buffer = torch.empty(max(nbytes, PANEL_BYTES), dtype=torch.uint8, device="cpu")
        return held[:nbytes]
