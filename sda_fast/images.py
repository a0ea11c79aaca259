"""Pictures in and out: files and PIL images to tensors and back."""

import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 178_956_970  # where Pillow itself speaks of a decompression bomb

Picture = str | PathLike[str] | Image.Image
Images = Picture | Sequence[Picture] | Tensor


def load_image(picture: Picture) -> Image.Image:
    """Read a picture whole, upright, as RGB.

    The EXIF orientation is applied, transparency laid over white, 16-bit grey brought to 8 bits
    (Pillow's integers of mode I are taken for such where all lie in 0 to 65535); of an animation
    the current frame is taken (the first, for a file).

    Args:
        picture: a file, or a PIL image, which is not changed.

    Returns:
        A decoded RGB image.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the system does not open it, as for want of permission.
        ValueError: it is no picture, damaged or truncated, of values without a range (float, or
            integers beyond 16 bits), without a pixel, or has more than ``MAX_PIXELS`` of them
            (refused before anything is decoded). The message names the file.
    """
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, getattr(picture, "filename", "") or "the image")
    if not isinstance(picture, str | PathLike):
        raise ValueError(f"picture must be a path or a PIL image, got {type(picture).__name__}")
    name = os.fsdecode(picture)
    if "\0" in name:
        raise ValueError(f"picture must be a file, got {name!r} with a null byte")
    with _named(name):
        image = Image.open(picture)
    with image:
        return _to_rgb(image, name)


def to_tensor(images: Images) -> Tensor:
    """Pictures of one size as a batch.

    Args:
        images: a path or PIL image, a sequence of these, or a tensor, which is checked and
            returned as it is.

    Returns:
        [B, 3, H, W] in [0, 1]; f32, or the floating dtype of the tensor given.

    Raises:
        ValueError: there is none, they differ in size, or a tensor is no such batch.
        FileNotFoundError: a file is not there.
    """
    groups = list(group_by_size(images))
    sizes = sorted({tuple(pixels.shape[-2:]) for _, pixels in groups})
    if len(sizes) > 1:
        raise ValueError(f"images must have one size, got (height, width) {sizes}")
    return torch.cat([pixels for _, pixels in groups]) if len(groups) > 1 else groups[0][1]


def group_by_size(images: Images, at_most: int = 32) -> Iterator[tuple[list[int], Tensor]]:
    """Cut pictures into batches of one size.

    Args:
        images: as in ``to_tensor``, but the sizes may differ.
        at_most: pictures in a batch.

    Yields:
        (places in images, pixels [B, 3, H, W] in [0, 1]); every picture comes once.

    Raises:
        ValueError: images is empty, or something in it is no picture.
        FileNotFoundError: a file is not there.
    """
    if isinstance(images, Tensor):
        _check_pixels(images)
        for start in range(0, len(images), at_most):
            pixels = images[start : start + at_most]
            yield list(range(start, start + len(pixels))), pixels
        return
    pictures = _as_pictures(images)
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(place)
    for places in by_size.values():
        for start in range(0, len(places), at_most):
            rows = places[start : start + at_most]
            yield rows, torch.stack([_pixels(pictures[row]) for row in rows])


def put_in_order(parts: Sequence[Any], rows: Sequence[int]) -> Any:
    """What was made of each group of ``group_by_size``, in the order of the pictures given.

    Args:
        parts: of each group a tensor [n, ...] or a list of n.
        rows: where each of all groups' pictures was.

    Returns:
        One tensor, or one list.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[order]
    pictures = [picture for part in parts for picture in part]
    return [pictures[place] for place in order]


def fit_area(size: Sequence[int], area: int, unit: int) -> tuple[int, int]:
    """(height, width) of about an area at the aspect ratio of a size, in whole units of pixels."""
    scale = math.sqrt(area / math.prod(size))
    rows, cols = (max(1, round(side * scale / unit)) for side in size)
    return rows * unit, cols * unit


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Turn [B, 3, H, W] into B RGB images; values outside [0, 1] are clipped.

    Raises:
        ValueError: pixels is not a float tensor of that shape.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be float [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}"
        )
    levels = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(sample) for sample in levels.permute(0, 2, 3, 1).cpu().numpy()]


def _as_pictures(images: Picture | Sequence[Picture]) -> list[Image.Image]:
    if isinstance(images, str | PathLike | Image.Image):
        return [load_image(images)]
    if not isinstance(images, Sequence):
        raise ValueError(
            f"images must be a path, a PIL image, a sequence of these or a tensor, "
            f"got {type(images).__name__}"
        )
    if not images:
        raise ValueError("images must hold at least one picture, got an empty sequence")
    return [load_image(picture) for picture in images]


def _check_pixels(pixels: Tensor) -> None:
    if not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(
            f"images must be a float tensor [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}"
        )
    if 0 in pixels.shape:
        raise ValueError(f"images must hold at least one pixel, got shape {tuple(pixels.shape)}")
    low, high = (v.item() for v in pixels.detach().aminmax())
    # NaN fails the comparison too
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}")


def _pixels(picture: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] f32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


@contextmanager
def _named(name: str) -> Generator[None, None, None]:
    """Give whatever Pillow raises at a file one type and the file's name."""
    try:
        yield
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"picture must be a file, got {name}, not there") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} must have at most {MAX_PIXELS:,} pixels: {error}") from error
    except (Image.UnidentifiedImageError, IsADirectoryError) as error:
        raise ValueError(f"{name} is not a picture that Pillow can read") from error
    except Exception as error:  # each format's reader has errors of its own for torn bytes
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the system's, as permission denied: it names the file already
        raise ValueError(f"{name} is damaged or truncated: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if not width * height:
        raise ValueError(f"{name} must hold at least one pixel, got {width} x {height}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} must have at most {MAX_PIXELS:,} pixels, got {width} x {height}")
    if image.mode == "F":
        raise ValueError(f"{name} must be an 8- or 16-bit picture, got one of floats")
    with _named(name):
        image.load()  # opening reads the header alone: a torn file shows only here
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{name} must be an 8- or 16-bit picture, got values from {grey.min()} to "
                f"{grey.max()}"
            )
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
