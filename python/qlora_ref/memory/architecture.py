"""The shapes of a transformer that decide its memory, read from a Hugging Face `config.json`. Standard library only."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# model_type -> what its config.json does not say. `biases` are the linear layers that carry a bias,
# `norms` the (h,) norms of one layer, `qk_norm` a norm of every query and key head, `softcap` a tanh over the logits.
# `absent` holds what transformers' configuration class (5.23) assumes for a field that is not in the file.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"absent": {"num_key_value_heads": 8}},
    "mixtral": {"absent": {"num_key_value_heads": 8}},
    "qwen2": {"biases": ("q_proj", "k_proj", "v_proj"), "absent": {"num_key_value_heads": 32}},
    "qwen3": {"qk_norm": True, "absent": {"num_key_value_heads": 32, "head_dim": 128}},
    "gemma": {"tied": True, "absent": {"num_key_value_heads": 16, "head_dim": 256}},
    "gemma2": {
        "tied": True, "norms": 4, "softcap": True,
        "absent": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    },
    "gemma3_text": {  # the published files leave all of these out
        "tied": True, "norms": 4, "qk_norm": True,
        "absent": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208},
    },
    "t5": {"tied": True},
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
T5_BUCKETS = 32  # relative position buckets, one table a stack
LARGEST = (
    2**24
)  # of any width, vocabulary or count: some ten times the largest model there is; beyond is a typing error
MOST_LAYERS = 2**12


class ConfigError(ValueError):
    """The configuration cannot describe a model we know; the message is one sentence."""


@dataclass(frozen=True)
class Matrix:
    """One linear layer of a block: `name`, `inputs` (in_features) and `outputs` (out_features)."""

    name: str
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Architecture:
    """Shapes of one model. `layers` are decoder layers, or encoder layers where `decoder_layers` > 0 (T5)."""

    name: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    biases: tuple[str, ...] = ()
    norms: int = 2
    qk_norm: bool = False
    softcap: bool = False
    experts: int = 0
    experts_per_token: int = 0
    decoder_layers: int = 0
    gated: bool = True
    max_position: int = 0
    source: str = ""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def encoder_decoder(self) -> bool:
        return self.decoder_layers > 0

    def attention_matrices(self, names: tuple[str, ...] = ATTENTION) -> list[Matrix]:
        h, q, kv = self.hidden, self.query_width, self.kv_width
        shapes = ((h, q), (h, kv), (h, kv), (q, h))
        return [Matrix(name, *shape) for name, shape in zip(names, shapes, strict=True)]

    def mlp_matrices(self) -> list[Matrix]:
        """The linear layers of the MLP. Fused experts are 3-D parameters, not linear layers: see `expert_tensors`."""
        h, f = self.hidden, self.intermediate
        if self.experts:
            return []
        if self.encoder_decoder:
            first = [Matrix("wi_0", h, f), Matrix("wi_1", h, f)] if self.gated else [Matrix("wi", h, f)]
            return [*first, Matrix("wo", f, h)]
        return [Matrix("gate_proj", h, f), Matrix("up_proj", h, f), Matrix("down_proj", f, h)]

    def linear_layers(self) -> list[tuple[Matrix, int]]:
        """Every linear layer that QLoRA quantizes, with how many of it the model has (the head is not one of them)."""
        if self.encoder_decoder:
            attention = self.attention_matrices(("q", "k", "v", "o"))
            encoder, decoder = self.layers, self.decoder_layers
            return [(m, encoder + 2 * decoder) for m in attention] + [
                (m, encoder + decoder) for m in self.mlp_matrices()
            ]
        return [(m, self.layers) for m in (*self.attention_matrices(), *self.mlp_matrices())]

    def projection_names(self) -> tuple[str, ...]:
        return tuple(m.name for m, _ in self.linear_layers())

    def quantizable_parameters(self) -> int:
        return sum(m.size * count for m, count in self.linear_layers())

    def expert_tensors(self) -> list[int]:
        """Elements of the fused expert tensors of transformers v5: [experts, 2f, h] and [experts, h, f] a layer."""
        one = self.experts * self.hidden * self.intermediate
        return [2 * one, one] * self.layers if self.experts else []

    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def small_tensors(self) -> list[int]:
        """Elements of every norm, bias and router weight, and of T5's relative position tables."""
        h = self.hidden
        if self.encoder_decoder:
            tables = [T5_BUCKETS * self.heads] * 2
            return [h] * (2 * self.layers + 3 * self.decoder_layers + 2) + tables
        widths = {m.name: m.outputs for m, _ in self.linear_layers()}
        layer = [h] * self.norms + [self.head_dim] * (2 * self.qk_norm) + [widths[name] for name in self.biases]
        router = [self.experts * h] if self.experts else []
        return (layer + router) * self.layers + [h]

    def parameters(self) -> int:
        """All parameters, as a checkpoint counts them (a tied embedding once)."""
        return (
            self.quantizable_parameters()
            + sum(self.expert_tensors())
            + self.embedding_parameters()
            + sum(self.small_tensors())
        )


