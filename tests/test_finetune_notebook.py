"""The Colab notebook runs from top to bottom, on the embedded model, with fewer steps."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "examples" / "qlora_ref.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    shorter = [
        s.replace("STEPS = 60", "STEPS = 3").replace("max_eval_examples=32", "max_eval_examples=8") for s in sources
    ]
    assert sum(a != b for a, b in zip(sources, shorter, strict=True)) == 2
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for i, source in enumerate(shorter):
        exec(compile(source, f"cell {i}", "exec"), namespace)
    out = capsys.readouterr().out
    assert "[[" in out and "4-bit weights" in out and "merged into the dequantized weights" in out
    assert (tmp_path / "merged" / "config.json").exists() and (tmp_path / "adapter" / "loss.png").exists()
    assert namespace["after"] < namespace["before"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells if c["cell_type"] == "code")
