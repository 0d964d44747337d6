"""PagedAdamW: AdamW whose states need not fit on the device (paper section 3, "Paged Optimizers").

Use it like `torch.optim.AdamW`. It is a `torch.optim.Optimizer`: parameter groups, closures, learning-rate
schedulers, and a `state_dict` in torch AdamW's own schema (`step`, `exp_avg`, `exp_avg_sq`; plain CPU
tensors), so checkpoints go both ways. Loading pages the states in again; they never become device tensors.

    parameters   states    one call a window and group   equal, bit for bit, to
    float32      32 bits   torch._fused_adamw_           torch.optim.AdamW(fused=True), same device
    bf16         32 bits   qlora_ref::adamw_             reference/adamw.py
    either        8 bits   qlora_ref::adamw_8bit_        reference/adamw.py
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .optim_ops import update_pieces
from .pager import Fields, PagedStates, PageLayout, Piece
from .reference.adamw import decode_moments, encode_moments
from .reference.paging import PagingStats

PAGINGS = ("auto", "none", "cpu", "pinned", "managed")
MOMENTS = ("exp_avg", "exp_avg_sq")
CODES_KEY = "qlora_ref_8bit"  # beside "state" in the state_dict of 8-bit states: what torch's schema cannot hold


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with paged states of 32 or 8 bits.

    params       float32 or bf16 tensors, or groups of them; contiguous; on one device or several. DTensors
                 (FSDP2) are updated shard by shard, and each rank's `state_dict` holds its own shard.
    bits         32 (float32 moments), or 8 (blocks of 256, dynamic map: 2.03 bytes a parameter)
    paging       "none"     states on the device
                 "cpu"      pages in host memory, copied through a pool: the reference pager, for CPU
                 parameters "pinned"   the same for CUDA: page-locked host memory, copies overlap the update
                 "managed"  CUDA unified memory with prefetch (Linux)
                 "auto"     "pinned" for CUDA parameters, "none" for others
    page_bytes   a power of two; 2 MiB is the unit in which CUDA moves managed memory
    pool_bytes   device memory for pages, on each device; states that fit into it never move again

    Raises ValueError or TypeError, naming what is wrong, before anything is allocated.
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
        _check_numbers(lr, betas, eps, weight_decay)
        if paging not in PAGINGS:
            raise ValueError(f"paging is one of {', '.join(PAGINGS)}; not '{paging}'")
        self.layout, self.paging = PageLayout(bits, page_bytes), paging
        self.pool_pages = pool_bytes // page_bytes
        if self.pool_pages < 2:
            raise ValueError(
                f"pool_bytes={pool_bytes} is less than two pages of {page_bytes}, one in use and one arriving; "
                "raise pool_bytes or lower page_bytes"
            )
        self._device_states: dict[torch.device, _DeviceStates] = {}
        self._process = os.getpid()
        # every key of torch.optim.AdamW, so that either optimizer can read the other's groups
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=False, maximize=False)
        defaults |= dict(foreach=None, capturable=False, differentiable=False, fused=True)
        super().__init__(params, defaults | dict(decoupled_weight_decay=True))

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Never waits for the device."""
        self._check_process()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._build([p for p in self._params() if p.grad is not None])
        plans = []
        for states in self._device_states.values():
            states.prepare()
            plans.append((states, states.grads()))
        for states, grads in plans:  # whatever can be refused has been by now
            if grads:
                self._step_device(states, grads)
        return loss

    def _step_device(self, states: _DeviceStates, grads: dict[int, tuple[Tensor, ...]]) -> None:
        """`grads`: the pieces of the gradient of each of this device's parameters that has one, by its index."""
        number = {id(p): k for k, group in enumerate(self.param_groups) for p in group["params"]}
        groups = {i: number[id(states.params[i])] for i in grads}
        params = {i: states.param(i) for i in grads}
        steps = {i: self._step_of(states.params[i], states.device) for i in grads}
        states.pages.store.run(None, lambda: torch._foreach_add_(list(steps.values()), 1))

        def update(window: list[tuple[Piece, Fields]]) -> None:
            calls: dict[tuple[int, torch.dtype], list[tuple[Tensor, ...]]] = defaultdict(list)
            for piece, fields in window:
                i, part = piece.owner, piece.number
                row = params[i][part], grads[i][part], *fields, steps[i]
                calls[groups[i], row[0].dtype].append(row)
            for (group, _), rows in calls.items():
                update_pieces(self.layout.bits, rows, self.param_groups[group])

        states.pages.sweep(grads, update)

    def _step_of(self, p: Tensor, device: torch.device) -> Tensor:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return state["step"]

    # --- memory ---

    def page_out(self) -> None:
        """Write everything back to host memory and free the pools; the next step takes them again. Call it
        before something large, such as an evaluation with long sequences. Waits for the device. Does nothing
        with paging="none"."""
        self._check_process()
        for states in self._device_states.values():
            states.pages.release()

    def stats(self) -> PagingStats:
        """Faults, evictions and bytes moved so far, as counted where the copies are made."""
        total = PagingStats()
        for states in self._device_states.values():
            for name, count in vars(states.pages.store.stats).items():
                setattr(total, name, getattr(total, name) + count)
        return total

    def memory(self) -> dict[str, int]:
        """Bytes that optimizer states take now: on the 'device' (pools, or all of it if not paged) and the
        'host'."""
        stores = [states.pages.store for states in self._device_states.values()]
        return {"device": sum(s.device_bytes for s in stores), "host": sum(s.host_bytes for s in stores)}

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """torch AdamW's schema: per parameter `step`, `exp_avg` and `exp_avg_sq`, float32 CPU tensors.

        8-bit states are decoded for it; their codes are beside, under "qlora_ref_8bit", which torch ignores
        and `load_state_dict` here uses, so that a resumed run is exact.
        """
        self._check_process()
        live = self.state
        self.state, codes = self._materialize()  # hooks registered on state_dict shall see the moments too
        try:
            result = super().state_dict()
        finally:
            self.state = live
        if codes:
            number = {p: i for i, p in enumerate(self._params())}
            result[CODES_KEY] = {number[p]: fields for p, fields in codes.items()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this class or of torch.optim.AdamW; the states are paged as before.

        Raises ValueError, before anything changes, if a moment is missing or has another shape, or if the
        state_dict was made with amsgrad or maximize.
        """
        self._check_process()
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
            loaded[p] = [entry.pop(name).value for name in (*MOMENTS, CODES_KEY) if name in entry]
            step = torch.as_tensor(entry["step"], dtype=torch.float32, device=local_tensor(p).device)
            entry["step"] = step.detach().clone().view(())
        self._device_states.clear()  # frees the old states before the new ones are allocated
        self._build(list(loaded))
        for p, moments in loaded.items():
            self._write(p, *moments)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("PagedAdamW cannot be copied or pickled, its pages would be lost; use state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. TypeError or ValueError for parameters that are not float32 or bf16, or not
        contiguous."""
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                if p.requires_grad:
                    _check_param(p, self.paging)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # --- inside ---

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this PagedAdamW belongs to process {self._process}, its pages are of no use in a fork: create the "
                "optimizer in the process that trains (DataLoader workers need none)"
            )

    def _build(self, needed: list[Tensor]) -> None:
        """See that every parameter of `needed` has pages; if one has none, lay all out anew, keeping their
        states."""
        placed = {id(p) for states in self._device_states.values() for p in states.params}
        if all(id(p) in placed for p in needed):
            return
        full, codes = self._materialize()
        self._device_states.clear()
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for p in self._params():
            if p.requires_grad or id(p) in placed or p.grad is not None:
                _check_param(p, self.paging)
                by_device[local_tensor(p).device].append(p)
        for device, params in by_device.items():
            kind = self.paging if self.paging != "auto" else "pinned" if device.type == "cuda" else "none"
            self._device_states[device] = _DeviceStates(params, self.layout, kind, self.pool_pages, device)
        for p, entry in full.items():
            if "exp_avg" in entry:
                self._write(p, entry["exp_avg"], entry["exp_avg_sq"], codes.get(p))

    def _materialize(self) -> tuple[defaultdict[Tensor, dict[str, Any]], dict[Tensor, Fields]]:
        """The state of every parameter that has one, in torch's schema, on the CPU; and the codes of 8-bit
        states."""
        full: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        full.update((p, dict(entry)) for p, entry in self.state.items())
        codes = {}
        for states in self._device_states.values():
            states.pages.flush()
            for i, p in enumerate(states.params):
                if "step" not in full.get(p, ()):
                    continue
                moments = states.pages.read(i)
                if self.layout.bits == 8:
                    codes[p] = moments
                    moments = decode_moments(*moments)
                for name, moment in zip(MOMENTS, moments, strict=True):
                    full[p][name] = moment.view(local_tensor(p).shape)
                full[p]["step"] = full[p]["step"].to("cpu", copy=True)
        return full, codes

    def _write(self, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, codes: Fields | None = None) -> None:
        """Put the moments of `p` (and, for 8-bit states that were saved here, their codes) on its pages."""
        states = next(s for s in self._device_states.values() if p in s.index)
        fields = codes or tuple(local_tensor(m).detach().reshape(-1).float().cpu() for m in (exp_avg, exp_avg_sq))
        if self.layout.bits == 8 and codes is None:
            fields = encode_moments(*fields)
        states.pages.write(states.index[p], fields)


