"""One fine-tuning run from a config: check, load, train, save. `train_cli` and `demo_cli` and sweeps call this."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..cli import UserError
from . import config as config_module
from . import loggers, model_card
from .batches import split
from .checkpoint import list_checkpoints
from .config import TrainConfig
from .encode import Dataset, find_format, load_dataset
from .loading import (
    build,
    check_model_folder,
    is_seq2seq,
    load_tokenizer,
    pad_id,
    require_transformers,
    resolve_device,
    resolve_dtype,
)
from .loop import METRICS, Trainer, reset_peak
from .peft_io import read_adapter, save_adapter, write_atomically
from .plots import plot_losses
from .products import kept_by_default

CONFIG_FILE, PLOT_FILE = "config.yaml", "loss.png"


@dataclass
class Prepared:
    """Everything that can be checked and loaded before the first byte is written."""

    config: TrainConfig  # resolved: no "auto" left, and keep_products is true or false
    tokenizer: Any
    trainer: Trainer
    dtype: torch.dtype
    memory_allows: bool  # so products are kept, though nobody asked for it


def embedded(config: TrainConfig) -> TrainConfig:
    """`--model embedded` and `--data embedded` are the small model and the questions that come with the package."""
    from ..data import stdlib_qa_path, tiny_base_path

    try:
        if config.model == "embedded":
            config = config.replace(model=str(tiny_base_path()))
        if config.data == "embedded":
            heldout = config.eval_data or str(stdlib_qa_path("heldout"))
            config = config.replace(data=str(stdlib_qa_path("train")), eval_data=heldout)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    return config


def check_output(config: TrainConfig) -> None:
    """UserError unless the output folder can take this run: new or empty, or with --resume one that holds a run."""
    if not config.output:
        raise UserError("--output DIR is missing: the folder that the adapter is written to.")
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder.")
    if config.resume:
        if not (folder / CONFIG_FILE).exists():
            raise UserError(f"--resume: {folder} holds no run (no {CONFIG_FILE}).")
        return
    if folder.exists() and any(folder.iterdir()):
        what = "already holds a run" if (folder / CONFIG_FILE).exists() else "is not empty"
        raise UserError(f"--output {folder} {what}; choose another folder, or continue the run with --resume.")
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {folder}: no permission to write in {parent}.")


def _load_data(
    config: TrainConfig, tokenizer: Any, seq2seq: bool
) -> tuple[TrainConfig, Dataset, Dataset, list[int], list[int]]:
    form = find_format(config.data, config.format)
    template = form.template if config.template == "auto" else config.template
    config = config.replace(format=form.name, template=template)
    if seq2seq and (config.packing or config.loss_on == "all" or template in ("guanaco", "chat")):
        raise UserError(
            "an encoder-decoder model takes one prompt and one answer: no --packing, no --loss-on all, and "
            "--template alpaca or plain."
        )
    data = load_dataset(config.data, form, template, tokenizer, config, seq2seq)
    if config.eval_data:
        held = load_dataset(config.eval_data, form, template, tokenizer, config.replace(max_examples=None), seq2seq)
        return config, data, held, list(range(len(data))), list(range(len(held)))
    if len(data) < 2 and config.eval_size > 0:
        raise UserError(f"{config.data} has one usable example, too few to hold any out; pass --eval-size 0.")
    if config.eval_size >= len(data):
        raise UserError(f"--eval-size {config.eval_size:g} leaves nothing of the {len(data)} examples to train on.")
    train_ids, eval_ids = split(len(data), config.eval_size, config.seed)
    return config, data, data, train_ids, eval_ids


def _check_lengths(config: TrainConfig, model_config: dict[str, Any]) -> None:
    limit = model_config.get("max_position_embeddings")
    if isinstance(limit, int) and config.max_length > limit:
        raise UserError(f"--max-length {config.max_length} is more than the {limit} positions of {config.model}.")


def side_file(config: TrainConfig) -> dict[str, Any]:
    """What our own tools need beside PEFT's files: how the base was quantized and how to prompt the adapter."""
    quantization = None
    if config.quant_type != "none":
        names = ("quant_type", "block_size", "double_quant")
        quantization = {k: getattr(config, k) for k in names}
    return {"version": __version__, "quantization": quantization, "template": config.template}


