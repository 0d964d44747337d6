"""What the multiply-add instructions of this CPU can do at most (tools/peak_flops.cpp): the floor of every product. And
what they do in a bf16 product whose weights are written to the cache first, 32 by one instruction, and not decoded.

python tools/peak_flops.py          GFLOP/s in float32, bf16 and bf16 by panels, one thread and all
"""

import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

SOURCE = Path(__file__).resolve().with_suffix(".cpp")


class Rates(NamedTuple):
    """flop/s of all threads together; 0 without the instruction (bf16), or where nothing could be measured."""

    float32: float = 0
    bfloat16: float = 0
    panels: float = 0

    def of(self, dtype: torch.dtype) -> float:
        return {torch.float32: self.float32, torch.bfloat16: self.bfloat16}.get(dtype, 0)


@cache
def peak(threads: int) -> Rates:
    """Zeros without a compiler or on another processor."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak_flops"
        command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-std=c++17", str(SOURCE), "-o", str(program)]
        try:
            subprocess.run([*command, "-lpthread"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return Rates()
        text = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout
    return Rates(*map(float, text.split()))


def main() -> None:
    for threads in sorted({1, os.cpu_count() or 1}):
        rates = peak(threads)
        found = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates._asdict().items() if rate)
        print(f"{threads} thread(s): {found or 'not measured: no C++ compiler, or neither AVX-512 nor FMA'}")


if __name__ == "__main__":
    main()
