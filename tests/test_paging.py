"""Paging: the plan (reference/paging.py), the layout of a page, and the stores that carry the plan out."""

import ctypes
import gc
import random
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ref import pager_managed, pager_stores
from qlora_ref.pager import PagedStates, PageLayout
from qlora_ref.pager_managed import Driver
from qlora_ref.reference.paging import Pager, PagingStats, sweep_faults

# --- the plan
# ------------------------------------------------------------------------------------------------------

POOLS = [(n, k) for n in (1, 2, 3, 7, 16, 33) for k in range(min(2, n), n + 3)]


@pytest.mark.parametrize("n_pages, pool", POOLS)
def test_alternating_sweeps_miss_what_cannot_fit(n_pages, pool):
    """First sweep: every page. Then n - pool a sweep, page by page or window by window."""
    expected = [n_pages] + [max(0, n_pages - pool)] * 4
    assert sweep_faults(n_pages, pool, 5) == expected
    pager, faults = Pager(n_pages, pool, page_bytes=8), []
    for _ in range(5):
        before, in_use = pager.stats.faults, []
        for window in pager.sweep(range(n_pages)):
            pager.admit(window, pinned=in_use)
            in_use = window
        faults.append(pager.stats.faults - before)
    assert faults == expected
    evictions = sum(expected) - min(n_pages, pool)
    assert pager.stats == PagingStats(sum(expected), evictions, 8 * sum(expected), 8 * evictions)


@pytest.mark.parametrize("n_pages, pool", [(100, 25), (100, 50), (100, 90), (100, 99)])
def test_plain_lru_never_hits(n_pages, pool):
    """The obvious policy, for any pool smaller than the whole: this is why sweeps alternate."""
    assert sweep_faults(n_pages, pool, 4, alternate=False) == [n_pages] * 4


@pytest.mark.parametrize("n_pages, pool", [(7, 2), (7, 3), (16, 5), (33, 32)])
def test_no_policy_does_better(n_pages, pool):
    """Belady's optimum for the same order of visits, which needs the future, has the same number of
    faults."""
    visits = [page for sweep in range(4) for page in (range(n_pages) if sweep % 2 == 0 else reversed(range(n_pages)))]
    resident: set[int] = set()
    faults = 0
    for i, page in enumerate(visits):
        if page in resident:
            continue
        faults += 1
        if len(resident) == pool:
            rest = visits[i:]
            resident.remove(max(resident, key=lambda p: rest.index(p) if p in rest else len(rest)))
        resident.add(page)
    assert faults == sum(sweep_faults(n_pages, pool, 4))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_invariants(n_pages, pool, seed):
    """Whatever is visited, in whatever order, flushed or released in between."""
    choose, pager = random.Random(seed), Pager(n_pages, pool, page_bytes=1)
    device, host = {}, dict.fromkeys(range(n_pages), 0)  # version of each page's content, there and here
    version = 0
    for _ in range(12):
        action = choose.random()
        if action < 0.2:
            for page, slot in pager.flush() if action < 0.1 else pager.release():
                assert device[slot][0] == page
                host[page] = device[slot][1]
            if not pager.resident:
                device.clear()
            continue
        in_use: list[int] = []
        for window in pager.sweep(choose.sample(range(n_pages), choose.randint(0, n_pages))):
            for move in pager.admit(window, pinned=in_use):
                if move.evicted is not None:
                    page, content = device.pop(move.slot)
                    assert page == move.evicted and page not in window and page not in in_use
                    assert move.dirty or content == host[page], "a page newer than the host's copy was dropped"
                    host[page] = content if move.dirty else host[page]
                assert move.slot not in device
                device[move.slot] = (move.page, host[move.page])
            for page in window:  # the update
                version += 1
                assert device[pager.resident[page]][0] == page
                device[pager.resident[page]] = (page, version)
            assert len(pager.resident) == len(device) <= min(pool, n_pages)
            assert set(pager.resident.values()) == set(device) and pager.dirty <= set(pager.resident)
            in_use = window


def test_impossible_pool():
    with pytest.raises(ValueError, match="at least 2 pages"):
        Pager(n_pages=5, pool_pages=1, page_bytes=4096)


