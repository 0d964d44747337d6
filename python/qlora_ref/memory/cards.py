"""Does it fit, how much more would, and what would make it fit: questions to the estimate."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .architecture import Architecture
from .estimate import Estimate, Margin, estimate
from .settings import PAPER, Settings, flags, preset

MIB = 2**20


@dataclass(frozen=True)
class Card:
    """A card by the memory its driver reports (`nvidia-smi --query-gpu=memory.total`), never the round number."""

    name: str
    mib: int
    example: str

    @property
    def size(self) -> int:
        return self.mib * MIB


CARDS = (
    Card("16 GB", 15360, "T4"),
    Card("24 GB", 24564, "RTX 3090, 4090"),
    Card("40 GB", 40536, "A100 40GB"),
    Card("48 GB, ECC on", 46068, "A40, L40S, RTX 6000 Ada"),
    Card("48 GB, ECC off", 49140, "A6000, RTX 6000 Ada"),
    Card("80 GB", 81559, "A100, H100"),
    Card("141 GB", 143771, "H200"),
)
SEARCH_LIMIT = 2**22  # tokens: longer sequences or larger batches are not searched for


@dataclass(frozen=True)
class Verdict:
    """What one card can do. Bytes are what is left (negative: missing); 0 as length or batch: not even one fits."""

    card: Card
    fits: bool
    slack: int
    longest_sequence: int
    largest_batch: int
    remedy: tuple[str, ...] | None  # the fewest flags that would make it fit; None: no flags would


def verdict(result: Estimate, card: Card) -> Verdict:
    a, s, margin = result.architecture, result.settings, result.margin
    fits = result.needed <= card.size

    def ok(**change: Any) -> bool:
        return estimate(a, replace(s, **change), margin).needed <= card.size

    return Verdict(
        card,
        fits,
        card.size - result.needed,
        largest(lambda n: ok(seq=16 * n), SEARCH_LIMIT // (16 * s.batch)) * 16,
        largest(lambda n: ok(batch=n), SEARCH_LIMIT // s.seq),
        () if fits else smallest_remedy(a, s, card, margin),
    )


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in 1..limit for which the monotone `fits` holds; 0 if it does not hold for 1."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remedies(s: Settings) -> list[dict]:
    """Changes that can lower memory, those that leave the result the same first, then from mild to harsh."""
    candidates: list[dict[str, Any]] = [
        {"paged": True},
        {"keep_products": False},
        {"checkpointing": True},
        {"logits_chunk": 1024},
        {"attention": "flash"},
        {"double_quant": True},
        {"embedding_dtype": "bf16"},
        {"adapter_dtype": "bf16"},
        {"optimizer": "adamw8"},
        {"dropout": 0.0},
        {"weights": "nf4", "train": "adapters"},
        {"batch": 1},
        {"rank": 16},
    ]
    return [change for change in candidates if any(getattr(s, name) != value for name, value in change.items())]


def smallest_remedy(a: Architecture, s: Settings, card: Card, margin: Margin) -> tuple[str, ...] | None:
    """The fewest flags that make it fit on `card`; None when all of them together do not."""
    changes = remedies(s)

    def attempt(chosen) -> Settings | None:
        changed = replace(s, **{name: value for change in chosen for name, value in change.items()})
        return changed if estimate(a, changed, margin).needed <= card.size else None

    if attempt(changes) is None:
        return None
    for count in range(1, len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            if changed := attempt(chosen):
                return tuple(flags(changed, s))
    return None


def ladder(a: Architecture, s: Settings, margin: Margin) -> list[tuple[str, Estimate]]:
    """From 16-bit full fine-tuning to the paper's setup, and one step beyond, one feature at a time."""
    kept = {name: getattr(s, name) for name in ("checkpointing", "attention", "logits_chunk")}
    start = preset(Settings(**kept), s)
    full = replace(start, weights="bf16", train="full", double_quant=False)
    lora = replace(full, train="adapters")
    flat = replace(lora, weights="nf4")
    steps = [
        ("16-bit full fine-tuning", full),
        ("+ LoRA", lora),
        ("+ NF4", flat),
        ("+ double quantization", replace(flat, double_quant=True)),
        ("+ paged optimizer", replace(flat, double_quant=True, paged=True)),
        ("+ 8-bit optimizer", replace(flat, double_quant=True, paged=True, optimizer="adamw8")),
    ]
    return [(name, estimate(a, settings, margin)) for name, settings in steps]


def difference(result: Estimate, reference: Estimate) -> list[tuple[str, int]]:
    """Categories in which `result` is larger than `reference` at its peak, the largest first: (category, bytes)."""
    extra = result.categories - reference.categories
    return extra.most_common()


def paper_estimate(a: Architecture, s: Settings, margin: Margin) -> Estimate:
    return estimate(a, preset(PAPER, s), margin)
