"""The backend of the CUDA kernels: how they are called, and their tables on each card."""

from contextlib import nullcontext

import torch

from .arguments import table_bytes
from .backend import Backend
from .cuda_linear import CudaLinear, Scratch


class CudaBackend(CudaLinear, Backend):
    """On the device of the tensors and torch's current stream there; the linear layer as cuda_linear.py divides it."""

    device_type = "cuda"

    def __init__(self, module):
        super().__init__(module)
        self.scratch = Scratch()
        self._maps: dict[tuple[int, torch.device], torch.Tensor] = {}

    def _call(self, function, device, *args):
        here = device.index == torch.cuda.current_device()
        with nullcontext() if here else torch.cuda.device(device):
            function(*args, torch.cuda.current_stream(device).cuda_stream)

    def _map_address(self, map8, device):
        key = id(map8), device
        if key not in self._maps:
            table_bytes(map8)  # keeps the object, and so its id, alive
            self._maps[key] = map8.levels.to(device)
        return self._maps[key].data_ptr()
