"""The only importer of the compiled module `_C`: which native backends there are here, and why not.

    native.cpu, native.cuda    a Backend (backend.py) with the functions of src/cpp/kernels.h, or None
    native.missing["cuda"]     then one sentence: why, and what mends it ("" if nothing is missing)
    native.cpu_variants()      the instruction sets this build can use on this CPU; set_cpu_variant(name) takes one

Environment, read once at import: QLORA_BACKEND=reference leaves both None; QLORA_CPU_VARIANT=name forces a variant.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from .cpu_backend import CpuBackend
from .cuda_backend import CudaBackend
from .cuda_linear import unusable
from .source_hash import source_hash

BUILD_HINT = "build it with `cmake --preset cpu && cmake --build --preset cpu` (or `--preset cuda`), or `pip install .`"
missing: dict[str, str] = {"cpu": "", "cuda": ""}
cpu: CpuBackend | None = None
cuda: CudaBackend | None = None
module: Any = None  # _C


def _stale(module) -> bool:
    """Whether `_C` was built from other sources than those beside this package (False without sources)."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "src" / "cpp" / "kernels.h").is_file() or not (root / "CMakeLists.txt").is_file():
        return False
    return module.source_hash != source_hash(root, hasattr(module, "cuda"))


def _load() -> tuple[Any, str]:
    """(`_C`, "") or (None, why not)."""
    if os.environ.get("QLORA_BACKEND") == "reference":
        return None, "QLORA_BACKEND=reference asks for the pure PyTorch reference; unset it to use the kernels"
    try:
        compiled = importlib.import_module(f"{__package__}._C")
    except ModuleNotFoundError:
        return None, f"the compiled module qlora_ref._C is not there; {BUILD_HINT}"
    except ImportError as error:
        return None, f"the compiled module qlora_ref._C does not load ({error}); {BUILD_HINT}"
    if _stale(compiled):
        return None, f"the compiled module was built from other sources than those in src/; {BUILD_HINT}"
    return compiled, ""


def _why_no_cuda(module) -> str:
    """ "" if the CUDA kernels can be used."""
    if not hasattr(module, "cuda"):
        build = "`cmake --preset cuda && cmake --build --preset cuda`"
        return f"_C was built without CUDA; put nvcc on PATH and build with {build}"
    if not torch.backends.cuda.is_built():
        return "this torch is a CPU build; install a CUDA build of torch (https://pytorch.org/get-started)"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    c = module.cuda
    return unusable(c.archs, c.capabilities(), c.driver_version(), c.runtime_version())


def cpu_variants() -> list[str]:
    """Variants of the CPU kernels that this build has and this CPU can run, slowest first; empty without `_C`."""
    return module.cpu.variants() if cpu is not None else []


def set_cpu_variant(name: str) -> None:
    """Use this variant from now on (tests, benchmarks). ValueError with those available for any other name."""
    if cpu is None:
        raise RuntimeError(f"there are no CPU kernels: {missing['cpu']}")
    module.cpu.set_variant(name)


module, _reason = _load()
if module is None:
    missing["cpu"] = missing["cuda"] = _reason
else:
    cpu = CpuBackend(module.cpu)
    if os.environ.get("QLORA_CPU_VARIANT"):
        set_cpu_variant(os.environ["QLORA_CPU_VARIANT"])
    missing["cuda"] = _why_no_cuda(module)
    if not missing["cuda"]:
        cuda = CudaBackend(module.cuda)
