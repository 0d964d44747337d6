"""A merged Llama-shaped model as one GGUF file, the format of llama.cpp (needs the `gguf` package).

Tensor names come from gguf's own table. llama.cpp rotates neighbouring pairs where transformers rotates halves, so the
rows of q and k are reordered within each head (as llama.cpp's converter does). Two kinds of tokenizer are written:
SentencePiece-style BPE with byte fallback (Llama 2, Mistral 7B), and byte-level BPE of a known pre-tokenizer.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cli import UserError
from .loading import check_model_folder

ARCHITECTURES = ("llama", "mistral")
# what a byte-level pre-tokenizer's regular expression contains -> its name in llama.cpp
PRE_TOKENIZERS = {r"\p{N}{1,3}": "llama-bpe", r"\p{N}": "qwen2"}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def check_base(base: str) -> None:
    """UserError before any work if the package is missing or the model or tokenizer is of another kind."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf needs a package: pip install gguf.")
    kind = check_model_folder(base).get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--format gguf writes {', '.join(ARCHITECTURES)} models, not {kind}; merge to safetensors and use "
            "llama.cpp's convert_hf_to_gguf.py."
        )
    if not (Path(base) / "tokenizer.json").exists():
        raise UserError(f"--format gguf needs {base}/tokenizer.json.")
    tokenizer_kind(json.loads((Path(base) / "tokenizer.json").read_text(encoding="utf-8")))


def tokenizer_kind(spec: dict[str, Any]) -> tuple[str, str]:
    """(tokenizer.ggml.model, tokenizer.ggml.pre) of a tokenizer.json. UserError for one that cannot be expressed."""
    if spec["model"].get("type") == "BPE" and spec["model"].get("byte_fallback"):
        return "llama", "default"
    text = json.dumps(spec.get("pre_tokenizer") or {}, ensure_ascii=False)
    if spec["model"].get("type") == "BPE" and '"ByteLevel"' in text:
        if '"Split"' not in text and '"Digits"' not in text:
            return "gpt2", "gpt-2"
        pattern = text.replace("\\\\", "\\")
        for part, name in PRE_TOKENIZERS.items():
            if part in pattern:
                return "gpt2", name
    raise UserError(
        "--format gguf does not know this tokenizer; merge to safetensors and use llama.cpp's convert_hf_to_gguf.py."
    )


def rotate_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from transformers' order (two halves a head) to llama.cpp's (neighbouring pairs)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(model: Any, tokenizer: Any, path: Path, name: str) -> None:
    """Write `path` whole or not at all, and read it back. UserError if a tensor differs."""
    import gguf

    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    c = model.config
    dtype = next(model.parameters()).dtype
    writer.add_name(name)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    rope = getattr(c, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"--format gguf does not write scaled rotary embeddings ({rope['rope_type']}).")
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(c, "rope_theta", 10000.0))))
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype])
    _add_tokenizer(writer, tokenizer, c.vocab_size)
    tensors = _tensors(model, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers))
    kinds = gguf.GGMLQuantizationType
    for key, tensor in tensors.items():
        if tensor.dtype is torch.bfloat16:
            writer.add_tensor(key, _bytes(tensor), raw_dtype=kinds.BF16)
        else:
            writer.add_tensor(key, tensor.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _verify(temporary, tensors)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _tensors(model: Any, names: Any) -> dict[str, torch.Tensor]:
    """GGUF name -> CPU tensor; norms in float32, as llama.cpp wants them; a tied output layer is left out."""
    c, found = model.config, {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        new = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(f"--format gguf: llama.cpp has no name for {key}.")
        tensor = tensor.detach().cpu()
        if "q_proj" in key:
            tensor = rotate_pairs(tensor, c.num_attention_heads)
        elif "k_proj" in key:
            tensor = rotate_pairs(tensor, c.num_key_value_heads)
        found[new] = (tensor.float() if tensor.dim() == 1 else tensor).contiguous()
    return found


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, pre = tokenizer_kind(spec)
    special = {t["id"]: t for t in spec.get("added_tokens", [])}
    by_id = {i: t for t, i in tokenizer.get_vocab().items()}
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    rank = {m.replace(" ", ""): i for i, m in reversed(list(enumerate(merges)))}
    tokens, scores, types = [], [], []
    for i in range(size):
        token = by_id.get(i, f"[UNUSED{i}]")
        tokens.append(token)
        # SentencePiece merges the pair of highest score first: the rank of the merge, negated; letters come last
        scores.append(float(-rank.get(token, len(merges))))
        byte = kind == "llama" and len(token) == 6 and token.startswith("<0x")
        unknown = i == tokenizer.unk_token_id and kind == "llama"
        types.append(UNKNOWN if unknown else CONTROL if i in special or i not in by_id else BYTE if byte else NORMAL)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores(scores)
    else:
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        value = getattr(tokenizer, f"{name}_token_id")
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def _verify(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    import gguf

    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        data = _bytes(tensor).reshape(-1)
        if name not in found or not np.array_equal(np.asarray(found[name].data).reshape(-1).view(np.uint8), data):
            raise UserError(f"{path}: {name} does not hold what was written; is the disk full or failing?")
