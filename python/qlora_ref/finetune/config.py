"""What a run can be told: one flat table of keys, the same in YAML, on the command line and in Python.

The defaults are the paper's (arXiv 2305.14314, section 5 and appendix B; artidoro/qlora `qlora.py`): NF4 with double
quantization, LoRA of rank 64 and alpha 16 on every linear layer, paged AdamW at a constant 2e-4, clipping at 0.3.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..cli import UserError

QUANT_TYPES = ("nf4", "fp4_bnb", "fp4_e2m1", "fp4_e3m0", "int4", "sf4", "bof4", "bof4_s", "none")
FORMATS = (
    *("auto", "alpaca", "input-output", "self-instruct", "chip2", "hh-rlhf", "oasst1", "longform"),
    *("unnatural-instructions", "flan-cot", "dolly", "messages"),
)
TEMPLATES = ("auto", "alpaca", "plain", "guanaco", "chat")


def opt(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """All keys of `qlora-ref train`. `None` and "auto" are decided at the start and written to the resolved config."""

    model: str = opt("", "folder of a Hugging Face model (config.json, *.safetensors, tokenizer), or: embedded")
    data: str = opt("", "training data: .json, .jsonl, .csv, .tsv or .parquet, optionally .gz; or: embedded")
    output: str = opt("", "folder to write; must not hold a run yet")
    resume: bool = opt(False, "continue the run in --output from its last checkpoint")

    format: str = opt("auto", "what the columns of the data mean", FORMATS)
    template: str = opt("auto", "how an example becomes a prompt", TEMPLATES)
    loss_on: str = opt(
        "answers", "tokens that carry loss: answers, or all (Guanaco trained on all)", ("answers", "all")
    )
    eval_data: str | None = opt(None, "held-out data; without it a split of --data is held out")
    eval_size: float = opt(0.1, "held-out split of --data: a fraction below 1, or a number of examples")
    max_eval_examples: int = opt(200, "at most this many held-out examples are evaluated")
    max_examples: int | None = opt(None, "use only the first N examples of --data")
    max_length: int = opt(512, "tokens per example; the prompt is cut first, then the answer, never its end token")
    source_max_length: int | None = opt(None, "tokens of the prompt (qlora.py: source_max_len)")
    target_max_length: int | None = opt(None, "tokens of the answer (qlora.py: target_max_len)")

    quant_type: str = opt("nf4", "4-bit data type of the base; none = 16-bit LoRA", QUANT_TYPES)
    double_quant: bool = opt(True, "quantize the block maxima again (8 bits)")
    block_size: int = opt(64, "weights per quantization block")
    dtype: str = opt(
        "auto", "dtype of activations and of weights that stay unquantized", ("auto", "bf16", "fp16", "fp32")
    )
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")

    lora_rank: int = opt(64, "rank of the adapters")
    lora_alpha: float = opt(16.0, "adapter scaling is alpha / rank")
    lora_dropout: float = opt(0.0, "dropout on the input of the adapters")
    lora_targets: str = opt("all-linear", "all-linear, or layer names separated by commas (q_proj,v_proj)")
    rslora: bool = opt(False, "scale by alpha / sqrt(rank)")

    epochs: float = opt(1.0, "passes over the data; ignored with --max-steps")
    max_steps: int | None = opt(None, "optimizer steps")
    batch_size: int = opt(4, "examples per forward pass")
    grad_accum: int = opt(4, "forward passes per optimizer step")
    lr: float = opt(2e-4, "learning rate")
    schedule: str = opt("constant", "learning rate schedule", ("constant", "cosine", "linear"))
    warmup: float = opt(0.03, "warm-up: a fraction of the steps below 1, or a number of steps")
    weight_decay: float = opt(0.0, "decoupled weight decay of the adapters")
    beta2: float = opt(0.999, "Adam's second decay rate")
    max_grad_norm: float = opt(0.3, "gradients are clipped to this norm")
    optimizer_bits: int = opt(32, "bits of the Adam moments: 32 or 8")
    paging: str = opt(
        "auto", "where Adam's moments live (docs/06_paging.md)", ("auto", "none", "cpu", "pinned", "managed")
    )
    pool_mib: int = opt(512, "device memory for pages of Adam's moments, MiB")
    gradient_checkpointing: bool = opt(True, "recompute activations in the backward pass")
    keep_products: bool | None = opt(
        None,
        "but keep the outputs of 4-bit layers and attention: faster, more memory (default: on a CPU where they fit)",
    )
    group_by_length: bool = opt(False, "batch examples of similar length")
    packing: bool = opt(False, "several examples in one row, each blind to the others")
    seed: int = opt(0, "adapter init, data order and dropout follow from it")

    log_steps: int = opt(1, "steps between lines of metrics.jsonl")
    eval_steps: int | None = opt(None, "steps between evaluations on the held-out data; default: 10 in a run")
    save_steps: int = opt(100, "steps between checkpoints")
    save_limit: int = opt(2, "checkpoints kept")
    report_to: str = opt("none", "also log to", ("none", "tensorboard", "wandb"))

    def replace(self, **changes: Any) -> "TrainConfig":
        return dataclasses.replace(self, **changes)


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_HINTS = get_type_hints(TrainConfig)
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def suggestion(word: str, known: Any) -> str:
    """' Did you mean X?' or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def is_switch(key: str) -> bool:
    """Whether the flag of the key needs no value, and has a --no- form."""
    return bool in (_HINTS[key], *get_args(_HINTS[key]))


