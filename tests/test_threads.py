"""The CPU kernels from several Python threads at once (the GIL is released in them), and in the child of a fork.

Memory is kept for each thread between calls, and torch's threads are borrowed: both must stay whose they are.
"""

import copy
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import run_python
from qlora_ref import native
from qlora_ref.arguments import DTYPE
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.quantized import QuantizedTensor

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"no native CPU: {native.missing['cpu']}")
TOKENS = (1, 40, 256)  # in registers; panels; panels that several threads share

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
PRODUCTS = native.cpu is not None and native.module.cpu.can_linear_4bit_backward(DTYPE[torch.bfloat16], 1)


class Work:
    """Every kernel with kept memory, on numbers and sizes that depend on `seed`."""

    def __init__(self, seed: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(seed)
        rows, cols, rank = 576 + 64 * seed, 640 - 64 * seed, 8 + seed
        randn = lambda *size: torch.randn(*size, generator=g)
        linear = nn.Linear(cols, rows)
        linear.weight.data, linear.bias.data = randn(rows, cols), randn(rows)
        self.weight = linear.weight.data.to(dtype)
        self.layer = Linear4bit.from_linear(linear.to(dtype)).requires_grad_(False)
        self.lora = LoRALinear(self.layer, rank, 16, generator=g)
        self.lora.lora_B.data = randn(rows, rank)
        self.x, self.dy = ([randn(m, n).to(dtype) for m in TOKENS] for n in (cols, rows))

    def __call__(self, layers: bool = True) -> list[torch.Tensor]:
        quantized = QuantizedTensor.quantize(self.weight, check_finite=False)
        results = [t for t in quantized._tensors() if t is not None]
        results += [quantized.dequantize(), quantized.dequantize(out=torch.empty_like(self.weight))]
        for x, dy in zip(self.x, self.dy, strict=True) if layers else ():
            results.append(self.layer(x))
            leaves = x.detach().requires_grad_(), *(p for p in self.lora.parameters() if p.requires_grad)
            y = self.lora(leaves[0])
            results += [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        return results


def same_bits(results, others) -> bool:
    """Without torch, whose threads a forked child waits for in vain."""
    numbers = lambda t: t.contiguous().view(torch.uint8).numpy().tobytes()
    return all(numbers(a) == numbers(b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPE, ids=str)
def test_python_threads_do_not_disturb_each_other(dtype):
    works = [Work(seed, dtype) for seed in range(3)]
    alone = [work() for work in works]
    begin, wrong = threading.Barrier(len(works)), []

    def run(seed: int) -> None:
        torch.set_num_threads(2)  # of this thread
        begin.wait()
        for _ in range(5):
            if not same_bits(works[seed](), alone[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "hangs"
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPE, ids=str)
def test_python_threads_may_share_a_layer(dtype):
    """What is bound (direct.py) by one thread is used by the others, from the first call on."""
    work = Work(0, dtype)
    alone = [work.layer(x) for x in work.x]
    shared, begin, results = copy.deepcopy(work.layer), threading.Barrier(4), []

    def run() -> None:
        begin.wait()
        results.append([shared(x) for x in work.x])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4 and all(same_bits(each, alone) for each in results)


@needs_fork
@pytest.mark.parametrize("who", ["the kernels", "torch alone"])
def test_kernels_work_in_a_forked_child(who):
    """libgomp's threads do not survive a fork, whoever started them; a child that waited for them would hang.

    Without products of our own torch multiplies, which does hang there.
    """
    code = f"""
import os, signal, warnings
warnings.simplefilter("ignore")
import torch
from test_threads import Work, same_bits
torch.set_num_threads(1)
work = Work(0, torch.bfloat16)
alone = work({PRODUCTS})
torch.set_num_threads(2)
has_run = torch.ones(10**6) + 1 if {who == "torch alone"} else work()
pid = os.fork()
signal.alarm(50)  # ends who hangs
same = same_bits(work({PRODUCTS}), alone)
if pid == 0:
    os._exit(0 if same else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
raise SystemExit(status if same else 2)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_a_forked_child_that_gets_no_threads():
    """No memory for a stack, as where the number of processes is limited: this thread does all the work."""
    code = """
import os, resource, signal
import torch
from qlora_ref import native
from qlora_ref.reference.codebook import get_codebook
from test_threads import same_bits
torch.set_num_threads(1)  # no team yet, whose stacks the child could use
x = torch.randn(400_000)
alone = native.cpu.quantize_4bit(x, get_codebook("nf4"), 64)
pid = os.fork()
if pid == 0:
    signal.alarm(50)
    torch.set_num_threads(4)
    used = 4096 * int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**20,) * 2)
    os._exit(0 if same_bits(native.cpu.quantize_4bit(x, get_codebook("nf4"), 64), alone) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