# --- the page
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("page_bytes", [4096, 8192, 2 << 20])
def test_layout(bits, page_bytes):
    """Fields lie inside the page, do not overlap, and serve a multiple of 256 elements."""
    layout = PageLayout(bits, page_bytes)
    page = torch.zeros(page_bytes, dtype=torch.uint8)
    fields = layout.fields(page)
    assert layout.elements % 256 == 0 and layout.elements > 0
    assert page_bytes - sum(f.nbytes for f in fields) < 2 * 256 * bits / 8 + 8, "as many elements as fit"
    for i, field in enumerate(fields):
        field.view(torch.uint8).fill_(i + 1)
    assert [int((page == i + 1).sum()) for i in range(len(fields))] == [f.nbytes for f in fields]
    whole = layout.empty(layout.elements)
    assert [(f.shape, f.dtype) for f in whole] == [(f.shape, f.dtype) for f in fields]


def test_layout_refuses():
    for bits, page_bytes, word in ((16, 4096, "32 or 8 bits"), (32, 5000, "power of two"), (32, 1024, "at least 4096")):
        with pytest.raises(ValueError, match=word):
            PageLayout(bits, page_bytes)


# --- the stores
# ----------------------------------------------------------------------------------------------------


class Simulation:
    """Streams whose work is done late and in an adversarial order that only their events restrict."""

    def __init__(self, seed: int) -> None:
        self.choose, self.lanes = random.Random(seed), [SimulatedLane(self) for _ in range(3)]
        self.patience = [self.choose.random() for _ in self.lanes]  # some lanes are slow as a rule

    def step(self) -> None:
        """One piece of work of some lane that may go on."""
        ready = [lane for lane in self.lanes if lane.queue and lane.may_go_on()]
        assert ready, "deadlock"
        weights = [self.patience[self.lanes.index(lane)] + 1e-3 for lane in ready]
        self.choose.choices(ready, weights)[0].queue.pop(0)[1]()


class SimulatedLane(pager_stores.Lane):
    def __init__(self, simulation: Simulation) -> None:
        self.simulation, self.queue = simulation, []

    def may_go_on(self) -> bool:
        kind, work = self.queue[0]
        return kind != "wait" or work.__self__.reached  # type: ignore[attr-defined]

    def run(self, work) -> None:
        self.queue.append(("run", work))

    def record(self):
        event = SimulatedEvent()
        self.queue.append(("record", event.reach))
        return event

    def wait(self, event) -> None:
        if event is not None:
            self.queue.append(("wait", event.nothing))

    def synchronize(self) -> None:
        while self.queue:
            self.simulation.step()


class SimulatedEvent:
    reached = False

    def reach(self) -> None:
        self.reached = True

    def nothing(self) -> None:
        pass


@pytest.fixture
def simulated(monkeypatch):
    """Call with a seed: stores made from then on run on simulated streams."""

    def start(seed: int) -> Simulation:
        simulation = Simulation(seed)
        monkeypatch.setattr(pager_stores, "make_lanes", lambda device: tuple(simulation.lanes))
        monkeypatch.setattr(pager_managed, "make_lanes", lambda device: tuple(simulation.lanes))
        return simulation

    return start


SIZES = (700, 0, 1, 5000, 256, 3000)


def run_sweeps(states: PagedStates, seed: int, sweeps: int = 7) -> list[list[int]]:
    """Sweeps over random parameters, with flushes and releases between. The update multiplies and adds, so
    that a lost, doubled, early or late one shows. Returns which were visited."""
    choose, visited = random.Random(seed), []

    def update(window):
        for piece, fields in window:
            fields[0].mul_(3).add_(piece.owner + 1)

    for sweep in range(sweeps):
        owners = [i for i in range(len(SIZES)) if choose.random() < 0.8]
        visited.append(owners)
        states.store.prepare()
        states.sweep(owners, update)
        if sweep % 3 == 1:
            states.flush()
        if sweep == 4:
            states.release()
    states.flush()
    return visited


def check_sweeps(states: PagedStates, visited: list[list[int]]) -> None:
    for owner, size in enumerate(SIZES):
        value = 0.0
        for owners in visited:
            value = value * 3 + owner + 1 if owner in owners else value
        assert (states.read(owner)[0] == value).all() and states.read(owner)[0].numel() == size


