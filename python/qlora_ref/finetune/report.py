"""What a run prints: the plan at the start, the memory by kind, the progress bar."""

import platform
from typing import Any

import torch

from .. import __version__
from ..nn import count_parameters
from .config import TrainConfig
from .loading import read_model_config
from .loop import Trainer, backend, peak_bytes
from .loss import CHUNK, PLAIN_HEAD
from .peft_io import storage


def human(n: float) -> str:
    """Bytes in the unit that reads best (1024-based)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError


def table(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Aligned columns; `right` are the columns set flush right. The first row is the header."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = []
    for k, row in enumerate(rows):
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
        if k == 0:
            lines.append("  " + "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def memory_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of everything a run keeps, by kind, read off the live tensors; gradients are those of the adapters."""
    sizes = storage(trainer.model)
    optimizer = trainer.optimizer.memory()
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[trainer.config.dtype]
    kinds = {
        "4-bit weights": sizes["packed"],
        "quantization constants": sizes["constants"],
        f"{dtype} weights": sizes["unquantized"],
        "adapters": sizes["adapters"],
        "gradients": sizes["adapters"],
        "optimizer states": optimizer["device"] + optimizer["host"],
    }
    return {kind: n for kind, n in kinds.items() if n}


def memory_table(runs: dict[str, dict[str, int]], peaks: dict[str, tuple[str, int]]) -> str:
    """Memory by kind of one or more runs side by side; `peaks`: run -> (what was measured, bytes)."""
    kinds = list(dict.fromkeys(kind for sizes in runs.values() for kind in sizes))
    rows: list[tuple[str, ...]] = [("memory", *runs)]
    rows += [(kind, *(human(s[kind]) if kind in s else "-" for s in runs.values())) for kind in kinds]
    rows.append(("sum", *(human(sum(s.values())) for s in runs.values())))
    label = next(iter(peaks.values()))[0]
    rows.append((label, *(human(peaks[name][1]) for name in runs)))
    return table(rows, right=tuple(range(1, len(runs) + 1)))


def measured_peak(trainer: Trainer) -> tuple[str, int]:
    label = "measured peak (GPU)" if trainer.device.type == "cuda" else "measured peak (process)"
    return label, peak_bytes(trainer.device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def estimated(config: TrainConfig) -> str:
    """The closed-form estimate of what this run needs on a GPU (`qlora-ref estimate` shows it by category)."""
    from ..memory.architecture import ConfigError, read_config
    from ..memory.estimate import estimate

    try:
        needed = estimate(read_config(config.model), memory_settings(config)).needed
    except ConfigError as error:
        return f"no estimate: {error}"
    return f"about {human(needed)} on a GPU, context included (qlora-ref estimate: by category)"


def _logits_chunk(config: TrainConfig) -> int:
    kind = read_model_config(config.model).get("model_type")
    return CHUNK if kind in PLAIN_HEAD else 0


def memory_settings(config: TrainConfig) -> Any:
    """This run in the words of the memory estimate. Other 4-bit types store what fp4 stores."""
    from ..memory.settings import Settings

    dtype = "bf16" if config.dtype == "auto" else config.dtype
    four_bit = {"none": dtype, "nf4": "nf4"}.get(config.quant_type, "fp4")
    return Settings(
        seq=config.max_length,
        batch=config.batch_size,
        accumulate=config.grad_accum,
        weights=four_bit,
        double_quant=config.double_quant,
        block_size=config.block_size,
        rank=config.lora_rank,
        targets="all" if config.lora_targets == "all-linear" else config.lora_targets,
        adapter_dtype="fp32",
        dropout=config.lora_dropout,
        compute_dtype=dtype,
        embedding_dtype=dtype,
        optimizer=f"adamw{config.optimizer_bits}",
        paged=True,
        checkpointing=config.gradient_checkpointing,
        keep_products=bool(config.keep_products),  # None: a card, where nobody asked for it
        logits_chunk=_logits_chunk(config),
    )


def paged(config: TrainConfig) -> str:
    """Where Adam's moments live, if that was asked for."""
    return "" if config.paging == "auto" else f", moments paged ({config.paging}, pool of {config.pool_mib} MiB)"


def startup(config: TrainConfig, trainer: Trainer, dtype: torch.dtype, memory_allows: bool = False) -> str:
    """What is about to run: versions, device, dtypes, true parameter counts, data, steps.

    memory_allows: products are kept for that reason, not because somebody asked.
    """
    total, trainable = count_parameters(trainer.model)
    base = "16-bit (not quantized)" if config.quant_type == "none" else (
        f"{config.quant_type}, blocks of {config.block_size}" + (", double quantization" if config.double_quant else "")
    )  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    per_step = f"{config.batch_size} x {config.grad_accum}"
    activations = "computed again in backward" if config.gradient_checkpointing else "kept"
    if config.keep_products:
        activations += ", 4-bit layers and sdpa attention kept"
        activations += " (memory allows; --no-keep-products)" if memory_allows else ""
    rows = [
        (
            "versions",
            f"qlora_ref {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        ),
        ("device", f"{device_name(trainer.device)}; kernels: {backend(trainer.device)}"),
        ("base", f"{config.model}: {base}"),
        ("dtypes", f"activations {name}, unquantized weights {name}, adapters and their gradients float32"),
        ("parameters", f"{total:,} in all, {trainable:,} trained ({trainable / total:.2%})"),
        ("adapters", f"rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {config.lora_targets}"),
        ("data", f"{config.data}: {trainer.data.summary()}"),
        ("held out", f"{min(len(trainer.eval_ids), config.max_eval_examples)} examples"),
        ("steps", f"{trainer.plan.total_steps} of {per_step} {'rows' if config.packing else 'examples'}"),
        ("activations", activations),
        ("memory", estimated(config.replace(keep_products=False) if memory_allows else config)),  # as on a GPU
        ("optimizer", f"paged AdamW {config.optimizer_bits}-bit, lr {config.lr:g} {config.schedule}{paged(config)}"),
    ]
    width = max(len(k) for k, _ in rows)
    return "\n".join(f"  {k:<{width}}  {v}" for k, v in rows)


class ProgressBar:
    """tqdm with loss, tokens per second and memory; one line per evaluation above it."""

    def __init__(self, trainer: Trainer, label: str):
        from tqdm import tqdm

        self.trainer = trainer
        self.bar = tqdm(
            total=trainer.plan.total_steps, initial=trainer.step, desc=label, dynamic_ncols=True, leave=True
        )

    def __call__(self, values: dict[str, Any]) -> None:
        shown = f"loss {values['loss']:.3f}, {values['tokens_per_second']:.0f} tok/s, {human(values['peak_bytes'])}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(1)

    def evaluated(self, record: dict[str, Any]) -> None:
        if record.get("eval_loss") is not None:
            self.bar.write(f"  step {record['step']}: held-out loss {record['eval_loss']:.4f}")

    def close(self) -> None:
        self.bar.close()
