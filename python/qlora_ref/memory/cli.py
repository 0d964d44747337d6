"""`qlora-ref estimate`: will it fit? Needs no torch unless asked to compare with the trace or a measurement."""

import argparse
import json
import math
import sys
from pathlib import Path

from ..cli import UserError
from . import models
from .architecture import Architecture, ConfigError, read_config
from .estimate import Estimate, Margin, estimate
from .settings import ATTENTION_KINDS, BYTES, OPTIMIZERS, WEIGHTS, Settings

FIGURES = (".png", ".svg")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options).")


def parser() -> Parser:
    default = Settings()
    p = Parser(
        prog="qlora-ref estimate",
        description="Will it fit? GPU memory of one training step by category, and a verdict for each kind of card. "
        "Computed from shapes in closed form: no GPU, no weights, no network.",
    )
    p.add_argument("--model", nargs="+", metavar="NAME", help="a built-in model, a config.json, or a model folder")
    p.add_argument("--config", metavar="PATH", help="a config.json, or a model folder that holds one")
    p.add_argument("--list-models", action="store_true", help="print the built-in models with their sources, and stop")
    work = p.add_argument_group("work")
    work.add_argument("--seq", type=int, default=default.seq, help="tokens of a sequence (%(default)s)")
    work.add_argument("--batch", type=int, default=default.batch, help="sequences of a micro-batch (%(default)s)")
    work.add_argument("--accumulate", type=int, default=default.accumulate, help="micro-batches a step (%(default)s)")
    _weight_options(p.add_argument_group("weights"), default)
    _training_options(p.add_argument_group("training"), default)
    margin = p.add_argument_group("what tensors do not show")
    margin.add_argument(
        "--context-mib", type=int, default=Margin().context >> 20, help="CUDA context, workspaces (%(default)s)"
    )
    margin.add_argument(
        "--fragmentation", type=float, default=Margin().fragmentation, help="share of the tensors (%(default)s)"
    )
    margin.add_argument(
        "--decoded-mib", type=int, default=Margin().decoded >> 20, help="decoded weights kept on CUDA (%(default)s)"
    )
    out = p.add_argument_group("output")
    out.add_argument("--compare", choices=("trace", "measure"), help="also trace on meta tensors, or run on --device")
    out.add_argument("--device", default="cuda", help="device of --compare measure: cuda or cpu (%(default)s)")
    out.add_argument("--json", metavar="FILE", help="write the facts as JSON (- for standard output)")
    out.add_argument("--csv", metavar="FILE", help="write bytes by phase and category as CSV (- for standard output)")
    out.add_argument("--figure", metavar="FILE", help="draw one stacked bar a model, .png or .svg")
    return p


def _weight_options(group, default: Settings) -> None:
    toggle = argparse.BooleanOptionalAction
    group.add_argument("--weights", default=default.weights, metavar="TYPE", help=f"{', '.join(WEIGHTS)} (%(default)s)")
    group.add_argument("--double-quant", action=toggle, default=None, help="quantize the constants (yes for 4 bits)")
    group.add_argument("--block-size", type=int, default=default.block_size, help="weights a constant (%(default)s)")
    group.add_argument(
        "--nested-block-size", type=int, default=default.nested_block_size, help="constants a constant (%(default)s)"
    )
    group.add_argument(
        "--compute-dtype", default=default.compute_dtype, metavar="TYPE", help=f"{', '.join(BYTES)} (%(default)s)"
    )
    group.add_argument("--embedding-dtype", default=default.embedding_dtype, metavar="TYPE",
                       help="of embeddings, head, norms, and so of activations (%(default)s)")  # fmt: skip


def _training_options(group, default: Settings) -> None:
    toggle = argparse.BooleanOptionalAction
    group.add_argument(
        "--train", default=default.train, metavar="WHAT", help="adapters, or full: every weight (%(default)s)"
    )
    group.add_argument("--rank", type=int, default=default.rank, help="LoRA rank (%(default)s)")
    group.add_argument(
        "--targets", default=default.targets, help="all, attention, mlp, or names with commas (%(default)s)"
    )
    group.add_argument("--adapter-dtype", default=default.adapter_dtype, metavar="TYPE",
                       help="of adapters and gradients (%(default)s; attach_lora makes fp32 unless told)")  # fmt: skip
    group.add_argument("--dropout", type=float, default=default.dropout, help="LoRA dropout (%(default)s)")
    group.add_argument(
        "--optimizer", default=default.optimizer, metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (%(default)s)"
    )
    group.add_argument(
        "--state-block", type=int, default=default.state_block, help="block of 8-bit states (%(default)s)"
    )
    group.add_argument("--paged", action=toggle, default=default.paged, help="optimizer states in host memory")
    group.add_argument("--pool-mib", type=int, default=default.pool_mib, help="device memory for pages (%(default)s)")
    group.add_argument("--checkpointing", action=toggle, default=default.checkpointing, help="recompute activations")
    group.add_argument(
        "--keep-products", action=toggle, default=default.keep_products, help="but keep 4-bit layers and attention"
    )
    group.add_argument(
        "--logits-chunk", type=int, default=default.logits_chunk, help="tokens with logits at a time, 0: all"
    )
    group.add_argument(
        "--attention", default=default.attention, metavar="KIND", help=f"{', '.join(ATTENTION_KINDS)} (%(default)s)"
    )


