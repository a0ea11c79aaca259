"""The interpreter's sanitizer notices planted faults, and only those."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction as interpreted

from . import interpreter
from .interpreter.sanitizer import sanitized

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    """The interpreter as every test of a kernel sees it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a launch may still load parts of triton
    interpreter.install()


@interpreted
def _shift_kernel(x, y, n, read, write, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(y + write + at, tl.load(x + read + at, mask=mask, other=0.0) * 2, mask=mask)


@interpreted
def _same_place_kernel(y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, at + tl.program_id(0))


@interpreted
def _pick_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.where(at % 2 == 0, x + at, y + at)
    tl.store(out + at, tl.load(source, mask=at < n), mask=at < n)


@interpreted
def _read_all_write_one_kernel(x, y):
    value = tl.load(x)
    tl.store(y + tl.program_id(0), value)
    if tl.program_id(0) == 0:
        tl.store(x, value + 1)


@interpreted
def _follow_kernel(table, y):
    tl.store(y, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


@interpreted
def _ticket_kernel(counter, tickets):
    tl.store(tickets + tl.program_id(0), tl.atomic_add(counter, 1))


@interpreted
def _swap_kernel(cell, found):
    tl.store(found + tl.program_id(0), tl.atomic_cas(cell, 0, 1))


def shift(x, y, n=64, read=0, write=0):
    """The report of ``y[write:][:n] = 2 * x[read:][:n]`` in programs of 16."""
    with sanitized() as report:
        _shift_kernel[(triton.cdiv(n, 16),)](x, y, n, read, write, BLOCK=16)
    return report


def only_fault(report):
    """The kind, the argument and the number of elements of the one fault in a report."""
    ((kind, _, argument), elements) = next(iter(report.faults.items()))
    assert len(report.faults) == 1
    with pytest.raises(AssertionError, match=kind):
        report.assert_clean()
    return kind, argument, elements


def test_a_right_kernel_is_clean():
    x, y = torch.randn(2, 61)
    report = shift(x, y, n=61)
    report.assert_clean()
    assert torch.equal(y, 2 * x)
    assert (report.launches, report.programs, report.loads, report.stores) == (1, 4, 61, 61)
    shift(x, x, n=61).assert_clean()  # in place: a program reads what it alone writes


def test_a_block_without_a_launch_is_not_clean():
    with sanitized() as report:
        torch.zeros(3)
    with pytest.raises(AssertionError, match="no kernel"):
        report.assert_clean()


@pytest.mark.parametrize("read", [-3, 3])
def test_an_out_of_bounds_load_is_found(read):
    memory = torch.randn(128)
    x, y = memory[32:96], torch.empty(64)
    assert only_fault(shift(x, y, read=read)) == ("out-of-bounds load", "x", 3)
    inside = slice(3, None) if read < 0 else slice(None, -3)
    assert torch.equal(y[inside], 2 * memory[32 + read : 96 + read][inside])
    assert y.count_nonzero() == 61  # what lies outside is not used


@pytest.mark.parametrize("write", [-3, 3])
def test_an_out_of_bounds_store_is_found_and_not_carried_out(write):
    memory = torch.full((128,), 7.0)
    assert only_fault(shift(torch.zeros(64), memory[32:96], write=write)) == (
        "out-of-bounds store",
        "y",
        3,
    )
    assert (memory[:32] == 7).all()
    assert (memory[96:] == 7).all()
    assert (memory[32:96] == 0).sum() == 61


def test_a_load_that_ends_in_another_argument_is_found():
    memory = torch.randn(128)
    assert only_fault(shift(memory[:64], memory[64:], read=64))[:2] == ("out-of-bounds load", "x")


def test_an_offset_that_overflows_is_found():
    x, y = torch.randn(2, 64)
    assert only_fault(shift(x, y, read=-(2**31)))[:2] == ("out-of-bounds load", "x")


def test_a_view_reaches_to_its_last_element():
    memory, y = torch.randn(64, 4), torch.empty(253)
    report = shift(memory[:, 0], y, n=253)
    report.assert_clean()
    y = torch.empty(254)
    assert only_fault(shift(memory[:, 0], y, n=254)) == ("out-of-bounds load", "x", 1)


def test_bf16_and_its_sanitizer_together():
    x = torch.randn(64).bfloat16()
    y = torch.empty_like(x)
    shift(x, y).assert_clean()
    assert torch.equal(y, 2 * x)
    assert only_fault(shift(x[:63], y)) == ("out-of-bounds load", "x", 1)


def test_an_address_from_memory_is_found():
    hidden, y = torch.ones(2, 1)
    table = torch.tensor([hidden.data_ptr()])
    with sanitized() as report:
        _follow_kernel[(1,)](table, y)
    assert only_fault(report) == ("out-of-bounds load", "?", 1)


def test_pointers_of_two_arguments_in_one_load():
    x, y, out = torch.randn(3, 64)
    with sanitized() as report:
        _pick_kernel[(2,)](x, y, out, 64, BLOCK=32)
    report.assert_clean()
    assert torch.equal(out, torch.where(torch.arange(64) % 2 == 0, x, y))
    with sanitized() as report:
        _pick_kernel[(2,)](x, y[:50], out, 64, BLOCK=32)
    assert only_fault(report) == ("out-of-bounds load", "y", 7)


def test_a_write_write_race_is_found():
    y = torch.empty(16, dtype=torch.int32)
    with sanitized() as report:
        _same_place_kernel[(4,)](y, BLOCK=16)
    assert only_fault(report) == ("write-write race", "y", 3 * 16)
    with sanitized() as report:
        _same_place_kernel[(1,)](y, BLOCK=16)
        _same_place_kernel[(1,)](y, BLOCK=16)  # one launch after the other
    report.assert_clean()


@pytest.mark.parametrize("seed", range(4))  # whichever comes first, the reader or the writer
def test_a_read_write_race_is_found(seed):
    x = torch.zeros(80)
    with sanitized(seed) as report:
        _shift_kernel[(4,)](x, x, 64, 16, 0, BLOCK=16)
    assert report.kinds() == {"read-write race"}
    assert sum(report.faults.values()) == 3 * 16


@pytest.mark.parametrize("seed", range(8))
def test_a_race_with_one_of_several_readers_is_found(seed):
    x, y = torch.zeros(2, 4)
    with sanitized(seed) as report:
        _read_all_write_one_kernel[(2,)](x, y)
    assert only_fault(report) == ("read-write race", "x", 1)


def test_a_race_between_views_of_different_types_is_found():
    memory = torch.zeros(64, dtype=torch.bfloat16)
    wide = memory.view(torch.float32)
    with sanitized() as report:
        _shift_kernel[(2,)](memory[32:], wide, 32, 0, 0, BLOCK=16)
    assert report.kinds() == {"read-write race"}
    assert sum(report.faults.values()) == 16  # two of memory's elements for each of wide's


def test_atomics_are_counted():
    counter, tickets = torch.zeros(2, 8, dtype=torch.int32)
    with sanitized() as report:
        _ticket_kernel[(8,)](counter, tickets)
    assert report.atomics == 8
    report.assert_clean(atomics=True)
    with pytest.raises(AssertionError, match="8 atomic"):
        report.assert_clean()
    with sanitized() as report:
        _swap_kernel[(8,)](counter[1:], tickets)
        _swap_kernel[(8,)](counter[:, None][:, :0], tickets)  # no element, but strides
    assert (counter[1], report.atomics) == (1, 16)
    assert only_fault(report) == ("out-of-bounds atomic", "cell", 8)


def test_programs_run_in_an_order_of_the_seed():
    orders = []
    for seed in (0, 0, 1):
        counter, tickets = torch.zeros(2, 16, dtype=torch.int32)
        with sanitized(seed):
            _ticket_kernel[(16,)](counter, tickets)
        orders.append(tickets.tolist())
    assert sorted(orders[0]) == list(range(16))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_nothing_is_left_behind():
    from triton.runtime import interpreter as patched

    before, kind = dict(vars(patched)), type(patched.interpreter_builder)
    with pytest.raises(ZeroDivisionError), sanitized():
        raise ZeroDivisionError
    assert dict(vars(patched)) == before
    assert type(patched.interpreter_builder) is kind
