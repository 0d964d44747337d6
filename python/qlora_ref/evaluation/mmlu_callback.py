"""MMLU during training: a transformers callback that adds the accuracies to every evaluation.

    trainer.add_callback(MMLUCallback(read_mmlu("mmlu.zip", "val"), tokenizer, split="eval"))

Metric names are upstream's: `mmlu_{split}_accuracy` (macro), `mmlu_{split}_accuracy_{subject}`.
"""

from typing import Any

from transformers import TrainerCallback

from .mmlu import MMLUItem
from .mmlu_model import LetterScorer, evaluate_mmlu


class MMLUCallback(TrainerCallback):
    """After each `Trainer.evaluate`: scores `items`, adds to its metrics and to the log history.

    items: see `mmlu.read_mmlu`. split: the word in the metric names. batch_size, max_length: see `LetterScorer`.
    """

    def __init__(
        self,
        items: list[MMLUItem],
        tokenizer: Any,
        split: str = "eval",
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        self.items, self.tokenizer, self.split = items, tokenizer, split
        self.batch_size, self.max_length = batch_size, max_length

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        scorer = LetterScorer(model, self.tokenizer, self.batch_size, self.max_length)
        score, nll = evaluate_mmlu(scorer, self.items)
        found = score.metrics(self.split) | {f"mmlu_{self.split}_nll": nll}
        if metrics is not None:
            metrics.update(found)
        state.log_history.append({"step": state.global_step, "epoch": state.epoch, **found})
