"""MMLU by a causal language model: the logits of four letters at the last position of the prompt, batched.

Which token is "A"? The one the model would produce after "Answer:". Tokenizers disagree (a piece with a leading
blank, a blank of its own, a merged piece), so the four are found by tokenizing "Answer: A" in full and comparing;
what all four begin with is moved into the prompt, and the rest must differ.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from .local_model import max_positions
from .mmlu import LETTERS, SHOTS, MMLUItem, MMLUScore, score

LONGEST_PROMPT = 2048  # upstream's mmlu_source_max_len
SPACINGS = {"space": " ", "bare": ""}  # " A" or "A" after "Answer:"
AUTO = "auto"  # the first of them that gives four distinct tokens


@dataclass(frozen=True)
class LetterTokens:
    """`ids`: four distinct token ids; `lead`: ids that come between "Answer:" and every letter."""

    ids: tuple[int, ...]
    lead: tuple[int, ...]
    pieces: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{a}={p!r} ({i})" for a, p, i in zip(LETTERS, self.pieces, self.ids, strict=True))
        return shown + (f" after the tokens {list(self.lead)}" if self.lead else "")


def letter_tokens(tokenizer: Any, spacing: str = AUTO) -> LetterTokens:
    """The tokens by which the model says A, B, C, D after "Answer:". Raises ValueError when they are not distinct."""
    if spacing != AUTO:
        return _letter_tokens(tokenizer, spacing)
    try:
        return _letter_tokens(tokenizer, "space")
    except ValueError:
        return _letter_tokens(tokenizer, "bare")


def _letter_tokens(tokenizer: Any, spacing: str) -> LetterTokens:
    stem = _plain_ids(tokenizer, "Answer:")
    tails = []
    for letter in LETTERS:
        ids = _plain_ids(tokenizer, f"Answer:{SPACINGS[spacing]}{letter}")
        if ids[: len(stem)] != stem or len(ids) == len(stem):
            raise ValueError(f"this tokenizer merges 'Answer:' with the letter ({spacing}); try the other --letters.")
        tails.append(ids[len(stem) :])
    lead: list[int] = []
    while len({tail[0] for tail in tails}) == 1 and all(len(tail) > 1 for tail in tails):
        lead.append(tails[0][0])
        tails = [tail[1:] for tail in tails]
    chosen = tuple(tail[0] for tail in tails)
    if len(set(chosen)) != 4:
        raise ValueError(f"the four letters are not four tokens in this tokenizer ({chosen}, {spacing}).")
    return LetterTokens(chosen, tuple(lead), tuple(tokenizer.convert_ids_to_tokens(list(chosen))))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class LetterScorer:
    """Scores MMLU items with a model on whatever device it is.

    max_length: longest prompt in tokens (default: 2048 or the model's positions, whichever is less). A prompt that is
    too long loses solved examples first and, when there are none left, its beginning; `shortened` and `cut` count.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 8, max_length: int | None = None, spacing: str = AUTO
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = max_length or min(LONGEST_PROMPT, max_positions(model) or LONGEST_PROMPT)
        self.letters = letter_tokens(tokenizer, spacing)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._can_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
        special = list(tokenizer("Answer:")["input_ids"])
        self._bos = special[:1] if special[:1] == [tokenizer.bos_token_id] else []
        self.shortened = self.cut = 0

    def encode(self, item: MMLUItem) -> list[int]:
        """Prompt ids, at most max_length, with the beginning token where the tokenizer uses one."""
        most = min(SHOTS, len(item.shots))
        for n_shots in range(most, -1, -1):
            ids = self._bos + _plain_ids(self.tokenizer, item.prompt(n_shots)) + list(self.letters.lead)
            if len(ids) <= self.max_length:
                self.shortened += n_shots < most
                return ids
        self.cut += 1
        return self._bos + ids[len(ids) - self.max_length + len(self._bos) :]

    def logits(self, items: list[MMLUItem]) -> np.ndarray:
        """(n, 4) float32: the logits of A, B, C, D for every item. Long prompts go first, so memory fails early."""
        import torch

        self.shortened = self.cut = 0
        encoded = [self.encode(item) for item in items]
        order = sorted(range(len(items)), key=lambda i: -len(encoded[i]))
        out = np.empty((len(items), len(LETTERS)), dtype=np.float32)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for start in range(0, len(order), self.batch_size):
                    batch = order[start : start + self.batch_size]
                    out[batch] = self._batch_logits([encoded[i] for i in batch])
        finally:
            self.model.train(was_training)
        return out

    def _batch_logits(self, rows: list[list[int]]) -> np.ndarray:
        """Padding is on the right: a causal model never sees it, and positions need no correction."""
        import torch

        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = (torch.arange(width) < lengths[:, None]).long()
        # Only the positions that end some prompt go through the output layer.
        last, column = torch.unique(lengths - 1, return_inverse=True)
        device = next(self.model.parameters()).device
        keep = {"logits_to_keep": last.to(device)} if self._can_keep else {}
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), **keep).logits
        if not self._can_keep:
            logits = logits[:, last.to(device)]
        picked = logits[torch.arange(len(rows)), column.to(device)][:, list(self.letters.ids)].float().cpu()
        if not torch.isfinite(picked).all():
            raise RuntimeError("the model gave logits that are not finite; an answer cannot be read from them.")
        return picked.numpy()


def evaluate_mmlu(scorer: LetterScorer, items: list[MMLUItem]) -> tuple[MMLUScore, float]:
    """(score, mean negative log-likelihood in nats of the right letter among the four)."""
    logits = scorer.logits(items).astype(np.float64)
    gold = np.array([item.gold for item in items])
    top = logits.max(axis=1)
    log_norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    nll = float((log_norm - logits[np.arange(len(items)), gold]).mean())
    return score(items, logits.argmax(axis=1)), nll
