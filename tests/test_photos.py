"""Every kind of picture, as other programs write and read it, and every kind of folder."""
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, PngImagePlugin
from scipy.ndimage import gaussian_filter

from common import gradient
from support import photos
from support.cli import UserError


def read(path, size=64):
    """The photo as an int array (size, size, 3)."""
    image = photos.read_photo(path, size)
    assert image.shape == (3, size, size) and image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("name, slack", [("a.png", 0), ("a.bmp", 0), ("a.jpg", 12), ("a.jpeg", 12),
                                         ("a.webp", 12), ("a.JPG", 12), ("a.PNG", 0)])
def test_every_suffix_is_found_and_read(tmp_path, name, slack):
    Image.fromarray(gradient()).save(tmp_path / name)
    assert [path.name for path in photos.find_photos(tmp_path)] == [name]
    assert abs(read(tmp_path / name) - gradient()).max() <= slack


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_upright_photo(tmp_path, orientation):
    # Stored = what the camera writes, so that the tag's operation brings the upright photo back.
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}[orientation]
    upright = Image.fromarray(gradient(64, 96)).convert("P", palette=Image.Palette.ADAPTIVE)
    upright.convert("RGB").save(tmp_path / "upright.png")
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "stored.png", exif=exif)     # a palette: convert() comes after the turn
    assert abs(read(tmp_path / "stored.png") - read(tmp_path / "upright.png")).max() == 0


def test_grey_palette_and_cmyk(tmp_path):
    rgb = Image.fromarray(gradient())
    rgb.convert("L").save(tmp_path / "grey.png")
    assert abs(read(tmp_path / "grey.png") - np.array(rgb.convert("L"))[..., None]).max() == 0
    rgb.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    assert abs(read(tmp_path / "palette.png") - gradient()).mean() < 12
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert abs(read(tmp_path / "cmyk.jpg") - gradient()).max() <= 24


def test_transparency_is_laid_on_white(tmp_path):
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:, :32], alpha[:, 32:40] = 0, 128
    rgba = np.dstack([np.full((64, 64, 3), 40, np.uint8), alpha])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    palette = Image.fromarray((alpha > 0).astype(np.uint8), "L").convert("P")
    palette.putpalette([0, 0, 0, 40, 40, 40])
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba", "la", "palette"):
        photo = read(tmp_path / f"{name}.png")
        assert (photo[:, :32] == 255).all() and (photo[:, 40:] == 40).all()
        if name != "palette":       # half-transparent: between the photo and white
            assert abs(photo[:, 32:40] - (255 + 40) / 2).max() <= 1


def test_16_bit_grey_keeps_its_values(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert abs(read(tmp_path / "grey.png") - (grey / 257)[..., None]).max() <= 1


def test_a_transparent_16_bit_grey_is_refused(tmp_path):
    """Pillow cannot write such a PNG: its chunk is put in by hand."""
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(grey).save(tmp_path / "a.png")
    png, key = (tmp_path / "a.png").read_bytes(), b"tRNS" + struct.pack(">H", grey[9, 9])
    before = png.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(png[:before] + struct.pack(">I", 2) + key
                                     + struct.pack(">I", zlib.crc32(key)) + png[before:])
    with pytest.raises(UserError, match="16 bits with transparency"):
        read(tmp_path / "a.png")


WEDGE = np.linspace(0, 1, 64 * 64).reshape(64, 64)       # every grey from black to white


@pytest.mark.parametrize("top, kind, white", [
    (255, "<u1", "minisblack"), (255, "<u1", "miniswhite"), (65535, "<u2", "minisblack"),
    (65535, "<u2", "miniswhite"), (65535, ">u2", "minisblack"), (1, bool, "minisblack"),
    (1, bool, "miniswhite")])
def test_grey_tiffs_of_another_program_are_shown_as_they_are(tmp_path, top, kind, white):
    grey = np.round(WEDGE * top)
    stored = grey if white == "minisblack" else top - grey
    tifffile.imwrite(tmp_path / "a.tif", stored.astype(kind), photometric=white,
                     byteorder=">" if kind == ">u2" else "<")
    assert abs(read(tmp_path / "a.tif") - (grey / top * 255)[..., None]).max() <= .501


def test_12_bits_are_not_read_as_16(tmp_path):
    """A TIFF by hand, because tifffile needs a further package: two numbers in three bytes."""
    a, b = (np.round(WEDGE * 4095).astype(int).reshape(-1, 2)).T
    bits = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    tags = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64),
            (279, len(bits))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(bits)) + bits
                                     + struct.pack("<H", len(tags)) + directory + bytes(4))
    assert abs(read(tmp_path / "a.tif") - WEDGE[..., None] * 255).max() <= 1


