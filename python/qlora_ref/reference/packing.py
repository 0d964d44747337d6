"""Two 4-bit codes in one byte, the first element in the high nibble (bitsandbytes' order).

codes   c0 c1 c2 c3 c4        n = 5, odd: padded with the code of zero
bytes   c0c1  c2c3  c40z      (n + 1) // 2
"""

import torch


def pack(codes: torch.Tensor, pad_code: int) -> torch.Tensor:
    """(n,) u8 codes below 16 -> ((n + 1) // 2,) u8."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad_code)])
    high, low = codes[0::2], codes[1::2]
    return (high << 4) | low


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """((n + 1) // 2,) u8 -> (n,) u8 codes; the padding nibble of an odd count is dropped."""
    return torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)[:n]
