"""The machine code of `microkernels.py`: what it computes, loop by loop, and its compilation for the processor that this runs on."""

from __future__ import annotations

import ctypes
import mmap
from typing import NamedTuple

from llvmlite import binding, ir

from pipeline.saliency.assembly import BIT, INT, POINTER, Address, Code, Number, vector
from pipeline.saliency.plans import TAPS, Addresses, Sizes


class Host(NamedTuple):
    """A processor: its name and what it can do in LLVM's words; float32 numbers of a register; the filters of a tile, and the registers that its columns take."""

    name: str
    features: str
    lanes: int
    rows: int
    wide: int


class Compiled(NamedTuple):
    """The two kernels, made for a processor: each takes an array of Addresses and one of Sizes. engine: has the code, which goes with it."""

    host: Host
    dense: ctypes._CFuncPtr
    depthwise: ctypes._CFuncPtr
    engine: binding.ExecutionEngine


def host() -> Host:
    """This processor. Raises RuntimeError where it has no vectors that multiply and add at once, or may not run what was not there when the process began."""
    if not _runs_new_code():
        raise RuntimeError("this process may not run code that it makes")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = binding.get_host_cpu_name(), binding.get_host_cpu_features()
    if features.get("avx512f"):
        return Host(name, features.flatten() + ",-prefer-256-bit", 16, 8, 2)  # 16 + 2 + 1 of 32 registers
    if features.get("avx2") and features.get("fma"):
        return Host(name, features.flatten(), 8, 6, 2)  # 12 + 2 + 1 of 16
    if binding.get_process_triple().startswith(("aarch64", "arm64")):
        return Host(name, features.flatten(), 4, 8, 2)  # 16 + 2 + 1 of 32
    raise RuntimeError("this processor has neither AVX2 with FMA nor NEON")


