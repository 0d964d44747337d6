"""The command line of a run: every key of `TrainConfig` is a flag; a YAML file or a recipe comes first, flags win.

Flags of the authors' `qlora.py` (artidoro/qlora) are understood and mapped, so an old command keeps working.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..cli import UserError
from .config import FIELDS, TrainConfig, check, coerce, from_dict, is_switch, load_yaml, suggestion

# old flag -> our key
RENAMED = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "dataset_format": "format",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "num_train_epochs": "epochs",
    "lora_r": "lora_rank",
    "source_max_len": "source_max_length",
    "target_max_len": "target_max_length",
    "eval_dataset_size": "eval_size",
    "max_eval_samples": "max_eval_examples",
    "max_train_samples": "max_examples",
    "adam_beta2": "beta2",
    "logging_steps": "log_steps",
    "save_total_limit": "save_limit",
}
# old flags that need no equivalent here, and why
IGNORED = {
    "do_train": "train always trains",
    "do_eval": "the held-out loss is always measured",
    "evaluation_strategy": "see --eval-steps",
    "eval_strategy": "see --eval-steps",
    "save_strategy": "see --save-steps",
    "logging_strategy": "see --log-steps",
    "remove_unused_columns": "columns are chosen by --format",
    "data_seed": "one --seed covers the data order",
    "dataloader_num_workers": "the data is tokenized once, at the start",
    "max_memory_MB": "qlora-ref estimate tells what fits",
    "per_device_eval_batch_size": "evaluation uses --batch-size",
    "max_new_tokens": "a setting of qlora-ref generate",
    "report_to_none": "",
    "ddp_find_unused_parameters": "not needed",
    "use_auth_token": "models are local folders",
    "lora_modules": "see --lora-targets",
}
REFUSED = {
    "do_mmlu_eval": "evaluate with `qlora-ref eval mmlu` after training",
    "mmlu_split": "evaluate with `qlora-ref eval mmlu` after training",
    "do_predict": "use `qlora-ref generate` after training",
    "predict_with_generate": "use `qlora-ref generate` after training",
    "trust_remote_code": "code from a model folder is never run; use a model that transformers knows",
    "full_finetune": "this is QLoRA: only adapters are trained; --quant-type none gives 16-bit LoRA",
    "bits": "use --quant-type nf4 (4 bits) or --quant-type none (16 bits)",
}
OLD_FORMATS = {
    "hh-rlhf": "hh-rlhf",
    "alpaca-clean": "alpaca",
    "vicuna": "messages",
    "input-output": "input-output",
}


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake as a UserError sentence, with a suggestion for an unknown flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].lower() + message[1:] + (" See --help." if "--help" not in message else ""))


def build_parser(prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below; flags win over it")
    parser.add_argument("--recipe", metavar="NAME", help="a shipped config (--recipe list shows them)")
    parser.add_argument(
        "--card", metavar="GB", help="choose micro-batch and optimizer bits that fit a card (24, 48, 80)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, but train nothing")
    for key, f in FIELDS.items():
        flag, default = "--" + key.replace("_", "-"), f.default
        if f.metadata["choices"]:
            text = f"{f.metadata['help']}: {', '.join(f.metadata['choices'])}"
        else:
            text = f.metadata["help"]
        text += "" if default in (None, "") else f" (default: {default})"
        nargs: dict[str, Any] = {"nargs": "?", "const": "true"} if is_switch(key) else {}
        parser.add_argument(flag, dest=key, metavar="X", help=text.replace("%", "%%"), **nargs)
        if is_switch(key):
            parser.add_argument("--no-" + key.replace("_", "-"), dest=key, action="store_const", const="false",
                                help=argparse.SUPPRESS)  # fmt: skip
    return parser


def _translate_old(key: str, value: str | None, note: list[str]) -> list[str] | None:
    """One old flag as new arguments; None if it is not an old flag. UserError where there is no equivalent."""
    if key in RENAMED:
        new = RENAMED[key]
        value = OLD_FORMATS.get(value or "", value) if new == "format" else value
        note.append(f"--{key} is --{new.replace('_', '-')} here")
        return ["--" + new.replace("_", "-"), value or ""]
    if key == "bits" and value in ("4", "16"):
        return [] if value == "4" else ["--quant-type", "none"]
    if key in ("bf16", "fp16"):
        return ["--dtype", key] if (value or "true").lower() in ("true", "1") else []
    if key == "train_on_source":
        return ["--loss-on", "all" if (value or "true").lower() == "true" else "answers"]
    if key == "optim":
        if value not in ("paged_adamw_32bit", "paged_adamw_8bit"):
            raise UserError(f"--optim {value}: only paged_adamw_32bit and paged_adamw_8bit exist here.")
        return ["--optimizer-bits", value[12:-3]]
    if key == "dataset":
        return ["--data", value or ""]
    if key in REFUSED and (value or "true").lower() != "false":
        raise UserError(f"--{key} has no place here: {REFUSED[key]}.")
    if key in IGNORED or key in REFUSED:
        note.append(f"--{key} is ignored: {IGNORED.get(key) or REFUSED[key]}")
        return []
    return None


def normalize(argv: list[str], known: set[str], note: list[str]) -> list[str]:
    """`--lora_rank=8` -> `--lora-rank 8`, old flags mapped, unknown flags refused with a suggestion."""
    out: list[str] = []
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--") or word == "--":
            out.append(word)
            continue
        name, has_value, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if key in known or key.removeprefix("no_") in known:
            flag = "--" + key.replace("_", "-")
            out += [f"{flag}={value}"] if has_value else [flag]
            continue
        takes_next = not has_value and i < len(argv) and not argv[i].startswith("--")
        mapped = _translate_old(key, value if has_value else argv[i] if takes_next else None, note)
        if mapped is None:
            raise UserError(f"unknown flag --{name}.{suggestion(key, known | set(RENAMED)).replace('_', '-')}")
        i += takes_next
        out += mapped
    return out


def parse(argv: list[str], prog: str, description: str) -> tuple[TrainConfig, argparse.Namespace]:
    """Flags (and the YAML file or recipe they name) -> a checked config. Raises UserError; `--help` exits as usual."""
    parser = build_parser(prog, description)
    note: list[str] = []
    known = set(FIELDS) | {"config", "recipe", "card", "dry_run", "help"}
    args = parser.parse_args(normalize(argv, known, note))
    for line in note:
        print(f"note: {line}", file=sys.stderr)
    values: dict[str, Any] = {}
    if args.recipe:
        from .recipe import recipe

        values |= recipe(args.recipe)
    if args.config:
        values |= from_dict(load_yaml(Path(args.config)), f"--config {args.config}")
    values |= {k: coerce(k, v) for k in FIELDS if (v := getattr(args, k)) is not None}
    args.given = set(values)
    config = TrainConfig(**values)
    check(config)
    if args.card:
        from .recipe import fit_to_card

        config = fit_to_card(config, args.card)
    return config, args
