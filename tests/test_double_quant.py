"""Double quantization: the 8-bit map, the two-rounding rule, and the guard against negative absmax."""

import hashlib

import pytest
import torch

from qlora_ref import ops
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.reference.blockwise import quantize_blockwise
from qlora_ref.reference.codebook import get_codebook
from qlora_ref.reference.double_quant import (
    absmax_mean,
    count_below,
    double_dequantize,
    double_quantize,
    dynamic_map,
    get_map8,
)
from qlora_ref.testing.compare import assert_bits_equal

# sha256 of bitsandbytes' create_dynamic_map, little-endian float32
GOLDEN = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}
MAPS = ["dynamic", "fp8_e4m3"]


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes_map(signed):
    assert hashlib.sha256(dynamic_map(signed).numpy().tobytes()).hexdigest() == GOLDEN[signed]


@pytest.mark.parametrize("name", [*MAPS, "dynamic_unsigned"])
def test_maps_are_sound(name):
    m = get_map8(name)
    distinct = torch.unique(m.levels)
    assert m.levels[m.zero_code] == 0 and m.levels.max() == 1 and torch.all(m.levels[1:] >= m.levels[:-1])
    assert torch.equal(m.levels[count_below(distinct, m.thresholds)], distinct), "an entry must encode to itself"


def test_fp8_map_holds_the_e4m3_values():
    m = get_map8("fp8_e4m3")
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.unique(values[values.isfinite()])
    assert len(values) == 253 and torch.equal(torch.unique(m.levels), values / 448)


@pytest.mark.parametrize("name", MAPS)
def test_nearest_entry(name):
    """Against argmin in float64, for values that are not at a midpoint."""
    m = get_map8(name)
    s = torch.linspace(-1, 1, 10001)
    distance = (s.double()[:, None] - m.levels.double()).abs()
    chosen = (s.double() - m.levels[count_below(s, m.thresholds)].double()).abs()
    assert torch.all(chosen <= distance.min(1).values + 2.0**-24)


def test_bits_per_weight_of_the_paper():
    """Section 3: 32/64 = 0.5 bit becomes 8/64 + 32/(64 * 256) = 0.127 bit."""
    assert QuantConfig().bits_per_weight() == 4 + 8 / 64 + 32 / (64 * 256)
    q = QuantizedTensor.quantize(torch.randn(256, 4096))
    assert q.nbytes - 4 == 256 * 4096 * QuantConfig().bits_per_weight() / 8  # 4: the bytes of the mean


@pytest.mark.parametrize("name", MAPS)
def test_relative_error_of_the_absmax_is_half_a_step(name):
    """|absmax' - absmax| <= half the widest gap of the map times the group's largest deviation, plus two roundings."""
    absmax = torch.randn(10000, 64, generator=torch.Generator().manual_seed(0)).abs().amax(1)
    mean = absmax_mean(absmax)
    m = get_map8(name)
    codes, nested = double_quantize(absmax, mean, m)
    error = (double_dequantize(codes, nested, mean, m) - absmax).abs()
    levels = torch.unique(m.levels)
    gap = max((levels[1:] - levels[:-1]).max() / 2, levels[0] + 1)  # also below the lowest entry
    assert torch.all(error <= gap * nested.repeat_interleave(256)[:10000] + 2.0**-23 * absmax)


def test_mean_is_exact_in_any_order():
    """The float64 sum of realistic absmax is exact, so every order gives the same float32 mean."""
    absmax = torch.randn(100_000, 64, generator=torch.Generator().manual_seed(1)).abs().amax(1)
    shuffled = absmax[torch.randperm(len(absmax), generator=torch.Generator().manual_seed(2))]
    assert_bits_equal(absmax_mean(absmax), absmax_mean(shuffled))
    assert absmax_mean(torch.empty(0)).tolist() == [0.0]


def test_reconstruction_is_two_roundings():
    """A fused multiply-add would differ: the data tells the two apart, and the reference takes two roundings."""
    absmax = torch.randn(50_000, 64, generator=torch.Generator().manual_seed(3)).abs().amax(1)
    mean, m = absmax_mean(absmax), get_map8()
    codes, nested = double_quantize(absmax, mean, m)
    level, scale = m.levels[codes.int()], nested.repeat_interleave(256)[: len(absmax)]
    product = level * scale
    assert_bits_equal(double_dequantize(codes, nested, mean, m), product + mean)
    fused = (level.double() * scale.double() + mean.double()).float()
    assert not torch.equal(fused, product + mean)


