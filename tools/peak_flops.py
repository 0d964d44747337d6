"""What the multiply-add instructions of this CPU can do at most (tools/peak_flops.cpp): the floor of every product.

python tools/peak_flops.py          GFLOP/s in float32 and bf16, one thread and all
"""

import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().with_suffix(".cpp")


@cache
def peak(threads: int) -> dict[torch.dtype, float]:
    """flop/s of `threads` threads together by dtype; without those the CPU has no instruction for, empty without a
    compiler or on another processor."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak_flops"
        command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-std=c++17", str(SOURCE), "-o", str(program)]
        try:
            subprocess.run([*command, "-lpthread"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        text = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout
    rates = dict(zip((torch.float32, torch.bfloat16), map(float, text.split()), strict=True))
    return {dtype: rate for dtype, rate in rates.items() if rate > 0}


def main() -> None:
    for threads in sorted({1, os.cpu_count() or 1}):
        rates = peak(threads)
        found = ", ".join(f"{str(d).removeprefix('torch.')} {r / 1e9:.0f} GFLOP/s" for d, r in rates.items())
        print(f"{threads} thread(s): {found or 'not measured: no C++ compiler, or neither AVX-512 nor FMA'}")


if __name__ == "__main__":
    main()
