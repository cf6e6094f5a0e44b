"""The pickle inside a PyTorch checkpoint, read as data: which tensors there are and where they lie. No code of it ever runs.

Python's unpickler calls whatever a pickle names. This one knows the few operations that torch.save writes for a dict of tensors; names
stay names, the only call it understands is the making of a tensor, and anything else is an error.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAX_DIMS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """Something of a module, by name alone."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PickledTensor:
    """A view of a storage; offset and strides count elements.

    Args:
      storage: name of the file in the archive.
      storage_count: elements that the storage holds.
    """

    dtype: str
    storage: str
    storage_count: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PickleError(ValueError):
    """The pickle holds something that is no dict of tensors, or is damaged."""


def read_tensor_pickle(data: bytes) -> dict[str, PickledTensor]:
    """The tensors of a state dict.

    Raises: PickleError saying what else is in it.
    """
    try:
        value = _Machine().run(data)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise PickleError(f"the pickle is damaged: {type(error).__name__}: {error!s:.100}") from None
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise PickleError(f"the pickle holds a {type(value).__name__}, not a dict of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, PickledTensor):
            raise PickleError(f"{name!r:.80} is a {type(tensor).__name__}, not a tensor")
    return value


class _Machine:
    """A stack, a memo, and the operations that torch.save uses."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._operations: dict[str, Callable[[Any], None]] = {
            "MARK": self._mark, "TUPLE": lambda _: self._push(tuple(self._pop_mark())), "EMPTY_DICT": lambda _: self._push({}),
            "EMPTY_LIST": lambda _: self._push([]), "GLOBAL": lambda arg: self._push(_Name(*arg.split(" ", 1))),
            "STACK_GLOBAL": self._stack_global, "BINPUT": self._put, "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self._memo)), "BINGET": lambda arg: self._push(self._memo[arg]),
            "LONG_BINGET": lambda arg: self._push(self._memo[arg]), "BINPERSID": lambda _: self._push(_storage(self._stack.pop())),
            "REDUCE": self._reduce, "BUILD": lambda _: self._ignore_attributes(), "SETITEM": self._set_item, "SETITEMS": self._set_items,
            "APPEND": self._append, "APPENDS": self._appends, "PROTO": lambda _: None, "FRAME": lambda _: None,
        }  # fmt: skip

    def run(self, data: bytes) -> Any:
        for opcode, arg, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _LITERALS:
                self._push(arg)
            elif name in _CONSTANTS:
                self._push(_CONSTANTS[name])
            elif name in _TUPLES:
                count = _TUPLES[name]
                if len(self._stack) < count:
                    raise PickleError("the pickle is damaged: its stack is empty")
                kept = len(self._stack) - count
                self._stack[kept:] = [tuple(self._stack[kept:])]
            elif name in self._operations:
                self._operations[name](arg)
            else:
                raise PickleError(f"the pickle uses {name}, which a dict of tensors does not need")
        raise PickleError("the pickle has no end")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push(_Name(module, name))

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _dict(self._stack[-1])[key] = value

    def _set_items(self, _: Any) -> None:
        items = self._pop_mark()
        _dict(self._stack[-1]).update(zip(items[::2], items[1::2], strict=True))

    def _append(self, _: Any) -> None:
        value = self._stack.pop()
        _list(self._stack[-1]).append(value)

    def _appends(self, _: Any) -> None:
        items = self._pop_mark()
        _list(self._stack[-1]).extend(items)

    def _ignore_attributes(self) -> None:
        self._stack.pop()  # a state dict's _metadata: the versions of its modules
        _dict(self._stack[-1])

    def _reduce(self, _: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        match called, arguments:
            case _Name("torch._utils", "_rebuild_tensor_v2"), (_Storage() as storage, offset, shape, strides, *_):
                self._push(_tensor(storage, offset, shape, strides))
            case _Name("torch._utils", "_rebuild_parameter"), (PickledTensor() as tensor, *_):
                self._push(tensor)
            case _Name("collections", "OrderedDict"), ():
                self._push({})
            case _Name(module, name), _:
                raise PickleError(f"the pickle calls {module}.{name}, which could run code; only tensors are read")
            case _:
                raise PickleError("the pickle calls something that has no name; only tensors are read")


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise PickleError(f"the pickle sets an item of a {type(value).__name__}")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise PickleError(f"the pickle appends to a {type(value).__name__}")
    return value


def _storage(reference: Any) -> _Storage:
    match reference:
        case ("storage", _Name("torch", kind), str(key), str(), int(count)) if kind in _STORAGES and count >= 0:
            return _Storage(_STORAGES[kind], key, count)
        case ("storage", _Name(module, kind), *_):
            raise PickleError(f"the pickle has a storage of kind {module}.{kind}; there are {', '.join(_STORAGES)}")
        case _:
            raise PickleError(f"the pickle refers to {reference!r:.80}, which is no storage")


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> PickledTensor:
    sound = (
        isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= _MAX_DIMS
        and all(type(number) is int and 0 <= number < 2**62 for number in (offset, *shape, *strides))
    )
    if not sound:
        raise PickleError(f"the pickle has a tensor of offset {offset!r:.30}, shape {shape!r:.80} and strides {strides!r:.80}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if all(shape) and last >= storage.count:
        raise PickleError(f"the pickle has a tensor of shape {shape} that ends at {last}, beyond its storage of {storage.count} elements")
    return PickledTensor(dtype=storage.dtype, storage=storage.key, storage_count=storage.count, offset=offset, shape=shape, strides=strides)
