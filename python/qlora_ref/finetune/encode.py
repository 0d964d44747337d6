"""Text becomes token ids and a loss mask, by position: never by comparing ids, so a pad token equal to EOS is harmless.

Pieces are tokenized one by one and joined: the prompt's ids are then the same in training and in generation. Cutting
takes the prompt first, from its start (the words next to the answer stay), then the end of the answer; the last token
of an answer stays the end token.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..cli import UserError
from .config import TrainConfig
from .files import read_rows
from .formats import Example, Format, detect, examples_of, get_format
from .prompts import Piece, render


@dataclass(frozen=True)
class Encoded:
    """`ids` and, for each, whether it carries loss (`answer`)."""

    ids: list[int]
    answer: list[bool]
    cut: bool = False


def bos_ids(tokenizer: Any) -> list[int]:
    """[bos] if this tokenizer itself begins a text with it (Llama), else [] (GPT-2, Qwen)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _ids(tokenizer: Any, piece: Piece) -> list[int]:
    """Ids of one piece. Outside a chat template a special token spelled out in the text is text, not a token."""
    return tokenizer(piece.text, add_special_tokens=False, split_special_tokens=not piece.markup).input_ids


def encode(pieces: list[Piece], tokenizer: Any, config: TrainConfig, seq2seq: bool = False) -> Encoded:
    """Pieces -> ids and mask, cut to the lengths of `config`. A conversation ends with EOS, which carries loss.

    seq2seq: the prompt is the encoder's input and ends with an EOS of its own, without loss.
    """
    eos = tokenizer.eos_token_id
    ids: list[int] = [] if pieces[0].markup else bos_ids(tokenizer)
    answer = [False] * len(ids)
    for piece in pieces:
        new = _ids(tokenizer, piece)
        if piece.answer and (piece.end or (piece is pieces[-1] and eos not in new)):
            new = [*new, eos]
        ids += new
        answer += [piece.answer] * len(new)
    if seq2seq and True in answer:
        start = answer.index(True)
        ids, answer = [*ids[:start], eos, *ids[start:]], [*answer[:start], False, *answer[start:]]
    if config.loss_on == "all":
        answer = [i > 0 for i in range(len(ids))]
    return _cut(ids, answer, eos, config)


def _cut(ids: list[int], answer: list[bool], eos: int, config: TrainConfig) -> Encoded:
    source = answer.index(True) if True in answer else len(ids)
    target = len(ids) - source
    target_keep = min(target, config.target_max_length or target, config.max_length - 1)
    source_keep = min(source, config.source_max_length or source, config.max_length - target_keep)
    if (source_keep, target_keep) == (source, target):
        return Encoded(ids, answer)
    head = min(1, source_keep)  # the first token (BOS) stays
    prompt = ids[:head] + ids[source - source_keep + head : source]
    rest, mask = ids[source : source + target_keep], answer[source : source + target_keep]
    if target_keep < target:
        rest[-1], mask[-1] = eos, True
    return Encoded(prompt + rest, [False] * source_keep + mask, True)


def prompt_ids(messages: Example, template: str, tokenizer: Any) -> list[int]:
    """Ids of the prompt that asks for the next answer: exactly the unmasked part of a training example."""
    pieces = render(messages, template, tokenizer)
    ids = [] if pieces[0].markup else bos_ids(tokenizer)
    for piece in pieces:
        ids += _ids(tokenizer, piece)
        ids += [tokenizer.eos_token_id] if piece.end else []
    return ids


@dataclass
class Dataset:
    """Encoded examples in two flat arrays (5 bytes a token; the text is not kept), and what happened on the way."""

    ids: array = field(default_factory=lambda: array("i"))
    answer: array = field(default_factory=lambda: array("b"))
    starts: list[int] = field(default_factory=lambda: [0])
    rows: int = 0
    no_answer: int = 0
    cut: int = 0
    seq2seq: bool = False

    def add(self, example: Encoded) -> None:
        self.ids.extend(example.ids)
        self.answer.extend(example.answer)
        self.starts.append(len(self.ids))
        self.cut += example.cut

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[array, array]:
        a, b = self.starts[i], self.starts[i + 1]
        return self.ids[a:b], self.answer[a:b]

    def length(self, i: int) -> int:
        return self.starts[i + 1] - self.starts[i]

    def labels(self, i: int) -> int:
        """Tokens of example i that carry loss (the first token never does: nothing predicts it)."""
        return sum(self.answer[self.starts[i] + 1 : self.starts[i + 1]])

    def summary(self) -> str:
        text = f"{self.rows} rows, {len(self)} examples, {len(self.ids)} tokens"
        dropped = f", {self.no_answer} dropped (no answer)" if self.no_answer else ""
        return text + dropped + (f", {self.cut} cut to length" if self.cut else "")


def find_format(path: str, name: str) -> Format:
    """The named format, or for "auto" the one that fits the first row. UserError for an empty or unknown file."""
    if name != "auto":
        return get_format(name)
    first = next(iter(read_rows(path)), None)
    if first is None:
        raise UserError(f"{path} holds no rows.")
    return detect(first, path)


def conversations(path: str, form: Format) -> Iterator[list[Example]]:
    return examples_of(read_rows(path, header=form.header), form, path)


def load_dataset(
    path: str, form: Format, template: str, tokenizer: Any, config: TrainConfig, seq2seq: bool = False
) -> Dataset:
    """Read, render and encode a data file. Raises UserError if no row carries an answer."""
    data = Dataset(seq2seq=seq2seq)
    for examples in conversations(path, form):
        if config.max_examples is not None and len(data) >= config.max_examples:
            break
        data.rows += 1
        data.no_answer += not examples
        for messages in examples:
            encoded = encode(render(messages, template, tokenizer), tokenizer, config, seq2seq)
            if any(encoded.answer[1:]):
                data.add(encoded)
            else:
                data.no_answer += 1
    if data.rows == 0:
        raise UserError(f"{path} holds no rows.")
    if len(data) == 0:
        raise UserError(f"{path}: none of its {data.rows} rows carries an answer to learn from (format {form.name}).")
    return data
