"""A training problem small enough to pin: three 4-bit layers with adapters, fixed data, ten AdamW steps."""

from collections.abc import Callable

import torch
from torch import nn

from ..nn import Linear4bit, LoRALinear, attach_lora, quantize_model

STEPS = 10


def make_problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(model, x (32, 64), y (32, 16)): NF4 + double quantization, rank 4 on every layer, all from one seed."""
    g = torch.Generator().manual_seed(0)
    sizes = [64, 128, 96, 16]
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(fan_in, fan_out)
        layer.weight.data = torch.randn(fan_out, fan_in, generator=g) / fan_in**0.5
        layer.bias.data.zero_()
        layers += [layer, nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    quantize_model(model, skip=())
    attach_lora(model, rank=4, alpha=8, skip=(), seed=1)
    return model, torch.randn(32, 64, generator=g), torch.randn(32, 16, generator=g)


def double_twin(model: nn.Module) -> nn.Module:
    """The same model in float64: every 4-bit layer replaced by its dequantized weight. The truth of the comparison."""
    twin = nn.Sequential()
    for module in model.children():
        if isinstance(module, LoRALinear):
            base = module.base_layer
            assert isinstance(base, Linear4bit)
            copy = LoRALinear(base.to_linear(torch.float32).double(), module.rank, module.alpha, dtype=torch.float64)
            copy.lora_A.data, copy.lora_B.data = module.lora_A.data.double(), module.lora_B.data.double()
            module = copy
        twin.append(module)
    return twin


def train(model: nn.Module, x, y, make_optimizer: Callable, steps: int = STEPS) -> list[float]:
    """Mean-squared-error training on one batch. Returns the loss before each step."""
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def adapter_vector(model: nn.Module) -> torch.Tensor:
    """Every trained parameter in one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])
