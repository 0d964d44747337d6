"""Benchmark of the CUDA kernels against bitsandbytes, plain torch and the floor, in one process on the same inputs.

    python tools/bench.py                     every shape, every number of tokens (a few minutes)
    python tools/bench.py --quick             three shapes, for `make gpu`
    python tools/bench.py --output results/   writes bench_cuda.json and bench_cuda.md there

How it measures. The two ceilings first: a large copy (bytes read + written) and a large bf16 product. A floor is
max(bytes / copy, flops / product). Every call is captured in a CUDA graph that runs it over rotating weights, together
larger than three times the L2, so that weights come from memory as they do in a model; medians of replays; what cannot
be captured is timed with events and marked "e". A time below the floor means that the floor is wrong or the cache warm.
"""

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import linear

from qlora_ref import native
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.quantized import QuantizedTensor

SHAPES = (  # (out, in)
    (4096, 4096),  # Llama 7B and 8B: q, o
    (1024, 4096),  # 8B: k, v
    (14336, 4096),  # 8B: gate, up
    (4096, 14336),  # 8B: down
    (11008, 4096),  # 7B: gate, up
    (4096, 11008),  # 7B: down
    (8192, 8192),  # 70B: q, o
    (28672, 8192),  # 70B: gate, up
    (8192, 28672),  # 70B: down
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
QUICK_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
QUICK_TOKENS = (1, 4, 8, 16, 32, 128, 2048)
LORA_TOKENS = (512, 2048, 8192)
RANK = 64
BF16 = torch.bfloat16
DEVICE = "cuda"  # the smoke test sets "cpu"


@dataclass
class Row:
    op: str
    shape: str
    tokens: int
    ours: float  # microseconds, like all below
    floor: float
    bitsandbytes: float | None = None
    torch: float | None = None  # the 16-bit operation without quantization
    other: float | None = None  # another way to compute the same; `other_is` says which
    other_is: str = ""
    marks: str = ""  # columns timed with events instead of a graph


# --- timing ----------------------------------------------------------------------------------------------------------


def median_us(call, seconds: float) -> float:
    """Median time of `call()` by events, after one warm-up, within about `seconds`."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)

    once()
    first = once()
    repeats = max(5, min(200, int(1e6 * seconds / max(first, 1))))
    return statistics.median(once() for _ in range(repeats))


def time_us(calls: list, seconds: float, capture: bool = True) -> tuple[float, bool]:
    """(microseconds a call, was it captured?) for `calls`: the same operation on rotating inputs."""
    calls = calls * max(1, 8 // len(calls))

    def run():
        for call in calls:
            call()

    run()
    torch.cuda.synchronize()
    replay = run
    if capture:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            replay = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()
    return median_us(replay, seconds) / len(calls), replay is not run


class Table:
    """Fills rows; a column whose operation is missing or fails stays empty, with the reason in `problems`."""

    def __init__(self, seconds: float):
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self.seconds = seconds

    def add(self, op, shape, tokens, floor, ours, other_is="", uncapturable=(), **columns) -> None:
        row = Row(op, f"{shape[0]}x{shape[1]}", tokens, float("nan"), floor, other_is=other_is)
        for name, calls in dict(ours=ours, **columns).items():
            if calls is None:
                continue
            try:
                value, captured = time_us(calls, self.seconds, name not in uncapturable)
                setattr(row, name, value)
                row.marks += "" if captured else f"{name}:e "
            except Exception as error:
                self.problems.append(f"{op} {row.shape} tokens={tokens} {name}: {type(error).__name__}: {error}")
        self.rows.append(row)
        print(line(row), flush=True)


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Ceilings:
    copy: float  # bytes a second, read + written
    product: float  # flops a second, bf16
    l2: int

    def floor(self, nbytes: float, flops: float = 0.0) -> float:
        return 1e6 * max(nbytes / self.copy, flops / self.product)


def ceilings() -> Ceilings:
    source = torch.randn(2**28, device=DEVICE).to(BF16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / (1e-6 * median_us(lambda: target.copy_(source), 0.3))
    a, b = (torch.randn(8192, 8192, device=DEVICE).to(BF16) for _ in range(2))
    product = 2 * 8192**3 / (1e-6 * median_us(lambda: a @ b, 0.3))
    return Ceilings(copy, product, torch.cuda.get_device_properties(0).L2_cache_size)


def rotations(nbytes: int, l2: int) -> int:
    """Copies of a weight of `nbytes` that together overflow three L2 caches."""
    return max(2, min(64, -(-3 * l2 // nbytes)))


def random_weights(shape, count) -> list[torch.Tensor]:
    return [0.02 * torch.randn(shape, device=DEVICE, dtype=BF16) for _ in range(count)]


def load_bitsandbytes():
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes

    return bitsandbytes


def bench_blockwise(table: Table, c: Ceilings, shape, bnb) -> None:
    rows, cols = shape
    n = rows * cols
    packed_bytes = n * (0.5 + 1 / 64) + n / 64 / 256 * 4
    weights = random_weights(shape, rotations(2 * n, c.l2))
    quantized = [QuantizedTensor.quantize(w, check_finite=False) for w in weights]
    theirs = theirs_q = None
    if bnb is not None:
        f = bnb.functional
        states = [f.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True) for w in weights]
        theirs = [lambda s=s: f.dequantize_4bit(*s) for s in states]
        theirs_q = [lambda w=w: f.quantize_4bit(w, blocksize=64, quant_type="nf4") for w in weights]
    plain = [torch.empty_like(w) for w in weights]
    table.add(
        "dequantize", shape, 0, c.floor(packed_bytes + 2 * n), [q.dequantize for q in quantized], bitsandbytes=theirs,
        torch=[lambda a=a, b=b: a.copy_(b) for a, b in zip(plain, weights, strict=True)],
    )  # fmt: skip
    quantize = torch.ops.qlora_ref.quantize_4bit
    table.add(
        "quantize", shape, 0, c.floor(2 * n + n / 2 + n / 16),
        [lambda w=w: quantize(w, "nf4", 64) for w in weights], bitsandbytes=theirs_q,
        uncapturable=("bitsandbytes",),  # it launches on the legacy stream, and exits the process on the CUDA error
    )  # fmt: skip


def bench_linear(table: Table, c: Ceilings, shape, tokens_list, bnb) -> None:
    rows, cols = shape
    n = rows * cols
    packed_bytes = n * (0.5 + 1 / 64) + n / 64 / 256 * 4
    weights = random_weights(shape, rotations(int(packed_bytes), c.l2))
    quantized = [QuantizedTensor.quantize(w, check_finite=False) for w in weights]
    weights = weights[: rotations(2 * n, c.l2)]
    states = None
    if bnb is not None:
        f = bnb.functional
        make = lambda w: f.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
        states = [make(q.dequantize(BF16)) for q in quantized]
    for tokens in tokens_list:
        x = torch.randn(tokens, cols, device=DEVICE).to(BF16)
        theirs = None
        if states is not None:
            theirs = [lambda s=s, x=x: bnb.matmul_4bit(x, s[0].t(), quant_state=s[1]) for s in states]
        table.add(
            "linear", shape, tokens, c.floor(packed_bytes + 2 * tokens * (rows + cols), 2.0 * tokens * n),
            [lambda q=q, x=x: torch.ops.qlora_ref.linear_4bit(x, *q.op_args(), rows, None) for q in quantized],
            bitsandbytes=theirs,
            torch=[lambda w=w, x=x: linear(x, w) for w in weights],
            other=[lambda q=q, x=x: linear(x, q.dequantize(BF16)) for q in quantized],
            other_is="dequantize + cuBLAS",
        )  # fmt: skip


class AddmmLoRA(torch.autograd.Function):
    """The hand-ordered rival: dequantize, cuBLAS, then the adapter added in place (as Unsloth orders it)."""

    @staticmethod
    def forward(ctx, x, q, A, B, scaling):
        ctx.save_for_backward(x, A, B)
        ctx.q, ctx.scaling = q, scaling
        y = linear(x, q.dequantize(x.dtype))
        return y.addmm_(x @ A.T.to(x.dtype), B.T.to(x.dtype), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, A, B = ctx.saved_tensors
        s, A_c, B_c = ctx.scaling, A.to(x.dtype), B.to(x.dtype)
        v = dy @ B_c
        dA = (v.T @ x).mul_(s).to(A.dtype)
        dB = (dy.T @ (x @ A_c.T)).mul_(s).to(B.dtype)
        dx = (dy @ ctx.q.dequantize(x.dtype)).addmm_(v, A_c, alpha=s)
        return dx, None, dA, dB, None


def forward_backward(function, x, dy, parameters):
    def call():
        for p in (x, *parameters):
            p.grad = None
        function(x).backward(dy)

    return call


def peft_layer(bnb, weight, lora_A, lora_B):
    """PEFT's LoRA around bitsandbytes' Linear4bit, adapters in bf16 (its fastest); None if either is missing."""
    if bnb is None or importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig, inject_adapter_in_model

    rows, cols = weight.shape
    base = bnb.nn.Linear4bit(cols, rows, bias=False, compute_dtype=BF16, quant_type="nf4", compress_statistics=True)
    base.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    model = torch.nn.Sequential(base).to(DEVICE)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]), model)
    layer = model[0]
    layer.lora_A.to(BF16), layer.lora_B.to(BF16)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(lora_A)
        layer.lora_B["default"].weight.copy_(lora_B)
    return layer


def bench_lora(table: Table, c: Ceilings, shape, tokens_list, bnb) -> None:
    """Forward + backward with a LoRA of rank 64, x needing a gradient. `torch`: plain bf16 forward + dX, no adapter."""
    rows, cols = shape
    n = rows * cols
    weight = random_weights(shape, 1)[0]
    base = Linear4bit(cols, rows, bias=False, device="meta")
    q = QuantizedTensor.quantize(weight)
    base._store(q)
    layer = LoRALinear(base, RANK, 2 * RANK)
    with torch.no_grad():
        layer.lora_B.normal_()
    theirs_layer = peft_layer(bnb, weight, layer.lora_A, layer.lora_B)
    adapters = [layer.lora_A, layer.lora_B]
    for tokens in tokens_list:
        x = torch.randn(tokens, cols, device=DEVICE, dtype=BF16, requires_grad=True)
        dy = torch.randn(tokens, rows, device=DEVICE, dtype=BF16)

        def ours(x):
            y = layer(x)
            native.cuda.scratch.clear()  # as in the middle of a model: the backward decodes again, like the rivals
            return y

        theirs = None
        if theirs_layer is not None:
            parameters = [p for p in theirs_layer.parameters() if p.requires_grad]
            theirs = [forward_backward(theirs_layer, x, dy, parameters)]
        addmm = lambda x: AddmmLoRA.apply(x, q, *adapters, layer.scaling)
        flops = 4.0 * tokens * n + 12.0 * tokens * RANK * (rows + cols) / 2
        table.add(
            "LoRA forward+backward", shape, tokens, c.floor(2 * (n / 2 + 2 * tokens * (rows + cols)), flops),
            [forward_backward(ours, x, dy, adapters)],
            bitsandbytes=theirs,
            torch=[forward_backward(lambda x: linear(x, weight), x, dy, [])],
            other=[forward_backward(addmm, x, dy, adapters)],
            other_is="addmm order",
        )  # fmt: skip


# --- the report ------------------------------------------------------------------------------------------------------


@cache
def machine() -> dict:
    p = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except OSError:
        driver = "unknown"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    bnb = load_bitsandbytes()
    return {
        "device": p.name, "multiprocessors": p.multi_processor_count, "memory_GiB": round(p.total_memory / 2**30, 1),
        "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "bitsandbytes": getattr(bnb, "__version__", None), "kernels": native.module.cuda.archs, "commit": commit,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def ratio(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None or a != a or b != b else f"{a / b:.2f}"


def line(r: Row) -> str:
    tokens = str(r.tokens) if r.tokens else ""
    cells = [r.op, r.shape, tokens, number(r.ours), number(r.bitsandbytes), number(r.torch), number(r.other)]
    cells += [number(r.floor), ratio(r.bitsandbytes, r.ours), ratio(r.torch, r.ours), ratio(r.floor, r.ours), r.marks]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| op | out x in | tokens | ours us | bitsandbytes us | bf16 torch us | other way us | floor us | bnb/ours | "
    "bf16/ours | share of floor | by events |\n" + "|---" * 12 + "|"
)


def markdown(info: dict, c: Ceilings, table: Table) -> str:
    about = ", ".join(f"{k} {v}" for k, v in info.items())
    text = [f"{about}.", "", f"Ceilings measured here: copy {c.copy / 1e12:.2f} TB/s, bf16 product "
            f"{c.product / 1e12:.0f} TFLOP/s, L2 {c.l2 / 2**20:.0f} MiB. Times are medians in microseconds, cold "
            "cache, CUDA graphs. \"Other way\": dequantize + cuBLAS (linear), hand-ordered addmm (LoRA). For "
            "dequantize, \"bf16 torch\" is a copy of the bf16 weight.", "", HEAD, *map(line, table.rows)]  # fmt: skip
    if table.problems:
        text += ["", "Not measured:", *(f"- {p}" for p in table.problems)]
    return "\n".join(text) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes and sizes")
    parser.add_argument("--output", type=Path, help="folder for bench_cuda.json and bench_cuda.md")
    args = parser.parse_args(argv)
    if native.cuda is None:
        print(f"nothing to measure: {native.missing['cuda']}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bnb, c = load_bitsandbytes(), ceilings()
    table = Table(seconds=0.06 if args.quick else 0.2)
    print(f"copy {c.copy / 1e12:.2f} TB/s, bf16 product {c.product / 1e12:.0f} TFLOP/s\n{HEAD}", flush=True)
    shapes = QUICK_SHAPES if args.quick else SHAPES
    tokens = QUICK_TOKENS if args.quick else TOKENS
    stages = [lambda s: bench_blockwise(table, c, s, bnb), lambda s: bench_linear(table, c, s, tokens, bnb)]
    stages += [lambda s: bench_lora(table, c, s, LORA_TOKENS, bnb)]
    for stage in stages:
        for shape in shapes:
            try:
                stage(shape)
            except Exception as error:
                table.problems.append(f"{shape}: {type(error).__name__}: {error}")
            torch.cuda.empty_cache()
            save(args.output, c, table)
    return 0 if not any(r.ours != r.ours for r in table.rows) else 1


def save(folder: Path | None, c: Ceilings, table: Table) -> None:
    """Written after every shape: a run that is cut off leaves what it measured."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    info = machine()
    (folder / "bench_cuda.md").write_text(markdown(info, c, table))
    content = {"machine": info, "ceilings": asdict(c), "rows": [asdict(r) for r in table.rows]}
    (folder / "bench_cuda.json").write_text(json.dumps({**content, "problems": table.problems}, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
