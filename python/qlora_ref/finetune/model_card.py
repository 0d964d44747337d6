"""README.md of an adapter: what it is, what it was trained on, how to load it. Every number comes from the run."""

import math
from typing import Any

from .config import TrainConfig

TEMPLATE = """---
library_name: peft
base_model: {base}
tags: [qlora, lora]
---
# {name}

A LoRA adapter trained with QLoRA ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)) by qlora_ref {version}.

| | |
|---|---|
| base model | `{base}` |
| base weights while training | {quantization} |
| adapter | rank {rank}, alpha {alpha:g}{rslora}, on {targets} |
| data | `{data}` ({format} format, {template} prompt; loss on {loss_on}) |
| training | {steps} steps of {batch} examples, {tokens:,} tokens, AdamW {bits}-bit, lr {lr:g} {schedule} |
| held-out loss | {before} before, {after} after (nats a labelled token, {held} examples) |
| seed, dtype | {seed}, {dtype} |

## Use

With this package: `qlora-ref chat --adapter {folder}`

With PEFT:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
```

The adapter was trained on the *quantized* base. To fold it in, merge into the dequantized weights
(`qlora-ref merge --adapter {folder}`), not into the original ones, unless you measure that it makes no difference.

## Limits

Only the held-out loss above was measured. What the model says is checked neither for truth nor for harm. The licences
of the base model and of the data apply.
"""


def write(config: TrainConfig, facts: dict[str, Any]) -> str:
    """Markdown. facts: version, steps, tokens, held (examples), before, after (losses, NaN: not measured)."""
    quantization = "16-bit, not quantized"
    if config.quant_type != "none":
        nested = ", double quantization" if config.double_quant else ""
        quantization = f"{config.quant_type}, blocks of {config.block_size}{nested}"
    shown = {k: "not measured" if math.isnan(facts[k]) else f"{facts[k]:.4f}" for k in ("before", "after")}
    return TEMPLATE.format(
        **{k: v for k, v in facts.items() if k not in shown},
        **shown,
        base=config.model,
        name=config.output.rstrip("/").rpartition("/")[2],
        folder=config.output,
        quantization=quantization,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        rslora=", rank-stabilized" if config.rslora else "",
        targets="every linear layer" if config.lora_targets == "all-linear" else config.lora_targets,
        data=config.data,
        format=config.format,
        template=config.template,
        loss_on=config.loss_on,
        batch=config.batch_size * config.grad_accum,
        bits=config.optimizer_bits,
        lr=config.lr,
        schedule=config.schedule,
        seed=config.seed,
        dtype=config.dtype,
    )
