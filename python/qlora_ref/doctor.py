"""`qlora-ref doctor`: what this machine and this installation can do, what is missing, and how to get it.

Always exits with 0: it reports. It imports every part inside a try, so that it also works when the rest does not.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

# package -> what needs it, how to get it
PACKAGES = {
    "torch": ("everything", "pip install torch"),
    "numpy": ("everything", "pip install numpy"),
    "scipy": ("deriving the data types", "pip install scipy"),
    "tabulate": ("tables", "pip install tabulate"),
    "transformers": ("fine-tuning and evaluating models", "pip install 'qlora_ref[hf]'"),
    "peft": ("reading and writing adapters", "pip install 'qlora_ref[hf]'"),
    "accelerate": ("fine-tuning", "pip install 'qlora_ref[hf]'"),
    "safetensors": ("reading checkpoints", "pip install 'qlora_ref[hf]'"),
    "matplotlib": ("plots", "pip install 'qlora_ref[hf]'"),
    "bitsandbytes": ("comparing with the peer", "pip install 'qlora_ref[test]'"),
    "pytest": ("tests", "pip install 'qlora_ref[test]'"),
    "pybind11": ("building in the tree", "pip install pybind11"),
}
TOOLS = {
    "cmake": ("building in the tree", "pip install cmake"),
    "c++": ("the CPU kernels", "apt-get install g++"),
    "nvcc": ("the CUDA kernels", "the CUDA toolkit 12.8 or newer, https://developer.nvidia.com/cuda-downloads"),
}


def package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def tool_version(name: str) -> str | None:
    """The line with the version of `name --version`, None if the tool is not on PATH."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}, which does not run ({error})"
    lines = [line.strip() for line in text.splitlines() if any(c.isdigit() for c in line)]
    released = [line for line in lines if "release" in line]  # nvcc's first lines are its copyright and a date
    return (released + lines + [path])[0]


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def backends() -> dict[str, Any]:
    """What native.py found: per backend ready or why not, variants, CUDA targets, compiler."""
    try:
        from . import native
    except Exception as error:
        return {"cpu": {"ready": False, "why": str(error)}, "cuda": {"ready": False, "why": str(error)}}
    report: dict[str, Any] = {
        name: {"ready": not why, **({"why": why} if why else {})} for name, why in native.missing.items()
    }
    if native.cpu is not None:
        variants, used = native.cpu_variants(), native.module.cpu.variant()
        report["cpu"] |= {"variants": variants, "variant": used, "compiler": native.module.compiler}
    if hasattr(native.module, "cuda"):
        report["cuda"] |= {"archs": native.module.cuda.archs.split()}
    return report


def gpus() -> list[dict[str, Any]]:
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:
        return []
    return [
        {"name": p.name, "compute_capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in found
    ]


def torch_report() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:
        return {"why": f"torch does not import: {error}"}
    return {"cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def collect() -> dict[str, Any]:
    """Everything, as one JSON-able dict."""
    from . import __version__

    settings = ("QLORA_BACKEND", "QLORA_CPU_VARIANT", "QLORA_DATA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {
        "qlora_ref": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"name": cpu_name(), "cores": os.cpu_count()},
        "torch": torch_report(),
        "backends": backends(),
        "gpus": gpus(),
        "packages": package_versions(),
        "tools": {name: tool_version(name) for name in TOOLS},
        "environment": {name: os.environ[name] for name in settings if name in os.environ},
    }


def missing_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"native {name}: {b['why']}" for name, b in report["backends"].items() if not b["ready"]]
    for kind, table in (("packages", PACKAGES), ("tools", TOOLS)):
        for name, version in report[kind].items():
            if version is None:
                purpose, remedy = table[name]
                lines.append(f"{name} (for {purpose}): {remedy}")
    return lines


def render(report: dict[str, Any]) -> str:
    cpu, torch_, native = report["cpu"], report["torch"], report["backends"]
    lines = [
        f"qlora_ref {report['qlora_ref']}, Python {report['python']}, {report['platform']}",
        f"CPU       {cpu['name']}, {cpu['cores']} cores; torch uses {torch_.get('threads', '?')} threads",
    ]
    for gpu in report["gpus"]:
        size = gpu["memory_bytes"] / 2**30
        lines.append(f"GPU       {gpu['name']}, compute capability {gpu['compute_capability']}, {size:.0f} GiB")
    if not report["gpus"]:
        lines.append(f"GPU       none seen (torch's CUDA: {torch_.get('cuda') or 'none, a CPU build'})")
    if native["cpu"]["ready"]:
        others = ", ".join(native["cpu"]["variants"])
        lines.append(f"kernels   CPU: {native['cpu']['variant']} (of {others}), built with {native['cpu']['compiler']}")
    else:
        lines.append("kernels   CPU: none; every op runs the PyTorch reference (correct, slow)")
    state = "ready" if native["cuda"]["ready"] else "not usable"
    archs = native["cuda"].get("archs")
    lines.append(f"          CUDA: {state}" + (f", compiled for {' '.join(archs)}" if archs else ""))
    present = [f"{name} {version}" for name, version in report["packages"].items() if version]
    lines.append("packages  " + ", ".join(present))
    lines += [f"tool      {name}: {version}" for name, version in report["tools"].items() if version]
    lines += [f"set       {name}={value}" for name, value in report["environment"].items()]
    absent = missing_lines(report)
    lines += ["", "missing, and how to get it:" if absent else "nothing is missing", *(f"  {line}" for line in absent)]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="qlora-ref doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
