"""qlora_ref.compat.bitsandbytes beside the real one: same names, shapes and bytes, and code that runs unchanged."""

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF

import qlora_ref.compat.bitsandbytes as ours
from qlora_ref.optim import PagedAdamW

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed ([test] extra)")

F, B = ours.functional, theirs.functional
pytestmark = pytest.mark.bnb
KINDS = [(t, n) for t in ("nf4", "fp4") for n in (False, True)]
STORAGE = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def weights(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    "name",
    [
        *("quantize_4bit", "dequantize_4bit", "quantize_nf4", "quantize_fp4", "dequantize_nf4", "dequantize_fp4"),
        *("quantize_blockwise", "dequantize_blockwise", "gemv_4bit", "get_4bit_type", "create_dynamic_map"),
        *("create_linear_map", "create_normal_map", "create_fp8_map"),
    ],
)
def test_signatures_of_functions(name):
    assert parameters(getattr(F, name)) == parameters(getattr(B, name))


def test_signatures_of_classes():
    assert parameters(ours.matmul_4bit) == parameters(theirs.matmul_4bit)
    assert parameters(F.QuantState) == parameters(B.QuantState)
    for name in ("Linear4bit", "LinearNF4", "LinearFP4", "Embedding4bit", "EmbeddingNF4", "EmbeddingFP4"):
        assert parameters(getattr(ours.nn, name).__init__) == parameters(getattr(theirs.nn, name).__init__)
    assert parameters(ours.nn.Params4bit.__new__) == parameters(theirs.nn.Params4bit.__new__)
    for name in ours.optim.__all__:
        mine, peer = parameters(getattr(ours.optim, name).__init__), parameters(getattr(theirs.optim, name).__init__)
        mine, peer = dict(mine), dict(peer)
        assert list(mine)[: len(peer)] == list(peer)  # ours keep is_paged where their paged classes fix it
        assert all(mine[k] == v for k, v in peer.items() if k not in ("self", "is_paged"))


# --- quantize and dequantize --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_nf4_bytes_and_shapes(dtype, storage):
    x = weights(64, 128, dtype=dtype)
    (a, s), (b, t) = F.quantize_nf4(x, quant_storage=storage), B.quantize_nf4(x, quant_storage=storage)
    assert a.shape == b.shape and a.dtype == b.dtype == storage
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) and torch.equal(s.absmax, t.absmax)
    assert torch.equal(F.dequantize_nf4(a, s), B.dequantize_nf4(b, t))


