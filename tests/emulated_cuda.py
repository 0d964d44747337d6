"""Builds the CUDA sources for the CPU through tests/cuda_emulator.h and wraps them as a backend."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from qlora_ref.backend import Backend
from qlora_ref.cuda_linear import CudaLinear, Scratch
from qlora_ref.reference.codebook import get_codebook
from qlora_ref.reference.double_quant import get_map8

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which("g++")
SOURCES = ("blockwise", "double_quant", "quantize_nested", "linear_small")
POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
WEIGHT = [POINTER] * 6 + [LONG] * 4 + [ctypes.c_char_p]
SIGNATURES = {
    "quantize_4bit": [POINTER, INT, LONG, LONG, ctypes.c_char_p, POINTER, POINTER],
    "quantize_4bit_nested": [POINTER, INT, LONG, LONG, ctypes.c_char_p, POINTER, LONG, ctypes.c_char_p] + [POINTER] * 3,
    "dequantize_4bit": [*WEIGHT, POINTER, INT, LONG],
    "double_quantize": [POINTER, LONG, POINTER, LONG, ctypes.c_char_p, POINTER, POINTER],
    "double_dequantize": [POINTER] * 4 + [LONG, LONG, POINTER],
    "linear_4bit_forward": [POINTER, INT, LONG, *WEIGHT, POINTER, POINTER],
    "set_device": [INT, INT],
    "position": [LONG, LONG, LONG],
    "position_in_tile": [LONG, LONG, ctypes.c_uint32, LONG, LONG],
    "divide": [LONG, LONG],
    "tiling": [LONG, INT, INT, POINTER],
    "bins_usable": [ctypes.c_char_p],
}
RESULTS = {"divide": LONG, "position": LONG, "position_in_tile": LONG, "bins_usable": INT}


@cache
def launchers() -> SimpleNamespace:
    """The launchers as functions; compiles for about five seconds, once a process."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # What a card punishes and a CPU forgives (a misaligned vector, a read past a table) is an illegal instruction;
    # pytest's faulthandler then names the test.
    flags += ["-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error", "-Wno-clobbered"]
    flags += ["-x", "c++", "-include", str(ROOT / "tests/cuda_emulator.h")]
    inputs = [ROOT / f"src/cuda/{name}.cu" for name in SOURCES] + [ROOT / "tests/cuda_emulated.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "emulated.so"
        command = [CXX, *flags, *map(str, inputs), "-shared", "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        loaded = ctypes.CDLL(str(library))
    functions = {}
    for name, signature in SIGNATURES.items():
        functions[name] = getattr(loaded, name)
        functions[name].argtypes, functions[name].restype = signature, RESULTS.get(name)
    return SimpleNamespace(**functions)


class EmulatedBackend(Backend):
    """The CUDA launchers on CPU tensors: every check of backend.py, then the emulated kernel."""

    device_type = "cpu"

    def _call(self, function, device, *args):
        function(*args)


class EmulatedCudaBackend(CudaLinear, EmulatedBackend):
    """As cuda_backend.CudaBackend: the division of the linear layer on top."""

    def __init__(self, module):
        super().__init__(module)
        self.scratch = Scratch()


def run(backend: Backend, op: str, arguments: tuple):
    """An op of ops.py, computed by `backend` (what ops._register_native does)."""
    arguments = list(arguments)
    if op == "quantize_4bit":
        x, name, block = arguments
        return backend.quantize_4bit(x, get_codebook(name, block), block)
    if op == "quantize_4bit_double":
        x, name, block, map8, nested_block = arguments
        return backend.quantize_4bit_double(x, get_codebook(name, block), block, get_map8(map8), nested_block)
    if op == "quantize_4bit_nested":
        x, mean, name, block, map8, nested_block = arguments
        return backend.quantize_4bit_nested(x, mean, get_codebook(name, block), block, get_map8(map8), nested_block)
    if op in ("double_quantize", "double_dequantize"):
        arguments[-2] = get_map8(arguments[-2])
        return getattr(backend, op)(*arguments)
    first = {"dequantize_4bit": 0, "lora_linear_4bit_backward": 2}.get(op, 1)  # the weight's eight arguments start here
    nested, name, block, map8 = (arguments[first + i] for i in (2, 4, 5, 6))
    arguments[first + 4] = get_codebook(name, block)
    arguments[first + 6] = None if nested is None else get_map8(map8)
    return getattr(backend, {"linear_4bit": "linear_4bit_forward"}.get(op, op))(*arguments)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)
