"""Everything a machine with an NVIDIA GPU should run, in one command, into one folder.

    make gpu            or            python3 tools/check_gpu.py [--minutes 9] [--output results/gpu-...]

Needs torch with CUDA, nvcc, cmake, ninja, pybind11 and pytest in the Python that runs it; no virtual environment, no
network. Stages: build (for this card only), tests of the kernels, benchmark, tests of optimizer, paging and memory, and
compute-sanitizer's memcheck, racecheck, synccheck. Each has a time limit; one that fails or runs out of time is
recorded and the others still run (only a failed build ends it). The folder then holds report.md, report.json, log.txt,
bench_cuda.md, bench_cuda.json. Exit status 0 only if every stage passed or says why it could not run.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# stage -> (file, part of it, share of the time); each a process, as a kernel that faults takes its process with it
TESTS = {
    "exact parity tests": ("test_parity.py", "test_exact", 0.05),
    "product parity tests": ("test_parity.py", "test_bound", 0.05),
    "kernel tests": ("test_cuda_gpu.py", "", 0.05),
    "AdamW tests": ("test_adamw.py", "", 0.03),
    "paged optimizer tests": ("test_optim.py", "", 0.04),
    "memory tests": ("test_memory_report.py", "", 0.06),
}


@dataclass
class Stage:
    name: str
    command: list[str]
    share: float  # of the whole time
    needs: str = ""  # a program without which the stage is skipped
    status: str = "not run"  # passed, failed, out of time, skipped
    seconds: float = 0.0
    summary: str = ""


def pytest_command(stage: str) -> list[str]:
    """The GPU tests of a stage, each named as it starts. Warnings stay warnings: the suite pins another torch."""
    file, part, _ = TESTS[stage]
    options = ["-v", "-m", "gpu", "-k", part, "-p", "no:cacheprovider", "--tb=short"]
    options += ["-o", "filterwarnings=default", "-o", "addopts="]
    return [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / file)]


def stages(output: Path) -> list[Stage]:
    python, build = sys.executable, str(ROOT / "build" / "gpu")
    cmake = shutil.which("cmake") or str(Path(python).parent / "cmake")
    configure = [cmake, "-S", str(ROOT), "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DQLORA_INPLACE=ON"]
    configure += ["-DQLORA_CUDA=ON", "-DQLORA_CUDA_ARCHS=native", f"-DPython_EXECUTABLE={python}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    tool = [python, str(ROOT / "tools" / "sanitize.py"), "--limit", "{limit}", "--tools"]
    sanitizer = "compute-sanitizer"
    tests = [Stage(name, pytest_command(name), share) for name, (_, _, share) in TESTS.items()]
    return [
        Stage("configure", configure, 0.2),  # nothing runs without these two, and what they leave is shared out
        Stage("build", [cmake, "--build", build, "-j", str(min(16, os.cpu_count() or 1))], 0.3),
        Stage("doctor", [python, "-m", "qlora_ref", "doctor"], 0.02),
        *tests[:3],
        Stage("benchmark", [python, str(ROOT / "tools/bench.py"), "cuda", "--quick", "--output", str(output)], 0.1),
        *tests[3:],
        Stage("memcheck", [*tool, "memcheck"], 0.04, sanitizer),
        Stage("racecheck", [*tool, "racecheck"], 0.03, sanitizer),
        Stage("synccheck", [*tool, "synccheck"], 0.03, sanitizer),
    ]


def run_limited(command: list[str], log, seconds: float) -> tuple[int | None, str]:
    """(exit status or None if the time ran out, output). Ends the whole process group of a stage that runs out."""
    # QLORA_REQUIRE: kernels that do not load are a failure here, not a reason to skip every test
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "PYTHONUNBUFFERED": "1"}
    environment["QLORA_REQUIRE"] = "cpu,cuda"
    with open(log, "a+", errors="replace") as file:  # what is killed may end inside a character
        start = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        file.seek(start)
        return status, file.read()


def available(program: str) -> bool:
    return shutil.which(program) is not None or (Path("/usr/local/cuda/bin") / program).exists()


def run_stage(stage: Stage, log: Path, limit: float) -> None:
    if stage.needs and not available(stage.needs):
        stage.status, stage.summary = "skipped", f"{stage.needs} is not installed"
        return
    command = [part.format(limit=int(0.9 * limit)) if part == "{limit}" else part for part in stage.command]
    with open(log, "a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(command)}\n")
    begin = time.time()
    try:
        status, text = run_limited(command, log, limit)
    except OSError as error:
        status, text = 127, f"could not start: {error}"
    stage.seconds = round(time.time() - begin, 1)
    stage.status = "out of time" if status is None else "passed" if status == 0 else "failed"
    lines = [line for line in text.splitlines() if line.strip()]
    stage.summary = lines[-1][:300] if lines else ""


def environment() -> dict[str, str]:
    """Versions of everything, each "missing" where it is."""

    def output(*command: str) -> str:
        try:  # the first import of torch on a fresh machine reads gigabytes
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=150)
            return done.stdout.strip() or done.stderr.strip() or "silent"
        except OSError:
            return "missing"
        except subprocess.TimeoutExpired:
            return "did not answer in 150 s"

    query = "name,driver_version,memory.total,compute_cap"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    torch = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "gpu": output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "nvcc": output(nvcc, "--version").splitlines()[-1],
        "torch": output(sys.executable, "-c", torch),
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def report(output: Path, info: dict[str, str], done: list[Stage]) -> None:
    (output / "report.json").write_text(
        json.dumps({"environment": info, "stages": [asdict(s) for s in done]}, indent=1)
    )
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in info.items()), ""]
    lines += ["| stage | result | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.status} | {s.seconds:.0f} | {s.summary.replace('|', '/')} |" for s in done]
    bench = output / "bench_cuda.md"
    lines += ["", bench.read_text() if bench.exists() else "No benchmark was written."]
    (output / "report.md").write_text("\n".join(lines) + "\n")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / f"gpu-{stamp}")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages together")
    parser.add_argument("--only", help="comma-separated stages, by name")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    tools = str(Path(sys.executable).parent), "/usr/local/cuda/bin"  # pip's cmake and ninja; nvcc
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *tools])
    begin, budget = time.time(), 60 * args.minutes
    info, everything = environment(), stages(output)
    print("\n".join(f"{key}: {value}" for key, value in info.items()), flush=True)
    if not args.only and not info["torch"].endswith("True"):
        print(
            "torch sees no NVIDIA GPU here, so there is nothing to check; see nvidia-smi, and use a CUDA build of torch"
        )
        return 2
    for i, stage in enumerate(everything):
        if args.only and stage.name not in args.only.split(","):
            continue
        left = budget - (time.time() - begin)
        ahead = sum(s.share for s in everything[i:])
        limit = left * stage.share / ahead  # what earlier stages did not use is shared out
        run_stage(stage, output / "log.txt", limit)
        print(f"{stage.name}: {stage.status} in {stage.seconds:.0f} s (limit {limit:.0f}). {stage.summary}", flush=True)
        report(output, info, everything)
        if stage.name in ("configure", "build") and stage.status != "passed":
            print(f"the kernels were not built, so the rest cannot run; see {output / 'log.txt'}")
            return 1
    print(f"written to {output}")
    return int(any(s.status in ("failed", "out of time") for s in everything))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
