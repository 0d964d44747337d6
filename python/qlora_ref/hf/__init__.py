"""qlora_ref in the Hugging Face stack. Importing this module registers the quantizer; nothing is patched.

    from qlora_ref.hf import QLoraConfig
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QLoraConfig(), dtype=torch.bfloat16)

Loading a checkpoint that was saved with it needs the same import first: transformers discovers no plug-ins by itself.
"""

# ruff: noqa: E402  (a missing package is one sentence, raised before anything is imported from it)

from .versions import require

require("transformers", "qlora_ref.hf")

from .bnb_format import from_bnb, negative_absmax, save_bnb, use_for_bitsandbytes
from .config import QLoraConfig
from .quantizer import QLoraQuantizer

_LAZY = {  # need peft (or more), which need not be installed to load and save a model
    "allow_merge_into_4bit": "lora",
    "QLoraTrainer": "trainer",
    "attach": "peft",
    "chunked_loss": "loss",
    "init_adapter": "adapter_init",
    "load_adapter": "peft",
    "lora_config": "peft",
    "merge": "merging",
    "paged_adamw": "trainer",
    "prepare_model": "peft",
    "print_trainable_parameters": "peft",
    "rank_device_map": "distributed",
    "save_adapter": "peft",
    "save_sharded_adapter": "distributed",
    "shard": "distributed",
}

__all__ = [
    "QLoraConfig",
    "QLoraQuantizer",
    "from_bnb",
    "negative_absmax",
    "save_bnb",
    "use_for_bitsandbytes",
    *_LAZY,
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    import_module(f"{__name__}.peft")  # first, so that a missing peft is one sentence
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
