"""`qlora-ref eval lm-eval --tasks A,B --model-folder DIR`: the harness on a model with an adapter, quantized or not."""

from .cli_common import add_model, add_output, emit, model_of, parser, positive_int
from .harness import run_harness
from .records import BadInput
from .report_tables import Result, Table


def main(argv: list[str]) -> int:
    p = parser("lm-eval", "Runs tasks of lm-evaluation-harness (pip install lm_eval).")
    p.add_argument("--tasks", required=True, metavar="A,B")
    p.add_argument("--include-path", metavar="DIR", help="a folder with task files of your own")
    p.add_argument("--limit", type=positive_int, metavar="N", help="only the first N documents of each task")
    p.add_argument("--shots", type=int, metavar="N", help="solved examples (default: the task's)")
    p.add_argument("--batch-size", type=positive_int, default=8)
    add_model(p)
    add_output(p)
    args = p.parse_args(argv)
    model, tokenizer = model_of(args)
    tasks = args.tasks.split(",")
    try:
        found = run_harness(model, tokenizer, tasks, args.batch_size, args.limit, args.shots, args.include_path)
    except RuntimeError as error:
        raise BadInput(str(error)) from error
    rows = [[task, metric, value] for task, metrics in found.items() for metric, value in metrics.items()]
    settings = {"model": args.model_folder, "adapter": args.adapter, "quantize": args.quantize}
    settings |= {"limit": args.limit, "shots": args.shots}
    emit(
        Result("lm-evaluation-harness", settings, [Table("metrics", ["task", "metric", "value"], rows, {"value": 4})]),
        args,
    )
    return 0
