"""Training: it learns, loss and gradient are what the formula says, it resumes bit for bit, PEFT reads its adapter."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_ref.cli import UserError
from qlora_ref.finetune import report, run
from qlora_ref.finetune.checkpoint import flatten, list_checkpoints, unflatten
from qlora_ref.finetune.config import TrainConfig
from qlora_ref.finetune.generate import inference
from qlora_ref.finetune.loading import is_checkpointing, keeps_products
from qlora_ref.finetune.loop import TrainingStopped, learning_rate
from qlora_ref.finetune.peft_io import WEIGHTS, AdapterError, attach_adapter, read_adapter

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def settings(data_dir, tmp_path):
    data = data_dir / "instruct" / "llms_from_scratch" / "instruction-data.json.gz"
    return TrainConfig(
        model=str(data_dir / "weights" / "stories260K_hf"), data=str(data), output=str(tmp_path / "run"),
        device="cpu", max_examples=60, max_length=96, eval_size=12, batch_size=2, grad_accum=2, lora_rank=4,
        lora_alpha=8, lr=3e-3, max_steps=6, save_steps=2, eval_steps=3,
    )  # fmt: skip


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / WEIGHTS)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_promises(settings, tmp_path):
    prepared = run.run(settings.replace(max_steps=12, dtype="fp32"))
    folder = tmp_path / "run"
    before, after = run.held_out(prepared.trainer.records)
    assert after < before
    written = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", WEIGHTS, "metrics.jsonl", "loss.png", "config.yaml", "tokenizer.json"} <= written
    assert not [n for n in written if n.endswith(".tmp")]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    state = adapter_of(folder)
    assert len(state) == 2 * 35 and all(v.dtype == torch.float32 for v in state.values())
    assert all(v.norm() > 0 for k, v in state.items() if k.endswith("lora_B.weight"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 3, 6, 9, 12]
    resolved = run.config_module.load_yaml(folder / "config.yaml")
    assert resolved["format"] == "alpaca" and resolved["template"] == "alpaca" and resolved["device"] == "cpu"


def test_stock_peft_reads_the_adapter(settings, data_dir):
    """The same adapter on the same dequantized base gives the same logits in PEFT: names, shapes, scaling agree."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from qlora_ref.finetune.loading import load_base
    from qlora_ref.nn import LoRALinear

    prepared = run.run(settings.replace(rslora=True))
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    model = prepared.trainer.model.eval()
    with torch.no_grad():
        ours = model(ids).logits
    base = load_base(settings.model, torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            base.get_submodule(name).weight.data.copy_(module.base_layer.dequantize(torch.float32))
    theirs = peft.PeftModel.from_pretrained(base, settings.output).eval()
    with torch.no_grad():
        # two orders of summation of the same products; the base alone is farther off than that by orders of magnitude
        torch.testing.assert_close(theirs(ids).logits, ours)
        with theirs.disable_adapter():
            assert not torch.allclose(theirs(ids).logits, ours, rtol=1e-2, atol=1e-2)
    target = json.loads((Path(settings.output) / "adapter_config.json").read_text())["target_modules"]
    assert target == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_our_own_reader_restores_the_model(settings):
    from qlora_ref.finetune.loading import load_base, quant_config
    from qlora_ref.nn import quantize_model

    prepared = run.run(settings)
    model = load_base(settings.model, torch.float32)
    quantize_model(model, quant_config(settings))
    side = attach_adapter(model, settings.output)
    assert side["quantization"]["quant_type"] == "nf4" and side["template"] == "alpaca"
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, prepared.trainer.model.eval()(ids).logits)


def test_damaged_adapters_are_refused(settings, tmp_path):
    run.run(settings.replace(max_steps=1))
    weights = tmp_path / "run" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:443])  # an empty adapter of old PEFT had 443 bytes
    with pytest.raises(AdapterError, match="not a readable PEFT adapter"):
        read_adapter(tmp_path / "run")


# --- the step -------------------------------------------------------------------------------------------------------


def test_accumulation_equals_one_large_batch(settings, tmp_path):
    """Rows of different length: only the division by all labelled tokens makes 1 x 4, 2 x 2 and 4 x 1 the same step."""
    results = []
    for k, (batch, accumulate) in enumerate([(1, 4), (2, 2), (4, 1)]):
        c = settings.replace(batch_size=batch, grad_accum=accumulate, max_steps=1, output=str(tmp_path / str(k)))
        trainer = run.prepare(c).trainer
        values = trainer.train_step()
        results.append((values["loss"], values["grad_norm"]))
    for loss, norm in results[1:]:  # float32 sums in another order
        assert math.isclose(loss, results[0][0], rel_tol=1e-5) and math.isclose(norm, results[0][1], rel_tol=1e-4)


