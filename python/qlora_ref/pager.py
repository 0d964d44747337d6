"""Where paged optimizer states live and how a page travels. `reference/paging.py` decides, this file carries out.

    PageLayout     what lies inside a page of `page_bytes`: both moments of a run of elements
    Resident       no paging: every page is on the device
    Staged         pages in host memory, copied through a bounded pool of slots: `cpu` and `pinned`
    PagedStates    the states of many parameters end to end over pages, swept window by window

(The third store, CUDA managed memory, is pager_managed.py.)

The pinned store overlaps: three lanes (CUDA streams) carry the copies in, the copies out and the update kernels, and
events order exactly what must be ordered. Nothing in a sweep waits on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from .reference.adamw import STATE_BLOCK_SIZE
from .reference.paging import Move, Pager, PagingStats

ALIGNMENT = STATE_BLOCK_SIZE  # elements. Also a multiple of 64: torch's fused CPU kernel rounds its scalar tail otherwise


@dataclass(frozen=True)
class PageLayout:
    """The fields of one page, each contiguous: m, v (float32), or m and v codes (uint8) and their absmax (float32)."""

    bits: int
    page_bytes: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 32):
            raise ValueError(f"optimizer states have 32 or 8 bits, not {self.bits}")
        if self.page_bytes < 4096 or self.page_bytes & (self.page_bytes - 1):
            raise ValueError(f"page_bytes must be a power of two of at least 4096, not {self.page_bytes}")

    @property
    def elements(self) -> int:
        """Parameters a page serves: a multiple of 256, so that neither 8-bit blocks nor vector bodies are cut."""
        block_bytes = 8 * STATE_BLOCK_SIZE if self.bits == 32 else 2 * STATE_BLOCK_SIZE + 8
        return self.page_bytes // block_bytes * STATE_BLOCK_SIZE

    def fields(self, page: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Typed views of a (page_bytes,) uint8 page: (m, v), or (m_codes, m_absmax, v_codes, v_absmax)."""
        n, blocks = self.elements, self.elements // STATE_BLOCK_SIZE
        if self.bits == 32:
            return tuple(page[: 8 * n].view(torch.float32).split(n))
        absmax = page[2 * n : 2 * n + 8 * blocks].view(torch.float32)
        return page[:n], absmax[:blocks], page[n : 2 * n], absmax[blocks:]

    def empty(self, size: int) -> tuple[torch.Tensor, ...]:
        """CPU tensors for the fields of a whole parameter of `size` elements."""
        if self.bits == 32:
            return torch.empty(size, device="cpu"), torch.empty(size, device="cpu")
        codes, absmax = torch.empty(2, size, dtype=torch.uint8, device="cpu"), -(-size // STATE_BLOCK_SIZE)
        return codes[0], torch.empty(absmax, device="cpu"), codes[1], torch.empty(absmax, device="cpu")

    def narrow(self, fields: tuple[torch.Tensor, ...], start: int, count: int) -> tuple[torch.Tensor, ...]:
        """The part of `fields` that belongs to elements start .. start + count; `start` is a multiple of 256."""
        if self.bits == 32:
            return tuple(f.narrow(0, start, count) for f in fields)
        first, blocks = start // STATE_BLOCK_SIZE, -(-count // STATE_BLOCK_SIZE)
        m, m_absmax, v, v_absmax = fields
        return (
            m.narrow(0, start, count), m_absmax.narrow(0, first, blocks),
            v.narrow(0, start, count), v_absmax.narrow(0, first, blocks),
        )  # fmt: skip


class Lane:
    """Work in order. This one does it at once (CPU); `CudaLane` queues it on a stream."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> object:
        """An event: the point that this lane's work has now reached."""
        return None

    def wait(self, event: object) -> None:
        """Everything run here from now on happens after `event`."""

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

    def record(self) -> torch.cuda.Event:
        return self.stream.record_event()

    def wait(self, event: object) -> None:
        if event is not None:
            self.stream.wait_event(event)

    def synchronize(self) -> None:
        self.stream.synchronize()


def make_lanes(device: torch.device) -> tuple[Lane, Lane, Lane]:
    """(main, copies in, copies out) for `device`."""
    if device.type != "cuda":
        return Lane(), Lane(), Lane()
    return (
        CudaLane(device),
        CudaLane(device, torch.cuda.Stream(device)),
        CudaLane(device, torch.cuda.Stream(device)),
    )


class Resident:
    """No paging: all pages on the device, all the time."""

    def __init__(self, layout: PageLayout, n_pages: int, device: torch.device) -> None:
        self.pages = torch.zeros(n_pages, layout.page_bytes, dtype=torch.uint8, device=device)
        self.main = make_lanes(device)[0]
        self.stats = PagingStats()
        self.pool_pages, self.device_bytes, self.host_bytes = n_pages, self.pages.nbytes, 0

    def admit(self, moves: list[Move]) -> object:
        assert not moves, "a resident store has nothing to move"

    def slot(self, page: int, slot: int) -> torch.Tensor:
        return self.pages[page]

    def run(self, ready: object, work: Callable[[], object]) -> None:
        self.main.run(work)

    def write_back(self, written: list[tuple[int, int]]) -> None:
        """Nothing: there is no other copy."""

    def host_page(self, page: int) -> torch.Tensor:
        return self.pages[page]

    def release(self, resident: int) -> None:
        """Nothing: there is nowhere else to go."""


class Staged:
    """Pages in host memory (page-locked for CUDA), a pool of slots on the device, copies between the two."""

    def __init__(self, layout: PageLayout, n_pages: int, pool_pages: int, device: torch.device, lanes=None) -> None:
        self.layout, self.pool_pages, self.device = layout, min(pool_pages, n_pages), device
        self.main, self.inwards, self.outwards = lanes or make_lanes(device)
        self.stats = PagingStats()
        self.host = _host_pages(n_pages, layout.page_bytes, pinned=device.type == "cuda")
        self.pool: torch.Tensor | None = None
        self.done: object = None  # when the last window's update is over
        self.device_bytes, self.host_bytes = self.pool_pages * layout.page_bytes, n_pages * layout.page_bytes

    def admit(self, moves: list[Move]) -> object:
        """Start the copies; returns the event after which the window is there.

        `self.done` is at this moment the end of the window before the one in use. No victim is in use (the pager pins
        that window), so all updates of all victims are over by then.
        """
        if self.pool is None:
            self._allocate()
        for move in moves:
            slot = self.pool[move.slot]
            if move.evicted is not None:
                self.stats.evictions += 1
                if move.dirty:
                    self.outwards.wait(self.done)
                    self._copy(self.outwards, self.host[move.evicted], slot)
                    self.stats.bytes_to_host += slot.nbytes
                self.inwards.wait(self.done)
                self.inwards.wait(self.outwards.record())  # this slot's, and any earlier, write-back
            self._copy(self.inwards, slot, self.host[move.page])
            self.stats.faults += 1
            self.stats.bytes_to_device += slot.nbytes
        return self.inwards.record()

    def slot(self, page: int, slot: int) -> torch.Tensor:
        assert self.pool is not None
        return self.pool[slot]

    def run(self, ready: object, work: Callable[[], object]) -> None:
        """Queue the update of a window behind its arrival. `self.done` first: the caller's stream may have changed."""
        self.main.wait(self.done)
        self.main.wait(ready)
        self.main.run(work)
        self.done = self.main.record()

    def write_back(self, written: list[tuple[int, int]]) -> None:
        """Bring host memory up to date, and wait until it is."""
        self.outwards.wait(self.done)
        for page, slot in written:
            self._copy(self.outwards, self.host[page], self.slot(page, slot))
            self.stats.bytes_to_host += self.layout.page_bytes
        self.inwards.synchronize()
        self.outwards.synchronize()

    def host_page(self, page: int) -> torch.Tensor:
        return self.host[page]

    def release(self, resident: int) -> None:
        """Give the pool, with its `resident` pages, back to the allocator. Call after `write_back`: no copy under way."""
        self.stats.evictions += resident
        self.pool = None

    def _allocate(self) -> None:
        self.pool = torch.empty(self.pool_pages, self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        self.inwards.wait(self.main.record())  # whoever had this memory before may still be using it on that stream

    @staticmethod
    def _copy(lane: Lane, target: torch.Tensor, source: torch.Tensor) -> None:
        lane.run(lambda: target.copy_(source, non_blocking=True))


def _host_pages(n_pages: int, page_bytes: int, pinned: bool) -> list[torch.Tensor]:
    """`n_pages` zeroed host pages, in as many runs as n_pages has binary digits: torch's allocator of page-locked memory
    rounds every request up to a power of two, and a power of two of pages is one already."""
    pages: list[torch.Tensor] = []
    while len(pages) < n_pages:
        run = 1 << ((n_pages - len(pages)).bit_length() - 1)
        pages += torch.zeros(run, page_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned).unbind()
    return pages


@dataclass(frozen=True)
class Piece:
    """The run of parameter `owner` (elements start .. start + count) that lies on one page, from `offset` on."""

    owner: int
    start: int
    count: int
    offset: int


class PagedStates:
    """The states of parameters of `sizes` elements, end to end over the pages of one store."""

    def __init__(self, sizes: Iterable[int], layout: PageLayout, make_store: Callable[[int], object]) -> None:
        """`make_store(n_pages)` returns a Resident, Staged or Managed store."""
        self.layout, self.pieces = layout, [[]]  # type: ignore[var-annotated]
        self.pages_of: list[list[int]] = []
        position = 0
        self.sizes = list(sizes)
        for owner, size in enumerate(self.sizes):
            self.pages_of.append(self._lay(owner, size, position))
            position += -(-size // ALIGNMENT) * ALIGNMENT
        self.store = make_store(len(self.pieces))
        self.pager = Pager(len(self.pieces), self.store.pool_pages, layout.page_bytes)
        if isinstance(self.store, Resident):
            self.pager.resident.update((page, page) for page in range(len(self.pieces)))

    def _lay(self, owner: int, size: int, position: int) -> list[int]:
        pages, start = [], 0
        while start < size:
            page, offset = divmod(position + start, self.layout.elements)
            count = min(size - start, self.layout.elements - offset)
            while len(self.pieces) <= page:
                self.pieces.append([])
            self.pieces[page].append(Piece(owner, start, count, offset))
            pages.append(page)
            start += count
        return pages

    def sweep(self, owners: Iterable[int], update: Callable[[list], None]) -> None:
        """Visit every page of `owners` once; `update` gets a list of (piece, state fields) a window, in page order."""
        wanted = set(owners)
        windows = self.pager.sweep({page for owner in wanted for page in self.pages_of[owner]})
        ready = self.store.admit(self.pager.admit(windows[0])) if windows else None
        for window, following in zip(windows, [*windows[1:], None]):
            work = [
                (piece, self.layout.narrow(fields, piece.offset, piece.count))
                for page in window
                for fields in [self.layout.fields(self.store.slot(page, self.pager.resident[page]))]
                for piece in self.pieces[page]
                if piece.owner in wanted
            ]
            arriving = self.store.admit(self.pager.admit(following, pinned=window)) if following else None
            self.store.run(ready, lambda work=work: update(work))
            ready = arriving

    def flush(self) -> None:
        """Bring the host's copy of every page up to date and wait for it."""
        self.store.write_back(self.pager.flush())

    def release(self) -> None:
        """Flush and give up all device memory but the store's own; the next sweep takes it again."""
        if not isinstance(self.store, Resident):
            resident = len(self.pager.resident)
            self.store.write_back(self.pager.release())
            self.store.release(resident)

    def read(self, owner: int) -> tuple[torch.Tensor, ...]:
        """The state fields of a whole parameter, copied to CPU tensors. Call `flush` first."""
        whole = self.layout.empty(self.sizes[owner])
        for target, kept in self._matched(owner, whole):
            target.copy_(kept)
        return whole

    def write(self, owner: int, whole: Iterable[torch.Tensor]) -> None:
        """The inverse of `read`, from tensors on any device."""
        self.release()
        for source, kept in self._matched(owner, tuple(whole)):
            kept.copy_(source)

    def _matched(self, owner: int, whole: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (part of a whole field, the same part on its page in host memory)."""
        for page in self.pages_of[owner]:
            fields = self.layout.fields(self.store.host_page(page))
            for piece in self.pieces[page]:
                if piece.owner == owner:
                    yield from zip(
                        self.layout.narrow(whole, piece.start, piece.count),
                        self.layout.narrow(fields, piece.offset, piece.count),
                    )
