"""The house rules that a machine can check: who imports whom, and what never appears in which file."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "qlora_ref"
HUGGING_FACE = {"transformers", "peft", "accelerate", "datasets", "trl", "tokenizers", "safetensors", "bitsandbytes"}
MAY_IMPORT_HF = ("hf", "finetune", "evaluation", "memory", "compat", "data", "quantize_cli.py", "doctor.py")
CORE = (
    "reference",
    "arguments.py",
    "backend.py",
    "cpu_backend.py",
    "cuda_backend.py",
    "native.py",
    "ops.py",
    "quantized.py",
    "nn.py",
    "optim.py",
)
# room -> rooms of ours it may import (besides itself); the arrows of the architecture page
ALLOWED = {
    "reference": set(),
    "source_hash.py": set(),
    "arguments.py": {"reference"},
    "backend.py": {"reference", "arguments.py"},
    "cpu_backend.py": {"reference", "arguments.py", "backend.py", "cpu_linear.py"},
    "cuda_backend.py": {"arguments.py", "backend.py", "cuda_linear.py"},
    "native.py": {"cpu_backend.py", "cuda_backend.py", "source_hash.py", "cuda_linear.py", "_C"},
    "ops.py": {"reference", "arguments.py", "native.py", "gradients.py", "direct.py"},
    "gradients.py": {"autograd.py", "direct.py"},
    "direct.py": {"reference", "arguments.py", "native.py", "autograd.py"},
    "autograd.py": {"checkpointing.py"},
    "checkpointing.py": set(),
    "cpu_linear.py": set(),
    "cuda_linear.py": set(),
    "quantized.py": {"reference", "ops.py", "direct.py"},
    "bound_lora.py": {"autograd.py", "checkpointing.py", "native.py", "arguments.py", "direct.py", "gradients.py"},
    "nn.py": {"reference", "ops.py", "direct.py", "bound_lora.py", "quantized.py"},
}


def python_files():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: str) -> str:
    return path.split("/")[0]


def imports(path: Path, top_level_only: bool = False):
    """(module, is ours) of every import; ours as a path relative to the package, e.g. 'reference/codebook'."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    package = ["qlora_ref", *path.relative_to(PACKAGE).parts[:-1]]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name.split(".")[0] == "qlora_ref") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            dotted = ".".join([*base, *([node.module] if node.module else [])])
            if dotted.split(".")[0] != "qlora_ref":
                yield dotted, False
            elif dotted == "qlora_ref":
                yield from ((f"qlora_ref.{alias.name}", True) for alias in node.names)
            else:
                yield dotted, True


def our_room(dotted: str) -> str:
    name = dotted.split(".")[1] if "." in dotted else "__init__.py"
    return name if (PACKAGE / name).is_dir() or name == "_C" else f"{name}.py"


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_only_these_rooms_know_hugging_face(path):
    foreign = {m.split(".")[0] for m, ours in imports(path) if not ours} & HUGGING_FACE
    assert not foreign or room(relative(path)) in MAY_IMPORT_HF, f"{relative(path)} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", [p for p in python_files() if room(relative(p)) in ALLOWED], ids=relative)
def test_the_core_imports_downwards_only(path):
    mine = room(relative(path))
    used = {our_room(m) for m, ours in imports(path) if ours} - {mine, "__init__.py"}
    assert used <= ALLOWED[mine], f"{relative(path)} may not import {sorted(used - ALLOWED[mine])}"


def test_only_native_imports_the_compiled_module():
    """`_C` in code (not in comments or docstrings) stands in native.py alone."""
    pattern = re.compile(r"""(import .*\b_C\b|import_module\(.*_C\b)""")
    assert [relative(p) for p in python_files() if pattern.search(p.read_text())] == ["native.py"]


def test_evaluation_does_not_import_the_quantization_core():
    for path in (PACKAGE / "evaluation").rglob("*.py"):
        used = {our_room(m) for m, ours in imports(path, top_level_only=True) if ours}
        assert not used & set(CORE), f"{relative(path)} imports {sorted(used & set(CORE))}"


def test_the_estimate_needs_only_the_standard_library():
    code = (
        "import sys; import qlora_ref.memory.estimate; "
        "print([m for m in ('torch', 'numpy', 'scipy', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_importing_the_core_loads_no_hugging_face():
    code = f"import sys, qlora_ref.nn, qlora_ref.optim; print(sorted({HUGGING_FACE!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def native_sources():
    return sorted(p for d in ("cpp", "cuda") for p in (ROOT / "src" / d).iterdir() if p.is_file())


@pytest.mark.parametrize("path", native_sources(), ids=lambda p: p.name)
def test_native_code_includes_no_torch_and_pybind_only_in_bindings(path):
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
    assert not [i for i in included if i.startswith(("torch/", "ATen/", "c10/"))]
    if "pybind11" in " ".join(included):
        assert path.name.startswith("bindings")
    if path.parent.name == "cpp" and not path.name.startswith("bindings"):
        assert not [i for i in included if "cuda" in i and "/" in i], "src/cpp may not include src/cuda"


def test_no_constant_of_the_codebook_is_pasted():
    """NF4 is a derivation in reference/codebook.py; its digits stand nowhere else in the package or the kernels."""
    digits = re.compile(r"0\.69619|0\.52507|0\.39491|0\.28444|0\.18477|0\.07958|0\.16093|0\.24611|0\.33791|0\.44070")
    for path in [*python_files(), *native_sources()]:
        assert not digits.search(path.read_text()), path.name


def test_no_fast_math():
    for path in [ROOT / "CMakeLists.txt", *native_sources()]:
        assert not re.search(r"use_fast_math|-ffast-math|-Ofast", path.read_text()), path.name


def test_no_pickle():
    """torch.load without weights_only=True, pickle and shelve are ways to run a stranger's code."""
    for path in python_files():
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|shelve|dill|joblib)\b", text, re.M), relative(path)
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{relative(path)}: {call}"


def test_the_reference_reads_in_one_sitting():
    lines = sum(len(p.read_text().splitlines()) for p in (PACKAGE / "reference").glob("*.py"))
    assert lines <= 1000, f"the reference has {lines} lines"