@pytest.mark.parametrize("block", [32, 64, 128, 1024, 4096])
@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_either_decodes_what_the_other_wrote(quant_type, nested, block):
    x = weights(64, 4096 // 16, seed=block)
    for q, d in ((F, B), (B, F)):
        packed, state = q.quantize_4bit(x, blocksize=block, quant_type=quant_type, compress_statistics=nested)
        there = d.QuantState.from_dict(state.as_dict(packed=True), torch.device("cpu"))
        if block > 256:  # beside their AVX-512 path, which is wrong unless rows are whole blocks
            flat = x.numel() * torch.ones((), dtype=torch.long)
            there.shape = state.shape = torch.Size([int(flat)])
        a, b = (m.dequantize_4bit(packed, s).reshape(-1) for m, s in ((q, state), (d, there)))
        assert torch.equal(a, b)


def test_published_error_of_each_block_size():
    """Their suite's limits, mean + 7 sigma on N(0,1) at block 64: nf4 0.072798 +- 7.4e-5, fp4 0.096543."""
    x = weights(1024, 1024)
    for quant_type, limit in (("nf4", 0.072798 + 7 * 7.4e-5), ("fp4", 0.096543 + 7 * 9.8e-5)):
        packed, state = F.quantize_4bit(x, quant_type=quant_type)
        assert (F.dequantize_4bit(packed, state) - x).abs().mean() < limit


def test_out_arguments_and_missing_state():
    x = weights(8, 64)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    assert F.quantize_4bit(x, absmax, out, quant_type="nf4")[0] is out and torch.equal(out, packed)
    dense = torch.empty_like(x)
    assert F.dequantize_4bit(packed, absmax=absmax, out=dense, quant_type="nf4") is dense
    assert torch.equal(dense, F.dequantize_4bit(packed, state))
    with pytest.raises(ValueError, match="absmax and out"):
        F.dequantize_4bit(packed)


@pytest.mark.parametrize(
    ("kwargs", "match"), [({"blocksize": 48}, "invalid blocksize"), ({"quant_type": "int4"}, "quant_type must be")]
)
def test_refusals_of_quantize_4bit(kwargs, match):
    for module in (F, B):
        with pytest.raises(ValueError, match=match):
            module.quantize_4bit(weights(8, 64), **kwargs)
        with pytest.raises(ValueError, match="16/32-bit floats"):
            module.quantize_4bit(weights(8, 64).double())


def test_shapes_of_odd_rows_and_single_bytes():
    for shape in ((3, 33), (7,), (1, 2), (2, 3, 5), (0, 4)):
        packed, state = F.quantize_4bit(weights(*shape), quant_type="nf4")
        assert packed.shape == ((torch.Size(shape).numel() + 1) // 2, 1)
        assert F.dequantize_4bit(packed, state).shape == shape  # theirs transposes (1, 2) and adds an axis to (7,)
    packed, state = F.quantize_4bit(weights(8, 64), quant_type="nf4")
    assert F.dequantize_4bit(packed.t(), state).shape == (64, 8)


# --- 8 bits and the maps ------------------------------------------------------------------------------------


def test_maps():
    for name, arguments in (
        ("create_dynamic_map", [(), (False,), (True, 4, 4), (True, 6, 6), (True, 3, 4)]),
        ("create_fp8_map", [(), (True, 2, 1, 4), (True, 4, 3), (False, 4, 4)]),
        ("create_normal_map", [(), (0.9677083, False)]),
        ("create_linear_map", [(), (False,), (True, 2)]),
    ):
        for args in arguments:
            assert torch.equal(getattr(F, name)(*args), getattr(B, name)(*args)), (name, args)
    for name in ("nf4", "fp4"):
        assert torch.equal(F.get_4bit_type(name, "cpu"), B.get_4bit_type(name, "cpu"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockwise_is_nearest_and_decodes_theirs(nested, block, dtype):
    x = weights(100, 100, dtype=dtype)
    codes, state = F.quantize_blockwise(x, blocksize=block, nested=nested)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    back = F.dequantize_blockwise(codes, state)
    assert back.dtype == dtype and back.shape == x.shape
    peer_codes, peer = B.quantize_blockwise(x, blocksize=block, nested=nested)
    assert (codes != peer_codes).float().mean() < 0.01  # theirs is a table of 65,536 bins, not the nearest entry
    error, peer_error = ((m.dequantize_blockwise(c, s) - x).float().norm() for m, c, s in
                         ((F, codes, state), (B, peer_codes, peer)))  # fmt: skip
    assert error <= peer_error * 1.001 and back.float().sub(x.float()).abs().mean() < 0.011  # their limit
    if not nested:
        mine = F.QuantState(peer.absmax, code=peer.code, blocksize=block, dtype=dtype)
        assert torch.equal(F.dequantize_blockwise(peer_codes, mine), B.dequantize_blockwise(peer_codes, peer))


@pytest.mark.parametrize("bits", range(2, 9))
def test_few_bit_maps(bits):
    for code in (F.create_linear_map(True, bits), F.create_dynamic_map(True, bits if bits < 8 else 7, bits)):
        assert code.unique().numel() in (2**bits, 2**bits - 1)
        x = weights(1000).tanh()
        codes, state = F.quantize_blockwise(x, code=code, blocksize=64)
        scale = x.view(-1)[: 15 * 64].view(15, 64).abs().amax(1, keepdim=True)
        nearest = (x[: 15 * 64].view(15, 64, 1) / scale[..., None] - code.unique()).abs().amin(-1) * scale
        error = (F.dequantize_blockwise(codes, state) - x)[: 15 * 64].view(15, 64).abs()
        assert (error <= nearest + 2.0**-22 * scale).all()  # reciprocal, product, subtraction: ulps of the scale


# --- QuantState ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_as_dict_is_theirs_key_for_key(quant_type, nested):
    x = weights(32, 64, dtype=torch.bfloat16)
    _, a = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)
    _, b = B.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)
    if nested:
        a.offset = b.offset  # the mean: ours is summed in float64
    for packed in (False, True):
        a_dict, b_dict = a.as_dict(packed), b.as_dict(packed)
        assert list(a_dict) == list(b_dict)
        for key, value in a_dict.items():
            same = torch.equal(value, b_dict[key]) if torch.is_tensor(value) else value == b_dict[key]
            assert same or key in ("absmax", "nested_absmax")
    again = F.QuantState.from_dict({f"model.weight.{k}": v for k, v in a.as_dict(True).items()}, "cpu")
    assert again == a and again != F.QuantState(a.absmax) and a[3] == 64 and (a[4] is None) != nested
    assert torch.equal(
        getattr(a, f"bitsandbytes__{quant_type}"), a.as_dict(True)[f"quant_state.bitsandbytes__{quant_type}"]
    )


def test_from_dict_refuses_and_leaves_the_dict_alone():
    _, state = F.quantize_4bit(weights(8, 64), quant_type="nf4")
    packed = state.as_dict(packed=True)
    keys = list(packed)
    F.QuantState.from_dict(packed, "cpu")
    assert list(packed) == keys
    with pytest.raises(ValueError, match="found neither"):
        F.QuantState.from_dict({"absmax": state.absmax}, "cpu")
    with pytest.raises(ValueError, match="exactly one"):
        F.QuantState.from_dict({"quant_state.bitsandbytes__int4": packed["quant_state.bitsandbytes__nf4"]}, "cpu")
    with pytest.raises(ValueError, match="unknown items"):
        F.QuantState.from_dict({**packed, "weight.stray": state.absmax}, "cpu")


# --- products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_and_gradients(quant_type, nested, dtype, transposed):
    W, bias = weights(48, 96, dtype=dtype, seed=1), weights(48, dtype=dtype, seed=2)
    packed, state = F.quantize_4bit(W, quant_type=quant_type, compress_statistics=nested)
    W_dq = F.dequantize_4bit(packed, state)
    packed = packed.t() if transposed else packed
    results = []
    for call in (lambda x, b: ours.matmul_4bit(x, packed, state, bias=b), lambda x, b: TF.linear(x, W_dq, b)):
        x, b = weights(5, 7, 96, dtype=dtype).requires_grad_(), bias.clone().requires_grad_()
        y = call(x, b)
        y.backward(weights(5, 7, 48, dtype=dtype, seed=3))
        results.append((y.detach(), x.grad, b.grad))
    unit = torch.finfo(dtype).eps
    for a, b, terms in zip(*results, (96, 48, 35), strict=True):
        # the same weight; sums of `terms` products in another order, rounded to dtype at the end
        assert a.dtype == dtype and (a - b).abs().max() <= (2 * unit + terms * 2.0**-23) * 4 * b.abs().max()


def test_matmul_corners():
    packed, state = F.quantize_nf4(weights(48, 96))
    assert ours.matmul_4bit(torch.empty(0, 96), packed, state).shape == (0, 48)
    out = torch.empty(3, 48)
    assert ours.matmul_4bit(weights(3, 96), packed, state, out=out) is out
    assert torch.equal(F.gemv_4bit(weights(3, 96), packed, state=state), out)
    with pytest.raises(ValueError, match="quant_state is required"):
        ours.matmul_4bit(weights(3, 96), packed, None)
    with pytest.raises(ValueError, match="state cannot be None"):
        F.gemv_4bit(weights(1, 96), packed)
    wrong_way, wrong_state = F.quantize_nf4(weights(96, 48))
    with pytest.warns(DeprecationWarning, match=r"\[K, N\]"):
        assert ours.matmul_4bit(weights(3, 96), wrong_way, wrong_state).shape == (3, 48)


def test_identity_reads_the_weight_exactly():
    packed, state = F.quantize_4bit(weights(64, 128), quant_type="nf4", compress_statistics=True)
    assert torch.equal(F.gemv_4bit(torch.eye(128), packed, state=state).t(), F.dequantize_4bit(packed, state))


# --- modules ------------------------------------------------------------------------------------------------


def linear4bit(package, linear, **kwargs):
    layer = package.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **kwargs)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_linear_serialization(quant_type, nested, storage):
    linear = torch.nn.Linear(64, 48)
    kwargs = dict(quant_type=quant_type, compress_statistics=nested, quant_storage=storage)
    layer, peer = linear4bit(ours, linear, **kwargs), linear4bit(theirs, linear, **kwargs)
    assert layer.weight.dtype == storage and layer.weight.bnb_quantized
    state, peer_state = layer.state_dict(), peer.state_dict()
    assert list(state) == list(peer_state)  # shapes too, but for the JSON, whose length is that of a printed mean
    assert all(state[k].shape == peer_state[k].shape for k in state if "bitsandbytes__" not in k)

    x = weights(5, 64)
    fresh = ours.nn.Linear4bit(64, 48, **kwargs)
    fresh.load_state_dict(state)  # theirs: "Unexpected key(s)" (bitsandbytes#1946)
    assert torch.equal(fresh(x), layer(x)) and fresh.weight.quant_state == layer.weight.quant_state
    from_peer = ours.nn.Linear4bit(64, 48, **kwargs)
    from_peer.load_state_dict(peer_state)
    assert torch.equal(
        F.dequantize_4bit(from_peer.weight.data, from_peer.quant_state),
        B.dequantize_4bit(peer.weight.data, peer.weight.quant_state),
    )
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    weight = ours.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert torch.equal(weight.data.view(torch.uint8), layer.weight.data.view(torch.uint8))  # floats may be NaN
    assert weight.quant_state == layer.weight.quant_state


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
@pytest.mark.parametrize("quantized", [False, True])
def test_params_copy_and_pickle(duplicate, quantized):
    p = ours.nn.Params4bit(weights(4, 64), quant_type="nf4")
    p = p.to("cpu") if quantized else p
    q = duplicate(p)
    assert type(q) is ours.nn.Params4bit and torch.equal(p, q) and q.bnb_quantized == quantized
    assert (q.quant_state is p.quant_state) == (duplicate is copy.copy or not quantized)
    assert (q.data_ptr() == p.data_ptr()) == (duplicate is copy.copy)
    assert q.quant_state == p.quant_state and q.blocksize == 64 and q.quant_type == "nf4" and not q.requires_grad


@pytest.mark.parametrize("quantized", [False, True])
def test_modules_copy_and_pickle(quantized):
    layer, x = ours.nn.LinearNF4(64, 32), weights(3, 64)
    layer = layer.to("cpu") if quantized else layer
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.weight.module is again and again.weight is not layer.weight
        again.to("cpu")
        assert again.quant_state is not None and (layer.quant_state is not None) == quantized
        if quantized:
            assert torch.equal(again(x), layer(x))


def test_params_chunks_forwarding_and_casts():
    p = ours.nn.Params4bit(weights(4, 64), quant_type="nf4", compress_statistics=True).to("cpu")
    for pieces in (torch.chunk(p, 2), torch.split(p, 64)):
        assert all(type(c) is ours.nn.Params4bit and c.quant_state is p.quant_state for c in pieces)
    assert torch.equal(p.absmax, p.quant_state.absmax) and torch.equal(p.quant_map, p.quant_state.code)
    assert torch.equal(p.nested_absmax, p.quant_state.state2.absmax)
    with pytest.raises(AttributeError):
        ours.nn.Params4bit(weights(4, 64)).absmax  # noqa: B018
    layer = linear4bit(ours, torch.nn.Linear(64, 8), quant_type="nf4", quant_storage=torch.bfloat16)
    x, before = weights(3, 64), layer.weight.clone()
    y = layer(x)
    layer.to(torch.float32)  # theirs casts bf16 storage, which destroys the codes
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8)) and torch.equal(layer(x), y)


