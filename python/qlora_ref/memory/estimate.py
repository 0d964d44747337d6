"""The closed-form estimate: bytes by category and phase, from shapes alone. Standard library only, microseconds.

    peak = static + max over the phases of what only that phase holds

Every term is exact for the module graph of this package under a 512-byte-granular allocator with no fragmentation;
the trace (`trace.py`) runs that graph and must agree. What an operator-level view cannot see, the CUDA context, library
workspaces and fragmentation, is a stated margin on top (`Margin`).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from . import activations
from . import categories as row
from .architecture import Architecture, blocks
from .settings import BYTES, PAGE_BYTES, Settings

FP32 = 4
DECODED_BYTES = 512 * 2**20  # cuda_linear.SCRATCH_BYTES
GRANULE = 512  # bytes: the CUDA caching allocator rounds every request up to this
ALIGNMENT = 256  # elements: where a tensor may start in a page of 32-bit states


@dataclass(frozen=True)
class Margin:
    """What is on the card besides the tensors of the module graph.

    context: bytes, once. fragmentation: share of the tensors. decoded: budget in bytes of the dequantized weights that
    the CUDA path keeps between a layer's recomputation and its backward (cuda_linear.Scratch).

    The first two are assumed, not measured: 0.8 GiB for CUDA context, cuBLAS and attention workspaces; 3 % for blocks
    that the caching allocator reserves but cannot use (with `expandable_segments`).
    `qlora-ref estimate --compare measure` measures both.
    """

    context: int = 819 * 2**20
    fragmentation: float = 0.03
    decoded: int = DECODED_BYTES


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training setup. `static` lives in every phase; `phases[name]` only in that one; `host` in RAM."""

    architecture: Architecture
    settings: Settings
    static: Counter
    phases: dict[str, Counter]
    host: int = 0
    margin: Margin = field(default_factory=Margin)

    def phase_bytes(self, phase: str) -> int:
        return self.static.total() + self.phases[phase].total()

    @property
    def ranking(self) -> list[str]:
        """Phases, largest first: the peak and its runner-up lead."""
        return sorted(self.phases, key=self.phase_bytes, reverse=True)

    @property
    def peak_phase(self) -> str:
        return self.ranking[0]

    @property
    def allocated(self) -> int:
        """Peak of live tensors, what `torch.cuda.max_memory_allocated` reports."""
        return self.phase_bytes(self.peak_phase)

    @property
    def dynamic(self) -> int:
        return self.phases[self.peak_phase].total()

    @property
    def categories(self) -> Counter:
        return self.static + self.phases[self.peak_phase]

    @property
    def kept(self) -> int:
        """Decoded weights that the CUDA path keeps, beyond the one that the peak counts already."""
        if not self.settings.quantized:
            return 0
        decoded = self.settings.product_bytes * self.architecture.quantizable_parameters()
        return max(0, min(self.margin.decoded, decoded) - self.phases[self.peak_phase][row.SCRATCH])

    @property
    def needed(self) -> int:
        """What the card must have: tensors, kept decoded weights, fragmentation, context."""
        return int((self.allocated + self.kept) * (1 + self.margin.fragmentation)) + self.margin.context


def estimate(architecture: Architecture, settings: Settings, margin: Margin | None = None) -> Estimate:
    """Memory of one training step. Raises `ConfigError` when `settings.targets` names no layer of the model."""
    trainable = trainable_tensors(architecture, settings)
    static = _weights(architecture, settings)
    if settings.train == "adapters":
        static[row.ADAPTERS] = _bytes(trainable, settings.adapter_bytes)
    static[row.STATES], host = _states(trainable, settings)
    return Estimate(
        architecture, settings, +static, _phases(architecture, settings, trainable), host, margin or Margin()
    )


def trainable_tensors(a: Architecture, s: Settings) -> list[tuple[int, int]]:
    """(elements, how many of them) of the trainable tensors: lora_A and lora_B of each target, or every parameter."""
    if s.train == "full":
        matrices = [(m.size, count) for m, count in a.linear_layers()]
        embeddings = [(a.vocab * a.hidden, 1 if a.tied else 2)]
        return [*matrices, *embeddings, *Counter([*a.expert_tensors(), *a.small_tensors()]).items()]
    targets = s.target_names(a)
    pairs = [(m, count) for m, count in a.linear_layers() if m.name in targets]
    return [(s.rank * side, count) for m, count in pairs for side in (m.inputs, m.outputs)]


