"""The switch of forward-mode differentiation: under it, layers calculate in forms that have a Jacobian-vector product.

Hand-written gradients (`jax.custom_vjp`) and fused kernels know the reverse mode alone. Flow maps differentiate their
network in forward mode (`gen.diffusion.flowmap`), and the layers that have such a form ask this switch.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["forward_mode", "in_forward_mode"]

_ON: ContextVar[bool] = ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, every layer can be differentiated by `jax.jvp`, and by `jax.grad` of that.

    The switch is read when a function is traced. A function that `jax.jit` has traced outside keeps its form, and
    `jax.jvp` of it raises TypeError; take the derivative of the plain function, and compile the whole.
    """
    token = _ON.set(True)
    try:
        yield
    finally:
        _ON.reset(token)


def in_forward_mode() -> bool:
    """Tells whether the code that is being traced must have a Jacobian-vector product."""
    return _ON.get()
