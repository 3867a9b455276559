"""What a compiled program says of itself: a reader of the text of optimised HLO.

Operations inside a loop count as often as the loop runs. Only what is scheduled is read: of a fusion the fusion itself,
not the operations inside it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

__all__ = ["Operation", "Traffic", "attention_calls", "collectives", "custom_calls", "cycles", "operations"]

_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16} | dict.fromkeys(("f8e4m3fn", "f8e5m2", "s4", "u4"), 1)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_KIND = re.compile(rf"^({'|'.join(_COLLECTIVES)})(-start)?$")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation that the compiler scheduled.

    Attributes:
      name: of its result.
      kind: what it does, such as "fusion".
      shape: type of the result, as the text has it.
      rest: operands and attributes, as the text has them.
      times: how often it runs in one call of the program.
    """

    name: str
    kind: str
    shape: str
    rest: str
    times: int

    @property
    def origin(self) -> str:
        """Gives the path of the jax operation that it came from; "" where the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


def operations(text: str) -> Iterator[Operation]:
    """Reads the scheduled operations of a program from the text of its optimised HLO."""
    bodies, entry = _computations(text)
    yield from _walk(bodies, entry, 1)


def _computations(text: str) -> tuple[Mapping[str, list[Operation]], str]:
    """Operations by computation, and the name of the computation that is the program."""
    bodies: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = bodies.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            name, shape, kind, rest = found.groups()
            current.append(Operation(name, kind, shape, rest, 1))
    return bodies, entry


def _walk(bodies: Mapping[str, list[Operation]], name: str, times: int) -> Iterator[Operation]:
    for operation in bodies.get(name, ()):
        yield dataclasses.replace(operation, times=times)
        called = dict(re.findall(r"\b(\w+)=%?([\w.\-]+)", operation.rest))
        if operation.kind == "while":
            yield from _walk(bodies, called["body"], times * _trips(operation, bodies.get(called["condition"], [])))
        elif operation.kind == "conditional":
            inside = re.search(r"branch_computations=\{([^}]*)\}", operation.rest)
            branches = inside.group(1) if inside else f"{called.get('true_computation')}, {called['false_computation']}"
            walks = [list(_walk(bodies, branch.strip(" %"), times)) for branch in branches.split(",")]
            yield from max(walks, key=lambda walk: (_total(walk), len(walk)))
        elif operation.kind == "call":
            yield from _walk(bodies, called["to_apply"], times)
        elif operation.kind in ("fusion", "async-start") and _starts(operation, called["calls"]):
            for inner in _walk(bodies, called["calls"], times):
                if _KIND.match(inner.kind) and called["calls"].startswith("all-reduce-scatter"):
                    # the TPU's: an all-reduce of which each device keeps its part, done as one
                    yield dataclasses.replace(inner, kind="reduce-scatter", shape=operation.shape)
                elif _KIND.match(inner.kind):
                    yield inner


def _starts(operation: Operation, called: str) -> bool:
    """Whether a collective inside a fusion begins there.

    The TPU's compiler splits one over a start, fusions that carry it along and a done, and writes it in each.
    """
    carried = operation.name.startswith("async-collective-done") or called.startswith("async_collective_fusion")
    return operation.kind == "async-start" or not carried


def _trips(loop: Operation, condition: list[Operation]) -> int:
    """How often a loop runs: as the compiler states it, else the constant that its counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known.group(1))
    bounds = [
        int(found.group(1))
        for operation in condition
        if operation.kind == "constant" and (found := re.match(r"(\d+)\)", operation.rest))
    ]
    return max(bounds, default=1)


def _total(walk: list[Operation]) -> int:
    return sum(_estimate(operation) for operation in walk)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the collectives of one kind move in a call of the program: their number and their bytes.

    Attributes:
      count: how many there are.
      sent: bytes that one device sends, where the devices form rings: (n - 1) / n of the whole array for gathering and
        scattering among n devices and for all-to-all, twice that for all-reduce, the array itself for a permutation.
    """

    count: int
    sent: float


def collectives(text: str) -> dict[str, Traffic]:
    """Sums the traffic of a program between devices by kind of collective."""
    found: dict[str, Traffic] = {}
    for operation in operations(text):
        match = _KIND.match(operation.kind)
        if match is None:
            continue
        kind = match.group(1)
        before = found.get(kind, Traffic(0, 0.0))
        sent = _sent(kind, operation, bool(match.group(2))) * operation.times
        found[kind] = Traffic(before.count + operation.times, before.sent + sent)
    return found


def _sent(kind: str, operation: Operation, start: bool) -> float:
    sizes = [_size(element, dims) for element, dims in _ARRAY.findall(operation.shape) if element in _BYTES]
    if start and kind == "all-gather":  # (operands, results)
        sizes = sizes[len(sizes) // 2 :]
    if start and kind == "collective-permute":  # (operand, result, and what the device keeps of it)
        sizes = sizes[:1]
    size, n = sum(sizes), _group(operation.rest)
    if kind == "collective-permute":
        return size
    whole = size * n if kind == "reduce-scatter" else size
    return (2 if kind == "all-reduce" else 1) * whole * (n - 1) / n


def _size(element: str, dims: str) -> int:
    return _BYTES[element] * math.prod(int(dim) for dim in dims.split(",") if dim)


def _group(rest: str) -> int:
    """How many devices take part in a collective: 1 where the text does not say."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed.group(1).count(",") + 1
    if meshed := re.search(r"replica_groups=\S*mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed.group(1)))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    return int(tiled.group(2)) if tiled else 1


def custom_calls(text: str) -> dict[str, int]:
    """Counts calls of kernels that the compiler did not make itself, by target; those of a TPU by the kernel's name."""
    found: dict[str, int] = {}
    for operation in operations(text):
        if operation.kind == "custom-call" and (match := re.search(r'custom_call_target="([^"]+)"', operation.rest)):
            name = match.group(1)
            if name == "tpu_custom_call":
                name = f"{name} {operation.origin.rpartition('/')[2] or operation.name}"
            found[name] = found.get(name, 0) + operation.times
    return found


def attention_calls(text: str) -> dict[str, int]:
    """Counts calls of fused attention by name: cuDNN's on GPUs, the flash kernel on TPUs."""
    known = re.compile(r"__cudnn\$fmha|flash|splash")
    return {name: count for name, count in custom_calls(text).items() if known.search(name)}


def cycles(text: str) -> list[tuple[str, int, int]]:
    """Gives (origin, estimated cycles, how often) of a TPU program's operations, summed by origin, the dearest first.

    Empty for programs of compilers that make no estimate. What waits for the end of a transfer is not counted.
    """
    found: dict[str, tuple[int, int]] = {}
    for operation in operations(text):
        estimate = _estimate(operation)
        if estimate:
            total, times = found.get(operation.origin, (0, 0))
            found[operation.origin] = (total + estimate, times + operation.times)
    rows = [(origin, total, times) for origin, (total, times) in found.items()]
    return sorted(rows, key=lambda row: -row[1])


def _estimate(operation: Operation) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', operation.rest)
    if found is None or re.search(r"(async|all-gather|all-reduce|collective)\S*-done", operation.name):
        return 0
    return int(found.group(1)) * operation.times