def settings_of(args: argparse.Namespace) -> Settings:
    four_bit = args.weights not in BYTES
    if args.double_quant and not four_bit:
        raise ConfigError(
            f"--double-quant with --weights {args.weights}: there are no quantization constants to quantize."
        )
    values = {name: getattr(args, name) for name in Settings.__dataclass_fields__}
    return Settings(**{**values, "double_quant": four_bit if args.double_quant is None else args.double_quant})


def margin_of(args: argparse.Namespace) -> Margin:
    if min(args.context_mib, args.decoded_mib, args.fragmentation) < 0:
        raise ConfigError("--context-mib, --decoded-mib and --fragmentation cannot be negative.")
    if not math.isfinite(args.fragmentation):
        raise ConfigError(f"--fragmentation {args.fragmentation}: a share of the tensors is needed, such as 0.03.")
    return Margin(args.context_mib << 20, args.fragmentation, args.decoded_mib << 20)


def load(name: str) -> tuple[dict, Architecture]:
    """(config dictionary, architecture) of a built-in name, a config.json, or a model folder."""
    path = Path(name)
    if not path.exists() and "/" in name and not name.endswith(".json") and (near := models.nearest(name)):
        raise ConfigError(
            f"There is no {name} on this disk, and nothing is fetched from a hub; give a config.json or a model "
            f"folder, or a built-in model: the nearest are {', '.join(near)}."
        )
    if not name.strip():
        raise ConfigError("The name of the model is empty; --list-models lists the built-in ones.")
    if path.exists() or name.endswith(".json") or "/" in name:
        architecture = read_config(path)
        file = path / "config.json" if path.is_dir() else path
        return json.loads(file.read_text(encoding="utf-8-sig")), architecture
    return models.hf_config(models.model(name).name), models.model(name)


def check_outputs(args: argparse.Namespace) -> None:
    if args.json == args.csv == "-":
        raise ConfigError("--json - and --csv - would mix on standard output; give one of them a file.")
    for option in ("json", "csv", "figure"):
        target = getattr(args, option)
        if target in (None, "-"):
            continue
        if not Path(target).absolute().parent.is_dir():
            raise ConfigError(f"--{option} {target}: there is no folder {Path(target).absolute().parent}.")
        if Path(target).is_dir():
            raise ConfigError(f"--{option} {target}: that is a folder; give the name of a file.")
        if option == "figure" and Path(target).suffix.lower() not in FIGURES:
            raise ConfigError(f"--figure {target}: the name must end in {' or '.join(FIGURES)}.")


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except ConfigError as error:
        raise UserError(str(error)) from error


def run(args: argparse.Namespace) -> int:
    if args.list_models:
        print(list_models())
        return 0
    named = [*(args.model or []), *([args.config] if args.config else [])]
    if not named:
        raise ConfigError("Give --model NAME (--list-models lists them) or --config PATH.")
    check_outputs(args)
    settings, margin = settings_of(args), margin_of(args)
    loaded = [load(name) for name in named]
    results = [estimate(architecture, settings, margin) for _, architecture in loaded]
    if args.compare:
        for (config, _), result in zip(loaded, results, strict=True):
            # Standard output belongs to the facts when they go there: it must stay JSON or CSV.
            print(compare(args, config, result) + "\n", file=sys.stderr if "-" in (args.json, args.csv) else sys.stdout)
    write(args, results)
    return 0


def compare(args: argparse.Namespace, config: dict, result: Estimate) -> str:
    if result.architecture.encoder_decoder:
        raise ConfigError(
            f"--compare {args.compare}: {result.architecture.name} is an encoder-decoder, which only the closed form "
            "covers; leave --compare out."
        )
    try:
        from .compare import compare_measure, compare_trace
    except ModuleNotFoundError as error:
        raise ConfigError(f"--compare {args.compare} needs {error.name}: pip install torch transformers.") from error
    return compare_trace(config, result) if args.compare == "trace" else compare_measure(config, result, args.device)


def write(args: argparse.Namespace, results: list[Estimate]) -> None:
    from . import report

    for option, make in (("json", report.json_text), ("csv", report.csv_text)):
        target = getattr(args, option)
        if target == "-":
            sys.stdout.write(make(results))
        elif target:
            report.write_atomic(target, make(results))
    if args.figure:
        from .figure import draw

        draw(results, args.figure)
    if "-" not in (args.json, args.csv):
        print(report.text(results[0]) if len(results) == 1 else report.side_by_side(results))


def list_models() -> str:
    from .report import table

    rows = [
        [name, f"{models.published_parameters(name) / 1e9:.2f}", models.model(name).source] for name in models.names()
    ]
    return table(rows, ["model", "B parameters", "source of the shapes"], "lrl")