def prepare(config: TrainConfig) -> Prepared:
    """Check the config, read the data, load and quantize the model. Writes nothing. Raises UserError."""
    require_transformers()
    config_module.check(config)
    for key in ("model", "data"):
        if not getattr(config, key):
            raise UserError(f"--{key} is missing: {config_module.FIELDS[key].metadata['help']}.")
    check_output(config)
    config = embedded(config)
    loggers.check(config)
    model_config = check_model_folder(config.model)
    _check_lengths(config, model_config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model)
    config, data, held, train_ids, eval_ids = _load_data(config, tokenizer, is_seq2seq(model_config))
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    config = config.replace(device=str(device), dtype=short[dtype])
    memory_allows = config.keep_products is None and kept_by_default(config, device)
    config = config.replace(keep_products=bool(config.keep_products or memory_allows))
    reset_peak(device)
    model = build(config, device, dtype)
    adapter = {
        "base": os.path.abspath(config.model),
        "dropout": config.lora_dropout,
        "side": side_file(config),
    }
    trainer = Trainer(
        *(
            model,
            config,
            data,
            train_ids,
            held,
            eval_ids,
            pad_id(tokenizer),
            device,
            Path(config.output),
            adapter,
        )
    )
    return Prepared(config, tokenizer, trainer, dtype, memory_allows)


def start(prepared: Prepared) -> None:
    """Make the output folder with the resolved config, or continue the run that is there."""
    config, trainer = prepared.config, prepared.trainer
    if not config.resume:
        trainer.output.mkdir(parents=True, exist_ok=True)
        write_atomically(trainer.output / CONFIG_FILE, config_module.dump_yaml(config.replace(resume=False)).encode())
        return
    checkpoints = list_checkpoints(trainer.output)
    if checkpoints:
        trainer.resume(checkpoints[-1])
    else:
        (trainer.output / METRICS).unlink(missing_ok=True)  # stopped before the first checkpoint: from the beginning


def resumed_config(config: TrainConfig, given: set[str]) -> TrainConfig:
    """The config of the run in --output. UserError if a flag disagrees with it."""
    check_output(config)
    path = Path(config.output) / CONFIG_FILE
    saved = TrainConfig(**config_module.from_dict(config_module.load_yaml(path), str(path)))
    free = {"output", "resume", "report_to", "save_limit", "keep_products"}  # none of them changes a bit of the result
    for key in sorted(given - free):
        new, old = getattr(config, key), getattr(saved, key)
        if new != old and new != "auto":
            raise UserError(
                f"--resume: this run was started with --{key.replace('_', '-')} {old}, not {new}; leave the flag out, "
                "or start a new run in another folder."
            )
    changes = {k: getattr(config, k) for k in free & given | {"output", "resume"}}
    return saved.replace(**changes)


def finish(prepared: Prepared) -> dict[str, Any]:
    """Write and verify the adapter at the top of the folder; tokenizer and plot beside it. Returns what was saved."""
    trainer = prepared.trainer
    saved = save_adapter(trainer.model, trainer.output, **trainer.adapter)
    if trainer.step and not saved["lora_B_norm"] > 0:
        raise UserError("training changed nothing: every lora_B is still zero; is --lr too small?")
    read_adapter(trainer.output)
    prepared.tokenizer.save_pretrained(trainer.output)
    plot_losses({trainer.config.quant_type: trainer.records}, trainer.output / PLOT_FILE)
    before, after = held_out(trainer.records)
    facts = {"version": __version__, "steps": trainer.step, "tokens": trainer.tokens, "before": before, "after": after}
    facts["held"] = min(len(trainer.eval_ids), trainer.config.max_eval_examples)
    write_atomically(trainer.output / "README.md", model_card.write(prepared.config, facts).encode())
    return saved


def held_out(records: list[dict[str, Any]]) -> tuple[float, float]:
    """(first, last) held-out loss of a run; NaN where nothing was held out."""
    losses = [r["eval_loss"] for r in records if r.get("eval_loss") is not None]
    return (losses[0], losses[-1]) if losses else (math.nan, math.nan)


def run(config: TrainConfig, progress: Callable[[dict[str, Any]], None] = lambda values: None) -> Prepared:
    """Prepare, train to the end, save: the whole run without any printing."""
    prepared = prepare(config)
    start(prepared)
    prepared.trainer.train(progress)
    if prepared.trainer.finished:
        finish(prepared)
    return prepared


def as_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
