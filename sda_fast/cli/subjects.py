"""What commands work on: pictures and embedding files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from sda_fast.embedding import SemanticEmbedding
    from sda_fast.pipeline import SemanticPipeline

    Subject = Image.Image | SemanticEmbedding


def open_pictures(paths: Sequence[Path]) -> "list[Image.Image]":
    """Read pictures; see ``load_image`` for what it raises."""
    from sda_fast.images import load_image

    return [load_image(path) for path in paths]


def open_subject(path: Path) -> "Subject":
    """Read an embedding, if the name ends as that of one, or else a picture.

    Raises:
        ValueError: the file is damaged or something else.
        FileNotFoundError: it is not there.
    """
    from sda_fast.embedding import SemanticEmbedding

    if path.suffix == ".safetensors":
        return SemanticEmbedding.load(path)
    return open_pictures([path])[0]


def count(subject: "Subject") -> int:
    """How many pictures it is: an embedding file may hold several."""
    from sda_fast.embedding import SemanticEmbedding

    return len(subject) if isinstance(subject, SemanticEmbedding) else 1


def embed(pipe: "SemanticPipeline", subject: "Subject") -> "SemanticEmbedding":
    """The embedding of what ``open_subject`` read."""
    from sda_fast.embedding import SemanticEmbedding

    return subject if isinstance(subject, SemanticEmbedding) else pipe.encode(subject)


def open_single(path: Path) -> "Subject":
    """As ``open_subject``, but one picture.

    Raises:
        ValueError: the embedding file holds several; otherwise as there.
    """
    subject = open_subject(path)
    if count(subject) != 1:
        raise ValueError(f"{path} must hold one picture, got {count(subject)}")
    return subject


def named_files(pairs: Sequence[str]) -> dict[str, Path]:
    """The files that ``--with NAME=FILE`` gives names to.

    Raises:
        ValueError: one is not of this form, or a name is there twice.
    """
    files: dict[str, Path] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise ValueError(f"--with must be NAME=FILE, got {pair!r}")
        if name in files:
            raise ValueError(f"--with must name each file differently, got {name!r} twice")
        files[name] = Path(path)
    return files
