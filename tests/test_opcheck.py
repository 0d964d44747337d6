"""torch.library.opcheck on every op: schema, fake tensors, autograd registration, AOT dispatch; and torch.compile."""

import pytest
import torch

from qlora_ref import ops
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.testing.cases import cases


def small_cases():
    """A few cases of each op: opcheck runs an op many times."""
    wanted = []
    for op in ops.OP_NAMES:
        mine = [c for c in cases(op) if c.params.get("n", 0) > 0 and c.params.get("data", "normal") == "normal"]
        wanted += mine[:: max(1, len(mine) // 4)][:4]
    return wanted


@pytest.mark.parametrize("case", small_cases(), ids=lambda c: c.id)
def test_opcheck(case):
    arguments = tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and i in trainable(case.op) else a
        for i, a in enumerate(case.arguments())
    )
    torch.library.opcheck(getattr(torch.ops.qlora_ref, case.op).default, arguments)


def trainable(op: str) -> set[int]:
    """Positions of the arguments that have a gradient."""
    return {"linear_4bit": {0, 10}, "lora_linear_4bit": {0, 10, 11, 12}}.get(op, set())


@pytest.mark.parametrize("double_quant", [True, False])
def test_compile_without_a_graph_break(double_quant):
    from qlora_ref.quantized import QuantConfig

    torch.manual_seed(0)
    base = Linear4bit.from_linear(torch.nn.Linear(64, 32), QuantConfig(double_quant=double_quant))
    layer = LoRALinear(base, 4, 8)
    torch.nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 64, requires_grad=True)
    outputs = []
    for f in (layer, compiled):
        layer.zero_grad()
        y = f(x)
        y.square().sum().backward()
        outputs.append((y.detach(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    for eager, compiled_out in zip(*outputs, strict=True):
        assert torch.equal(eager, compiled_out)