def coerce(key: str, value: Any) -> Any:
    """A YAML value or a flag's text as the type of the key. Raises UserError with the key and the value."""
    hint = _HINTS[key]
    optional = type(None) in get_args(hint)
    kind = next((t for t in get_args(hint) if t is not type(None)), hint)
    if optional and (value is None or str(value).lower() in ("none", "null", "")):
        return None
    try:
        return _convert(kind, value)
    except (TypeError, ValueError):
        flag = "--" + key.replace("_", "-")
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{flag} must be {names[kind]}, not {value!r}.") from None


def _convert(kind: type, value: Any) -> Any:
    if kind is bool:
        word = str(value).lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(word)
        return word in _TRUE
    if kind is str:
        if isinstance(value, dict):
            raise ValueError(value)
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value)
    if kind is int:
        if number != int(number):
            raise ValueError(value)
        return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
    return number


# key -> (smallest, largest or None, what to do)
_RANGES = {
    "max_length": (2, None),
    "source_max_length": (1, None),
    "target_max_length": (1, None),
    "lora_rank": (1, None),
    "epochs": (1e-9, None),
    "max_steps": (1, None),
    "batch_size": (1, None),
    "grad_accum": (1, None),
    "weight_decay": (0, None),
    "warmup": (0, None),
    "log_steps": (1, None),
    "eval_steps": (1, None),
    "save_steps": (1, None),
    "save_limit": (1, None),
    "max_examples": (1, None),
    "max_eval_examples": (0, None),
    "eval_size": (0, None),
    "seed": (0, 2**62),
}


def check(config: TrainConfig) -> None:
    """Raise UserError for the first value that cannot work, before anything is read or written."""
    for key, f in FIELDS.items():
        value, flag, choices = getattr(config, key), "--" + key.replace("_", "-"), f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{flag} {value!r} is not one of {', '.join(choices)}.{suggestion(str(value), choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} must be a finite number, not {value}.")
        low, high = _RANGES.get(key, (None, None))
        if value is not None and low is not None and (value < low or (high and value > high)):
            raise UserError(
                f"{flag} must be at least {low:g}, not {value:g}." if value < low else f"{flag} is too large."
            )
    if config.lr <= 0 or config.max_grad_norm <= 0:
        raise UserError(f"--lr ({config.lr:g}) and --max-grad-norm ({config.max_grad_norm:g}) must be positive.")
    if not 0 <= config.lora_dropout < 1 or not 0 <= config.beta2 < 1:
        raise UserError("--lora-dropout and --beta2 must lie in [0, 1).")
    if config.optimizer_bits not in (8, 32):
        raise UserError(f"--optimizer-bits must be 32 or 8, not {config.optimizer_bits}.")
    if config.pool_mib < 1:
        raise UserError(f"--pool-mib must be at least 1, not {config.pool_mib}.")
    if config.quant_type != "none":
        _check_quantization(config)
    if config.keep_products and not config.gradient_checkpointing:
        raise UserError("--keep-products is a kind of checkpointing; pass it without --no-gradient-checkpointing.")
    if config.packing and config.group_by_length:
        raise UserError("--packing and --group-by-length exclude each other: packing already fills every row.")


def _check_quantization(config: TrainConfig) -> None:
    size = config.block_size
    if size < 32 or size > 4096 or size & (size - 1):
        raise UserError(f"--block-size must be a power of two in 32..4096, not {size}; the paper uses 64.")
    if config.quant_type == "bof4_s" and config.double_quant:
        raise UserError("--quant-type bof4_s keeps a signed maximum; pass --no-double-quant with it.")


def from_dict(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Checked keys and coerced values of a mapping (a YAML file, a recipe). UserError for an unknown key."""
    result = {}
    for raw, value in values.items():
        key = str(raw).replace("-", "_")
        if key not in FIELDS:
            raise UserError(f"{origin}: unknown key '{raw}'.{suggestion(key, FIELDS)}")
        result[key] = coerce(key, value)
    return result


def load_yaml(path: Path) -> dict[str, Any]:
    """A flat YAML mapping of keys. UserError for a missing file, bad YAML, or something that is not a mapping."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must be a mapping of key: value lines.")
    return values


def dump_yaml(config: TrainConfig) -> str:
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
