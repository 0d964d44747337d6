"""What only a card can show: real sizes, streams, graphs, indices past 2^31, the scratch under checkpointing.

Small cases of every op on the card are in tests/test_parity.py; here are the properties that need more.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora_ref import native
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.ops import _REFERENCE
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.reference.codebook import get_codebook
from qlora_ref.testing.compare import ACCUMULATE_CUDA, assert_bits_equal, gamma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda is None, reason=f"no CUDA kernels: {native.missing['cuda']}"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
SHAPES = ((4096, 14336), (1024, 4096), (1000, 4128))  # a Llama layer, a small one, rows that blocks straddle
GIB = 2**30


def weight(rows, cols, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (0.02 * torch.randn(rows, cols, generator=generator, device="cuda")).to(dtype)


def need_memory(nbytes):
    free, _ = torch.cuda.mem_get_info()
    if free < nbytes:
        pytest.skip(f"{free / GIB:.1f} GiB are free on the GPU; this test wants {nbytes / GIB:.1f}")


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_and_dequantize_at_real_sizes(shape, dtype):
    """Against the reference on the same card: equal bits of codes, absmax, second level, weights in three dtypes."""
    x = weight(*shape, dtype)
    packed, absmax = torch.ops.qlora_ref.quantize_4bit(x, "nf4", 64)
    for ours, expected in zip((packed, absmax), _REFERENCE["quantize_4bit"](x, "nf4", 64), strict=True):
        assert_bits_equal(ours, expected)
    q = QuantizedTensor.quantize(x)
    for out in (torch.bfloat16, torch.float16, torch.float32):
        expected = _REFERENCE["dequantize_4bit"](*q.op_args(), shape, out)
        assert_bits_equal(q.dequantize(out), expected, f"{out}")


@DTYPES
def test_both_levels_in_one_kernel_at_real_sizes(dtype):
    """3584 nested groups at once, with the tensor's own mean: the bytes of the two kernels; and in a graph."""
    x = weight(4096, 14336, dtype)
    two = QuantizedTensor.quantize(x)
    one = QuantizedTensor.quantize(x, absmax_mean=two.absmax_mean)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.qlora_ref.quantize_4bit_nested(x, two.absmax_mean, "nf4", 64, "dynamic", 256)
    graph.replay()
    for c, name in zip(captured, ("packed", "absmax", "nested_absmax"), strict=True):
        assert_bits_equal(getattr(one, name), getattr(two, name), name)
        assert_bits_equal(c, getattr(two, name), f"{name}, captured")


@DTYPES
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_misaligned_storage(offset, dtype):
    """Slices that 16-byte accesses cannot reach, in and out: a card faults on a misaligned vector."""
    x = weight(1, 300 * 64 + 37, dtype)[0]
    shifted = torch.empty(x.numel() + offset, dtype=dtype, device="cuda")[offset:].copy_(x)
    expected, ours = (torch.ops.qlora_ref.quantize_4bit(t, "nf4", 64) for t in (x, shifted))
    for e, o in zip(expected, ours, strict=True):
        assert_bits_equal(o, e)
    packed, absmax = expected
    tables = get_codebook("nf4", 64), 64, None, 256
    codes = torch.empty(packed.numel() + offset, dtype=torch.uint8, device="cuda")[offset:].copy_(packed)
    out = torch.empty(x.numel() + offset, dtype=dtype, device="cuda")[offset:]
    native.cuda.dequantize_4bit(codes, absmax, None, None, *tables, x.shape, dtype, out=out)
    assert_bits_equal(out, native.cuda.dequantize_4bit(packed, absmax, None, None, *tables, x.shape, dtype))
    rows = torch.ops.qlora_ref.quantize_4bit(weight(64, 96), "nf4", 64)
    inputs = weight(2, 96, dtype)
    moved = [
        torch.empty(t.numel() + offset, dtype=t.dtype, device="cuda")[offset:].copy_(t)
        for t in (rows[0], inputs.flatten())
    ]
    y = torch.ops.qlora_ref.linear_4bit(
        moved[1].view(2, 96), moved[0], rows[1], None, None, "nf4", 64, "dynamic", 256, 64, None
    )
    expected, bound = float64_linear(
        inputs, QuantizedTensor(*rows, None, None, QuantConfig(double_quant=False), torch.Size((64, 96)), dtype), None
    )
    assert ((y.double() - expected).abs() <= bound).all()


