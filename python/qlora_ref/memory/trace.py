"""The trace: the real module graph, forward + backward + optimizer step, on meta tensors. No GPU, no memory, no weights.

It runs two steps, so that the second forward and backward see the optimizer states, and reports the second.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch

from .categories import (
    ADAPTERS, CHECKPOINTS, EMBEDDINGS, FIRST_LAYER, GRADIENTS, LAST_LAYER, LEVEL1, LEVEL2, LOGITS, LOSS_BACKWARD,
    LOSS_FORWARD, PACKED, PLAIN, SMALL, STATES, STEP, TABLES, WORKING,
)  # fmt: skip
from .estimate import SMALLEST_8BIT, state_bytes
from .settings import Settings
from .tracker import Tracker


@dataclass
class Trace:
    """What one traced training step held. `phases`: phase -> (total bytes, bytes by category)."""

    phases: dict[str, tuple[int, Counter]] = field(default_factory=dict)
    tokens: int = 0

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase][0])

    @property
    def allocated(self) -> int:
        return self.phases[self.peak_phase][0]

    @property
    def categories(self) -> Counter:
        return self.phases[self.peak_phase][1]


def category_of(name: str, tensor: torch.Tensor) -> str:
    """Category of a parameter or buffer, from its name in the model."""
    leaf = name.rpartition(".")[2]
    if "lora_" in name:
        return ADAPTERS
    if leaf in ("absmax", "absmax_codes"):
        return LEVEL1
    if leaf in ("nested_absmax", "absmax_mean"):
        return LEVEL2
    if tensor.dtype == torch.uint8:
        return PACKED
    if any(part in name for part in ("embed_tokens", "lm_head", "shared.")):
        return EMBEDDINGS
    return PLAIN if tensor.dim() > 1 else SMALL


class States:
    """AdamW's two states of every trainable parameter, allocated at the first step like a fused kernel would."""

    def __init__(self, parameters, settings: Settings):
        self.parameters, self.settings, self.states = list(parameters), settings, []

    def step(self) -> None:
        if self.states:
            return
        if self.settings.paged:
            movable, fixed = state_bytes([p.numel() for p in self.parameters], self.settings)
            size = min(movable, self.settings.pool_mib * 2**20) + fixed
            self.states = [torch.empty(size, dtype=torch.uint8, device=self.parameters[0].device)]
            return
        for p in self.parameters:
            self.states += self._allocate(p)

    def _allocate(self, p: torch.Tensor) -> list[torch.Tensor]:
        if self.settings.optimizer == "adamw8" and p.numel() >= SMALLEST_8BIT:
            blocks = -(-p.numel() // self.settings.state_block)
            codes = [torch.empty(p.numel(), dtype=torch.uint8, device=p.device) for _ in range(2)]
            return codes + [torch.empty(blocks, dtype=torch.float32, device=p.device) for _ in range(2)]
        return [torch.empty_like(p, dtype=torch.float32) for _ in range(2)]


def watch_layers(tracker: Tracker, layers, checkpointing: bool) -> list:
    """Hooks that name the phase: which layer is in backward, and which tensors are checkpoints."""
    last = len(layers) - 1
    names = {0: FIRST_LAYER, last: LAST_LAYER}

    def hook(index):
        def after(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if checkpointing and index < last:
                tracker.relabel(hidden, CHECKPOINTS)
            phase = names.get(index, "middle layers backward")
            hidden.register_hook(lambda grad: tracker.enter(phase))

        return after

    return [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]


def watch_head(tracker: Tracker, head) -> list:
    """Hooks around the head: what is allocated from here until the gradient of its input is logits and loss."""

    def before(module, args):
        tracker.enter(LOSS_FORWARD)
        tracker.scope_name = LOGITS
        args[0].register_hook(leave)

    def leave(grad):
        tracker.scope_name = WORKING

    return [head.register_forward_pre_hook(before)]


def watch_gradients(tracker: Tracker, parameters) -> list:
    return [
        p.register_post_accumulate_grad_hook(lambda p: tracker.relabel(p.grad, GRADIENTS)) for p in parameters
    ]


def traced_step(tracker: Tracker, model, optimizer, settings: Settings, inputs: dict, loss_of) -> None:
    """One optimizer step: `min(accumulate, 2)` micro-batches, then the states."""
    for _ in range(min(settings.accumulate, 2)):
        tracker.enter("forward")
        loss = loss_of(model, inputs)
        tracker.enter(LOSS_BACKWARD)
        loss.backward()
        del loss
    tracker.enter(STEP)
    with tracker.scope(STATES):
        optimizer.step()
    for p in model.parameters():
        p.grad = None


def hf_loss(model, inputs):
    return model(**inputs, use_cache=False).loss


def trace_model(model, layers, head, settings: Settings, op_categories=None, loss_of=hf_loss, device="meta") -> Trace:
    """Trace two steps of `model` (on `device`), whose decoder `layers` and `head` are given; report the second."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = States(trainable, settings)
    tracker = Tracker(op_categories)
    with tracker:
        tracker.adopt(model.named_parameters(), category_of)
        tracker.adopt(model.named_buffers(), category_of)
        ids = torch.zeros(settings.batch, settings.seq, dtype=torch.long, device=device)
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        hooks = watch_layers(tracker, layers, settings.checkpointing) + watch_head(tracker, head)
        hooks += watch_gradients(tracker, trainable)
        for _ in range(2):
            tracker.reset_peaks()
            traced_step(tracker, model, optimizer, settings, inputs, loss_of)
    for hook in hooks:
        hook.remove()
    return Trace({name: (peak.total, peak.categories) for name, peak in tracker.peaks.items()}, settings.tokens)


def dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

