"""Benchmark of the CPU kernels against bitsandbytes, plain bf16 torch and the floor, in one process on the same inputs.

    python tools/bench.py --device cpu                       both shapes, one thread and all (about 7 minutes)
    python tools/bench.py --device cpu --quick               4096 x 4096 and fewer tokens (about 2 minutes)
    python tools/bench.py --device cpu --output docs/results writes bench_cpu.json and bench_cpu.md there
    python tools/bench.py --device cpu --steps               also whole training steps, of a 110M-parameter Llama
                                                             and of the demo, with peak memory, a process an arm
    python tools/bench.py --device cpu --only-steps          nothing else (about 11 minutes)

How it measures. Every op, shape and number of threads has a process of its own, with all alternatives in it: whether an
allocation costs page faults depends on what others left on the heap (a row's page faults are printed). Alternatives
take turns, in random order, and the median counts (testing/timing.py). Weights rotate through copies that together
exceed twice the last-level cache, except where a row says "cached". A floor is what the machine itself needs: bytes /
the copy or read bandwidth measured here, or flops / what its multiply-add instruction can do at most (peak_flops.cpp;
where that is not known, the rate of torch's bf16 product). Beside it stands what that instruction reached in a
product that writes its weights to the cache first, but has nothing to decode.
"""

import argparse
import copy
import ctypes
import datetime
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import torch
from torch import nn

from bench_cpu_report import Machine, Row, markdown, name, save
from peak_flops import peak
from qlora_ref import native
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.reference.codebook import get_codebook
from qlora_ref.reference.double_quant import get_map8
from qlora_ref.testing.timing import Rotation, interleaved
from step_processes import generation

BF16 = torch.bfloat16
SHAPES = ((4096, 4096), (4096, 14336))  # (out, in)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RANK = 16
STEP_ROWS = (  # op, arm of ours, arms of the others (bench_cpu_steps.py)
    ("training step", "", "", ">= 1.5x bitsandbytes + PEFT"),
    ("training step, products kept by all", "-kept", "-kept", ">= 1.5x bitsandbytes + PEFT"),
    ("training step, products kept by ours", "-kept", "", ">= 1.5x bitsandbytes + PEFT"),
    ("training step in the loop of `qlora-ref demo`", "-demo", "-demo", ">= 1.5x bitsandbytes + PEFT"),
)
FLAT, NESTED = QuantConfig(double_quant=False), QuantConfig()


def load_bitsandbytes():
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def measure_machine() -> Machine:
    """The ceilings with the current number of threads."""
    big, out = torch.zeros(2**27, dtype=torch.uint8).fill_(1), torch.zeros(2**27, dtype=torch.uint8)
    a, b = torch.randn(1024, 4096).to(BF16), torch.randn(4096, 4096).to(BF16)
    as_int = big.view(torch.int64)
    t = interleaved({"read": as_int.sum, "copy": lambda: out.copy_(big), "product": lambda: a @ b.T}, 5)
    product = 2 * 1024 * 4096 * 4096 / t["product"]
    rates = peak(torch.get_num_threads())
    return Machine(2**27 / t["read"], 2**28 / t["copy"], product, rates.bfloat16 or product, rates.panels)


def page_faults(calls) -> dict[str, int]:
    """Of one more call of each."""
    counts = {}
    for key, call in calls.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts[key] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return counts


def last_level_cache() -> int:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def overwrite_cache():
    """A function that fills the last-level cache with something else."""
    return torch.empty(2 * last_level_cache() // 4).zero_


# --- the ops ---------------------------------------------------------------------------------------------------------


def bench_quantize(rows: list[Row], machine: Machine, shape, bnb, threads: int) -> None:
    weight = torch.randn(shape).mul_(0.02).to(BF16)
    calls = {
        "nested": lambda: QuantizedTensor.quantize(weight, NESTED, check_finite=False),
        "flat": lambda: QuantizedTensor.quantize(weight, FLAT, check_finite=False),
    }
    if bnb:
        calls["bitsandbytes"] = lambda: bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    n = weight.numel()
    floor = n * (2 + 0.5 + 1 / 16) / machine.copy
    target = ">= 100x bitsandbytes, >= 3 Gw/s a core"
    times = interleaved(calls, 21, before=overwrite_cache())
    rows.append(Row("quantize", name(shape), threads, None, times, floor, target))


def bnb_kernel(bnb, packed, absmax, out):
    """bitsandbytes' C kernel itself, into a given buffer."""
    function = getattr(bnb.cextension.lib, "cdequantize_blockwise_cpu_nf4_bf16", None)
    if function is None:
        return None
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (packed, absmax, out)]
    sizes = [ctypes.c_longlong(v) for v in (64, *out.shape)]
    return lambda: function(*pointers, *sizes)


