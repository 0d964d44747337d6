"""Checkpointing of transformers' models: its arguments, and attention that can be kept."""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import checkpointing


# the second name: transformers before the renaming
def enable(model: Any, products: bool = False) -> None:
    """Switch it on, with these `arguments`."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch(arguments(products))


def disable(model: Any) -> None:
    switch = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    switch()


def arguments(products: bool = False) -> dict[str, Any]:
    """What a model's own method takes: the non-reentrant kind (the other loses gradients of frozen inputs).

    `products`: keep the outputs of 4-bit layers and of attention (qlora_ref/checkpointing.py).
    """
    if not products:
        return {"use_reentrant": False}
    keep_attention()
    return {"use_reentrant": False, "context_fn": checkpointing.keep_products}


def keep_attention() -> None:
    """Put transformers' "sdpa" within `checkpointing.attention`. Where no products are kept, that does nothing.

    The name stays, because models, masks and users ask for it. Other kinds of attention are computed again.
    """
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if hasattr(inner, "keeps"):
        return

    @functools.wraps(inner)
    def sdpa(module, query, key, value, attention_mask, dropout=0.0, **more):
        with nullcontext() if torch.compiler.is_compiling() else checkpointing.attention(dropout):
            return inner(module, query, key, value, attention_mask, dropout=dropout, **more)

    sdpa.keeps = True  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", sdpa)
