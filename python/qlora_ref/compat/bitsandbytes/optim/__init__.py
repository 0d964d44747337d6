"""Adam and AdamW of bitsandbytes, computed by `qlora_ref.optim.PagedAdamW`.

States have torch's names (`exp_avg`, `exp_avg_sq`), so checkpoints go to and from `torch.optim.AdamW`; with 8 bits
small tensors are quantized too (`min_8bit_size` is accepted and has no effect).
"""

from typing import Any

from ....optim import PagedAdamW as _PagedAdamW

__all__ = []


def _make(name: str, weight_decay: float, bits: int | None, paged: bool) -> type:
    """One of their twelve classes. bits None: the argument `optim_bits` decides."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = weight_decay,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = paged,
    ):
        if amsgrad:
            raise ValueError(f"{name} does not support amsgrad=True")
        if args is not None:
            raise ValueError(f"{name} takes no args object; pass lr, betas, eps and weight_decay")
        if bits is not None and optim_bits != 32:
            raise ValueError(f"{name} has its number of bits in its name; use optim_bits with {name.rstrip('bit832')}")
        paging = "auto" if is_paged else "none"
        chosen = optim_bits if bits is None else bits
        _PagedAdamW.__init__(self, params, float(lr), betas, eps, weight_decay, bits=chosen, paging=paging)

    made = type(name, (_PagedAdamW,), {"__init__": __init__, "__module__": __name__})
    made.__doc__ = f"bitsandbytes.optim.{name}: {'8' if bits == 8 else '32'}-bit states{', paged' if paged else ''}."
    __all__.append(name)
    return made


for _family, _decay in (("Adam", 0.0), ("AdamW", 1e-2)):
    for _suffix, _bits in (("", None), ("8bit", 8), ("32bit", 32)):
        globals()[_family + _suffix] = _make(_family + _suffix, _decay, _bits, False)
        globals()["Paged" + _family + _suffix] = _make("Paged" + _family + _suffix, _decay, _bits, True)
