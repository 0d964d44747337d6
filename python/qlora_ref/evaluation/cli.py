"""`qlora-ref eval SUBVERB ...`: finds the subverb's module, imports it, hands over the arguments."""

import difflib
import importlib

from ..cli import UserError

# subverb -> (module, what it does)
SUBVERBS = {
    "relative": (
        "cli_relative",
        "scores relative to ChatGPT in both presentation orders, with intervals (Table 6)",
    ),
    "elo": ("cli_elo", "a tournament: Elo over random orderings, replay, Bradley-Terry, order bias"),
    "agreement": ("cli_agreement", "Kendall, Spearman, Fleiss kappa between judges, annotators, orders"),
    "generate": ("cli_generate", "answers of a local model or an endpoint to a file of questions; resumable"),
    "judge": ("cli_judge", "ask a judge model for ratings of answers, in both orders; resumable"),
    "rate": ("cli_rate", "rate answers yourself on a local web page: blind, sides randomised"),
    "import-csv": ("cli_import", "check human ratings in a CSV file and write them as JSON Lines"),
    "mmlu": ("cli_mmlu", "MMLU, 5-shot or 0-shot, by the logits of the four letters"),
    "perplexity": ("cli_perplexity", "perplexity of a model on a text file"),
    "lm-eval": ("cli_lm_eval", "run tasks of lm-evaluation-harness on a model with an adapter"),
    "report": ("cli_report", "one static HTML page to read answers and verdicts side by side"),
}


def usage() -> str:
    width = max(map(len, SUBVERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in SUBVERBS.items()]
    return "\n".join(["usage: qlora-ref eval SUBVERB [options]   (SUBVERB --help for one of them)", "", *lines])


def main(argv: list[str]) -> int:
    """Runs one subverb. What a library function refuses (ValueError) becomes a one-sentence UserError here."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in SUBVERBS:
        near = difflib.get_close_matches(verb, SUBVERBS, n=1)
        raise UserError(f"no subverb '{verb}'. " + (f"Did you mean '{near[0]}'? " if near else "") + "\n" + usage())
    try:
        module = importlib.import_module(f".{SUBVERBS[verb][0]}", __package__)
        return module.main(rest)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
