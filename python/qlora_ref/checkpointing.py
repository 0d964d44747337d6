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

Outputs are recognized by the order of calls, op, shape and dtype, as checkpointing itself recognizes what is saved.
Where one does not fit, it and all behind it are computed again. So is one that was changed in place meanwhile. A kernel
that writes into it without PyTorch's knowledge is not noticed (Liger's rotary embedding does: leave it off here).
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
_FUSED_NAMES = {op.name() for op in _FUSED}


class _Kept(NamedTuple):
    name: str
    outputs: tuple[Any, ...]  # tensors share memory and version counter with what the model got
    versions: tuple[int, ...]

    def fits(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return (self.name, self.outputs[0].shape, self.outputs[0].dtype) == (name, shape, dtype)

    def is_changed(self) -> bool:
        return self.versions != _versions(self.outputs)


def _detached(y: Any) -> Any:
    """Without the graph, but with the same version counter, which a dispatch mode would else take away."""
    if not isinstance(y, torch.Tensor):
        return y
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return y.detach()


def _versions(outputs: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(y._version for y in outputs if isinstance(y, torch.Tensor))


class Run:
    """The first run of a checkpointed function, or a later one. A context: this thread's products belong to it."""

    def __init__(self, kept: list[_Kept | None], again: bool) -> None:
        self._kept, self._again, self._count = kept, again, 0
        self.attending = False  # whether an Attention is active

    def __enter__(self) -> None:
        self._count = 0
        _runs.stack.append(self)

    def __exit__(self, *_: Any) -> None:
        _runs.stack.pop()
        last = self._kept[-1] if self._kept and not self._again else None
        if last is not None and last.name not in _FUSED_NAMES:
            self._kept.pop()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...] | None:
        """What the first run had at this place, or None. A kept output is given once: it is the caller's then."""
        place, self._count = self._count, self._count + 1
        if not self._again or place >= len(self._kept):
            return None
        kept, self._kept[place] = self._kept[place], None
        if kept is None:
            return None
        if not kept.fits(name, shape, dtype):  # not what the first run did, so nothing behind can be recognized either
            self._kept.clear()
            return None
        return None if kept.is_changed() else kept.outputs

    def product(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The kept output, or compute()."""
        kept = self.take(name, shape, dtype)
        return compute() if kept is None else kept[0]

    def keep(self, name: str, *outputs: Any) -> None:
        """If this is the first run. `outputs` are what the model gets."""
        if not self._again:
            self._kept.append(_Kept(name, tuple(map(_detached, outputs)), _versions(outputs)))


class Attention(TorchDispatchMode):
    """Around calls of scaled_dot_product_attention: what its kernel gives is kept, or taken, like a product."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def __enter__(self):
        self._run.attending = True
        return super().__enter__()

    def __exit__(self, *error):
        self._run.attending = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _FUSED or types:  # types: fake tensors and the like
            return func(*args, **(kwargs or {}))
        (query, _, value), name = args[:3], func.name()
        outputs = self._run.take(name, (*query.shape[:-1], value.shape[-1]), query.dtype)
        if outputs is None:
            outputs = func(*args, **(kwargs or {}))
            self._run.keep(name, *outputs)
        return outputs


class _Runs(threading.local):
    def __init__(self) -> None:
        self.stack: list[Run] = []


_runs = _Runs()


def current() -> Run | None:
    """The innermost run that this thread is in."""
    return _runs.stack[-1] if _runs.stack else None


def attention(dropout: float = 0.0) -> AbstractContextManager:
    """A context for scaled_dot_product_attention, whose output and log-sum-exp are then kept too.

    Without dropout only: a recomputation that skips a kernel would leave the random generator where it was. Within
    another such context this one does nothing.
    """
    run = current()
    return nullcontext() if run is None or run.attending or dropout else Attention(run)


def keep_products() -> tuple[Run, Run]:
    """The `context_fn` of torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."""
    kept: list[_Kept | None] = []
    return Run(kept, again=False), Run(kept, again=True)
