"""bitsandbytes' 4-bit modules: float until `.to(device)`, packed afterwards."""

# mypy: disable-error-code="return-value"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

import logging

import torch
from torch import nn

from ..autograd._functions import matmul_4bit
from ..functional import QuantState, dequantize_4bit
from .params import Params4bit

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4", "Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]
logger = logging.getLogger(__name__)


class _Quantized(nn.Module):
    """What Linear4bit and Embedding4bit share: where the state is, and how it is saved *and loaded*."""

    def _state(self) -> QuantState:
        """The state of `weight`, taken from the module when FSDP exchanged the Parameter."""
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is None:
            raise RuntimeError(f"{type(self).__name__} is not quantized yet; move it to a device first: .to(device)")
        return state

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        mark = f"{prefix}weight."
        stats = {k.removeprefix(mark): v for k, v in state_dict.items() if k.startswith(mark)}
        if stats and f"{prefix}weight" in state_dict:
            data = state_dict[f"{prefix}weight"]
            device = data.device if self.weight.device.type == "meta" else self.weight.device
            self.weight = Params4bit.from_prequantized(data.clone(), stats, device=device, module=self)
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(mark)}
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear4bit(_Quantized, nn.Linear):
    """y = x W'^T + bias. compute_dtype None follows each input (theirs keeps the first one seen)."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device=None,
    ):
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype, self.quant_storage = compute_dtype, quant_storage
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_c = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return matmul_4bit(x_c, self.weight, self._state(), bias=self.bias).to(x.dtype)


class LinearFP4(Linear4bit):
    def __init__(
        self,
        input_features,
        output_features,
        bias=True,
        compute_dtype=None,
        compress_statistics=True,
        quant_storage=torch.uint8,
        device=None,
    ):
        super().__init__(
            *(input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device)
        )


class LinearNF4(Linear4bit):
    def __init__(
        self,
        input_features,
        output_features,
        bias=True,
        compute_dtype=None,
        compress_statistics=True,
        quant_storage=torch.uint8,
        device=None,
    ):
        super().__init__(
            *(input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device)
        )


class Embedding4bit(_Quantized, nn.Embedding):
    """A 4-bit table. Rows that are whole blocks are gathered packed and decoded alone; it can be saved and loaded."""

    def __init__(
        self, num_embeddings, embedding_dim, dtype=None, quant_type="fp4", quant_storage=torch.uint8, device=None
    ):
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.quant_state: QuantState | None = None
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        if embedding_dim % self.weight.blocksize:
            logger.warning(
                f"Embedding size {embedding_dim} is not divisible by block size {self.weight.blocksize}. "
                "This will lead to slow inference."
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        state, rows, width = self._state(), self.num_embeddings, self.embedding_dim
        if width % state.blocksize or state.nested:
            table = dequantize_4bit(self.weight.data, state)
            return nn.functional.embedding(input, table).to(self.dtype)
        packed = self.weight.data.reshape(-1).view(torch.uint8)[: rows * width // 2].view(rows, width // 2)
        codes = nn.functional.embedding(input, packed).reshape(-1, 1)
        absmax = nn.functional.embedding(input, state.absmax.view(rows, -1)).reshape(-1)
        shape = torch.Size((*input.shape, width))
        part = QuantState(absmax, shape, state.code, state.blocksize, state.quant_type, state.dtype)
        return dequantize_4bit(codes, part).to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None):
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None):
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)