def test_the_loss_is_the_formula(settings):
    """Against plain log-softmax over the full logits, mask by hand."""
    trainer = run.prepare(settings).trainer
    batch = trainer.batches()[0]
    from qlora_ref.finetune.loss import summed_loss

    loss, count = summed_loss(trainer.model, batch)
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    logp, expected, n = logits.log_softmax(-1), 0.0, 0
    for b in range(logits.shape[0]):
        for t in range(1, logits.shape[1]):
            if batch["labels"][b, t] != -100:
                expected -= logp[b, t - 1, batch["labels"][b, t]].item()
                n += 1
    assert count == n and math.isclose(loss.item(), expected, rel_tol=1e-5)


def test_chunked_logits_are_the_same_loss_and_gradient(settings, monkeypatch):
    from qlora_ref.finetune import loss as module

    trainer = run.prepare(settings.replace(batch_size=4)).trainer
    batch, results = trainer.batches()[0], []
    for chunk in (10**9, 7):
        monkeypatch.setattr(module, "CHUNK", chunk)
        loss, count = module.summed_loss(trainer.model, batch)
        results.append((loss.item(), count, torch.autograd.grad(loss, trainer.trainable[-1])[0]))
    (a, n, g), (b, m, h) = results
    assert n == m > 7
    # float32 sums of n terms in another order
    assert abs(a - b) <= n * torch.finfo(torch.float32).eps * a
    torch.testing.assert_close(g, h)


def test_checkpointing_changes_memory_not_the_step(settings, tmp_path):
    norms = []
    for k, (on, products) in enumerate(((False, False), (True, False), (True, True))):
        c = settings.replace(gradient_checkpointing=on, keep_products=products, output=str(tmp_path / str(k)))
        trainer = run.prepare(c).trainer
        assert is_checkpointing(trainer.model) == on and keeps_products(trainer.model) == products
        norms.append(trainer.train_step())
    assert all(n["loss"] == norms[0]["loss"] and n["grad_norm"] == norms[0]["grad_norm"] for n in norms)


def test_generating_between_steps_leaves_checkpointing_as_it_was(settings):
    model = run.prepare(settings.replace(keep_products=True)).trainer.model
    with inference(model):
        assert not is_checkpointing(model)
    assert is_checkpointing(model) and keeps_products(model)
    model.gradient_checkpointing_disable()
    with inference(model):
        pass
    assert not is_checkpointing(model) and not keeps_products(model)


@pytest.mark.parametrize("schedule, end", [("constant", 1.0), ("cosine", 0.0), ("linear", 0.0)])
def test_schedules(schedule, end):
    c = TrainConfig(lr=1.0, warmup=0.1, schedule=schedule)
    rates = [learning_rate(i, 100, c) for i in range(101)]
    assert rates[:11] == [*[(i + 1) / 10 for i in range(10)], 1.0]
    assert math.isclose(rates[100], end, abs_tol=1e-12)
    if schedule != "constant":
        assert math.isclose(rates[55], 0.5) and all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_a_nonfinite_step_stops_and_names_the_layer(settings):
    prepared = run.prepare(settings)
    run.start(prepared)
    trainer = prepared.trainer
    trainer.train_step()
    trainer.save()
    with torch.no_grad():
        trainer.model.model.layers[3].mlp.up_proj.lora_A.fill_(math.inf)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(TrainingStopped, match=r"step 2 is not finite.*model\.layers\.3\.mlp\.up_proj"):
        trainer.train_step()
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    assert list_checkpoints(Path(settings.output))[-1].name == "checkpoint-1"


def test_dropout_and_packing_and_grouping_run(settings, tmp_path):
    for k, change in enumerate([{"lora_dropout": 0.1}, {"packing": True}, {"group_by_length": True}]):
        prepared = run.run(settings.replace(max_steps=2, output=str(tmp_path / f"r{k}"), **change))
        assert prepared.trainer.finished


