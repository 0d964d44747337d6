"""bitsandbytes' 4-bit names over our operations: `import qlora_ref.compat.bitsandbytes as bnb`.

A thin border: names, signatures, shapes and serialized keys are theirs, every number is computed by
`torch.ops.qlora_ref`. LLM.int8, the optimizers other than Adam and AdamW, and their `torch.ops.bitsandbytes` namespace
are not here. What differs is one table in docs/12_huggingface.md.
"""

import sys

from . import autograd, cextension, functional, nn, optim, utils
from .autograd._functions import matmul_4bit

__all__ = ["autograd", "cextension", "functional", "install", "matmul_4bit", "nn", "optim", "utils"]
__version__ = "0.50.2"  # the API that is imitated
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"}


def install() -> None:
    """Let `import bitsandbytes` mean this package for the rest of the process, for code that cannot be edited.

    Raises RuntimeError if the real one was imported before: two of them in one process would mix their layers.
    """
    real = sys.modules.get("bitsandbytes")
    if real is not None and real is not sys.modules[__name__]:
        raise RuntimeError("bitsandbytes is already imported; call qlora_ref.compat.bitsandbytes.install() before it")
    for name, module in list(sys.modules.items()):
        if name == __name__ or name.startswith(__name__ + "."):
            sys.modules["bitsandbytes" + name.removeprefix(__name__)] = module