def from_config(config: dict, name: str = "config.json", source: str = "") -> Architecture:
    """Architecture of a Hugging Face config dictionary.

    Raises `ConfigError` when `model_type` is unknown, a field is missing, or the fields contradict each other.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"{name} holds a {type(config).__name__}, not a JSON object of configuration fields.")
    if isinstance(config.get("text_config"), dict):  # the language part of a vision-language model
        config = config["text_config"]
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError(f"{name} has no field 'model_type'; known types are {', '.join(FAMILIES)}.")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{name} says model_type '{model_type}', whose memory this package cannot compute; "
            f"known types are {', '.join(FAMILIES)}."
        )
    return _t5(config, name, source) if model_type == "t5" else _decoder(config, model_type, name, source)


def _integer(config: dict, field: str, name: str, default: int | None = None, largest: int = LARGEST) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} has no field '{field}', which the memory of the model depends on.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} says {field} = {value!r}; it must be a positive integer.")
    if value > largest:
        raise ConfigError(f"{name} says {field} = {value:.3g}; no model has more than {largest:,}.")
    return value


def _boolean(config: dict, field: str, name: str, default: bool = False) -> bool:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{name} says {field} = {value!r}; it must be true or false.")
    return value


def _decoder(config: dict, model_type: str, name: str, source: str) -> Architecture:
    family = FAMILIES[model_type]
    given, config = config, {**family.get("absent", {}), **config}
    hidden = _integer(config, "hidden_size", name)
    heads = _integer(config, "num_attention_heads", name)
    kv_heads = _integer(config, "num_key_value_heads", name, default=heads)
    if heads % kv_heads:
        assumed = "" if "num_key_value_heads" in given else ", which transformers assumes where the file does not say"
        raise ConfigError(f"{name}: {heads} attention heads cannot share {kv_heads} key-value heads evenly{assumed}.")
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"{name}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    biases = family.get("biases", ())
    if _boolean(config, "attention_bias", name):
        biases = ATTENTION
    if _boolean(config, "mlp_bias", name):
        biases = (*biases, *MLP)
    experts = _integer(config, "num_local_experts", name) if model_type == "mixtral" else 0
    chosen = _integer(config, "num_experts_per_tok", name) if experts else 0
    if chosen > experts:
        raise ConfigError(f"{name}: a token cannot choose {chosen} of {experts} experts.")
    return Architecture(
        name=name,
        model_type=model_type,
        hidden=hidden,
        intermediate=_integer(config, "intermediate_size", name),
        layers=_integer(config, "num_hidden_layers", name, largest=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_integer(config, "head_dim", name, default=max(1, hidden // heads)),
        vocab=_integer(config, "vocab_size", name),
        tied=_boolean(config, "tie_word_embeddings", name, family.get("tied", False)),
        biases=biases,
        norms=family.get("norms", 2),
        qk_norm=family.get("qk_norm", False),
        softcap=family.get("softcap", False),
        experts=experts,
        experts_per_token=chosen,
        max_position=_integer(config, "max_position_embeddings", name, default=2**31, largest=2**31),
        source=source or name,
    )


def _t5(config: dict, name: str, source: str) -> Architecture:
    heads = _integer(config, "num_heads", name)
    layers = _integer(config, "num_layers", name, largest=MOST_LAYERS)
    feed_forward = str(config.get("feed_forward_proj", "relu"))
    return Architecture(
        name=name,
        model_type="t5",
        hidden=_integer(config, "d_model", name),
        intermediate=_integer(config, "d_ff", name),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=_integer(config, "d_kv", name),
        vocab=_integer(config, "vocab_size", name),
        tied=_boolean(config, "tie_word_embeddings", name, True),
        norms=3,
        decoder_layers=_integer(config, "num_decoder_layers", name, default=layers, largest=MOST_LAYERS),
        gated=feed_forward.startswith("gated"),
        max_position=2**31,  # relative positions: no table to run out of
        source=source or name,
    )


def read_config(path: str | Path) -> Architecture:
    """Architecture of a `config.json`, or of a model folder that holds one."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"There is no {file}; give a config.json, or a model folder that holds one.")
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers or nesting without end
        raise ConfigError(f"{file} is not valid JSON ({error}).") from error
    return from_config(config, name=str(file), source=str(file))


def blocks(elements: int, block_size: int) -> int:
    """How many blocks of `block_size` cover `elements`, the last one perhaps short."""
    return math.ceil(elements / block_size)
