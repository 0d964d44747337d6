"""Every program of docs/examples runs, on a tiny model, as a user would start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed (pip install 'qlora_ref[hf]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'qlora_ref[hf]')")
from transformers import AutoModelForCausalLM

from hf_models import IDS
from qlora_ref.hf import versions

pytestmark = [pytest.mark.hf, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "python"),
}


def run(script, *arguments, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "docs" / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def work(data_dir, tmp_path_factory):
    """(base model, folder with data.jsonl)."""
    folder = tmp_path_factory.mktemp("examples")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n + 1)))} for n in range(1, 9)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return data_dir / "weights" / "stories260K_hf", folder


def test_quantize_chat_then_train_over_two_processes(work, tmp_path):
    base, folder = work
    quantized = tmp_path / "quantized"
    said = run("quantize_and_chat.py", base, "--save", quantized, "--prompt", "Once upon", "--max-new-tokens", 8)
    assert "parameters in" in said and "model: " in said
    again = run("quantize_and_chat.py", quantized, "--prompt", "Once upon", "--max-new-tokens", 8)
    assert said == again  # the reloaded copy says the same
    if not versions.at_least(torch.__version__, versions.FSDP2_TORCH):
        pytest.skip("FSDP2 over uint8 needs torch >= 2.12")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = (quantized, folder / "data.jsonl", tmp_path / "adapter", "--max-steps", 2, "--rank", 4)
    out = run("train_with_fsdp2.py", *arguments, launcher=torchrun)
    assert "step 2: loss" in out and (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_train_resume_merge_and_export(work, tmp_path):
    base, folder = work
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    common = (base, folder / "data.jsonl", adapter, "--rank", 4)
    assert "trainable params" in run("train_with_trainer.py", *common, "--max-steps", 1)
    run("train_with_trainer.py", *common, "--max-steps", 2, "--resume")
    assert (adapter / "checkpoint-2").is_dir() and (adapter / "adapter_config.json").exists()
    out = run("merge_and_export.py", base, adapter, merged, "--dtype", "float32", "--bnb", tmp_path / "bnb")
    assert "nats a token" in out
    stock = AutoModelForCausalLM.from_pretrained(merged)
    assert not hasattr(stock.config, "quantization_config") and torch.isfinite(stock(IDS).logits).all()
    assert json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def test_sft_trainer(work, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    base, folder = work
    run("train_with_sft_trainer.py", base, folder / "data.jsonl", tmp_path / "adapter", "--max-steps", 2, "--rank", 4)
    assert (tmp_path / "adapter" / "qlora_ref.json").exists()


def test_every_example_is_tested():
    mine = [p.name for p in (ROOT / "docs" / "examples").glob("*.py") if "qlora_ref" in p.read_text()]
    assert len(mine) >= 5 and all(name in Path(__file__).read_text() for name in mine)
