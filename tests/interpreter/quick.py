"""The interpreter without what it does in vain, which is more than half of its time.

Upstream does every ``+``, ``-`` and ``*`` of int32 again in int64 for an assertion that only a
debug build makes, puts its own functions in the place of the language's at each call of a device
function, though the launch around it has done so, and makes its table of dtypes for each value.
Results have the same bits without.
"""

from dataclasses import replace

from triton.runtime import interpreter

upstream_launch = interpreter.GridExecutor.__call__
upstream_patch_lang = interpreter._patch_lang
upstream_np_dtype = interpreter._get_np_dtype

_dtypes = {}
_launches = []  # the one that runs: by their globals, the modules that the language was patched for


def install():
    """Leave that work out in this process; a second call changes nothing."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = np_dtype


def launch(executor, *args, **kwargs):
    """A launch of a kernel, which restores the language at its end."""
    _launches.append(set())
    try:
        return upstream_launch(executor, *args, **kwargs)
    finally:
        _launches.pop()


def patch_lang(fn):
    """Make the language the interpreter's, as a function's module sees it, once a launch."""
    module = id(fn.__globals__)
    if _launches and module in _launches[-1]:
        return interpreter._LangPatchScope()  # nothing to restore
    if _launches:
        _launches[-1].add(module)
    return upstream_patch_lang(fn)


def np_dtype(tt_dtype):
    """The dtype of numpy that holds a value of Triton's, looked up once."""
    name = tt_dtype.scalar.name
    if name not in _dtypes:
        _dtypes[name] = upstream_np_dtype(tt_dtype)
    return _dtypes[name]
