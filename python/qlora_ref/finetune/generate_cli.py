"""`qlora-ref generate`: answer one prompt, or every row of a file."""

import json
import sys
from pathlib import Path

from ..cli import UserError
from .engine import Engine, make_engine
from .files import read_rows
from .flags import Parser
from .formats import Example, Message
from .generate import Sampling, generate_ids


def model_parser(prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--model", action="append", default=[], metavar="DIR", help="base model folder, or: embedded")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="DIR", help="adapter folder (brings its base)"
    )
    parser.add_argument("--quant-type", default="nf4", help="of a bare --model; none = 16 bits (nf4)")
    parser.add_argument("--template", default="auto", help="auto, alpaca, plain, guanaco or chat")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 = greedy (0.7, the paper's)")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus (0.9, the paper's)")
    parser.add_argument("--seed", type=int)
    return parser


def sampling_of(args) -> Sampling:
    """UserError for values outside what sampling can do."""
    if args.max_new_tokens < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        raise UserError("--max-new-tokens must be at least 1, --temperature not negative, --top-p in (0, 1].")
    return Sampling(args.max_new_tokens, args.temperature, args.top_p, 0, args.seed)


def printable(text: str) -> str:
    """Text without the control characters by which a model's output could steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def main(argv: list[str]) -> int:
    parser = model_parser("qlora-ref generate", "Answer a prompt, or every row of a file, with a model or an adapter.")
    parser.add_argument("--prompt", help="the question ('-' reads it from standard input)")
    parser.add_argument("--input", metavar="FILE", help="rows with an 'instruction' (and 'input') or a 'prompt' column")
    parser.add_argument("--output", metavar="FILE", help="jsonl to write the answers of --input to")
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.input is None):
        raise UserError("give either --prompt TEXT or --input FILE.")
    if args.output and Path(args.output).exists():
        raise UserError(f"--output {args.output} exists; name a new file.")
    sampling = sampling_of(args)
    rows = list(read_rows(args.input)) if args.input else []
    if args.input and not rows:
        raise UserError(f"{args.input} holds no rows.")
    questions = [_question(r, args.input, i) for i, r in enumerate(rows, 1)]
    if args.prompt is not None:
        questions = [Message("user", sys.stdin.read() if args.prompt == "-" else args.prompt)]
    engine = make_engine(args.model, args.adapter, args.quant_type, args.template, args.device)
    engine.use(next(iter(engine.served)))
    answers = [_answer(engine, (q,), sampling) for q in questions]
    if args.output:
        from .peft_io import write_atomically

        lines = [json.dumps({**r, "answer": a}, ensure_ascii=False) for r, a in zip(rows, answers, strict=True)]
        write_atomically(Path(args.output), ("\n".join(lines) + "\n").encode())
        print(f"{len(lines)} answers written to {args.output}")
    else:
        print("\n\n".join(printable(a) for a in answers))
    return 0


def _question(row: dict, origin: str, number: int) -> Message:
    text = row.get("instruction", row.get("prompt"))
    if not isinstance(text, str):
        raise UserError(f"{origin}, row {number}: needs an 'instruction' or a 'prompt' column with text.")
    return Message("user", text, str(row.get("input") or ""))


def _answer(engine: Engine, messages: Example, sampling: Sampling) -> str:
    ids = engine.prompt(messages)
    check_room(engine, ids, sampling)
    new = generate_ids(engine.model, engine.tokenizer, ids, sampling)
    return engine.tokenizer.decode(new, skip_special_tokens=True).strip()


def check_room(engine: Engine, ids: list[int], sampling: Sampling) -> None:
    if len(ids) + sampling.max_new_tokens > engine.context():
        raise UserError(
            f"the prompt has {len(ids)} tokens and --max-new-tokens is {sampling.max_new_tokens}, but the model has "
            f"{engine.context()} positions."
        )
