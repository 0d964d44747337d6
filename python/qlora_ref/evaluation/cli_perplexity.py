"""`qlora-ref eval perplexity TEXT --model-folder DIR`."""

from dataclasses import asdict

from .cli_common import add_model, add_output, emit, model_of, parser, positive_int
from .perplexity import perplexity
from .records import read_text
from .report_tables import Result, Table


def main(argv: list[str]) -> int:
    p = parser("perplexity", "Perplexity on a text file: every token but the first is scored once.")
    p.add_argument("text", help="a UTF-8 text file, plain or .gz")
    p.add_argument("--window", type=positive_int, help="tokens seen at once (the model's limit, at most 2048)")
    p.add_argument("--context", type=positive_int, help="tokens of a window that only give context (half of it)")
    p.add_argument("--batch-size", type=positive_int, default=4)
    p.add_argument("--max-characters", type=positive_int, metavar="N", help="only the first N characters")
    add_model(p)
    add_output(p)
    args = p.parse_args(argv)
    text = read_text(args.text)[: args.max_characters]
    model, tokenizer = model_of(args)
    found = asdict(perplexity(model, tokenizer, text, args.window, args.context, args.batch_size))
    settings = {"text": args.text, "characters": len(text), "model": args.model_folder}
    settings |= {"adapter": args.adapter, "quantize": args.quantize}
    settings |= {"window": found.pop("window"), "context": found.pop("context")}
    table = Table("perplexity", list(found), [list(found.values())], {"nll": 4, "bits_per_byte": 4})
    emit(Result("Perplexity", settings, [table]), args)
    return 0
