"""The linear layer on a CPU: what the variant in use cannot do, by panels of W' and torch's product.

Native          y = x W'^T and dx = dy W' where the variant has a loop for the dtype: few tokens decode the weight in
                registers (src/cpp/linear.cpp), many share panels in the second-level cache (src/cpp/product.cpp), LoRA
                is a second term of their sums (src/cpp/lora.cpp).
Elsewhere       a panel of W' is dequantized into a buffer that is kept, and torch (oneDNN, MKL) multiplies it; then the
                next panel. A large decoded weight never exists as a whole, and nothing is allocated (bitsandbytes
                allocates and page-faults 33 MB for one 4096 x 4096 product).

Both use the bit-same W'. A panel is a slice of whole output features of y, or of whole input features of dx: each
output is one inner product, rounded once, exactly as in one big product.

LoRA adds thin products, with one side of `rank`. Elsewhere they are torch's: oneDNN and MKL like them best with the
rank as rows: u^T = A x^T, (rank, tokens).
"""

import threading
from collections.abc import Callable

import torch

# Each panel is two more waits of threads, so few large ones; multiples of 256 features, because oneDNN is slow where
# a size is no multiple of its blocks times threads. Tried by hand; tools/bench_cpu.py shows what they give.
PANEL_BYTES = 32 * 2**20
PANEL_STEP = 256  # panels are multiples of this many features


class CpuLinear:
    """Mixed into cpu_backend.CpuBackend, in front of Backend. Arguments as in backend.Backend."""

    _local = threading.local()
    _can_forward: Callable[..., bool]
    _can_backward: Callable[..., bool]
    _can_lora: Callable[..., bool]
    _lora_forward: Callable[..., torch.Tensor]
    _lora_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def linear_4bit_forward(self, x, *args):
        """y (..., out) = x (..., in) W'^T + bias, in the dtype of x."""
        *weight, out_features, bias = args if len(args) == 10 else (*args, None)
        in_features, tokens = x.shape[-1], x.shape[:-1].numel()
        if x.dtype == torch.float64 or self._can_forward(x.dtype, tokens, in_features, weight[5]):
            return super().linear_4bit_forward(x, *args)
        x2 = self._check_input("x", x).reshape(tokens, in_features)
        y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
        y2 = y.view(tokens, out_features)
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
        if dy.dtype == torch.float64 or self._can_backward(dy.dtype, out_features):
            return super().linear_4bit_backward(dy, *args)
        dy2 = self._check_input("dy", dy).reshape(dy.shape[:-1].numel(), out_features)
        dx = torch.empty((*dy.shape[:-1], in_features), dtype=dy.dtype, device=dy.device)
        dx2 = dx.view(len(dy2), in_features)
        for first, count, panel in self._panels(weight, dy.dtype, out_features, in_features, by_rows=False):
            torch.mm(dy2, panel, out=dx2[:, first : first + count])
        return dx

    def lora_linear_4bit(self, x, *args):
        """y (..., out) = x W'^T + bias + scaling (x A^T) B^T."""
        *weight, out_features, bias, lora_A, lora_B, scaling = args
        x2 = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        if self._can_lora(x2, lora_A, lora_B):
            A, B = _as_stored(lora_A, x), _as_stored(lora_B, x)
            y = self._lora_forward(x2, weight, out_features, bias, A, B, scaling)
            return y.view(*x.shape[:-1], out_features)
        y = self.linear_4bit_forward(x, *weight, out_features, bias)
        u = _thin(lora_A.to(x.dtype), x2.T, scaling)  # (rank, tokens)
        y.view(len(x2), out_features).addmm_(u.T, lora_B.T.to(x.dtype, memory_format=torch.contiguous_format))
        return y

    def lora_linear_4bit_backward(self, dy, x, *args):
        """(dx (..., in) or empty, dA (rank, in), dB (out, rank)); the gradients in the dtypes of A and B."""
        *weight, lora_A, lora_B, scaling, need_dx = args
        tokens = x.shape[:-1].numel()
        dy2, x2 = dy.reshape(tokens, dy.shape[-1]), x.reshape(tokens, x.shape[-1])
        if self._can_lora(x2, lora_A, lora_B) and dy.dtype == x.dtype:
            A, B = _as_stored(lora_A, x), _as_stored(lora_B, x)
            dx, dA, dB = self._lora_backward(dy2, x2, weight, A, B, scaling, need_dx)
            return dx.view(x.shape) if need_dx else dx, dA.to(lora_A.dtype), dB.to(lora_B.dtype)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        v, u = _thin(B.T, dy2.T, scaling), _thin(A, x2.T, scaling)  # both (rank, tokens)
        dA, dB = (v @ x2).to(lora_A.dtype), torch.empty_like(lora_B).copy_((u @ dy2).T)
        if not need_dx:
            return dy.new_empty(0), dA, dB
        dx = self.linear_4bit_backward(dy2, *weight, x.shape[-1]).addmm_(v.T, A)
        return dx.view(x.shape), dA, dB

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


def _as_stored(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A or B as the kernels read it: float32 or the dtype of x, contiguous."""
    return (matrix if matrix.dtype == torch.float32 else matrix.to(x.dtype)).contiguous()


def _thin(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * (a @ b), rounded once."""
    return torch.addmm(a.new_empty(a.shape[0], b.shape[1]), a, b, beta=0, alpha=scaling)
