"""`qlora-ref train`: fine-tune a local Hugging Face causal language model on an instruction file with QLoRA."""

import sys
from pathlib import Path
from typing import Any

import torch

from ..cli import UserError
from . import flags, loggers, recipe, report, run
from .checkpoint import list_checkpoints
from .config import TrainConfig
from .loop import TrainingStopped
from .peft_io import AdapterError

DESCRIPTION = "Fine-tune a local language model with QLoRA: 4-bit frozen base, LoRA adapters, paged AdamW."
OOM = """Out of memory: {error}
What the run keeps:
{table}
Three flags that help: --batch-size 1 --grad-accum {accumulate} (same step, smaller activations);
--max-length {length} (activations and logits grow with it); {third}"""


def main(argv: list[str]) -> int:
    """Exit status 0: trained and saved; 130: stopped by Ctrl-C with a checkpoint; 1: training failed."""
    if argv[:1] == ["--recipe"] and argv[1:] in (["list"], []):
        print(recipe.listing())
        return 0
    config, args = flags.parse(argv, "qlora-ref train", DESCRIPTION)
    if config.resume:
        config = run.resumed_config(config, args.given)
    try:
        prepared = run.prepare(config)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the model does not fit on {config.device}: {report.estimated(run.embedded(config))}; --quant-type nf4, "
            "--lora-rank 16 or --device cpu would help."
        ) from None
    except KeyboardInterrupt:
        print("stopped before training; nothing was written", file=sys.stderr)
        return 130
    config = prepared.config
    print(report.startup(config, prepared.trainer, prepared.dtype, prepared.memory_allows))
    if args.dry_run:
        print("dry run: nothing was trained or written")
        return 0
    return train(prepared)


def train(prepared: run.Prepared) -> int:
    trainer, config = prepared.trainer, prepared.config
    try:
        run.start(prepared)
        if trainer.step:
            norm = torch.stack([p.detach().norm() for p in trainer.trainable]).norm().item()
            print(f"  resumed at step {trainer.step} of {trainer.plan.total_steps}, adapter norm {norm:.4f}")
        bar = report.ProgressBar(trainer, "training")
        more = loggers.logger(config)

        def log(record: dict[str, Any]) -> None:
            bar.evaluated(record)
            more(record)

        trainer.log = log
        try:
            trainer.train(bar)
        finally:
            bar.close()
        if not trainer.finished:
            print(f"stopped at step {trainer.step}; continue with: qlora-ref train --output {config.output} --resume")
            return 130
        saved = run.finish(prepared)
    except torch.OutOfMemoryError as error:
        print(out_of_memory(prepared, error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped at once; {_last(config)}", file=sys.stderr)
        return 130
    except (TrainingStopped, AdapterError) as error:
        print(f"qlora-ref train: {error} {_last(config)}", file=sys.stderr)
        return 1
    except OSError as error:
        raise UserError(f"cannot write to {config.output}: {error.strerror or error}; {_last(config)}") from None
    print(_summary(prepared, saved))
    return 0


def _last(config: TrainConfig) -> str:
    found = list_checkpoints(Path(config.output))
    return (
        f"the last checkpoint is {found[-1]} (--resume continues from it)." if found else "there is no checkpoint yet."
    )


def out_of_memory(prepared: run.Prepared, error: BaseException) -> str:
    """The memory table and three flags for this configuration."""
    c, trainer = prepared.config, prepared.trainer
    third = "--optimizer-bits 8 (a quarter of the optimizer states)."
    if c.quant_type == "none":
        third = "--quant-type nf4 (a quarter of the weights)."
    elif c.keep_products:
        third = "--no-keep-products (the same step, more of it computed again)."
    elif not c.gradient_checkpointing:
        third = "--gradient-checkpointing (recompute activations)."
    table = report.memory_table({"run": report.memory_bytes(trainer)}, {"run": report.measured_peak(trainer)})
    return OOM.format(
        error=str(error).splitlines()[0],
        table=table,
        accumulate=c.batch_size * c.grad_accum,
        length=max(2, c.max_length // 2),
        third=third,
    )


def _summary(prepared: run.Prepared, saved: dict) -> str:
    trainer = prepared.trainer
    before, after = run.held_out(trainer.records)
    lines = [report.memory_table({"run": report.memory_bytes(trainer)}, {"run": report.measured_peak(trainer)})]
    if before == before:
        lines.append(f"held-out loss: {before:.4f} before, {after:.4f} after (nats per labelled token)")
    lines.append(
        f"{trainer.tokens:,} tokens in {trainer.seconds:.1f} s: {trainer.tokens / max(trainer.seconds, 1e-9):.0f} tok/s"
    )
    lines.append(
        f"adapter: {trainer.output} ({saved['tensors']} tensors, {report.human(saved['bytes'])}, "
        f"|lora_B| {saved['lora_B_norm']:.4f}; read back and equal)"
    )
    return "\n".join(lines)
