"""How much memory a traced function needs beside its arguments: a walk over its jaxpr; nothing is compiled.

XLA keeps in memory what matrix products, convolutions and loops read or write, and elementwise results that are read
more than once; the rest is calculated on the fly inside whatever reads it. Walking the equations in order with the
moment at which each kept array is last read gives the peak. Activations that a backward pass waits for are such arrays,
and rematerialisation needs no rule of its own: the trace contains it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from gen.nn.convolution import CONVOLUTIONS

__all__ = ["nbytes", "temporaries"]

# Buffers are packed into one arena with gaps: XLA's figure over the sum of what lives at the peak, fitted to networks
# smaller than those of benchmarks/memory.py.
PACKING = 1.08

# The output is the input under another shape or name.
_SAME = {
    "reshape", "squeeze", "expand_dims", "copy", "copy_p", "stop_gradient", "sharding_constraint", "name",
    "optimization_barrier", "random_wrap", "random_unwrap", "bitcast_convert_type", "reduce_precision",
}  # fmt: skip
_INLINED = {
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
}  # fmt: skip
_LOOPS = {"scan", "while", "cond"}
# Read from and written to memory whole: never calculated inside another operation.
_HEAVY = _LOOPS | {
    "dot_general", "ragged_dot_general", "conv_general_dilated", *CONVOLUTIONS, "sort", "top_k", "fft", "cholesky",
    "custom_call", "pallas_call", "gather", "scatter", "scatter-add", "scatter_add", "random_bits", "random_seed",
    "random_fold_in", "random_split", "threefry2x32", "cumsum", "cumprod", "cummax", "cumlogsumexp", "reduce_window",
    "reduce_window_sum", "reduce_window_max", "select_and_scatter_add", "select_and_gather_add",
}  # fmt: skip
_REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin",
}  # fmt: skip
# Not calculated twice, however small the operands.
_COSTLY = _REDUCTIONS | {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "pow", "sqrt", "rsqrt", "cbrt", "erf", "erf_inv",
    "erfc", "sin", "cos", "tan", "atan2", "rem", "lgamma", "digamma",
}  # fmt: skip


def temporaries(
    closed: core.ClosedJaxpr,
    donated: int,
    cut: Mapping[tuple[int, ...], int] | None = None,
    platform: str | None = None,
) -> int:
    """Bytes that a traced function needs at one time beside its arguments.

    Args:
      closed: the traced function.
      donated: number of leading outputs that are written over arguments of the same type.
      cut: into how many parts arrays of a shape are cut over devices (parameters and all that has their shape).
      platform: on "cpu" XLA calculates half precision in float32 and drops the barriers that keep unrolled
        rematerialisation from being undone; that of the default backend if None.
    """
    walk = _Walk(dict(cut or {}), (platform or jax.default_backend()) == "cpu")
    given = [_Value(0, kept=True) for _ in closed.jaxpr.invars]
    outs = walk.run(closed.jaxpr, given)
    return int(PACKING * walk.peak([], outs, written_over=outs[:donated]))


class _Value:
    """An array between equations: `size` bytes if it is kept in memory, else calculated by `op` where it is read."""

    __slots__ = ("costly_users", "kept", "op", "roots", "size", "users")

    def __init__(self, size: int, kept: bool = False) -> None:
        self.size, self.kept = size, kept
        self.op: _Op | None = None
        self.users, self.costly_users = 0, False
        self.roots: frozenset[_Value] | None = None


@dataclasses.dataclass(eq=False)
class _Op:
    """One equation: what it reads and writes, and the bytes it needs only while it runs."""

    name: str
    ins: list[_Value]
    outs: list[_Value]
    scratch: int = 0

    @property
    def heavy(self) -> bool:
        return self.name in _HEAVY

    @property
    def in_place(self) -> bool:
        """Whether an output may take the place of an operand that is read here for the last time."""
        return self.name in _LOOPS or not (self.heavy or self.name in _REDUCTIONS)


class _Walk:
    """The equations of a jaxpr and of those it calls, as one list of operations."""

    def __init__(self, cut: Mapping[tuple[int, ...], int], cpu: bool) -> None:
        self.cut, self.cpu = cut, cpu
        self.ops: list[_Op] = []
        self.made: dict[Any, list[_Value]] = {}  # equal equations, calculated once

    def size(self, aval: Any) -> int:
        return nbytes(aval, self.cpu) // self.cut.get(tuple(getattr(aval, "shape", ())), 1)

    def whole(self, aval: Any) -> int:
        """Bytes of a cut array put together again, 0 for one that is not cut."""
        return nbytes(aval, self.cpu) if tuple(getattr(aval, "shape", ())) in self.cut else 0

    def run(self, jaxpr: Any, ins: Sequence[_Value]) -> list[_Value]:
        """Appends the operations of `jaxpr` and returns its outputs."""
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, ins, strict=True))
        env |= {var: _Value(0, kept=True) for var in jaxpr.constvars}

        def read(atom: Any) -> _Value:
            return _Value(0, kept=True) if isinstance(atom, core.Literal) else env[atom]

        for eqn in _needed(jaxpr):
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            env |= dict(zip(eqn.outvars, outs, strict=False))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name in _INLINED:
            inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
            inner = getattr(inner, "jaxpr", inner)
            return self.run(inner, ins[len(ins) - len(inner.invars) :])
        if name in _SAME:
            return ins[: len(eqn.outvars)]
        key = self._key(eqn, ins)
        if key is None or key not in self.made:
            op = _Op(name, ins, [_Value(self.size(var.aval)) for var in eqn.outvars], self._scratch(eqn))
            outs = self._append(op)
            if key is None:
                return outs
            self.made[key] = outs
        return self.made[key]

    def _key(self, eqn: Any, ins: list[_Value]) -> Any:
        """What makes two equations equal; None where that is not asked: elsewhere than on CPU, and of loops."""
        if not self.cpu or eqn.primitive.name in _LOOPS:
            return None
        pairs = zip(eqn.invars, ins, strict=True)
        operands = tuple(str(atom) if isinstance(atom, core.Literal) else id(value) for atom, value in pairs)
        return eqn.primitive.name, operands, str(sorted(eqn.params.items(), key=lambda item: item[0]))

    def _append(self, op: _Op) -> list[_Value]:
        for value in op.ins:
            value.users += 1
            value.costly_users |= op.heavy
        for value in op.outs:
            value.op = op
        self.ops.append(op)
        return op.outs

    def _scratch(self, eqn: Any) -> int:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return _Walk(self.cut, self.cpu).loop(params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"])
        if name == "while":
            body = params["body_jaxpr"].jaxpr
            return _Walk(self.cut, self.cpu).loop(body, params["body_nconsts"], len(eqn.outvars))
        if name == "cond":
            inner = [branch.jaxpr for branch in params["branches"]]
            return max(_Walk(self.cut, self.cpu).loop(jaxpr, len(jaxpr.invars), 0) for jaxpr in inner)
        if name not in _HEAVY:
            return 0
        # Cut weights are put together to be read, and their gradients are summed before they are cut.
        total = sum(self.whole(atom.aval) for atom in (*eqn.invars, *eqn.outvars))
        if name == "dot_general":
            total += sum(self.size(aval) for aval in _reordered_by_dot(eqn))
        elif name == "conv_general_dilated":
            total += sum(self.size(aval) for aval in _reordered_by_conv(eqn))
        elif name in ("random_bits", "threefry2x32"):
            total += sum(self.size(var.aval) for var in eqn.outvars)
        return total

    def loop(self, body: Any, consts: int, carry: int) -> int:
        """Bytes that one turn of a loop needs beside what it carries and stacks."""
        ins = []
        for index, var in enumerate(body.invars):
            value = _Value(0 if index < consts else self.size(var.aval), kept=index < consts + carry)
            if index >= consts + carry:  # a slice of a stacked operand: read in place where that can be
                self._append(_Op("slice", [], [value]))
            ins.append(value)
        carried = ins[consts : consts + carry]
        outs = self.run(body, ins)
        for value in outs[carry:]:  # written into its place in the stack
            value.users += 1
        return self.peak(carried, outs[:carry]) - sum(value.size for value in carried)

    def peak(self, given: Sequence[_Value], final: Sequence[_Value], written_over: Sequence[_Value] = ()) -> int:
        """The largest number of bytes kept at one time, from `given` at the start to `final` at the end."""
        self._decide(final)
        used = [frozenset(root for value in op.ins for root in self._roots(value)) for op in self.ops]
        last: dict[_Value, int] = {}
        for index, (op, roots) in enumerate(zip(self.ops, used, strict=True)):
            if any(value.kept for value in op.outs):
                last |= dict.fromkeys(roots, index)
        last |= {root: len(self.ops) for value in final for root in self._roots(value)}
        free, alive = set(map(id, written_over)), set(given)
        live = most = sum(value.size for value in given)
        for index, (op, roots) in enumerate(zip(self.ops, used, strict=True)):
            new = [value for value in op.outs if value.kept and id(value) not in free]
            if not any(value.kept for value in op.outs):
                continue
            dying = [root for root in roots if last[root] == index and root in alive]
            sizes = [root.size for root in dying] if op.in_place else []
            added = 0
            for value in new:
                if value.size in sizes:
                    sizes.remove(value.size)
                else:
                    added += value.size
            most = max(most, live + added + op.scratch)
            alive.difference_update(dying)
            alive.update(value for value in new if value in last)
            live += sum(value.size for value in new if value in last) - sum(root.size for root in dying)
        return most

    def _decide(self, final: Sequence[_Value]) -> None:
        """Which values are kept in memory."""
        ends = set(map(id, final))
        for op in self.ops:
            for value in op.outs:
                value.kept = op.heavy or value.costly_users or id(value) in ends
                if not value.kept and value.users > 1:  # read twice: kept unless it is a small thing spread out
                    spread = all(root.size < value.size for root in self._roots(value))
                    value.kept = op.name in _COSTLY or not spread
                    value.roots = None
                self._roots(value)

    def _roots(self, value: _Value) -> frozenset[_Value]:
        """The kept values that are read where `value` is read."""
        if value.roots is None:
            if value.kept or value.op is None:
                value.roots = frozenset((value,))
            else:
                value.roots = frozenset(root for operand in value.op.ins for root in self._roots(operand))
        return value.roots


def _needed(jaxpr: Any) -> Iterator[Any]:
    """The equations whose results reach an output."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
    return reversed(found)


