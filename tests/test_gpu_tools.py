"""The tools for a GPU machine, as far as they run without one: nothing may break for the first time over there."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from qlora_ref import native
from qlora_ref.cuda_linear import Scratch
from qlora_ref.testing.compare import ACCUMULATE_CPU, assert_within_bound, bounds


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_gpu, bench, sanitize = load("check_gpu"), load("bench_cuda"), load("sanitize")


# --- check_gpu -------------------------------------------------------------------------------------------------------


def test_a_failing_stage_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """One passes, one fails, one hangs, one lacks its program: all four recorded, exit status 1."""
    python = sys.executable

    def stages(output):
        return [
            check_gpu.Stage("good", [python, "-c", "print('all well')"], 0.25),
            check_gpu.Stage("bad", [python, "-c", "raise SystemExit('no good')"], 0.25),
            check_gpu.Stage("slow", [python, "-c", "import time; print('waits', flush=True); time.sleep(60)"], 0.02),
            check_gpu.Stage("absent", ["x"], 0.1, needs="no-such-program"),
            check_gpu.Stage("unstartable", [str(tmp_path / "nothing")], 0.1),
        ]

    monkeypatch.setattr(check_gpu, "stages", stages)
    monkeypatch.setattr(check_gpu, "environment", lambda: {"torch": "True"})
    assert check_gpu.main(["--output", str(tmp_path), "--minutes", "0.5"]) == 1
    written = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert [s["status"] for s in written] == ["passed", "failed", "out of time", "skipped", "failed"]
    assert [s["summary"] for s in written[:3]] == ["all well", "no good", "waits"]
    assert "no-such-program is not installed" in (tmp_path / "report.md").read_text()


def test_a_failed_build_ends_it(tmp_path, monkeypatch):
    failing = [check_gpu.Stage("build", [sys.executable, "-c", "raise SystemExit(1)"], 0.5)]
    after = [check_gpu.Stage("kernel tests", [sys.executable, "-c", ""], 0.5)]
    monkeypatch.setattr(check_gpu, "stages", lambda output: failing + after)
    monkeypatch.setattr(check_gpu, "environment", lambda: {"torch": "True"})
    assert check_gpu.main(["--output", str(tmp_path)]) == 1
    assert [s["status"] for s in json.loads((tmp_path / "report.json").read_text())["stages"]] == ["failed", "not run"]


def test_every_gpu_test_belongs_to_a_stage():
    marked = {p.name for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text()} - {"test_gpu_tools.py"}
    assert marked == {file for file, *_ in check_gpu.TESTS.values()}


def test_output_cut_inside_a_character(tmp_path):
    stage = check_gpu.Stage("x", [sys.executable, "-c", "import os; os.write(1, b'half \\xc3')"], 1.0)
    check_gpu.run_stage(stage, tmp_path / "log.txt", 20)
    assert stage.status == "passed" and stage.summary.startswith("half")


def test_without_a_card_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "environment", lambda: {"torch": "2.13 None False"})
    assert check_gpu.main(["--output", str(tmp_path)]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().out


def test_stages_name_files_that_exist(tmp_path):
    for file, part, _ in check_gpu.TESTS.values():
        text = (ROOT / "tests" / file).read_text()
        assert "mark.gpu" in text and f"def {part}" in text, file
    stages = check_gpu.stages(tmp_path)
    assert {s.name for s in stages} > set(check_gpu.TESTS)
    assert sum(s.share for s in stages) == pytest.approx(1)
    for stage in stages:
        assert all(not part.startswith(str(ROOT / "tools")) or (ROOT / part).exists() for part in stage.command)


# --- sanitize --------------------------------------------------------------------------------------------------------


def test_the_sanitized_workload_reaches_every_op():
    from qlora_ref.ops import OP_NAMES

    assert {case.op for case in sanitize.cases_worth_running()} == set(OP_NAMES)


def test_when_the_time_is_out_every_op_has_had_a_turn():
    from qlora_ref.ops import OP_NAMES

    first = [case.op for case, _ in zip(sanitize.cases_worth_running(), OP_NAMES, strict=False)]
    assert sorted(first) == sorted(OP_NAMES)


@pytest.mark.skipif(native.cpu is None, reason=f"no native CPU: {native.missing['cpu']}")
def test_the_sanitized_adamw_steps_are_calls_that_work():
    sanitize.adamw_steps(native.cpu, "cpu")


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """The benchmark's code on CPU tensors, each operation called once instead of timed."""
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(
        bench, "time_us", lambda calls, seconds, capture=True: ([call() for call in calls][0:0], 1.0, True)[1:]
    )
    monkeypatch.setattr(native, "cuda", SimpleNamespace(scratch=Scratch()))
    monkeypatch.setattr(bench, "rotations", lambda nbytes, l2: 2)


CEILINGS = bench.Ceilings(4.3e12, 790e12, 50 * 2**20)


def test_every_row_can_be_measured(on_cpu, tmp_path, monkeypatch):
    table, shape = bench.Table(0.0), (64, 128)
    bench.bench_blockwise(table, CEILINGS, shape, None)
    bench.bench_linear(table, CEILINGS, shape, (1, 40), None)
    bench.bench_lora(table, CEILINGS, shape, (40,), None)
    assert not table.problems and [r.op for r in table.rows] == [
        "dequantize", "quantize", "linear", "linear", "LoRA forward+backward",
    ]  # fmt: skip
    assert all(r.ours == 1 and r.floor > 0 for r in table.rows)
    monkeypatch.setattr(bench, "machine", lambda: {"device": "none"})
    bench.save(tmp_path, CEILINGS, table)
    assert "| linear | 64x128 | 40 | 1.0 |" in (tmp_path / "bench_cuda.md").read_text()
    assert len(json.loads((tmp_path / "bench_cuda.json").read_text())["rows"]) == 5


@pytest.mark.bnb
@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
def test_the_peers_columns_can_be_measured(on_cpu):
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    table = bench.Table(0.0)
    bench.bench_blockwise(table, CEILINGS, (64, 128), bnb)
    bench.bench_linear(table, CEILINGS, (64, 128), (1, 40), bnb)
    bench.bench_lora(table, CEILINGS, (64, 128), (40,), bnb)
    assert not table.problems and all(r.bitsandbytes == 1 for r in table.rows)


def test_the_floor_of_the_notes():
    """4096 x 14336 to bf16 with double quantization: 147.7 MB, 34.4 us at 4.3 TB/s."""
    n = 4096 * 14336
    assert CEILINGS.floor(n * (0.5 + 1 / 64) + n / 64 / 256 * 4 + 2 * n) == pytest.approx(34.4, abs=0.05)


def test_the_rival_computes_the_same():
    """The addmm-ordered LoRA that we are compared with gives the same gradients within the class's bound."""
    from qlora_ref.quantized import QuantConfig, QuantizedTensor
    from test_cuda_linear import lora_arguments

    x, dy, weight, _, A, B = lora_arguments(20, 96, 64, 8)
    q = QuantizedTensor(*weight[:4], QuantConfig(), torch.Size((96, 64)), torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    y = bench.AddmmLoRA.apply(leaves[0], q, leaves[1], leaves[2], 0.25)
    y.backward(dy)
    ours = [leaf.grad for leaf in leaves]
    arguments = (dy, x, *weight, A, B, 0.25, True)
    for a, (name, value, bound) in zip(
        ours, bounds("lora_linear_4bit_backward", arguments, ACCUMULATE_CPU), strict=True
    ):
        assert_within_bound(a, a, value, bound, name)
