"""Options that several subverbs share."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from .records import BAD_ROW_POLICIES
from .report_tables import FORMATS, Result, render, write_text


def parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"qlora-ref eval {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_output(p: argparse.ArgumentParser) -> None:
    p.add_argument("--format", choices=FORMATS, default="text", help="csv holds one table (default: text)")
    p.add_argument("--table", metavar="NAME", help="only this table (csv: default the first)")
    p.add_argument("--out", metavar="FILE", help="write there instead of printing")


def add_bad_rows(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--bad-rows",
        choices=BAD_ROW_POLICIES,
        default=BAD_ROW_POLICIES[0],
        help="duplicate ids and scores out of range: refuse the file, or leave the rows out and name them",
    )


def add_human(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("human ratings (rows with the key annotator)")
    group.add_argument("--annotators", choices=("majority", "each", "first"), default="majority")
    group.add_argument("--no-majority", choices=("tie", "drop"), default="tie")
    group.add_argument("--raters", type=positive_int, default=3, metavar="N", help="annotations per item (default 3)")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def whole_number(text: str) -> int:
    """0, 1, 2, ...; numpy takes no other seed."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def amount(text: str) -> float:
    """A finite number, zero or more: seconds, prices, limits. (nan would pass every comparison with a limit.)"""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, zero or more, not {text}")
    return value


def duration(text: str) -> float:
    """Seconds, more than zero."""
    value = amount(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def emit(result: Result, args: argparse.Namespace, plot: Callable[[], None] | None = None) -> None:
    """Prints or writes the result; with csv, which has no place for them, settings and notes go to stderr.

    `plot` draws its file once it is certain that there is a result to print.
    """
    text = render(result, args.format, args.table)
    if plot:
        plot()
    if args.format == "csv":
        print(
            "; ".join(f"{k} {v}" for k, v in result.settings.items()),
            *result.notes,
            sep="\n",
            file=sys.stderr,
        )
    if args.out:
        write_text(args.out, text)
        print(f"wrote {args.out}", file=sys.stderr)
    else:
        sys.stdout.write(text)


def add_model(p: argparse.ArgumentParser, required: bool = True) -> None:
    g = p.add_argument_group("local model")
    g.add_argument("--model-folder", required=required, metavar="DIR", help="a transformers folder (safetensors)")
    g.add_argument("--adapter", metavar="DIR", help="a PEFT adapter folder to put on top")
    g.add_argument("--quantize", choices=("nf4", "fp4"), help="load the model in 4 bits, double quantization")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")


def model_of(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of the local-model options."""
    from transformers.utils import logging

    from .local_model import load_model, load_tokenizer

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.model_folder)
    return load_model(args.model_folder, args.adapter, args.quantize, args.device, args.dtype), tokenizer
