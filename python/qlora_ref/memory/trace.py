"""The trace: the real module graph, forward + backward + optimizer step, on meta tensors. No GPU, no memory, no weights.

It runs two steps, so that the second forward and backward see the optimizer states, and reports the second.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch

from . import categories as row
from .estimate import state_bytes
from .architecture import Architecture
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

    def __init__(self, parameters: list[torch.Tensor], settings: Settings):
        self.parameters, self.settings, self.states = parameters, settings, []

    def step(self) -> None:
        if self.states:
            return
        size = state_bytes([p.numel() for p in self.parameters], self.settings)
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

    return [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]


def watch_head(tracker: Tracker, head) -> list:
    """Hooks around the head: what is allocated from here until the gradient of its input is logits and loss."""

    def before(module, args):
        tracker.enter(row.LOSS_FORWARD)
        tracker.scope_name = row.LOGITS
        args[0].register_hook(leave)

    def leave(grad):
        tracker.scope_name = row.WORKING

    return [head.register_forward_pre_hook(before)]


def watch_gradients(tracker: Tracker, parameters) -> list:
    return [
        p.register_post_accumulate_grad_hook(lambda p: tracker.relabel(p.grad, row.GRADIENTS)) for p in parameters
    ]


def traced_step(tracker: Tracker, model, optimizer, settings: Settings, inputs: dict, loss_of) -> None:
    """One optimizer step: `min(accumulate, 2)` micro-batches, then the states."""
    for _ in range(min(settings.accumulate, 2)):
        tracker.enter("forward")
        loss = loss_of(model, inputs)
        tracker.enter(row.LOSS_BACKWARD)
        loss.backward()
        del loss
    tracker.enter(row.STEP)
    with tracker.scope(row.STATES):
        optimizer.step()
    for p in model.parameters():
        p.grad = None


def hf_loss(model, inputs):
    return model(**inputs, use_cache=False).loss


def trace(config: dict, architecture: Architecture, settings: Settings) -> Trace:
    """Trace two steps of the model of a Hugging Face config on meta tensors; report the second."""
    return trace_graph(build(config, architecture, settings), settings)


def trace_graph(graph: Graph, settings: Settings, loss_of=hf_loss) -> Trace:
    """Trace two steps of a graph on the device it lives on; report the second."""
    model = graph.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = States(trainable, settings)
    dequantize = torch.ops.qlora_ref.dequantize_4bit.default
    tracker = Tracker({dequantize: row.SCRATCH}, expansions())
    with tracker:
        tracker.adopt(model.named_parameters(), category_of)
        tracker.adopt(model.named_buffers(), category_of)
        ids = torch.zeros(settings.batch, settings.seq, dtype=torch.long, device=trainable[0].device)
        inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        hooks = watch_layers(tracker, graph.layers, settings.checkpointing) + watch_head(tracker, graph.head)
        hooks += watch_gradients(tracker, trainable)
        for _ in range(2):
            tracker.reset_peaks()
            traced_step(tracker, model, optimizer, settings, inputs, loss_of)
    for hook in hooks:
        hook.remove()
    return Trace({name: (peak.total, peak.categories) for name, peak in tracker.peaks.items()})