def _runs_new_code() -> bool:
    """Whether memory can be written first and run then. LLVM dies where it cannot."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC) == 0


def compiled(host: Host, absolute: bool) -> Compiled:
    """absolute: |g| is added up along columns, and else g. Takes some tenths of a second. Raises RuntimeError where LLVM cannot."""
    module = ir.Module()
    dense(module, host, absolute)
    depthwise(module, host, absolute)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    machine = binding.Target.from_default_triple().create_target_machine(cpu=host.name, features=host.features, opt=3)
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False  # it is written as it shall be
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    begin = [engine.get_function_address(name) for name in ("dense", "depthwise")]
    if not all(begin):
        raise RuntimeError("LLVM has made no code")
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    return Compiled(host, *map(kernel, begin), engine)


class Kernel(Code):
    """Of a layer's part: `at` and `size` are what it is given."""

    def __init__(self, module: ir.Module, name: str, lanes: int):
        super().__init__(module, name, [POINTER, POINTER], lanes)
        given = Address(self.builder, self.function.args[0], POINTER), Address(self.builder, self.function.args[1], INT)
        places = [(given[0] + i).load() for i in range(len(Addresses._fields))]
        self.at = Addresses(*(Address(self.builder, value, *([INT] if name in ("taps", "standing") else [])) for name, value in zip(Addresses._fields, places)))
        self.size = Sizes(*((given[1] + i).number() for i in range(len(Sizes._fields))))
        with self.loop(self.size.high) as y, self.loop(self.size.across) as x:
            (self.at.standing + (y * self.size.across + x)).store((y * self.size.down + x * self.size.right).value)

    def sample(self, n: Number) -> tuple[Address, Address, Address]:
        """(input, gradient, found) of one, the first two channels-last, the input with its padding."""
        at, size = self.at, self.size
        image, gradient = at.input + n * size.image, at.gradient + n * size.gradients
        copied, plain, plain_gradient = (self.number(0).below(flag) for flag in (size.copied, size.plain, size.plain_gradient))
        with self.builder.if_then(copied), self.loop(size.lines) as line:
            to = at.bordered + (size.border + line * size.bordered_row)
            with self.builder.if_else(plain) as (turn, take):
                with turn:
                    self.turn(to, image + line * size.line, size.channels, size.channels, size.line, size.image // size.channels)
                with take:
                    self.copy(to, image + line * size.line * size.channels, size.line * size.channels)
        with self.builder.if_then(plain_gradient):
            self.turn(at.turned, gradient, size.gradient_row, size.gradient_row, size.places, size.places)
        image = Address(self.builder, self.builder.select(copied, at.bordered.value, image.value))
        return image + size.skipped, Address(self.builder, self.builder.select(plain_gradient, at.turned.value, gradient.value)), at.found + n * size.all_outs

    def turn(self, to: Address, of: Address, row: Number, channels: Number, places: Number, apart: Number) -> None:
        """Channel after channel, so far apart -> place after place, a row from each other."""
        each = range(self.lanes)
        with self.loop(channels, self.lanes) as channel, self.loop(places, self.lanes) as place:
            some, here, there = (channels - channel).least(self.lanes), of + (channel * apart + place), to + (place * row + channel)
            last = (places - place).least(self.lanes)
            with self.builder.if_else(some.least(last).below(self.lanes)) as (part, whole):
                with whole:
                    for i, value in enumerate(self.turned([(here + apart * i).load(self.vector) for i in each])):
                        (there + row * i).store(value)
                with part:
                    mask = self.first(last)
                    seen = self.turned([self.load(here + apart * self.number(i).least(some - 1), mask) for i in each])
                    for i, value in enumerate(seen):
                        with self.builder.if_then(self.number(i).below(last)):
                            self.store(value, there + row * i, self.first(some))

    def blocks(self):
        """Of places, one after another: where it starts."""
        return self.loop(self.size.places, self.size.block)

    def of_block(self, start: Number) -> Number:
        """How many places it has."""
        return self.size.block.least(self.size.places - start)


def dense(module: ir.Module, host: Host, absolute: bool) -> None:
    """For every sample and group, block of places after block: pack the gradients, and for panel after panel of columns, pack the input and let every tile of filters pass over it."""
    passes = {wide: _tile(module, host, wide, absolute) for wide in (1, host.wide)}
    code = Kernel(module, "dense", host.lanes)
    size, at, rows, lanes, columns = code.size, code.at, host.rows, host.lanes, host.lanes * host.wide
    tiles, weights = (size.outs + (rows - 1)) // rows, size.runs * size.run
    with code.loop(size.samples) as n:
        image, gradient, found = code.sample(n)
        with code.loop(size.groups) as group:
            seen, gave, mean = image + group * size.ins, gradient + group * size.outs, found + group * size.outs
            with code.loop(tiles * (rows * lanes), lanes) as i:
                (at.sums + i).store(code.zeros)
            with code.blocks() as start:
                count = code.of_block(start)
                begun, follows = code.number(0).below(start), (start + count).below(size.places)
                _pack_gradient(code, rows, gave + start * size.gradient_row, count)
                with code.loop(weights, columns) as column:
                    left = weights - column
                    with code.builder.if_else(left.below(lanes + 1)) as ways:
                        for way, wide in zip(ways, (1, host.wide)):
                            with way:
                                _pack_input(code, lanes * wide, seen, start, count, column, left)
                                with code.loop(tiles) as tile:
                                    of_tile = at.panel, at.asked + tile * rows * size.block, at.partial + (column * tiles * rows + tile * (rows * lanes * wide)), at.sums + tile * (rows * lanes)
                                    code.builder.call(passes[wide], [*(address.value for address in of_tile), count.value, begun, follows])
            with code.loop(size.outs) as out:
                (mean + out).store(code.builder.fdiv(code.absolute(code.total((at.sums + out * lanes).load(code.vector))), code.real(weights)))
    code.close()


def _tile(module: ir.Module, host: Host, wide: int, absolute: bool) -> ir.Function:
    """Some filters by some columns: takes (panel [places, columns], asked [places, rows], partial [rows, columns], sums [rows, lanes], places, whether partial has what the places before gave,
    whether others follow). What the product gives is left in partial, or added to sums at the end."""
    code = Code(module, f"tile_{wide}", [POINTER] * 4 + [INT, BIT, BIT], host.lanes)
    code.function.linkage = "internal"
    code.function.attributes.add("noinline")
    panel, asked, partial, sums = (Address(code.builder, value) for value in code.function.args[:4])
    count, begun, follows = code.function.args[4:]
    lanes, columns = host.lanes, host.lanes * wide
    tile = {(row, one): code.variable(code.zeros) for row in range(host.rows) for one in range(wide)}
    with code.loop(code.number(count)) as place:
        seen = [(panel + (place * columns + one * lanes)).load(code.vector) for one in range(wide)]
        for row in range(host.rows):
            gave = code.spread((asked + (place * host.rows + row)).load())
            for one in range(wide):
                tile[row, one].store(code.product(gave, seen[one], tile[row, one].load()))
    with code.builder.if_then(begun):  # now, and not before: a sum of sums of a block each is less rounded
        for (row, one), held in tile.items():
            held.store(code.builder.fadd(held.load(), (partial + (row * columns + one * lanes)).load(code.vector)))
    with code.builder.if_else(follows) as (more, last):
        with more:
            for (row, one), held in tile.items():
                (partial + (row * columns + one * lanes)).store(held.load())
        with last:
            for (row, _), held in tile.items():
                total = sums + row * lanes
                total.store(code.builder.fadd(total.load(code.vector), code.absolute(held.load()) if absolute else held.load()))
    code.close()
    return code.function


def _pack_gradient(code: Kernel, rows: int, gave: Address, count: Number) -> None:
    """`asked`: tile after tile, a place's filters side by side, 0 for those that the last tile lacks."""
    size = code.size
    whole, tall = size.outs // rows, size.block * rows
    rest = size.outs - whole * rows
    with code.loop(count) as place:
        of, to = gave + place * size.gradient_row, code.at.asked + place * rows
        with code.loop(whole) as tile:
            (to + tile * tall).store((of + tile * rows).load(vector(rows)))
        with code.builder.if_then(code.number(0).below(rest)):
            (to + whole * tall).store(code.load(of + whole * rows, code.first(rest, rows)))


def _pack_input(code: Kernel, columns: int, seen: Address, start: Number, count: Number, column: Number, left: Number) -> None:
    """`panel`: place after place, its columns side by side, 0 for those that the last panel lacks. It is filled run by run."""
    size, lanes, places, panel = code.size, code.lanes, code.at.standing + start, code.at.panel
    width = left.least(columns)
    with code.builder.if_then(width.below(columns)), code.loop(count * columns, lanes) as i:
        (panel + i).store(code.zeros)
    with code.going(width) as (done, advance):
        run, into = (column + done) // size.run, (column + done) % size.run
        length = (size.run - into).least(width - done)
        of, to = seen + ((code.at.taps + run).number() + into), panel + done
        with code.builder.if_else(length.below(columns)) as (part, whole):
            with whole, code.loop(count) as place:
                at = of + (places + place).number()
                for one in range(0, columns, lanes):
                    (to + (place * columns + one)).store((at + one).load(code.vector))
            with part, code.loop(length, lanes) as some:
                mask = code.first(length - some)
                with code.builder.if_else((done + some).below(columns - lanes + 1)) as (fits, over):
                    with fits, code.loop(count) as place:  # the lanes behind the run get 0, and then what the next run has
                        (to + (some + place * columns)).store(code.load(of + (some + (places + place).number()), mask))
                    with over, code.loop(count) as place:
                        code.store(code.load(of + (some + (places + place).number()), mask), to + (some + place * columns), mask)
        advance(length)


def depthwise(module: ir.Module, host: Host, absolute: bool) -> None:
    """Each channel has a kernel of its own: for every sample, block of places after block and vector of channels after vector, TAPS sums lie in registers while the places pass, and in partial between two blocks."""
    code = Kernel(module, "depthwise", host.lanes)
    size, at, lanes = code.size, code.at, host.lanes
    with code.loop(size.samples) as n:
        image, gradient, found = code.sample(n)
        with code.blocks() as start:
            begun = code.number(0).below(start)
            with code.loop(size.groups, lanes) as channel, code.loop(size.runs, TAPS) as tap:
                mask, partial = code.first(size.groups - channel), at.partial + (channel * size.run + tap * lanes)
                taps = [image + (channel + (at.taps + (tap + i)).number()) for i in range(TAPS)]
                sums = [code.variable(code.zeros) for _ in taps]
                with code.loop(code.of_block(start)) as place:
                    gave, seen = code.load(gradient + (channel + (start + place) * size.gradient_row), mask), (at.standing + (start + place)).number()
                    for of, held in zip(taps, sums):
                        held.store(code.product(gave, code.load(of + seen, mask), held.load()))
                with code.builder.if_then(begun):
                    for i, held in enumerate(sums):
                        held.store(code.builder.fadd(held.load(), (partial + i * lanes).load(code.vector)))
                for i, held in enumerate(sums):
                    (partial + i * lanes).store(held.load())
        with code.loop(size.groups, lanes) as channel:
            total = code.variable(code.zeros)
            with code.loop(size.runs) as tap:
                value = (at.partial + (channel * size.run + tap * lanes)).load(code.vector)
                total.store(code.builder.fadd(total.load(), code.absolute(value) if absolute else value))
            mean = code.builder.fdiv(code.absolute(total.load()), code.spread(code.real(size.runs)))
            code.store(mean, found + channel, code.first(size.groups - channel))
    code.close()
