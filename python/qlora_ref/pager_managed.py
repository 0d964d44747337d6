"""Pages in CUDA unified memory: one address for host and device, moved by prefetching (what the paper used).

Only on Linux, where the device may use managed memory while the host does (attribute
concurrentManagedAccess). The driver is called through ctypes by its versioned names: `cuMemPrefetchAsync_v2`
and `cuMemAdvise_v2` mean the same from driver 12.2 on, while the runtime changed the signatures behind the
plain names in CUDA 13.

Managed memory would let us ask for more than the card has, and the driver would then evict whatever it likes
while kernels run. So it is never asked for: pages come to the device only by our prefetches, within the pool,
and a pool larger than what is free is refused. Eviction by the driver therefore has no occasion.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .pager_stores import CudaLane, Lane, make_lanes
from .reference.paging import Move, PagingStats

_ATTACH_GLOBAL, _PREFERRED_LOCATION, _CONCURRENT_MANAGED_ACCESS = 1, 3, 89  # cuda.h


class _Location(ctypes.Structure):
    """CUmemLocation, passed by value: type 1 is a device, with its number as id; type 2 is the host."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


_HOST = _Location(2, 0)


class Driver:
    """The six driver calls; every error becomes a RuntimeError with the driver's name for it."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        pointer, size, number, stream = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
        signatures = {
            "cuMemAllocManaged": (ctypes.POINTER(pointer), size, ctypes.c_uint),
            "cuMemFree_v2": (pointer,),
            "cuMemPrefetchAsync_v2": (pointer, size, _Location, ctypes.c_uint, stream),
            "cuMemAdvise_v2": (pointer, size, number, _Location),
            "cuDeviceGetAttribute": (ctypes.POINTER(number), number, number),
            "cuGetErrorName": (number, ctypes.POINTER(ctypes.c_char_p)),
        }
        try:
            self._library = ctypes.CDLL(library)
            for name, arguments in signatures.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise RuntimeError(
                f"paging='managed' needs an NVIDIA driver of version 12.2 or later ({error}); use paging='pinned'"
            ) from None

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name} failed: {(text.value or b'error').decode()} ({status})")

    def concurrent_access(self, device: int) -> bool:
        """Whether host and device may use managed memory at the same time."""
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), _CONCURRENT_MANAGED_ACCESS, device)
        return bool(value.value)

    def allocate(self, nbytes: int) -> int:
        """The address of `nbytes` of managed memory."""
        address = ctypes.c_uint64()
        self._call("cuMemAllocManaged", ctypes.byref(address), nbytes, _ATTACH_GLOBAL)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def prefetch(self, address: int, nbytes: int, device: int | None, stream: int) -> None:
        """Move to `device`, or to the host for None, in the order of `stream`."""
        location = _HOST if device is None else _Location(1, device)
        self._call("cuMemPrefetchAsync_v2", address, nbytes, location, 0, stream)

    def prefer(self, address: int, nbytes: int, device: int) -> None:
        """Advise that the pages are to stay on `device`."""
        self._call("cuMemAdvise_v2", address, nbytes, _PREFERRED_LOCATION, _Location(1, device))


class Managed:
    """The store over one managed allocation. Page k lies at its place k for good: slots have no meaning here."""

    flush_evicts = True  # reading on the host moves pages there, so a flush leaves nothing on the device

    def __init__(self, page_bytes: int, n_pages: int, pool_pages: int, device: torch.device) -> None:
        self.driver, self.index = Driver(), device.index or 0  # a CUDA tensor's device always has an index
        self.page_bytes, self.pool_pages, self.device = page_bytes, min(pool_pages, n_pages), device
        if not sys.platform.startswith("linux") or not self.driver.concurrent_access(self.index):
            raise RuntimeError(
                f"device {self.index} cannot share managed memory with the host while it runs "
                "(concurrentManagedAccess is 0, as on Windows, WSL and Jetson); use paging='pinned'"
            )
        self.main, self.inwards, self.outwards = make_lanes(device)
        self.stats, self.resident, self.done = PagingStats(), 0, None
        self.host_bytes = nbytes = page_bytes * n_pages
        self._refuse_more_than_free(nbytes)  # it must fit even if all of it came to the device
        self.address = self.driver.allocate(nbytes)
        weakref.finalize(self, _free, self.driver, self.address, device).atexit = False
        if self.pool_pages == n_pages:
            self.driver.prefer(self.address, nbytes, self.index)
        host = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(self.address), dtype=torch.uint8)
        self.host_pages = host.zero_().view(n_pages, page_bytes)
        self.device_pages = _device_view(self.address, nbytes, device).view(n_pages, page_bytes)

    @property
    def device_bytes(self) -> int:
        return self.resident * self.page_bytes

    def prepare(self) -> None:
        """Refuse, before anything is planned, a pool that the card has no room for."""
        if self.resident < self.pool_pages:
            self._refuse_more_than_free((self.pool_pages - self.resident) * self.page_bytes)

    def _refuse_more_than_free(self, nbytes: int) -> None:
        free = _free_bytes(self.device)
        if nbytes > free:
            raise RuntimeError(
                f"{nbytes} bytes of managed memory are more than the {free} free on device {self.index}: the "
                "driver would evict pages that kernels use; lower pool_bytes, use bits=8 or paging='pinned'"
            )

    def admit(self, moves: list[Move]) -> Any:
        """Prefetch the victims to the host, the pages to the device; ordered as in `Staged.admit`."""
        for move in moves:
            if move.evicted is not None:
                self.outwards.wait(self.done)
                self._to_host(move.evicted)
                self.stats.evictions += 1
                self.inwards.wait(self.outwards.record())
            self._prefetch(self.inwards, move.page, self.index)
            self.resident += 1
            self.stats.faults += 1
            self.stats.bytes_to_device += self.page_bytes
        return self.inwards.record()

    def slot(self, page: int, slot: int) -> torch.Tensor:
        return self.device_pages[page]

    def run(self, ready: Any, work: Callable[[], object]) -> None:
        self.main.wait(self.done)
        self.main.wait(ready)
        self.main.run(work)
        self.done = self.main.record()

    def write_back(self, written: list[tuple[int, int]]) -> None:
        """Prefetch these pages to the host, and wait until they are there."""
        self.outwards.wait(self.done)
        for page, _ in written:
            self._to_host(page)
        self.inwards.synchronize()
        self.outwards.synchronize()

    def host_page(self, page: int) -> torch.Tensor:
        return self.host_pages[page]

    def release(self, resident: int) -> None:
        """After `write_back` nothing is on the device any more: every page that was is dirty, so was
        written."""
        self.stats.evictions += resident

    def _to_host(self, page: int) -> None:
        self._prefetch(self.outwards, page, None)
        self.resident -= 1
        self.stats.bytes_to_host += self.page_bytes

    def _prefetch(self, lane: Lane, page: int, device: int | None) -> None:
        stream = lane.stream.cuda_stream if isinstance(lane, CudaLane) else 0
        address = self.address + page * self.page_bytes
        lane.run(lambda: self.driver.prefetch(address, self.page_bytes, device, stream))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _free(driver: Driver, address: int, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # an update may still be running, on whatever stream the caller used
    driver.free(address)


def _device_view(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """A CUDA tensor over managed memory. It does not own it: the store does."""

    class Array:
        __cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    return torch.as_tensor(Array(), device=device)
