"""What the compiler says of every CUDA kernel: registers, spills, stack, shared memory, and the size of the code.

    python tools/cuda_report.py                     sm_90a, a table
    python tools/cuda_report.py --archs all --json report.json

Needs nvcc, no GPU. Exit status 1 if a hot kernel spills or uses local memory.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALL_ARCHS = ("75", "80", "86", "89", "90a", "100", "120")
SOURCES = ("blockwise", "double_quant", "quantize_nested", "linear_small", "adamw")
NO_FMA = ("blockwise", "double_quant", "quantize_nested", "adamw")  # as in CMakeLists.txt: these define bits


@dataclass
class Kernel:
    source: str
    name: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse(source: str, text: str) -> list[Kernel]:
    """The lines of `ptxas -v`, one Kernel for each entry function and target."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if m := _ENTRY.search(line):
            kernels.append(Kernel(source, m[1], m[2].removeprefix("sm_"), 0, 0, 0, 0))
        elif (m := _SPILL.search(line)) and kernels:
            kernels[-1].stack_bytes, kernels[-1].spill_bytes = int(m[1]), int(m[2]) + int(m[3])
        elif (m := _USED.search(line)) and kernels:
            kernels[-1].registers, kernels[-1].shared_bytes = int(m[1]), int(m[2] or 0)
    return kernels


def demangle(names: list[str]) -> list[str]:
    """Readable names where c++filt is there: `dequantize_kernel<bf16>`."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    lines = [re.sub(r"qlora::(cuda::)?|\(anonymous namespace\)::", "", line) for line in text.splitlines()]
    return [line.removeprefix("void ").partition("(")[0] for line in lines]


def compile_source(source: str, archs: tuple[str, ...], nvcc: str = "nvcc") -> tuple[list[Kernel], int]:
    """(kernels, bytes of the object file) of src/cuda/`source`.cu. Raises RuntimeError with the compiler's words."""
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra,-Werror", "--Werror=all-warnings"]
    flags += ["--fmad=false"] if source in NO_FMA else []
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.o"
        command = [nvcc, *flags, "-c", str(ROOT / f"src/cuda/{source}.cu"), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source}.cu does not compile:\n{done.stdout}{done.stderr}")
        kernels, size = parse(source, done.stdout + done.stderr), output.stat().st_size
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        kernel.name = name
    return kernels, size


def markdown(kernels: list[Kernel], sizes: dict[str, int]) -> str:
    lines = ["| source | kernel | arch | registers | spill bytes | shared bytes |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {k.source} | `{k.name}` | {k.arch} | {k.registers} | {k.spill_bytes} | {k.shared_bytes} |" for k in kernels
    ]
    lines += ["", *(f"{source}.o: {size / 1024:.0f} KiB" for source, size in sizes.items())]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="90a", help="comma-separated targets, or 'all'")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH; install the CUDA toolkit or add its bin folder to PATH", file=sys.stderr)
        return 2
    archs = ALL_ARCHS if args.archs == "all" else tuple(args.archs.split(","))
    kernels, sizes = [], {}
    for source in args.sources.split(","):
        if (ROOT / f"src/cuda/{source}.cu").exists():
            found, sizes[source] = compile_source(source, archs)
            kernels += found
    print(markdown(kernels, sizes))
    if args.json:
        args.json.write_text(json.dumps({"kernels": [asdict(k) for k in kernels], "object_bytes": sizes}, indent=1))
    spilled = [k for k in kernels if k.spill_bytes or k.stack_bytes]
    for k in spilled:
        print(f"{k.source}.cu {k.name} for sm_{k.arch} uses local memory: {k.spill_bytes} bytes spilled, "
              f"{k.stack_bytes} bytes of stack", file=sys.stderr)  # fmt: skip
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
