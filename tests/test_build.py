"""The build's promises that need no compiler: the hash that notices stale binaries, doctor, one list of versions."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_ref
from qlora_ref import doctor, native
from qlora_ref.source_hash import source_hash, write_header

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sources(tmp_path):
    for folder, file in (("cpp", "a.cpp"), ("cuda", "b.cu")):
        (tmp_path / "src" / folder).mkdir(parents=True)
        (tmp_path / "src" / folder / file).write_text("// one\n")
    return tmp_path


def test_hash_notices_every_source_that_was_compiled(sources):
    cpu, both = source_hash(sources, False), source_hash(sources, True)
    (sources / "src/cuda/b.cu").write_text("// two\n")
    assert source_hash(sources, False) == cpu, "a binary without CUDA is not stale because of a .cu file"
    assert source_hash(sources, True) != both
    (sources / "src/cpp/a.cpp").write_text("// two\n")
    assert source_hash(sources, False) != cpu


def test_header_is_rewritten_only_when_the_hash_changes(sources):
    header = sources / "source_hash.h"
    write_header(sources, True, header)
    first = header.stat().st_mtime_ns, header.read_text()
    write_header(sources, True, header)
    assert (header.stat().st_mtime_ns, header.read_text()) == first
    (sources / "src/cpp/a.cpp").write_text("// three\n")
    write_header(sources, True, header)
    assert header.read_text() != first[1]


def test_stale_binary_is_noticed(monkeypatch):
    if native.module is None:
        pytest.skip(f"no native module: {native.missing['cpu']}")
    assert not native._stale(native.module)
    monkeypatch.setattr(native, "source_hash", lambda root, cuda: "another")
    if (ROOT / "src/cpp/kernels.h").is_file():
        assert native._stale(native.module)


def test_every_source_is_in_the_build():
    text = (ROOT / "CMakeLists.txt").read_text()
    for path in (ROOT / "src/cpp").glob("*.cpp"):
        assert f"src/cpp/{path.name}" in text, f"{path.name} is not compiled"
    listed = re.search(r"foreach\(name ([^)]*)\)", text)[1].split()
    assert {p.stem for p in (ROOT / "src/cuda").glob("*.cu")} <= set(listed)


def test_version_is_the_same_everywhere():
    assert f'version = "{qlora_ref.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_doctor_reports_as_text_and_json(capsys):
    assert doctor.main([]) == 0
    assert "kernels   CPU:" in capsys.readouterr().out
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] and set(report["backends"]) == {"cpu", "cuda"}


def test_doctor_says_how_to_get_what_is_missing(monkeypatch):
    report = doctor.collect()
    report["packages"]["peft"] = report["tools"]["nvcc"] = None
    report["backends"]["cpu"] = {"ready": False, "why": "not built"}
    text = doctor.render(report)
    for line in ("native cpu: not built", "peft (for reading", "nvcc (for the CUDA kernels): the CUDA toolkit"):
        assert line in text


def test_doctor_survives_a_broken_native_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "qlora_ref.native", None)
    monkeypatch.delattr(qlora_ref, "native")
    assert not doctor.backends()["cpu"]["ready"]


def test_readme_table_replaces_its_section_only(tmp_path):
    """tools/readme_table.py: the tables of one results folder, between their markers, twice the same."""
    (tmp_path / "bench_cuda.md").write_text("| new |\n")
    times = {"nested": 0.002, "bitsandbytes": 0.003, "bnb flat": 0.0025, "bf16": 0.004}
    row = {"op": "linear", "shape": "8 x 64", "threads": 2, "tokens": 4, "times": times, "floor": 0.001}
    step = {"op": "training step", "shape": "demo", "threads": 1, "tokens": None, "times": times, "floor": None}
    about = dict.fromkeys(("CPU", "variant", "torch", "bitsandbytes", "date", "commit"), "?")
    content = {"machine": about, "rows": [{**row, "op": "left out", "threads": 1}, row, step]}
    (tmp_path / "bench_cpu.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    for _ in range(2):
        subprocess.run([sys.executable, ROOT / "tools" / "readme_table.py", tmp_path, "--readme", readme], check=True)
    before, after = (ROOT / "README.md").read_text(), readme.read_text()
    around = [
        re.sub(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", r"\1\3", t, flags=re.S) for t in (before, after)
    ]
    assert around[0] == around[1] and "| new |" in after and "left out" not in after
    assert "| linear | 8 x 64 | 4 | 2 | 1.25 | 2.00 | 0.50 |\n| training step | demo |  | 2 | 1.25 | 2.00 |  |" in after


def test_a_benchmark_leaves_out_an_arm_that_fails(monkeypatch, capsys):
    """tools/step_processes.py: and it does not wait for it."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    from step_processes import generation

    assert generation(("nonsense",), "demo", 1, rounds=2) == {}
    assert "training step of nonsense left out: it stopped: " in capsys.readouterr().err
