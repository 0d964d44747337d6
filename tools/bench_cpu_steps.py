"""Whole training steps on the CPU, one process an arm: seconds, peak resident memory of the steps, and the roofline.

    python tools/bench_cpu_steps.py --arm qlora_ref --model llama --threads 2      one arm as JSON
    python tools/bench_cpu_steps.py --arm qlora_ref --model llama --profile        its operators, by time
    python tools/bench.py --device cpu --steps                                     all arms by turns (bench_cpu.py)

Models: `llama`, 110M parameters, 1 x 256 tokens, bf16; `demo`, the embedded model with the settings and the first
batches of `qlora-ref demo`, float32. LoRA of rank 16 on every linear layer, gradient checkpointing, torch's fused AdamW
(what transformers' Trainer takes).

Arms: `qlora_ref`, `bitsandbytes` (with PEFT), `bf16` (our adapters on plain nn.Linear in the model's dtype), and
`rest`: the linear layers and their adapters give zeros at once, everything else runs. `floor` is its time plus the
flops of those layers at the most the multiply-add instruction can do (peak_flops.cpp; where that is not known, at the
rate of torch's own large product): no implementation of the 4-bit layer can be faster.

"kept" arms: checkpointing keeps the outputs of products and of attention. Ours by keep_products (checkpointing.py), the
others by what torch has for it, selective checkpointing. The floor of `rest-kept` has no flops of recomputed products.

"demo" arms: the step that `qlora-ref demo` really makes (finetune/loop.py): only labelled positions through the output
layer, gradients clipped, paged AdamW. In ours products are kept, as the demo does; the others' layers stand in the same
loop, and checkpointing computes all again.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import bench_cpu
from peak_flops import peak
from qlora_ref.hf.checkpointing import arguments
from qlora_ref.nn import LoRALinear, attach_lora, quantize_model

ARMS = tuple(arm + kept for arm in ("qlora_ref", "bitsandbytes", "bf16", "rest") for kept in ("", "-kept"))
DEMO_ARMS = tuple(f"{arm}-demo" for arm in ("qlora_ref", "bitsandbytes", "bf16", "rest"))
MODELS = {"llama": ARMS, "demo": ARMS + DEMO_ARMS}
RANK, ALPHA = 16, 32  # also the demo's


@dataclass
class Problem:
    """A model in its own dtype and the micro-batches of one optimizer step."""

    model: Any
    dtype: torch.dtype
    batches: list[dict[str, torch.Tensor]]

    def tokens(self) -> int:
        return sum(b["input_ids"].numel() for b in self.batches)


def llama() -> Problem:
    import transformers

    config = transformers.LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                                      num_attention_heads=12, vocab_size=16000, tie_word_embeddings=True)  # fmt: skip
    ids = torch.randint(0, config.vocab_size, (1, 256))
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return Problem(model, torch.bfloat16, [{"input_ids": ids, "labels": ids}])


def demo_config() -> Any:
    """Of `qlora-ref demo`, which would write what it is told to; nothing is written here."""
    from qlora_ref.finetune.demo_cli import configuration

    return configuration(f"{tempfile.gettempdir()}/unwritten-{os.getpid()}", "cpu")


def demo() -> Problem:
    """What `qlora-ref demo` trains on in its first step."""
    from qlora_ref.finetune.batches import Plan, collate
    from qlora_ref.finetune.encode import find_format, load_dataset
    from qlora_ref.finetune.loading import load_base, load_tokenizer, pad_id

    config = demo_config()
    tokenizer, form = load_tokenizer(config.model), find_format(config.data, config.format)
    data = load_dataset(config.data, form, form.template, tokenizer, config, False)
    micro = Plan(data, range(len(data)), config).step(0)
    batches = [collate(data, rows, pad_id(tokenizer)) for rows in micro]
    return Problem(load_base(config.model, torch.float32), torch.float32, batches)


class _Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_A, lora_B):
        ctx.save_for_backward(x, lora_A, lora_B)
        return x.new_zeros(*x.shape[:-1], lora_B.shape[0])

    @staticmethod
    def backward(ctx, dy):
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


class NoProduct(LoRALinear):
    """A layer and its adapter that cost nothing but what autograd must keep and give."""

    def forward(self, x):
        return _Zeros.apply(x, self.lora_A, self.lora_B)


def layer_flops(linears, tokens: int, kept: bool) -> float:
    """What the layers of a step must compute: forward, dx, the gradients of the adapters, and the forward once more
    if it is not kept, except in down_proj: nobody needs the output of a block a second time."""
    total = 0
    for path, m in linears:
        base, adapter = m.in_features * m.out_features, RANK * (m.in_features + m.out_features)
        again = not (kept or path.endswith("down_proj"))
        total += (2 + again) * base + (3 + again) * adapter
    return 2.0 * tokens * total


def adapt(problem: Problem, arm: str) -> tuple[Any, float]:
    """(the model with adapters as the arm makes them, flops of its linear layers in a step)."""
    model = problem.model
    linears = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"]
    flops = layer_flops(linears, problem.tokens(), arm.endswith("-kept"))
    if arm.startswith("bitsandbytes"):
        return _with_bitsandbytes(model, linears, problem.dtype), flops
    if arm.startswith("qlora_ref"):
        quantize_model(model)
    attach_lora(model, RANK, ALPHA)
    if arm.startswith("rest"):
        leave_out_products(model)
    return model, flops


def leave_out_products(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.__class__ = NoProduct


def _with_bitsandbytes(model, linears, dtype):
    from peft import LoraConfig, get_peft_model

    bnb = bench_cpu.load_bitsandbytes()
    for path, module in linears:
        parent, _, child = path.rpartition(".")
        layer = bench_cpu.bnb_linear(bnb, module.weight.data, nested=True, compute_dtype=dtype)
        setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))


def checkpointing(arm: str) -> dict[str, Any]:
    """The arguments of torch.utils.checkpoint."""
    if not arm.endswith("-kept"):
        return {"use_reentrant": False}
    if arm in ("qlora_ref-kept", "rest-kept"):
        return arguments(products=True)
    products = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]
    products += [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default]
    if arm == "bitsandbytes-kept":
        products.append(torch.ops.bitsandbytes.gemm_4bit.default)
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, products)}


def prepare_demo(arm: str) -> tuple[Any, Problem, float]:
    """As `prepare`: the first step of `qlora-ref demo`, again and again, with the layers of the arm."""
    from qlora_ref.finetune.loading import load_base
    from qlora_ref.finetune.run import prepare

    config, ours = demo_config(), arm.startswith(("qlora_ref", "rest"))
    config = config if ours else config.replace(quant_type="none", keep_products=False)
    trainer = prepare(config).trainer
    problem = Problem(None, torch.float32, trainer.batches())
    layers = [(p, m.base_layer) for p, m in trainer.model.named_modules() if isinstance(m, LoRALinear)]
    if arm.startswith("rest"):
        leave_out_products(trainer.model)
    if arm.startswith("bitsandbytes"):
        problem.model = load_base(config.model, torch.float32)
        trainer = dataclasses.replace(trainer, model=adapt(problem, arm)[0].get_base_model())

    def step():
        trainer.step = 0
        trainer.train_step()

    problem.model = None
    return step, problem, layer_flops(layers, problem.tokens(), config.keep_products)


def prepare(arm: str, name: str) -> tuple[Any, Problem, float]:
    """(a function that makes one optimizer step, the problem without its model, flops of the linear layers)."""
    torch.manual_seed(0)
    if arm.endswith("-demo"):
        return prepare_demo(arm)
    problem = {"llama": llama, "demo": demo}[name]()
    model, flops = adapt(problem, arm)
    problem.model = None
    base = model.get_base_model() if arm.startswith("bitsandbytes") else model
    base.config.use_cache = False
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing(arm))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step():
        for batch in problem.batches:
            (model(**batch).loss / len(problem.batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, problem, flops


def reset_peak() -> int:
    """Forget the peak so far (Linux), after giving back what building the model left over; resident bytes now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def product_rate(dtype: torch.dtype) -> float:
    """flop/s of torch's own product of large matrices on the current number of threads."""
    a, b = torch.randn(256, 4096).to(dtype), torch.randn(2048, 4096).to(dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b.T
        times.append(time.perf_counter() - start)
    return 2 * 256 * 4096 * 2048 / sorted(times)[5]


class Arm:
    """One arm ready to make steps; the first has been made."""

    def __init__(self, arm: str, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.arm, self.threads = arm, threads
        self._step, problem, self.flops = prepare(arm, name)
        self.dtype, self.before = problem.dtype, reset_peak()
        self._step()

    def step(self) -> dict[str, float]:
        """Seconds and page faults: memory that the C library has given back and must fetch again."""
        start, faulted = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self._step()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faulted}

    def memory(self) -> dict[str, float]:
        """Resident bytes before the steps and their peak. For `rest` also the seconds of the flops it leaves out."""
        result = {"before_bytes": self.before, "peak_bytes": resident("VmHWM")}
        if self.arm.startswith("rest"):
            result["flop_seconds"] = self.flops / (peak(self.threads).of(self.dtype) or product_rate(self.dtype))
        return result


def run_arm(arm: Arm, steps: int = 7) -> dict[str, float]:
    """Medians of some steps, and the memory."""
    made = [arm.step() for _ in range(steps)]
    return {key: statistics.median(step[key] for step in made) for key in made[0]} | arm.memory()


def serve(arm: Arm) -> None:
    """A step for every line of the input, its numbers as a line of the output (step_processes.py)."""
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(arm.step()), flush=True)
    print(json.dumps(arm.memory()), flush=True)


def profile_arm(arm: str, name: str, threads: int) -> str:
    """Operators of three steps by their own time."""
    torch.set_num_threads(threads)
    step, _, _ = prepare(arm, name)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS + DEMO_ARMS, required=True)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", action="store_true", help="a step for every line of the input")
    args = parser.parse_args(argv)
    if args.arm not in MODELS[args.model]:
        parser.error(f"--arm {args.arm} is one of --model demo")
    if args.serve:
        serve(Arm(args.arm, args.model, args.threads))
    elif args.profile:
        print(profile_arm(args.arm, args.model, args.threads))
    else:
        print(json.dumps(run_arm(Arm(args.arm, args.model, args.threads))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
