"""PagedAdamW: AdamW whose states need not fit on the device (paper section 3, "Paged Optimizers").

Use it like `torch.optim.AdamW`. It is a `torch.optim.Optimizer`: parameter groups, closures, learning-rate schedulers,
and a `state_dict` in torch AdamW's own schema (`step`, `exp_avg`, `exp_avg_sq`; plain CPU tensors), so checkpoints go
both ways. Loading pages the states in again; they never become device tensors on the way.

    parameters   states   update                                                        equal, bit for bit, to
    float32      32 bits  torch._fused_adamw_, one call a window and group              torch.optim.AdamW(fused=True)
    bf16         32 bits  qlora_ref::adamw_, one call a window and group                reference/adamw.py
    either       8 bits   qlora_ref::adamw_8bit_, the same                              reference/adamw.py
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import optim_ops  # noqa: F401  (declares torch.ops.qlora_ref.adamw_ and adamw_8bit_)
from .pager import PagedStates, PageLayout, Resident, Staged
from .reference.adamw import decode_moments, encode_moments
from .reference.paging import PagingStats

PAGINGS = ("auto", "none", "cpu", "pinned", "managed")
QUANTIZED_KEY = "qlora_ref_8bit"  # beside "state" in the state_dict of 8-bit states: what torch's schema cannot hold


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with paged states of 32 or 8 bits.

    params         float32 or bf16 tensors or groups of them, on one device or several; contiguous. FSDP2's DTensors are
                   updated shard by shard, and every rank's `state_dict` holds its own shard.
    bits           32 (float32 moments) or 8 (blocks of 256, dynamic map; 2.03 bytes a parameter)
    paging         none      states on the device
                   cpu       pages in host memory, copied through a pool: the reference pager, for CPU parameters
                   pinned    the same for CUDA: page-locked host memory, copies overlap the update
                   managed   CUDA unified memory with prefetch (Linux, concurrent managed access)
                   auto      pinned for CUDA parameters, none for others
    page_bytes     a power of two; 2 MiB is the unit in which CUDA moves managed memory
    pool_bytes     device memory for pages, per device; states that fit into it are never moved again

    Raises ValueError or TypeError, naming the parameter, before anything is allocated.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        paging: str = "auto",
        page_bytes: int = 2 << 20,
        pool_bytes: int = 512 << 20,
    ) -> None:
        if paging not in PAGINGS:
            raise ValueError(f"paging is one of {', '.join(PAGINGS)}; not '{paging}'")
        self.layout = PageLayout(bits, page_bytes)
        if pool_bytes < 2 * page_bytes:
            raise ValueError(
                f"pool_bytes={pool_bytes} is less than two pages of {page_bytes}: one in use, one arriving; "
                "raise pool_bytes or lower page_bytes"
            )
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not float(value) >= 0:
                raise ValueError(f"{name} must not be negative, and is {value}")
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {betas}")
        self.paging, self.pool_bytes = paging, pool_bytes
        self._stores: dict[torch.device, _DeviceStates] = {}
        self._process = os.getpid()
        # every key of torch.optim.AdamW, so that either optimizer can read the other's groups
        as_torch = dict(amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=True)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **as_torch)
        super().__init__(params, {**defaults, "decoupled_weight_decay": True})

    # --- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Never waits for the device."""
        self._check_process()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_grad = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._build(with_grad)
        for p in with_grad:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=_local(p).device)
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        for store in self._stores.values():
            mine = [i for i, p in enumerate(store.params) if p.grad is not None]
            if mine:
                self._step_device(store, mine, group_of)
        return loss

    def _step_device(self, store: _DeviceStates, mine: list[int], group_of: dict[Tensor, int]) -> None:
        if store.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("PagedAdamW moves pages by decisions of the host, which a CUDA graph cannot record")
        flat = {i: (_flat(store.params[i]), _flat_grad(store.params[i])) for i in mine}
        steps = {i: self.state[store.params[i]]["step"] for i in mine}
        store.states.store.main.run(lambda: torch._foreach_add_(list(steps.values()), 1))

        def update(window: list) -> None:
            calls: dict[tuple[int, torch.dtype], list[tuple]] = defaultdict(list)  # one call for each of these
            for piece, fields in window:
                p, grad = flat[piece.owner]
                key = group_of[store.params[piece.owner]], p.dtype
                cut = p.narrow(0, piece.start, piece.count), grad.narrow(0, piece.start, piece.count)
                calls[key].append((*cut, *fields, steps[piece.owner]))
            for (group, dtype), rows in calls.items():
                _update(self.layout.bits, dtype, [list(column) for column in zip(*rows)], self.param_groups[group])

        store.states.sweep(mine, update)

    # --- memory ----------------------------------------------------------------------------------------------------

    def page_out(self) -> None:
        """Write everything back to host memory and free the pools; the next step takes them again. Call it before
        something large, an evaluation with long sequences say. Waits for the device. Nothing with paging="none"."""
        self._check_process()
        for store in self._stores.values():
            store.states.release()

    def stats(self) -> PagingStats:
        """Faults, evictions and bytes moved so far, as counted where the copies are made."""
        total = PagingStats()
        for store in self._stores.values():
            for name, count in vars(store.states.store.stats).items():
                setattr(total, name, getattr(total, name) + count)
        return total

    def memory(self) -> dict[str, int]:
        """Bytes of optimizer states: 'device' (the pools, or everything if not paged) and 'host'."""
        stores = [store.states.store for store in self._stores.values()]
        return {"device": sum(s.device_bytes for s in stores), "host": sum(s.host_bytes for s in stores)}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch AdamW's schema: per parameter `step`, `exp_avg`, `exp_avg_sq`, float32 CPU tensors of its shape.

        8-bit states are decoded for it; their codes are kept beside, under "qlora_ref_8bit", which torch ignores and
        `load_state_dict` here uses, so that a resumed run is exact.
        """
        self._check_process()
        live = self.state
        full, codes = self._materialize()
        self.state = full  # hooks registered on state_dict shall see the moments too
        try:
            result = super().state_dict()
        finally:
            self.state = live
        if codes:
            number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
            result[QUANTIZED_KEY] = {number[p]: pieces for p, pieces in codes.items()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this class or of torch.optim.AdamW. The states are paged, as before.

        Raises ValueError, before anything changes, if a moment is missing or has another shape, or for amsgrad/maximize.
        """
        self._check_process()
        # torch would cast every state tensor to its parameter's dtype and device; what it does not know it leaves alone
        handle = self.register_load_state_dict_pre_hook(_hold_moments)  # the last of the hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        loaded = {}
        for p, entry in self.state.items():
            moments = [entry.pop(name).value for name in ("exp_avg", "exp_avg_sq", QUANTIZED_KEY) if name in entry]
            loaded[p] = moments
            entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32, device=_local(p).device).clone()
        self._stores.clear()  # frees the old states before the new are allocated
        self._build(list(loaded))
        for p, moments in loaded.items():
            self._write(p, *moments)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("PagedAdamW cannot be copied or pickled: its pages would be lost; use state_dict() instead")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; parameters must be float32 or bf16 and contiguous (TypeError, ValueError)."""
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                if p.requires_grad:
                    _check_param(p, self.paging)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # --- inside ----------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this PagedAdamW belongs to process {self._process}, and a fork has no use of its pages: create the "
                "optimizer in the process that trains (DataLoader workers need none)"
            )

    def _build(self, needed: list[Tensor]) -> None:
        """Make sure that every parameter of `needed` has pages; if one has none, lay all out anew, states kept."""
        placed = {p for store in self._stores.values() for p in store.params}
        if placed.issuperset(needed):
            return
        full, codes = self._materialize()
        self._stores.clear()
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.requires_grad or p in placed or p.grad is not None:
                _check_param(p, self.paging)
                by_device[_local(p).device].append(p)
        for device, params in by_device.items():
            self._stores[device] = _DeviceStates(device, params, self.layout, self.paging, self.pool_bytes)
        for p, entry in full.items():
            if "exp_avg" in entry:
                self._write(p, entry["exp_avg"], entry["exp_avg_sq"], *([codes[p]] if p in codes else []))

    def _materialize(self) -> tuple[dict, dict]:
        """The full state of every parameter that has one, in torch's schema; and the codes of 8-bit states."""
        full: dict[Any, dict[str, Any]] = defaultdict(dict, {p: dict(entry) for p, entry in self.state.items()})
        codes = {}
        for store in self._stores.values():
            store.states.flush()
            for i, p in enumerate(store.params):
                if "step" in full.get(p, ()):
                    moments = store.states.read(i)
                    if self.layout.bits == 8:
                        codes[p] = moments
                        moments = decode_moments(*moments)
                    for name, moment in zip(("exp_avg", "exp_avg_sq"), moments):
                        full[p][name] = moment.view(_local(p).shape)
                    full[p]["step"] = full[p]["step"].detach().to("cpu", copy=True)
        return full, codes

    def _write(self, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, codes: Iterable[Tensor] | None = None) -> None:
        """Moments (and, for 8-bit states that were saved here, their codes) of `p` into its pages."""
        store = next(s for s in self._stores.values() if p in s.index)
        moments = [_local(moment).detach().reshape(-1).float() for moment in (exp_avg, exp_avg_sq)]
        store.states.write(store.index[p], moments if self.layout.bits == 32 else codes or encode_moments(*moments))


