"""The low-rank adapter (Hu et al. 2021, arXiv 2106.09685; equation 3 of the QLoRA paper).

    y = W x + scaling * B (A x),     A (rank, in),  B (out, rank),  scaling = alpha / rank

B starts at zero, so training starts exactly at the frozen model. QLoRA puts an adapter on *every* linear layer: the
paper's finding (section 4, figure 2) is that this, not the rank, is what it takes to match 16-bit fine-tuning.
"""

import math

import torch


def scaling(alpha: float, rank: int, rslora: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def init_lora(
    rank: int, in_features: int, out_features: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_A` (rank, in) uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), as in PEFT), `lora_B` (out, rank) zero."""
    bound = 1.0 / math.sqrt(in_features)
    lora_A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return lora_A, torch.zeros(out_features, rank)


def dropout(x: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Zero each input of the adapter with probability p and scale the rest by 1 / (1 - p); the base path has none."""
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep / (1 - p)


def delta_weight(lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """scaling * B A, (out, in): what the adapter adds to the weight."""
    return scale * (lora_B @ lora_A)


def merge(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """W' + scaling * B A in the dtype of `weight` (fp32 sum, one rounding). Pass the *dequantized* weight.

    The adapter was trained on W', not on the original W. And do not quantize the result again: every weight of W' sits
    on a level, so a small delta rounds away (tests/test_lora.py: of a delta of 1 % of the norm under 5 % survives).
    """
    return (weight.float() + delta_weight(lora_A.float(), lora_B.float(), scale)).to(weight.dtype)
