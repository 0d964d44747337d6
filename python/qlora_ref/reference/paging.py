"""Paged optimizer states (paper section 3, "Paged Optimizers"): which page is where, what moving them costs.

The states of all parameters lie end to end and are cut into pages. A page lives in host memory; to be used it
needs one of the few slots of a pool on the device. A step visits every page that has a gradient once, a
window at a time:

    fault     a page that is not in the pool is copied in                   page_bytes to the device
    eviction  the pool was full: the page unused for longest leaves first   page_bytes to the host, if dirty

Two facts decide the design. The pool must be *bounded*: a step that brings all pages back has the memory peak
that paging was to avoid. And always sweeping upwards is the worst order there is: after a sweep the pool
holds the last pages, the next sweep wants the first, evicts the ones it will need later, and not one page is
found (0 % hits for any pool smaller than the whole). So sweeps alternate, up and down: the last `pool` pages
of one are the first of the next, and the page unused for longest is then also the one needed latest, which is
Belady's optimum. Faults a step: pages - pool.

This class moves nothing. It plans, counts, and is what the optimizer's backends carry out.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Move:
    """`page` is to be copied into `slot`; first `evicted`, if any, leaves it, written back if `dirty`."""

    page: int
    slot: int
    evicted: int | None = None
    dirty: bool = False


@dataclass
class PagingStats:
    """Counts since construction; bytes are those copied, each way."""

    faults: int = 0
    evictions: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0


@dataclass
class Pager:
    """`n_pages` pages of `page_bytes`, of which at most `pool_pages` are resident at once."""

    n_pages: int
    pool_pages: int
    page_bytes: int
    sweeps: int = 0
    resident: OrderedDict[int, int] = field(default_factory=OrderedDict)  # page -> slot, longest unused first
    dirty: set[int] = field(default_factory=set)  # resident pages newer than their copy in host memory
    stats: PagingStats = field(default_factory=PagingStats)

    def __post_init__(self) -> None:
        if self.page_bytes <= 0 or self.pool_pages < min(2, self.n_pages):
            raise ValueError(
                f"a pool of {self.pool_pages} pages of {self.page_bytes} bytes cannot hold one window while the "
                "next one arrives; it needs at least 2 pages: raise pool_bytes or lower page_bytes"
            )

    def sweep(self, pages: Iterable[int]) -> list[list[int]]:
        """The windows of the next sweep over `pages`: upwards, then downwards, and so on.

        A window is half the pool, so that one can be computed on while the next is copied in; or everything,
        if the pool holds everything.
        """
        order = sorted(pages, reverse=self.sweeps % 2 == 1)
        self.sweeps += 1
        size = self.n_pages if self.pool_pages >= self.n_pages else self.pool_pages // 2
        return [order[i : i + size] for i in range(0, len(order), size)]

    def admit(self, window: list[int], pinned: Iterable[int] = ()) -> list[Move]:
        """Make the pages of `window` resident, and dirty, for they are about to be updated; never evict a
        page of `window` or of `pinned`, the window in use. Returns the moves to carry out, in order."""
        moves, keep = [], {*window, *pinned}
        for page in window:
            if page not in self.resident:
                moves.append(self._fault(page, keep))
            self.resident.move_to_end(page)
            self.dirty.add(page)
        return moves

    def _fault(self, page: int, keep: set[int]) -> Move:
        self.stats.faults += 1
        self.stats.bytes_to_device += self.page_bytes
        if len(self.resident) < self.pool_pages:
            move = Move(page, slot=len(self.resident))
        else:
            victim = next(p for p in self.resident if p not in keep)
            move = Move(page, self.resident.pop(victim), victim, victim in self.dirty)
            self.stats.evictions += 1
            self.stats.bytes_to_host += self.page_bytes * move.dirty
            self.dirty.discard(victim)
        self.resident[page] = move.slot
        return move

    def flush(self) -> list[tuple[int, int]]:
        """(page, slot) of every dirty page, to be copied to the host; all stay resident and are clean
        afterwards."""
        written = [(page, slot) for page, slot in self.resident.items() if page in self.dirty]
        self.stats.bytes_to_host += self.page_bytes * len(written)
        self.dirty.clear()
        return written

    def release(self) -> list[tuple[int, int]]:
        """Flush, then give up the whole pool: nothing is resident afterwards (between steps, before a memory
        spike)."""
        written = self.flush()
        self.stats.evictions += len(self.resident)
        self.resident.clear()
        return written


def sweep_faults(n_pages: int, pool_pages: int, sweeps: int, alternate: bool = True) -> list[int]:
    """Faults of each of `sweeps` full sweeps, page by page. `alternate=False` is plain LRU, to show what it
    costs."""
    pager, faults = Pager(n_pages, pool_pages, page_bytes=1), []
    for sweep in range(sweeps):
        before = pager.stats.faults
        for page in range(n_pages) if sweep % 2 == 0 or not alternate else reversed(range(n_pages)):
            pager.admit([page])
        faults.append(pager.stats.faults - before)
    return faults
