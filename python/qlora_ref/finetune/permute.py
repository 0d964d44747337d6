"""The same function from differently arranged weights: the channels of a Llama permuted consistently.

Quantization error is fixed for a checkpoint, so fine-tuning seeds do not resample it, and a comparison of data types on
one checkpoint has one draw of the noise. A permutation of channels changes which weights share a block, hence the
noise, while the 16-bit model computes what it did (sums in another order). Permuted are:

    residual channels     columns of the embedding, of q, k, v, gate, up and the output layer; rows of o and down; norms
    hidden units          rows of gate and up, columns of down
    value dimensions      rows of v within a head, columns of o within every query head that reads it

Query and key dimensions stay: rotary embeddings tie each to its frequency.
"""

from typing import Any

import torch


def permute_llama(model: Any, seed: int) -> None:
    """Permute a transformers Llama (or one of the same shape: Mistral, Qwen2) in place. ValueError for other models."""
    if getattr(model.config, "model_type", "") not in ("llama", "mistral", "qwen2"):
        raise ValueError(f"only Llama-shaped models can be permuted, not {model.config.model_type}")
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        return torch.randperm(n, generator=generator)

    c = model.config
    residual = draw(c.hidden_size)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    with torch.no_grad():
        _columns(model.model.embed_tokens, residual)
        if model.lm_head.weight is not model.model.embed_tokens.weight:
            _columns(model.lm_head, residual)
        _rows(model.model.norm, residual)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                _rows(norm, residual)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                _columns(linear, residual)
            for linear in (attention.o_proj, mlp.down_proj):
                _rows(linear, residual)
            hidden = draw(c.intermediate_size)
            _rows(mlp.gate_proj, hidden)
            _rows(mlp.up_proj, hidden)
            _columns(mlp.down_proj, hidden)
            values = [draw(head) for _ in range(c.num_key_value_heads)]
            _rows(attention.v_proj, torch.cat([k * head + v for k, v in enumerate(values)]))
            group = c.num_attention_heads // c.num_key_value_heads
            order = [q * head + values[q // group] for q in range(c.num_attention_heads)]
            _columns(attention.o_proj, torch.cat(order))


def _rows(module: Any, order: torch.Tensor) -> None:
    module.weight.copy_(module.weight[order].clone())
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(module.bias[order].clone())


def _columns(module: Any, order: torch.Tensor) -> None:
    module.weight.copy_(module.weight[:, order].clone())
