"""`qlora-ref eval mmlu PATH --model-folder DIR`: accuracy per subject, macro and micro."""

from .cli_common import add_model, add_output, emit, model_of, parser, positive_int
from .mmlu import SHOTS, SPLITS, MMLUItem, MMLUScore, constant_baselines, read_mmlu
from .mmlu_model import AUTO, SPACINGS, LetterScorer, evaluate_mmlu
from .records import BadInput
from .report_tables import Result, Table


def main(argv: list[str]) -> int:
    p = parser("mmlu", "Accuracy on MMLU by the logits of the four letters after 'Answer:'.")
    p.add_argument("path", help="the official mmlu.zip or its folder, or zero-shot prompts (.jsonl)")
    p.add_argument("--shots", type=int, choices=range(SHOTS + 1), default=SHOTS, help=f"solved examples ({SHOTS})")
    p.add_argument("--split", choices=SPLITS, default="test")
    p.add_argument("--subjects", metavar="A,B", help="only these")
    p.add_argument("--limit", type=positive_int, metavar="N", help="only the first N questions of each subject")
    p.add_argument("--batch-size", type=positive_int, default=8)
    p.add_argument("--max-length", type=positive_int, help="longest prompt in tokens (2048 or the model's limit)")
    p.add_argument("--letters", choices=(AUTO, *SPACINGS), default=AUTO, help="' A' or 'A' after 'Answer:'")
    add_model(p)
    add_output(p)
    args = p.parse_args(argv)
    items = _chosen(read_mmlu(args.path, args.split, args.shots), args.subjects, args.limit)
    model, tokenizer = model_of(args)
    scorer = LetterScorer(model, tokenizer, args.batch_size, args.max_length, args.letters)
    score, nll = evaluate_mmlu(scorer, items)
    is_prompts = not items[0].header
    settings = {"model": args.model_folder, "adapter": args.adapter, "quantize": args.quantize}
    settings |= {"shots": "as in the file" if is_prompts else args.shots, "split": "-" if is_prompts else args.split}
    settings |= {"limit": args.limit, "letters": str(scorer.letters), "longest prompt": scorer.max_length}
    notes = []
    if scorer.shortened:
        notes.append(f"{scorer.shortened} of {len(items)} prompts were too long and lost solved examples")
    if scorer.cut:
        notes.append(f"{scorer.cut} of {len(items)} prompts were too long without examples and lost their beginning")
    emit(Result("MMLU", settings, _tables(score, nll, items), notes), args)
    return 0


def _chosen(items: list[MMLUItem], subjects: str | None, limit: int | None) -> list[MMLUItem]:
    if subjects:
        wanted = set(subjects.split(","))
        if unknown := wanted - {item.subject for item in items}:
            raise BadInput(f"no subject {', '.join(sorted(unknown))} in the file.")
        items = [item for item in items if item.subject in wanted]
    if limit:
        by_subject: dict[str, list[MMLUItem]] = {}
        for item in items:
            by_subject.setdefault(item.subject, []).append(item)
        items = [item for group in by_subject.values() for item in group[:limit]]
    return items


def _tables(score: MMLUScore, nll: float, items: list[MMLUItem]) -> list[Table]:
    averages = [
        ["macro (mean over subjects)", 100 * score.macro, 100 * score.macro_se, len(score.subjects)],
        ["micro (all questions)", 100 * score.micro, 100 * score.micro_se, score.n],
    ]
    subjects = [[name, 100 * accuracy, n] for name, (accuracy, n) in score.subjects.items()]
    floors = [
        [f"always {letter}", 100 * s.macro, 100 * s.micro, sum(item.gold == i for item in items)]
        for i, (letter, s) in enumerate(constant_baselines(items).items())
    ]
    return [
        Table("accuracy", ["average", "percent", "se", "of"], averages),
        Table("answer loss", ["statistic", "nats"], [["-log p(right letter | four letters)", nll]], {"nats": 4}),
        Table("subjects", ["subject", "percent", "questions"], subjects),
        Table("constant answers", ["answer", "macro", "micro", "gold count"], floors),
    ]
