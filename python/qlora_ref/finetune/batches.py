"""Which examples make which step: a pure function of the seed, so a resumed run needs no saved state to go on.

An epoch is a list of optimizer steps; a step a list of micro-batches; a micro-batch a list of rows; a row a list of
example numbers (one, unless packed).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .config import TrainConfig
from .encode import Dataset

IGNORE = -100
Row = list[int]
Step = list[list[Row]]


def _shuffled(n: int, *seeds: int) -> list[int]:
    return np.random.default_rng(seeds).permutation(n).tolist()


def split(n: int, eval_size: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) example numbers; `eval_size` is a fraction below 1 or a count; at least one stays."""
    held = round(n * eval_size) if eval_size < 1 else int(eval_size)
    held = min(max(held, 1 if eval_size > 0 else 0), n - 1)
    order = _shuffled(n, seed, 1)
    return sorted(order[held:]), sorted(order[:held])


def pack(lengths: Sequence[int], limit: int) -> list[Row]:
    """First fit, longest first: rows of at most `limit` tokens. Returns positions in `lengths`."""
    rows: list[Row] = []
    room: list[int] = []
    open_from = 0  # rows before it are too full for the longest example left
    shortest = min(lengths, default=0)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = min(lengths[i], limit)
        for r in range(open_from, len(rows)):
            if room[r] >= size:
                break
        else:
            rows.append([])
            room.append(limit)
            r = len(rows) - 1
        rows[r].append(i)
        room[r] -= size
        while open_from < len(rows) and room[open_from] < shortest:
            open_from += 1
    return rows


class Plan:
    """The order of a whole run. `step(i)` are the micro-batches of optimizer step i (from 0)."""

    def __init__(self, data: Dataset, examples: Sequence[int], config: TrainConfig):
        self.config = config
        self.lengths = {i: data.length(i) for i in examples}
        if config.packing:
            packed = pack([self.lengths[i] for i in examples], config.max_length)
            self.rows: list[Row] = [[examples[k] for k in row] for row in packed]
        else:
            self.rows = [[i] for i in examples]
        per_step = config.batch_size * config.grad_accum
        self.steps_per_epoch = -(-len(self.rows) // per_step)
        self.total_steps = config.max_steps or max(1, round(config.epochs * self.steps_per_epoch))
        self._epoch: tuple[int, list[Step]] = (-1, [])

    def epoch(self, number: int) -> list[Step]:
        c = self.config
        order = _shuffled(len(self.rows), c.seed, 2, number)
        batches = [order[i : i + c.batch_size] for i in range(0, len(order), c.batch_size)]
        if c.group_by_length:
            batches = self._grouped(order, number)
        rows = [[self.rows[r] for r in batch] for batch in batches]
        return [rows[i : i + c.grad_accum] for i in range(0, len(rows), c.grad_accum)]

    def _grouped(self, order: list[int], number: int) -> list[list[int]]:
        """Sort by length inside windows of 50 batches, cut into batches, shuffle the batches."""
        size, window = self.config.batch_size, 50 * self.config.batch_size
        batches = []
        for i in range(0, len(order), window):
            part = sorted(order[i : i + window], key=lambda r: self.lengths[self.rows[r][0]])
            batches += [part[k : k + size] for k in range(0, len(part), size)]
        return [batches[k] for k in _shuffled(len(batches), self.config.seed, 3, number)]

    def step(self, i: int) -> Step:
        number, offset = divmod(i, self.steps_per_epoch)
        if self._epoch[0] != number:
            self._epoch = (number, self.epoch(number))
        return self._epoch[1][offset]


def collate(data: Dataset, rows: list[Row], pad: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Tensors of one micro-batch, right-padded: `input_ids`, `labels` (IGNORE where no loss), (batch, length) int64.

    One example a row: plus `attention_mask`. Packed rows: plus `position_ids` that start again at every example, from
    which the model builds a mask that is causal inside an example and blind across; padding is an example of its own.
    """
    if data.seq2seq:
        return {k: v.to(device, non_blocking=True) for k, v in _collate_seq2seq(data, rows, pad).items()}
    packed = any(len(row) > 1 for row in rows)
    width = max(sum(data.length(i) for i in row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORE)
    mask, position = torch.zeros_like(ids), torch.arange(width).repeat(len(rows), 1)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            tokens, answer = (torch.tensor(a, dtype=torch.long) for a in data[i])
            end = at + len(tokens)
            ids[r, at:end], mask[r, at:end] = tokens, 1
            labels[r, at:end] = torch.where(answer.bool(), tokens, IGNORE)
            labels[r, at] = IGNORE
            position[r, at:] = torch.arange(width - at)
            at = end
        position[r, at:] = torch.arange(width - at)
    batch = {"input_ids": ids, "labels": labels}
    batch |= {"position_ids": position} if packed else {"attention_mask": mask}
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def _collate_seq2seq(data: Dataset, rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of the prompts, `labels` of the answers; each padded to its own width."""
    pairs = []
    for (i,) in rows:
        tokens, answer = data[i]
        start = answer.index(1)
        pairs.append((tokens[:start], tokens[start:]))
    source, target = (max(len(pair[k]) for pair in pairs) for k in (0, 1))
    ids, mask = torch.full((len(rows), source), pad), torch.zeros(len(rows), source, dtype=torch.long)
    labels = torch.full((len(rows), target), IGNORE)
    for r, (prompt, reply) in enumerate(pairs):
        ids[r, : len(prompt)], mask[r, : len(prompt)] = torch.tensor(prompt, dtype=torch.long), 1
        labels[r, : len(reply)] = torch.tensor(reply, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
