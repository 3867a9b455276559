"""Products and sums of a traced program, counted from its shapes: loops as often as they run."""

import dataclasses
import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

__all__ = ["Flops", "count_flops"]


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiplications and additions of matrix products and convolutions: nothing else is counted.

    Attributes:
      model: of the forward and the backward pass.
      recomputed: of what the backward pass calculates a second time instead of keeping it (rematerialisation).
    """

    model: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.recomputed + other.recomputed)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.model * times, self.recomputed * times)

    @property
    def total(self) -> float:
        """Gives all that the program does."""
        return self.model + self.recomputed


def count_flops(jaxpr: Jaxpr, again: bool = False) -> Flops:
    """Counts a program and everything that it calls.

    A loop of unknown length counts once, of several branches the dearest. Kernels count as what their bodies do.

    Args:
      jaxpr: of a traced program (``traced.jaxpr.jaxpr``).
      again: whether all of it is recomputed.
    """
    total = Flops()
    for equation in jaxpr.eqns:
        repeated = again or "rematted_computation" in str(equation.source_info.name_stack)
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            found = float(_product(equation) if name == "dot_general" else _convolution(equation))
            total += Flops(recomputed=found) if repeated else Flops(found)
            continue
        inner = [count_flops(body, repeated) for body in _bodies(equation.params)]
        if name == "cond":
            total += max(inner, key=lambda flops: flops.total)
            continue
        times = equation.params["length"] if name == "scan" else _cells(equation.params) if name == "pallas_call" else 1
        total += sum(inner, Flops()) * times
    return total


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs among the parameters of an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            body = item.jaxpr if isinstance(item, ClosedJaxpr) else item
            if isinstance(body, Jaxpr):
                found.append(body)
    return found


def _cells(params: dict[str, Any]) -> int:
    """How often the body of a kernel runs."""
    return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    """Each output sums over the kernel's window and one group's channels; zeros between the inputs do not count."""
    kernel, out, params = equation.invars[1].aval.shape, equation.outvars[0].aval.shape, equation.params
    summed = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out) * summed // math.prod(params["lhs_dilation"])
