"""`qlora-ref chat`: a conversation on the terminal, with the prompt that the adapter was trained on."""

import sys
import threading

from ..cli import UserError
from .engine import SINGLE_TURN, Engine, make_engine
from .formats import Example, Message
from .generate import Sampling
from .generate_cli import check_room, model_parser, printable, sampling_of

DESCRIPTION = "A conversation: an empty line or /quit ends it, /reset starts anew, Ctrl-C stops an answer."


def main(argv: list[str]) -> int:
    args = model_parser("qlora-ref chat", DESCRIPTION).parse_args(argv)
    sampling = sampling_of(args)
    engine = make_engine(args.model, args.adapter, args.quant_type, args.template, args.device)
    served = engine.use(next(iter(engine.served)))
    single = served.template in SINGLE_TURN
    print(f"{served.name}, {served.template} prompt. /reset starts anew, /quit ends.")
    if single:
        print("This prompt holds one question: earlier turns are not shown to the model.")
    turns: list[Message] = []
    while (line := _read()) not in ("", "/quit"):
        if line == "/reset":
            turns = []
            continue
        turns = [*([] if single else turns), Message("user", line)]
        try:
            turns.append(Message("assistant", _say(engine, tuple(turns), sampling)))
        except UserError as error:
            print(f"{error} (/reset starts anew)", file=sys.stderr)
            turns.pop()
    return 0


def _read() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return "/quit"


def _say(engine: Engine, messages: Example, sampling: Sampling) -> str:
    ids = engine.prompt(messages)
    check_room(engine, ids, sampling)
    cancelled, said = threading.Event(), []
    try:
        for text in engine.stream(ids, sampling, cancelled):
            said.append(text)
            print(printable(text), end="", flush=True)
    except KeyboardInterrupt:
        cancelled.set()
    print()
    return "".join(said).strip()
