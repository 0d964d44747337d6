"""Cross-entropy in chunks of tokens: the logits of a whole batch are never in memory.

At 2048 tokens and a vocabulary of 128,256 the float32 logits are 1.0 GiB, and their gradient as much again: more than
the 4-bit weights of a small model. Only labelled positions go through the head; many of them `chunk` at a time, and
each chunk is computed again in the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside DDP, PEFT and others."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def chunked_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: Any, chunk: int, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """-log p of the labels, as `F.cross_entropy(head(hidden), labels)` would give it.

    hidden (tokens, width), labels (tokens,) already shifted, -100 ignored. head: width -> vocabulary. Returns the sum
    divided by `num_items`, by default the number of labels.
    """
    keep = labels != IGNORE
    hidden, labels = hidden[keep], labels[keep]
    total = hidden.sum(dtype=torch.float32) * 0.0  # in the graph even if no position is labelled

    def part(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(h).float(), y, reduction="sum")

    run = part if labels.numel() <= chunk else partial(checkpoint, part, use_reentrant=False)
    for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + run(h, y)
    return total / (max(labels.numel(), 1) if num_items is None else num_items)


class _ChunkedLoss:
    """Stands where the model has its loss function; knows the real head, which is the identity meanwhile."""

    def __init__(self, head: Any, chunk: int):
        self.head, self.chunk = head, chunk
        self.hidden: torch.Tensor | None = None
        self.called = False

    def identity(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        return hidden

    def __call__(self, logits, labels, vocab_size=None, num_items_in_batch=None, shift_labels=None, **kwargs):
        self.called = True
        if logits is not self.hidden:
            raise RuntimeError(
                "this model changes its logits after the output layer (soft-capping, scaling), which a chunked loss "
                "would miss; train it with chunk_tokens=None"
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return chunked_cross_entropy(logits.flatten(0, -2), targets, self.head, self.chunk, num_items_in_batch)


@contextmanager
def chunked_loss(model: nn.Module, chunk_tokens: int = 1024) -> Iterator[None]:
    """Within it, `model(..., labels=...)` computes its loss in chunks, and its `logits` are the hidden states.

    The forward pass stays the model's own (DDP, FSDP and PEFT wrappers work); only the output layer is postponed into
    the loss. Raises ValueError for a model without output layer, RuntimeError for one that alters its logits.
    """
    causal = _causal_lm(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None or getattr(causal.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(causal).__name__} computes its loss itself; train it with chunk_tokens=None")
    own_forward, own_loss = vars(head).get("forward"), vars(causal).get("_loss_function")
    loss = _ChunkedLoss(head.forward, chunk_tokens)
    try:
        head.forward, causal._loss_function = loss.identity, loss
        yield
    finally:
        for owner, name, value in ((head, "forward", own_forward), (causal, "_loss_function", own_loss)):
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
    if not loss.called:
        raise RuntimeError(f"{type(causal).__name__} has a loss of its own; train it with chunk_tokens=None")
