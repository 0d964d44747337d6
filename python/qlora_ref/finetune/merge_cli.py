"""`qlora-ref merge` folds an adapter into 16-bit weights; `qlora-ref export` writes it for other programs."""

import shutil
from pathlib import Path

from ..cli import UserError
from . import merge
from .engine import describe_adapter
from .flags import Parser
from .loading import DTYPES
from .peft_io import CONFIG, WEIGHTS, AdapterError, read_adapter

FORMATS = ("safetensors", "gguf", "peft")


def main(argv: list[str]) -> int:
    return _run(argv, "qlora-ref merge", "Fold an adapter into 16-bit weights: a Hugging Face folder.", False)


def _run(argv: list[str], prog: str, description: str, choose_format: bool) -> int:
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    parser.add_argument("--model", metavar="DIR", help="base model folder, if not where the adapter says")
    parser.add_argument("--output", required=True, metavar="PATH", help="new folder (gguf: new file)")
    parser.add_argument(
        "--base", default="dequantized", help="merge into the dequantized (default) or original weights"
    )
    parser.add_argument("--dtype", default="bf16", help="bf16 (default), fp16 or fp32")
    if choose_format:
        parser.add_argument(
            "--format", default="safetensors", help="safetensors (merged), gguf (merged) or peft (adapter)"
        )
    args = parser.parse_args(argv)
    kind = args.format if choose_format else "safetensors"
    for flag, value, known in (
        ("base", args.base, merge.BASES),
        ("dtype", args.dtype, DTYPES),
        ("format", kind, FORMATS),
    ):
        if value not in known:
            raise UserError(f"--{flag} {value!r} is not one of {', '.join(known)}.")
    output = Path(args.output)
    if output.exists() and not (kind != "gguf" and output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} exists; name a new one.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.absolute().parent}.")
    if kind == "peft":
        return _copy_adapter(args.adapter, output)
    served = describe_adapter(args.adapter, args.model, "auto")
    if kind == "gguf":
        from . import gguf_export

        gguf_export.check_base(served.base)
    model, tokenizer, difference = merge.merged_model(served, args.base, DTYPES[args.dtype])
    if kind == "gguf":
        gguf_export.write(model, tokenizer, output, served.name)
    else:
        merge.save_merged(model, tokenizer, output)
    print(f"{served.adapter} merged into the {args.base} weights of {served.base} ({args.dtype}): {output}")
    print(
        f"next-token distributions on a test sentence: {difference.from_adapter:.2e} nats from the adapter model, "
        f"{difference.from_base:.2e} from the base (mean KL); written and read back"
    )
    return 0


def _copy_adapter(adapter: str, output: Path) -> int:
    """The two files of PEFT's format, verified, and nothing of ours."""
    try:
        read_adapter(adapter)
        output.mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(Path(adapter) / name, output / name)
        config, state, _ = read_adapter(output)
    except AdapterError as error:
        raise UserError(str(error)) from None
    print(f"PEFT adapter: {output} (rank {config['r']}, {len(state)} tensors, read back)")
    return 0