def float64_linear(x, q, bias):
    """(y64, bound) on the card: the bound of testing/compare.py for one product and one rounding."""
    W = q.dequantize(x.dtype).double()
    y = x.double() @ W.T
    size = x.double().abs() @ W.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    u_out = torch.finfo(x.dtype).eps / 2
    error = gamma(x.shape[1] + 1, ACCUMULATE_CUDA) * size
    return y, error * (1 + u_out) + u_out * y.abs() + torch.finfo(x.dtype).tiny


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_for_every_few_tokens(shape, dtype):
    rows, cols = shape
    q = QuantizedTensor.quantize(weight(rows, cols))
    bias = weight(1, rows, dtype)[0]
    for tokens in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33):
        x = torch.randn(tokens, cols, device="cuda").to(dtype)
        y = torch.ops.qlora_ref.linear_4bit(x, *q.op_args(), rows, bias)
        expected, bound = float64_linear(x, q, bias)
        worst = ((y.double() - expected).abs() / bound).max().item()
        assert worst <= 1, f"{tokens} tokens: {worst:.3g} times the rounding bound"
        again = torch.ops.qlora_ref.linear_4bit(x, *q.op_args(), rows, bias)
        assert_bits_equal(again, y, f"{tokens} tokens, second run")


@DTYPES
def test_one_weight_whatever_the_batch(dtype):
    """Rows of the identity read W' out of the fused kernel: the very bits of dequantize, for every number of tokens."""
    q = QuantizedTensor.quantize(weight(1000, 4128))
    W = q.dequantize(dtype)
    for tokens in (1, 5, 8, 16, 32, 64):
        x = torch.eye(4128, dtype=dtype, device="cuda")[100 : 100 + tokens]
        y = torch.ops.qlora_ref.linear_4bit(x, *q.op_args(), 1000, None)
        assert_bits_equal(y.T.contiguous(), W[:, 100 : 100 + tokens].contiguous(), f"{tokens} tokens")


def lora_layer(rows=512, cols=768, rank=16, dtype=torch.bfloat16):
    linear = torch.nn.Linear(cols, rows, bias=False, device="cuda", dtype=dtype)
    layer = LoRALinear(Linear4bit.from_linear(linear), rank, 2 * rank)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


@pytest.mark.parametrize("tokens", [4, 200], ids=["few", "many"])
def test_other_stream(tokens):
    """Work queued on a side stream behind slow work there: a kernel on another stream would read too early."""
    layer, stream = lora_layer(), torch.cuda.Stream()
    x = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    q = QuantizedTensor.quantize(x)
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y, q_late = layer(late), QuantizedTensor.quantize(late, check_finite=False)
    stream.synchronize()
    assert_bits_equal(y, expected)
    assert_bits_equal(q_late.packed, q.packed)
    assert_bits_equal(q_late.nested_absmax, q.nested_absmax)


@pytest.mark.parametrize("tokens", [1, 4, 32, 200])
def test_graph_capture(tokens):
    """A captured forward and backward replays with new inputs; what the scratch kept before must not leak into it."""
    layer = lora_layer()
    x = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)

    def step():
        x.grad = layer.lora_A.grad = layer.lora_B.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
        captured = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.normal_()
            dy.normal_()
        lora_layer()(torch.randn(200, 768, device="cuda", dtype=torch.bfloat16))  # another weight into the scratch
        graph.replay()
        replayed = [t.clone() for t in (y, *captured)]
        eager = [step(), x.grad, layer.lora_A.grad, layer.lora_B.grad]
        for name, a, e in zip(("y", "dx", "dA", "dB"), replayed, eager, strict=True):
            assert_bits_equal(a, e.detach(), f"{name}, seed {seed}")


