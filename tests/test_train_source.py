import io
import json
import os
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sda_fast.images import load_image
from train.data.pictures import decode
from train.data.source import open_source

NAMES = ["a.png", "b/c.jpg", "b/d.webp", "b/e/f.jpeg", "g.PNG", "h.avif"]


def picture(height, width, seed=0):
    """Soft colours: what compression keeps."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, suffix, **options):
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[suffix.lower()], **options)
    return buffer.getvalue()


def png(width, height):
    """The header of a PNG of that size, and no pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "b/e").mkdir(parents=True)
    for place, name in enumerate(NAMES):
        image = picture(20 + place, 40, place)
        (root / name).write_bytes(encoded(image, name[name.index(".") :]))
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes(b"")
    return root


def many(root, count):
    """So many good pictures, that a few bad ones are below one in a hundred."""
    (root / "many").mkdir(parents=True)
    (root / "many/0.png").write_bytes(encoded(picture(8, 8), ".png"))
    for n in range(1, count):
        os.link(root / "many/0.png", root / f"many/{n}.png")


def write_tar(path, members):
    """members: (name or TarInfo, bytes)."""
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_folder_is_read_to_any_depth(folder):
    source = open_source(folder)
    assert source.kind == "pictures"
    assert [source.ids(n) for n in range(len(source))] == NAMES
    assert source.sizes.tolist() == [[20 + place, 40] for place in range(len(NAMES))]
    assert source.sizes.dtype == np.int32
    assert not source.refused
    for n, name in enumerate(NAMES):
        sample = source.read(n, (16, 16))
        assert sample.keys() == {"pictures"}
        assert torch.equal(sample["pictures"], decode((folder / name).read_bytes(), name, (16, 16)))
    with pytest.raises(IndexError, match="index must be 0 to 5, got 6"):
        source.ids(6)
    same = open_source(folder, workers=1)
    assert same.fingerprint == source.fingerprint
    (folder / "a.png").write_bytes(encoded(picture(21, 40), ".png"))
    assert open_source(folder).fingerprint != source.fingerprint


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".avif"])
def test_sizes_are_those_of_the_picture_upright(tmp_path, suffix):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}{suffix}"
        path.write_bytes(encoded(picture(10, 30), suffix, exif=exif.tobytes()))
    source = open_source(tmp_path)
    for n in range(8):
        upright = load_image(tmp_path / source.ids(n))
        assert source.sizes[n].tolist() == [upright.height, upright.width]
    assert {tuple(size) for size in source.sizes.tolist()} == {(10, 30), (30, 10)}


def test_the_middle_is_what_a_crop_keeps():
    column = np.arange(90, dtype=np.uint8)[None, :, None].repeat(30, 0).repeat(3, 2)
    wide = encoded(Image.fromarray(column), ".png")
    cut = decode(wide, "a.png", (30, 30))
    assert (cut.dtype, cut.shape) == (torch.uint8, (3, 30, 30))
    assert cut.is_contiguous()
    assert torch.equal(cut[0, 0], torch.arange(30, 60, dtype=torch.uint8))
    high = encoded(Image.fromarray(column.transpose(1, 0, 2)), ".png")
    assert torch.equal(decode(high, "a.png", (30, 30)), cut.mT)
    half = decode(wide, "a.png", (15, 20)).float()[1, 7]
    assert half[8:12].tolist() == pytest.approx([42, 44, 46, 48], abs=1)
    assert torch.equal(decode(wide, "a.png", (30, 90)).mT[1], torch.from_numpy(column[:, :, 0]).mT)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(orientation):
    large = picture(1024, 768)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode(encoded(large, ".jpg", quality=95, exif=exif.tobytes()), "a.jpg", (48, 64))
    # a lossless picture is not decoded small
    same = decode(encoded(large, ".png", exif=exif.tobytes()), "a.png", (48, 64))
    assert (got.int() - same.int()).abs().max() <= 6
    assert same.float().std() > 20


