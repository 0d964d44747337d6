"""QLoRA with transformers' Trainer: paged AdamW, chunked loss, checkpointing, exact resume.

    python docs/examples/train_with_trainer.py MODEL data.jsonl adapter/ --max-steps 100
    python docs/examples/train_with_trainer.py MODEL data.jsonl adapter/ --max-steps 200 --resume

data.jsonl has one {"instruction": ..., "output": ...} a line; the loss is on the output only. On several GPUs, DDP:

    torchrun --nproc_per_node 2 docs/examples/train_with_trainer.py MODEL data.jsonl adapter/
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from qlora_ref import hf
from qlora_ref.hf.distributed import rank_device_map


def read(path: str, tokenizer, limit: int) -> list[dict]:
    """Prompt masked with -100, the end token part of the target; labels come from positions, not from token ids."""
    rows = []
    for line in Path(path).read_text().splitlines():
        example = json.loads(line)
        prompt = tokenizer(f"### Instruction:\n{example['instruction']}\n\n### Response:\n")["input_ids"]
        answer = tokenizer(example["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        prompt = prompt[-max(limit - len(answer), 1) :]  # cut the prompt, keep the answer and its end
        ids = (prompt + answer)[:limit]
        rows.append({"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:limit]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--optimizer-bits", type=int, default=32, choices=(8, 32))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless here: labels do not look at ids
    gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=hf.QLoraConfig(),
        dtype=torch.bfloat16 if gpu else torch.float32,
        device_map=rank_device_map(),
    )
    model = hf.attach(hf.prepare_model(model), r=args.rank, lora_alpha=16)
    hf.print_trainable_parameters(model)

    settings = TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        logging_steps=5,
        save_steps=max(args.max_steps // 2, 1),
        use_cpu=not gpu,
        report_to=[],
        seed=0,
    )
    trainer = hf.QLoraTrainer(
        model,
        settings,
        train_dataset=read(args.data, tokenizer, args.max_length),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        optimizer_bits=args.optimizer_bits,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    if trainer.is_world_process_zero():
        hf.save_adapter(model, args.output, base=args.model)
        tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
