"""qlora_ref in the Hugging Face stack. Importing this module registers the quantizer; nothing is patched.

    from qlora_ref.hf import QLoraConfig
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QLoraConfig(), dtype=torch.bfloat16)

Loading a checkpoint that was saved with it needs the same import first: transformers discovers no plug-ins by itself.
"""

from .versions import require

require("transformers", "qlora_ref.hf")

from .bnb_format import from_bnb, negative_absmax, save_bnb, use_for_bitsandbytes  # noqa: E402
from .config import QLoraConfig  # noqa: E402
from .quantizer import QLoraQuantizer  # noqa: E402

__all__ = [
    "QLoraConfig",
    "QLoraQuantizer",
    "from_bnb",
    "negative_absmax",
    "save_bnb",
    "use_for_bitsandbytes",
]
