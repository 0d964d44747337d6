"""Answers to be judged, with the paper's sampling (nucleus 0.9, temperature 0.7), resumable question by question.

Each question has a random seed of its own, made from the run's seed and its id, so an interrupted run, a longer
question file or another order gives the same answers. Rows follow the published files: `generation` is all that
was written; where the model went on into an invented next turn, `generation_truncated` is what counts.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .answers import Question
from .endpoint import CallFailed, Endpoint
from .judging import ask_all
from .ledger import Ledger
from .records import BadInput, item_of

TEMPLATES = {"guanaco": "### Human: {question}\n### Assistant:", "plain": "{question}"}
CHAT = "chat"  # the tokenizer's own chat template
NEXT_TURN = "### Human:"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy."""

    top_p: float = 0.9
    temperature: float = 0.7
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.top_p <= 1 and self.temperature >= 0 and self.max_new_tokens > 0):
            raise ValueError(f"sampling needs 0 < top_p <= 1, temperature >= 0, max_new_tokens > 0; got {self}.")

    def seed_for(self, item: int | str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{item}".encode()).digest()[:4], "big")


Generator = Callable[[Question], str]


def fill(template: str, question: str) -> str:
    """The prompt of `question`; `template` is a name of TEMPLATES or a text holding {question}."""
    text = TEMPLATES.get(template, template)
    if "{question}" not in text:
        raise ValueError(
            f"template {template!r}: use {', '.join([*TEMPLATES, CHAT])}, or a text that holds {{question}}."
        )
    return text.replace("{question}", question)


def local_generator(model: Any, tokenizer: Any, template: str, sampling: Sampling) -> Generator:
    """Draws with a transformers model; the answer ends at the end token or before an invented next turn."""
    import torch

    def prompt_ids(question: Question) -> Any:
        if template != CHAT:
            return tokenizer(fill(template, question.text), return_tensors="pt")
        turns = [{"role": "user", "content": question.text}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def generate(question: Question) -> str:
        inputs = {
            k: v.to(model.device) for k, v in prompt_ids(question).items() if k in ("input_ids", "attention_mask")
        }
        length = inputs["input_ids"].shape[1]
        drawn = {"do_sample": True, "top_p": sampling.top_p, "temperature": sampling.temperature, "top_k": 0}
        greedy = {"do_sample": False, "top_p": None, "temperature": None, "top_k": None}
        cuda = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.inference_mode():
            torch.manual_seed(sampling.seed_for(question.item))
            ids = model.generate(
                **inputs,
                **(drawn if sampling.temperature > 0 else greedy),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[lambda ids, scores, **_: _begins_next_turn(tokenizer, ids, length)],
            )
        return tokenizer.decode(ids[0, length:], skip_special_tokens=True)

    return generate


def _begins_next_turn(tokenizer: Any, ids: Any, length: int) -> Any:
    """(1,) bool: the last tokens of the answer spell the beginning of another question. No token is that long."""
    import torch

    tail = ids[0, max(length, ids.shape[1] - len(NEXT_TURN)) :]
    return torch.tensor([NEXT_TURN in tokenizer.decode(tail)], device=ids.device)


def endpoint_generator(endpoint: Endpoint, sampling: Sampling) -> Generator:
    """Draws from a chat endpoint; the server gets the seed, and whether it honours it is its own affair."""

    def generate(question: Question) -> str:
        return endpoint.chat(
            [{"role": "user", "content": question.text}],
            top_p=sampling.top_p,
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed_for(question.item),
        ).text

    return generate


def generation_row(question: Question, text: str) -> dict[str, Any]:
    row: dict[str, Any] = {question.key: question.item, "generation": text}
    judged = text.split(NEXT_TURN)[0].strip()
    return row if judged == text else row | {"generation_truncated": judged}


def run(
    questions: dict[int | str, Question],
    generator: Generator,
    out: str | Path,
    source: dict[str, Any],
    sampling: Sampling,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, left: None,
) -> tuple[int, int, list[str]]:
    """Answers what `out` does not hold yet; returns (new, already there, failures as sentences).

    source: what made the answers (model, adapter, template ...); with the sampling and the questions it must be the
    same when a run is resumed.
    """
    texts = hashlib.sha256(json.dumps([[i, q.text] for i, q in questions.items()]).encode()).hexdigest()
    settings = source | asdict(sampling) | {"questions_sha256": texts}
    failures: list[str] = []
    with Ledger(out, settings, lambda row: item_of({**row, "_where": "row"})) as ledger:
        unknown = ledger.keys - set(questions)
        if unknown:
            raise BadInput(f"{out} answers questions that are not asked, such as {sorted(map(str, unknown))[0]}.")
        todo = [question for item, question in questions.items() if item not in ledger.keys]
        new = 0

        def store(question: Question, text: str) -> None:
            nonlocal new
            ledger.append(generation_row(question, text))
            new += 1
            progress(new, len(todo) - new - len(failures))

        def fail(question: Question, error: CallFailed) -> None:
            failures.append(f"{question.item}: {error}")

        ask_all(generator, todo, workers, store, fail)
        return new, len(questions) - len(todo), failures