def test_eval_forward_leaves_the_layer_alone():
    """Theirs repacks the weight in place where the CPU has AVX512-BF16; the next gradient is then missing."""
    layer = linear4bit(ours, torch.nn.Linear(64, 32), quant_type="nf4").eval()
    before = layer.weight.clone()
    with torch.no_grad():
        layer(weights(3, 64))
    assert torch.equal(layer.weight, before)
    x = weights(3, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_not_quantized_yet_is_a_sentence():
    with pytest.raises(RuntimeError, match=r"\.to\(device\)"):
        ours.nn.LinearNF4(64, 32)(weights(1, 64))


@pytest.mark.parametrize("cls", ["EmbeddingNF4", "EmbeddingFP4"])
@pytest.mark.parametrize("width", [64, 72])
def test_embeddings(cls, width, caplog):
    table = torch.nn.Embedding(50, width)
    layer = getattr(ours.nn, cls)(50, width)
    assert ("not divisible by block size" in caplog.text) == (width == 72)
    layer.load_state_dict(table.state_dict())
    layer.to("cpu")
    dense = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    ids = torch.tensor([[0, 3], [49, 3]])
    assert torch.equal(layer(ids), dense[ids]) and layer(ids).shape == (2, 2, width)
    again = getattr(ours.nn, cls)(50, width)
    again.load_state_dict(layer.state_dict())  # theirs: NotImplementedError
    assert torch.equal(again(ids), layer(ids))


def test_compiles_without_a_graph_break():
    layer = linear4bit(ours, torch.nn.Linear(64, 32), quant_type="nf4", compress_statistics=True)
    x = weights(3, 64)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_parametrized_experts():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weights(4, 32, 64))

        def forward(self, x, i):
            return x @ self.weight[i]

    replace = ours.nn.parametrize.replace_parameter_4bit
    experts, x = Experts(), weights(3, 32)
    expected = F.dequantize_4bit(*F.quantize_4bit(experts.weight.data, quant_type="nf4"))
    replace(experts, "weight", quant_type="nf4")
    assert torch.equal(experts.weight, expected) and torch.equal(experts(x, 1), x @ expected[1])
    state = experts.state_dict()
    assert {"weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"} == set(state)
    again = Experts()
    again.weight = torch.nn.Parameter(state.pop("weight"), requires_grad=False)
    stats = {k.removeprefix("weight."): v for k, v in state.items()}
    ours.nn.parametrize.replace_parameter_4bit_prequantized(again, "weight", stats, torch.device("cpu"))
    assert torch.equal(again.weight, expected)
    with pytest.raises(AttributeError, match="does not have parameter 'nothing'"):
        replace(Experts(), "nothing")
    experts.plain = weights(3)
    with pytest.raises(TypeError, match="'plain' is not an instance"):
        replace(experts, "plain")


