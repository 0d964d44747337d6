"""A counter of fused attention kernels."""

from torch.utils._python_dispatch import TorchDispatchMode

from qlora_ref import checkpointing


class Kernels(TorchDispatchMode):
    """How often a fused attention kernel ran. The modes of `checkpointing` come before it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in checkpointing._FUSED
        return func(*args, **(kwargs or {}))
