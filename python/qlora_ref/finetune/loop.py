"""The training loop: micro-batches summed into a step, the step clipped and applied, everything written down.

    loss = sum of -log p over the step's labelled tokens / how many there are     (no mean of means: rows differ)
    g <- g * min(1, max_grad_norm / |g|);   paged AdamW;   learning rate by the schedule

Every random number is a function of (seed, step), so a resumed run repeats an uninterrupted one bit for bit on a CPU.
"""

import json
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..optim import PagedAdamW
from .batches import IGNORE, Plan, collate
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .encode import Dataset
from .loading import set_checkpointing
from .loss import first_nonfinite, mean_loss, summed_loss
from .peft_io import write_atomically

METRICS = "metrics.jsonl"
_STATUS = Path("/proc/self/status")
PATIENCE = 10  # steps in a row that the fp16 loss scaler may skip before the run is stopped


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what helps. The last checkpoint is good."""


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step` (from 0) of `total`: linear warm-up, then constant, cosine to 0 or linear to 0."""
    warmup = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, total - warmup)
    return config.lr * (0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done)


def peak_bytes(device: torch.device) -> int:
    """Most memory used since `reset_peak`: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> None:
    """Start the peak anew. Without /proc (macOS) a process has one peak for all its life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Trainer:
    """One run. `train()` from the current step to the end; `interrupt()` asks it to stop after the step in hand."""

    model: Any  # a transformers model with adapters
    config: TrainConfig
    data: Dataset
    train_ids: list[int]
    eval_data: Dataset
    eval_ids: list[int]
    pad: int
    device: torch.device
    output: Path
    adapter: dict[str, Any]  # keywords of save_adapter
    log: Callable[[dict[str, Any]], None] = lambda record: None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # fp16 steps in a row that overflowed
    interrupted: bool = False
    finished: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        c = self.config
        self.plan = Plan(self.data, self.train_ids, c)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        pool = c.pool_mib << 20
        self.optimizer = PagedAdamW(
            self.trainable,
            lr=c.lr,
            betas=(0.9, c.beta2),
            weight_decay=c.weight_decay,
            bits=c.optimizer_bits,
            paging=c.paging,
            page_bytes=min(2 << 20, 1 << (pool // 8).bit_length() - 1),  # at least eight pages in a small pool
            pool_bytes=pool,
        )
        half = next(p.dtype for p in self.model.parameters() if p.is_floating_point() and not p.requires_grad)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half is torch.float16)
        self.eval_steps = c.eval_steps or max(1, -(-self.plan.total_steps // 10))
        if c.gradient_checkpointing:
            set_checkpointing(self.model, True, bool(c.keep_products))
        self.model.train()

    # --- one step --------------------------------------------------------------------------------------------------

    def batches(self) -> list[dict[str, Any]]:
        """The micro-batches of the step in hand."""
        return [collate(self.data, rows, self.pad, self.device) for rows in self.plan.step(self.step)]

    def train_step(self) -> dict[str, Any]:
        """Forward, backward, clip, update. Returns loss (nats a labelled token), gradient norm and rate.

        Raises TrainingStopped naming the layer if loss or gradient is not finite (fp16: after PATIENCE skipped steps).
        """
        c, start = self.config, time.perf_counter()
        torch.manual_seed(c.seed * 1_000_003 + self.step)  # dropout
        batches = self.batches()
        labelled = sum(int((b["labels"] != IGNORE).sum()) for b in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss, _ = summed_loss(self.model, batch)
            self.scaler.scale(loss / labelled).backward()
            total += loss.detach()
        rate = learning_rate(self.step, self.plan.total_steps, c)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, c.max_grad_norm).item()
        loss_value = total.item() / labelled
        self._check_finite(loss_value, norm, batches)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seen = sum(int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches)
        elapsed = time.perf_counter() - start
        self.tokens, self.seconds = self.tokens + seen, self.seconds + elapsed
        return {"loss": loss_value, "grad_norm": norm, "lr": rate, "tokens_per_second": seen / elapsed}

    def _check_finite(self, loss: float, norm: float, batches: list[dict[str, Any]]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        if self.scaler.is_enabled() and self.skipped < PATIENCE:
            return  # the scaler skips this step and halves its scale
        where = next((w for b in batches if (w := first_nonfinite(self.model, b)) != "the loss"), "the loss")
        raise TrainingStopped(
            f"step {self.step + 1} is not finite (loss {loss:g}, gradient norm {norm:g}): first in {where}. Nothing of "
            "it was applied; lower --lr, use --dtype bf16 or fp32, or look at the data of this step."
        )

    # --- the run ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> float:
        """Held-out loss, nats a labelled token; NaN (null in metrics.jsonl) if nothing is held out."""
        size = self.config.batch_size
        ids = self.eval_ids[: self.config.max_eval_examples]
        if not ids:
            return math.nan
        order = sorted(ids, key=self.eval_data.length)
        chunks = [[[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
        return mean_loss(self.model, [collate(self.eval_data, rows, self.pad, self.device) for rows in chunks])

    def record(self, values: dict[str, Any]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        entry = {"step": self.step, **finite}
        self.records.append(entry)
        with open(self.output / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.log(entry)

    def train(self, progress: Callable[[dict[str, Any]], None] = lambda values: None) -> None:
        """Run to the end, or to the end of the current step after `interrupt()`; a checkpoint is left either way."""
        with self._signals():
            if self.step == 0 and not self.records:
                self.record({"eval_loss": self.evaluate()})
            while self.step < self.plan.total_steps and not self.interrupted:
                values = self.train_step()
                last = self.step == self.plan.total_steps
                peak = peak_bytes(self.device)
                if self.step % self.config.log_steps == 0 or last:
                    self.record({**values, "tokens": self.tokens, "peak_bytes": peak})
                progress({**values, "peak_bytes": peak})
                if self.step % self.eval_steps == 0 or last:
                    self.record({"eval_loss": self.evaluate()})
                if self.step % self.config.save_steps == 0:
                    self.save()
            self.save()
        self.finished = self.step >= self.plan.total_steps

    def interrupt(self) -> None:
        self.interrupted = True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """First Ctrl-C (or SIGTERM): finish the step, leave a checkpoint. Second: stop at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def first(number: int, _frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupt()
            print(
                "\nstopping after this step; a checkpoint will be left (again to stop at once)",
                file=sys.stderr,
            )

        old = {s: signal.signal(s, first) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this step (kept as it is if there is one)."""
        progress = {
            "step": self.step,
            "total_steps": self.plan.total_steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": fingerprint(self.data, self.train_ids),
            "scaler": self.scaler.state_dict(),
            "computed_by": computed_by(self.device),
        }
        return save_checkpoint(
            self.output, self.model, self.optimizer, progress, self.adapter, keep=self.config.save_limit
        )

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint. TrainingStopped if the data is not the one the run was started with."""
        progress = load_checkpoint(checkpoint, self.model, self.optimizer)
        if progress["data"] != fingerprint(self.data, self.train_ids):
            raise TrainingStopped(
                f"the training data or its tokens changed since {checkpoint} was saved; start a new run elsewhere."
            )
        if progress["computed_by"] != computed_by(self.device):
            print(
                f"note: {checkpoint} was computed by {progress['computed_by']}, this is {computed_by(self.device)}: "
                "the resumed run is sound, but not bit for bit what it would have been",
                file=sys.stderr,
            )
        self.step, self.tokens, self.seconds = progress["step"], progress["tokens"], progress["seconds"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(progress["scaler"])
        self.records = rewind_metrics(self.output / METRICS, self.step)


def backend(device: torch.device) -> str:
    return "native" if getattr(native, device.type, None) is not None else "reference (PyTorch)"


def computed_by(device: torch.device) -> str:
    """What fixes the bits of a run beside its seed."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"torch {torch.__version__}, {chip}, {backend(device)} kernels, {torch.get_num_threads()} threads"


def fingerprint(data: Dataset, ids: list[int]) -> str:
    """sha256 over the tokens, the loss mask and the split: what a resumed run must find unchanged."""
    import hashlib

    digest = hashlib.sha256(data.ids.tobytes())
    digest.update(data.answer.tobytes())
    digest.update(repr(ids).encode())
    return digest.hexdigest()


def rewind_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was logged after `step` (the interrupted run may have gone further than its last checkpoint)."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line cut by the kill
        if entry["step"] <= step:
            records.append(entry)
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in records).encode())
    return records
