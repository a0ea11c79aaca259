"""The interpreter's 16-bit floats with the numbers of the hardware.

Triton's interpreter keeps bfloat16 as uint16 and, up to 3.9 at least, computes on the bit
patterns: ``tl.dot``, ``+`` and ``<`` are wrong without a word, and a cast from float32 does not
round to nearest even. Here a bfloat16 operand is widened (exact), the operation is float32's, and
its result is rounded back to nearest even; ``tl.dot`` accumulates in float32.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

HALVES = (np.dtype(np.uint16), np.dtype(np.float16))


def install():
    """Put the mended classes where the interpreter looks for its own; idempotent."""
    if issubclass(interpreter.InterpreterBuilder, Builder):
        return
    interpreter.InterpreterBuilder = Builder
    # the one builder exists already and is known to others by reference
    interpreter.interpreter_builder.__class__ = Builder
    interpreter.ReduceOps = ReduceOps
    interpreter.ScanOps = ScanOps


def widen(bits):
    """The float32 values of bfloat16 patterns (uint16), exact; same shape, same memory order."""
    words = bits.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


def narrow(values):
    """The bfloat16 patterns (uint16) of float32 values: nearest, ties to even, NaN stays NaN."""
    words = np.atleast_1d(values).view(np.uint32)
    rounded = words >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += words
    rounded >>= 16
    bits = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        nan = np.atleast_1d(nan)
        bits[nan] = (words[nan] >> 16) | 0x40  # quiet, or a small payload would round to inf
    return bits.reshape(np.shape(values))


def round_to_odd(values, lost):
    """float32 of float64 ``values`` plus ``lost`` (less than half a unit), as a sticky bit.

    Rounding the result once more to bfloat16 then rounds the exact sum once (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        rest = values - near + lost
        step = np.nextafter(near, np.where(rest > 0, np.float32(np.inf), np.float32(-np.inf)))
    even = near.view(np.uint32) & 1 == 0
    return np.where(np.isfinite(values) & (rest != 0) & even, step, near)


def single(values):
    """float32 of any values but bfloat16's, so that narrowing it rounds a float64 only once."""
    return round_to_odd(values, 0.0) if values.dtype == np.float64 else values.astype(np.float32)


def is_bf16(handle):
    """Whether a handle holds bfloat16 patterns; the first test is for speed alone."""
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def bf16(values):
    """A bfloat16 handle of float32 values."""
    return TensorHandle(narrow(values), tl.bfloat16)


def float32(handle):
    """A handle of the same values in float32, if they are bfloat16 or float16."""
    if is_bf16(handle):
        return TensorHandle(widen(handle.data), tl.float32)
    if handle.data.dtype == np.float16:
        return TensorHandle(handle.data.astype(np.float32), tl.float32)
    return handle


class Builder(interpreter.InterpreterBuilder):
    """The operations of a kernel, with bfloat16 as a number."""

    def get_bf16(self, value):
        return bf16(np.array([value], np.float32))

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if is_bf16(src) else bf16(single(src.data))
        if not is_bf16(src):
            return super().cast_impl(src, dst_type)
        wide = float32(src)
        return wide if dst_type.scalar == tl.float32 else super().cast_impl(wide, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        from_bf16, to_bf16 = is_bf16(src), dst_type.scalar == tl.bfloat16
        if 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)  # fp8 is upstream's
        if to_bf16 and rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            wide = single(src.data)
            truncated = (wide.view(np.uint32) >> 16).astype(np.uint16)
            return TensorHandle(np.where(np.isnan(wide), narrow(wide), truncated), tl.bfloat16)
        if from_bf16 or to_bf16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def unary_op(self, arg, op):
        if not is_bf16(arg):
            return super().unary_op(arg, op)
        return bf16(op(widen(arg.data)))

    def binary_op(self, lhs, rhs, op):
        if not is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        return TensorHandle(result, tl.int1) if result.dtype == bool else bf16(result)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not is_bf16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return bf16(op(widen(lhs.data), widen(rhs.data), widen(other.data)))

    def create_fma(self, x, y, z):
        if not is_bf16(z):
            return super().create_fma(x, y, z)
        product = widen(x.data).astype(np.float64) * widen(y.data)  # exact
        addend = widen(z.data).astype(np.float64)
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)  # Knuth's two-sum
        return bf16(round_to_odd(total, lost))

    def create_minnumf(self, lhs, rhs):
        """The number of a number and a NaN, as Triton 3.9 and the hardware have it."""
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        """The number of a number and a NaN, as Triton 3.9 and the hardware have it."""
        return self.binary_op(lhs, rhs, np.fmax)

    def create_dot(self, a, b, d, *options):
        if a.data.dtype not in HALVES or not a.dtype.scalar.is_floating():
            return super().create_dot(a, b, d, *options)
        # upstream would accumulate in the type of `d`
        total = super().create_dot(float32(a), float32(b), float32(d), *options)
        return total if d.data.dtype == np.float32 else self.cast_impl(total, d.dtype)


class ReduceOps(interpreter.ReduceOps):
    """Reductions along an axis, with bfloat16 as a number."""

    def sum(self, input):
        if not is_bf16(input.handle):
            return super().sum(input)
        return self.to_tensor(tree_sum(input.handle.data, self.axis, self.keep_dims), input.dtype)

    def min_max(self, input, val_reduce_op, idx_reduce_op=None):
        tensor = input[0] if isinstance(input, tuple) else input
        if not is_bf16(tensor.handle):
            return super().min_max(input, val_reduce_op, idx_reduce_op)
        found = super().min_max(widened(tensor), val_reduce_op, idx_reduce_op)
        return (
            tuple(map(self.narrowed, found)) if isinstance(found, tuple) else self.narrowed(found)
        )

    def narrowed(self, tensor):
        """A float32 result as bfloat16; an index as it is."""
        if tensor.dtype != tl.float32:
            return tensor
        return tl.tensor(bf16(tensor.handle.data), tensor.type.with_element_ty(tl.bfloat16))


class ScanOps(interpreter.ScanOps):
    """Scans along an axis, with bfloat16 as a number; rounded once, at the end."""

    def cumsum(self, input):
        return self.scanned(input, np.cumsum) or super().cumsum(input)

    def cumprod(self, input):
        return self.scanned(input, np.cumprod) or super().cumprod(input)

    def scanned(self, input, op):
        """What upstream's methods return, or None if the input is not bfloat16."""
        if not is_bf16(input.handle):
            return None
        values = op(widen(input.handle.data), axis=self.axis)
        return [self.to_tensor(narrow(values), input.dtype)]


def widened(tensor):
    """A float32 tensor of the values of a bfloat16 one."""
    return tl.tensor(float32(tensor.handle), tensor.type.with_element_ty(tl.float32))


def tree_sum(bits, axis, keep_dims):
    """The sum of bfloat16 patterns, halves onto halves and every partial sum rounded.

    Triton's own sum of bfloat16 adds in bfloat16, in an order that depends on the layout; this
    one has the same error without the order.
    """
    shape = list(bits.shape)
    bits = bits.reshape(-1) if axis is None else np.moveaxis(bits, axis, 0)
    while len(bits) > 1:
        half = len(bits) // 2  # lengths are powers of two
        bits = narrow(widen(bits[:half]) + widen(bits[half:]))
    if not keep_dims:
        return bits[0]
    return bits.reshape([1 if axis in (None, i) else n for i, n in enumerate(shape)])
