"""QLoRA over several devices with FSDP2: each rank keeps its share of the packed 4-bit bytes.

    python docs/examples/quantize_and_chat.py MODEL --save quantized/ --prompt hello
    torchrun --nproc_per_node 2 docs/examples/train_with_fsdp2.py quantized/ data.jsonl adapter/

Takes a *quantized* model: double quantization uses the mean of a whole weight, so it is done once, before sharding.
data.jsonl has one {"instruction": ..., "output": ...} a line. Needs torch >= 2.12; without GPUs it runs over gloo.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_ref import hf
from qlora_ref.hf.distributed import local_bytes, rank_device_map
from qlora_ref.optim import PagedAdamW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank_device_map()[""]) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if gpu else torch.float32)
    torch.manual_seed(0)  # every rank draws the same adapters
    model = hf.attach(hf.prepare_model(model), r=args.rank, lora_alpha=16).to(device)
    whole = local_bytes(model)["packed"]
    hf.shard(model)
    print(f"rank {rank} of {world}: {local_bytes(model)['packed']:,} of {whole:,} packed bytes")

    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    lines = Path(args.data).read_text().splitlines()
    model.train()
    for step in range(args.max_steps):
        example = json.loads(lines[(step * world + rank) % len(lines)])  # every rank its own row
        text = f"### Instruction:\n{example['instruction']}\n\n### Response:\n{example['output']}"
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"].to(device)
        with hf.chunked_loss(model):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / world)
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    hf.save_sharded_adapter(model, args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