def bench_dequantize(rows: list[Row], machine: Machine, shape, bnb, threads: int) -> None:
    weight = torch.randn(64 * threads, 4096).mul_(0.02).to(BF16)  # 0.6 MB a thread: stays in second-level caches
    q, flat = QuantizedTensor.quantize(weight, NESTED), QuantizedTensor.quantize(weight, FLAT)
    out = torch.empty_like(weight)
    calls = {"nested": lambda: q.dequantize(out=out), "flat": lambda: flat.dequantize(out=out)}
    calls |= {f"{key} kernel": native_kernel(value, out, threads) for key, value in (("nested", q), ("flat", flat))}
    if bnb and (kernel := bnb_kernel(bnb, flat.packed, flat.absmax, out)):
        calls["bitsandbytes"] = kernel
    target = "kernel >= 2.5x bitsandbytes' kernel; nested <= 1.05 flat"
    rows.append(Row("dequantize, cached", name(weight.shape), threads, None, interleaved(calls, 999), None, target))

    weight = torch.randn(shape).mul_(0.02).to(BF16)
    q, flat = QuantizedTensor.quantize(weight, NESTED), QuantizedTensor.quantize(weight, FLAT)
    out = torch.empty_like(weight)
    calls = {"nested": lambda: q.dequantize(out=out), "flat": lambda: flat.dequantize(out=out)}
    if bnb:
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        calls["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(packed, state)
    floor = weight.numel() * (0.5159 + 2) / machine.copy
    target = ">= 3x bitsandbytes; nested <= 1.05 flat"
    times = interleaved(calls, 21, before=overwrite_cache())
    rows.append(Row("dequantize, public", name(shape), threads, None, times, floor, target, page_faults(calls)))


def native_kernel(q: QuantizedTensor, out: torch.Tensor, threads: int):
    """Our C++ function itself, into a given buffer."""
    tables = get_codebook(q.config.quant_type), q.config.block_size, get_map8(q.config.map8), q.config.nested_block_size
    arguments, _ = native.cpu._weight(q.packed, q.absmax, q.nested_absmax, q.absmax_mean, *tables, *out.shape)
    return lambda: native.module.cpu.dequantize_4bit(*arguments, out.data_ptr(), 1, out.shape[1], threads)


def bnb_linear(bnb, weight, nested: bool, compute_dtype: torch.dtype = BF16):
    how = dict(bias=False, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=nested)
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], **how)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    return layer.to("cpu")


