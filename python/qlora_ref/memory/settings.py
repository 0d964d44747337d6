"""How the model is trained: every choice that moves memory, and the combinations that are refused."""

from dataclasses import dataclass, fields, replace

from .architecture import ATTENTION, Architecture, ConfigError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FOUR_BIT = ("nf4", "fp4")
WEIGHTS = (*FOUR_BIT, "bf16", "fp16", "fp32")
OPTIMIZERS = ("adamw32", "adamw8")
ATTENTION_KINDS = ("flash", "eager")
PAGE_BYTES = 2 * 2**20  # one root chunk of CUDA unified memory, and the page of the pager
T5_ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Settings:
    """One training setup. Defaults are the paper's (section 4, appendix B), states not paged.

    seq: tokens a sequence; batch: sequences a micro-batch; accumulate: micro-batches a step.
    weights: data type of the frozen base; double_quant, block_size, nested_block_size: of its constants.
    train: "adapters" (LoRA) or "full" (every weight). rank, targets, adapter_dtype, dropout: of the adapters;
    targets is "all", "attention", "mlp" or names joined by commas.
    compute_dtype: of activations and dequantized weights; embedding_dtype: of embeddings, head and norms.
    optimizer: "adamw32" or "adamw8" (blocks of state_block); paged: states in host memory, with a device
    pool of pool_mib. checkpointing: keep one tensor a layer, recompute the rest; keep_products: keep the
    outputs of 4-bit layers and of flash attention too. logits_chunk: tokens whose logits exist at a time (0: all).
    attention: "flash" (nothing quadratic) or "eager" (score matrices).
    """

    seq: int = 512
    batch: int = 1
    accumulate: int = 1
    weights: str = "nf4"
    double_quant: bool = True
    block_size: int = 64
    nested_block_size: int = 256
    train: str = "adapters"
    rank: int = 64
    targets: str = "all"
    adapter_dtype: str = "bf16"
    dropout: float = 0.0
    compute_dtype: str = "bf16"
    embedding_dtype: str = "bf16"
    optimizer: str = "adamw32"
    state_block: int = 256
    paged: bool = False
    pool_mib: int = 512
    checkpointing: bool = True
    keep_products: bool = False
    logits_chunk: int = 0
    attention: str = "flash"

    def __post_init__(self):
        check(self)

    @property
    def tokens(self) -> int:
        return self.seq * self.batch

    @property
    def quantized(self) -> bool:
        return self.weights in FOUR_BIT

    @property
    def product_bytes(self) -> int:
        """Of one element of a matrix product. 16-bit weights are multiplied in their own type."""
        return BYTES[self.compute_dtype if self.quantized else self.weights]

    @property
    def activation_bytes(self) -> int:
        """Of one element between the layers: embeddings set the type, and every layer keeps it."""
        return BYTES[self.embedding_dtype] if self.quantized else BYTES[self.weights]

    @property
    def adapter_bytes(self) -> int:
        return BYTES[self.adapter_dtype]

    @property
    def keeps_gradients(self) -> bool:
        """Gradients of the previous micro-batch are alive in the next forward only when they accumulate."""
        return self.accumulate > 1

    def target_names(self, architecture: Architecture) -> tuple[str, ...]:
        """Names of the linear layers that carry an adapter. Raises `ConfigError`, listing the candidates."""
        present = architecture.projection_names()
        if self.train == "full":
            return ()
        groups = {"all": present, "attention": (*ATTENTION, *T5_ATTENTION)}
        groups["mlp"] = tuple(name for name in present if name not in groups["attention"])
        wanted = groups.get(self.targets) or tuple(n.strip() for n in self.targets.split(",") if n.strip())
        found = tuple(name for name in present if name in wanted)
        missing = [n for n in wanted if n not in present] if self.targets not in groups else []
        if missing or not found:
            raise ConfigError(
                f"--targets: {architecture.name} has no linear layer {', '.join(missing) or self.targets}; "
                f"its linear layers are {', '.join(present)}."
            )
        return found


def check(s: Settings) -> None:
    """Refuse values and combinations that cannot be trained. Raises `ConfigError` with one sentence."""
    for name in ("seq", "batch", "accumulate", "rank", "pool_mib", "state_block"):
        value = getattr(s, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{_flag(name)} {value!r}: a positive whole number is needed.")
    for name, allowed in _CHOICES.items():
        if getattr(s, name) not in allowed:
            raise ConfigError(f"{_flag(name)} {getattr(s, name)!r}: choose one of {', '.join(allowed)}.")
    for name in ("block_size", "nested_block_size"):
        value = getattr(s, name)
        if value < 32 or value > 4096 or value & (value - 1):
            raise ConfigError(f"{_flag(name)} {value}: a block is a power of two from 32 to 4096 elements.")
    if s.logits_chunk < 0:
        raise ConfigError(f"--logits-chunk {s.logits_chunk}: give a number of tokens, or 0 for no chunks.")
    if not 0 <= s.dropout < 1:
        raise ConfigError(f"--dropout {s.dropout}: a probability from 0 up to (not including) 1 is needed.")
    if s.keep_products and not s.checkpointing:
        raise ConfigError("--keep-products is a kind of checkpointing; pass it without --no-checkpointing.")
    if s.train == "full" and s.quantized:
        raise ConfigError(
            f"--train full with --weights {s.weights}: 4-bit weights are frozen and get no gradient; "
            "use --train adapters, or --weights bf16."
        )
    if s.optimizer == "adamw8" and (s.state_block < 32 or s.state_block & (s.state_block - 1)):
        raise ConfigError(
            f"--state-block {s.state_block} with 8-bit states: pages are cut at powers of two, and a block of that "
            "many elements would straddle two of them; use a power of two such as 256."
        )
    if s.paged and s.pool_mib * 2**20 < PAGE_BYTES * 2:
        raise ConfigError(f"--pool-mib {s.pool_mib}: the pool needs a page of each moment, {2 * PAGE_BYTES >> 20} MiB.")


_CHOICES = {
    "weights": WEIGHTS,
    "train": ("adapters", "full"),
    "adapter_dtype": tuple(BYTES),
    "compute_dtype": tuple(BYTES),
    "embedding_dtype": tuple(BYTES),
    "optimizer": OPTIMIZERS,
    "attention": ATTENTION_KINDS,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


PAPER = Settings(paged=True)
"""The paper: 16-bit adapters on every linear layer, r = 64, paged 32-bit AdamW, checkpointing."""

PEFT = Settings(adapter_dtype="fp32", embedding_dtype="fp32", dropout=0.05)
"""PEFT's defaults at the same rank: adapters in fp32, and `prepare_model_for_kbit_training`, which makes
embeddings, head and norms fp32; the usual dropout of 0.05; AdamW not paged."""


def preset(base: Settings, s: Settings) -> Settings:
    """`base` on the workload of `s`: same sequence, batch, rank and targets."""
    return replace(base, **{name: getattr(s, name) for name in ("seq", "batch", "accumulate", "rank", "targets")})


def flags(s: Settings, than: Settings) -> list[str]:
    """Command-line flags that turn `than` into `s`."""
    out = []
    for field in fields(Settings):
        value = getattr(s, field.name)
        if value == getattr(than, field.name):
            continue
        name = _flag(field.name)
        out.append((name if value else "--no-" + name[2:]) if isinstance(value, bool) else f"{name} {value}")
    return out
