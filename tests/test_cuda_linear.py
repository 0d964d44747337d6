"""cuda_linear.py on CPU tensors: dispatch, the adapter inside the product, the scratch. The kernels are emulated."""

import pytest
import torch

from emulated_cuda import CXX, EmulatedCudaBackend, as_tuple, launchers, run
from qlora_ref.cuda_linear import FUSED_TOKENS, Scratch, fused_tokens, padded_rank, unusable
from qlora_ref.quantized import QuantizedTensor
from qlora_ref.testing.cases import BOUND, cases
from qlora_ref.testing.compare import ACCUMULATE_CPU, assert_bits_equal, assert_within_bound, bounds

needs_cxx = pytest.mark.skipif(CXX is None, reason="g++ is not installed, so the kernels cannot be emulated")


@pytest.fixture
def backend() -> EmulatedCudaBackend:
    launchers().set_device(9, 4)
    return EmulatedCudaBackend(launchers())


def assert_in_class(op, actual, arguments):
    """Within the rounding bound. (The products are torch's own here, in another order: "twice torch" says nothing.)"""
    for out, (name, value, bound) in zip(as_tuple(actual), bounds(op, arguments, ACCUMULATE_CPU), strict=True):
        assert_within_bound(out, out, value, bound, f"{op} {name}")


SMALL = [c for c in cases() if c.parity == BOUND and c.params["n"] * c.params["k"] < 2**15]


@needs_cxx
@pytest.mark.parametrize("case", [c for c in SMALL if "quant_type" not in c.params], ids=lambda c: c.id)
def test_bound(case, backend):
    """Every linear op, few tokens and many, within its rounding bound."""
    assert_in_class(case.op, run(backend, case.op, case.arguments()), case.arguments())


def lora_arguments(tokens, rows, cols, rank, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = QuantizedTensor.quantize(torch.randn(rows, cols, generator=generator)).op_args()
    x, dy = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (cols, rows))
    A, B = torch.randn(rank, cols, generator=generator) / cols**0.5, torch.randn(rows, rank, generator=generator)
    bias = torch.randn(rows, generator=generator).to(dtype)
    return x, dy, weight, bias, A, B


@needs_cxx
@pytest.mark.parametrize("rank", [1, 5, 8, 16])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)], ids=["wide", "tall", "square"])
def test_both_ways_to_add_the_adapter(shape, rank, backend):
    """x wider than y takes `addmm_`, x not wider the extended product; forward and backward choose oppositely."""
    rows, cols = shape
    x, dy, weight, bias, A, B = lora_arguments(50, rows, cols, rank)
    forward = (x, *weight, rows, bias, A, B, 0.25)
    assert_in_class("lora_linear_4bit", run(backend, "lora_linear_4bit", forward), forward)
    backward = (dy, x, *weight, A, B, 0.25, True)
    outputs = run(backend, "lora_linear_4bit_backward", backward)
    assert_in_class("lora_linear_4bit_backward", outputs, backward)
    assert outputs[1].dtype == A.dtype and outputs[2].dtype == B.dtype


@needs_cxx
def test_autocast_changes_nothing_inside(backend):
    """The caller chose x's dtype: a float32 op under bf16 autocast stays float32, bit for bit."""
    x, dy, weight, bias, A, B = lora_arguments(40, 96, 64, 8)
    calls = {
        "linear_4bit": (x, *weight, 96, bias),
        "linear_4bit_backward": (dy, *weight, 64),
        "lora_linear_4bit": (x, *weight, 96, bias, A, B, 0.25),
        "lora_linear_4bit_backward": (dy, x, *weight, A, B, 0.25, True),
    }
    for op, arguments in calls.items():
        expected = as_tuple(run(backend, op, arguments))
        with torch.autocast("cpu", torch.bfloat16):
            actual = as_tuple(run(backend, op, arguments))
        for a, e in zip(actual, expected, strict=True):
            assert_bits_equal(a, e, op)


@pytest.fixture
def decoded(backend, monkeypatch) -> list:
    """Grows by one with each dequantization."""
    calls: list = []
    dequantize = backend.dequantize_4bit
    monkeypatch.setattr(backend, "dequantize_4bit", lambda *a, **k: (calls.append(1), dequantize(*a, **k))[1])
    return calls


