"""The command line of a run: flags, YAML, old flags, and every mistake a sentence before anything is written."""

import json
from pathlib import Path

import pytest
import torch

from qlora_ref import cli
from qlora_ref.cli import UserError
from qlora_ref.finetune import flags, recipe, train_cli
from qlora_ref.finetune.config import FIELDS, TrainConfig, check, dump_yaml, from_dict, load_yaml

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def parse(*argv: str) -> TrainConfig:
    return flags.parse(list(argv), "qlora-ref train", "")[0]


def test_defaults_are_the_papers():
    c = parse()
    assert (c.quant_type, c.double_quant, c.block_size) == ("nf4", True, 64)
    assert (c.lora_rank, c.lora_alpha, c.lora_targets, c.lora_dropout) == (64, 16, "all-linear", 0)
    assert (c.lr, c.schedule, c.max_grad_norm, c.optimizer_bits) == (2e-4, "constant", 0.3, 32)
    assert c.gradient_checkpointing and c.batch_size * c.grad_accum == 16


def test_flags_win_over_yaml_and_both_are_coerced(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 2e-5\nlora-rank: 8\ndouble_quant: no\nmax_steps: null\nlora_targets: [q_proj, v_proj]\n")
    c = parse("--config", str(path), "--lora-rank", "4", "--packing", "--epochs=2", "--no-gradient-checkpointing")
    assert (c.lr, c.lora_rank, c.double_quant, c.max_steps) == (2e-5, 4, False, None)
    assert (c.packing, c.epochs, c.gradient_checkpointing, c.lora_targets) == (True, 2.0, False, "q_proj,v_proj")


@pytest.mark.parametrize(
    ("line", "given", "value"),
    [
        ("", [], None),
        ("", ["--keep-products"], True),
        ("", ["--no-keep-products"], False),
        ("", ["--keep-products=no"], False),
        ("keep_products: true", [], True),
        ("keep_products: false", [], False),
        ("keep_products: null", [], None),
        ("keep_products: true", ["--no-keep-products"], False),
        ("keep_products: false", ["--keep-products", "--packing"], True),
        ("keep_products: true", ["--keep-products", "null"], None),
    ],
)
def test_a_switch_that_may_be_left_open(tmp_path, line, given, value):
    (tmp_path / "c.yaml").write_text(f"seed: 1\n{line}\n")
    assert parse("--config", str(tmp_path / "c.yaml"), *given).keep_products is value


def test_resolved_config_reads_back(tmp_path):
    c = parse("--lr", "1e-4", "--max-steps", "7", "--eval-data", "x.json")
    (tmp_path / "c.yaml").write_text(dump_yaml(c))
    assert TrainConfig(**from_dict(load_yaml(tmp_path / "c.yaml"), "")) == c


def test_an_old_command_line_still_works(capsys):
    """The flags of artidoro/qlora's scripts/finetune_guanaco_7b.sh that say something about the run."""
    c = parse(*"""--model_name_or_path m --output_dir ./output/guanaco-7b --logging_steps 10 --save_strategy steps
        --data_seed 42 --save_steps 500 --save_total_limit 40 --evaluation_strategy steps --eval_dataset_size 1024
        --max_eval_samples 1000 --per_device_eval_batch_size 1 --max_new_tokens 32 --dataloader_num_workers 3
        --group_by_length --logging_strategy steps --remove_unused_columns False --do_train --do_eval
        --lora_r 64 --lora_alpha 16 --lora_modules all --double_quant --quant_type nf4 --bf16 --bits 4
        --warmup_ratio 0.03 --lr_scheduler_type constant --gradient_checkpointing --dataset d.jsonl
        --source_max_len 16 --target_max_len 512 --per_device_train_batch_size 1 --gradient_accumulation_steps 16
        --max_steps 1875 --eval_steps 187 --learning_rate 0.0002 --adam_beta2 0.999 --max_grad_norm 0.3
        --lora_dropout 0.1 --weight_decay 0.0 --seed 0 --optim paged_adamw_8bit""".split())  # fmt: skip  # noqa: SIM905
    assert (c.model, c.output, c.data, c.log_steps, c.save_limit) == ("m", "./output/guanaco-7b", "d.jsonl", 10, 40)
    assert (c.eval_size, c.max_eval_examples, c.group_by_length, c.dtype) == (1024, 1000, True, "bf16")
    assert (c.source_max_length, c.target_max_length, c.batch_size, c.grad_accum) == (16, 512, 1, 16)
    assert (c.max_steps, c.lr, c.beta2, c.lora_dropout, c.optimizer_bits) == (1875, 2e-4, 0.999, 0.1, 8)
    assert "--lora_r is --lora-rank here" in capsys.readouterr().err


MISTAKES = [
    (["--lora-rnk", "8"], "unknown flag --lora-rnk. Did you mean lora-rank?"),
    (["--lr", "fast"], "--lr must be a number, not 'fast'"),
    (["--lora-rank", "2.5"], "--lora-rank must be a whole number, not '2.5'"),
    (["--packing", "maybe"], "--packing must be true or false"),
    (["--keep-products", "maybe"], "--keep-products must be true or false"),
    (["--max-length", "0"], "--max-length must be at least 2, not 0"),
    (["--quant-type", "nf5"], "--quant-type 'nf5' is not one of nf4"),
    (["--block-size", "48"], "--block-size must be a power of two in 32..4096, not 48"),
    (["--lr", "nan"], "--lr must be a finite number"),
    (["--lr", "0"], "must be positive"),
    (["--lora-dropout", "1"], "must lie in [0, 1)"),
    (["--optimizer-bits", "16"], "--optimizer-bits must be 32 or 8, not 16"),
    (["--packing", "--group-by-length"], "exclude each other"),
    (["--keep-products", "--no-gradient-checkpointing"], "--keep-products is a kind of checkpointing"),
    (["--quant-type", "bof4_s"], "pass --no-double-quant"),
    (["--config", "nowhere.yaml"], "cannot read --config nowhere.yaml"),
    (["--bits", "8"], "--bits has no place here"),
    (["--optim", "sgd"], "only paged_adamw_32bit"),
    (["--trust_remote_code", "True"], "code from a model folder is never run"),
    (["--format", "alpca"], "Did you mean alpaca?"),
]


@pytest.mark.parametrize("argv, sentence", MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_are_sentences(argv, sentence):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_yaml_mistakes(tmp_path):
    for content, sentence in [("lora_rnk: 8\n", "unknown key 'lora_rnk'. Did you mean lora_rank?"),
                              ("- 1\n", "must be a mapping"), ("a: [\n", "not valid YAML")]:  # fmt: skip
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(UserError, match="c.yaml") as error:
            parse("--config", str(tmp_path / "c.yaml"))
        assert sentence in str(error.value)


def test_every_range_is_checked():
    for key in ("lora_rank", "batch_size", "grad_accum", "save_steps", "log_steps", "max_steps"):
        with pytest.raises(UserError, match="at least 1, not 0"):
            check(TrainConfig(**{key: 0}))
    assert all(f.metadata["help"] for f in FIELDS.values())


# --- recipes and cards ----------------------------------------------------------------------------------------------

GUANACO = {7: (2e-4, 0.1), 13: (2e-4, 0.1), 33: (1e-4, 0.05), 65: (1e-4, 0.05)}  # the paper: rate and dropout by size
OTHERS = {
    7: (2e-4, 0.1, 16, 10_000),
    13: (2e-4, 0.1, 16, 10_000),
    33: (1e-4, 0.05, 32, 5_000),
    65: (1e-4, 0.05, 64, 2_500),
}


@pytest.mark.parametrize("size", GUANACO)
def test_recipes_hold_the_papers_table(size):
    c = parse("--recipe", f"guanaco-{size}b")
    assert (c.lr, c.lora_dropout) == GUANACO[size] and c.batch_size * c.grad_accum == 16 and c.max_steps == 1875
    assert (c.source_max_length, c.target_max_length, c.loss_on, c.format) == (16, 512, "all", "oasst1")
    c = parse("--recipe", f"paper-{size}b")
    assert (c.lr, c.lora_dropout, c.batch_size * c.grad_accum, c.max_steps) == OTHERS[size]
    assert (c.source_max_length, c.target_max_length) == (384, 128)


def test_every_recipe_loads_and_says_where_it_is_from(capsys):
    for name in recipe.names():
        assert parse("--recipe", name, "--lr", "1e-5").lr == 1e-5
        assert "paper" in recipe.text(name)
    assert train_cli.main(["--recipe", "list"]) == 0
    assert "guanaco-65b" in capsys.readouterr().out


def test_a_card_keeps_the_step_and_fits_it(tmp_path):
    from qlora_ref.memory.cards import CARDS
    from qlora_ref.memory.models import hf_config

    (tmp_path / "config.json").write_text(json.dumps(hf_config("llama-3.1-8b")))
    common = ["--model", str(tmp_path), "--max-length", "2048", "--batch-size", "4", "--grad-accum", "4"]
    batches = []
    for card in ("16", "24GB", "80"):
        c = parse(*common, "--card", card)
        assert c.batch_size * c.grad_accum == 16 and c.keep_products is False
        batches.append(c.batch_size)
        size = next(k.size for k in CARDS if k.name.startswith(card.removesuffix("GB") + " "))
        from qlora_ref.finetune.report import memory_settings
        from qlora_ref.memory.architecture import read_config
        from qlora_ref.memory.estimate import estimate

        assert estimate(read_config(tmp_path), memory_settings(c)).needed <= size
    assert batches == sorted(batches) and batches[0] < batches[-1]
    for length, kept in (("1024", True), ("4096", False)):  # given up before the moments lose bits
        c = parse(*common, "--max-length", length, "--keep-products", "--card", "16")
        assert (c.keep_products, c.optimizer_bits) == (kept, 32)
    with pytest.raises(UserError, match="is not known; known are"):
        parse(*common, "--card", "7")
    (tmp_path / "config.json").write_text(json.dumps(hf_config("llama-3.1-405b")))
    with pytest.raises(UserError, match="does not fit on 24 GB: it needs about"):
        parse(*common, "--card", "24")


# --- before anything is written -------------------------------------------------------------------------------------


@pytest.fixture
def good(data_dir, tmp_path):
    return {
        "--model": str(data_dir / "weights" / "stories260K_hf"),
        "--data": str(data_dir / "instruct" / "llms_from_scratch" / "instruction-data.json.gz"),
        "--output": str(tmp_path / "out"),
        "--max-examples": "20",
    }


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def _cases(tmp: Path):
    _write(tmp / "empty" / "x", "")
    _write(tmp / "noweights" / "config.json", "{}")
    _write(tmp / "pickle" / "config.json", "{}")
    _write(tmp / "pickle" / "pytorch_model.bin", "x")
    _write(tmp / "badconfig" / "config.json", "{")
    _write(tmp / "damaged" / "config.json", "{}")
    _write(tmp / "damaged" / "model.safetensors", "x")
    _write(tmp / "adapter" / "adapter_config.json", "{}")
    _write(tmp / "taken" / "file", "x")
    _write(tmp / "run" / "config.yaml", "lr: 1\n")
    yield {"--model": None}, "--model is missing"
    yield {"--data": None}, "--data is missing"
    yield {"--output": None}, "--output DIR is missing"
    yield {"--model": str(tmp / "none")}, "there is no model folder"
    yield {"--model": str(tmp / "empty")}, "has no config.json"
    yield {"--model": str(tmp / "noweights")}, "has no *.safetensors"
    yield {"--model": str(tmp / "pickle")}, "they can run code"
    yield {"--model": str(tmp / "badconfig")}, "cannot be read"
    yield {"--model": str(tmp / "damaged")}, "no usable tokenizer"
    yield {"--model": str(tmp / "adapter")}, "holds an adapter, not a model"
    yield {"--data": str(tmp / "none.jsonl")}, "there is no data file"
    yield {"--data": _write(tmp / "e.jsonl", "")}, "holds no rows"
    yield {"--data": _write(tmp / "c.jsonl", '{"a": "b"}\n')}, "match no known format"
    yield {"--data": _write(tmp / "n.jsonl", '{"instruction": "a", "output": ""}\n')}, "none of its 1 rows"
    yield {"--data": _write(tmp / "1.jsonl", '{"instruction": "a", "output": "b"}\n')}, "too few to hold any out"
    yield {"--output": str(tmp / "run")}, "already holds a run"
    yield {"--output": str(tmp / "taken")}, "is not empty"
    yield {"--output": str(tmp / "taken" / "file")}, "is a file"
    yield {"--max-length": "513"}, "more than the 512 positions"
    yield {"--lora-targets": "query"}, "candidates are"
    yield {"--device": "cuda:99"}, "--device cuda"
    yield {"--device": "tpu"}, "not a device"
    yield {"--eval-size": "20"}, "leaves nothing of the 20 examples"
    yield {"--template": "chat"}, "no chat template"
    yield {"--recipe": "guanacoo-7b"}, "Did you mean guanaco-7b"


def test_bad_input_is_a_sentence_and_nothing_is_written(good, tmp_path, capsys):
    for change, sentence in _cases(tmp_path):
        given = {k: v for k, v in {**good, **change}.items() if v is not None}
        before = sorted(p for p in tmp_path.rglob("*"))
        status = cli.main(["train", *(x for pair in given.items() for x in pair)])
        error = capsys.readouterr().err
        assert status == 2 and sentence in error, (change, error)
        assert error.count("\n") == 1 and "Traceback" not in error, error
        assert sorted(p for p in tmp_path.rglob("*")) == before, change


def test_dry_run_writes_nothing(good, tmp_path, capsys):
    assert cli.main(["train", *(x for pair in good.items() for x in pair), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "dry run" in out and "on a GPU" in out and not (tmp_path / "out").exists()


def test_the_command_trains_and_reports(good, tmp_path, capsys):
    argv = [*(x for pair in good.items() for x in pair), "--max-steps", "2", "--max-length", "64", "--lr", "2e-3"]
    assert train_cli.main(argv) == 0
    out = capsys.readouterr().out
    for words in ("4-bit weights", "quantization constants", "adapters", "gradients", "optimizer states",
                  "measured peak", "held-out loss", "read back and equal"):  # fmt: skip
        assert words in out
    assert "| held-out loss | " in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "qlora_ref.json").read_text())["quantization"]["quant_type"] == "nf4"
    assert cli.main(["train", *argv]) == 2 and "already holds a run" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", str(tmp_path / "out")]) == 0  # complete already: a no-op


def test_out_of_memory_names_three_flags(good, capsys, monkeypatch):

    from qlora_ref.finetune.loop import Trainer

    def out_of_memory(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "train_step", out_of_memory)
    assert train_cli.main([*(x for pair in good.items() for x in pair), "--no-keep-products"]) == 1
    error = capsys.readouterr().err
    assert "--batch-size 1 --grad-accum 16" in error and "--max-length 256" in error and "--optimizer-bits 8" in error
    assert "4-bit weights" in error
    flags = {**good, "--output": good["--output"] + "-kept"}
    assert train_cli.main([*(x for pair in flags.items() for x in pair), "--keep-products"]) == 1
    assert "--no-keep-products" in capsys.readouterr().err


# --- preview --------------------------------------------------------------------------------------------------------


def test_preview_shows_the_mask(good, tmp_path, capsys, monkeypatch):
    path = _write(tmp_path / "d.jsonl", json.dumps({"instruction": "Say\x1b[31m hi", "output": "hi there"}) + "\n")
    assert cli.main(["preview", "--model", good["--model"], "--data", path, "--examples", "2"]) == 0
    out = capsys.readouterr().out
    assert "[[hi there</s>]]" in out and "### Response: [[" in out and "<s> Below is" in out
    assert "\x1b" not in out and "\\x1b[31m" in out  # nothing in the data may steer the terminal
    assert "format alpaca, template alpaca" in out and "with loss" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["preview", "--model", good["--model"], "--data", path]) == 0
    assert "\x1b[1;32mhi there</s>\x1b[0m" in capsys.readouterr().out
    assert cli.main(["preview", "--model", good["--model"], "--data", path, "--examples", "0"]) == 2
