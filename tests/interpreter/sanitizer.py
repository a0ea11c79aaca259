"""What the interpreter does not notice: stray accesses, races between programs, atomics.

Inside ``sanitized()`` a kernel does not see where its tensors lie. Every tensor argument gets an
address of its own, terabytes from the next, so a pointer tells which argument it came from and an
access outside of that argument's elements is found even if it hits the memory of another one.
Accesses that are inside are carried out at the true address, and remembered there by program.

Addresses that a kernel loads from memory are not followed: using one is reported.
"""

import contextlib
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

TAG = 44  # an argument's number starts at this bit of its address
FIRST = 16  # above all true addresses, which have 47 bits
MIDDLE = 1 << (TAG - 1)  # both directions leave room for a large stray offset
MANY = -1  # more than one program; programs are numbered from 1, and 0 is none


@dataclass
class Report:
    """What happened in the launches of one ``sanitized()`` block.

    ``loads``, ``stores`` and ``atomics`` count elements; ``faults`` counts elements by kind,
    kernel and argument, and ``examples`` tells of the first of each.
    """

    launches: int = 0
    programs: int = 0
    loads: int = 0
    stores: int = 0
    atomics: int = 0
    faults: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)

    def add(self, kind, kernel, argument, elements, example):
        """Note a fault of so many elements."""
        self.faults[kind, kernel, argument] += elements
        self.examples.setdefault((kind, kernel, argument), example)

    def kinds(self):
        """The kinds of fault that were found."""
        return {kind for kind, _, _ in self.faults}

    def lines(self):
        """One line for each fault."""
        return [
            f"{fault[0]}, argument {fault[2]!r} of {fault[1]}: {count} elements, first {example}"
            for (fault, count), example in zip(
                self.faults.items(), self.examples.values(), strict=True
            )
        ]

    def assert_clean(self, atomics=False):
        """Fail unless a kernel ran, without fault and, if not allowed, without ``atomics``."""
        lines = self.lines()
        if not self.launches:
            lines.append("no kernel was launched in the interpreter")
        if self.atomics and not atomics:
            lines.append(f"{self.atomics} atomic operations in kernels that should have none")
        assert not lines, "\n".join(lines)


@contextlib.contextmanager
def sanitized(seed=0):
    """Watch every kernel launched inside; programs run in an order drawn from ``seed``.

    Nothing is raised: an element outside of its tensor is not loaded (``other`` or 0 instead) and
    not stored, and is in the report, as the rest. Does not nest.
    """
    report, order = Report(), random.Random(seed)
    builder = interpreter.interpreter_builder
    convert = interpreter._implicit_cvt

    class Executor(interpreter.GridExecutor):
        def __call__(self, *args, **kwargs):
            tensors = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            builder.launch = Launch(self.fn.__name__, tensors, report, order)
            return super().__call__(*args, **kwargs)

    def implicit_cvt(value):
        converted = convert(value)
        if hasattr(value, "data_ptr"):
            converted.handle.data = builder.launch.place(interpreter._unwrap_tensor(value))
        return converted

    with pytest.MonkeyPatch.context() as patch:
        watched = type("Watched", (Watch, type(builder)), {})
        patch.setattr(builder, "__class__", watched)
        patch.setattr(interpreter, "GridExecutor", Executor)
        patch.setattr(interpreter, "_implicit_cvt", implicit_cvt)
        yield report