def test_paging_changes_where_moments_live_and_no_weight(settings, tmp_path):
    """A pool smaller than the moments: pages move, and the adapter is that of the resident run, bit for bit."""
    moved = {}
    for paging in ("none", "cpu"):
        change = dict(max_steps=3, lora_rank=64, paging=paging, pool_mib=1, output=str(tmp_path / paging))
        moved[paging] = run.run(settings.replace(**change)).trainer.optimizer.stats().faults
    assert moved["none"] == 0 < moved["cpu"]
    assert equal(adapter_of(tmp_path / "none"), adapter_of(tmp_path / "cpu"))


# --- checkpoints and resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
def test_resume_is_exact(settings, tmp_path, bits):
    settings = settings.replace(lora_dropout=0.1, optimizer_bits=bits, schedule="cosine")
    whole = run.run(settings)
    part = run.prepare(settings.replace(output=str(tmp_path / "part")))
    run.start(part)
    part.trainer.log = lambda record: part.trainer.interrupt() if record["step"] == 3 else None
    part.trainer.train()
    assert not part.trainer.finished and list_checkpoints(tmp_path / "part")[-1].name == "checkpoint-3"
    again = run.run(run.resumed_config(TrainConfig(output=str(tmp_path / "part"), resume=True), set()))
    assert again.trainer.finished
    assert equal(adapter_of(tmp_path / "run"), adapter_of(tmp_path / "part"))
    a, b = ([{k: v for k, v in r.items() if k in ("step", "loss", "eval_loss", "grad_norm", "lr", "tokens")}
             for r in p.trainer.records] for p in (whole, again))  # fmt: skip
    assert a == b
    lines = (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [r["step"] for r in again.trainer.records]


def test_resume_refuses_other_settings_and_other_data(settings, tmp_path):
    run.run(settings.replace(max_steps=2))
    asked = settings.replace(resume=True, lr=1.0)
    with pytest.raises(UserError, match="started with --lr 0.003, not 1.0"):
        run.resumed_config(asked, {"lr", "output"})
    kept = settings.replace(resume=True, keep_products=True)
    assert run.resumed_config(kept, {"keep_products"}).keep_products  # it changes no bit
    config = run.resumed_config(settings.replace(resume=True), {"output"})
    with pytest.raises(TrainingStopped, match="data or its tokens changed"):
        run.run(config.replace(max_examples=50))


def test_a_damaged_checkpoint_is_named(settings, tmp_path):
    run.run(settings.replace(max_steps=2))
    target = list_checkpoints(tmp_path / "run")[-1] / "optimizer.safetensors"
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    with pytest.raises(AdapterError, match="has changed since it was saved"):
        run.run(run.resumed_config(settings.replace(resume=True), {"output"}))


def test_a_full_disk_leaves_the_last_checkpoint(settings, tmp_path, monkeypatch):
    prepared = run.prepare(settings)
    run.start(prepared)
    prepared.trainer.train_step()
    prepared.trainer.save()
    prepared.trainer.train_step()

    def full(*_args, **_kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_ref.finetune.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        prepared.trainer.save()
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_optimizer_state_survives_json():
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.arange(3)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.loads(json.dumps(flatten(state, tensors)))
    back = unflatten(skeleton, tensors)
    assert torch.equal(back["state"][0]["m"], torch.arange(3)) and back["param_groups"] == state["param_groups"]


def _start_cli(settings, *more):
    keys = ("model", "data", "device", "max_examples", "max_length", "eval_size", "batch_size", "grad_accum",
            "lora_rank", "lr", "max_steps", "save_steps", "eval_steps")  # fmt: skip
    flags = [x for k in keys for x in ("--" + k.replace("_", "-"), str(getattr(settings, k)))]
    arguments = [sys.executable, "-m", "qlora_ref", "train", "--output", settings.output, *(more or flags)]
    return subprocess.Popen(arguments, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _environment():
    from qlora_ref import native

    same_backend = {} if native.cpu else {"QLORA_BACKEND": "reference"}
    return {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1", **same_backend}


def _wait_for_steps(metrics, steps, process, seconds=60):
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count('"loss"') >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_weights(settings, tmp_path):
    settings = settings.replace(max_steps=20, save_steps=100, lora_alpha=16.0)
    run.run(settings.replace(output=str(tmp_path / "whole")))
    folder = tmp_path / "run"
    process = _start_cli(settings)
    _wait_for_steps(folder / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in output, output
    (checkpoint,) = list_checkpoints(folder)
    assert checkpoint.name != "checkpoint-20", "the run was over before it could be interrupted"
    process = _start_cli(settings, "--resume")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed at step" in output, output
    assert equal(adapter_of(tmp_path / "whole"), adapter_of(folder))


KILLER = """
import dataclasses, json, os, random, signal, sys, time
import torch
from qlora_ref.finetune import report, run
from qlora_ref.finetune.config import TrainConfig

torch.set_num_threads(1)
settings, kills = TrainConfig(**json.loads(sys.argv[1])), int(sys.argv[2])
start = time.monotonic()
run.run(settings.replace(output=settings.output + "-whole"))
whole = time.monotonic() - start
rng, status, reached = random.Random(0), None, 0
for life in range(kills + 1):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            started = os.path.exists(settings.output + "/config.yaml")
            resumed = TrainConfig(output=settings.output, resume=True)
            run.run(run.resumed_config(resumed, set()) if started else settings)
            status = 0
        finally:
            os._exit(status)
    if life < kills:
        rest = (1 - reached / settings.max_steps) * whole  # what is left, so that no change of pace uses it up early
        time.sleep(rng.uniform(0.1, 1.2) * rest / (kills + 1 - life))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    names = os.listdir(settings.output) if os.path.exists(settings.output) else []
    reached = max((int(n.split("-")[1]) for n in names if n.startswith("checkpoint-")), default=0)
    print(life, os.WIFSIGNALED(status), reached)
sys.exit(0 if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else 1)
"""


def test_twenty_random_kills(settings, tmp_path):
    """SIGKILL at twenty random moments of one run (in steps, evaluations, saves): the end is bit for bit the same.

    A process that has the model's code loaded forks each life, so that a life is training and not importing.
    """
    settings = settings.replace(max_steps=30, save_steps=1, max_examples=40, eval_size=4, eval_steps=5)
    arguments = [sys.executable, "-c", KILLER, json.dumps(run.as_dict(settings)), "20"]
    done = subprocess.run(arguments, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lives = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(lives) == 21 and sum(killed == "True" for _, killed, _ in lives) == 20, done.stdout
    assert len({reached for *_, reached in lives}) > 3, "the kills did not fall into different steps: " + done.stdout
    assert equal(adapter_of(tmp_path / "run-whole"), adapter_of(tmp_path / "run"))


# --- encoder-decoder models -----------------------------------------------------------------------------------------


@pytest.fixture
def t5(data_dir, tmp_path):
    """A random T5 with the tokenizer of stories260K: the shape is what is tested, not what it knows."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "t5")
    tokenizer = run.load_tokenizer(str(data_dir / "weights" / "stories260K_hf"))
    tokenizer.save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_t5_learns_and_is_served_as_trained(settings, t5, quant_type, tmp_path):
    from qlora_ref.finetune.engine import make_engine

    prepared = run.run(settings.replace(model=t5, quant_type=quant_type, max_steps=20, lr=1e-2, template="plain"))
    before, after = run.held_out(prepared.trainer.records)
    assert after < before
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM" and {"q", "k", "v", "o", "wi_0", "wi_1", "wo"} == set(
        config["target_modules"]
    )
    engine = make_engine([], [str(tmp_path / "run")], quant_type, "auto", "cpu", "fp32")
    engine.use("run")
    batch = prepared.trainer.batches()[0]
    with torch.no_grad():
        assert torch.equal(engine.model(**batch).logits, prepared.trainer.model.eval()(**batch).logits)


def test_t5_batches_are_prompt_and_answer(settings, t5):
    trainer = run.prepare(settings.replace(model=t5, template="plain", batch_size=1)).trainer
    (row,) = trainer.plan.step(0)[0]
    batch = trainer.batches()[0]
    tokens, answer = trainer.data[row[0]]
    start = answer.index(1)
    assert batch["input_ids"][0].tolist() == tokens[:start].tolist() and tokens[start - 1] == 2  # the encoder's EOS
    assert batch["labels"][0].tolist() == tokens[start:].tolist() and tokens[-1] == 2
    with pytest.raises(UserError, match="encoder-decoder model takes one prompt"):
        run.prepare(settings.replace(model=t5, packing=True, template="plain"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"gradient_checkpointing": False}, "activations  kept\n"),
        ({"keep_products": False}, "activations  computed again in backward\n"),
        ({"keep_products": True}, "computed again in backward, 4-bit layers and sdpa attention kept\n"),
    ],
)
def test_the_start_says_what_backward_computes_again(settings, flags, text):
    prepared = run.prepare(settings.replace(**flags))
    assert text in report.startup(prepared.config, prepared.trainer, prepared.dtype)