def _reordered_by_dot(eqn: Any) -> list[Any]:
    """Operands that are transposed first: those of batched products whose batch axes do not lead."""
    _, batch = eqn.params["dimension_numbers"]
    pairs = zip(eqn.invars, batch, strict=True)
    return [atom.aval for atom, axes in pairs if tuple(axes) != tuple(range(len(axes)))]


def _reordered_by_conv(eqn: Any) -> list[Any]:
    """Arrays that are transposed to or from (batch, space, channels) and (space, in, out), as weight gradients need."""
    numbers, axes = eqn.params["dimension_numbers"], range(len(eqn.invars[0].aval.shape))
    image, kernel = (0, axes[-1], *axes[1:-1]), (axes[-1], axes[-2], *axes[:-2])
    specs = (numbers.lhs_spec, image), (numbers.rhs_spec, kernel), (numbers.out_spec, image)
    arrays = (*eqn.invars, *eqn.outvars)
    return [atom.aval for atom, (spec, plain) in zip(arrays, specs, strict=True) if tuple(spec) != plain]


def nbytes(aval: Any, widened: bool = False) -> int:
    """Bytes of an array or shape; half precision counted as float32 if `widened`."""
    if not hasattr(aval, "shape"):
        return 0
    item = aval.dtype.itemsize
    half = widened and jax.dtypes.issubdtype(aval.dtype, jax.numpy.floating) and item == 2
    return int(math.prod(aval.shape) * (4 if half else item))
