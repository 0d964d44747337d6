"""`qlora-ref eval generate ...`: answers of a local model or an endpoint to a file of questions, resumable."""

import argparse
from pathlib import Path

from .answers import read_questions
from .cli_common import add_model, model_of, parser, positive_int, whole_number
from .cli_judge import add_endpoint, endpoint_of
from .endpoint import EndpointRefuses
from .generate import CHAT, TEMPLATES, Sampling, endpoint_generator, fill, local_generator, run
from .records import BadInput


def main(argv: list[str]) -> int:
    p = parser("generate", "Answers every question once. The same command resumes an interrupted run.")
    p.add_argument("--questions", required=True, metavar="FILE", help="question_id or message_id, and text")
    p.add_argument("--out", required=True, metavar="FILE", help="answers, .jsonl; grows by one row at a time")
    p.add_argument("--top-p", type=float, default=0.9)
    p.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    p.add_argument("--max-new-tokens", type=positive_int, default=512)
    p.add_argument("--seed", type=whole_number, default=0)
    p.add_argument("--limit", type=positive_int, metavar="N", help="only the first N questions")
    p.add_argument("--workers", type=positive_int, default=4, metavar="N", help="endpoint calls at a time (4)")
    help_template = f"local models: {', '.join([*TEMPLATES, CHAT])}, or a text holding {{question}} (guanaco)"
    p.add_argument("--template", default="guanaco", help=help_template)
    add_model(p, required=False)
    add_endpoint(p)
    args = p.parse_args(argv)
    sampling = Sampling(args.top_p, args.temperature, args.max_new_tokens, args.seed)
    questions = read_questions(args.questions)
    if args.limit:
        questions = dict(list(questions.items())[: args.limit])
    generator, source, workers = _source(args, sampling)
    try:
        new, there, failures = run(questions, generator, args.out, source, sampling, workers, _progress)
    except EndpointRefuses as error:
        raise BadInput(f"{error} (answers so far are in {args.out}; the same command goes on from there)") from error
    print(f"{new} answered, {there} were there: {args.out}")
    for failure in failures:
        print(f"- failed: {failure}")
    return 1 if failures else 0


def _source(args: argparse.Namespace, sampling: Sampling):
    """(generator, what identifies it, calls at a time); a local model answers one question at a time."""
    if bool(args.base_url) == bool(args.model_folder):
        raise BadInput("say who answers: --model-folder DIR (local) or --base-url URL --model NAME (endpoint).")
    if args.base_url:
        endpoint = endpoint_of(args)
        return endpoint_generator(endpoint, sampling), {"endpoint model": args.model}, args.workers
    if args.template != CHAT:
        fill(args.template, "")
    model, tokenizer = model_of(args)
    source = {"model": Path(args.model_folder).name, "adapter": args.adapter and Path(args.adapter).name}
    source |= {"quantize": args.quantize, "template": args.template}
    return local_generator(model, tokenizer, args.template, sampling), source, 1


def _progress(done: int, left: int) -> None:
    if left % 10 == 0:
        print(f"  {done} answered, {left} to go", flush=True)