class _DeviceStates:
    """The states of all parameters of one device."""

    def __init__(
        self, params: list[Tensor], layout: PageLayout, kind: str, pool_pages: int, device: torch.device
    ) -> None:
        self.device, self.params = device, params
        self.index = {p: i for i, p in enumerate(params)}
        sizes = [local_tensor(p).numel() for p in params]
        self.pages = PagedStates(sizes, layout, kind, pool_pages, device)
        self._param_pieces: dict[int, tuple[int, tuple[Tensor, ...]]] = {}  # index -> address, pieces

    def prepare(self) -> None:
        """Take the device memory that a step needs, or raise."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("PagedAdamW decides on the host which pages move; a CUDA graph cannot record that")
        self.pages.store.prepare()

    def grads(self) -> dict[int, tuple[Tensor, ...]]:
        """The pieces of the gradient of every parameter that has one, by its index."""
        return {i: self.pages.cut(i, _flat_grad(p)) for i, p in enumerate(self.params) if p.grad is not None}

    def param(self, i: int) -> tuple[Tensor, ...]:
        """The pieces of parameter i: views, kept for as long as it stays where it is."""
        local = local_tensor(self.params[i])
        known = self._param_pieces.get(i)
        if known is None or known[0] != local.data_ptr():
            known = self._param_pieces[i] = local.data_ptr(), self.pages.cut(i, local.detach().view(-1))
        return known[1]


class _Held:
    """Around a tensor, so that `Optimizer.load_state_dict` does not cast it to its parameter's dtype and
    device."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _hold_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Check a state_dict against the optimizer's parameters, and hold its moments."""
    for group in state_dict["param_groups"]:
        for flag in ("amsgrad", "maximize"):
            if group.get(flag):
                raise ValueError(f"the state_dict was made with {flag}=True, which PagedAdamW does not have")
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    assert isinstance(optimizer, PagedAdamW)
    codes = state_dict.get(CODES_KEY, {}) if optimizer.layout.bits == 8 else {}
    state = {}
    for number, p in zip(numbers, optimizer._params(), strict=False):  # torch refuses other lengths in a moment
        if number in state_dict["state"]:
            entry = dict(state_dict["state"][number])
            for name in MOMENTS:
                _check_moment(entry, name, number, tuple(local_tensor(p).shape))
                entry[name] = _Held(entry[name])
            if number in codes:
                entry[CODES_KEY] = _Held(codes[number])
            state[number] = entry
    return {**state_dict, "state": state}


