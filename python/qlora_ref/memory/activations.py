"""Bytes of one layer and of the loss during training, in closed form.

Method: Korthikanti et al. 2022, arXiv 2205.05198; the terms are derived anew from the module graph and held to the
trace by `tests/test_memory_trace.py`. `docs/09_memory.md` tells which tensor each term is.

T tokens, h hidden, f MLP width, q = heads * head_dim, kv = kv_heads * head_dim, n heads, r rank, V vocabulary;
e bytes of an activation element, c of an element of a product (they differ when embeddings are made fp32).
"""

from dataclasses import dataclass

from .architecture import MLP, Architecture, Matrix
from .settings import Settings

FP32 = 4
# T5's names. Its layers are all counted as decoder layers, the larger kind, so its activations are an upper bound.
ROLES = {
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj",
}  # fmt: skip
NORM_TEMPORARIES = 5  # fp32 tensors of the input's shape inside the backward of an RMS norm written in PyTorch


@dataclass(frozen=True)
class Moment:
    """All bytes of a layer that are alive at one instant of its backward, its input not counted."""

    name: str
    working: int
    scratch: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.working + self.scratch + self.gradients


class Layer:
    """Activations of one decoder layer: what autograd saves, and the worst instants of its backward."""

    def __init__(self, architecture: Architecture, settings: Settings):
        self.a, self.s = architecture, settings
        self.T = settings.tokens
        self.e, self.c = settings.activation_bytes, settings.product_bytes
        self.targets = {ROLES.get(name, name) for name in settings.target_names(architecture)}
        self.full = settings.train == "full"
        self.matrices = {ROLES.get(m.name, m.name): m for m, _ in architecture.linear_layers()}

    @property
    def checkpoint(self) -> int:
        """The one tensor kept for a layer under checkpointing: its input."""
        return self.e * self.T * self.a.hidden

    @property
    def products(self) -> int:
        """What waits for the layer's recomputation: outputs of 4-bit layers, all but the last one's, and what a fused
        attention kernel gives."""
        if not self.s.keep_products:
            return 0
        attentions = 2 if self.a.encoder_decoder else 1
        fused = attentions * self.attention_outputs() if self.s.attention == "flash" else 0
        if not self.s.quantized:
            return fused
        last = "down_proj" if "down_proj" in self.matrices else "o_proj"
        outputs = {name: m.outputs * (1 if name in MLP else attentions) for name, m in self.matrices.items()}
        return fused + self.c * self.T * (sum(outputs.values()) - self.matrices[last].outputs)

    def attention_outputs(self) -> int:
        """The result of a fused kernel and its log-sum-exp."""
        return self.T * (self.e * self.a.query_width + FP32 * self.a.heads)

    def saved(self) -> int:
        """S: everything autograd saves for the backward of one layer, without the layer's input."""
        blocks = 2 if self.a.encoder_decoder else 1  # a decoder layer attends to itself and to the encoder
        return self.norms() + blocks * self.attention() + self.mlp()

    def norms(self) -> int:
        """1/rms and an fp32 copy of the input of each norm (fp32 inputs are saved themselves: the first one is the
        layer's input). Trained norms save their normalized input too."""
        h, norms = self.a.hidden, self.a.norms
        inputs = FP32 * h * (norms - 1 if self.e == FP32 and self.s.checkpointing else norms)
        return self.T * (inputs + FP32 * norms + self.full * self.e * h * norms)

    def attention(self) -> int:
        a, e = self.a, self.e
        saved = self.linear_inputs("q_proj", "k_proj", "v_proj") + self.linear_inputs("o_proj")
        saved += e * self.T * (a.query_width + 2 * self.key_width)
        if a.qk_norm:
            saved += FP32 * self.T * (a.query_width + a.kv_width + a.heads + a.kv_heads)
        if self.s.attention == "eager":
            return saved + self.T * self.s.seq * a.heads * (FP32 + e * (e < FP32))  # softmax, its 16-bit copy
        shared_output = e == self.c and self.s.dropout == 0 and self.keeps_input("o_proj")
        return saved + self.attention_outputs() - shared_output * e * self.T * a.query_width

    @property
    def key_width(self) -> int:
        """Eager attention saves keys and values repeated for every query head."""
        return self.a.query_width if self.s.attention == "eager" else self.a.kv_width

    def mlp(self) -> int:
        """gate, its activation, up; and the inputs of the linear layers: the normed hidden state, the product.

        Experts are frozen, each token passes `experts_per_token` of them, and the weighted sum saves their outputs.
        """
        if self.a.experts:
            return self.e * self.T * self.a.experts_per_token * (3 * self.a.intermediate + self.a.hidden)
        inputs = self.linear_inputs("gate_proj", "up_proj") + self.linear_inputs("down_proj")
        return inputs + 3 * self.e * self.T * self.a.intermediate

    def keeps_input(self, name: str) -> bool:
        """Autograd saves the input of a linear layer only for the gradient of something trainable in it."""
        return name in self.matrices and (self.full or name in self.targets)

    def linear_inputs(self, *names: str) -> int:
        """What linear layers that share one input save of it: one tensor; with casts or dropout, one each."""
        kept = [self.matrices[name] for name in names if self.keeps_input(name)]
        if not kept:
            return 0
        if self.s.dropout > 0 and not self.full:
            return sum(self.dropout_branch(m) for m in kept)
        copies = len(kept) if self.e != self.c else 1
        mids = 0 if self.s.quantized or self.full else sum(self.unfused_branch(m) for m in kept)
        return copies * self.c * self.T * kept[0].inputs + mids

    def unfused_branch(self, m: Matrix) -> int:
        """x A^T of a branch that is not part of the fused operator, and 16-bit copies of fp32 adapters."""
        copies = self.e * self.s.rank * (m.inputs + m.outputs) * (self.s.adapter_bytes != self.e)
        return self.e * self.T * self.s.rank + copies

    def dropout_branch(self, m: Matrix) -> int:
        """One byte of mask an element, the dropped input, and the branch."""
        return self.T * m.inputs * (1 + self.e) + self.unfused_branch(m)

    def moments(self) -> list[Moment]:
        """The candidates for the worst instant, in the order of the backward."""
        mlp = self.mlp_moments() if "down_proj" in self.matrices else [self.expert_moment()]
        return mlp + self.attention_moments()

    def mlp_moments(self) -> list[Moment]:
        """Around the last linear layer of the block, whose backward finds everything else still saved."""
        s, e, c, T = self.s, self.e, self.c, self.T
        h, f, S = self.a.hidden, self.a.intermediate, self.saved()
        down = self.matrices["down_proj"]
        scratch = c * down.size if s.quantized else 0
        branch, gradients = self.branch_backward(down)
        arriving = e * T * h + c * T * h * (e != c)
        out = [Moment("down recompute", self.recompute(), scratch)] if s.checkpointing else []
        out.append(Moment("down dequantized", S + arriving + c * T * f + branch, scratch, gradients))
        if "down_proj" in self.targets:
            out.append(Moment("down adapter", S + arriving + 2 * c * T * f + branch, 0, gradients))
        product = self.linear_inputs("down_proj")
        return [*out, Moment("product", S - product + e * T * (h + 3 * f), 0, gradients)]

    def expert_moment(self) -> Moment:
        k, h, e = self.a.experts_per_token, self.a.hidden, self.e
        return Moment("experts", self.saved() - e * k * self.T * h + e * self.T * (h + 3 * k * self.a.intermediate))

    def attention_moments(self) -> list[Moment]:
        """Norms, whose backward in plain PyTorch makes five fp32 tensors, and the softmax of eager attention."""
        a, s, e, T, h, S = self.a, self.s, self.e, self.T, self.a.hidden, self.saved()
        norm = FP32 * NORM_TEMPORARIES * T * h
        done = self.gradients(*MLP) if a.norms == 2 else 0
        out = [Moment("norm", S + norm + e * T * h, 0, 0) if a.norms == 4 else
               Moment("norm", S - self.mlp() + norm + 2 * e * T * h, 0, done)]  # fmt: skip
        if s.attention == "eager":
            scores = 3 * FP32 * T * s.seq * a.heads
            kept = S - self.mlp() - self.attention() - FP32 * T * h
            working = kept + scores + e * T * (2 * h + 3 * a.query_width)
            out.append(Moment("softmax", working, 0, done + self.gradients("o_proj")))
        inputs = FP32 * T * h * (e < FP32) + norm + e * T * h
        return [*out, Moment("first norm", inputs, 0, self.gradients(*self.matrices))]

    def gradients(self, *names: str) -> int:
        """Gradients that the backward of these linear layers has left behind; accumulated ones are there anyway."""
        if self.s.keeps_gradients:
            return 0
        return sum(self.branch_backward(self.matrices[name])[1] for name in names if name in self.matrices)

    def recompute(self) -> int:
        """The layer's last product computed again: its input, the residual, the MLP's input, the incoming gradient
        (scaled, once more, for a separate branch), the output."""
        s, e, c, T, h, f = self.s, self.e, self.c, self.T, self.a.hidden, self.a.intermediate
        separate = s.dropout > 0 and "down_proj" in self.targets  # the branch is no part of the operator
        shared = e == c and s.dropout == 0 and (self.keeps_input("gate_proj") or self.keeps_input("up_proj"))
        hidden = e * (1 + (e < FP32) + separate + (not shared)) + c * (1 + (e != c and not separate))
        return self.saved() - self.linear_inputs("down_proj") + T * (f * (e + c * (e != c)) + h * hidden)

    def branch_backward(self, m: Matrix) -> tuple[int, int]:
        """(working bytes, gradient bytes) inside the backward of one adapter."""
        s = self.s
        if self.full:
            return 0, m.size * self.c
        if ROLES.get(m.name, m.name) not in self.targets:
            return 0, 0
        casts = self.c * s.rank * (m.inputs + m.outputs) * (s.adapter_bytes != self.c)
        return self.c * self.T * s.rank + casts, s.adapter_bytes * s.rank * (m.inputs + m.outputs)

    def backward(self) -> Moment:
        return max(self.moments(), key=lambda moment: moment.total)


def loss_forward(a: Architecture, s: Settings) -> tuple[int, int]:
    """(working bytes, logits bytes): the final norm; logits, their fp32 copy, log-softmax."""
    e = s.activation_bytes
    copies = FP32 if e < FP32 else 0
    softcap = e if a.softcap else 0
    return s.tokens * a.hidden * (FP32 + e), _logit_rows(s) * a.vocab * (e + copies + FP32 + softcap)


def loss_backward(a: Architecture, s: Settings) -> tuple[int, int]:
    """(working bytes, logits bytes): the final norm's input in fp32; log-softmax and two fp32 gradients.

    A chunked loss also keeps the final norm's output and gathers its gradient, chunk by chunk.
    """
    e, rows = s.activation_bytes, _logit_rows(s)
    softcap = e if a.softcap else 0
    chunks = e * a.hidden * (2 * s.tokens - rows) if rows < s.tokens else 0
    return s.tokens * a.hidden * FP32 + chunks, _logit_rows(s) * a.vocab * (3 * FP32 + softcap)


def _logit_rows(s: Settings) -> int:
    return min(s.tokens, s.logits_chunk or s.tokens)
