"""A reader of pickles of plain data that executes nothing.

`pickle` calls any function that a pickle names. Here its opcodes are read one by one
(`pickletools.genops`), and only those that build lists, tuples, bytes, text, booleans and integers
have an effect. Functions are names that are never resolved; only the calls by which NumPy arrays
and Python's bytes are pickled are interpreted, as data.

Source: CPython, `Lib/pickletools.py`, which describes every opcode.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ..data.formats.decode import DataError

MAX_OPCODES = 1 << 23  # of a file, which bounds its objects


class Located(bytes):
    """Bytes with their offset in the file."""

    at: int = -1


class Name(NamedTuple):
    """The name of a global, "module name", which is never resolved."""

    text: str


@dataclass
class Dtype:
    """A NumPy type, such as "u1" or "S20", little-endian."""

    code: str


@dataclass
class Array:
    """A NumPy array.

    Attributes:
        items: the content's bytes, or a list of objects for the type "O8".
    """

    dtype: Dtype | None = None
    shape: tuple[int, ...] = ()
    items: bytes | list[Any] | None = None


class _Refused(Exception):
    pass


_MARK = object()
_ENCODE = "_codecs encode"  # by which Python 3 writes bytes for Python 2
_BYTES = ("builtins bytes", "__builtin__ bytes", "builtins bytearray", "__builtin__ bytearray")
_NUMPY = ("numpy.core.", "numpy._core.")  # before and since NumPy 2
_RECONSTRUCT, _SCALAR, _FROMBUFFER = (
    tuple(home + name for home in _NUMPY)
    for name in ("multiarray _reconstruct", "multiarray scalar", "numeric _frombuffer")
)
_KNOWN = (
    _ENCODE,
    *_BYTES,
    "numpy ndarray",
    "numpy dtype",
    *_RECONSTRUCT,
    *_SCALAR,
    *_FROMBUFFER,
)
# Opcodes that push their argument.
_PLAIN = (
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "UNICODE",
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTENT = {  # opcodes of bytes, with the size of the opcode before the content
    "SHORT_BINBYTES": 2,
    "BINBYTES": 5,
    "BINBYTES8": 9,
    "BYTEARRAY8": 9,
    "SHORT_BINSTRING": 2,  # Python 2's bytes
    "BINSTRING": 5,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME")


def load(path: str | Path) -> Any:
    """Return the content of a pickle of plain data.

    Returns:
        Lists, tuples, `Located` bytes, str, bool, int, None and `Array`. Python 2's strings are
        bytes.

    Raises:
        DataError: for a truncated or damaged pickle, and for one that asks for anything else,
            naming the file, the offset and the request.

    Memory: that of the content, and at most 2**23 objects.
    """
    path = Path(path)
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            return _Machine(path).run(mapped)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is empty") from error  # an empty file cannot be mapped


class _Machine:
    """The stack machine of pickles, with its stack and memo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: mmap.mmap) -> Any:
        at = 0
        try:
            for number, (opcode, argument, position) in enumerate(
                pickletools.genops(cast(IO[bytes], file))
            ):
                at = position or 0
                if number >= MAX_OPCODES:
                    raise _Refused(f"more than {MAX_OPCODES:,} opcodes")
                if opcode.name == "STOP":
                    (value,) = self.stack
                    return value
                self.step(opcode.name, argument, at)
        except _Refused as error:
            raise DataError(
                f"{self.path}, offset {at}: {error}; a pickle may hold lists, tuples, bytes, text, "
                "booleans, integers and NumPy arrays of them, and is never executed"
            ) from None
        except Exception as error:  # damaged bytes may raise any error
            raise DataError(f"{self.path}, offset {at}: not a whole pickle: {error!r}") from None
        raise DataError(f"{self.path}: not a whole pickle")

    def step(self, name: str, argument: Any, at: int) -> None:
        stack, memo = self.stack, self.memo
        if name in _CONTENT:
            raw = argument.encode("latin-1") if isinstance(argument, str) else argument
            content = Located(raw)
            content.at = at + _CONTENT[name]
            stack.append(content)
        elif name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "LIST":
            stack.append(self.marked())
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(items[::-1]))
        elif name == "APPEND":
            item = self.pop()
            self.top(list).append(item)
        elif name == "APPENDS":
            items = self.marked()
            self.top(list).extend(items)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if argument is None else argument] = self.top(object)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "POP":
            stack.pop()
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                argument = f"{module} {attribute}"
            if argument not in _KNOWN:
                raise _Refused(f"it asks for {argument.replace(' ', '.')}")
            stack.append(Name(argument))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            if not isinstance(function, Name) or not isinstance(arguments, tuple):
                raise _Refused("it asks for a call")
            stack.append(_call(function.text, arguments))
        elif name == "BUILD":
            state = self.pop()
            _build(self.top(object), state)
        elif name not in _IGNORED:
            raise _Refused(f"it asks for the opcode {name}")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if value is _MARK or not isinstance(value, kind):
            raise ValueError(f"expected a {kind.__name__}")
        return value

    def marked(self) -> list[Any]:
        """Pop the values that were pushed since the last mark."""
        items = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]