def small_rows_weight(generator):
    """Student-t weights with 2 % of the rows scaled down a thousandfold: bitsandbytes flips signs on these."""
    t = (
        torch.randn(512, 512, generator=generator)
        / torch.randn(5, 512, 512, generator=generator).square().mean(0).sqrt()
    )
    t[::50] *= 1e-3
    return t


@pytest.mark.parametrize("name", MAPS)
def test_no_sign_is_ever_flipped(name):
    weight = small_rows_weight(torch.Generator().manual_seed(4))
    packed, absmax = quantize_blockwise(weight, get_codebook("nf4"))
    mean, m = absmax_mean(absmax), get_map8(name)
    codes, nested = double_quantize(absmax, mean, m)
    unguarded = count_below((absmax - mean) * (1 / nested.repeat_interleave(256)[: len(absmax)]), m.thresholds)
    guarded = int((codes != unguarded).sum())
    assert guarded > 0, "the data does not exercise the guard"
    restored = double_dequantize(codes, nested, mean, m)
    assert torch.all(restored >= 0) and not torch.signbit(restored).any()
    assert (double_dequantize(unguarded.to(torch.uint8), nested, mean, m) < 0).sum() == guarded  # it acts nowhere else
    decoded = QuantizedTensor.quantize(weight, QuantConfig(map8=name)).dequantize()
    assert torch.all(decoded * weight >= 0)


def test_zero_blocks_decode_to_plus_zero():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    weight[::3] = 0
    decoded = QuantizedTensor.quantize(weight).dequantize()
    assert_bits_equal(decoded[::3], torch.zeros_like(decoded[::3]))


def test_constant_absmax_has_zero_second_level():
    """All deviations zero: nested_absmax 0, every code the map's zero, absmax exact."""
    absmax = torch.full((300,), 0.75)
    codes, nested = double_quantize(absmax, absmax_mean(absmax), get_map8())
    assert set(codes.tolist()) == {127} and nested.tolist() == [0.0, 0.0]
    assert_bits_equal(double_dequantize(codes, nested, absmax_mean(absmax), get_map8()), absmax)


def test_a_poisoned_block_poisons_the_tensor():
    weight = torch.randn(256)
    weight[3] = float("nan")
    q = QuantizedTensor.quantize(weight, check_finite=False)
    assert q.dequantize().isnan().all()


def test_signed_absmax_cannot_be_double_quantized():
    arguments = torch.randn(64), torch.ones(1), "bof4_s", 64, "dynamic", 256
    for refused in (
        lambda: QuantConfig("bof4_s"),
        lambda: torch.ops.qlora_ref.quantize_4bit_nested(*arguments),
        lambda: ops._REFERENCE["quantize_4bit_nested"](*arguments),
    ):
        with pytest.raises(ValueError, match="bof4_s keeps the sign of the absmax.*double_quant=False"):
            refused()


def test_a_mean_handed_in():
    """With its own mean a tensor gives the bytes it has; the rows of a tensor, each with that mean, give the parts."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    whole = QuantizedTensor.quantize(x)
    assert_bits_equal(QuantizedTensor.quantize(x, absmax_mean=whole.absmax_mean).absmax, whole.absmax)
    parts = [QuantizedTensor.quantize(half, absmax_mean=whole.absmax_mean) for half in x.chunk(2)]
    for name in ("packed", "absmax", "nested_absmax"):
        assert_bits_equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name), name)
    assert_bits_equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
    with pytest.raises(ValueError, match="only double quantization uses"):
        QuantizedTensor.quantize(x, QuantConfig(double_quant=False), absmax_mean=whole.absmax_mean)
    with pytest.raises(ValueError, match=r"one float32 .* not \(2,\)"):
        QuantizedTensor.quantize(x, absmax_mean=torch.ones(2))


def test_unknown_map():
    with pytest.raises(ValueError, match="unknown 8-bit map 'int8'; known are dynamic"):
        QuantConfig(map8="int8")
