"""A picture's bytes to the pixels of its bucket."""

import math
from io import BytesIO
from pathlib import PurePosixPath
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sda_fast.images import MAX_PIXELS, load_image
from train.data.order import Size

# what a file of this name must hold; a JPEG of several pictures is an MPO to Pillow
KINDS = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".avif": ("AVIF",),
}
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")
MAX_BYTES = 1 << 30
"""Of a file: a picture of MAX_PIXELS is half as large when it is not compressed at all."""

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF; those that swap height and width
GAP = (
    2.0  # a JPEG is decoded at least so many times larger than it is wanted, as Pillow's thumbnails
)


def check_bytes(count: int) -> None:
    """See that a file may be a picture by its length.

    Raises:
        ValueError: it has none, or more than ``MAX_BYTES``; the message follows a name.
    """
    if not 0 < count <= MAX_BYTES:
        raise ValueError(f"must have 1 to {MAX_BYTES:,} bytes, has {count:,}")


def open_picture(stream: IO[bytes], name: str) -> Image.Image:
    """Read a picture's header; nothing is decoded.

    Args:
        stream: seekable; the picture reads on from it.
        name: whose extension says what the stream holds, one of ``KINDS``.

    Raises:
        ValueError: it is no picture, another kind than its name says, its header is damaged, or it
            has no pixel or more than ``MAX_PIXELS``. The message follows a name.
    """
    suffix = PurePosixPath(name).suffix.lower()
    try:
        image = Image.open(stream, formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"has no whole header of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"must have at most {MAX_PIXELS:,} pixels: {error}") from error
    except Exception as error:  # each format's reader has errors of its own for torn bytes
        raise ValueError(f"has a damaged header: {error}") from error
    if image.format not in KINDS[suffix]:
        raise ValueError(f"is {image.format} by its content and {suffix} by its name")
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"must have 1 to {MAX_PIXELS:,} pixels, has {width} x {height}")
    return image


def upright_size(image: Image.Image) -> Size:
    """Height and width after the EXIF orientation is applied; nothing is decoded.

    A PNG may say how it lies only after its pixels; that is not looked for.
    """
    width, height = image.size
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return height, width
    try:
        turned = image.getexif().get(ORIENTATION) in TURNED
    except MemoryError:
        raise
    except Exception:  # torn EXIF: the picture may still be read, and is then as it lies
        turned = False
    return (width, height) if turned else (height, width)


def decode(data: bytes, name: str, size: Size) -> Tensor:
    """Decode a picture upright as RGB, and crop its middle to a size.

    It is resized (Lanczos, antialiased) until it just covers the size. A JPEG much larger than
    that is decoded at a half, a quarter or an eighth.

    Args:
        data: a whole file.
        name: its name, for the extension.
        size: height and width wanted.

    Returns:
        [3, H, W] uint8.

    Raises:
        ValueError: as ``open_picture`` and ``sda_fast.images.load_image``.
    """
    check_bytes(len(data))
    height, width = size
    with open_picture(BytesIO(data), name) as image:
        tall, wide = upright_size(image)
        if image.format in KINDS[".jpg"]:
            scale = GAP * max(height / tall, width / wide)
            # a draft is told no smaller than this, before it is turned upright
            least = (math.ceil(side * scale) for side in image.size)
            image.draft(None, (next(least), next(least)))
        upright = load_image(image)
    cut = min(upright.height / height, upright.width / width)
    left, top = (upright.width - cut * width) / 2, (upright.height - cut * height) / 2
    # rounding must not reach over the edge
    right, bottom = min(left + cut * width, upright.width), min(top + cut * height, upright.height)
    box = (max(left, 0.0), max(top, 0.0), right, bottom)
    resized = upright.resize((width, height), Image.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
