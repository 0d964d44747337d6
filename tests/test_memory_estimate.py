"""The closed form: published parameter counts, golden numbers, monotonicity, and what it refuses. No torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ref.memory import cards, models
from qlora_ref.memory import categories as row
from qlora_ref.memory.architecture import FAMILIES, ConfigError, from_config, read_config
from qlora_ref.memory.estimate import Margin, estimate, state_bytes
from qlora_ref.memory.settings import PAPER, PEFT, Settings, flags, preset

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


MOE = {**TINY, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize("name", models.names())
def test_shapes_give_the_published_parameter_count(name):
    assert models.model(name).parameters() == models.published_parameters(name)


# An independent trace (bitsandbytes + PEFT on meta tensors) of the same models: 512 tokens, batch 1, r = 64, bf16
# adapters, fp32 states; given to three or four digits. Peaks in GB, categories in MB.
TRACED = {"llama-7b": 5.974, "llama-13b": 10.472, "llama-65b": 44.61, "llama-2-70b": 46.991}
TRACED_PARTS = {
    "llama-7b": (3238.0, 101.2, 524.3, 319.8, 1279.3, 311.8),
    "llama-13b": (6343.9, 198.2, 655.4, 500.7, 2002.8, 491),
    "llama-65b": (32380.0, 1011.9, 1048.6, 1599.1, 6396.3, 1583.0),
    "llama-2-70b": (34225.5, 1069.5, 1048.6, 1656.8, 6627.0, 1641),
}


@pytest.mark.parametrize("name", TRACED)
def test_peak_of_an_independent_trace(name):
    result = estimate(models.model(name), Settings())
    assert result.allocated / 1e9 == pytest.approx(TRACED[name], rel=5e-4)
    assert result.peak_phase == row.FIRST_LAYER
    names = (row.PACKED, row.LEVEL1, row.EMBEDDINGS, row.ADAPTERS, row.STATES, row.GRADIENTS)
    for category, megabytes in zip(names, TRACED_PARTS[name], strict=True):
        assert result.categories[category] / 1e6 == pytest.approx(megabytes, abs=0.6), category


def test_the_paper_fits_48_gb_and_peft_s_defaults_do_not():
    a = models.model("llama-65b")
    ecc, no_ecc = (card for card in cards.CARDS if card.name.startswith("48"))
    asked, paper = estimate(a, Settings()), estimate(a, preset(PAPER, Settings()))
    peft = estimate(a, preset(PEFT, Settings()), Margin(decoded=0))
    assert asked.needed < ecc.size and paper.needed < ecc.size
    assert ecc.size < peft.needed < no_ecc.size
    # The real bitsandbytes + PEFT stack, traced on meta tensors: 49.16 GB.
    assert peft.allocated / 1e9 == pytest.approx(49.16, rel=0.01)
    assert estimate(a, Settings(weights="bf16", train="full")).allocated > 780e9  # paper, section 1


def test_bits_of_a_weight():
    """4 + 8/64 + 32/(64 * 256) bits (paper, section 3); the mean of each matrix is the rest."""
    a = models.model("llama-65b")
    static = estimate(a, Settings()).static
    bits = 8 * (static[row.PACKED] + static[row.LEVEL1] + static[row.LEVEL2]) / a.quantizable_parameters()
    assert 0 <= bits - (4 + 8 / 64 + 32 / (64 * 256)) < 8 * 1024 / 8192**2


def test_constants_equal_those_of_the_code_they_describe():
    torch = pytest.importorskip("torch")
    from qlora_ref.cuda_linear import SCRATCH_BYTES
    from qlora_ref.optim import PagedAdamW

    assert Margin().decoded == SCRATCH_BYTES
    for name, bits in (("adamw32", 32), ("adamw8", 8)):
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (300_000, 1000, 2_000_001)]
        expected = state_bytes([(p.numel(), 1) for p in params], Settings(optimizer=name))
        for paging, pool, memory in (
            ("none", 512, {"device": expected, "host": 0}),
            ("cpu", 512, {"device": expected, "host": expected}),  # everything fits into the pool
            ("cpu", 4, {"device": 4 << 20, "host": expected}),
        ):
            optimizer = PagedAdamW(params, bits=bits, paging=paging, pool_bytes=pool << 20)
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            assert optimizer.memory() == memory


MORE = {  # a change that can only need more memory
    "seq": lambda s: replace(s, seq=2 * s.seq),
    "batch": lambda s: replace(s, batch=s.batch + 1),
    "rank": lambda s: replace(s, rank=2 * s.rank),
    "no double quantization": lambda s: replace(s, double_quant=False),
    "smaller blocks": lambda s: replace(s, block_size=32),
    "fp32 adapters": lambda s: replace(s, adapter_dtype="fp32"),
    "fp32 embeddings": lambda s: replace(s, embedding_dtype="fp32"),
    "accumulation": lambda s: replace(s, accumulate=4),
    "eager": lambda s: replace(s, attention="eager"),
    "dropout": lambda s: replace(s, dropout=0.1),
    "16-bit weights": lambda s: replace(s, weights="bf16", double_quant=False),
}


@given(
    name=st.sampled_from([n for n in models.names() if not n.startswith("t5")]),
    seq=st.integers(16, 8192),
    batch=st.integers(1, 8),
    rank=st.sampled_from([1, 8, 64]),
    paged=st.booleans(),
    change=st.sampled_from(sorted(MORE)),
)
@settings(max_examples=150, deadline=None)
def test_more_needs_more(name, seq, batch, rank, paged, change):
    base = Settings(seq=seq, batch=batch, rank=rank, paged=paged)
    a = models.model(name)
    assert estimate(a, MORE[change](base)).allocated >= estimate(a, base).allocated


@given(name=st.sampled_from(models.names()), seq=st.integers(16, 4096))
@settings(max_examples=40, deadline=None)
def test_paging_and_eight_bits_only_save(name, seq):
    a, base = models.model(name), Settings(seq=seq)
    whole, paged = estimate(a, base), estimate(a, replace(base, paged=True))
    assert paged.allocated <= whole.allocated
    assert estimate(a, replace(base, optimizer="adamw8")).allocated <= whole.allocated
    assert paged.host == state_bytes([(0, 1)], base) + whole.static[row.STATES] - _steps(a, base)


def _steps(a, s):
    return 512 * 2 * sum(count for _, count in a.linear_layers())


def test_checkpointing_saves_at_the_length_it_is_for():
    a, s = models.model("llama-65b"), Settings(seq=4096)
    assert estimate(a, replace(s, checkpointing=False)).allocated > 2 * estimate(a, s).allocated


def test_verdicts_are_at_the_edge():
    """The longest sequence fits and 16 tokens more do not; likewise the batch; the remedy makes it fit."""
    result = estimate(models.model("llama-33b"), Settings(seq=1024))
    for card in cards.CARDS:
        v = cards.verdict(result, card)
        needs = lambda **change: estimate(result.architecture, replace(result.settings, **change)).needed
        if v.longest_sequence:
            assert needs(seq=v.longest_sequence) <= card.size < needs(seq=v.longest_sequence + 16)
        if v.largest_batch:
            assert needs(batch=v.largest_batch) <= card.size < needs(batch=v.largest_batch + 1)
        assert v.fits == (v.slack >= 0)


def test_the_remedy_is_the_smallest():
    a, card = models.model("llama-65b"), cards.CARDS[3]
    s = Settings(adapter_dtype="fp32", embedding_dtype="fp32", dropout=0.05, checkpointing=False)
    remedy = cards.smallest_remedy(a, s, card, Margin())
    assert remedy == ("--paged", "--checkpointing")
    assert estimate(a, replace(s, paged=True, checkpointing=True)).needed <= card.size
    for change in cards.remedies(s):
        assert estimate(a, replace(s, **change)).needed > card.size  # no single flag would do
    assert cards.smallest_remedy(a, Settings(), cards.CARDS[0], Margin()) is None


def test_largest_is_a_search_for_the_edge():
    for edge in (0, 1, 2, 7, 63, 64, 100):
        assert cards.largest(lambda n, edge=edge: n <= edge, 64) == min(edge, 64)


def test_flags_name_what_changed():
    assert flags(Settings(paged=True, rank=8), Settings()) == ["--rank 8", "--paged"]
    assert flags(Settings(checkpointing=False), Settings()) == ["--no-checkpointing"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "no field 'hidden_size'"),
        ({"hidden_size": 8}, "no field 'model_type'"),
        ({**TINY, "model_type": "mamba"}, "model_type 'mamba'"),
        ({**TINY, "hidden_size": -1}, "must be a positive integer"),
        ({**TINY, "hidden_size": 250}, "not a multiple"),
        ({**TINY, "num_key_value_heads": 3}, "cannot share 3 key-value heads"),
        ({**TINY, "model_type": "mistral"}, "cannot share 8 key-value heads evenly, which transformers assumes"),
        ({**TINY, "model_type": ["llama"]}, "model_type '\\['llama'\\]'"),
        ({**TINY, "hidden_size": 10**30}, "no model has more than"),
        ({**TINY, "num_hidden_layers": 10**9}, "no model has more than 4,096"),
        ({**TINY, "head_dim": 0}, "head_dim = 0; it must be a positive integer"),
        ({**TINY, "tie_word_embeddings": "false"}, "must be true or false"),
        ({**MOE, "num_experts_per_tok": 9}, "cannot choose 9 of 8 experts"),
        ([1, 2], "not a JSON object"),
    ],
)
def test_a_config_that_cannot_be_used(config, message):
    with pytest.raises(ConfigError, match=message):
        from_config(config)


@pytest.mark.hf
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "t5"])
def test_fields_left_out_are_what_transformers_assumes(kind):
    auto = pytest.importorskip("transformers", reason="transformers is not installed").AutoConfig
    left_out = {**TINY, "model_type": kind, "hidden_size": 4096, "num_attention_heads": 32, "num_local_experts": 8,
                "num_experts_per_tok": 2}  # fmt: skip
    for field in FAMILIES[kind].get("absent", {}):
        left_out.pop(field, None)
    theirs = auto.for_model(**left_out)
    ours = from_config(left_out)
    assert (ours.heads, ours.kv_heads, ours.vocab, ours.tied) == (
        theirs.num_attention_heads, theirs.num_key_value_heads, theirs.vocab_size, theirs.tie_word_embeddings,
    )  # fmt: skip
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or ours.hidden // ours.heads)


def test_a_folder_and_a_vision_model_s_text_part(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": TINY}))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json")
    assert read_config(tmp_path).hidden == 256
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8-sig")
    assert read_config(tmp_path).hidden == 256
    for damaged in ("{", "[" * 100_000, json.dumps(TINY).replace("256", "9" * 5000)):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ConfigError, match="not valid JSON"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="There is no"):
        read_config(tmp_path / "absent")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq": 0}, "--seq 0"),
        ({"keep_products": True, "checkpointing": False}, "--keep-products is a kind of checkpointing"),
        ({"weights": "int3"}, "choose one of nf4"),
        ({"block_size": 48}, "power of two"),
        ({"train": "full"}, "4-bit weights are frozen"),
        ({"optimizer": "adamw8", "state_block": 100}, "straddle"),
        ({"paged": True, "pool_mib": 2}, "the pool needs"),
        ({"dropout": 1.0}, "--dropout"),
        ({"logits_chunk": -1}, "--logits-chunk"),
    ],
)
def test_settings_that_cannot_be_trained(values, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**values)


def test_targets_that_are_not_there_list_the_candidates():
    with pytest.raises(ConfigError, match="no linear layer c_attn.*q_proj"):
        estimate(models.model("llama-7b"), Settings(targets="c_attn"))


def test_the_estimate_needs_only_the_standard_library():
    """No torch, numpy or tabulate is loaded by the closed form."""
    code = (
        "import sys; from qlora_ref.memory import cards, estimate, models; "
        "from qlora_ref.memory.settings import Settings; "
        "estimate.estimate(models.model('llama-65b'), Settings()); "
        "print([m for m in ('torch', 'numpy', 'tabulate', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