@needs_cxx
def test_scratch_serves_the_backward(backend, decoded):
    """Forward, then backward: one dequantization, and the scratch is empty again. A second backward decodes anew."""
    x, dy, weight, bias, A, B = lora_arguments(40, 96, 64, 8)
    backward = (dy, x, *weight, A, B, 0.25, True)
    run(backend, "lora_linear_4bit", (x, *weight, 96, bias, A, B, 0.25))
    assert backend.scratch.nbytes == (96 + 8) * (64 + 8) * 4
    first = run(backend, "lora_linear_4bit_backward", backward)
    assert len(decoded) == 1 and backend.scratch.nbytes == 0
    second = run(backend, "lora_linear_4bit_backward", backward)
    assert len(decoded) == 2 and backend.scratch.nbytes == 0
    for a, b in zip(first, second, strict=True):
        assert_bits_equal(a, b, "the reused weight gave other bits than a fresh one")


@needs_cxx
@pytest.mark.parametrize("which", range(4), ids=["packed", "codes", "nested_absmax", "mean"])
def test_scratch_notices_a_changed_weight(which, backend, decoded):
    """Whatever part of the weight changes in place after the forward, the backward decodes the new one."""
    x, dy, weight, bias, A, B = lora_arguments(40, 96, 64, 8)
    run(backend, "lora_linear_4bit", (x, *weight, 96, bias, A, B, 0.25))
    weight[which].copy_(weight[which].flip(0) if which < 2 else weight[which] * 2)
    backward = (dy, x, *weight, A, B, 0.25, True)
    after = run(backend, "lora_linear_4bit_backward", backward)
    expected = run(EmulatedCudaBackend(backend._c), "lora_linear_4bit_backward", backward)
    assert_bits_equal(after[0], expected[0], "a stale decoded weight was used")
    assert len(decoded) == 2


@needs_cxx
def test_scratch_never_takes_another_tensor_for_the_same(backend):
    """A freed weight's address may come back with other contents: the scratch holds the tensor, so it cannot."""
    for seed in range(4):
        x, dy, weight, bias, A, B = lora_arguments(40, 96, 64, 8, seed=seed)
        backward = (dy, x, *weight, A, B, 0.25, True)
        after = run(backend, "lora_linear_4bit_backward", backward)
        fresh = run(EmulatedCudaBackend(backend._c), "lora_linear_4bit_backward", backward)
        assert_bits_equal(after[0], fresh[0], f"seed {seed}")
        run(backend, "lora_linear_4bit", (x, *weight, 96, bias, A, B, 0.25))
        del weight, x, dy, backward


def test_scratch_budget():
    """The oldest out first; the last one stays even if it alone is over the budget."""
    scratch = Scratch(budget=100)
    weights = [(torch.zeros(4),) for _ in range(4)]
    for w in weights[:3]:
        scratch.make_room(40)
        scratch.keep(w, ("k",), torch.zeros(10))
        assert scratch.nbytes <= 100
    assert scratch.take(weights[0], ("k",)) is None
    assert scratch.take(weights[1], ("k",)) is not None and scratch.take(weights[1], ("k",)) is None
    scratch.make_room(400)
    scratch.keep(weights[3], ("k",), torch.zeros(100))
    assert scratch.nbytes == 400 and scratch.take(weights[2], ("k",)) is None
    scratch.clear()
    assert scratch.nbytes == 0


def test_dispatch_table():
    for dtype in FUSED_TOKENS:
        assert FUSED_TOKENS[dtype].keys() >= {0}, "every card must find a row"
        for major in (7, 8, 9, 10, 12):
            assert 0 < fused_tokens(dtype, major, 4096) <= 32  # the kernel's limit, kLinearMaxTokens
            assert fused_tokens(dtype, major, 4100) == 0
    assert fused_tokens(torch.float64, 9, 4096) == 0
    assert [padded_rank(r) for r in (1, 8, 9, 64)] == [8, 8, 16, 64]


ARCHS = "75-real 80-real 86-real 89-real 90a-real 100-real 120-real 120-virtual"


def test_which_cards_a_build_serves():
    for capability in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121, 130):
        assert unusable(ARCHS, [capability], 13000, 13000) == "", capability
    for capability in (61, 70, 72, 110):
        sentence = unusable(ARCHS, [90, capability], 13000, 13000)
        assert f"{capability // 10}.{capability % 10}" in sentence and "QLORA_CUDA_ARCHS" in sentence
    assert unusable("90", [120], 13000, 13000) == ""  # neither real nor virtual: both
    assert unusable("90a-real", [100], 13000, 13000)


def test_an_old_driver_is_named():
    sentence = unusable(ARCHS, [90], 12080, 13000)
    assert "12.8" in sentence and "13.0" in sentence and "driver" in sentence
    assert unusable(ARCHS, [90], 13010, 13000) == unusable(ARCHS, [90], 13000, 13010) == ""
