"""Every native kernel against the reference, over the one list of cases, in its parity class.

Outputs are allocated inside a larger buffer, poisoned, with guard bytes on both sides that must come back unchanged.
"""

import pytest
import torch

from qlora_ref import native, ops
from qlora_ref.testing.cases import BOUND, EXACT, cases
from qlora_ref.testing.compare import (
    ACCUMULATE_CPU,
    ACCUMULATE_CUDA,
    assert_bits_equal,
    assert_within_bound,
    bounds,
)

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(native.cpu is None, reason=f"no native CPU: {native.missing['cpu']}")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("case", [c for c in cases() if c.parity == EXACT], ids=lambda c: c.id)
@pytest.mark.parametrize("device", DEVICES)
def test_exact(case, device, guarded_outputs):
    """Equal bits, and not a byte written outside the outputs."""
    arguments = case.arguments(device)
    with guarded_outputs():
        actual = as_tuple(getattr(torch.ops.qlora_ref, case.op)(*arguments))
    expected = as_tuple(ops._REFERENCE[case.op](*case.arguments()))
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(a, e, f"{case.id} output {i}")


@pytest.mark.parametrize("case", [c for c in cases() if c.parity == BOUND], ids=lambda c: c.id)
@pytest.mark.parametrize("device", DEVICES)
def test_bound(case, device, guarded_outputs):
    """Within the rounding bound of a float64 product of the same W', and at most twice torch's error."""
    arguments = case.arguments(device)
    with guarded_outputs():
        actual = as_tuple(getattr(torch.ops.qlora_ref, case.op)(*arguments))
    same_dtype = as_tuple(ops._REFERENCE[case.op](*case.arguments(device)))  # torch on the same device
    u_acc = ACCUMULATE_CPU if device == "cpu" else ACCUMULATE_CUDA
    for a, t, (name, value, bound) in zip(actual, same_dtype, bounds(case.op, case.arguments(), u_acc), strict=True):
        assert_within_bound(a, t, value, bound, f"{case.id} {name}")


@pytest.mark.parametrize("case", [c for c in cases() if c.parity == BOUND], ids=lambda c: c.id)
def test_reference_within_bound(case):
    """The bound itself is valid: the reference path in plain torch satisfies it."""
    outputs = as_tuple(ops._REFERENCE[case.op](*case.arguments()))
    for out, (name, value, bound) in zip(outputs, bounds(case.op, case.arguments()), strict=True):
        assert_within_bound(out, out, value, bound, f"{case.id} {name}")


def test_every_op_has_cases():
    covered = {case.op for case in cases()}
    assert covered == set(ops.OP_NAMES), f"ops without a case: {set(ops.OP_NAMES) - covered}"


def test_case_ids_are_unique():
    ids = [case.id for case in cases()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_backward"])
def test_bound_notices_one_wrong_block(op):
    """Power: scaling one block of the weight by one part in 2^8 breaks the fp32 bound."""
    case = next(c for c in cases(op) if c.params.get("m") == 16 and c.params["dtype"] == "f32")
    arguments = list(case.arguments())
    ((name, value, bound),) = bounds(op, tuple(arguments))
    arguments[3] = arguments[3].clone()  # nested_absmax
    arguments[3][0] *= 1 + 2.0**-8
    wrong = ops._REFERENCE[op](*arguments)
    with pytest.raises(AssertionError, match="rounding bound"):
        assert_within_bound(wrong, wrong, value, bound, name)
