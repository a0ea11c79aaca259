import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sda_fast.images import group_by_size, load_image, to_pil, to_tensor


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_tensor_and_picture_are_inverse(picture):
    pixels = to_tensor([picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert pixels.shape == (2, 3, 6, 10)
    assert pixels.dtype == torch.float32
    assert pixels[0, 1, 2, 3] == picture.getpixel((3, 2))[1] / 255
    assert torch.equal(pixels[0].flip(-1), pixels[1])
    assert [np.array_equal(p, picture) for p in to_pil(pixels)] == [True, False]


def test_to_pil_rounds_and_clips():
    values = torch.tensor([-1.0, 0.5019, 2.0]).view(1, 3, 1, 1)
    assert to_pil(values)[0].getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match=r"pixels must be float \[B, 3, H, W\]"):
        to_pil(values[0])


def test_load_image_reads_a_file(tmp_path, picture):
    path = tmp_path / "a.png"
    picture.save(path)
    for given in (path, str(path), Image.open(path)):
        loaded = load_image(given)
        assert loaded.mode == "RGB"
        assert np.array_equal(loaded, picture)


def test_load_image_turns_a_picture_upright(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 270 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert upright.size == (6, 10)
    assert np.array_equal(upright, np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_load_image_lays_transparency_over_white(mode):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        clear = clear.convert("RGB").convert("P")
        clear.putdata([1, 0])
        clear.putpalette([0, 0, 0, 9, 9, 9])
        clear.info["transparency"] = 1
    loaded = load_image(clear.convert(mode))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_load_image_keeps_the_range_of_16_bit_grey(tmp_path):
    grey = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_load_image_takes_integers_of_16_bits(tmp_path):
    grey = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 3 1 65535 " + grey.astype(">u2").tobytes())
    assert Image.open(path).mode == "I"
    loaded = load_image(path)
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]
    for beyond in (-1, 65536):
        with pytest.raises(ValueError, match=rf"8- or 16-bit picture, got values .*{beyond}"):
            load_image(Image.fromarray(np.array([[7, beyond]], dtype=np.int32)))


@pytest.mark.parametrize(
    "format", ["JPEG", "WEBP", "PNG", "ICO", "BMP", "DDS", "MPO", "AVIF", "PPM"]
)
def test_load_image_refuses_a_file_cut_anywhere_by_name(tmp_path, format):
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format)
    data, path, messages = buffer.getvalue(), tmp_path / "torn", set()
    for length in range(0, len(data) - 21, 1 if format == "WEBP" else 5):  # what ends a file may go
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"torn is (damaged or truncated|not a pict)") as error:
            load_image(path)
        messages.add(str(error.value).split(":")[0])
    assert f"{path} is damaged or truncated" in messages


def test_load_image_refuses_a_cut_jpeg2000(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG2000")
    path = tmp_path / "torn"
    for length in (20, 60, 400):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(ValueError, match="torn is damaged or truncated"):
            load_image(path)


def test_load_image_passes_on_what_the_system_refuses(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(OSError, match="File name too long"):
        load_image(tmp_path / ("a" * 5000))
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(PermissionError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


def test_load_image_refuses_what_is_no_picture(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png is not a picture"):
        load_image(tmp_path / "notes.png")
    with pytest.raises(ValueError, match="is not a picture"):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="must be a path or a PIL image, got int"):
        load_image(3)
    with pytest.raises(ValueError, match=r"a file, got 'a\\x00b\.png' with a null byte"):
        load_image("a\0b.png")
    with pytest.raises(ValueError, match="the image must hold at least one pixel, got 0 x 4"):
        load_image(Image.new("RGB", (0, 4)))
    with pytest.raises(ValueError, match="8- or 16-bit"):
        load_image(Image.new("F", (2, 2)))


def test_load_image_refuses_400_megapixels_before_decoding(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("RGB", (4, 4)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"huge\.png must have at most 178,956,970 pixels"):
        load_image(path)


def test_load_image_keeps_its_limit_where_pillow_has_none(tmp_path, monkeypatch, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("sda_fast.images.MAX_PIXELS", 59)
    with pytest.raises(ValueError, match="at most 59 pixels, got 10 x 6"):
        load_image(picture)


def test_group_by_size_brings_every_picture_once(picture):
    small = picture.resize((4, 4))
    images = [picture, small, picture, picture, small]
    groups = list(group_by_size(images, at_most=2))
    assert [rows for rows, _ in groups] == [[0, 2], [3], [1, 4]]
    for rows, pixels in groups:
        for row, sample in zip(rows, pixels, strict=True):
            assert torch.equal(sample, to_tensor(images[row])[0])


def test_group_by_size_splits_a_tensor():
    images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    groups = list(group_by_size(images, at_most=2))
    assert [rows for rows, _ in groups] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([pixels for _, pixels in groups]), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one picture, got an empty sequence"),
        ({"a": 1}, "got dict"),
        (torch.zeros(2, 3, 4), r"float tensor \[B, 3, H, W\], got torch.float32 \(2, 3, 4\)"),
        (torch.zeros(1, 4, 4, 4), r"\(1, 4, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(0, 3, 4, 4), "at least one pixel"),
        (torch.full((1, 3, 2, 2), 255.0), r"must lie in \[0, 1\], got values from 255 to 255"),
        (torch.full((1, 3, 2, 2), -0.5), "got values from -0.5"),
        (torch.full((1, 3, 2, 2), float("nan")), r"must lie in \[0, 1\]"),
    ],
)
def test_images_that_cannot_be_used_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(images)


def test_to_tensor_wants_one_size(picture):
    with pytest.raises(ValueError, match=r"must have one size, .*\[\(4, 4\), \(6, 10\)\]"):
        to_tensor([picture, picture.resize((4, 4))])
