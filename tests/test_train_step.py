"""Ten pinned training steps: the definition does not move, and the native path follows it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qlora_ref import native
from qlora_ref.testing.tiny import adapter_vector, double_twin, make_problem, train

# Loss before each step of the float64 run of the reference (testing/tiny.py), six digits.
# A change here is a change of numerics: it needs a decision record and a line in the changelog.
PINNED = [
    "1.254962", "1.212520", "1.148263", "1.066012", "0.976052",
    "0.889233", "0.811546", "0.742200", "0.678073", "0.618584",
]  # fmt: skip


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)


def run(double: bool = False):
    model, x, y = make_problem()
    if double:
        model, x, y = double_twin(model), x.double(), y.double()
    return train(model, x, y, adamw), adapter_vector(model)


def run_in_reference_mode() -> tuple[list[float], torch.Tensor]:
    """The same run in a process where no native path is registered."""
    code = "import json, sys, test_train_step as t; losses, end = t.run(); print(json.dumps([losses, end.tolist()]))"
    environment = {**os.environ, "QLORA_BACKEND": "reference", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    losses, end = json.loads(result.stdout)
    return losses, torch.tensor(end, dtype=torch.float64)


def test_ten_losses_are_pinned():
    losses, _ = run(double=True)
    assert [f"{loss:.6f}" for loss in losses] == PINNED


@pytest.mark.skipif(native.cpu is None, reason=f"no native CPU: {native.missing['cpu']}")
def test_native_trains_as_close_to_the_truth_as_the_reference():
    """After ten steps the adapters are at most twice as far from the float64 run as those of the reference."""
    _, truth = run(double=True)
    _, native_end = run()
    _, reference_end = run_in_reference_mode()
    reference_distance = (reference_end - truth).norm().item()
    assert reference_distance > 0
    assert (native_end - truth).norm().item() <= 2 * reference_distance
