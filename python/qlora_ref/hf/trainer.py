"""transformers' Trainer with the paged optimizer and the chunked loss. Everything else is Trainer's."""

# ruff: noqa: E402  (a missing package is one sentence, raised before anything is imported from it)

from typing import Any

import torch
from torch import nn

from ..optim import PagedAdamW
from .loss import chunked_loss
from .versions import require

require("accelerate", "qlora_ref.hf.trainer")

from transformers import Trainer, TrainingArguments


def paged_adamw(args: TrainingArguments, bits: int = 32, **kwargs: Any) -> tuple[type, dict[str, Any]]:
    """What to pass as `optimizer_cls_and_kwargs` to Trainer, SFTTrainer and their relatives.

    bits: 32 or 8. kwargs: of `PagedAdamW` (paging, pool_bytes). Weight decay reaches it through Trainer's own groups.
    """
    betas = (args.adam_beta1, args.adam_beta2)
    return PagedAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "bits": bits, **kwargs}


class QLoraTrainer(Trainer):
    """`Trainer(model, args, ...)` whose defaults are QLoRA's.

    optimizer_bits   32 or 8: moments of PagedAdamW. Passing `optimizers` or `optimizer_cls_and_kwargs` overrides it
    chunk_tokens     positions that go through the output layer at once; None computes all logits, as Trainer does
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        optimizer_bits: int = 32,
        chunk_tokens: int | None = 1024,
        **kwargs: Any,
    ):
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("nothing to train: attach an adapter first, model = qlora_ref.hf.attach(model)")
        if kwargs.get("optimizers", (None, None))[0] is None and kwargs.get("optimizer_cls_and_kwargs") is None:
            kwargs["optimizer_cls_and_kwargs"] = paged_adamw(args, optimizer_bits)
        self.chunk_tokens = chunk_tokens
        super().__init__(model, args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        plain = super().compute_loss
        if self.chunk_tokens is None or return_outputs or "labels" not in inputs:
            return plain(model, inputs, return_outputs, num_items_in_batch)
        with chunked_loss(model, self.chunk_tokens):
            return plain(model, inputs, False, num_items_in_batch)