def bench_linear(rows: list[Row], machine: Machine, shape, bnb, threads: int, tokens_list) -> None:
    weight = torch.randn(shape).mul_(0.02).to(BF16)
    n = weight.numel()
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=BF16)
    linear.weight.data = weight
    make = {  # each layer as a model's is made, not copied
        "nested": lambda: Linear4bit.from_linear(linear, NESTED),
        "flat": lambda: Linear4bit.from_linear(linear, FLAT),
        "bf16": lambda: copy.deepcopy(linear),
    }
    if bnb:
        make["bitsandbytes"] = lambda: bnb_linear(bnb, weight, nested=True).eval()
        make["bnb flat"] = lambda: bnb_linear(bnb, weight, nested=False).eval()
    copies = max(2, -(-2 * last_level_cache() // (n // 2)))
    items = {}
    with torch.no_grad():
        for key, layer in make.items():
            many = copies if key != "bf16" else max(2, -(-2 * last_level_cache() // (2 * n)))
            items[key] = [layer() for _ in range(many)]
            for each in items[key]:
                each(torch.zeros(1, shape[1], dtype=BF16))  # bitsandbytes repacks its weight at the first call
        for m in tokens_list:
            x = torch.randn(m, shape[1]).to(BF16)
            calls = {key: Rotation(lambda layer, x=x: layer(x), many) for key, many in items.items()}
            floor = max(n * 0.5159 / machine.read, 2 * m * n / machine.peak)
            target = {1: ">= 1.2x bitsandbytes, >= 5x bf16 (14336)", 256: "<= 1.10 of bf16"}.get(m, "")
            target = target or (">= 1x both" if m <= 32 else "")
            result = interleaved(calls, 9 if m >= 64 else 21, 0.3)
            rows.append(Row("linear, cold", name(shape), threads, m, result, floor, target))


def peft_layer(layer, loaded_4bit: bool):
    """PEFT's LoRA around the layer, adapters in bf16 as in ours."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(layer)
    model.is_loaded_in_4bit = loaded_4bit
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]), model)
    return model[0]


def bench_lora(rows: list[Row], machine: Machine, shape, bnb, threads: int, m: int = 256) -> None:
    weight = torch.randn(shape).mul_(0.02).to(BF16)
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=BF16)
    linear.weight.data = weight
    linear.weight.requires_grad_(False)
    layers = {
        "nested": LoRALinear(Linear4bit.from_linear(linear, NESTED), RANK, 2 * RANK),
        "flat": LoRALinear(Linear4bit.from_linear(linear, FLAT), RANK, 2 * RANK),
        "bf16": LoRALinear(linear, RANK, 2 * RANK),
    }
    if bnb:
        layers["bitsandbytes"] = peft_layer(bnb_linear(bnb, weight, nested=True), True)
    x, dy = torch.randn(m, shape[1]).to(BF16).requires_grad_(), torch.randn(m, shape[0]).to(BF16)

    def step(layer):
        def call():
            layer.zero_grad()
            x.grad = None
            layer(x).to(BF16).backward(dy)

        return call

    for layer in layers.values():
        layer.train()
    calls = {key: step(layer) for key, layer in layers.items()}
    # forward and dx, and of the adapter A and B on the way forth, on the way back, and their gradients
    floor = 2 * m * (2 * weight.numel() + 3 * RANK * sum(shape)) / machine.peak
    times, target = interleaved(calls, 15, 0.5), ">= 1.5x bitsandbytes + PEFT"
    rows.append(Row("forward + backward, LoRA", name(shape), threads, m, times, floor, target, page_faults(calls)))


BENCHES = {"quantize": bench_quantize, "dequantize": bench_dequantize, "linear": bench_linear, "lora": bench_lora}


def in_own_process(op: str, machine: Machine, shape, threads: int, tokens) -> list[Row]:
    """The rows of one of BENCHES."""
    job = json.dumps({"op": op, "machine": asdict(machine), "shape": shape, "threads": threads, "tokens": tokens})
    run = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the benchmark of {op} {name(shape)} failed: {run.stderr.strip()[-2000:]}")
    return [Row(**row) for row in json.loads(run.stdout.splitlines()[-1])]


def do_job(job: dict) -> None:
    """What `in_own_process` started: prints the rows as JSON."""
    rows: list[Row] = []
    torch.set_num_threads(job["threads"])
    arguments = rows, Machine(**job["machine"]), tuple(job["shape"]), load_bitsandbytes(), job["threads"]
    BENCHES[job["op"]](*arguments, **({"tokens_list": job["tokens"]} if job["op"] == "linear" else {}))
    print(json.dumps([asdict(row) for row in rows]))


# --- whole training steps, a process an arm (bench_cpu_steps.py, step_processes.py) -----------------------------------


def bench_steps(rows: list[Row], peaks: dict, steps: dict) -> None:
    """The demo sets one thread."""
    from bench_cpu_steps import MODELS

    for model, threads in (("llama", os.cpu_count() or 1), ("demo", 1)):
        generations = [generation(MODELS[model], model, threads, rounds=9) for _ in range(3)]
        results = {arm: [g[arm] for g in generations if arm in g] for arm in MODELS[model]}
        seconds = {arm: statistics.median(sum((r["seconds"] for r in rs), [])) for arm, rs in results.items() if rs}
        of_process = lambda r: [statistics.median(r[key]) for key in ("seconds", "page_faults")]
        steps[model] = {arm: [of_process(r) for r in rs] for arm, rs in results.items()}
        for op, ours, theirs, target in STEP_ROWS:
            if "qlora_ref" + ours not in seconds:
                continue
            times = {key: seconds[key + theirs] for key in ("bitsandbytes", "bf16", "rest") if key + theirs in seconds}
            times["nested"] = seconds["qlora_ref" + ours]
            flops = min((r["flop_seconds"] for r in results["rest" + ours]), default=None)
            floor = flops and seconds["rest" + ours] + flops
            rows.append(Row(op, model, threads, None, times, floor, target))
        peaks[model] = {arm: max(r["peak_bytes"] for r in rs) for arm, rs in results.items() if rs}


def machine_info(bnb) -> dict:
    from qlora_ref.doctor import cpu_name

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "CPU": cpu_name(), "cores": os.cpu_count(), "variant": native.module.cpu.variant(),
        "compiler": native.module.compiler, "torch": torch.__version__, "python": platform.python_version(),
        "bitsandbytes": getattr(bnb, "__version__", "absent"), "commit": commit,
        "date": datetime.date.today().isoformat(), "load average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape and few sizes")
    parser.add_argument("--steps", action="store_true", help="also whole training steps (minutes)")
    parser.add_argument("--only-steps", action="store_true", help="whole training steps and nothing else")
    parser.add_argument("--threads", type=int, nargs="*", help="default: 1 and all cores")
    parser.add_argument("--output", type=Path, help="folder for bench_cpu.json and bench_cpu.md")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if native.cpu is None:
        print(f"nothing to measure: {native.missing['cpu']}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if args.job:
        do_job(args.job)
        return 0
    rows, ceilings, peaks, steps = [], {}, {}, {}
    info = machine_info(load_bitsandbytes())
    shapes, tokens = (SHAPES[:1], (1, 8, 32, 256)) if args.quick else (SHAPES, TOKENS)
    for threads in args.threads or sorted({1, os.cpu_count() or 1}):
        if args.only_steps:
            break
        torch.set_num_threads(threads)
        ceilings[threads] = machine = measure_machine()
        for shape in shapes:
            for op in BENCHES:
                rows += in_own_process(op, machine, shape, threads, tokens)
            save(args.output, ceilings, info, rows, peaks, steps)
    if args.steps or args.only_steps:
        bench_steps(rows, peaks, steps)
        save(args.output, ceilings, info, rows, peaks, steps)
    print(markdown(ceilings, info, rows, peaks, steps))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
