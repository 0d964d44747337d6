"""bitsandbytes checkpoints, both ways: equal bytes, equal weights, equal logits."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_models import IDS, gpt2, llama, saved

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed ([test] extra)")

from qlora_ref.hf import QLoraConfig, from_bnb, negative_absmax, save_bnb, use_for_bitsandbytes
from qlora_ref.hf.bnb_format import BnbState, from_stats, to_stats
from qlora_ref.nn import Linear4bit
from qlora_ref.quantized import QuantConfig, QuantizedTensor

pytestmark = [pytest.mark.hf, pytest.mark.bnb, pytest.mark.usefixtures("one_thread")]
KINDS = [(t, n) for t in ("nf4", "fp4") for n in (False, True)]


def theirs(path, quant_type="nf4", nested=False, dtype=torch.float32, **kwargs):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested, **kwargs
    )
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)


def train_logits(model):
    """bitsandbytes repacks its weights in eval mode on some CPUs (and computes in bf16); train mode does not."""
    with torch.no_grad():
        logits = model.train()(IDS).logits
    model.eval()
    return logits


def bnb_weights(model):
    return {
        n: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        for n, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }


@pytest.fixture
def path(tmp_path):
    return saved(llama(), tmp_path / "base")


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_reading_changes_no_weight_and_no_logit(path, tmp_path, quant_type, nested):
    peer = theirs(path, quant_type, nested)
    ours = from_bnb(saved(peer, tmp_path / "bnb"))
    weights = bnb_weights(peer)
    assert len(weights) == 14
    for name, weight in weights.items():
        layer = ours.get_submodule(name)
        assert layer.config.quant_type == {"nf4": "nf4", "fp4": "fp4_bnb"}[quant_type]
        assert torch.equal(layer.dequantize(), weight)
    # the same products by the same library: 0.0. (Our native linear sums in another order; the weights above are it)
    assert torch.equal(ours.dequantize()(IDS).logits, train_logits(peer))


def test_logits_equal_theirs_on_the_reference_backend(path, tmp_path):
    """Max difference 0.0 of the 4-bit layers themselves, in a process whose backend is the reference."""
    peer = theirs(path, "nf4", True)
    torch.save(train_logits(peer), tmp_path / "logits.pt")
    code = (
        "import sys, torch; from qlora_ref.hf import from_bnb;"
        "torch.set_num_threads(1); ids = torch.arange(3, 23)[None]; m = from_bnb(sys.argv[1]);"
        "d = m(ids).logits - torch.load(sys.argv[2]); sys.exit(d.abs().max().item() != 0.0)"
    )
    env = os.environ | {"QLORA_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent / "python")
    arguments = [saved(peer, tmp_path / "bnb"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", False), ("nf4", True), ("fp4_bnb", True)])
def test_stock_transformers_and_bitsandbytes_load_ours(path, tmp_path, quant_type, nested):
    ours = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=QLoraConfig(quant_type, double_quant=nested), dtype=torch.float32
    )
    save_bnb(ours, tmp_path / "bnb")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
    weights = bnb_weights(peer)
    assert len(weights) == 14
    assert all(torch.equal(ours.get_submodule(n).dequantize(), w) for n, w in weights.items())
    assert torch.equal(ours.dequantize()(IDS).logits, train_logits(peer))


def test_flat_nf4_files_are_equal_byte_for_byte(path, tmp_path):
    """Quantized by them, read and written by us: the file they wrote, tensor for tensor."""
    from safetensors.torch import load_file

    for nested in (False, True):
        peer = saved(theirs(path, "nf4", nested, torch.bfloat16), tmp_path / f"theirs{nested}")
        save_bnb(from_bnb(peer), tmp_path / f"ours{nested}")
        a, b = (load_file(f"{d}/model.safetensors") for d in (peer, tmp_path / f"ours{nested}"))
        assert a.keys() == b.keys()
        assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
        configs = [json.loads(Path(d, "config.json").read_text()) for d in (peer, tmp_path / f"ours{nested}")]
        a, b = (c["quantization_config"] for c in configs)
        assert b.pop("llm_int8_skip_modules") == ["lm_head"] and a.pop("llm_int8_skip_modules") is None
        # both compute in the model's dtype unless told; they write their default, we write the one meant
        assert a.pop("bnb_4bit_compute_dtype") == "float32" and b.pop("bnb_4bit_compute_dtype") == "bfloat16"
        assert a == b


def test_float_storage_and_conv1d(tmp_path):
    path = saved(gpt2(), tmp_path / "base")
    peer = theirs(path, "nf4", True, torch.bfloat16, bnb_4bit_quant_storage="bfloat16")
    ours = from_bnb(saved(peer, tmp_path / "bnb"), dtype=torch.bfloat16)
    weights = bnb_weights(peer)
    assert len(weights) == 8
    assert all(torch.equal(ours.get_submodule(n).dequantize(), w) for n, w in weights.items())


def test_opt_in_switch_runs_unmodified_checkpoints_and_configs(path, tmp_path):
    peer = theirs(path, "nf4", True)
    folder = saved(peer, tmp_path / "bnb")
    use_for_bitsandbytes()
    try:
        read = AutoModelForCausalLM.from_pretrained(folder)
        quantized = theirs(path, "nf4", True)
    finally:
        use_for_bitsandbytes(False)
    assert all(isinstance(m.get_submodule(n), Linear4bit) for m in (read, quantized) for n in bnb_weights(peer))
    assert all(torch.equal(read.get_submodule(n).dequantize(), w) for n, w in bnb_weights(peer).items())
    again = AutoModelForCausalLM.from_pretrained(saved(read, tmp_path / "ours"))  # saved as what it now is
    assert torch.equal(again(IDS).logits, read(IDS).logits)
    assert isinstance(theirs(path).model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)  # switched off again


def test_flipped_signs_of_small_blocks_are_reported(tmp_path, caplog):
    model = llama()
    heavy_tailed = torch.distributions.StudentT(5.0).sample(model.model.layers[0].mlp.up_proj.weight.shape)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.copy_(heavy_tailed)
            layer.mlp.up_proj.weight[::2] *= 1e-3
    path = saved(model, tmp_path / "base")
    read = from_bnb(saved(theirs(path, "nf4", True), tmp_path / "bnb"))
    assert negative_absmax(read) and "negative absmax" in caplog.text
    ours = AutoModelForCausalLM.from_pretrained(path, quantization_config=QLoraConfig())
    assert negative_absmax(ours) == {}


def test_json_is_theirs_character_for_character():
    state = bnb.functional.QuantState(
        torch.ones(3), torch.Size([4, 48]), None, 64, "nf4", torch.bfloat16, torch.tensor(0.1),
        bnb.functional.QuantState(torch.ones(1), blocksize=256, code=torch.ones(256), dtype=torch.float32),
    )  # fmt: skip
    state.code = torch.ones(16)
    packed = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
    mine = BnbState(QuantConfig(), torch.Size([4, 48]), torch.bfloat16, float(torch.tensor(0.1)))
    assert mine.to_json() == bytes(packed.tolist()).decode() and BnbState.from_json(mine.to_json()) == mine


# --- bad input ----------------------------------------------------------------------------------------------


def test_what_their_format_cannot_hold_is_refused_before_writing(path, tmp_path):
    for config, word in ((QLoraConfig("int4"), "int4"), (QLoraConfig(map8="fp8_e4m3"), "dynamic map")):
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
        with pytest.raises(ValueError, match=word):
            save_bnb(model, tmp_path / "bnb")
        assert not (tmp_path / "bnb").exists() and model.config.quantization_config is not None


def test_not_a_bnb_checkpoint(path, tmp_path):
    with pytest.raises(ValueError, match="quantization: none"):
        from_bnb(path)
    with pytest.raises(ValueError, match="save_bnb needs"):
        save_bnb(llama(), tmp_path / "x")


@pytest.mark.parametrize("damage", ["weight.quant_map", "weight.nested_quant_map", "weight.absmax", "state", "type"])
def test_damaged_layers_are_refused(damage):
    stats = to_stats(QuantizedTensor.quantize(torch.randn(8, 128)))
    if damage == "state":
        del stats["weight.quant_state.bitsandbytes__nf4"]
    elif damage == "type":
        text = b'{"quant_type": "nf3", "blocksize": 64, "dtype": "float32", "shape": [8, 128]}'
        stats["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    elif damage == "weight.absmax":
        stats[damage] = stats[damage][1:]
    else:
        stats[damage] = stats[damage] * 0.5
    with pytest.raises(ValueError):
        from_stats(stats)
