"""One optimizer step, PagedAdamW with resident states against torch's fused AdamW: `python tools/bench_optim.py`.

112 LoRA-shaped float32 tensors, by turns in one process, medians; one thread unless OMP_NUM_THREADS says otherwise.
"""

import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
from qlora_ref.optim import PagedAdamW

SHAPES, TENSORS, WARM_UP, STEPS = ((64, 4096), (4096, 64)), 112, 4, 24


def parameters(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(SHAPES[i % 2], generator=generator).to(device).requires_grad_() for i in range(TENSORS)]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return made


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    fused = torch.optim.AdamW(parameters(device), lr=1e-4, fused=True)
    paged = PagedAdamW(parameters(device), lr=1e-4)
    times: dict[str, list[float]] = {"torch": [], "ours": []}
    for step in range(WARM_UP + STEPS):
        for name, optimizer in (("torch", fused), ("ours", paged)):
            sync()
            start = time.perf_counter()
            optimizer.step()
            sync()
            if step >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    theirs, ours = (1e3 * statistics.median(times[name]) for name in ("torch", "ours"))
    print(f"{platform.processor() or platform.machine()}, {device}, torch {torch.__version__}, {date.today()}")
    print(f"torch fused {theirs:.2f} ms, PagedAdamW {ours:.2f} ms, overhead {ours / theirs - 1:+.1%}")


if __name__ == "__main__":
    main()