# --- optimizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ours.optim.__all__)
def test_optimizers_follow_torch(name):
    p, q = (weights(128, 64).requires_grad_() for _ in range(2))
    optimizer = getattr(ours.optim, name)([p], lr=1e-3)
    assert isinstance(optimizer, PagedAdamW) and optimizer.layout.bits == (8 if "8bit" in name else 32)
    decay = 1e-2 if "AdamW" in name else 0.0
    reference = torch.optim.AdamW([q], lr=1e-3, weight_decay=decay, fused=True)
    for step in range(5):
        p.grad, q.grad = (weights(128, 64, seed=step + 10) for _ in range(2))
        optimizer.step(), reference.step()
    if "8bit" in name:
        # five steps of at most lr each; 8-bit moments may turn a step, and never by more than its own length
        assert (p - q).abs().mean() < 1e-3 and not torch.equal(p, q)
    else:
        assert torch.equal(p, q)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    r = p.detach().clone().requires_grad_()
    again = getattr(ours.optim, name)([r], lr=1e-3)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for x in (p, r):
        x.grad = weights(128, 64, seed=99)
    optimizer.step(), again.step()
    assert torch.equal(p, r)


def test_optimizer_refusals():
    p = [torch.nn.Parameter(torch.ones(4))]
    with pytest.raises(ValueError, match="amsgrad"):
        ours.optim.AdamW(p, amsgrad=True)
    with pytest.raises(ValueError, match="optim_bits"):
        ours.optim.AdamW8bit(p, optim_bits=8)
    assert ours.optim.AdamW(p, optim_bits=8).layout.bits == 8


# --- unmodified programs ------------------------------------------------------------------------------------


def run(code, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "python")}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.hf
def test_stock_transformers_and_peft_run_on_the_installed_alias(tmp_path):
    pytest.importorskip("peft")
    from hf_models import llama, saved

    code = """
import sys
import qlora_ref.compat.bitsandbytes as ours
ours.install()
import bitsandbytes, torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
assert bitsandbytes is ours
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
assert type(model.model.layers[0].mlp.up_proj) is ours.nn.Linear4bit
ids = torch.arange(3, 23)[None]
logits = model(ids).logits
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2])
assert torch.equal(again(ids).logits, logits)
peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
assert any("lora.bnb" in type(m).__module__ for m in peft.modules())
peft(ids, labels=ids).loss.backward()
assert sum(p.grad is not None for p in peft.parameters()) == 28
"""
    done = run(code, saved(llama(), tmp_path / "base"), str(tmp_path / "bnb"))
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():  # and the real one reads what was saved
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
        assert isinstance(model.model.layers[0].mlp.up_proj, theirs.nn.Linear4bit)


def test_install_beside_the_real_one_is_refused():
    with pytest.raises(RuntimeError, match="already imported"):
        ours.install()