def test_what_is_unfit_is_refused_by_name_and_nothing_is_decoded(tmp_path):
    root = tmp_path / "pictures"
    many(root, 1400)
    (tmp_path / "outside").mkdir()
    secret = tmp_path / "outside/secret.png"
    secret.write_bytes(encoded(picture(8, 8), ".png"))
    (root / "empty.jpg").write_bytes(b"")
    (root / "lies.jpg").write_bytes(encoded(picture(8, 8), ".png"))
    (root / "gif.webp").write_bytes(encoded(picture(8, 8), ".gif"))
    (root / "bomb.png").write_bytes(png(40_000, 40_000))
    (root / "flat.png").write_bytes(png(0, 40))
    (root / "torn.png").write_bytes(encoded(picture(8, 8), ".png")[:20])
    (root / "noise.jpg").write_bytes(os.urandom(100))
    os.mkfifo(root / "pipe.png")
    os.symlink(secret, root / "out.png")
    os.symlink(tmp_path / "outside", root / "away")
    os.symlink(root / "many/0.png", root / "in.png")
    os.symlink(root / "many", root / "twice")
    os.symlink(root / "loop.png", root / "loop.png")
    (root / os.fsdecode(b"\xff.png")).write_bytes(encoded(picture(8, 8), ".png"))
    source = open_source(root)
    assert len(source) == 1401
    assert "in.png" in {source.ids(n) for n in range(len(source))}
    reasons = {
        "empty.jpg": "has 0",
        "lies.jpg": "is PNG by its content and .jpg by its name",
        "gif.webp": "has no whole header of JPEG, PNG, WEBP, AVIF",
        "bomb.png": "at most 178,956,970 pixels",
        "flat.png": "has no whole header",
        "torn.png": "has a damaged header",
        "noise.jpg": "has no whole header",
        "pipe.png": "is no file",
        "out.png": "is a link out of the folder",
        "away": "is a link out of the folder",
        "loop.png": "cannot be read",
        "\\xff.png": "not UTF-8",
    }
    assert source.refused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, source.refused[name])