class _DeviceStates:
    """The pages of all parameters of one device."""

    def __init__(
        self, device: torch.device, params: list[Tensor], layout: PageLayout, paging: str, pool_bytes: int
    ) -> None:
        self.device, self.params = device, params
        self.index = {p: i for i, p in enumerate(params)}
        pool = pool_bytes // layout.page_bytes
        kind = paging if paging != "auto" else "pinned" if device.type == "cuda" else "none"

        def make_store(n_pages: int):
            if kind == "none":
                return Resident(layout, n_pages, device)
            return Staged(layout, n_pages, pool, device)

        self.states = PagedStates([_local(p).numel() for p in params], layout, make_store)


class _Held:
    """A tensor that `Optimizer.load_state_dict` passes through as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _hold_moments(optimizer: PagedAdamW, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Check a state_dict against the optimizer's parameters and wrap its moments."""
    for group in state_dict["param_groups"]:
        for flag in ("amsgrad", "maximize"):
            if group.get(flag):
                raise ValueError(f"the state_dict was made with {flag}=True, which PagedAdamW does not have")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    codes = state_dict.get(QUANTIZED_KEY, {}) if optimizer.layout.bits == 8 else {}
    state = {}
    for position, (number, p) in enumerate(zip(numbers, params)):
        if number not in state_dict["state"]:
            continue
        entry = dict(state_dict["state"][number])
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in entry or _local(entry[name]).shape != _local(p).shape:
                found = tuple(_local(entry[name]).shape) if name in entry else "missing"
                raise ValueError(
                    f"{name} of parameter {position} is {found} in the state_dict and {tuple(_local(p).shape)} in the "
                    "optimizer: it belongs to another model, or another optimizer than AdamW"
                )
            entry[name] = _Held(entry[name])
        if number in codes:
            entry[QUANTIZED_KEY] = _Held(codes[number])
        state[number] = entry
    return {**state_dict, "state": state}


