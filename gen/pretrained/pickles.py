"""A pickle reader that can execute nothing.

Python's own unpickler calls whatever the file names. This one walks the opcodes itself and knows a short list of
names, each of which stands for a function of this module that only stores its arguments. Any other name, and any
opcode that torch and numpy never write, is refused by name.
"""

import dataclasses
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np

from gen.errors import GenError

__all__ = ["Storage", "Tensor", "read_pickle"]

_SCALARS = (str, bytes, int, float, bool, type(None))
_MARK = object()


@dataclasses.dataclass
class Storage:
    """A flat buffer of a torch file; `data` is filled in when the bytes have been found.

    Attributes:
      numel: number of elements of `dtype` (uint8 for untyped storages).
    """

    key: str
    dtype: np.dtype
    numel: int
    data: np.ndarray | None = None


@dataclasses.dataclass
class Tensor:
    """A strided view of a storage, not yet materialised."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def array(self) -> np.ndarray:
        """Gives the contents as a read-only view. Raises ValueError when the view leaves its storage."""
        if self.storage.data is None:
            raise ValueError(f"storage {self.storage.key} has no bytes")
        flat = self.storage.data if self.storage.dtype == self.dtype else self.storage.data.view(self.dtype)
        numel = math.prod(self.shape)
        if numel == 0:
            return np.zeros(self.shape, self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if numel > flat.size or last >= flat.size:
            raise ValueError(f"a tensor of shape {self.shape} does not fit its storage of {flat.size} elements")
        strides = tuple(s * flat.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


@dataclasses.dataclass
class _Array:
    """A numpy array or dtype in the making; `build` receives what its __setstate__ would."""

    state: Any = None

    def build(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        data = data.encode("latin1") if isinstance(data, str) else data
        flat = np.frombuffer(data, dtype.dtype())
        return flat.reshape(tuple(shape), order="F" if fortran else "C")


@dataclasses.dataclass
class _Dtype:
    code: str
    order: Any = "<"

    def build(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype:
        if not isinstance(self.code, str) or self.code.lstrip("<>|=")[:1] not in {"b", "i", "u", "f", "c"}:
            raise ValueError(f"numpy type {self.code!r} is not numeric")
        result = np.dtype(self.code)
        return result.newbyteorder(self.order) if self.order in ("<", ">") else result


@dataclasses.dataclass
class _Inert:
    """An object that weights do not need (command-line arguments, paths): kept as data, never brought to life."""

    name: str
    args: tuple[Any, ...] = ()

    def build(self, state: Any) -> None:
        """Its attributes are of no use here."""


class _Dict(dict[Any, Any]):
    """OrderedDict and defaultdict: attributes such as torch's `_metadata` are dropped."""

    def build(self, state: Any) -> None:
        """See the class."""


@dataclasses.dataclass(frozen=True)
class _Known:
    """A name the file may use; `make` stores arguments and calls nothing of the file's."""

    name: str
    make: Callable[..., Any]


_TORCH_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "uint8": np.uint8,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
_STORAGES: dict[str, str] = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


def _ints(values: Any) -> tuple[int, ...]:
    result = tuple(values)
    if len(result) > 32 or any(type(v) is not int or not 0 <= v < 2**62 for v in result):
        raise ValueError("tensor sizes and strides must be at most 32 non-negative integers")
    return result


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any, dtype: Any = None) -> Tensor:
    shape, strides = _ints(size), _ints(stride)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise ValueError("a tensor needs a storage, and as many strides as sizes")
    return Tensor(storage, _ints((offset,))[0], shape, strides, storage.dtype if dtype is None else dtype)


def _tensor3(storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Tensor:
    return _tensor(storage, offset, size, stride, dtype=np.dtype(dtype))


def _scalar(dtype: _Dtype, data: Any) -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype())[0]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1", "ascii": "ascii"}[encoding])


