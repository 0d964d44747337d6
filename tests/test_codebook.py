"""The sixteen-level tables: NF4 against its published constants, and the properties that every row must have."""

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from qlora_ref.reference.blockwise import count_below
from qlora_ref.reference.codebook import NAMES, get_codebook

# The paper's Appendix E, as printed by the authors. A golden value, not a source: the code derives its own.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# llm-datatypes' SF4 (Dotzel et al. 2024), printed with six digits
PUBLISHED_SF4 = [
    -1, -0.627781, -0.454736, -0.334331, -0.237434, -0.152899, -0.074982, 0,
    0.065513, 0.132965, 0.204661, 0.283835, 0.375805, 0.491076, 0.656781, 1,
]  # fmt: skip


def bits(x) -> list[int]:
    return np.asarray(x, np.float32).view(np.uint32).tolist()


def test_nf4_equals_the_published_constants_bit_for_bit():
    assert bits(get_codebook("nf4").levels) == bits(PUBLISHED_NF4)


def test_nf4_thresholds_are_float32_midpoints():
    levels = np.array(PUBLISHED_NF4, np.float32)
    assert bits(get_codebook("nf4").thresholds) == bits((levels[:-1] + levels[1:]) * np.float32(0.5))


def test_sf4_agrees_with_its_published_digits():
    assert np.abs(get_codebook("sf4").levels.numpy() - np.array(PUBLISHED_SF4)).max() < 1e-6  # six printed digits


def test_a_cleaner_recipe_would_be_wrong():
    """Why the derivation looks the way it does: everything in float64 misses most of the constants."""
    from scipy.special import ndtri

    p = 0.9677083
    positive, negative = ndtri(np.linspace(p, 0.5, 9)[:-1]), -ndtri(np.linspace(p, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([negative, [0.0], positive]))
    assert bits(levels / levels.max()) != bits(PUBLISHED_NF4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_every_table_is_sound(name, block_size):
    book = get_codebook(name, block_size)
    sorted_levels = book.levels[book.order.long()]
    used = 15 if torch.isinf(book.thresholds[-1]) else 16
    assert torch.all(sorted_levels[1:used] > sorted_levels[: used - 1]), "levels must ascend in the order of encoding"
    assert torch.all(book.thresholds[1:] > book.thresholds[:-1])
    assert len(set(book.order[:used].tolist())) == used, "two positions share a code"
    assert book.levels[book.zero_code] == 0 and not torch.signbit(book.levels[book.zero_code])
    assert sorted_levels[used - 1] == 1, "the block's maximum must be exact"
    assert book.signed_absmax or sorted_levels[0] == -1
    nearest = book.levels[book.order[count_below(sorted_levels[:used], book.thresholds)].long()]
    assert torch.equal(nearest, sorted_levels[:used]), "a level must encode to itself"


@pytest.mark.parametrize("name", NAMES)
def test_counting_thresholds_finds_the_nearest_level(name):
    """Against the definition, argmin |s - level| in float64, away from ties."""
    book = get_codebook(name)
    s = torch.linspace(-1, 1, 20001)
    decoded = book.levels[book.order[count_below(s, book.thresholds)].long()].double()
    distance = (s.double()[:, None] - book.levels.double()).abs()
    best = distance.min(dim=1).values
    assert torch.all((s.double() - decoded).abs() <= best + 2.0**-24)  # a midpoint is rounded once, to float32


@pytest.mark.parametrize("name", ["fp4_bnb", "fp4_e2m1", "fp4_e3m0", "int4"])
def test_symmetric_tables_treat_both_signs_alike(name):
    """Ties go to the smaller magnitude on both sides, and -0 is the code of zero."""
    book = get_codebook(name)
    finite = book.thresholds[8:14]
    s = torch.cat([finite, torch.linspace(0, 1, 4097), torch.zeros(1)])
    decode = lambda v: book.levels[book.order[count_below(v, book.thresholds)].long()]
    assert torch.equal(decode(-s), -decode(s))
    assert int(book.order[count_below(torch.tensor([-0.0]), book.thresholds)]) == book.zero_code


def test_nf4_ties_go_to_the_lower_code():
    book = get_codebook("nf4")
    assert count_below(book.thresholds, book.thresholds).tolist() == list(range(15))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_bof4_is_stationary(block_size):
    """Moving any free level, in either direction, raises E[m^2 (x - q(x))^2] for N(0,1) (checked by quadrature)."""
    from qlora_ref.testing.quality import expected_error

    levels = get_codebook("bof4", block_size).levels.double()
    best = expected_error(levels, block_size).mse
    for i in (1, 5, 9, 14):
        for step in (-1e-3, 1e-3):
            moved = levels.clone()
            moved[i] += step
            assert expected_error(moved, block_size).mse > best


def test_nf4_is_nearly_l1_optimal_but_its_bins_are_not_equally_used():
    """The paper calls NF4 information-theoretically optimal; the bins of N(0,1) at block 64 are far from equal."""
    levels = get_codebook("nf4").levels.double().numpy()
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    m = 2.4  # a typical maximum of 64 normal values
    share = np.diff(ndtr(np.clip(edges * m, -m, m)))
    assert share.max() / share.min() > 3


def test_unknown_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown 4-bit data type 'nf5'; known are nf4, fp4_bnb"):
        get_codebook("nf5")
