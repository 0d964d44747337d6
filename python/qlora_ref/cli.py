"""The one console script, `qlora-ref VERB ...`: finds the verb's module, imports it, hands over the arguments.

Every verb is a function `main(argv: list[str]) -> int` (the exit status). Modules are imported only when their
verb is asked for, so `qlora-ref estimate` needs no torch and `qlora-ref doctor` works when everything else is broken.
"""

import difflib
import importlib
import os
import sys

from . import __version__

# verb -> (module, what it does)
VERBS = {
    "doctor": ("qlora_ref.doctor", "what this machine and this installation can do, and what is missing"),
    "quantize": ("qlora_ref.quantize_cli", "quantization error of every layer of a safetensors file, by data type"),
    "train": ("qlora_ref.finetune.train_cli", "fine-tune a local causal language model with QLoRA"),
    "demo": ("qlora_ref.finetune.demo_cli", "fine-tune the embedded model and show everything (make demo)"),
    "preview": ("qlora_ref.finetune.preview_cli", "a few training examples as tokens, with their loss mask"),
    "sweep": ("qlora_ref.finetune.sweep_cli", "many fine-tunes from one grid file, compared in pairs"),
    "generate": ("qlora_ref.finetune.generate_cli", "answer a prompt, or every row of a file"),
    "chat": ("qlora_ref.finetune.chat_cli", "talk to a model or an adapter on the terminal"),
    "serve": ("qlora_ref.finetune.serve_cli", "a web page and an OpenAI-compatible endpoint, on loopback"),
    "merge": ("qlora_ref.finetune.merge_cli", "fold an adapter into 16-bit weights"),
    "export": ("qlora_ref.finetune.export_cli", "write an adapter as merged safetensors, GGUF or PEFT files"),
    "estimate": ("qlora_ref.memory.cli", "will it fit? memory by category, and a verdict per card"),
    "eval": ("qlora_ref.evaluation.cli", "relative scores, Elo tournaments, agreement, MMLU, judges, reports"),
}


class UserError(Exception):
    """A mistake the user can mend; its message is one sentence and is printed without a traceback."""


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: qlora-ref VERB [options]   (qlora-ref VERB --help for one verb)", "", *lines])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"qlora_ref {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"qlora-ref: no verb '{verb}'.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(VERBS[verb][0]).main(rest)
    except UserError as error:
        print(f"qlora-ref {verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `qlora-ref estimate ... | head` closed the pipe: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 141
