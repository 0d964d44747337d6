"""Trainer and TRL: exact resume, the chunked loss, packing, checkpointing, evaluation."""

# ruff: noqa: E402  (skip before importing what is missing)

import pytest
import torch
import torch.nn.functional as F

from hf_models import IDS, llama, saved, t5, tokenizer

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'qlora_ref[hf]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'qlora_ref[hf]')")
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qlora_ref import hf
from qlora_ref.hf.loss import chunked_cross_entropy
from qlora_ref.optim import PagedAdamW

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(llama(), tmp_path_factory.mktemp("base") / "base")


def attached(path, seed=1, dtype=torch.float32, prepare=True, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=hf.QLoraConfig(), dtype=dtype)
    torch.manual_seed(seed)
    return hf.attach(hf.prepare_model(model) if prepare else model, r=4, lora_alpha=8, lora_dropout=0.1, **kwargs)


def rows(n=12, length=16):
    ids = torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]


def arguments(folder, **kwargs):
    defaults = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True,
        learning_rate=1e-2, save_strategy="steps", save_steps=2, logging_steps=1, seed=3, report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="cosine", max_grad_norm=0.3,
    )  # fmt: skip
    return TrainingArguments(**(defaults | kwargs))


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("bits", [32, 8])
def test_resume_is_bitwise_equal_to_an_uninterrupted_run(path, tmp_path, bits):
    whole = attached(path)
    trainer = hf.QLoraTrainer(whole, arguments(tmp_path / "whole"), train_dataset=rows(), optimizer_bits=bits)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, PagedAdamW)  # under accelerate's wrapper

    first = hf.QLoraTrainer(
        attached(path),
        arguments(tmp_path / "parts"),
        train_dataset=rows(),
        optimizer_bits=bits,
        callbacks=[StopAfter(2)],
    )
    first.train()
    resumed = attached(path, seed=77)  # other start values: everything must come from the checkpoint
    second = hf.QLoraTrainer(resumed, arguments(tmp_path / "parts"), train_dataset=rows(), optimizer_bits=bits)
    second.train(resume_from_checkpoint=True)
    a, b = adapter(whole), adapter(resumed)
    assert all(torch.equal(a[n], b[n]) for n in a)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, second)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_training_lowers_the_loss_and_moves_every_adapter(path, tmp_path):
    model = attached(path, dtype=torch.bfloat16)
    base = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    args = arguments(tmp_path, max_steps=12, save_strategy="no", lr_scheduler_type="constant")
    trainer = hf.QLoraTrainer(model, args, train_dataset=rows(4))
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in adapter(model).values())
    assert all(p.abs().max() > 0 for n, p in adapter(model).items() if "lora_B" in n)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in base.items())


def test_chunked_and_plain_trainer_agree(path, tmp_path):
    runs = []
    for chunk in (None, 5):
        model = attached(path)
        args = arguments(tmp_path / str(chunk), max_steps=1, save_strategy="no")
        trainer = hf.QLoraTrainer(model, args, train_dataset=rows(), eval_dataset=rows(4), chunk_tokens=chunk)
        trainer.train()
        runs.append((trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]))
    (a, a_eval), (b, b_eval) = runs
    # sums of 60 float32 losses in another order; the step moved the weights by the same gradients up to that
    assert abs(a - b) <= 60 * 2.0**-23 * a and abs(a_eval - b_eval) <= 600 * 2.0**-23 * a_eval


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_cross_entropy_and_its_gradients(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).double()
    labels = torch.randint(50, (20,))
    labels[[0, 4, 5]] = -100
    results = []
    for chunked in (False, True):
        h = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head.zero_grad()
        if chunked:
            loss = chunked_cross_entropy(h, labels, head, chunk)
        else:
            loss = F.cross_entropy(head(h).float(), labels, reduction="sum") / 17
        loss.backward()
        results.append((loss.detach(), h.grad, head.weight.grad.clone()))
    for a, b in zip(*results, strict=True):  # cross-entropy is float32, everything around it float64
        assert (a - b).abs().max() <= 20 * 2.0**-24 * a.abs().max()
    assert results[1][1][0].abs().max() == 0


def test_chunked_loss_never_holds_all_logits(path):
    model, seen = attached(path).train(), []
    head = model.get_output_embeddings()
    plain = head.forward
    head.forward = lambda x: seen.append(x.shape[:-1].numel()) or plain(x)
    with hf.chunked_loss(model, 6):
        out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert max(seen) == 6 and sum(seen) == 2 * 19  # 19 predicted tokens, forward and again backward
    assert model(input_ids=IDS).logits.shape == (1, 20, 96)  # the head is back
    seen.clear()
    with hf.chunked_loss(model, 19):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert seen == [19]  # one chunk is not computed again


def test_all_labels_ignored_is_zero_not_nan(path):
    model = attached(path)
    with hf.chunked_loss(model):
        loss = model(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss
    loss.backward()
    assert loss.item() == 0


def test_chunked_loss_refuses_models_it_would_get_wrong(path):
    with pytest.raises(ValueError, match="chunk_tokens=None"), hf.chunked_loss(t5()):
        pass
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    capped = Gemma2ForCausalLM(config)
    with pytest.raises(RuntimeError, match="soft-capping"), hf.chunked_loss(capped):
        capped(input_ids=IDS, labels=IDS)
    assert capped(input_ids=IDS).logits.shape[-1] == 96


def test_packed_rows_do_not_see_each_other(path):
    """transformers' collator packs; position ids that start again keep the examples apart (sdpa and eager)."""
    model = attached(path).eval()
    a, b = rows(2, 9)
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": r["input_ids"].tolist()} for r in (a, b)])
    assert batch["position_ids"].tolist()[0] == [*range(9), *range(9)] and batch["labels"][0, 9] == -100
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    apart = torch.cat([model(input_ids=r["input_ids"][None]).logits for r in (a, b)], dim=1)
    # equal up to the order of float32 sums; contamination would show in the first digit
    assert (packed - apart).abs().max() <= 16 * 128 * 14 * 2.0**-24 * apart.abs().max()
    with hf.chunked_loss(model):
        assert torch.isfinite(model(**{k: batch[k] for k in ("input_ids", "position_ids", "labels")}).loss)


def test_nothing_to_train(path, tmp_path):
    model = hf.prepare_model(AutoModelForCausalLM.from_pretrained(path, quantization_config=hf.QLoraConfig()))
    with pytest.raises(ValueError, match="hf.attach"):
        hf.QLoraTrainer(model, arguments(tmp_path))


def test_stock_trainer_takes_the_paged_optimizer(path, tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="no")
    trainer = Trainer(attached(path), args, train_dataset=rows(), optimizer_cls_and_kwargs=hf.paged_adamw(args, bits=8))
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, PagedAdamW) and trainer.optimizer.optimizer.layout.bits == 8


@pytest.mark.slow
def test_sft_trainer(path, tmp_path, data_dir):
    pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base = str(data_dir / "weights" / "stories260K_hf")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=hf.QLoraConfig(), dtype=torch.float32)
    args = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, max_length=48, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, bf16=False, logging_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    data = Dataset.from_list([{"text": "Once upon a time there was a little dog who liked to run."}] * 8)
    trainer = SFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer(data_dir), peft_config=hf.lora_config(model, r=4),
        optimizer_cls_and_kwargs=hf.paged_adamw(args),
    )  # fmt: skip
    trainer.train()
    assert any(type(m).__name__ == "Lora4bit" for m in trainer.model.modules())
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]
