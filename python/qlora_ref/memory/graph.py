"""The module graph that is traced and measured: transformers' model, quantized and adapted by this package.

transformers is imported here, lazily, and only for its model code: no hub, no weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import checkpointing, ops
from ..nn import attach_lora, quantize_model
from ..quantized import QuantConfig
from .architecture import Architecture
from .settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FUSED, EAGER = "qlora_traced_fused", "qlora_traced_eager"


@dataclass
class Graph:
    """A model ready to train, and the modules whose borders name the phases of a step."""

    model: nn.Module
    layers: list[nn.Module]
    head: nn.Module
    architecture: Architecture


class Flash(torch.autograd.Function):
    """Allocates what a flash attention kernel allocates: (b, n, s, d) output, fp32 log-sum-exp, three gradients."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash(module, query, key, value, attention_mask, **_):
    with checkpointing.attention():
        return Flash.apply(query, key, value).transpose(1, 2), None


def _eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout)


def register_attention() -> None:
    """Attention functions of our own: with a fake or meta tensor, transformers' own would take another path than in
    training (a materialized mask, repeated keys, no flash). The names must not contain "flash"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(FUSED, _flash)
    AttentionMaskInterface.register(FUSED, lambda *args, **kwargs: None)
    AttentionInterface.register(EAGER, _eager)
    AttentionMaskInterface.register(EAGER, lambda *args, **kwargs: None)


def materialize(model: nn.Module, device: str, seed: int = 0) -> None:
    """Give a meta model random weights on `device`, tensor by tensor: a 65B model in 4 bits never exists in 16.

    Packed bytes are uniform, statistics those of small weights, norms one, biases and lora_B zero.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, meta in list(model.named_parameters()):
        leaf = name.rpartition(".")[2]
        data = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        _randomize(leaf, data, generator)
        _set_everywhere(model, meta, nn.Parameter(data, requires_grad=meta.requires_grad))
    for name, module in list(model.named_modules()):
        if any(buffer.device.type == "meta" for buffer in module._buffers.values()):
            if not name.endswith("rotary_emb"):
                raise ValueError(f"{name} has buffers of its own; only models with rotary tables can be measured.")
            parent, _, leaf = name.rpartition(".")
            with torch.device(device):
                setattr(model.get_submodule(parent), leaf, type(module)(config=module.config))


def _randomize(leaf: str, data: torch.Tensor, generator: torch.Generator) -> None:
    if leaf in ("absmax", "nested_absmax", "absmax_mean"):
        data.view(-1).view(torch.float32).fill_(0.05)
    elif data.dtype == torch.uint8:
        data.random_(0, 256, generator=generator)
    elif leaf in ("lora_B", "bias"):
        data.zero_()
    elif data.dim() == 1:
        data.fill_(1)
    else:
        data.normal_(0, 0.02, generator=generator)


def _set_everywhere(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` wherever `old` is registered (a tied weight is registered twice)."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def build(
    config: dict, architecture: Architecture, settings: Settings, device: str = "meta", attention: str = ""
) -> Graph:
    """The training graph of a Hugging Face config dictionary under `settings`, on `device`, with random weights.

    On "meta" nothing is allocated. Elsewhere the 4-bit bytes are made directly: no 16-bit weight ever exists.
    """
    register_attention()
    model: Any = _load(
        config, architecture, settings, device, attention or {"flash": FUSED, "eager": EAGER}[settings.attention]
    )
    model.train()
    if settings.checkpointing:
        from ..hf.checkpointing import enable

        enable(model, settings.keep_products)
    return Graph(model, list(model.model.layers), model.lm_head, architecture)


def _load(config: dict, architecture: Architecture, settings: Settings, device: str, attention: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    hf = AutoConfig.for_model(fields.pop("model_type"), **fields)
    dtype = DTYPES[settings.weights if settings.weights in DTYPES else settings.compute_dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation=attention)
    model = _train(model, architecture, settings)
    if device != "meta":
        materialize(model, device)
    return model


def _train(model: nn.Module, architecture: Architecture, settings: Settings) -> nn.Module:
    """Quantize, adapt and cast as `settings` say."""
    if settings.train == "full":
        return model
    compute = DTYPES[settings.compute_dtype]
    if settings.quantized:
        quantize_model(model, quant_config(settings), compute_dtype=compute)
        cast_unquantized(model, DTYPES[settings.embedding_dtype])
    attach_lora(
        model,
        settings.rank,
        target_modules=settings.target_names(architecture),
        dropout=settings.dropout,
        dtype=DTYPES[settings.adapter_dtype],
    )
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), nn.Dropout):
            module.dropout = MaskedDropout(settings.dropout)
    return model


class MaskedDropout(nn.Dropout):
    """Dropout as on CUDA: a mask of one byte an element (on CPU and meta, torch saves it in the input's type)."""

    def forward(self, x):
        return torch.native_dropout(x, self.p, self.training)[0] if self.p else x


def quant_config(settings: Settings) -> QuantConfig:
    return QuantConfig(
        settings.weights, settings.block_size, settings.double_quant, nested_block_size=settings.nested_block_size
    )


def cast_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Embeddings, head, norms and biases to `dtype`, as PEFT's `prepare_model_for_kbit_training` does."""
    for parameter in model.parameters():
        if parameter.dtype != torch.uint8:
            parameter.data = parameter.data.to(dtype)


def expansions() -> dict:
    """The fused operators opened up into what their reference allocates: the dequantized weight and the LoRA products.

    On meta tensors a fused operator shows only its outputs. Dequantization stays one operator: its output is W'.
    """
    qlora = torch.ops.qlora_ref
    weight = ops._WEIGHT_ARGS

    def linear_4bit(x, *args):
        out_features, bias = args[weight:]
        w = qlora.dequantize_4bit(*args[:weight], (out_features, x.shape[-1]), x.dtype)
        return nn.functional.linear(x, w, bias)

    def linear_4bit_backward(dy, *args):
        return dy @ qlora.dequantize_4bit(*args[:weight], (dy.shape[-1], args[weight]), dy.dtype)

    return {
        qlora.linear_4bit.default: linear_4bit,
        qlora.linear_4bit_backward.default: linear_4bit_backward,
        qlora.lora_linear_4bit.default: ops._REFERENCE["lora_linear_4bit"],
        qlora.lora_linear_4bit_backward.default: ops._REFERENCE["lora_linear_4bit_backward"],
    }
