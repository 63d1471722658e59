"""Every kind of picture, as other programs write and read it, and every kind of folder."""
import numpy as np
import pytest
import torch
from PIL import Image

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


def test_decompression_bomb_is_a_bad_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(gradient()).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="bomb.png"):
        photos.read_photo(tmp_path / "bomb.png", 32)


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