@pytest.mark.parametrize("top, kind", [(1, "f4"), (127, "i1"), (32767, "i2"), (2 ** 31 - 1, "i4"),
                                       (2 ** 32 - 1, "u4"), (1, "f2"), (1, "f8"), (2 ** 63, "u8")])
@pytest.mark.parametrize("white", ["minisblack", "miniswhite"])
def test_numbers_without_a_known_white_are_refused(tmp_path, top, kind, white):
    tifffile.imwrite(tmp_path / "a.tif", (WEDGE * top).astype(kind), photometric=white)
    with pytest.raises(UserError, match="a.tif: cannot be read as a photo .(signed|cannot ident)"):
        read(tmp_path / "a.tif")


def test_grey_maps_of_16_bits_are_read_and_those_of_fractions_refused(tmp_path):
    for top in (4095, 65535):
        (tmp_path / "a.pgm").write_bytes(b"P5 64 64 %d\n" % top
                                         + np.round(WEDGE * top).astype(">u2").tobytes())
        assert abs(read(tmp_path / "a.pgm") - WEDGE[..., None] * 255).max() <= 1
    (tmp_path / "a.pfm").write_bytes(b"Pf\n64 64\n-1.0\n" + WEDGE.astype("<f4").tobytes())
    with pytest.raises(UserError, match="fractional"):
        read(tmp_path / "a.pfm")


# ---- colours ----

GAMMA = 2.19921875      # 2.2 as a profile stores it, in 1 / 256
# The colours' XYZ under D50: of sRGB by IEC 61966-2-1 and of Display P3, both adapted by Bradford.
SRGB = [[.43607, .38515, .14307], [.22249, .71687, .06061], [.01392, .09708, .71410]]
P3 = [[.51512, .29198, .15710], [.24120, .69225, .06657], [-.00105, .04189, .78407]]


