"""`qlora-ref eval judge ...`: ratings by a judge model, in both presentation orders, resumable."""

import argparse
import math
import sys

from .answers import common_items, read_all_answers, read_questions
from .cli_common import add_bad_rows, amount, duration, parser, positive_int, whole_number
from .endpoint import Endpoint, EndpointRefuses
from .judge_prompts import KINDS
from .judging import Estimate, Outcome, ReplayJudge, endpoint_judge, estimate, fingerprint, keys_in, make_jobs, run
from .records import BadInput, Notes, read_rows


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    baseline = args.baseline if args.kind == "relative" else None
    notes = Notes()
    questions = read_questions(args.questions)
    systems = read_all_answers(args.answers)
    items = common_items(questions, systems, args.bad_rows, notes)
    jobs = make_jobs(args.kind, questions, systems, items, baseline)
    judge = _judge(args, baseline)
    settings = fingerprint(jobs, "replay" if args.replay else args.model)
    there = keys_in(args.out, baseline)
    todo = [job for job in jobs if job.key not in there]
    cost = estimate(todo, token_counter(args.tokenizer), args.price_in, args.price_out)
    for line in notes.lines():
        print(f"- {line}")
    print(f"{len(jobs) - len(todo):,} of {len(jobs):,} ratings are there; to do: {cost}")
    if args.dry_run or not todo:
        return 0
    _agree(args, cost)
    try:
        outcome = run(jobs, judge, args.out, settings, baseline, args.workers, _progress)
    except EndpointRefuses as error:
        raise BadInput(f"{error} (ratings so far are in {args.out}; the same command goes on from there)") from error
    return _report(outcome, args)


def _parser() -> argparse.ArgumentParser:
    p = parser("judge", "Asks a judge about every pair of systems in both orders. The same command resumes.")
    p.add_argument("--questions", required=True, metavar="FILE", help="question_id or message_id, text, category")
    p.add_argument("--answers", required=True, action="append", metavar="SYSTEM=FILE", help="once per system")
    p.add_argument("--out", required=True, metavar="FILE", help="ratings, .jsonl; grows by one row at a time")
    p.add_argument("--kind", choices=KINDS, default="threeclass", help="which of the paper's prompts")
    p.add_argument("--baseline", default="chatgpt", metavar="SYSTEM", help="for --kind relative (chatgpt)")
    p.add_argument("--workers", type=positive_int, default=4, metavar="N", help="calls at a time (4)")
    p.add_argument("--replay", metavar="FILE", help="serve these recorded ratings instead of asking")
    p.add_argument("--dry-run", action="store_true", help="count calls, tokens and cost, and stop")
    p.add_argument("--yes", action="store_true", help="start without asking")
    p.add_argument("--tokenizer", metavar="FOLDER", help="count prompt tokens with this local tokenizer")
    p.add_argument("--price-in", type=amount, metavar="USD", help="per million prompt tokens")
    p.add_argument("--price-out", type=amount, metavar="USD", help="per million completion tokens")
    p.add_argument("--max-cost", type=amount, metavar="USD", help="refuse to start when it could cost more")
    add_endpoint(p)
    add_bad_rows(p)
    return p


def add_endpoint(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("endpoint (OpenAI-compatible)")
    g.add_argument("--base-url", metavar="URL", help="such as http://localhost:8000/v1")
    g.add_argument("--model", metavar="NAME", help="the model's name there")
    g.add_argument("--key-env", metavar="VAR", help="environment variable with the key (default: no key)")
    g.add_argument("--timeout", type=duration, default=120.0, metavar="S", help="seconds for one attempt (120)")
    g.add_argument(
        "--retries", type=whole_number, default=6, metavar="N", help="further attempts, with growing pauses (6)"
    )
    g.add_argument("--pause", type=amount, default=1.0, metavar="S", help="first pause (1), doubled each time")


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    if not args.base_url or not args.model:
        raise BadInput("an endpoint needs --base-url and --model.")
    return Endpoint(args.base_url, args.model, args.key_env, args.timeout, args.retries, args.pause)


def _judge(args: argparse.Namespace, baseline: str | None):
    if args.replay:
        return ReplayJudge(read_rows(args.replay), baseline)
    return endpoint_judge(endpoint_of(args))


def token_counter(folder: str | None):
    """A function text -> number of tokens, from a local tokenizer folder; None when no folder is given."""
    if folder is None:
        return None
    from .local_model import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _agree(args: argparse.Namespace, cost: Estimate) -> None:
    if args.max_cost is not None:
        if math.isnan(cost.max_cost):
            raise BadInput("--max-cost needs --price-in and --price-out.")
        if cost.max_cost > args.max_cost:
            raise BadInput(f"this could cost ${cost.max_cost:.2f}, more than --max-cost ${args.max_cost:.2f}.")
    if args.yes or args.replay:
        return
    if not sys.stdin.isatty():
        raise BadInput("nothing was sent: look at the estimate above and add --yes to start.")
    if input("start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise BadInput("nothing was sent.")


def _progress(outcome: Outcome, left: int) -> None:
    if left % 50 == 0:
        print(f"  {outcome.asked:,} rated, {len(outcome.failed)} failed, {left:,} to go", flush=True)


def _report(outcome: Outcome, args: argparse.Namespace) -> int:
    if outcome.torn_bytes:
        print(f"- a torn last line of {outcome.torn_bytes} bytes (a killed run) was cut off and asked again")
    print(f"{outcome.asked:,} rated, {outcome.already:,} were there; ", end="")
    print(f"{outcome.prompt_tokens:,} + {outcome.completion_tokens:,} tokens as the server counts", end="")
    if args.price_in is not None and args.price_out is not None:
        spent = (outcome.prompt_tokens * args.price_in + outcome.completion_tokens * args.price_out) / 1e6
        print(f" (${spent:.4f})", end="")
    print()
    if outcome.unparsed:
        print(f"- {len(outcome.unparsed)} unparsed (kept as -1): {_named(outcome.unparsed)}")
    if outcome.failed:
        keys = [key for key, _ in outcome.failed]
        print(f"- {len(keys)} failed for good, no rating stored: {_named(keys)}; the last: {outcome.failed[-1][1]}")
        print("  the same command asks for these again")
    return 1 if outcome.failed else 0


def _named(keys: list[tuple], shown: int = 5) -> str:
    names = [f"{a} first, {b}, {item}" for a, b, item in keys[:shown]]
    return "; ".join(names) + (f", and {len(keys) - shown} more" if len(keys) > shown else "")
