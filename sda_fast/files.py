"""Files that appear whole or not at all."""

import os
from os import PathLike
from pathlib import Path


def write_whole(path: str | PathLike[str], data: bytes | str) -> Path:
    """Write a file beside path and put it in its place; the folder must be there.

    Args:
        path: what is there already is replaced.
        data: text is written as UTF-8.

    Raises:
        OSError: it cannot be written; path is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
