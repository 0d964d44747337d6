"""The benchmark's own machinery (tools/bench_cpu.py): what it says of a row, and of a process that fails."""

import pytest

from conftest import ROOT


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")


def test_a_row_says_its_ratios_and_page_faults(tools):
    from bench_cpu_report import Machine, Row, markdown

    times = {"nested": 0.002, "flat": 0.0016, "bitsandbytes": 0.003, "bnb flat": 0.0025, "bf16": 0.004}
    row = Row("LoRA", "8 x 64", 2, 256, times, 0.001, "fast", {"nested": 0, "bitsandbytes": 7})
    text = markdown({2: Machine(read=5e9, copy=4e9, peak=3e9)}, {"CPU": "some"}, [row], {}, {})
    assert "| LoRA | 8 x 64 | 2 | 256 | 2.000 | 1.600 | 2.500 | 4.000 | 1.000 " in text
    assert " | 1.25 | 2.00 | 0.50 | 1.25 | fast |\n" in text  # bitsandbytes, bf16, floor over ours; nested over flat
    assert "Page faults of a call, LoRA, 8 x 64, 2 threads: nested 0, bitsandbytes 7." in text
    assert "2 threads: read 5 GB/s, copy 4 GB/s, bf16 multiply-add 3 GFLOP/s." in text  # nothing of what is not known


def test_a_process_that_fails_is_told_of(tools):
    from bench_cpu import in_own_process
    from bench_cpu_report import Machine

    with pytest.raises(RuntimeError, match=r"the benchmark of nonsense 8 x 64 failed: (?s:.*)nonsense"):
        in_own_process("nonsense", Machine(), (8, 64), 1, [])
