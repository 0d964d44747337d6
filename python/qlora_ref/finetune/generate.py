"""Answers from a model: the prompt rendered and tokenized exactly as in training, until the end token.

Sampling is transformers' `generate`; this file prepares the model for it (evaluation mode, cache on) and the text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .encode import prompt_ids
from .formats import Example
from .loading import is_checkpointing, keeps_products, pad_id, set_checkpointing


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens. temperature 0 is greedy; top_p and top_k cut the tail (top_k 0: no cut)."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        if self.temperature == 0:
            chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            chosen = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return {"max_new_tokens": self.max_new_tokens, **chosen}


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradient checkpointing (which would turn the cache off); both restored."""
    training, checkpointing, products = model.training, is_checkpointing(model), keeps_products(model)
    model.eval()
    if checkpointing:
        set_checkpointing(model, False)
    try:
        with torch.inference_mode():
            yield
    finally:
        if checkpointing:
            set_checkpointing(model, True, products)
        model.train(training)


def generate_ids(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    sampling: Sampling,
    streamer: Any = None,
    stop: Any = None,
) -> list[int]:
    """New token ids after `ids`, the end token left out. `streamer`, `stop`: transformers' own objects."""
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    device = next(model.parameters()).device
    input_ids = torch.tensor([ids], device=device)
    with inference(model):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id(tokenizer),
            use_cache=True,
            streamer=streamer,
            stopping_criteria=stop,
            **sampling.arguments(),
        )
    start = 1 if model.config.is_encoder_decoder else len(ids)
    new = out[0, start:].tolist()
    return new[:-1] if new and new[-1] == tokenizer.eos_token_id else new


def answer(model: Any, tokenizer: Any, messages: Example, template: str, sampling: Sampling) -> str:
    """The model's next turn in a conversation, as text."""
    ids = prompt_ids(messages, template, tokenizer)
    return tokenizer.decode(generate_ids(model, tokenizer, ids, sampling), skip_special_tokens=True).strip()