def test_quantization_is_capturable():
    x = weight(256, 512)
    expected = torch.ops.qlora_ref.quantize_4bit(x, "nf4", 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.qlora_ref.quantize_4bit(x, "nf4", 64)
    graph.replay()
    for c, e in zip(captured, expected, strict=True):
        assert_bits_equal(c, e)


@pytest.mark.filterwarnings("ignore:.*ynchronization debug mode")
def test_no_hidden_synchronization():
    layer = lora_layer()
    for tokens in (1, 200):
        x = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()  # first use: tables travel to the card
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = layer(x)
            y.backward(torch.ones_like(y))
            layer.base_layer.dequantize()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_indices_beyond_two_to_the_31():
    """2^31 + 8192 + 5 weights: the end of a huge tensor equals the same elements quantized alone."""
    n = 2**31 + 8192 + 5
    need_memory(14 * GIB)
    start = (n // 64 - 300) * 64  # a block start near the end
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[start:] = weight(1, n - start)[0]
    packed, absmax = torch.ops.qlora_ref.quantize_4bit(x, "nf4", 64)
    tail_packed, tail_absmax = torch.ops.qlora_ref.quantize_4bit(x[start:].clone(), "nf4", 64)
    assert_bits_equal(packed[start // 2 :], tail_packed)
    assert_bits_equal(absmax[start // 64 :], tail_absmax)
    tables = get_codebook("nf4", 64), 64, None, 256
    del x
    out = native.cuda.dequantize_4bit(packed, absmax, None, None, *tables, (n,), torch.bfloat16)
    expected = native.cuda.dequantize_4bit(tail_packed, tail_absmax, None, None, *tables, (n - start,), torch.bfloat16)
    assert_bits_equal(out[start:], expected)
    assert not out[: start : 2**20].any()


def test_autograd_saves_no_decoded_weight():
    layer = lora_layer(4096, 4096)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    weight_bytes, others = 4096 * 4096 // 2, 64 * 4096 * 2 + 2 * 16 * 4096 * 4
    assert sum(saved.values()) < 1.2 * (weight_bytes + others), "more than the packed weight and small tensors is saved"


def test_checkpointing_decodes_twice(monkeypatch):
    """Equal gradients with and without checkpointing; the backward takes what the recomputation decoded."""
    layer = lora_layer()
    x = torch.randn(200, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def gradients(run):
        x.grad = layer.lora_A.grad = layer.lora_B.grad = None
        run(x).float().pow(2).sum().backward()
        return x.grad, layer.lora_A.grad, layer.lora_B.grad

    expected = gradients(layer)
    decoded = []
    dequantize = native.cuda.dequantize_4bit
    monkeypatch.setattr(native.cuda, "dequantize_4bit", lambda *a, **k: (decoded.append(1), dequantize(*a, **k))[1])
    native.cuda.scratch.clear()
    for a, e in zip(gradients(lambda x: checkpoint(layer, x, use_reentrant=False)), expected, strict=True):
        assert_bits_equal(a, e)
    assert len(decoded) == 2  # the forward, and the recomputation


def test_mistakes_are_sentences():
    q = QuantizedTensor.quantize(weight(64, 128))
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match="device|cuda"):
        torch.ops.qlora_ref.linear_4bit(x, *q.op_args(), 64, None)
    with pytest.raises(ValueError, match=r"move .*\.to\(\)"):
        torch.ops.qlora_ref.linear_4bit(x.cuda(), q.packed, q.absmax.cpu(), *q.op_args()[2:], 64, None)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        torch.ops.qlora_ref.quantize_4bit(torch.zeros(64, dtype=torch.int32, device="cuda"), "nf4", 64)
    with pytest.raises(ValueError, match="elements"):
        torch.ops.qlora_ref.linear_4bit(x.cuda(), q.packed[:-1], *q.op_args()[1:], 64, None)
    strided = torch.randn(2, 256, dtype=torch.bfloat16, device="cuda")[:, ::2]  # copied, not misread
    y = torch.ops.qlora_ref.linear_4bit(strided, *q.op_args(), 64, None)
    assert_bits_equal(y, torch.ops.qlora_ref.linear_4bit(strided.contiguous(), *q.op_args(), 64, None))
    assert torch.isfinite(torch.randn(4, device="cuda")).all(), "the context is broken"


@pytest.mark.bnb
@pytest.mark.parametrize("double_quant", [False, True], ids=["flat", "nested"])
def test_bitsandbytes_decodes_our_bytes(double_quant):
    """bf16: the same codes, and the same weights from them, as bitsandbytes' CUDA kernels give."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = weight(512, 1024)
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    q = QuantizedTensor.quantize(x, QuantConfig(double_quant=double_quant))
    assert_bits_equal(q.packed, codes.view(-1))
    if not double_quant:
        assert_bits_equal(q.dequantize(torch.bfloat16), functional.dequantize_4bit(codes, state))