def _known() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {
        "torch._utils _rebuild_tensor": _tensor,
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch._utils _rebuild_tensor_v3": _tensor3,
        "torch._utils _rebuild_parameter": lambda data, *_: data,
        "torch._utils _rebuild_parameter_with_state": lambda data, *_: data,
        "torch Size": lambda values=(): tuple(values),
        "torch device": lambda *args: _Inert("torch.device", args),
        "torch.serialization _get_layout": lambda *args: _Inert("torch.layout", args),
        "collections OrderedDict": lambda items=(): _Dict(_pairs(items)),
        "collections defaultdict": lambda *_: _Dict(),
        "_codecs encode": _encode,
        "numpy ndarray": lambda *_: _Array(),
        "numpy dtype": lambda code, *_: _Dtype(code),
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table |= {f"{module} _reconstruct": lambda *_: _Array(), f"{module} scalar": _scalar}
    for module in ("builtins", "__builtin__"):
        table |= {f"{module} {name}": lambda *args, name=name: _Inert(name, args) for name in ("set", "frozenset")}
        table |= {f"{module} {name}": lambda *_, name=name: _Inert(name) for name in ("list", "dict", "int", "float")}
    for name in ("argparse Namespace", "pathlib PosixPath", "pathlib PurePosixPath", "pathlib WindowsPath"):
        table[name] = lambda *args, name=name: _Inert(name, args)
    return table


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    pairs = [(k, v) for k, v in items]
    if not all(isinstance(k, _SCALARS) for k, _ in pairs):
        raise ValueError("a dictionary key is neither text nor a number")
    return pairs


_KNOWN = {name: _Known(name, make) for name, make in _known().items()}
_CONSTANTS: dict[str, Any] = {
    **{f"torch {name}": np.dtype(kind) for name, kind in _TORCH_TYPES.items()},
    **{f"torch {name}": np.dtype(_TORCH_TYPES[kind]) for name, kind in _STORAGES.items()},
    "torch.storage UntypedStorage": np.dtype(np.uint8),
}

Persistent = Callable[[Any], Any]
# "module name" -> a function that stores its arguments, or None where the name is not known
More = Callable[[str], Callable[..., Any] | None]


def read_pickle(stream: IO[bytes], persistent: Persistent, where: str, more: More = lambda name: None) -> Any:
    """Reads the next object of a pickle stream, with tensors as `Tensor` and unneeded objects as inert data.

    Args:
      persistent: turns a persistent id into what it stands for (a `Storage`).
      where: names the file in error messages.
      more: names known besides torch's and numpy's.
    Raises GenError for a name or opcode outside the known ones, and for a damaged stream.
    """
    try:
        return _Machine(persistent, where, more).run(stream)
    except GenError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError) as error:
        text = " ".join(str(error).split())[:120]
        raise GenError(f"{where} is damaged ({text or type(error).__name__}); download or write it again") from None


class _Machine:
    """The pickle machine: a stack, a memo, and no power to call anything but `_KNOWN`."""

    def __init__(self, persistent: Persistent, where: str, more: More) -> None:
        self.persistent, self.where, self.more = persistent, where, more
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            else:
                raise GenError(f"{self.where} uses the pickle opcode {name}, which weight files never need; refused")
        raise ValueError("it ends too early")

    def until_mark(self) -> list[Any]:
        position = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def top(self, count: int) -> tuple[Any, ...]:
        if count > len(self.stack):
            raise ValueError("its stack runs empty")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def put(self, index: Any) -> None:
        self.memo[int(index)] = self.stack[-1]

    def get(self, index: Any) -> None:
        self.stack.append(self.memo[int(index)])

    def find(self, name: str) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _KNOWN:
            self.stack.append(_KNOWN[name])
        elif (make := self.more(name)) is not None:
            self.stack.append(_Known(name, make))
        else:
            text = name.replace(" ", ".")[:80]
            raise GenError(f"{self.where} asks for '{text}', which weight files never need; refused, nothing was run")

    def stack_global(self, _: Any) -> None:
        module, name = self.top(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global is not named by text")
        self.find(f"{module} {name}")

    def call(self, _: Any) -> None:
        function, args = self.top(2)
        if not isinstance(function, _Known):
            raise ValueError("it calls something that is no function")
        self.stack.append(function.make(*args))

    def call_keywords(self, _: Any) -> None:
        function, args, keywords = self.top(3)
        if keywords:
            raise ValueError("it passes keyword arguments")
        self.stack += [function, args]
        self.call(None)

    def build(self, _: Any) -> None:
        (state,) = self.top(1)
        self.stack[-1].build(state)

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            return self._refill(self.stack[-1])
        self.stack[-1].extend(items)

    def _refill(self, target: Any) -> None:
        if not isinstance(target, _Inert):
            raise ValueError("it appends to something that is no list")

    def update(self, items: list[Any]) -> None:
        pairs = _pairs(zip(items[::2], items[1::2], strict=True))
        if not isinstance(self.stack[-1], dict):
            return self._refill(self.stack[-1])
        self.stack[-1].update(pairs)

    def new_dict(self, items: list[Any]) -> None:
        self.stack.append({})
        self.update(items)


_LITERALS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_OPERATIONS: Mapping[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.stack.append(_MARK),
    "POP": lambda m, _: m.top(1),
    "POP_MARK": lambda m, _: m.until_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_SET": lambda m, _: m.stack.append(_Inert("set")),
    "LIST": lambda m, _: m.stack.append(m.until_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.until_mark())),
    "TUPLE1": lambda m, _: m.stack.append(m.top(1)),
    "TUPLE2": lambda m, _: m.stack.append(m.top(2)),
    "TUPLE3": lambda m, _: m.stack.append(m.top(3)),
    "FROZENSET": lambda m, _: m.stack.append(_Inert("frozenset", tuple(m.until_mark()))),
    "DICT": lambda m, _: m.new_dict(m.until_mark()),
    "APPEND": lambda m, _: m.extend(list(m.top(1))),
    "APPENDS": lambda m, _: m.extend(m.until_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.until_mark()),
    "SETITEM": lambda m, _: m.update(list(m.top(2))),
    "SETITEMS": lambda m, _: m.update(m.until_mark()),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.top(1)[0])),
}
