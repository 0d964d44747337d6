"""Where pages live and how they travel. `reference/paging.py` has decided; a store carries it out and counts.

    Resident   "none"              every page on the device, nothing moves
    Staged     "cpu", "pinned"     pages in host memory, copied through a bounded pool of slots
    Managed    "managed"           CUDA unified memory, prefetched (pager_managed.py)

The pinned store overlaps: three lanes (CUDA streams) carry the copies in, the copies out and the updates, and
events order exactly what must be ordered. Nothing in a sweep waits on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .reference.paging import Move, PagingStats

_TOGETHER = 8  # pages that leave before the first of them is replaced: fewer events, and both directions still overlap


class Lane:
    """Work in order. This one does it at once (CPU); `CudaLane` queues it on a stream."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> Any:
        """An event: the point that this lane's work has now reached."""
        return None

    def wait(self, event: Any) -> None:
        """Everything run here from now on happens after `event`; None is an event of the past."""

    def synchronize(self) -> None:
        """Block the host until all of this lane's work is done."""


class CudaLane(Lane):
    """A CUDA stream; without one, whatever stream is current (the caller's), asked each time."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device, self.own = device, stream

    @property
    def stream(self) -> torch.cuda.Stream:
        return self.own or torch.cuda.current_stream(self.device)

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            work()

    def record(self) -> Any:
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        if event is not None:
            self.stream.wait_event(event)

    def synchronize(self) -> None:
        self.stream.synchronize()


def make_lanes(device: torch.device) -> tuple[Lane, Lane, Lane]:
    """(updates, copies in, copies out) for `device`."""
    if device.type != "cuda":
        return Lane(), Lane(), Lane()
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    return CudaLane(device), *(CudaLane(device, stream) for stream in streams)  # type: ignore[return-value]


class Resident:
    """No paging: all pages on the device, all the time."""

    flush_evicts = False

    def __init__(self, page_bytes: int, n_pages: int, device: torch.device) -> None:
        self.pages = torch.zeros(n_pages, page_bytes, dtype=torch.uint8, device=device)
        self.main = make_lanes(device)[0]
        self.stats = PagingStats()
        self.pool_pages, self.device_bytes, self.host_bytes = n_pages, self.pages.nbytes, 0

    def prepare(self) -> None:
        """Nothing to take."""

    def admit(self, moves: list[Move]) -> None:
        assert not moves, "a resident store has nothing to move"

    def slot(self, page: int, slot: int) -> torch.Tensor:
        return self.pages[page]

    def run(self, ready: Any, work: Callable[[], object]) -> None:
        self.main.run(work)

    def write_back(self, written: list[tuple[int, int]]) -> None:
        """Nothing: there is no other copy."""

    def host_page(self, page: int) -> torch.Tensor:
        return self.pages[page]

    def release(self, resident: int) -> None:
        """Nothing: there is nowhere else to go."""


class Staged:
    """Pages in host memory (page-locked for CUDA), a pool of slots on the device, copies between the two."""

    flush_evicts = False

    def __init__(
        self,
        page_bytes: int,
        n_pages: int,
        pool_pages: int,
        device: torch.device,
        lanes: tuple[Lane, Lane, Lane] | None = None,
    ) -> None:
        self.page_bytes, self.pool_pages, self.device = page_bytes, min(pool_pages, n_pages), device
        self.main, self.inwards, self.outwards = lanes or make_lanes(device)
        self.stats = PagingStats()
        self.host = _host_pages(n_pages, page_bytes, pinned=device.type == "cuda")
        self.pool: torch.Tensor | None = None
        self.done: Any = None  # the event at which the last window's update is over
        self.host_bytes = n_pages * page_bytes

    @property
    def device_bytes(self) -> int:
        return 0 if self.pool is None else self.pool.nbytes

    def prepare(self) -> None:
        """Allocate the pool, before anything is planned: an out-of-memory error then leaves everything as it
        was."""
        if self.pool is None:
            self.pool = torch.empty(self.pool_pages, self.page_bytes, dtype=torch.uint8, device=self.device)
            self.inwards.wait(self.main.record())  # the memory's last owner may still be using it on that stream

    def admit(self, moves: list[Move]) -> Any:
        """Start the copies; returns the event at which they have arrived.

        `self.done` is at this moment the end of the window before the one in use. No victim is in use (the
        pager pins that window), so by then every update of every victim is over. A clean victim was written back
        by `flush`, which waited for it.
        """
        self.outwards.wait(self.done)
        for start in range(0, len(moves), _TOGETHER):
            some = moves[start : start + _TOGETHER]
            leaving = [(m, m.evicted) for m in some if m.evicted is not None]
            if leaving:
                dirty = [(self.host[evicted], self.slot(m.page, m.slot)) for m, evicted in leaving if m.dirty]
                self.stats.bytes_to_host += self._copy(self.outwards, dirty)
                self.inwards.wait(self.outwards.record())  # these write-backs, and every earlier one
            arriving = [(self.slot(m.page, m.slot), self.host[m.page]) for m in some]
            self.stats.bytes_to_device += self._copy(self.inwards, arriving)
            self.stats.faults += len(some)
            self.stats.evictions += len(leaving)
        return self.inwards.record()

    def slot(self, page: int, slot: int) -> torch.Tensor:
        assert self.pool is not None, "prepare() comes first"
        return self.pool[slot]

    def run(self, ready: Any, work: Callable[[], object]) -> None:
        """Queue the update of a window behind its arrival, and behind the last one: the caller's stream may
        be another by now."""
        self.main.wait(self.done)
        self.main.wait(ready)
        self.main.run(work)
        self.done = self.main.record()

    def write_back(self, written: list[tuple[int, int]]) -> None:
        """Bring host memory up to date, and wait until it is."""
        self.outwards.wait(self.done)
        copies = [(self.host[page], self.slot(page, slot)) for page, slot in written]
        self.stats.bytes_to_host += self._copy(self.outwards, copies)
        self.inwards.synchronize()
        self.outwards.synchronize()

    def host_page(self, page: int) -> torch.Tensor:
        return self.host[page]

    def release(self, resident: int) -> None:
        """Give the pool with its `resident` pages back to the allocator; after `write_back`, so nothing is
        under way."""
        self.stats.evictions += resident
        self.pool = None

    @staticmethod
    def _copy(lane: Lane, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
        """Queue copies (target, source) on `lane`; returns how many bytes they move."""

        def copy_all() -> None:
            for target, source in copies:
                target.copy_(source, non_blocking=True)

        if copies:
            lane.run(copy_all)
        return sum(target.nbytes for target, _ in copies)


def _host_pages(n_pages: int, page_bytes: int, pinned: bool) -> list[torch.Tensor]:
    """`n_pages` zeroed host pages, in as many runs as n_pages has binary ones: torch's allocator of
    page-locked memory rounds every request up to a power of two, and each of these is one already."""
    pages: list[torch.Tensor] = []
    while len(pages) < n_pages:
        run = 1 << ((n_pages - len(pages)).bit_length() - 1)
        pages += torch.zeros(run, page_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned).unbind()
    return pages


def make_store(kind: str, page_bytes: int, n_pages: int, pool_pages: int, device: torch.device) -> Any:
    """A store for `n_pages` pages. RuntimeError if this machine cannot have it."""
    if kind == "none":
        return Resident(page_bytes, n_pages, device)
    if kind == "managed":
        from .pager_managed import Managed

        return Managed(page_bytes, n_pages, pool_pages, device)
    return Staged(page_bytes, n_pages, pool_pages, device)
