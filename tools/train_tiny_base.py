"""Make the embedded default of qlora_ref: a small Llama, its tokenizer and an instruction set, from nothing.

    python tools/train_tiny_base.py                  # the committed model: its README has the exact command
    python tools/train_tiny_base.py --minutes 25     # as many steps as this machine does in that time
    python tools/train_tiny_base.py --data-only      # only the questions and answers

The text is this Python's own standard library (`stdlib_corpus.py`), so the result depends on the Python patch
version; MANIFEST.json beside the model lists every file with its SHA-256. With the same Python, torch build,
number of threads and --steps, a run gives the same bytes: all randomness comes from --seed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stdlib_corpus import documents, instruction_rows, read_modules
from tiny_base_files import save, write_instructions

DATA = Path(__file__).resolve().parents[1] / "python" / "qlora_ref" / "data"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 2048
CONTEXT = 512
CARD_COPIES = 3  # help pages per epoch; see stdlib_corpus.documents
PEAK_LR, FINAL_LR_SHARE, WARMUP_STEPS = 3e-3, 0.03, 60
WEIGHT_DECAY, BETAS, CLIP_NORM = 0.1, (0.9, 0.95), 1.0
ROWS = {"train": 3600, "heldout": 250}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    modules = read_modules()
    if not args.model_only:
        write_instructions(modules, instruction_rows(modules, ROWS), args.out / "stdlib_qa")
    if args.data_only:
        return 0
    train_texts = documents([m for m in modules if not m.held_out], CARD_COPIES)
    heldout_texts = documents([m for m in modules if m.held_out], card_copies=1)
    tokenizer = train_tokenizer(train_texts)
    corpus = encode(tokenizer, train_texts)
    heldout = windows(torch.cat(encode(tokenizer, heldout_texts)))
    heldout = heldout[:: max(1, len(heldout) // args.eval_windows)]  # evenly spread over the held-out modules
    print(
        f"{len(modules)} modules, {sum(map(len, corpus)):,} training tokens an epoch, "
        f"{heldout.numel():,} held-out tokens",
        flush=True,
    )

    torch.manual_seed(args.seed)
    model = new_model(tokenizer)
    steps = args.steps or steps_in(model, corpus, args)
    record = train(model, corpus, heldout, steps, args)
    save(model, tokenizer, modules, record, args.out / "tiny_base", lambda m: mean_loss(m, heldout))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA, help="receives tiny_base/ and stdlib_qa/")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps; reproducible")
    length.add_argument("--minutes", type=float, default=25.0, help="choose the steps from measured speed")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (part of what fixes the bytes)")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {CONTEXT} tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=int, default=48, help="held-out sequences to evaluate on")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast (faster where the CPU has it)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--data-only", action="store_true", help="write the instruction set and stop")
    only.add_argument("--model-only", action="store_true", help="leave the instruction set alone")
    args = parser.parse_args(argv)
    for flag in ("steps", "minutes", "threads", "batch", "eval_windows"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            parser.error(f"--{flag.replace('_', '-')} is {value}: give a positive number.")
    return args


# --- tokens -----------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text round-trips) trained on the training text; puts BOS in front like Llama."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bos = bpe.token_to_id(BOS)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """Token ids [n] int32 of each text, from BOS to EOS."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return [torch.tensor(e.ids + [tokenizer.eos_token_id], dtype=torch.int32) for e in encoded]


def windows(stream: torch.Tensor) -> torch.Tensor:
    """Cut a token stream [n] into rows [n // CONTEXT, CONTEXT]; the rest is dropped."""
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


# --- training ---------------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Llama, 2.75 M parameters; every in_features is a multiple of 256, so no NF4 block straddles rows."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(corpus: list[torch.Tensor], batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches [batch, CONTEXT] int64; each epoch shuffles documents, joins, cuts, shuffles."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(corpus), generator=generator).tolist()
        rows = windows(torch.cat([corpus[i] for i in order]))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[start : start + batch].long()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_LR_SHARE of the peak at the last step."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LR * warm * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS)


def one_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, ids: torch.Tensor, bf16: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def steps_in(model: LlamaForCausalLM, corpus: list[torch.Tensor], args: argparse.Namespace) -> int:
    """How many steps fit in --minutes, timed on another model so that the run itself stays reproducible."""
    trial = LlamaForCausalLM(model.config)
    optimizer, stream = optimizer_for(trial), batches(corpus, args.batch, args.seed)
    one_step(trial, optimizer, next(stream), args.bf16)
    count, start = 4, time.perf_counter()
    for _ in range(count):
        one_step(trial, optimizer, next(stream), args.bf16)
    seconds = (time.perf_counter() - start) / count
    steps = max(1, int(args.minutes * 60 / seconds))
    print(f"{seconds:.2f} s a step: --minutes {args.minutes:g} is --steps {steps}", flush=True)
    return steps


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats over rows [n, CONTEXT]."""
    model.eval()
    losses = [model(input_ids=r.long(), labels=r.long(), use_cache=False).loss.item() for r in rows.split(8)]
    sizes = [len(r) for r in rows.split(8)]
    model.train()
    return sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / len(rows)


def train(
    model: LlamaForCausalLM, corpus: list[torch.Tensor], heldout: torch.Tensor, steps: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Train in place with AdamW; print progress; return what the README records."""
    optimizer, stream = optimizer_for(model), batches(corpus, args.batch, args.seed)
    start, smooth = time.perf_counter(), None
    untrained = mean_loss(model, heldout)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = one_step(model, optimizer, next(stream), args.bf16)
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        if (step + 1) % 20 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            speed = (step + 1) * args.batch * CONTEXT / seconds
            line = f"step {step + 1}/{steps}  loss {smooth:.3f}  {speed:,.0f} tok/s"
            if (step + 1) % 200 == 0:
                line += f"  held-out {mean_loss(model, heldout):.3f}"
            print(f"{line}  {seconds / 60:.1f} min", flush=True)
    return {
        "command": f"python tools/train_tiny_base.py --steps {steps} --threads {args.threads} "
        f"--batch {args.batch} --seed {args.seed}" + (" --bf16" if args.bf16 else ""),
        "steps": steps,
        "tokens seen": steps * args.batch * CONTEXT,
        "tokens per epoch": sum(map(len, corpus)),
        "final training loss (smoothed)": round(smooth or math.nan, 4),
        "held-out loss before training": round(untrained, 4),
        "wall minutes": round((time.perf_counter() - start) / 60, 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
