"""A pickle of plain data and numpy arrays as a description of itself: nothing that a pickle says is ever called.

`scan` walks the opcodes and builds containers, numbers and short texts. Long byte strings stay in the file as a `Span`, and what a pickle
would have called stays a `Call`; names outside `NAMES` are refused. numpy arrays are then read from where their bytes lie (`array_of`), so a
batch of any size needs the memory of the rows that are asked for, and a hostile one gets nothing run.
"""

from __future__ import annotations

import codecs
import pickle
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

SHORT = 4096  # bytes; longer ones stay in the file
MOST_OPCODES = 20_000_000
NAMES = {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
NAMES |= {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")} | {("numpy", "ndarray"), ("numpy", "dtype")}
NAMES |= {("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes")}  # how Python 3 writes bytes in protocol 2


class Refused(ValueError):
    """The pickle is damaged, or holds more than plain data; the text says which."""


@dataclass(frozen=True, eq=False)
class Span:
    """Bytes that stay in the file. `utf8`: each byte was written as the character of that number, in UTF-8 (Python 3's protocols 0 to 2)."""

    offset: int
    length: int
    utf8: bool = False


@dataclass(eq=False)
class Call:
    """What the pickle would have had called: the last part of its name, arguments, and the state given to the result."""

    name: str
    args: tuple | None = None
    state: object = None


_MARK = object()
_LENGTHS = {pickle.SHORT_BINSTRING: 1, pickle.BINSTRING: 4, pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4, pickle.BINBYTES8: 8, pickle.BYTEARRAY8: 8}
_LENGTHS |= {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}
_TEXTS = (pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8)
_INTS = {pickle.BININT: (4, True), pickle.BININT1: (1, False), pickle.BININT2: (2, False)}
_GETS, _PUTS = {pickle.BINGET: 1, pickle.LONG_BINGET: 4}, {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
_FIXED = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_FRESH = {pickle.EMPTY_DICT: dict, pickle.EMPTY_LIST: list, pickle.EMPTY_TUPLE: tuple}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


def scan(file: BinaryIO) -> object:
    """What a pickle of protocol 2 or newer holds. Raises Refused."""
    try:
        return _Scanner(file).run()
    except (IndexError, TypeError, KeyError, UnicodeError, OverflowError) as fault:
        raise Refused(f"the pickle is damaged ({type(fault).__name__})") from None


class _Scanner:
    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise Refused("the pickle is cut off")
        return data

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def run(self) -> object:
        if not (head := self.file.read(2)).startswith(pickle.PROTO) or head[1:] not in (b"\2", b"\3", b"\4", b"\5"):
            raise Refused("it is no pickle of protocol 2 to 5")
        for _ in range(MOST_OPCODES):
            op = self.take(1)
            if op == pickle.STOP:
                return self.stack.pop()
            self.step(op)
        raise Refused("the pickle has more parts than any batch")

    def step(self, op: bytes) -> None:
        push = self.stack.append
        if op in _LENGTHS:
            push(self.text(self.number(_LENGTHS[op]), op in _TEXTS))
        elif op in _INTS:
            push(self.number(*_INTS[op]))
        elif op == pickle.LONG1:
            push(self.number(self.number(1), True))
        elif op == pickle.BINFLOAT:
            push(float(np.frombuffer(self.take(8), ">f8")[0]))
        elif op in _FIXED:
            push(_FIXED[op])
        elif op in _FRESH:
            push(_FRESH[op]())
        elif op in _GETS:
            push(self.memo[self.number(_GETS[op])])
        elif op in _PUTS:
            self.memo[self.number(_PUTS[op])] = self.stack[-1]
        elif op == pickle.MEMOIZE:
            self.memo[len(self.memo)] = self.stack[-1]
        elif op == pickle.MARK:
            push(_MARK)
        elif op == pickle.FRAME:
            self.take(8)
        else:
            self.build(op)

    def build(self, op: bytes) -> None:
        stack = self.stack
        if op in _TUPLES:
            count = _TUPLES[op]
            stack[-count:] = [tuple(stack[-count:])]
        elif op in (pickle.TUPLE, pickle.LIST):
            items = self.since_mark()
            stack.append(tuple(items) if op == pickle.TUPLE else items)
        elif op in (pickle.APPEND, pickle.APPENDS):
            items = self.since_mark() if op == pickle.APPENDS else [stack.pop()]
            _plain(stack[-1], list).extend(items)
        elif op in (pickle.SETITEM, pickle.SETITEMS):
            items = self.since_mark() if op == pickle.SETITEMS else [stack.pop(-2), stack.pop()]
            for key, value in zip(items[::2], items[1::2], strict=True):
                _plain(stack[-1], dict)[_plain(key, (str, bytes))] = value  # Python itself does not survive the hash of a key nested deep enough
        elif op == pickle.GLOBAL:
            stack.append(self.called(*(self.file.readline(256).rstrip(b"\n").decode() for _ in range(2))))
        elif op == pickle.STACK_GLOBAL:
            name, module = stack.pop(), stack.pop()
            stack.append(self.called(_plain(module, str), _plain(name, str)))
        elif op == pickle.REDUCE:
            args, function = stack.pop(), stack.pop()
            stack.append(_bytes_of(Call(_plain(function, Call).name, _plain(args, tuple))))
        elif op == pickle.BUILD:
            state = stack.pop()
            _plain(stack[-1], Call).state = state
        else:
            raise Refused(f"its opcode {op!r} is more than plain data and arrays need")

    def text(self, length: int, is_text: bool) -> object:
        offset = self.file.tell()
        if offset + length > self.size:
            raise Refused("the pickle is cut off")
        if length > SHORT:
            self.file.seek(offset + length)
            return Span(offset, length, is_text)
        data = self.take(length)
        return data.decode("utf-8", "surrogatepass") if is_text else data

    def since_mark(self) -> list:
        at = next((i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _MARK), None)
        if at is None:
            raise Refused("the pickle is damaged (it ends what it did not begin)")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def called(self, module: str, name: str) -> Call:
        if (module, name) not in NAMES:
            raise Refused(f"it asks to call {module}.{name}; it was not called, and plain data needs no such thing")
        return Call(name)


def _bytes_of(call: Call) -> Call | bytes:
    """The short bytes that protocol 2 writes as a text to be encoded; any other call as it is."""
    if call.name == "bytes":
        return b"" if not call.args else call
    return call.args[0].encode("latin-1") if call.name == "encode" and isinstance(call.args[0], str) else call


def _plain(value: object, kind: type | tuple[type, ...]):
    if not isinstance(value, kind):
        raise Refused("the pickle is damaged (a part is not what it is used as)")
    return value


@dataclass(frozen=True)
class Array:
    """A numpy array whose bytes lie in `source`, a Span of the file where they are many."""

    shape: tuple[int, ...]
    dtype: np.dtype
    source: Span | bytes

    def open(self, file: BinaryIO) -> Bytes:
        return Bytes(file, self.source)


def array_of(value: object) -> Array | None:
    """The array that a Call describes; None if it is something else. Raises Refused for one in Fortran's order or of Python objects."""
    try:
        if isinstance(value, Call) and value.name == "_reconstruct":
            _, shape, kind, fortran, raw = value.state
        elif isinstance(value, Call) and value.name == "_frombuffer":
            raw, kind, shape, order = value.args
            fortran = order == "F"
        else:
            return None
        if isinstance(raw, Call) and raw.name == "encode":
            raw = raw.args[0]  # a Span of text
        dtype = _dtype(kind)
        shape = tuple(int(side) for side in shape)
    except Refused:
        raise
    except (TypeError, ValueError, AttributeError, IndexError):
        raise Refused("an array in the pickle is damaged") from None
    if (fortran and len(shape) > 1) or min(shape, default=0) < 0 or not isinstance(raw, (Span, bytes)):
        raise Refused("an array in the pickle is in Fortran's order or damaged")
    return Array(shape, dtype, raw)


def _dtype(value: Call) -> np.dtype:
    """`dtype('i8', False, True)` with state (3, '<', ...)."""
    texts = [t.decode() if isinstance(t, bytes) else t for t in (value.args[0], value.state[1])]
    if value.name != "dtype" or texts[0] not in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"):
        raise Refused("an array in the pickle is not of whole numbers")
    return np.dtype((texts[1] if texts[1] in "<>" else "") + texts[0])


def integers_of(value: object, file: BinaryIO, most: int) -> list[int]:
    """A list or array of at most `most` whole numbers. Raises Refused."""
    array = array_of(value)
    if array is not None:
        if len(array.shape) != 1 or array.shape[0] > most:
            raise Refused(f"its labels have shape {array.shape}, not ({most},)")
        data = array.open(file).read(array.shape[0] * array.dtype.itemsize)
        return np.frombuffer(data[: len(data) // array.dtype.itemsize * array.dtype.itemsize], array.dtype).tolist()
    try:
        numbers = [_scalar(v) if isinstance(v, Call) else v for v in _plain(value, list)]
    except (TypeError, ValueError, AttributeError, IndexError):
        raise Refused("its labels are not whole numbers") from None
    if not all(type(n) is int for n in numbers):
        raise Refused("its labels are not whole numbers")
    return numbers


def _scalar(value: Call) -> int:
    """`scalar(dtype, bytes)`, a number of numpy's in a list."""
    kind, raw = value.args
    return int(np.frombuffer(_plain(raw, bytes), _dtype(kind))[0])


class Bytes:
    """The bytes of an array as a file that can be read from any place; going back in a UTF-8 text begins it again."""

    def __init__(self, file: BinaryIO, source: Span | bytes):
        self.file, self.source = file, source
        self.position = 0
        self._restart()

    def _restart(self) -> None:
        self.position, self.buffer, self.used = 0, b"", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def seek(self, position: int) -> None:
        if isinstance(self.source, Span) and self.source.utf8:
            if position < self.position:
                self._restart()
            while self.position < position and self.read(min(1 << 20, position - self.position)):
                pass
        else:
            self.position = position

    def read(self, size: int) -> bytes:
        """At most `size` bytes; fewer at the end."""
        if not isinstance(self.source, Span):
            data = self.source[self.position : self.position + size]
        elif not self.source.utf8:
            self.file.seek(self.source.offset + self.position)
            data = self.file.read(max(0, min(size, self.source.length - self.position)))
        else:
            while len(self.buffer) < size and self.used < self.source.length:
                self.file.seek(self.source.offset + self.used)
                chunk = self.file.read(min(1 << 16, self.source.length - self.used))
                if not chunk:
                    break
                self.used += len(chunk)
                self.buffer += self.decoder.decode(chunk).encode("latin-1")
            data, self.buffer = self.buffer[:size], self.buffer[size:]
        self.position += len(data)
        return data
