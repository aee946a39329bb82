"""Functions of machine code, written down as in any language: numbers, addresses, loops, and vectors of float32. What they are for is in `microcode.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llvmlite import ir

INT, BIT, FLOAT, POINTER, NOTHING = ir.IntType(64), ir.IntType(1), ir.FloatType(), ir.PointerType(), ir.VoidType()
INDEX = ir.IntType(32)
ALIGNED = 4  # bytes, as any float32 is


class Number:
    """An int64 of the code, with the arithmetic of one."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value | int):
        self.builder, self.value = builder, INT(value) if isinstance(value, int) else value

    def _with(self, make: Callable[[ir.Value, ir.Value], ir.Value], other: Number | int) -> Number:
        return Number(self.builder, make(self.value, INT(other) if isinstance(other, int) else other.value))

    def __add__(self, other: Number | int) -> Number:
        return self._with(self.builder.add, other)

    def __sub__(self, other: Number | int) -> Number:
        return self._with(self.builder.sub, other)

    def __mul__(self, other: Number | int) -> Number:
        return self._with(self.builder.mul, other)

    def __floordiv__(self, other: Number | int) -> Number:
        return self._with(self.builder.sdiv, other)

    def __mod__(self, other: Number | int) -> Number:
        return self._with(self.builder.srem, other)

    def below(self, other: Number | int) -> ir.Value:
        return self._with(lambda a, b: self.builder.icmp_signed("<", a, b), other).value

    def least(self, other: Number | int) -> Number:
        return self._with(lambda a, b: self.builder.select(self.builder.icmp_signed("<", a, b), a, b), other)


