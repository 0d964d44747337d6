"""LoftQ and QPiSSA: start the adapter from what quantization took away, instead of from zero.

    LoftQ  (Li et al. 2023, arXiv 2310.08659)    A, B = rank-r part of W - Q(W), then Q = quantize(W - BA), again
    PiSSA  (Meng et al. 2024, arXiv 2404.02948)  A, B = rank-r part of W,       and Q = quantize(W - BA)

Both need the original W, one layer at a time. One LoftQ iteration leaves the 4-bit base as it is, so the adapter can be
loaded on it anywhere; PiSSA and further iterations change the base, which must then be saved with the adapter.
"""

# mypy: disable-error-code="operator,arg-type,call-arg,assignment,union-attr"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..quantized import QuantizedTensor
from .lora import Lora4bit

METHODS = ("loftq", "pissa")


def rank_part(matrix: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (rank, in), lora_B (out, rank) with scaling * B A = the best rank-r approximation; sqrt(S) on each."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def init_layer(weight: torch.Tensor, layer: Lora4bit, name: str, method: str, iterations: int) -> float:
    """Initialise one layer in place from its original weight (out, in); returns ||W - Q - sBA|| / ||W - Q_before||."""
    base, scaling, rank = layer.base_layer, layer.scaling[name], layer.r[name]
    weight = weight.to(base.weight.device, torch.float32)
    before = torch.linalg.norm(weight - base.dequantize(torch.float32))
    q = base.quantized
    for step in range(iterations):
        target = weight if method == "pissa" else weight - q.dequantize(torch.float32)
        A, B = rank_part(target, rank, scaling)
        if method == "pissa" or step + 1 < iterations:
            q = QuantizedTensor.quantize((weight - scaling * (B @ A)).to(base.weight_dtype), base.config)
    if q.packed.data_ptr() != base.weight.data_ptr():
        base._store(q)
    layer.lora_A[name].weight.data.copy_(A)
    layer.lora_B[name].weight.data.copy_(B)
    after = torch.linalg.norm(weight - base.dequantize(torch.float32) - scaling * (B @ A))
    return float(after / before)


@torch.no_grad()
def init_adapter(
    model: nn.Module,
    method: str,
    original: str | Mapping[str, torch.Tensor],
    iterations: int = 1,
    adapter_name: str = "default",
) -> dict[str, float]:
    """Initialise every `Lora4bit` of a PEFT model. Returns {layer: error left, as a share of the quantization error}.

    original: folder with the safetensors of the model that was quantized, or a mapping from its names to tensors.
    iterations: LoftQ's alternation (1: the base stays as it is). PiSSA has one.
    Raises ValueError for an unknown method and, before anything is changed, for a weight that is missing.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}")
    if iterations < 1 or (method == "pissa" and iterations != 1):
        raise ValueError(f"iterations={iterations}: LoftQ takes 1 or more, PiSSA exactly 1")
    layers = {_base_name(n): m for n, m in model.named_modules() if isinstance(m, Lora4bit)}
    if not layers:
        raise ValueError("the model has no adapter on a 4-bit layer; call qlora_ref.hf.attach(model) first")
    source = _Folder(original) if isinstance(original, (str, Path)) else original
    missing = [n for n in layers if f"{n}.weight" not in source]
    if missing:
        raise ValueError(f"{original if isinstance(original, str) else 'the mapping'} has no {missing[0]}.weight")
    errors = {}
    for name, layer in layers.items():
        weight = source[f"{name}.weight"]
        if getattr(layer.base_layer, "from_conv1d", False):
            weight = weight.T
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(f"{name}.weight is {list(weight.shape)}, not {[layer.out_features, layer.in_features]}")
        errors[name] = init_layer(weight, layer, adapter_name, method, iterations)
    return errors


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


class _Folder(Mapping):
    """The tensors of a checkpoint folder, opened one at a time."""

    def __init__(self, folder: str | Path):
        from .checkpoint import read_headers

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no .safetensors file to initialise from")
        self.file_of = {name: file for file in files for name in read_headers([str(file)])}

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.file_of[name], framework="pt") as f:
            return f.get_tensor(name)

    def __iter__(self):
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)
