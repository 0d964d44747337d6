"""Every variant of the CPU kernels against the scalar one, by a C++ program that the project's own build compiles.

It needs neither Python nor torch, so it also runs under an emulator: NEON is compiled by a cross compiler and run by
QEMU. That shows that the bits are right; nothing about speed. `digest` is over everything the scalar variant wrote:
equal on both processors, so the equality with the reference, which test_native.py shows here, holds there.
"""

import os
import platform
import re
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from qlora_ref import native
from qlora_ref.arguments import table_bytes
from qlora_ref.reference.blockwise import dequantize_blockwise
from qlora_ref.reference.codebook import NAMES, get_codebook
from qlora_ref.reference.double_quant import get_map8
from qlora_ref.testing.compare import assert_bits_equal

ROOT = Path(__file__).resolve().parent.parent
MAPS = ("dynamic", "dynamic_unsigned", "fp8_e4m3")  # AdamW's two first
CXX_AARCH64 = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
IS_AARCH64 = platform.machine() in ("aarch64", "arm64")

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH (pip install cmake ninja)")


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """The file that native_parity.cpp reads: nothing in it is pasted, all comes from the reference."""
    path = tmp_path_factory.mktemp("native_parity") / "tables"
    structs = [table_bytes(get_codebook(name)) for name in NAMES] + [table_bytes(get_map8(name)) for name in MAPS]
    path.write_bytes(struct.pack("2i", len(NAMES), len(MAPS)) + b"".join(structs))
    return path


@cache
def build(name: str, *options: str) -> Path:
    """The program, built by CMakeLists.txt with its own flags; kept in build/, so that only changes are compiled."""
    folder = ROOT / "build" / f"native_parity-{name}"
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    configure = ["cmake", "-S", ROOT, "-B", folder, *generator, "-DQLORA_CUDA=OFF", "-DQLORA_WERROR=ON", *options]
    for command in (configure, ["cmake", "--build", folder, "--target", "native_parity", "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "native_parity"


def run(*command) -> tuple[list[str], str]:
    """(variants, digest) of a run in which nothing differs."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    cases = int(re.search(r"^(\d+) cases, 0 failures$", done.stdout, re.M)[1])
    assert cases > 1500, "the list of cases has shrunk"
    return re.search(r"^variants (.*)$", done.stdout, re.M)[1].split(), re.search(r"digest (\w+)", done.stdout)[1]


@pytest.mark.skipif(shutil.which("c++") is None and "CXX" not in os.environ, reason="no C++ compiler (g++, or set CXX)")
def test_every_variant_of_this_processor(tables):
    variants, _ = run(build("native"), tables)
    assert variants[0] == "scalar"
    if IS_AARCH64:
        assert "neon" in variants
    if native.cpu is not None:
        assert variants == native.cpu_variants()


@pytest.mark.skipif(IS_AARCH64, reason="this is an Arm machine: the test above ran NEON without an emulator")
@pytest.mark.skipif(
    CXX_AARCH64 is None or QEMU is None,
    reason="NEON needs a cross compiler and an emulator here: apt-get install g++-aarch64-linux-gnu qemu-user",
)
def test_neon_under_an_emulator(tables):
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CXX_AARCH64}"]
    program = build("aarch64", *options, "-DCMAKE_EXE_LINKER_FLAGS=-static")  # QEMU then needs no Arm libraries
    variants, digest = run(QEMU, program, tables)
    assert variants == ["scalar", "neon"]
    assert digest == run(build("native"), tables)[1], "the scalar variants of the two processors differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_absmax_that_no_quantizer_makes_as_the_reference(dtype):
    """The program's strange absmax, once against the reference: infinite ones give infinite values, not NaN."""
    if native.cpu is None:
        pytest.skip(f"no native CPU: {native.missing['cpu']}")
    absmax = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1e-40, 2.0**-133, 65519.0, 65520.0, 3.4e38])
    packed = torch.arange(32 * len(absmax)).to(torch.uint8) * 17
    codebook, before = get_codebook("nf4"), native.module.cpu.variant()
    want = dequantize_blockwise(packed, absmax, codebook, 64, (64 * len(absmax),), dtype)
    try:
        for variant in native.cpu_variants():
            native.set_cpu_variant(variant)
            got = native.cpu.dequantize_4bit(packed, absmax, None, None, codebook, 64, None, 256, want.shape, dtype)
            assert_bits_equal(got, want, f"{variant} {dtype}")
    finally:
        native.set_cpu_variant(before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and "CXX" not in os.environ, reason="no C++ compiler (g++, or set CXX)")
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers(sanitizer, tables, tmp_path):
    """Every case, those on several threads among them: no races, and nothing outside of the tensors is read.

    Without torch the team is plain threads, which ThreadSanitizer sees (libgomp it does not).
    """
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    compiler, flag = os.environ.get("CXX", "c++"), f"-fsanitize={sanitizer}"
    if subprocess.run([compiler, flag, empty, "-o", tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {flag} (apt-get install libtsan2 libasan8, or those of your compiler)")
    run(build(sanitizer, f"-DCMAKE_CXX_FLAGS={flag}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"), tables)
