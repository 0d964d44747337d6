"""The estimate beside another backend: the trace, or a measurement. Imports torch and transformers: only on request."""

from collections import Counter

from . import categories as row
from .estimate import Estimate
from .measure import STEPS, measure
from .report import GB, table
from .trace import trace


def compare_trace(config: dict, result: Estimate) -> str:
    """Estimate and trace of one setup, by category at each one's peak and by phase."""
    traced = trace(config, result.architecture, result.settings)
    rows = _category_rows(result.categories, traced.categories)
    rows.append(["= peak of tensors", *_pair(result.allocated, traced.allocated)])
    phases = [[name, *_pair(result.phase_bytes(name), traced.phases[name][0])] for name in row.PHASES]
    error = result.allocated / traced.allocated - 1
    dynamic = result.dynamic / (traced.allocated - result.static.total()) - 1
    return "\n\n".join([
        f"{result.architecture.name}: closed form against the traced module graph, "
        f"{result.settings.batch} x {result.settings.seq} tokens",
        table(rows, ["at the peak", "estimate, GB", "trace, GB", "difference, MB"], "lrrr"),
        table(phases, ["phase", "estimate, GB", "trace, GB", "difference, MB"], "lrrr"),
        f"estimate / trace - 1 = {100 * error:+.3f} % of the total, {100 * dynamic:+.3f} % of the dynamic part; "
        f"peak in {result.peak_phase!r} (estimate) and {traced.peak_phase!r} (trace)",
    ])  # fmt: skip


def compare_measure(config: dict, result: Estimate, device: str) -> str:
    """Estimate and measurement on a real device."""
    measured = measure(config, result.architecture, result.settings, device)
    rows = [
        [name, *_pair(expected, size), f"{100 * (expected / size - 1):+.2f} %"]
        for name, size, expected in measured.readings(result)
    ]
    title = f"{result.architecture.name}: closed form against {measured.device}, {STEPS} training steps"
    headers = ["reading", "estimate, GB", "measured, GB", "difference, MB", "error"]
    return "\n\n".join([title, table(rows, headers, "lrrrr"), *measured.notes])


def _category_rows(expected: Counter, found: Counter) -> list[list[str]]:
    names = [name for name in row.CATEGORIES if expected[name] or found[name]]
    return [[name, *_pair(expected[name], found[name])] for name in names]


def _pair(expected: float, found: float) -> list[str]:
    digits = 3 if max(expected, found) > 0.1 * GB else 5
    return [f"{expected / GB:.{digits}f}", f"{found / GB:.{digits}f}", f"{(expected - found) / 1e6:+.3f}"]
