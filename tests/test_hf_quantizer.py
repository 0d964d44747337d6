"""from_pretrained(quantization_config=QLoraConfig()): what is quantized, what a reload gives back, what is refused."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.pytorch_utils import Conv1D

from hf_models import IDS, gpt2, llama, mixtral, saved, t5
from qlora_ref.hf import QLoraConfig, QLoraQuantizer
from qlora_ref.nn import Linear4bit
from qlora_ref.quantized import QuantConfig, QuantizedTensor

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


def layers(model) -> dict[str, Linear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def load(path, config=None, **kwargs):
    if config is not None:  # an explicit None would override what config.json says
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def same_bytes(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def path(tmp_path):
    return saved(llama(), tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_loading_quantizes_each_weight_as_the_core_does(path, dtype, double_quant):
    model = load(path, QLoraConfig(double_quant=double_quant), dtype=dtype)
    original = llama()
    found = layers(model)
    assert len(found) == 14 and "lm_head" not in found and model.is_loaded_in_4bit
    for name, layer in found.items():
        weight = original.get_submodule(name).weight.detach().to(dtype)
        expected = QuantizedTensor.quantize(weight, QuantConfig(double_quant=double_quant))
        assert torch.equal(layer.dequantize(), expected.dequantize()) and layer.weight_dtype == dtype
        assert all(p.dtype == torch.uint8 and not p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("config", [QLoraConfig(), QLoraConfig("int4", 128, False, compute_dtype="bfloat16")])
def test_save_and_reload_is_bit_exact(path, tmp_path, kwargs, config):
    model = load(path, config, dtype=torch.bfloat16)
    again = load(saved(model, tmp_path / "quantized", **kwargs))
    assert same_bytes(model, again) and torch.equal(model(IDS).logits, again(IDS).logits)
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_tied_embeddings_stay_tied_and_float(tmp_path):
    path = saved(llama(tied=True), tmp_path / "base")
    model = load(path, QLoraConfig(skip_modules=[]))  # asks for everything: the tied head must stay anyway
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_floating_point()
    again = load(saved(model, tmp_path / "quantized"))
    assert again.lm_head.weight is again.model.embed_tokens.weight and same_bytes(model, again)


def test_dequantize_gives_an_ordinary_model_with_the_same_outputs(path, tmp_path):
    model = load(path, QLoraConfig(), dtype=torch.float32)
    weights = {n: m.dequantize() for n, m in layers(model).items()}
    dense = model.dequantize()
    assert not layers(dense) and not hasattr(dense.config, "quantization_config")
    assert all(torch.equal(dense.get_submodule(n).weight, w) for n, w in weights.items())
    stock = load(saved(dense, tmp_path / "dense"))
    assert torch.equal(stock(IDS).logits, dense(IDS).logits)


def test_bf16_cast_leaves_bytes_alone(path):
    model = load(path, QLoraConfig(), dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    model.to(torch.bfloat16)
    after = dict(model.named_parameters())
    assert before and all(torch.equal(p, after[n]) for n, p in before.items())


def test_gpt2_conv1d_is_quantized_transposed_and_comes_back(tmp_path):
    path = saved(gpt2(), tmp_path / "base")
    model = load(path, QLoraConfig(double_quant=False), dtype=torch.float32)
    original = gpt2()
    found = layers(model)
    assert len(found) == 8
    for name, layer in found.items():
        weight = original.get_submodule(name).weight.detach().T.contiguous()
        expected = QuantizedTensor.quantize(weight, QuantConfig(double_quant=False))
        assert torch.equal(layer.dequantize(), expected.dequantize())
        assert torch.equal(layer.bias, original.get_submodule(name).bias)
    again = load(saved(model, tmp_path / "quantized"))
    assert same_bytes(model, again)
    logits = again(IDS).logits
    dense = again.dequantize()
    assert isinstance(dense.transformer.h[0].attn.c_attn, Conv1D)
    # float32 sums in another order: at most K = 256 terms a layer, so a few hundred ulps of the largest logit
    assert (load(saved(dense, tmp_path / "dense"))(IDS).logits - logits).abs().max() < 256 * 2**-23 * logits.abs().max()


def test_t5_is_quantized_and_generates(tmp_path):
    path = saved(t5(), tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(path, quantization_config=QLoraConfig(), dtype=torch.bfloat16)
    found = layers(model)
    assert any(n.startswith("encoder") for n in found) and any("EncDecAttention" in n for n in found)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.is_floating_point()  # T5 reads its dtype
    again = AutoModelForSeq2SeqLM.from_pretrained(saved(model, tmp_path / "quantized"), dtype=torch.bfloat16)
    assert same_bytes(model, again)
    out = [m.generate(IDS, max_new_tokens=5, do_sample=False) for m in (model, again)]
    assert torch.equal(*out)


def test_fused_experts_are_named_with_their_bytes(tmp_path, caplog):
    path = saved(mixtral(), tmp_path / "base")
    with caplog.at_level(logging.WARNING, logger="qlora_ref"):
        model = load(path, QLoraConfig(), dtype=torch.float32)
    experts = [p for n, p in model.named_parameters() if "experts" in n]
    assert len(layers(model)) == 8 and experts
    assert f"{sum(p.nbytes for p in experts):,} bytes" in caplog.text and "gate_up_proj" in caplog.text
    assert same_bytes(model, load(saved(model, tmp_path / "quantized")))


def test_device_map_is_respected_and_offloading_to_disk_works(path, tmp_path):
    whole = load(path, QLoraConfig(), device_map={"": "cpu"})
    assert {p.device.type for p in whole.parameters()} == {"cpu"}
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    split |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    quantized = saved(whole, tmp_path / "quantized")
    offloaded = load(quantized, device_map=split, offload_folder=str(tmp_path / "offload"))
    assert offloaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(offloaded(IDS).logits, whole(IDS).logits)


def test_new_head_of_a_classifier_stays_float(path):
    model = AutoModelForSequenceClassification.from_pretrained(path, quantization_config=QLoraConfig(), num_labels=3)
    assert len(layers(model)) == 14 and type(model.score) is torch.nn.Linear


def test_generation_and_compile(path):
    model = load(path, QLoraConfig(), dtype=torch.float32)
    eager = model(IDS).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS).logits
    assert torch.equal(eager, compiled)
    torch.manual_seed(0)
    assert model.generate(IDS, max_new_tokens=4, do_sample=True, pad_token_id=0).shape == (1, 24)


# --- bad input: a sentence, and nothing half-loaded -------------------------------------------------------------------


def edit_config(path, **changes):
    file = Path(path) / "config.json"
    config = json.loads(file.read_text())
    config.setdefault("quantization_config", {}).update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"double_quant": False}, 'set "double_quant": true'),
        ({"block_size": 32}, "the quantization_config is not the one"),
        ({"block_size": 63}, "power of two"),
        ({"quant_type": "nf5"}, "unknown 4-bit data type"),
        ({"blocksize": 64}, "QLoraConfig knows no blocksize"),
    ],
)
def test_config_and_files_that_disagree(path, tmp_path, changes, sentence):
    quantized = saved(load(path, QLoraConfig()), tmp_path / "quantized")
    edit_config(quantized, **changes)
    with pytest.raises(ValueError, match=sentence):
        load(quantized)


def test_config_promises_4bit_but_files_are_ordinary(path):
    edit_config(path, **QLoraConfig().to_dict())
    with pytest.raises(ValueError, match="delete quantization_config from config.json"):
        load(path)


def test_a_missing_tensor_is_not_replaced_by_noise(path, tmp_path):
    from safetensors.torch import load_file, save_file

    quantized = saved(load(path, QLoraConfig()), tmp_path / "quantized")
    tensors = load_file(f"{quantized}/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.absmax_codes"]
    save_file(tensors, f"{quantized}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"no tensor for 1 parameters.*up_proj\.absmax_codes"):
        load(quantized)


def test_truncated_file(path, tmp_path):
    quantized = saved(load(path, QLoraConfig()), tmp_path / "quantized")
    file = Path(quantized) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match="incomplete|complete safetensors"):
        load(quantized)


def test_automatic_device_map_in_a_multi_process_run(path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK"):
        load(path, QLoraConfig(), device_map="auto")


def test_sharding_at_load_that_would_change_the_weights():
    with pytest.raises(ValueError, match="mean of a whole tensor|transformers >= 5.23"):
        QLoraQuantizer(QLoraConfig(), pre_quantized=False)._check_sharding(SimpleNamespace(fsdp_size=2))
    with pytest.raises(ValueError, match="tensor parallelism"):
        QLoraQuantizer(QLoraConfig())._check_sharding(SimpleNamespace(tp_size=2))
    QLoraQuantizer(QLoraConfig())._check_sharding(SimpleNamespace(fsdp_size=2, tp_size=None))
    QLoraQuantizer(QLoraConfig(double_quant=False), pre_quantized=False)._check_sharding(SimpleNamespace(fsdp_size=2))


def test_bnb_config_on_our_checkpoint(path, tmp_path):
    quantized = saved(load(path, QLoraConfig()), tmp_path / "quantized")
    with pytest.raises(ValueError, match="QLoraConfig"):
        load(quantized, BitsAndBytesConfig(load_in_4bit=True))


def test_non_finite_weight_names_the_layer(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(RuntimeError, match="conversion"):  # transformers collects errors of its conversions
        load(saved(model, tmp_path / "base"), QLoraConfig())


def test_nothing_to_quantize(path):
    with pytest.raises(ValueError, match="no linear layer to quantize"):
        load(path, QLoraConfig(skip_modules=[".*"]))


def test_missing_and_old_packages(monkeypatch):
    from qlora_ref.hf import versions

    monkeypatch.setitem(versions.MINIMUM, "no_such_package", ("1.0", "hf"))
    with pytest.raises(ImportError, match=r"pip install 'qlora_ref\[hf\]'"):
        versions.require("no_such_package", "a test")
    monkeypatch.setitem(versions.MINIMUM, "transformers", ("99.0", "hf"))
    with pytest.raises(ImportError, match="pip install -U 'transformers>=99.0'"):
        versions.require("transformers", "a test")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(RuntimeError, match="torch >= 2.12"):
        versions.require_fsdp2()
