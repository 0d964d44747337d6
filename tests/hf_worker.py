"""One process of tests/test_hf_distributed.py: `torchrun --nproc_per_node 2 hf_worker.py MODE BASE OUT`, or alone.

Two ranks train on one half of the batch each; alone, the two halves are accumulated. Both are (a + b) / 2, bit for bit.
"""

import json
import os
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qlora_ref import hf
from qlora_ref.hf.distributed import local_bytes, rank_device_map
from qlora_ref.optim import PagedAdamW

STEPS = 3


def load(base, **kwargs):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **kwargs)


def attach(model):
    torch.manual_seed(1)
    return hf.attach(hf.prepare_model(model), r=4, lora_alpha=8)


def batch(step, half):
    ids = torch.randint(3, 96, (2, 2, 12), generator=torch.Generator().manual_seed(step))[half]
    return {"input_ids": ids, "labels": ids}


def train(model, halves, scale):
    model.train()
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for half in halves:
            with hf.chunked_loss(model, 8):
                loss = model(**batch(step, half)).loss * scale
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def accelerate_fsdp2(model):
    """What `accelerate launch --use_fsdp --fsdp_version 2` does to a model; on a CPU it would choose DDP by itself."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
        reshard_after_forward=True,
    )
    stub = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=None,
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        parallelism_config=None,
    )
    if dist.get_rank() != 0:  # only rank 0 has read the files in this mode
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    return fsdp2_prepare_model(stub, model)


def main(mode, base, out):
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world > 1 else 0
    if mode.startswith("native"):
        from transformers.distributed import DistributedConfig

        kwargs = {"quantization_config": hf.QLoraConfig(double_quant=False)} if mode == "native-quantize" else {}
        model = load(base, distributed_config=DistributedConfig(fsdp_size=world), **kwargs)
        with torch.no_grad():
            save = model(**batch(0, 0)).logits
        result, packed = {"logits": save.full_tensor() if hasattr(save, "full_tensor") else save}, local_bytes(model)
        losses = []
    else:
        model = attach(load(base, device_map=rank_device_map()))
        whole = local_bytes(model)["packed"]
        if mode == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        elif mode == "fsdp2":
            model = hf.shard(model)
        elif mode == "accelerate":
            model = accelerate_fsdp2(model)
        packed = {**local_bytes(model), "whole": whole}
        losses = train(model, [rank] if world > 1 else [0, 1], 1.0 if world > 1 else 0.5)
        hf.save_sharded_adapter(model, f"{out}/adapter")
        result = {}
    if result and rank == 0:
        save_file({k: v.contiguous() for k, v in result.items()}, f"{out}/result.safetensors")
    Path(out, f"rank{rank}.json").write_text(json.dumps({"losses": losses, **packed}))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
