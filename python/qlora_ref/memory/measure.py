"""The measurement: three real training steps with random weights on a real device.

CUDA: the statistics of torch's caching allocator, and what the driver says is gone.
CPU: a fresh process per measurement; torch's own CPU allocator (through the profiler) and resident memory (VmHWM).

The CUDA half has not been run on a GPU yet.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import categories as row
from .architecture import Architecture, ConfigError, from_config
from .estimate import Estimate
from .graph import build
from .settings import Settings
from .trace import batch, loss_function

STEPS = 3
MMAP_ABOVE = 4096  # bytes: larger blocks are their own pages and go back to the system when they are freed


@dataclass
class Measurement:
    """Bytes by reading, and what to know about them. A device shows totals only, no categories."""

    device: str
    values: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def readings(self, result: Estimate) -> list[tuple[str, int, int]]:
        """(reading, measured bytes, what the estimate expects of it)."""
        expected = {
            "allocated": result.allocated + result.kept,
            "reserved": int((result.allocated + result.kept) * (1 + result.margin.fragmentation)),
            "used on the card": result.needed,
            "CPU allocator": cpu_expected(result),
            "resident growth": cpu_expected(result),
        }
        return [(name, value, expected[name]) for name, value in self.values.items()]


def measure(config: dict, architecture: Architecture, settings: Settings, device: str) -> Measurement:
    """Three training steps on `device` ("cuda", "cuda:1", "cpu"). Raises `ConfigError` if there is no such device."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError("--compare measure: torch sees no CUDA GPU here; use --device cpu, or --compare trace.")
        return measure_cuda(config, architecture, settings, device)
    if device != "cpu":
        raise ConfigError(f"--device {device}: cuda or cpu is needed.")
    return measure_cpu(config, settings)


def optimizer_of(model, settings: Settings):
    from ..optim import PagedAdamW

    bits = 8 if settings.optimizer == "adamw8" else 32
    trainable = [p for p in model.parameters() if p.requires_grad]
    device = trainable[0].device.type
    paging = {"cuda": "pinned", "cpu": "cpu"}[device] if settings.paged else "none"
    return PagedAdamW(trainable, lr=1e-4, bits=bits, paging=paging, pool_bytes=settings.pool_mib << 20)


def train(model, settings: Settings, device: str, steps: int = STEPS) -> None:
    """`steps` optimizer steps on one repeated batch."""
    optimizer, loss_of = optimizer_of(model, settings), loss_function(settings)
    for _ in range(steps):
        for _ in range(min(settings.accumulate, 2)):
            loss_of(model, batch(settings, device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def attention_of(settings: Settings) -> str:
    return {"flash": "sdpa", "eager": "eager"}[settings.attention]


def measure_cuda(config: dict, architecture: Architecture, settings: Settings, device: str) -> Measurement:
    """Peaks of torch's caching allocator over three steps, and what of the card is used after them."""
    _clear_cuda()
    torch.cuda.reset_peak_memory_stats(device)
    graph = build(config, architecture, settings, device, attention_of(settings))
    train(graph.model, settings, device)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    values = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "used on the card": total - free,
    }
    outside = total - free - torch.cuda.memory_reserved(device)
    del graph
    _clear_cuda()
    name = torch.cuda.get_device_name(device)
    note = (
        f"{outside / 2**20:.0f} MiB of the card are outside torch's allocator: the CUDA context, and other processes."
    )
    return Measurement(f"{name}, torch {torch.__version__}", values, [note])


def _clear_cuda() -> None:
    """Give back what an earlier model in this process left: decoded weights, garbage, cached blocks."""
    from .. import native

    if native.cuda is not None:
        native.cuda.scratch.clear()
    gc.collect()
    torch.cuda.empty_cache()


def measure_cpu(config: dict, settings: Settings, readings=("CPU allocator", "resident growth")) -> Measurement:
    """Run this module in a fresh process, so that resident memory starts clean; once for each reading."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "MALLOC_MMAP_THRESHOLD_": str(MMAP_ABOVE),
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
    }
    values = {}
    for reading in readings:
        request = json.dumps({"config": config, "settings": asdict(settings), "reading": reading})
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__],
            input=request, capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"The measuring process failed:\n{done.stderr[-2000:]}")
        values[reading] = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return Measurement(f"CPU, torch {torch.__version__}", values)


def cpu_expected(result: Estimate) -> int:
    """The estimate for a CPU: its kernels decode a weight row by row, so no dequantized weight is ever whole."""
    from .. import native

    if native.cpu is None:
        return result.allocated
    return max(result.phase_bytes(phase) - result.phases[phase][row.SCRATCH] for phase in result.phases)


def resident_growth(config: dict, settings: Settings) -> int:
    """Growth of the peak resident set from before the model is built to after three steps.

    A one-layer copy of the model trains first: that loads the code and grows the pools that any model would.
    """
    _run(_shallow(config), settings)
    _collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM to the resident set of now
    _run(config, settings)
    return _status("VmHWM") - before


def allocator_peak(config: dict, settings: Settings) -> int:
    """Peak of live bytes in torch's CPU allocator over three steps, the internals of every operator included."""
    _run(_shallow(config), settings)
    _collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        _run(config, settings)
    live = peak = 0
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _run(config: dict, settings: Settings) -> None:
    architecture = from_config(config)
    graph = build(config, architecture, settings, "cpu", attention_of(settings))
    train(graph.model, settings, "cpu")


def _shallow(config: dict) -> dict:
    return {**config, "num_hidden_layers": 1}


def _collect() -> None:
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}: resident memory can only be measured on Linux.")


READINGS = {"CPU allocator": allocator_peak, "resident growth": resident_growth}


def main() -> None:
    """Child process: a JSON request on standard input, a JSON answer on the last line of standard output."""
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    settings = Settings(**request["settings"])
    print(json.dumps({"bytes": READINGS[request["reading"]](request["config"], settings)}))


if __name__ == "__main__":
    main()
