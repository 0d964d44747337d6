"""Built-in table of model shapes, each with its source and the parameter count its authors publish.

The count is the check of the row: `tests/test_memory_models.py` computes it from the shapes and wants equality.
"""

import difflib
from functools import cache

from .architecture import FAMILIES, Architecture, ConfigError, from_config

HF = "config.json of huggingface.co/"
LLAMA1 = "Touvron et al. 2023, arXiv 2302.13971, table 2; widths of the released checkpoints"

# name: (model_type, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, max_position,
#        published parameters, source)
DECODERS = {
    "llama-7b": ("llama", 4096, 11008, 32, 32, 32, 128, 32000, False, 2048, 6_738_415_616, LLAMA1),
    "llama-13b": ("llama", 5120, 13824, 40, 40, 40, 128, 32000, False, 2048, 13_015_864_320, LLAMA1),
    "llama-33b": ("llama", 6656, 17920, 60, 52, 52, 128, 32000, False, 2048, 32_528_943_616, LLAMA1),
    "llama-65b": ("llama", 8192, 22016, 80, 64, 64, 128, 32000, False, 2048, 65_285_660_672, LLAMA1),
    "llama-2-7b": (
        "llama",
        4096,
        11008,
        32,
        32,
        32,
        128,
        32000,
        False,
        4096,
        6_738_415_616,
        HF + "meta-llama/Llama-2-7b-hf",
    ),
    "llama-2-13b": (
        "llama",
        5120,
        13824,
        40,
        40,
        40,
        128,
        32000,
        False,
        4096,
        13_015_864_320,
        HF + "meta-llama/Llama-2-13b-hf",
    ),
    "llama-2-70b": (
        "llama",
        8192,
        28672,
        80,
        64,
        8,
        128,
        32000,
        False,
        4096,
        68_976_648_192,
        HF + "meta-llama/Llama-2-70b-hf",
    ),
    "llama-3-8b": (
        "llama",
        4096,
        14336,
        32,
        32,
        8,
        128,
        128256,
        False,
        8192,
        8_030_261_248,
        HF + "meta-llama/Meta-Llama-3-8B",
    ),
    "llama-3-70b": (
        "llama",
        8192,
        28672,
        80,
        64,
        8,
        128,
        128256,
        False,
        8192,
        70_553_706_496,
        HF + "meta-llama/Meta-Llama-3-70B",
    ),
    "llama-3.1-8b": (
        "llama",
        4096,
        14336,
        32,
        32,
        8,
        128,
        128256,
        False,
        131072,
        8_030_261_248,
        HF + "meta-llama/Llama-3.1-8B",
    ),
    "llama-3.1-70b": (
        "llama",
        8192,
        28672,
        80,
        64,
        8,
        128,
        128256,
        False,
        131072,
        70_553_706_496,
        HF + "meta-llama/Llama-3.1-70B",
    ),
    "llama-3.1-405b": (
        "llama",
        16384,
        53248,
        126,
        128,
        8,
        128,
        128256,
        False,
        131072,
        405_853_388_800,
        HF + "meta-llama/Llama-3.1-405B",
    ),
    "llama-3.2-1b": (
        "llama",
        2048,
        8192,
        16,
        32,
        8,
        64,
        128256,
        True,
        131072,
        1_235_814_400,
        HF + "meta-llama/Llama-3.2-1B",
    ),
    "llama-3.2-3b": (
        "llama",
        3072,
        8192,
        28,
        24,
        8,
        128,
        128256,
        True,
        131072,
        3_212_749_824,
        HF + "meta-llama/Llama-3.2-3B",
    ),
    "llama-3.3-70b": (
        "llama",
        8192,
        28672,
        80,
        64,
        8,
        128,
        128256,
        False,
        131072,
        70_553_706_496,
        HF + "meta-llama/Llama-3.3-70B-Instruct",
    ),
    "mistral-7b": (
        "mistral",
        4096,
        14336,
        32,
        32,
        8,
        128,
        32000,
        False,
        32768,
        7_241_732_096,
        HF + "mistralai/Mistral-7B-v0.1",
    ),
    "mistral-7b-v0.3": (
        "mistral",
        4096,
        14336,
        32,
        32,
        8,
        128,
        32768,
        False,
        32768,
        7_248_023_552,
        HF + "mistralai/Mistral-7B-v0.3",
    ),
    "mixtral-8x7b": (
        "mixtral",
        4096,
        14336,
        32,
        32,
        8,
        128,
        32000,
        False,
        32768,
        46_702_792_704,
        HF + "mistralai/Mixtral-8x7B-v0.1",
    ),
    "mixtral-8x22b": (
        "mixtral",
        6144,
        16384,
        56,
        48,
        8,
        128,
        32000,
        False,
        65536,
        140_620_634_112,
        HF + "mistralai/Mixtral-8x22B-v0.1",
    ),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True, 32768, 494_032_768, HF + "Qwen/Qwen2.5-0.5B"),
    "qwen2.5-1.5b": (
        "qwen2",
        1536,
        8960,
        28,
        12,
        2,
        128,
        151936,
        True,
        131072,
        1_543_714_304,
        HF + "Qwen/Qwen2.5-1.5B",
    ),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True, 32768, 3_085_938_688, HF + "Qwen/Qwen2.5-3B"),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 131072, 7_615_616_512, HF + "Qwen/Qwen2.5-7B"),
    "qwen2.5-14b": (
        "qwen2",
        5120,
        13824,
        48,
        40,
        8,
        128,
        152064,
        False,
        131072,
        14_770_033_664,
        HF + "Qwen/Qwen2.5-14B",
    ),
    "qwen2.5-32b": (
        "qwen2",
        5120,
        27648,
        64,
        40,
        8,
        128,
        152064,
        False,
        131072,
        32_763_876_352,
        HF + "Qwen/Qwen2.5-32B",
    ),
    "qwen2.5-72b": (
        "qwen2",
        8192,
        29568,
        80,
        64,
        8,
        128,
        152064,
        False,
        131072,
        72_706_203_648,
        HF + "Qwen/Qwen2.5-72B",
    ),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 40960, 596_049_920, HF + "Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True, 40960, 1_720_574_976, HF + "Qwen/Qwen3-1.7B"),
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True, 40960, 4_022_468_096, HF + "Qwen/Qwen3-4B"),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False, 40960, 8_190_735_360, HF + "Qwen/Qwen3-8B"),
    "qwen3-14b": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False, 40960, 14_768_307_200, HF + "Qwen/Qwen3-14B"),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False, 40960, 32_762_123_264, HF + "Qwen/Qwen3-32B"),
    "gemma-2b": ("gemma", 2048, 16384, 18, 8, 1, 256, 256000, True, 8192, 2_506_172_416, HF + "google/gemma-2b"),
    "gemma-7b": ("gemma", 3072, 24576, 28, 16, 16, 256, 256000, True, 8192, 8_537_680_896, HF + "google/gemma-7b"),
    "gemma-2-2b": ("gemma2", 2304, 9216, 26, 8, 4, 256, 256000, True, 8192, 2_614_341_888, HF + "google/gemma-2-2b"),
    "gemma-2-9b": ("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, True, 8192, 9_241_705_984, HF + "google/gemma-2-9b"),
    "gemma-2-27b": (
        "gemma2",
        4608,
        36864,
        46,
        32,
        16,
        128,
        256000,
        True,
        8192,
        27_227_128_320,
        HF + "google/gemma-2-27b",
    ),
    "gemma-3-1b": (
        "gemma3_text",
        1152,
        6912,
        26,
        4,
        1,
        256,
        262144,
        True,
        32768,
        999_885_952,
        HF + "google/gemma-3-1b-pt",
    ),
}