class Address:
    """Of numbers of one kind in memory, float32 unless said; `+` goes so many numbers on."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value, kind: ir.Type = FLOAT):
        self.builder, self.value, self.kind = builder, value, kind

    def __add__(self, numbers: Number | int) -> Address:
        return Address(self.builder, self.builder.gep(self.value, [INT(numbers) if isinstance(numbers, int) else numbers.value], source_etype=self.kind), self.kind)

    def load(self, kind: ir.Type | None = None) -> ir.Value:
        """What lies there, one of its numbers or another kind of value: a vector of them."""
        return self.builder.load(self.value, typ=kind or self.kind, align=ALIGNED)

    def number(self) -> Number:
        return Number(self.builder, self.load())

    def store(self, value: ir.Value) -> None:
        self.builder.store(value, self.value, align=ALIGNED)


class Code:
    """One function that is being written, with vectors of so many lanes. Its variables lie in memory here, and in registers once LLVM is done."""

    def __init__(self, module: ir.Module, name: str, kinds: list[ir.Type], lanes: int):
        self.module, self.function, self.lanes = module, ir.Function(module, ir.FunctionType(NOTHING, kinds), name), lanes
        self.variables, begin = (self.function.append_basic_block(name) for name in ("variables", "begin"))
        self.begin, self.builder = begin, ir.IRBuilder(begin)
        self.vector = vector(lanes)
        self.zeros = self.vector([0.0] * lanes)

    def close(self) -> None:
        ir.IRBuilder(self.variables).branch(self.begin)
        self.builder.ret_void()

    def number(self, value: ir.Value | int) -> Number:
        return Number(self.builder, value)

    def variable(self, value: ir.Value) -> Address:
        found = Address(self.builder, ir.IRBuilder(self.variables).alloca(value.type), value.type)
        found.store(value)
        return found

    @contextmanager
    def loop(self, stop: Number | int, step: Number | int = 1) -> Iterator[Number]:
        """0, step, ... below stop."""
        with self.going(stop) as (at, advance):
            yield at
            advance(step)

    @contextmanager
    def going(self, stop: Number | int) -> Iterator[tuple[Number, Callable[[Number | int], None]]]:
        """The same where each turn says with `advance` how far it went."""
        counter = self.variable(INT(0))
        asks, does, after = (self.function.append_basic_block() for _ in range(3))
        self.builder.branch(asks)
        self.builder.position_at_end(asks)
        at = counter.number()
        self.builder.cbranch(at.below(stop), does, after)
        self.builder.position_at_end(does)
        yield at, lambda step: counter.store((at + step).value)
        self.builder.branch(asks)
        self.builder.position_at_end(after)

    def spread(self, value: ir.Value, lanes: int | None = None) -> ir.Value:
        """A vector of one number."""
        lanes = lanes or self.lanes
        unknown = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        return self.builder.shuffle_vector(self.builder.insert_element(unknown, value, INDEX(0)), unknown, ir.VectorType(INDEX, lanes)([0] * lanes))

    def first(self, count: Number, lanes: int | None = None) -> ir.Value:
        """A mask of the lanes below count."""
        lanes = lanes or self.lanes
        return self.builder.icmp_signed("<", ir.VectorType(INT, lanes)(list(range(lanes))), self.spread(count.value, lanes))

    def load(self, at: Address, mask: ir.Value) -> ir.Value:
        """A vector of which the lanes of a mask are read, and the others 0."""
        kind = vector(mask.type.count)
        return self.call("llvm.masked.load", kind, at.value, INDEX(ALIGNED), mask, kind([0.0] * mask.type.count), of=f".v{kind.count}f32.p0")

    def store(self, value: ir.Value, at: Address, mask: ir.Value) -> None:
        """The lanes of a mask alone."""
        self.call("llvm.masked.store", NOTHING, value, at.value, INDEX(ALIGNED), mask, of=f".v{mask.type.count}f32.p0")

    def product(self, a: ir.Value, b: ir.Value, more: ir.Value) -> ir.Value:
        """a * b + more, rounded once."""
        return self.call("llvm.fma", self.vector, a, b, more, of=f".v{self.lanes}f32")

    def absolute(self, value: ir.Value) -> ir.Value:
        return self.call("llvm.fabs", value.type, value, of=f".v{value.type.count}f32" if value.type == self.vector else ".f32")

    def real(self, number: Number) -> ir.Value:
        """As a float32."""
        return self.builder.sitofp(number.value, FLOAT)

    def copy(self, to: Address, of: Address, numbers: Number) -> None:
        self.call("llvm.memcpy", NOTHING, to.value, of.value, (numbers * 4).value, BIT(0), of=".p0.p0.i64")

    def call(self, name: str, gives: ir.Type, *arguments: ir.Value, of: str) -> ir.Value:
        """What LLVM has itself, of some kinds."""
        known = self.module.globals.get(name + of) or ir.Function(self.module, ir.FunctionType(gives, [a.type for a in arguments]), name + of)
        return self.builder.call(known, arguments)

    def turned(self, rows: list[ir.Value]) -> list[ir.Value]:
        """As many vectors as lanes, their columns as rows: blocks of 1, 2, 4 ... change places across the diagonal."""
        far = 1
        while far < self.lanes:
            kept = [lane & far == 0 for lane in range(self.lanes)]
            low, high = [lane if keep else lane - far + self.lanes for lane, keep in enumerate(kept)], [lane + far if keep else lane + self.lanes for lane, keep in enumerate(kept)]
            pairs = [(rows[i], rows[i + far]) for i in range(self.lanes) if i & far == 0]
            mixed = [tuple(self.builder.shuffle_vector(*pair, ir.VectorType(INDEX, self.lanes)(order)) for order in (low, high)) for pair in pairs]
            found = iter(mixed)
            rows = list(rows)
            for i in range(self.lanes):
                if i & far == 0:
                    rows[i], rows[i + far] = next(found)
            far *= 2
        return rows

    def total(self, value: ir.Value) -> ir.Value:
        """The sum of a vector's lanes, by halves."""
        lanes = [self.builder.extract_element(value, INDEX(i)) for i in range(value.type.count)]
        while len(lanes) > 1:
            lanes = [self.builder.fadd(a, b) for a, b in zip(lanes, lanes[len(lanes) // 2 :])]
        return lanes[0]


def vector(lanes: int) -> ir.VectorType:
    return ir.VectorType(FLOAT, lanes)