def _weights(a: Architecture, s: Settings) -> Counter:
    out: Counter = Counter()
    e = s.activation_bytes
    out[row.EMBEDDINGS] = rounded(a.vocab * a.hidden * e) * (1 if a.tied else 2)
    out[row.SMALL] = sum(rounded(size * e) for size in a.small_tensors())
    plain = BYTES.get(s.weights, s.product_bytes)
    out[row.PLAIN] = sum(rounded(size * plain) for size in a.expert_tensors())  # no nn.Linear: they stay 16-bit
    for matrix, count in a.linear_layers():
        if not s.quantized:
            out[row.PLAIN] += count * rounded(matrix.size * plain)
            continue
        level1 = blocks(matrix.size, s.block_size)
        out[row.PACKED] += count * rounded(blocks(matrix.size, 2))
        out[row.LEVEL1] += count * rounded(level1 * (1 if s.double_quant else FP32))
        if s.double_quant:  # and the mean that was taken off
            out[row.LEVEL2] += count * (rounded(FP32 * blocks(level1, s.nested_block_size)) + rounded(FP32))
    return out


def rounded(size: int) -> int:
    """`size` bytes as the caching allocator hands them out."""
    return blocks(size, GRANULE) * GRANULE


def _bytes(tensors: list[tuple[int, int]], size: int) -> int:
    return sum(count * rounded(elements * size) for elements, count in tensors)


def state_bytes(sizes: Iterable[tuple[int, int]], s: Settings) -> int:
    """Bytes of the states of tensors of these (elements, count): whole pages, in which every tensor starts at a block.

    A 32-bit page holds both moments of its elements, an 8-bit page their codes and one fp32 absmax a block each.
    """
    block = ALIGNMENT if s.optimizer == "adamw32" else s.state_block
    block_bytes = 2 * FP32 * block if s.optimizer == "adamw32" else 2 * block + 2 * FP32
    elements = sum(count * blocks(size, block) * block for size, count in sizes)
    return blocks(elements, PAGE_BYTES // block_bytes * block) * PAGE_BYTES


def _states(sizes: list[tuple[int, int]], s: Settings) -> tuple[int, int]:
    """(bytes on the device, bytes in host memory). The pool stays on the device between steps."""
    states = state_bytes(sizes, s)
    steps = sum(count for _, count in sizes) * GRANULE  # each tensor's step count
    return (min(states, s.pool_mib * 2**20) + steps, states) if s.paged else (states + steps, 0)


def _tables(a: Architecture, s: Settings) -> int:
    """cos and sin (seq, head_dim), and token ids, labels, mask as int64."""
    rotary = 0 if a.encoder_decoder else 2 * s.activation_bytes * s.seq * a.head_dim
    return rotary + 3 * 8 * s.tokens


def _phases(a: Architecture, s: Settings, trainable: list[tuple[int, int]]) -> dict[str, Counter]:
    layer = activations.Layer(a, s)
    count = a.layers + a.decoder_layers
    kind = row.CHECKPOINTS if s.checkpointing else row.WORKING
    kept = layer.checkpoint if s.checkpointing else layer.saved()
    ahead = count if s.checkpointing else count - 1  # what the last layer's backward finds besides its own tensors
    size = s.adapter_bytes if s.train == "adapters" else s.product_bytes
    gradients = _bytes(trainable, size)
    worst = layer.backward()

    def phase(
        kept_layers: int, waiting: int, working: int = 0, logits: int = 0, scratch: int = 0, grads: int = 0
    ) -> Counter:
        out = Counter({row.TABLES: _tables(a, s), kind: kept_layers * kept + waiting * layer.products})
        out.update({row.WORKING: working - unsaved, row.LOGITS: logits, row.SCRATCH: scratch})
        return +(out + Counter({row.GRADIENTS: grads}))

    # Without checkpointing and with frozen embeddings, the first norm needs no gradient of its input and saves none.
    unsaved = 0 if s.checkpointing or s.train == "full" else FP32 * s.tokens * a.hidden
    before = gradients if s.keeps_gradients else 0  # of earlier micro-batches
    # Only full fine-tuning has a gradient of the head (before the layers') and of the embeddings (after them).
    head = rounded(a.vocab * a.hidden * size) if s.train == "full" else 0
    layers = gradients - head * (1 if a.tied else 2)
    last = before or head
    first = before or head + layers * (count - 1) // count
    return {
        row.LOSS_FORWARD: phase(count, count, *activations.loss_forward(a, s), grads=before),
        row.LOSS_BACKWARD: phase(count, count, *activations.loss_backward(a, s), grads=before),
        row.LAST_LAYER: phase(ahead, count - 1, worst.working, 0, worst.scratch, last + worst.gradients),
        row.FIRST_LAYER: phase(ahead - count + 1, 0, worst.working, 0, worst.scratch, first + worst.gradients),
        row.STEP: Counter({row.GRADIENTS: gradients}),
    }
