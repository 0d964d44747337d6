"""Counts every live byte of a PyTorch program, operation by operation, on any device, meta tensors included.

One dispatch mode. Each new storage is keyed by its `_cdata`, gets a finalizer that subtracts it again, is rounded up to
the allocator's 512 B, and carries a category. Peaks are kept for each phase of the training step. What one operation
allocates inside itself (kernel workspaces) cannot be seen from here; `docs/09_memory.md` lists it.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUND = 512  # bytes: the CUDA caching allocator rounds every request up to this
SKIP = {torch.ops.prim.device.default}  # asked for the device, allocates nothing, half of all dispatches


@dataclass
class Peak:
    """The largest sum of live bytes seen in one phase, and what it was made of."""

    total: int = 0
    categories: Counter = field(default_factory=Counter)


class Tracker(TorchDispatchMode):
    """`with Tracker() as tracker:` counts what the block allocates.

    op_categories: operator overload -> category of its outputs, over the category of the current scope.
    expansions: operator overload -> function to run in its place, whose own operators are then counted.
    round_to: granularity of an allocation in bytes (1 to count exact bytes).
    """

    def __init__(self, op_categories: dict | None = None, expansions: dict | None = None, round_to: int = ROUND):
        super().__init__()
        self.op_categories, self.expansions = op_categories or {}, expansions or {}
        self.round_to = round_to
        self.live: dict[int, tuple[int, str]] = {}  # storage key -> (bytes, category)
        self.now: Counter = Counter()
        self.total = 0
        self.scope_name = "layer working set"
        self.phase = "setup"
        self.peaks: dict[str, Peak] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.expansions:
            with self:
                return self.expansions[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func not in SKIP:
            category = self.op_categories.get(func, self.scope_name)
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf, category)
        return out

    def add(self, tensor: torch.Tensor, category: str) -> None:
        """Count the storage of `tensor` if it is new. A storage that is known keeps its category."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        self.live[key] = (size, category)
        self.now[category] += size
        self.total += size
        weakref.finalize(storage, self._drop, key).atexit = False
        self._note_peak()

    def relabel(self, tensor: torch.Tensor, category: str) -> None:
        """Move the storage of `tensor` to another category (adding it when it is new)."""
        key = tensor.untyped_storage()._cdata
        if key not in self.live:
            return self.add(tensor, category)
        size, old = self.live[key]
        self.live[key] = (size, category)
        self.now[old] -= size
        self.now[category] += size

    def adopt(self, named: Iterable[tuple[str, torch.Tensor]], category_of) -> None:
        """Count tensors that existed before: parameters and buffers. `category_of(name, tensor)` -> category."""
        for name, tensor in named:
            self.add(tensor, category_of(name, tensor))

    @contextmanager
    def scope(self, category: str):
        """New storages inside belong to `category`."""
        before, self.scope_name = self.scope_name, category
        try:
            yield
        finally:
            self.scope_name = before

    def enter(self, phase: str) -> None:
        self.phase = phase
        self._note_peak()

    def reset_peaks(self) -> None:
        self.peaks.clear()

    def _drop(self, key: int) -> None:
        size, category = self.live.pop(key)
        self.now[category] -= size
        self.total -= size

    def _note_peak(self) -> None:
        peak = self.peaks.get(self.phase)
        if peak is None or self.total > peak.total:
            self.peaks[self.phase] = Peak(self.total, +self.now)
