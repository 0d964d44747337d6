"""Every CUDA kernel of the project under NVIDIA's compute-sanitizer.

    python tools/sanitize.py                          memcheck, racecheck, synccheck
    python tools/sanitize.py --tools memcheck --limit 120 --output results/

The run itself (`--run`) calls each op once for each small case of testing/cases.py, and the AdamW kernels, with torch's
caching allocator off, so that a tensor ends where its memory ends. Exit status 1 if a tool finds anything.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # exit status that means "the tool found something", told apart from a crash


def cases_worth_running():
    """One of each (op, dtype, size, layout ...) combination that is small: the tools slow kernels down 10-100 times."""
    from qlora_ref.testing.cases import cases

    small: dict[str, list] = {}
    for case in cases():
        p = case.params
        if p.get("n", 0) * p.get("k", 1) <= 2**15 and p.get("data", "normal") in ("normal", "nonfinite", "zeros"):
            small.setdefault(case.op, []).append(case)
    for turn in zip_longest(*small.values()):  # by turns: when the time is out, every op has had some
        yield from (case for case in turn if case is not None)


def run() -> int:
    """The workload: to be started under the sanitizer."""
    sys.path.insert(0, str(ROOT / "python"))
    import torch

    from qlora_ref import native, ops  # noqa: F401  (registers the ops)

    if native.cuda is None:
        print(f"no CUDA kernels: {native.missing['cuda']}", file=sys.stderr)
        return 2
    begin, count = time.time(), 0
    limit = float(os.environ.get("QLORA_SANITIZE_SECONDS", "1e9"))
    for case in cases_worth_running():
        if time.time() - begin > limit:
            print(f"out of time after {count} cases")
            break
        getattr(torch.ops.qlora_ref, case.op)(*case.arguments("cuda"))
        count += 1
    tilings()
    adamw_steps(native.cuda, "cuda")
    torch.cuda.synchronize()
    print(f"{count} cases ran")
    return 0


def tilings() -> None:
    """The linear kernel for few tokens, in every tiling on most cards."""
    import torch

    for rows, tokens in ((40, 5), (9000, 8), (40, 12), (9000, 12), (40, 20), (9000, 32)):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        codes = torch.zeros(rows * 128, dtype=torch.uint8, device="cuda")
        absmax = torch.ones(rows * 4, device="cuda")
        torch.ops.qlora_ref.linear_4bit(x, codes, absmax, None, None, "nf4", 64, "dynamic", 256, rows, None)


def adamw_steps(backend, device: str) -> None:
    """One step of both AdamW kernels in both dtypes, over two tensors with ragged ends."""
    import torch

    hyper = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8)
    sizes = (20_000, 513)  # more than a chunk of 16384; a few elements over two state blocks
    for dtype in (torch.float32, torch.bfloat16):
        params, grads = ([torch.randn(n, device=device).to(dtype) for n in sizes] for _ in range(2))
        steps = [torch.ones(1, device=device) for _ in sizes]
        moments = [[torch.zeros(n, device=device) for n in sizes] for _ in range(2)]
        backend.adamw(params, grads, *moments, steps, **hyper)
        states = []
        for _ in range(2):
            states.append([torch.zeros(n, dtype=torch.uint8, device=device) for n in sizes])
            states.append([torch.zeros(-(-n // 256), device=device) for n in sizes])
        backend.adamw_8bit(params, grads, *states, steps, **hyper)


def sanitizer() -> str | None:
    for candidate in (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"):
        if candidate and Path(candidate).exists():
            return candidate
    return None


def command(binary: str, tool: str) -> list[str]:
    """Only our kernels are instrumented where this version can choose (its help names the option)."""
    text = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=60).stdout
    chosen = next(([f"{o}", "kns=qlora"] for o in ("--kernel-regex", "--filter") if o in text), [])
    flags = ["--tool", tool, "--error-exitcode", str(FOUND), *chosen]
    return [binary, *flags, sys.executable, str(Path(__file__).resolve()), "--run"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--limit", type=float, default=600, help="seconds for each tool")
    parser.add_argument("--output", type=Path, help="folder for the tools' full output")
    parser.add_argument("--run", action="store_true", help="the workload itself, without a tool")
    args = parser.parse_args(argv)
    if args.run:
        return run()
    binary = sanitizer()
    if binary is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["QLORA_SANITIZE_SECONDS"] = str(0.6 * args.limit)
    worst = 0
    for tool in args.tools.split(","):
        try:
            done = subprocess.run(
                command(binary, tool), env=environment, capture_output=True, text=True, timeout=args.limit
            )
            text, status = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            text, status = (error.stdout or b"").decode(errors="replace"), None  # bytes, whatever `text` says
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / f"{tool}.txt").write_text(text)
        verdict = {0: "clean", FOUND: "FOUND SOMETHING", None: f"did not end within {args.limit:.0f} s"}
        found = [line for line in text.splitlines() if line.startswith("=========")]
        print("\n".join(found[:200] if status == FOUND else text.splitlines()[-30 if status else -3 :]))
        print(f"{tool}: {verdict.get(status, f'failed to run (status {status})')}")  # the last line is the summary
        worst = max(worst, int(status != 0))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
