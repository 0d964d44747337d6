"""`qlora-ref preview`: the tokens of a few examples as the model will see them, and which of them carry loss.

Coloured text carries loss; the rest is the prompt. Special tokens are shown by name. The same code as in training.
"""

import itertools
import os
import sys
from typing import Any

from ..cli import UserError
from . import flags, run
from .config import TrainConfig
from .encode import Encoded, conversations, encode, find_format
from .loading import check_model_folder, load_tokenizer, require_transformers
from .prompts import render

LOSS, GIVEN, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
DESCRIPTION = "Show decoded examples of a data file with their loss mask (any flag of `qlora-ref train` applies)."


def main(argv: list[str]) -> int:
    examples, rest = _own_flag(argv)
    config, _ = flags.parse(rest, "qlora-ref preview", DESCRIPTION + " --examples N shows N of them (3).")
    require_transformers()
    for key in ("model", "data"):
        if not getattr(config, key):
            raise UserError(f"--{key} is missing.")
    config = run.embedded(config)
    check_model_folder(config.model)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(preview(config, load_tokenizer(config.model), examples, colour))
    return 0


def _own_flag(argv: list[str]) -> tuple[int, list[str]]:
    if "--examples" not in argv:
        return 3, argv
    at = argv.index("--examples")
    if at + 1 >= len(argv) or not argv[at + 1].isdigit() or argv[at + 1] == "0":
        raise UserError("--examples must be a whole number of at least 1.")
    return int(argv[at + 1]), argv[:at] + argv[at + 2 :]


def preview(config: TrainConfig, tokenizer: Any, count: int, colour: bool) -> str:
    """The first `count` examples of config.data. Without colour, stretches with loss stand between [[ and ]]."""
    form = find_format(config.data, config.format)
    template = form.template if config.template == "auto" else config.template
    found = (e for row in conversations(config.data, form) for e in row)
    blocks = [f"{config.data}: format {form.name}, template {template}, loss on {config.loss_on}"]
    for i, messages in enumerate(itertools.islice(found, count), 1):
        example = encode(render(messages, template, tokenizer), tokenizer, config)
        loss = sum(example.answer[1:])
        cut = f", cut to {config.max_length}" if example.cut else ""
        blocks.append(f"--- example {i}: {len(example.ids)} tokens, {loss} with loss{cut}")
        blocks.append(marked(example, tokenizer, colour))
    if len(blocks) == 1:
        raise UserError(f"{config.data} holds no example with an answer (format {form.name}).")
    return "\n".join(blocks)


def marked(example: Encoded, tokenizer: Any, colour: bool) -> str:
    """Stretches of equal mask, decoded; control characters of the data are made visible, so they cannot act here."""
    start, end, given, reset = (LOSS, RESET, GIVEN, RESET) if colour else ("[[", "]]", "", "")
    parts = []
    for answer, group in itertools.groupby(zip(example.ids, example.answer, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        parts.append(f"{start}{text}{end}" if answer else f"{given}{text}{reset}")
    return "".join(parts)