def reference_counts(states: PagedStates, visited: list[list[int]]) -> PagingStats:
    """What the reference pager says of the same visits."""
    pager = Pager(len(states.pieces), states.store.pool_pages, states.layout.page_bytes)
    flush = pager.release if states.store.flush_evicts else pager.flush
    for sweep, owners in enumerate(visited):
        in_use: list[int] = []
        for window in pager.sweep({page for owner in owners for page in states.pages_of[owner]}):
            pager.admit(window, pinned=in_use)
            in_use = window
        if sweep % 3 == 1:
            flush()
        if sweep == 4:
            pager.release()
    flush()
    return pager.stats


@pytest.mark.parametrize("pool_pages", [2, 3, 5, 8, 40])
def test_staged_store(pool_pages):
    """Contents right, and faults, evictions and bytes exactly those of the reference."""
    states = PagedStates(SIZES, PageLayout(32, 4096), "cpu", pool_pages, torch.device("cpu"))
    visited = run_sweeps(states, seed=pool_pages)
    check_sweeps(states, visited)
    assert states.store.stats == reference_counts(states, visited) == states.pager.stats
    assert states.store.stats.faults > 0


@pytest.mark.parametrize("seed", range(40))
def test_staged_store_with_late_streams(simulated, seed):
    """The events are enough: any order of the three streams that they allow gives the same contents."""
    simulated(seed)
    states = PagedStates(SIZES, PageLayout(32, 4096), "cpu", 2 + seed % 5, torch.device("cpu"))
    visited = run_sweeps(states, seed)
    check_sweeps(states, visited)
    assert states.store.stats == reference_counts(states, visited)


def test_a_sweep_never_waits_on_the_host(simulated):
    """A whole sweep is queued before any of its work is done."""
    simulation = simulated(0)
    states = PagedStates(SIZES, PageLayout(32, 4096), "cpu", 4, torch.device("cpu"))
    done = []
    states.store.prepare()
    states.sweep(range(len(SIZES)), lambda window: done.append(len(window)))
    assert not done and all(lane.queue for lane in simulation.lanes)
    simulation.lanes[0].synchronize()
    assert sum(done) == sum(map(len, states.pieces))


def test_pool_is_given_back():
    states = PagedStates(SIZES, PageLayout(32, 4096), "cpu", 4, torch.device("cpu"))
    states.store.prepare()
    assert states.store.device_bytes == 4 * 4096
    states.release()
    assert states.store.device_bytes == 0 and states.store.pool is None


@pytest.mark.parametrize("n_pages", [1, 2, 5, 3050])
def test_host_pages_waste_nothing(n_pages, monkeypatch):
    """Every run of pages is a power of two, so torch's page-locked allocator rounds none up."""
    runs, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **k: runs.append(size[0]) or zeros(size[0], 1, dtype=torch.uint8))
    assert len(pager_stores._host_pages(n_pages, 4096, pinned=False)) == n_pages == sum(runs)
    assert all(run & (run - 1) == 0 for run in runs)


# --- managed memory, on a driver made of malloc
# ----------------------------------------------------------------------

FAKE_DRIVER = r"""
#include <stdlib.h>
#include <string.h>
typedef struct { int type, id; } Location;
enum { PAGE = 4096, MOST = 4096 };
static char* base; static size_t size; static char on_device[MOST];
static int live, concurrent = 1, preferred = -1, bad;
int cuMemAllocManaged(unsigned long long* p, size_t n, unsigned flags) {
  if (flags != 1) return 1;
  if (posix_memalign((void**)&base, PAGE, n)) return 2;
  memset(base, 0x5a, n); memset(on_device, 0, MOST); size = n; ++live; *p = (unsigned long long)base; return
  0;
}
int cuMemFree_v2(unsigned long long p) { if ((char*)p != base) return 1; free(base); base = 0; --live; return
0; } int cuMemPrefetchAsync_v2(unsigned long long p, size_t n, Location to, unsigned flags, void* stream) {
  size_t from = (char*)p - base;
  if (flags || n != PAGE || from % PAGE || from + n > size || (to.type != 1 && to.type != 2)) return 1;
  if (on_device[from / PAGE] == (to.type == 1)) ++bad;  /* moved to where it is */
  on_device[from / PAGE] = to.type == 1; return stream ? 3 : 0;
}
int cuMemAdvise_v2(unsigned long long p, size_t n, int advice, Location to) {
  if ((char*)p != base || n != size || advice != 3 || to.type != 1) return 1;
  preferred = to.id; return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device == 7) return 101;
  *value = attribute == 89 ? concurrent : -1; return 0;
}
int cuGetErrorName(int code, const char** name) { *name = code == 101 ? "CUDA_ERROR_INVALID_DEVICE" : "OTHER";
return 0; } int resident(size_t page) { return on_device[page]; }
int count_resident(void) { int n = 0; for (int i = 0; i < MOST; ++i) n += on_device[i]; return n; }
int state(int which) { return which == 0 ? live : which == 1 ? preferred : bad; }
void set_concurrent(int value) { concurrent = value; }
"""


