"""The trace: the real module graph, forward + backward + optimizer step, on meta tensors. No GPU and no weights.

It runs two steps, so that the second forward and backward see the optimizer states, and reports the second.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import categories as row
from .architecture import Architecture
from .estimate import state_bytes
from .graph import Graph, build, expansions
from .settings import Settings
from .tracker import Tracker


@dataclass
class Trace:
    """What one traced training step held. `phases`: phase -> (total bytes, bytes by category)."""

    phases: dict[str, tuple[int, Counter]] = field(default_factory=dict)

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
        return row.ADAPTERS
    if leaf in ("absmax", "absmax_codes"):
        return row.LEVEL1
    if leaf in ("nested_absmax", "absmax_mean"):
        return row.LEVEL2
    if tensor.dtype == torch.uint8:
        return row.PACKED
    if any(part in name for part in ("embed_tokens", "lm_head", "shared.")):
        return row.EMBEDDINGS
    return row.PLAIN if tensor.dim() > 1 else row.SMALL


class States:
    """The states of `PagedAdamW`, allocated at the first step: all pages, or the pool, and a step count a tensor."""

    def __init__(self, parameters: Sequence[torch.Tensor], settings: Settings):
        self.parameters, self.settings = parameters, settings
        self.states: list[torch.Tensor] = []

    def step(self) -> None:
        if self.states:
            return
        size = state_bytes([(p.numel(), 1) for p in self.parameters], self.settings)
        if self.settings.paged:
            size = min(size, self.settings.pool_mib * 2**20)
        device = self.parameters[0].device
        self.states = [torch.empty(size, dtype=torch.uint8, device=device)]
        self.states += [torch.empty((), device=device) for _ in self.parameters]


def watch_layers(tracker: Tracker, layers, checkpointing: bool) -> list:
    """Hooks that name the phase: which layer is in backward, and which tensors are checkpoints."""
    last = len(layers) - 1
    names = {0: row.FIRST_LAYER, last: row.LAST_LAYER}

    def hook(index):
        def after(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if checkpointing and index < last:
                tracker.relabel(hidden, row.CHECKPOINTS)
            phase = names.get(index, "middle layers backward")
            hidden.register_hook(lambda grad: tracker.enter(phase))

        return after

    def before(module, args):
        if checkpointing:
            tracker.relabel(args[0], row.CHECKPOINTS)

    return [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)] + [
        layers[0].register_forward_pre_hook(before)
    ]


def watch_rotary(tracker: Tracker, model) -> list:
    """What the shared rotary module returns, cos and sin, is a table."""

    def after(module, args, output):
        for table in output:
            tracker.relabel(table, row.TABLES)

    return [m.register_forward_hook(after) for n, m in model.named_modules() if n.endswith("rotary_emb")]


def watch_head(tracker: Tracker, head) -> list:
    """Hooks around the head: what is allocated from here until the gradient of its input is logits and loss."""

    def before(module, args):
        if tracker.phase == "forward":  # in a chunked loss, the backward computes logits again
            tracker.enter(row.LOSS_FORWARD)
        tracker.scope_name = row.LOGITS
        args[0].register_hook(leave)

    def leave(grad):
        tracker.scope_name = row.WORKING

    return [head.register_forward_pre_hook(before)]


def watch_gradients(tracker: Tracker, parameters) -> list:
    return [p.register_post_accumulate_grad_hook(lambda p: tracker.relabel(p.grad, row.GRADIENTS)) for p in parameters]


def traced_step(tracker: Tracker, model, optimizer, settings: Settings, inputs: dict) -> None:
    """One optimizer step: `min(accumulate, 2)` micro-batches, then the states."""
    for _ in range(min(settings.accumulate, 2)):
        tracker.enter("forward")
        loss = loss_function(settings)(model, inputs)
        tracker.enter(row.LOSS_BACKWARD)
        loss.backward()
        del loss
    tracker.enter(row.STEP)
    with tracker.scope(row.STATES):
        optimizer.step()
    for p in model.parameters():
        p.grad = None


def batch(settings: Settings, device) -> dict[str, torch.Tensor]:
    ids = torch.zeros(settings.batch, settings.seq, dtype=torch.long, device=device)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def loss_function(settings: Settings):
    """(model, inputs) -> loss, as transformers computes it, or in chunks of `logits_chunk` tokens."""
    if settings.logits_chunk:
        return partial(chunked_loss, chunk=settings.logits_chunk)
    return lambda model, inputs: model(**inputs, use_cache=False).loss


def chunked_loss(model, inputs, chunk: int):
    """Mean cross-entropy whose logits exist for `chunk` tokens at a time, in the forward and in the backward."""
    hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)[0].flatten(0, 1)
    labels = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100).flatten()

    def part(rows, targets):
        return nn.functional.cross_entropy(model.lm_head(rows).float(), targets, ignore_index=-100, reduction="sum")

    total = sum(
        checkpoint(part, rows, targets, use_reentrant=False)
        for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    )
    return total / (labels != -100).sum()


def trace(config: dict, architecture: Architecture, settings: Settings) -> Trace:
    """Trace two steps of the model of a Hugging Face config on meta tensors; report the second."""
    return trace_graph(build(config, architecture, settings), settings)


def trace_graph(graph: Graph, settings: Settings) -> Trace:
    """Trace two steps of a graph on the device it lives on; report the second."""
    model = graph.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = States(trainable, settings)
    dequantize = torch.ops.qlora_ref.dequantize_4bit.default
    tracker = Tracker({dequantize: row.SCRATCH}, expansions())
    with tracker:
        tracker.adopt(model.named_parameters(), category_of)
        tracker.adopt(model.named_buffers(), category_of)
        with tracker.scope(row.TABLES):
            inputs = batch(settings, trainable[0].device)
        hooks = watch_layers(tracker, graph.layers, settings.checkpointing) + watch_head(tracker, graph.head)
        hooks += watch_gradients(tracker, trainable) + watch_rotary(tracker, model)
        for _ in range(2):
            tracker.reset_peaks()
            traced_step(tracker, model, optimizer, settings, inputs)
    for hook in hooks:
        hook.remove()
    return Trace({name: (peak.total, peak.categories) for name, peak in tracker.peaks.items()})
