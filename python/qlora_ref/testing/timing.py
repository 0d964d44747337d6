"""Timing that survives a machine with other work on it: alternatives take turns, and the median speaks.

What others do to the machine then falls on every alternative alike, so that ratios are steadier than times. So does
what a neighbour leaves in the caches: the order is another one in every round. (In a fixed order our second form found
the interpreter's data that our first had just brought back.)
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 9,
    seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Median seconds of every call. All take turns, `rounds` times at least and for `seconds` each at least.

    One call of each beforehand warms up. Every round has its own order, the same in every run.
    `before` is run, outside of the time, before every call. `clock`: time.thread_time counts only the time on the core,
    one thread's.
    """
    if not calls:
        return {}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began, order = time.perf_counter(), random.Random(0)
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - began < seconds * len(calls):
        for name in order.sample(list(calls), len(calls)):
            before()
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Rotation:
    """Calls `function` with the next of `items` each time: what it reads is then not in the cache any more."""

    def __init__(self, function: Callable[[Any], Any], items: list):
        self.function, self.items, self.next = function, items, 0

    def __call__(self) -> Any:
        self.next = (self.next + 1) % len(self.items)
        return self.function(self.items[self.next])