class Watch:
    """Mixed into the interpreter's builder: its accesses to memory go through the launch."""

    launch = None

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(*self.launch.next_program(self.grid_dim))

    def create_masked_load(self, ptrs, mask, *rest, **options):
        ptrs, mask = self.launch.access("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        ptrs, mask = self.launch.access("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *rest, **options)

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        ptr, mask = self.launch.access("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr, cmp, val, *rest):
        every = TensorHandle(np.ones(ptr.data.shape, bool), tl.int1)
        ptr, mask = self.launch.access("atomic", ptr, every)
        # it takes no mask, so one stray element keeps all of them from memory
        return super().create_atomic_cas(ptr, cmp, val, *rest) if mask.data.all() else cmp

    # Triton 3.9; the accesses themselves are the masked ones above

    def create_atomic_load(self, ptr, *rest):
        self.launch.report.atomics += ptr.data.size
        return super().create_atomic_load(ptr, *rest)

    def create_atomic_store(self, ptr, *rest):
        self.launch.report.atomics += ptr.data.size
        return super().create_atomic_store(ptr, *rest)

    def create_atomic_poll(self, ptr, *rest):
        self.launch.report.atomics += ptr.data.size
        return super().create_atomic_poll(ptr, *rest)


class Cells:
    """Which program read and wrote each cell of a storage; a cell is its smallest element."""

    def __init__(self, storage):
        self.start, self.bytes = storage.data_ptr(), storage.nbytes()
        self.size = 8

    def open(self):
        """Make the two tables, once all arguments are known; pages that stay 0 cost nothing."""
        if not hasattr(self, "readers"):
            cells = self.bytes // self.size + 1
            self.readers, self.writers = np.zeros(cells, np.int32), np.zeros(cells, np.int32)

    def at(self, addresses, size):
        """The cells of elements of ``size`` bytes at true ``addresses``."""
        cells = (addresses - np.uint64(self.start)) // np.uint64(self.size)
        if size > self.size:
            cells = cells[:, None] + np.arange(size // self.size, dtype=np.uint64)
        return cells.ravel()


@dataclass
class Argument:
    """A tensor argument: bytes ``[first, end)`` as the kernel sees them."""

    name: str
    first: int
    end: int
    shift: np.uint64  # true address - seen address, modulo 2**64
    cells: Cells


class Launch:
    """One launch of a kernel: its arguments, the program that runs now, and who touched what."""

    def __init__(self, kernel, values, report, order):
        self.kernel, self.report, self.order = kernel, report, order
        self.arguments, self.cells, self.programs = [], {}, None
        tensors = {name: getattr(value, "base", value) for name, value in values.items()}
        self.names = {t.data_ptr(): name for name, t in tensors.items() if hasattr(t, "data_ptr")}
        report.launches += 1

    def place(self, tensor):
        """Give a tensor its address and return it, as the interpreter keeps a pointer."""
        true, size = tensor.data_ptr(), tensor.element_size()
        number = FIRST + len(self.arguments)
        seen = (number << TAG) + MIDDLE + (true & 0xFFFF)  # as aligned as the truth
        reach = sum(
            (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        end = seen + (reach + 1) * size if tensor.numel() else seen
        storage = tensor.untyped_storage()
        cells = self.cells.setdefault(storage.data_ptr(), Cells(storage))
        cells.size = min(cells.size, size)
        name = self.names.get(true, f"tensor {number - FIRST}")
        self.arguments.append(Argument(name, seen, end, np.uint64((true - seen) % 2**64), cells))
        return np.array([seen], np.uint64)

    def next_program(self, grid):
        """The next program in a random order."""
        if self.programs is None:
            programs = list(itertools.product(*map(range, grid)))
            self.order.shuffle(programs)
            self.grid, self.programs = grid, iter(programs)
        self.program = next(self.programs)
        self.number = 1 + int(np.ravel_multi_index(self.program, grid))
        self.report.programs += 1
        return self.program

    def access(self, kind, ptrs, mask):
        """Check and remember an access; returns true pointers and a mask of what may be touched."""
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        seen = ptrs.data
        lanes = np.broadcast_to(np.asarray(mask.data, bool), seen.shape).copy()
        total = int(np.count_nonzero(lanes))
        counter = {"load": "loads", "store": "stores", "atomic": "atomics"}[kind]
        setattr(self.report, counter, getattr(self.report, counter) + total)
        if not total:
            return ptrs, TensorHandle(lanes, tl.int1)
        low, high = extremes(seen, lanes)
        if low >> TAG == high >> TAG:  # nearly always
            true = self.access_argument(kind, low >> TAG, seen, lanes, size)
        else:
            true, allowed = seen.copy(), np.zeros_like(lanes)
            for tag in np.unique(seen[lanes] >> np.uint64(TAG)):
                part = lanes & (seen >> np.uint64(TAG) == tag)
                moved = self.access_argument(kind, int(tag), seen, part, size)
                true[part], allowed = moved[part], allowed | part
            lanes = allowed
        return TensorHandle(true, ptrs.dtype), TensorHandle(lanes, tl.int1)

    def access_argument(self, kind, tag, seen, lanes, size):
        """The part of an access with one argument's tag; clears its stray ``lanes`` in place."""
        if not 0 <= tag - FIRST < len(self.arguments):
            self.stray(kind, "?", np.count_nonzero(lanes), "at an address of no argument")
            lanes[:] = False
            return seen
        argument = self.arguments[tag - FIRST]
        low, high = extremes(seen, lanes)
        if low < argument.first or high + size > argument.end:
            outside = lanes & ((seen < argument.first) | (seen + np.uint64(size) > argument.end))
            stray = int(seen[outside][0])
            example = (
                f"{argument.first - stray} bytes before its start"
                if stray < argument.first
                else f"{stray + size - argument.end} bytes past its end"
            )
            self.stray(kind, argument.name, np.count_nonzero(outside), example)
            lanes &= ~outside
        true = seen + argument.shift
        if kind != "atomic":
            self.remember(kind, argument, true[lanes], size)
        return true

    def stray(self, kind, name, elements, example):
        """Report elements outside of their tensor."""
        example = f"{example}, by program {self.program}"
        self.report.add(f"out-of-bounds {kind}", self.kernel, name, int(elements), example)

    def remember(self, kind, argument, addresses, size):
        """Mark the cells of an access, and report those that race with another program's."""
        cells = argument.cells
        cells.open()
        where = cells.at(addresses, size)
        readers, writers = cells.readers[where], cells.writers[where]
        if kind == "load":
            self.race("read-write race", argument.name, writers)
            mine = (readers == 0) | (readers == self.number)
            cells.readers[where] = np.where(mine, self.number, MANY)
        else:
            self.race("write-write race", argument.name, writers)
            self.race("read-write race", argument.name, readers)
            cells.writers[where] = self.number

    def race(self, kind, name, others):
        """Report the cells that another program than this one has touched."""
        raced = others[(others != 0) & (others != self.number)]
        if raced.size:
            other = int(raced[0])
            program = "several programs"
            if other != MANY:
                program = tuple(map(int, np.unravel_index(other - 1, self.grid)))
            example = f"of {self.program} and {program}"
            self.report.add(kind, self.kernel, name, raced.size, example)


def extremes(addresses, lanes):
    """The lowest and highest address of an access, as integers."""
    touched = addresses if lanes.all() else addresses[lanes]
    return int(touched.min()), int(touched.max())
