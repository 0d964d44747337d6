"""Gradient checkpointing that keeps what the 4-bit layers computed: two products a layer and step instead of three.

Checkpointing forgets what a block of the model computed and computes it again in backward. Most of that is products
with frozen weights. Where there is memory for their results, keep them:

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_products})

The recomputation of a block then takes the outputs of its 4-bit layers (with their adapters, unless dropout makes those
a branch of their own) from the forward pass, and computes only the rest: norms, activation functions, and attention,
unless that is called within `attention()`. Gradients have the same bits. Kept are tokens x out_features elements a
layer, about half of all that a Llama block would save without checkpointing. The output of a block's last layer is not
kept: in most models nothing behind it saves anything, and the recomputation stops before it (autograd.py). Where that
is not so, it is computed again.

Outputs are recognized by the order of calls, op, shape and dtype, as checkpointing itself recognizes what is saved. One
that was changed in place meanwhile is computed again. A kernel that writes into it without PyTorch's knowledge is not
noticed (Liger's rotary embedding does: leave it off here).
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What scaled_dot_product_attention may choose: one kernel, whose first output is the result, the others what its
# backward needs (log-sum-exp; the state of a random generator that is not used without dropout).
_FUSED = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


class _Kept(NamedTuple):
    name: str
    outputs: tuple[Any, ...]  # tensors share memory and version counter with what the model got
    versions: tuple[int, ...]

    def fits(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        first, changed = self.outputs[0], self.versions != _versions(self.outputs)
        return (self.name, first.shape, first.dtype) == (name, shape, dtype) and not changed


def _versions(outputs: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(y._version for y in outputs if isinstance(y, torch.Tensor))


class Run:
    """The first run of a checkpointed function, or a later one. A context: this thread's products belong to it."""

    def __init__(self, kept: list[_Kept | None], again: bool) -> None:
        self._kept, self._again, self._count = kept, again, 0

    def __enter__(self) -> None:
        self._count = 0
        _runs.stack.append(self)

    def __exit__(self, *_: Any) -> None:
        _runs.stack.pop()
        last = self._kept[-1] if self._kept and not self._again else None
        if last is not None and last.name != Attention.__name__:
            self._kept.pop()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...] | None:
        """What the first run had at this place, or None. A kept output is given once: it is the caller's then."""
        place, self._count = self._count, self._count + 1
        if not self._again or place >= len(self._kept):
            return None
        kept, self._kept[place] = self._kept[place], None
        return kept.outputs if kept is not None and kept.fits(name, shape, dtype) else None

    def product(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The kept output, or compute()."""
        kept = self.take(name, shape, dtype)
        return compute() if kept is None else kept[0]

    def keep(self, name: str, *outputs: Any) -> None:
        """If this is the first run. `outputs` are what the model gets."""
        if not self._again:
            detached = tuple(y.detach() if isinstance(y, torch.Tensor) else y for y in outputs)
            self._kept.append(_Kept(name, detached, _versions(outputs)))


class Attention(TorchDispatchMode):
    """Around calls of scaled_dot_product_attention: what its kernel gives is kept, or taken, like a product."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._computed: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _FUSED or types:  # types: fake tensors and the like
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        outputs = self._run.take(Attention.__name__, (*query.shape[:-1], value.shape[-1]), query.dtype)
        if outputs is None:
            outputs = func(*args, **(kwargs or {}))
            self._computed.append(outputs)
        return outputs

    def __exit__(self, failed, *error):
        super().__exit__(failed, *error)
        if failed is None:  # out here, where a detached tensor shares the version counter
            for outputs in self._computed:
                self._run.keep(Attention.__name__, *outputs)


class _Runs(threading.local):
    def __init__(self) -> None:
        self.stack: list[Run] = []


_runs = _Runs()


def current() -> Run | None:
    """The innermost run that this thread is in."""
    return _runs.stack[-1] if _runs.stack else None


def attention(dropout: float = 0.0) -> AbstractContextManager:
    """A context for scaled_dot_product_attention, whose output and log-sum-exp are then kept too.

    Without dropout only: a recomputation that skips a kernel would leave the random generator where it was.
    """
    run = current()
    return nullcontext() if run is None or dropout else Attention(run)


def keep_products() -> tuple[Run, Run]:
    """The `context_fn` of torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."""
    kept: list[_Kept | None] = []
    return Run(kept, again=False), Run(kept, again=True)
