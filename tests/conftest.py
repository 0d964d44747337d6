"""Fixtures, and the header and footer that make a missing backend visible."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
_skipped: dict[str, int] = {}


def pytest_configure(config):
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_report_header(config):
    from qlora_ref import native

    lines = []
    for name in ("cpu", "cuda"):
        ready = getattr(native, name) is not None
        lines.append(f"qlora_ref {name}: {'native' if ready else 'MISSING - ' + native.missing[name]}")
    data = data_path()
    lines.append(f"qlora_ref data: {data if data else 'MISSING - set QLORA_DATA to the shared data folder'}")
    required = [b for b in os.environ.get("QLORA_REQUIRE", "").split(",") if b]
    for name in required:
        if getattr(native, name, None) is None:
            pytest.exit(f"QLORA_REQUIRE={name}, but: {native.missing.get(name, 'unknown backend')}", returncode=3)
    return lines


def pytest_collection_modifyitems(items):
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def pytest_runtest_logreport(report):
    if report.failed and "gpu" in report.keywords and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            pytest.exit(f"{report.nodeid} broke the CUDA context ({first}); the rest was not run", returncode=4)
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        _skipped[reason] = _skipped.get(reason, 0) + 1


def pytest_terminal_summary(terminalreporter):
    if _skipped:
        terminalreporter.section("what was skipped, and why")
        for reason, count in sorted(_skipped.items(), key=lambda item: -item[1]):
            terminalreporter.line(f"{count:5d}  {reason}")


def data_path() -> Path | None:
    """The shared data folder: $QLORA_DATA, else ../shared/data beside the repository."""
    path = Path(os.environ.get("QLORA_DATA", ROOT.parent / "shared" / "data"))
    return path if path.is_dir() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    path = data_path()
    if path is None:
        pytest.skip("the shared data folder is absent (set QLORA_DATA)")
    return path


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    """In a fresh interpreter that imports what this one does."""
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def one_thread():
    """For models smaller than a thread's start: two threads waiting for each other are what takes the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def float32_reductions(request):
    """On a card torch lets cuBLAS round partial sums of a split k to 16 bits; the tests' bounds are for float32."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    matmul, names = torch.backends.cuda.matmul, [f"allow_{t}_reduced_precision_reduction" for t in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


GUARD, POISON = 64, 0xA5


@pytest.fixture
def guarded_outputs(monkeypatch):
    """A context in which torch.empty gives poisoned memory between guard bytes, checked when the context ends."""

    @contextmanager
    def guard(required: bool = True):
        blocks = []

        def empty(*size, dtype=None, device=None, **_):
            shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
            dtype = dtype or torch.get_default_dtype()
            n = shape.numel() * dtype.itemsize
            buffer = torch.full((GUARD + n + GUARD,), POISON, dtype=torch.uint8, device=device)
            blocks.append((buffer, n))
            return buffer[GUARD : GUARD + n].view(dtype).view(shape)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            yield
        assert blocks or not required, "nothing was allocated through torch.empty: the guard tested nothing"
        for buffer, n in blocks:
            around = torch.cat([buffer[:GUARD], buffer[GUARD + n :]])
            assert (around == POISON).all(), f"bytes outside an output of {n} bytes were overwritten"

    return guard