T5_PAPER = "Raffel et al. 2020, arXiv 1910.10683, section 3.7; "

# name: (d_model, d_ff, layers a stack, heads, d_kv, gated, published parameters, source)
T5 = {
    "t5-small": (512, 2048, 6, 8, 64, False, 60_506_624, T5_PAPER + HF + "google-t5/t5-small"),
    "t5-base": (768, 3072, 12, 12, 64, False, 222_903_552, T5_PAPER + HF + "google-t5/t5-base"),
    "t5-large": (1024, 4096, 24, 16, 64, False, 737_668_096, T5_PAPER + HF + "google-t5/t5-large"),
    "t5-3b": (1024, 16384, 24, 32, 128, False, 2_851_598_336, T5_PAPER + HF + "google-t5/t5-3b"),
    "t5-11b": (1024, 65536, 24, 128, 128, False, 11_307_321_344, T5_PAPER + HF + "google-t5/t5-11b"),
    "t5-v1.1-small": (512, 1024, 8, 6, 64, True, 76_961_152, HF + "google/t5-v1_1-small"),
    "t5-v1.1-base": (768, 2048, 12, 12, 64, True, 247_577_856, HF + "google/t5-v1_1-base"),
    "t5-v1.1-large": (1024, 2816, 24, 16, 64, True, 783_150_080, HF + "google/t5-v1_1-large"),
    "t5-v1.1-xl": (2048, 5120, 24, 32, 64, True, 2_849_757_184, HF + "google/t5-v1_1-xl"),
    "t5-v1.1-xxl": (4096, 10240, 24, 64, 64, True, 11_135_332_352, HF + "google/t5-v1_1-xxl"),
}


def names() -> list[str]:
    return [*DECODERS, *T5]


def published_parameters(name: str) -> int:
    return DECODERS[name][10] if name in DECODERS else T5[name][6]


def hf_config(name: str) -> dict:
    """The fields of the model's config.json that decide its memory, for `from_config` and for the trace."""
    if name in T5:
        d_model, d_ff, layers, heads, d_kv, gated, _, _ = T5[name]
        return {
            "model_type": "t5", "d_model": d_model, "d_ff": d_ff, "num_layers": layers,
            "num_decoder_layers": layers, "num_heads": heads, "d_kv": d_kv, "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated,
        }  # fmt: skip
    kind, hidden, inner, layers, heads, kv_heads, head_dim, vocab, tied, positions, _, _ = DECODERS[name]
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": positions, **experts,
    }  # fmt: skip


def nearest(name: str) -> list[str]:
    """Up to three built-in names like `name`, the most alike first; an organisation before a slash is ignored."""
    key = name.rsplit("/", 1)[-1].lower().replace("_", "-").removesuffix("-hf")
    return difflib.get_close_matches(key, names(), n=3, cutoff=0.5)


@cache
def model(name: str) -> Architecture:
    """Architecture of a built-in model. Raises `ConfigError`, naming the nearest model, when there is none."""
    key = name.strip().lower().replace("_", "-")
    if key not in names():
        near = nearest(name)
        hint = f"the nearest are {', '.join(near)}" if near else f"known families: {', '.join(FAMILIES)}"
        raise ConfigError(
            f"There is no built-in model '{name}'; {hint}. "
            "List them with --list-models, or give a config.json with --config."
        )
    source = DECODERS[key][-1] if key in DECODERS else T5[key][-1]
    return from_config(hf_config(key), name=key, source=source)