def _check_moment(entry: dict[str, Any], name: str, number: int, shape: tuple[int, ...]) -> None:
    found = tuple(local_tensor(entry[name]).shape) if name in entry else "missing"
    if found != shape or "step" not in entry:
        raise ValueError(
            f"the state_dict does not fit: for parameter {number} of shape {shape}, {name} is {found}"
            f"{'' if 'step' in entry else ' and step is missing'}; it is of another model or optimizer"
        )


def local_tensor(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return t if type(t) in (Tensor, torch.nn.Parameter) or not hasattr(t, "to_local") else t.to_local()


def _flat_grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    grad = local_tensor(p.grad)
    if grad.layout != torch.strided:
        raise RuntimeError("PagedAdamW needs dense gradients; use sparse=False in the embedding")
    if grad.dtype != p.dtype:
        raise RuntimeError(f"a gradient is {grad.dtype} and its parameter {p.dtype}; they must agree")
    return grad.reshape(-1)


def _check_numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not float(value) >= 0:
            raise ValueError(f"{name} must not be negative, and is {value}")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), not {betas}")


def _check_param(p: Tensor, paging: str) -> None:
    t, shape = local_tensor(p), tuple(p.shape)
    if t.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"PagedAdamW updates float32 or bfloat16 parameters; one of shape {shape} is {t.dtype}")
    if not t.is_contiguous():
        raise ValueError(f"the parameter of shape {shape} is not contiguous; replace it by its .contiguous()")
    if paging in ("pinned", "managed") and t.device.type != "cuda":
        raise ValueError(f"paging='{paging}' is for CUDA parameters, one is on {t.device}; use 'cpu' or 'auto'")
    if paging == "cpu" and t.device.type != "cpu":
        raise ValueError(f"paging='cpu' is for CPU parameters, one is on {t.device}; use 'pinned' or 'auto'")
