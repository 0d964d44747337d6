"""Bytes of one layer and of the loss during training, in closed form (method: Korthikanti et al. 2022, arXiv 2205.05198).

T tokens, h hidden, f MLP width, q = heads * head_dim, kv = kv_heads * head_dim, n heads, r rank, V vocabulary,
c bytes of a computed element. Terms are re-derived from the module graph and held to the trace by
`tests/test_memory_trace.py`; `docs/09_memory.md` says which tensor each one is.
"""

from dataclasses import dataclass

from .architecture import Architecture
from .settings import BYTES, Settings

FP32 = 4


@dataclass(frozen=True)
class Moment:
    """What is alive at one instant of a layer's backward on top of its input: bytes by kind."""

    working: int
    scratch: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.working + self.scratch + self.gradients


class Layer:
    """Activations of one decoder layer: what autograd saves, and the worst instant of its backward."""

    def __init__(self, architecture: Architecture, settings: Settings):
        self.a, self.s = architecture, settings
        self.T = settings.tokens
        self.c = BYTES[settings.compute_dtype]
        self.targets = settings.target_names(architecture)
        self.full = settings.train == "full"

    @property
    def checkpoint(self) -> int:
        """The one tensor kept for a layer under checkpointing: its input."""
        return self.c * self.T * self.a.hidden

    def keeps_input(self, *names: str) -> bool:
        """Autograd saves the input of a linear layer only for the gradient of something trainable in it."""
        return self.full or any(name in self.targets for name in names)

    def saved(self) -> int:
        """S: everything autograd saves for the backward of one layer."""
        return self.norms() + self.attention() + self.mlp() + self.adapters()

    def norms(self) -> int:
        """An fp32 copy of the input and 1/rms of each norm; trained norms save their normalized input as well."""
        h, copies = self.a.hidden, FP32 if self.c < FP32 else 0
        return self.T * self.a.norms * (copies * h + FP32 + self.full * self.c * h)

    def attention(self) -> int:
        a, c = self.a, self.c
        inputs = c * a.hidden * self.keeps_input("q_proj", "k_proj", "v_proj")
        qkv = c * (a.query_width + 2 * a.kv_width)
        if self.s.attention == "flash":
            return self.T * (inputs + qkv + c * a.query_width + FP32 * a.heads)  # output, log-sum-exp
        scores = self.s.seq * a.heads * (FP32 + c)  # softmax in fp32, its copy in the compute dtype
        return self.T * (inputs + qkv + c * a.query_width * self.keeps_input("o_proj") + scores)

    def mlp(self) -> int:
        a, c = self.a, self.c
        inputs = c * a.hidden * self.keeps_input("gate_proj", "up_proj")
        return self.T * (inputs + 3 * c * a.intermediate + c * a.intermediate * self.keeps_input("down_proj"))

    def adapters(self) -> int:
        """The (T, r) product x A^T of every adapter."""
        return self.T * BYTES[self.s.adapter_dtype] * self.s.rank * len(self.targets)

    def backward(self) -> Moment:
        """The worst instant of the layer's backward, both around its last linear layer, `down_proj`."""
        return max(self.moments(), key=lambda moment: moment.total)

    def moments(self) -> list[Moment]:
        a, s, c, T = self.a, self.s, self.c, self.T
        h, f = a.hidden, a.intermediate
        scratch = c * h * f if s.quantized else 0
        mid = T * BYTES[s.adapter_dtype] * s.rank * ("down_proj" in self.targets)
        adapter = BYTES[s.adapter_dtype] * s.rank * (h + f) * ("down_proj" in self.targets)
        recompute = Moment(self.saved() - mid + 4 * c * T * h, scratch)
        product = Moment(self.saved() - mid + c * T * (h + f), scratch, adapter)
        return [recompute, product] if s.checkpointing else [product]


def loss_forward(a: Architecture, s: Settings) -> tuple[int, int]:
    """(working bytes, logits bytes): final norm; logits, their fp32 copy, log-softmax."""
    c, T = BYTES[s.compute_dtype], s.tokens
    copies = FP32 if c < FP32 else 0
    return T * a.hidden * (copies + c), _logit_rows(s) * a.vocab * (c + copies + FP32)


def loss_backward(a: Architecture, s: Settings) -> tuple[int, int]:
    """(working bytes, logits bytes): final norm's copy; log-softmax and two fp32 gradients."""
    copies = FP32 if BYTES[s.compute_dtype] < FP32 else BYTES[s.compute_dtype]
    return s.tokens * a.hidden * copies, _logit_rows(s) * a.vocab * 3 * FP32


def _logit_rows(s: Settings) -> int:
    return min(s.tokens, s.logits_chunk or s.tokens)
