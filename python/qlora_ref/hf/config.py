"""QLoraConfig: what transformers writes into config.json under "quantization_config", and hands back to us."""

# mypy: disable-error-code="assignment"
# (to mypy every attribute of an nn.Module is "Tensor | Module", and the bases of our subclasses are loosely typed)

from typing import Any

import torch
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quantized import QuantConfig

QUANT_METHOD = "qlora_ref"
FORMATS = ("qlora_ref", "bitsandbytes")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}


def dtype_from_name(name: str | torch.dtype | None, what: str = "compute_dtype") -> torch.dtype | None:
    """'bfloat16', 'torch.bfloat16' or torch.bfloat16 -> torch.bfloat16. ValueError listing the possible ones."""
    if name is None:
        return None
    key = str(name).removeprefix("torch.")
    if key not in _DTYPES:
        raise ValueError(f"{what}={name} is none of {', '.join(_DTYPES)}")
    return _DTYPES[key]


@register_quantization_config(QUANT_METHOD)
class QLoraConfig(QuantizationConfigMixin):
    """How to quantize a model: `from_pretrained(path, quantization_config=QLoraConfig(...))`.

    quant_type, block_size, double_quant, map8, nested_block_size   as in `qlora_ref.quantized.QuantConfig`; the
        defaults are the paper's (NF4, blocks of 64, double quantization in blocks of 256)
    compute_dtype   dtype of the products; None follows the input, so `dtype=torch.bfloat16` computes in bf16
    skip_modules    names (or regular expressions) of linear layers to leave alone; None skips the output head, tied
        weights and the last module, as transformers does for every method
    checkpoint_format   how the tensors of a *saved* checkpoint are named: "qlora_ref" or "bitsandbytes"

    Raises ValueError for a value that cannot work and for an unknown key.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        map8: str = "dynamic",
        nested_block_size: int = 256,
        compute_dtype: str | torch.dtype | None = None,
        skip_modules: list[str] | None = None,
        checkpoint_format: str = "qlora_ref",
        **others: Any,
    ):
        method = others.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"this quantization_config says quant_method='{method}', QLoraConfig is '{QUANT_METHOD}'")
        if others:
            raise ValueError(
                f"QLoraConfig knows no {', '.join(sorted(others))}; a misspelling, or a checkpoint written by a newer "
                "qlora_ref (pip install -U qlora_ref)"
            )
        if checkpoint_format not in FORMATS:
            raise ValueError(f"checkpoint_format={checkpoint_format!r} is none of {', '.join(FORMATS)}")
        if isinstance(skip_modules, str):
            raise ValueError(f"skip_modules is a list of names: write [{skip_modules!r}]")
        self.quant_method = QUANT_METHOD
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.map8, self.nested_block_size = map8, nested_block_size
        dtype = dtype_from_name(compute_dtype)
        self.compute_dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.checkpoint_format = checkpoint_format
        self.quant_config()  # refuses what cannot work

    def quant_config(self) -> QuantConfig:
        """The part that the core understands."""
        return QuantConfig(self.quant_type, self.block_size, self.double_quant, self.map8, self.nested_block_size)

    def torch_compute_dtype(self) -> torch.dtype | None:
        return dtype_from_name(self.compute_dtype)