def test_too_many_unfit_ones_stop_with_the_first_of_them(tmp_path):
    many(tmp_path, 100)
    (tmp_path / "bad00.png").write_bytes(b"")
    assert len(open_source(tmp_path).refused) == 1
    for n in range(1, 25):
        (tmp_path / f"bad{n:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="at most 1 % of unfit pictures, got 25 of 125") as error:
        open_source(tmp_path, tmp_path / "kept")
    assert "  bad19.png: must have 1 to" in str(error.value)
    assert "bad20.png" not in str(error.value)
    assert str(error.value).endswith("and 5 more")
    assert not (tmp_path / "kept").exists()


def test_a_folder_without_pictures_is_named(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"data must hold pictures \(.jpg.*got .*empty without"):
        open_source(empty)
    with pytest.raises(FileNotFoundError, match=r"data must be a folder, got .*none"):
        open_source(tmp_path / "none")
    with pytest.raises(NotADirectoryError, match="data must be a folder, got the file"):
        open_source(folder / "a.png")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        open_source(folder, workers=0)
    write_tar(folder / "x.tar", [])
    with pytest.raises(ValueError, match=r"data must hold pictures or tars, .* 6 pictures and 1"):
        open_source(folder)


def test_metadata_chooses_and_may_spare_the_headers(folder):
    rows = [
        {"file_name": "./b/c.jpg", "text": "a caption"},
        {"file_name": "a.png", "width": 7, "height": 5},
    ]
    listed = folder / "metadata.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_source(folder)
    assert [source.ids(n) for n in range(len(source))] == ["a.png", "b/c.jpg"]
    assert source.sizes.tolist() == [[5, 7], [21, 40]]
    for line, message in (
        ("[1]", 'line 3: must be an object with "file_name", got .1'),
        ("{", "line 3: "),
        ('{"file_name": "b/c.jpg"}', "line 3: b/c.jpg comes twice"),
        ('{"file_name": "h.avif", "width": 7}', "line 3: height and width .* got None and 7"),
        ('{"file_name": "h.avif", "width": 7, "height": 0}', "line 3: height and width"),
        ('{"file_name": "\\u0000.png"}', "line 3: file_name must be the name of a file"),
        ('{"file_name": "\\ud800.png"}', "line 3: "),
    ):
        listed.write_text("\n".join([*map(json.dumps, rows), line]))
        with pytest.raises(ValueError, match=message):
            open_source(folder)


def test_metadata_that_names_what_is_not_there_or_not_inside_is_refused(tmp_path):
    root = tmp_path / "root"
    many(root, 500)
    names = [f"many/{n}.png" for n in range(500)]
    odd = {
        "../root/many/0.png": "leads out of the folder",
        str(root / "many/0.png"): "leads out of the folder",
        "gone.png": "cannot be read",
        "a.gif": "must be one of .jpg",
        "many/../../x.png": "leads out of the folder",
    }
    rows = [{"file_name": name} for name in [*names, *odd]]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(root)
    assert len(source) == 500
    assert source.refused.keys() == odd.keys()
    assert all(source.refused[name].startswith(reason) for name, reason in odd.items())


def test_what_was_found_is_kept_until_a_file_changes(folder, tmp_path):
    cache, path = tmp_path / "index.safetensors", folder / "a.png"
    first = open_source(folder, cache)
    times = path.stat()
    other = encoded(picture(30, 40), ".png")
    # another picture of the same length and time: seen only if a header is read
    length = times.st_size
    path.write_bytes(other[:length].ljust(length, b"\0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    kept = open_source(folder, cache)
    assert kept.sizes.tolist() == first.sizes.tolist()
    assert kept.fingerprint == first.fingerprint
    assert [kept.ids(n) for n in range(6)] == NAMES
    data = bytearray(cache.read_bytes())
    for place in (3, len(data) // 2, len(data) - 3):
        flipped = data.copy()
        flipped[place] ^= 4
        cache.write_bytes(flipped)
        assert open_source(folder, cache).sizes[0].tolist() == [30, 40]
    cache.write_bytes(data[:-50])
    assert open_source(folder, cache).sizes[0].tolist() == [30, 40]
    os.utime(path, ns=(0, 0))
    path.write_bytes(encoded(picture(25, 40), ".png"))
    assert open_source(folder, cache).sizes[0].tolist() == [25, 40]
    (folder / "b/e/f.jpeg").unlink()
    assert len(open_source(folder, cache)) == 5
    elsewhere = tmp_path / "none/index.safetensors"
    assert len(open_source(folder, elsewhere)) == 5
    assert elsewhere.read_bytes() == cache.read_bytes()


def test_tars_are_read_in_place(folder, tmp_path):
    root = tmp_path / "tars"
    (root / "more").mkdir(parents=True)
    data = {name: (folder / name).read_bytes() for name in NAMES}
    beside = [("./", b""), ("a.json", b"{}"), ("a.txt", b"words"), ("a.mask.png", data["a.png"])]
    beside[0] = tarfile.TarInfo("./"), b""
    beside[0][0].type = tarfile.DIRTYPE
    write_tar(root / "0.tar", [*beside, *((f"./{name}", data[name]) for name in NAMES[:3])])
    write_tar(root / "more/1.tar", [(name, data[name]) for name in NAMES[3:]])
    before = sorted(p for p in tmp_path.rglob("*"))
    source = open_source(root)
    ids = [source.ids(n) for n in range(len(source))]
    assert ids == [f"0.tar/{n}" for n in NAMES[:3]] + [f"more/1.tar/{n}" for n in NAMES[3:]]
    plain = open_source(folder)
    assert source.sizes.tolist() == plain.sizes.tolist()
    for n in range(6):
        assert torch.equal(
            source.read(n, (16, 24))["pictures"], plain.read(n, (16, 24))["pictures"]
        )
    assert sorted(p for p in tmp_path.rglob("*")) == before
    cache = tmp_path / "index.safetensors"
    kept = [open_source(root, cache), open_source(root, cache)]
    assert [k.fingerprint for k in kept] == [source.fingerprint] * 2
    assert [kept[1].ids(n) for n in range(6)] == ids
    # the tar is cut after it was indexed
    tar = root / "0.tar"
    tar.write_bytes(tar.read_bytes()[: source.index.spans[2, 1] + 10])
    with pytest.raises(ValueError, match=r"0.tar ends .* bytes too early"):
        source.read(2, (16, 16))


def test_tricks_in_tars_are_refused(tmp_path):
    good = encoded(picture(8, 8), ".png")
    kinds = {
        "link.png": tarfile.SYMTYPE,
        "hard.png": tarfile.LNKTYPE,
        "null.png": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    special = []
    for name, kind in kinds.items():
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        special.append((info, b""))
    tricks = [
        ("/tmp/abs.png", good),
        ("../up.png", good),
        ("a/../../b.png", good),
        ("/etc/passwd", b"root"),
        ("empty.png", b""),
        ("lies.jpg", good),
        ("bomb.png", png(40_000, 40_000)),
        ("0.png", good),
        *special,
    ]
    write_tar(tmp_path / "a.tar", [*((f"{n}.png", good) for n in range(1500)), *tricks])
    source = open_source(tmp_path)
    assert len(source) == 1500
    assert source.refused.keys() == {
        f"a.tar/{name.name if isinstance(name, tarfile.TarInfo) else name}" for name, _ in tricks
    }
    assert "leads out" in source.refused["a.tar//tmp/abs.png"]
    assert "comes twice" in source.refused["a.tar/0.png"]
    assert "is no plain file" in source.refused["a.tar/null.png"]
    assert "is PNG by its content" in source.refused["a.tar/lies.jpg"]


def test_a_damaged_tar_keeps_what_lies_before_and_is_named(tmp_path):
    good = encoded(picture(8, 8), ".png")
    members = [(f"{n}.png", good) for n in range(10)]
    write_tar(tmp_path / "bad.tar", members)
    whole = (tmp_path / "bad.tar").read_bytes()
    for n in range(100):
        write_tar(tmp_path / f"{n}.tar", members)
    block = 512 + -(-len(good) // 512) * 512  # of a member
    header = bytearray(whole)
    header[5 * block + 20] ^= 1
    long = bytearray(whole)
    info = tarfile.TarInfo("9.png")
    info.size = 10**7
    long[9 * block : 9 * block + 512] = info.tobuf()
    negative = bytearray(whole)
    info.size = -block
    negative[9 * block : 9 * block + 512] = info.tobuf(tarfile.GNU_FORMAT)
    for data, kept, reason in (
        (whole[: 5 * block + 512 + 9], 5, "5.png is longer than the file"),
        (whole[: 5 * block + 100], 5, "no header at byte"),
        (header, 5, "no header at byte"),
        (long, 9, "9.png is longer than the file"),
        (negative, 9, "9.png has a length below 0"),
        (zlib.compress(whole), 0, "no tar without compression"),
        (b"", 0, "no tar without compression"),
    ):
        (tmp_path / "bad.tar").write_bytes(data)
        source = open_source(tmp_path)
        assert len(source) == 1000 + kept
        assert source.refused.keys() == {"bad.tar"}
        assert re.search(reason, source.refused["bad.tar"])
    for n in range(2):
        (tmp_path / f"{n}.tar").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"at most 1 % .*got 3 of 983 .*, 3 of 101 tars among them"
    ):
        open_source(tmp_path)
