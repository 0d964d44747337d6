"""`qlora-ref demo`: the whole method on the embedded model, in a few minutes, on a laptop.

QLoRA (NF4 + double quantization, LoRA on every linear layer, paged AdamW, gradient checkpointing), then 16-bit LoRA
with the same seed, data and schedule; what each keeps in memory; two questions about functions it never saw, before and
after.
"""

import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cli import UserError
from . import report, run
from .config import TrainConfig
from .files import read_rows
from .flags import Parser
from .formats import Message
from .generate import Sampling, answer
from .peft_io import write_json
from .plots import plot_losses

SAMPLES = 2
ANSWER_TOKENS = 48
# Small model, short run: a higher rate and a lower rank than the paper's 2e-4 and 64, which are for billions of weights
SETTINGS: dict[str, Any] = dict(
    lora_rank=16, lora_alpha=32.0, lr=2e-3, schedule="cosine", warmup=0.05, batch_size=8, grad_accum=2, max_length=192,
    max_eval_examples=64, save_steps=1000, keep_products=True,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One arm of the demo: losses, memory, the answers before and after."""

    name: str
    before: float
    after: float
    memory: dict[str, int]
    peak: tuple[str, int]
    answers: list[tuple[str, str]]
    seconds: float
    paging: dict[str, int]
    records: list[dict]


def main(argv: list[str]) -> int:
    parser = Parser(prog="qlora-ref demo", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--output", default="runs/demo", help="folder to write; a taken name gets a number (runs/demo)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each of the two runs (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # products of this size are too small to share; beside other work two threads wait
    config = configuration(str(free_folder(Path(args.output))), args.device, args.steps, args.seed)
    demo(config)
    return 0


def configuration(output: str, device: str = "auto", steps: int = 60, seed: int = 0) -> TrainConfig:
    """Of the 4-bit arm. UserError if the package came without its model or data."""
    from ..data import stdlib_qa_path, tiny_base_path

    try:
        model, train, heldout = tiny_base_path(), stdlib_qa_path("train"), stdlib_qa_path("heldout")
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # the moments of both arms take 2 MB: on the CPU the reference pager moves them through a pool of half that
    paging: dict[str, Any] = dict(paging="cpu", pool_mib=1) if on_cpu else {}
    return TrainConfig(
        model=str(model), data=str(train), eval_data=str(heldout), output=output, format="alpaca",
        max_steps=steps, eval_steps=max(1, steps // 4), seed=seed, device=device, **paging, **SETTINGS,
    )  # fmt: skip


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that is empty or new: a demo never touches an earlier one."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2)))
    return next(f for f in names if not f.exists() or (f.is_dir() and not any(f.iterdir())))


def questions(path: str) -> list[tuple[Message, str]]:
    """The first held-out questions with their true answers."""
    rows = itertools.islice(read_rows(path), SAMPLES)
    return [(Message("user", r["instruction"], r.get("input", "")), r["output"]) for r in rows]


def train_arm(config: TrainConfig, name: str, asked: list[tuple[Message, str]]) -> Result:
    """Train one arm to the end and ask it the questions before and after."""
    start = time.perf_counter()
    prepared = run.prepare(config)
    trainer, template = prepared.trainer, prepared.config.template

    def answers() -> list[str]:
        sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
        return [answer(trainer.model, prepared.tokenizer, (q,), template, sampling) for q, _ in asked]

    print(f"\n{name}\n{report.startup(prepared.config, trainer, prepared.dtype)}")
    before = answers()
    run.start(prepared)
    bar = report.ProgressBar(trainer, name)
    trainer.log = bar.evaluated
    try:
        trainer.train(bar)
    finally:
        bar.close()
    if not trainer.finished:
        raise KeyboardInterrupt
    saved = run.finish(prepared)
    print(
        f"  adapter: {trainer.output} ({saved['tensors']} tensors, {report.human(saved['bytes'])}, read back and equal)"
    )
    losses = run.held_out(trainer.records)
    memory, peak = report.memory_bytes(trainer), report.measured_peak(trainer)
    pairs = list(zip(before, answers(), strict=True))
    paging = vars(trainer.optimizer.stats())
    return Result(name, *losses, memory, peak, pairs, time.perf_counter() - start, paging, trainer.records)


def demo(config: TrainConfig) -> list[Result]:
    """Both arms, and the comparison: printed, and written to `demo.json` and `loss.png` in the output folder."""
    asked = questions(str(config.eval_data))
    output = Path(config.output)
    try:
        four_bit = train_arm(config, "QLoRA (NF4)", asked)
        plain = config.replace(quant_type="none", keep_products=False, output=str(output / "lora16"))
        sixteen = train_arm(plain, "16-bit LoRA", asked)
    except KeyboardInterrupt:
        raise UserError(f"the demo was stopped; what was trained is in {output}.") from None
    results = [four_bit, sixteen]
    plot_losses({r.name: r.records for r in results}, output / run.PLOT_FILE)
    write_json(output / "demo.json", [{k: v for k, v in vars(r).items() if k != "records"} for r in results])
    print(summary(results, asked, output))
    return results


def summary(results: list[Result], asked: list[tuple[Message, str]], output: Path) -> str:
    rows: list[tuple[str, ...]] = [("held-out loss (nats/token)", "before", "after", "seconds")]
    rows += [(r.name, f"{r.before:.4f}", f"{r.after:.4f}", f"{r.seconds:.0f}") for r in results]
    difference = results[0].after - results[1].after
    lines = [
        "",
        report.table(rows, right=(1, 2, 3)),
        f"  QLoRA ends {abs(difference):.4f} {'above' if difference > 0 else 'below'} 16-bit LoRA (one seed)",
        "  QLoRA kept the outputs of 4-bit layers and attention (--keep-products), 16-bit LoRA computed all again",
        "",
        report.memory_table({r.name: r.memory for r in results}, {r.name: r.peak for r in results}),
        "  paged AdamW: {faults} page faults, {} to the device, {} back".format(
            *(report.human(results[0].paging[f"bytes_to_{place}"]) for place in ("device", "host")),
            faults=results[0].paging["faults"],
        ),
        "",
    ]
    for i, (question, truth) in enumerate(asked):
        before, after = (json.dumps(text, ensure_ascii=False) for text in results[0].answers[i])
        lines += [f"  {question.text}  {question.context}".rstrip(), f"    before  {before}", f"    after   {after}"]
        lines += [f"    library {json.dumps(truth, ensure_ascii=False)}", ""]
    lines.append(f"  written: {output} (adapter, metrics.jsonl, loss.png, config.yaml, demo.json)")
    return "\n".join(lines)
