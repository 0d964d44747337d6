"""The gradient of an op: what torch.library.register_autograd does, but the graph's node is made before the product.

Checkpointing runs a block again until all that its backward needs is saved again, and stops there. A node that saves
its inputs after the product makes it compute the last product of the block too, whose result nobody wants. In a Llama
block that is down_proj: a fifth of the weights. Here the inputs are saved first.

It also costs less: register_autograd goes through the schema of the op at every call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import checkpointing

_ORDINARY = (torch.Tensor, torch.nn.Parameter)
# By name of the op: (kernel, *args) -> the kernel's result, with a node, where all arguments are ordinary
recorders: dict[str, Callable[..., torch.Tensor]] = {}


def register(
    lib: torch.library.Library,
    op: Any,
    output_shape: Callable[..., tuple[int, ...]],
    save: Callable[[Any, tuple], None],
    backward: Callable[..., tuple],
    dual: Callable[..., torch.Tensor],
) -> None:
    """For an op with one output of the dtype and device of its first argument, and of shape `output_shape(*args)`.

    `save(ctx, args)` keeps what `backward(ctx, dy)` needs to give a gradient, or None, for every argument. An entry of
    ctx.needs_input_grad is counted from the first argument; behind the last there is one more.
    `dual(*args)` computes it where an argument is a dual tensor (forward mode), from other ops.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args_and_output):
            *args, output = args_and_output
            save(ctx, args)
            return output()

        @staticmethod
        def backward(ctx, dy):
            return *backward(ctx, dy), None

    def kernel(keyset, *args):
        if _has_tangent(args):
            return dual(*args)

        def below(*args):
            return _below(op, keyset, args)

        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(*args)
        if is_plain(args[0]):
            return record(below, *args)

        # One level of torch.func's at a time: the dispatcher has peeled off the others, and goes on inside.
        def lower():
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # a Function's forward has neither
                return below(*args)

        with enable_single_level_autograd_function():
            return record_followed(lower, *args)

    def record_followed(lower, *args):
        run = checkpointing.current() if are_ordinary(*args) else None
        if run is None:
            return apply(*args, lower)
        y = apply(*args, lambda: run.product(name, output_shape(*args), args[0].dtype, lower))
        run.keep(name, y)
        return y

    def record(compute, *args):
        y = apply(*args, lambda: hollow(args[0], output_shape(*args)))  # a recomputation stops in here
        run = checkpointing.current()
        with torch._C._AutoDispatchBelowAutograd():
            y.data = compute(*args) if run is None else run.product(name, y.shape, y.dtype, lambda: compute(*args))
        if run is not None:
            run.keep(name, y)
        return y

    apply = super(torch.autograd.Function, Node).apply
    name = op._schema.name.split("::")[1]
    recorders[name] = record
    lib.impl(name, kernel, "Autograd", with_keyset=True)


def register_composite(lib: torch.library.Library, op: Any, composite: Callable[..., Any]) -> None:
    """For an op that is itself a gradient: where somebody differentiates it, it is computed as `composite` (*args)."""

    def kernel(keyset, *args):
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if recorded or _has_tangent(args):
            return composite(*args)
        return _below(op, keyset, args)

    lib.impl(op._schema.name.split("::")[1], kernel, "Autograd", with_keyset=True)


def _below(op: Any, keyset: Any, args: tuple) -> Any:
    """The op without autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def is_forward_mode() -> bool:
    """Whether somebody is taking forward-mode derivatives: dual tensors look like any other."""
    return forward_ad._current_level >= 0


def is_plain(x: torch.Tensor) -> bool:
    """False under whatever follows operations instead of running them: compilers, fake tensors, torch.func."""
    return (
        type(x) in _ORDINARY
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_ordinary(t: torch.Tensor) -> bool:
    """No tensor of another class, nor a wrapper that a transform of torch.func has left behind."""
    return type(t) in _ORDINARY and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def are_ordinary(*args: Any) -> bool:
    """Those among them that are tensors."""
    return all(is_ordinary(a) for a in args if isinstance(a, torch.Tensor))


def _has_tangent(args: tuple) -> bool:
    return is_forward_mode() and any(tangent is not None for tangent in unpack(args)[1])


def unpack(args: tuple) -> tuple[list, list]:
    """The arguments, and for each its tangent or None."""
    pairs = [forward_ad.unpack_dual(a) if isinstance(a, torch.Tensor) else (a, None) for a in args]
    return [primal for primal, _ in pairs], [tangent for _, tangent in pairs]


def hollow(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of this shape on the storage of one element."""
    return like.new_empty_strided(shape, (0,) * len(shape))
