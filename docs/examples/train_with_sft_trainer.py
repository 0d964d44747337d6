"""QLoRA with TRL's SFTTrainer: our quantizer, our LoRA layer and our optimizer in its place of theirs.

    python docs/examples/train_with_sft_trainer.py MODEL data.jsonl adapter/ --max-steps 100

data.jsonl has one {"instruction": ..., "output": ...} a line, used as prompt and completion.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qlora_ref import hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()

    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    data = Dataset.from_list([{"prompt": r["instruction"] + "\n", "completion": r["output"]} for r in rows])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=hf.QLoraConfig(), dtype=dtype)
    settings = SFTConfig(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        max_length=512,
        logging_steps=5,
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        report_to=[],
    )
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=hf.lora_config(model, r=args.rank),
        optimizer_cls_and_kwargs=hf.paged_adamw(settings),
    )
    trainer.train()
    hf.save_adapter(trainer.model, args.output, base=args.model)


if __name__ == "__main__":
    main()
