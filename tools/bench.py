"""Benchmark of the kernels on this machine: those for CUDA where there is a card, else those for the CPU.

python tools/bench.py [--device cuda|cpu] [options of tools/bench_cuda.py or tools/bench_cpu.py]
"""

import importlib
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]


def main(argv: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if argv[:1] == ["--device"]:
        argv = argv[1:]
    if argv[:1] in (["cuda"], ["cpu"]):
        device, argv = argv[0], argv[1:]
    if not (HERE / f"bench_{device}.py").exists():
        print(f"there is no benchmark for {device} here, and torch sees no GPU", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench_{device}").main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
