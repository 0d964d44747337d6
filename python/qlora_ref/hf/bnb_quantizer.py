"""A quantizer that obeys a BitsAndBytesConfig and builds our layers (see `bnb_format.use_for_bitsandbytes`)."""

from .bnb_format import OURS_OF
from .config import QLoraConfig
from .quantizer import QLoraQuantizer


class BnbOnQLora(QLoraQuantizer):
    """Reads and quantizes what "bitsandbytes 4-bit" describes. The model it returns is an ordinary qlora_ref model."""

    def __init__(self, quantization_config, **kwargs):
        theirs = quantization_config
        ours = QLoraConfig(
            quant_type=OURS_OF[theirs.bnb_4bit_quant_type],
            double_quant=theirs.bnb_4bit_use_double_quant,
            compute_dtype=theirs.bnb_4bit_compute_dtype,
            skip_modules=theirs.llm_int8_skip_modules,
            checkpoint_format="bitsandbytes",
        )
        super().__init__(ours, **kwargs)