def profile(space: bytes, matrix=None, gamma=GAMMA) -> bytes:
    """An ICC profile (version 2) of these primaries, or of grey, by the specification."""
    def fixed(*values):
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"t\0" + bytes(80),
            b"cprt": b"text" + bytes(4) + b"none\0\0\0\0",
            b"wtpt": b"XYZ " + bytes(4) + fixed(.9642, 1, .8249)}
    if matrix is None:
        tags[b"kTRC"] = curve
    else:
        for i, c in enumerate(b"rgb"):
            tags[bytes([c]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*np.array(matrix)[:, i])
            tags[bytes([c]) + b"TRC"] = curve
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, b"mntr", space,
                       b"XYZ ", b"acsp") + fixed(.9642, 1, .8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def encoded(linear):
    """sRGB's curve, IEC 61966-2-1: [0, 1] to 0 .. 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= .0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - .055)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_a_profile_of_other_primaries_is_converted(tmp_path, name):
    colours = 60 + gradient() * .5              # inside sRGB after the conversion
    stored = Image.fromarray(colours.astype(np.uint8))
    stored.save(tmp_path / name, icc_profile=profile(b"RGB ", P3), lossless=True)
    linear = (np.asarray(stored) / 255) ** GAMMA
    want = encoded(linear @ np.array(P3).T @ np.linalg.inv(SRGB).T)
    assert abs(want - np.asarray(stored)).max() > 10        # else nothing is tested
    assert abs(read(tmp_path / name) - want).max() <= 2


def test_grey_and_transparency_with_profiles(tmp_path):
    grey = Image.fromarray((40 + WEDGE * 200).astype(np.uint8))
    want = encoded((np.asarray(grey) / 255) ** 1.5)[..., None]
    grey.save(tmp_path / "a.png", icc_profile=profile(b"GRAY", gamma=1.5))
    assert abs(read(tmp_path / "a.png") - want).max() <= 2
    grey.convert("LA").save(tmp_path / "b.png", icc_profile=profile(b"GRAY", gamma=1.5))
    assert abs(read(tmp_path / "b.png") - want).max() <= 2
    want = encoded((np.asarray(grey) / 255) ** GAMMA)[..., None]
    grey.save(tmp_path / "c.png", icc_profile=profile(b"RGB ", P3))     # P3's greys are grey
    assert abs(read(tmp_path / "c.png") - want).max() <= 2
    clear = Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    clear.save(tmp_path / "d.png", icc_profile=profile(b"RGB ", P3))
    assert (read(tmp_path / "d.png") >= 254).all()


@pytest.mark.parametrize("icc", [b"damaged", profile(b"RGB ", P3)[:200], profile(b"GRAY")])
def test_a_damaged_profile_or_one_for_other_pictures_is_refused(tmp_path, icc):
    Image.fromarray(gradient()).save(tmp_path / "a.png", icc_profile=icc)
    with pytest.raises(UserError, match="a.png: cannot be read as a photo"):
        read(tmp_path / "a.png")


# ---- shapes and sizes ----

def test_centre_square_is_cut_out(tmp_path):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = gradient()
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert abs(read(tmp_path / "wide.png") - gradient()).max() == 0
    assert abs(read(tmp_path / "tall.png") - gradient().transpose(1, 0, 2)).max() == 0


def test_shrinking_does_not_alias(tmp_path):
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    assert abs(read(tmp_path / "board.png", 32) - 127.5).max() <= 3


def test_bad_files_are_named(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, content in [("text.png", b"no picture"), ("empty.jpg", b""),
                          ("truncated.png", whole[:len(whole) // 2])]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            photos.read_photo(tmp_path / name, 32)
    with pytest.raises(UserError, match="missing.png"):
        photos.read_photo(tmp_path / "missing.png", 32)


def test_a_huge_picture_is_refused_and_a_huge_jpeg_read_small(tmp_path):
    """Without a warning, above twice the limit that Pillow has by itself as well."""
    huge = Image.new("L", (13500, 13500), 99)
    huge.save(tmp_path / "a.jpg")
    huge.crop((0, 0, 9000, 9000)).save(tmp_path / "a.png")
    with warnings.catch_warnings(action="error"):
        assert abs(read(tmp_path / "a.jpg", 16) - 99).max() <= 1
        with pytest.raises(UserError, match="64,000,000 pixels"):
            read(tmp_path / "a.png", 16)


@pytest.mark.parametrize("size", [16, 40])
def test_a_jpeg_that_is_decoded_small_is_that_of_the_whole(tmp_path, size):
    """The same pixels in a PNG are all decoded: noise of every frequency, grey, in the middle."""
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((512, 768)), 2)
    noise = (127 + 40 * noise / noise.std()).clip(0, 255).round().astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=98)
    Image.fromarray(noise).save(tmp_path / "a.png")
    small, whole = read(tmp_path / "a.jpg", size), read(tmp_path / "a.png", size)
    assert ((small - whole) ** 2).mean() ** .5 < 1 and whole.std() > 4


def test_long_texts_in_a_png_are_no_matter(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.fromarray(gradient()).save(tmp_path / "a.png", pnginfo=text)
    assert abs(read(tmp_path / "a.png") - gradient()).max() == 0


def test_too_small_a_memory_is_no_bad_photo(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    monkeypatch.setattr(photos.ImageOps, "fit", full)
    with pytest.raises(MemoryError):
        read(tmp_path / "a.png")


# ---- folders ----

def test_folders(tmp_path):
    with pytest.raises(UserError, match="--data .*nowhere: no such folder"):
        photos.find_photos(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="no photo"):
        photos.find_photos(tmp_path)
    for name in ["b.png", "a/z.png", "a/.hidden/x.png", "._b.png", "C.png", "a.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16)).save(tmp_path / name)
    found = [path.relative_to(tmp_path).as_posix() for path in photos.find_photos(tmp_path)]
    assert found == ["C.png", "a.png", "a/z.png", "b.png"]


def test_links_are_followed_once(tmp_path):
    for name in ("all/a.png", "all/deep/b.png", "else/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16)).save(tmp_path / name)
    links = {"all/link": "else", "all/deep/back": "all", "all/deep/twice": "else",
             "all/e.png": "else/c.png"}
    for name, to in links.items():
        (tmp_path / name).symlink_to(tmp_path / to)
    found = [path.relative_to(tmp_path / "all").as_posix()
             for path in photos.find_photos(tmp_path / "all")]
    assert found == ["a.png", "deep/b.png", "deep/twice/c.png", "e.png"]
    assert len(photos.find_photos(tmp_path / "all", but=tmp_path / "else")) == 3


def test_what_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")            # would be waited for
    found = photos.find_photos(tmp_path)
    assert [path.name for path in found] == ["a.png", "gone.png"]
    with pytest.raises(UserError, match="gone.png: cannot be read"):
        photos.read_photo(found[1], 16)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="closed: cannot be searched .Permission denied"):
        photos.find_photos(tmp_path)
