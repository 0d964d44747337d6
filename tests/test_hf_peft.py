"""PEFT on our layers: the fused branch, DoRA, LoftQ and PiSSA, merging, adapter folders, counts."""

# ruff: noqa: E402  (skip before importing what is missing)

import json
from pathlib import Path

import pytest
import torch

from attention_kernels import Kernels
from hf_models import IDS, gpt2, llama, saved

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'qlora_ref[hf]')")
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_ref import hf
from qlora_ref.checkpointing import keep_products as keeping
from qlora_ref.hf.checkpointing import keep_attention
from qlora_ref.hf.lora import Lora4bit
from qlora_ref.hf.peft import SIDE_FILE
from qlora_ref.nn import Linear4bit

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
RANK = 4


@pytest.fixture
def path(tmp_path):
    return saved(llama(), tmp_path / "base")


def load(path, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=hf.QLoraConfig(**kwargs), dtype=dtype)


def attached(path, **kwargs):
    torch.manual_seed(1)
    return hf.attach(load(path), r=RANK, lora_alpha=8, **kwargs)


def moved(model):
    """Give every trainable parameter a value that matters."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def lora_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Lora4bit)}


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def close(a, b, terms):
    """Two float32 sums of `terms` products in different orders: within terms * 2^-24 each of the sum of magnitudes,
    which for these random data is at most a few times the largest result; 16 of those."""
    return (a - b).abs().max() <= 16 * terms * 2.0**-24 * torch.maximum(a.abs().max(), b.abs().max())


@pytest.mark.parametrize("rslora", [False, True])
def test_fused_branch_equals_pefts_own(path, rslora):
    model = moved(attached(path, use_rslora=rslora)).eval()
    stock = get_peft_model(load(path), LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", use_rslora=rslora))
    assert not lora_layers(stock) and len(lora_layers(model)) == 14
    stock.load_state_dict(model.state_dict())
    assert close(model(IDS).logits, stock(IDS).logits, 128 * 14)
    ours, theirs = gradients(model), gradients(stock)
    assert ours.keys() == theirs.keys() and len(ours) == 28
    assert all(close(ours[n], theirs[n], 128 * 14) and ours[n].abs().max() > 0 for n in ours)


def test_scaling_of_rslora_is_alpha_over_root_rank(path):
    for layer in lora_layers(attached(path, use_rslora=True)).values():
        assert layer.scaling["default"] == 8 / RANK**0.5


def test_disabled_second_and_dropped_adapters_take_pefts_path(path):
    model = moved(attached(path, lora_dropout=0.5))
    base = load(path)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    model.train()
    torch.manual_seed(0)
    a = model(IDS).logits
    assert not torch.equal(a, model(IDS).logits)  # dropout is active
    model.eval()
    only = model(IDS).logits
    model.add_adapter("second", hf.lora_config(base, r=2))
    moved(model.base_model.set_adapter(["default", "second"]) or model)
    assert not torch.equal(model(IDS).logits, only)


def test_dora_starts_at_the_base_and_trains(path):
    base, model = load(path), attached(path, use_dora=True)
    assert close(model(IDS).logits, base(IDS).logits, 128 * 14)
    layer = next(iter(lora_layers(model).values()))
    W = layer.base_layer.dequantize(torch.float32)
    assert torch.equal(layer.lora_magnitude_vector["default"].weight, torch.linalg.norm(W, dim=1))
    moved(model)
    x = torch.randn(5, layer.in_features)
    assert close(layer(x), x @ layer.merged_weight(W).T, layer.in_features)  # DoRA's definition
    grads = gradients(model)
    assert sum("magnitude" in n for n in grads) == 14 and all(g.abs().max() > 0 for g in grads.values())


# --- LoftQ and PiSSA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "iterations"), [("loftq", 1), ("loftq", 5), ("pissa", 1)])
def test_init_leaves_less_error_than_quantization(path, method, iterations):
    model = attached(path)
    before = {n: m.base_layer.weight.clone() for n, m in lora_layers(model).items()}
    errors = hf.init_adapter(model, method, path, iterations)
    assert len(errors) == 14 and all(e < 1 for e in errors.values())
    kept = all(torch.equal(m.base_layer.weight, before[n]) for n, m in lora_layers(model).items())
    assert kept == (method == "loftq" and iterations == 1)
    assert all(g.abs().max() > 0 for g in gradients(model).values())


def test_loftq_is_the_best_rank_r_correction(path):
    """Eckart-Young: what is left of W - Q(W) is exactly its singular values beyond r."""
    model, original = attached(path), llama()
    errors = hf.init_adapter(model, "loftq", original.state_dict())
    for name, error in errors.items():
        W = original.get_submodule(name).weight.detach()
        layer = model.base_model.model.get_submodule(name)
        s = torch.linalg.svdvals((W - layer.base_layer.dequantize()).double())
        assert (
            abs(error - float((s[RANK:].square().sum() / s.square().sum()).sqrt())) < 64 * 2.0**-23
        )  # float32 svd of 64 values


def test_init_refuses(path):
    model = attached(path)
    with pytest.raises(ValueError, match="loftq, pissa"):
        hf.init_adapter(model, "olora", path)
    with pytest.raises(ValueError, match="has no model.layers.0"):
        hf.init_adapter(model, "loftq", {})
    with pytest.raises(ValueError, match="attach"):
        hf.init_adapter(load(path), "loftq", path)
    with pytest.raises(ValueError, match="init_adapter"):
        attached(path, init_lora_weights="pissa")


# --- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merge_from_the_dequantized_base(path, tmp_path, kwargs):
    model = moved(attached(path, **kwargs)).eval()
    expected = model(IDS).logits.detach()
    merged = hf.merge(model, torch.float32)
    assert not any(isinstance(m, (Linear4bit, Lora4bit)) for m in merged.modules())
    stock = AutoModelForCausalLM.from_pretrained(saved(merged, tmp_path / "merged"))
    assert not hasattr(stock.config, "quantization_config")
    assert close(stock(IDS).logits, expected, 128 * 14)


def test_merge_from_the_original_base(path):
    model, original = moved(attached(path)), llama()
    deltas = {n.removeprefix("base_model.model."): m.get_delta_weight("default") for n, m in lora_layers(model).items()}
    merged = hf.merge(model, torch.float32, "original", path)
    for name, delta in deltas.items():
        assert torch.equal(merged.get_submodule(name).weight, original.get_submodule(name).weight + delta)


def test_merge_of_gpt2_gives_conv1d_back(tmp_path):
    path = saved(gpt2(), tmp_path / "base")
    model = moved(attached(path)).eval()
    expected = model(IDS).logits.detach()
    stock = AutoModelForCausalLM.from_pretrained(saved(hf.merge(model, torch.float32), tmp_path / "merged"))
    assert close(stock(IDS).logits, expected, 256 * 8)


def test_merging_into_4bit_is_refused_with_the_reason_or_forced(path):
    model = moved(attached(path)).eval()
    before = model(IDS).logits
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"only 1.6 %.*hf.merge"):
            call()
    assert torch.equal(model(IDS).logits, before)  # nothing half-merged
    hf.allow_merge_into_4bit(model)
    model.merge_adapter()
    merged = model(IDS).logits
    assert not torch.equal(merged, before)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, before)  # the bytes are back


def test_merge_refuses(path):
    model = attached(path)
    with pytest.raises(ValueError, match="original=FOLDER"):
        hf.merge(model, base="original")
    with pytest.raises(ValueError, match="no model.layers.0"):
        hf.merge(model, base="original", original={})
    next(iter(lora_layers(model).values())).lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        hf.merge(model)
    with pytest.raises(ValueError, match="dequantize"):
        hf.merge(load(path))
    assert len(lora_layers(model)) == 14


# --- adapter folders ----------------------------------------------------------------------------------------


def test_adapter_folder_is_what_others_read(path, tmp_path):
    model = moved(attached(path))
    hf.save_adapter(model, tmp_path / "adapter", base=path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert config["base_model_name_or_path"] == path and config["modules_to_save"] is None
    assert config["bias"] == "none" and config["peft_type"] == "LORA" and not config["use_dora"]
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt" and len(list(f.keys())) == 28
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        assert f.get_slice(key).get_shape() == [RANK, 64]
    # stock PEFT: on the 16-bit base (what vLLM and llama.cpp do), on our base, and through AutoPeft
    expected = model.eval()(IDS).logits
    on_ours = hf.load_adapter(load(path), tmp_path / "adapter").eval()
    assert lora_layers(on_ours) and torch.equal(on_ours(IDS).logits, expected)
    stock = PeftModel.from_pretrained(load(path), tmp_path / "adapter").eval()
    assert close(stock(IDS).logits, expected, 128 * 14)
    dense = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    merged = dense.merge_and_unload()
    assert torch.isfinite(merged(IDS).logits).all()
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=hf.QLoraConfig())
    assert close(auto.eval()(IDS).logits, expected, 128 * 14)


def test_adapter_for_another_base_is_refused(path, tmp_path):
    model = attached(path)
    hf.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(9)
    other_shape = saved(llama(width=128), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"another base.*lora_"):
        hf.load_adapter(load(other_shape), tmp_path / "adapter")
    for base in (load(path, block_size=32), load(path, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="trained on another base"):
            hf.load_adapter(base, tmp_path / "adapter")
        assert not lora_layers(base)
    (tmp_path / "adapter" / SIDE_FILE).unlink()
    assert lora_layers(hf.load_adapter(load(path, block_size=32), tmp_path / "adapter"))


def test_a_real_gpt2_adapter_of_stock_peft_loads(tmp_path, data_dir):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = saved(GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64)), tmp_path / "gpt2")
    model = hf.load_adapter(load(path, dtype=torch.bfloat16), data_dir / "weights" / "peft_gpt2_kto")
    assert len(lora_layers(model)) == 12 and torch.isfinite(model(IDS).logits).all()
    on_dense = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path), data_dir / "weights" / "peft_gpt2_kto"
    )
    name = "base_model.model.transformer.h.0.attn.c_attn"
    ours, theirs = model.get_submodule(name), on_dense.get_submodule(name)
    assert torch.equal(ours.get_delta_weight("default"), theirs.get_delta_weight("default").T)


# --- preparing, counting ------------------------------------------------------------------------------------


def test_prepare_model_freezes_and_upcasts_nothing(path):
    model = load(path, dtype=torch.bfloat16)
    hf.prepare_model(model)
    assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters()) and model.is_gradient_checkpointing
    hf.prepare_model(model, norms_fp32=True)
    floats = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert floats and all("norm" in n for n in floats)


@pytest.mark.parametrize("keep_products", [False, True])
def test_checkpointing_changes_no_gradient(path, keep_products):
    plain = moved(attached(path))
    kept = {n: g.clone() for n, g in gradients(plain.train()).items()}
    torch.manual_seed(1)
    prepared = hf.prepare_model(load(path), keep_products=keep_products)
    arguments = prepared.model.layers[0]._gradient_checkpointing_func.keywords
    assert arguments.get("context_fn") is (keeping if keep_products else None)
    checkpointed = moved(hf.attach(prepared, r=RANK, lora_alpha=8)).train()
    again = gradients(checkpointed)
    assert all(torch.equal(kept[n], again[n]) for n in kept)
    with Kernels() as attention:
        gradients(checkpointed)
    layers = len(prepared.model.layers)
    assert attention.count == (layers if keep_products else 2 * layers)


def test_the_attention_of_transformers_is_wrapped_once():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    keep_attention()
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    keep_attention()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapped and not hasattr(wrapped.__wrapped__, "__wrapped__")


def test_counts_are_the_unpacked_ones(path, capsys):
    dense, model = llama(), attached(path)
    hf.print_trainable_parameters(model)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in dense.parameters()) + adapters
    assert f"trainable params: {adapters:,} || all params: {total:,}" in capsys.readouterr().out


def test_every_lora_b_moves_after_a_step(path):
    model = attached(path).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    gradients(model)
    optimizer.step()
    assert all(m.lora_B["default"].weight.abs().max() > 0 for m in lora_layers(model).values())


def test_lora_config_needs_a_4bit_model():
    with pytest.raises(ValueError, match="QLoraConfig"):
        hf.lora_config(llama())


def test_folder_without_original(path, tmp_path):
    model = attached(path)
    with pytest.raises(ValueError, match="no .safetensors"):
        hf.init_adapter(model, "loftq", str(Path(tmp_path)))