@pytest.fixture
def fake_driver(tmp_path, monkeypatch):
    """libcuda as far as Managed needs it; pages are 4096 bytes, and it knows which are on the device."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of libcuda")
    source, library = tmp_path / "driver.c", tmp_path / "libdriver.so"
    source.write_text(FAKE_DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setattr(pager_managed, "Driver", lambda: Driver(str(library)))
    monkeypatch.setattr(pager_managed, "_free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(
        pager_managed,
        "_device_view",
        lambda address, nbytes, device: torch.frombuffer(
            (ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8
        ),
    )
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("pool_pages", [2, 3, 5, 40])
def test_managed_store(fake_driver, pool_pages):
    """Pages are on the device when they are updated, on the host when they are read; counts as in the
    reference."""
    states = PagedStates(SIZES, PageLayout(32, 4096), "managed", pool_pages, torch.device("cpu"))
    assert fake_driver.state(1) == (0 if pool_pages == 40 else -1), "preferred location only if all is to stay"
    sweep, store = states.sweep, states.store

    def checked_sweep(owners, update):
        def checked(window):
            for piece, fields in window:
                page = (fields[0].data_ptr() - store.address) // 4096
                assert fake_driver.resident(page) and piece in states.pieces[page]
            assert fake_driver.count_resident() <= store.pool_pages
            update(window)

        sweep(owners, checked)

    states.sweep = checked_sweep
    visited = run_sweeps(states, seed=pool_pages)
    assert fake_driver.count_resident() == 0 == store.device_bytes, "a flush brings everything to the host"
    check_sweeps(states, visited)
    assert store.stats == reference_counts(states, visited)
    assert fake_driver.state(2) == 0, "no page was sent to where it was"


@pytest.mark.parametrize("seed", range(10))
def test_managed_store_with_late_streams(fake_driver, simulated, seed):
    simulated(seed)
    states = PagedStates(SIZES, PageLayout(32, 4096), "managed", 2 + seed % 4, torch.device("cpu"))
    visited = run_sweeps(states, seed)
    check_sweeps(states, visited)
    assert fake_driver.count_resident() == 0 and fake_driver.state(2) == 0


def test_managed_memory_is_freed_once(fake_driver):
    states = PagedStates(SIZES, PageLayout(32, 4096), "managed", 4, torch.device("cpu"))
    assert fake_driver.state(0) == 1
    del states
    gc.collect()
    assert fake_driver.state(0) == 0


def test_managed_refuses(fake_driver, monkeypatch):
    """More than is free; a device without concurrent access; a driver error; no driver at all."""

    def make():
        return PagedStates(SIZES, PageLayout(32, 4096), "managed", 4, torch.device("cpu"))

    states = make()
    monkeypatch.setattr(pager_managed, "_free_bytes", lambda device: 3 * 4096)
    with pytest.raises(RuntimeError, match="more than the 12288 free"):
        states.store.prepare()
    with pytest.raises(RuntimeError, match="lower pool_bytes"):
        make()
    fake_driver.set_concurrent(0)
    with pytest.raises(RuntimeError, match="paging='pinned'"):
        make()
    with pytest.raises(RuntimeError, match=r"cuDeviceGetAttribute failed: CUDA_ERROR_INVALID_DEVICE \(101\)"):
        states.store.driver.concurrent_access(7)
    with pytest.raises(RuntimeError, match=r"version 12\.2 or later"):
        Driver("libcuda-of-nobody.so.1")
