"""Modules: a linear layer stored in 4 bits, a LoRA adapter around it, and the two functions that rebuild a model.

Storage: everything frozen is a uint8 Parameter, the float32 statistics as their bytes. Then `model.to(torch.bfloat16)`
leaves them alone, `state_dict` and FSDP2 treat them like any weight, and nothing hangs off a tensor subclass.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import bound_lora, ops
from .direct import BoundLinear
from .quantized import QuantConfig, QuantizedTensor
from .reference import lora as ref_lora


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _to_bytes(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).view(*shape)


def _to_f32(stored: torch.Tensor) -> torch.Tensor:
    return stored.reshape(-1).view(torch.float32)


class Linear4bit(nn.Linear):
    """y = x W'^T + bias with W' stored in 4 bits and frozen (paper section 3; reference/linear.py).

    Parameters, all uint8: `weight` (out, in/2), and either `absmax` (the bytes of (n_blocks,) f32) or, with double
    quantization, `absmax_codes`, `nested_absmax` (n, 4), `absmax_mean` (4,). Dim 0 is the output row wherever `in` is
    a multiple of the block size. `bias` is an ordinary Parameter.
    compute_dtype: dtype of the products; None follows the input (or autocast). The output has the input's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantConfig = QuantConfig(),
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: that would allocate the 16-bit weight
        self.in_features, self.out_features = in_features, out_features
        self.config, self.compute_dtype, self.weight_dtype = config, compute_dtype, dtype
        self._bound = BoundLinear()
        empty = QuantizedTensor.quantize(torch.empty(out_features, in_features, device="meta", dtype=dtype), config)
        if device != "meta":  # all-zero weights, like an unloaded checkpoint
            empty = empty.map(lambda t: torch.zeros_like(t, device=device or "cpu"))
        self._store(empty)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    def _store(self, q: QuantizedTensor) -> None:
        rows, cols, block = self.out_features, self.in_features, self.config.block_size
        self.weight = _frozen(q.packed.view(rows, cols // 2) if cols % 2 == 0 else q.packed)
        per_row = (rows, -1) if rows and cols and cols % block == 0 else (-1,)
        if q.nested_absmax is None or q.absmax_mean is None:
            self.absmax = _frozen(_to_bytes(q.absmax, *per_row) if q.absmax.numel() else q.absmax.view(torch.uint8))
            return
        self.absmax_codes = _frozen(q.absmax.view(*per_row) if q.absmax.numel() else q.absmax)
        self.nested_absmax = _frozen(_to_bytes(q.nested_absmax, q.nested_absmax.numel(), 4))
        self.absmax_mean = _frozen(_to_bytes(q.absmax_mean, 4))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: QuantConfig = QuantConfig(),
        compute_dtype: torch.dtype | None = None,
        check_finite: bool = True,
    ) -> "Linear4bit":
        """Quantize an `nn.Linear` on its device. Raises ValueError for non-finite weights (unless unchecked)."""
        q = QuantizedTensor.quantize(linear.weight.detach(), config, check_finite)
        return cls.from_quantized(q, linear.bias, compute_dtype)

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, bias: nn.Parameter | None = None, compute_dtype: torch.dtype | None = None
    ) -> "Linear4bit":
        out_features, in_features = q.shape
        module = cls(in_features, out_features, False, q.config, compute_dtype, "meta", q.dtype)
        module._store(q)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return module

    def _stored(self) -> tuple[Any, Any, Any, Any]:
        """packed, absmax or its codes, nested_absmax, absmax_mean: 1-D views of the Parameters."""
        packed = self.weight.reshape(-1)
        if not self.config.double_quant:
            return packed, _to_f32(self.absmax), None, None
        return packed, self.absmax_codes.reshape(-1), _to_f32(self.nested_absmax), _to_f32(self.absmax_mean)

    def op_args(self) -> tuple:
        """The eight arguments that stand for this weight in every op of `ops.py`: the Parameters as they are stored."""
        c = self.config
        spec = c.quant_type, c.block_size, c.map8, c.nested_block_size
        if not c.double_quant:
            return self.weight, self.absmax, None, None, *spec
        return self.weight, self.absmax_codes, self.nested_absmax, self.absmax_mean, *spec

    @property
    def quantized(self) -> QuantizedTensor:
        """The stored weight as a `QuantizedTensor` (views, no copy)."""
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedTensor(*self._stored(), self.config, shape, self.weight_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W' (out, in); `dtype` defaults to the dtype that was quantized."""
        return self.quantized.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary `nn.Linear` holding W'."""
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        return linear

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype of the products: `compute_dtype`, else autocast's, else x's own."""
        if self.compute_dtype is not None:
            return x.to(self.compute_dtype)
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return x
        return x.to(torch.get_autocast_dtype(device))

    def cast_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_dynamo_compiling() and (few := self._bound(self, x)) is not None:
            return few
        x_c = self.cast_input(x)
        y = ops.linear_4bit(x_c, *self.op_args(), self.out_features, self.cast_bias(x_c.dtype))
        return y if self.compute_dtype is None else y.to(x.dtype)

    def with_adapter(self, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
        """y + scaling (x A^T) B^T in one op; lora_A (rank, in), lora_B (out, rank)."""
        if x.is_cpu and not torch.compiler.is_dynamo_compiling():
            y = bound_lora.lora_linear(self, x, lora_A, lora_B, scaling)
            if y is not None:
                return y
        x_c = self.cast_input(x)
        bias = self.cast_bias(x_c.dtype)
        y = ops.lora_linear_4bit(x_c, *self.op_args(), self.out_features, bias, lora_A, lora_B, scaling)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        c = self.config
        nested = f", double_quant={c.map8}/{c.nested_block_size}" if c.double_quant else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{c.quant_type}, block_size={c.block_size}{nested}, compute_dtype={self.compute_dtype}"
        )


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank branch: base(x) + scaling * (dropout(x) A^T) B^T.

    `lora_A` (rank, in) and `lora_B` (out, rank) are kept in float32 and cast to the dtype of the products: in bf16 an
    update below half an ulp of the parameter would be lost for ever. `base_layer` is `nn.Linear` or `Linear4bit`.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"the LoRA rank must be at least 1, not {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"the LoRA dropout must lie in [0, 1), not {dropout}")
        self.base_layer = base.requires_grad_(False)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = ref_lora.scaling(alpha, rank, rslora)
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        with torch.device("meta" if device.type == "meta" else "cpu"):
            lora_A, lora_B = ref_lora.init_lora(rank, base.in_features, base.out_features, generator)
        self.lora_A = nn.Parameter(lora_A.to(device, dtype))
        self.lora_B = nn.Parameter(lora_B.to(device, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        if isinstance(base, Linear4bit) and not (self.training and self.dropout.p > 0):
            return base.with_adapter(x, self.lora_A, self.lora_B, self.scaling)
        y = base(x)
        branch = self.dropout(x).to(y.dtype)
        branch = nn.functional.linear(branch, self.lora_A.to(y.dtype))
        return y + self.scaling * nn.functional.linear(branch, self.lora_B.to(y.dtype))

    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary `nn.Linear` with W' + scaling * B A (reference/lora.py: merge), in `dtype`."""
        base = self.base_layer
        if isinstance(base, Linear4bit):
            linear = base.to_linear(dtype)
        else:
            linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            linear.weight = nn.Parameter(base.weight.detach().to(dtype or base.weight.dtype), requires_grad=False)
            if base.bias is not None:
                linear.bias = nn.Parameter(base.bias.detach().to(linear.weight.dtype), requires_grad=False)
        with torch.no_grad():
            merged = ref_lora.merge(linear.weight, self.lora_A, self.lora_B, self.scaling)
        linear.weight = nn.Parameter(merged, requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}, rslora={self.rslora}"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Is `name` one of the patterns, or does it end in "." + pattern? ("q_proj" matches every q_proj.)"""
    return any(name == p or name.endswith("." + p) for p in patterns)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def quantize_model(
    model: nn.Module,
    config: QuantConfig = QuantConfig(),
    skip: Sequence[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Replace every `nn.Linear` except `skip` by a `Linear4bit`, in place, one at a time. Returns their names.

    Embeddings, norms and biases keep their dtype. Raises ValueError if there is nothing to quantize, or for non-finite
    weights (with the layer's name); the model is then unchanged up to that layer.
    """
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n and not matches(n, skip)]
    if not names:
        raise ValueError(f"the model has no nn.Linear to quantize outside skip={list(skip)}")
    _warn_unreached(model, skip)
    for name in names:
        try:
            linear: Any = model.get_submodule(name)
            _replace(model, name, Linear4bit.from_linear(linear, config, compute_dtype))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    return names


def _warn_unreached(model: nn.Module, skip: Sequence[str]) -> None:
    """Name large weights that stay in 16 bits because no nn.Linear holds them (fused experts, Conv1D)."""
    big = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or matches(name, skip):
            continue
        for pname, p in module.named_parameters(recurse=False):
            if p.dim() >= 2 and p.is_floating_point() and p.numel() >= 1 << 16:
                big[f"{name}.{pname}"] = p.nbytes
    if big:
        total = sum(big.values()) / 2**20
        warnings.warn(
            f"{len(big)} weights ({total:.0f} MiB) are not held by nn.Linear and stay unquantized, "
            f"for example {next(iter(big))}",
            stacklevel=3,
        )


def attach_lora(
    model: nn.Module,
    rank: int = 64,
    alpha: float = 16,
    target_modules: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    skip: Sequence[str] = ("lm_head",),
    seed: int | None = None,
) -> list[str]:
    """Freeze the model and wrap the target linear layers in `LoRALinear`, in place. Returns their names.

    The defaults are the paper's: rank 64, alpha 16, every linear layer (except `skip`). Raises ValueError listing the
    candidates when `target_modules` matches nothing.
    """
    candidates = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n and not matches(n, skip)]
    names = candidates if target_modules == "all-linear" else [n for n in candidates if matches(n, target_modules)]
    if not names:
        suffixes = sorted({n.rpartition(".")[2] for n in candidates})
        raise ValueError(f"target_modules={target_modules!r} matches no linear layer; candidates are {suffixes}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in names:
        base: Any = model.get_submodule(name)
        _replace(model, name, LoRALinear(base, rank, alpha, dropout, rslora, dtype, generator))
    return names


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, counting the *weights* that packed bytes stand for and no statistics."""
    total = trainable = 0
    seen: set[int] = set()
    for module in model.modules():
        if packed := isinstance(module, Linear4bit):
            total += module.in_features * module.out_features
        for p in module.parameters(recurse=False):
            if id(p) in seen or (packed and p.dtype == torch.uint8):
                continue
            seen.add(id(p))
            total += p.numel()
            trainable += p.numel() * p.requires_grad
    return total, trainable
