"""The CUDA sources compile without warnings for every target, and no kernel spills. Needs nvcc, no card."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from qlora_ref.cuda_linear import unusable

SPEC = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools" / "cuda_report.py")
cuda_report = sys.modules["cuda_report"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cuda_report)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_75'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers
"""


def test_the_compilers_words_are_read():
    first, second = cuda_report.parse("x", PTXAS)
    assert (first.arch, first.registers, first.spill_bytes, first.stack_bytes, first.shared_bytes) == (
        "75",
        40,
        44,
        8,
        128,
    )
    assert (second.arch, second.registers, second.spill_bytes, second.shared_bytes) == ("90a", 38, 0, 0)


def check(source: str, archs: tuple[str, ...]) -> None:
    kernels, size = cuda_report.compile_source(source, archs)
    assert {k.arch for k in kernels} == set(archs) and size > 0
    spilled = [f"{k.name} sm_{k.arch}" for k in kernels if k.spill_bytes or k.stack_bytes]
    assert not spilled, f"{source}.cu uses local memory in {spilled}"


@needs_nvcc
@pytest.mark.parametrize("source", ["blockwise", "double_quant", "quantize_nested", "linear_small"])
def test_no_spills(source):
    check(source, ("90a",))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", ["blockwise", "double_quant", "quantize_nested", "linear_small"])
def test_no_spills_for_any_target(source):
    check(source, cuda_report.ALL_ARCHS)


def test_every_source_is_built_and_reported():
    """CMake compiles exactly the .cu files there are; those without kernels of their own are not in the report."""
    sources = {p.stem for p in (ROOT / "src/cuda").glob("*.cu")}
    listed = (ROOT / "CMakeLists.txt").read_text().split("foreach(name ", 1)[1].split(")")[0].split()
    assert sources <= set(listed), f"not in CMakeLists.txt: {sources - set(listed)}"
    assert sources <= {*cuda_report.SOURCES, "device", "paged_memory"}


@needs_nvcc
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_native_is_resolved_to_numbers(tmp_path, monkeypatch):
    """QLORA_CUDA_ARCHS=native, the build of `make gpu`: what the binary tells native.py must be targets it can read."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\necho 7.5\necho 9.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run([*command, "-DQLORA_CUDA=ON", "-DQLORA_CUDA_ARCHS=native"], capture_output=True, text=True)
    assert "CUDA ON 90-real 75-real" in done.stdout, done.stdout + done.stderr
    assert unusable("90-real 75-real", [90], 13000, 13000) == ""
