"""The loss: cross-entropy summed over the tokens that carry it, logits computed only where it is needed."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from .batches import IGNORE

CHUNK = 512  # positions whose logits exist at a time
PLAIN_HEAD = ("llama", "mistral", "qwen2", "qwen3")  # logits = lm_head(hidden), nothing between or after


def summed_loss(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """(sum of -log p over labelled tokens in float32, how many there are) of one micro-batch.

    The token at position p + 1 is predicted from position p. With a vocabulary of 128,000 the logits of all positions
    would be the largest tensor of the run. Where the output layer is a plain matrix only labelled positions go through
    it, if they are many CHUNK at a time, recomputed in the backward pass; elsewhere positions that some row needs.
    """
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if model.config.is_encoder_decoder:
        logits, targets = model(**inputs, labels=labels, use_cache=False).logits, labels
    else:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if model.config.model_type in PLAIN_HEAD:
            return _of_labelled(model, inputs, targets)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            keep = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
            inputs["logits_to_keep"], targets = keep, targets[:, keep]
        logits = model(**inputs, use_cache=False).logits
    count = int((targets != IGNORE).sum())
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, count


def _of_labelled(model: Any, inputs: dict[str, Any], targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same sum from the logits of labelled positions, at most CHUNK at a time."""
    from ..hf.loss import chunked_cross_entropy

    hidden, targets = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1), targets.flatten()
    total = chunked_cross_entropy(hidden, targets, model.lm_head, CHUNK, num_items=1)
    return total, int((targets != IGNORE).sum())


@torch.no_grad()
def mean_loss(model: Any, batches: list[dict[str, Any]]) -> float:
    """Mean -log p per labelled token (nats) over all batches, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        total, count = 0.0, 0
        for batch in batches:
            loss, n = summed_loss(model, batch)
            total, count = total + loss.double().item(), count + n
    finally:
        model.train(was_training)
    return total / max(count, 1)


def first_nonfinite(model: Any, batch: dict[str, Any]) -> str:
    """Run the batch again and name the first module whose output is not finite, or the gradient that is not."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            summed_loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the output of {found[0]}"
    for name, p in model.named_parameters():
        if p.grad is not None and not torch.isfinite(p.grad).all():
            return f"the gradient of {name}"
    return "the loss"
