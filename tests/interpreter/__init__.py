"""Triton's CPU interpreter, mended so that a test can trust what it computes."""


def install():
    """Mend the interpreter for this process; a second call changes nothing.

    Triton is imported here and not above, so that TRITON_INTERPRET can still be set before it.
    """
    from . import bf16, numpy24, quick

    numpy24.install()
    bf16.install()
    quick.install()
