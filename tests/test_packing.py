"""Two codes a byte, the first in the high nibble."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_ref.reference.packing import pack, unpack


def test_first_element_is_the_high_nibble():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), pad_code=7).tolist() == [0x12, 0xF7]


@given(st.lists(st.integers(0, 15), max_size=70), st.integers(0, 15))
def test_round_trip(codes, pad):
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(codes, pad)
    assert packed.numel() == (codes.numel() + 1) // 2
    assert torch.equal(unpack(packed, codes.numel()), codes)
