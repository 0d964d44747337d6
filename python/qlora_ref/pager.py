"""Paged optimizer states: what lies on a page, and the sweep that visits pages window by window.

    PageLayout     the fields of one page: both moments of a run of elements
    PagedStates    the states of many parameters end to end over the pages of one store

`reference/paging.py` decides which page goes where; a store (pager_stores.py, pager_managed.py) moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from .pager_stores import Resident, make_store
from .reference.adamw import STATE_BLOCK_SIZE
from .reference.paging import Pager

Fields = tuple[torch.Tensor, ...]  # (m, v) in float32, or (m_codes, m_absmax, v_codes, v_absmax)


@dataclass(frozen=True)
class PageLayout:
    """Both moments of a run of elements in one page: m, v (float32), or their codes (uint8) and absmax
    (float32)."""

    bits: int
    page_bytes: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 32):
            raise ValueError(f"optimizer states have 32 or 8 bits, not {self.bits}")
        if self.page_bytes < 4096 or self.page_bytes & (self.page_bytes - 1):
            raise ValueError(f"page_bytes must be a power of two of at least 4096, not {self.page_bytes}")

    @property
    def elements(self) -> int:
        """Parameters a page serves, a multiple of 256: no 8-bit block is cut. It is a multiple of 64 as well,
        without which torch's fused CPU kernel would round differently in the tail of its vector loop."""
        block_bytes = 8 * STATE_BLOCK_SIZE if self.bits == 32 else 2 * STATE_BLOCK_SIZE + 8
        return self.page_bytes // block_bytes * STATE_BLOCK_SIZE

    def fields(self, page: torch.Tensor) -> Fields:
        """Typed views of a (page_bytes,) uint8 page."""
        n, blocks = self.elements, self.elements // STATE_BLOCK_SIZE
        if self.bits == 32:
            return tuple(page[: 8 * n].view(torch.float32).split(n))
        absmax = page[2 * n : 2 * n + 8 * blocks].view(torch.float32)
        return page[:n], absmax[:blocks], page[n : 2 * n], absmax[blocks:]

    def empty(self, size: int) -> Fields:
        """CPU tensors for the fields of a whole parameter of `size` elements."""
        if self.bits == 32:
            return torch.empty(size, device="cpu"), torch.empty(size, device="cpu")
        codes, blocks = torch.empty(2, size, dtype=torch.uint8, device="cpu"), -(-size // STATE_BLOCK_SIZE)
        return codes[0], torch.empty(blocks, device="cpu"), codes[1], torch.empty(blocks, device="cpu")

    def narrow(self, fields: Fields, start: int, count: int) -> Fields:
        """The part of `fields` that belongs to elements start .. start + count; `start` is a multiple of
        256."""
        if self.bits == 32:
            return tuple(field.narrow(0, start, count) for field in fields)
        first, blocks = start // STATE_BLOCK_SIZE, -(-count // STATE_BLOCK_SIZE)
        cut = ((start, count), (first, blocks)) * 2
        return tuple(field.narrow(0, *part) for field, part in zip(fields, cut, strict=True))


@dataclass(frozen=True)
class Piece:
    """Piece `number` of parameter `owner`: its elements start .. start + count, on one page from `offset` on."""

    owner: int
    number: int
    start: int
    count: int
    offset: int


class PagedStates:
    """The states of parameters of `sizes` elements, in pages of one store ("none", "cpu", "pinned",
    "managed")."""

    def __init__(
        self, sizes: Iterable[int], layout: PageLayout, kind: str, pool_pages: int, device: torch.device
    ) -> None:
        self.layout, self.sizes = layout, list(sizes)
        self.pieces: list[list[Piece]] = [[]]  # per page
        self.pages_of: list[list[int]] = []  # per parameter
        position = 0
        for owner, size in enumerate(self.sizes):
            self.pages_of.append(self._lay(owner, size, position))
            position += -(-size // STATE_BLOCK_SIZE) * STATE_BLOCK_SIZE
        self._counts: list[list[int]] = [[] for _ in self.sizes]
        for piece in (piece for page in self.pieces for piece in page):  # those of one parameter come in order
            self._counts[piece.owner].append(piece.count)
        self._views: dict[int, tuple[int, list[tuple[Piece, Fields]]]] = {}  # page -> slot it was in, its pieces
        self.store = make_store(kind, layout.page_bytes, len(self.pieces), pool_pages, device)
        self.pager = Pager(len(self.pieces), self.store.pool_pages, layout.page_bytes)
        if isinstance(self.store, Resident):
            self.pager.resident.update((page, page) for page in range(len(self.pieces)))

    def _lay(self, owner: int, size: int, position: int) -> list[int]:
        """Put parameter `owner` at `position`; returns its pages."""
        pages: list[int] = []
        start = 0
        while start < size:
            page, offset = divmod(position + start, self.layout.elements)
            count = min(size - start, self.layout.elements - offset)
            while len(self.pieces) <= page:
                self.pieces.append([])
            self.pieces[page].append(Piece(owner, len(pages), start, count, offset))
            pages.append(page)
            start += count
        return pages

    def sweep(self, owners: Iterable[int], update: Callable[[list[tuple[Piece, Fields]]], None]) -> None:
        """Visit every page of `owners` once. `update` is called once a window with all its pieces and their
        fields, in the order of the sweep; the next window is on its way by then."""
        wanted = set(owners)
        windows = self.pager.sweep({page for owner in wanted for page in self.pages_of[owner]})
        ready = self.store.admit(self.pager.admit(windows[0])) if windows else None
        for window, following in zip(windows, [*windows[1:], []], strict=True):
            work = [item for page in window for item in self._work(page) if item[0].owner in wanted]
            arriving = self.store.admit(self.pager.admit(following, pinned=window))
            self.store.run(ready, lambda work=work: update(work))
            ready = arriving

    def _work(self, page: int) -> list[tuple[Piece, Fields]]:
        """The pieces of a resident page with their fields. Making views is much of what the host does in a step, so
        they are kept for as long as the page returns to the same slot."""
        slot, known = self.pager.resident[page], self._views.get(page)
        if known is None or known[0] != slot:
            fields = self.layout.fields(self.store.slot(page, slot))
            views = [(p, self.layout.narrow(fields, p.offset, p.count)) for p in self.pieces[page]]
            known = self._views[page] = slot, views
        return known[1]

    def cut(self, owner: int, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pieces of a (size,) tensor that goes with parameter `owner`."""
        counts = self._counts[owner]
        return flat.split(counts) if len(counts) > 1 else (flat,)

    def flush(self) -> None:
        """Bring the host's copy of every page up to date, and wait for it."""
        if self.store.flush_evicts:
            self.release()
        else:
            self.store.write_back(self.pager.flush())

    def release(self) -> None:
        """Flush and give up the device memory that pages are in; the next sweep takes it again."""
        if not isinstance(self.store, Resident):
            resident = len(self.pager.resident)
            self.store.write_back(self.pager.release())
            self._views.clear()
            self.store.release(resident)

    def read(self, owner: int) -> Fields:
        """The fields of a whole parameter, copied to CPU tensors. Call `flush` first."""
        whole = self.layout.empty(self.sizes[owner])
        for target, kept in self._matched(owner, whole):
            target.copy_(kept)
        return whole

    def write(self, owner: int, whole: Iterable[torch.Tensor]) -> None:
        """The inverse of `read`, from tensors on any device."""
        self.release()
        for source, kept in self._matched(owner, tuple(whole)):
            kept.copy_(source)

    def _matched(self, owner: int, whole: Fields) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (part of a whole field, the same part on its page in host memory)."""
        for page in self.pages_of[owner]:
            fields = self.layout.fields(self.store.host_page(page))
            for piece in self.pieces[page]:
                if piece.owner == owner:
                    part = self.layout.narrow(whole, piece.start, piece.count)
                    yield from zip(part, self.layout.narrow(fields, piece.offset, piece.count), strict=True)
