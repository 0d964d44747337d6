"""DDP and FSDP2 with two gloo processes against one process, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_models import llama, saved

pytest.importorskip("peft", reason="peft is not installed (pip install 'qlora_ref[hf]')")
from qlora_ref import hf
from qlora_ref.hf import versions

pytestmark = pytest.mark.hf
HERE = Path(__file__).resolve().parent
fsdp2 = pytest.mark.skipif(
    not versions.at_least(torch.__version__, versions.FSDP2_TORCH), reason="FSDP2 over uint8 needs torch >= 2.12"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A quantized checkpoint: whole-tensor double quantization must not be done shard by shard."""
    folder = tmp_path_factory.mktemp("distributed")
    path = saved(llama(), folder / "base")
    return saved(AutoModelForCausalLM.from_pretrained(path, quantization_config=hf.QLoraConfig()), folder / "quantized")


def run(mode, base, out, processes):
    out.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "python"), "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(HERE / "hf_worker.py"), mode, base, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{r}.json").read_text()) for r in range(processes)]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    (record,) = run("single", base, out, 1)
    return record, load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "mode", ["ddp", pytest.param("fsdp2", marks=fsdp2), pytest.param("accelerate", marks=[fsdp2, pytest.mark.slow])]
)
def test_two_processes_equal_one(mode, base, alone, tmp_path):
    records = run(mode, base, tmp_path / "run", 2)
    record, adapter = alone
    for step, loss in enumerate(record["losses"]):
        assert sum(r["losses"][step] for r in records) / 2 == loss
    written = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert written.keys() == adapter.keys() and len(written) == 28  # adapters only: no packed bytes, no statistics
    assert all(torch.equal(written[k], adapter[k]) for k in adapter)
    for r in records:  # truly sharded: half of the packed bytes each, up to one row per tensor
        assert r["packed"] == r["whole"] if mode == "ddp" else r["packed"] <= r["whole"] / 2 * 1.01
    model = hf.load_adapter(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "run" / "adapter"))
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@fsdp2
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["native", "native-quantize"])
def test_transformers_native_fsdp2_loads_shards(mode, base, tmp_path):
    """Each rank reads, and without double quantization also quantizes, its own rows only."""
    kwargs = {}
    if mode == "native-quantize":
        base, kwargs = saved(llama(), tmp_path / "base"), {"quantization_config": hf.QLoraConfig(double_quant=False)}
    records = run(mode, base, tmp_path / "run", 2)
    model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    ids = torch.randint(3, 96, (2, 2, 12), generator=torch.Generator().manual_seed(0))[0]
    logits = load_file(tmp_path / "run" / "result.safetensors")["logits"]
    with torch.no_grad():
        assert torch.equal(logits, model(ids).logits)
    whole = sum(p.nbytes for p in model.parameters() if p.dtype == torch.uint8)
    assert all(r["packed"] <= whole / 2 * 1.01 for r in records)


def test_shard_refuses(base, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    with pytest.raises(RuntimeError, match="torch >= 2.12"):
        hf.shard(model)
    monkeypatch.undo()
    if versions.at_least(torch.__version__, versions.FSDP2_TORCH):
        with pytest.raises(RuntimeError, match="torchrun"):
            hf.shard(model)
