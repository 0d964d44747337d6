"""One optimizer step of LoRA-shaped tensors beside torch's fused AdamW and bitsandbytes: `python tools/bench_optim.py`.

32 and 8 bits, float32 and bf16 parameters, one thread and all. Whole optimizers, states resident, by turns in one
process, medians. `kernel` is our 32-bit kernel, called through native.py with its checks (some 5 us a tensor) on the
tensors of the torch optimizer: PagedAdamW itself uses torch's where torch has the combination (float32). torch has no
8 bits, so its 32 stand beside them, and it keeps the moments of bf16 parameters in bf16, which are fewer bytes. The
floor is the bytes of our step at the rate of an in-place multiplication.
"""

import logging
import platform
import sys
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
from qlora_ref import native
from qlora_ref.optim import PagedAdamW
from qlora_ref.testing.timing import interleaved

SHAPES, TENSORS = ((64, 4096), (4096, 64)), 32
ELEMENTS = TENSORS * 64 * 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND: Any = native.cuda if DEVICE == "cuda" else native.cpu
SCALARS = dict(lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8)


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call and, on a GPU, the end of what it has started."""

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def load_bitsandbytes():
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(SHAPES[i % 2], generator=generator).to(DEVICE, dtype) for i in range(TENSORS)]
    for p in made:
        p.requires_grad_().grad = torch.randn(p.shape, generator=generator).to(DEVICE, dtype)
    return made


def kernel_step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Our 32-bit kernel on the tensors of a torch optimizer: where memory lies matters more than who reads it."""
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    flat, grads = [p.detach().view(-1) for p in params], [p.grad.view(-1) for p in params]
    m, v = ([optimizer.state[p][name].view(-1) for p in params] for name in ("exp_avg", "exp_avg_sq"))
    steps = [optimizer.state[p]["step"] for p in params]
    return lambda: BACKEND.adamw(flat, grads, m, v, steps, **SCALARS)


def arms(bits: int, dtype: torch.dtype, bnb) -> dict[str, Callable[[], Any]]:
    torchs = torch.optim.AdamW(parameters(dtype), lr=1e-4, fused=True)
    made: dict[str, Any] = {"torch": torchs.step, "ours": PagedAdamW(parameters(dtype), lr=1e-4, bits=bits).step}
    if BACKEND and bits == 32 and dtype == torch.float32:
        made["kernel"] = kernel_step(torchs)
    if bnb:
        made["bitsandbytes"] = (bnb.optim.AdamW8bit if bits == 8 else bnb.optim.AdamW)(parameters(dtype), lr=1e-4).step
    return {name: finished(step) for name, step in made.items()}


def bytes_of_step(bits: int, dtype: torch.dtype) -> float:
    """An element: parameter read and written, gradient read, two moments read and written."""
    moment = 4 if bits == 32 else 1 + 4 / 256
    return 3 * dtype.itemsize + 2 * 2 * moment


def in_place_rate() -> float:
    """Bytes/s."""
    x = torch.randn(2**26, device=DEVICE)
    return 2 * 4 * x.numel() / interleaved({"x": finished(lambda: x.mul_(1.0))})["x"]


def main() -> None:
    bnb = load_bitsandbytes()
    versions = f"torch {torch.__version__}" + (f", bitsandbytes {bnb.__version__}" if bnb else "")
    variant = native.module.cpu.variant() if DEVICE == "cpu" and native.cpu else ""
    print(f"{platform.processor() or platform.machine()}, {DEVICE} {variant}, {versions}, {date.today()}")
    print(f"{ELEMENTS / 1e6:.1f} M parameters in {TENSORS} tensors; ms (in brackets: divided by ours)\n")
    print("| moments | parameters | threads | floor | ours | kernel | torch fused | bitsandbytes |")
    print("|---|---|---|---|---|---|---|---|")
    for threads in dict.fromkeys((1, torch.get_num_threads() if DEVICE == "cpu" else 1)):
        torch.set_num_threads(threads)
        rate = in_place_rate()
        for bits in (32, 8):
            for dtype in (torch.float32, torch.bfloat16):
                times = interleaved(arms(bits, dtype, bnb))
                floor = ELEMENTS * bytes_of_step(bits, dtype) / rate
                cells = [f"{1e3 * floor:.2f} ({floor / times['ours']:.2f})", f"{1e3 * times['ours']:.2f}"]
                for name in ("kernel", "torch", "bitsandbytes"):
                    shown = f"{1e3 * times[name]:.2f} ({times[name] / times['ours']:.2f})" if name in times else ""
                    cells.append(shown)
                print(f"| {bits} bits | {str(dtype)[6:]} | {threads} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
