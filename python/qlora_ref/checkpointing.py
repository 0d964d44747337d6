"""Gradient checkpointing that keeps what the 4-bit layers computed: two products a layer and step instead of three.

Checkpointing forgets what a block of the model computed and computes it again in backward. Most of that is products
with frozen weights. Where there is memory for their results, keep them:

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_products})

The recomputation of a block then takes the outputs of its 4-bit layers (with their adapters, unless dropout makes those
a branch of their own) from the forward pass, and computes only the rest: norms, attention, activation functions.
Gradients have the same bits. Kept are tokens x out_features elements a layer, about half of all that a Llama block
would save without checkpointing. The output of a block's last layer is not kept: in most models nothing behind it
saves anything, and the recomputation stops before it (autograd.py). Where that is not so, it is computed again.

Outputs are recognized by the order of calls, op, shape and dtype, as checkpointing itself recognizes what is saved. One
that was changed in place meanwhile is computed again. A kernel that writes into it without PyTorch's knowledge is not
noticed (Liger's rotary embedding does: leave it off here).
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class _Product(NamedTuple):
    name: str
    y: torch.Tensor  # shares memory and version counter with what the model got
    version: int


class Run:
    """The first run of a checkpointed function, or a later one. A context: this thread's products belong to it."""

    def __init__(self, kept: list[_Product | None], again: bool) -> None:
        self._kept, self._again, self._count = kept, again, 0

    def __enter__(self) -> None:
        self._count = 0
        _runs.stack.append(self)

    def __exit__(self, *_: Any) -> None:
        _runs.stack.pop()
        if not self._again and self._kept:
            self._kept.pop()  # the last

    def product(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What the first run had at this place, or compute(). A kept output is given once: it is the caller's then."""
        place, self._count = self._count, self._count + 1
        kept = self._kept[place] if self._again and place < len(self._kept) else None
        if kept is None:
            return compute()
        self._kept[place] = None
        fits = kept.name == name and kept.y.shape == shape and kept.y.dtype == dtype
        return kept.y if fits and kept.y._version == kept.version else compute()

    def keep(self, name: str, y: torch.Tensor) -> None:
        """If this is the first run. `y` is what the model gets."""
        if not self._again:
            self._kept.append(_Product(name, y.detach(), y._version))


class _Runs(threading.local):
    def __init__(self) -> None:
        self.stack: list[Run] = []


_runs = _Runs()


def current() -> Run | None:
    """The innermost run that this thread is in."""
    return _runs.stack[-1] if _runs.stack else None


def keep_products() -> tuple[Run, Run]:
    """The `context_fn` of torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."""
    kept: list[_Product | None] = []
    return Run(kept, again=False), Run(kept, again=True)
