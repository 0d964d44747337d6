"""Perplexity of a causal language model on a text: exp of the mean negative log-likelihood per token.

The text is tokenized once. Windows of `window` tokens slide over it; each begins with `context` tokens that were
scored before and only give context, so every token but the first is scored exactly once.
Perplexities compare only between models with the same tokenizer; bits per byte compare across tokenizers.
"""

import math
from dataclasses import dataclass
from typing import Any

from .local_model import max_positions


@dataclass(frozen=True)
class Perplexity:
    """perplexity per scored token, mean NLL in nats, counts, and bits per byte of UTF-8 text."""

    perplexity: float
    nll: float
    n_scored: int
    bits_per_byte: float
    window: int
    context: int


def perplexity(
    model: Any, tokenizer: Any, text: str, window: int | None = None, context: int | None = None, batch_size: int = 4
) -> Perplexity:
    """Perplexity of `text`. window: default the model's positions, at most 2048. context: default half the window.

    Raises ValueError for a text of fewer than two tokens, and when not 1 <= context < window.
    """
    import torch

    limit = max_positions(model)
    window = window or min(2048, limit or 2048)
    context = window // 2 if context is None else context
    if not 1 <= context < window or (limit and window > limit):
        raise ValueError(f"need 1 <= context < window <= {limit or 'any'}; got context {context}, window {window}.")
    # One long sequence on purpose: the tokenizer's warning about the model's length does not apply to windows.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise ValueError("the text has fewer than two tokens; there is nothing to predict.")
    total, count = 0.0, 0
    starts = list(_windows(len(ids), window, context))
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(starts), batch_size):
            nll, n = _score(model, ids, starts[at : at + batch_size])
            total, count = total + nll, count + n
    model.train(was_training)
    mean = total / count
    if not math.isfinite(mean):
        raise RuntimeError("the likelihood is not finite; the model gave nan or inf.")
    bits = total / math.log(2) / len(text.encode("utf-8"))
    return Perplexity(math.exp(mean), mean, count, bits, window, context)


def _windows(n: int, window: int, context: int):
    """(begin, first scored, end) such that the tokens 1..n-1 are scored once each."""
    begin, first = 0, 1
    while first < n:
        end = min(begin + window, n)
        yield begin, first, end
        begin, first = end - context, end


def _score(model: Any, ids: Any, windows: list[tuple[int, int, int]]) -> tuple[float, int]:
    """Summed NLL (float64) and number of the scored tokens of these windows, as one batch padded on the right."""
    import torch

    device = next(model.parameters()).device
    width = max(end - begin for begin, _, end in windows)
    batch = torch.zeros(len(windows), width, dtype=torch.long)
    target = torch.full((len(windows), width), -100)
    mask = torch.zeros(len(windows), width, dtype=torch.long)
    for row, (begin, first, end) in enumerate(windows):
        batch[row, : end - begin] = ids[begin:end]
        mask[row, : end - begin] = 1
        target[row, first - begin : end - begin] = ids[first:end]
    logits = model(input_ids=batch.to(device), attention_mask=mask.to(device)).logits[:, :-1].float()
    target = target[:, 1:].to(device)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
    return nll.double().sum().item(), int((target != -100).sum())
