"""Merge and export: the merged model is the adapter model, others read it, a merge that does nothing is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_ref import cli
from qlora_ref.cli import UserError
from qlora_ref.finetune import run
from qlora_ref.finetune.config import TrainConfig
from qlora_ref.finetune.engine import make_engine
from qlora_ref.finetune.gguf_export import rotate_pairs, tokenizer_kind
from qlora_ref.finetune.loading import load_base, load_tokenizer
from qlora_ref.finetune.peft_io import WEIGHTS

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
IDS = torch.tensor([[1, 50, 60, 70, 80, 90]])


@pytest.fixture(scope="module")
def adapter(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    data = str(data_dir / "instruct" / "llms_from_scratch" / "instruction-data.json.gz")
    run.run(TrainConfig(
        model=str(data_dir / "weights" / "stories260K_hf"), data=data, device="cpu", max_examples=40, max_length=96,
        eval_size=4, lora_rank=4, lr=1e-2, max_steps=3, eval_steps=3, output=str(folder),
    ))  # fmt: skip
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_logits(adapter, name=None):
    engine = make_engine([], [str(adapter)], "nf4", "auto", "cpu", "fp32")
    engine.use(name or "adapter")
    return logits(engine.model)


def test_the_merged_model_is_the_adapter_model(adapter, tmp_path, capsys):
    argv = ["merge", "--adapter", str(adapter), "--dtype", "fp32", "--output"]
    assert cli.main([*argv, str(tmp_path / "m")]) == 0
    assert "nats from the adapter model" in capsys.readouterr().out
    merged = logits(load_base(str(tmp_path / "m"), torch.float32))
    torch.testing.assert_close(merged, adapter_logits(adapter))  # the same sums, in another order
    base = adapter_logits(adapter, "stories260K_hf")
    assert (merged - base).abs().max() > 100 * (merged - adapter_logits(adapter)).abs().max()
    assert load_tokenizer(str(tmp_path / "m")).eos_token_id == 2
    assert cli.main([*argv, str(tmp_path / "o"), "--base", "original"]) == 0
    original = logits(load_base(str(tmp_path / "o"), torch.float32))
    assert (original - merged).abs().max() > 100 * (merged - adapter_logits(adapter)).abs().max()
    assert cli.main([*argv, str(tmp_path / "m")]) == 2 and "exists" in capsys.readouterr().err


def test_a_merge_that_changes_nothing_is_refused(adapter, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    state = load_file(adapter / WEIGHTS)
    save_file({k: v * ("lora_A" in k) for k, v in state.items()}, empty / WEIGHTS)
    with pytest.raises(UserError, match="changes nothing"):
        from qlora_ref.finetune import merge_cli

        merge_cli.main(["--adapter", str(empty), "--dtype", "fp32", "--output", str(tmp_path / "m")])
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gguf_read_by_transformers(adapter, tmp_path, dtype):
    """transformers has its own GGUF reader, which undoes llama.cpp's order of rows: model and tokenizer come back."""
    pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "m.gguf"
    argv = ["export", "--adapter", str(adapter), "--dtype", dtype, "--output"]
    assert cli.main([*argv, str(file), "--format", "gguf"]) == 0
    assert cli.main([*argv, str(tmp_path / "m")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = load_base(str(tmp_path / "m"), torch.float32)
    assert torch.equal(logits(theirs), logits(ours))
    back, mine = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), load_tokenizer(str(tmp_path / "m"))
    for text in ("Once upon a time there was a girl.", "Grün 12 £"):
        assert back(text).input_ids == mine(text).input_ids
    assert back.eos_token_id == mine.eos_token_id and not list(tmp_path.glob("*.tmp"))


def test_rows_are_reordered_within_heads():
    weight = torch.arange(8.0)[:, None]  # two heads of four: halves (0 1 | 2 3) become pairs (0 2 1 3)
    assert rotate_pairs(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_tokenizers_of_llamacpp(data_dir):
    def kind(name):
        return tokenizer_kind(json.loads((data_dir / "tokenizers" / name / "tokenizer.json").read_text()))

    assert kind("gpt2") == ("gpt2", "gpt-2") and kind("mistral_sp") == ("llama", "default")
    with pytest.raises(UserError, match="does not know this tokenizer"):
        tokenizer_kind({"model": {"type": "Unigram"}})


def test_plain_peft_files(adapter, tmp_path):
    assert cli.main(["export", "--adapter", str(adapter), "--format", "peft", "--output", str(tmp_path / "p")]) == 0
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"adapter_config.json", WEIGHTS}


@pytest.mark.parametrize("change, sentence", [
    (["--dtype", "int4"], "--dtype 'int4' is not one of bf16"),
    (["--base", "none"], "--base 'none'"),
    (["--output", "{tmp}/a/b"], "there is no folder"),
    (["--adapter", "nowhere"], "not a readable PEFT adapter"),
    (["--model", "nowhere"], "is not a folder here"),
])  # fmt: skip
def test_mistakes(adapter, tmp_path, capsys, change, sentence):
    argv = [
        "--adapter",
        str(adapter),
        "--output",
        str(tmp_path / "m"),
        *(c.replace("{tmp}", str(tmp_path)) for c in change),
    ]
    assert cli.main(["merge", *argv]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "m").exists()