def _call(function: str, arguments: tuple[Any, ...]) -> Any:
    """Return the result of calling a known name, as data."""
    if function == _ENCODE:
        text, coding = arguments
        if coding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise _Refused(f"it asks for the coding {coding!r}")
        return Located(text.encode("latin-1"))
    if function in _BYTES:
        if arguments and not isinstance(arguments[0], bytes):
            raise _Refused("it asks for a call of bytes")
        return arguments[0] if arguments else Located()
    if function == "numpy dtype" and isinstance(arguments[0], (str, bytes)):
        code = arguments[0]
        return Dtype(code.decode("ascii") if isinstance(code, bytes) else code)
    if function in _RECONSTRUCT and arguments[0] == Name("numpy ndarray"):
        return Array()
    if function in _SCALAR:
        dtype, content = arguments
        return _array(dtype, (), content)
    if function in _FROMBUFFER:
        content, dtype, shape = arguments[:3]
        return _array(dtype, shape, content)
    raise _Refused(f"it asks for a call of {function.replace(' ', '.')}")


def _build(value: Any, state: Any) -> None:
    """Set the state of an array or a type."""
    if isinstance(value, Dtype) and isinstance(state, tuple) and state[1] in ("|", "<", "="):
        if any(part is not None for part in state[2:5]):
            raise _Refused("it asks for a NumPy type with fields")
        if value.code in ("S", "V", "U") and len(state) > 5 and isinstance(state[5], int):
            value.code += str(state[5])
    elif isinstance(value, Array) and isinstance(state, tuple) and len(state) == 5:
        filled = _array(state[2], state[1], state[4])
        value.dtype, value.shape, value.items = filled.dtype, filled.shape, filled.items
    else:
        raise _Refused("it asks for the state of an object")


def _array(dtype: Any, shape: Any, items: Any) -> Array:
    """Return an array; refuse one whose items do not match its type and shape."""
    if not isinstance(dtype, Dtype) or not isinstance(shape, tuple) or len(shape) > 32:
        raise _Refused("it asks for a NumPy array without a type or a shape")
    kind, size = dtype.code[:1], dtype.code[1:]
    count = 1
    for side in shape:
        if type(side) is not int or not 0 <= side < 1 << 40:
            raise _Refused(f"it asks for a NumPy array of shape {shape}")
        count *= side
    if kind == "O":
        fits = isinstance(items, list) and len(items) == count
    elif kind in "biuS" and size.isdecimal() and len(size) < 12:
        fits = isinstance(items, bytes) and len(items) == count * int(size)
    else:
        raise _Refused(f"it asks for a NumPy array of {dtype.code!r}")
    if not fits:
        raise _Refused(f"it asks for a NumPy array of shape {shape} without as many items")
    return Array(dtype, shape, items)


def items(value: Any, of_what: Callable[[Any], Any]) -> list[Any]:
    """Return the items of a list, a tuple or an array, each converted by `of_what`.

    Raises:
        DataError: for anything else, and as `of_what`.
    """
    if isinstance(value, Array) and value.dtype is not None and len(value.shape) == 1:
        kind, size = value.dtype.code[0], value.dtype.code[1:]
        if kind == "O":
            value = value.items
        else:
            content, width = value.items, int(size)
            assert isinstance(content, bytes)
            parts = [content[i : i + width] for i in range(0, width * value.shape[0], width or 1)]
            if kind == "S":
                value = [part.rstrip(b"\0") for part in parts]
            else:
                value = [int.from_bytes(part, "little", signed=kind == "i") for part in parts]
    if not isinstance(value, (list, tuple)):
        raise DataError(f"expected a list, got {type(value).__name__}")
    return [of_what(item) for item in value]