def _update(bits: int, dtype: torch.dtype, columns: list[list[Tensor]], group: dict[str, Any]) -> None:
    """One call for the pieces of one window and group. Columns: params, grads, state fields..., steps."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    scalars = dict(
        lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"]
    )
    if bits == 8:
        torch.ops.qlora_ref.adamw_8bit_(*columns, **scalars)
    elif dtype == torch.float32:
        *tensors, steps = columns
        torch._fused_adamw_(*tensors, [], steps, amsgrad=False, maximize=False, **scalars)
    else:
        torch.ops.qlora_ref.adamw_(*columns, **scalars)


def _local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def _flat(p: Tensor) -> Tensor:
    return _local(p).detach().view(-1)


def _flat_grad(p: Tensor) -> Tensor:
    grad = p.grad
    if grad.is_sparse:
        raise RuntimeError("PagedAdamW needs dense gradients; use sparse=False in the embedding")
    if grad.dtype != p.dtype:
        raise RuntimeError(f"a gradient is {grad.dtype} and its parameter {p.dtype}; they must agree")
    return _local(grad).detach().reshape(-1)


def _check_param(p: Tensor, paging: str) -> None:
    t = _local(p)
    if t.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"PagedAdamW updates float32 or bfloat16 parameters, not {t.dtype} {tuple(t.shape)}; cast it")
    if not t.is_contiguous():
        raise ValueError(f"the parameter of shape {tuple(t.shape)} is not contiguous; replace it by .contiguous()")
    if paging in ("pinned", "managed") and t.device.type != "cuda":
        raise ValueError(f"paging='{paging}' is for CUDA parameters, and one is on {t.device}; use 'cpu' or 'auto'")
    if paging == "cpu" and t.device.type != "cpu":
        raise ValueError(f"paging='cpu' is for CPU parameters, and one is on {t.device}; use 'pinned' or 'auto'")
