"""Loops with run-time bounds in the interpreter of Triton 3.6 under numpy 2.4 and newer.

The interpreter keeps a scalar in an array of one element and gives it to ``int`` when it becomes
the bound of a ``range``; numpy 2.4 refuses that. Triton 3.7 mends it the same way.
"""

import operator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install():
    """Let ``range`` take the interpreter's scalars; does nothing where it already does."""
    if scalars_are_bounds():
        return
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def scalars_are_bounds():
    """Whether a scalar of a running kernel can be the bound of a ``range``."""
    scalar = tl.tensor(interpreter.TensorHandle(np.array([3], np.int32), tl.int32), tl.int32)
    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_tensor(tl.tensor, scope)
    try:
        return operator.index(scalar) == 3
    except TypeError:
        return False
    finally:
        scope.restore()
